"""`prefix_decode_attention` for TPU, in Pallas (Mosaic): bound by reading keys and values once.

A program of the grid is one KV head and one lane, or a part of its slots where there are many; its
steps walk blocks of the prompt, then blocks of the slots' own columns, with a running maximum and
sum. Blocks of the prompt behind its length are neither read nor computed. All layers' cache is an
operand, of which the blocks of one layer are read: a slice would be a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from spark_jax.kernels.prefix_decode_attention_xla import EMPTY, FLOOR, MASKED

_MIB = 2**20
_SLOTS = 32  # that a program deals with at once


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
    if length == 0:  # a block must hold something; `lengths` keeps it unseen
        length = 8
        prompt_keys = jnp.zeros((n, r, g, d, length), prompt_keys.dtype)
        prompt_values = jnp.zeros((n, r, g, length, d), prompt_values.dtype)
    w = _slots(s // r)
    folded = _fold(q, g)
    tiles = _Tiles(
        lanes=r,
        parts=s // r // w,
        slots=w,
        kv_heads=g,
        rows=folded.shape[2],
        width=d,
        length=length,
        columns=columns,
        itemsize=q.dtype.itemsize,
    )
    out, logsumexp = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles),
        name="prefix_decode_attention",
        grid_spec=_grid_spec(tiles),
        out_shape=[
            jax.ShapeDtypeStruct(folded.shape, jnp.float32),
            jax.ShapeDtypeStruct((s // w, g, w, tiles.rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=48 * _MIB
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * s * h * d * (length + columns),
            transcendentals=s * h * (length + columns),
            bytes_accessed=2 * g * d * (s // w * length + s * columns) * keys.dtype.itemsize,
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
        jnp.where(own_mask, 0.0, MASKED).reshape(-1, w, columns),
    )
    return out[:, :, : h // g].reshape(s, h, d), _unfold(logsumexp, h // g).reshape(s, h)


class _Tiles(NamedTuple):
    """Static sizes: of the arrays, and of what a program of the grid has of them."""

    lanes: int
    parts: int  # of a lane, each with so many
    slots: int
    kv_heads: int
    rows: int  # queries of a KV head, in whole tiles
    width: int
    length: int
    columns: int
    itemsize: int

    @property
    def prompt_block(self) -> int:
        scores = self.slots * self.rows * 4  # in float32
        return _block(self.length, max(self.width * self.itemsize, scores))

    @property
    def own_block(self) -> int:
        return _block(self.columns, self.slots * max(self.width * self.itemsize, self.rows * 4))

    @property
    def prompt_blocks(self) -> int:
        return pl.cdiv(self.length, self.prompt_block)


def _grid_spec(tiles: _Tiles) -> pltpu.PrefetchScalarGridSpec:
    parts, w, rows, d = tiles.parts, tiles.slots, tiles.rows, tiles.width
    own_blocks = pl.cdiv(tiles.columns, tiles.own_block)

    def of_prompt(at: Callable[[Any, Any, Any], tuple[Any, ...]]) -> Callable[..., Any]:
        """Blocks of a lane's prompt in the layer, the last used one again where there are more."""

        def index(i: Any, j: Any, c: Any, lengths: Any, layer: Any) -> tuple[Any, ...]:
            lane = jax.lax.div(i, parts)
            used = jnp.maximum(pl.cdiv(lengths[lane], tiles.prompt_block), 1)
            return layer[0], *at(lane, j, jnp.minimum(c, used - 1))

        return index

    def of_slots(at: Callable[[Any, Any, Any], tuple[Any, ...]]) -> Callable[..., Any]:
        def index(i: Any, j: Any, c: Any, _: Any, layer: Any) -> tuple[Any, ...]:
            return layer[0], *at(i, j, jnp.maximum(c - tiles.prompt_blocks, 0))

        return index

    def keys(i: Any, j: Any, block: Any) -> tuple[Any, ...]:
        return i, j, 0, block

    def values(i: Any, j: Any, block: Any) -> tuple[Any, ...]:
        return i, j, block, 0

    def bias(i: Any, j: Any, c: Any, *_: Any) -> tuple[Any, ...]:
        return i, 0, jnp.maximum(c - tiles.prompt_blocks, 0)

    def whole(i: Any, j: Any, *_: Any) -> tuple[Any, ...]:
        return i, j, 0, 0

    query = pl.BlockSpec((w, None, rows, d), whole)
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(tiles.lanes * parts, tiles.kv_heads, tiles.prompt_blocks + own_blocks),
        in_specs=[
            query,
            pl.BlockSpec((None, None, None, d, tiles.prompt_block), of_prompt(keys)),
            pl.BlockSpec((None, None, None, tiles.prompt_block, d), of_prompt(values)),
            pl.BlockSpec((None, w, None, d, tiles.own_block), of_slots(keys)),
            pl.BlockSpec((None, w, None, tiles.own_block, d), of_slots(values)),
            pl.BlockSpec((None, w, tiles.own_block), bias),
        ],
        out_specs=[query, pl.BlockSpec((None, None, w, rows), whole)],
        scratch_shapes=[
            pltpu.VMEM((w, rows, 1), jnp.float32),
            pltpu.VMEM((w, rows, 1), jnp.float32),
            pltpu.VMEM((w, rows, d), jnp.float32),
        ],
    )


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
    tiles: _Tiles,
) -> None:
    step = pl.program_id(2)
    slots, rows, d = q.shape
    length, columns, prompt_blocks = tiles.length, tiles.columns, tiles.prompt_blocks
    scale = d**-0.5

    @pl.when(step == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, FLOOR)
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

    block, own_block = tiles.prompt_block, tiles.own_block
    seen = lengths[jax.lax.div(pl.program_id(0), tiles.parts)] - step * block

    @pl.when((step < prompt_blocks) & (seen > 0))
    def _() -> None:
        scores = _dot(q[...].reshape(slots * rows, d), prompt_keys[...]) * scale
        column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(column < seen, scores, MASKED).reshape(slots, rows, block)
        v = _within(prompt_values[...], length - step * block, length % block)
        add(scores, lambda p: _dot(p.reshape(-1, block), v).reshape(slots, rows, d))

    @pl.when(step >= prompt_blocks)
    def _() -> None:
        left = columns - (step - prompt_blocks) * own_block
        scores = _dot(q[...], keys[...]) * scale + bias[...][:, None]
        if columns % own_block:
            column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
            scores = jnp.where(column < left, scores, MASKED)
        v = _within(values[...], left, columns % own_block)
        add(scores, lambda p: _dot(p, v))

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        n = jnp.maximum(total[...], EMPTY)
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


def _slots(width: int) -> int:
    """As many as keep their blocks of own columns small: each part of a lane reads its prompt."""
    return next(n for n in range(min(width, _SLOTS), 0, -1) if width % n == 0)


def _block(tokens: int, bytes_per_token: int) -> int:
    """At most 2 MiB, in whole tiles; all tokens where they fit."""
    most = max(128, 2 * _MIB // bytes_per_token // 128 * 128)
    return tokens if tokens <= most else most


def _fold(q: Array, kv_heads: int) -> Array:
    """[S, H, K] as [S, G, rows, K]: the queries of one KV head, padded to whole tiles."""
    s, h, d = q.shape
    tile = 8 * 4 // q.dtype.itemsize
    padding = -(h // kv_heads) % tile
    return jnp.pad(q.reshape(s, kv_heads, -1, d), ((0, 0), (0, 0), (0, padding), (0, 0)))


def _unfold(x: Array, queries: int) -> Array:
    """[P, G, W, rows] as [P, W, G, Q], without the padding."""
    return x[..., :queries].swapaxes(1, 2)
