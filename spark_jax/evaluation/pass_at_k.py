"""Accuracy from several samples a problem: avg@k, pass@k, maj@k.

Each function gives one number per problem, so that intervals over problems can be taken; the figure
that is reported is the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64

from spark_jax.data.formats import SameAnswer
from spark_jax.evaluation.grading import in_threads


def avg_at_k(correct: Bool[np.ndarray, "P k"]) -> Float64[np.ndarray, "P"]:
    """Share of each problem's k samples that are correct."""
    _need_samples(correct)
    return correct.mean(axis=1)


def pass_at_k(correct: Bool[np.ndarray, "P n"], k: int) -> Float64[np.ndarray, "P"]:
    """Unbiased estimate, from n ≥ k samples, of the chance that one of k is correct.

    1 − C(n−c, k) / C(n, k) for c correct ones (Chen et al., arXiv 2107.03374, equation 1), as a
    product, which does not overflow. Raises ValueError unless 1 ≤ k ≤ n.
    """
    _need_samples(correct)
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n, but there are n={n} samples a problem")
    wrong = n - correct.sum(axis=1)
    drawn = np.arange(k)  # the chance that draw i is wrong too is (wrong - i) / (n - i)
    return 1.0 - np.prod(np.maximum(wrong[:, None] - drawn, 0) / (n - drawn), axis=1)


def maj_at_k(
    answers: Sequence[Sequence[str | None]],
    references: Sequence[str],
    same_answer: SameAnswer,
) -> Float64[np.ndarray, "P"]:
    """1 where the majority of a problem's answers equals the reference, else 0.

    Ties go to the answer that appeared first; a problem nobody answered is wrong. `same_answer` is
    called from several threads. Raises ValueError if answers and references differ in number.
    """
    if len(answers) != len(references):
        raise ValueError(f"maj@k: answers to {len(answers)} problems, {len(references)} references")

    def grade(group: Sequence[str | None], reference: str) -> bool:
        return same_answer(majority_answer(group, same_answer), reference)

    return np.array(in_threads(grade, answers, references), np.float64)


def majority_answer(answers: Sequence[str | None], same_answer: SameAnswer) -> str | None:
    """The answer given most often, as its first giver wrote it; None if nobody answered.

    Answers that are the same as the first of a class belong to that class. A tie goes to the class
    that appeared first. None never wins.
    """
    classes: list[str] = []
    counts: list[int] = []
    for answer in answers:
        if answer is None:
            continue
        for i, first in enumerate(classes):
            if same_answer(answer, first):
                counts[i] += 1
                break
        else:
            classes.append(answer)
            counts.append(1)
    return classes[counts.index(max(counts))] if classes else None


def _need_samples(correct: Bool[np.ndarray, "P k"]) -> None:
    if not correct.shape[1]:
        raise ValueError(f"no samples: correct has shape {correct.shape}")
