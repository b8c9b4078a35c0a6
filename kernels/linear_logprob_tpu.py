"""`linear_logprob` for TPU, in Pallas (Mosaic): scores live in registers and VMEM, never in HBM.

Scores are held as [vocabulary block, token block]: sums over the vocabulary then run down sublanes,
which is plain addition of registers, and a token's statistics are rows that lie dense in lanes.

The backward pass computes the scores once more (4 matrix products in all, as many as the blocked
XLA code): vocabulary blocks outside, token blocks inside, the gradient of all hidden states of one
span of tokens stays in VMEM.

Equations, with z = scores − logsumexp and p = exp(z):
  logprob = z[target], entropy = −Σ p z,
  dscores = p · (g_logsumexp − g_logprob − g_entropy · (z + entropy)) + g_logprob · [v = target].
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

_NEVER = -1e30  # below every score; finite, so that differences are never NaN
_MIB = 2**20
_VMEM = 62 * _MIB  # of the 64 MiB of a v5p core (v5e and v6e have 128)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def linear_logprob_and_entropy(
    hidden: Array, vocab_matrix: Array, targets: Array, vocab_major: bool, interpret: Any = False
) -> tuple[Array, Array, Array]:
    """See `linear_logprob.linear_logprob_and_entropy`; both matrices of one dtype.

    `interpret` goes to `pallas_call` (`pltpu.InterpretParams` in tests).
    """
    n, width = hidden.shape
    vocab = vocab_matrix.shape[0 if vocab_major else 1]
    if n == 0 or vocab == 0:
        return (jnp.zeros(n, jnp.float32),) * 3
    tokens, words = _blocks(n, width, vocab, hidden.dtype)
    hidden = _pad(hidden, tokens)
    blocks = len(hidden) // tokens
    row = pl.BlockSpec((None, 1, tokens), lambda i, j: (i, 0, 0))
    outputs = pl.pallas_call(
        functools.partial(_forward_kernel, vocab=vocab, words=words, vocab_major=vocab_major),
        name="linear_logprob_forward",
        grid=(blocks, pl.cdiv(vocab, words)),
        in_specs=[
            row,
            pl.BlockSpec((tokens, width), lambda i, j: (i, 0)),
            _vocab_spec(words, width, vocab_major, lambda i, j: j),
        ],
        out_specs=[row] * 3,
        out_shape=[jax.ShapeDtypeStruct((blocks, 1, tokens), jnp.float32)] * 3,
        scratch_shapes=[pltpu.VMEM((1, tokens), jnp.float32)] * 4,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=_cost(hidden, vocab, products=1, matrix_passes=blocks, hidden_passes=1),
        interpret=interpret,
    )(_rows(targets, tokens), hidden, vocab_matrix)
    logprob, logsumexp, entropy = (x.reshape(-1)[:n] for x in outputs)
    return logprob, logsumexp, entropy


def _forward(
    hidden: Array, vocab_matrix: Array, targets: Array, vocab_major: bool, interpret: Any
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    out = linear_logprob_and_entropy(hidden, vocab_matrix, targets, vocab_major, interpret)
    return out, (hidden, vocab_matrix, targets, *out[1:])


def _backward(
    vocab_major: bool, interpret: Any, residuals: tuple[Array, ...], gradients: tuple[Array, ...]
) -> tuple[Array, Array, None]:
    hidden, vocab_matrix, targets, logsumexp, entropy = residuals
    g_logprob, g_logsumexp, g_entropy = gradients
    n, width = hidden.shape
    vocab = vocab_matrix.shape[0 if vocab_major else 1]
    if n == 0 or vocab == 0:
        return jnp.zeros_like(hidden), jnp.zeros_like(vocab_matrix), None
    tokens, _ = _blocks(n, width, vocab, hidden.dtype)
    spans, span = _spans(n, width, tokens)
    constant = g_logsumexp - g_logprob - g_entropy * entropy
    statistics = (targets, logsumexp, constant, g_entropy, g_logprob)
    inputs = (
        _pad(hidden, span).reshape(spans, span, width),
        *(_pad(x, span).reshape(spans, span // tokens, 1, tokens) for x in statistics),
    )
    step = functools.partial(
        _backward_span, vocab_matrix, vocab_major=vocab_major, interpret=interpret
    )
    if spans == 1:
        d_matrix, d_hidden = step(None, tuple(x[0] for x in inputs))
    else:  # a span's share is added to the gradient of the matrix in place
        d_matrix, d_hidden = jax.lax.scan(step, jnp.zeros_like(vocab_matrix), inputs)
    return d_hidden.reshape(-1, width)[:n], d_matrix, None


linear_logprob_and_entropy.defvjp(_forward, _backward)


def _backward_span(
    vocab_matrix: Array,
    so_far: Array | None,
    inputs: tuple[Array, ...],
    *,
    vocab_major: bool,
    interpret: Any,
) -> tuple[Array, Array]:
    """Gradients of the matrix (added to `so_far`) and of one span of hidden states."""
    hidden, *rows = inputs
    span, width = hidden.shape
    vocab = vocab_matrix.shape[0 if vocab_major else 1]
    blocks, _, tokens = rows[0].shape
    _, words = _blocks(span, width, vocab, hidden.dtype)
    last = pl.cdiv(vocab, words) - 1
    row = pl.BlockSpec((None, 1, tokens), lambda j, i: (i, 0, 0))
    matrix = _vocab_spec(words, width, vocab_major, lambda j, i: j)
    added = [] if so_far is None else [so_far]
    d_matrix, d_hidden = pl.pallas_call(
        functools.partial(
            _backward_kernel,
            vocab=vocab,
            words=words,
            vocab_major=vocab_major,
            adds=so_far is not None,
        ),
        name="linear_logprob_backward",
        grid=(last + 1, blocks),
        in_specs=[
            *[row] * 5,
            pl.BlockSpec((tokens, width), lambda j, i: (i, 0)),
            matrix,
            *[matrix] * len(added),
        ],
        out_specs=[
            matrix,
            # Only the last vocabulary block writes; until then the window rests on block 0.
            pl.BlockSpec((tokens, width), lambda j, i: (jnp.where(j == last, i, 0), 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(vocab_matrix.shape, vocab_matrix.dtype),
            jax.ShapeDtypeStruct(hidden.shape, hidden.dtype),
        ],
        scratch_shapes=[
            pltpu.VMEM((words, width) if vocab_major else (width, words), jnp.float32),
            pltpu.VMEM((span, width), jnp.float32),
        ],
        input_output_aliases={7: 0} if added else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=_cost(
            hidden,
            vocab,
            products=3,
            matrix_passes=2 + len(added),
            hidden_passes=last + 2,
        ),
        interpret=interpret,
    )(*rows, hidden, vocab_matrix, *added)
    return d_matrix, d_hidden


def _forward_kernel(
    target: Any,
    hidden: Any,
    matrix: Any,
    logprob: Any,
    logsumexp: Any,
    entropy: Any,
    top: Any,
    total: Any,
    moment: Any,
    chosen: Any,
    *,
    vocab: int,
    words: int,
    vocab_major: bool,
) -> None:
    """One token block meets one vocabulary block; `moment` is Σ exp(score − top)(score − top)."""
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, _NEVER)
        for total_like in (total, moment, chosen):
            total_like[...] = jnp.zeros_like(total_like)

    scores = _dot(matrix[...], hidden[...], 1 if vocab_major else 0, 1)  # [words, tokens]
    word = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    if vocab % words:
        scores = jnp.where(word < vocab - j * words, scores, _NEVER)
    hit = word == target[...] - j * words
    chosen[...] += jnp.sum(jnp.where(hit, scores, 0.0), axis=0, keepdims=True)
    before, n = top[...], total[...]
    now = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
    z = scores - now
    p = jnp.exp(z)
    shrink = jnp.exp(before - now)
    top[...] = now
    total[...] = shrink * n + jnp.sum(p, axis=0, keepdims=True)
    # Where nothing was summed yet, before − now is huge and n is 0.
    moved = jnp.where(n > 0, (before - now) * n, 0.0)
    moment[...] = shrink * (moment[...] + moved) + jnp.sum(p * z, axis=0, keepdims=True)

    @pl.when(j == pl.num_programs(1) - 1)
    def _() -> None:
        log_total = jnp.log(total[...])
        logsumexp[...] = top[...] + log_total
        logprob[...] = chosen[...] - top[...] - log_total
        entropy[...] = log_total - moment[...] / total[...]


def _backward_kernel(
    target: Any,
    logsumexp: Any,
    constant: Any,
    g_entropy: Any,
    g_logprob: Any,
    hidden: Any,
    matrix: Any,
    *rest: Any,
    vocab: int,
    words: int,
    vocab_major: bool,
    adds: bool,
) -> None:
    """One vocabulary block meets one token block."""
    so_far, (d_matrix, d_hidden, d_matrix_sum, d_hidden_sum) = rest[:adds], rest[adds:]
    j, i = pl.program_id(0), pl.program_id(1)
    h, w = hidden[...], matrix[...]
    tokens = h.shape[0]
    vocab_axis, width_axis = (0, 1) if vocab_major else (1, 0)
    if vocab % words:  # what lies behind the matrix may be anything, NaN included
        index = jax.lax.broadcasted_iota(jnp.int32, w.shape, vocab_axis)
        w = jnp.where(index < vocab - j * words, w, jnp.zeros_like(w))
    z = _dot(w, h, width_axis, 1) - logsumexp[...]  # [words, tokens]
    word = jax.lax.broadcasted_iota(jnp.int32, z.shape, 0)
    d = jnp.exp(z) * (constant[...] - g_entropy[...] * z)
    d += jnp.where(word == target[...] - j * words, g_logprob[...], 0.0)
    if vocab % words:
        d = jnp.where(word < vocab - j * words, d, 0.0)
    d = d.astype(h.dtype)

    @pl.when(i == 0)
    def _() -> None:
        d_matrix_sum[...] = so_far[0][...].astype(jnp.float32) if adds else jnp.zeros(w.shape)

    d_matrix_sum[...] += _dot(d, h, 1, 0) if vocab_major else _dot(h, d, 0, 1)

    @pl.when(i == pl.num_programs(1) - 1)
    def _() -> None:
        d_matrix[...] = d_matrix_sum[...].astype(d_matrix.dtype)

    here = pl.ds(pl.multiple_of(i * tokens, tokens), tokens)

    @pl.when(j == 0)
    def _() -> None:
        d_hidden_sum[here, :] = jnp.zeros(h.shape, jnp.float32)

    d_hidden_sum[here, :] += _dot(d, w, 0, vocab_axis)

    @pl.when(j == pl.num_programs(0) - 1)
    def _() -> None:
        d_hidden[...] = d_hidden_sum[here, :].astype(d_hidden.dtype)


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Sum over one axis of each, accumulated in float32."""
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _blocks(n: int, width: int, vocab: int, dtype: Any) -> tuple[int, int]:
    """Tokens and words of a block: at most 4 MiB of hidden states and 2 MiB of the matrix.

    Many tokens, because every token block reads the whole matrix: 1024 make a v6e do enough with
    each byte of it.
    """
    row = width * jnp.dtype(dtype).itemsize
    tokens, words = 1024, 512
    while tokens > 128 and tokens * row > 4 * _MIB:
        tokens //= 2
    while words > 128 and words * row > 2 * _MIB:
        words //= 2
    return min(tokens, -(-n // 128) * 128), min(words, vocab)


def _spans(n: int, width: int, tokens: int) -> tuple[int, int]:
    """Number and length of the spans whose float32 gradients fit in 16 MiB of VMEM."""
    fits = max(1, 16 * _MIB // (width * 4 * tokens))  # token blocks
    blocks = -(-n // tokens)
    spans = -(-blocks // fits)
    return spans, -(-blocks // spans) * tokens


def _vocab_spec(words: int, width: int, vocab_major: bool, index: Any) -> pl.BlockSpec:
    if vocab_major:
        return pl.BlockSpec((words, width), lambda *grid: (index(*grid), 0))
    return pl.BlockSpec((width, words), lambda *grid: (0, index(*grid)))


def _pad(x: Array, multiple: int) -> Array:
    padding = -len(x) % multiple
    return x if padding == 0 else jnp.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1)))


def _rows(x: Array, tokens: int) -> Array:
    """[N] as [blocks, 1, tokens]: a block is then a whole row, whatever its length."""
    return _pad(x, tokens).reshape(-1, 1, tokens)


def _cost(
    hidden: Array, vocab: int, *, products: int, matrix_passes: int, hidden_passes: int
) -> pl.CostEstimate:
    """For XLA's scheduler, which knows nothing of what a kernel does."""
    n, width = hidden.shape
    return pl.CostEstimate(
        flops=2 * products * n * width * vocab,
        transcendentals=n * vocab,
        bytes_accessed=(matrix_passes * vocab + hidden_passes * n) * width * hidden.dtype.itemsize,
    )
