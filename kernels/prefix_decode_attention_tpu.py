"""`prefix_decode_attention` for TPU, in Pallas (Mosaic): bound by reading keys and values once.

A program of the grid is one lane and KV head; its steps walk blocks of the prompt, then blocks of
the own columns of all W slots, with a running maximum and sum. Blocks of the prompt behind its
length are neither read nor computed.
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
    *,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """See `kernels.prefix_decode_attention`; `interpret` goes to `pallas_call`."""
    r, w, h, d = q.shape
    _, g, length, _ = prompt_keys.shape
    columns = keys.shape[3]
    if length == 0:  # a block must hold something; `lengths` keeps it unseen
        prompt_keys = prompt_values = jnp.zeros((r, g, 8, d), prompt_keys.dtype)
        length = 8
    folded, rows = _fold(q, g)
    prompt_block = _block(length, d * q.dtype.itemsize)
    own_block = _block(columns, w * d * q.dtype.itemsize)
    prompt_blocks = pl.cdiv(length, prompt_block)
    own_blocks = pl.cdiv(columns, own_block)

    def prompt(i: Any, j: Any, c: Any, lengths: Any) -> tuple[Any, ...]:
        used = jnp.maximum(pl.cdiv(lengths[i], prompt_block), 1)
        return i, j, jnp.minimum(c, used - 1), 0

    def own(i: Any, j: Any, c: Any, _: Any) -> tuple[Any, ...]:
        return i, 0, j, jnp.maximum(c - prompt_blocks, 0), 0

    def own_bias(i: Any, j: Any, c: Any, _: Any) -> tuple[Any, ...]:
        return i, 0, jnp.maximum(c - prompt_blocks, 0)

    def whole(i: Any, j: Any, c: Any, _: Any) -> tuple[Any, ...]:
        return i, j, 0, 0, 0

    query = pl.BlockSpec((None, None, w, rows, d), whole)
    out, logsumexp = pl.pallas_call(
        functools.partial(
            _kernel,
            prompt_blocks=prompt_blocks,
            length=length,
            columns=columns,
        ),
        name="prefix_decode_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(r, g, prompt_blocks + own_blocks),
            in_specs=[
                query,
                *[pl.BlockSpec((None, None, prompt_block, d), prompt)] * 2,
                *[pl.BlockSpec((None, w, None, own_block, d), own)] * 2,
                pl.BlockSpec((None, w, own_block), own_bias),
            ],
            out_specs=[
                query,
                pl.BlockSpec((None, None, w, rows), lambda *grid: whole(*grid)[:-1]),
            ],
            scratch_shapes=[
                pltpu.VMEM((w, rows, 1), jnp.float32),
                pltpu.VMEM((w, rows, 1), jnp.float32),
                pltpu.VMEM((w, rows, d), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(folded.shape, q.dtype),
            jax.ShapeDtypeStruct(folded.shape[:-1], jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=48 * _MIB
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * r * w * h * d * (length + columns),
            transcendentals=r * w * h * (length + columns),
            bytes_accessed=2 * r * g * d * (length + w * columns) * keys.dtype.itemsize,
        ),
        interpret=interpret,
    )(
        lengths.astype(jnp.int32),
        folded,
        prompt_keys,
        prompt_values,
        keys,
        values,
        jnp.where(own_mask, 0.0, _MASKED),
    )
    return _unfold(out, h), _unfold(logsumexp[..., None], h)[..., 0]


def _kernel(
    lengths: Any,
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

    block = prompt_keys.shape[0]
    seen = lengths[pl.program_id(0)] - step * block

    @pl.when((step < prompt_blocks) & (seen > 0))
    def _() -> None:
        scores = _dot(q[...].reshape(slots * rows, d), prompt_keys[...], 1, 1) * scale
        column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(column < seen, scores, _MASKED).reshape(slots, rows, block)
        v = _within(prompt_values[...], length - step * block, length % block)
        add(scores, lambda p: _dot(p.reshape(-1, block), v, 1, 0).reshape(slots, rows, d))

    @pl.when(step >= prompt_blocks)
    def _() -> None:
        own_block = keys.shape[1]
        left = columns - (step - prompt_blocks) * own_block
        scores = _dot(q[...], keys[...], 2, 2, batched=True) * scale + bias[...][:, None]
        if columns % own_block:
            column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
            scores = jnp.where(column < left, scores, _MASKED)
        v = _within(values[...], left, columns % own_block)
        add(scores, lambda p: _dot(p, v, 2, 1, batched=True))

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        n = jnp.maximum(total[...], _EMPTY)
        out[...] = (sums[...] / n).astype(out.dtype)
        logsumexp[...] = (top[...] + jnp.log(n))[:, :, 0]


def _within(x: Array, count: Any, ragged: int) -> Array:
    """Zeros behind the array's end, where a window may hold anything, NaN included."""
    if not ragged:
        return x
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 2)
    return jnp.where(index < count, x, jnp.zeros_like(x))


def _dot(a: Array, b: Array, a_axis: int, b_axis: int, batched: bool = False) -> Array:
    batch = ((0,), (0,)) if batched else ((), ())
    return jax.lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), batch), preferred_element_type=jnp.float32
    )


def _block(tokens: int, bytes_per_token: int) -> int:
    """At most 2 MiB of keys, in whole tiles; all tokens where they fit."""
    most = max(128, 2 * _MIB // bytes_per_token // 128 * 128)
    return tokens if tokens <= most else most


def _fold(q: Array, kv_heads: int) -> tuple[Array, int]:
    """[R, W, H, K] as [R, G, W, rows, K]: the queries of one KV head, padded to whole tiles."""
    r, w, h, d = q.shape
    queries = h // kv_heads
    tile = 8 * 4 // q.dtype.itemsize
    rows = -(-queries // tile) * tile
    folded = q.reshape(r, w, kv_heads, queries, d).swapaxes(1, 2)
    return jnp.pad(folded, ((0, 0), (0, 0), (0, 0), (0, rows - queries), (0, 0))), rows


def _unfold(x: Array, heads: int) -> Array:
    r, g, w, _, d = x.shape
    return x[:, :, :, : heads // g].swapaxes(1, 2).reshape(r, w, heads, d)
