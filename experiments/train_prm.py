"""SPARK stage II: a generative reward model by supervised fine-tuning on stage I's verifications.

    python -m spark_jax.experiments.train_prm --config=configs/demo.py \
        --config.run_dir=runs/prm --config.prm.data=runs/stage1 --config.prm.kind=prm_cot

Writes the reward model (`model/`, a Hugging Face checkpoint), metrics and its F1 on held-out
solutions (`summary.json`). Started again, it goes on from the last checkpoint.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp

from spark_jax.data import tasks
from spark_jax.experiments import evaluate, generate_verifications, launch
from spark_jax.experiments.launch import Config, OnProgress
from spark_jax.models import checkpoints
from spark_jax.prm.examples import tokenize_examples
from spark_jax.prm.targets import TrainingPair, aggregated_by, training_pairs
from spark_jax.reports import plots
from spark_jax.training import optimizer, state
from spark_jax.training.checkpointing import Checkpoints
from spark_jax.training.metrics import MetricsWriter
from spark_jax.training.run_folder import RunFolder
from spark_jax.training.sft import SFTBatch, sft_step
from spark_jax.verification.aggregate import balance

SAVE_EVERY = 100


def run(config: Config, path: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Stage II in the folder `path`; returns its summary. Progress is in updates."""
    launch.check_prm(config)
    config = launch.sub_config(config, "generate", "verify", "prm", "evaluate")
    task = tasks.load(config.task)
    params, model_config, tokenizer = launch.load_model(config.model)
    pairs, counts = examples(config, task)
    folder = RunFolder.open(path, config)
    if (finished := folder.read_summary()) is not None:
        return finished

    arrays = tokenize_examples(tokenizer, pairs, max_length=config.prm.max_length)
    order = (
        grain.MapDataset.range(len(arrays["tokens"]))
        .shuffle(seed=config.seed)
        .repeat()
        .batch(config.prm.batch_size)
    )
    train = state.create(
        jax.tree.map(jnp.copy, params), make_optimizer(config), jax.random.key(config.seed)
    )
    update = compiled_step(
        model_config, json.dumps(config.prm.optimizer.to_dict()), config.prm.accumulation_steps
    )
    with Checkpoints(folder.checkpoints) as saved, MetricsWriter(path) as metrics:
        restored = saved.restore_latest(train)
        if restored is not None:
            train, _ = restored
        metrics.truncate_after(int(train.step))
        for step in range(int(train.step) + 1, config.prm.steps + 1):
            rows = order[step - 1]
            batch = SFTBatch(
                jnp.asarray(arrays["tokens"][rows]), jnp.asarray(arrays["loss_mask"][rows])
            )
            train, values = update(train, batch)
            metrics.scalars(step, {f"train/{name}": value for name, value in values.items()})
            if step % SAVE_EVERY == 0 or step == config.prm.steps:
                saved.save(step, train)
            if on_progress:
                on_progress(step, config.prm.steps)

    checkpoints.save_hf(path / "model", train.params, model_config, tokenizer)
    model = launch.text_model(train.params, model_config, tokenizer, name=str(path / "model"))
    held_out = evaluate.held_out_solutions(config, task)
    summary = {
        "num_examples": len(arrays["tokens"]),
        "num_too_long": arrays["num_dropped"],
        **counts,
        "skipped_updates": int(train.skipped),
        "held_out": evaluate.reward_model_scores(config, task, model, config.prm.kind, *held_out),
    }
    folder.write_summary(summary)
    plots.training_curves(path / "metrics.jsonl", folder.plots)
    return summary


def examples(config: Config, task: tasks.Task) -> tuple[list[TrainingPair], dict[str, Any]]:
    """Prompt and target of every solution that the method verified, balanced if asked for."""
    problems, solutions, verified = generate_verifications.load(Path(config.prm.data), task)
    counts: dict[str, Any] = {}
    if config.prm.balance:
        judged = [(r.problem_id, aggregated_by(r, config.prm.method)) for r in verified]
        kept, counts["balance"] = balance(judged, key=config.seed)
        verified = [verified[i] for i in kept]
    pairs, without = training_pairs(
        task.text_format, config.prm.kind, config.prm.method, problems, solutions, verified
    )
    return pairs, counts | {"without_verification": without}


def make_optimizer(config: Config) -> Any:
    return optimizer.make({**config.prm.optimizer, "total_steps": config.prm.steps})


@functools.lru_cache(maxsize=8)
def compiled_step(model_config: Any, optimizer_config: str, accumulation_steps: int) -> Any:
    """One compiled SFT step per setting, shared by all runs of a process."""
    step = functools.partial(
        sft_step,
        model_config=model_config,
        optimizer=optimizer.make(json.loads(optimizer_config)),
        accumulation_steps=accumulation_steps,
    )
    return jax.jit(step, donate_argnums=0)


if __name__ == "__main__":
    launch.main(run, launch.check_prm)
