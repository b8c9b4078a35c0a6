"""How an experiment starts: its configuration from file and command line, and its models.

    python -m spark_jax.experiments.<name> --config=configs/x.py --config.field=value

A configuration that cannot work is refused before anything is computed.
"""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import ml_collections
from absl import app
from ml_collections import config_flags

from spark_jax import decoding
from spark_jax.advantages import ADVANTAGES, AdvantageInputs
from spark_jax.data.formats import REWARD_KINDS
from spark_jax.data.tasks import TASKS
from spark_jax.models import checkpoints, transformer
from spark_jax.models.config import ModelConfig
from spark_jax.rewards.format import FORMAT_CHECKS, MAX_STEPS
from spark_jax.rewards.prm import REWARDS, REWARDS_THAT_JUDGE
from spark_jax.text_generation import DecodeOptions, TextModel
from spark_jax.training import optimizer
from spark_jax.training.policy import Objective
from spark_jax.training.run_folder import OtherRun
from spark_jax.verification.aggregate import AGGREGATIONS

Config = Any  # ml_collections.ConfigDict
OnProgress = Callable[[int, int], None]  # (done, total), in the experiment's own unit

NEEDS_VERDICTS = ("selective", "global_step")


class ConfigError(ValueError):
    """A configuration that cannot work: the message is for the user, a traceback would not help."""


def main(run: Callable[[Config, Path], Any], *checks: Callable[[Config], None]) -> None:
    """Reads `--config`, makes the checks, and calls `run(config, Path(config.run_dir))`."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    flag = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")

    def start(_: Sequence[str]) -> None:
        absl.logging.set_verbosity(absl.logging.WARNING)  # orbax reports every step at INFO
        for check in (check_common, *checks):
            check(flag.value)
        run(flag.value, Path(flag.value.run_dir))

    def guarded(arguments: Sequence[str]) -> None:
        try:
            start(arguments)
        except (ConfigError, OtherRun, FileNotFoundError) as error:
            sys.exit(f"error: {error}")

    try:
        arguments = check_arguments(sys.argv)
    except (ConfigError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    app.run(guarded, argv=arguments)


def check_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--config` resolved: a path, or a file of the installed configs.

    Raises:
      FileNotFoundError: no such config file.
      ConfigError: no `--config`, or a field that the config does not have, with its neighbours.
    """
    if "--config" in arguments[:-1]:  # `--config FILE`, as absl also allows
        at = list(arguments).index("--config")
        arguments = [*arguments[:at], f"--config={arguments[at + 1]}", *arguments[at + 2 :]]
    files = [a.split("=", 1)[1] for a in arguments if a.startswith("--config=")]
    if not files:
        raise ConfigError("--config=FILE is missing, such as --config=configs/demo.py")
    path = config_path(files[-1])
    fields = _fields(load_config(path))
    for argument in arguments:
        name = argument.split("=", 1)[0]
        if name.startswith("--config.") and name.removeprefix("--config.") not in fields:
            field = name.removeprefix("--config.")
            siblings = [f for f in fields if f.rpartition(".")[0] == field.rpartition(".")[0]]
            close = difflib.get_close_matches(field, fields, n=5, cutoff=0.5) or siblings or fields
            raise ConfigError(f"config field {field!r} is unknown; did you mean one of {close}?")
    return [f"--config={path}" if a.startswith("--config=") else a for a in arguments]


def config_path(name: str) -> Path:
    """`name` itself where it is a file, else the file of that name among the installed configs."""
    installed = Path(str(importlib.resources.files("spark_jax.configs"))) / Path(name).name
    for path in (Path(name), installed):
        if path.is_file():
            return path
    have = sorted(p.name for p in installed.parent.glob("*.py") if p.name != "__init__.py")
    raise FileNotFoundError(f"config {name!r} is no file, nor one of {have}")


def load_config(name: str | Path) -> Config:
    """The ConfigDict of a config file."""
    path = config_path(str(name))
    namespace: dict[str, Any] = {"__file__": str(path)}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    return namespace["get_config"]()


def check_common(config: Config) -> None:
    """What every experiment needs: a task, a model, sizes. ConfigError names field and choices."""
    _choose("task", config.task, TASKS)
    _model_exists("model", config.model)
    _at_least(1, config, "decode.max_new_tokens")
    for field in ("decode.max_prompt_length", "decode.slots"):
        if value_of(config, field) is not None:
            _at_least(1, config, field)
    _at_least(0, config, "seed")


def check_stage1(config: Config) -> None:
    """`config.generate` and `config.verify`."""
    if not config.verify.methods:
        raise ConfigError(f"verify.methods is empty; choose from {sorted(AGGREGATIONS)}")
    for method in config.verify.methods:
        _choose("verify.methods", method, AGGREGATIONS)
    _at_least(1, config, "generate.num_problems", "generate.samples_per_problem")
    _at_least(1, config, "generate.chunk_size", "verify.chunk_size", "verify.samples_per_solution")
    for section in ("generate", "verify"):
        _sampling(config, section)


def check_prm(config: Config) -> None:
    """`config.prm` and what its evaluation needs."""
    _choose("prm.method", config.prm.method, AGGREGATIONS)
    _choose("prm.kind", config.prm.kind, REWARD_KINDS)
    _at_least(1, config, "prm.steps", "prm.batch_size", "prm.max_length")
    _divides("prm.batch_size", config.prm.batch_size, config.prm.accumulation_steps)
    _optimizer("prm.optimizer", config.prm.optimizer, config.prm.steps)
    check_evaluate(config)


def check_rl(config: Config) -> None:
    """`config.rl`, the kind of its reward model, and what its evaluation needs."""
    rl = config.rl
    _choose("rl.reward", rl.reward, REWARDS)
    _choose("rl.advantage", rl.advantage, ADVANTAGES)
    _choose("prm.kind", config.prm.kind, REWARD_KINDS)
    for check in rl.format_checks:
        _choose("rl.format_checks", check, FORMAT_CHECKS)
    _check_rewards_fit(config)
    _at_least(1, config, "rl.steps", "rl.num_problems", "rl.prompts_per_step", "rl.epochs")
    _at_least(1, config, "rl.evaluate_every", "rl.save_every")
    _at_least(2, config, "rl.group_size")  # a group of one has no advantage
    if rl.temperature != 1:
        raise ConfigError(
            f"rl.temperature={rl.temperature}; it must be 1: the policy gradient is that of the "
            "policy at temperature 1, so samples of another law would bias it"
        )
    _divides("rl.prompts_per_step", rl.prompts_per_step, rl.minibatches)
    rows = rl.prompts_per_step // rl.minibatches * rl.group_size
    _divides(
        "rows of one update (rl.prompts_per_step / rl.minibatches * rl.group_size)",
        rows,
        rl.accumulation_steps,
    )
    low, high = rl.filter_low, rl.filter_high
    if low is not None and high is not None and low > high:
        raise ConfigError(f"rl.filter_low={low} is above rl.filter_high={high}; no group is left")
    _check_advantage_options(rl.advantage, given(rl.advantage_options))
    _optimizer("rl.optimizer", rl.optimizer, rl.steps)
    _refuse("rl.objective", lambda: Objective(**objective_fields(config)))
    check_evaluate(config)


def check_evaluate(config: Config) -> None:
    """`config.evaluate`."""
    _choose("evaluate.what", config.evaluate.what, ("policy", "reward_model"))
    _model_exists("evaluate.generator", config.evaluate.generator)
    _at_least(1, config, "evaluate.num_problems", "evaluate.samples_per_problem")
    _at_least(1, config, "evaluate.num_solutions", "evaluate.votes")
    _sampling(config, "generate")
    _sampling(config, "verify")
    _refuse(
        "evaluate.temperature",
        lambda: decoding.Sampling(temperature=config.evaluate.temperature).per_prompt(1),
    )


def objective_fields(config: Config) -> dict[str, Any]:
    """`config.rl.objective` with the constant that "sequence_sum_const" divides by."""
    fields = config.rl.objective.to_dict()
    if fields["aggregation"] == "sequence_sum_const":
        fields["sequence_constant"] = config.decode.max_new_tokens
    return fields


def load_model(name: str, *, dtype: str = "float32") -> tuple[transformer.Params, ModelConfig, Any]:
    """Parameters (stacked), configuration and tokenizer of a checkpoint directory, or of the base
    that ships with a task, by the task's name."""
    with _LOADING:
        if name == "arithmetic_chains":
            from spark_jax.data.arithmetic_chains import base

            return base.load()
        from transformers import AutoTokenizer

        params, config = checkpoints.load(name, dtype=dtype)
        return params, config, AutoTokenizer.from_pretrained(name)


_LOADING = threading.Lock()  # importing parts of transformers is not safe in two threads at once


def text_model(
    params: transformer.Params, config: ModelConfig, tokenizer: Any, name: str
) -> TextModel:
    """A model ready to sample text: parameters in the decoding layout."""
    return TextModel(decoding.layout(params, config), config, tokenizer, name)


def decode_options(config: Config) -> DecodeOptions:
    return DecodeOptions(config.decode.max_prompt_length, config.decode.slots)


def sub_config(config: Config, *sections: str, **changes: Any) -> Config:
    """What one stage needs of a larger configuration: its folder depends on nothing else."""
    names = ("seed", "task", "model", "decode", *sections)
    part = ml_collections.ConfigDict({name: config[name] for name in names})
    return changed(part, changes)


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with other values in some fields, named with dots. KeyError for an unknown field."""
    copy = ml_collections.ConfigDict(config.to_dict()).lock()
    copy.update_from_flattened_dict(dict(changes))
    return copy


def given(options: Config) -> dict[str, Any]:
    """The fields that are not None: what was asked for beyond the defaults."""
    return {name: value for name, value in options.items() if value is not None}


def value_of(config: Config, field: str) -> Any:
    """A field named with dots."""
    return functools.reduce(lambda part, name: part[name], field.split("."), config)


def _check_rewards_fit(config: Config) -> None:
    """The reward, the reward model's kind and the advantage need each other."""
    rl, kinds = config.rl, REWARDS_THAT_JUDGE.get(config.rl.reward)
    if kinds is not None and config.prm.kind not in kinds:
        raise ConfigError(
            f"rl.reward={rl.reward!r} needs a reward model of kind {kinds}, but prm.kind="
            f"{config.prm.kind!r}"
        )
    if rl.advantage in NEEDS_VERDICTS and (kinds is None or "prm" not in kinds):
        judging = [name for name, kinds in REWARDS_THAT_JUDGE.items() if "prm" in kinds]
        raise ConfigError(
            f"rl.advantage={rl.advantage!r} needs step verdicts, which rl.reward={rl.reward!r} "
            f"does not give; choose one of {judging}"
        )


def _check_advantage_options(name: str, options: dict[str, Any]) -> None:
    def shapes(rewards: jax.Array) -> jax.Array:
        tokens = jnp.zeros((2, 3))
        inputs = AdvantageInputs(
            rewards=rewards,
            mask=tokens == 0,
            group_size=2,
            policy_logprobs=tokens,
            ref_logprobs=tokens,
            verdicts=jnp.zeros((2, MAX_STEPS), jnp.int8),
            step_ids=jnp.zeros((2, 3), jnp.int32),
        )
        return ADVANTAGES[name](inputs, **options)

    try:
        jax.eval_shape(shapes, jax.ShapeDtypeStruct((2,), jnp.float32))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"rl.advantage_options={options} do not fit {name!r}: {error}") from error


def _choose(field: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ConfigError(f"{field}={value!r} is unknown; choose one of {sorted(choices)}")


def _divides(field: str, total: int, parts: int) -> None:
    if parts < 1 or total % parts:
        raise ConfigError(f"{field}={total} does not divide into {parts} equal parts")


def _at_least(least: int, config: Config, *fields: str) -> None:
    for field in fields:
        if value_of(config, field) < least:
            raise ConfigError(f"{field}={value_of(config, field)}; it must be at least {least}")


def _refuse(field: str, make: Callable[[], Any]) -> None:
    """Makes what a section describes, to see whether it can be made."""
    try:
        make()
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from error


def _sampling(config: Config, section: str) -> None:
    values = config[section]
    sampling = decoding.Sampling(temperature=values.temperature, top_p=values.top_p)
    _refuse(section, lambda: sampling.per_prompt(1))


def _optimizer(field: str, config: Config, steps: int) -> None:
    _refuse(field, lambda: optimizer.make({**config, "total_steps": steps}))


def _model_exists(field: str, name: str) -> None:
    if name not in TASKS and not (Path(name) / checkpoints.WEIGHTS).is_file():
        raise ConfigError(
            f"{field}={name!r} is no folder with {checkpoints.WEIGHTS}, nor one of {sorted(TASKS)}"
        )


def _fields(config: Config, prefix: str = "") -> list[str]:
    names = []
    for name, value in config.items():
        names.append(prefix + name)
        if isinstance(value, ml_collections.ConfigDict):
            names += _fields(value, f"{prefix}{name}.")
    return names
