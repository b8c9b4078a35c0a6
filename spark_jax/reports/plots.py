"""The plots of runs, as PNG files.

Of a pipeline: points are means over seeds, bars and bands 95 % t-intervals, small dots the seeds.
A missing value is left out. Safe to call from several threads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spark_jax.reports.study import (
    finite,
    number_of_seeds,
    over_seeds,
    stage1_scores,
    stage2_metric,
)
from spark_jax.training.metrics import read_metrics

# Okabe and Ito's palette, told apart by colour-blind readers. Together with line styles and markers
# no two of 35 lines look the same, and each style leaves gaps through which a line below is seen.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", (0, (4, 2.5)), (0, (1, 1.5)), (0, (7, 2, 1.5, 2)), (0, (2, 3)))
MARKERS = "osD^vPX*"

STEP_ACCURACY, OVERALL_ACCURACY = "step verdicts right", "overall verdicts right"
BY_STEP = {
    "truth/accuracy": "accuracy of rollouts",
    "response/length": "response tokens",
    "policy/entropy": "entropy (nats)",
}
STUDY_BY_STEP = {
    "policy/entropy": "entropy (nats)",
    "spro/msa_mean_absolute": "mean |MSA|",
    "spro/process_reward_auc_truth": "AUC of process rewards, truth",
    "spro/process_reward_auc_verdicts": "AUC of process rewards, verdicts",
}
# Panels of a single run: title → metrics. A name that ends in "/" stands for all that begin so.
RUN_PANELS = {
    "reward": ("reward/mean",),
    "accuracy": ("truth/accuracy", "eval/accuracy"),
    "groups of equal rewards": ("reward/zero_variance_groups",),
    "response tokens": ("response/length", "eval/response_length"),
    "entropy (nats)": ("policy/entropy",),
    "loss": ("policy/loss", "train/loss"),
    "gradient norm": ("policy/grad_norm", "train/grad_norm"),
    "log-prob gap, sampler to scorer": ("policy/logprob_gap_max",),
    "steps per response": ("hacking/steps_per_response", "eval/steps"),
    "shares of rollouts": ("format/", "hacking/"),
    "reward model": ("reward_model/",),
    "process rewards": ("spro/",),
}
NOT_A_SHARE = "hacking/steps_per_response"  # though it begins like one

_DRAWING = threading.Lock()  # matplotlib's caches of fonts and texts are not made for threads

Panel = Callable[[Any], None]  # draws into the axes it is given


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """The plots of a pipeline's `study.collect`: one per stage (`stage1.png`, ...), one of all
    policies by step (`by_step.png`), and all in one picture (`overview.png`)."""
    stages: dict[str, Panel] = {
        "stage1": partial(
            _stage1, methods=results["stage1"], metric="step_accuracy", label=STEP_ACCURACY
        ),
        "stage2": partial(_stage2, methods=results["stage2"]),
        "stage3": partial(_stage3, arms=results["stage3"]),
    }
    by_step: list[Panel] = [
        partial(_by_step, arms=results["stage3"], metric=metric, label=label)
        for metric, label in BY_STEP.items()
    ]
    seeds = len(results["seeds"])
    note = f"means over {seeds} seeds, bars: 95 % t-intervals" if seeds > 1 else "one seed"
    legend = note, list(results["stage3"])
    return [
        *(_save([panel], 1, folder / f"{name}.png") for name, panel in stages.items()),
        _save(by_step, 3, folder / "by_step.png", legend=legend),
        _save([*stages.values(), *by_step], 3, folder / "overview.png", legend=legend),
    ]


def draw_study(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """The plots of a full study's record (`full_study.collect`): stages I and II; a picture for
    each part of stage III; and one for each group of arms under `pictures`."""
    early: list[Panel] = []
    if found["stage1"]:
        early.append(
            partial(_stage1, methods=found["stage1"], metric="step_accuracy", label=STEP_ACCURACY)
        )
    if found["verifier"]:
        early.append(partial(_threshold, rows=found["verifier"]))
    if found["problems"]:
        early.append(partial(_by_problems, problems=found["problems"]))
    made = [_save(early, len(early), folder / "stages.png")] if early else []
    for part, arms in found["rl"].items():
        made.append(_draw_part(arms, folder / f"{part}.png"))
        for name, chosen_arms in found["pictures"].get(part, {}).items():
            if shown := {arm: arms[arm] for arm in chosen_arms if arm in arms}:
                made.append(_draw_arms(shown, folder / f"{part}_{name}.png"))
    return made


def _draw_part(arms: Mapping[str, Any], path: Path) -> Path:
    """Accuracy of all arms at the end; by step and by token of those that have most seeds."""
    most = max(scores["after"]["num_seeds"] for scores in arms.values())
    lines = {arm: s for arm, s in arms.items() if s["after"]["num_seeds"] == most}
    panels: list[Panel] = [
        partial(_stage3, arms=arms),
        partial(_by_step, arms=lines, metric="eval/accuracy", label="accuracy, held-out"),
        partial(_by_token, arms=lines),
    ]
    size = (max(5.0, 0.28 * len(arms)), 4.6)
    return _save(panels, 3, path, size=size, legend=(_over_seeds(lines), list(lines)))


def _draw_arms(arms: Mapping[str, Any], path: Path) -> Path:
    """A few arms: accuracy by step and by token, and what else they have of `STUDY_BY_STEP`."""
    had = {
        metric
        for scores in arms.values()
        for metric, curve in scores["curves"].items()
        if any(value is not None for one in curve["values"] for value in one)
    }
    panels: list[Panel] = [
        partial(_by_step, arms=arms, metric="eval/accuracy", label="accuracy, held-out"),
        partial(_by_token, arms=arms),
        *(
            partial(_by_step, arms=arms, metric=metric, label=label)
            for metric, label in STUDY_BY_STEP.items()
            if metric in had
        ),
    ]
    panels = [partial(_close_up, panel=panel) for panel in panels]
    title = f"{_over_seeds(arms)}; intervals may end outside the picture"
    return _save(panels, 3, path, legend=(title, list(arms)))


def _close_up(axes: Any, panel: Panel) -> None:
    """The panel as high as its lines are: an interval over two seeds is many times wider."""
    panel(axes)
    values = np.concatenate([np.zeros(0), *(np.array(x.get_ydata(), float) for x in axes.lines)])
    if (values := values[np.isfinite(values)]).size:
        margin = 0.1 * float(np.ptp(values)) or 0.05
        axes.set_ylim(values.min() - margin, values.max() + margin)


def _over_seeds(arms: Mapping[str, Any]) -> str:
    """The title of a legend: "3 seeds", "2 to 3 seeds"."""
    return number_of_seeds(scores["after"]["num_seeds"] for scores in arms.values())


def stage1_summary(
    summary: Mapping[str, Any], folder: Path, *, num_samples: int | None = None
) -> Path:
    """`stage1.png` of one stage I run: accuracy of step and of overall verdicts by method and N.

    Args:
        summary: of `generate_verifications`.
        folder: where to write.
        num_samples: N of the scores under `methods`; without it they stand at N = "all".
    """
    scores = stage1_scores([summary], "all" if num_samples is None else num_samples)
    panels: list[Panel] = [
        partial(_stage1, methods=scores, metric="step_accuracy", label=STEP_ACCURACY),
        partial(_stage1, methods=scores, metric="overall_accuracy", label=OVERALL_ACCURACY),
    ]
    return _save(panels, 2, folder / "stage1.png")


def training_curves(metrics_path: Path, folder: Path) -> list[Path]:
    """`training_curves.png` of one run, RL or reward model: its main metrics by step.

    Values that are not finite are left out and counted in the panel's title. Returns no path where
    the run has none of the metrics.
    """
    rows = read_metrics(metrics_path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    panels: list[Panel] = []
    for title, wanted in RUN_PANELS.items():
        series = {
            name: [(row["step"], finite(row[name])) for row in rows if name in row]
            for name in chosen(names, wanted)
        }
        if series:
            panels.append(partial(_run_panel, title=title, series=series))
    if not panels:
        return []
    columns = min(len(panels), 4)
    return [_save(panels, columns, folder / "training_curves.png", size=(3.6, 2.7))]


def chosen(names: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """The metrics of a panel of `RUN_PANELS`."""
    prefixes = tuple(name for name in wanted if name.endswith("/"))
    return [
        name
        for name in names
        if name in wanted or (name.startswith(prefixes) and name != NOT_A_SHARE)
    ]


def _save(
    panels: Sequence[Panel],
    columns: int,
    path: Path,
    *,
    size: tuple[float, float] = (5.0, 3.8),
    legend: tuple[str, Sequence[str]] | None = None,
) -> Path:
    """Panels in rows of `columns`, each of `size` inches; below them title and names of a legend
    of lines."""
    with _DRAWING:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        rows = math.ceil(len(panels) / columns)
        height = size[1] * rows + (0.6 if legend else 0)
        figure = Figure(figsize=(size[0] * columns, height), layout="constrained")
        FigureCanvasAgg(figure)
        all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, panel in zip(all_axes, panels):
            panel(axes)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.3)
        for axes in all_axes[len(panels) :]:
            axes.remove()
        if legend:
            title, names = legend
            handles = [Line2D([], [], label=name, **_style(i)) for i, name in enumerate(names)]
            figure.legend(
                handles=handles,
                title=title,
                loc="outside lower center",
                ncols=max(1, min(len(names), 2 * columns)),
                handlelength=3.5,
                frameon=False,
            )
        figure.savefig(path, dpi=110)
    return path


def _stage1(axes: Any, methods: Mapping[str, Any], metric: str, label: str) -> None:
    counts = list(dict.fromkeys(n for by_count in methods.values() for n in by_count))
    counts.sort(key=lambda n: int(n) if n.isdecimal() else math.inf)
    width = 0.2  # methods stand side by side, or their intervals would hide each other
    for i, (method, by_count) in enumerate(methods.items()):
        shift = width * (i / max(len(methods) - 1, 1) - 0.5)
        x = np.array([counts.index(n) for n in by_count]) + shift
        scores = [scores[metric] for scores in by_count.values()]
        estimates, low, high = _bounds(scores)
        if not np.isfinite(estimates).any():
            continue
        axes.plot(x, estimates, label=method, **_style(i))
        axes.vlines(x, low, high, color=_style(i)["color"], alpha=0.6)
    axes.set_xticks(range(len(counts)), counts)
    axes.set(title="Stage I: verdicts by vote", xlabel="verifications N", ylabel=label)
    if axes.lines:
        axes.set_xlim(-0.4, len(counts) - 0.6)
        axes.legend(fontsize=8, handlelength=3.5)
    else:
        _nothing(axes, "no ground truth")


def _stage2(axes: Any, methods: Mapping[str, Any]) -> None:
    metric = stage2_metric(methods)
    _bars(axes, {name: scores[metric] for name, scores in methods.items()}, [COLOURS[0]])
    label = {"f1": "F1, first wrong step", "overall_accuracy": "overall verdicts right"}[metric]
    axes.set(title="Stage II: reward models by their targets", ylabel=label)


def _stage3(axes: Any, arms: Mapping[str, Any]) -> None:
    """In the colours of the lines by step."""
    bars = {name: arm["after"] for name, arm in arms.items()}
    if arms:
        bars = {"before": next(iter(arms.values()))["before"], **bars}
    _bars(axes, bars, ["#888888", *(_style(i)["color"] for i in range(len(arms)))])
    axes.set(title="Stage III: policies", ylabel="accuracy, held-out")


def _by_step(axes: Any, arms: Mapping[str, Any], metric: str, label: str) -> None:
    for i, scores in enumerate(arms.values()):
        if metric not in scores["curves"]:
            continue
        curve = scores["curves"][metric]
        points = [over_seeds(column) for column in zip(*curve["values"], strict=True)]
        estimates, low, high = _bounds(points)
        steps = np.array(curve["step"])
        # Bands of runs alike would make one grey: intervals stand at every few steps, in turn.
        every = max(len(steps) // 5, len(arms))
        marked = slice(i % len(steps), None, every)
        style = _style(i)
        axes.plot(steps, estimates, markevery=marked, **style)
        axes.vlines(steps[marked], low[marked], high[marked], color=style["color"], alpha=0.6)
    _step_axis(axes)
    axes.set(title=f"RL: {label}", ylabel=label)
    if not axes.lines:
        _nothing(axes, "no runs")


def _by_token(axes: Any, arms: Mapping[str, Any]) -> None:
    """Held-out accuracy by the response tokens a run has generated per rollout row, in thousands:
    a policy of shorter responses gets further for the same."""
    for i, scores in enumerate(arms.values()):
        curves = scores["curves"]
        if not {"eval/accuracy", "response/length"} <= curves.keys():
            continue
        lengths = _means(curves["response/length"])
        steps = np.array(curves["response/length"]["step"])
        accuracy = _means(curves["eval/accuracy"])
        tokens = [
            np.nansum(lengths[steps <= step]) / 1000 for step in curves["eval/accuracy"]["step"]
        ]
        axes.plot(tokens, accuracy, **_style(i))
    axes.set(
        title="RL: accuracy by tokens",
        xlabel="thousand response tokens per row",
        ylabel="accuracy, held-out",
    )
    if not axes.lines:
        _nothing(axes, "no runs")


def _means(curve: Mapping[str, Any]) -> np.ndarray:
    """Over seeds, step by step; nan where no seed has a value."""
    estimates = [over_seeds(column)["estimate"] for column in zip(*curve["values"], strict=True)]
    return np.array(estimates, float)


def _threshold(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """How many wrong steps a vote detects, by how many one verification of the verifier does."""
    rows = sorted(rows, key=lambda row: row["detection"]["estimate"] or 0.0)
    x, left, right = _bounds([row["detection"] for row in rows])
    y, low, high = _bounds([row["voted_detection"] for row in rows])
    axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
    axes.axvline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes.plot(x, y, **_style(0))
    axes.vlines(x, low, high, color=_style(0)["color"], alpha=0.4)
    axes.hlines(y, left, right, color=_style(0)["color"], alpha=0.4)
    for where, height, row in zip(x, y, rows):
        axes.annotate(str(row["updates"]), (where, height), fontsize=7, xytext=(6, -8),
                      textcoords="offset points")  # fmt: skip
    axes.set(
        title="Stage I: votes by verifiers' updates",
        xlabel="wrong steps that one verification detects",
        ylabel="that a vote detects",
        xlim=(0, 1),
        ylim=(0, 1),
    )


def _by_problems(axes: Any, problems: Mapping[str, Any]) -> None:
    """F1 of reward models by the number of problems that stage I had."""
    estimates, low, high = _bounds([scores["f1"] for scores in problems.values()])
    x = [int(number) for number in problems]
    axes.plot(x, estimates, **_style(0))
    axes.vlines(x, low, high, color=_style(0)["color"], alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, list(problems))
    axes.set(title="Stage II: F1 by problems", xlabel="problems", ylabel="F1, first wrong step")


def _run_panel(axes: Any, title: str, series: Mapping[str, Sequence[tuple[int, Any]]]) -> None:
    """Lines of one run; `series` are (step, value or None)."""
    missing = 0
    for i, (name, points) in enumerate(series.items()):
        kept = [(step, value) for step, value in points if value is not None]
        missing += len(points) - len(kept)
        style = _style(i) | {"marker": "" if len(kept) > 30 else ".", "linewidth": 1.4}
        axes.plot([step for step, _ in kept], [value for _, value in kept], label=name, **style)
    title = title if len(series) > 1 else next(iter(series))
    axes.set_title(f"{title} ({missing} not finite)" if missing else title, fontsize=10)
    axes.tick_params(labelsize=8)
    if len(series) > 1:
        axes.legend(fontsize=7, framealpha=0.6)
    _step_axis(axes)


def _bars(axes: Any, scores: Mapping[str, Any], colours: Sequence[str]) -> None:
    """A bar and its number for each score in [0, 1], with its interval and every seed as a dot."""
    estimates, low, high = _bounds(list(scores.values()))
    positions = np.arange(len(scores))
    axes.bar(positions, estimates, color=list(colours), alpha=0.8)
    axes.vlines(positions, low, high, color="black")
    for x, score in enumerate(scores.values()):
        seeds = [value for value in score["per_seed"] if value is not None]
        axes.plot([x] * len(seeds), seeds, ".", color="black", markersize=4)
        text = "–" if score["estimate"] is None else f"{score['estimate']:.2f}"
        ground = {"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 1}
        axes.text(x, 0.03, text, ha="center", fontsize=9, bbox=ground)
    axes.set_xticks(positions, list(scores), rotation=30, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", labelsize=9)
    axes.set_ylim(0, 1.02)
    if not scores:
        _nothing(axes, "no runs")


def _bounds(scores: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimates, lower and upper bounds, nan where missing: matplotlib leaves nan out."""
    estimates, low, high = (
        np.array([score[key] for score in scores], float) for key in ("estimate", "low", "high")
    )
    return estimates, low, high


def _style(i: int) -> dict[str, Any]:
    """How the i-th line looks. Solid lines are broad, so that broken ones show on top of them."""
    line = i % len(LINES)
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": LINES[line],
        "linewidth": 1.7 if line else 4.0,
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 5,
        "zorder": 3 if line else 2,
    }


def _step_axis(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel("step")


def _nothing(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="gray")
