"""The process in which reasoning-gym makes problems and scores answers. `reasoning_gym_tasks`
starts it, by file name.

It imports nothing of spark_jax. What is scored was written by a model that is rewarded for breaking
this, and many of the scorers evaluate it: hence a process of its own, with limits.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PARENT_CHECK = 5.0  # seconds between two looks whether the parent is still there


def serve(connection: Connection, parent: int, limits: dict[str, Any]) -> None:
    """Answers JSON requests by `{"value": ...}` or `{"error": text}` until nobody asks any more.

    `["make", dataset, settings, seed, size]`: the questions and answers of a dataset.
    `["score", dataset, settings, seed, size, index, answer]`: what the dataset's own scorer says, a
    number; −1 where it raises. A request that takes more than its limit of processor seconds, or
    more than the limit of memory, ends the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS; the limit of time holds everywhere
        resource.setrlimit(resource.RLIMIT_AS, (limits["memory"],) * 2)
    requests: dict[str, Callable[..., Any]] = {"make": make, "score": score}
    while (message := _next(connection, parent)) is not None:
        kind, *arguments = json.loads(message)
        try:
            signal.setitimer(signal.ITIMER_PROF, limits["make"])
            _entries(*_which(arguments))  # of a fresh worker; not on the answer's bill
            signal.setitimer(signal.ITIMER_PROF, limits[kind])
            reply = {"value": requests[kind](*arguments)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(json.dumps(reply).encode())


def make(name: str, settings: dict[str, Any], seed: int, size: int) -> list[list[Any]]:
    """[question, answer or None] of each entry."""
    entries = _entries(*_which([name, settings, seed, size]))[1]
    return [[entry["question"], entry["answer"]] for entry in entries]


def score(
    name: str, settings: dict[str, Any], seed: int, size: int, index: int, answer: str
) -> float:
    """The score of an answer to entry `index` of the dataset."""
    dataset, entries = _entries(*_which([name, settings, seed, size]))
    try:
        return float(dataset.score_answer(answer, entries[index]))
    except Exception:  # scorers parse the answer, some without care
        return -1.0


def _which(arguments: list[Any]) -> tuple[str, str, int, int]:
    name, settings, seed, size = arguments[:4]
    return name, json.dumps(settings), seed, size


@functools.lru_cache(maxsize=64)
def _entries(name: str, settings: str, seed: int, size: int) -> tuple[Any, list[dict[str, Any]]]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ValueError(f"there is no dataset {name!r}; choose one of {sorted(DATASETS)}")
    dataset = reasoning_gym.create_dataset(name, seed=seed, size=size, **json.loads(settings))
    entries = [dataset[index] for index in range(size)]
    with contextlib.suppress(Exception):  # what a first score imports is on no answer's bill
        dataset.score_answer(entries[0]["answer"] or "", entries[0])
    return dataset, entries


def _next(connection: Connection, parent: int) -> bytes | None:
    """The next request; None once nobody can send one."""
    try:
        while not connection.poll(PARENT_CHECK):
            if os.getppid() != parent:  # another child may hold the other end open
                return None
        return connection.recv_bytes()
    except (EOFError, OSError):
        return None


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]), json.loads(sys.argv[3]))
