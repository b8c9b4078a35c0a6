"""Grading of mathematical answers with math-verify, under a time limit.

What cannot be read, or takes too long, is not the same as anything else: it counts as wrong and
never raises, because the texts come from a model that is rewarded for breaking this.
"""

from __future__ import annotations

import functools
import re
import threading

TIME_LIMIT = 3  # seconds, for each of at most two readings and two comparisons
MAX_CHARACTERS = 1000  # the longest answer that is read


def same_answer(a: str | None, b: str | None) -> bool:
    """Whether two answers, the contents of two boxes, are mathematically the same. Symmetric.

    Equal texts are the same, whatever they are. Otherwise both must be readable, and math-verify
    must find them equal in either direction (it follows the form of its first argument: `x=3` and
    `3` are the same). Equal to nothing are None, an empty text, more than `MAX_CHARACTERS`
    characters, and what takes longer than `TIME_LIMIT` seconds to read or to compare; that is
    logged, by math-verify.

    The limit is an alarm signal, which cannot stop one long operation inside C code.

    Raises RuntimeError outside the main thread, where there are no alarms.
    """
    if a is None or b is None:
        return False
    a, b = sorted((a.strip(), b.strip()))
    if not a or not b:
        return False
    if a == b:
        return True
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "same_answer keeps its time limit by an alarm signal, which only the main thread can "
            "set; grade in the main thread or in a worker process"
        )
    return _equal(a, b)


@functools.lru_cache(maxsize=1 << 16)
def _equal(a: str, b: str) -> bool:
    import math_verify  # sympy with it: not before something is graded

    first, second = _parse(a), _parse(b)
    if not first or not second:
        return False
    return any(
        math_verify.verify(list(gold), list(target), timeout_seconds=TIME_LIMIT)
        for gold, target in ((first, second), (second, first))
    )


@functools.lru_cache(maxsize=1 << 16)
def _parse(answer: str) -> tuple[object, ...]:
    """What math-verify reads in an answer; () for nothing."""
    import math_verify

    bare = _without_dollars(answer)
    if bare is None or len(bare) > MAX_CHARACTERS:
        return ()
    return tuple(math_verify.parse(f"${bare}$", parsing_timeout=TIME_LIMIT))


_DOLLAR = re.compile(r"(?<!\\)\$")


def _without_dollars(answer: str) -> str | None:
    """The answer without a pair of dollars around it or a currency sign before it.

    None if other dollars remain: `3$ and $4` is two formulas, of which one would be picked.
    """
    if len(answer) > 1 and answer[0] == "$" and answer[-1] == "$" and answer[-2] != "\\":
        answer = answer[1:-1]
    elif answer.startswith("$"):
        answer = answer[1:]
    answer = answer.strip()
    return None if not answer or _DOLLAR.search(answer) else answer
