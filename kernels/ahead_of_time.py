"""What XLA's TPU compiler makes of the kernels and of their references, on a machine without a TPU.

    make pods        (libtpu, 700 MB)
    python -m spark_jax.kernels.ahead_of_time --generations v5e,v5p,v6e [--cycles]

Per case, implementation and generation: seconds to compile, temporaries in HBM, bytes of HBM that
the program's operations read and write, and with --cycles an estimate of clock cycles: for every
operation the larger of its instruction bundles (the compiler's final schedule, a bundle a cycle)
and of its HBM bytes at full bandwidth. Both count loops by their trips. The estimate knows no
stalls: believe ratios. (XLA's own `estimated_cycles` are kept as `xla_cycles`; a kernel has none.)
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spark_jax.kernels import hlo
from spark_jax.kernels.linear_logprob import linear_logprob_and_entropy
from spark_jax.kernels.prefix_decode_attention import prefix_decode_attention

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# HBM bytes a cycle: 819, 2765 and 1640 GB/s at 1.5, 1.75 and 0.94 GHz. A v5p core has half of it.
BYTES_PER_CYCLE = {"v5e": 546, "v5p": 790, "v6e": 1745}


class Case(NamedTuple):
    function: Callable[..., Any]
    shapes: tuple[tuple[tuple[int, ...], Any], ...]


def report(
    generations: Sequence[str] = ("v5e",), cases: str = "", *, cycles: bool = False
) -> list[dict[str, Any]]:
    """Compiles every case whose name contains `cases`, in a process of its own: a backend chosen
    there does not touch this one. One dictionary per case and generation, see the module.

    Raises:
      RuntimeError: libtpu is not installed.
      subprocess.CalledProcessError: a case does not compile.
    """
    for generation in generations:
        if generation not in TOPOLOGIES:
            raise ValueError(f"generation {generation!r}; choose from {list(TOPOLOGIES)}")
    command = [sys.executable, "-m", "spark_jax.kernels.ahead_of_time", "--cases", cases]
    command += ["--generations", ",".join(generations), *(["--cycles"] if cycles else [])]
    return run_apart(command, cycles=cycles)


def run_apart(command: Sequence[str], *, cycles: bool) -> list[dict[str, Any]]:
    """The rows that a process prints which compiles for TPUs; with `cycles` the compiler leaves its
    schedules in the folder that SPARK_DUMP names there."""
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true" if cycles else ""
        variables = environment(folder) | {
            "LIBTPU_INIT_ARGS": dump,
            "SPARK_DUMP": folder if cycles else "",
        }
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def all_cases() -> dict[str, Case]:
    """By name: kernel/implementation/shape[/gradient]."""
    cases = {}
    for width, vocab in ((576, 49152), (2048, 151936)):
        for implementation in ("xla", "pallas_tpu"):
            for gradient in (False, True):
                name = f"linear_logprob/{implementation}/4096x{width}x{vocab}"
                cases[name + gradient * "/gradient"] = _linear_logprob(
                    4096, width, vocab, implementation, gradient
                )
    shapes = {  # lanes, slots of each, heads, KV heads, head width, prompt, own columns
        "7B/512+1024": (16, 8, 28, 4, 128, 512, 1024),
        "7B/2048+2048": (64, 1, 28, 4, 128, 2048, 2048),
        "7B/4096+2048": (32, 2, 28, 4, 128, 4096, 2048),
        "7B/8192+4096": (2, 64, 28, 4, 128, 8192, 4096),
    }
    for shape, sizes in shapes.items():
        for implementation in ("xla", "pallas_tpu"):
            cases[f"prefix_decode_attention/{implementation}/{shape}"] = _prefix_decode_attention(
                *sizes, implementation
            )
    return cases


def _linear_logprob(n: int, width: int, vocab: int, implementation: str, gradient: bool) -> Case:
    # In memory XLA keeps the axis last that fills its tiles of 128: [D, V] at a width of 576.
    vocab_major = width % 128 == 0

    def forward(hidden: Any, matrix: Any, targets: Any) -> Any:
        return linear_logprob_and_entropy(
            hidden,
            matrix,
            targets,
            implementation=implementation,
            block=512,
            vocab_major=vocab_major,
        )

    def both(hidden: Any, matrix: Any, targets: Any, *weights: Any) -> Any:
        outputs, pull = jax.vjp(lambda h, m: forward(h, m, targets), hidden, matrix)
        return outputs, pull(weights)

    matrix = (vocab, width) if vocab_major else (width, vocab)
    shapes: tuple[Any, ...] = (
        ((n, width), jnp.bfloat16),
        (matrix, jnp.bfloat16),
        ((n,), jnp.int32),
    )
    if gradient:
        return Case(both, (*shapes, *[((n,), jnp.float32)] * 3))
    return Case(forward, shapes)


def _prefix_decode_attention(
    r: int, w: int, h: int, g: int, k: int, length: int, columns: int, implementation: str
) -> Case:
    layers, s = 2, r * w  # the cache of all layers is an operand, of which one is read
    return Case(
        functools.partial(prefix_decode_attention, implementation=implementation),
        (
            ((s, h, k), jnp.bfloat16),
            ((layers, r, g, k, length), jnp.bfloat16),
            ((layers, r, g, length, k), jnp.bfloat16),
            ((r,), jnp.int32),
            ((layers, s, g, k, columns), jnp.bfloat16),
            ((layers, s, g, columns, k), jnp.bfloat16),
            ((s, columns), jnp.bool_),
            ((), jnp.int32),
        ),
    )


def environment(folder: str, accelerator: str = "v5litepod-4") -> dict[str, str]:
    """What a process needs to have in its environment, before it imports jax, to compile for TPUs
    without one; libtpu logs to `folder`. Several such processes may run at once.

    Raises:
      RuntimeError: libtpu is not installed.
    """
    return os.environ | {
        "TPU_LIBRARY_PATH": str(libtpu_path()),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": accelerator,
        "TPU_LOG_DIR": folder,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    }


def libtpu_path() -> Path:
    """The library with XLA's TPU compiler: that of $TPU_LIBRARY_PATH, of the installed package, or
    of `make pods`, which puts the package beside an environment's others, where jax on a machine
    without TPUs does not stumble over it.

    Raises:
      RuntimeError: there is none, with the command that installs it.
    """
    if given := os.environ.get("TPU_LIBRARY_PATH"):
        return Path(given)
    found = importlib.util.find_spec("libtpu")
    places = [Path(found.origin).parent] if found and found.origin else []
    for place in (*places, Path(sys.prefix) / "pods" / "libtpu"):
        if (place / "libtpu.so").is_file():
            return place / "libtpu.so"
    raise RuntimeError(
        "libtpu is not installed. It holds XLA's compiler for TPUs, needs no TPU, and takes "
        "700 MB: make pods, or pip install 'spark-jax[tpu]'"
    )


def libtpu_version() -> str:
    """Of the package that `libtpu_path` lies in; "unknown" where it lies in none."""
    folder = str(libtpu_path().parent.parent)
    found = importlib.metadata.distributions(name="libtpu", path=[folder])
    return next((package.version for package in found), "unknown")


def main() -> None:
    """The child process of `report`; called by hand it starts itself through it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--generations", default="v5e")
    parser.add_argument("--cases", default="", help="only those whose name contains this")
    parser.add_argument("--cycles", action="store_true", help="several times slower")
    options = parser.parse_args()
    generations = options.generations.split(",")
    if "SPARK_DUMP" not in os.environ:
        for row in report(generations, options.cases, cycles=options.cycles):
            print(json.dumps(row))
        return
    for generation in generations:
        for name, case in all_cases().items():
            if options.cases in name:
                print(json.dumps({"case": name} | compile_case(case, generation)), flush=True)


@functools.cache
def device(generation: str) -> Any:
    """A chip that is not there; always the same one."""
    from jax.experimental import topologies

    name = TOPOLOGIES[generation]
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]


def compile_case(case: Case, generation: str) -> dict[str, Any]:
    """One row of `report`, in a process that `run_apart` started."""
    here = jax.sharding.SingleDeviceSharding(device(generation))
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=here) for shape in case.shapes]
    dump = os.environ["SPARK_DUMP"]
    for old in Path(dump).glob("*.txt") if dump else ():
        old.unlink()
    start = time.perf_counter()
    compiled = jax.jit(case.function).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    operations = scheduled_operations(compiled.as_text() or "")
    row = {
        "generation": generation,
        "compile_seconds": time.perf_counter() - start,
        "temporaries": memory.temp_size_in_bytes,
        "hbm_bytes": sum(o.trips * o.hbm_bytes for o in operations),
        "xla_cycles": sum(o.trips * o.estimated_cycles for o in operations),
    }
    if dump:
        bundles = {o.name: bundle_count(Path(dump), o.name) for o in operations}
        row["cycles"] = sum(
            o.trips * max(bundles[o.name], o.hbm_bytes / BYTES_PER_CYCLE[generation])
            for o in operations
        )
    return row


class Operation(NamedTuple):
    """One scheduled operation of a compiled program."""

    name: str
    trips: int  # of the loops around it
    hbm_bytes: int
    estimated_cycles: int


_WORKING = ("fusion", "copy", "custom-call", "convolution", "dot", "copy-start", "slice-start")


def scheduled_operations(text: str) -> list[Operation]:
    """From the optimised HLO of a TPU program; loops' bodies with their trips."""
    return [
        Operation(i.name, i.trips, _hbm_bytes(i), i.estimated_cycles)
        for i in hlo.instructions(text)
        if i.kind in _WORKING
    ]


def _hbm_bytes(i: hlo.Instruction) -> int:
    if told := re.search(r'"bytes_accessed":"?(\d+)', i.line):  # a kernel reads again
        return int(told[1])
    size = sum(hlo.shape_bytes(shape, hbm_only=True) for shape in i.operands)
    # An asynchronous copy's result names its operand again.
    return size + (0 if i.kind.endswith("-start") else hlo.shape_bytes(i.shape, hbm_only=True))


def bundle_count(folder: Path, name: str) -> int:
    """Instruction bundles that one operation executes, from the compiler's dump; 0 if it has none.
    A kernel's branches all count, in every step of its grid."""
    files = [p for p in folder.glob(f"*-{name}-*final_bundles.txt") if "schedule" not in p.name]
    if not files:
        return 0
    text = files[0].read_text()
    depths: Counter[int] = Counter()
    for loops in re.findall(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?:((?: ?>)*) +\{", text, re.M):
        depths[loops.count(">")] += 1
    bounds = [int(n) for n in re.findall(r"totalorder %\S+, (\d+) /\* loop exit test", text)]
    grid = re.search(r"iteration_bounds: \(([\d, ]+)\)", text)
    if grid and len(bounds) == 1:  # the test counts two more, for the pipeline to fill and drain
        bounds = [math.prod(int(n) for n in grid[1].split(",") if n.strip())]
    outermost_first = [1, *reversed(bounds)]
    return sum(n * math.prod(outermost_first[: depth + 1]) for depth, n in depths.items())


if __name__ == "__main__":
    main()
