"""Blocked scoring against the full log-softmax: values, gradients, masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark_jax import scoring
from spark_jax.models import transformer
from spark_jax.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=50, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=32
)
PARAMS = jax.jit(transformer.init, static_argnums=0)(CONFIG, jax.random.key(0))
TOKENS = jax.random.randint(jax.random.key(1), (3, 7), 0, 50)


@jax.jit
def full(params, tokens):
    scores = transformer.logits(params, CONFIG, transformer.forward(params, CONFIG, tokens))
    logprobs = jax.nn.log_softmax(scores[:, :-1])
    chosen = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


@functools.partial(jax.jit, static_argnums=2)
def of_tokens(params, tokens, chunk):
    both = scoring.token_logprobs_and_entropy(params, CONFIG, tokens, chunk=chunk)
    return both, scoring.token_logprobs(params, CONFIG, tokens, chunk=chunk)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_equals_full_log_softmax(chunk):
    (logprobs, entropy), alone = of_tokens(PARAMS, TOKENS, chunk)
    expected_logprobs, expected_entropy = full(PARAMS, TOKENS)
    np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-5)
    np.testing.assert_allclose(entropy, expected_entropy, atol=1e-5)
    np.testing.assert_array_equal(logprobs, alone)


def test_gradients_equal_those_of_full_log_softmax():
    weights = jax.random.normal(jax.random.key(2), (2, 3, 6))

    def loss(score, params):
        return sum(jnp.sum(w * x) for w, x in zip(weights, score(params), strict=True))

    def blocked(params):
        return scoring.token_logprobs_and_entropy(params, CONFIG, TOKENS, chunk=4)

    got = jax.jit(jax.grad(lambda p: loss(blocked, p)))(PARAMS)
    expected = jax.jit(jax.grad(lambda p: loss(lambda q: full(q, TOKENS), p)))(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


def test_responses_are_scored_as_if_alone():
    """Left-padded prompts, right-padded responses, one of them empty; exact zeros off the mask."""
    prompt_lengths, lengths = np.array([2, 4, 3]), np.array([3, 1, 0])
    prompt_mask = jnp.arange(4) >= 4 - prompt_lengths[:, None]
    mask = jnp.arange(3) < lengths[:, None]
    tokens = np.asarray(TOKENS)
    compute = jax.jit(
        functools.partial(scoring.response_logprobs_and_entropy, chunk=5), static_argnums=1
    )
    got, entropy = compute(PARAMS, CONFIG, tokens[:, :4], prompt_mask, tokens[:, 4:], mask)
    got, entropy = np.asarray(got), np.asarray(entropy)
    alone = np.zeros_like(tokens)  # from the start on, and causal: what follows is not seen
    for row, (p, n) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        alone[row, : p + n] = tokens[row, 4 - p : 4 + n]
    logprobs, entropies = map(np.asarray, full(PARAMS, alone))
    for row, (p, n) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        here = slice(p - 1, p + n - 1)
        np.testing.assert_allclose(got[row, :n], logprobs[row, here], atol=1e-5)
        np.testing.assert_allclose(entropy[row, :n], entropies[row, here], atol=1e-5)
    assert np.all(np.asarray(got)[~np.asarray(mask)] == 0)


def test_indexed_tokens_are_scored_as_among_all():
    """Any order, any repetition; each row's own."""
    index = jnp.asarray([[6, 1, 3, 3], [2, 2, 5, 1], [4, 6, 5, 3]])
    compute = jax.jit(functools.partial(scoring.logprobs_and_entropy_at, chunk=5), static_argnums=1)
    got = compute(PARAMS, CONFIG, TOKENS, index)
    for a, b in zip(got, full(PARAMS, TOKENS), strict=True):
        expected = np.take_along_axis(np.asarray(b), np.asarray(index) - 1, axis=1)
        np.testing.assert_allclose(a, expected, atol=1e-5)


def test_indices_of_zero_are_harmless():
    def loss(p, index):
        logprobs, entropy = scoring.logprobs_and_entropy_at(p, CONFIG, TOKENS, index)
        return jnp.sum(jnp.where(index > 0, logprobs + entropy, 0.0))

    grad = jax.jit(jax.grad(loss))
    filled = grad(PARAMS, jnp.asarray([[1, 4, 0, 0]] * 3))
    alone = grad(PARAMS, jnp.asarray([[1, 4]] * 3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), filled, alone)


def test_tokens_at_once_fit_the_budget():
    assert scoring.tokens_at_once(49152) == 320
    assert scoring.SCORES_BYTES >= 320 * 49152 * 4
    assert scoring.tokens_at_once(151936) == 256
    assert scoring.tokens_at_once(11) % 64 == 0


def test_scoring_4096_tokens_takes_a_quarter_gigabyte_of_temporaries(optimised):
    """At the vocabulary and width of SmolLM2, compiled only."""
    config = ModelConfig(49152, 576, 1, 9, 3, 64, 1536)
    params = transformer.shapes(config)
    arguments = [jax.ShapeDtypeStruct((16, 256), dtype) for dtype in (jnp.int32, jnp.bool_)] * 2

    def score(p, *batch):
        return scoring.response_logprobs_and_entropy(
            p, config, *(x[:, :16] for x in batch[:2]), *batch[2:]
        )

    compiled = jax.jit(score).lower(params, *arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.25 * 2**30


@pytest.mark.slow  # of a train step, test_performance_guards.py has it among fast tests
def test_no_scores_over_all_tokens_are_held(optimised):
    """Neither forward nor backward has an array of tokens × vocabulary."""
    config = ModelConfig(1031, 16, 1, 2, 1, 8, 32)
    params = transformer.shapes(config)
    tokens = jnp.zeros((4, 65), jnp.int32)

    def loss(p):
        logprobs, entropy = scoring.token_logprobs_and_entropy(p, config, tokens, chunk=32)
        return jnp.sum(logprobs + entropy)

    text = jax.jit(jax.value_and_grad(loss)).lower(params).compile().as_text()
    assert "[64,344]" in text  # about as many scores as 32 tokens have, of all words
    for shape in ("[256,1031]", "[4,64,1031]", "[256,344]", "[4,64,344]"):
        assert shape not in text
