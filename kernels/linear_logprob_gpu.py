"""`linear_logprob` for NVIDIA GPUs: the forward pass in Pallas (Triton), without temporaries.

A program holds one block of tokens and walks one share of the vocabulary; the shares of a token
are joined afterwards. The backward pass is that of `linear_logprob_xla`: three matrix products per
tile, which cuBLAS does best.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from spark_jax.kernels import linear_logprob_xla

_NEVER = -1e30  # below every score; finite, so that differences are never NaN
_TOKENS, _WORDS, _DEPTH = 64, 128, 64  # a tile of scores, and how much of the width at once
_SHARES = 8  # of the vocabulary, so that a few thousand tokens fill all processors


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def linear_logprob_and_entropy(
    hidden: Array,
    vocab_matrix: Array,
    targets: Array,
    block: int,
    vocab_major: bool,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """See `linear_logprob.linear_logprob_and_entropy`; both matrices of one dtype. `block` is
    for the backward pass; `interpret` goes to `pallas_call`."""
    n, width = hidden.shape
    vocab = vocab_matrix.shape[0 if vocab_major else 1]
    if n == 0 or vocab == 0:
        return (jnp.zeros(n, jnp.float32),) * 3
    padding = -n % _TOKENS
    rows = n + padding
    statistics = pl.pallas_call(
        functools.partial(_kernel, width=width, vocab=vocab, vocab_major=vocab_major),
        name="linear_logprob_forward",
        grid=(rows // _TOKENS, _SHARES),
        out_specs=[pl.BlockSpec((None, _TOKENS), lambda i, s: (s, i))] * 4,
        out_shape=[jax.ShapeDtypeStruct((_SHARES, rows), jnp.float32)] * 4,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(
        jnp.pad(hidden, ((0, padding), (0, 0))),
        vocab_matrix,
        jnp.pad(targets, (0, padding)),
    )
    tops, totals, moments, chosen = (x[:, :n] for x in statistics)
    top = tops.max(axis=0)
    shrink = jnp.exp(tops - top)
    total = jnp.sum(shrink * totals, axis=0)
    # A share that holds no word has total 0, and its top is not to be looked at.
    moved = jnp.where(totals > 0, (tops - top) * totals, 0.0)
    moment = jnp.sum(shrink * (moments + moved), axis=0)
    logsumexp = top + jnp.log(total)
    return chosen.sum(axis=0) - logsumexp, logsumexp, jnp.log(total) - moment / total


def _kernel(
    hidden: Any,
    matrix: Any,
    targets: Any,
    top_out: Any,
    total_out: Any,
    moment_out: Any,
    chosen_out: Any,
    *,
    width: int,
    vocab: int,
    vocab_major: bool,
) -> None:
    """One block of tokens against one share; `moment` is Σ exp(score − top)(score − top)."""
    rows = pl.ds(pl.program_id(0) * _TOKENS, _TOKENS)
    target = targets[rows]
    share = pl.cdiv(pl.cdiv(vocab, _WORDS), _SHARES)  # in blocks

    def scores_of(first: Array) -> Array:
        words = pl.ds(first, _WORDS)
        known = first + jnp.arange(_WORDS) < vocab

        def add(k: Array, scores: Array) -> Array:
            part = pl.ds(k * _DEPTH, _DEPTH)
            there = k * _DEPTH + jnp.arange(_DEPTH) < width
            x = plgpu.load(hidden.at[rows, part], mask=there[None, :], other=0)
            if vocab_major:
                inside = known[:, None] & there[None, :]
                w = plgpu.load(matrix.at[words, part], mask=inside, other=0).T
            else:
                inside = there[:, None] & known[None, :]
                w = plgpu.load(matrix.at[part, words], mask=inside, other=0)
            return scores + jnp.dot(x, w, preferred_element_type=jnp.float32)

        zeros = jnp.zeros((_TOKENS, _WORDS), jnp.float32)
        scores = jax.lax.fori_loop(0, pl.cdiv(width, _DEPTH), add, zeros)
        return jnp.where(known[None, :], scores, _NEVER)

    def body(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        before, total, moment, chosen = carry
        first = j * _WORDS
        scores = scores_of(first)
        hit = first + jnp.arange(_WORDS)[None, :] == target[:, None]
        chosen += jnp.sum(jnp.where(hit, scores, 0.0), axis=1)
        top = jnp.maximum(before, jnp.max(scores, axis=1))
        z = scores - top[:, None]
        p = jnp.exp(z)
        shrink = jnp.exp(before - top)
        moved = jnp.where(total > 0, (before - top) * total, 0.0)
        moment = shrink * (moment + moved) + jnp.sum(p * z, axis=1)
        return top, shrink * total + jnp.sum(p, axis=1), moment, chosen

    zero = jnp.zeros(_TOKENS, jnp.float32)
    start = pl.program_id(1) * share
    stop = jnp.minimum(start + share, pl.cdiv(vocab, _WORDS))
    carry = (jnp.full(_TOKENS, _NEVER, jnp.float32), zero, zero, zero)
    results = jax.lax.fori_loop(start, stop, body, carry)
    for out, value in zip((top_out, total_out, moment_out, chosen_out), results, strict=True):
        out[...] = value


def _forward(
    hidden: Array,
    vocab_matrix: Array,
    targets: Array,
    block: int,
    vocab_major: bool,
    interpret: Any,
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    out = linear_logprob_and_entropy(hidden, vocab_matrix, targets, block, vocab_major, interpret)
    return out, (hidden, vocab_matrix, targets, *out[1:])


def _backward(
    block: int, vocab_major: bool, interpret: Any, *arguments: Any
) -> tuple[Array, Array, None]:
    return linear_logprob_xla.backward(block, vocab_major, *arguments)


linear_logprob_and_entropy.defvjp(_forward, _backward)
