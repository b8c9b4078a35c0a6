"""The pretraining corpus: batches, masks, and that rows are what the prompts will say."""

from __future__ import annotations

import numpy as np
import pytest

from spark_jax.data.records import Problem, Verification
from spark_jax.tasks.arithmetic_chains import corpus, world
from spark_jax.tasks.arithmetic_chains.format import FORMAT

WORDS = np.array(world.VOCABULARY)


def sections(batch: dict[str, np.ndarray], row: int) -> list[tuple[str, str]]:
    """(prompt so far, target) for each stretch of loss in a row."""
    words = WORDS[batch["tokens"][row]]
    loss = batch["loss_mask"][row].astype(int)
    edges = np.flatnonzero(np.diff(loss, prepend=0, append=0)).reshape(-1, 2)
    return [(" ".join(words[:start]), " ".join(words[start:end])) for start, end in edges]


def test_a_batch_is_a_function_of_seed_and_step_alone():
    first = [corpus.pretraining_batch(0, step, 4) for step in range(6)]
    for step in (5, 3, 0):
        again = corpus.pretraining_batch(0, step, 4)
        assert all(np.array_equal(again[name], first[step][name]) for name in again)
    assert not np.array_equal(first[0]["tokens"], first[1]["tokens"])
    assert not np.array_equal(first[0]["tokens"], corpus.pretraining_batch(1, 0, 4)["tokens"])


@pytest.mark.parametrize("kind", ["plain", "guided", "criticised"])
def test_masks_cover_what_is_said_and_padding_is_only_at_the_end(kind):
    batch = corpus.pretraining_batch(0, 0, 64, cycle=(kind,))
    length = corpus.ROW_LENGTHS[kind]
    tokens, mask, loss_mask = batch["tokens"], batch["mask"], batch["loss_mask"]
    assert tokens.shape == mask.shape == loss_mask.shape == (64, length)
    assert tokens.dtype == np.int32
    assert mask.dtype == loss_mask.dtype == bool
    assert np.array_equal(mask, tokens != world.VOCABULARY.index(world.PAD))
    assert np.array_equal(mask, np.arange(length) < mask.sum(1)[:, None])
    assert not np.any(loss_mask & ~mask)
    for row in range(64):
        assert all(target.split()[-1] == world.EOS for _, target in sections(batch, row))
        assert WORDS[tokens[row]][loss_mask[row]].tolist().count(world.EOS) == tokens[
            row
        ].tolist().count(world.VOCABULARY.index(world.EOS))


def test_kinds_of_batches_come_in_turn():
    lengths = [corpus.pretraining_batch(0, i, 2)["tokens"].shape[1] for i in range(16)]
    assert lengths == 2 * [96, 162, 96, 162, 96, 162, 96, 99]


def test_every_row_is_prompts_of_the_format_and_their_answers():
    """What the base is asked at run time is, word for word, what it has read."""
    kinds = set()
    for step in range(8):
        batch = corpus.pretraining_batch(5, step, 32)
        for row in range(32):
            said = sections(batch, row)
            question = said[0][0].removeprefix("<q> ").removesuffix(" <a>")
            problem = Problem("p", question, str(world.true_answer(world.read_question(question))))
            assert world.split_of(world.read_question(question)) == "train"
            targets = [target.removesuffix(" <eos>") for _, target in said]
            num_steps = len(FORMAT.split_steps(targets[0]))
            reference = problem.answer if world.REFERENCE in said[1][0] else None
            prompts = [
                FORMAT.solve_prompt(problem),
                FORMAT.verify_prompt(problem, targets[0], reference),
            ]
            if len(said) == 4:
                prompts.append(FORMAT.critique_prompt(problem, *targets[:2]))
                prompts.append(FORMAT.merge_prompt(problem, *targets[:3]))
                merged = FORMAT.parse_verification(targets[3], num_steps)
                assert isinstance(merged, Verification)
            assert [prompt for prompt, _ in said] == prompts
            assert isinstance(FORMAT.parse_verification(targets[1], num_steps), Verification)
            kinds.add((len(said), reference is not None))
    assert kinds == {(2, False), (2, True), (4, False)}


def test_the_longest_row_fits():
    chain = world.Chain(7, ("+5",) * 5)
    assert len(FORMAT.solve_prompt(world.as_problem(chain)).split()) == corpus.PROBLEM_LENGTH
    steps = [world.Step(7, "+5", 2)] * world.MAX_STEPS
    text = world.write_solution(steps, [1, 2])
    assert len(text.split()) + 1 == corpus.SOLUTION_LENGTH
    lines = [world.VerifiedStep(step, True) for step in steps]
    assert len(world.write_verification(lines, True).split()) + 1 == corpus.VERIFICATION_LENGTH
    for kind, length in corpus.ROW_LENGTHS.items():
        longest = max(corpus.pretraining_batch(9, 0, 500, cycle=(kind,))["mask"].sum(1))
        assert length - 10 <= longest <= length
