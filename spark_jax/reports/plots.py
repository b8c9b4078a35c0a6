"""The plots of a pipeline, as PNG files: lines and points are means over seeds, bands and bars 95 %
t-intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spark_jax.reports.study import over_seeds

# Okabe and Ito's palette: told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """One plot per stage, one of SPRO against GRPO, and all of them in one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        "stage1": _stage1,
        "stage2": _stage2,
        "stage3": _stage3,
        "accuracy_by_step": lambda axes, r: _curve(
            axes, r, "truth/accuracy", "accuracy of rollouts"
        ),
        "length_by_step": lambda axes, r: _curve(axes, r, "response/length", "response tokens"),
        "entropy_by_step": lambda axes, r: _curve(axes, r, "policy/entropy", "entropy (nats)"),
    }

    def save(names: Sequence[str], columns: int, name: str) -> Path:
        rows = -(-len(names) // columns)
        figure = Figure(figsize=(5 * columns, 3.8 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, names):
            panels[panel](axes, results)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.3)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110)
        return path

    by_step = ("accuracy_by_step", "length_by_step", "entropy_by_step")
    return [
        *(save((panel,), 1, panel) for panel in ("stage1", "stage2", "stage3")),
        save(by_step, 3, "by_step"),
        save(list(panels), 3, "overview"),
    ]


def _stage1(axes: Any, results: Mapping[str, Any]) -> None:
    for (method, by_count), colour in zip(results["stage1"].items(), COLOURS):
        counts = [int(n) for n in by_count]
        scores = [by_count[n]["step_accuracy"] for n in by_count]
        _line(axes, counts, scores, colour, method)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.set(title="Stage I: verdicts by vote", xlabel="verifications N", ylabel="step accuracy")
    axes.legend(fontsize=8)


def _stage2(axes: Any, results: Mapping[str, Any]) -> None:
    metric = "f1" if any("f1" in s for s in results["stage2"].values()) else "overall_accuracy"
    scores = {method: s[metric] for method, s in results["stage2"].items() if metric in s}
    _bars(axes, list(scores), list(scores.values()), COLOURS[0])
    label = {"f1": "F1, first wrong step", "overall_accuracy": "overall accuracy"}[metric]
    axes.set(title="Stage II: reward models by their targets", ylabel=label, ylim=(0, 1))


def _stage3(axes: Any, results: Mapping[str, Any]) -> None:
    arms = results["stage3"]
    before = next(iter(arms.values()))["before"]
    scores = [before, *(arm["after"] for arm in arms.values())]
    _bars(axes, ["before", *arms], scores, COLOURS[2])
    axes.set(title="Stage III: policies", ylabel="accuracy, held-out", ylim=(0, 1))


def _curve(axes: Any, results: Mapping[str, Any], metric: str, label: str) -> None:
    for (arm, scores), colour in zip(results["stage3"].items(), COLOURS):
        if metric in scores["curves"]:
            curve = scores["curves"][metric]
            points = [over_seeds(list(column)) for column in np.transpose(curve["values"])]
            _line(axes, curve["step"], points, colour, arm)
    axes.set(title=f"RL: {label}", xlabel="step", ylabel=label)
    if metric == "truth/accuracy":
        axes.legend(fontsize=7)


def _line(axes: Any, x: Sequence[float], scores: Sequence[Any], colour: str, label: str) -> None:
    axes.plot(x, [s["estimate"] for s in scores], color=colour, label=label, marker=".")
    if scores[0]["low"] is not None:
        low, high = [s["low"] for s in scores], [s["high"] for s in scores]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _bars(axes: Any, names: Sequence[str], scores: Sequence[Any], colour: str) -> None:
    estimates = [s["estimate"] for s in scores]
    axes.bar(names, estimates, color=colour, alpha=0.8)
    if scores[0]["low"] is not None:
        errors = [[e - s["low"], s["high"] - e] for e, s in zip(estimates, scores)]
        axes.errorbar(names, estimates, np.transpose(errors), fmt="none", color="black", capsize=3)
    for i, score in enumerate(scores):  # every seed as a dot
        axes.plot([i] * len(score["per_seed"]), score["per_seed"], ".", color="black", markersize=4)
    axes.tick_params(axis="x", labelrotation=20, labelsize=8)
