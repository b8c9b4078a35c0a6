"""How far a run is, how fast it goes, and how long it has left: bars in a terminal, lines in a log.

A run that is not finished reports where it stands before it begins, then after every unit of work.
The pace is that of this start alone, and as soon as possible without the first unit, which
compiles: what an earlier start did, and what is read back, does not make it look faster.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from spark_jax.parallel import processes

OnProgress = Callable[[int, int], None]  # (done, total), in the experiment's own unit
Job = tuple[Callable[[Any, Path, OnProgress], Any], Any, Path]  # run, configuration, folder

SECONDS_BETWEEN_LINES = 60.0  # where there is no terminal to draw a bar in


class Pace:
    """Seconds per unit of work. `done` counts from any start; `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._marks: list[tuple[float, float]] = []  # (time, done): at first, after the first unit
        self._last: tuple[float, float] | None = None

    def report(self, done: float) -> None:
        self._last = (self._clock(), done)
        if len(self._marks) < 2 and (not self._marks or done > self._marks[-1][1]):
            self._marks.append(self._last)

    def seconds_per_unit(self) -> float | None:
        """None before a unit was done."""
        for at, done in reversed(self._marks):
            if self._last is not None and self._last[1] > done:
                return (self._last[0] - at) / (self._last[1] - done)
        return None


class Jobs:
    """Runs independent jobs on a few threads (the compiled programs run outside Python's lock),
    with one bar per stage that counts the jobs' own units."""

    def __init__(self, progress: Progress, workers: int) -> None:
        self.progress, self.workers = progress, workers

    def run(self, title: str, jobs: Iterable[Job]) -> None:
        """Runs all jobs; the first error ends the stage and is raised."""
        jobs = list(jobs)
        share = dict.fromkeys(range(len(jobs)), 0.0)
        before: dict[int, float] = {}  # what of each was there when it began
        lock = threading.Lock()
        bar = Bar(self.progress, title, "runs")
        bar.report(0.0, len(jobs))

        ended = threading.Event()  # by an error: no other job is begun

        def one(index: int) -> None:
            if ended.is_set():
                return
            job, config, path = jobs[index]
            try:
                job(config, path, lambda done, total: report(index, done / total))
            except BaseException:
                ended.set()
                raise
            report(index, 1.0)

        def report(index: int, done: float) -> None:
            with lock:
                before.setdefault(index, done)
                share[index] = done
                bar.report(sum(share.values()), len(jobs), sum(before.values()))

        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(one, index) for index in range(len(jobs))]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                self.progress.console.print("stopping: what is under way is finished first ...")
                pool.shutdown(cancel_futures=True)
                raise


class Bar:
    """One line of `bars`, with the pace in `unit` if there is one."""

    def __init__(self, progress: Progress, title: str, unit: str = "") -> None:
        self._progress, self._title, self._unit = progress, title, unit
        self._pace, self._first = Pace(time.monotonic), True
        self._said, self._over = time.monotonic(), False
        self._task = progress.add_task(title, total=None, pace=None, unit=unit)

    def report(self, done: float, total: float, before: float = 0.0) -> None:
        """`before` of what is done was there when it was begun."""
        self._pace.report(done - before)
        pace = self._pace.seconds_per_unit()
        self._progress.update(self._task, completed=done, total=total, pace=pace)
        finished = done >= total and not self._first
        due = finished or time.monotonic() - self._said >= SECONDS_BETWEEN_LINES
        due, self._over = due and not self._over, finished
        if due and not self._progress.console.is_terminal and not self._progress.console.quiet:
            self._said = time.monotonic()
            parts = (
                f"{round(done, 2):g} of {total:g} {self._unit}".rstrip(),
                speed(pace, self._unit),
            )
            left = f"left: {duration(pace and pace * (total - done))}"
            self._progress.console.print(f"{self._title}: {', '.join(filter(None, parts))}, {left}")
        self._first = False


def bars(console: Console) -> Progress:
    """Bars with a share, the time gone, the pace and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        _Left(),
        console=console,
        refresh_per_second=2,
        disable=not console.is_terminal,
    )


@contextlib.contextmanager
def shown(title: str, unit: str) -> Iterator[OnProgress]:
    """A bar for one run, which is handed what is yielded; on stderr, of the first process alone."""
    with bars(Console(stderr=True, quiet=not processes.is_main())) as progress:
        yield Bar(progress, title, unit).report


def speed(pace: float | None, unit: str) -> str:
    """ "12.3 s per update", "8.1 updates/s"; "" where it is not known or there is no unit."""
    if pace is None or not unit or pace <= 0:
        return ""
    if pace < 1:
        return f"{1 / pace:.1f} {unit}/s"
    return f"{pace:.1f} s per {unit.removesuffix('s')}"


def duration(seconds: float | None) -> str:
    """ "0:02:05"; "unknown" for None."""
    return "unknown" if seconds is None else str(timedelta(seconds=round(seconds)))


class _Left(ProgressColumn):
    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        pace = task.fields["pace"]
        if task.total is None or pace is None:
            return Text("")
        left = f"left: {duration(pace * (task.total - task.completed))}"
        return Text("  ".join(filter(None, (speed(pace, task.fields["unit"]), left))))
