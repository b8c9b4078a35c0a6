import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import CONFIG, params

from spark_jax.scoring import response_logprobs_and_entropy
from spark_jax.training import state as train_state
from spark_jax.training.policy import Objective, PolicyBatch, policy_step

ROWS, PROMPT, LENGTH = 6, 4, 7
EVERY_TERM = {"kl_coefficient": 0.3, "entropy_coefficient": 0.2, "clip_low": 0.1, "clip_high": 0.3}
OBJECTIVES = [
    Objective(aggregation="token_mean", **EVERY_TERM),
    Objective(aggregation="sequence_mean", **EVERY_TERM),
    Objective(aggregation="sequence_mean", importance="sequence", **EVERY_TERM),
    Objective(aggregation="sequence_sum_const", sequence_constant=LENGTH, **EVERY_TERM),
]


# How tokens are weighed is compared with loops in test_losses.py too.
objectives = pytest.mark.parametrize(
    "objective",
    [
        OBJECTIVES[0],
        OBJECTIVES[2],
        pytest.param(OBJECTIVES[1], marks=pytest.mark.slow),
        pytest.param(OBJECTIVES[3], marks=pytest.mark.slow),
    ],
    ids=lambda o: f"{o.aggregation}-{o.importance}",
)


@jax.jit
def score(params, batch):
    return response_logprobs_and_entropy(
        params, CONFIG, batch.prompt_tokens, batch.prompt_mask, batch.tokens, batch.mask
    )


@functools.cache
def ragged_batch(drift=0.3):
    """Responses of 1 to 7 tokens and one without any; `drift` is how far old and new policy are."""
    rng = np.random.default_rng(0)
    mask = np.arange(LENGTH) < np.array([7, 1, 4, 0, 2, 6])[:, None]
    prompt_mask = np.arange(PROMPT) >= np.array([0, 3, 1, 2, 0, 3])[:, None]
    batch = PolicyBatch(
        prompt_tokens=jnp.asarray(rng.integers(0, 11, (ROWS, PROMPT))),
        prompt_mask=jnp.asarray(prompt_mask),
        tokens=jnp.asarray(rng.integers(0, 11, (ROWS, LENGTH))),
        mask=jnp.asarray(mask),
        old_logprobs=jnp.zeros((ROWS, LENGTH)),
        advantages=jnp.asarray(rng.normal(size=(ROWS, LENGTH)), jnp.float32),
    )
    logprobs = np.asarray(score(params(), batch)[0])
    noise = np.float32(rng.normal(size=(2, ROWS, LENGTH))) * mask
    old, ref = (jnp.asarray(logprobs + np.float32(drift) * x) for x in noise)
    return batch.replace(old_logprobs=old, ref_logprobs=ref)


SGD, SMALL = optax.sgd(0.1), optax.sgd(0.01)
STEP = jax.jit(
    policy_step,
    static_argnames=("model_config", "optimizer", "objective", "accumulation_steps", "chunk"),
)


def one_step(batch, objective, *, optimizer=SGD, **options):
    state = train_state.create(params(), optimizer, jax.random.key(0))
    return STEP(
        state, batch, model_config=CONFIG, optimizer=optimizer, objective=objective, **options
    )


@pytest.mark.parametrize(
    "objective",
    [OBJECTIVES[0], *(pytest.param(x, marks=pytest.mark.slow) for x in OBJECTIVES[1:])],
    ids=lambda o: f"{o.aggregation}-{o.importance}",
)
def test_accumulated_update_equals_the_whole_one(objective):
    whole, metrics = one_step(ragged_batch(), objective)
    split, split_metrics = one_step(ragged_batch(), objective, accumulation_steps=3)
    assert metrics.keys() == split_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(split_metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    moved = 0.0
    for a, b, old in zip(
        *map(jax.tree.leaves, (whole.params, split.params, params())), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        moved += np.sum((np.asarray(a) - np.asarray(old)) ** 2)
    assert moved > 1e-4


def numpy_objective(logprobs, entropy, batch, objective):
    """The formula of the method page, §5, token by token."""
    mask, old, ref, advantages = (
        np.asarray(x, np.float64)
        for x in (batch.mask, batch.old_logprobs, batch.ref_logprobs, batch.advantages)
    )
    rows = [b for b in range(ROWS) if mask[b].any()]
    total = 0.0
    for b in rows:
        length = int(mask[b].sum())
        share = {
            "token_mean": 1 / mask.sum(),
            "sequence_mean": 1 / (len(rows) * length),
            "sequence_sum_const": 1 / (len(rows) * LENGTH),
        }[objective.aggregation]
        ratios = np.exp(logprobs[b, :length] - old[b, :length])
        if objective.importance == "sequence":
            ratios = np.full(length, np.exp(np.log(ratios).mean()))
        for t in range(length):
            low, high = 1 - objective.clip_low, 1 + objective.clip_high
            clipped = min(max(ratios[t], low), high)
            gain = min(ratios[t] * advantages[b, t], clipped * advantages[b, t])
            d = ref[b, t] - logprobs[b, t]
            kl = np.exp(d) - d - 1
            total += share * (
                -gain
                + objective.kl_coefficient * kl
                - objective.entropy_coefficient * entropy[b, t]
            )
    return total


@objectives
def test_loss_is_the_formula(objective):
    batch = ragged_batch()
    logprobs, entropy = (np.asarray(x, np.float64) for x in score(params(), batch))
    _, metrics = one_step(batch, objective)
    np.testing.assert_allclose(
        metrics["loss"], numpy_objective(logprobs, entropy, batch, objective), rtol=1e-4
    )
    gap = np.abs(logprobs - np.asarray(batch.old_logprobs))[np.asarray(batch.mask)]
    np.testing.assert_allclose(metrics["logprob_gap_max"], gap.max(), rtol=1e-4)
    np.testing.assert_allclose(metrics["logprob_gap_mean"], gap.mean(), rtol=1e-4)
    np.testing.assert_allclose(
        metrics["entropy"], entropy[np.asarray(batch.mask)].mean(), rtol=1e-5
    )


def test_update_is_the_numerical_gradient_of_the_formula():
    batch, objective, rate = ragged_batch(), OBJECTIVES[0], 0.1
    after, _ = one_step(batch, objective, optimizer=SGD)
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), params())

    def value(scale):
        moved = jax.tree.map(
            lambda p, d: np.asarray(p) + np.float32(scale) * d, params(), direction
        )
        logprobs, entropy = (np.asarray(x, np.float64) for x in score(moved, batch))
        return numpy_objective(logprobs, entropy, batch, objective)

    slope = (value(1e-4) - value(-1e-4)) / 2e-4
    grads = jax.tree.map(lambda new, old: np.asarray(old - new) / rate, after.params, params())
    along = sum(
        float(np.vdot(g, d))
        for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True)
    )
    assert abs(slope) > 0.1
    np.testing.assert_allclose(along, slope, rtol=0.02)


def test_positive_advantage_raises_the_chosen_tokens_and_negative_lowers_them():
    batch = ragged_batch(drift=0.0)
    sign = np.asarray([1.0, -1.0, 1.0, 1.0, -1.0, -1.0], np.float32)[:, None]
    batch = batch.replace(advantages=jnp.asarray(np.repeat(sign, LENGTH, axis=1)))
    before = np.asarray(score(params(), batch)[0])
    for row in (0, 1, 2, 4, 5):  # one at a time: rows share parameters
        alone = np.asarray(batch.mask) & (np.arange(ROWS) == row)[:, None]
        only = batch.replace(mask=jnp.asarray(alone))
        after, metrics = one_step(only, Objective(), optimizer=SMALL)
        change = (np.asarray(score(after.params, batch)[0]) - before)[row].sum()
        assert float(change * sign[row, 0]) > 1e-3
        assert float(metrics["logprob_gap_max"]) < 1e-5
        np.testing.assert_allclose(metrics["ratio_mean"], 1.0, atol=1e-5)


def test_what_stands_under_the_mask_reaches_nothing():
    batch = ragged_batch()

    def spoil(x, value):
        return jnp.asarray(np.where(batch.mask, x, np.asarray(value, x.dtype)))

    spoiled = batch.replace(
        tokens=spoil(batch.tokens, 10),
        old_logprobs=spoil(batch.old_logprobs, -jnp.inf),
        ref_logprobs=spoil(batch.ref_logprobs, jnp.nan),
        advantages=spoil(batch.advantages, jnp.nan),
        prompt_tokens=jnp.asarray(np.where(batch.prompt_mask, batch.prompt_tokens, 7)),
    )
    clean, clean_metrics = one_step(batch, OBJECTIVES[0])
    dirty, dirty_metrics = one_step(spoiled, OBJECTIVES[0])
    for name, value in clean_metrics.items():
        np.testing.assert_allclose(dirty_metrics[name], value, rtol=1e-6, err_msg=name)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), dirty.params, clean.params
    )


def test_a_live_nan_skips_the_update_and_the_next_batch_trains():
    batch = ragged_batch()
    optimizer = optax.adam(0.01)
    state = train_state.create(params(), optimizer, jax.random.key(0))
    step = jax.jit(
        partial(
            policy_step,
            model_config=CONFIG,
            optimizer=optimizer,
            objective=Objective(),
            accumulation_steps=2,
        )
    )
    bad = batch.replace(advantages=batch.advantages.at[2, 1].set(jnp.nan))
    skipped, metrics = step(state, bad)
    assert (int(skipped.step), int(skipped.skipped)) == (1, 1)
    assert float(metrics["update_skipped"]) == 1
    jax.tree.map(
        np.testing.assert_array_equal,
        (skipped.params, skipped.opt_state),
        (state.params, state.opt_state),
    )
    trained, _ = step(skipped, batch)
    expected, _ = step(state, batch)
    assert (int(trained.step), int(trained.skipped)) == (2, 1)
    jax.tree.map(np.testing.assert_array_equal, trained.params, expected.params)


def test_kl_needs_a_reference_and_is_reported_without_a_coefficient():
    batch = ragged_batch()
    _, metrics = one_step(batch, Objective(), optimizer=SMALL)
    assert float(metrics["kl"]) > 0
    with pytest.raises(ValueError, match=r"kl_coefficient is 0\.1, but ref_logprobs is None"):
        one_step(batch.replace(ref_logprobs=None), Objective(kl_coefficient=0.1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aggregation": "tokens"}, r"'tokens'.*sequence_mean.*token_mean"),
        ({"importance": "sequnce"}, r"importance='sequnce'.*token.*sequence"),
        ({"kl_estimator": "k4"}, r"'k4'.*k1.*k2.*k3"),
        ({"aggregation": "sequence_sum_const"}, "needs sequence_constant"),
        ({"clip_low": 1.5}, r"clip_low=1\.5"),
        ({"clip_high": -0.1}, r"clip_high=-0\.1"),
    ],
)
def test_bad_objectives_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Objective(**fields)


def test_impossible_split_names_the_numbers():
    with pytest.raises(ValueError, match=r"accumulation_steps=4 .* batch of 6 rows"):
        one_step(ragged_batch(), Objective(), accumulation_steps=4)
