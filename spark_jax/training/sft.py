"""Supervised fine-tuning: next-token cross-entropy on target tokens only (method page, §2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from spark_jax.losses import aggregation_weights, cross_entropy
from spark_jax.models.config import ModelConfig
from spark_jax.scoring import logprobs_and_entropy_at, token_logprobs
from spark_jax.training.packing import first_fit
from spark_jax.training.state import TrainState
from spark_jax.training.update import apply_update


@flax.struct.dataclass
class SFTBatch:
    """B right-padded or packed sequences of T tokens."""

    tokens: Any  # int [B, T]
    loss_mask: Any  # bool [B, T], on the tokens to be predicted; the prediction is made one before
    segment_ids: Any = None  # int [B, T]: which of several packed sequences; 0 is padding
    positions: Any = None  # int [B, T]; counted from each segment's start where not given
    target_index: Any = None  # int [B, S]: where the targets stand; see `index_targets`


def sft_step(
    state: TrainState,
    batch: SFTBatch,
    *,
    model_config: ModelConfig,
    optimizer: optax.GradientTransformation,
    accumulation_steps: int = 1,
    chunk: int | None = None,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One update on the mean cross-entropy over all target tokens of the batch.

    Micro-batches share one normaliser, so `accumulation_steps` changes memory, not the update.
    Pure; jit it with everything but `state` and `batch` bound and `donate_argnums=0`.

    Returns:
      the state and metrics: `loss` in nats per target token, `target_tokens`, and those of
      `update.apply_update`. A batch without targets has loss 0.

    Raises:
      ValueError: the rows do not divide into `accumulation_steps`.
    """
    targets = _targets(batch)
    weights = aggregation_weights(targets, "token_mean")

    def loss_function(
        params: Any, inputs: tuple[SFTBatch, Array]
    ) -> tuple[Float[Array, ""], tuple[()]]:
        rows, row_weights = inputs
        return _loss(params, rows, row_weights, model_config, chunk), ()

    state, _, metrics = apply_update(
        state, (batch, weights), loss_function, optimizer, accumulation_steps
    )
    return state, metrics | {"target_tokens": targets.sum().astype(jnp.float32)}


def pack(examples: Mapping[str, Any], length: int) -> SFTBatch:
    """Several short examples to a row of `length` tokens, none cut: first fit, longest first.

    Args:
      examples: `tokens` and `loss_mask` [N, T], right-padded, every row with a target and ending
        with one, as `prm.examples.tokenize_examples` makes them.

    Returns:
      NumPy arrays [M, length], M <= N. A segment sees itself alone, so the packed loss is that of
      the examples apart.

    Raises:
      ValueError: an example is longer than `length`.
    """
    tokens, loss_mask = np.asarray(examples["tokens"]), np.asarray(examples["loss_mask"])
    ends = tokens.shape[1] - np.argmax(loss_mask[:, ::-1], axis=1)
    rows = first_fit(ends, length)
    packed = {
        name: np.zeros((len(rows), length), dtype)
        for name, dtype in (("tokens", np.int32), ("loss_mask", bool), ("segment_ids", np.int32))
    }
    for row, members in enumerate(rows):
        start = 0
        for segment, example in enumerate(members, start=1):
            place = slice(start, start + int(ends[example]))
            packed["tokens"][row, place] = tokens[example, : ends[example]]
            packed["loss_mask"][row, place] = loss_mask[example, : ends[example]]
            packed["segment_ids"][row, place] = segment
            start = place.stop
    return index_targets(SFTBatch(**packed))


def index_targets(batch: SFTBatch) -> SFTBatch:
    """The batch with the places of its targets, in NumPy: positions that predict none, such as
    those of prompts and padding, then never meet the vocabulary.

    Do so once for all rows of a data set: S, the most targets that a row has, rounded up to a
    multiple of 8, is a shape.
    """
    batch = dataclasses.replace(batch, target_index=None)
    mask = np.pad(target_mask(jax.tree.map(np.asarray, batch)), ((0, 0), (1, 0)))
    counts = mask.sum(axis=1)
    width = -(-max(int(counts.max(initial=0)), 1) // 8) * 8
    index = np.zeros((len(mask), width), np.int32)
    index[np.arange(width) < counts[:, None]] = np.nonzero(mask)[1]
    return dataclasses.replace(batch, target_index=index)


def target_mask(batch: SFTBatch) -> Bool[Any, "B S"]:
    """Which of the S = T − 1 `tokens[:, 1:]` are targets.

    Those marked in `loss_mask`, but for padding (segment 0) and the first token of a segment, which
    has nothing to be predicted from.
    """
    mask = batch.loss_mask[:, 1:].astype(bool)
    if batch.segment_ids is None:
        return mask
    ids = batch.segment_ids
    return mask & (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0)


def _loss(
    params: Any,
    batch: SFTBatch,
    weights: Float[Array, "B S"],
    model_config: ModelConfig,
    chunk: int | None,
) -> Float[Array, ""]:
    how = {"positions": batch.positions, "segment_ids": batch.segment_ids, "chunk": chunk}
    if batch.target_index is None:
        logprobs = token_logprobs(params, model_config, batch.tokens, **how)
    else:
        logprobs, _ = logprobs_and_entropy_at(
            params, model_config, batch.tokens, batch.target_index, **how
        )
    return cross_entropy(logprobs, _targets(batch), weights=weights)


def _targets(batch: SFTBatch) -> Bool[Array, "B S"]:
    """Which of the scored tokens count: those of `target_mask`, or of `target_index`."""
    mask = target_mask(batch)
    if batch.target_index is None:
        return mask
    index = batch.target_index
    return (index > 0) & jnp.take_along_axis(mask, jnp.maximum(index - 1, 0), axis=1)
