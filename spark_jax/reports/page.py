"""One HTML file to look at runs: curves, tables, alarms, and rollouts token by token.

It opens from disk: styles, scripts and data are in it, and nothing is fetched. The texts of models
are untrusted: data stands in the file as base64 of gzipped JSON, which no text can break out of,
and the scripts put it on the screen as text, never as markup. Curves are drawn by uPlot
(https://github.com/leeoniya/uPlot, MIT), which lies beside this file.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import html
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spark_jax.reports.benchmarks import Table
from spark_jax.reports.rollouts import Group, RolloutRecord
from spark_jax.rewards.monitor import Alarm

STYLES = ("uplot.css", "page.css")
SCRIPTS = ("uplot.js", "curves.js", "rollouts.js", "page.js")


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve: `estimate` at each of `steps`, and bounds of its interval, None where missing."""

    label: str
    steps: Sequence[int]
    estimate: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


@dataclasses.dataclass(frozen=True)
class Panel:
    """Curves in one picture; `note` says what their bands are."""

    title: str
    lines: Sequence[Line]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """Panels under one heading; `runs` are the labels that mean the same in all of them."""

    title: str
    runs: Sequence[str]
    panels: Sequence[Panel]


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A record as one entry of the page's menu."""

    name: str
    record: RolloutRecord


@dataclasses.dataclass(frozen=True)
class Page:
    """What the page shows.

    Attributes:
        facts: short lines under the title.
        alarms: run → its alarms; a run that was watched and has none is there too.
    """

    title: str
    facts: Sequence[str] = ()
    sections: Sequence[Section] = ()
    tables: Sequence[Table] = ()
    alarms: Mapping[str, Sequence[Alarm]] = dataclasses.field(default_factory=dict)
    rollouts: Sequence[Rollout] = ()


def write(path: Path, page: Page) -> Path:
    """Writes the page, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render(page), encoding="utf-8")
    temporary.replace(path)
    return path


def render(page: Page) -> str:
    """The page as HTML."""
    data = [_block("page", _page_data(page))]
    data += [
        _block(f"rollout-{i}", _rollout_data(rollout.record))
        for i, rollout in enumerate(page.rollouts)
    ]
    parts = {
        "title": html.escape(page.title),
        "styles": "\n".join(_file(name) for name in STYLES),
        "licence": _file("uplot.LICENSE"),
        "scripts": "\n".join(_file(name) for name in SCRIPTS),
        "data": "\n".join(data),
    }
    template = _file("page.html")
    for name, text in parts.items():
        template = template.replace(f"<!--{name}-->", text)
    return template


def _page_data(page: Page) -> dict[str, Any]:
    return {
        "title": page.title,
        "facts": list(page.facts),
        "watched": bool(page.alarms),
        "sections": [dataclasses.asdict(section) for section in page.sections],
        "tables": [dataclasses.asdict(table) for table in page.tables],
        "alarms": [
            {"run": run, "pattern": alarm.pattern, "text": str(alarm)}
            for run, alarms in page.alarms.items()
            for alarm in alarms
        ],
        "rollouts": [
            {
                "name": rollout.name,
                "advantage": rollout.record.advantage,
                "values": list(rollout.record.values),
                "numGroups": rollout.record.num_groups,
            }
            for rollout in page.rollouts
        ],
    }


def _rollout_data(record: RolloutRecord) -> dict[str, Any]:
    values = iter(record.split_values())
    return {"groups": [_group_data(group, values) for group in record.groups]}


def _group_data(group: Group, values: Any) -> dict[str, Any]:
    data = dataclasses.asdict(group)
    for response in data["responses"]:
        numbers = next(values)
        response["values"] = {name: shown_values(array) for name, array in numbers.items()}
    return data


def shown_values(numbers: np.ndarray) -> Any:
    """Numbers as the page holds them: 4 significant digits, None where not finite; one number alone
    where all are equal."""
    rounded = [float(f"{x:.4g}") if np.isfinite(x) else None for x in numbers.tolist()]
    return rounded[0] if rounded and len(set(rounded)) == 1 else rounded


def _block(name: str, value: Any) -> str:
    """Data in a script element that no browser runs. The same data gives the same text."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    packed = base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()
    return f'<script type="application/gzip" id="data-{name}">{packed}</script>'


def _file(name: str) -> str:
    return (importlib.resources.files("spark_jax.reports") / name).read_text(encoding="utf-8")
