"""Speed and memory of the library's own variants against one another.

    make bench                                            (or: python -m benchmarks.run)
    python -m benchmarks.run --only layouts,scoring --repeats 9
    python -m benchmarks.run --small                      (tiny shapes: does it run at all)

A SmolLM2-135M-shaped model with random weights. Writes runs/benchmarks/benchmarks.json with every
single measurement, and benchmarks.md with the tables printed here. Believe the ratios of one run,
not absolute figures of two.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib

from .measure import compare, markdown
from .workloads import BENCHMARKS, FULL, SMALL


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    size = SMALL if options.small else FULL
    record: dict[str, Any] = {"machine": machine(), "size": dataclasses.asdict(size), "results": {}}
    tables = "; ".join(f"{name} {value}" for name, value in record["machine"].items()) + "\n"
    print(tables, end="", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        jax.clear_caches()  # each benchmark counts its own compilations
        timings = compare(BENCHMARKS[name](size), options.repeats)
        table = f"\n### {name}\n\n{BENCHMARKS[name].__doc__}\n\n{markdown(timings)}"
        print(table, end="", flush=True)
        record["results"][name] = [dataclasses.asdict(timing) for timing in timings]
        tables += table
        # After each benchmark, so that an interrupted run keeps what it measured.
        (options.out / "benchmarks.json").write_text(json.dumps(record, indent=1) + "\n")
        (options.out / "benchmarks.md").write_text(tables)


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "processor": _processor(),
        "threads": len(os.sched_getaffinity(0)),
        "devices": ", ".join(sorted({device.device_kind for device in jax.devices()})),
        "system": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def _processor() -> str:
    """Its name and, for x86, the vector extensions that matter for matrix products."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    parts = [line.partition(":") for line in lines]
    entries = {key.strip(): value.strip() for key, _, value in parts}
    extensions = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    has = [name for name in extensions if name in entries.get("flags", "").split()]
    return " ".join([entries.get("model name", platform.machine()), *has])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a smoke test")
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="names, with commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    for name in options.only:
        if name not in BENCHMARKS:
            parser.error(f"--only: {name!r} is unknown; choose from {list(BENCHMARKS)}")
    if options.repeats < 1:
        parser.error(f"--repeats: {options.repeats}; it must be at least 1")
    return options


if __name__ == "__main__":
    main()
