"""Refuses a configuration that cannot work, before anything is computed.

Every check raises ConfigError with the field, its value and how to fix it. A choice or range that
a constructor checks is checked by constructing (`make_or_refuse`); here stands what concerns
several fields, and what nothing else checks.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spark_jax import decoding, tasks
from spark_jax.advantages import ADVANTAGES, AdvantageInputs
from spark_jax.data.formats import REWARD_KINDS
from spark_jax.evaluation.benchmarks import ANSWER_FROM
from spark_jax.experiments import configuration, loading
from spark_jax.experiments.configuration import Config, ConfigError, make_or_refuse
from spark_jax.models import checkpoints
from spark_jax.models import config as model_config
from spark_jax.models.config import ModelConfig
from spark_jax.models.mesh import check_fits
from spark_jax.models.published_shapes import MODEL_SHAPES
from spark_jax.prm.evaluate import JUDGE_KINDS
from spark_jax.response_format import MAX_STEPS, format_ok
from spark_jax.rewards import monitor
from spark_jax.rewards.prm import REWARDS
from spark_jax.training import optimizer
from spark_jax.training.policy import Objective
from spark_jax.verification.aggregate import AGGREGATIONS


def check_common(config: Config) -> None:
    """Checks what every experiment needs: a folder, a task, a model, and how it is computed."""
    if not config.run_dir:
        raise ConfigError("run_dir='' is empty; set it to the folder of the run")
    make_or_refuse("task", lambda: loading.load_task(config))
    model_exists("model", config.model)
    if "://" in config.run_dir:
        raise ConfigError(
            f"run_dir={config.run_dir!r} is not a folder; mount the bucket as one, as "
            "docs/pods.md says, and name that"
        )
    for field in ("dtype", "attention", "remat_save", "decode.cache_dtype"):
        computed = {field.rpartition(".")[2]: configuration.value_of(config, field)}
        make_or_refuse(field, functools.partial(dataclasses.replace, ANY_SHAPE, **computed))
    make_or_refuse("chat", lambda: configuration.chat_options(config))
    _at_least(1, config, "decode.max_new_tokens")
    for field in ("decode.max_prompt_length", "decode.slots"):
        if configuration.value_of(config, field) is not None:
            _at_least(1, config, field)
    _at_least(0, config, "seed")


def check_mesh(
    config: Config, field: str, name: str, rows: int | None = None, made_of: str = ""
) -> None:
    """Checks `config.mesh` against the devices, the rows of a batch, and the shape of a model.

    A hub id has its shape in `models.published_shapes`; a model that is not there either is checked
    when it is loaded, before its weights are.

    Args:
      config: the configuration.
      field: the field that names the model.
      name: the model.
      rows: of a batch, to be spread over devices; None where nothing is trained.
      made_of: the fields that `rows` is the product of, for the message.
    """
    mesh = configuration.make_mesh(config)
    if mesh is None:
        return
    of, shape = f"mesh and {field}={name!r}", _known_config(name)
    if made_of:
        of += f", batch of {made_of}"
    make_or_refuse(of, lambda: check_fits(mesh, batch=rows, config=shape))


def check_stage1(config: Config, *, on_mesh: bool = True) -> None:
    """Checks `config.generate` and `config.verify`.

    Args:
      config: the configuration.
      on_mesh: whether models will be loaded, so that the mesh must fit them.
    """
    if not config.verify.methods:
        raise ConfigError(f"verify.methods is empty; choose from {sorted(AGGREGATIONS)}")
    for method in config.verify.methods:
        _choose("verify.methods", method, AGGREGATIONS)
        if AGGREGATIONS[method].reference:
            _needs_references(config, f"verify.methods={method!r}")
    _at_least(1, config, "generate.num_problems", "generate.samples_per_problem")
    _at_least(1, config, "generate.chunk_size", "verify.chunk_size", "verify.samples_per_solution")
    check_shard(config)
    for section in ("generate", "verify"):
        _sampling(config, section)
        if config[section].model is not None:
            model_exists(f"{section}.model", config[section].model)
        if on_mesh:
            check_mesh(config, f"{section}.model", config[section].model or config.model)


def check_shard(config: Config) -> None:
    """Checks `generate.shard`, which part of how many."""
    shard = config.generate.shard
    whole = len(shard) == 2 and all(isinstance(number, int) for number in shard)
    if not whole or not 0 <= shard[0] < shard[1]:
        raise ConfigError(
            f"generate.shard={tuple(shard)}; give (i, n): the i-th of n parts, i from 0 to n - 1"
        )


def check_sft(config: Config) -> None:
    """Checks `config.sft`."""
    check_fine_tuning(config, "sft")
    if config.sft.data:
        if not Path(config.sft.data).is_file():
            raise ConfigError(f"sft.data={config.sft.data!r} is not a file")
    else:
        _at_least(1, config, "sft.num_examples")


def check_fine_tuning(config: Config, name: str) -> None:
    """Checks what every section of a supervised fine-tuning has.

    Args:
      config: the configuration.
      name: the section, "sft" or "prm".
    """
    section = config[name]
    _at_least(1, config, f"{name}.steps", f"{name}.batch_size", f"{name}.max_length")
    _divides(f"{name}.batch_size", section.batch_size, section.accumulation_steps)
    _optimizer(f"{name}.optimizer", section.optimizer, section.steps)
    _keeping(config, name)
    rows = section.batch_size // section.accumulation_steps
    made_of = f"{name}.batch_size / {name}.accumulation_steps"
    check_mesh(config, f"{name}.model", section.get("model") or config.model, rows, made_of)


def check_prm(config: Config) -> None:
    """Checks `config.prm` and what its evaluation needs."""
    _choose("prm.method", config.prm.method, AGGREGATIONS)
    _choose("prm.kind", config.prm.kind, REWARD_KINDS)
    check_fine_tuning(config, "prm")
    if config.prm.model is not None:
        model_exists("prm.model", config.prm.model)
    check_evaluate(config)


def check_rl(config: Config) -> None:
    """Checks `config.rl`, the kind of its reward model, and what its evaluation needs."""
    rl = config.rl
    _choose("rl.reward", rl.reward, REWARDS)
    _choose("rl.advantage", rl.advantage, ADVANTAGES)
    _choose("prm.kind", config.prm.kind, REWARD_KINDS)
    make_or_refuse("rl.format_checks", lambda: format_ok("", tuple(rl.format_checks)))
    _check_rewards_fit(config)
    _at_least(1, config, "rl.steps", "rl.num_problems", "rl.prompts_per_step", "rl.epochs")
    _at_least(1, config, "rl.evaluate_every")
    _keeping(config, "rl")
    _at_least(2, config, "rl.group_size")  # a group of one has no advantage
    _at_least(0, config, "rl.record.problems")
    if rl.record.every is not None:
        _at_least(1, config, "rl.record.every")
    make_or_refuse("rl.monitor", lambda: monitor.Thresholds(**rl.monitor))
    if rl.temperature != 1:
        raise ConfigError(
            f"rl.temperature={rl.temperature}; it must be 1: the policy gradient is that of the "
            "policy at temperature 1, so samples of another law would bias it"
        )
    if rl.reference_decay is not None and not 0 <= rl.reference_decay < 1:
        raise ConfigError(
            f"rl.reference_decay={rl.reference_decay} is not in [0, 1); None keeps π_ref in place"
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
    _check_advantage_options(rl.advantage, configuration.given(rl.advantage_options))
    _optimizer("rl.optimizer", rl.optimizer, rl.steps)
    # Packed rows are as many as fit; what is scored before it is packed has the rows of a rollout.
    rows = rows * rl.minibatches if rl.pack else rows // rl.accumulation_steps
    parts = "" if rl.pack else " / rl.minibatches / rl.accumulation_steps"
    made_of = f"rl.prompts_per_step * rl.group_size{parts}"
    check_mesh(config, "model", config.model, rows, made_of)
    if rl.reward_model:
        check_mesh(config, "rl.reward_model", rl.reward_model)
    make_or_refuse("rl.objective", lambda: Objective(**configuration.objective_fields(config)))
    check_evaluate(config)


def check_evaluate(config: Config) -> None:
    """Checks `config.evaluate`."""
    evaluate = config.evaluate
    whats = ("policy", "benchmarks", "reward_model", "processbench")
    _choose("evaluate.what", evaluate.what, whats)
    _choose("evaluate.answer_from", evaluate.answer_from, ANSWER_FROM)
    _choose("evaluate.kind", evaluate.kind or config.prm.kind, JUDGE_KINDS)
    if evaluate.what == "processbench" and config.task == "arithmetic_chains":
        raise ConfigError(
            "evaluate.what='processbench' judges real text, for which task='arithmetic_chains' has "
            "no prompts; set task to the one whose prompts to use, such as 'gsm8k'"
        )
    model_exists("evaluate.generator", evaluate.generator)
    check_mesh(config, "model", config.model)
    if evaluate.what == "reward_model":
        check_mesh(config, "evaluate.generator", evaluate.generator)
    _at_least(1, config, "evaluate.num_problems", "evaluate.samples_per_problem")
    _at_least(1, config, "evaluate.num_solutions", "evaluate.votes", "evaluate.chunk_size")
    for field in ("processbench.num_samples", "benchmarks.num_problems"):
        if configuration.value_of(evaluate, field) is not None:
            _at_least(1, config, f"evaluate.{field}")
    for name in evaluate.benchmarks.names:
        if not tasks.known(name):
            _choose("evaluate.benchmarks.names", name, tasks.choices())
    for name in evaluate.benchmarks.samples_per_problem:
        _at_least(1, config, f"evaluate.benchmarks.samples_per_problem.{name}")
    for section in ("generate", "verify", "evaluate"):
        _sampling(config, section)


def _check_rewards_fit(config: Config) -> None:
    """The reward, the reward model's kind and the advantage need each other."""
    rl, reward = config.rl, REWARDS[config.rl.reward]
    if reward.references:
        _needs_references(config, f"rl.reward={rl.reward!r}")
    if reward.judges and config.prm.kind not in reward.judges:
        raise ConfigError(
            f"rl.reward={rl.reward!r} needs a reward model of kind {reward.judges}, but prm.kind="
            f"{config.prm.kind!r}"
        )
    if "verdicts" in ADVANTAGES[rl.advantage].needs and not reward.gives_verdicts:
        judging = [name for name, other in REWARDS.items() if other.gives_verdicts]
        raise ConfigError(
            f"rl.advantage={rl.advantage!r} needs step verdicts, which rl.reward={rl.reward!r} "
            f"does not give; choose one of {judging}"
        )
    if reward.judges and not rl.reward_model:
        raise ConfigError(
            f"rl.reward={rl.reward!r} needs rl.reward_model, the checkpoint folder of a reward "
            "model; train_prm makes one in its run_dir/model, and pipeline makes and uses one"
        )


def _needs_references(config: Config, what: str) -> None:
    if not loading.load_task(config).has_references:
        raise ConfigError(
            f"{what} needs reference answers, which task={config.task!r} with these task_options "
            "does not have"
        )


def _check_advantage_options(name: str, options: dict[str, Any]) -> None:
    """Makes the advantage of shapes: of options that do not fit, and of a function that reads what
    it does not say it needs, a ConfigError."""

    def shapes(rewards: jax.Array) -> Any:
        tokens = jnp.zeros((2, 3))
        inputs = AdvantageInputs(
            rewards=rewards,
            mask=tokens == 0,
            group_size=2,
            policy_logprobs=tokens,
            ref_logprobs=tokens,
            verdicts=jnp.zeros((2, MAX_STEPS), jnp.int8),
            step_ids=jnp.zeros((2, 3), jnp.int32),
            num_steps=MAX_STEPS,
        )
        return ADVANTAGES[name](inputs, **options)

    given = f"rl.advantage_options={options} do not fit {name!r}"
    needs = f"(it says that it needs {sorted(ADVANTAGES[name].needs)} and is handed nothing else)"
    try:
        made = jax.eval_shape(shapes, jax.ShapeDtypeStruct((2,), jnp.float32))
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{given} {needs if not options else ''}: {error}") from error
    if made.shape != (2, 3):
        raise ConfigError(
            f"rl.advantage={name!r} gives shape {made.shape} for 2 responses of 3 tokens; it must "
            "give one number per token, (2, 3)"
        )


def _choose(field: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ConfigError(f"{field}={value!r} is unknown; choose one of {sorted(choices)}")


def _divides(field: str, total: int, parts: int) -> None:
    if parts < 1 or total % parts:
        raise ConfigError(f"{field}={total} does not divide into {parts} equal parts")


def _at_least(least: int, config: Config, *fields: str) -> None:
    for field in fields:
        value = configuration.value_of(config, field)
        if value is None and field in MAY_BE_ALL:
            continue
        if value is None or value < least:
            raise ConfigError(
                f"{field}={configuration.value_of(config, field)}; it must be at least {least}"
            )


# None means all that there are, where a task does not make its problems.
MAY_BE_ALL = (
    "generate.num_problems",
    "rl.num_problems",
    "evaluate.num_problems",
    "evaluate.num_solutions",
)


def _sampling(config: Config, section: str) -> None:
    values = config[section]
    sampling = decoding.Sampling(temperature=values.temperature, top_p=values.top_p)
    make_or_refuse(section, lambda: sampling.per_prompt(1))


def _keeping(config: Config, name: str) -> None:
    """How often a section saves, and what it keeps."""
    _at_least(1, config, f"{name}.save_every", f"{name}.keep_checkpoints")
    if config[name].keep_every is not None:
        _at_least(1, config, f"{name}.keep_every")


def _optimizer(field: str, config: Config, steps: int) -> None:
    make_or_refuse(field, lambda: optimizer.make({**config, "total_steps": steps}))


SHIPPED_MODELS = ("arithmetic_chains", loading.SMOLLM2)
ANY_SHAPE = ModelConfig(  # how a model is computed is checked with any
    vocab_size=1, width=2, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, mlp_width=1
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_exists(field: str, name: str) -> None:
    """Checks that a model is there; whether a hub id exists is seen when it is loaded.

    Args:
      field: the field that names it, for the message.
      name: the model.
    """
    path = Path(name)
    if name in SHIPPED_MODELS or (path.suffix == ".gguf" and path.is_file()):
        return
    if (path / "config.json").is_file() or (not path.exists() and _HUB_ID.fullmatch(name)):
        return
    raise ConfigError(
        f"{field}={name!r} is not a model; give a checkpoint folder (with a config.json), a GGUF "
        f"file, a hub id (owner/name), or one of {SHIPPED_MODELS}"
    )


def _known_config(name: str) -> ModelConfig | None:
    """The shape of a model that is here already or well known, None of another one."""
    if name == "arithmetic_chains":
        from spark_jax.tasks.arithmetic_chains import base

        return checkpoints.read_config(base.PATH)
    if name == loading.SMOLLM2 or Path(name).exists():
        return checkpoints.read_config(loading.model_path(name))
    return model_config.from_hf(MODEL_SHAPES[name]) if name in MODEL_SHAPES else None
