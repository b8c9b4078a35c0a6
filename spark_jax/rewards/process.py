"""Process rewards from log-probabilities: SPRO's cumulative process reward, whole and by steps.

SPRO (arXiv 2507.01551) needs no reward model: the policy's own log-ratio to a reference policy,
summed over the prefix, is the value it assigns to that prefix. No gradient flows through anything
here. Log-probabilities are float32, in nats; whatever stands under a mask of 0 is never read.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def cumulative_process_reward(
    policy_logprobs: Float[Array, "B T"],
    ref_logprobs: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    *,
    beta: float = 0.05,
) -> Float[Array, "B T"]:
    """The cumulative process reward R̃ of every prefix (SPRO, arXiv 2507.01551; method page §4).

    R̃[b,t] = Σ_{j ≤ t} β · (log π_θ(a_j|s_j) − log π_ref(a_j|s_j)) · mask[b,j]: the maximum-entropy
    identity r + V(s') − V(s) = β log π*/π_ref telescoped over the prefix, with the current policy
    in place of π*. Where the mask is 0 the sum stands still. `beta` is a reward per nat.
    """
    log_ratio = jnp.where(mask.astype(bool), policy_logprobs - ref_logprobs, 0.0)
    return jax.lax.stop_gradient(beta * jnp.cumsum(log_ratio, axis=1))


def step_process_rewards(
    cumulative_rewards: Float[Array, "B T"], step_ids: Int[Array, "B T"], *, num_steps: int
) -> Float[Array, "B K"]:
    """What each step adds to the cumulative process reward: R̃ gained on the tokens of step k.

    The quantity to set beside a reward model's verdict on the same step (method page §4, point 4).
    `step_ids` is 0..K−1, −1 outside any step; `num_steps` is K, the width of the verdicts. A step
    without tokens gets 0, and tokens whose step id is K or more belong to no step.
    """
    gains = jnp.diff(cumulative_rewards, axis=1, prepend=0.0)
    in_step = step_ids[:, :, None] == jnp.arange(num_steps)
    return jnp.sum(jnp.where(in_step, gains[:, :, None], 0.0), axis=1)


def process_reward_auc(
    step_rewards: Float[Array, "B K"], verdicts: Int[Array, "B K"]
) -> Float[Array, ""]:
    """How well step rewards tell correct steps (+1) from incorrect ones (−1), as an area under ROC.

    The chance that a correct step, drawn at random, has a higher reward than an incorrect one; ties
    count half (Mann and Whitney 1947). 0.5 is no relation, 1 is perfect, below 0.5 is inverted.
    Verdict 0 (no such step, or not judged) is left out. NaN where one of the classes is empty: the
    area is then undefined. Sorts instead of comparing all pairs, so a whole batch fits.
    """
    correct, incorrect = (verdicts > 0).ravel(), (verdicts < 0).ravel()
    values = step_rewards.ravel()
    sorted_incorrect = jnp.sort(jnp.where(incorrect, values, jnp.inf))
    num_incorrect = jnp.sum(incorrect)
    below = jnp.searchsorted(sorted_incorrect, values, side="left")
    not_above = jnp.searchsorted(sorted_incorrect, values, side="right")
    wins = (below + not_above) / 2
    return jnp.sum(jnp.where(correct, wins / num_incorrect, 0.0)) / jnp.sum(correct)


def last_token_of_step(
    step_ids: Int[Array, "B T"], mask: Shaped[Array, "B T"], *, num_steps: int
) -> Int[Array, "B K"]:
    """The position in 0..T−1 of the last response token of each step; −1 for a step without one."""
    positions = jnp.arange(step_ids.shape[1])[:, None]
    in_step = (step_ids[:, :, None] == jnp.arange(num_steps)) & mask.astype(bool)[:, :, None]
    return jnp.max(jnp.where(in_step, positions, -1), axis=1)
