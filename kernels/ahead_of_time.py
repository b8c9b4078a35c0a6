"""What XLA's TPU compiler makes of the kernels and of their references, on a machine without a TPU.

    pip install libtpu        (the version that `pip show jax` names for its extra "tpu"; 600 MB)
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
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError("libtpu is not installed: pip install 'jax[tpu]' (600 MB)")
    for generation in generations:
        if generation not in TOPOLOGIES:
            raise ValueError(f"generation {generation!r}; choose from {list(TOPOLOGIES)}")
    command = [sys.executable, "-m", "spark_jax.kernels.ahead_of_time", "--cases", cases]
    command += ["--generations", ",".join(generations), *(["--cycles"] if cycles else [])]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, env=_environment(folder, cycles), stdout=subprocess.PIPE, text=True, check=True
        )
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
    shapes = {  # lanes, slots, heads, KV heads, head width, prompt, own columns
        "7B/512+1024": (16, 8, 28, 4, 128, 512, 1024),
        "7B/2048+256": (32, 16, 28, 4, 128, 2048, 256),
        "7B/2048+2048": (32, 16, 28, 4, 128, 2048, 2048),
    }
    for shape, sizes in shapes.items():
        for implementation in ("xla", "pallas_tpu"):
            cases[f"prefix_decode_attention/{implementation}/{shape}"] = _prefix_decode_attention(
                *sizes, implementation
            )
    return cases


def _linear_logprob(n: int, width: int, vocab: int, implementation: str, gradient: bool) -> Case:
    # In memory XLA keeps the axis last that fills its tiles of 128: [D, V] at a width of 576.
    vocab_major = width % 128 == 0 and implementation != "xla"

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
    prompt, own = ((r, g, length, k), jnp.bfloat16), ((r, w, g, columns, k), jnp.bfloat16)
    return Case(
        functools.partial(prefix_decode_attention, implementation=implementation),
        (
            ((r, w, h, k), jnp.bfloat16),
            prompt,
            prompt,
            ((r,), jnp.int32),
            own,
            own,
            ((r, w, columns), jnp.bool_),
        ),
    )


def _environment(folder: str, cycles: bool) -> dict[str, str]:
    dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true" if cycles else ""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_LOG_DIR": folder,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "LIBTPU_INIT_ARGS": dump,
        "SPARK_DUMP": folder if cycles else "",
    }


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
                print(json.dumps({"case": name} | _compile(case, generation)), flush=True)


def _compile(case: Case, generation: str) -> dict[str, Any]:
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    here = jax.sharding.SingleDeviceSharding(topology.devices[0])
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


_ITEM = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
_WORKING = ("fusion", "copy", "custom-call", "convolution", "dot", "copy-start", "slice-start")


def scheduled_operations(text: str) -> list[Operation]:
    """From the optimised HLO of a TPU program; loops' bodies with their trips."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = computations.setdefault("ENTRY" if header[1] else header[2], [])
        else:
            lines.append(line)

    def walk(computation: str, trips: int) -> list[Operation]:
        types: dict[str, str] = {}
        found = []
        for line in computations[computation]:
            match = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line)
            if match is None:
                continue
            name, shape, kind, rest = match.groups()
            types[name] = shape
            if kind == "while":
                loop = dict(re.findall(r"(condition|body)=%([\w.\-]+)", line))
                bounds = re.findall(r"constant\((\d+)\)", "".join(computations[loop["condition"]]))
                found += walk(loop["body"], trips * max(map(int, bounds), default=1))
            elif kind in _WORKING:
                operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
                size = sum(_hbm_bytes(types.get(x, "")) for x in operands)
                # An asynchronous copy's result names its operand again.
                size += 0 if kind.endswith("-start") else _hbm_bytes(shape)
                if told := re.search(r'"bytes_accessed":"?(\d+)', line):  # a kernel reads again
                    size = int(told[1])
                cycles = re.search(r'estimated_cycles":"(\d+)"', line)
                found.append(Operation(name, trips, size, int(cycles[1]) if cycles else 0))
        return found

    return walk("ENTRY", 1)


def _hbm_bytes(shape: str) -> int:
    """Of a type, or of a tuple of types; S(1) is VMEM."""
    return sum(
        _ITEM[dtype] * math.prod(int(x) for x in sizes.split(",") if x)
        for dtype, sizes, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shape)
        if dtype in _ITEM and "S(1)" not in layout
    )


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
