"""GGUF files (llama.cpp's format) read as if they were Hugging Face checkpoints.

Needs the `gguf` package (extra `gguf`). Quantised tensors come out dequantised in float32: what
is loaded is the file's rounded weights, in full precision.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
# Llama 3.1 to 3.3 differ in the factor alone; a file holds the resulting divisors of frequencies.
_LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hf_config(path: str | Path) -> dict[str, Any]:
    """The `config.json` dictionary of the model in a GGUF file.

    Raises:
      ImportError: the `gguf` package is not installed.
      ValueError: an architecture other than `ARCHITECTURES`, a field that is missing, or a rotary
        scaling that the file does not describe fully.
    """
    reader = _reader(Path(path))
    fields = metadata(path)
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: general.architecture={architecture!r} is not supported; have {ARCHITECTURES}"
        )

    def field(name: str, default: Any = None) -> Any:
        value = fields.get(f"{architecture}.{name}", default)
        if value is None:
            raise ValueError(f"{path}: metadata field {architecture}.{name} is missing")
        return value

    names = {tensor.name for tensor in reader.tensors}
    heads, width = field("attention.head_count"), field("embedding_length")
    config = {
        "model_type": architecture,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": field("attention.key_length", width // heads),
        "intermediate_size": field("feed_forward_length"),
        "hidden_act": "silu",
        "rope_theta": field("rope.freq_base", 10_000.0),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in names,
        "max_position_embeddings": field("context_length"),
    }
    scaling = _rope_scaling(path, reader, config, field("rope.scaling.type", "none"))
    return config | ({"rope_scaling": scaling} if scaling else {})


def tensors(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, float32 array in [out, in] layout), one tensor at a time.

    llama.cpp stores the rows of Llama's query and key projections in pairs (i, i + head_dim/2);
    they come back in Hugging Face's half-split order.

    Raises:
      ValueError: a tensor whose name is not one of a dense decoder's.
    """
    import gguf

    config = hf_config(path)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in _reader(Path(path)).tensors:
        if tensor.name == _ROPE_FACTORS:  # in the config, as rope_scaling
            continue
        name, kind = _hf_name(path, tensor.name)
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        if config["model_type"] == "llama" and kind in heads:
            array = _half_split(array, heads[kind])
        yield name, array


def metadata(path: str | Path) -> dict[str, Any]:
    """Every metadata field of the file, by its GGUF name."""
    return dict(_fields(Path(path)))


def _hf_name(path: str | Path, name: str) -> tuple[str, str]:
    """The Hugging Face name, and which of a layer's tensors it is."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name], name
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise ValueError(f"{path}: tensor {name!r} is not one of a dense decoder's")
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}", match[2]


def _half_split(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows (or a bias) of a projection from interleaved pairs to two halves per head."""
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def _rope_scaling(
    path: str | Path, reader: Any, config: dict[str, Any], kind: str
) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling`; None where there is none."""
    import gguf

    factors = [tensor for tensor in reader.tensors if tensor.name == _ROPE_FACTORS]
    if factors:
        given = np.asarray(gguf.dequantize(factors[0].data, factors[0].tensor_type)).reshape(-1)
        scaling = _LLAMA3_SCALING | {"rope_type": "llama3", "factor": float(given.max())}
        if not np.allclose(given, _llama3_divisors(config, scaling), rtol=1e-3):
            raise ValueError(
                f"{path}: {_ROPE_FACTORS} is not the rotary scaling of a Llama 3 model; load the "
                "model's safetensors, whose config says how it is scaled"
            )
        return scaling
    if kind in ("none", ""):
        return None
    fields = metadata(path)
    prefix = f"{config['model_type']}.rope.scaling."
    if kind not in ("linear", "yarn") or f"{prefix}factor" not in fields:
        raise ValueError(f"{path}: {prefix}type={kind!r} without what is needed to compute it")
    scaling = {"rope_type": kind, "factor": fields[f"{prefix}factor"]}
    original = fields.get(f"{prefix}original_context_length")
    return scaling | ({"original_max_position_embeddings": original} if original else {})


def _llama3_divisors(config: dict[str, Any], scaling: dict[str, Any]) -> np.ndarray:
    """By what each rotary frequency is divided (transformers' `_compute_llama3_parameters`)."""
    half = config["head_dim"] // 2
    wavelength = 2 * np.pi * config["rope_theta"] ** (np.arange(half) / half)
    turns = scaling["original_max_position_embeddings"] / wavelength
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


@functools.lru_cache(maxsize=2)  # the lists of a large vocabulary take seconds
def _fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in _reader(path).fields.items()}


@functools.lru_cache(maxsize=2)
def _reader(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"{path}: reading a GGUF file needs the gguf package: pip install 'spark-jax[gguf]'"
        ) from error
    return gguf.GGUFReader(path)
