"""The closing tables of a pipeline on the terminal."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spark_jax.reports.study import over_seeds, stage2_metric

PIPED_WIDTH = 100  # columns, where there is no terminal to ask
MISSING = "–"
TUNED_WORLD = "arithmetic_chains"
DERIVED = "derived: the overall verdict taken to be Yes where every step is judged correct."
MARGINS = "Margins here are a property of this world, tuned so that voting matters."


def show(results: Mapping[str, Any], console: Console) -> None:
    """Prints what the stages found, and each claim with whether it shows here.

    Made for 100 columns; where the output is piped, that many are used whatever the console's
    width.
    """
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, PIPED_WIDTH))
    seeds = len(results["seeds"])
    note = f"mean over {seeds} seeds with 95 % t-interval" if seeds > 1 else "one seed: no interval"
    caption = [MARGINS] if results["task"] == TUNED_WORLD else []

    _print(console, f"Stage I: verifications against the truth ({note})", _stage1(results))
    _captions(console, [DERIVED, _detection(results["verifier"]), *caption])
    for warning in results["verifier"]["warnings"]:
        console.print(f"[yellow]{escape(warning)}")
    _print(console, f"Stage II: reward models on held-out solutions ({note})", _stage2(results))
    _captions(console, caption)
    _print(console, f"Stage III: accuracy on held-out problems ({note})", _stage3(results))
    title = f"What shows in this world, and what does not ({note})"
    _print(console, title, _claims(results["differences"]))
    _captions(console, [_reading(seeds)])


def as_text(results: Mapping[str, Any]) -> str:
    """What `show` prints, without colours."""
    file = io.StringIO()
    show(results, Console(file=file, width=PIPED_WIDTH, force_terminal=False))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def interval(value: Mapping[str, Any], decimals: int = 2) -> str:
    """`0.914 [0.90, 0.93]`, or the estimate alone where there is no interval, or `–`.

    `decimals` are those of the bounds. ` n=2` is added where only two of more seeds had a value.
    """
    if value["estimate"] is None:
        return MISSING
    text = f"{value['estimate']:.3f}"
    if value["low"] is not None:
        text += f" [{value['low']:.{decimals}f}, {value['high']:.{decimals}f}]"
    return (
        text if value["num_seeds"] == len(value["per_seed"]) else f"{text} n={value['num_seeds']}"
    )


def verdict(difference: Mapping[str, Any]) -> str:
    """Whether a difference is told from 0 by its interval."""
    if difference["estimate"] is None:
        return MISSING
    if difference["low"] is None:
        return "one seed"
    if difference["low"] > 0:
        return "shows"
    return "reversed" if difference["high"] < 0 else "does not show"


def _stage1(results: Mapping[str, Any]) -> Table:
    table = _table("method", "N", "step acc", "overall acc", "derived acc")
    for method, by_count in results["stage1"].items():
        for n, scores in by_count.items():
            table.add_row(method, n, *(interval(score) for score in scores.values()))
    return table


def _detection(verifier: Mapping[str, Any]) -> str:
    found = interval(verifier["detection_rate"])
    return f"A single verification sees {found} of the wrong steps; voting needs more than 0.5."


def _stage2(results: Mapping[str, Any]) -> Table:
    """Intervals for F1 and overall accuracy; of what F1 is made of, the estimates."""
    by_steps = {"f1": "F1", "error_acc": "error acc", "correct_acc": "correct acc"}
    names = by_steps if stage2_metric(results["stage2"]) == "f1" else {}
    table = _table("targets from", *names.values(), "overall acc")
    for method, scores in results["stage2"].items():
        cells = [
            interval(scores[name]) if name in ("f1", "overall_accuracy") else _number(scores[name])
            for name in (*names, "overall_accuracy")
        ]
        table.add_row(escape(method), *cells)
    return table


def _stage3(results: Mapping[str, Any]) -> Table:
    table = _table("run", "before", "after", "tokens", "entropy")
    for arm, scores in results["stage3"].items():
        table.add_row(
            escape(arm),
            interval(scores["before"]),
            interval(scores["after"]),
            _number(_last(scores["curves"], "eval/response_length"), 1),
            _number(_last(scores["curves"], "policy/entropy")),
        )
    return table


def _claims(differences: Mapping[str, Mapping[str, Any]]) -> Table:
    """One block a stage. Bounds have three decimals: a verdict hangs on their sign."""
    table = _table("difference", "estimate", "verdict")
    blocks = groupby(differences.values(), key=lambda claim: (claim["stage"], claim["metric"]))
    for (stage, metric), block in blocks:
        table.add_section()
        table.add_row(f"[bold]stage {stage}: {metric}", "", "")
        for claim in block:
            table.add_row(f"  {escape(claim['pair'])}", interval(claim, 3), verdict(claim))
    return table


def _reading(seeds: int) -> str:
    if seeds < 2:
        return "One seed gives no interval: no difference is told from chance."
    return (
        f"'does not show': with {seeds} seeds the interval holds 0, which is not to say that there "
        "is no effect. 'reversed': the interval lies below 0."
    )


def _last(curves: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Over seeds, at the last step."""
    return over_seeds([series[-1] for series in curves.get(metric, {"values": []})["values"]])


def _number(value: Mapping[str, Any], decimals: int = 3) -> str:
    return MISSING if value["estimate"] is None else f"{value['estimate']:.{decimals}f}"


def _table(first: str, *others: str) -> Table:
    """No text is ever cut: what does not fit goes on in the next line of its cell."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column(first, no_wrap=True, overflow="fold")
    for column in others:
        table.add_column(column, overflow="fold")
    return table


def _print(console: Console, title: str, table: Table) -> None:
    console.print(f"\n[bold]{title}", highlight=False)
    console.print(table, highlight=False)


def _captions(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(f"[dim]{escape(line)}", highlight=False)
