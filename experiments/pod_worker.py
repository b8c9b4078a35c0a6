"""The process in which `compile_for_pod` compiles: a job on standard input, a JSON line a program.

It is a process of its own because what makes a machine without TPUs compile for them has to be in
the environment before jax is imported, and because a compiler that dies must not take others along.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from spark_jax.experiments import pod_programs
from spark_jax.experiments.configuration import ConfigError
from spark_jax.experiments.pod_programs import Program
from spark_jax.experiments.tpu_chips import CHIPS, generation
from spark_jax.kernels import hlo
from spark_jax.kernels.ahead_of_time import libtpu_version
from spark_jax.parallel.mesh import make_mesh

WRONG_JOB = 3  # the exit status where the job is wrong whatever its mesh


def main() -> None:
    """Compiles the programs that the job names; it has the fields of
    `compile_for_pod.compile_programs`. Ends with `WRONG_JOB` where no mesh would do, with 1 where
    another one might."""
    job = json.load(sys.stdin)
    try:
        devices = topology_devices(job["topology"], job["num_slices"])
        mesh = make_mesh(job["mesh"], devices)
        wanted = _wanted(ml_collections.ConfigDict(job["config"]), mesh, job["programs"])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_JOB)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for program in wanted:
        row = compile_program(program, mesh, job["topology"], job["hlo"])
        print(json.dumps(row), flush=True)


def _wanted(config: Any, mesh: Mesh, names: Sequence[str]) -> list[Program]:
    found = pod_programs.programs(config, mesh)
    have = [program.name for program in found]
    if unknown := sorted(set(names) - set(have)):
        raise ConfigError(f"programs {unknown} are none of this configuration's: {have}")
    return [program for program in found if not names or program.name in names]


def topology_devices(topology: str, num_slices: int) -> Sequence[Any]:
    """The devices of a TPU topology that is not there. ConfigError for one that the compiler does
    not know."""
    from jax.experimental import topologies

    name = generation(topology)
    more: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if topology == "v5e:1x1":
        more["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"topology={topology!r} of {name}: {error}") from error
    return described.devices


def compile_program(program: Program, mesh: Mesh, topology: str, hlo_folder: str) -> dict[str, Any]:
    """One row: what the compiler says of a program, per device."""
    row: dict[str, Any] = {
        "program": program.name,
        "model": program.model,
        "rows": program.rows,
        "positions": program.positions,
        "topology": topology,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "hbm": int(CHIPS[generation(topology)].hbm * 2**30),
        "beside": program.beside,
        "versions": {"jax": jax.__version__, "libtpu": libtpu_version()},
    }
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = program.lower().compile()
    except Exception as error:
        row["seconds_to_compile"] = time.perf_counter() - start
        return row | _failure(error, row)
    row["seconds_to_compile"] = time.perf_counter() - start
    text = compiled.as_text() or ""
    if hlo_folder:
        name = f"{program.name}_{topology}_{'x'.join(map(str, mesh.shape.values()))}.hlo"
        Path(hlo_folder).mkdir(parents=True, exist_ok=True)
        (Path(hlo_folder) / re.sub(r"[/:]", "_", name)).write_text(text)
    return row | _memory(compiled.memory_analysis(), row) | _work(text)


def _memory(stats: Any, row: dict[str, Any]) -> dict[str, Any]:
    sizes = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "output": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    total = sum(sizes.values()) + sum(row["beside"].values())
    return sizes | {"total": total, "fits": total <= row["hbm"], "over": total - row["hbm"]}


def _work(text: str) -> dict[str, Any]:
    found = hlo.instructions(text)
    flops, silent = hlo.kernel_flops(found)
    return {
        "cycles": hlo.estimated_cycles(found),
        "kernel_flops": flops,
        "kernels_without_estimate": silent,
        "collectives": _summed(hlo.collectives(found)),
        "loops": _loops(found),
        "largest_arrays": [name for _, name in hlo.largest_arrays(text)],
    }


def _summed(found: list[hlo.Collective]) -> dict[str, dict[str, int]]:
    """Executions and bytes of a device, by kind."""
    sums: dict[str, dict[str, int]] = {}
    for one in found:
        kind = sums.setdefault(one.kind, {"count": 0, "bytes": 0})
        kind["count"] += one.trips
        kind["bytes"] += one.trips * one.bytes
    return sums


def _loops(found: list[hlo.Instruction]) -> dict[str, dict[str, Any]]:
    """What one trip of each loop of unknown length costs, of those inside it one trip too."""
    names = {i.loops[: n + 1] for i in found for n in range(len(i.loops))}
    costs = {}
    for name in sorted(names):
        inside = [i for i in found if i.loops[: len(name)] == name]
        costs[" > ".join(name)] = {
            "cycles": hlo.estimated_cycles(inside),
            "kernel_flops": hlo.kernel_flops(inside)[0],
            "collectives": _summed(hlo.collectives(inside)),
        }
    return costs


def _failure(error: Exception, row: dict[str, Any]) -> dict[str, Any]:
    """Why a program does not compile, and by how much it does not fit where that is why."""
    message = str(error)
    used = _USED.search(message)
    if used is None:
        return {"fits": False, "error": message[:2000]}
    needed = float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[used[2]]
    total = int(needed) + sum(row["beside"].values())
    first_line = message.partition("\n")[0]
    return {"fits": False, "total": total, "over": total - row["hbm"], "error": first_line}


# "Used 20.1G of 15.7G hbm", and "memory required for HLO temporaries (20.1G) exceeds".
_USED = re.compile(r"(?:Used |required for HLO temporaries \()([\d.]+)([KMGT])")


if __name__ == "__main__":
    main()
