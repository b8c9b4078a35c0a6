"""The closing tables of a pipeline."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from rich.console import Console

from spark_jax.reports import benchmarks
from spark_jax.reports.benchmarks import MISSING, PIPED_WIDTH, Table, number
from spark_jax.reports.study import over_seeds, stage2_metric

TUNED_WORLD = "arithmetic_chains"
DERIVED = "derived: the overall verdict taken to be Yes where every step is judged correct."
STAGE1_COLUMNS = {
    "step acc": "step_accuracy",
    "overall acc": "overall_accuracy",
    "derived acc": "derived_outcome_accuracy",
}
MARGINS = "Margins here are a property of this world, tuned so that voting matters."


def stages(results: Mapping[str, Any]) -> list[Table]:
    """What `study.collect` found, as tables: one a stage that has runs, and one of the claims."""
    seeds = len(results["seeds"])
    note = f"mean over {seeds} seeds with 95 % t-interval" if seeds > 1 else "one seed: no interval"
    margins = (MARGINS,) if results["task"] == TUNED_WORLD else ()
    found = (DERIVED, _detection(results["verifier"]), *margins, *results["verifier"]["warnings"])
    return [
        stage1(f"Stage I: verifications against the truth ({note})", results["stage1"], found),
        stage2(
            f"Stage II: reward models on held-out solutions ({note})", results["stage2"], margins
        ),
        _stage3(f"Stage III: accuracy on held-out problems ({note})", results),
        _claims(f"What shows in this world, and what does not ({note})", results["differences"],
                (_reading(seeds),)),
    ]  # fmt: skip


def stage1(
    title: str, scores: Mapping[str, Any], notes: tuple[str, ...] = (), decimals: int = 2
) -> Table:
    """The table of `study.stage1_scores`."""
    rows = [
        ((method, n), metrics)
        for method, by_count in scores.items()
        for n, metrics in by_count.items()
    ]
    return estimates(title, ("method", "N"), rows, STAGE1_COLUMNS, notes, decimals)


def estimates(
    title: str,
    names: tuple[str, ...],
    rows: Iterable[tuple[tuple[str, ...], Mapping[str, Any]]],
    columns: Mapping[str, str],
    notes: tuple[str, ...] = (),
    decimals: int = 3,
) -> Table:
    """Make a table of estimates over seeds.

    Args:
        names: headings of the cells that say what a row is about.
        rows: those cells of each row, and its metric → estimate.
        columns: heading → metric; `–` in a row that does not have the metric.
        notes: sentences below the table.
        decimals: of the bounds.
    """
    cells = [
        (
            *row,
            *(interval(scores[m], decimals) if m in scores else MISSING for m in columns.values()),
        )
        for row, scores in rows
    ]
    return Table(title, (*names, *columns), tuple(cells), notes)


def show(results: Mapping[str, Any], console: Console) -> None:
    """Prints what the stages found, and each claim with whether it shows here.

    Made for 100 columns; where the output is piped, that many are used whatever the console's
    width.
    """
    for table in stages(results):
        benchmarks.show(table, console)


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


def _detection(verifier: Mapping[str, Any]) -> str:
    found = interval(verifier["detection_rate"])
    return f"A single verification sees {found} of the wrong steps; voting needs more than 0.5."


def stage2(title: str, methods: Mapping[str, Any], notes: tuple[str, ...] = ()) -> Table:
    """Intervals for F1 and overall accuracy; of what F1 is made of, the estimates."""
    by_steps = {"f1": "F1", "error_acc": "error acc", "correct_acc": "correct acc"}
    names = by_steps if stage2_metric(methods) == "f1" else {}
    rows = [
        (
            method,
            *(
                interval(scores[name])
                if name in ("f1", "overall_accuracy")
                else number(scores[name]["estimate"])
                for name in (*names, "overall_accuracy")
            ),
        )
        for method, scores in methods.items()
    ]
    columns = ("targets from", *names.values(), "overall acc")
    return Table(title, columns, tuple(rows), notes)


def _stage3(title: str, results: Mapping[str, Any]) -> Table:
    rows = [
        (
            arm,
            interval(scores["before"]),
            interval(scores["after"]),
            number(last(scores["curves"], "eval/response_length")["estimate"], 1),
            number(last(scores["curves"], "policy/entropy")["estimate"]),
        )
        for arm, scores in results["stage3"].items()
    ]
    return Table(title, ("run", "before", "after", "tokens", "entropy"), tuple(rows))


def _claims(
    title: str, differences: Mapping[str, Mapping[str, Any]], notes: tuple[str, ...]
) -> Table:
    """One block a stage. Bounds have three decimals: a verdict hangs on their sign."""
    rows: list[tuple[str, ...]] = []
    blocks = groupby(differences.values(), key=lambda claim: (claim["stage"], claim["metric"]))
    for (stage, metric), block in blocks:
        rows.append((f"stage {stage}: {metric}", "", ""))
        rows += [(f"  {claim['pair']}", interval(claim, 3), verdict(claim)) for claim in block]
    return Table(title, ("difference", "estimate", "verdict"), tuple(rows), notes)


def _reading(seeds: int) -> str:
    if seeds < 2:
        return "One seed gives no interval: no difference is told from chance."
    return (
        f"'does not show': with {seeds} seeds the interval holds 0, which is not to say that there "
        "is no effect. 'reversed': the interval lies below 0."
    )


def last(curves: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Over seeds, at the last step."""
    return over_seeds([series[-1] for series in curves.get(metric, {"values": []})["values"]])
