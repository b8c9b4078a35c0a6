"""Supervised fine-tuning on examples: a first taste of the formats, before stage I.

    python -m spark_jax.experiments.sft --config=configs/smollm2_word_problems.py \
        --config.run_dir=runs/sft
    python -m spark_jax.experiments.sft --config=configs/smollm2_word_problems.py \
        --config.run_dir=runs/sft_own --config.sft.data=examples.jsonl

The examples are the task's own (`word_problems` has some), or those of a JSON-lines file with a
`prompt` and a `target` a line; prompts are put into the model's chat template. Writes the model
(`model/`), metrics and `summary.json`. Started again, it goes on from the last checkpoint.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spark_jax import tokenizers
from spark_jax.data.batches import batch_order
from spark_jax.data.records import Example, read_jsonl
from spark_jax.experiments import launch
from spark_jax.experiments.launch import Config, OnProgress
from spark_jax.prm.examples import tokenize_examples
from spark_jax.reports import plots
from spark_jax.training import optimizer, state
from spark_jax.training.checkpointing import Checkpoints
from spark_jax.training.metrics import MetricsWriter
from spark_jax.training.run_folder import RunFolder
from spark_jax.training.sft import SFTBatch, index_targets, pack, sft_step

SAVE_EVERY = 100


def run(config: Config, path: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Fine-tunes `config.model` in the folder `path`; returns its summary. Progress: updates."""
    launch.check_sft(config)
    config = launch.sub_config(config, "sft")
    loaded = launch.load_trainable(config, config.model)
    examples = task_examples(config, loaded.tokenizer)
    folder = RunFolder.open(path, config)
    if (finished := folder.read_summary()) is not None:
        return finished
    params, summary = fine_tune(
        config.sft, loaded, examples, folder, seed=config.seed, on_progress=on_progress
    )
    launch.save_model(path / "model", loaded._replace(params=params))
    folder.write_summary(summary)
    plots.training_curves(path / "metrics.jsonl", folder.plots)
    return summary


def task_examples(config: Config, tokenizer: Any) -> list[tuple[str, str]]:
    """(prompt, target) of every example, prompts as the model is shown them."""
    task = launch.for_model(launch.load_task(config), tokenizer, config)
    if not config.sft.data:
        if task.examples is None:
            raise launch.ConfigError(
                f"task={config.task!r} has no examples of its own: set sft.data to a JSON-lines "
                "file with a prompt and a target a line"
            )
        made = task.examples(config.sft.num_examples, config.seed, task.text_format)
        return [(example.prompt, example.target) for example in made]
    chat = launch.chat_options(config)
    given = read_jsonl(config.sft.data, Example)
    return [(tokenizers.render(tokenizer, row.prompt, chat), row.target) for row in given]


def fine_tune(
    section: Config,
    loaded: launch.Loaded,
    examples: Sequence[Any],
    folder: RunFolder,
    *,
    seed: int,
    on_progress: OnProgress | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Updates by `section` (steps, batch_size, accumulation_steps, max_length, pack, optimizer) on
    packed or padded examples, from the folder's last checkpoint; parameters and what was counted.

    The updates take over the memory of `loaded.params`, which cannot be used afterwards.
    """
    arrays = tokenize_examples(loaded.tokenizer, examples, max_length=section.max_length)
    counts = {"num_examples": len(arrays["tokens"]), "num_too_long": arrays["num_dropped"]}
    batches = (
        pack(arrays, section.max_length)
        if section.pack
        else index_targets(SFTBatch(arrays["tokens"], arrays["loss_mask"]))
    )
    order = batch_order(len(batches.tokens), section.batch_size, seed)
    train = state.create(loaded.params, make_optimizer(section), jax.random.key(seed))
    update = compiled_step(
        loaded.config, json.dumps(optimizer_settings(section)), section.accumulation_steps
    )
    with Checkpoints(folder.checkpoints, keep=1) as saved, MetricsWriter(folder.path) as metrics:
        restored = saved.restore_latest(train)
        if restored is not None:
            train, _ = restored
        metrics.truncate_after(int(train.step))
        for step in range(int(train.step) + 1, section.steps + 1):
            rows = order[step - 1]
            batch = jax.tree.map(lambda x, rows=rows: jnp.asarray(x[rows]), batches)
            train, values = update(train, batch)
            metrics.scalars(step, {f"train/{name}": value for name, value in values.items()})
            if step % SAVE_EVERY == 0 or step == section.steps:
                saved.save(step, train)
            if on_progress:
                on_progress(step, section.steps)
    return train.params, counts | {"skipped_updates": int(train.skipped)}


def make_optimizer(section: Config) -> Any:
    return optimizer.make(optimizer_settings(section))


@functools.lru_cache(maxsize=8)
def compiled_step(model_config: Any, optimizer_settings: str, accumulation_steps: int) -> Any:
    """One compiled SFT step per setting, shared by all runs of a process."""
    step = functools.partial(
        sft_step,
        model_config=model_config,
        optimizer=optimizer.make(json.loads(optimizer_settings)),
        accumulation_steps=accumulation_steps,
    )
    return jax.jit(step, donate_argnums=0)


def optimizer_settings(section: Config) -> dict[str, Any]:
    return {**section.optimizer.to_dict(), "total_steps": section.steps}


if __name__ == "__main__":
    launch.main(run, launch.check_sft)
