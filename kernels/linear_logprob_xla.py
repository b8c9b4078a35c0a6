"""`linear_logprob` in plain JAX: the reference of the kernels, and what CPU runs.

Scores live in tiles of some tokens by some words, as many as `block` tokens have over the whole
vocabulary; a tile's log-sum-exp and entropy are joined to those of the words before it. The
backward pass makes each tile once more from the log-sum-exp. Tiles are narrow in words rather than
in tokens: the matrix is then read, and its gradient written, once for many tokens.

With z = scores − logsumexp and p = exp(z): logprob = z[target], entropy = −Σ p z, and
  dscores = p · (g_logsumexp − g_logprob − g_entropy · (z + entropy)) + g_logprob · [v = target].
Products are of hidden's dtype with float32 sums, backwards too, so dscores are rounded to it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spark_jax.parallel.sharding import platform

_NEVER = -1e30  # below every score; finite, so that differences are never NaN
_FEWEST_WORDS = 512  # of a tile: fewer make a thin product


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def linear_logprob_and_entropy(
    hidden: Array, vocab_matrix: Array, targets: Array, block: int, vocab_major: bool
) -> tuple[Array, Array, Array]:
    """See `linear_logprob.linear_logprob_and_entropy`. The matrix may be wider than hidden, such as
    the float32 master of a bfloat16 computation: each tile's part is rounded for its product, and
    the gradient never is."""
    tiles = _tiles(len(hidden), _vocab(vocab_matrix, vocab_major), block)
    walk = functools.partial(_walk, vocab_matrix, tiles=tiles, vocab_major=vocab_major)
    results = jax.lax.map(lambda rows: walk(*rows), _in_blocks((hidden, targets), tiles.tokens))
    logprob, logsumexp, entropy = (x.reshape(-1)[: len(hidden)] for x in results)
    return logprob, logsumexp, entropy


def forward(
    hidden: Array, vocab_matrix: Array, targets: Array, block: int, vocab_major: bool
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    out = linear_logprob_and_entropy(hidden, vocab_matrix, targets, block, vocab_major)
    return out, (hidden, vocab_matrix, targets, *out[1:])


def backward(
    block: int, vocab_major: bool, residuals: tuple[Array, ...], gradients: Any
) -> tuple[Array, Array, None]:
    """From hidden, matrix, targets, log-sum-exp and entropy. The gradient of the matrix is summed
    in float32; with one block of tokens nothing is summed and it has the matrix's dtype at once."""
    hidden, matrix, targets, logsumexp, entropy = residuals
    g_logprob, g_logsumexp, g_entropy = gradients
    tiles = _tiles(len(hidden), _vocab(matrix, vocab_major), block)
    constant = g_logsumexp - g_logprob - g_entropy * entropy
    rows = _in_blocks((hidden, targets, logsumexp, constant, g_entropy, g_logprob), tiles.tokens)
    walk_back = functools.partial(_walk_back, matrix, tiles=tiles, vocab_major=vocab_major)
    summed = len(rows[0]) > 1 or platform() == "cpu"  # where a narrow one costs passes, see _part
    start = jnp.zeros(matrix.shape, jnp.float32 if summed else matrix.dtype)
    d_matrix, d_hidden = jax.lax.scan(walk_back, start, rows)
    d_hidden = d_hidden.reshape(-1, hidden.shape[1])[: len(hidden)]
    return d_hidden, d_matrix.astype(matrix.dtype), None


linear_logprob_and_entropy.defvjp(forward, backward)


class _Tiles(NamedTuple):
    tokens: int  # of a tile
    words: int
    vocab: int

    @property
    def across(self) -> int:
        """Tiles of one block of tokens. The last overlaps with the one before it where the words of
        a tile do not divide the vocabulary."""
        return -(-self.vocab // self.words)


def _tiles(tokens: int, vocab: int, block: int) -> _Tiles:
    """Of equal size, and at most `block` · vocab scores, but one word of one token."""
    scores = max(block, 1) * vocab
    most = max(scores // min(vocab, _FEWEST_WORDS), 1)
    tokens = _share(max(tokens, 1), most)
    return _Tiles(tokens, _share(vocab, max(scores // tokens, 1)), vocab)


def _share(total: int, most: int) -> int:
    """The largest of the fewest equal parts of at most `most`."""
    return -(-total // -(-total // most))


def _walk(
    matrix: Array,
    hidden: Float[Array, "N D"],
    targets: Int[Array, " N"],
    *,
    tiles: _Tiles,
    vocab_major: bool,
) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
    """One block of tokens against all words; `moment` is Σ exp(score − top)(score − top)."""

    def tile(carry: tuple[Array, ...], number: Array) -> tuple[tuple[Array, ...], None]:
        before, total, moment, chosen = carry
        words, new = _words(number, tiles)
        scores = _scores(hidden, _part(matrix, words[0], tiles, vocab_major), vocab_major)
        place = targets - words[0]
        own = jnp.take_along_axis(scores, jnp.clip(place, 0, tiles.words - 1)[:, None], axis=1)
        chosen = jnp.where((place >= 0) & (place < tiles.words), own[:, 0], chosen)
        if new is not None:
            scores = jnp.where(new, scores, _NEVER)
        top = jnp.maximum(before, scores.max(axis=1))
        z = scores - top[:, None]
        p = jnp.exp(z)
        shrink = jnp.exp(before - top)
        moved = jnp.where(total > 0, (before - top) * total, 0.0)
        moment = shrink * (moment + moved) + jnp.sum(p * z, axis=1)
        return (top, shrink * total + jnp.sum(p, axis=1), moment, chosen), None

    zero = jnp.zeros(len(hidden), jnp.float32)
    start: tuple[Array, ...] = (jnp.full_like(zero, _NEVER), zero, zero, zero)
    (top, total, moment, chosen), _ = jax.lax.scan(tile, start, jnp.arange(tiles.across))
    logsumexp = top + jnp.log(total)
    return chosen - logsumexp, logsumexp, jnp.log(total) - moment / total


def _walk_back(
    matrix: Array,
    d_matrix: Array,
    rows: tuple[Array, ...],
    *,
    tiles: _Tiles,
    vocab_major: bool,
) -> tuple[Array, Array]:
    """Adds one block of tokens to the gradient of the matrix; and that of these hidden states."""
    hidden, targets, logsumexp, constant, g_entropy, g_logprob = rows
    axis = 0 if vocab_major else 1

    def tile(carry: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
        d_matrix, d_hidden = carry
        words, new = _words(number, tiles)
        part = _part(matrix, words[0], tiles, vocab_major).astype(hidden.dtype)
        z = _scores(hidden, part, vocab_major) - logsumexp[:, None]
        d = jnp.exp(z) * (constant[:, None] - g_entropy[:, None] * z)
        d = d + jnp.where(words == targets[:, None], g_logprob[:, None], 0.0)
        d = (d if new is None else jnp.where(new, d, 0.0)).astype(hidden.dtype)
        d_part = _gradient_of_part(hidden, d, vocab_major)
        so_far = jax.lax.dynamic_slice_in_dim(d_matrix, words[0], tiles.words, axis)
        new_part = (so_far + d_part).astype(d_matrix.dtype)
        d_matrix = jax.lax.dynamic_update_slice_in_dim(d_matrix, new_part, words[0], axis)
        d_hidden = d_hidden + _dot("nv,vd->nd" if vocab_major else "nv,dv->nd", d, part)
        return (d_matrix, d_hidden), None

    start = (d_matrix, jnp.zeros(hidden.shape, jnp.float32))
    (d_matrix, d_hidden), _ = jax.lax.scan(tile, start, jnp.arange(tiles.across))
    return d_matrix, d_hidden.astype(hidden.dtype)


def _words(number: Array, tiles: _Tiles) -> tuple[Int[Array, " W"], Bool[Array, " W"] | None]:
    """The words of a tile, and which of them no tile had before; None: all of them."""
    first = number * tiles.words
    words = jnp.minimum(first, tiles.vocab - tiles.words) + jnp.arange(tiles.words)
    return words, words >= first if tiles.vocab % tiles.words else None


def _part(matrix: Array, first: Array, tiles: _Tiles, vocab_major: bool) -> Array:
    """The matrix's share of a tile. XLA:CPU widens all of a bfloat16 array to cut a part from it,
    and so gets integers."""
    narrow = matrix.dtype == jnp.bfloat16 and platform() == "cpu"
    whole = jax.lax.bitcast_convert_type(matrix, jnp.uint16) if narrow else matrix
    axis = 0 if vocab_major else 1
    part = jax.lax.dynamic_slice_in_dim(whole, first, tiles.words, axis)
    return jax.lax.bitcast_convert_type(part, jnp.bfloat16) if narrow else part


def _scores(hidden: Array, part: Array, vocab_major: bool) -> Float[Array, "N W"]:
    equation = "nd,vd->nv" if vocab_major else "nd,dv->nv"
    return _dot(equation, hidden, part.astype(hidden.dtype))


def _dot(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _gradient_of_part(
    hidden: Float[Array, "N D"], d: Float[Array, "N W"], vocab_major: bool
) -> Float[Array, "D W"] | Float[Array, "W D"]:
    """hiddenᵀ · d. XLA:CPU sums over the first axis of its first operand in float32 only; with two
    axes to sum over it transposes that operand, here the narrow one. The barrier keeps it from
    making one product again of this one and the transpose."""
    if platform() != "cpu" or hidden.dtype == jnp.float32:
        return _dot("nd,nv->vd" if vocab_major else "nd,nv->dv", hidden, d)
    d_part = _dot("bnd,bnv->dv", hidden[None], d[None])
    return jax.lax.optimization_barrier(d_part).T if vocab_major else d_part


def _in_blocks(rows: tuple[Any, ...], tokens: int) -> tuple[Array, ...]:
    """[N, ...] -> [blocks, tokens, ...], the last block filled up with zeros."""
    return tuple(
        jnp.pad(x, ((0, -len(x) % tokens), *[(0, 0)] * (x.ndim - 1))).reshape(
            -1, tokens, *x.shape[1:]
        )
        for x in rows
    )


def _vocab(matrix: Array, vocab_major: bool) -> int:
    return matrix.shape[0 if vocab_major else 1]
