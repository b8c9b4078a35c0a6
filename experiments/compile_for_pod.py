"""What the programs of a run need on a TPU slice, from XLA's TPU compiler, without a TPU.

    make pods
    python -m spark_jax.experiments.compile_for_pod --config=configs/spark_qwen25_math_7b.py \
        --topology=v5p:4x4x4 --mesh=fsdp=16,tensor=4
    python -m spark_jax.experiments.compile_for_pod --config=configs/spark_qwen25_math_7b.py \
        --topology=v6e:16x16 --search --programs=rl/policy_step
    python -m spark_jax.experiments.compile_for_pod --config=configs/spark_qwen25_math_7b.py \
        --topology=v5p:4x4x4 --mesh=fsdp=16,tensor=4 --plan --mean_verification_tokens=600

Every program (prefill and decode of each model, scoring, policy step, fine-tuning step) is compiled
for the mesh from shapes alone, in a process of its own, and printed with what a device needs:
arguments, temporaries, output, what else lies there at that time, collectives, and a static
estimate of its time. The same, with more, goes to a JSON file. `--search` tries every mesh that
divides the topology, with the axes of `--mesh` as they are, and ranks those that fit; `--plan` adds
what stage I would take, over the best of them.
The models are not fetched: shapes come from checkpoint folders, `models.published_shapes` or the
hub. A program takes half a minute to several minutes and up to a few GiB of memory.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from spark_jax.experiments import checks, launch, pod_plan
from spark_jax.experiments.configuration import Config, ConfigError
from spark_jax.experiments.pod_worker import WRONG_JOB
from spark_jax.experiments.tpu_chips import CHIPS, generation
from spark_jax.kernels.ahead_of_time import environment
from spark_jax.parallel import processes
from spark_jax.parallel.sharding import MESH_AXES

GIB = 2**30

Row = dict[str, Any]


def compile_programs(
    config: Config,
    topology: str,
    mesh: Mapping[str, int],
    *,
    programs: Sequence[str] = (),
    num_slices: int = 1,
    hlo_folder: str = "",
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Compiles the programs of a run for a mesh over a TPU topology, in another process.

    Args:
      config: of a `pipeline`.
      topology: generation and sizes, such as "v5p:4x4x4"; of one slice.
      mesh: axes as `parallel.mesh.make_mesh` takes them.
      programs: names (`pod_programs.programs`); none: all.
      hlo_folder: where the compiled programs are written as text; "": nowhere.
      on_row: called with every row as it is made.

    Returns:
      One row per program, in bytes and cycles of one device: `arguments`, `temporaries`, `output`
      (that is not an argument's memory), `code`, `beside` (what else lies there, by name), `total`,
      `hbm`, `fits`, `over` (total - hbm), `cycles`, `kernel_flops`, `collectives`, `loops`,
      `seconds_to_compile`, `versions`; where it does not compile `error`, and `total` if that was
      for lack of memory.

    Raises:
      RuntimeError: libtpu is not installed.
      ConfigError: a topology, programs or a configuration that cannot be, with the reason.
      ValueError: a mesh that cannot be, with the reason; or the compiler itself ended.
    """
    job = {
        "config": config.to_dict(),
        "topology": topology,
        "num_slices": num_slices,
        "mesh": dict(mesh),
        "programs": list(programs),
        "hlo": hlo_folder,
    }
    accelerator = CHIPS[generation(topology)].accelerator
    with tempfile.TemporaryDirectory() as folder:
        complaints = Path(folder) / "stderr"
        with complaints.open("w") as file:
            child = subprocess.Popen(
                [sys.executable, "-m", "spark_jax.experiments.pod_worker"],
                env=environment(folder, accelerator)
                | {"LIBTPU_INIT_ARGS": processes.tpu_flags(os.environ)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
            rows = _read(child, json.dumps(job), on_row)
        if child.returncode:
            kind = ConfigError if child.returncode == WRONG_JOB else ValueError
            raise kind(_complaint(child.returncode, complaints.read_text(), len(rows)))
    return rows


def meshes(devices: int, fixed: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Every way of spreading so many devices over the axes of a mesh, with the fixed ones kept."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for data, fsdp in itertools.product(divisors, divisors):
        if devices % (data * fsdp) == 0:
            mesh = dict(zip(MESH_AXES, (data, fsdp, devices // (data * fsdp)), strict=True))
            if mesh | dict(fixed) == mesh:
                yield mesh


def searched(
    config: Config,
    topology: str,
    devices: int,
    *,
    fixed: Mapping[str, int],
    programs: Sequence[str],
    num_slices: int = 1,
    hlo_folder: str = "",
    on_row: Callable[[Row], None] = lambda row: None,
) -> tuple[list[list[Row]], dict[str, str]]:
    """Compiles for every mesh that divides the topology and has the `fixed` sizes.

    Returns:
      the rows of each, best first: those whose programs all fit, by their estimated time; then the
      others, by how much is missing. And why meshes were refused that do not divide a model.

    Raises:
      ConfigError: as `compile_programs`, at once; it would be refused for every mesh.
      ValueError: no mesh has the `fixed` sizes.
    """
    found, refused = [], {}
    tried = list(meshes(devices, fixed))
    if not tried:
        raise ValueError(
            f"--mesh={dict(fixed)} with --search: no mesh over {devices} devices has these sizes; "
            f"give sizes that divide {devices} for some of {list(MESH_AXES)}, and leave out those "
            "that are to be searched"
        )
    for mesh in tried:
        try:
            rows = compile_programs(
                config, topology, mesh, programs=programs, num_slices=num_slices,
                hlo_folder=hlo_folder, on_row=on_row,
            )  # fmt: skip
            found.append(rows)
        except ConfigError:
            raise
        except ValueError as error:
            refused["·".join(map(str, mesh.values()))] = str(error)
    return sorted(found, key=rank), refused


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """The table: sizes in GiB and times in ms, of one device."""
    table = Table(title="per device; GiB, and milliseconds by static estimate")
    left = ("program", "mesh")
    for name in (*left, *_COLUMNS):
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        mesh = "·".join(str(size) for size in row["mesh"].values())
        table.add_row(row["program"], mesh, *(cell(row) for cell in _COLUMNS.values()))
    console.print(table)
    if silent := sum(row.get("kernels_without_estimate", 0) > 0 for row in rows):
        console.print(f"{silent} programs have kernels (attention) whose time is not estimated")
    for row in rows:
        if row.get("error") and "total" not in row:
            console.print(f"{row['program']} does not compile: {row['error']}", markup=False)


def _gib(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name] / GIB:.2f}" if name in row else "-"


def _fits(row: Row) -> str:
    if row["fits"]:
        return "yes"
    return f"no: {row['over'] / GIB:.2f} over" if "over" in row else "no"


def _milliseconds(part: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        return (
            f"{1000 * pod_plan.seconds(row, row['topology'])[part]:.1f}" if "cycles" in row else "-"
        )

    return cell


def _moved(row: Row) -> str:
    """Collectives: how often, and what they move."""
    short = {"collective-permute": "permute"}
    return "\n".join(
        f"{short.get(kind, kind)} {one['count']} × = {one['bytes'] / GIB:.2f}"
        for kind, one in sorted(row.get("collectives", {}).items())
    )


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "arguments": _gib("arguments"),
    "temporaries": _gib("temporaries"),
    "output": _gib("output"),
    "beside": lambda row: f"{sum(row['beside'].values()) / GIB:.2f}",
    "total": _gib("total"),
    "of": _gib("hbm"),
    "fits": _fits,
    "collectives": _moved,
    "computing": _milliseconds("computing"),
    "moving": _milliseconds("moving"),
    "compiled in": lambda row: f"{row['seconds_to_compile']:.0f} s",
}


def rank(rows: Sequence[Row]) -> tuple[bool, float]:
    """What a mesh's rows are sorted by."""
    if all(row["fits"] for row in rows):
        times = (pod_plan.seconds(row, row["topology"]).values() for row in rows)
        return False, sum(sum(parts) for parts in times)
    return True, sum(row.get("over", math.inf) for row in rows if not row["fits"])


def _read(child: subprocess.Popen[str], job: str, on_row: Callable[[Row], None]) -> list[Row]:
    assert child.stdin is not None
    assert child.stdout is not None
    rows = []
    child.stdin.write(job)
    child.stdin.close()
    for line in child.stdout:
        if line.startswith("{"):
            rows.append(json.loads(line))
            on_row(rows[-1])
    child.wait()
    return rows


def _complaint(status: int, text: str, done: int) -> str:
    """What the process that ended so said last."""
    if status < 0:
        how = f"the compiler ended by {signal.Signals(-status).name} after {done} programs"
        return how + (": not enough memory on this machine?" if -status == signal.SIGKILL else "")
    errors = [line for line in text.splitlines() if re.match(r"(error|[\w.]*Error): ", line)]
    last = errors[-1].removeprefix("error: ") if errors else text[-500:]
    known = status in (1, WRONG_JOB)
    return last if known else f"the compiler ended with status {status}: {last}"


def main() -> None:
    """The command line; see the module."""
    flag = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
    flags.DEFINE_string("topology", None, "generation:sizes of a slice, such as v5p:4x4x4")
    flags.DEFINE_integer("num_slices", 1, "slices, all of that topology")
    flags.DEFINE_string("mesh", "", "such as fsdp=16,tensor=4; empty: the configuration's")
    flags.DEFINE_list("programs", [], "names, separated by commas; none: all")
    flags.DEFINE_bool("search", False, "try all meshes that have the axes of --mesh")
    flags.DEFINE_bool("plan", False, "tokens, hours and chip-hours of stage I")
    flags.DEFINE_string("output", "", "the JSON file; empty: in runs/pods, by config and topology")
    flags.DEFINE_string("hlo", "", "a folder for the compiled programs as text")
    for name, (default, help_string) in pod_plan.ASSUMPTIONS.items():
        flags.DEFINE_float(name, default, help_string)
    flags.mark_flag_as_required("topology")

    def start(_: Sequence[str]) -> None:
        try:
            run(flag.value, flags.FLAGS)
        except (ConfigError, FileNotFoundError, RuntimeError, ValueError) as error:
            sys.exit(f"error: {error}")

    try:
        arguments = launch.check_arguments(sys.argv)
    except (ConfigError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    app.run(start, argv=arguments)


def run(config: Config, options: Any) -> None:
    """Compiles, prints and writes, as the command line's `options` say."""
    jax.config.update("jax_platforms", "cpu")  # of this process: the other one compiles
    checks.check_common(config)
    console = Console(width=None if sys.stdout.isatty() else 200)

    def on_row(row: Row) -> None:
        print(f"{row['program']}: {row['seconds_to_compile']:.0f} s", file=sys.stderr, flush=True)

    rows, best = compiled(config, options, console, on_row)
    print_rows(rows, console)
    result: dict[str, Any] = {"programs": rows}
    if options.plan:
        given = {name: getattr(options, name) for name in pod_plan.ASSUMPTIONS}
        result["plan"] = pod_plan.stage_one(config, best, given)
        pod_plan.print_plan(result["plan"], console)
    path = Path(options.output or default_output(config, options))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written to {path}", highlight=False)


def compiled(
    config: Config, options: Any, console: Console, on_row: Callable[[Row], None]
) -> tuple[list[Row], list[Row]]:
    """All rows, and those of the best mesh. Raises as `searched`, and ValueError where every mesh
    is refused; prints why meshes are."""
    how = {
        "programs": options.programs,
        "num_slices": options.num_slices,
        "hlo_folder": options.hlo,
        "on_row": on_row,
    }
    if not options.search:
        axes = parse_mesh(options.mesh) or dict(config.mesh)
        rows = compile_programs(config, options.topology, axes, **how)
        return rows, rows
    devices = device_count(options.topology, options.num_slices)
    fixed = parse_mesh(options.mesh)
    ranked, refused = searched(config, options.topology, devices, fixed=fixed, **how)
    for mesh, reason in refused.items():
        console.print(f"{mesh} is refused: {reason}", markup=False, highlight=False)
    if not ranked:
        raise ValueError(f"--search: all {len(refused)} meshes are refused; see above")
    return [row for mesh in ranked for row in mesh], ranked[0]


def parse_mesh(text: str) -> dict[str, int]:
    """ "fsdp=16,tensor=4" as a dictionary. ValueError for anything else."""
    try:
        pairs = [part.split("=") for part in text.split(",") if part]
        return {name.strip(): int(size) for name, size in pairs}
    except ValueError:
        raise ValueError(f"--mesh={text!r}; write it as fsdp=16,tensor=4") from None


def device_count(topology: str, num_slices: int) -> int:
    """Devices that a topology has, as JAX counts them."""
    chip = CHIPS[generation(topology)]
    sizes = topology.partition(":")[2].split("x")
    return math.prod(map(int, sizes)) * chip.devices_per_chip * num_slices


def default_output(config: Config, options: Any) -> Path:
    name = f"{Path(config.run_dir).name}_{options.topology.replace(':', '_')}"
    return Path("runs/pods") / f"{name}{'_search' * options.search}.json"


if __name__ == "__main__":
    main()
