"""The record in which samples leave the decoder."""

from __future__ import annotations

from typing import Any

import flax.struct


@flax.struct.dataclass
class Rollout:
    """Samples of P prompts, `group_size` = G each, group-major: row b belongs to prompt b // G.

    `mask` is 1 on response tokens, the stop token included, and is the only word on which tokens
    count: padding may equal a real token id. Log-probs are float32 nats, 0 outside the mask.
    """

    prompt_tokens: Any  # [P, L] int32, left-padded
    prompt_mask: Any  # [P, L] bool
    tokens: Any  # [B, T] int32
    mask: Any  # [B, T] bool
    logprobs: Any  # [B, T] under the model, temperature 1
    sampling_logprobs: Any  # [B, T] under the truncated, tempered law the token was drawn from
    finished: Any  # [B] bool: ended by a stop id, not by the length limit
    decode_steps: Any  # [] int32: steps of the inner loop
    slot_occupancy: Any  # [] float32: share of slot-steps that produced a token
    queue_occupancy: Any  # [] float32: the same while any sample waited for a slot; 1 if none did
    shared_prefix: Any  # [] int32: tokens that all prompts begin with, held once; 0 if none were
    group_size: int = flax.struct.field(pytree_node=False, default=1)
