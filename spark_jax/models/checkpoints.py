"""Hugging Face checkpoints in and out: `config.json` and `model.safetensors` in one directory.

What `save_hf` writes, transformers and vLLM load; what `load` reads may come from either.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spark_jax.models import config as model_config
from spark_jax.models.config import ModelConfig
from spark_jax.models.transformer import Layer, Params

WEIGHTS = "model.safetensors"


def load(path: str | Path, *, dtype: str = "float32") -> tuple[Params, ModelConfig]:
    """Loads a checkpoint directory; parameters and compute are in `dtype`, layers stacked.

    Raises:
      FileNotFoundError: no config or weights in `path`.
      ValueError: an unsupported architecture; a missing, extra or mis-shaped tensor, by name.
    """
    path = Path(path)
    for name in ("config.json", WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} does not exist; not a checkpoint directory")
    from safetensors.flax import load_file

    config = model_config.from_hf(json.loads((path / "config.json").read_text()), dtype=dtype)
    return from_hf_tensors(load_file(path / WEIGHTS), config, source=str(path)), config


def save_hf(path: str | Path, params: Params, config: ModelConfig, tokenizer: Any = None) -> None:
    """Writes config, weights (in the parameters' dtype) and, where given, the tokenizer."""
    from safetensors.flax import save_file

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(to_hf_tensors(params, config), path / WEIGHTS, metadata={"format": "pt"})
    hf = {**model_config.to_hf(config), "dtype": jnp.dtype(params.embedding.dtype).name}
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
        hf |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (path / "config.json").write_text(json.dumps(hf, indent=2) + "\n")


def from_hf_tensors(tensors: Mapping[str, Any], config: ModelConfig, *, source: str) -> Params:
    """Hugging Face names and [out, in] matrices → `Params` with stacked layers."""
    remaining = dict(tensors)

    def take(name: str, leaf: _Leaf) -> jax.Array:
        if name not in remaining:
            raise ValueError(f"{source}: tensor {name!r} is missing")
        tensor = remaining.pop(name)
        if tuple(tensor.shape) != leaf.hf_shape:
            raise ValueError(f"{source}: {name!r} has shape {tensor.shape}, needs {leaf.hf_shape}")
        return jnp.asarray(leaf.from_hf(tensor), config.compute_dtype)

    layers = {
        field: jnp.stack([take(leaf.name.format(i), leaf) for i in range(config.num_layers)])
        for field, leaf in _layer_leaves(config).items()
    }
    rest = {field: take(leaf.name, leaf) for field, leaf in _outer_leaves(config).items()}
    if config.tied_embeddings:
        remaining.pop("lm_head.weight", None)  # some exporters write the tied matrix twice
    if remaining:
        raise ValueError(f"{source}: tensors this architecture does not have: {sorted(remaining)}")
    return Params(layers=Layer(**layers), **rest)


def to_hf_tensors(params: Params, config: ModelConfig) -> dict[str, jax.Array]:
    """`Params` with stacked layers → Hugging Face names and layout."""
    tensors = {}
    for field, leaf in _layer_leaves(config).items():
        for i, value in enumerate(getattr(params.layers, field)):
            tensors[leaf.name.format(i)] = leaf.to_hf(value)
    for field, leaf in _outer_leaves(config).items():
        tensors[leaf.name] = leaf.to_hf(getattr(params, field))
    return tensors


class _Leaf(NamedTuple):
    """Where a parameter lives in a Hugging Face checkpoint, and how its axes lie there."""

    name: str
    hf_shape: tuple[int, ...]
    from_hf: Callable[[Any], Any]
    to_hf: Callable[[Any], Any]


def _layer_leaves(config: ModelConfig) -> dict[str, _Leaf]:
    d, f, k = config.width, config.mlp_width, config.head_dim
    h, g = config.num_heads, config.num_kv_heads
    prefix = "model.layers.{}."

    def same(name: str, *shape: int) -> _Leaf:
        return _Leaf(prefix + name, shape, lambda x: x, lambda x: x)

    def matrix(name: str, out: int, into: int) -> _Leaf:
        return _Leaf(prefix + name, (out, into), lambda x: x.T, lambda x: x.T)

    def heads(name: str, n: int) -> _Leaf:
        return _Leaf(
            prefix + name,
            (n * k, d),
            lambda x: x.T.reshape(d, n, k),
            lambda x: x.reshape(d, n * k).T,
        )

    def bias(name: str, n: int) -> _Leaf:
        return _Leaf(prefix + name, (n * k,), lambda x: x.reshape(n, k), lambda x: x.reshape(-1))

    leaves = {
        "attention_norm": same("input_layernorm.weight", d),
        "query": heads("self_attn.q_proj.weight", h),
        "key": heads("self_attn.k_proj.weight", g),
        "value": heads("self_attn.v_proj.weight", g),
        "output": _Leaf(
            prefix + "self_attn.o_proj.weight",
            (d, h * k),
            lambda x: x.T.reshape(h, k, d),
            lambda x: x.reshape(h * k, d).T,
        ),
        "mlp_norm": same("post_attention_layernorm.weight", d),
        "gate": matrix("mlp.gate_proj.weight", f, d),
        "up": matrix("mlp.up_proj.weight", f, d),
        "down": matrix("mlp.down_proj.weight", d, f),
    }
    if config.qkv_bias:
        leaves["query_bias"] = bias("self_attn.q_proj.bias", h)
        leaves["key_bias"] = bias("self_attn.k_proj.bias", g)
        leaves["value_bias"] = bias("self_attn.v_proj.bias", g)
    if config.qk_norm:
        leaves["query_norm"] = same("self_attn.q_norm.weight", k)
        leaves["key_norm"] = same("self_attn.k_norm.weight", k)
    return leaves


def _outer_leaves(config: ModelConfig) -> dict[str, _Leaf]:
    v, d = config.vocab_size, config.width

    def keep(x: Any) -> Any:
        return x

    leaves = {
        "embedding": _Leaf("model.embed_tokens.weight", (v, d), keep, keep),
        "final_norm": _Leaf("model.norm.weight", (d,), keep, keep),
    }
    if not config.tied_embeddings:
        leaves["head"] = _Leaf("lm_head.weight", (v, d), jnp.transpose, jnp.transpose)
    return leaves
