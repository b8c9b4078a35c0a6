"""The block head: closed form, finite differences, odd sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from spark_jax.kernels import linear_logprob_xla
from spark_jax.kernels.linear_logprob import (
    default_implementation,
    linear_logprob,
    linear_logprob_and_entropy,
)


def inputs(n=7, width=6, vocab=11, scale=1.0):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(scale * rng.normal(size=(n, width)), jnp.float32)
    matrix = jnp.asarray(rng.normal(size=(width, vocab)), jnp.float32)
    return hidden, matrix, jnp.asarray(rng.integers(0, vocab, n), jnp.int32)


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_closed_form_for_any_block(block):
    hidden, matrix, targets = inputs()

    @jax.jit
    def compute(*arguments):
        pair = linear_logprob(*arguments, block=block)
        return linear_logprob_and_entropy(*arguments, block=block), pair

    (logprob, logsumexp, entropy), pair = compute(hidden, matrix, targets)
    scores = np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64)
    expected = np.log(np.exp(scores).sum(axis=1))
    p = np.exp(scores - expected[:, None])
    np.testing.assert_allclose(logsumexp, expected, rtol=1e-5)
    np.testing.assert_allclose(logprob, np.log(p[np.arange(7), targets]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(pair[0], logprob)
    np.testing.assert_array_equal(pair[1], logsumexp)


SIZES = [(7, 3, True), (50, 20, False), (9, 100, True)]
MORE = [(*x, major) for x in ((7, 3), (7, 6), (50, 20), (9, 100)) for major in (False, True)]


@pytest.mark.parametrize(
    ("n", "block", "vocab_major"),
    [*SIZES, *(pytest.param(*x, marks=pytest.mark.slow) for x in MORE if x not in SIZES)],
)
def test_tiles_of_words_that_do_not_divide_the_vocabulary(n, block, vocab_major):
    """Against full log-softmax and its gradient."""
    hidden, matrix, targets = inputs(n=n, vocab=1301)
    matrix = matrix.T if vocab_major else matrix

    def whole(h, m):
        log_p = jax.nn.log_softmax(h @ (m.T if vocab_major else m))
        logsumexp = jax.nn.logsumexp(h @ (m.T if vocab_major else m), axis=1)
        chosen = jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
        return chosen, logsumexp, -jnp.sum(jnp.exp(log_p) * log_p, axis=1)

    def tiled(h, m):
        return linear_logprob_and_entropy(h, m, targets, block=block, vocab_major=vocab_major)

    weights = np.float32(np.random.default_rng(1).normal(size=(3, n)))

    @functools.partial(jax.jit, static_argnums=0)
    def values_and_gradients(function, h, m):
        return *function(h, m), *_gradients(function, weights)(h, m)

    got, expected = (values_and_gradients(f, hidden, matrix) for f in (tiled, whole))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_the_gradient_of_a_wider_matrix_is_not_rounded():
    """bfloat16 hidden states against float32 words: sums over 4096 tokens of one word, of which
    bfloat16 would keep 8 bits, or none once the sum is 256 times a term."""
    hidden = jnp.ones((4096, 2), jnp.bfloat16)
    matrix, targets = jnp.zeros((2, 3)), jnp.zeros(4096, jnp.int32)

    @jax.jit
    @jax.grad
    def gradient_of(m):
        return jnp.sum(linear_logprob(hidden, m, targets, block=64)[0])

    gradient = gradient_of(matrix)
    assert gradient.dtype == jnp.float32
    third = float(jnp.bfloat16(1 / 3))
    np.testing.assert_allclose(gradient[:, 1], -4096 * third, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, 0], 4096 * float(jnp.bfloat16(2 / 3)), rtol=1e-6)


def test_a_narrow_matrix_has_its_gradient_rounded_once(monkeypatch):
    """On accelerators, where one block of tokens writes a bfloat16 gradient in place of float32
    sums; the words that two tiles share are not counted twice."""
    hidden, matrix, targets = inputs(n=50, vocab=1301)
    hidden, matrix = hidden.astype(jnp.bfloat16), matrix.astype(jnp.bfloat16)
    weights = np.float32(np.random.default_rng(1).normal(size=(3, 50)))

    def gradients():
        def function(h, m):
            return linear_logprob_and_entropy(h, m, targets, block=20)

        compute = _gradients(function, weights)
        return jax.jit(compute)(hidden, matrix), str(jax.make_jaxpr(compute)(hidden, matrix))

    (summed, program), wide = gradients(), "f32[6,1301]"
    assert wide in program
    monkeypatch.setattr(linear_logprob_xla, "platform", lambda: "tpu")
    rounded, program = gradients()
    assert wide not in program
    for a, b in zip(rounded, summed, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=2**-7)  # one bit: products may sum in other orders


def _gradients(function, weights):
    def loss(h, m):
        return sum(jnp.sum(w * x) for w, x in zip(weights, function(h, m), strict=True))

    return jax.grad(loss, argnums=(0, 1))


def test_gradients_by_finite_differences():
    hidden, matrix, targets = inputs(n=5, width=3, vocab=4)

    @jax.jit
    def outputs(h, m):
        return linear_logprob_and_entropy(h, m, targets, block=2)

    check_grads(outputs, (hidden, matrix), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=1e-2)


def test_no_tokens_give_empty_arrays_and_no_gradient():
    hidden, matrix, targets = inputs(n=0)
    assert [x.shape for x in linear_logprob_and_entropy(hidden, matrix, targets)] == [(0,)] * 3
    gradient = jax.grad(lambda m: jnp.sum(linear_logprob(hidden, m, targets)[0]))(matrix)
    np.testing.assert_array_equal(gradient, np.zeros(matrix.shape))


def test_huge_scores_stay_finite():
    hidden, matrix, targets = inputs(scale=1e4)
    results = linear_logprob_and_entropy(hidden, matrix, targets, block=4)
    assert all(np.all(np.isfinite(x)) for x in results)


def test_the_kernel_is_taken_on_one_tpu_where_scores_exceed_vmem(monkeypatch):
    assert default_implementation(151_936, 512) == "xla"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert default_implementation(151_936, 512) == "pallas_tpu"
    assert default_implementation(49_152, 512) == "xla"
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert default_implementation(151_936, 512) == "xla"


def test_vocab_major_is_the_transposed_matrix():
    hidden, matrix, targets = inputs()
    got = linear_logprob(hidden, matrix.T, targets, vocab_major=True)
    for a, b in zip(got, linear_logprob(hidden, matrix, targets), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    with pytest.raises(ValueError, match="vocab_major=True"):
        linear_logprob(hidden, matrix.T, targets)


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"'cuda'.*xla"):
        linear_logprob(*inputs(), implementation="cuda")
    with pytest.raises(ValueError, match="choose from"):
        linear_logprob_and_entropy(*inputs(), implementation="")
