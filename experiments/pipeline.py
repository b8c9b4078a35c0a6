"""The whole method, from a base model to better policies: stages I, II and III, and SPRO.

    python -m spark_jax.experiments.pipeline --config=configs/demo.py

For every seed of `pipeline.seeds`: stage I makes step-by-step verifications without references,
stage II a reward model from those of each method of `verify.methods` (and evaluates what it starts
from), stage III a policy for each of `pipeline.arms`, with the reward model of `prm.method` where
its reward asks one. Each part is the experiment of its own name in a folder of its own; rerunning
the command resumes. Writes `summary.json`, `plots/*.png` and closing tables, which it also prints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from spark_jax.experiments import (
    checks,
    configuration,
    evaluate,
    generate_verifications,
    launch,
    report,
    sft,
    train_prm,
    train_rl,
)
from spark_jax.experiments.base_config import FORMER_DEFAULTS
from spark_jax.experiments.configuration import Config, ConfigError
from spark_jax.experiments.progress import Bar, Jobs, bars
from spark_jax.parallel import processes
from spark_jax.reports import plots, study, tables
from spark_jax.training.run_folder import RunFolder

BASE = "base"


def run(config: Config, path: Path) -> dict[str, Any]:
    """Makes all runs of `config.pipeline` in folders below `path`; returns the summary."""
    check(config)
    if config.quick:
        config, path = quick_version(config), path.with_name(f"{path.name}-quick")
    folder = RunFolder.open(path, config, FORMER_DEFAULTS)
    console = Console(quiet=not processes.is_main())
    with bars(console) as progress:
        if config.pretrain:
            config = make_base(config, path / BASE, progress)
        if config.pipeline.sft:
            config = fine_tuned_base(config, path / "sft", progress)
        jobs = Jobs(progress, config.pipeline.workers)
        seeds = list(config.pipeline.seeds)
        jobs.run(
            "Stage I: verifications",
            [
                (generate_verifications.run, seed_config(config, seed), path / stage1(seed))
                for seed in seeds
            ],
        )
        jobs.run(
            "Stage II: reward models",
            [
                (evaluate.run, base_as_reward_model(config, seed), path / prm(seed, BASE))
                for seed in seeds
            ]
            + [
                (train_prm.run, prm_config(config, path, seed, method), path / prm(seed, method))
                for seed in seeds
                for method in config.verify.methods
            ],
        )
        jobs.run(
            "Stage III: policies",
            [
                (
                    train_rl.run,
                    arm_config(config, arm, seed, _reward_model(config, path, seed)),
                    path / rl(seed, name),
                )
                for seed in seeds
                for name, arm in config.pipeline.arms.items()
            ],
        )

    results = processes.on_main(
        lambda: study.collect(
            path,
            seeds=seeds,
            methods=(BASE, *config.verify.methods),
            arms=list(config.pipeline.arms),
            folders=study.Folders(stage1, prm, rl),
        )
    )
    folder.write_summary(results)
    if not processes.is_main():
        return results
    (path / "tables.txt").write_text(tables.as_text(results))
    made = plots.draw(results, folder.plots)
    tables.show(results, console)
    console.print(f"summary: {path / 'summary.json'}")
    console.print(f"page:    {report.write(path)}")
    for plot in made:
        console.print(f"plot:    {plot}")
    return results


def stage1(seed: int) -> str:
    return f"seed{seed}/stage1"


def prm(seed: int, method: str) -> str:
    return f"seed{seed}/prm_{method}"


def rl(seed: int, arm: str) -> str:
    return f"seed{seed}/rl_{arm}"


def seed_config(config: Config, seed: int) -> Config:
    return configuration.changed(config, {"seed": seed})


def base_as_reward_model(config: Config, seed: int) -> Config:
    """What the reward models start from, asked for a verification: what stage II has to beat."""
    start = config.prm.model or config.model
    changes = {"evaluate.what": "reward_model", "evaluate.kind": None, "prm.kind": "prm_cot"}
    return configuration.changed(config, {"seed": seed, "model": start, **changes})


def prm_config(config: Config, path: Path, seed: int, method: str) -> Config:
    changes = {"seed": seed, "prm.method": method, "prm.data": str(path / stage1(seed))}
    return configuration.changed(config, changes)


def arm_config(config: Config, arm: Config, seed: int, reward_model: str) -> Config:
    """One run of stage III: the arm's fields of `config.rl` over the common ones."""
    changes = {f"rl.{field}": value for field, value in arm.items()}
    return configuration.changed(config, {"seed": seed, "rl.reward_model": reward_model, **changes})


def check(config: Config) -> None:
    """Checks all stages, and every arm of the last one."""
    checks.check_stage1(config)
    checks.check_prm(config)
    if config.pipeline.sft:
        checks.check_sft(config)
    if config.prm.method not in config.verify.methods:
        raise ConfigError(
            f"prm.method={config.prm.method!r} is not among verify.methods="
            f"{tuple(config.verify.methods)}; add it there"
        )
    for name in ("seeds", "arms"):
        if not config.pipeline[name]:
            raise ConfigError(f"pipeline.{name} is empty; give at least one")
    if config.pipeline.workers < 1:
        raise ConfigError(f"pipeline.workers={config.pipeline.workers}; needs at least 1")
    if config.pipeline.workers > 1 and jax.process_count() > 1:
        raise ConfigError(
            f"pipeline.workers={config.pipeline.workers} with {jax.process_count()} processes, "
            "which must run their programs in one order; set pipeline.workers=1"
        )
    if config.generate.shard[1] > 1:
        raise ConfigError(
            f"generate.shard={tuple(config.generate.shard)}: a pipeline makes all of stage I; "
            "leave it at (0, 1)"
        )
    to_come = prm(0, config.prm.method)  # what stage II leaves is not there yet
    for arm in config.pipeline.arms.values():
        checks.check_rl(arm_config(config, arm, seed=0, reward_model=to_come))


def quick_version(config: Config) -> Config:
    """One seed and smaller runs: enough to see every part work, not enough for an interval."""
    shares = {
        "generate.num_problems": (1, 2),
        "prm.steps": (1, 2),
        "rl.steps": (3, 5),
        "evaluate.num_problems": (1, 2),
        "evaluate.samples_per_problem": (1, 2),
    }
    changes: dict[str, Any] = {"pipeline.seeds": tuple(config.pipeline.seeds)[:1]}
    for field, (part, whole) in shares.items():
        value = configuration.value_of(config, field)
        if value is None:
            raise ConfigError(f"quick=True takes a share of {field}, which is None; set it")
        changes[field] = -(-value * part // whole)
    return configuration.changed(config, changes)


def make_base(config: Config, path: Path, progress: Progress) -> Config:
    """Pretrains the base afresh into `path` and uses it from here on."""
    from spark_jax.experiments import pretrain

    if not (path / "config.json").exists():
        settings = pretrain.PretrainSettings()
        bar = Bar(progress, "Base: pretraining", "updates")
        pretrain.run(
            path,
            seed=config.seed,
            settings=settings,
            on_progress=lambda step, _: bar.report(step, settings.steps),
        )
    processes.exchange(None)  # the first process writes it
    return configuration.changed(config, {"model": str(path), "evaluate.generator": str(path)})


def fine_tuned_base(config: Config, path: Path, progress: Progress) -> Config:
    """Teaches the model the formats, into `path`, and uses the result from here on."""
    sft.run(config, path, Bar(progress, "Base: fine-tuning on formats", "updates").report)
    model = str(path / "model")
    return configuration.changed(config, {"model": model, "evaluate.generator": model})


def _reward_model(config: Config, path: Path, seed: int) -> str:
    return str(path / prm(seed, config.prm.method) / "model")


if __name__ == "__main__":
    launch.main(run, check)
