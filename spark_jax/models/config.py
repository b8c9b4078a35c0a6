"""Model configuration: one frozen record covers Llama, SmolLM2, Qwen2/2.5 and Qwen3."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from spark_jax.models import rotary
from spark_jax.models.rotary import RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

PROJECTIONS = ("qkv_proj", "out_proj", "gate_proj", "up_proj")

ATTENTION = ("auto", "dense", "blockwise", "splash", "cudnn", "triton")


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
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied_embeddings: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 4096
    dtype: str = "float32"
    """Compute dtype of activations, weights in use and KV cache: "float32" or "bfloat16"."""
    remat: bool = True
    """Recompute each layer in the backward pass instead of storing its activations."""
    remat_save: tuple[str, ...] = ()
    """Which of `PROJECTIONS` to store all the same: where memory is left, each saves a product. Of
    a token and layer "qkv_proj" stores (H + 2 H_kv) K numbers, "out_proj" (what attention leaves of
    the residual stream) D, the other two F each."""
    attention: str = "auto"
    """What computes attention, of `ATTENTION`: see `models.attention`."""
    cache_dtype: str | None = None
    """What decoding keeps keys and values in: None for the compute dtype, or "int8", with a scale
    per token and head (`models.cache.Rounded`): half the memory of bfloat16, for some error."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need pairs")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}; choose 'float32' or 'bfloat16'")
        self._check_remat()
        if self.attention not in ATTENTION:
            raise ValueError(f"attention={self.attention!r}; choose from {list(ATTENTION)}")
        if self.cache_dtype not in (None, "int8"):
            raise ValueError(f"cache_dtype={self.cache_dtype!r}; choose None or 'int8'")

    def _check_remat(self) -> None:
        unknown = sorted(set(self.remat_save) - set(PROJECTIONS))
        if unknown:
            raise ValueError(f"remat_save has {unknown}; choose from {list(PROJECTIONS)}")
        if self.remat_save and not self.remat:
            raise ValueError(
                f"remat_save={self.remat_save} with remat=False, which stores everything; leave "
                "one of them out"
            )

    @property
    def compute_dtype(self) -> np.dtype:
        return jnp.dtype(self.dtype)


def from_hf(hf: Mapping[str, Any], *, dtype: str = "float32") -> ModelConfig:
    """Reads the dictionary of a Hugging Face `config.json`. Generation settings in it (stop tokens,
    for one) are no part of a `ModelConfig`.

    Raises:
      ValueError: a missing field, or an architecture, activation, rotary scaling, attention window
        or quantisation that this library does not compute, by name.
    """
    model_type = hf.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type={model_type!r} is not supported; have {sorted(ARCHITECTURES)}"
        )
    _refuse_what_is_not_computed(hf, model_type)
    for name in _REQUIRED:
        if hf.get(name) is None:
            raise ValueError(f"the field {name!r} is missing")
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    theta, scaling = rotary.from_hf(hf)
    biased = bool(hf.get("attention_bias")) and model_type != "qwen2"
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        width=width,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or width // heads,
        mlp_width=hf["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=model_type == "qwen2" or biased,
        output_bias=biased,
        qk_norm=model_type == "qwen3",
        max_positions=hf["max_position_embeddings"],
        dtype=dtype,
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` dictionary that transformers and vLLM read back.

    Raises:
      ValueError: biases that no architecture of transformers has.
    """
    biases = (config.qkv_bias, config.output_bias)
    model_type = "qwen3" if config.qk_norm else "qwen2" if biases == (True, False) else "llama"
    if biases not in {(False, False), (True, True)} and model_type != "qwen2":
        raise ValueError(
            f"no architecture of transformers has qkv_bias={config.qkv_bias}, "
            f"output_bias={config.output_bias}, qk_norm={config.qk_norm}"
        )
    hf = {
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
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": config.max_positions,
        **rotary.to_hf(config.rope_theta, config.rope_scaling),
    }
    return hf if model_type == "qwen2" else hf | {"attention_bias": config.output_bias}


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


def _refuse_what_is_not_computed(hf: Mapping[str, Any], model_type: str) -> None:
    architectures = hf.get("architectures") or [ARCHITECTURES[model_type]]
    if architectures != [ARCHITECTURES[model_type]]:
        raise ValueError(
            f"architectures={architectures} is not supported; have {sorted(ARCHITECTURES.values())}"
        )
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={hf['hidden_act']!r} is not supported; only 'silu' is")
    if hf.get("mlp_bias"):
        raise ValueError("mlp_bias=true is not supported")
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method")
        raise ValueError(
            f"quantization_config with quant_method={method!r} is not supported; bring the model's "
            "unquantised checkpoint"
        )
    windowed = [kind for kind in _layer_types(hf) if kind != "full_attention"]
    if windowed:
        raise ValueError(
            f"{len(windowed)} layers with {sorted(set(windowed))} are not supported; only full "
            "attention is (use_sliding_window, layer_types)"
        )


def _layer_types(hf: Mapping[str, Any]) -> list[str]:
    """As transformers decides them: a window that is set but not in use changes nothing."""
    if hf.get("layer_types"):
        return list(hf["layer_types"])
    if not hf.get("use_sliding_window") or hf.get("sliding_window", 4096) is None:
        return []
    first, layers = hf.get("max_window_layers", 28), hf.get("num_hidden_layers") or 0
    return ["sliding_attention"] * max(layers - first, 0)
