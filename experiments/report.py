"""One HTML file about a run, or about all the runs in a folder, to open in a browser.

    python -m spark_jax.experiments.report --run=runs/demo
    python -m spark_jax.experiments.report --run=runs/rl --output=rl.html --rollouts=2000

Curves with intervals, the tables of the stages, the monitor's alarms, and rollouts token by token.
A folder of one run, of a pipeline, of a study, or any that holds runs; what has not finished is
shown as far as it is. The file needs no network and no server.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from spark_jax import tasks
from spark_jax.data.records import Problem, Solution, VerifiedSolution, read_jsonl
from spark_jax.reports import full_study, page, rollouts, runs, tables
from spark_jax.reports.benchmarks import Table
from spark_jax.reports.page import Page, Rollout
from spark_jax.reports.rollouts import RolloutRecord
from spark_jax.reports.runs import Run
from spark_jax.reports.study import read_json, stage1_scores, stage2_scores

logger = logging.getLogger(__name__)

NAME = "page.html"
MAX_STEPS = 8  # recorded steps that are shown of a run alone; of several, the first and the last


def write(path: Path, output: Path | None = None, *, max_rollouts: int = 1000) -> Path:
    """Writes the page about the runs in `path`, to `path/page.html` if not told otherwise.

    About `max_rollouts` responses are in it, spread over runs and steps, whole groups each.
    Raises FileNotFoundError for a folder without runs.
    """
    found = runs.find(path)
    shown = Page(
        title=path.resolve().name,
        facts=facts(found),
        sections=runs.sections(found),
        tables=stage_tables(path, found),
        alarms=runs.alarms(found),
        rollouts=chosen_rollouts(found, max_rollouts),
    )
    return page.write(output or path / NAME, shown)


def facts(found: Sequence[Run]) -> list[str]:
    """Short lines: what the runs are about."""
    task = sorted({run.config["task"] for run in found if "task" in run.config})
    model = sorted({run.config["model"] for run in found if "model" in run.config})
    seeds = sorted({run.seed for run in found})
    lines = [f"{len(found)} runs"] if len(found) > 1 else []
    lines += [f"task {', '.join(task)}"] if task else []
    lines += [f"model {', '.join(model)}"] if 0 < len(model) < 4 else []
    return [*lines, f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"]


def stage_tables(path: Path, found: Sequence[Run]) -> list[Table]:
    """Those of a study or a pipeline that has come so far; else one of each name of a stage I run,
    and one of all reward models, over the seeds that have finished."""
    if (path / "study.json").exists():
        return list(full_study.tables(read_json(path / "study.json")))
    if (path / "summary.json").exists() and "stage3" in (
        summary := read_json(path / "summary.json")
    ):
        return tables.stages(summary)
    made, judges = [], {}
    for name, of in _by_name(found).items():
        finished = [run for run in of if (run.path / "summary.json").exists()]
        summaries = [read_json(run.path / "summary.json") for run in finished]
        if finished and finished[0].is_stage1:
            title = f"{name}: verifications against the truth ({_seeds(finished)})"
            made.append(tables.stage1(title, stage1_scores(summaries, _samples(finished[0]))))
        elif finished and is_judge(summaries[0]):
            judges[name] = stage2_scores(summaries)
    if judges:
        made.append(tables.stage2("Reward models on held-out solutions", judges))
    return made


def is_judge(summary: Mapping[str, Any]) -> bool:
    """Whether it says how good a reward model is, alone or at the end of its training."""
    return "overall_accuracy" in summary.get("held_out", summary)


def _by_name(found: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs that differ in their seed alone."""
    named: dict[str, list[Run]] = {}
    for run in found:
        named.setdefault(run.full_name, []).append(run)
    return named


def _seeds(runs: Sequence[Run]) -> str:
    return f"seed{'s' if len(runs) > 1 else ''} {', '.join(str(run.seed) for run in runs)}"


def chosen_rollouts(found: Sequence[Run], max_rollouts: int) -> list[Rollout]:
    """Recorded steps of the runs with the lowest seed of their name, and stage I, the first groups
    of each, so that there are about `max_rollouts` responses."""
    first = {(run.part, run.name): run for run in reversed(found)}
    shown = [run for run in found if first[run.part, run.name] is run]
    several = sum(run.is_rl for run in shown) > 1
    records: list[tuple[str, RolloutRecord]] = []
    for run in shown:
        if run.is_stage1:
            records.append((f"{run.full_name}: solutions", stage1_record(run)))
        files = rollouts.recorded_steps(run.path)
        steps = _evenly(list(files), 2 if several else MAX_STEPS)
        records += [(f"{run.full_name}, step {step}", rollouts.read(files[step])) for step in steps]
    return [
        Rollout(name, record.first_groups(_groups(record, max_rollouts // len(records))))
        for name, record in records
    ]


def stage1_record(run: Run) -> RolloutRecord:
    """Solutions, their verifications, and what is known of them."""
    solutions = read_jsonl(run.path / "solutions.jsonl", Solution)
    verified = read_jsonl(run.path / "verified.jsonl", VerifiedSolution)
    problems: list[Problem] = []
    try:
        task = tasks.load(run.config["task"], _task_options(run.config))
        number = run.config["generate"]["num_problems"]
        problems = task.problems(number, run.seed, "train")
        solutions = tasks.with_labels(task, problems, solutions)
    except (FileNotFoundError, ValueError, KeyError) as error:
        logger.warning("%s: questions and labels are left out: %s", run.path, error)
    methods = run.config["verify"]["methods"]
    method = "step_consistency" if "step_consistency" in methods else methods[0]
    return rollouts.from_stage1(problems, solutions, verified, method)


def _groups(record: RolloutRecord, responses: int) -> int:
    """How many groups have about so many responses, at least one."""
    size = len(record.responses) / max(1, len(record.groups))
    return max(1, round(responses / max(1.0, size)))


def _evenly(steps: list[int], number: int) -> list[int]:
    """At most so many of the steps, the first and the last among them."""
    if len(steps) <= number:
        return steps
    return [steps[round(i * (len(steps) - 1) / (number - 1))] for i in range(number)]


def _samples(run: Run) -> int:
    return run.config["verify"]["samples_per_solution"]


def _task_options(config: Mapping[str, Any]) -> tasks.TaskOptions:
    return tasks.TaskOptions(**config.get("task_options", {}))


def main(_: Sequence[str]) -> None:
    try:
        output = Path(_OUTPUT.value) if _OUTPUT.value else None
        print(write(Path(_RUN.value), output, max_rollouts=_ROLLOUTS.value))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _RUN = flags.DEFINE_string("run", None, "A folder with runs.", required=True)
    _OUTPUT = flags.DEFINE_string("output", None, f"The file; {NAME} in the folder if not given.")
    _ROLLOUTS = flags.DEFINE_integer("rollouts", 1000, "About how many responses to show.")
    app.run(main)
