"""JSON-lines files that are sampled chunk by chunk and go on where they stopped.

The seed of a chunk is made of the stage's seed and the chunk's content and of nothing that happened
before, so a run that was killed, wherever that was, is continued by making the same call again, and
with a `sample` that is itself reproducible the file is the same byte for byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spark_jax.data.records import Provenance, SamplingSettings, append_jsonl, read_jsonl

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]  # (members done, members in all)
Record = TypeVar("Record")
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What is sampled together: its members, and the keys of the records they give, in order."""

    members: Sequence[Any]
    keys: Sequence[Any]
    provenance: Provenance


def continue_file(
    path: str | os.PathLike[str],
    cls: type[Record],
    chunks: Sequence[Chunk],
    make: Callable[[Chunk], list[Record]],
    key: Callable[[Any], Any],
    check: Callable[[Any], str | None] = lambda record: None,
    on_progress: OnProgress | None = None,
) -> list[Record]:
    """Append the records that the file lacks, chunk by chunk, and return all of them.

    What stands in the file must be a beginning of what this call would write. A chunk of which a
    part stands there is made again, for the rest of it.

    Args:
        cls: a frozen dataclass with a field `provenance`.
        make: the records of a chunk, one for each of its keys, in order.
        key: the key of a record.
        check: what else is wrong with a record found in the file, or None.
        on_progress: called at the start and after each chunk that was made.

    Raises ValueError, with file and line, for a record that another call wrote.
    """
    standing: list[Any] = read_jsonl(path, cls) if Path(path).exists() else []
    records: list[Record] = []
    total = sum(len(chunk.members) for chunk in chunks)
    done = 0
    for chunk in chunks:
        have = standing[len(records) : len(records) + len(chunk.keys)]
        for line, (record, expected) in enumerate(zip(have, chunk.keys), start=len(records) + 1):
            _require_same_call(f"{path}:{line}", record, key(record), expected, chunk, check)
        if len(have) < len(chunk.keys):
            if on_progress is not None:
                on_progress(done, total)
            have = _complete(path, chunk, make, have)
        records += have
        done += len(chunk.members)
    if len(standing) > len(records):
        raise ValueError(
            f"{path}:{len(records) + 1}: the file holds {len(standing)} records, this call makes "
            f"{len(records)}; give another path"
        )
    append_jsonl(path, [])  # ends a last line that a crash left whole but unended
    if on_progress is not None:
        on_progress(done, total)
    return records


def provenance(model: str, settings: SamplingSettings, seed: int, *content: Any) -> Provenance:
    """That of a chunk: its own seed is made of the stage's and of the content (JSON values)."""
    return Provenance(model, settings, seed, sample_seed=content_seed(seed, *content))


def content_seed(*content: Any) -> int:
    """A seed in [0, 2^31) made of JSON values, the same on every platform."""
    digest = hashlib.blake2b(json.dumps(content).encode("ascii"), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def in_chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """The items in order, `size` at a time. ValueError for a size below 1."""
    if size < 1:
        raise ValueError(f"chunk_size is {size}, must be at least 1")
    return (items[start : start + size] for start in range(0, len(items), size))


def _complete(
    path: str | os.PathLike[str],
    chunk: Chunk,
    make: Callable[[Chunk], list[Record]],
    have: list[Record],
) -> list[Record]:
    made = make(chunk)
    if len(made) != len(chunk.keys):
        raise ValueError(f"{path}: a chunk of {len(chunk.keys)} gave {len(made)} records")
    if made[: len(have)] != have:
        logger.warning(
            "%s: sampling a chunk again after an interruption gave other texts; `sample` is not "
            "reproducible here, so the file is not what an uninterrupted run gives",
            path,
        )
    append_jsonl(path, made[len(have) :])
    return have + made[len(have) :]


def _require_same_call(
    place: str,
    record: Any,
    key: Any,
    expected: Any,
    chunk: Chunk,
    check: Callable[[Any], str | None],
) -> None:
    if key != expected:
        problem: str | None = f"is of {key!r}, expected {expected!r}"
    elif record.provenance != chunk.provenance:
        problem = (
            f"was sampled with {record.provenance}, this call has {chunk.provenance} (sample_seed "
            "also tells other contents or another chunk_size apart)"
        )
    else:
        problem = check(record)
    if problem is not None:
        raise ValueError(
            f"{place}: the record {problem}. Give another path, or remove the file to start anew"
        )
