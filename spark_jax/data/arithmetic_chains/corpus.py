"""The pretraining corpus: what generator and verifier say, errors included, as batches of tokens.

Batches are a function of (seed, step) alone, so a run that resumes reads what it would have read.
Most batches are plain: one problem, its solution and its verification in a row. Every few steps one
batch is long: its rows also show a reference to the verifier, or go on with a critique of the
verification and a merge of the two, so that the base can do all that stage I asks for.
"""

from __future__ import annotations

import random

import numpy as np

from spark_jax.data.arithmetic_chains import format as chain_format
from spark_jax.data.arithmetic_chains import world
from spark_jax.data.arithmetic_chains.world import EOS, MAX_STEPS

PROBLEM_LENGTH = 13  # tokens, all of these at most: `<q> 7`, five numbered operations, `<a>`
SOLUTION_LENGTH = 6 * MAX_STEPS + 2 + 2 * 5 + 1  # six steps, two answers, the end
VERIFICATION_LENGTH = 5 * MAX_STEPS + 3
CRITIQUE_LENGTH = 3 * MAX_STEPS + 1
PLAIN_LENGTH = PROBLEM_LENGTH + SOLUTION_LENGTH + 1 + VERIFICATION_LENGTH  # 96
LONG_LENGTH = PLAIN_LENGTH + 1 + CRITIQUE_LENGTH + 1 + VERIFICATION_LENGTH  # 150

_INDEX = {word: index for index, word in enumerate(world.VOCABULARY)}


def pretraining_batch(
    seed: int, step: int, batch_size: int, *, long_every: int = 4
) -> dict[str, np.ndarray]:
    """Batch `step` of the corpus: problems of the train split, each with texts of its own.

    Args:
        seed: of the whole corpus.
        step: which batch, from 0.
        batch_size: rows B.
        long_every: every this many steps the batch is long; 0 for never.

    Returns:
        `tokens` int32 [B, T], right-padded; `mask` bool [B, T], true on real tokens; `loss_mask`
        bool [B, T], true on the tokens to be predicted: solution, verification, critique and merge,
        the end of each included. T is `PLAIN_LENGTH`, or `LONG_LENGTH` in a long batch.
    """
    rng = random.Random(f"arithmetic_chains corpus {seed} {step}")
    long = long_every > 0 and step % long_every == long_every - 1
    length = LONG_LENGTH if long else PLAIN_LENGTH
    tokens = np.full((batch_size, length), _INDEX[world.PAD], np.int32)
    mask = np.zeros((batch_size, length), bool)
    loss_mask = np.zeros((batch_size, length), bool)
    for row in range(batch_size):
        end = 0
        for prompt, target in _long_row(rng) if long else _plain_row(rng):
            for text, is_target in ((prompt, False), (f"{target} {EOS}", True)):
                ids = [_INDEX[word] for word in text.split()]
                tokens[row, end : end + len(ids)] = ids
                loss_mask[row, end : end + len(ids)] = is_target
                end += len(ids)
        mask[row, :end] = True
    return {"tokens": tokens, "mask": mask, "loss_mask": loss_mask}


Exchange = tuple[str, str]  # a prompt, which continues the row so far, and what is to be said


def _plain_row(rng: random.Random) -> list[Exchange]:
    problem = world.as_problem(world.draw_chain(rng, "train"))
    solution = world.noisy_solution(world.read_question(problem.question), rng)
    verification = world.noisy_verification(problem, solution, rng)
    return [(chain_format.solve_prompt(problem), solution), (world.VERIFY, verification)]


def _long_row(rng: random.Random) -> list[Exchange]:
    """Half of the rows with a reference, half with a critique and a merge."""
    problem = world.as_problem(world.draw_chain(rng, "train"))
    solution = world.noisy_solution(world.read_question(problem.question), rng)
    solve = (chain_format.solve_prompt(problem), solution)
    if rng.random() < 0.5:
        verification = world.noisy_verification(problem, solution, rng, reference=problem.answer)
        return [solve, (f"{world.REFERENCE} {problem.answer} {world.VERIFY}", verification)]
    verification = world.noisy_verification(problem, solution, rng)
    critique = world.noisy_critique(problem, solution, verification, rng)
    merged = world.merged_verification(problem, solution, verification, critique, rng)
    verify, criticise = (world.VERIFY, verification), (world.CRITIQUE, critique)
    return [solve, verify, criticise, (world.MERGE, merged)]
