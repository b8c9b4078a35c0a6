"""The TPU kernel under the TPU interpreter, which looks for races, uninitialised memory and windows
out of bounds, against the plain reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from spark_jax.kernels import linear_logprob_tpu
from spark_jax.kernels.linear_logprob import linear_logprob_and_entropy as reference

INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@pytest.fixture(autouse=True)
def no_races(capfd):
    """The interpreter prints what it finds and goes on."""
    yield
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.fixture
def small_blocks(monkeypatch):
    """Several token and vocabulary blocks at shapes that an interpreter can run."""

    def blocks(n, width, vocab, dtype):
        return 8, min(16, vocab)

    monkeypatch.setattr(linear_logprob_tpu, "_blocks", blocks)


def inputs(n, width, vocab, dtype=jnp.float32, scale=1.0):
    rng = np.random.default_rng(n + vocab)
    hidden = jnp.asarray(scale * rng.normal(size=(n, width)), dtype)
    matrix = jnp.asarray(rng.normal(size=(width, vocab)), dtype)
    targets = jnp.asarray(rng.integers(0, vocab, n), jnp.int32)
    return hidden, matrix, targets, jnp.asarray(rng.normal(size=(3, n)), jnp.float32)


def kernel(hidden, matrix, targets, vocab_major=False):
    matrix = matrix.T if vocab_major else matrix
    return linear_logprob_tpu.linear_logprob_and_entropy(
        hidden, matrix, targets, vocab_major, INTERPRET
    )


def with_gradients(function, hidden, matrix, targets, weights):
    """The three outputs, and the gradients of their weighted sum in hidden and matrix."""
    outputs, pull = jax.vjp(lambda h, m: function(h, m, targets), hidden, matrix)
    return outputs, pull(tuple(weights))


expected_with_gradients = jax.jit(functools.partial(with_gradients, reference))


def assert_all_close(got, expected, atol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("tokens", "width", "vocab", "vocab_major"),
    [  # whole blocks, and ragged ends of every axis
        (19, 5, 47, True),
        *(
            pytest.param(*sizes, marks=pytest.mark.slow)
            for sizes in (
                (8, 8, 16, False),
                (16, 3, 32, True),
                (1, 8, 5, True),
                (7, 4, 17, False),
                (19, 5, 47, False),
            )
        ),
    ],
)
def test_equals_the_reference(tokens, width, vocab, vocab_major):
    arguments = inputs(tokens, width, vocab)
    got = with_gradients(functools.partial(kernel, vocab_major=vocab_major), *arguments)
    assert_all_close(got, expected_with_gradients(*arguments), atol=1e-4)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("vocab_major", [pytest.param(False, marks=pytest.mark.slow), True])
def test_spans_of_tokens_add_to_the_same_gradient(vocab_major, monkeypatch):
    """More tokens than have room in VMEM at once; the last span is not full."""
    arguments = inputs(21, 4, 32)
    monkeypatch.setattr(linear_logprob_tpu, "_spans", lambda n, width, tokens: (2, 16))
    got = with_gradients(functools.partial(kernel, vocab_major=vocab_major), *arguments)
    assert_all_close(got, expected_with_gradients(*arguments), atol=1e-4)


@pytest.mark.slow
def test_blocks_as_on_the_chip():
    arguments = inputs(1030, 4, 515)
    got = with_gradients(kernel, *arguments)
    assert_all_close(got, expected_with_gradients(*arguments), atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_bfloat16_is_summed_in_float32():
    """Outputs are those of the same numbers in float32; gradients are rounded once or twice."""
    hidden, matrix, targets, weights = inputs(16, 64, 40, jnp.bfloat16, scale=0.3)
    outputs, gradients = with_gradients(kernel, hidden, matrix, targets, weights)
    wide = hidden.astype(jnp.float32), matrix.astype(jnp.float32)
    expected, expected_gradients = expected_with_gradients(*wide, targets, weights)
    assert all(x.dtype == jnp.float32 for x in outputs)
    assert_all_close(outputs, expected, atol=1e-4)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert a.dtype == jnp.bfloat16
        assert_all_close(a, b, atol=0.02 * float(jnp.abs(b).max()))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.slow
def test_extreme_scores_stay_finite_and_right():
    scale = 1e5
    hidden, matrix, targets, weights = inputs(9, 4, 40, scale=scale)
    outputs, gradients = with_gradients(kernel, hidden, matrix, targets, weights)
    logprob, logsumexp, entropy = outputs
    scores = np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64)
    top = scores.max(axis=1, keepdims=True)
    expected = np.log(np.exp(scores - top).sum(axis=1)) + top[:, 0]
    np.testing.assert_allclose(logsumexp, expected, rtol=1e-5)
    np.testing.assert_allclose(
        logprob, scores[np.arange(9), targets] - expected, rtol=1e-4, atol=1e-6 * scale
    )
    assert np.all(np.asarray(entropy) >= -1e-6)
    assert np.all(np.asarray(entropy) <= np.log(40) + 1e-5)
    assert all(np.all(np.isfinite(x)) for x in gradients)


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_rows_without_weight_have_no_gradient_and_reach_no_other():
    """Masked rows: whatever stands in them changes nothing."""
    hidden, matrix, targets, weights = inputs(19, 4, 20)
    counts = jnp.arange(19) % 3 > 0
    other = jnp.where(counts[:, None], hidden, 1e3)
    _, (d_hidden, d_matrix) = with_gradients(kernel, hidden, matrix, targets, weights * counts)
    _, others = with_gradients(kernel, other, matrix, targets, weights * counts)
    assert np.all(np.asarray(d_hidden)[::3] == 0)
    np.testing.assert_array_equal(d_hidden, others[0])
    np.testing.assert_array_equal(d_matrix, others[1])


@pytest.mark.parametrize(("n", "width", "itemsize"), [(1, 64, 4), (5000, 2048, 2), (9000, 8192, 4)])
def test_blocks_keep_within_vmem_and_cover_all_tokens(n, width, itemsize):
    dtype = jnp.float32 if itemsize == 4 else jnp.bfloat16
    tokens, words = linear_logprob_tpu._blocks(n, width, 100_000, dtype)
    spans, span = linear_logprob_tpu._spans(n, width, tokens)
    assert tokens % 128 == 0
    assert span % tokens == 0
    assert spans * span >= n > (spans - 1) * span
    windows = 2 * itemsize * width * (2 * tokens + 3 * words)
    assert windows + 4 * width * (words + span) + 16 * words * tokens < linear_logprob_tpu._VMEM


def test_no_tokens():
    outputs, (d_hidden, d_matrix) = with_gradients(kernel, *inputs(0, 4, 8))
    assert [x.shape for x in outputs] == [(0,)] * 3
    assert d_hidden.shape == (0, 4)
    np.testing.assert_array_equal(d_matrix, np.zeros((4, 8)))
