"""Every sampler setting against its exact law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from spark_jax.decoding import sampling
from spark_jax.decoding.sampling import Sampling, inverse_cdf, sample, threshold


def exact_law(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """By sorting, one token at a time, in float64."""
    scaled = np.asarray(logits, np.float64) / temperature
    law = np.exp(scaled - scaled.max())
    order = np.argsort(-law)
    if top_k:
        law[order[top_k:]] = 0
    law /= law.sum()
    mass, keep = 0.0, []
    for token in order:
        if mass < top_p:
            keep.append(token)
        mass += law[token]
    law = np.where(np.isin(np.arange(len(law)), keep), law, 0)
    law = np.where(law >= min_p * law.max(), law, 0)
    return law / law.sum()


draw = jax.jit(sample)
cut_of = jax.jit(threshold)

SETTINGS = {
    "plain": {},
    "hot": {"temperature": 2.0},
    "cold": {"temperature": 0.5},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.3, "top_k": 8, "top_p": 0.9, "min_p": 0.05},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("vocab", [12, 300])
def test_frequencies_follow_the_exact_law(options, vocab):
    logits = np.random.default_rng(vocab).normal(size=vocab).astype(np.float32) * 2
    draws = 20_000
    law = exact_law(logits, **options)
    tokens, model_logprobs, law_logprobs = draw(
        jnp.broadcast_to(logits, (draws, vocab)),
        jax.random.uniform(jax.random.key(0), (draws,)),
        jax.tree.map(jnp.asarray, Sampling(**options).per_prompt(draws)),
    )
    counts = np.bincount(tokens, minlength=vocab)
    assert counts[law == 0].sum() == 0
    common = law * draws >= 5
    observed, expected = counts[common], law[common] * draws
    observed = np.append(observed, draws - observed.sum())
    expected = np.append(expected, max(draws - expected.sum(), 1e-9))
    if expected[-1] < 5:
        observed, expected = (
            observed[:-1],
            expected[:-1] * observed[:-1].sum() / expected[:-1].sum(),
        )
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    np.testing.assert_allclose(law_logprobs, np.log(law[np.asarray(tokens)]), atol=1e-4)
    plain = np.log(exact_law(logits))
    np.testing.assert_allclose(model_logprobs, plain[np.asarray(tokens)], atol=1e-4)


def test_rows_may_have_different_settings():
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    options = [SETTINGS[name] for name in ("plain", "cold", "top_k", "top_p")]
    fields = {
        name: np.asarray([getattr(Sampling(**o), name) for o in options])
        for name in ("temperature", "top_k", "top_p", "min_p")
    }
    sampling = jax.tree.map(jnp.asarray, Sampling(**fields).per_prompt(4))
    tokens, _, law_logprobs = draw(jnp.asarray(logits), jnp.full(4, 0.4), sampling)
    for row, option, token, logprob in zip(logits, options, tokens, law_logprobs, strict=True):
        np.testing.assert_allclose(logprob, np.log(exact_law(row, **option)[token]), atol=1e-4)


def test_greedy_takes_the_argmax_with_certainty():
    logits = jax.random.normal(jax.random.key(0), (5, 40))
    sampling = jax.tree.map(jnp.asarray, Sampling(greedy=True).per_prompt(5))
    tokens, _, law_logprobs = draw(logits, jnp.linspace(0, 0.99, 5), sampling)
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))
    np.testing.assert_array_equal(law_logprobs, 0)


@pytest.mark.parametrize("cached", [4 * 40, 4 * 40 * 4, 2**19])
def test_rows_are_cut_alike_however_many_at_once(cached, monkeypatch):
    """One at a time, three at a time (four do not divide nine), all at once."""
    monkeypatch.setattr(sampling, "_CACHED", cached)
    logits = np.random.default_rng(0).normal(size=(9, 40)).astype(np.float32) * 3
    fields = {
        "top_k": np.asarray([0, 3, 0, 7, 0, 0, 1, 0, 40]),
        "top_p": np.asarray([1.0, 1.0, 0.6, 0.9, 1.0, 0.3, 0.5, 0.99, 0.8]),
    }
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    cut = jax.jit(lambda *inputs: threshold(*inputs))(weights, Sampling(**fields).per_prompt(9))
    for i, row in enumerate(logits):
        law = exact_law(row, top_k=fields["top_k"][i], top_p=fields["top_p"][i])
        np.testing.assert_array_equal(weights[i] >= cut[i], law > 0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), top_k=st.integers(1, 40), top_p=st.floats(0.01, 0.999))
def test_bisection_keeps_what_a_sort_keeps(seed, top_k, top_p):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=40).astype(np.float32) * rng.choice([0.1, 1, 5])
    weights = np.exp(logits - logits.max())[None]
    for options in ({"top_k": top_k}, {"top_p": top_p}):
        kept = np.asarray(weights[0] >= cut_of(weights, Sampling(**options).per_prompt(1))[0])
        law = exact_law(logits, **options)
        # A sum that lands on top_p to float precision may fall on either side.
        close = np.isclose(np.cumsum(np.sort(np.asarray(weights[0]) / weights.sum())[::-1]), top_p)
        assert ("top_p" in options and close.any()) or np.array_equal(kept, law > 0)


def test_ties_at_the_edge_are_all_kept():
    weights = jnp.asarray([[1.0, 0.5, 0.5, 0.5, 0.25]])
    for options in ({"top_k": 2}, {"top_p": 0.5}):
        cut = cut_of(weights, Sampling(**options).per_prompt(1))
        assert np.sum(weights[0] >= cut[0]) == 4


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, 1e-30, 1e-6, 0.3, 1.0]), min_size=1, max_size=600),
    uniform=st.floats(0, 1, exclude_max=True, width=32),
)
def test_inverse_cdf_never_returns_a_weightless_index(weights, uniform):
    weights = [*weights, 1.0, 0.0]
    padded = np.zeros((1, 640), np.float32)
    padded[0, : len(weights)] = weights
    index, total = jax.jit(inverse_cdf)(padded, np.asarray([uniform], np.float32))
    assert weights[int(index[0])] > 0
    np.testing.assert_allclose(total[0], np.sum(weights), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0.*greedy=True"),
        ({"top_p": 0.0}, r"top_p=0.0.*\(0, 1\]"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": np.ones(3)}, r"top_p has shape \(3,\), needs \(\) or \(2,\)"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options).per_prompt(2)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), vocab=st.sampled_from([128, 300]))
def test_greedy_takes_the_first_of_equal_maxima(seed, vocab):
    logits = np.random.default_rng(seed).integers(0, 4, (3, vocab)).astype(np.float32)
    sampling = jax.tree.map(jnp.asarray, Sampling(greedy=[True, False, True]).per_prompt(3))
    tokens, _, _ = draw(jnp.asarray(logits), jnp.full(3, 0.5), sampling)
    np.testing.assert_array_equal(np.asarray(tokens)[::2], np.argmax(logits, axis=-1)[::2])


def test_rows_that_cut_nothing_do_not_prolong_the_search():
    """Their cut is 0 whatever the others ask for."""
    weights = jnp.exp(jax.random.normal(jax.random.key(0), (3, 200)))
    weights /= weights.max(axis=1, keepdims=True)
    top_p, top_k = np.asarray([1.0, 0.5, 1.0]), np.asarray([0, 0, 7])
    cut = np.asarray(cut_of(weights, Sampling(top_p=top_p, top_k=top_k).per_prompt(3)))
    kept = np.sum(np.asarray(weights) >= cut[:, None], axis=1)
    assert cut[0] == 0
    assert 1 < kept[1] < 100
    assert kept[2] == 7
