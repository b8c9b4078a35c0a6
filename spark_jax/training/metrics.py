"""Metrics on disk: JSON lines for programs, TensorBoard for people."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spark_jax.parallel import processes

_RESERVED = ("step", "wall_time", "cpu_time", "seconds", "non_finite")
SECONDS_BETWEEN_SYNCS = 1.0  # a bucket takes no more of one object


class MetricsWriter:
    """Appends to `<directory>/metrics.jsonl` and, unless told not to, to TensorBoard event files.

    A row is one JSON object: `step`; `wall_time` and `cpu_time`, seconds spent in this run, summed
    over resumptions; `seconds`, where it is given; and one float a metric. JSON has no NaN or
    infinity: such a value is written as null and named in the row's `non_finite`; `read_metrics`
    puts it back. Several rows may share a step. Use as a context manager, or call `close`. Of
    several processes only the first writes.

    A row is on the disk, or in the bucket that is mounted there, when `scalars` returns, but for
    rows that follow within `SECONDS_BETWEEN_SYNCS` of another: those come with the next one.
    """

    def __init__(self, directory: str | os.PathLike[str], *, tensorboard: bool = True) -> None:
        """Opens or creates `directory`; a last line torn by a crash is dropped with a warning."""
        self.directory = Path(directory)
        self.path = self.directory / "metrics.jsonl"
        self._writes = processes.is_main()
        self._with_tensorboard = tensorboard and self._writes
        self._events: Any = None
        self._file: Any = None
        self._purge_step: int | None = None
        if not self._writes:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self._reopen(_complete_lines(self.path) if self.path.exists() else [])

    def truncate_after(self, step: int) -> int:
        """Drops every row of a later step than `step`, the one a resumed run restored; clocks go on
        from the last row left. TensorBoard hides the dropped events as well.

        Returns how many rows were dropped. Warns, with file and step, where the step's own row is
        missing, as a machine that was taken away leaves it.
        """
        if self._events is not None:
            raise ValueError("truncate_after must come before the first TensorBoard event")
        if not self._writes:
            return 0
        lines = _complete_lines(self.path)
        steps = [json.loads(line)["step"] for line in lines]
        kept = [line for line, at in zip(lines, steps, strict=True) if at <= step]
        if step > 0 and step not in (there := [at for at in steps if at <= step]):
            warnings.warn(
                f"{self.path} has no row of step {step}, from which the run goes on: rows after "
                f"step {max(there, default=0)} were lost with the machine that wrote them",
                stacklevel=2,
            )
        self._purge_step = step + 1
        self._reopen(kept)
        return len(lines) - len(kept)

    def scalars(
        self, step: int, metrics: Mapping[str, Any], *, seconds: Mapping[str, float] | None = None
    ) -> None:
        """Writes one row; values are Python, NumPy or JAX scalars, and become floats.

        `seconds` is what parts of the step took, and rates made of that: like the clocks it is of
        the machine, no two runs agree on it, and so it has a column of its own.

        Raises:
          ValueError: a value is not a scalar, or a metric is named like a column of our own.
        """
        values = {name: _scalar(name, v) for name, v in jax.device_get(dict(metrics)).items()}
        if not self._writes:
            return
        non_finite = {name: str(v) for name, v in values.items() if not math.isfinite(v)}
        row: dict[str, Any] = {
            "step": int(step),
            "wall_time": time.monotonic() - self._wall_origin,
            "cpu_time": time.process_time() - self._cpu_origin,
            **{name: None if name in non_finite else v for name, v in values.items()},
        }
        if seconds:
            row["seconds"] = dict(seconds)
        if non_finite:
            row["non_finite"] = non_finite
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if time.monotonic() - self._synced >= SECONDS_BETWEEN_SYNCS:
            self._sync()
        if self._with_tensorboard:
            timed = {f"seconds/{name}": value for name, value in (seconds or {}).items()}
            for name, value in (values | timed).items():
                self._tensorboard().add_scalar(name, value, int(step))

    def histogram(self, step: int, name: str, values: Any) -> None:
        """A histogram of the finite entries of an array, in TensorBoard only."""
        array = np.asarray(jax.device_get(values), np.float64).ravel()
        array = array[np.isfinite(array)]
        if self._with_tensorboard and array.size:
            self._tensorboard().add_histogram(name, array, int(step))

    def text(self, step: int, name: str, text: str) -> None:
        """A text (Markdown), such as a sampled response, in TensorBoard only."""
        if self._with_tensorboard:
            self._tensorboard().add_text(name, text, int(step))

    def close(self) -> None:
        if self._file is not None and not self._file.closed:
            self._sync()
            self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reopen(self, lines: list[str]) -> None:
        """Makes `lines` the file's content, by a rename, and continues after the last of them."""
        if self._file is not None:
            self._file.close()
        temporary = self.path.with_suffix(".jsonl.tmp")
        with temporary.open("w") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        last = json.loads(lines[-1]) if lines else {"wall_time": 0.0, "cpu_time": 0.0}
        self._wall_origin = time.monotonic() - last["wall_time"]
        self._cpu_origin = time.process_time() - last["cpu_time"]
        self._file, self._synced = self.path.open("a"), -math.inf

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _tensorboard(self) -> Any:
        if self._events is None:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self.directory), purge_step=self._purge_step)
        return self._events


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, in order, with NaN and infinities put back."""
    rows = []
    for line in _complete_lines(Path(path)):
        row = json.loads(line)
        for name, text in row.pop("non_finite", {}).items():
            row[name] = float(text)
        rows.append(row)
    return rows


def _complete_lines(path: Path) -> list[str]:
    """The file's lines; a last one without its newline is what a crash in mid-write leaves."""
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        warnings.warn(f"{path}: dropped the last line, cut short: {lines[-1][:80]!r}", stacklevel=3)
        lines.pop()
    return lines


def _scalar(name: str, value: Any) -> float:
    if name in _RESERVED:
        raise ValueError(f"metric name {name!r} is taken by a column of the file; rename it")
    array = np.asarray(value)
    if array.shape != () or (array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16"):
        raise ValueError(
            f"metric {name!r} is not a scalar number: shape {array.shape}, dtype {array.dtype}; "
            "reduce it, or write it with `histogram` or `text`"
        )
    return float(array)
