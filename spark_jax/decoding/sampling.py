"""Sampling settings and the sampler: truncation without sorting, one uniform number per token.

Every setting is traced, and may differ from row to row, so changing it compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from spark_jax.parallel.sharding import mesh_in_scope, platform

_BLOCK = 128
_CACHED = 2**19  # bytes of weights, in a core's cache beside what else is there
_ONE_AS_BITS = 0x3F800000  # bit pattern of 1.0f; non-negative floats order like their bits


@flax.struct.dataclass
class Sampling:
    """How to draw the next token. Each field is one value for all prompts or one per prompt [P].

    Applied in the order temperature, top-k, top-p, min-p (as Hugging Face does). Tokens that tie
    with the last one kept by top-k or top-p are kept too. `stop_ids` ends a response; it is a tuple
    of ids, or [P, S] padded with -1.
    """

    temperature: Any = 1.0
    top_k: Any = 0  # 0 keeps all
    top_p: Any = 1.0
    min_p: Any = 0.0  # relative to the likeliest token
    greedy: Any = False
    stop_ids: Any = ()

    def per_prompt(self, num_prompts: int) -> Sampling:
        """The same settings as arrays [P] (stop ids [P, S], S a multiple of 8, padded with -1).

        Raises:
          ValueError: a value out of range, or an array of another length than `num_prompts`.
        """

        def rows(name: str, dtype: Any, valid: Callable[[Any], Any], need: str) -> np.ndarray:
            values = np.asarray(getattr(self, name), dtype)
            if values.shape not in ((), (num_prompts,)):
                raise ValueError(f"{name} has shape {values.shape}, needs () or ({num_prompts},)")
            if not np.all(valid(values)):
                raise ValueError(f"{name}={getattr(self, name)}; it must be {need}")
            return np.broadcast_to(values, num_prompts)

        stop = np.asarray(self.stop_ids, np.int32)
        stop = np.broadcast_to(stop, (num_prompts, stop.shape[-1]))
        width = max(8, -(-stop.shape[1] // 8) * 8)
        return Sampling(
            temperature=rows(
                "temperature", np.float32, lambda x: x > 0, "above 0 (greedy=True for the argmax)"
            ),
            top_k=rows("top_k", np.int32, lambda x: x >= 0, "0 (off) or more"),
            top_p=rows("top_p", np.float32, lambda x: (x > 0) & (x <= 1), "in (0, 1]"),
            min_p=rows("min_p", np.float32, lambda x: (x >= 0) & (x <= 1), "in [0, 1]"),
            greedy=rows("greedy", np.bool_, lambda x: (x == 0) | (x == 1), "True or False"),
            stop_ids=np.pad(stop, ((0, 0), (0, width - stop.shape[1])), constant_values=-1),
        )


def sample(
    logits: Float[Array, "N V"], uniforms: Float[Array, " N"], sampling: Sampling
) -> tuple[Int[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
    """Draws one token a row; `sampling` holds [N] arrays, `uniforms` are in [0, 1).

    Returns the tokens, their log-prob under the model (temperature 1, nothing cut), and their
    log-prob under the law they were drawn from (0 where greedy).
    """
    top = jnp.max(logits, axis=-1, keepdims=True)

    def draw() -> tuple[Array, Array, Array]:
        return _draw(logits, top, uniforms, sampling)

    def greedy() -> tuple[Array, Array, Array]:
        nothing = jnp.zeros_like(uniforms)
        return _argmax(logits), nothing, _row_sums(jnp.exp(logits - top))

    tokens, law_logprobs, total = jax.lax.cond(jnp.all(sampling.greedy), greedy, draw)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    return tokens, (chosen - top)[:, 0] - jnp.log(total), law_logprobs


def _draw(
    logits: Float[Array, "N V"],
    top: Float[Array, "N 1"],
    uniforms: Float[Array, " N"],
    sampling: Sampling,
) -> tuple[Int[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
    """Tokens, some of them perhaps greedy, their log-prob under the law, and the sum of
    exp(logits - top)."""
    weights = jnp.exp((logits - top) / sampling.temperature[:, None])
    total = jax.lax.cond(
        jnp.all(sampling.temperature == 1),
        lambda: _row_sums(weights),
        lambda: _row_sums(jnp.exp(logits - top)),
    )
    weights = jnp.where(weights >= threshold(weights, sampling)[:, None], weights, 0.0)
    drawn, kept = inverse_cdf(weights, uniforms)
    best = jax.lax.cond(jnp.any(sampling.greedy), _argmax, lambda x: jnp.zeros_like(drawn), logits)
    tokens = jnp.where(sampling.greedy, best, drawn)
    chosen = jnp.take_along_axis(weights, tokens[:, None], axis=-1)[:, 0]
    return tokens, jnp.where(sampling.greedy, 0.0, jnp.log(chosen / kept)), total


def threshold(weights: Float[Array, "N V"], sampling: Sampling) -> Float[Array, " N"]:
    """The least weight that is kept, for rows whose largest weight is 1.

    top-k and top-p are found by bisection over float bit patterns: a dozen or two of passes of
    counting or summing, only where a row asks for them, instead of a sort.
    """
    n, vocab = weights.shape
    rows = _rows_at_once(n, vocab)

    def search() -> Float[Array, " N"]:
        groups = jax.tree.map(
            lambda x: x.reshape(n // rows, rows, *x.shape[1:]),
            (weights, sampling.top_k, sampling.top_p),
        )
        return jax.lax.map(lambda group: _least_kept(*group), groups).reshape(n)

    asked = jnp.any((sampling.top_k > 0) | (sampling.top_p < 1))
    floor = jax.lax.cond(asked, search, lambda: jnp.zeros(n, weights.dtype))
    return jnp.maximum(floor, sampling.min_p)


def _rows_at_once(n: int, vocab: int) -> int:
    """On CPU as many rows are bisected together as stay in a core's cache: each pass over 16 rows
    of 50 thousand words would come from memory."""
    if platform() != "cpu" or mesh_in_scope() is not None:
        return n
    most = max(1, _CACHED // (4 * vocab))
    return next(rows for rows in range(min(n, most), 0, -1) if n % rows == 0)


def _least_kept(
    weights: Float[Array, "N V"], most: Int[Array, " N"], share: Float[Array, " N"]
) -> Float[Array, " N"]:
    """What the `most` likeliest tokens keep, then what a `share` of the mass of those keeps."""

    def top_k(floor: Array) -> Array:
        def excess(cut: Array) -> tuple[Array, Array]:
            kept = _row_sums((weights >= cut[:, None]).astype(jnp.float32))
            return kept - jnp.maximum(most, 1), jnp.ones_like(kept)

        return _largest_cut(excess, floor, most > 0)

    def top_p(floor: Array) -> Array:
        def mass(cut: Array) -> Array:
            return _row_sums(jnp.where(weights >= cut[:, None], weights, 0.0))

        total = mass(floor)
        wanted = share * total

        # What lies below this share of the mean weighs less than 1 - share together.
        low = jnp.maximum(floor, 0.99 * (1 - share) * total / weights.shape[1])
        low = jnp.where(share < 1, low, floor)
        return _largest_cut(lambda cut: (mass(cut) - wanted, cut), low, share < 1)

    floor = jnp.zeros(weights.shape[0], weights.dtype)
    floor = jax.lax.cond(jnp.any(most > 0), top_k, lambda x: x, floor)
    return jax.lax.cond(jnp.any(share < 1), top_p, lambda x: x, floor)


def inverse_cdf(
    weights: Float[Array, "N V"], uniforms: Float[Array, " N"]
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """The index at which the running sum passes `uniform · total`, and the total, for each row.

    Two levels (blocks, then inside one block), so no running sum over the vocabulary is made. An
    index of weight 0 is never returned.
    """
    n, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(n, -1, _BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    running = jnp.cumsum(sums, axis=-1)
    total = running[:, -1]
    target = uniforms * total
    block = _first_above(running, target)
    before = jnp.take_along_axis(running - sums, block[:, None], axis=-1)[:, 0]
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    # Rounding can put the target just below the block's start; 0 keeps weightless entries out.
    offset = _first_above(jnp.cumsum(inside, axis=-1), jnp.maximum(target - before, 0.0))
    return block * _BLOCK + offset, total


def _first_above(running: Float[Array, "N K"], target: Float[Array, " N"]) -> Int[Array, " N"]:
    """First index whose running sum exceeds the target; if none does, the last that adds to it."""
    first = jnp.sum(running <= target[:, None], axis=-1)
    last_adding = jnp.sum(running < running[:, -1:], axis=-1)
    return jnp.minimum(first, last_adding)


def _argmax(x: Float[Array, "N V"]) -> Int[Array, " N"]:
    """First index of the maximum, in two levels: a tenth of the time of argmax on CPU."""
    n, vocab = x.shape
    padding = ((0, 0), (0, -vocab % _BLOCK))
    blocks = jnp.pad(x, padding, constant_values=-jnp.inf).reshape(n, -1, _BLOCK)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + jnp.argmax(inside, axis=-1)


def _row_sums(x: Float[Array, "N V"]) -> Float[Array, " N"]:
    """Sums of rows in two levels: XLA:CPU makes vector code of it, not of one long sum."""
    blocks = jnp.pad(x, ((0, 0), (0, -x.shape[1] % _BLOCK))).reshape(len(x), -1, _BLOCK)
    return jnp.sum(jnp.sum(blocks, axis=1), axis=-1)


def _largest_cut(
    excess: Callable[[Array], tuple[Array, Array]], low: Float[Array, " N"], rows: Bool[Array, " N"]
) -> Float[Array, " N"]:
    """The largest cut in [low, 1] that still keeps enough, up to one that keeps the same weights;
    `low` itself where `rows` is false.

    `excess(cut)` is how much more than wanted is kept, and the least that one kept weight adds: as
    soon as the excess is below that, no kept weight can be spared. It holds at `low`, and falls.
    """

    def as_float(bits: Array) -> Array:
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def halve(bounds: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, unfinished = bounds
        middle = low + (high - low) // 2
        more, least = excess(as_float(middle))
        low = jnp.where(unfinished & (more >= 0), middle, low)
        high = jnp.where(more >= 0, high, middle)
        tight = (more >= 0) & (more < least)
        return low, high, unfinished & ~tight & (high - low > 1)

    bits = jax.lax.bitcast_convert_type(low, jnp.int32)
    high = jnp.full_like(bits, _ONE_AS_BITS + 1)
    bounds = (bits, high, rows)
    bits, _, _ = jax.lax.while_loop(lambda b: jnp.any(b[2]), halve, bounds)
    return as_float(bits)
