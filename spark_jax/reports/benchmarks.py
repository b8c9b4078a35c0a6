"""The tables of an evaluation: ProcessBench's, and a policy's on the benchmarks.

`processbench_table` and `policy_table` pick from a summary what is shown; `markdown` and `show`
write any table. Numbers have three decimals; what there is none of is `–`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

PIPED_WIDTH = 100  # columns, where there is no terminal to ask
MISSING = "–"


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text, the columns' names first; `notes` are sentences below it. A row whose cells
    but the first are empty is the heading of those below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def processbench_table(summary: Mapping[str, Any]) -> Table:
    """A line a split and way to ask, of what `prm.processbench.evaluate_processbench` returns with
    `missing` (split -> reason) beside it."""
    rows: list[tuple[str, ...]] = []
    for split, scores in summary["splits"].items():
        for how, prefix in (("greedy", ""), ("majority", "majority_")):
            if f"{prefix}unparseable" in scores:
                rows.append((split, how, *_processbench_cells(scores, prefix)))
    rows += [(split, "missing", *[MISSING] * 9) for split in summary["missing"]]
    means = [("greedy", "mean_f1"), ("majority", "majority_mean_f1")]
    for how, name in means:
        if name in summary:
            mean = estimate(summary[name])
            rows.append(("mean", how, MISSING, MISSING, MISSING, mean, *[MISSING] * 5))
    columns = ("subset", "judged", "wrong/right", "error acc", "correct acc", "F1", "overall acc")
    return Table(
        "ProcessBench: the first erroneous step (95 % bootstrap intervals)",
        (*columns, "unread", "miscounted", "soft AUC", "tokens"),
        tuple(rows),
        (
            "Wrong are also judgements that cannot be read, and those of another number of steps "
            "than the solution has (miscounted).",
            *_missing_notes(summary["missing"], len(summary["splits"]), "subsets"),
            *_shown_otherwise(summary["splits"]),
        ),
    )


def policy_table(summary: Mapping[str, Any]) -> Table:
    """A line a benchmark, of {"benchmarks": name -> `evaluation.benchmarks.policy_scores`,
    "missing": name -> reason, "mean_accuracy": interval or None, "answer_from"}."""
    rows: list[tuple[str, ...]] = []
    for name, scores in summary["benchmarks"].items():
        k = scores["samples_per_problem"]
        rows.append(
            (
                name,
                str(scores["num_with_reference"]),
                str(k),
                estimate(scores["accuracy"]),
                number(scores[f"pass@{k}"]),
                number(scores[f"maj@{k}"]),
                number(scores["response_length"], 1),
                number(scores["format_kept"]),
                number(scores["finished"]),
            )
        )
    rows += [(name, "missing", *[MISSING] * 7) for name in summary["missing"]]
    rows.append(("mean", MISSING, MISSING, estimate(summary["mean_accuracy"]), *[MISSING] * 5))
    columns = ("benchmark", "problems", "k", "avg@k", "pass@k", "maj@k", "tokens", "format kept")
    read = {
        "format": "Answers are read as in training: a response that breaks the format has none.",
        "last_boxed": "The answer of a response is its last box, whatever its format.",
    }
    return Table(
        "Accuracy on benchmarks (95 % bootstrap intervals over problems)",
        (*columns, "finished"),
        tuple(rows),
        (
            read[summary["answer_from"]],
            *(
                f"{name}: {scores['too_long']} prompts are too long and count as not answered."
                for name, scores in summary["benchmarks"].items()
                if scores["too_long"]
            ),
            *_missing_notes(summary["missing"], len(summary["benchmarks"]), "benchmarks"),
        ),
    )


def markdown(table: Table) -> str:
    """The table as GitHub's Markdown, with its title as a heading."""
    lines = [f"## {table.title}", "", _line(table.columns)]
    lines.append(_line(["---", *["---:"] * (len(table.columns) - 1)]))
    lines += [_line(row) for row in table.rows]
    for note in table.notes:
        lines += ["", note]
    return "\n".join(lines) + "\n"


def show(table: Table, console: Console) -> None:
    """Prints the table; where the output is piped, at least 100 columns are used. No text is ever
    cut: what does not fit goes on in the next line of its cell."""
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, PIPED_WIDTH))
    rich_table = RichTable(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for number, column in enumerate(table.columns):
        rich_table.add_column(column, no_wrap=number == 0, overflow="fold")
    for row in table.rows:
        if any(row[1:]):
            rich_table.add_row(*map(escape, row))
        else:
            rich_table.add_section()
            rich_table.add_row(f"[bold]{escape(row[0])}")
    console.print(f"\n[bold]{escape(table.title)}", highlight=False)
    console.print(rich_table, highlight=False)
    for note in table.notes:
        console.print(f"[dim]{escape(note)}", highlight=False)


def estimate(interval: Mapping[str, Any] | None) -> str:
    """`0.914 [0.901, 0.933]`, or `–`."""
    if interval is None or interval["estimate"] is None:
        return MISSING
    return f"{interval['estimate']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def number(value: float | None, decimals: int = 3) -> str:
    return MISSING if value is None else f"{value:.{decimals}f}"


def _processbench_cells(scores: Mapping[str, Any], prefix: str) -> tuple[str, ...]:
    def point(name: str) -> str:
        return number(scores[f"{prefix}{name}"]["estimate"]) if "error_acc" in scores else MISSING

    greedy = prefix == ""
    return (
        f"{scores['erroneous']}/{scores['correct']}",
        point("error_acc"),
        point("correct_acc"),
        estimate(scores.get(f"{prefix}f1")),
        number(scores[f"{prefix}overall_accuracy"]["estimate"]),
        number(scores[f"{prefix}unparseable"]),
        number(scores.get(f"{prefix}other_step_count")),
        number(scores.get("soft_auc")) if greedy else MISSING,
        number(scores["tokens_per_judgement"], 1) if greedy else MISSING,
    )


def _missing_notes(missing: Mapping[str, str], present: int, what: str) -> tuple[str, ...]:
    if not missing:
        return ()
    notes = [f"missing: {name}: {reason}" for name, reason in missing.items()]
    return (f"The mean is over {present} of {present + len(missing)} {what}.", *notes)


def _shown_otherwise(splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was not judged as it was published."""
    notes = []
    for name, scores in splits.items():
        if scores["too_long"]:
            notes.append(f"{name}: {scores['too_long']} prompts are too long and count as unread.")
        if scores["rewritten"]:
            notes.append(f"{name}: {scores['rewritten']} solutions hold tags, shown as &lt;..&gt;.")
    return notes


def _line(cells: Any) -> str:
    escaped = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
    return f"| {' | '.join(escaped)} |"
