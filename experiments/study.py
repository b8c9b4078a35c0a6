"""The full study: every method of the three stages and of SPRO, with seeds and intervals.

    make demo-full
    python -m spark_jax.experiments.study --config=configs/demo_full.py

Each run is an experiment of its own in a folder of its own; a second start reads what is done and
goes on where the first stopped. After every part it writes what has been found so far: `study.json`
(all numbers), `study.md` (tables) and `plots/*.png`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from rich.console import Console

from spark_jax.experiments import evaluate, generate_verifications, launch, train_prm, train_rl
from spark_jax.experiments.launch import Config
from spark_jax.experiments.pipeline import base_as_reward_model
from spark_jax.experiments.progress import Job, Jobs, bars
from spark_jax.reports import full_study, plots
from spark_jax.rewards.prm import REWARDS_THAT_JUDGE

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
    """All methods; votes of verifiers sampled colder and hotter; fewer and fewer problems."""
    study = config.study
    jobs = [_stage1_job(config, path / "stage1", seed) for seed in study.seeds]
    for temperature in study.verifier_temperatures:
        changes = {"verify.temperature": temperature, "verify.methods": VOTING}
        folder = path / "verifier" / f"temperature_{temperature:g}"
        jobs += [_stage1_job(config, folder, seed, changes) for seed in fewer(config)]
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
            for seed in study.seeds if kind == "prm_cot" else fewer(config):
                data = path / "stage1" / f"seed{seed}"
                folder = path / "prm" / kind / method
                jobs.append(_prm_job(config, folder, seed, kind, method, data))
    by_size = {path / "problems" / str(n): path / "prm_by_problems" / str(n) for n in
               study.problem_counts}  # fmt: skip
    weak = path / "verifier" / f"temperature_{study.weak_temperature:g}"
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
    """`config` with the arm's fields of `rl`, nested ones too, and its reward model."""
    fields = {name: value for name, value in _flat(arm).items() if name != "reward_model"}
    changes = {"seed": seed, **{f"rl.{name}": value for name, value in fields.items()}}
    if fields["reward"] in REWARDS_THAT_JUDGE:
        asked = arm.get("reward_model") or config.study.reward_model
        changes["rl.reward_model"] = str(path / "prm" / asked / f"seed{seed}" / "model")
        changes["prm.kind"] = "prm_cot" if asked == WEAK else asked.split("/")[0]
    return launch.changed(config, changes)


def arm_seeds(config: Config, name: str) -> Sequence[int]:
    return config.study.seeds if name in config.study.headline else fewer(config)


def fewer(config: Config) -> Sequence[int]:
    return config.study.seeds[:FEWER]


def outline(config: Config) -> full_study.Outline:
    """Which runs the study consists of, for the report."""
    study = config.study
    return full_study.Outline(
        seeds=tuple(study.seeds),
        fewer=tuple(fewer(config)),
        num_samples=config.verify.samples_per_solution,
        temperatures=tuple(study.verifier_temperatures),
        problem_counts=tuple(study.problem_counts),
        kinds=tuple(study.kinds),
        methods=tuple(config.verify.methods),
        arms={
            part: {name: tuple(arm_seeds(config, name)) for name in sorted(made)}
            for part, made in study.arms.items()
        },
        baselines=study.baselines.to_dict(),
    )


def check(config: Config) -> None:
    """The parts exist, and every run of them can work."""
    study = config.study
    for part in study.parts:
        if part not in PARTS:
            raise launch.ConfigError(f"study.parts={part!r} is unknown; have {sorted(PARTS)}")
    if len(study.seeds) < FEWER:
        raise launch.ConfigError(f"study.seeds={study.seeds}: an interval needs at least {FEWER}")
    if study.weak_temperature not in study.verifier_temperatures:
        raise launch.ConfigError(
            f"study.weak_temperature={study.weak_temperature} is not among "
            f"study.verifier_temperatures={study.verifier_temperatures}"
        )
    launch.check_stage1(config)
    for kind in study.kinds:
        launch.check_prm(launch.changed(config, {"prm.kind": kind}))
    for part, baseline in study.baselines.items():
        if baseline not in study.arms[part]:
            raise launch.ConfigError(f"study.baselines.{part}={baseline!r} is no arm of that part")
    for made in study.arms.values():
        for name, arm in made.items():
            _check_arm(config, name, arm)


def _check_arm(config: Config, name: str, arm: Config) -> None:
    study = config.study
    have = [f"{kind}/{method}" for kind in study.kinds for method in config.verify.methods]
    asked = arm.get("reward_model") or study.reward_model
    if asked not in (WEAK, *have):
        raise launch.ConfigError(f"arm {name!r}: reward_model={asked!r}; have {[WEAK, *have]}")
    try:
        launch.check_rl(arm_config(config, arm, seed=0, path=Path()))
    except (launch.ConfigError, KeyError) as error:
        raise launch.ConfigError(f"arm {name!r}: {error}") from error


def _stage1_job(
    config: Config, folder: Path, seed: int, changes: dict[str, Any] | None = None
) -> Job:
    changed = launch.changed(config, {"seed": seed, **(changes or {})})
    return generate_verifications.run, changed, folder / f"seed{seed}"


def _prm_job(config: Config, folder: Path, seed: int, kind: str, method: str, data: Path) -> Job:
    changes = {"seed": seed, "prm.kind": kind, "prm.method": method, "prm.data": str(data)}
    return train_prm.run, launch.changed(config, changes), folder / f"seed{seed}"


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
