"""What the runs of a full study found: from run folders to one record, and its tables.

Every estimate is `study.over_seeds`: a mean with its 95 % t-interval over seeds. Runs that are not
there yet are left out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spark_jax import tasks
from spark_jax.data.records import Solution, Verification, VerifiedSolution, read_jsonl
from spark_jax.evaluation.intervals import paired_permutation_test
from spark_jax.reports import study
from spark_jax.reports.benchmarks import Table, markdown
from spark_jax.reports.tables import MISSING, estimates, interval, last, stage1, verdict
from spark_jax.training.metrics import read_metrics
from spark_jax.verification.report import sampled_detection

STAGE2_COLUMNS = {
    "F1": "f1",
    "F1, votes": "majority_f1",
    "overall": "overall_accuracy",
    "overall, votes": "majority_overall_accuracy",
    "soft AUC": "soft_auc",
    "says Yes": "yes",
    "unread": "unparseable",
}
STAGE2_METRICS = tuple(STAGE2_COLUMNS.values())
VERIFIER_COLUMNS = {
    "readable": "validity",
    "detects": "detection",
    "detects, vote": "voted_detection",
    "doubts": "doubt",
    "doubts, vote": "voted_doubt",
    "step accuracy": "accuracy",
    "step accuracy, vote": "voted_accuracy",
}
PROBLEMS_COLUMNS = {
    "F1": "f1",
    "F1, votes": "majority_f1",
    "overall": "overall_accuracy",
    "soft AUC": "soft_auc",
}


@dataclasses.dataclass(frozen=True)
class Outline:
    """Which runs a study consists of.

    `arms` is part → arm → seeds; `baselines` part → arm → the arm it is compared with, of the part
    or `<part>/<arm>`, the part's own baseline having none; `pictures` part → picture → arms.
    """

    seeds: tuple[int, ...]
    fewer: tuple[int, ...]
    num_samples: int
    verifier_updates: tuple[int, ...]
    weak_updates: int
    problem_counts: tuple[int, ...]
    kinds: tuple[str, ...]
    methods: tuple[str, ...]
    arms: Mapping[str, Mapping[str, tuple[int, ...]]]
    baselines: Mapping[str, Mapping[str, str]]
    pictures: Mapping[str, Mapping[str, Sequence[str]]]


def collect(path: Path, outline: Outline) -> dict[str, Any]:
    """The record of the study in the folder `path`, JSON values.

    Keys: `seeds`; `stage1` (method → N → metric); `verifier` (a row a verifier: how many wrong
    steps one verification detects and how many a vote, and the step accuracy of both); `stage2`
    (kind → method → metric), `problems` (number → metric); `rl` (part → arm → scores, see `_arm`);
    `pictures` (as in the outline).
    """
    first = _summaries(path / "stage1", outline.seeds)
    return {
        "seeds": list(outline.seeds),
        "num_samples": outline.num_samples,
        "stage1": study.stage1_scores(first, outline.num_samples) if first else {},
        "verifier": [
            {"updates": updates, **_verifier(folders)}
            for updates, folders in _verifiers(path, outline).items()
            if folders
        ],
        "stage2": _stage2(path / "prm", outline),
        "problems": {
            str(number): study.stage2_scores(found, STAGE2_METRICS)
            for number in outline.problem_counts
            if (found := _summaries(path / "prm_by_problems" / str(number), outline.fewer))
        },
        "rl": {
            part: scores for part in outline.arms if (scores := _part(path / "rl", part, outline))
        },
        "pictures": {
            part: {name: list(arms) for name, arms in groups.items()}
            for part, groups in outline.pictures.items()
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
        if any(PROCESS_REWARD_AUC["truth"] in scores["curves"] for scores in arms.values()):
            yield _process_reward_table(part, arms)
        yield _monitor_table(part, arms)


def _verifiers(path: Path, outline: Outline) -> dict[int | str, list[Path]]:
    """Updates that a verifier learned for → its finished runs; last the base, of stage I itself."""
    early: dict[int | str, list[Path]] = {
        updates: _finished(path / "verifier" / f"updates_{updates}", outline.fewer)
        for updates in sorted(outline.verifier_updates)
    }
    return {**early, "base": _finished(path / "stage1", outline.seeds)}


def _verifier(folders: Sequence[Path]) -> dict[str, Any]:
    """How good single verifications are, and what a vote over all of them makes of that."""
    summaries = [study.read_json(folder / "summary.json") for folder in folders]
    by_vote = [_voted_detection(folder) for folder in folders]
    one = [summary["methods"]["single"] for summary in summaries]
    vote = [summary["methods"]["step_consistency"] for summary in summaries]

    def both(name: str, ones: Sequence[Any], votes: Sequence[Any]) -> dict[str, Any]:
        return {
            name: study.over_seeds(ones),
            f"voted_{name}": study.over_seeds(votes),
            f"{name}_gain": study.over_seeds(study.paired(votes, ones)),
        }

    return {
        "validity": study.over_seeds([scores["validity_rate"] for scores in one]),
        **{
            name: value
            for short, metric in (("detection", "detection_rate"), ("doubt", "false_alarm_rate"))
            for name, value in both(
                short, [s[metric] for s in one], [found[metric] for found in by_vote]
            ).items()
        },
        **both("accuracy", *([s["step_accuracy"] for s in scores] for scores in (one, vote))),
    }


@functools.cache
def _voted_detection(folder: Path) -> dict[str, Any]:
    """`sampled_detection` of the step verdicts that a finished stage I run's votes arrive at."""
    config = study.read_json(folder / "config.json")
    task = tasks.load(config["task"], tasks.TaskOptions(**config["task_options"]))
    problems = task.problems(config["generate"]["num_problems"], config["seed"], "train")
    solutions = read_jsonl(folder / "solutions.jsonl", Solution)
    labelled = {
        (solution.problem_id, solution.index): solution
        for solution in tasks.with_labels(task, problems, solutions)
    }
    votes = [
        ((Verification("", item.voted_verdicts, overall=True),), labelled[key])
        for record in read_jsonl(folder / "verified.jsonl", VerifiedSolution)
        if (key := (record.problem_id, record.solution_index)) in labelled
        for item in record.aggregated
        if item.method == "step_consistency" and item.voted_verdicts is not None
    ]
    return sampled_detection(votes)


def _stage2(path: Path, outline: Outline) -> dict[str, Any]:
    made: dict[str, Any] = {}
    weak = f"a verifier of {outline.weak_updates} updates"
    for name, source, seeds in (("base", "", outline.seeds), ("weak", weak, outline.fewer)):
        if found := _summaries(path / name, seeds):
            made[name] = {source: study.stage2_scores(found, STAGE2_METRICS)}
    for kind in outline.kinds:
        seeds = outline.seeds if kind == "prm_cot" else outline.fewer
        rows = {
            method: study.stage2_scores(found, STAGE2_METRICS)
            for method in outline.methods
            if (found := _summaries(path / kind / method, seeds))
        }
        if rows:
            made[kind] = rows
    return made


def _part(path: Path, part: str, outline: Outline) -> dict[str, Any]:
    """Arm → scores, what is nobody's but others' baseline first, for the arms of which every seed
    has finished."""
    baselines = outline.baselines[part]
    runs = {
        arm: found
        for arm, seeds in outline.arms[part].items()
        if len(found := _finished(path / part / arm, seeds)) == len(seeds)
    }

    def baseline(arm: str) -> tuple[str, list[Path]] | None:
        if (name := baselines.get(arm)) is None:
            return None
        of, _, against = name.rpartition("/")
        of = of or part
        return name, _finished(path / of / against, outline.arms[of][against])

    order = sorted(runs, key=lambda arm: arm in baselines)
    return {arm: _arm(runs[arm], baseline(arm)) for arm in order}


def _arm(folders: Sequence[Path], baseline: tuple[str, list[Path]] | None) -> dict[str, Any]:
    """What `study.arm_scores` says, and the best accuracy on the way; `clipped`, the share of
    tokens whose ratio is clipped; what the monitor saw, seed by seed (`_watched`); and, of an arm
    with a baseline, its name as `baseline` and `_against` it."""
    scores = study.arm_scores(folders)
    accuracy = scores["curves"].get("eval/accuracy", {"values": [[] for _ in folders]})["values"]
    best = [max((v for v in one if v is not None), default=None) for one in accuracy]
    scores["best"] = study.over_seeds(best)
    rows = [read_metrics(folder / "metrics.jsonl") for folder in folders]
    scores["clipped"] = study.over_seeds([_clipped(one) for one in rows])
    scores["watched"] = [_watched(folder, one) for folder, one in zip(folders, rows, strict=True)]
    if baseline is not None:
        scores["baseline"] = baseline[0]
        scores |= _against(folders, baseline[1])
    return scores


def _against(folders: Sequence[Path], baseline: Sequence[Path]) -> dict[str, Any]:
    """`difference` from the baseline's accuracy at the end, seed by seed, with `p_value`, a paired
    permutation test over all the problems of the seeds that both have (the problems of a seed are
    the same for all arms). Nothing without such a seed."""
    theirs = {folder.name: folder for folder in baseline}
    pairs = [
        (_shares(folder), _shares(theirs[folder.name]))
        for folder in folders
        if folder.name in theirs
    ]
    if not pairs:
        return {}
    first, second = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return {
        "difference": study.over_seeds([float(np.mean(one - two)) for one, two in pairs]),
        "p_value": paired_permutation_test(first, second),
    }


def _clipped(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over the steps of a run; a step's is over its updates."""
    names = ("policy/clip_fraction_low", "policy/clip_fraction_high")
    shares = [sum(row[name] for name in names) for row in rows if names[0] in row]
    return float(np.mean(shares)) if shares else None


def _watched(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one run: `alarms`, pattern → the first step at which the monitor gave it; and `fell`, None
    or the evaluation at which accuracy on held-out problems had first fallen by `FALL` below its
    maximum so far (`seen`), and the one before (`after`): it fell in between."""
    alarms = {
        a["pattern"]: a["first_step"] for a in study.read_json(folder / "summary.json")["alarms"]
    }
    series = [
        (row["step"], accuracy)
        for row in rows
        if (accuracy := study.finite(row.get("eval/accuracy"))) is not None
    ]
    best = np.maximum.accumulate([accuracy for _, accuracy in series])
    for i, (step, accuracy) in enumerate(series):
        if best[i] - accuracy > FALL - 1e-9:
            return {"alarms": alarms, "fell": {"after": series[i - 1][0], "seen": step}}
    return {"alarms": alarms, "fell": None}


def _shares(folder: Path) -> np.ndarray:
    """Share of right responses to each evaluation problem, in the problems' order."""
    found = study.read_json(folder / "summary.json")["evaluation"]
    order = np.argsort(found["problem_ids"])
    return np.array(found["correct_per_problem"], float)[order]


def _summaries(folder: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Those of the finished runs among the seeds."""
    return [study.read_json(run / "summary.json") for run in _finished(folder, seeds)]


def _finished(folder: Path, seeds: Sequence[int]) -> list[Path]:
    """The folders of the finished runs among the seeds."""
    runs = [folder / f"seed{seed}" for seed in seeds]
    return [run for run in runs if (run / "summary.json").is_file()]


def _stage1_table(found: Mapping[str, Any]) -> Table:
    notes = (
        "Derived: the overall verdict taken to be Yes where every step is judged correct.",
        f"Methods with a critique are at N = {found['num_samples']} only: fewer samples choose "
        "another verification, and its critique would have to be sampled anew.",
    )
    return stage1("Stage I: verifications against the truth", found["stage1"], notes, decimals=3)


def _verifier_table(found: Mapping[str, Any]) -> Table:
    return estimates(
        f"Stage I: one verification and a vote over {found['num_samples']}, by verifier",
        ("updates",),
        [((str(row["updates"]),), row) for row in found["verifier"]],
        VERIFIER_COLUMNS,
        (
            "Updates: of the verifier's pretraining, one for all seeds; solutions are the base's, "
            "which is the last verifier. Early in it chance decides much, and intervals are of "
            "problems and samples alone.",
            "Detects, doubts: share of wrong, of right steps that are marked incorrect. Were all "
            "steps alike, a vote would detect fewer wrong steps than one verification that detects "
            "less than half of them.",
        ),
    )


def _stage2_table(stage2: Mapping[str, Any]) -> Table:
    rows = [
        ((kind, method or MISSING), scores)
        for kind, methods in stage2.items()
        for method, scores in methods.items()
    ]
    title = "Stage II: reward models on held-out solutions"
    return estimates(title, ("kind", "targets from"), rows, STAGE2_COLUMNS)


def _problems_table(problems: Mapping[str, Any]) -> Table:
    title = "Stage II: PRM-CoT by the number of problems of stage I"
    rows = [((number,), scores) for number, scores in problems.items()]
    return estimates(title, ("problems",), rows, PROBLEMS_COLUMNS)


def _accuracy_table(part: str, arms: Mapping[str, Any]) -> Table:
    rows = [
        (
            arm,
            str(scores["after"]["num_seeds"]),
            interval(scores["before"], 3),
            interval(scores["after"], 3),
            interval(scores["best"], 3),
            scores.get("baseline", MISSING),
            interval(scores["difference"], 3) if "difference" in scores else MISSING,
            verdict(scores["difference"]) if "difference" in scores else MISSING,
            f"{scores['p_value']:.3g}" if "p_value" in scores else MISSING,
        )
        for arm, scores in arms.items()
    ]
    columns = ("arm", "seeds", "before", "after", "best", "against", "difference", "over seeds")
    notes = (
        "p: paired permutation test over the evaluation problems of these very policies; the "
        "interval is over the seeds that arm and baseline share, which is what a claim about the "
        "method needs.",
        *(note for arm, note in ARM_NOTES.items() if arm in arms),
    )
    return Table(f"RL, {part}: accuracy on held-out problems", (*columns, "p"), tuple(rows), notes)


ARM_NOTES = {
    "prime_own_implicit_reward": "prime_own_implicit_reward: PRIME's formula for the advantage on "
    "the policy's own implicit reward, log π - log π_ref; no implicit reward model is trained.",
    "grpo_4": "grpo_4, gspo_4, dapo_4: four updates per rollout; with one, as in all other arms, "
    "every ratio is 1, and neither ratios nor clips do anything.",
}
BEHAVIOUR = {
    "tokens": "eval/response_length",
    "steps": "hacking/steps_per_response",
    "appended": "hacking/appended_after_answer",
    "entropy": "policy/entropy",
    "equal groups": "reward/zero_variance_groups",
    "reward": "reward/mean",
    "true accuracy": "truth/accuracy",
    "abs MSA": "spro/msa_mean_absolute",
}
PROCESS_REWARD_AUC = {
    "truth": "spro/process_reward_auc_truth",
    "verdicts": "spro/process_reward_auc_verdicts",
}
FALL = 0.05  # of held-out accuracy below its maximum


def _behaviour_table(part: str, arms: Mapping[str, Any]) -> Table:
    rows = [
        (
            arm,
            *(_short(last(scores["curves"], metric)["estimate"]) for metric in BEHAVIOUR.values()),
            _short(scores["clipped"]["estimate"]),
        )
        for arm, scores in arms.items()
    ]
    notes = (
        "Reward and true accuracy are of the last rollout: a reward far above the accuracy is "
        "hacked. Clipped: share of tokens whose ratio was clipped, mean over the steps.",
    )
    columns = ("arm", *BEHAVIOUR, "clipped")
    return Table(f"RL, {part}: what the policies do", columns, tuple(rows), notes)


def _process_reward_table(part: str, arms: Mapping[str, Any]) -> Table:
    rows = [
        (arm, *(cell for metric in PROCESS_REWARD_AUC.values() for cell in _course(found, metric)))
        for arm, scores in arms.items()
        if PROCESS_REWARD_AUC["truth"] in (found := scores["curves"])
    ]
    columns = [
        f"{of}, {when}"
        for of in PROCESS_REWARD_AUC
        for when in ("mean over steps", "first", "last")
    ]
    notes = (
        "Area under the curve: how often a right step has a greater cumulative process reward than "
        "a wrong one, by the truth and by the reward model's verdicts; 0.5 is chance. First and "
        "last: means of a quarter of the steps each. Arms without a reward model have no verdicts.",
    )
    title = f"RL, {part}: do process rewards tell right steps from wrong ones?"
    return Table(title, ("arm", *columns), tuple(rows), notes)


def _course(curves: Mapping[str, Any], metric: str) -> tuple[str, str, str]:
    """A metric's mean over the steps of a run, over the first quarter of them, and the last."""
    values = curves.get(metric, {"values": []})["values"]

    def over(part: slice) -> str:
        means = [[value for value in one[part] if value is not None] for one in values]
        return interval(study.over_seeds([np.mean(one) if one else None for one in means]), 3)

    quarter = max(1, len(values[0]) // 4) if values else 1
    return over(slice(None)), over(slice(quarter)), over(slice(-quarter, None))


def _monitor_table(part: str, arms: Mapping[str, Any]) -> Table:
    """The runs whose accuracy fell, or that the monitor gave an alarm for."""
    runs = [
        (arm, i, run) for arm, scores in arms.items() for i, run in enumerate(scores["watched"])
    ]
    shown = [(arm, i, run) for arm, i, run in runs if run["fell"] or run["alarms"]]
    rows = [(arm, str(i + 1), *_fall_and_alarms(run)) for arm, i, run in shown]
    fallen = [run for _, _, run in runs if run["fell"]]
    others = [run for _, _, run in runs if not run["fell"]]
    when = [_when(run) for run in fallen]
    notes = (
        f"Fell: held-out accuracy was {FALL:g} or more below its maximum so far, for the first "
        "time; it did so between these two evaluations. Lead: from the first alarm to the second "
        "of them.",
        f"{len(fallen)} of {len(runs)} runs fell; there was an alarm before in "
        f"{when.count('before')}, between the two evaluations in {when.count('meanwhile')}, later "
        f"in {when.count('after')}, never in {when.count('never')}. Of the "
        f"{len(others)} that did not fall, {sum(bool(run['alarms']) for run in others)} had one "
        "too: false, unless the reward had left the truth before accuracy could.",
    )
    columns = ("arm", "run", "fell", "first alarm", "lead", "when", "first steps of all alarms")
    title = f"RL, {part}: did the monitor see it before the accuracy fell?"
    return Table(title, columns, tuple(rows), notes)


def _fall_and_alarms(run: Mapping[str, Any]) -> tuple[str, ...]:
    alarms, fell = run["alarms"], run["fell"]
    first = min(alarms.values(), default=None)
    return (
        f"{fell['after']} to {fell['seen']}" if fell else MISSING,
        MISSING if first is None else str(first),
        str(fell["seen"] - first) if fell and first is not None else MISSING,
        _when(run),
        ", ".join(f"{name.replace('_', ' ')} {step}" for name, step in alarms.items()) or MISSING,
    )


def _when(run: Mapping[str, Any]) -> str:
    """The first alarm, seen from the fall."""
    first, fell = min(run["alarms"].values(), default=None), run["fell"]
    if first is None:
        return "never"
    if fell is None:
        return "no fall"
    if first <= fell["after"]:
        return "before"
    return "meanwhile" if first <= fell["seen"] else "after"


def _short(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}"
