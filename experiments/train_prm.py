"""SPARK stage II: a generative reward model by supervised fine-tuning on stage I's verifications.

    python -m spark_jax.experiments.train_prm --config=configs/demo.py \
        --config.run_dir=runs/prm --config.prm.data=runs/stage1 --config.prm.kind=prm_cot

Writes the reward model (`model/`, a Hugging Face checkpoint), metrics and its F1 on held-out
solutions (`summary.json`). Started again, it goes on from the last checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spark_jax import tasks
from spark_jax.experiments import (
    checks,
    configuration,
    evaluate,
    generate_verifications,
    launch,
    loading,
    sft,
)
from spark_jax.experiments.base_config import FORMER_DEFAULTS
from spark_jax.experiments.configuration import Config
from spark_jax.experiments.progress import OnProgress
from spark_jax.parallel import processes
from spark_jax.reports import plots
from spark_jax.training.run_folder import RunFolder
from spark_jax.verification.aggregate import balance
from spark_jax.verification.targets import TrainingPair, aggregated_by, training_pairs


@configuration.on_mesh
def run(config: Config, path: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Stage II in the folder `path`; returns its summary. Progress is in updates."""
    checks.check_prm(config)
    config = configuration.sub_config(config, "remat_save", "generate", "verify", "prm", "evaluate")
    task = loading.load_task(config)
    loaded = loading.load_trainable(config, config.prm.model or config.model)
    pairs, counts = examples(config, loading.for_model(task, loaded.tokenizer, config))
    folder = RunFolder.open(path, config, FORMER_DEFAULTS)
    if (finished := folder.read_summary()) is not None:
        return finished

    params, trained = sft.fine_tune(
        config.prm, loaded, pairs, folder, seed=config.seed, on_progress=on_progress
    )
    loading.save_model(path / "model", loaded._replace(params=params))
    model = loading.text_model(*loaded._replace(params=params), name=str(path / "model"))
    held_out = evaluate.held_out_solutions(config, task)
    shown = loading.for_model(task, loaded.tokenizer, config)
    summary = {
        **trained,
        **counts,
        "held_out": evaluate.reward_model_scores(config, shown, model, config.prm.kind, *held_out),
    }
    folder.write_summary(summary)
    if processes.is_main():
        plots.training_curves(path / "metrics.jsonl", folder.plots)
    return summary


def examples(config: Config, task: tasks.Task) -> tuple[list[TrainingPair], dict[str, Any]]:
    """Prompt and target of every solution that the method verified, balanced if asked for."""
    problems, solutions, verified = generate_verifications.load(config, task)
    counts: dict[str, Any] = {}
    if config.prm.balance:
        judged = [(r.problem_id, aggregated_by(r, config.prm.method)) for r in verified]
        kept, counts["balance"] = balance(judged, key=config.seed)
        verified = [verified[i] for i in kept]
    pairs, without = training_pairs(
        task.text_format, config.prm.kind, config.prm.method, problems, solutions, verified
    )
    return pairs, counts | {"without_verification": without}


if __name__ == "__main__":
    launch.main(run, checks.check_prm, unit="updates")
