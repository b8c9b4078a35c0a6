"""The pretraining corpus: what generator and verifier say, errors included, as batches of tokens.

Batches are a function of (seed, step) alone, so a run that resumes reads what it would have read.
A row is one problem, its solution and its verification. In three batches of eight a critique of the
verification and a merge of the two follow, and in one the verifier was shown the reference: so the
base can do all that stage I asks for.
"""

from __future__ import annotations

import random
from typing import Literal

import numpy as np

from spark_jax.tasks.arithmetic_chains import format as chain_format
from spark_jax.tasks.arithmetic_chains import world
from spark_jax.tasks.arithmetic_chains.world import EOS, MAX_STEPS

PROBLEM_LENGTH = 13  # tokens, all of these at most: `<q> 7`, five numbered operations, `<a>`
SOLUTION_LENGTH = 6 * MAX_STEPS + 2 + 2 * 5 + 1  # six steps, two answers, the end
VERIFICATION_LENGTH = 5 * MAX_STEPS + 3
CRITIQUE_LENGTH = 5 * MAX_STEPS + 1
RowKind = Literal["plain", "guided", "criticised"]
CYCLE: tuple[RowKind, ...] = (*("plain", "criticised") * 3, "plain", "guided")
_PLAIN = PROBLEM_LENGTH + SOLUTION_LENGTH + 1 + VERIFICATION_LENGTH
ROW_LENGTHS: dict[RowKind, int] = {
    "plain": _PLAIN,  # 96
    "guided": _PLAIN + 3,
    "criticised": _PLAIN + 1 + CRITIQUE_LENGTH + 1 + VERIFICATION_LENGTH,  # 162
}

_INDEX = {word: index for index, word in enumerate(world.VOCABULARY)}


def pretraining_batch(
    seed: int, step: int, batch_size: int, *, cycle: tuple[RowKind, ...] = CYCLE
) -> dict[str, np.ndarray]:
    """Batch `step` of the corpus: problems of the train split, each with texts of its own.

    Args:
        seed: of the whole corpus.
        step: which batch, from 0.
        batch_size: rows B, all of the kind `cycle[step % len(cycle)]`.

    Returns:
        `tokens` int32 [B, T], right-padded; `mask` bool [B, T], true on real tokens; `loss_mask`
        bool [B, T], true on the tokens to be predicted: solution, verification, critique and merge,
        the end of each included. T is the kind's in `ROW_LENGTHS`.
    """
    rng = random.Random(f"arithmetic_chains corpus {seed} {step}")
    kind = cycle[step % len(cycle)]
    length = ROW_LENGTHS[kind]
    tokens = np.full((batch_size, length), _INDEX[world.PAD], np.int32)
    mask = np.zeros((batch_size, length), bool)
    loss_mask = np.zeros((batch_size, length), bool)
    for row in range(batch_size):
        end = 0
        for prompt, target in _row(kind, rng):
            for text, is_target in ((prompt, False), (f"{target} {EOS}", True)):
                ids = [_INDEX[word] for word in text.split()]
                tokens[row, end : end + len(ids)] = ids
                loss_mask[row, end : end + len(ids)] = is_target
                end += len(ids)
        mask[row, :end] = True
    return {"tokens": tokens, "mask": mask, "loss_mask": loss_mask}


Exchange = tuple[str, str]  # a prompt, which continues the row so far, and what is to be said


def _row(kind: RowKind, rng: random.Random) -> list[Exchange]:
    chain = world.draw_chain(rng, "train")
    problem = world.as_problem(chain)
    solution = world.noisy_solution(chain, rng)
    solve = (chain_format.solve_prompt(problem), solution)
    if kind == "guided":
        verification = world.noisy_verification(problem, solution, rng, reference=problem.answer)
        prompt = chain_format.verify_prompt(problem, solution, problem.answer)
        return [solve, (prompt.rpartition(f" {EOS} ")[2], verification)]
    verification = world.noisy_verification(problem, solution, rng)
    verify = (world.VERIFY, verification)
    if kind == "plain":
        return [solve, verify]
    critique = world.noisy_critique(problem, solution, verification, rng)
    merged = world.merged_verification(problem, solution, critique, rng)
    return [solve, verify, (world.CRITIQUE, critique), (world.MERGE, merged)]
