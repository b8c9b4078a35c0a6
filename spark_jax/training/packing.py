"""Several sequences to a row: where lengths differ, most of a padded batch is padding.

All on the host, in NumPy. Shapes come from few rungs, so that few programs are compiled.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np

from spark_jax import losses

RUNGS = 8  # of the number of rows, and of the number of scored tokens in a row


@flax.struct.dataclass
class PackedPolicyBatch:
    """M rows of N tokens that hold the sequences of a `policy.PolicyBatch`, and what its objective
    holds constant about S response tokens of each row."""

    tokens: Any  # int [M, N], prompts and responses
    segment_ids: Any  # int [M, N]: which sequence, from 1; 0 is padding
    index: Any  # int [M, S]: where the response tokens stand in the row; 0 is padding
    sequences: Any  # int [M, S]: which sequence they belong to; 0 is padding
    weights: Any  # float [M, S]: of every token in the loss
    old_logprobs: Any  # float [M, S], nats
    advantages: Any  # float [M, S]
    ref_logprobs: Any = None  # float [M, S], nats


def first_fit(lengths: Any, room: int) -> list[list[int]]:
    """Which of the sequences with these `lengths` [N] share a row of `room` tokens: first fit,
    longest first (at most 11/9 of the fewest rows there can be, and one more).

    Raises:
      ValueError: a sequence is longer than a row, with both lengths.
    """
    lengths = np.asarray(lengths)
    if lengths.max(initial=0) > room:
        raise ValueError(f"a sequence has {lengths.max()} tokens; rows of {room} cannot hold it")
    rows: list[list[int]] = []
    free: list[int] = []
    for sequence in np.argsort(-lengths, kind="stable"):
        fits = (row for row, left in enumerate(free) if left >= lengths[sequence])
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            free.append(room)
        rows[row].append(int(sequence))
        free[row] -= int(lengths[sequence])
    return rows


def pack_policy_batch(
    batch: Any, objective: Any, *, length: int | None = None, rows_multiple_of: int = 1
) -> PackedPolicyBatch:
    """The responses of a batch, each after its prompt, packed; those without tokens are left out.

    Every token takes with it the weight that it has in the unpacked batch, so the loss is the same
    whatever the aggregation.

    Args:
      batch: a `policy.PolicyBatch` of B responses.
      objective: the `policy.Objective` of the update.
      length: N, tokens of a row; None: L + T, that of the unpacked rows, at which attention costs a
        row what it cost before. Longer rows leave less room at their ends.
      rows_multiple_of: M divides by it: accumulation steps, devices.

    Returns:
      NumPy arrays. M and S are rounded up to eighths of B and N, so that not every batch has shapes
      of its own.

    Raises:
      ValueError: a prompt with its response is longer than `length`.
    """
    prompt_mask, mask = (np.asarray(x, bool) for x in (batch.prompt_mask, batch.mask))
    length = prompt_mask.shape[1] + mask.shape[1] if length is None else length
    responses = np.flatnonzero(mask.any(axis=1))
    lengths = (prompt_mask.sum(axis=1) + mask.sum(axis=1))[responses]
    rows = [responses[members] for members in first_fit(lengths, length)]
    scored = max((int(mask[row].sum()) for row in rows), default=0)
    m = _multiple(_rung(len(rows), len(mask)), rows_multiple_of)
    return _filled(batch, _constants(batch, objective), rows, m, length, _rung(scored, length))


def _constants(batch: Any, objective: Any) -> dict[str, np.ndarray]:
    """What the objective holds constant about every token [B, T]."""
    weights = losses.aggregation_weights(
        jnp.asarray(batch.mask), objective.aggregation, constant=objective.sequence_constant
    )
    values = {
        "weights": weights,
        "old_logprobs": batch.old_logprobs,
        "advantages": batch.advantages,
        "ref_logprobs": batch.ref_logprobs,
    }
    return {name: np.asarray(x, np.float32) for name, x in values.items() if x is not None}


def _filled(
    batch: Any, constants: dict[str, np.ndarray], rows: list[np.ndarray], m: int, n: int, s: int
) -> PackedPolicyBatch:
    packed = {name: np.zeros((m, n), np.int32) for name in ("tokens", "segment_ids")}
    packed |= {name: np.zeros((m, s), np.int32) for name in ("index", "sequences")}
    packed |= {name: np.zeros((m, s), np.float32) for name in constants}
    prompts, prompt_mask = np.asarray(batch.prompt_tokens), np.asarray(batch.prompt_mask, bool)
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask, bool)
    for row, members in enumerate(rows):
        start = done = 0
        for segment, b in enumerate(members, start=1):
            first = start + int(prompt_mask[b].sum())  # token of the response
            end = first + int(mask[b].sum())
            packed["tokens"][row, start:first] = prompts[b, prompt_mask[b]]
            packed["tokens"][row, first:end] = tokens[b, mask[b]]
            packed["segment_ids"][row, start:end] = segment
            place = slice(done, done + end - first)
            packed["index"][row, place] = np.arange(first, end)
            packed["sequences"][row, place] = segment
            for name, values in constants.items():
                packed[name][row, place] = values[b, mask[b]]
            start, done = end, place.stop
    return PackedPolicyBatch(**packed)


def _rung(n: int, most: int) -> int:
    """n rounded up to a multiple of an eighth of `most`."""
    return _multiple(n, max(-(-most // RUNGS), 1))


def _multiple(n: int, step: int) -> int:
    """The least multiple of `step` that is at least n and at least one."""
    return max(-(-n // step), 1) * step
