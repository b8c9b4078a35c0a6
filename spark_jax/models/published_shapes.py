"""Shapes of well-known models: the fields of their public `config.json`, by hub id.

Enough to compile a run's programs ahead of time where no checkpoint has been fetched
(`spark_jax.experiments.compile_for_pod`); weights, tokenizers and stop ids are read from
checkpoints alone. `spark_jax.models.config.from_hf` reads these dictionaries as it reads the files.
"""

from __future__ import annotations

from typing import Any


def _qwen(
    model_type: str,
    width: int,
    mlp_width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int = 152064,
    **fields: Any,
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **fields,
    }


_SMALL_QWEN25 = {"vocab": 151936, "tie_word_embeddings": True}
_QWEN25 = {
    "0.5B": _qwen("qwen2", 896, 4864, 24, 14, 2, **_SMALL_QWEN25),
    "1.5B": _qwen("qwen2", 1536, 8960, 28, 12, 2, **_SMALL_QWEN25),
    "3B": _qwen("qwen2", 2048, 11008, 36, 16, 2, **_SMALL_QWEN25),
    "7B": _qwen("qwen2", 3584, 18944, 28, 28, 4),
    "14B": _qwen("qwen2", 5120, 13824, 48, 40, 8),
    "32B": _qwen("qwen2", 5120, 27648, 64, 40, 8),
}
_QWEN3 = {
    "0.6B": _qwen("qwen3", 1024, 3072, 28, 16, 8, **_SMALL_QWEN25),
    "1.7B": _qwen("qwen3", 2048, 6144, 28, 16, 8, **_SMALL_QWEN25),
    "4B": _qwen("qwen3", 2560, 9728, 36, 32, 8, **_SMALL_QWEN25),
    "8B": _qwen("qwen3", 4096, 12288, 36, 32, 8, 151936),
    "14B": _qwen("qwen3", 5120, 17408, 40, 40, 8, 151936),
    "32B": _qwen("qwen3", 5120, 25600, 64, 64, 8, 151936),
}
_SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
_MATH = {"max_position_embeddings": 4096, "rope_theta": 10_000.0}

MODEL_SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m-instruct": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    **{f"Qwen/Qwen2.5-{size}": shape for size, shape in _QWEN25.items()},
    **{f"Qwen/Qwen2.5-{size}-Instruct": shape for size, shape in _QWEN25.items()},
    "Qwen/Qwen2.5-Math-1.5B": _QWEN25["1.5B"] | _MATH,
    "Qwen/Qwen2.5-Math-7B": _QWEN25["7B"] | _MATH,
    "PRIME-RL/Eurus-2-7B-SFT": _QWEN25["7B"] | _MATH,
    **{
        f"Qwen/Qwen3-{size}": shape | {"head_dim": 128, "max_position_embeddings": 40960}
        for size, shape in _QWEN3.items()
    },
}
