"""Run folders as the page shows them: found in a tree, their curves over seeds, their alarms."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spark_jax.reports.page import Line, Panel, Section
from spark_jax.reports.plots import RUN_PANELS, chosen
from spark_jax.reports.study import finite, number_of_seeds, over_seeds
from spark_jax.rewards import monitor
from spark_jax.training.metrics import read_metrics

# Panels of several runs, one metric each; those that no run has are left out.
COMPARED = {
    "accuracy, held-out": "eval/accuracy",
    "accuracy of rollouts": "truth/accuracy",
    "reward": "reward/mean",
    "response tokens": "response/length",
    "steps per response": "hacking/steps_per_response",
    "entropy (nats)": "policy/entropy",
    "groups of equal rewards": "reward/zero_variance_groups",
    "reward model says Yes": "reward_model/yes",
    "CPR against verdicts (AUC)": "spro/process_reward_auc_verdicts",
    "CPR against truth (AUC)": "spro/process_reward_auc_truth",
    "mean |MSA|": "spro/msa_mean_absolute",
    "log-prob gap, sampler to scorer": "policy/logprob_gap_max",
    "gradient norm": "policy/grad_norm",
    "loss": "train/loss",
}
WATCHED = {"monitor: above a threshold is an alarm": (monitor.PREFIX,)}
BOUNDS = ("_low", "_high")  # after a metric's name: the interval that the run itself gave


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder. Runs of one `name` differ in their seed; `part` is what they are compared
    within. `config` is `config.json`."""

    path: Path
    part: str
    name: str
    seed: int
    config: Mapping[str, Any]

    @functools.cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`; none where there is no such file."""
        file = self.path / "metrics.jsonl"
        return read_metrics(file) if file.exists() else []

    @property
    def full_name(self) -> str:
        """Part and name, of all seeds."""
        return "/".join(filter(None, (self.part, self.name)))

    @property
    def is_rl(self) -> bool:
        return "rl" in self.config and bool(self.metrics)

    @property
    def is_stage1(self) -> bool:
        return (self.path / "verified.jsonl").exists()

    @property
    def thresholds(self) -> monitor.Thresholds:
        """Those of the run, else the usual ones."""
        return monitor.Thresholds(**self.config.get("rl", {}).get("monitor", {}))


def find(root: Path) -> list[Run]:
    """The runs in a folder, itself or below it, by name and seed.

    A run's name is its path with what names the seed taken out, such as `rl_spro` of
    `seed0/rl_spro` and `rl/spro/clipped` of `rl/spro/clipped/seed0`. Raises FileNotFoundError for a
    folder without runs. A folder of runs, such as a pipeline's, is none itself.
    """
    found = []
    for folder, below, files in os.walk(root):
        below[:] = sorted(set(below) - {"checkpoints", "model", "samples", "plots"})
        if "config.json" in files and "versions.json" in files:
            path = Path(folder)
            config = json.loads((path / "config.json").read_text())
            relative = path.relative_to(root).as_posix() if path != root else root.resolve().name
            name = _SEED.sub("", relative).strip("/") or root.resolve().name
            part, _, name = name.rpartition("/")
            found.append(Run(path, part, name, int(config.get("seed", 0)), config))
    if not found:
        raise FileNotFoundError(
            f"{root} holds no run: no config.json with a versions.json beside it, here or below"
        )
    holding = {parent for run in found for parent in run.path.parents}
    runs = [run for run in found if run.metrics or run.is_stage1 or run.path not in holding]
    return sorted(runs, key=lambda run: (run.part, run.name, run.seed))


def sections(runs: Sequence[Run]) -> list[Section]:
    """The curves: RL by part, then whatever else trained. One run alone has panels of many metrics,
    several have a panel for each metric, means with t-intervals over their seeds."""
    made = []
    for rl in (True, False):
        kind = [run for run in runs if run.metrics and run.is_rl == rl]
        for part in dict.fromkeys(run.part for run in kind):
            within = [run for run in kind if run.part == part]
            title = " ".join(filter(None, (part, "RL" if rl else "supervised training")))
            made.append(_section(title, within))
    return [section for section in made if section.panels]


def alarms(runs: Sequence[Run]) -> dict[str, list[monitor.Alarm]]:
    """Run → the monitor's alarms, of the runs that it watched."""
    watched = [run for run in runs if any(f"{monitor.PREFIX}alarms" in row for row in run.metrics)]
    return {
        f"{run.full_name}, seed {run.seed}": monitor.alarms(run.metrics, run.thresholds)
        for run in watched
    }


def _section(title: str, runs: Sequence[Run]) -> Section:
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    if len(runs) == 1:
        return Section(title, (), tuple(_own_panels(runs[0])))
    panels = [
        Panel(label, tuple(lines), _note(by_name.values(), lines))
        for label, metric in COMPARED.items()
        if (lines := list(_lines(by_name, metric)))
    ]
    return Section(title, tuple(by_name), tuple(panels))


def _own_panels(run: Run) -> Iterable[Panel]:
    """A panel for each group of metrics that belong together."""
    names = list(dict.fromkeys(name for row in run.metrics for name in row))
    for title, wanted in {**RUN_PANELS, **WATCHED}.items():
        shown = [name for name in chosen(names, wanted) if name != f"{monitor.PREFIX}alarms"]
        lines = [line for name in shown if (line := _line(name, [run], name))]
        if lines:
            yield Panel(title, tuple(lines), _note([[run]], lines))


def _lines(by_name: Mapping[str, Sequence[Run]], metric: str) -> Iterable[Line]:
    for name, runs in by_name.items():
        if line := _line(name, runs, metric):
            yield line


def _line(label: str, runs: Sequence[Run], metric: str) -> Line | None:
    """A metric over the seeds of a run; of a single seed with its own interval, where it has one.
    None without any value."""
    series = [_by_step(run, metric) for run in runs]
    steps = sorted(set().union(*series))
    points = [over_seeds([one.get(step) for one in series]) for step in steps]
    if all(point["estimate"] is None for point in points):
        return None
    estimate = [point["estimate"] for point in points]
    if len(runs) > 1:
        bounds = [[point[side] for point in points] for side in ("low", "high")]
    else:
        own = [_by_step(runs[0], metric + suffix) for suffix in BOUNDS]
        bounds = [[one.get(step) for step in steps] for one in own]
    return Line(label, steps, estimate, *bounds)


def _by_step(run: Run, metric: str) -> dict[int, float | None]:
    """step → value; a share of a reward model that was never asked is none."""
    asked = not metric.startswith("reward_model/")
    return {
        row["step"]: finite(row[metric])
        for row in run.metrics
        if metric in row and (asked or row.get("reward_model/called", 0) > 0)
    }


def _note(groups: Iterable[Sequence[Run]], lines: Sequence[Line]) -> str:
    """What the bands are."""
    counts = [len(runs) for runs in groups]
    if max(counts) > 1:
        return f"mean, 95 % t-interval over {number_of_seeds(counts)}"
    bounded = any(value is not None for line in lines for value in line.low)
    return "band: 95 % over problems" if bounded else ""


_SEED = re.compile(r"(?:^|[/_.-])seed[_-]?\d+")
