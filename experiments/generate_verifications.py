"""SPARK stage I: solutions, N verifications of each, and one target verification by every method.

    python -m spark_jax.experiments.generate_verifications --config=configs/demo.py \
        --config.run_dir=runs/stage1 --config.verify.methods="('single', 'meta_critique')"

In parts, on any number of machines and at any time, then joined:

    python -m spark_jax.experiments.generate_verifications --config=configs/demo.py \
        --config.run_dir=runs/stage1 --config.generate.shard="(0, 2)"    # and (1, 2)
    python -m spark_jax.experiments.merge_verifications --config=configs/demo.py \
        --config.run_dir=runs/stage1

Writes `solutions.jsonl`, `verified.jsonl`, how busy the decoder was in this start (`decoding.json`)
and, where the task knows the truth, how good the verifications of each method are (`summary.json`).
Started again, it goes on where it stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spark_jax import tasks
from spark_jax.data.formats import Sample
from spark_jax.data.records import Problem, Solution, VerifiedSolution, read_jsonl
from spark_jax.experiments import checks, configuration, launch, loading
from spark_jax.experiments.base_config import FORMER_DEFAULTS
from spark_jax.experiments.configuration import Config, ConfigError
from spark_jax.experiments.progress import OnProgress
from spark_jax.parallel import processes
from spark_jax.reports import plots
from spark_jax.text_generation import DecodeStatistics, text_sampler
from spark_jax.training.run_folder import RunFolder
from spark_jax.verification.aggregate import AGGREGATIONS
from spark_jax.verification.pipeline import aggregate_first, generate_solutions, verify_solutions
from spark_jax.verification.report import report


@configuration.on_mesh
def run(config: Config, path: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Stage I, or the part of it that `generate.shard` asks for, in the folder `path` (a part:
    `shard_folder`); returns its summary. Progress is in problems, both passes."""
    checks.check_stage1(config)
    path = shard_folder(config, path)
    config = configuration.sub_config(config, "generate", "verify")
    task = loading.load_task(config)
    problems = shard_of(config, all_problems(config, task))  # before a folder is made
    folder = RunFolder.open(path, config, FORMER_DEFAULTS)
    if (finished := folder.read_summary()) is not None:
        return finished

    model = loading.load_text_model(config, config.generate.model or config.model)

    # Process 0's; the others have no use for them, and a record of each response is a lot to send.
    solutions: list[Solution] = []
    verified: list[VerifiedSolution] = []
    options = configuration.decode_options(config)
    generated, checked = DecodeStatistics(), DecodeStatistics()

    def generate(sample: Sample) -> None:
        solutions[:] = generate_solutions(
            sample,
            problems,
            loading.for_model(task, model.tokenizer, config).text_format,
            samples_per_problem=config.generate.samples_per_problem,
            settings=loading.sampling(config, config.generate),
            seed=config.seed,
            path=path / SOLUTIONS,
            model=model.name,
            chunk_size=config.generate.chunk_size,
            on_progress=on_progress and (lambda done, total: on_progress(done, 2 * total)),
        )

    processes.lead(generate, text_sampler(model, options, generated))
    if (verifier := config.verify.model or config.model) != model.name:
        del model  # there need not be room for both
        model = loading.load_text_model(config, verifier)

    def verify(sample: Sample) -> None:
        verified[:] = verify_solutions(
            sample,
            problems,
            solutions,
            loading.for_model(task, model.tokenizer, config).text_format,
            methods=config.verify.methods,
            samples_per_solution=config.verify.samples_per_solution,
            settings=loading.sampling(config, config.verify),
            seed=config.seed,
            path=path / VERIFIED,
            model=model.name,
            chunk_size=config.verify.chunk_size,
            on_progress=on_progress and (lambda done, total: on_progress(total + done, 2 * total)),
        )

    processes.lead(verify, text_sampler(model, options, checked))
    if processes.is_main():
        busy = {"generate": generated.means(), "verify": checked.means()}
        (path / "decoding.json").write_text(json.dumps(busy, indent=2) + "\n")
    return finish(config, task, folder, problems, solutions, verified)


def finish(
    config: Config,
    task: tasks.Task,
    folder: RunFolder,
    problems: Sequence[Problem],
    solutions: Sequence[Solution],
    verified: Sequence[VerifiedSolution],
) -> dict[str, Any]:
    """Writes and returns the summary of a run whose records are all there: on process 0; those that
    other processes give are not looked at."""

    def summarised() -> dict[str, Any]:
        labelled = tasks.with_labels(task, problems, solutions)
        return {
            "num_problems": len(problems),
            "num_solutions": len(solutions),
            "data": task.data_counts("train"),
            "methods": report(verified, labelled),
            "by_sample_count": by_sample_count(config, verified, labelled),
        }

    summary = processes.on_main(summarised)
    folder.write_summary(summary)
    if processes.is_main():
        num_samples = config.verify.samples_per_solution
        plots.stage1_summary(summary, folder.plots, num_samples=num_samples)
    return summary


def all_problems(config: Config, task: tasks.Task) -> list[Problem]:
    return task.problems(config.generate.num_problems, config.seed, "train")


def shard_folder(config: Config, path: Path) -> Path:
    """Where a part of the run of the folder `path` lies; the folder itself for all of it."""
    index, count = config.generate.shard
    return path if count == 1 else path / f"shard_{index}_of_{count}"


def shard_of(config: Config, problems: Sequence[Problem]) -> list[Problem]:
    """The problems of `generate.shard`: whole chunks of both passes, so that what is sampled, and
    the seeds it is sampled with, are those of a run that makes all of it.

    Raises ConfigError where there are fewer such blocks than shards.
    """
    index, count = config.generate.shard
    block = math.lcm(config.generate.chunk_size, config.verify.chunk_size)
    blocks = -(-len(problems) // block)
    if blocks < count:
        raise ConfigError(
            f"generate.shard={(index, count)}: {len(problems)} problems are {blocks} blocks of "
            f"{block}, the least common multiple of generate.chunk_size and verify.chunk_size; "
            f"make at most {blocks} shards, or smaller chunks"
        )
    return list(problems[index * blocks // count * block : (index + 1) * blocks // count * block])


SOLUTIONS, VERIFIED = "solutions.jsonl", "verified.jsonl"


def load(
    config: Config, task: tasks.Task
) -> tuple[list[Problem], list[Solution], list[VerifiedSolution]]:
    """What a finished stage I run left in the folder `prm.data`. FileNotFoundError where there is
    none, ConfigError where it is of another task."""
    path = Path(config.prm.data)
    for name in ("summary.json", VERIFIED):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"prm.data={str(path)!r} holds no {name}, so it is no finished stage I run; run "
                "generate_verifications with --config.run_dir set to it"
            )
    made_with = json.loads((path / "config.json").read_text())
    if made_with["task"] != task.name:
        raise ConfigError(
            f"prm.data={str(path)!r} is of task {made_with['task']!r}, this run of {task.name!r}"
        )
    ours, theirs = config.task_options.to_dict(), made_with["task_options"]
    if differing := [name for name in ours if ours[name] != theirs.get(name)]:
        raise ConfigError(
            f"prm.data={str(path)!r} was made with other task_options: {differing}; it had "
            f"{[theirs.get(name) for name in differing]}"
        )
    index, count = made_with["generate"].get("shard", (0, 1))
    if count > 1:
        raise ConfigError(
            f"prm.data={str(path)!r} is part {index} of {count}; give the folder that "
            "merge_verifications made of all of them"
        )
    problems = task.problems(made_with["generate"]["num_problems"], made_with["seed"], "train")
    solutions = read_jsonl(path / SOLUTIONS, Solution)
    return problems, solutions, read_jsonl(path / VERIFIED, VerifiedSolution)


def by_sample_count(
    config: Config, verified: Sequence[VerifiedSolution], labelled: Sequence[Solution]
) -> dict[str, Any]:
    """The report had only the first n of the N samples been drawn, for methods that only vote."""
    methods = [m for m in config.verify.methods if not AGGREGATIONS[m].critique]
    return {
        str(n): report(
            [aggregate_first(record, n, methods, seed=config.seed) for record in verified], labelled
        )
        for n in config.verify.report_sample_counts
        if n <= config.verify.samples_per_solution and methods
    }


if __name__ == "__main__":
    launch.main(run, checks.check_stage1, unit="problems")
