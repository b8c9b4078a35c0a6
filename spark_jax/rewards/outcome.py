"""Rewards on the final answer alone: the baselines beside a reward model (method page, section 3).

Each takes a batch and gives r per response, 0 wherever the format is broken. Answers are read from
the valid part of a response. `rule_based` is the only reward that reads a problem's reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from spark_jax.evaluation.grading import in_threads
from spark_jax.evaluation.pass_at_k import majority_answer
from spark_jax.response_format import valid_part
from spark_jax.rewards.records import RewardInputs


def rule_based(batch: RewardInputs) -> Float32[np.ndarray, "B"]:
    """1 where the answer equals the reference: RLVR, the baseline that needs references.

    Raises ValueError naming a problem that has no reference.
    """
    references = [problem.answer for problem in batch.problems]
    if None in references:
        row = references.index(None)
        raise ValueError(
            f"the rule_based reward needs a reference answer, but problem "
            f"{batch.problems[row].id!r} (row {row}) has none; give it one or choose a reward "
            f"without references"
        )
    return _by_group(batch, references)


def majority_vote(batch: RewardInputs) -> Float32[np.ndarray, "B"]:
    """1 where the answer equals the group's majority answer (TTRL, arXiv 2504.16084).

    Our reading: responses that break the format do not vote.
    """
    return _by_group(batch, None)


def random(batch: RewardInputs) -> Float32[np.ndarray, "B"]:
    """1 with probability ½ where the format holds: a sanity check on any claimed improvement.

    The draw of a row depends on the seed and its position only, never on the texts.
    """
    draws = np.random.default_rng(batch.seed).random(len(batch.responses)) < 0.5
    return (draws & batch.format_ok).astype(np.float32)


def _by_group(
    batch: RewardInputs, references: Sequence[str | None] | None
) -> Float32[np.ndarray, "B"]:
    """1 where an answer equals its reference, or its group's majority without references.

    Groups are graded in threads: comparing answers of real text means waiting for a worker.
    """
    same_answer, size = batch.format.same_answer, batch.group_size
    answers = _answers(batch)

    def grade(start: int) -> list[bool]:
        group = answers[start : start + size]
        if references is None:
            right = [majority_answer(group, same_answer)] * len(group)
        else:
            right = list(references[start : start + size])
        return [same_answer(answer, other) for answer, other in zip(group, right, strict=True)]

    groups = in_threads(grade, range(0, len(answers), size))
    return np.array([same for group in groups for same in group], np.float32)


def _answers(batch: RewardInputs) -> list[str | None]:
    """The answer in each response's valid part; None where the format is broken."""
    return [
        batch.format.final_answer(valid_part(text)) if ok else None
        for text, ok in zip(batch.responses, batch.format_ok)
    ]
