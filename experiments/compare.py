"""Is one run better than another? The difference in accuracy on the same problems, with a test.

    python -m spark_jax.experiments.compare --first=runs/spro --second=runs/grpo
    python -m spark_jax.experiments.compare \
        --first=runs/seed0/spro,runs/seed1/spro --second=runs/seed0/grpo,runs/seed1/grpo

Folders of `evaluate` (policy or benchmarks) or of `train_rl`, several of a run that was repeated
with other seeds. Prints JSON: per benchmark the accuracy of each side, the difference with its 95 %
interval, and a p-value where problems can be paired (paired permutation test); and which benchmarks
only some of the folders have. Several seeds share their evaluation problems (`evaluate` with one
`seed` for all policies), or each seed has its own (`train_rl`): then the folders are paired in the
order given, and the interval is over seeds.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from spark_jax.evaluation import intervals


def compare(first: Sequence[Path], second: Sequence[Path]) -> dict[str, Any]:
    """benchmark (or "evaluation") -> accuracies, difference, interval, and p-value; "left_out"
    names the benchmarks that only some of the folders have.

    Raises:
        FileNotFoundError: a folder without a finished run.
        ValueError: no accuracies per problem, or not of the same problems.
    """
    sides = [[shares(path) for path in side] for side in (first, second)]
    names = [name for name in sides[0][0] if all(name in run for side in sides for run in side)]
    if not names:
        raise ValueError(f"{[*map(str, first), *map(str, second)]} have no benchmark in common")
    everything = {name for side in sides for run in side for name in run}
    found = {name: difference(*([run[name] for run in side] for side in sides)) for name in names}
    return found | ({"left_out": left_out} if (left_out := sorted(everything - {*names})) else {})


def shares(path: Path) -> dict[str, dict[str, float]]:
    """benchmark -> problem id -> share of right responses, in the run of a folder."""
    file = path / "summary.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no summary.json, so it is no finished run")
    summary = json.loads(file.read_text())
    scores = summary.get("benchmarks") or {"evaluation": summary.get("evaluation", summary)}
    found = {
        name: dict(zip(score["problem_ids"], score["correct_per_problem"], strict=True))
        for name, score in scores.items()
        if "problem_ids" in score
    }
    known = {
        name: {problem: share for problem, share in of.items() if share is not None}
        for name, of in found.items()
    }
    if not any(known.values()):
        raise ValueError(f"{file} has no accuracy per problem; it must be of a policy")
    return {name: of for name, of in known.items() if of}


def difference(
    first: Sequence[dict[str, float]], second: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """mean(first) − mean(second), one dict of shares a run."""
    problems = sorted(first[0])
    if any(sorted(run) != problems for run in (*first, *second)):
        return difference_by_pairs(first, second)
    one, two = (np.array([[run[p] for p in problems] for run in side]) for side in (first, second))
    found = {
        "first": one.mean(axis=1).tolist(),
        "second": two.mean(axis=1).tolist(),
        "num_problems": len(problems),
    }
    if len(one) > 1 and len(two) > 1:
        interval = intervals.paired_crossed_interval(one, two)
        return found | {"difference": dataclasses.asdict(interval)}
    if len(one) > 1 or len(two) > 1:
        raise ValueError(
            f"{len(one)} runs against {len(two)}: give one of each, or at least two of each"
        )
    interval = intervals.paired_bootstrap_interval(one[0], two[0])
    p_value = intervals.paired_permutation_test(one[0], two[0])
    return found | {"difference": dataclasses.asdict(interval), "p_value": p_value}


def difference_by_pairs(
    first: Sequence[dict[str, float]], second: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """As `difference`, where only the runs of a pair share their problems."""
    pairs = list(zip(first, second, strict=False))
    if len(first) != len(second) or any(sorted(one) != sorted(two) for one, two in pairs):
        raise ValueError(
            "the runs were evaluated on different problems, and not the same ones in each pair of "
            "folders either; evaluate all of them with the same task, evaluate.num_problems and "
            "seed, or name the folders of both sides in the order of their seeds"
        )
    shares = [np.array([[one[p], two[p]] for p in sorted(one)]).T for one, two in pairs]
    one, two = np.concatenate(shares, axis=1)
    interval = intervals.t_interval(np.array([np.mean(a - b) for a, b in shares]))
    return {
        "first": [float(a.mean()) for a, _ in shares],
        "second": [float(b.mean()) for _, b in shares],
        "num_problems": [len(a) for a, _ in shares],
        "difference": dataclasses.asdict(interval),
        "p_value": intervals.paired_permutation_test(one, two),
    }


def main(_: Sequence[str]) -> None:
    try:
        found = compare([*map(Path, _FIRST.value)], [*map(Path, _SECOND.value)])
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    _FIRST = flags.DEFINE_list("first", None, "Folders of one run, a seed each.", required=True)
    _SECOND = flags.DEFINE_list("second", None, "Folders of the other.", required=True)
    app.run(main)
