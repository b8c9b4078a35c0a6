"""Problems from files and from the hub: rows in, `Problem` records and what was wrong with the
other rows out.

JSON and JSON-lines files are read here, row by row, so that a bad row costs that row and is named
by file and line (the loader of `datasets` ends at the first, and changes the types of others).
Parquet files, dataset folders and hub ids are read by `datasets`. No code of a dataset is ever run.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spark_jax.data.records import Problem

logger = logging.getLogger(__name__)

ON_BAD_ROW = ("report", "error")
SUFFIXES = (".jsonl", ".json", ".parquet")
NAMED_IN_THE_LOG = 5  # bad rows of a file; all are counted and returned


class Content(NamedTuple):
    """What a reader finds in a row. `id` is the row's own name for itself, if it has one."""

    question: str
    answer: str | None
    id: str | None
    metadata: dict[str, Any]


Reader = Callable[[Mapping[str, Any]], Content]  # raises ValueError with the reason for a bad row


@dataclasses.dataclass(frozen=True)
class Source:
    """Where rows come from: one file, or one split of a dataset.

    Attributes:
        name: a file, a folder in the layout of `datasets`, or a hub id such as `openai/gsm8k`.
        split: of a folder or hub id. For a file it is the file's name without suffix.
        config: the dataset's configuration, where it has several. Not read for files.
    """

    name: str
    split: str
    config: str | None = None

    def __str__(self) -> str:
        if Path(self.name).is_file():
            return self.name
        return f"{self.name} ({', '.join(filter(None, (self.config, self.split)))})"


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that gives no problem: where it is (`file:line`) and what is wrong with it."""

    place: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a source gave. `duplicates` counts rows whose question stood there before."""

    problems: tuple[Problem, ...]
    bad_rows: tuple[BadRow, ...]
    duplicates: int

    def counts(self) -> dict[str, int]:
        """As metrics: `problems`, `bad_rows`, `duplicates`."""
        return {
            "problems": len(self.problems),
            "bad_rows": len(self.bad_rows),
            "duplicates": self.duplicates,
        }


def load(source: Source, read: Reader, *, name: str, on_bad_row: str = "report") -> Loaded:
    """All problems of a source, in its order.

    A problem's id is `<name>/<split>/<the row's own id>`, or the line number where the row has
    none. Of rows with the same question (but for white space) the first counts. A row with another
    question but an id that was there before gets its line number added to the id.

    Args:
        read: what makes a question of a row.
        name: of the task.
        on_bad_row: "report" logs, counts and skips a bad row; "error" raises at the first.

    Raises:
        FileNotFoundError: no such file or split; a hub dataset that cannot be reached.
        ValueError: a bad row, if asked for; a file that cannot be read at all; no usable row.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"on_bad_row={on_bad_row!r} is unknown; choose one of {ON_BAD_ROW}")
    problems: dict[str, Problem] = {}  # by question
    ids: set[str] = set()
    bad_rows: list[BadRow] = []
    duplicates = 0
    for row in rows(source):
        try:
            content = read(_as_object(row))
            _check_text(content)
        except ValueError as error:
            bad_rows.append(BadRow(row.place, str(error)))
            if on_bad_row == "error":
                raise ValueError(f"{row.place}: {error}") from error
            continue
        key = question_key(content.question)
        if key in problems:
            duplicates += 1
            continue
        problems[key] = _problem(name, source.split, row.number, content, ids)
        ids.add(problems[key].id)
    loaded = Loaded(tuple(problems.values()), tuple(bad_rows), duplicates)
    _report(source, loaded)
    return loaded


class Row(NamedTuple):
    """One row as it stands in its source. `fault` says why it could not be read at all."""

    place: str
    number: int
    value: Any
    fault: str | None = None


def rows(source: Source) -> Iterator[Row]:
    """The rows of a source, bad ones included. Errors as in `load`."""
    path = Path(source.name)
    if path.is_file():
        return _FILE_ROWS[file_suffix(path)](path)
    if path.is_dir() or is_hub_id(source.name):
        return _dataset_rows(source)
    raise FileNotFoundError(
        f"{source.name!r} is no file, no folder, and no hub id such as 'openai/gsm8k'"
    )


def file_suffix(path: Path) -> str:
    """The suffix, which is one that can be read. ValueError for any other."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: files of problems end in one of {SUFFIXES}, not {suffix!r}")
    return suffix


def is_hub_id(name: str) -> bool:
    """Whether `name` can only be meant as a hub id: `owner/name` or `name`, nothing like a path."""
    return bool(_HUB_ID.fullmatch(name)) and not name.lower().endswith(SUFFIXES)


def question_key(question: str) -> str:
    """What makes two questions the same: their words."""
    return " ".join(question.split())


def as_text(value: Any, field: str) -> str:
    """A field's value as text: text is stripped, 27.0 is "27", a list is joined by commas.

    Raises ValueError, with the reason, for what is missing, empty, or of another type.
    """
    if isinstance(value, list | tuple):
        return ", ".join(as_text(item, field) for item in _required(value, field))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"field {field!r} is {_shown(value)}, must be text or a number")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"field {field!r} is {value!r}, must be finite")
        return str(int(value)) if value.is_integer() else repr(value)
    return _required(str(value).strip(), field)


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    """Lines are cut at line feeds only; blank ones hold no row."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                value, fault = _parse(line)
                yield Row(f"{path}:{number}", number, value, fault)


def _json_rows(path: Path) -> Iterator[Row]:
    """A file that is one list. Its rows have no lines, so they are counted from 1."""
    value, fault = _parse(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    if fault is not None or not isinstance(value, list):
        raise ValueError(
            f"{path}: {fault or 'not a list'}; a .json file of problems is one list of objects "
            "(a file with an object a line is named .jsonl)"
        )
    for number, item in enumerate(value, start=1):
        yield Row(f"{path}: row {number}", number, item)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import datasets

    try:
        table = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # pyarrow's, wrapped by `datasets` in several ways
        raise ValueError(f"{path}: not a parquet file: {error}") from error
    return _numbered(str(path), table)


def _dataset_rows(source: Source) -> Iterator[Row]:
    import datasets

    try:
        table = datasets.load_dataset(source.name, source.config, split=source.split)
    except Exception as error:  # of `datasets`, the hub's client, its transport or the file system
        raise FileNotFoundError(
            f"dataset {source} could not be loaded: {type(error).__name__}: {error}. Without a "
            "network, download it elsewhere and name the folder or file in task_options.data, or "
            "put it where $SPARK_JAX_DATA points to"
        ) from error
    return _numbered(str(source), table)


def _numbered(place: str, values: Iterable[Any]) -> Iterator[Row]:
    return (Row(f"{place}: row {n}", n, value) for n, value in enumerate(values, start=1))


_FILE_ROWS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}


def _parse(data: bytes) -> tuple[Any, str | None]:
    """A JSON value, or why it is none."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant), None
    except UnicodeDecodeError as error:
        return None, f"not UTF-8: {error}"
    except RecursionError:
        return None, "not JSON: nested too deeply"
    except ValueError as error:
        return None, f"not JSON: {error}"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _as_object(row: Row) -> Mapping[str, Any]:
    if row.fault is not None:
        raise ValueError(row.fault)
    if not isinstance(row.value, Mapping):
        raise ValueError(f"not an object but {_shown(row.value)}")
    return row.value


def _check_text(content: Content) -> None:
    """Half a surrogate pair can stand in JSON, but not in a file or before a tokenizer."""
    for text in (content.question, content.answer, content.id, *content.metadata.values()):
        try:
            str(text).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"not text: {error}") from error


def _problem(name: str, split: str, number: int, content: Content, ids: set[str]) -> Problem:
    own = f"{name}/{split}/{content.id if content.id is not None else number}"
    if own in ids:
        own = f"{own}, line {number}"
    return Problem(own, content.question, content.answer, content.metadata)


def _report(source: Source, loaded: Loaded) -> None:
    for bad in loaded.bad_rows[:NAMED_IN_THE_LOG]:
        logger.warning("%s: %s; the row is skipped", bad.place, bad.reason)
    if not loaded.problems:
        first = loaded.bad_rows[0] if loaded.bad_rows else None
        found = f"; the first of {len(loaded.bad_rows)} bad rows: {first}" if first else ""
        raise ValueError(f"{source}: no usable problem{found}")
    log = logger.warning if loaded.bad_rows or loaded.duplicates else logger.info
    log(
        "%s: %d problems; %d bad rows and %d with a question that stood there before are skipped",
        source, len(loaded.problems), len(loaded.bad_rows), loaded.duplicates,
    )  # fmt: skip


def _required(value: Any, field: str) -> Any:
    if not value:
        raise ValueError(f"field {field!r} is empty")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
