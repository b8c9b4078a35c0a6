"""What every worker does: read jobs as JSON lines, run and measure them, answer as JSON lines.

Standard library only, because it runs in the environments of the peers too. Standard input carries
the requests, one JSON object a line:

    {"do": "about"}                -> versions and devices
    {"do": "prepare", "job": {..}} -> {"id": n}; loads what the job needs, runs nothing
    {"do": "run", "id": n}         -> what `Measured` holds, as an object
    {"do": "warm", "id": n}        -> the same, for a run that only has to compile and touch memory
    {"do": "rest"}                 -> {}; gives memory that is not in use back to the system

An answer with "error" in it says why there is none; the worker goes on.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Run = Callable[[bool], Result]
"""(warm) -> {"amount": tokens, bytes or operations done} and, where known, "temporaries" (bytes),
"facts" (numbers by name) and "tokens" (rows, to compare with another worker's). It waits for the
result before it returns."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one run took."""

    amount: float  # in the benchmark's unit
    cpu_seconds: float  # process time: all threads together
    wall_seconds: float
    peak_bytes: int | None  # most memory resident during the run, libraries and weights included
    device_peak_bytes: int | None  # the same on an accelerator
    compilations: int | None  # programs; None where the worker does not compile
    compile_seconds: float | None
    temporaries: int | None
    facts: dict[str, float]
    tokens: list[list[int]] | None


@dataclasses.dataclass(frozen=True)
class Probes:
    """How a framework is asked about itself. None: it cannot be."""

    compilations: Callable[[], tuple[int, float]] | None = None  # so far: programs, seconds
    reset_device_peak: Callable[[], None] | None = None
    device_peak: Callable[[], int | None] | None = None


def serve(
    about: Callable[[], dict[str, Any]],
    prepare: Callable[[dict[str, Any]], Run],
    probes: Callable[[], Probes],
) -> None:
    """Answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    known = probes()
    runs: list[Run] = []
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "about":
                answer = about()
            elif request["do"] == "prepare":
                runs.append(prepare(request["job"]))
                answer = {"id": len(runs) - 1}
            elif request["do"] == "rest":
                answer = _rest()
            else:
                run = runs[request["id"]]
                answer = dataclasses.asdict(_measure(run, request["do"] == "warm", known))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def jax_probes() -> Probes:
    """Counts XLA's compilations, and asks the first device for its peak memory."""
    import jax

    compiled: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)

    def device_peak() -> int | None:  # since the process began: JAX cannot set it back
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    return Probes(lambda: (len(compiled), sum(compiled)), None, device_peak)


def _rest() -> dict[str, Any]:
    """Idle, a train step's memory is for the others: glibc would keep gigabytes of it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim:
        trim(0)
    return {}


def _measure(run: Run, warm: bool, probes: Probes) -> Measured:
    before = probes.compilations() if probes.compilations else (0, 0.0)
    if probes.reset_device_peak:
        probes.reset_device_peak()
    _reset_peak()
    cpu, wall = time.process_time(), time.perf_counter()
    result = run(warm)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    after = probes.compilations() if probes.compilations else None
    return Measured(
        amount=result["amount"],
        cpu_seconds=cpu,
        wall_seconds=wall,
        peak_bytes=_peak(),
        device_peak_bytes=probes.device_peak() if probes.device_peak else None,
        compilations=None if after is None else after[0] - before[0],
        compile_seconds=None if after is None else after[1] - before[1],
        temporaries=result.get("temporaries"),
        facts=result.get("facts", {}),
        tokens=result.get("tokens"),
    )


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux: the peak is the process's, not the run's


def _peak() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kilobytes * (1 if sys.platform == "darwin" else 1024)
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM")), None)
