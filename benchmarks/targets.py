"""What was aimed at, beside what one run measured.

A ratio is the median over rounds of ours to theirs in the same round, on the benchmark's clock,
and to the fastest of a peer's variants. What a run did not measure, or a peer that was missing,
leaves its rows open: neither reached nor missed.

    python -m benchmarks.targets runs/benchmarks/benchmarks.json ...

prints the table of one run, or of several that measured different benchmarks (the last counts).
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .measure import Timing

Results = Mapping[str, Sequence[Timing]]


@dataclasses.dataclass(frozen=True)
class Target:
    work: str
    wanted: float
    at_least: bool  # or at most
    benchmark: str  # for --only
    measured: Callable[[Results], float | None]
    unit: str = "×"
    command: str = "python -m benchmarks.run --only {}"


def read(*files: str | Path) -> Results:
    """What runs left in their benchmarks.json."""
    results: dict[str, list[Timing]] = {}
    for file in files:
        for name, result in json.loads(Path(file).read_text())["results"].items():
            results[name] = [Timing(**timing) for timing in result["timings"]]
    return results


def table(results: Results) -> str:
    """Markdown: one row per target."""
    rows = ["| work | target | measured | reached | command |", "| --- | ---: | ---: | --- | --- |"]
    for target in TARGETS:
        value = target.measured(results)
        reached = "not measured"
        if value is not None:
            good = value >= target.wanted if target.at_least else value <= target.wanted
            reached = "yes" if good else "no"
        sign = "≥" if target.at_least else "≤"
        rows.append(
            f"| {target.work} | {sign} {target.wanted:.4g} {target.unit} "
            f"| {'' if value is None else f'{value:.3g} {target.unit}'} | {reached} "
            f"| `{target.command.format(target.benchmark)}` |"
        )
    return "\n".join(rows) + "\n"


def speed(benchmark: str, ours: str, theirs: str) -> Callable[[Results], float | None]:
    """Ours to the fastest contender whose name has all words of `theirs`, in a median round."""

    def measured(results: Results) -> float | None:
        mine = _find(results, benchmark, ours)
        ratios = [_ratio(mine[0], x) for x in _find(results, benchmark, theirs)] if mine else []
        return min(ratios, default=None)

    return measured


def memory(benchmark: str, ours: str, theirs: str) -> Callable[[Results], float | None]:
    """The peak of ours to that of the peer, libraries and weights included."""

    def measured(results: Results) -> float | None:
        mine, peers = _find(results, benchmark, ours), _find(results, benchmark, theirs)
        if not mine or not peers or not mine[0].peak_bytes or not peers[0].peak_bytes:
            return None
        return mine[0].peak_bytes / peers[0].peak_bytes

    return measured


def fact(benchmark: str, contender: str, name: str) -> Callable[[Results], float | None]:
    """A number that the worker reported."""

    def measured(results: Results) -> float | None:
        found = _find(results, benchmark, contender)
        return found[0].facts.get(name) if found else None

    return measured


def field(
    benchmark: str, contender: str, name: str, scale: float = 1.0
) -> Callable[[Results], float | None]:
    """A field of the timing: a number, or the median of a list."""

    def measured(results: Results) -> float | None:
        found = _find(results, benchmark, contender)
        value = getattr(found[0], name) if found else None
        if value is None:
            return None
        return scale * (statistics.median(value) if isinstance(value, list) else value)

    return measured


def recompilations(results: Results) -> float | None:
    """Programs that the settings after the first compiled, or any of them when run again."""
    ours = _find(results, "settings", "ours")
    if not ours:
        return None
    return sum(x.compilations or 0 for x in ours[1:]) + sum(x.recompilations or 0 for x in ours)


_SHAPE = "decode, batch 16, 64 + 128"
_STAGE = "stage-I load"
_TRAIN = "policy step, 3072 tokens"

TARGETS: list[Target] = [
    *(
        Target(f"{_SHAPE}, {how}, to {name}", 2.0, True, "decode", measured)
        for how in ("greedy", "T = 1")
        for name, measured in (
            ("Tunix, float32", speed("decode", f"ours, float32, {how}$", f"tunix {how}$")),
            (
                "transformers, bfloat16",
                speed("decode", f"ours, bfloat16, {how}$", f"transformers {how}$"),
            ),
        )
    ),
    Target(
        f"{_SHAPE}, top-p 0.95, to Tunix, float32",
        5.0,
        True,
        "decode",
        speed("decode", "ours, float32, T = 1, top-p", "tunix top-p"),
    ),
    *(
        Target(
            f"{_SHAPE}, top-p 0.95, to our own T = 1, {dtype}",
            0.9,
            True,
            "decode",
            speed("decode", f"ours, {dtype}, T = 1, top-p", f"ours, {dtype}, T = 1$"),
        )
        for dtype in ("float32", "bfloat16")
    ),
    Target(
        f"{_STAGE}, to Tunix, float32",
        6.0,
        True,
        "stage_one",
        speed("stage_one", "ours, float32", "tunix"),
    ),
    Target(
        f"{_STAGE}, to transformers, bfloat16",
        6.0,
        True,
        "stage_one",
        speed("stage_one", "ours, bfloat16", "transformers"),
    ),
    *(
        Target(
            f"decode, batch 64, of the roofline, {dtype}",
            45,
            True,
            "decode_large",
            field("decode_large", f"ours, {dtype}", "roofline", 100),
            "%",
        )
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Target(
            f"log-probs of 4096 tokens, temporaries, {dtype}",
            0.25,
            False,
            "head",
            field("head", f"ours, linear_logprob, {dtype}", "temporaries", 1e-9),
            "GB",
        )
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Target(
            f"log-probs of 4096 tokens, to full log-softmax, {dtype}",
            1.3,
            True,
            "head",
            speed("head", f"ours, linear_logprob, {dtype}", f"full {dtype}"),
        )
        for dtype in ("float32", "bfloat16")
    ),
    Target(
        f"{_TRAIN}, to Tunix, float32 (≤ 0.75 of its CPU seconds)",
        1 / 0.75,
        True,
        "policy_step",
        speed("policy_step", "ours", "tunix"),
    ),
    Target(
        f"{_TRAIN}, peak memory, of Tunix's",
        1 / 3,
        False,
        "policy_step",
        memory("policy_step", "ours", "tunix, float32$"),
    ),
    *(
        Target(
            f"{_TRAIN}{how}, to transformers, bfloat16",
            1.0,
            True,
            "policy_step_bfloat16",
            speed("policy_step_bfloat16", f"ours, bfloat16{how}", "transformers"),
        )
        for how in ("", ", projections stored")
    ),
    Target(
        "sampler against scorer, float32",
        1e-4,
        False,
        "agreement",
        fact("agreement", "ours, float32", "largest gap, nat"),
        "nat",
    ),
    Target(
        "sampler against scorer, bfloat16",
        0.05,
        False,
        "agreement",
        fact("agreement", "ours, bfloat16", "largest gap, nat"),
        "nat",
    ),
    Target(
        "programs compiled when settings change or a prompt within its bucket",
        0,
        False,
        "settings",
        recompilations,
        "",
    ),
    Target(
        "on a GPU: decode, 1.5B shape, batch 256, of the memory bandwidth",
        60,
        True,
        "decode_large",
        field("1.5B decode_large", "ours", "roofline", 100),
        "%",
        "python -m benchmarks.run --platform gpu --only {}",
    ),
    Target(
        "on a GPU: policy step, 1.5B shape, of the matrix-product rate",
        45,
        True,
        "policy_step_bfloat16",
        field("1.5B policy_step_bfloat16", "ours", "roofline", 100),
        "%",
        "python -m benchmarks.run --platform gpu --only {}",
    ),
]


def _find(results: Results, benchmark: str, words: str) -> list[Timing]:
    """Measured contenders whose names have all words, in their order; a `$` ends the name."""
    *inside, last = words.replace(",", " ").split()
    found = []
    for timing in results.get(benchmark, ()):
        name = timing.contender.replace(",", " ").split()
        at_end = not last.endswith("$") or (name and name[-1] == last[:-1])
        if not timing.missing and at_end and {*inside, last.rstrip("$")} <= set(name):
            found.append(timing)
    return found


def _ratio(mine: Timing, theirs: Timing) -> float:
    return statistics.median(a / b for a, b in zip(mine.rates, theirs.rates, strict=True))


if __name__ == "__main__":
    print(table(read(*sys.argv[1:])), end="")
