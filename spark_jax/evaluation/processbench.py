"""ProcessBench (arXiv 2412.06559): find the first erroneous step of a solution, if there is one.

A label or a prediction is the 0-based index of the first erroneous step, −1 if no step is wrong. A
prediction is None where the verifier gave nothing that could be read; it is then wrong, always.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spark_jax.data.records import from_json
from spark_jax.evaluation.intervals import Interval, percentile_interval

SPLITS = ("gsm8k", "math", "olympiadbench", "omnimath")
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
    error_acc, correct_acc = (_mean(hits) for hits in _hits(predictions, labels))
    total = error_acc + correct_acc
    f1 = 2 * error_acc * correct_acc / total if total else 0.0
    return {"error_acc": error_acc, "correct_acc": correct_acc, "f1": f1}


def score_intervals(
    predictions: Sequence[int | None],
    labels: Sequence[int],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Interval]:
    """`score` with percentile bootstrap intervals over samples, those with an error and those
    without resampled apart, for a subset fixes how many there are of each."""
    figures = score(predictions, labels)
    draws = _bootstrap(predictions, labels, resamples, np.random.default_rng(seed))
    return {name: percentile_interval(figures[name], draws[name], level) for name in figures}


def mean_f1_interval(
    subsets: Mapping[str, tuple[Sequence[int | None], Sequence[int]]],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """`mean_f1` with its bootstrap interval. `subsets`: subset -> (predictions, labels)."""
    estimate = mean_f1({name: score(*pair) for name, pair in subsets.items()})
    rng = np.random.default_rng(seed)
    draws = [_bootstrap(*pair, resamples, rng)["f1"] for pair in subsets.values()]
    return percentile_interval(estimate, np.mean(draws, axis=0), level)


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


def find(
    folder: str | os.PathLike[str], splits: Sequence[str] = ()
) -> tuple[dict[str, Path], dict[str, str]]:
    """The files `<folder>/<split>.json`: (split -> file, split -> why it is missing).

    All that `splits` names must be there. Without names it is the four of the paper, of which at
    least one must be; the others are named as missing. Raises FileNotFoundError otherwise.
    """
    files = {split: Path(folder) / f"{split}.json" for split in splits or SPLITS}
    missing = {split: f"no file {file}" for split, file in files.items() if not file.is_file()}
    if missing and (splits or len(missing) == len(files)):
        raise FileNotFoundError(
            f"ProcessBench: {'; '.join(missing.values())}. Fetch Qwen/ProcessBench and put its "
            "subsets there as <split>.json, or name another folder"
        )
    return {split: file for split, file in files.items() if split not in missing}, missing


def subset(
    samples: Sequence[ProcessBenchSample], number: int | None, seed: int
) -> list[ProcessBenchSample]:
    """`number` of the samples, drawn by the seed, in their own order; all of them for None or for
    more than there are.

    Samples with and without an error keep their proportion, and two or more hold at least one of
    each where there are such, for F1 needs both.
    """
    if number is None or number >= len(samples):
        return list(samples)
    if number < 1:
        raise ValueError(f"a subset of {number} samples; take at least 1")
    places: dict[bool, list[int]] = {True: [], False: []}
    for place, sample in enumerate(samples):
        places[sample.label != NO_ERROR].append(place)
    erroneous = round(number * len(places[True]) / len(samples))
    if number > 1 and places[True] and places[False]:
        erroneous = min(max(erroneous, 1), number - 1)
    rng = np.random.default_rng(seed)
    chosen = [
        *rng.choice(places[True], erroneous, replace=False).tolist(),
        *rng.choice(places[False], number - erroneous, replace=False).tolist(),
    ]
    return [samples[int(place)] for place in sorted(chosen)]


def solution_text(
    sample: ProcessBenchSample, split_steps: Callable[[str], Sequence[tuple[int, int]]]
) -> str:
    """The solution as one text in which `split_steps` finds exactly the sample's steps.

    With `<step>` tags inside `<think>` where the splitter reads tags; else as numbered lines; else
    as paragraphs, in which each step is put on one line. Tags that a step itself holds are written
    `&lt;step&gt;`, a step of nothing but white space `(empty step)`: see `is_rewritten`.

    Raises ValueError, naming the sample, where the splitter finds other steps in all three.
    """
    steps = [_shown(step) for step in sample.steps]
    for text, shown in _layouts(steps):
        spans = split_steps(text)
        if len(spans) == len(shown) and all(
            step in text[start:end] for step, (start, end) in zip(shown, spans)
        ):
            return text
    raise ValueError(
        f"ProcessBench sample {sample.id!r}: the task's split_steps does not find its "
        f"{len(steps)} steps, neither tagged nor numbered nor as paragraphs"
    )


def is_rewritten(sample: ProcessBenchSample) -> bool:
    """Whether a step is shown in other words than its own."""
    return any(_shown(step) != step.strip() for step in sample.steps)


_FIELDS = {field.name for field in dataclasses.fields(ProcessBenchSample)}


def _sample(row: Any, place: str) -> ProcessBenchSample:
    known = {k: row[k] for k in row if k in _FIELDS} if isinstance(row, dict) else row
    try:
        sample = from_json(known, ProcessBenchSample)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if not NO_ERROR <= sample.label < len(sample.steps):
        raise ValueError(
            f"{place}: label {sample.label} is no step's index among {len(sample.steps)}, nor -1"
        )
    return sample


_TAG = re.compile(r"<(/?(?:think|step|answer))>")


def _shown(step: str) -> str:
    return _TAG.sub(r"&lt;\1&gt;", step.strip()) or "(empty step)"


def _layouts(steps: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """The ways to write steps down, each with the steps as it shows them."""
    tagged = [f"<step> {step} </step>" for step in steps]
    yield "\n".join(["<think>", *tagged, "</think>"]), steps
    lines = [" ".join(step.split()) for step in steps]
    numbered = [f"Step {number}: {line}" for number, line in enumerate(lines, start=1)]
    yield "\n".join(numbered), lines
    yield "\n\n".join(lines), lines


def _hits(
    predictions: Sequence[int | None], labels: Sequence[int]
) -> tuple[list[bool], list[bool]]:
    """Whether each prediction is its label: of the samples with an error, of those without."""
    pairs = list(zip(predictions, labels, strict=True))
    return (
        [prediction == label for prediction, label in pairs if label != NO_ERROR],
        [prediction == label for prediction, label in pairs if label == NO_ERROR],
    )


def _bootstrap(
    predictions: Sequence[int | None],
    labels: Sequence[int],
    resamples: int,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Resampled figures. The sum of n hits drawn with replacement from n is binomial."""
    error_acc, correct_acc = (
        rng.binomial(len(hits), _mean(hits), resamples) / len(hits)
        if hits
        else np.full(resamples, np.nan)
        for hits in _hits(predictions, labels)
    )
    total = error_acc + correct_acc
    f1 = 2 * error_acc * correct_acc / np.where(total == 0, 1.0, total)
    return {"error_acc": error_acc, "correct_acc": correct_acc, "f1": f1}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
