"""The closing tables of a pipeline on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show(results: Mapping[str, Any], console: Console) -> None:
    """Prints what the stages found, and each claim with whether it shows here."""
    seeds = len(results["seeds"])
    note = f"mean over {seeds} seeds with 95 % t-interval" if seeds > 1 else "one seed: no interval"
    for table in (*_stages(results, note), _claims(results, note)):
        console.print(table)
    detection = results["verifier"]["detection_rate"]
    console.print(
        f"A single verification sees {interval(detection)} of the wrong steps; voting helps only "
        "above one half."
    )
    for warning in results["verifier"]["warnings"]:
        console.print(f"[yellow]{warning}")


def interval(value: Mapping[str, Any]) -> str:
    """`0.914 [0.902, 0.926]`, or the estimate alone where there is no interval."""
    if value["low"] is None:
        return f"{value['estimate']:.3f}"
    return f"{value['estimate']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def verdict(difference: Mapping[str, Any]) -> str:
    """Whether a difference is told from 0 by its interval."""
    if difference["low"] is None:
        return "one seed"
    if difference["low"] > 0:
        return "shows"
    return "reversed" if difference["high"] < 0 else "does not show"


def _stages(results: Mapping[str, Any], note: str) -> list[Table]:
    first = Table(title=f"Stage I: verifications against the truth ({note})")
    for column in ("method", "N", "step verdicts", "overall verdict", "all steps correct = Yes"):
        first.add_column(column)
    for method, by_count in results["stage1"].items():
        for n, scores in by_count.items():
            first.add_row(method, n, *(interval(score) for score in scores.values()))

    second = Table(title=f"Stage II: reward models on held-out solutions ({note})")
    names = list(dict.fromkeys(n for scores in results["stage2"].values() for n in scores))
    for column in ("targets from", *names):
        second.add_column(column)
    for method, scores in results["stage2"].items():
        second.add_row(method, *(interval(scores[n]) if n in scores else "" for n in names))

    third = Table(title=f"Stage III: accuracy on held-out problems ({note})")
    for column in ("reward, advantage", "before", "after", "response tokens", "entropy, last step"):
        third.add_column(column)
    for arm, scores in results["stage3"].items():
        third.add_row(
            arm,
            interval(scores["before"]),
            interval(scores["after"]),
            _last(scores["curves"], "eval/response_length", ".1f"),
            _last(scores["curves"], "policy/entropy", ".3f"),
        )
    return [first, second, third]


def _claims(results: Mapping[str, Any], note: str) -> Table:
    table = Table(title=f"What shows in this world, and what does not ({note})")
    for column in ("difference", "estimate", "verdict"):
        table.add_column(column)
    for claim, difference in results["differences"].items():
        table.add_row(claim, interval(difference), verdict(difference))
    return table


def _last(curves: Mapping[str, Any], metric: str, spec: str) -> str:
    """The mean over seeds at the last step."""
    if metric not in curves:
        return ""
    values = [series[-1] for series in curves[metric]["values"]]
    return format(sum(values) / len(values), spec)
