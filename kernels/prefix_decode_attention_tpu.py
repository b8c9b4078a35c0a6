"""`prefix_decode_attention` for TPU, in Pallas (Mosaic): bound by reading keys and values once.

A program of the grid is one lane and KV head; its steps walk blocks of the prompt, then blocks of
the own columns of all W slots, with a running maximum and sum. Blocks of the prompt behind its
length are neither read nor computed. All layers' cache is an operand, of which the blocks of one
layer are read: a slice would be a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

_MIB = 2**20
_MASKED = -1e30  # this and the next two as in the reference
_FLOOR = -1e29
_EMPTY = 1e-30


@functools.partial(jax.jit, static_argnames="interpret")
def prefix_decode_attention(
    q: Array,
    prompt_keys: Array,
    prompt_values: Array,
    lengths: Array,
    keys: Array,
    values: Array,
    own_mask: Array,
    layer: Array,
    *,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """See `kernels.prefix_decode_attention`; `interpret` goes to `pallas_call`."""
    n, r, g, d, length = prompt_keys.shape
    (s, h, _), columns = q.shape, keys.shape[-1]
    w = s // r
    if length == 0:  # a block must hold something; `lengths` keeps it unseen
        length = 8
        prompt_keys = jnp.zeros((n, r, g, d, length), prompt_keys.dtype)
        prompt_values = jnp.zeros((n, r, g, length, d), prompt_values.dtype)
    folded = _fold(q, g)
    rows = folded.shape[2]
    prompt_block = _block(length, d * q.dtype.itemsize)
    own_block = _block(columns, w * d * q.dtype.itemsize)
    prompt_blocks = pl.cdiv(length, prompt_block)
    own_blocks = pl.cdiv(columns, own_block)

    def prompt(i: Any, c: Any, lengths: Any) -> Any:
        used = jnp.maximum(pl.cdiv(lengths[i], prompt_block), 1)
        return jnp.minimum(c, used - 1)

    def own(c: Any) -> Any:
        return jnp.maximum(c - prompt_blocks, 0)

    query = pl.BlockSpec((w, None, rows, d), lambda i, j, c, lengths, layer: (i, j, 0, 0))
    out, logsumexp = pl.pallas_call(
        functools.partial(_kernel, prompt_blocks=prompt_blocks, length=length, columns=columns),
        name="prefix_decode_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(r, g, prompt_blocks + own_blocks),
            in_specs=[
                query,
                pl.BlockSpec(
                    (None, None, None, d, prompt_block),
                    lambda i, j, c, lengths, layer: (layer[0], i, j, 0, prompt(i, c, lengths)),
                ),
                pl.BlockSpec(
                    (None, None, None, prompt_block, d),
                    lambda i, j, c, lengths, layer: (layer[0], i, j, prompt(i, c, lengths), 0),
                ),
                pl.BlockSpec(
                    (None, w, None, d, own_block),
                    lambda i, j, c, lengths, layer: (layer[0], i, j, 0, own(c)),
                ),
                pl.BlockSpec(
                    (None, w, None, own_block, d),
                    lambda i, j, c, lengths, layer: (layer[0], i, j, own(c), 0),
                ),
                pl.BlockSpec((None, w, own_block), lambda i, j, c, lengths, layer: (i, 0, own(c))),
            ],
            out_specs=[
                query,
                pl.BlockSpec((None, None, w, rows), lambda i, j, c, lengths, layer: (i, j, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((w, rows, 1), jnp.float32),
                pltpu.VMEM((w, rows, 1), jnp.float32),
                pltpu.VMEM((w, rows, d), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(folded.shape, jnp.float32),
            jax.ShapeDtypeStruct((r, g, w, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=48 * _MIB
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * s * h * d * (length + columns),
            transcendentals=s * h * (length + columns),
            bytes_accessed=2 * g * d * (r * length + s * columns) * keys.dtype.itemsize,
        ),
        interpret=interpret,
    )(
        lengths.astype(jnp.int32),
        layer.astype(jnp.int32).reshape(1),
        folded,
        prompt_keys,
        prompt_values,
        keys,
        values,
        jnp.where(own_mask, 0.0, _MASKED).reshape(r, w, columns),
    )
    return out[:, :, : h // g].reshape(s, h, d), _unfold(logsumexp, h // g).reshape(s, h)


def _kernel(
    lengths: Any,
    _layer: Any,
    q: Any,
    prompt_keys: Any,
    prompt_values: Any,
    keys: Any,
    values: Any,
    bias: Any,
    out: Any,
    logsumexp: Any,
    top: Any,
    total: Any,
    sums: Any,
    *,
    prompt_blocks: int,
    length: int,
    columns: int,
) -> None:
    step = pl.program_id(2)
    slots, rows, d = q.shape
    scale = d**-0.5

    @pl.when(step == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, _FLOOR)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def add(scores: Array, weigh: Callable[[Array], Array]) -> None:
        before = top[...]
        now = jnp.maximum(before, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - now)
        shrink = jnp.exp(before - now)
        top[...] = now
        total[...] = shrink * total[...] + jnp.sum(weights, axis=-1, keepdims=True)
        sums[...] = shrink * sums[...] + weigh(weights.astype(q.dtype))

    block = prompt_values.shape[0]
    seen = lengths[pl.program_id(0)] - step * block

    @pl.when((step < prompt_blocks) & (seen > 0))
    def _() -> None:
        scores = _dot(q[...].reshape(slots * rows, d), prompt_keys[...]) * scale
        column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(column < seen, scores, _MASKED).reshape(slots, rows, block)
        v = _within(prompt_values[...], length - step * block, length % block)
        add(scores, lambda p: _dot(p.reshape(-1, block), v).reshape(slots, rows, d))

    @pl.when(step >= prompt_blocks)
    def _() -> None:
        own_block = values.shape[1]
        left = columns - (step - prompt_blocks) * own_block
        scores = _dot(q[...], keys[...]) * scale + bias[...][:, None]
        if columns % own_block:
            column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
            scores = jnp.where(column < left, scores, _MASKED)
        v = _within(values[...], left, columns % own_block)
        add(scores, lambda p: _dot(p, v))

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        n = jnp.maximum(total[...], _EMPTY)
        out[...] = sums[...] / n
        logsumexp[...] = (top[...] + jnp.log(n))[:, :, 0]


def _within(x: Array, count: Any, ragged: int) -> Array:
    """Zeros behind the array's end, where a window may hold anything, NaN included."""
    if not ragged:
        return x
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 2)
    return jnp.where(index < count, x, jnp.zeros_like(x))


def _dot(a: Array, b: Array) -> Array:
    """Matrices, or as many of them as the first axis has."""
    batch = tuple(range(a.ndim - 2))
    contracted = ((a.ndim - 1,), (b.ndim - 2,))
    return jax.lax.dot_general(
        a, b, (contracted, (batch, batch)), preferred_element_type=jnp.float32
    )


def _block(tokens: int, bytes_per_token: int) -> int:
    """At most 2 MiB of keys, in whole tiles; all tokens where they fit."""
    most = max(128, 2 * _MIB // bytes_per_token // 128 * 128)
    return tokens if tokens <= most else most


def _fold(q: Array, kv_heads: int) -> Array:
    """[S, H, K] as [S, G, rows, K]: the queries of one KV head, padded to whole tiles."""
    s, h, d = q.shape
    tile = 8 * 4 // q.dtype.itemsize
    padding = -(h // kv_heads) % tile
    return jnp.pad(q.reshape(s, kv_heads, -1, d), ((0, 0), (0, 0), (0, padding), (0, 0)))


def _unfold(x: Array, queries: int) -> Array:
    """[R, G, W, rows] as [R, W, G, Q], without the padding."""
    return x[..., :queries].swapaxes(1, 2)
