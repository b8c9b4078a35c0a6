"""What the runs of a pipeline found, with intervals over seeds: from run folders to one record.

A value that a run does not have (a rate with nothing to divide by, F1 without one of its classes)
is None in the record, and what is made of the seeds says how many of them it rests on.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spark_jax.evaluation.intervals import t_interval
from spark_jax.rewards.prm import REWARDS
from spark_jax.training.metrics import read_metrics
from spark_jax.verification.aggregate import AGGREGATIONS

STAGE1_METRICS = ("step_accuracy", "overall_accuracy", "derived_outcome_accuracy")
STAGE2_METRICS = ("f1", "error_acc", "correct_acc", "overall_accuracy")
CURVES = (
    "eval/accuracy",
    "eval/response_length",
    "truth/accuracy",
    "reward/mean",
    "response/length",
    "policy/entropy",
    "reward/zero_variance_groups",
    "policy/logprob_gap_max",
    "spro/msa_mean_absolute",
    "spro/process_reward_auc_truth",
    "spro/process_reward_auc_verdicts",
    "hacking/steps_per_response",
    "hacking/appended_after_answer",
)


class Folders(NamedTuple):
    """Where a pipeline keeps its runs, relative to its own folder."""

    stage1: Callable[[int], str]
    prm: Callable[[int, str], str]
    rl: Callable[[int, str], str]


def collect(
    path: Path,
    *,
    seeds: Sequence[int],
    methods: Sequence[str],
    arms: Sequence[str],
    folders: Folders,
) -> dict[str, Any]:
    """The summary of a pipeline: estimates with 95 % t-intervals over seeds, and all seeds' values.

    Keys: `seeds`; `task`; `stage1` (method → N → metric, the last N being all samples of a
    solution); `verifier` (detection rate and warnings); `stage2` (method → scores); `stage3` (arm →
    accuracy before and after, and curves), arms with a reward model first, else in the order given;
    `differences` (claims as paired differences over seeds, in stage III of the first arm against
    each other). Every estimate is as `over_seeds` gives it.
    """
    stage1 = [read_json(path / folders.stage1(seed) / "summary.json") for seed in seeds]
    stage1_config = read_json(path / folders.stage1(seeds[0]) / "config.json")
    stage2 = {
        m: [read_json(path / folders.prm(seed, m) / "summary.json") for seed in seeds]
        for m in methods
    }
    runs = {arm: [path / folders.rl(seed, arm) for seed in seeds] for arm in arms}
    results: dict[str, Any] = {
        "seeds": list(seeds),
        "task": stage1_config["task"],
        "stage1": stage1_scores(stage1, stage1_config["verify"]["samples_per_solution"]),
        "verifier": _verifier(stage1),
        "stage2": {method: stage2_scores(summaries) for method, summaries in stage2.items()},
        "stage3": {arm: arm_scores(runs[arm]) for arm in _judged_first(runs)},
    }
    results["differences"] = _differences(results)
    return results


def over_seeds(values: Sequence[Any]) -> dict[str, Any]:
    """Mean with its 95 % t-interval over the seeds that have a value.

    A missing value is None, not finite, or what `RunFolder.write_summary` makes of that ("nan").

    Returns:
        estimate: None where no seed has a value; low, high: None for fewer than two of them;
        num_seeds: how many the estimate rests on; per_seed: every seed's value, None if missing.
    """
    per_seed = [finite(value) for value in values]
    present = [value for value in per_seed if value is not None]
    found: dict[str, Any] = {"estimate": present[0] if present else None, "low": None, "high": None}
    if len(present) > 1:
        found = dataclasses.asdict(t_interval(np.array(present)))
    return {**found, "num_seeds": len(present), "per_seed": per_seed}


def finite(value: Any) -> float | None:
    """The value as a finite number, or None for one that is missing (see `over_seeds`)."""
    if value is None or not math.isfinite(number := float(value)):
        return None
    return number


def number_of_seeds(counts: Iterable[int]) -> str:
    """ "3 seeds", "2 to 3 seeds": of things that need not have equally many."""
    fewest, most = min(found := set(counts)), max(found)
    return f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"


def stage1_scores(
    summaries: Sequence[Mapping[str, Any]], num_samples: int | str
) -> dict[str, dict[str, Any]]:
    """method → N → metric → estimate over seeds, N increasing.

    A summary's `methods` are the scores of all `num_samples` verifications. Only methods that do no
    more than vote have scores for fewer (`by_sample_count`); a critique is made of one choice.
    """
    reports = [
        {**summary["by_sample_count"], str(num_samples): summary["methods"]}
        for summary in summaries
    ]
    counts = sorted(reports[0], key=lambda n: int(n) if n.isdecimal() else math.inf)
    return {
        method: {
            n: {
                metric: over_seeds([report[n][method][metric] for report in reports])
                for metric in STAGE1_METRICS
            }
            for n in counts
            if method in reports[0][n]
        }
        for method in summaries[0]["methods"]
    }


def stage2_metric(stage2: Mapping[str, Mapping[str, Any]]) -> str:
    """What compares all reward models: F1 where every one of them has it (an ORM has not)."""
    every = all("f1" in scores and scores["f1"]["num_seeds"] for scores in stage2.values())
    return "f1" if every else "overall_accuracy"


def arm_scores(folders: Sequence[Path]) -> dict[str, Any]:
    """Accuracy before and after, their difference, and curves, of RL runs that differ in the seed.

    Without references no run has an accuracy: what is made of it is then missing.
    """
    curves = _curves(folders)
    accuracy = curves.get("eval/accuracy", {"values": [[None]] * len(folders)})["values"]
    before, after = [one[0] for one in accuracy], [one[-1] for one in accuracy]
    return {
        "before": over_seeds(before),
        "after": over_seeds(after),
        "gain": over_seeds(paired(after, before)),
        "curves": curves,
    }


def _verifier(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How often single samples, made without a reference, see an error."""
    reports: list[Mapping[str, Any]] = [
        next((r for m, r in run["methods"].items() if not AGGREGATIONS[m].reference), {})
        for run in runs
    ]
    return {
        "detection_rate": over_seeds([report.get("detection_rate") for report in reports]),
        "validity_rate": over_seeds([report.get("validity_rate") for report in reports]),
        "warnings": sorted({r["warning"] for r in reports if r.get("warning")}),
    }


def stage2_scores(
    summaries: Sequence[Mapping[str, Any]], metrics: Sequence[str] = STAGE2_METRICS
) -> dict[str, Any]:
    """metric → estimate over seeds; a trained model's scores stand under `held_out`."""
    scores = [summary.get("held_out", summary) for summary in summaries]
    flat = [{**s, "overall_accuracy": s["overall_accuracy"]["estimate"]} for s in scores]
    names = [name for name in metrics if any(name in score for score in flat)]
    return {name: over_seeds([score.get(name) for score in flat]) for name in names}


def _judged_first(runs: Mapping[str, Sequence[Path]]) -> list[str]:
    """The arms, those with a reward model first: a ConfigDict hands out its keys by the alphabet,
    and what is to be compared with the rest must not hang on a name."""
    rewards = {
        arm: read_json(folders[0] / "config.json")["rl"]["reward"] for arm, folders in runs.items()
    }
    return sorted(runs, key=lambda arm: not REWARDS[rewards[arm]].judges)


def _curves(folders: Sequence[Path]) -> dict[str, Any]:
    """metric → {"step": [...], "values": [seed][step]} for the steps at which any run has it."""
    runs = [read_metrics(folder / "metrics.jsonl") for folder in folders]
    curves = {}
    for metric in CURVES:
        series = [
            {row["step"]: finite(row[metric]) for row in run if metric in row} for run in runs
        ]
        steps = sorted(set().union(*series))
        if steps:
            curves[metric] = {
                "step": steps,
                "values": [[one.get(step) for step in steps] for one in series],
            }
    return curves


def _differences(results: Mapping[str, Any]) -> dict[str, Any]:
    """claim → difference over seeds, with its `stage`, the `metric` and the `pair` compared."""
    return {
        f"{stage}: {metric}, {pair}": {
            "stage": stage,
            "metric": metric,
            "pair": pair,
            **over_seeds(paired(a["per_seed"], b["per_seed"])),
        }
        for stage, metric, pair, a, b in _claims(results)
    }


def _claims(results: Mapping[str, Any]) -> Iterable[tuple[str, str, str, Any, Any]]:
    """What beats what: (stage, metric, pair, the one, the other). Only of runs that are there."""
    stage1, stage2, stage3 = results["stage1"], results["stage2"], results["stage3"]
    ours = "step_consistency"
    if ours in stage1:
        n = list(stage1[ours])[-1]
        for other in [method for method in stage1 if method != ours]:
            one, two = stage1[ours][n]["step_accuracy"], stage1[other][n]["step_accuracy"]
            yield "I", f"step accuracy, N={n}", f"{ours} - {other}", one, two
    if ours in stage2:
        metric = stage2_metric(stage2)
        name = {"f1": "F1", "overall_accuracy": "overall accuracy"}[metric]
        for other in [method for method in stage2 if method != ours]:
            yield "II", name, f"{ours} - {other}", stage2[ours][metric], stage2[other][metric]
    for arm, scores in stage3.items():
        yield "III", "accuracy", f"{arm}, after - before", scores["after"], scores["before"]
    first, *others = stage3 or [None]
    for other in others:
        one, two = stage3[first]["after"], stage3[other]["after"]
        yield "III", "accuracy", f"{first} - {other}", one, two


def paired(first: Sequence[Any], second: Sequence[Any]) -> list[float | None]:
    """The differences, seed by seed; missing where either is (see `over_seeds`)."""
    pairs = [(finite(a), finite(b)) for a, b in zip(first, second, strict=True)]
    return [None if a is None or b is None else a - b for a, b in pairs]


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
