"""Which tensor of a Hugging Face checkpoint is which parameter, and how its axes lie there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from spark_jax.models.config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Index = tuple[tuple[int, int], ...]
"""A part of an array: start and stop on each axis."""


class Leaf(NamedTuple):
    """A parameter as a checkpoint has it: a matrix [outputs, inputs], or a vector.

    `out` are the axes that make up its rows and `into` those of its columns (none: a vector). Our
    array, of one layer, has the axes `into + out`, so that it is multiplied from the right; the
    embedding is looked up by row and stays as it is.
    """

    name: str
    out: tuple[int, ...]
    into: tuple[int, ...] = ()
    lookup: bool = False

    @property
    def hf_shape(self) -> tuple[int, ...]:
        rows = math.prod(self.out)
        return (rows, math.prod(self.into)) if self.into else (rows,)

    def blocks(self, data: Any, index: Index, size: int) -> Iterator[tuple[tuple[int, ...], Any]]:
        """The part `index` of our array out of `data`, which is sliced like a NumPy array.

        Yields (where in that part, block in our layout), blocks of about `size` numbers: whole rows
        of the file, or those of their columns that are needed.
        """
        axis = 0 if self.lookup else len(self.into)
        out = index[: len(self.out)] if self.lookup else index[axis:]
        into = index[len(self.out) :] if self.lookup else index[:axis]
        rows, columns = _flat(out, self.out), _flat(into, self.into)
        unit = math.prod(self.out[1:])
        step = unit * max(1, size // (unit * (columns[1] - columns[0])))
        for first in range(*rows, step):
            part = slice(first, min(first + step, rows[1]))
            block = data[part, slice(*columns)] if self.into else data[part]
            block = block.reshape(-1, *self.out[1:], *(stop - start for start, stop in into))
            start = [0] * len(index)
            start[axis] = (first - rows[0]) // unit
            yield tuple(start), self._transposed(block, len(self.out))

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Our array, of one layer, as the checkpoint has it."""
        return np.ascontiguousarray(self._transposed(array, len(self.into)).reshape(self.hf_shape))

    def _transposed(self, array: np.ndarray, first: int) -> np.ndarray:
        """The first axes moved behind the others."""
        if self.lookup or not self.into:
            return array
        return array.transpose(*range(first, array.ndim), *range(first))


class Place(NamedTuple):
    """The parameter that a tensor belongs to; `layer` is None outside the layers."""

    field: str
    layer: int | None
    leaf: Leaf


def places(config: ModelConfig) -> dict[str, Place]:
    """Every tensor of a checkpoint by name, in the order in which exports have them."""
    v, d = config.vocab_size, config.width
    layers = {
        f"model.layers.{i}.{leaf.name}": Place(field, i, leaf)
        for i in range(config.num_layers)
        for field, leaf in _layer_leaves(config).items()
    }
    first = {EMBEDDING: Place("embedding", None, Leaf(EMBEDDING, (v,), (d,), lookup=True))}
    last = {"model.norm.weight": Place("final_norm", None, Leaf("model.norm.weight", (d,)))}
    head = {} if config.tied_embeddings else {HEAD: Place("head", None, Leaf(HEAD, (v,), (d,)))}
    return first | layers | last | head


def is_ignored(name: str, config: ModelConfig) -> bool:
    """Old exports wrote the rotary frequencies, and some write a tied matrix twice."""
    return name.endswith("rotary_emb.inv_freq") or (config.tied_embeddings and name == HEAD)


def _layer_leaves(config: ModelConfig) -> dict[str, Leaf]:
    d, f, k = config.width, config.mlp_width, config.head_dim
    h, g = config.num_heads, config.num_kv_heads
    leaves = {
        "attention_norm": Leaf("input_layernorm.weight", (d,)),
        "query": Leaf("self_attn.q_proj.weight", (h, k), (d,)),
        "key": Leaf("self_attn.k_proj.weight", (g, k), (d,)),
        "value": Leaf("self_attn.v_proj.weight", (g, k), (d,)),
        "output": Leaf("self_attn.o_proj.weight", (d,), (h, k)),
        "mlp_norm": Leaf("post_attention_layernorm.weight", (d,)),
        "gate": Leaf("mlp.gate_proj.weight", (f,), (d,)),
        "up": Leaf("mlp.up_proj.weight", (f,), (d,)),
        "down": Leaf("mlp.down_proj.weight", (d,), (f,)),
    }
    if config.qkv_bias:
        leaves["query_bias"] = Leaf("self_attn.q_proj.bias", (h, k))
        leaves["key_bias"] = Leaf("self_attn.k_proj.bias", (g, k))
        leaves["value_bias"] = Leaf("self_attn.v_proj.bias", (g, k))
    if config.output_bias:
        leaves["output_bias"] = Leaf("self_attn.o_proj.bias", (d,))
    if config.qk_norm:
        leaves["query_norm"] = Leaf("self_attn.q_norm.weight", (k,))
        leaves["key_norm"] = Leaf("self_attn.k_norm.weight", (k,))
    return leaves


def _flat(index: Index, shape: tuple[int, ...]) -> tuple[int, int]:
    """The range that a part covers when its axes are made one; only the first may be cut."""
    if not shape:
        return 0, 1
    if any(part != (0, n) for part, n in zip(index[1:], shape[1:], strict=True)):
        raise ValueError(f"a part {index} of {shape} is not contiguous; shard the first axis only")
    unit = math.prod(shape[1:])
    return index[0][0] * unit, index[0][1] * unit
