"""The least time a job can take here: its operations at the rate of the fastest matrix product
measured in the same round, or its bytes at the rate memory was read, whichever is longer.

Operations count two per multiply and add. Rates are per second of the benchmark's clock: on CPU per
second of process time, so a thread's worth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Cost:
    flops: float
    bytes: float
    dtype: str  # of the matrix products


def shares(
    cost: Cost | None, seconds: Sequence[float], peaks: Sequence[Mapping[str, float]]
) -> list[float] | None:
    """The least time over the time taken, per round; None where the rates were not measured."""
    if cost is None or not all({cost.dtype, "bytes"} <= set(peak) for peak in peaks):
        return None
    return [
        max(cost.flops / peak[cost.dtype], cost.bytes / peak["bytes"]) / taken
        for taken, peak in zip(seconds, peaks, strict=True)
    ]


def decode(model: Mapping[str, Any], dtype: str, rows: int, prompt: int, new: int) -> Cost:
    """`rows` different prompts and `new` tokens for each, all rows a token further at a time.

    Every step reads all weights once and each row's own keys and values; prompts are prefilled but
    for their last token, and their scores over the vocabulary are not needed.
    """
    size = _itemsize(dtype)
    layers, vocabulary = _parameters(model)
    weights = layers + vocabulary
    contexts = sum(prompt + i for i in range(new))  # of one row, over all its steps
    flops = 2 * rows * (new * weights + (prompt - 1) * layers) + _attention(
        model, rows * (contexts + prompt * (prompt - 1) / 2)
    )
    cache = 2 * model["num_hidden_layers"] * model["num_key_value_heads"] * model["head_dim"]
    return Cost(flops, size * (new * weights + layers + rows * contexts * cache), dtype)


def forward(model: Mapping[str, Any], dtype: str, rows: int, length: int, scored: int) -> Cost:
    """`rows` sequences of `length` tokens through the layers, `scored` of each to scores."""
    layers, vocabulary = _parameters(model)
    flops = 2 * rows * (length * layers + scored * vocabulary) + _attention(
        model, rows * length * (length + 1) / 2
    )
    return Cost(flops, _itemsize(dtype) * (layers + vocabulary), dtype)


def train(model: Mapping[str, Any], dtype: str, rows: int, length: int, scored: int) -> Cost:
    """Forward and backward; what is computed twice to save memory does not count. AdamW reads and
    writes float32 weights, moments and gradients."""
    once = forward(model, dtype, rows, length, scored)
    return Cost(3 * once.flops, 4 * 7 * sum(_parameters(model)), dtype)


def head(model: Mapping[str, Any], dtype: str, rows: int, passes: int) -> Cost:
    """Hidden states against the vocabulary; three passes with the gradient."""
    vocabulary = model["hidden_size"] * model["vocab_size"]
    return Cost(2.0 * passes * rows * vocabulary, _itemsize(dtype) * vocabulary, dtype)


def decode_attention(
    model: Mapping[str, Any], dtype: str, tokens: int, pairs: int, calls: int
) -> Cost:
    """One layer's queries against that many cached tokens, read once; `pairs` of a slot and a token
    that it sees."""
    cache = 2 * model["num_key_value_heads"] * model["head_dim"] * _itemsize(dtype)
    flops = _attention(model, pairs) / model["num_hidden_layers"]
    return Cost(calls * flops, calls * tokens * cache, dtype)


def _parameters(model: Mapping[str, Any]) -> tuple[int, int]:
    """Weights of matrix products: in the layers, and against the vocabulary."""
    width, heads = model["hidden_size"], model["num_attention_heads"]
    attention = 2 * width * model["head_dim"] * (heads + model["num_key_value_heads"])
    mlp = 3 * width * model["intermediate_size"]
    return model["num_hidden_layers"] * (attention + mlp), width * model["vocab_size"]


def _attention(model: Mapping[str, Any], pairs: float) -> float:
    """Scores and weighted sums of so many pairs of a query and a key."""
    return 4 * pairs * model["num_hidden_layers"] * model["num_attention_heads"] * model["head_dim"]


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4
