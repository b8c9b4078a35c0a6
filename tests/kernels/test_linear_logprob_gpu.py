"""The GPU kernel interpreted, against the plain reference, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from for_cuda import text as text_for_cuda

from spark_jax.kernels import linear_logprob_gpu
from spark_jax.kernels.linear_logprob import linear_logprob_and_entropy


def inputs(n, width, vocab, dtype=jnp.float32, scale=1.0):
    rng = np.random.default_rng(n + vocab)
    hidden = jnp.asarray(scale * rng.normal(size=(n, width)), dtype)
    matrix = jnp.asarray(rng.normal(size=(width, vocab)), dtype)
    targets = jnp.asarray(rng.integers(0, vocab, n), jnp.int32)
    return hidden, matrix, targets, jnp.asarray(rng.normal(size=(3, n)), jnp.float32)


def kernel(hidden, matrix, targets, vocab_major=False):
    matrix = matrix.T if vocab_major else matrix
    return linear_logprob_gpu.linear_logprob_and_entropy(
        hidden, matrix, targets, 16, vocab_major, True
    )


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(function, hidden, matrix, targets, weights):
    outputs, pull = jax.vjp(lambda h, m: function(h, m, targets), hidden, matrix)
    return outputs, pull(tuple(weights))


SIZES = [(70, 65, 1300, False), (1, 3, 5, True)]
MORE = [(n, width, vocab, major)
        for n, width, vocab in ((64, 64, 128), (1, 3, 5), (70, 65, 1300), (19, 128, 257))
        for major in (False, True)]  # fmt: skip


@pytest.mark.parametrize(
    ("n", "width", "vocab", "vocab_major"),
    [*SIZES, *(pytest.param(*x, marks=pytest.mark.slow) for x in MORE if x not in SIZES)],
)
def test_equals_the_reference(n, width, vocab, vocab_major):
    arguments = inputs(n, width, vocab, scale=width**-0.5)
    got = with_gradients(functools.partial(kernel, vocab_major=vocab_major), *arguments)
    expected = with_gradients(linear_logprob_and_entropy, *arguments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_extreme_scores_stay_finite():
    hidden, matrix, targets, weights = inputs(9, 4, 300, scale=1e5)
    (logprob, logsumexp, entropy), gradients = with_gradients(
        kernel, hidden, matrix, targets, weights
    )
    scores = np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64)
    np.testing.assert_allclose(logsumexp, scores.max(axis=1), rtol=1e-5)
    assert np.all(np.asarray(logprob) <= 1)
    assert np.all(np.asarray(entropy) >= -1e-6)
    assert all(np.all(np.isfinite(x)) for x in gradients)


@pytest.mark.slow
@pytest.mark.parametrize("vocab_major", [False, True])
def test_lowers_for_cuda(vocab_major):
    matrix = (49152, 576) if vocab_major else (576, 49152)

    def loss(hidden, matrix, targets):
        outputs = linear_logprob_gpu.linear_logprob_and_entropy(
            hidden, matrix, targets, 512, vocab_major
        )
        return sum(jnp.sum(x) for x in outputs)

    text = text_for_cuda(
        jax.jit(jax.grad(loss, (0, 1))),
        jax.ShapeDtypeStruct((4096, 576), jnp.bfloat16),
        jax.ShapeDtypeStruct(matrix, jnp.bfloat16),
        jax.ShapeDtypeStruct((4096,), jnp.int32),
    )
    assert "triton" in text


def test_no_tokens():
    outputs, (d_hidden, d_matrix) = with_gradients(kernel, *inputs(0, 4, 8))
    assert [x.shape for x in outputs] == [(0,)] * 3
    assert d_hidden.shape == (0, 4)
    np.testing.assert_array_equal(d_matrix, np.zeros((4, 8)))
