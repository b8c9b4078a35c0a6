"""Digests of the files of a checkpoint, so that damage on disk is found before it is restored.

Array data has no checksum of its own that is looked at: a flipped bit would come back as another
weight. Every process digests the data that it wrote, before the checkpoint is complete, and process
0 the rest: an item's folder then holds `digests.json` (the index: names, shapes, places) and a
`digests.process_<i>.json` a process (its data), each a JSON object of file → [bytes, BLAKE2b].
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_INDEX = "digests.json"
_DATA = "ocdbt.process_{}"  # orbax's folder of what a process writes
_THREADS = 4  # about 1 GB/s each, where the disk gives as much


def attach(handler: Any, process: int) -> None:
    """Lets an orbax handler note the digests of what it writes, as part of its asynchronous save.

    Its class stays, and with it what orbax knows about it.
    """
    save, finalize = handler.async_save, handler.finalize

    async def async_save(directory: Any, *args: Any, **options: Any) -> list[Any]:
        futures = await save(directory, *args, **options) or []
        return [*futures, _Digested(futures, Path(directory), process)]

    def finalized(directory: Any) -> None:  # on process 0, when all have written
        finalize(directory)
        folder = Path(directory)
        rest = [file for file in _files(folder) if not _is_data(file.relative_to(folder))]
        _write(folder / _INDEX, folder, rest)

    handler.async_save, handler.finalize = async_save, finalized


def check_index(folder: Path) -> None:
    """Raises ValueError, with file and reason, where a file of an item's folder, other than array
    data, is not the one that was written. Without digests (an older version's) all is well."""
    if (folder / _INDEX).is_file():
        _check(folder, sorted(_read(folder / _INDEX).items()))


def check_data(folder: Path, *, part: int, parts: int) -> None:
    """The same of every `parts`-th file of array data of all processes, from the `part`-th on."""
    noted = [
        entry
        for file in sorted(folder.glob("digests.process_*.json"))
        for entry in sorted(_read(file).items())
    ]
    _check(folder, noted[part::parts])


class _Digested:
    """An orbax future that follows others: notes the digests of what they wrote."""

    def __init__(self, writes: Sequence[Any], folder: Path, process: int) -> None:
        self._writes, self._folder, self._process = writes, folder, process

    def result(self, timeout: float | None = None) -> None:
        for write in self._writes:
            write.result(timeout)
        if own := list(_files(self._folder / _DATA.format(self._process))):
            _write(self._folder / f"digests.process_{self._process}.json", self._folder, own)

    def cancel(self) -> None:
        pass


def _files(folder: Path) -> Iterable[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())


def _is_data(file: Path) -> bool:
    """Whether it is noted elsewhere; a digest, too, is not digested."""
    return file.parts[0].startswith((_DATA.format(""), "digests."))


def _write(target: Path, folder: Path, files: Sequence[Path]) -> None:
    with ThreadPoolExecutor(_THREADS) as threads:
        digests = threads.map(_digest, files)
        noted = {
            file.relative_to(folder).as_posix(): digest
            for file, digest in zip(files, digests, strict=True)
        }
    target.write_text(json.dumps(noted, indent=1) + "\n")


def _read(file: Path) -> dict[str, list[Any]]:
    noted = json.loads(file.read_text())
    if not isinstance(noted, dict):
        raise ValueError(f"{file} is damaged: {noted!r} instead of an object")
    return noted


def _check(folder: Path, noted: Sequence[tuple[str, list[Any]]]) -> None:
    with ThreadPoolExecutor(_THREADS) as threads:
        for reason in threads.map(lambda entry: _problem(folder / entry[0], entry[1]), noted):
            if reason is not None:
                raise ValueError(reason)


def _problem(file: Path, wanted: list[Any]) -> str | None:
    if not file.is_file():
        return f"{file} is missing"
    if (size := os.path.getsize(file)) != wanted[0]:
        return f"{file} has {size} bytes, of {wanted[0]} that were written"
    if _digest(file) != wanted:
        return f"{file} is not what was written: its digest is another"
    return None


def _digest(file: Path) -> list[Any]:
    """[bytes, BLAKE2b]"""
    digest, size = hashlib.blake2b(digest_size=16), 0
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
            size += len(block)
    return [size, digest.hexdigest()]
