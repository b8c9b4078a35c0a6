"""The programs of a run as they are compiled: the functions that the experiments call, the settings
of their configuration, the shapes of their arrays, and no arrays.

Every prompt and response is taken as long as the configuration allows, every token of a packed row
of a fine-tuning as a target: what fits then fits always. `decode.max_prompt_length` has to be set.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from spark_jax import decoding
from spark_jax.decoding import decoder
from spark_jax.decoding.generate import prepare
from spark_jax.experiments import configuration, loading, rl_setup, sft
from spark_jax.experiments.configuration import Config, ConfigError
from spark_jax.models import config as model_config
from spark_jax.models import transformer
from spark_jax.models.config import ModelConfig
from spark_jax.models.published_shapes import MODEL_SHAPES
from spark_jax.parallel.sharding import (
    batch_sharding,
    batch_shards,
    named_shardings,
    replicated,
)
from spark_jax.rewards.prm import REWARDS
from spark_jax.tasks.arithmetic_chains import base
from spark_jax.text_generation import longest_prompt
from spark_jax.training import state
from spark_jax.training.packing import pack_policy_batch
from spark_jax.training.policy import Objective, PolicyBatch, compiled_score
from spark_jax.training.sft import SFTBatch


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run.

    Attributes:
      name: its stage and what it does, such as "rl/policy_step".
      model: the name of the model it runs.
      lower: traces it; what it gives can be compiled. To be called with the mesh in scope.
      beside: by name, bytes on a device of what lies there meanwhile and is no argument of it.
      rows: sequences that it works on at once: slots, prompts, rows of a batch.
      positions: tokens of each of these.
    """

    name: str
    model: str
    lower: Callable[[], Any]
    beside: dict[str, int]
    rows: int
    positions: int


def programs(config: Config, mesh: Mesh) -> list[Program]:
    """All programs of `pipeline` with this configuration over a mesh, stage by stage.

    Raises:
      ConfigError: a size that is left open, or a model whose shape is not known here.
      ValueError: a mesh that does not divide a model.
    """
    if config.decode.max_prompt_length is None:
        raise ConfigError("decode.max_prompt_length is None; the programs' shapes depend on it")
    fine_tuned = [_sft(config, mesh, "sft", config.model)] if config.pipeline.sft else []
    reward_model = config.prm.model or config.model
    return [
        *fine_tuned,
        *_stage_one(config, mesh),
        _sft(config, mesh, "prm", reward_model),
        *_rl(config, mesh, reward_model),
    ]


def model_shape(config: Config, name: str) -> ModelConfig:
    """The shape of a model by its name: that of a checkpoint folder, of a model that ships, of
    `models.published_shapes`, or of the `config.json` on the hub, in this order."""
    file = Path(name) / "config.json"
    if name == "arithmetic_chains":
        file = Path(base.__file__).parent / "base" / "config.json"
    if file.is_file():
        fields = json.loads(file.read_text())
    elif name in MODEL_SHAPES:
        fields = MODEL_SHAPES[name]
    else:
        fields = _from_hub(name)
    return loading.how_computed(model_config.from_hf(fields, dtype=config.dtype), config)


def bytes_per_device(arrays: Any) -> int:
    """Of shapes with shardings, on the device that holds most."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(arrays)
    )


# --- the stages ----------------------------------------------------------------------------------


def _stage_one(config: Config, mesh: Mesh) -> list[Program]:
    generate, verify = config.generate, config.verify
    problems = min(generate.chunk_size, generate.num_problems or generate.chunk_size)
    checked = min(verify.chunk_size, generate.num_problems or verify.chunk_size)
    return [
        *_decoding(
            config,
            mesh,
            "generate",
            generate.model or config.model,
            prompts=problems,
            samples=generate.samples_per_problem,
            sampling=decoding.Sampling(temperature=generate.temperature, top_p=generate.top_p),
        ),
        *_decoding(
            config,
            mesh,
            "verify",
            verify.model or config.model,
            prompts=checked * generate.samples_per_problem,
            samples=verify.samples_per_solution,
            sampling=decoding.Sampling(temperature=verify.temperature, top_p=verify.top_p),
        ),
    ]


def _rl(config: Config, mesh: Mesh, reward_model: str) -> list[Program]:
    rl, policy = config.rl, model_shape(config, config.model)
    reward_model = rl.reward_model or reward_model
    judge = model_shape(config, reward_model)
    held = {
        "train state": _state(policy, rl_setup.make_optimizer(config), mesh),
        "policy to sample from": _params(policy, policy.dtype, mesh),
    }
    if rl_setup.needs_reference(config):
        dtype = config.dtype if rl.reference_model else "float32"
        held["reference policy"] = _params(policy, dtype, mesh)
    if REWARDS[rl.reward].judges:
        held["reward model"] = _params(judge, judge.dtype, mesh)

    def beside(argument: str) -> dict[str, int]:
        return {name: bytes_per_device(x) for name, x in held.items() if name != argument}

    found = _decoding(
        config,
        mesh,
        "rl",
        config.model,
        prompts=rl.prompts_per_step,
        samples=rl.group_size,
        sampling=decoding.Sampling(temperature=rl.temperature),
        beside=beside("policy to sample from"),
    )
    if "reward model" in held:
        found += _decoding(
            config,
            mesh,
            "rl/judge",
            reward_model,
            prompts=rl.prompts_per_step * rl.group_size,
            samples=1,
            sampling=decoding.Sampling(greedy=True),
            beside=beside("reward model"),
        )
    if (reference := held.get("reference policy")) is not None:
        found.append(_score(config, mesh, policy, reference, beside("reference policy")))
    train = held["train state"]
    return [*found, _policy_step(config, mesh, policy, train, beside("train state"))]


# --- the programs --------------------------------------------------------------------------------


def _decoding(
    config: Config,
    mesh: Mesh,
    stage: str,
    name: str,
    *,
    prompts: int,
    samples: int,
    sampling: decoding.Sampling,
    beside: dict[str, int] | None = None,
) -> list[Program]:
    """The decoder, and the prefill that is a part of it on its own."""
    model, options = model_shape(config, name), configuration.decode_options(config)
    length = longest_prompt(model, config.decode.max_new_tokens, options)
    # Different from the first token on: no template to share, which would take less memory.
    texts = [[i % model.vocab_size] + [0] * (length - 1) for i in range(prompts)]
    with jax.set_mesh(mesh):
        work = prepare(
            model,
            texts,
            sampling=dataclasses.replace(sampling, stop_ids=(0, 1)),
            samples_per_prompt=samples,
            max_new_tokens=config.decode.max_new_tokens,
            **dataclasses.asdict(options) | {"max_prompt_length": length},
        )
    params, key = _params(model, model.dtype, mesh), _whole(_key(), mesh)
    shape, own_length = work.shape, work.requests.tokens.shape[1]
    some = (np.zeros((shape.prefill, own_length), np.int32), np.zeros(shape.prefill, np.int32))

    def prefill() -> Any:
        run = jax.jit(transformer.prefill, static_argnums=1)
        return run.lower(params, model, *_whole(some, mesh))

    def decode() -> Any:
        requests = _whole(work.requests, mesh)
        return decoder.decode.lower(params, requests, key, config=model, shape=shape)

    slots, positions = shape.lanes * shape.width, own_length + shape.columns
    return [
        Program(f"{stage}/prefill", name, prefill, beside or {}, shape.prefill, own_length),
        Program(f"{stage}/decode", name, decode, beside or {}, slots, positions),
    ]


def _sft(config: Config, mesh: Mesh, stage: str, name: str) -> Program:
    section, model = config[stage], model_shape(config, name)
    size = (section.batch_size, section.max_length)
    batch = SFTBatch(
        tokens=np.broadcast_to(np.int32(0), size),
        loss_mask=np.broadcast_to(np.bool_(True), size),
        segment_ids=np.broadcast_to(np.int32(1), size) if section.pack else None,
        target_index=np.broadcast_to(np.int32(0), size),
    )

    def lower() -> Any:
        step = sft.compiled_step(model, section)
        return step.lower(_state(model, sft.make_optimizer(section), mesh), _rows(batch, mesh))

    return Program(f"{stage}/sft_step", name, lower, {}, *size)


def _score(
    config: Config, mesh: Mesh, model: ModelConfig, params: Any, beside: dict[str, int]
) -> Program:
    batch = _policy_batch(config, model, config.rl.prompts_per_step * config.rl.group_size)
    parts = (batch.prompt_tokens, batch.prompt_mask, batch.tokens, batch.mask)

    def lower() -> Any:
        score = compiled_score(model, rl_setup.score_parts(config))
        return score.lower(params, *_rows(parts, mesh))

    return Program("rl/score", config.model, lower, beside, *_size(batch))


def _policy_step(
    config: Config, mesh: Mesh, model: ModelConfig, train: Any, beside: dict[str, int]
) -> Program:
    rl = config.rl
    batch: Any = _policy_batch(config, model, rl.prompts_per_step // rl.minibatches * rl.group_size)
    rows, positions = _size(batch)
    if rl.pack:
        objective = Objective(**configuration.objective_fields(config))
        with jax.set_mesh(mesh):
            multiple = rl.accumulation_steps * batch_shards()
        batch = pack_policy_batch(batch, objective, rows_multiple_of=multiple)
        rows, positions = batch.tokens.shape

    def lower() -> Any:
        step = rl_setup.compiled_step(config, model)
        return step.lower(train, _rows(batch, mesh))

    return Program("rl/policy_step", config.model, lower, beside, rows, positions)


# --- arrays --------------------------------------------------------------------------------------


def _policy_batch(config: Config, model: ModelConfig, rows: int) -> PolicyBatch:
    """Prompts and responses of full length, in NumPy, of which one number is in memory."""
    response = config.decode.max_new_tokens
    prompt = longest_prompt(model, response, configuration.decode_options(config))

    def filled(value: Any, width: int = response) -> np.ndarray:
        return np.broadcast_to(value, (rows, width))

    numbers, counted = filled(np.float32(0)), filled(np.bool_(True))
    reference = numbers if rl_setup.needs_reference(config) else None
    return PolicyBatch(
        prompt_tokens=filled(np.int32(0), prompt),
        prompt_mask=filled(np.bool_(True), prompt),
        tokens=filled(np.int32(0)),
        mask=counted,
        old_logprobs=numbers,
        advantages=numbers,
        ref_logprobs=reference,
    )


def _size(batch: PolicyBatch) -> tuple[int, int]:
    return len(batch.tokens), batch.prompt_tokens.shape[1] + batch.tokens.shape[1]


def _params(model: ModelConfig, dtype: str, mesh: Mesh) -> transformer.Params:
    shapes = transformer.shapes(dataclasses.replace(model, dtype=dtype))
    return _placed(shapes, named_shardings(transformer.logical_axes(model), shapes, mesh))


def _state(model: ModelConfig, optimizer: Any, mesh: Mesh) -> state.TrainState:
    def make() -> state.TrainState:
        key = jax.random.key(0)
        return state.create(transformer.init(model, key), optimizer, key)

    shapes = jax.eval_shape(make)
    return _placed(shapes, state.state_shardings(shapes, model, mesh))


def _rows(arrays: Any, mesh: Mesh) -> Any:
    """A batch as the host hands it to a program: rows spread over the devices."""
    return jax.tree.map(
        lambda x: _array(x.shape, x.dtype, batch_sharding(mesh) if x.ndim else replicated(mesh)),
        arrays,
    )


def _whole(arrays: Any, mesh: Mesh) -> Any:
    """Arrays that every device has whole, as NumPy arrays are handed to a program."""
    return jax.tree.map(lambda x: _array(x.shape, x.dtype, replicated(mesh)), arrays)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, where: _array(x.shape, x.dtype, where), shapes, shardings)


def _array(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _from_hub(name: str) -> dict[str, Any]:
    try:
        from huggingface_hub import hf_hub_download

        return json.loads(Path(hf_hub_download(name, "config.json")).read_text())
    except Exception as error:
        raise ConfigError(
            f"model {name!r}: no folder with a config.json, none of models.published_shapes, and "
            f"its config.json cannot be fetched from the hub: {error}"
        ) from error
