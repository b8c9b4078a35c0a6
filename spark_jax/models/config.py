"""Model configuration: one frozen record covers Llama, SmolLM2, Qwen2/2.5 and Qwen3."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder-only transformer; families differ by flags, not by subclasses.

    Hashable, so it is a static argument of every jitted function.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 4096
    dtype: str = "float32"
    """Compute dtype of activations, weights in use and KV cache: "float32" or "bfloat16"."""
    remat: bool = True
    """Recompute each layer in the backward pass instead of storing its activations."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need pairs")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}; choose 'float32' or 'bfloat16'")

    @property
    def compute_dtype(self) -> np.dtype:
        return jnp.dtype(self.dtype)

    @property
    def queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads


def from_hf(hf: Mapping[str, Any], *, dtype: str = "float32") -> ModelConfig:
    """Reads the dictionary of a Hugging Face `config.json`.

    Raises:
      ValueError: an architecture, activation or rotary scaling that this library does not compute.
    """
    model_type = hf.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type={model_type!r} is not supported; have {sorted(ARCHITECTURES)}"
        )
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={hf['hidden_act']!r} is not supported; only 'silu' is")
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise ValueError(f"rotary scaling {scaling!r} is not supported; only 'default' is")
    if hf.get("use_sliding_window"):
        raise ValueError("use_sliding_window=true is not supported; set it to false")
    if model_type == "llama" and (hf.get("attention_bias") or hf.get("mlp_bias")):
        raise ValueError("attention_bias or mlp_bias in a llama config is not supported")
    heads = hf["num_attention_heads"]
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        mlp_width=hf["intermediate_size"],
        rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0))),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        max_positions=hf.get("max_position_embeddings", 4096),
        dtype=dtype,
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` dictionary that transformers and vLLM read back."""
    model_type = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": config.max_positions,
        "attention_bias": False,
    }
