"""Compiled programs that all runs of a process share, whatever threads these are on."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any


def shared(make: Callable[..., Any]) -> Callable[..., Any]:
    """`functools.lru_cache` for what makes a jitted function of hashable settings.

    Runs that start at once then wait for one jitted function; with `lru_cache` alone each would
    make its own, and XLA compile it as often.
    """
    made, making = functools.lru_cache(maxsize=16)(make), threading.Lock()

    @functools.wraps(make)
    def found(*settings: Any) -> Any:
        with making:
            return made(*settings)

    return found
