"""`prefix_decode_attention` for NVIDIA GPUs, in Pallas (Triton): reads what slots see, once.

A lane's slots ask its prompt together, each slot its own columns alone; both are the same kernel,
and their parts are joined by their log-sum-exp. A program holds the queries of one KV head, in
blocks, and walks one share of the columns; blocks of columns that nobody sees are not read. All
layers' cache is an operand, of which one layer is read: a slice would be a copy.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from spark_jax.kernels.prefix_decode_attention_xla import EMPTY, FLOOR, MASKED

_LEAST = 16  # rows, columns and depth of a matrix product
_QUERIES, _COLUMNS = 64, 64  # a tile of scores, at most
_PROGRAMS = 512  # to be made of few lanes and heads, by sharing out the columns


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
    _, r, g, d, length = prompt_keys.shape
    s, h, _ = q.shape
    own = q.reshape(s, g, h // g, d)
    parts = [_attend(own, keys, values, own_mask, layer, interpret)]
    if length:
        of_lanes = own.reshape(r, s // r, g, h // g, d).swapaxes(1, 2).reshape(r, g, -1, d)
        seen = jnp.arange(length) < lengths[:, None]
        shared = _attend(of_lanes, prompt_keys, prompt_values, seen, layer, interpret)

        def of_slots(x: Array) -> Array:  # [shares, R, G, W · Q, ...] as [shares, S, G, Q, ...]
            x = x.reshape(len(x), r, g, s // r, h // g, *x.shape[4:]).swapaxes(2, 3)
            return x.reshape(len(x), s, g, h // g, *x.shape[5:])

        parts.append(jax.tree.map(of_slots, shared))
    tops, totals, sums = (jnp.concatenate(x) for x in zip(*parts, strict=True))
    top = tops.max(axis=0)
    weights = jnp.exp(tops - top)
    total = jnp.maximum(jnp.sum(weights * totals, axis=0), EMPTY)
    out = jnp.sum(weights[..., None] * sums, axis=0) / total[..., None]
    return out.reshape(s, h, d), (top + jnp.log(total)).reshape(s, h)


class _Part(NamedTuple):
    """What queries [A, G, M, K] saw of each share of the columns."""

    tops: Array  # [shares, A, G, M] greatest score
    totals: Array  # [shares, A, G, M] Σ exp(score − top)
    sums: Array  # [shares, A, G, M, K] Σ exp(score − top) · value


def _attend(
    q: Array, keys: Array, values: Array, seen: Array, layer: Array, interpret: Any
) -> _Part:
    """M queries of each of A rows and G heads against C columns of the row, those that are seen."""
    a, g, m, d = q.shape
    columns = keys.shape[-1]
    rows, depth = min(_QUERIES, _power(m)), _power(d)
    block = min(_COLUMNS, _power(columns))
    row_blocks, column_blocks = pl.cdiv(m, rows), pl.cdiv(columns, block)
    shares = max(1, min(_PROGRAMS // (a * g * row_blocks), column_blocks // 4))
    padded = row_blocks * rows
    whole = pl.BlockSpec((None, None, rows, depth), lambda i, j, n: (i, j, n // shares, 0))

    def of_share(*tail: int) -> pl.BlockSpec:
        def index(i: Any, j: Any, n: Any) -> tuple[Any, ...]:
            return n % shares, i, j, n // shares, *(0 for _ in tail)

        return pl.BlockSpec((None, None, None, rows, *tail), index)

    everything = pl.BlockSpec(memory_space=pl.ANY)
    statistics = jax.ShapeDtypeStruct((shares, a, g, padded), jnp.float32)
    out = pl.pallas_call(
        functools.partial(_kernel, width=d, block=block, shares=shares),
        name="prefix_decode_attention",
        grid=(a, g, row_blocks * shares),
        in_specs=[everything, whole, everything, everything, everything],
        out_specs=[of_share(), of_share(), of_share(depth)],
        out_shape=[
            statistics,
            statistics,
            jax.ShapeDtypeStruct((*statistics.shape, depth), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(
        layer.astype(jnp.int32).reshape(1),
        jnp.pad(q, ((0, 0), (0, 0), (0, padded - m), (0, depth - d))),
        keys,
        values,
        seen.astype(jnp.int8),
    )
    return _Part(out[0][..., :m], out[1][..., :m], out[2][..., :m, :d])


def _kernel(
    layer: Any,
    q: Any,
    keys: Any,
    values: Any,
    seen: Any,
    top_out: Any,
    total_out: Any,
    sums_out: Any,
    *,
    width: int,
    block: int,
    shares: int,
) -> None:
    row, head, share = pl.program_id(0), pl.program_id(1), pl.program_id(2) % shares
    rows, depth = q.shape
    columns = keys.shape[-1]
    of_layer, queries = layer[0], q[...]
    all_depth = pl.ds(jnp.int32(0), depth)  # a start that is traced: it may reach over the end
    real = jnp.arange(depth) < width

    def attend(start: Array, there: Array, marked: Array, carry: tuple[Array, ...]) -> Any:
        before, total, sums = carry
        where = pl.ds(start, block)
        k = plgpu.load(
            keys.at[of_layer, row, head, all_depth, where],
            mask=real[:, None] & there[None, :],
            other=0,
        )
        scores = jnp.dot(queries, k, preferred_element_type=jnp.float32) * width**-0.5
        scores = jnp.where(marked[None, :], scores, MASKED)
        top = jnp.maximum(before, jnp.max(scores, axis=1))
        weights = jnp.exp(scores - top[:, None])
        shrink = jnp.exp(before - top)
        v = plgpu.load(
            values.at[of_layer, row, head, where, all_depth],
            mask=there[:, None] & real[None, :],
            other=0,
        )
        weighed = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        total = shrink * total + jnp.sum(weights, axis=1)
        return top, total, shrink[:, None] * sums + weighed

    def body(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        start = j * block
        there = start + jnp.arange(block) < columns
        marked = plgpu.load(seen.at[row, pl.ds(start, block)], mask=there, other=0).astype(
            jnp.int32
        )
        anything = jnp.max(marked) > 0
        return jax.lax.cond(
            anything, lambda c: attend(start, there, marked > 0, c), lambda c: c, carry
        )

    blocks = pl.cdiv(columns, block)
    most = pl.cdiv(blocks, shares)
    first = share * most
    carry = (
        jnp.full(rows, FLOOR, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((rows, depth), jnp.float32),
    )
    results = jax.lax.fori_loop(first, jnp.minimum(first + most, blocks), body, carry)
    for out, value in zip((top_out, total_out, sums_out), results, strict=True):
        out[...] = value


def _power(n: int) -> int:
    """The least power of two that is at least n, and `_LEAST`."""
    return max(_LEAST, 1 << (n - 1).bit_length())
