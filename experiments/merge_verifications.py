"""Joins the parts of a stage I run (`generate.shard`) to what one run would have made.

    python -m spark_jax.experiments.merge_verifications --config=configs/demo.py \
        --config.run_dir=runs/stage1

Reads `runs/stage1/shard_<i>_of_<n>/`, which must be all there, finished, and made with the same
configuration; writes `solutions.jsonl`, `verified.jsonl` and `summary.json` to `runs/stage1/`,
where `train_prm` finds them. A record that is there twice, as two jobs on one part leave it, counts
once. No model is loaded and no mesh is made, so any one machine does: on a TPU host, which would
wait for the others of its slice, with JAX_PLATFORMS=cpu.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spark_jax.data.records import Solution, VerifiedSolution, append_jsonl, read_jsonl
from spark_jax.experiments import checks, configuration, launch, loading
from spark_jax.experiments.base_config import FORMER_DEFAULTS
from spark_jax.experiments.configuration import Config, ConfigError
from spark_jax.experiments.generate_verifications import (
    SOLUTIONS,
    VERIFIED,
    all_problems,
    finish,
)
from spark_jax.training.run_folder import OtherRun, RunFolder, differences

logger = logging.getLogger(__name__)

Record = TypeVar("Record")


def run(config: Config, path: Path) -> dict[str, Any]:
    """Merges the shards in `path`; returns the summary.

    Raises:
      FileNotFoundError: there are no shards, or some are missing or not finished, by name.
      OtherRun: a shard was made with another configuration, with the fields that differ.
      ConfigError: shards of two different divisions, or two records of one key that differ.
    """
    check_config(config)
    config = configuration.changed(
        configuration.sub_config(config, "generate", "verify"), {"generate.shard": (0, 1)}
    )
    task = loading.load_task(config)
    shards = find(path)
    for index, shard in enumerate(shards):
        check(config, shard, index, len(shards))
    folder = RunFolder.open(path, config, FORMER_DEFAULTS)
    if (finished := folder.read_summary()) is not None:
        return finished

    problems = all_problems(config, task)
    keys = [(p.id, i) for p in problems for i in range(config.generate.samples_per_problem)]
    solutions = joined(shards, SOLUTIONS, Solution, keys, lambda r: (r.problem_id, r.index))
    verified = joined(
        shards, VERIFIED, VerifiedSolution, keys, lambda r: (r.problem_id, r.solution_index)
    )
    for name, records in ((SOLUTIONS, solutions), (VERIFIED, verified)):
        (path / name).unlink(missing_ok=True)  # of a merge that was cut off
        append_jsonl(path / name, records)
    return finish(config, task, folder, problems, solutions, verified)


def check_config(config: Config) -> None:
    """As of stage I, but for the mesh, whose devices need not be here."""
    checks.check_stage1(config, on_mesh=False)


def find(path: Path) -> list[Path]:
    """The folders of all shards, in order. Raises as `run`."""
    found = {
        (int(match[1]), int(match[2])): shard
        for shard in sorted(path.glob("shard_*_of_*"))
        if (match := re.fullmatch(r"shard_(\d+)_of_(\d+)", shard.name))
    }
    counts = sorted({count for _, count in found})
    if not counts:
        raise FileNotFoundError(
            f"{path} holds no shard_<i>_of_<n>; generate_verifications with generate.shard=(i, n) "
            "makes them"
        )
    if len(counts) > 1:
        raise ConfigError(
            f"{path} holds shards of {counts}; parts of two divisions overlap: remove one of them"
        )
    missing = [
        f"shard_{i}_of_{counts[0]}"
        for i in range(counts[0])
        if not (found.get((i, counts[0]), path / "none") / "summary.json").is_file()
    ]
    if missing:
        raise FileNotFoundError(f"{path}: {missing} are missing or not finished; run them first")
    return [found[i, counts[0]] for i in range(counts[0])]


def check(config: Config, shard: Path, index: int, count: int) -> None:
    """OtherRun where the shard is not that part of the run of `config`."""
    made_with = json.loads((shard / "config.json").read_text())
    expected = configuration.changed(config, {"generate.shard": (index, count)})
    if differing := differences(made_with, expected.to_dict(), FORMER_DEFAULTS):
        lines = "\n".join(f"  {line}" for line in differing)
        raise OtherRun(f"{shard} was made with another configuration:\n{lines}")


def joined(
    shards: Sequence[Path],
    name: str,
    cls: type[Record],
    keys: Sequence[Any],
    key: Callable[[Record], Any],
) -> list[Record]:
    """The records of all shards, each once, in the order of `keys`. Raises as `run`."""
    records: dict[Any, Record] = {}
    twice = 0
    for shard in shards:
        for line, record in enumerate(read_jsonl(shard / name, cls), start=1):
            if records.setdefault(key(record), record) != record:
                raise ConfigError(
                    f"{shard / name}:{line}: {key(record)} is there twice, with different content; "
                    "remove that shard and run it again"
                )
            twice += records[key(record)] is not record
    wrong = [k for k in keys if k not in records] or sorted(set(records) - set(keys))
    if wrong:
        raise ConfigError(
            f"{len(wrong)} records of {name}, such as {wrong[0]}, are missing or of no problem of "
            "this run; remove the shard that they belong to and run it again"
        )
    if twice:
        logger.warning("%s: %d records were there twice and count once", name, twice)
    return [records[k] for k in keys]


if __name__ == "__main__":
    launch.main(run, check_config)
