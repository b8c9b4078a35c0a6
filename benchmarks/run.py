"""Speed and memory of this library beside its peers: one run, all in turns.

    make bench                                          (or: python -m benchmarks.run)
    python -m benchmarks.run --only decode,stage_one --repeats 5
    python -m benchmarks.run --peers none               (ours alone: installs nothing)
    python -m benchmarks.run --quick                    (tiny shapes: does it run at all)
    python -m benchmarks.run --platform gpu             (1.5B and 7B shapes, beside transformers)

Peers are installed from the package index on first use, each into an environment of its own under
benchmarks/.peers. Writes benchmarks.json with every single measurement, benchmarks.md with the
tables printed here, and the workers' logs, to runs/benchmarks. Believe the ratios of one run, not
absolute figures of two.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform as system
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import sizes, targets
from .jobs import BENCHMARKS, CPU_ONLY, LONG, TRAINING, Setting, contenders
from .measure import Timing, compare, markdown
from .peers import FOLDER, PEERS, Missing, Programs


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    programs = Programs(options.platform, options.peers, options.peers_folder, options.out)
    report = _Report(options.out)
    report.write(machine(programs))
    clock = "cpu" if options.platform == "cpu" else "wall"
    for label, size in _sizes(options):
        weights = _weights(options, size)
        setting = Setting(size, options.platform, str(weights) if weights else None)
        try:
            for name in options.only:
                if name in TRAINING and not size.trains:
                    continue
                entries = contenders(name, setting)
                repeats = min(options.repeats, 2) if name in LONG else options.repeats
                load = os.getloadavg()
                told = partial(_progress, label + name)
                timings = compare(entries, programs.start, repeats, clock, told) if entries else []
                report.add(label + name, BENCHMARKS[name].__doc__, timings, load, clock)
        finally:
            if weights:
                shutil.rmtree(weights)
    report.close(targets.table(report.results), options.quick)
    if any(x.missing and x.worker == "ours" for y in report.results.values() for x in y):
        sys.exit("some of our own benchmarks failed; the tables say why")


def _progress(name: str, run: str) -> None:
    """Long benchmarks take most of an hour, and their table comes last."""
    print(f"{name}: {run}", file=sys.stderr, flush=True)


def machine(programs: Programs) -> dict[str, Any]:
    """What the figures depend on besides the code. Starts every worker once."""
    found = {
        "processor": _processor(),
        "threads": len(os.sched_getaffinity(0)),
        "system": system.platform(),
        "python": system.python_version(),
        "load": " ".join(f"{x:.1f}" for x in os.getloadavg()),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    for name in ("ours", *PEERS):
        try:
            worker = programs.start(name)
        except Missing as reason:
            found[name] = f"missing: {reason}"
            continue
        try:
            found[name] = ", ".join(f"{k} {v}" for k, v in worker.ask(do="about").items())
        except Missing as reason:
            found[name] = f"missing: {reason}"
        finally:
            worker.close()
    return found


class _Report:
    """Printed and on disk after each benchmark, so that an interrupted run keeps what it has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record: dict[str, Any] = {"results": {}}
        self.results: dict[str, list[Timing]] = {}
        self.text = ""

    def write(self, machine: dict[str, Any]) -> None:
        self.record["machine"] = machine
        self._print("".join(f"- {name}: {value}\n" for name, value in machine.items()))

    def add(
        self,
        name: str,
        question: str | None,
        timings: list[Timing],
        load: tuple[float, float, float],
        clock: str,
    ) -> None:
        if not timings:
            return
        self.results[name] = timings
        loads = [round(load[0], 1), round(os.getloadavg()[0], 1)]
        self.record["results"][name] = {
            "load": loads,
            "timings": [dataclasses.asdict(timing) for timing in timings],
        }
        asked = " ".join((question or "").split())
        heading = f"\n### {name}\n\n{asked} Load average {loads[0]} before, {loads[1]} after.\n\n"
        self._print(heading + markdown(timings, clock))

    def close(self, table: str, quick: bool) -> None:
        note = "Tiny shapes: these figures mean nothing.\n\n" if quick else ""
        self._print(f"\n### Targets\n\n{note}{table}")

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)
        self.text += text
        (self.folder / "benchmarks.json").write_text(json.dumps(self.record, indent=1) + "\n")
        (self.folder / "benchmarks.md").write_text(self.text)


def _sizes(options: argparse.Namespace) -> list[tuple[str, sizes.Size]]:
    if options.quick:
        return [("", sizes.QUICK)]
    if options.platform == "cpu":
        return [("", sizes.CPU)]
    return [("1.5B ", sizes.ACCELERATOR), ("7B ", sizes.QWEN_7B)]


def _weights(options: argparse.Namespace, size: sizes.Size) -> Path | None:
    """One random checkpoint for all; on accelerators, where it would be large, each draws its
    own."""
    if options.platform != "cpu":
        return None
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from spark_jax.models import checkpoints, transformer

    folder = options.out / "weights"
    params = jax.jit(transformer.init, static_argnums=0)(size.model, jax.random.key(0))
    checkpoints.save_hf(folder, params, size.model)
    return folder


def _processor() -> str:
    """Its name and, for x86, the vector extensions that matter for matrix products."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return system.processor()
    parts = [line.partition(":") for line in lines]
    entries = {key.strip(): value.strip() for key, _, value in parts}
    extensions = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    has = [name for name in extensions if name in entries.get("flags", "").split()]
    return " ".join([entries.get("model name", system.machine()), *has])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="tiny shapes, for a smoke test")
    parser.add_argument("--only", help="names of benchmarks, with commas")
    parser.add_argument("--repeats", type=int, default=3, help="rounds after the first")
    parser.add_argument("--platform", choices=("cpu", "gpu", "tpu"), default="cpu")
    parser.add_argument("--peers", default=",".join(PEERS), help="names with commas, or none")
    parser.add_argument("--peers-folder", type=Path, default=FOLDER, help="for their environments")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args(arguments)
    on_accelerators = [x for x in BENCHMARKS if x not in CPU_ONLY]
    every = list(BENCHMARKS) if options.platform == "cpu" else on_accelerators
    options.only = options.only.split(",") if options.only else every
    for name in options.only:
        if name not in every:
            parser.error(f"--only: {name!r} is unknown; choose from {every}")
    options.peers = () if options.peers == "none" else tuple(options.peers.split(","))
    for name in options.peers:
        if name not in PEERS:
            parser.error(f"--peers: {name!r} is unknown; choose from {list(PEERS)} or none")
    if options.repeats < 1:
        parser.error(f"--repeats: {options.repeats}; it must be at least 1")
    return options


if __name__ == "__main__":
    main()
