"""For tests of whole runs: killing them, corrupting their references, comparing what they left."""

import dataclasses
import json

from spark_jax.tasks.arithmetic_chains import world
from spark_jax.verification.aggregate import AGGREGATIONS

# The demo a thousand times smaller. Prompts are padded to one length, and stages ask for as many
# samples at a time as others do: each size is another program to compile, and that is what a tiny
# run's time goes into.
TINY = {
    "decode.max_prompt_length": 96,
    "generate.num_problems": 4,
    "generate.samples_per_problem": 2,
    "generate.chunk_size": 2,
    "verify.methods": tuple(AGGREGATIONS),
    "verify.samples_per_solution": 3,
    "verify.report_sample_counts": (1, 3),
    "verify.chunk_size": 2,
    "prm.steps": 4,
    "prm.batch_size": 4,
    "rl.steps": 3,
    "rl.num_problems": 8,
    "rl.prompts_per_step": 2,
    "rl.group_size": 4,
    "evaluate.num_problems": 2,
    "evaluate.samples_per_problem": 4,
    "evaluate.num_solutions": 8,
    "pipeline.seeds": (0, 1),
}


class Stop(Exception):
    pass


def stop_at(count):
    """An `on_progress` that kills the run when it is called for the `count`-th time."""
    calls = []

    def on_progress(done, total):
        calls.append(done)
        if len(calls) == count:
            raise Stop

    return on_progress


def weights(path):
    return (path / "model" / "model.safetensors").read_bytes()


def metric_rows(path):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    clocks = ("wall_time", "cpu_time", "seconds")
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows]


def corrupt_references(monkeypatch):
    """Makes the reference of every problem wrong; the questions stay."""
    true = world.problems

    def corrupted(*args):
        return [
            dataclasses.replace(problem, answer=str((int(problem.answer) + 5) % 10))
            for problem in true(*args)
        ]

    monkeypatch.setattr(world, "problems", corrupted)
