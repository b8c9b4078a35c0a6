"""Variants of one job timed in turns in one process, so that what disturbs one disturbs all."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to do a job. `run` does it once, waits for the result and returns its tokens."""

    name: str
    run: Callable[[], int]
    temporaries: Callable[[], int] | None = None  # bytes; called after the first run


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one variant took. Lists have one entry per repeat, the first run left out."""

    variant: str
    tokens: int
    cpu_seconds: list[float]  # process time: all threads together
    wall_seconds: list[float]
    speed: list[float]  # tokens per second relative to the first variant in the same round
    compilations: int  # programs compiled by the first run
    compile_seconds: float
    recompilations: int  # programs compiled by the runs after it
    temporaries: int | None  # bytes XLA sets aside besides arguments and results


def compare(variants: Sequence[Variant], repeats: int) -> list[Timing]:
    """Runs every variant once to compile it, then all of them in turns, `repeats` rounds.

    Relative speed is by CPU seconds where JAX runs on the CPU, by the clock on accelerators.
    """
    first = [_once(variant) for variant in variants]
    rounds = []
    for repeat in range(repeats):
        shift = repeat % len(variants)  # no variant always follows the same one
        order = [*range(shift, len(variants)), *range(shift)]
        results = {i: _once(variants[i]) for i in order}
        rounds.append([results[i] for i in range(len(variants))])
    clock = "cpu" if jax.default_backend() == "cpu" else "wall"

    def rate(run: _Run) -> float:
        return run.tokens / getattr(run, clock)

    return [
        Timing(
            variant=variant.name,
            tokens=first[i].tokens,
            cpu_seconds=[runs[i].cpu for runs in rounds],
            wall_seconds=[runs[i].wall for runs in rounds],
            speed=[rate(runs[i]) / rate(runs[0]) for runs in rounds],
            compilations=first[i].compilations,
            compile_seconds=first[i].compile_seconds,
            recompilations=sum(runs[i].compilations for runs in rounds),
            temporaries=None if variant.temporaries is None else variant.temporaries(),
        )
        for i, variant in enumerate(variants)
    ]


def markdown(timings: Sequence[Timing]) -> str:
    """A table of medians with the least and the greatest value in brackets."""
    rows = [
        "| variant | tokens / CPU-s | CPU seconds | wall seconds | speed, first = 1 "
        "| XLA temporaries | compiled | again |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for t in timings:
        memory = "" if t.temporaries is None else f"{t.temporaries / 2**20:.0f} MiB"
        rows.append(
            f"| {t.variant} | {t.tokens / statistics.median(t.cpu_seconds):.0f} "
            f"| {_spread(t.cpu_seconds)} | {_spread(t.wall_seconds)} | {_spread(t.speed)} "
            f"| {memory} | {t.compilations} in {t.compile_seconds:.1f} s | {t.recompilations} |"
        )
    return "\n".join(rows) + "\n"


@dataclasses.dataclass(frozen=True)
class _Run:
    tokens: int
    cpu: float
    wall: float
    compilations: int
    compile_seconds: float


def _once(variant: Variant) -> _Run:
    with _compilations() as compilations:
        cpu, wall = time.process_time(), time.perf_counter()
        tokens = variant.run()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return _Run(tokens, cpu, wall, len(compilations), sum(compilations))


@contextmanager
def _compilations() -> Iterator[list[float]]:
    """Collects the seconds of every XLA compilation inside the block."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"
