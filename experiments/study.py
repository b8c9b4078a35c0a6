"""The full study: every method of the three stages and of SPRO, with seeds and intervals.

    make demo-full
    python -m spark_jax.experiments.study --config=configs/demo_full.py

Each run is an experiment of its own in a folder of its own; a second start reads what is done and
goes on where the first stopped. After every part it writes what has been found so far: `study.json`
(all numbers), `study.md` (tables) and `plots/*.png`.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from rich.console import Console

from spark_jax.experiments import (
    checks,
    configuration,
    evaluate,
    generate_verifications,
    launch,
    pretrain,
    train_prm,
    train_rl,
)
from spark_jax.experiments.configuration import Config, ConfigError
from spark_jax.experiments.pipeline import base_as_reward_model
from spark_jax.experiments.progress import Job, Jobs, OnProgress, bars
from spark_jax.models import checkpoints
from spark_jax.reports import full_study, plots
from spark_jax.rewards.prm import REWARDS
from spark_jax.tasks.arithmetic_chains.tokenizer import load_tokenizer

VOTING = ("single", "outcome_consistency", "step_consistency")
FEWER = 2  # seeds of what is no headline


def run(config: Config, path: Path) -> dict[str, Any]:
    """The parts `config.study.parts`, in order, under the folder `path`; returns what was found."""
    check(config)
    path.mkdir(parents=True, exist_ok=True)
    console = Console()
    found: dict[str, Any] = {}
    with bars(console) as progress:
        jobs = Jobs(progress, config.study.workers)
        for part in config.study.parts:
            jobs.run(TITLES[part], PARTS[part](config, path))
            jax.clear_caches()  # a process has room for so many compiled programs only
            found = write(config, path)
    for name in ("study.md", "study.json", "plots"):
        console.print(f"{path / name}")
    return found


def write(config: Config, path: Path) -> dict[str, Any]:
    """What the finished runs say, as JSON, Markdown and plots."""
    found = full_study.collect(path, outline(config))
    (path / "study.json").write_text(json.dumps(found, indent=1))
    (path / "study.md").write_text(full_study.as_markdown(found))
    (path / "plots").mkdir(exist_ok=True)
    plots.draw_study(found, path / "plots")
    return found


def stage1(config: Config, path: Path) -> list[Job]:
    """All methods; votes of verifiers that have learned for longer and longer; fewer and fewer
    problems."""
    study = config.study
    jobs = [_stage1_job(config, path / "stage1", seed) for seed in study.seeds]
    for seed in fewer(config):
        for updates in study.verifier_updates:
            jobs.append(_early_verifier_job(config, path, seed, updates))
    for number in study.problem_counts:
        changes = {"generate.num_problems": number, "verify.methods": ("step_consistency",)}
        folder = path / "problems" / str(number)
        jobs += [_stage1_job(config, folder, seed, changes) for seed in fewer(config)]
    return jobs


def stage2(config: Config, path: Path) -> list[Job]:
    """Each kind of reward model from each method's verifications; the base; a weak one; by the
    number of problems."""
    study = config.study
    jobs: list[Job] = [
        (evaluate.run, base_as_reward_model(config, seed), path / "prm" / "base" / f"seed{seed}")
        for seed in study.seeds
    ]
    for kind in study.kinds:
        for method in config.verify.methods:
            for seed in model_seeds(config, f"{kind}/{method}"):
                data = path / "stage1" / f"seed{seed}"
                folder = path / "prm" / kind / method
                jobs.append(_prm_job(config, folder, seed, kind, method, data))
    by_size = {path / "problems" / str(n): path / "prm_by_problems" / str(n) for n in
               study.problem_counts}  # fmt: skip
    weak = path / "verifier" / f"updates_{study.weak_updates}"
    for source, folder in {**by_size, weak: path / "prm" / "weak"}.items():
        for seed in fewer(config):
            data = source / f"seed{seed}"
            jobs.append(_prm_job(config, folder, seed, "prm_cot", "step_consistency", data))
    return jobs


def arms(part: str) -> Callable[[Config, Path], list[Job]]:
    """The RL runs of `config.study.arms[part]`."""

    def make(config: Config, path: Path) -> list[Job]:
        return [
            (
                train_rl.run,
                arm_config(config, arm, seed, path),
                path / "rl" / part / name / f"seed{seed}",
            )
            for name, arm in config.study.arms[part].items()
            for seed in arm_seeds(config, name)
        ]

    return make


def arm_config(config: Config, arm: Config, seed: int, path: Path) -> Config:
    """`config` with the arm's fields of `rl`, nested ones too, and its models."""
    fields = {name: value for name, value in _flat(arm).items() if name not in NOT_OF_RL}
    changes = {"seed": seed, **{f"rl.{name}": value for name, value in fields.items()}}
    if (updates := arm.get("reference_updates")) is not None:
        changes["rl.reference_model"] = str(early_model(path, updates))
    if (asked := asked_model(config, arm)) is not None:
        changes["rl.reward_model"] = str(path / "prm" / asked / f"seed{seed}" / "model")
        changes["prm.kind"] = "prm_cot" if asked == WEAK else asked.split("/")[0]
    return configuration.changed(config, changes)


def asked_model(config: Config, arm: Config) -> str | None:
    """The arm's reward model by its name in the study, None where its reward asks none."""
    if not REWARDS[arm.reward].judges:
        return None
    return arm.get("reward_model") or config.study.reward_model


def model_seeds(config: Config, asked: str) -> Sequence[int]:
    """Those for which stage II makes a reward model."""
    return config.study.seeds if asked.startswith("prm_cot/") else fewer(config)


def arm_seeds(config: Config, name: str) -> Sequence[int]:
    return config.study.seeds if name in config.study.headline else fewer(config)


def baselines(config: Config, part: str) -> dict[str, str]:
    """Arm → what it is compared with: its own `baseline`, or the part's, which has none itself."""
    default = config.study.baselines[part]
    named = {name: arm.get("baseline") or default for name, arm in config.study.arms[part].items()}
    return {name: baseline for name, baseline in named.items() if baseline != name}


def fewer(config: Config) -> Sequence[int]:
    return config.study.seeds[:FEWER]


def outline(config: Config) -> full_study.Outline:
    """Which runs the study consists of, for the report."""
    study = config.study
    return full_study.Outline(
        seeds=tuple(study.seeds),
        fewer=tuple(fewer(config)),
        num_samples=config.verify.samples_per_solution,
        verifier_updates=tuple(study.verifier_updates),
        weak_updates=study.weak_updates,
        problem_counts=tuple(study.problem_counts),
        kinds=tuple(study.kinds),
        methods=tuple(config.verify.methods),
        arms={
            part: {name: tuple(arm_seeds(config, name)) for name in sorted(made)}
            for part, made in study.arms.items()
        },
        baselines={part: baselines(config, part) for part in study.arms},
        pictures={part: groups.to_dict() for part, groups in study.pictures.items()},
    )


def check(config: Config) -> None:
    """The parts exist, and every run of them can work."""
    study = config.study
    for part in study.parts:
        if part not in PARTS:
            raise ConfigError(f"study.parts={part!r} is unknown; have {sorted(PARTS)}")
    if len(study.seeds) < FEWER:
        raise ConfigError(f"study.seeds={study.seeds}: an interval needs at least {FEWER}")
    if study.weak_updates not in study.verifier_updates:
        raise ConfigError(
            f"study.weak_updates={study.weak_updates} is not among "
            f"study.verifier_updates={tuple(study.verifier_updates)}"
        )
    checks.check_stage1(config)
    for kind in study.kinds:
        checks.check_prm(configuration.changed(config, {"prm.kind": kind}))
    for part in (*study.arms, *study.baselines, *study.pictures):
        if part not in study.arms or part not in PARTS:
            have = sorted(set(study.arms) & set(PARTS))
            raise ConfigError(f"{part!r} is no part of study.arms; have {have}")
        if part not in study.baselines:
            raise ConfigError(f"study.baselines has no entry for study.arms.{part}")
    for part, made in study.arms.items():
        _check_named(config, f"study.baselines.{part}", part, [study.baselines[part]])
        for group, names in study.pictures.get(part, {}).items():
            _check_named(config, f"study.pictures.{part}.{group}", part, names)
        for name, arm in made.items():
            if arm.get("baseline"):
                _check_named(config, f"arm {name!r}: baseline", part, [arm.baseline])
            _check_arm(config, name, arm)


def _check_named(config: Config, field: str, part: str, names: Sequence[str]) -> None:
    """Names of arms: of the part, or `<part>/<arm>`."""
    for name in names:
        of, _, arm = name.rpartition("/")
        if arm not in config.study.arms.get(of or part, {}):
            raise ConfigError(f"{field}={name!r} is no arm of that part")


def _check_arm(config: Config, name: str, arm: Config) -> None:
    study = config.study
    have = [WEAK, *(f"{kind}/{method}" for kind in study.kinds for method in config.verify.methods)]
    asked = asked_model(config, arm)
    if asked is not None and asked not in have:
        raise ConfigError(f"arm {name!r}: reward_model={asked!r}; have {have}")
    seeds = arm_seeds(config, name)
    if asked is not None and not set(seeds) <= set(model_seeds(config, asked)):
        raise ConfigError(
            f"arm {name!r} is in study.headline, so it runs with seeds {tuple(seeds)}, but "
            f"reward_model={asked!r} is made for {tuple(model_seeds(config, asked))} only"
        )
    if arm.get("reference_updates") not in (None, *study.verifier_updates):
        raise ConfigError(
            f"arm {name!r}: reference_updates={arm.reference_updates} is not among "
            f"study.verifier_updates={tuple(study.verifier_updates)}"
        )
    try:
        checks.check_rl(arm_config(config, arm, seed=0, path=Path()))
    except (ConfigError, KeyError) as error:
        raise ConfigError(f"arm {name!r}: {error}") from error


def _stage1_job(
    config: Config, folder: Path, seed: int, changes: dict[str, Any] | None = None
) -> Job:
    changed = configuration.changed(config, {"seed": seed, **(changes or {})})
    return generate_verifications.run, changed, folder / f"seed{seed}"


def _early_verifier_job(config: Config, path: Path, seed: int, updates: int) -> Job:
    """The base's solutions, verified by a model pretrained for `updates` alone, which is made
    first."""
    model = early_model(path, updates)
    changes = {"verify.model": str(model), "verify.methods": VOTING}
    _, changed, folder = _stage1_job(config, model.parent, seed, changes)

    def run(config: Config, path: Path, on_progress: OnProgress) -> Any:
        with _MAKING[model]:
            make_early_model(model, updates)
        return generate_verifications.run(config, path, on_progress)

    return run, changed, folder


def early_model(path: Path, updates: int) -> Path:
    """One for all seeds: another pretraining of as few updates can be another verifier by far."""
    return path / "verifier" / f"updates_{updates}" / "model"


def make_early_model(path: Path, updates: int) -> None:
    """The base's pretraining, of fewer updates."""
    if (path / "config.json").is_file():  # which is written last
        return
    settings = pretrain.PretrainSettings(steps=updates)
    params, config = pretrain.pretrain(settings, seed=0)
    checkpoints.save_hf(path, params, config, load_tokenizer())


_MAKING: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)  # of seeds at once


def _prm_job(config: Config, folder: Path, seed: int, kind: str, method: str, data: Path) -> Job:
    changes = {"seed": seed, "prm.kind": kind, "prm.method": method, "prm.data": str(data)}
    return train_prm.run, configuration.changed(config, changes), folder / f"seed{seed}"


def _flat(section: Config, prefix: str = "") -> dict[str, Any]:
    """Fields by their names with dots."""
    fields: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, ml_collections.ConfigDict):
            fields |= _flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


WEAK = "weak"
NOT_OF_RL = ("reward_model", "reference_updates", "baseline")  # fields of an arm for the study
TITLES = {
    "stage1": "Stage I: verifications",
    "stage2": "Stage II: reward models",
    "rewards": "Stage III: rewards and advantages",
    "formats": "Stage III: format checks, hacking",
    "spro": "SPRO",
}
PARTS: dict[str, Callable[[Config, Path], list[Job]]] = {
    "stage1": stage1,
    "stage2": stage2,
    **{part: arms(part) for part in ("rewards", "formats", "spro")},
}


if __name__ == "__main__":
    launch.main(run, check)
