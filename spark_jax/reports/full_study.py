"""What the runs of a full study found: from run folders to one record, and its tables.

Every estimate is `study.over_seeds`: a mean with its 95 % t-interval over seeds. Runs that are not
there yet are left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spark_jax.evaluation.intervals import paired_permutation_test
from spark_jax.reports import study
from spark_jax.reports.benchmarks import Table, markdown
from spark_jax.reports.tables import MISSING, interval, verdict

STAGE2_METRICS = (
    "f1",
    "majority_f1",
    "overall_accuracy",
    "majority_overall_accuracy",
    "soft_auc",
    "yes",
    "unparseable",
)


@dataclasses.dataclass(frozen=True)
class Outline:
    """Which runs a study consists of; `arms` is part → arm → seeds, `baselines` part → arm."""

    seeds: tuple[int, ...]
    fewer: tuple[int, ...]
    num_samples: int
    temperatures: tuple[float, ...]
    problem_counts: tuple[int, ...]
    kinds: tuple[str, ...]
    methods: tuple[str, ...]
    arms: Mapping[str, Mapping[str, tuple[int, ...]]]
    baselines: Mapping[str, str]


def collect(path: Path, outline: Outline) -> dict[str, Any]:
    """The record of the study in the folder `path`, JSON values.

    Keys: `seeds`; `stage1` (method → N → metric); `verifier` (a row a temperature: how many wrong
    steps single verifications detect, and the step accuracy of one and of a vote); `stage2` (kind →
    method → metric), `problems` (number → metric); `rl` (part → arm → scores, see `_arm`).
    """
    first = _summaries(path / "stage1", outline.seeds)
    return {
        "seeds": list(outline.seeds),
        "num_samples": outline.num_samples,
        "stage1": study.stage1_scores(first, outline.num_samples) if first else {},
        "verifier": [
            {"temperature": t, **_verifier(found)}
            for t in outline.temperatures
            if (found := _summaries(path / "verifier" / f"temperature_{t:g}", outline.fewer))
        ],
        "stage2": _stage2(path / "prm", outline),
        "problems": {
            str(number): _reward_model(found)
            for number in outline.problem_counts
            if (found := _summaries(path / "prm_by_problems" / str(number), outline.fewer))
        },
        "rl": {
            part: scores
            for part, made in outline.arms.items()
            if (scores := _part(path / "rl" / part, made, outline.baselines[part]))
        },
    }


def as_markdown(found: Mapping[str, Any]) -> str:
    """All tables of what was found."""
    return "\n".join(markdown(table) for table in tables(found))


def tables(found: Mapping[str, Any]) -> Iterable[Table]:
    """The tables, in the order a reader would ask."""
    if found["stage1"]:
        yield _stage1_table(found)
    if found["verifier"]:
        yield _verifier_table(found)
    if found["stage2"]:
        yield _stage2_table(found["stage2"])
    if found["problems"]:
        yield _problems_table(found["problems"])
    for part, arms in found["rl"].items():
        yield _accuracy_table(part, arms)
        yield _behaviour_table(part, arms)


def _verifier(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How good single verifications are, and what a vote over all of them makes of that."""

    def over(method: str, metric: str) -> dict[str, Any]:
        return study.over_seeds([s["methods"][method][metric] for s in summaries])

    single, voted = (
        [s["methods"][method]["step_accuracy"] for s in summaries]
        for method in ("single", "step_consistency")
    )
    return {
        "detection": over("single", "detection_rate"),
        "false_alarm": over("single", "false_alarm_rate"),
        "validity": over("single", "validity_rate"),
        "single": study.over_seeds(single),
        "voted": study.over_seeds(voted),
        "gain": study.over_seeds([b - a for a, b in zip(single, voted, strict=True)]),
    }


def _stage2(path: Path, outline: Outline) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, seeds in (("base", outline.seeds), ("weak", outline.fewer)):
        if found := _summaries(path / name, seeds):
            made[name] = {"": _reward_model(found)}
    for kind in outline.kinds:
        seeds = outline.seeds if kind == "prm_cot" else outline.fewer
        rows = {
            method: _reward_model(found)
            for method in outline.methods
            if (found := _summaries(path / kind / method, seeds))
        }
        if rows:
            made[kind] = rows
    return made


def _reward_model(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """metric → estimate; a trained model's scores stand under `held_out`."""
    scores = [summary.get("held_out", summary) for summary in summaries]
    flat = [{**s, "overall_accuracy": s["overall_accuracy"]["estimate"]} for s in scores]
    return {
        name: study.over_seeds([score.get(name) for score in flat])
        for name in STAGE2_METRICS
        if any(name in score for score in flat)
    }


def _part(path: Path, arms: Mapping[str, Sequence[int]], baseline: str) -> dict[str, Any]:
    """Arm → scores, the baseline first, for the arms of which every seed has finished."""
    runs = {
        arm: [path / arm / f"seed{seed}" for seed in seeds]
        for arm, seeds in arms.items()
        if len(_summaries(path / arm, seeds)) == len(seeds)
    }
    order = sorted(runs, key=lambda arm: arm != baseline)
    against = runs.get(baseline)
    return {arm: _arm(runs[arm], None if arm == baseline else against) for arm in order}


def _arm(folders: Sequence[Path], baseline: Sequence[Path] | None) -> dict[str, Any]:
    """What `study.arm_scores` says; the best accuracy on the way; and, seed by seed, the difference
    from the baseline's accuracy at the end with `p_value`, a paired permutation test over all the
    problems of the seeds that both have (the problems of a seed are the same for all arms)."""
    scores = study.arm_scores(folders)
    accuracy = scores["curves"].get("eval/accuracy", {"values": [[] for _ in folders]})["values"]
    best = [max((v for v in one if v is not None), default=None) for one in accuracy]
    scores["best"] = study.over_seeds(best)
    if baseline is not None:
        pairs = list(zip(folders, baseline, strict=False))
        shares = [[_shares(folder) for folder in pair] for pair in pairs]
        differences = [float(np.mean(one - two)) for one, two in shares]
        ours, theirs = (np.concatenate([pair[i] for pair in shares]) for i in (0, 1))
        scores["difference"] = study.over_seeds(differences)
        scores["p_value"] = paired_permutation_test(ours, theirs)
    return scores


def _shares(folder: Path) -> np.ndarray:
    """Share of right responses to each evaluation problem, in the problems' order."""
    found = json.loads((folder / "summary.json").read_text())["evaluation"]
    order = np.argsort(found["problem_ids"])
    return np.array(found["correct_per_problem"], float)[order]


def _summaries(folder: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Those of the finished runs among the seeds."""
    files = [folder / f"seed{seed}" / "summary.json" for seed in seeds]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def _stage1_table(found: Mapping[str, Any]) -> Table:
    rows = [
        (method, n, *(interval(score, 3) for score in scores.values()))
        for method, by_count in found["stage1"].items()
        for n, scores in by_count.items()
    ]
    columns = ("method", "N", "step accuracy", "overall accuracy", "derived accuracy")
    notes = ("Derived: the overall verdict taken to be Yes where every step is judged correct.",)
    return Table("Stage I: verifications against the truth", columns, tuple(rows), notes)


def _verifier_table(found: Mapping[str, Any]) -> Table:
    rows = [
        (
            f"{row['temperature']:g}",
            *(interval(row[name], 3) for name in ("detection", "false_alarm", "validity")),
            *(interval(row[name], 3) for name in ("single", "voted", "gain")),
        )
        for row in sorted(found["verifier"], key=lambda row: row["temperature"])
    ]
    columns = ("temperature", "detects", "doubts", "readable", "one", "vote", "vote − one")
    return Table(
        f"Stage I: step accuracy of one verification and of a vote over {found['num_samples']}",
        columns,
        tuple(rows),
        ("Detects, doubts: share of wrong, of right steps that one verification marks incorrect.",),
    )


def _stage2_table(stage2: Mapping[str, Any]) -> Table:
    rows = [
        (kind, method or MISSING, *(_cell(scores, name) for name in STAGE2_METRICS))
        for kind, methods in stage2.items()
        for method, scores in methods.items()
    ]
    columns = ("kind", "targets from", "F1", "F1, votes", "overall", "overall, votes", "soft AUC")
    return Table(
        "Stage II: reward models on held-out solutions",
        (*columns, "says Yes", "unread"),
        tuple(rows),
    )


def _problems_table(problems: Mapping[str, Any]) -> Table:
    names = ("f1", "majority_f1", "overall_accuracy", "soft_auc")
    rows = [(n, *(_cell(scores, name) for name in names)) for n, scores in problems.items()]
    columns = ("problems", "F1", "F1, votes", "overall", "soft AUC")
    return Table("Stage II: PRM-CoT by the number of problems of stage I", columns, tuple(rows))


def _accuracy_table(part: str, arms: Mapping[str, Any]) -> Table:
    rows = [
        (
            arm,
            str(scores["after"]["num_seeds"]),
            interval(scores["before"], 3),
            interval(scores["after"], 3),
            interval(scores["best"], 3),
            interval(scores["difference"], 3) if "difference" in scores else MISSING,
            verdict(scores["difference"]) if "difference" in scores else MISSING,
            f"{scores['p_value']:.3g}" if "p_value" in scores else MISSING,
        )
        for arm, scores in arms.items()
    ]
    baseline = next(iter(arms))
    columns = ("arm", "seeds", "before", "after", "best", f"− {baseline}", "over seeds", "p")
    notes = (
        "p: paired permutation test over the evaluation problems of these very policies; the "
        "interval is over seeds, which is what a claim about the method needs.",
    )
    return Table(f"RL, {part}: accuracy on held-out problems", columns, tuple(rows), notes)


BEHAVIOUR = {
    "tokens": "eval/response_length",
    "steps": "hacking/steps_per_response",
    "appended": "hacking/appended_after_answer",
    "entropy": "policy/entropy",
    "equal groups": "reward/zero_variance_groups",
    "reward": "reward/mean",
    "true accuracy": "truth/accuracy",
    "abs MSA": "spro/msa_mean_absolute",
    "AUC of CPR": "spro/process_reward_auc_truth",
}


def _behaviour_table(part: str, arms: Mapping[str, Any]) -> Table:
    rows = [
        (arm, *(_last(scores["curves"], metric) for metric in BEHAVIOUR.values()))
        for arm, scores in arms.items()
    ]
    notes = (
        "Reward and true accuracy are of the last rollout: a reward far above the accuracy is "
        "hacked. AUC of CPR: does the process reward of a step tell right steps from wrong ones?",
    )
    return Table(f"RL, {part}: what the policies do", ("arm", *BEHAVIOUR), tuple(rows), notes)


def _last(curves: Mapping[str, Any], metric: str) -> str:
    if metric not in curves:
        return MISSING
    value = study.over_seeds([series[-1] for series in curves[metric]["values"]])["estimate"]
    return MISSING if value is None else f"{value:.3g}"


def _cell(scores: Mapping[str, Any], name: str) -> str:
    return interval(scores[name], 3) if name in scores else MISSING
