"""The plain records that stages I to III hand to one another, and their JSON-lines files.

Text, step texts, verdicts and provenance as frozen dataclasses: no arrays, no tokenizers. One
record is one line of a file; what `append_jsonl` writes, `read_jsonl` gives back exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

logger = logging.getLogger(__name__)

Record = TypeVar("Record")


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How text is sampled. `top_k=0` is no limit; `greedy` ignores the other four. Tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    greedy: bool = False
    max_new_tokens: int = 256


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a sampled text came from: enough to sample it again.

    `seed` is the seed the whole stage was called with, `sample_seed` the one that the chunk of
    problems was sampled with.
    """

    model: str
    settings: SamplingSettings
    seed: int
    sample_seed: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem. `answer` is the reference, which may be absent; only evaluation, the rule-based
    reward and `reference_guided` verification may read it. `metadata` holds JSON values."""

    id: str
    question: str
    answer: str | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def blind(self) -> Problem:
        """The problem without its reference: as every stage is handed it that may not read one."""
        return dataclasses.replace(self, answer=None)


@dataclasses.dataclass(frozen=True)
class Example:
    """One supervised example, as text: the loss is on the target alone."""

    prompt: str
    target: str


@dataclasses.dataclass(frozen=True)
class Solution:
    """One response to a problem. `steps` holds the text of each step, in order; `answer` is what
    the response boxed, or None; `finished` says that it ended by itself, not by the token limit.
    `step_labels` and `correct` are ground truth where the data has it, for evaluation only."""

    problem_id: str
    index: int
    text: str
    steps: tuple[str, ...]
    answer: str | None
    step_labels: tuple[bool, ...] | None = None
    correct: bool | None = None
    finished: bool = True
    provenance: Provenance | None = None


@dataclasses.dataclass(frozen=True)
class Verification:
    """A *valid* verification: one verdict per step of the solution, and the overall verdict."""

    text: str
    verdicts: tuple[bool, ...]
    overall: bool


@dataclasses.dataclass(frozen=True)
class ParseFailure:
    """A text that is no valid verification. `reason` is a short snake_case name, to be counted."""

    reason: str
    text: str


@dataclasses.dataclass(frozen=True)
class Aggregated:
    """What one method made of the N verifications of one solution (method page, section 1.3).

    Attributes:
        method: a name in `verification.aggregate.AGGREGATIONS`.
        verification: the target verification; None where there was nothing to choose from.
        chosen: position among the N samples of the verification chosen (before any merge).
        voted_verdicts: majority per step over the valid samples; None where no vote is taken.
        voted_overall: majority over the overall verdicts of the valid samples; None likewise.
        exact_match: whether `verification.verdicts` equals `voted_verdicts`; None likewise.
        num_samples: N.
        num_valid: how many of the N were valid.
        reason: why this verification was chosen, or why there is none; countable.
        agreement: share of the valid samples that side with the majority, mean over the votes (one
            per step and one overall); None without valid samples.
        critique: the critique's text, where the method asked for one.
        merge: "merged", or "not_merged_<reason>" where the un-merged verification had to stand.
    """

    method: str
    verification: Verification | None
    chosen: int | None
    voted_verdicts: tuple[bool, ...] | None
    voted_overall: bool | None
    exact_match: bool | None
    num_samples: int
    num_valid: int
    reason: str
    agreement: float | None = None
    critique: str | None = None
    merge: str | None = None


@dataclasses.dataclass(frozen=True)
class VerifiedSolution:
    """One line of stage I's output: a solution's N samples and what every method made of them.

    `samples` are the N reference-free verifications that all methods share; `reference_samples`
    those that were shown the reference, empty unless `reference_guided` was asked for.
    """

    problem_id: str
    solution_index: int
    samples: tuple[Verification | ParseFailure, ...]
    reference_samples: tuple[Verification | ParseFailure, ...]
    aggregated: tuple[Aggregated, ...]
    provenance: Provenance


def append_jsonl(path: str | os.PathLike[str], records: Iterable[Any]) -> None:
    """Append records to a file, one JSON line each, in one write that is on disk at return.

    A torn last line, left by a crash in mid-write, is cut off first (logged), and a whole one is
    given its line end. Makes missing folders and the file. Raises ValueError for a record that JSON
    would not give back unchanged; nothing is written then.
    """
    lines = b"".join(_encode_line(record) for record in records)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        last = _last_line(file)
        if _is_torn(last):
            logger.warning("%s: cut off a torn last line of %d bytes", path, len(last))
            file.truncate(file.seek(0, os.SEEK_END) - len(last))
        elif last:  # a whole record that only lacks its line end
            lines = b"\n" + lines
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: str | os.PathLike[str], cls: type[Record]) -> list[Record]:
    """All records of a file, in order.

    A torn last line (no line end, not a whole JSON object) is dropped and logged. Any other line
    that is not a `cls` raises ValueError with file, line and field.
    """
    *lines, last = Path(path).read_bytes().split(b"\n")
    if _is_torn(last):
        logger.warning("%s: dropped a torn last line of %d bytes", path, len(last))
    elif last:
        lines.append(last)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(from_json(json.loads(line), cls))
        except ValueError as error:  # json.JSONDecodeError and UnicodeDecodeError are ValueErrors
            raise ValueError(f"{path}:{number}: not a {cls.__name__}: {error}") from error
    return records


def to_json(record: Any) -> dict[str, Any]:
    """A dataclass record as a dict of JSON values; nested records become dicts, tuples lists."""
    return dataclasses.asdict(record)


def from_json(value: Any, cls: type[Record]) -> Record:
    """The record of type `cls` that `to_json` turned into `value`. ValueError names the field."""
    return typing.cast(Record, _decode(value, cls, cls.__name__))


def _encode_line(record: Any) -> bytes:
    encoded = json.dumps(to_json(record), allow_nan=False, separators=(", ", ": "))
    if from_json(json.loads(encoded), type(record)) != record:
        raise ValueError(
            f"{type(record).__name__}: JSON does not give this record back unchanged: {record!r}. "
            "Use only dicts with string keys, lists, strings, numbers, bools and None in metadata."
        )
    return encoded.encode("ascii") + b"\n"


def _last_line(file: BinaryIO, block: int = 65536) -> bytes:
    """What stands after the last line end; read from the back, for files may be large."""
    start = file.seek(0, os.SEEK_END)
    tail = b""
    while start > 0 and b"\n" not in tail:
        step = min(block, start)
        start = file.seek(start - step)
        tail = file.read(step) + tail
    return tail[tail.rfind(b"\n") + 1 :]


def _is_torn(last_line: bytes) -> bool:
    """Whether a last line without a line end is torn. No proper beginning of a JSON object is
    itself a JSON object, so one that lacks nothing but its line end is told apart without doubt."""
    if not last_line:
        return False
    try:
        return not isinstance(json.loads(last_line), dict)
    except ValueError:
        return True


def _decode(value: Any, annotation: Any, where: str) -> Any:
    """`value` (parsed JSON) as the type of a field's annotation, strictly."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if dataclasses.is_dataclass(annotation):
        return _decode_record(value, typing.cast(type, annotation), where)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(value, arguments, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        return tuple(_decode(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
    expected = origin or annotation
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise ValueError(f"{where}: expected {expected.__name__}, got {value!r}")
    return value


def _decode_record(value: Any, cls: type, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {value!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(value) - set(fields))
    missing = [
        name
        for name, field in fields.items()
        if name not in value
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if unknown or missing:
        raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}")
    hints = _field_types(cls)
    decoded = {name: _decode(item, hints[name], f"{where}.{name}") for name, item in value.items()}
    return cls(**decoded)


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode_union(value: Any, members: Sequence[Any], where: str) -> Any:
    """Optional values, and unions of records, which are told apart by their field names."""
    errors = []
    for member in members:
        if member is types.NoneType:
            if value is None:
                return None
            continue
        try:
            return _decode(value, member, where)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError("; or ".join(errors) or f"{where}: expected null, got {value!r}")
