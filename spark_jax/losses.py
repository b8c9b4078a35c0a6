"""Losses: clipped policy gradient, KL, cross-entropy, and how tokens are weighed.

Log-probabilities are float32, in nats, [B, T]; `mask` (bool or {0,1}) is 1 on the tokens that
count. Whatever stands under a mask of 0, inf and nan included, reaches neither value nor gradient.
Advantages, old, reference and sampler log-probabilities are constants: no gradient.

Every loss is Σ weights · values, with the weights made from the mask alone (`aggregation_weights`).
So a batch may be cut into micro-batches: make the weights once for the whole batch, pass each
micro-batch its rows (`weights=`), and the losses and gradients sum to those of the whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

Metrics = dict[str, Float[Array, ""]]


def policy_gradient(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregation: str = "token_mean",
    importance: str = "token",
    max_length: int | None = None,
    weights: Float[Array, "B T"] | None = None,
    sequences: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The clipped policy-gradient loss (PPO, arXiv 1707.06347, eq. 7; method page §5).

    L = −Σ weights · min(ρ A, clip(ρ, 1 − clip_low, 1 + clip_high) A), ρ = exp(log π − log π_old).
    Unequal clips are DAPO's (arXiv 2503.14476, §3.1). On the first update after a rollout of the
    same policy ρ = 1, and the gradient is REINFORCE's, −A ∇log π.

    `importance="sequence"` is GSPO (arXiv 2507.18071): ρ is the geometric mean of the sequence's
    token ratios. In its token form (§4.3): the value is that mean on every token, the gradient goes
    through the token's own log π; with one advantage per sequence this equals GSPO itself, and with
    token advantages it keeps their credit. Its clips are of the order of 3e-4, and it goes with
    "sequence_mean".

    `max_length` (tokens) is the constant of "sequence_sum_const". `weights` replaces
    `aggregation_weights(mask, aggregation)`. In packed rows, `sequences` says which of its row's
    sequences, from 0 to T, a token belongs to; the weights are then those of the unpacked mask.
    Metrics are over this call's tokens: `clip_fraction_low` and `clip_fraction_high` (shares of
    tokens whose gradient a bound removes), `approx_kl` (nats, k3 of KL(π_old || π)), `ratio_mean`,
    `ratio_max`, and `tokens`, their number, for whoever averages over calls.

    Raises ValueError for an unknown aggregation or importance, or a missing `max_length`.
    """
    mask = mask.astype(bool)
    if weights is None:
        weights = aggregation_weights(mask, aggregation, constant=max_length)
    advantages = jax.lax.stop_gradient(jnp.where(mask, advantages, 0.0))
    # Zero before exp: 0 · exp(inf) would be nan, in the gradient even where `where` hides it.
    log_ratio = jnp.where(mask, logprobs - jax.lax.stop_gradient(old_logprobs), 0.0)
    if importance == "sequence":
        log_ratio = _sequence_log_ratio(log_ratio, mask, sequences)
    elif importance != "token":
        raise ValueError(f"importance={importance!r} is unknown; choose from {list(IMPORTANCES)}")
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = -jnp.sum(weights * jnp.minimum(ratio * advantages, clipped * advantages))

    ratio, log_ratio = jax.lax.stop_gradient((ratio, log_ratio))
    metrics = {
        "clip_fraction_low": _token_mean((ratio < 1.0 - clip_low) & (advantages < 0), mask),
        "clip_fraction_high": _token_mean((ratio > 1.0 + clip_high) & (advantages > 0), mask),
        "approx_kl": _token_mean(jnp.expm1(log_ratio) - log_ratio, mask),
        "ratio_mean": _token_mean(ratio, mask),
        "ratio_max": jnp.max(jnp.where(mask, ratio, 0.0)),
        "tokens": jnp.sum(mask, dtype=ratio.dtype),
    }
    return loss, metrics


def policy_objective(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    *,
    ref_logprobs: Float[Array, "B T"] | None = None,
    entropy: Float[Array, "B T"] | None = None,
    kl_coefficient: float = 0.0,
    entropy_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregation: str = "token_mean",
    importance: str = "token",
    max_length: int | None = None,
    weights: Float[Array, "B T"] | None = None,
    sequences: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The whole objective: L = policy_gradient + c_kl · agg(KL) − c_ent · agg(H) (method page §5).

    KL to the reference policy and entropy H (nats) are aggregated with the policy loss's weights. A
    coefficient of 0 leaves its term out of the program; the metrics `kl` and `entropy` (means over
    this call's tokens) are still there whenever `ref_logprobs` and `entropy` are given.

    Raises ValueError for a coefficient without its input, and what `policy_gradient` raises.
    """
    mask = mask.astype(bool)
    if weights is None:
        weights = aggregation_weights(mask, aggregation, constant=max_length)
    loss, metrics = policy_gradient(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        importance=importance,
        weights=weights,
        sequences=sequences,
    )
    metrics["policy_loss"] = jax.lax.stop_gradient(loss)
    if ref_logprobs is not None:
        safe, safe_ref = jnp.where(mask, logprobs, 0.0), jnp.where(mask, ref_logprobs, 0.0)
        divergence = kl(safe, safe_ref, estimator=kl_estimator)
        metrics["kl"] = jax.lax.stop_gradient(_token_mean(divergence, mask))
        if kl_coefficient != 0:
            loss = loss + kl_coefficient * jnp.sum(weights * divergence)
    elif kl_coefficient != 0:
        raise ValueError(f"kl_coefficient is {kl_coefficient}, but ref_logprobs is None; pass them")
    if entropy is not None:
        metrics["entropy"] = jax.lax.stop_gradient(_token_mean(entropy, mask))
        if entropy_coefficient != 0:
            bonus = jnp.sum(weights * jnp.where(mask, entropy, 0.0))
            loss = loss - entropy_coefficient * bonus
    elif entropy_coefficient != 0:
        raise ValueError(
            f"entropy_coefficient is {entropy_coefficient}, but entropy is None; pass it"
        )
    return loss, metrics


def kl(
    logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"], *, estimator: str = "k3"
) -> Float[Array, "B T"]:
    """Per-token estimates of KL(π || π_ref) from samples of π, in nats (Schulman 2020).

    With d = log π_ref − log π: k1 = −d (unbiased, may be negative), k2 = d²/2, k3 = exp(d) − d − 1
    (unbiased, never negative; GRPO's, arXiv 2402.03300, eq. 4). As a loss k1 is useless: its
    gradient, ∇log π, is 0 in expectation. No gradient to the reference.

    Raises ValueError for an unknown estimator.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"KL estimator must be one of {sorted(KL_ESTIMATORS)}, got {estimator!r}")
    return KL_ESTIMATORS[estimator](jax.lax.stop_gradient(ref_logprobs) - logprobs)


def cross_entropy(
    logprobs: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    *,
    aggregation: str = "token_mean",
    max_length: int | None = None,
    weights: Float[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """Supervised next-token loss on the tokens of the mask: −Σ weights · log π (method page §2).

    `logprobs` are those of the targets, in nats; options as in `policy_gradient`.
    """
    mask = mask.astype(bool)
    if weights is None:
        weights = aggregation_weights(mask, aggregation, constant=max_length)
    return -jnp.sum(weights * jnp.where(mask, logprobs, 0.0))


def aggregation_weights(
    mask: Shaped[Array, "B T"], aggregation: str, *, constant: int | None = None
) -> Float[Array, "B T"]:
    """The weight of every token in the loss, so that loss = Σ weights · values (method page §4, 5).

    - "token_mean": the mean over all tokens of the batch (DAPO, arXiv 2503.14476, §3.3).
    - "sequence_mean": the mean over each sequence's tokens, then over sequences (GRPO).
    - "sequence_sum_const": each sequence's sum divided by `constant` tokens (max_new_tokens, for
      instance), then the mean over sequences: no length bias (Dr. GRPO, arXiv 2503.20783).

    A row without tokens is padding of the batch, not a response: it counts in no denominator. No
    tokens at all: all weights 0.

    Raises ValueError for an unknown aggregation, or "sequence_sum_const" without its constant.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {sorted(AGGREGATIONS)}, got {aggregation!r}")
    return AGGREGATIONS[aggregation](mask.astype(bool).astype(jnp.float32), constant)


def sampler_gap(
    sampler_logprobs: Float[Array, "B T"],
    scorer_logprobs: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
) -> Metrics:
    """Largest and mean |log π_sampler − log π_scorer| over the tokens, in nats (method page §5).

    The gap that silently breaks RL: π_old is the sampler's, the gradient the scorer's.
    """
    mask = mask.astype(bool)
    gap = jax.lax.stop_gradient(jnp.where(mask, jnp.abs(sampler_logprobs - scorer_logprobs), 0.0))
    return {"max": jnp.max(gap), "mean": _token_mean(gap, mask)}


# --- the names a config may use ----------------------------------------------------------------


def _token_mean_weights(mask: Float[Array, "B T"], _: int | None) -> Float[Array, "B T"]:
    return mask / jnp.maximum(jnp.sum(mask), 1.0)


def _sequence_mean_weights(mask: Float[Array, "B T"], _: int | None) -> Float[Array, "B T"]:
    lengths = jnp.sum(mask, axis=1, keepdims=True)
    return mask / jnp.maximum(lengths, 1.0) / jnp.maximum(jnp.sum(lengths > 0), 1)


def _sequence_sum_const_weights(
    mask: Float[Array, "B T"], constant: int | None
) -> Float[Array, "B T"]:
    if constant is None or constant <= 0:
        raise ValueError(
            f'aggregation "sequence_sum_const" divides by a positive number of tokens, got '
            f"{constant}; pass max_length, for instance the rollout's max_new_tokens"
        )
    sequences = jnp.sum(jnp.any(mask > 0, axis=1))
    return mask / constant / jnp.maximum(sequences, 1)


IMPORTANCES = ("token", "sequence")

AGGREGATIONS: dict[str, Callable[[Array, int | None], Array]] = {
    "token_mean": _token_mean_weights,
    "sequence_mean": _sequence_mean_weights,
    "sequence_sum_const": _sequence_sum_const_weights,
}

KL_ESTIMATORS: dict[str, Callable[[Array], Array]] = {
    "k1": lambda d: -d,
    "k2": lambda d: d**2 / 2,
    "k3": lambda d: jnp.expm1(d) - d,  # expm1: exp(d) − 1 would round a small d away
}


# --- helpers -----------------------------------------------------------------------------------


def _sequence_log_ratio(
    log_ratio: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    sequences: Int[Array, "B T"] | None,
) -> Float[Array, "B T"]:
    """The sequence's mean log-ratio on each of its tokens, with each token's own gradient."""
    total = functools.partial(_sequence_sum, sequences=sequences)
    mean = jax.lax.stop_gradient(total(log_ratio) / jnp.maximum(total(mask), 1))
    return jnp.where(mask, mean + (log_ratio - jax.lax.stop_gradient(log_ratio)), 0.0)


def _sequence_sum(
    values: Shaped[Array, "B T"], sequences: Int[Array, "B T"] | None
) -> Shaped[Array, "B _"]:
    """Sums over each row's sequences, on every one of their tokens."""
    if sequences is None:
        return jnp.sum(values, axis=1, keepdims=True)
    segments = values.shape[1] + 1
    sums = jax.vmap(lambda x, ids: jax.ops.segment_sum(x, ids, segments))(
        values.astype(jnp.float32), sequences
    )
    return jnp.take_along_axis(sums, sequences, axis=1)


def _token_mean(values: Shaped[Array, "B T"], mask: Shaped[Array, "B T"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
