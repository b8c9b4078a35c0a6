"""How many answers are graded per second, and what hostile ones cost.

    python -m benchmarks.grading
    python -m benchmarks.grading --small --workers 1,2

Prints one JSON line per figure. `in_process` is math-verify called here, without any limit: what
the workers' figures are measured against, in turns with them. Pairs are of our own making, no two
alike, so that no memory helps; `--repeats` rounds, of which the median counts.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from spark_jax.evaluation import grading_worker
from spark_jax.evaluation.grading import TIME_LIMIT, Grader

# What n makes of each: (answer, reference, whether they are the same).
KINDS: dict[str, Callable[[int], tuple[str, str, bool]]] = {
    "integers": lambda n: (f"{n}", f"{n + n % 2}", n % 2 == 0),
    "fractions": lambda n: (f"{2 * n}/{2 * n + 2}", f"\\frac{{{n}}}{{{n + 1}}}", True),
    "radicals": lambda n: (f"\\sqrt{{{7 * n * n}}}", f"{n}\\sqrt7", True),
    "intervals": lambda n: (f"[{n},{n + 3})", f"{n}\\le x<{n + 3 + n % 2}", n % 2 == 0),
    "tuples": lambda n: (f"({n}, \\frac{{{n}}}{{2}})", f"({n},{n / 2})", True),
    "polynomials": lambda n: (f"(x+{n})^2", f"x^2+{2 * n}x+{n * n + n % 2}", n % 2 == 0),
    "text": lambda n: (f"\\text{{team {n}}}", f"\\text{{Team {n + 1}}}", False),
}

HOSTILE = {
    "tower": "9^{9^{9^{9}}}",
    "factorial": "100000000!",
    "big power": "10^{10^{8}}",
    "open braces": "{" * 900,
    "nested fractions": "\\frac{" * 100 + "1" + "}{2}" * 100,
    "a megabyte": "1" * 1_000_000,
}

Pairs = list[tuple[str | None, str | None]]


Way = Callable[[Pairs], list[bool]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    _show(
        benchmark="machine",
        processors=os.cpu_count(),
        load=round(os.getloadavg()[0], 1),
        pairs=options.pairs,
        repeats=options.repeats,
    )
    fresh = itertools.count(2)  # every measurement has pairs that nobody has seen
    with contextlib.ExitStack() as stack:
        ways: dict[str, Way] = {"in_process": _in_process}
        for n in options.workers:
            ways[f"workers={n}"] = stack.enter_context(Grader(n)).same_answers
        for way in ways.values():
            way(_pairs("mixed", len(KINDS), fresh)[0])  # starts workers, warms math-verify
        for kind in (*KINDS, "mixed"):
            throughput(kind, ways, options.pairs, options.repeats, fresh)
    for name, text in HOSTILE.items():
        hostile(name, text, options.time_limit)


def throughput(
    kind: str, ways: dict[str, Way], num_pairs: int, repeats: int, fresh: itertools.count[int]
) -> None:
    """Prints graded pairs per second of wall time, in process and by so many workers.

    Raises RuntimeError where a verdict is wrong.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            pairs, expected = _pairs(kind, num_pairs, fresh)
            started = time.perf_counter()
            verdicts = way(pairs)
            seconds[name].append(time.perf_counter() - started)
            if verdicts != expected:
                wrong = [pair for pair, a, b in zip(pairs, verdicts, expected) if a != b]
                raise RuntimeError(f"{name} graded {len(wrong)} pairs wrongly, such as {wrong[0]}")
    base = statistics.median(seconds["in_process"])
    for name, times in seconds.items():
        _show(
            benchmark="throughput",
            kind=kind,
            way=name,
            pairs_per_second=round(num_pairs / statistics.median(times)),
            least=round(num_pairs / max(times)),
            most=round(num_pairs / min(times)),
            speed=round(base / statistics.median(times), 2),
        )


def hostile(name: str, text: str, time_limit: float) -> None:
    """Prints what one hostile answer costs, and the time to the next ordinary verdict after it."""
    with Grader(1, time_limit=time_limit) as grader:
        grader.same_answer("\\sqrt8", "2\\sqrt2")
        started = time.perf_counter()
        verdict = grader.same_answer(text, "7.25")
        taken = time.perf_counter() - started
        grader.same_answer("\\sqrt{12}", "2\\sqrt3")
        _show(
            benchmark="hostile",
            answer=name,
            verdict=verdict,
            time_limit=time_limit,
            seconds=round(taken, 2),
            seconds_to_next=round(time.perf_counter() - started - taken, 2),
            workers_lost=grader.counts()["started"] - 1,
        )


def _pairs(kind: str, count: int, fresh: itertools.count[int]) -> tuple[Pairs, list[bool]]:
    kinds = list(KINDS.values()) if kind == "mixed" else [KINDS[kind]]
    rows = [make(next(fresh)) for make in itertools.islice(itertools.cycle(kinds), count)]
    return [(a, b) for a, b, _ in rows], [same for _, _, same in rows]


def _in_process(pairs: Pairs) -> list[bool]:
    return [grading_worker.same(a or "", b or "") for a, b in pairs]


def _show(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.grading", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--small", action="store_true", help="few pairs, for a smoke test")
    parser.add_argument("--pairs", type=int, default=350, help="in one measurement")
    parser.add_argument("--workers", default="1,2,4", help="numbers, with commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="for hostile answers")
    options = parser.parse_args(arguments)
    try:
        options.workers = [int(text) for text in options.workers.split(",")]
    except ValueError:
        parser.error(f"--workers: {options.workers!r}; numbers with commas are needed")
    if options.small:
        options.pairs, options.repeats, options.time_limit = 4, 1, 0.3
    if min(options.pairs, options.repeats, *options.workers) < 1:
        parser.error("--pairs, --repeats and --workers must be at least 1")
    return options


if __name__ == "__main__":
    main()
