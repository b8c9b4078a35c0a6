"""One policy-gradient update from scored, rewarded responses (method page, §5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from spark_jax import losses
from spark_jax.models.config import ModelConfig
from spark_jax.scoring import logprobs_and_entropy_at, response_logprobs_and_entropy
from spark_jax.training.packing import PackedPolicyBatch
from spark_jax.training.state import TrainState
from spark_jax.training.update import apply_update


@flax.struct.dataclass
class PolicyBatch:
    """B responses to left-padded prompts, with what the objective holds constant about them."""

    prompt_tokens: Any  # int [B, L]
    prompt_mask: Any  # bool [B, L]
    tokens: Any  # int [B, T], right-padded
    mask: Any  # bool [B, T], the end-of-sequence token included
    old_logprobs: Any  # float [B, T], nats: under the policy that sampled
    advantages: Any  # float [B, T]; None where `advantage_function` makes them
    ref_logprobs: Any = None  # float [B, T], nats; needed for a KL term only
    advantage_inputs: Any = None  # what `advantage_function` is given


AdvantageFunction = Callable[[Any, Any], tuple[Any, losses.Metrics]]
"""(log π [B, T], advantage_inputs) -> (advantages [B, T], metrics). See `policy_step`."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is optimised; the fields are `losses.policy_objective`'s. Hashable: a static argument.

    Several epochs or mini-batches a rollout are the caller's loop: the same `old_logprobs` again.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: str = "token_mean"
    importance: str = "token"
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    entropy_coefficient: float = 0.0
    sequence_constant: int | None = None
    """Tokens that "sequence_sum_const" divides by: the rollout's max_new_tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise ValueError(
                f"clip_low={self.clip_low}, clip_high={self.clip_high}: the ratio is clipped to "
                "[1 - clip_low, 1 + clip_high]; clip_low lies in [0, 1], clip_high is not negative"
            )
        if self.aggregation not in losses.AGGREGATIONS:
            choices = sorted(losses.AGGREGATIONS)
            raise ValueError(f"aggregation={self.aggregation!r} is unknown; choose from {choices}")
        if self.importance not in losses.IMPORTANCES:
            choices = list(losses.IMPORTANCES)
            raise ValueError(f"importance={self.importance!r} is unknown; choose from {choices}")
        if self.kl_estimator not in losses.KL_ESTIMATORS:
            choices = sorted(losses.KL_ESTIMATORS)
            raise ValueError(
                f"kl_estimator={self.kl_estimator!r} is unknown; choose from {choices}"
            )
        if self.aggregation == "sequence_sum_const" and not self.sequence_constant:
            raise ValueError(
                'aggregation="sequence_sum_const" needs sequence_constant, a number of tokens; '
                "set it to the rollout's max_new_tokens"
            )


def policy_step(
    state: TrainState,
    batch: PolicyBatch | PackedPolicyBatch,
    *,
    model_config: ModelConfig,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    accumulation_steps: int = 1,
    chunk: int | None = None,
    advantage_function: AdvantageFunction | None = None,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One update on the clipped policy-gradient objective over all B responses.

    Token weights are made for the whole batch, so `accumulation_steps` changes memory, not the
    update; neither does packing (`packing.pack_policy_batch` with the same objective). Pure; jit it
    with everything but `state` and `batch` bound and `donate_argnums=0`.

    Advantages that compare the policy with another, such as SPRO's, can be made inside the step,
    from the log-probs that it computes anyway: the first update after a rollout then needs no pass
    of its own to score the policy. `advantage_function` is such an advantage; it sees all rows
    together, of an unpacked batch, and its metrics are among those returned. No gradient passes
    through it.

    Returns:
      the state and metrics, all taken at the parameters before the update: those of
      `losses.policy_objective` and `update.apply_update`, and `logprob_gap_max` and
      `logprob_gap_mean`, |log π − log π_old| in nats. On the first update after a rollout of this
      policy, this is the gap between sampler and scorer.

    Raises:
      ValueError: the rows do not divide into `accumulation_steps`, a KL coefficient without
        `ref_logprobs`, or an `advantage_function` with accumulation or a packed batch.
    """
    if advantage_function is not None:
        _refuse_rows_apart(batch, accumulation_steps)
    mask, weights = _mask(batch), _weights(batch, objective)

    def loss_function(
        params: Any, inputs: tuple[PolicyBatch | PackedPolicyBatch, Array]
    ) -> tuple[Float[Array, ""], tuple[Array, Array]]:
        rows, row_weights = inputs
        logprobs, entropy = _score(params, model_config, rows, chunk)
        rows, _ = _with_advantages(rows, logprobs, advantage_function)
        loss, _ = _objective(logprobs, entropy, rows, row_weights, objective)
        return loss, (logprobs, entropy)

    state, (logprobs, entropy), update_metrics = apply_update(
        state, (batch, weights), loss_function, optimizer, accumulation_steps
    )
    # Once more on the assembled [B, T] arrays: shares and maxima of micro-batches do not add up.
    batch, advantage_metrics = _with_advantages(batch, logprobs, advantage_function)
    _, metrics = _objective(logprobs, entropy, batch, weights, objective)
    gap = losses.sampler_gap(batch.old_logprobs, logprobs, mask)
    metrics |= {f"logprob_gap_{name}": value for name, value in gap.items()}
    return state, metrics | advantage_metrics | update_metrics


def _with_advantages(
    batch: Any, logprobs: Float[Array, "B T"], function: AdvantageFunction | None
) -> tuple[Any, losses.Metrics]:
    if function is None:
        return batch, {}
    advantages, metrics = function(jax.lax.stop_gradient(logprobs), batch.advantage_inputs)
    return dataclasses.replace(batch, advantages=advantages), metrics


def _refuse_rows_apart(batch: PolicyBatch | PackedPolicyBatch, accumulation_steps: int) -> None:
    if accumulation_steps != 1 or isinstance(batch, PackedPolicyBatch):
        raise ValueError(
            f"an advantage_function sees all rows of a batch together, but accumulation_steps="
            f"{accumulation_steps} and the batch is a {type(batch).__name__}; make the advantages "
            "before the step"
        )


def _mask(batch: PolicyBatch | PackedPolicyBatch) -> Bool[Array, "B T"]:
    if isinstance(batch, PackedPolicyBatch):
        return jnp.asarray(batch.sequences) > 0
    return jnp.asarray(batch.mask, bool)


def _weights(batch: PolicyBatch | PackedPolicyBatch, objective: Objective) -> Float[Array, "B T"]:
    if isinstance(batch, PackedPolicyBatch):
        return batch.weights
    return losses.aggregation_weights(
        _mask(batch), objective.aggregation, constant=objective.sequence_constant
    )


def _score(
    params: Any,
    model_config: ModelConfig,
    batch: PolicyBatch | PackedPolicyBatch,
    chunk: int | None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    if isinstance(batch, PackedPolicyBatch):
        return logprobs_and_entropy_at(
            params,
            model_config,
            batch.tokens,
            batch.index,
            segment_ids=batch.segment_ids,
            chunk=chunk,
        )
    return response_logprobs_and_entropy(
        params,
        model_config,
        batch.prompt_tokens,
        jnp.asarray(batch.prompt_mask, bool),
        batch.tokens,
        _mask(batch),
        chunk=chunk,
    )


def _objective(
    logprobs: Float[Array, "B T"],
    entropy: Float[Array, "B T"],
    batch: PolicyBatch | PackedPolicyBatch,
    weights: Float[Array, "B T"],
    objective: Objective,
) -> tuple[Float[Array, ""], losses.Metrics]:
    return losses.policy_objective(
        logprobs,
        batch.old_logprobs,
        batch.advantages,
        _mask(batch),
        ref_logprobs=batch.ref_logprobs,
        entropy=entropy,
        kl_coefficient=objective.kl_coefficient,
        entropy_coefficient=objective.entropy_coefficient,
        kl_estimator=objective.kl_estimator,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        importance=objective.importance,
        weights=weights,
        sequences=batch.sequences if isinstance(batch, PackedPolicyBatch) else None,
    )
