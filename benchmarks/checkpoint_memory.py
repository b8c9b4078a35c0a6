"""Peak host memory of loading a checkpoint, against the bound that `models.checkpoints` keeps:
1.3 times the largest file, plus the parameters where they lie in host memory (CPU).

    python -m benchmarks.checkpoint_memory
    python -m benchmarks.checkpoint_memory --small        (tiny shapes: does it run at all)

Writes a bfloat16 checkpoint of random weights in several files, loads it in a fresh process for
each case, and prints one JSON line per case, in bytes. What the process held before loading is not
counted; exits with an error if a case is over its bound. Needs Linux (/proc).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spark_jax.models import checkpoints, transformer
from spark_jax.models.config import ModelConfig

FULL = ModelConfig(
    vocab_size=32_000,
    width=1024,
    num_layers=24,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    mlp_width=4096,
    tied_embeddings=False,
    dtype="bfloat16",
)
SMALL = dataclasses.replace(FULL, vocab_size=400, width=128, num_layers=2, mlp_width=256)
FILES = 3
CASES: tuple[dict[str, Any], ...] = (
    {"dtype": "bfloat16", "fsdp": 1},
    {"dtype": "float32", "fsdp": 1},
    {"dtype": "float32", "fsdp": 4},
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.dtype, options.fsdp)))
        return
    config = SMALL if options.small else FULL
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), config)
        results = [_in_a_fresh_process(folder, **case) for case in CASES]
    if not options.small and not all(result["within_bound"] for result in results):
        sys.exit("over the bound")


def write(folder: Path, config: ModelConfig) -> None:
    """A checkpoint of random weights in about `FILES` files."""
    shapes = transformer.shapes(config)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), shapes)
    checkpoints.save_hf(folder, params, config, max_shard_bytes=-(-size // FILES))


def measure(folder: Path, dtype: str, fsdp: int) -> dict[str, Any]:
    """Loads once in this process. Sizes in bytes, time in seconds."""
    mesh = jax.make_mesh((fsdp,), ("fsdp",)) if fsdp > 1 else None
    with tempfile.TemporaryDirectory() as small:  # what is allocated once does not count
        write(Path(small), SMALL)
        checkpoints.load(small, dtype=dtype, mesh=mesh)
    before, start = _resident(), time.perf_counter()
    params, _ = checkpoints.load(folder, dtype=dtype, mesh=mesh)
    seconds = time.perf_counter() - start
    peak = _peak() - before
    on_host = jax.default_backend() == "cpu"
    held = sum(x.nbytes for x in jax.tree.leaves(params)) if on_host else 0
    largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        "dtype": dtype,
        "fsdp": fsdp,
        "files": len(list(folder.glob("*.safetensors"))),
        "largest_file": largest,
        "parameters_on_host": held,
        "before": before,
        "peak": peak,
        "peak_without_parameters_in_files": round((peak - held) / largest, 3),
        "bound": int(1.3 * largest) + held,
        "within_bound": peak <= 1.3 * largest + held,
        "seconds": round(seconds, 2),
    }


def _in_a_fresh_process(folder: str, dtype: str, fsdp: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.checkpoint_memory", f"--measure={folder}"]
    flags = os.environ.get("XLA_FLAGS", "")
    done = subprocess.run(
        [*command, f"--dtype={dtype}", f"--fsdp={fsdp}"],
        env=os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={fsdp}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    print(done.stdout, end="", flush=True)
    return json.loads(done.stdout)


def _resident() -> int:
    """Bytes of memory this process holds; the peak counts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.checkpoint_memory", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a smoke test")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    parser.add_argument("--fsdp", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
