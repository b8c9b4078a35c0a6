"""The process in which math-verify reads and compares answers. `grading` starts it, by file name.

It imports nothing of spark_jax, so that it starts in a fraction of a second, whatever the parent
runs: an experiment, a test, a notebook. `same` is what it computes, without any limit.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import resource
import signal
import sys
import traceback
from multiprocessing.connection import Connection

RETIRE_ABOVE = 0.5  # of the memory limit: a worker that holds so much is replaced
PARENT_CHECK = 5.0  # seconds between two looks whether the parent is still there


def same(a: str, b: str) -> bool:
    """Whether math-verify reads both formulas and finds them equal, in either direction.

    (It follows the form of its first argument: `x=3` and `3` are the same in one direction only.)
    """
    import math_verify

    first, second = _read(a), _read(b)
    if not first or not second:
        return False
    return any(
        math_verify.verify(list(gold), list(target), timeout_seconds=None)
        for gold, target in ((first, second), (second, first))
    )


@functools.lru_cache(maxsize=1 << 12)
def _read(formula: str) -> tuple[object, ...]:
    """What math-verify reads in a formula; () for nothing."""
    import math_verify

    return tuple(math_verify.parse(f"${formula}$", parsing_timeout=None))


def serve(connection: Connection, parent: int, time_limit: float, memory_limit: int) -> None:
    """Answers `[a, b]` with `{"same": ..., "last": ...}` until the parent hangs up or is gone.

    All messages are JSON. The first one from here is `{"memory_limited": ...}`, or `{"error": ...}`
    if there is nothing to grade with; nothing else raises. `last` means that this worker has grown
    and wants to be replaced. A pair that takes more than `time_limit` seconds of processor time
    ends the process by SIGPROF: an exception could be caught by the code that it interrupts, and
    could not interrupt one long operation inside C code at all.
    """
    try:
        memory_limited = _prepare(memory_limit)
        same("1/2", "0.50000001")  # what a first pair imports and compiles is not on its bill
    except Exception:
        connection.send_bytes(json.dumps({"error": traceback.format_exc()}).encode())
        return
    connection.send_bytes(json.dumps({"memory_limited": memory_limited}).encode())
    while (request := _request(connection, parent)) is not None:
        a, b = json.loads(request)
        signal.setitimer(signal.ITIMER_PROF, time_limit)
        try:
            equal = same(a, b)
        except Exception:  # what math-verify itself lets through: deep recursion, no memory
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        last = _memory() > RETIRE_ABOVE * memory_limit
        connection.send_bytes(json.dumps({"same": equal, "last": last}).encode())


def _request(connection: Connection, parent: int) -> bytes | None:
    """The next message; None once nobody can send one."""
    try:
        while not connection.poll(PARENT_CHECK):
            # Another child of the parent may hold the other end open after the parent's death.
            if os.getppid() != parent:
                return None
        return connection.recv_bytes()
    except (EOFError, OSError):
        return None


def _prepare(memory_limit: int) -> bool:
    """Sets signals, logs and limits; returns whether this system has limits of memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    logging.disable(logging.CRITICAL)  # math-verify logs whatever it cannot read
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = memory_limit if hard == resource.RLIM_INFINITY else min(memory_limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ValueError, OSError):  # macOS
        return False
    return True


def _memory() -> int:
    """The address space of this process, in bytes; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


if __name__ == "__main__":
    serve(
        Connection(int(sys.argv[1])),
        int(sys.argv[2]),
        float(sys.argv[3]),
        memory_limit=int(sys.argv[4]),
    )
