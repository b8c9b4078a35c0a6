"""Kernels that jax and tokamax ship for TPU, beside ours, compiled without a TPU.

    make pods; pip install tokamax==0.0.12      (0.0.12 is the last for Python 3.11; else "missing")
    python -m benchmarks.shipped_kernels --generations v5p,v6e [--cases tokamax]

The measure is that of `spark_jax.kernels.ahead_of_time --cycles`, at the same shapes, with two
exceptions. A branch of tokamax's kernels counts as often as it runs, because in most steps of their
grids most branches do not. Paged attention has loops that end with data, so that there are no
cycles: `hbm_bytes` is what it reads, every slot's keys and values, shared prompts once a slot.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spark_jax.kernels import ahead_of_time
from spark_jax.kernels.ahead_of_time import BYTES_PER_CYCLE, Case

TOKENS = 4096
HEADS = ((576, 49152), (2048, 151936))  # width, vocabulary
SLOTS = ((16, 8, 512, 1024), (64, 1, 2048, 2048), (32, 2, 4096, 2048), (2, 64, 8192, 4096))
QUERY_HEADS, KV_HEADS, WIDTH, PAGE = 28, 4, 128, 128
_BRANCH = 1000  # bundles: smaller branches count in every step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--generations", default="v5p,v6e")
    parser.add_argument("--cases", default="", help="only those whose name contains this")
    options = parser.parse_args()
    if "SPARK_DUMP" not in os.environ:
        command = [sys.executable, "-m", "benchmarks.shipped_kernels", *sys.argv[1:]]
        for row in ahead_of_time.run_apart(command, cycles=True):
            print(json.dumps(row))
        return
    for generation in options.generations.split(","):
        for name, case in (_losses() | _attentions()).items():
            if options.cases in name:
                row = {"case": name, "generation": generation}
                print(json.dumps(row | _measured(name, case, generation)), flush=True)


def _measured(name: str, case: Case | None, generation: str) -> dict[str, Any]:
    if case is None:
        return {"missing": "tokamax is not installed"}
    chip = ahead_of_time.device(generation)
    mesh = jax.sharding.Mesh(np.array([chip]), ("x",))
    with jax.set_mesh(mesh), jax.default_device(chip):  # tokamax looks at both
        row = ahead_of_time.compile_case(case, generation)
    measured = {key: row[key] for key in ("compile_seconds", "temporaries")}
    if "paged" in name:
        size = _bytes_read(case)
        return measured | {"hbm_bytes": size, "cycles_to_read": size / BYTES_PER_CYCLE[generation]}
    width = case.shapes[0][0][1]
    found = Path(os.environ["SPARK_DUMP"]).glob("*cross_entropy*final_bundles.txt")
    kernels = [path for path in found if "schedule" not in path.name]
    return measured | {"cycles": sum(_cycles_as_run(path, width) for path in kernels)}


# --- log-probs -----------------------------------------------------------------------------------


def _losses() -> dict[str, Case | None]:
    cases: dict[str, Case | None] = {}
    for width, vocab in HEADS:
        for suffix, function in (("", _loss), ("/gradient", _loss_and_gradients)):
            shapes = (
                ((TOKENS, width), jnp.bfloat16),
                ((width, vocab), jnp.bfloat16),
                ((TOKENS,), jnp.int32),
            )
            there = importlib.util.find_spec("tokamax") is not None
            name = f"linear_logprob/tokamax/{TOKENS}x{width}x{vocab}{suffix}"
            cases[name] = Case(function, shapes) if there else None
    return cases


def _loss(hidden: Any, matrix: Any, targets: Any) -> Any:
    import tokamax

    return tokamax.linear_softmax_cross_entropy_loss(
        hidden, targets, matrix, implementation="mosaic_tpu"
    )


def _loss_and_gradients(hidden: Any, matrix: Any, targets: Any) -> Any:
    return jax.value_and_grad(_loss, argnums=(0, 1))(hidden, matrix, targets)


def _cycles_as_run(path: Path, width: int) -> float:
    """Bundles that one of tokamax's kernels executes: each of its large branches in its share of
    the grid's steps, everything else in all. By their blocks, their bytes of HBM take less."""
    text = path.read_text()
    lines = re.findall(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?:.*", text, re.M)
    ends = {n: i for i, line in enumerate(lines) for n in re.findall(r"empty region (\d+)", line)}
    branches = [
        (start, ends[jump[1]])
        for start, line in enumerate(lines)
        if (jump := re.search(r"sbr\.rel .*?target = \$region(\d+)", line))
        and ends.get(jump[1], 0) - start > _BRANCH
    ]
    innermost = [
        end - start
        for start, end in branches
        if not any(start < other and last <= end for other, last in branches)
    ]
    (bound,) = re.findall(r"totalorder %\S+, (\d+) /\* loop exit test", text)
    steps, shares = _grid(int(bound), width, backward="_bwd_" in path.name)
    looped = sum(">" in line.partition("{")[0] for line in lines) - sum(innermost)
    return steps * (looped + sum(n * s for n, s in zip(innermost, shares, strict=True)))


def _grid(bound: int, width: int, *, backward: bool) -> tuple[int, list[float]]:
    """Steps of tokamax's grid, and the share of them that each large branch runs in, in the order
    of the program. The bound of the loop is one or two more than the steps."""
    token_blocks, width_blocks = TOKENS // 1024, -(-width // 512)
    steps_of_words = token_blocks * width_blocks * (2 if backward else 1)
    word_blocks = bound // steps_of_words
    first = 1 / width_blocks
    scores = [first, 1 - first, first]  # set, added to; then the loss, or the scores' gradient
    if not backward:
        return word_blocks * steps_of_words, scores
    tokens, words = 1 / token_blocks, 1 / word_blocks
    shares = [*scores, tokens, words, 1 - tokens, 1 - words]  # gradients: set, set; added to
    return word_blocks * steps_of_words, [share / 2 for share in shares]


# --- attention -----------------------------------------------------------------------------------


def _attentions() -> dict[str, Case | None]:
    cases: dict[str, Case | None] = {}
    for lanes, width, prompt, own in SLOTS:
        slots = lanes * width
        pages = (lanes * prompt + slots * own) // PAGE  # the pages of a prompt are its lane's
        query = ((slots, QUERY_HEADS, WIDTH), jnp.bfloat16)
        lengths = ((slots,), jnp.int32)
        table = ((slots, (prompt + own) // PAGE), jnp.int32)
        together = ((pages, PAGE, 2 * KV_HEADS, WIDTH), jnp.bfloat16)
        apart = ((KV_HEADS, pages, PAGE, WIDTH), jnp.bfloat16)
        shape = f"{lanes}x{width}/{prompt}+{own}"
        starts, count = ((slots + 1,), jnp.int32), ((1,), jnp.int32)
        ragged = (query, together, lengths, table, starts, count)
        cases[f"decode_attention/ragged_paged/{shape}"] = Case(_ragged_paged, ragged)
        cases[f"decode_attention/paged/{shape}"] = Case(
            _paged, (query, apart, apart, lengths, table)
        )
    return cases


def _ragged_paged(*arrays: Any) -> Any:
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as shipped

    blocks = {"num_kv_pages_per_block": 8, "num_queries_per_block": 32}
    return shipped.ragged_paged_attention(*arrays, **blocks, vmem_limit_bytes=48 * 2**20)


def _paged(*arrays: Any) -> Any:
    from jax.experimental.pallas.ops.tpu import paged_attention as shipped

    return shipped.paged_attention(*arrays, pages_per_compute_block=4)


def _bytes_read(case: Case) -> int:
    """Of keys and values, every slot's pages."""
    slots, pages = case.shapes[-1 if case.function.__name__ == "_paged" else 3][0]
    return slots * pages * PAGE * 2 * KV_HEADS * WIDTH * 2


if __name__ == "__main__":
    main()
