"""Cumulative process rewards against loops, with garbage under the mask and ragged responses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark_jax.rewards.process import (
    cumulative_process_reward,
    last_token_of_step,
    process_reward_auc,
    step_process_rewards,
)


def random_logprobs(rng, shape):
    return -rng.exponential(1.0, shape).astype(np.float32)


def random_steps(rng, batch, length, num_steps):
    """Contiguous step ids with −1 between steps, as text gives them, and a ragged mask."""
    step_ids, mask = np.full((batch, length), -1, np.int32), np.zeros((batch, length), bool)
    for b in range(batch):
        mask[b, : rng.integers(1, length + 1)] = True
        position = 0
        for step in range(rng.integers(0, num_steps + 1)):
            position += rng.integers(0, 2)
            width = rng.integers(1, 4)
            step_ids[b, position : position + width] = step
            position += width
    return step_ids, mask


@pytest.mark.parametrize("seed", range(5))
def test_cumulative_process_reward_is_the_loop_and_ignores_what_is_masked(seed):
    rng = np.random.default_rng(seed)
    policy, ref = random_logprobs(rng, (6, 11)), random_logprobs(rng, (6, 11))
    mask = rng.random((6, 11)) < 0.7  # holes too, not only ragged ends
    expected = np.zeros((6, 11))
    for b in range(6):
        total = 0.0
        for t in range(11):
            if mask[b, t]:
                total += 0.3 * (float(policy[b, t]) - float(ref[b, t]))
            expected[b, t] = total
    policy[~mask], ref[~mask] = np.nan, -np.inf
    actual = cumulative_process_reward(jnp.array(policy), jnp.array(ref), jnp.array(mask), beta=0.3)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


def test_beta_defaults_to_primes_value_and_masks_may_be_numbers():
    policy, ref = jnp.array([[-1.0, -2.0, jnp.nan]]), jnp.array([[-2.0, -5.0, -1.0]])
    for dtype in (bool, jnp.int32, jnp.float32):
        mask = jnp.array([[1, 1, 0]]).astype(dtype)
        actual = cumulative_process_reward(policy, ref, mask)
        np.testing.assert_allclose(actual, [[0.05, 0.2, 0.2]], rtol=1e-6)


def test_no_gradient_reaches_the_policy():
    def total(policy):
        mask = jnp.ones((2, 4), bool)
        return jnp.sum(cumulative_process_reward(policy, jnp.ones((2, 4)), mask, beta=1.0))

    assert total(jnp.zeros((2, 4))) != 0
    np.testing.assert_array_equal(jax.grad(total)(jnp.zeros((2, 4))), np.zeros((2, 4)))


@pytest.mark.parametrize("seed", range(5))
def test_step_process_rewards_sum_the_tokens_of_each_step(seed):
    rng = np.random.default_rng(seed)
    step_ids, mask = random_steps(rng, 5, 14, 4)
    policy, ref = random_logprobs(rng, (5, 14)), random_logprobs(rng, (5, 14))
    expected = np.zeros((5, 4))
    for b in range(5):
        for t in range(14):
            if mask[b, t] and step_ids[b, t] >= 0:
                expected[b, step_ids[b, t]] += 0.5 * (float(policy[b, t]) - float(ref[b, t]))
    policy[~mask] = np.nan
    cumulative = cumulative_process_reward(
        jnp.array(policy), jnp.array(ref), jnp.array(mask), beta=0.5
    )
    actual = step_process_rewards(cumulative, jnp.array(step_ids), num_steps=4)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_steps_beyond_the_verdicts_belong_to_no_step():
    gains = step_process_rewards(
        jnp.array([[1.0, 3.0, 6.0]]), jnp.array([[0, 7, 1]], jnp.int32), num_steps=2
    )
    np.testing.assert_allclose(gains, [[1.0, 3.0]])


@pytest.mark.parametrize("seed", range(5))
def test_last_token_of_step_is_the_last_one_under_the_mask(seed):
    rng = np.random.default_rng(seed)
    step_ids, mask = random_steps(rng, 6, 12, 4)
    actual = last_token_of_step(jnp.array(step_ids), jnp.array(mask), num_steps=4)
    for b in range(6):
        for step in range(4):
            positions = [t for t in range(12) if mask[b, t] and step_ids[b, t] == step]
            assert actual[b, step] == (positions[-1] if positions else -1)


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_in_the_right_order(seed):
    rng = np.random.default_rng(seed)
    rewards = rng.integers(-3, 4, (7, 5)).astype(np.float32)  # many ties
    verdicts = rng.integers(-1, 2, (7, 5)).astype(np.int32)
    good, bad = rewards[verdicts == 1], rewards[verdicts == -1]
    expected = np.mean([[float(g > b) + 0.5 * float(g == b) for b in bad] for g in good])
    actual = jax.jit(process_reward_auc)(jnp.array(rewards), jnp.array(verdicts))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_auc_of_one_class_is_undefined_and_of_a_perfect_order_is_one():
    rewards = jnp.array([[1.0, 2.0, 3.0]])
    assert np.isnan(process_reward_auc(rewards, jnp.array([[1, 1, 0]])))
    assert np.isnan(process_reward_auc(rewards, jnp.array([[-1, 0, -1]])))
    assert process_reward_auc(rewards, jnp.array([[-1, 1, 1]])) == 1.0
    assert process_reward_auc(rewards, jnp.array([[1, -1, -1]])) == 0.0
