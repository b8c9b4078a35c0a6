"""One policy-gradient update from scored, rewarded responses (method page, §5)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from spark_jax import losses
from spark_jax.models.config import ModelConfig
from spark_jax.parallel import sharding
from spark_jax.scoring import logprobs_and_entropy_at, response_logprobs_and_entropy
from spark_jax.training import programs
from spark_jax.training.packing import PackedPolicyBatch
from spark_jax.training.state import TrainState
from spark_jax.training.update import apply_update, in_micro_batches


@flax.struct.dataclass
class PolicyBatch:
    """B responses to left-padded prompts, with what the objective holds constant about them."""

    prompt_tokens: Any  # int [B, L]
    prompt_mask: Any  # bool [B, L]
    tokens: Any  # int [B, T], right-padded
    mask: Any  # bool [B, T], the end-of-sequence token included
    old_logprobs: Any  # float [B, T], nats: under the policy that sampled
    advantages: Any  # float [B, T]
    ref_logprobs: Any = None  # float [B, T], nats; needed for a KL term only


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
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One update on the clipped policy-gradient objective over all B responses.

    Token weights are made for the whole batch, so `accumulation_steps` changes memory, not the
    update; neither does packing (`packing.pack_policy_batch` with the same objective). Pure; jit it
    with everything but `state` and `batch` bound and `donate_argnums=0`, as `programs.train_step`
    does.

    Returns:
      the state and metrics, all taken at the parameters before the update: those of
      `losses.policy_objective` and `update.apply_update`, and `logprob_gap_max` and
      `logprob_gap_mean`, |log π − log π_old| in nats. On the first update after a rollout of this
      policy, this is the gap between sampler and scorer.

    Raises:
      ValueError: the rows do not divide into `accumulation_steps`, or a KL coefficient without
        `ref_logprobs`.
    """
    mask, weights = _mask(batch), _weights(batch, objective)

    def loss_function(
        params: Any, inputs: tuple[PolicyBatch | PackedPolicyBatch, Array]
    ) -> tuple[Float[Array, ""], tuple[Array, Array]]:
        rows, row_weights = inputs
        logprobs, entropy = _score(params, model_config, rows, chunk)
        loss, _ = _objective(logprobs, entropy, rows, row_weights, objective)
        return loss, (logprobs, entropy)

    state, (logprobs, entropy), update_metrics = apply_update(
        state, (batch, weights), loss_function, optimizer, accumulation_steps
    )
    # Once more on the assembled [B, T] arrays: shares and maxima of micro-batches do not add up.
    _, metrics = _objective(logprobs, entropy, batch, weights, objective)
    gap = losses.sampler_gap(batch.old_logprobs, logprobs, mask)
    metrics |= {f"logprob_gap_{name}": value for name, value in gap.items()}
    return state, metrics | update_metrics


@programs.shared
def compiled_score(model_config: ModelConfig, parts: int) -> Any:
    """(params, prompt_tokens, prompt_mask, tokens, mask) -> log-probs [B, T] of the responses,
    compiled; B / `parts` rows at a time, and replicated on every device."""

    def score(params: Any, *arrays: Any) -> Any:
        def logprobs(rows: Any) -> Any:
            return response_logprobs_and_entropy(params, model_config, *rows)[0]

        return sharding.constrain(in_micro_batches(logprobs, arrays, parts), (None, None))

    return jax.jit(score)


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
