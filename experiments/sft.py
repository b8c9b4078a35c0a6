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

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax.core import FrozenDict

from spark_jax import tokenizers
from spark_jax.data.batches import batch_order
from spark_jax.data.records import Example, read_jsonl
from spark_jax.experiments import checks, configuration, launch, loading
from spark_jax.experiments.base_config import FORMER_DEFAULTS
from spark_jax.experiments.configuration import Config, ConfigError
from spark_jax.experiments.progress import OnProgress
from spark_jax.models.config import ModelConfig
from spark_jax.parallel import processes
from spark_jax.prm.examples import tokenize_examples
from spark_jax.reports import plots
from spark_jax.training import optimizer, programs, spread
from spark_jax.training.checkpointing import Checkpoints
from spark_jax.training.metrics import MetricsWriter
from spark_jax.training.preemption import Preempted, Watch
from spark_jax.training.run_folder import RunFolder
from spark_jax.training.sft import SFTBatch, index_targets, pack, sft_step


@configuration.on_mesh
def run(config: Config, path: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Fine-tunes `config.model` in the folder `path`; returns its summary. Progress: updates."""
    checks.check_sft(config)
    config = configuration.sub_config(config, "remat_save", "sft")
    loaded = loading.load_trainable(config, config.model)
    examples = task_examples(config, loaded.tokenizer)
    folder = RunFolder.open(path, config, FORMER_DEFAULTS)
    if (finished := folder.read_summary()) is not None:
        return finished
    params, summary = fine_tune(
        config.sft, loaded, examples, folder, seed=config.seed, on_progress=on_progress
    )
    loading.save_model(path / "model", loaded._replace(params=params))
    folder.write_summary(summary)
    if processes.is_main():
        plots.training_curves(path / "metrics.jsonl", folder.plots)
    return summary


def task_examples(config: Config, tokenizer: Any) -> list[tuple[str, str]]:
    """(prompt, target) of every example, prompts as the model is shown them."""
    task = loading.for_model(loading.load_task(config), tokenizer, config)
    if not config.sft.data:
        if task.examples is None:
            raise ConfigError(
                f"task={config.task!r} has no examples of its own: set sft.data to a JSON-lines "
                "file with a prompt and a target a line"
            )
        made = task.examples(config.sft.num_examples, config.seed, task.text_format)
        return [(example.prompt, example.target) for example in made]
    chat = configuration.chat_options(config)
    try:
        given = read_jsonl(config.sft.data, Example)
    except ValueError as error:  # names file and line
        raise ConfigError(f"sft.data: {error}") from error
    return [(tokenizers.render(tokenizer, row.prompt, chat), row.target) for row in given]


def fine_tune(
    section: Config,
    loaded: loading.Loaded,
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
    train = spread.new_state(
        loaded.params, make_optimizer(section), jax.random.key(seed), loaded.config
    )
    update = compiled_step(loaded.config, section)
    keep = {"keep": section.keep_checkpoints, "keep_every": section.keep_every}
    with (
        Watch() as watch,
        Checkpoints(folder.checkpoints, **keep) as saved,
        MetricsWriter(folder.path) as metrics,
    ):
        restored = saved.restore_latest(train)
        if restored is not None:
            train, extra = restored
            folder.check_identity(extra)
        metrics.truncate_after(int(train.step))
        if on_progress:
            on_progress(int(train.step), section.steps)
        watch.release()  # every update takes over the state's memory at once
        for step in range(int(train.step) + 1, section.steps + 1):
            batch = jax.tree.map(lambda x, at=order[step - 1]: x[at], batches)
            train, values = update(train, spread.rows(batch))
            metrics.scalars(step, {f"train/{name}": value for name, value in values.items()})
            last, stop = step == section.steps, watch.asked()
            if step % section.save_every == 0 or last or stop:
                saved.save(step, train, folder.identity | {"data": {"seed": seed, "batch": step}})
            if on_progress:
                on_progress(step, section.steps)
            if stop:
                saved.wait()
                raise Preempted(0)
    return train.params, counts | {"skipped_updates": int(train.skipped)}


def make_optimizer(section: Config) -> Any:
    return optimizer.make(optimizer_settings(section))


def compiled_step(model_config: ModelConfig, section: Config) -> Any:
    """The compiled update of a section; see `programs.train_step`."""
    settings = optimizer_settings(section)
    return programs.train_step(
        sft_step, model_config, settings, accumulation_steps=section.accumulation_steps
    )


def optimizer_settings(section: Config) -> FrozenDict[str, Any]:
    return FrozenDict({**section.optimizer.to_dict(), "total_steps": section.steps})


if __name__ == "__main__":
    launch.main(run, checks.check_sft, unit="updates")
