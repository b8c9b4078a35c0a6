"""Contenders timed in turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from .peers import Missing, Worker
from .roofline import Cost, shares


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to do a job, by one program."""

    name: str
    worker: str  # "ours" or a key of `peers.PEERS`
    job: dict[str, Any]  # what the worker's function `job["work"]` reads
    process: str = ""  # contenders of one worker that say the same share a process
    threads: int | None = None
    unit: str = "tokens"
    scale: float = 1.0  # units for each of what the worker counts
    cost: Cost | None = None  # the least work of one run, for its share of the roofline
    in_a_row: bool = False  # each run follows one like it that does not count, as steps do

    @property
    def place(self) -> tuple[str, str, int | None]:
        return self.worker, self.process, self.threads


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one contender took. Lists have one entry per round, the first run left out."""

    contender: str
    worker: str
    unit: str
    dtype: str
    missing: str | None = None  # why there is nothing else
    amounts: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    wall_seconds: list[float] = dataclasses.field(default_factory=list)
    rates: list[float] = dataclasses.field(default_factory=list)  # per second of the clock
    speed: list[float] = dataclasses.field(default_factory=list)  # to the first of its unit
    roofline: list[float] | None = None  # share of it
    peak_bytes: int | None = None
    device_peak_bytes: int | None = None
    temporaries: int | None = None  # bytes XLA sets aside besides arguments and results
    compilations: int | None = None  # programs compiled by the first run
    compile_seconds: float | None = None
    recompilations: int | None = None  # programs compiled by the runs after it
    facts: dict[str, float] = dataclasses.field(default_factory=dict)


Start = Callable[[str, int | None], Worker]
"""(worker, threads) -> a started worker; raises Missing."""


def compare(
    contenders: Sequence[Contender],
    start: Start,
    repeats: int,
    clock: str = "cpu",
    on_run: Callable[[str], None] = lambda _: None,
) -> list[Timing]:
    """Warms every contender up, then runs them in turns, `repeats` rounds.

    Rates go by `clock`: "cpu" for process time, "wall" where the work is done elsewhere. Whoever
    fails is missing, and the others go on. `on_run` is told of every run in a line.
    """
    workers: dict[tuple[str, str, int | None], Worker | Missing] = {}
    try:
        entries = [
            _Entry(contender, _worker(contender, start, workers)) for contender in contenders
        ]
        for entry in entries:
            entry.run("warm")
            on_run(f"first run, {entry.told()}")
        for repeat in range(repeats):
            shift = repeat % len(entries)  # no contender always follows the same one
            for entry in entries[shift:] + entries[:shift]:
                if not entry.missing:
                    entry.run("run")
                    on_run(f"round {repeat + 1} of {repeats}, {entry.told()}")
    finally:
        for worker in workers.values():
            if isinstance(worker, Worker):
                worker.close()
    return _timings(entries, clock)


def markdown(timings: Sequence[Timing], clock: str = "cpu") -> str:
    """A table of medians with the least and the greatest value in brackets."""
    timings = list(timings)
    unit = timings[0].unit
    second = {"cpu": "CPU-s", "wall": "s"}[clock]
    rows = [
        f"| | {unit} / {second} | speed, first = 1 | CPU seconds | wall seconds | of the roofline "
        "| peak memory | XLA temporaries | compiled | again | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    rows += [_row(timing) for timing in timings if timing.unit == unit]
    probes = [x for x in timings if x.unit != unit]
    lines = [
        f"- {x.contender}: "
        + (
            f"missing, {x.missing}"
            if x.missing
            else f"{_spread(x.rates, 1e9)} G{x.unit} / {second}"
        )
        for x in probes
    ]
    heading = ["", "In the same rounds:", "", *lines] if lines else []
    return "\n".join([*rows, *heading]) + "\n"


class _Entry:
    """A contender, and what it has measured so far."""

    def __init__(self, contender: Contender, worker: Worker | Missing) -> None:
        self.contender = contender
        self.warm: dict[str, Any] = {}
        self.runs: list[dict[str, Any]] = []
        self.uncounted: list[dict[str, Any]] = []  # those that one in a row follows
        self.missing: str | None = None
        self.worker = worker
        if isinstance(worker, Missing):
            self.missing = str(worker)
        else:
            try:
                self.id = worker.ask(do="prepare", job=contender.job)["id"]
            except Missing as reason:
                self.missing = str(reason)

    def run(self, how: str) -> None:
        if self.missing or isinstance(self.worker, Missing):
            return
        try:
            if self.contender.in_a_row and how == "run":
                self.uncounted.append(self.worker.ask(do=how, id=self.id))
            answer = self.worker.ask(do=how, id=self.id)
            if self.contender.in_a_row:
                self.worker.ask(do="rest")
        except Missing as reason:
            self.missing = str(reason)
            return
        if how == "warm":
            self.warm = answer
        else:
            self.runs.append(answer)

    def told(self) -> str:
        """The latest run in a line."""
        name = self.contender.name
        if self.missing:
            return f"{name}: missing, {self.missing}"
        latest = self.runs[-1] if self.runs else self.warm
        cpu, wall = latest["cpu_seconds"], latest["wall_seconds"]
        amount = f"{self.amount(latest):.4g} {self.contender.unit}"
        return f"{name}: {amount} in {cpu:.1f} CPU seconds, {wall:.1f} by the clock"

    def amount(self, run: dict[str, Any]) -> float:
        return run["amount"] * self.contender.scale


def _worker(
    contender: Contender, start: Start, workers: dict[tuple[str, str, int | None], Worker | Missing]
) -> Worker | Missing:
    if contender.place not in workers:
        try:
            workers[contender.place] = start(contender.worker, contender.threads)
        except Missing as reason:
            workers[contender.place] = reason
    return workers[contender.place]


def _timings(entries: Sequence[_Entry], clock: str) -> list[Timing]:
    present = [entry for entry in entries if not entry.missing]
    rates = {id(x): [x.amount(run) / run[f"{clock}_seconds"] for run in x.runs] for x in present}
    peaks = _peaks(present, rates)
    timings = []
    for entry in entries:
        named = {
            "contender": entry.contender.name,
            "worker": entry.contender.worker,
            "unit": entry.contender.unit,
            "dtype": entry.contender.job.get("dtype", ""),
        }
        if entry.missing:
            timings.append(Timing(**named, missing=entry.missing))
            continue
        first = next(x for x in present if x.contender.unit == entry.contender.unit)
        seconds = [run[f"{clock}_seconds"] for run in entry.runs]
        timings.append(
            Timing(
                **named,
                amounts=[entry.amount(run) for run in entry.runs],
                cpu_seconds=[run["cpu_seconds"] for run in entry.runs],
                wall_seconds=[run["wall_seconds"] for run in entry.runs],
                rates=rates[id(entry)],
                speed=[a / b for a, b in zip(rates[id(entry)], rates[id(first)], strict=True)],
                roofline=shares(entry.contender.cost, seconds, peaks),
                peak_bytes=_most(entry, "peak_bytes"),
                device_peak_bytes=_most(entry, "device_peak_bytes"),
                temporaries=entry.runs[-1]["temporaries"],
                compilations=entry.warm["compilations"],
                compile_seconds=entry.warm["compile_seconds"],
                recompilations=_sum(entry, "compilations"),
                facts=entry.runs[-1]["facts"] | _agreement(entry, present),
            )
        )
    return timings


def _peaks(entries: Sequence[_Entry], rates: dict[int, list[float]]) -> list[dict[str, float]]:
    """The best rate of each round: "float32" and "bfloat16" products, and "bytes" of memory."""
    rounds: list[dict[str, float]] = [{} for _ in entries[0].runs] if entries else []
    for entry in entries:
        if entry.contender.unit in ("FLOP", "B"):
            key = "bytes" if entry.contender.unit == "B" else entry.contender.job["dtype"]
            for peak, rate in zip(rounds, rates[id(entry)], strict=True):
                peak[key] = max(peak.get(key, 0.0), rate)
    return rounds


def _agreement(entry: _Entry, present: Sequence[_Entry]) -> dict[str, float]:
    """How much of the first contender's greedy text, up to the first difference, is the same: says
    that the weights and the mathematics are."""
    mine = entry.runs[-1]["tokens"]
    theirs = next((x.runs[-1]["tokens"] for x in present if x.runs[-1]["tokens"]), None)
    if not mine or theirs is mine or theirs is None:
        return {}
    shares = []
    for a, b in zip(mine, theirs):
        same = [x == y for x, y in zip(a, b)]
        shares.append((same.index(False) if False in same else len(same)) / len(same))
    return {"same greedy text": statistics.mean(shares)}


def _most(entry: _Entry, field: str) -> int | None:
    return max((x[field] for x in entry.runs if x[field] is not None), default=None)


def _sum(entry: _Entry, field: str) -> int | None:
    later = entry.uncounted + entry.runs
    return None if later[-1][field] is None else sum(x[field] for x in later)


def _row(timing: Timing) -> str:
    if timing.missing:
        return f"| {timing.contender} | missing: {timing.missing} |" + " |" * 9
    memory = timing.device_peak_bytes or timing.peak_bytes
    compiled = ""
    if timing.compilations is not None:
        compiled = f"{timing.compilations} in {timing.compile_seconds:.1f} s"
    cells = [
        timing.contender,
        f"{statistics.median(timing.rates):.4g}",
        _spread(timing.speed),
        _spread(timing.cpu_seconds),
        _spread(timing.wall_seconds),
        "" if not timing.roofline else f"{100 * statistics.median(timing.roofline):.0f} %",
        "" if memory is None else f"{memory / 1e9:.2f} GB",
        "" if timing.temporaries is None else f"{timing.temporaries / 1e9:.3f} GB",
        compiled,
        "" if timing.recompilations is None else str(timing.recompilations),
        ", ".join(f"{name} {value:.3g}" for name, value in timing.facts.items()),
    ]
    return "| " + " | ".join(cells) + " |"


def _spread(values: Sequence[float], scale: float = 1.0) -> str:
    middle, least, most = (f(values) / scale for f in (statistics.median, min, max))
    return f"{middle:.2f} ({least:.2f}–{most:.2f})"
