"""From prompts to a `Rollout`: checks, static shapes from a short ladder, one jitted program."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from spark_jax.decoding import decoder
from spark_jax.decoding.rollout import Rollout
from spark_jax.decoding.sampling import Sampling
from spark_jax.models import transformer
from spark_jax.models.config import ModelConfig


def generate(
    params: transformer.Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    key: Array,
    sampling: Sampling,
    samples_per_prompt: int = 1,
    max_new_tokens: int | Sequence[int],
    max_prompt_length: int | None = None,
    slots: int | None = None,
    slots_per_lane: int | None = None,
) -> Rollout:
    """Samples every prompt `samples_per_prompt` times.

    Each prompt is prefilled once and its samples share its keys and values. Token t of row b is
    drawn with a uniform number that depends on (key, b, t) alone, so the result does not depend on
    how rows were scheduled into slots.

    Args:
      params: in either layout; `decoding.layout` picks the fast one for the platform.
      prompts: P lists of token ids.
      max_new_tokens: limit on response tokens, the stop token included; one, or one per prompt.
      max_prompt_length: tokens; pads to this length instead of to the next rung of the ladder, so
        that calls with different prompts share one compiled program.
      slots: rows decoded at the same time. None decodes all P · G at once; fewer is continuous
        batching: a finished row makes room for a waiting one.
      slots_per_lane: slots that share one prompt. Fewer than G lets a group's samples follow one
        another in the same slots; None takes G, or a quarter of it when rows have to wait.

    Raises:
      ValueError: an empty prompt, one above `max_prompt_length` or with an id outside the
        vocabulary (with its index), more positions than the model has, settings out of range,
        limits that are not positive.
    """
    limits = _limits(max_new_tokens, len(prompts))
    lengths = _check_prompts(prompts, config.vocab_size, max_prompt_length)
    _check_positions(lengths, limits, config.max_positions)
    if samples_per_prompt < 1:
        raise ValueError(f"samples_per_prompt={samples_per_prompt}; it must be at least 1")
    num_rows = len(prompts) * samples_per_prompt
    if slots is not None and slots < 1:
        raise ValueError(f"slots={slots}; it must be at least 1")
    if slots_per_lane is not None and slots_per_lane < 1:
        raise ValueError(f"slots_per_lane={slots_per_lane}; it must be at least 1")
    waiting = slots is not None and slots < num_rows
    width = slots_per_lane or (-(-samples_per_prompt // 4) if waiting else samples_per_prompt)
    width = min(width, samples_per_prompt, slots or num_rows)
    padded = ladder(len(prompts))
    lanes = padded if slots is None else max(1, min(padded, slots // width))
    shape = decoder.Shape(
        lanes=lanes,
        width=width,
        group_size=samples_per_prompt,
        columns=ladder(int(limits.max())),
        prefill=max(1, lanes // 4) if waiting else lanes,
    )
    length = max_prompt_length or ladder(int(lengths.max()))
    right_padded = np.zeros((padded, length), np.int32)
    for row, prompt in zip(right_padded, prompts, strict=False):
        row[: len(prompt)] = prompt
    requests = decoder.Requests(
        tokens=right_padded,
        lengths=_pad(lengths, padded),
        max_new_tokens=_pad(limits, padded),
        sampling=jax.tree.map(lambda x: _pad(x, padded), sampling.per_prompt(len(prompts))),
        count=np.int32(len(prompts)),
    )
    out = decoder.decode(params, requests, key, config=config, shape=shape)
    return _rollout(out, right_padded[: len(prompts)], lengths, int(limits.max()), shape)


def layout(params: transformer.Params, config: ModelConfig) -> transformer.Params:
    """Parameters as decoding wants them here: one array per layer on CPU (3-7x faster than a scan
    there), stacked elsewhere; in the compute dtype. Call once per policy update. Always a copy, so
    that a train step may donate the original."""
    if jax.default_backend() == "cpu":
        return _unstack(params, config)
    return jax.tree.map(lambda x: jnp.array(x, config.compute_dtype, copy=True), params)


def ladder(n: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least n: few programs."""
    power = 1 << max(n - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= n else power


_unstack = jax.jit(transformer.unstack, static_argnums=1)


def _rollout(
    out: decoder.Outputs, prompts: np.ndarray, lengths: np.ndarray, limit: int, shape: decoder.Shape
) -> Rollout:
    """Cuts the padding off on the host: sliced on the device, every size would compile anew."""
    rows = len(prompts) * shape.group_size
    out = jax.device_get(out)
    counts = out.counts[:rows]
    left_padded = np.zeros_like(prompts)
    for row, prompt, n in zip(left_padded, prompts, lengths, strict=True):
        row[len(row) - n :] = prompt[:n]
    slot_steps = max(int(out.steps) * shape.lanes * shape.width, 1)
    rollout = Rollout(
        prompt_tokens=left_padded,
        prompt_mask=np.arange(prompts.shape[1]) >= prompts.shape[1] - lengths[:, None],
        tokens=out.tokens[:rows, :limit],
        mask=np.arange(limit) < counts[:, None],
        logprobs=out.logprobs[:rows, :limit],
        sampling_logprobs=out.sampling_logprobs[:rows, :limit],
        finished=out.finished[:rows],
        decode_steps=out.steps,
        slot_occupancy=np.float32(counts.sum() / slot_steps),
        group_size=shape.group_size,
    )
    return jax.device_put(rollout)  # unlike jnp.asarray, compiles nothing


def _limits(max_new_tokens: int | Sequence[int], num_prompts: int) -> np.ndarray:
    limits = np.asarray(max_new_tokens, np.int32)
    if limits.shape not in ((), (num_prompts,)):
        raise ValueError(f"max_new_tokens has shape {limits.shape}; needs () or ({num_prompts},)")
    if np.any(limits < 1):
        raise ValueError(f"max_new_tokens={max_new_tokens}; it must be at least 1")
    return np.broadcast_to(limits, num_prompts)


def _check_prompts(
    prompts: Sequence[Sequence[int]], vocab_size: int, limit: int | None
) -> np.ndarray:
    if not prompts:
        raise ValueError("prompts is empty; give at least one")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; give it at least one token, such as BOS")
        if limit is not None and len(prompt) > limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, more than max_prompt_length={limit}; "
                "shorten it or raise the limit"
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"prompt {i} has a token id outside 0..{vocab_size - 1}")
    return np.asarray([len(prompt) for prompt in prompts], np.int32)


def _check_positions(lengths: np.ndarray, limits: np.ndarray, max_positions: int) -> None:
    total = lengths + limits
    if np.any(total > max_positions):
        i = int(np.argmax(total))
        raise ValueError(
            f"prompt {i} has {lengths[i]} tokens and may get {limits[i]} more, but the model has "
            f"max_positions={max_positions}; shorten the prompt or lower max_new_tokens"
        )


def _pad(x: np.ndarray, rows: int) -> np.ndarray:
    """Repeats the last entry: padding requests are never admitted."""
    return np.concatenate([x, np.repeat(x[-1:], rows - len(x), axis=0)])
