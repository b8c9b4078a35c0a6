"""What the runs of a pipeline found, with intervals over seeds: from run folders to one record."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spark_jax.evaluation.intervals import t_interval
from spark_jax.training.metrics import read_metrics

STAGE1_METRICS = ("step_accuracy", "overall_accuracy", "derived_outcome_accuracy")
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

    Keys: `seeds`; `stage1` (method → N → metric); `verifier` (detection rate and warnings);
    `stage2` (method → scores); `stage3` (arm → accuracy before and after, and curves);
    `differences` (claims as paired differences over seeds).
    """
    stage1 = [_summary(path / folders.stage1(seed)) for seed in seeds]
    stage2 = {m: [_summary(path / folders.prm(seed, m)) for seed in seeds] for m in methods}
    curves = {arm: _curves([path / folders.rl(seed, arm) for seed in seeds]) for arm in arms}
    results: dict[str, Any] = {
        "seeds": list(seeds),
        "stage1": _stage1(stage1),
        "verifier": _verifier(stage1),
        "stage2": {method: _stage2(runs) for method, runs in stage2.items()},
        "stage3": {arm: _stage3(curve) for arm, curve in curves.items()},
    }
    results["differences"] = _differences(results)
    return results


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean with its 95 % t-interval; `low` and `high` are None for a single seed."""
    if len(values) < 2:
        return {"estimate": values[0], "low": None, "high": None, "per_seed": list(values)}
    return {**dataclasses.asdict(t_interval(np.asarray(values))), "per_seed": list(values)}


def _stage1(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """method → N → metric → estimate over seeds."""
    counts = list(runs[0]["by_sample_count"])
    methods = list(runs[0]["by_sample_count"][counts[0]]) if counts else []
    return {
        method: {
            n: {
                metric: over_seeds([run["by_sample_count"][n][method][metric] for run in runs])
                for metric in STAGE1_METRICS
            }
            for n in counts
        }
        for method in methods
    }


def _verifier(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How often single samples see an error; voting needs more than one half."""
    reports = [next(iter(run["methods"].values())) for run in runs]
    return {
        "detection_rate": over_seeds([report["detection_rate"] for report in reports]),
        "validity_rate": over_seeds([report["validity_rate"] for report in reports]),
        "warnings": sorted({r["warning"] for r in reports if r["warning"]}),
    }


def _stage2(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scores = [run.get("held_out", run) for run in runs]
    flat = [
        {**score, "overall_accuracy": score["overall_accuracy"]["estimate"]} for score in scores
    ]
    names = [n for n in ("f1", "error_acc", "correct_acc", "overall_accuracy") if n in flat[0]]
    return {name: over_seeds([score[name] for score in flat]) for name in names}


def _curves(folders: Sequence[Path]) -> dict[str, Any]:
    """metric → {"step": [...], "values": [seed][step]} for the steps at which it was measured."""
    runs = [read_metrics(folder / "metrics.jsonl") for folder in folders]
    curves = {}
    for metric in CURVES:
        series = [{row["step"]: row[metric] for row in run if metric in row} for run in runs]
        steps = sorted(set.intersection(*(set(s) for s in series)))
        if steps:
            curves[metric] = {
                "step": steps,
                "values": [[one[step] for step in steps] for one in series],
            }
    return curves


def _stage3(curves: dict[str, Any]) -> dict[str, Any]:
    accuracy = np.asarray(curves["eval/accuracy"]["values"])
    return {
        "before": over_seeds(accuracy[:, 0].tolist()),
        "after": over_seeds(accuracy[:, -1].tolist()),
        "gain": over_seeds((accuracy[:, -1] - accuracy[:, 0]).tolist()),
        "curves": curves,
    }


def _differences(results: Mapping[str, Any]) -> dict[str, Any]:
    """The claims: what beats what, by how much, paired by seed. Only those whose runs are there."""
    claims: dict[str, tuple[Any, Any]] = {}
    stage1, stage2, stage3 = results["stage1"], results["stage2"], results["stage3"]
    if {"single", "outcome_consistency", "step_consistency"} <= stage1.keys():
        n = list(stage1["single"])[-1]
        step = stage1["step_consistency"][n]["step_accuracy"]
        for other in ("single", "outcome_consistency"):
            claim = f"I: step accuracy, step_consistency - {other}, N={n}"
            claims[claim] = (step, stage1[other][n]["step_accuracy"])
    for other in ("base", "single", "outcome_consistency"):
        if {"step_consistency", other} <= stage2.keys() and "f1" in stage2["step_consistency"]:
            pair = stage2["step_consistency"]["f1"], stage2[other]["f1"]
            claims[f"II: F1, step_consistency - {other}"] = pair
    for arm, scores in stage3.items():
        claims[f"III: accuracy, {arm}, after - before"] = (scores["after"], scores["before"])
    names = list(stage3)
    for other in names[1:]:
        pair = stage3[names[0]]["after"], stage3[other]["after"]
        claims[f"III: accuracy, {names[0]} - {other}"] = pair
    return {
        claim: over_seeds(np.subtract(a["per_seed"], b["per_seed"]).tolist())
        for claim, (a, b) in claims.items()
    }


def _summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())
