"""Grading of mathematical answers with math-verify, in worker processes under hard limits.

The texts come from a model that is rewarded for breaking this. What cannot be read, takes too long
or eats memory is not the same as anything else: it costs at most one worker, which is replaced, is
logged and counted, and neither raises nor hangs.

Processor time, not time on the clock, is what a pair may not take too much of, counted from when a
warm worker begins with it: on a busy machine an answer waits longer and is graded alike. (Ordinary
answers take a hundredth of a second, so the limit decides over hostile ones only.) The clock ends a
worker after `CLOCK_FACTOR` times as long, in case one sleeps or is stopped. Workers hash alike too,
by a fixed PYTHONHASHSEED: sympy's way to a result depends on the order of sets.

pebble and the standard library's process pools do not fit: their workers import the parent's main
module, an experiment with jax and all, and know the clock only.
"""

from __future__ import annotations

import collections
import functools
import logging
import os
import re
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from spark_jax.evaluation.worker_process import WorkerProcess, stop_all

TIME_LIMIT = 5.0  # seconds of processor time for one pair: two readings, two comparisons
CLOCK_FACTOR = 10  # the clock's limit, in time limits
MEMORY_LIMIT = 512 * 2**20  # bytes of address space of a worker; a fresh one has about 65 MB
START_LIMIT = 120.0  # seconds until a new worker must be ready; it takes about 0.3
MAX_CHARACTERS = 1000  # the longest answer that is read
THREADS = 8  # of `in_threads`: more than workers, because many comparisons need none
WORKERS_VARIABLE = "SPARK_JAX_GRADING_WORKERS"

Pair = tuple[str | None, str | None]
T = TypeVar("T")

logger = logging.getLogger(__name__)


def same_answer(a: str | None, b: str | None) -> bool:
    """Whether two answers, the contents of two boxes, are mathematically the same. Symmetric.

    Equal texts are the same, whatever they are. Otherwise both must be readable, and math-verify
    must find them equal in either direction. Equal to nothing are None, an empty text, more than
    `MAX_CHARACTERS` characters, and what breaks a limit.

    Callable from any thread. Workers are shared, started when first needed, and end with this
    process; there are at most `$SPARK_JAX_GRADING_WORKERS`, or as many as processors up to 4.

    Raises RuntimeError where no worker can be started, with the reason: graded as wrong is what the
    model wrote, not what the machine lacks.
    """
    return _shared().same_answer(a, b)


def same_answers(pairs: Sequence[Pair]) -> list[bool]:
    """`same_answer` of each pair, over all workers in parallel."""
    return _shared().same_answers(pairs)


def in_threads(grade: Callable[..., T], *columns: Sequence[Any]) -> list[T]:
    """`map`, for functions that compare answers: several rows at a time, so that no worker idles.

    The first exception of a row is raised. Raises ValueError for columns of unlike length.
    """
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"in_threads: columns of {[len(column) for column in columns]} rows")
    with ThreadPoolExecutor(THREADS, "grading") as threads:
        return list(threads.map(grade, *columns))


def counts() -> dict[str, int]:
    """What the shared workers did so far: see `Grader.counts`."""
    return _shared().counts()


class Grader:
    """Worker processes that grade, and a memory of what they said. A context manager.

    Args:
        workers: most processes at a time; None: `$SPARK_JAX_GRADING_WORKERS`, else min(4, CPUs).
        time_limit: seconds of processor time a pair.
        memory_limit: bytes of address space a worker. Not kept on macOS, which is logged.

    Raises ValueError for fewer than one worker and for limits that are not positive.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        time_limit: float = TIME_LIMIT,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        self.workers = _checked_workers(workers)
        if time_limit <= 0 or memory_limit <= 0:
            raise ValueError(f"{time_limit=}, {memory_limit=}: limits must be above 0")
        self.time_limit, self.memory_limit = time_limit, memory_limit
        self._idle: list[WorkerProcess] = []
        self._counts: collections.Counter[str] = collections.Counter()
        self._equal = functools.lru_cache(maxsize=1 << 16)(self._ask_a_worker)
        self._own()
        weakref.finalize(self, stop_all, self._idle)  # at the latest when the interpreter ends

    def same_answer(self, a: str | None, b: str | None) -> bool:
        """See `grading.same_answer`."""
        decision = _decide(a, b)
        return decision if isinstance(decision, bool) else self._equal(*decision)

    def same_answers(self, pairs: Sequence[Pair]) -> list[bool]:
        """See `grading.same_answers`. Each different pair is asked once."""
        decisions = [_decide(a, b) for a, b in pairs]
        open_pairs = list(dict.fromkeys(d for d in decisions if not isinstance(d, bool)))
        if len(open_pairs) < 2:
            equal = [self._equal(*pair) for pair in open_pairs]
        else:
            with ThreadPoolExecutor(self.workers, "grading") as threads:
                equal = list(threads.map(lambda pair: self._equal(*pair), open_pairs))
        verdicts = dict(zip(open_pairs, equal, strict=True))
        return [d if isinstance(d, bool) else verdicts[d] for d in decisions]

    def counts(self) -> dict[str, int]:
        """How often what happened.

        `asked`: pairs that went to a worker; `started`: workers; `retired`: workers replaced
        because they had grown; and pairs that cost a worker and count as different: `time_limit`,
        `clock_limit`, `crashed`.
        """
        kinds = ("asked", "started", "retired", *_FAILURES)
        return {kind: self._counts[kind] for kind in kinds}

    def close(self) -> None:
        """Stops the idle workers. Whatever is graded after it starts new ones."""
        stop_all(self._idle)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _own(self) -> None:
        """Makes the workers and locks this process's. A fork inherits both and may use neither."""
        self._process_id = os.getpid()
        self._idle.clear()
        self._free = threading.BoundedSemaphore(self.workers)
        self._counting = threading.Lock()

    def _ask_a_worker(self, a: str, b: str) -> bool:
        if self._process_id != os.getpid():
            self._own()
        with self._free:
            worker = self._idle_worker()
            try:
                reply = worker.ask([a, b], CLOCK_FACTOR * self.time_limit)
            except BaseException:  # an interrupt: its answer must not be taken for the next one's
                worker.stop()
                raise
            self._count("asked")
            if reply.get("last", True):
                worker.stop()
            else:
                self._idle.append(worker)
        failure = reply.get("failure")
        if failure is not None:
            times = self._count(failure)
            logger.warning(
                "grading: %s on %.60r and %.60r, which count as different (%s no. %d)",
                _FAILURES[failure], a, b, failure, times,
            )  # fmt: skip
        elif reply["last"]:
            self._count("retired")
        return failure is None and reply["same"]

    def _idle_worker(self) -> WorkerProcess:
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                break
            if worker.alive():
                return worker
            logger.warning("grading: an idle worker was killed; another takes its place")
            worker.stop()
        self._count("started")
        return _started(self.time_limit, self.memory_limit)

    def _count(self, kind: str) -> int:
        with self._counting:
            self._counts[kind] += 1
            return self._counts[kind]


_FAILURES = {
    "time_limit": "a worker was out of processor time",
    "clock_limit": "a worker did not reply",
    "crashed": "a worker died",
}


def _started(time_limit: float, memory_limit: int) -> WorkerProcess:
    """A worker that is ready to grade. RuntimeError, with the reason, where there can be none."""
    file = Path(__file__).with_name("grading_worker.py")
    worker = WorkerProcess(file, time_limit, memory_limit)
    try:
        first = worker.receive(START_LIMIT)
    except BaseException:
        worker.stop()
        raise
    if "memory_limited" not in first:
        worker.stop()
        raise RuntimeError(
            f"no grading worker could be started with {sys.executable}: "
            f"{first.get('error', first.get('failure'))}"
        )
    if not first["memory_limited"]:
        logger.warning("grading: this system has no limit of memory for a process")
    return worker


_SHARING = threading.Lock()


def _shared() -> Grader:
    with _SHARING:
        return _make_shared()


@functools.cache
def _make_shared() -> Grader:
    return Grader()


def _checked_workers(workers: int | None) -> int:
    place = "workers"
    if workers is None:
        text = os.environ.get(WORKERS_VARIABLE, "")
        place = f"${WORKERS_VARIABLE}"
        try:
            workers = int(text) if text else min(4, os.cpu_count() or 1)
        except ValueError:
            raise ValueError(f"{place}={text!r} is no number of processes") from None
    if workers < 1:
        raise ValueError(f"{place}={workers}: at least one worker is needed to grade")
    return workers


def _decide(a: str | None, b: str | None) -> bool | tuple[str, str]:
    """What can be said without math-verify; otherwise the two formulas to ask it about."""
    if a is None or b is None:
        return False
    a, b = sorted((a.strip(), b.strip()))
    if not a or not b:
        return False
    if a == b:
        return True
    first, second = _formula(a), _formula(b)
    if first is None or second is None:
        return False
    same = _same_number(first, second)
    return (first, second) if same is None else same


_DOLLAR = re.compile(r"(?<!\\)\$")


def _formula(answer: str) -> str | None:
    """The answer without a pair of dollars around it or a currency sign before it.

    None if it is too long or other dollars remain: `3$ and $4` is two formulas, of which one would
    be picked.
    """
    if len(answer) > 1 and answer[0] == "$" and answer[-1] == "$" and answer[-2] != "\\":
        answer = answer[1:-1]
    elif answer.startswith("$"):
        answer = answer[1:]
    answer = answer.strip()
    readable = 0 < len(answer) <= MAX_CHARACTERS and not _DOLLAR.search(answer)
    return answer if readable else None


_INTEGER = r"(?:0|[1-9][0-9]{0,11})"
_NUMBER = re.compile(
    rf"(?P<sign>-?)(?:(?P<decimal>{_INTEGER}\.[0-9]{{1,6}})"
    rf"|(?P<whole>{_INTEGER})(?:/(?P<under>{_INTEGER}))?"
    rf"|\\[dt]?frac\{{(?P<above>{_INTEGER})\}}\{{(?P<below>{_INTEGER})\}})"
)
_ROUNDING = Fraction(2, 10**6)


def _same_number(a: str, b: str) -> bool | None:
    """As math-verify would say, but without it, where both are plain numbers of few digits.

    It compares exactly, but with six decimals where one of the two is a decimal number: numbers
    that differ by less than two units there are left to it.
    """
    first, second = _NUMBER.fullmatch(a), _NUMBER.fullmatch(b)
    if not first or not second:
        return None
    x, y = _value(first), _value(second)
    if x is None or y is None:
        return None
    if x == y or not (first["decimal"] or second["decimal"]):
        return x == y
    return False if abs(x - y) > _ROUNDING else None


def _value(number: re.Match[str]) -> Fraction | None:
    below = int(number["under"] or number["below"] or 1)
    if not below:
        return None
    size = Fraction(number["decimal"] or number["whole"] or number["above"])
    return (-size if number["sign"] else size) / below
