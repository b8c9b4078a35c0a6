"""A reward model, or any instruct model, on ProcessBench (arXiv 2412.06559; method page, section
2): from the subsets' samples to F1, through files that go on where they stopped."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spark_jax.data.records import Problem, Provenance
from spark_jax.data.resumable import Chunk, OnProgress, continue_file, in_chunks, provenance
from spark_jax.evaluation import processbench
from spark_jax.evaluation.intervals import Interval, bootstrap_interval
from spark_jax.evaluation.processbench import NO_ERROR, ProcessBenchSample
from spark_jax.prm.evaluate import (
    TOO_LONG,
    Judge,
    Opinion,
    first_error,
    judge_format,
    judge_solutions,
    judgement_scores,
    vote_first_error,
)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One line of a subset's file. `prediction` and, with votes, `majority_prediction` are to be
    `label`; None where nothing could be read, and for an ORM, which names no step."""

    id: str
    label: int
    prediction: int | None
    majority_prediction: int | None
    opinion: Opinion
    provenance: Provenance


def evaluate_processbench(
    judge: Judge,
    splits: Mapping[str, Sequence[ProcessBenchSample]],
    *,
    seed: int,
    folder: Path,
    model: str,
    chunk_size: int = 16,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """The judge's predictions, in `<folder>/<split>.jsonl`, and what they score.

    Args:
        judge: its format must be one in which a text's steps can be written down
            (`evaluation.processbench.solution_text`).
        splits: name -> samples, at least one of each.
        model: the judge's name, for provenance.
        chunk_size: samples asked about together; it enters the seeds.
        on_progress: (samples done, samples in all), over all splits.

    Returns: JSON values, None for what is not defined.
        splits: name -> `split_scores`.
        mean_f1 (with votes also majority_mean_f1): the mean over the splits as an interval's
            {"estimate", "low", "high"}; not for an ORM.

    Raises ValueError, before anything is asked, for a sample that cannot be written down; and for a
    file that another call wrote.
    """
    for samples in splits.values():
        for sample in samples:
            processbench.solution_text(sample, judge.text_format.split_steps)
    read: dict[str, list[Prediction]] = {}
    total = sum(len(samples) for samples in splits.values())

    def report(done: int, _: int) -> None:
        if on_progress is not None:
            on_progress(sum(len(lines) for lines in read.values()) + done, total)

    for name, samples in splits.items():
        path = folder / f"{name}.jsonl"
        read[name] = predictions(judge, samples, seed, path, model, chunk_size, report)
    scores = {name: split_scores(judge, splits[name], read[name]) for name in splits}
    return {"splits": scores, **_means(judge, read)}


def predictions(
    judge: Judge,
    samples: Sequence[ProcessBenchSample],
    seed: int,
    path: Path,
    model: str,
    chunk_size: int,
    on_progress: OnProgress | None = None,
) -> list[Prediction]:
    """One prediction per sample, in order; the file at `path` is made or continued."""
    split_steps = judge.text_format.split_steps
    text_format, kind = judge_format(judge.text_format, judge.kind)

    def chunk(members: Sequence[ProcessBenchSample]) -> Chunk:
        shown = [
            text_format.reward_prompt(
                kind, problem_of(sample), processbench.solution_text(sample, split_steps)
            )
            for sample in members
        ]
        made = provenance(model, judge.settings, seed, judge.kind, shown)
        return Chunk(members, [sample.id for sample in members], made)

    def make(chunk: Chunk) -> list[Prediction]:
        texts = [processbench.solution_text(sample, split_steps) for sample in chunk.members]
        problems = [problem_of(sample) for sample in chunk.members]
        opinions = judge_solutions(judge, problems, texts, chunk.provenance.sample_seed)
        return [
            _prediction(judge, sample, opinion, chunk.provenance)
            for sample, opinion in zip(chunk.members, opinions, strict=True)
        ]

    def check(record: Prediction) -> str | None:
        asked = (judge.votes if judge.votes > 1 else 0, judge.token_logprobs is not None)
        has = (len(record.opinion.votes), record.opinion.soft_score is not None)
        return None if has == asked else f"has (votes, soft score) {has}, expected {asked}"

    return continue_file(
        path,
        Prediction,
        [chunk(members) for members in in_chunks(samples, chunk_size)],
        make,
        lambda record: record.id,
        check,
        on_progress,
    )


def split_scores(
    judge: Judge, samples: Sequence[ProcessBenchSample], read: Sequence[Prediction]
) -> dict[str, Any]:
    """The scores of one split, as JSON values.

    The overall verdict's truth is that no step is wrong. To those of
    `prm.evaluate.judgement_scores`, with intervals for `error_acc`, `correct_acc`, `f1` (also by
    majority) and `overall_accuracy`, come `num_samples`, `erroneous`, `correct`, `rewritten` (see
    `evaluation.processbench.is_rewritten`), `too_long` (not asked about), `tokens_generated` and
    `tokens_per_judgement` (None where the sampler does not tell).
    """
    labels = [sample.label for sample in samples]
    opinions = [prediction.opinion for prediction in read]
    truths = [label == NO_ERROR for label in labels]
    scores = judgement_scores(opinions, judge.kind, labels, truths)
    lists = scores.pop("per_solution")
    for prefix in ("", "majority_"):
        if f"{prefix}first_error" in lists:
            found = processbench.score_intervals(lists[f"{prefix}first_error"], labels)
            scores |= {f"{prefix}{name}": as_json(value) for name, value in found.items()}
        if f"{prefix}overall_right" in lists:
            right = np.array(lists[f"{prefix}overall_right"], bool)
            scores[f"{prefix}overall_accuracy"] = as_json(bootstrap_interval(right))
    lengths = [said.num_tokens for o in opinions for said in (o.greedy, *o.votes)]
    known = None not in lengths
    tokens = sum(length or 0 for length in lengths) if known else None
    return {
        "num_samples": len(samples),
        **processbench.counts(samples),
        "rewritten": sum(processbench.is_rewritten(sample) for sample in samples),
        "too_long": sum(opinion.greedy.failure == TOO_LONG for opinion in opinions),
        "tokens_generated": tokens,
        "tokens_per_judgement": None if tokens is None else tokens / len(lengths),
        **{name: _finite(value) for name, value in scores.items()},
    }


def problem_of(sample: ProcessBenchSample) -> Problem:
    return Problem(sample.id, sample.problem)


def as_json(interval: Interval) -> dict[str, float | None]:
    """An interval's fields; None for what is not a number."""
    return {name: _finite(value) for name, value in dataclasses.asdict(interval).items()}


def _prediction(
    judge: Judge, sample: ProcessBenchSample, opinion: Opinion, made: Provenance
) -> Prediction:
    one = many = None
    if judge.kind != "orm":
        one = first_error(opinion.greedy, opinion.num_steps)
        many = vote_first_error(opinion.votes, opinion.num_steps)
    return Prediction(sample.id, sample.label, one, many, opinion, made)


def _means(judge: Judge, read: Mapping[str, Sequence[Prediction]]) -> dict[str, Any]:
    if judge.kind == "orm":
        return {}
    labels = {split: [p.label for p in lines] for split, lines in read.items()}
    named = {"mean_f1": {split: [p.prediction for p in lines] for split, lines in read.items()}}
    if judge.votes > 1:
        named["majority_mean_f1"] = {
            split: [p.majority_prediction for p in lines] for split, lines in read.items()
        }
    return {
        name: as_json(
            processbench.mean_f1_interval({split: (said[split], labels[split]) for split in read})
        )
        for name, said in named.items()
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
