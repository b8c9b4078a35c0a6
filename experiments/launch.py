"""How an experiment starts: its configuration from file and command line, and its models.

    python -m spark_jax.experiments.<name> --config=configs/x.py --config.field=value

A configuration that cannot work is refused before anything is computed.
"""

from __future__ import annotations

import difflib
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
from spark_jax.text_generation import TextModel
from spark_jax.verification.aggregate import AGGREGATIONS

Config = Any  # ml_collections.ConfigDict
OnProgress = Callable[[int, int], None]  # (done, total), in the experiment's own unit

NEEDS_VERDICTS = ("selective", "global_step")


def main(run: Callable[[Config, Path], Any]) -> None:
    """Reads `--config`, checks it, and calls `run(config, Path(config.run_dir))`."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    flag = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
    try:
        arguments = check_arguments(sys.argv)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")

    def start(_: Sequence[str]) -> None:
        absl.logging.set_verbosity(absl.logging.WARNING)  # orbax reports every step at INFO
        try:
            validate(flag.value)
        except ValueError as error:
            sys.exit(f"error: {error}")
        run(flag.value, Path(flag.value.run_dir))

    app.run(start, argv=arguments)


def check_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--config` resolved: a path, or a file of the installed configs.

    Raises:
      FileNotFoundError: no such config file.
      ValueError: no `--config`, or a field that the config does not have, with its neighbours.
    """
    files = [a.split("=", 1)[1] for a in arguments if a.startswith("--config=")]
    if not files:
        raise ValueError("--config=FILE is missing, such as --config=configs/demo.py")
    path = config_path(files[-1])
    fields = _fields(load_config(path))
    for argument in arguments:
        name = argument.split("=", 1)[0]
        if name.startswith("--config.") and name.removeprefix("--config.") not in fields:
            field = name.removeprefix("--config.")
            siblings = [f for f in fields if f.rpartition(".")[0] == field.rpartition(".")[0]]
            close = difflib.get_close_matches(field, fields, n=5, cutoff=0.5) or siblings or fields
            raise ValueError(f"config field {field!r} is unknown; did you mean one of {close}?")
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


def validate(config: Config) -> None:
    """Refuses unknown names, parts that do not fit together and splits that do not divide.

    Raises:
      ValueError: names the field, its value, and the choices.
    """
    _choose("task", config.task, TASKS)
    for method in config.verify.methods:
        _choose("verify.methods", method, AGGREGATIONS)
    _choose("prm.method", config.prm.method, AGGREGATIONS)
    if config.prm.method not in config.verify.methods:
        raise ValueError(
            f"prm.method={config.prm.method!r} is not among verify.methods="
            f"{tuple(config.verify.methods)}; add it there"
        )
    _choose("prm.kind", config.prm.kind, REWARD_KINDS)
    _divides("prm.batch_size", config.prm.batch_size, config.prm.accumulation_steps)
    validate_rl(config)


def validate_rl(config: Config) -> None:
    """The checks of `validate` that concern `config.rl`."""
    rl = config.rl
    _choose("rl.reward", rl.reward, REWARDS)
    _choose("rl.advantage", rl.advantage, ADVANTAGES)
    for check in rl.format_checks:
        _choose("rl.format_checks", check, FORMAT_CHECKS)
    kinds = REWARDS_THAT_JUDGE.get(rl.reward)
    if kinds is not None and config.prm.kind not in kinds:
        raise ValueError(
            f"rl.reward={rl.reward!r} needs a reward model of kind {kinds}, but prm.kind="
            f"{config.prm.kind!r}"
        )
    if rl.advantage in NEEDS_VERDICTS and (kinds is None or "prm" not in kinds):
        judging = [name for name, kinds in REWARDS_THAT_JUDGE.items() if "prm" in kinds]
        raise ValueError(
            f"rl.advantage={rl.advantage!r} needs step verdicts, which rl.reward={rl.reward!r} "
            f"does not give; choose one of {judging}"
        )
    if rl.group_size < 1 or rl.prompts_per_step < 1:
        raise ValueError(
            f"rl.prompts_per_step={rl.prompts_per_step} and rl.group_size={rl.group_size} must be "
            "at least 1"
        )
    _divides("rl.prompts_per_step", rl.prompts_per_step, rl.minibatches)
    rows = rl.prompts_per_step // rl.minibatches * rl.group_size
    _divides(
        "rows of one update (rl.prompts_per_step / rl.minibatches * rl.group_size)",
        rows,
        rl.accumulation_steps,
    )
    _check_advantage_options(rl.advantage, given(rl.advantage_options))


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
    except TypeError as error:
        raise ValueError(f"rl.advantage_options={options} do not fit {name!r}: {error}") from error


def _choose(field: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{field}={value!r} is unknown; choose one of {sorted(choices)}")


def _divides(field: str, total: int, parts: int) -> None:
    if parts < 1 or total % parts:
        raise ValueError(f"{field}={total} does not divide into {parts} equal parts")


def _fields(config: Config, prefix: str = "") -> list[str]:
    names = []
    for name, value in config.items():
        names.append(prefix + name)
        if isinstance(value, ml_collections.ConfigDict):
            names += _fields(value, f"{prefix}{name}.")
    return names
