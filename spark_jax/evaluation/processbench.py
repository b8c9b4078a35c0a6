"""ProcessBench (arXiv 2412.06559): find the first erroneous step of a solution, if there is one.

A label or a prediction is the 0-based index of the first erroneous step, −1 if no step is wrong. A
prediction is None where the verifier gave nothing that could be read; it is then wrong, always.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NO_ERROR = -1


@dataclasses.dataclass(frozen=True)
class ProcessBenchSample:
    """One solution. `label`: its first erroneous step, −1 if none."""

    id: str
    problem: str
    steps: tuple[str, ...]
    label: int
    final_answer_correct: bool
    generator: str = ""


def score(predictions: Sequence[int | None], labels: Sequence[int]) -> dict[str, float]:
    """`error_acc`, `correct_acc` and `f1`, in [0, 1] (ProcessBench, section 3.2; method page, 2).

    `error_acc` is the share of the samples with an error for which exactly the first erroneous step
    was named, `correct_acc` the share of the samples without for which none was. `f1` is their
    harmonic mean, 0 where both are 0. An accuracy over no samples, and `f1` with it, is nan.

    Raises ValueError if predictions and labels differ in number or are below −1.
    """
    if len(predictions) != len(labels):
        raise ValueError(f"score: {len(predictions)} predictions for {len(labels)} labels")
    for name, values in (("prediction", predictions), ("label", labels)):
        for i, value in enumerate(values):
            if value is not None and value < NO_ERROR:
                raise ValueError(
                    f"{name} {i} is {value}; it must be a step's index, or -1 for none"
                )
    hits = [prediction == label for prediction, label in zip(predictions, labels)]
    error_acc = _mean([hit for hit, label in zip(hits, labels) if label != NO_ERROR])
    correct_acc = _mean([hit for hit, label in zip(hits, labels) if label == NO_ERROR])
    total = error_acc + correct_acc
    f1 = 2 * error_acc * correct_acc / total if total else 0.0
    return {"error_acc": error_acc, "correct_acc": correct_acc, "f1": f1}


def first_error(verdicts: Sequence[bool]) -> int:
    """Index of the first step judged incorrect, −1 if there is none."""
    return next((i for i, verdict in enumerate(verdicts) if not verdict), NO_ERROR)


def majority_prediction(predictions: Sequence[int | None]) -> int | None:
    """The commonest of k predictions for one sample; a tie goes to the first given.

    Unreadable ones do not vote; None if all are. (ProcessBench, section 4.1: majority over k.)
    """
    votes = Counter(prediction for prediction in predictions if prediction is not None)
    return votes.most_common(1)[0][0] if votes else None


def mean_f1(scores: Mapping[str, Mapping[str, float]]) -> float:
    """The headline: the unweighted mean of the subsets' F1. `scores`: subset -> `score(...)`."""
    if not scores:
        raise ValueError("mean_f1: no subsets")
    return _mean([subset["f1"] for subset in scores.values()])


def load(path: str | os.PathLike[str]) -> list[ProcessBenchSample]:
    """Read one subset's JSON file, a list of samples, as it is published.

    Raises ValueError naming file, sample and field for anything else.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and UTF-8 errors are ValueErrors
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of samples, got {type(rows).__name__}")
    return [_sample(row, f"{path}, sample {i}") for i, row in enumerate(rows)]


def counts(samples: Sequence[ProcessBenchSample]) -> dict[str, int]:
    """How many samples have an erroneous step, and how many have none."""
    erroneous = sum(sample.label != NO_ERROR for sample in samples)
    return {"erroneous": erroneous, "correct": len(samples) - erroneous}


_FIELDS = {
    "id": str,
    "problem": str,
    "steps": list,
    "label": int,
    "final_answer_correct": bool,
    "generator": str,
}


def _sample(row: Any, place: str) -> ProcessBenchSample:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object, got {row!r}")
    for field, kind in _FIELDS.items():
        if type(row.get(field)) is not kind:
            raise ValueError(
                f"{place}: {field!r} must be of type {kind.__name__}, got {row.get(field)!r}"
            )
    if not all(isinstance(step, str) for step in row["steps"]):
        raise ValueError(f"{place}: 'steps' must hold texts only, got {row['steps']!r}")
    if not NO_ERROR <= row["label"] < len(row["steps"]):
        raise ValueError(
            f"{place}: label {row['label']} is no step's index among {len(row['steps'])}, nor -1"
        )
    return ProcessBenchSample(
        **{field: row[field] for field in _FIELDS if field != "steps"}, steps=tuple(row["steps"])
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
