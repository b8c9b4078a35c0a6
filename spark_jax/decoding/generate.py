"""From prompts to a `Rollout`: checks, static shapes from a short ladder, one jitted program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from spark_jax.decoding import decoder
from spark_jax.decoding.rollout import Rollout
from spark_jax.decoding.sampling import Sampling
from spark_jax.models import transformer
from spark_jax.models.config import ModelConfig
from spark_jax.parallel.sharding import batch_shards, constrain, mesh_in_scope

# Sharing costs two more matrix products per layer and step, and saves (P - 1) · C prompt tokens:
# below this it is not worth another program.
MIN_SHARED_PREFIX = 64  # tokens; a shorter common prefix is not shared
# Prefixes are cut to whole grains, so that what prompts agree in by chance beyond their template
# compiles nothing, and the template needs no mask.
PREFIX_GRAIN = 32  # tokens

# Waiting prompts are prefilled as soon as so many tokens of them fit the free lanes: from there on
# arithmetic limits a prefill, not the reading of the weights, and slots that wait are waste.
PREFILL_TOKENS = 256

_OF_PROMPTS = ("prompt_tokens", "prompt_mask", "group_size")


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
) -> Rollout:
    """Samples every prompt `samples_per_prompt` times.

    Each prompt is prefilled once and its samples share its keys and values; what all prompts begin
    with is prefilled once for all (`Rollout.shared_prefix` says how much). Token t of row b is
    drawn with a uniform number that depends on (key, b, t) alone, so the result does not depend on
    how rows were scheduled into slots.

    With a mesh in scope the lanes are spread over its devices: their number is rounded up to a
    multiple of data · fsdp, and prompts too few for that are prefilled on several devices. The
    rollout is then of NumPy arrays, the same on every process.

    Args:
      params: in either layout; `decoding.layout` picks the fast one for the platform.
      prompts: P lists of token ids.
      max_new_tokens: limit on response tokens, the stop token included; one, or one per prompt.
      max_prompt_length: tokens; pads to this length instead of to the next rung of the ladder, so
        that calls with different prompts share one compiled program.
      slots: rows decoded at the same time. None decodes all P · G at once; fewer is continuous
        batching: a finished row makes room for a waiting one.

    Raises:
      ValueError: an empty prompt, one above `max_prompt_length` or with an id outside the
        vocabulary (with its index), more positions than the model has, settings out of range,
        limits that are not positive.
    """
    work = prepare(
        config,
        prompts,
        sampling=sampling,
        samples_per_prompt=samples_per_prompt,
        max_new_tokens=max_new_tokens,
        max_prompt_length=max_prompt_length,
        slots=slots,
    )
    out = decoder.decode(params, work.requests, key, config=config, shape=work.shape)
    samples = _samples(out, len(prompts) * samples_per_prompt, work)
    return rollout_of(samples, prompts, samples_per_prompt, max_prompt_length)


def samples_of(rollout: Rollout) -> dict[str, Any]:
    """The arrays of a rollout but those of its prompts: what there is to save of it. Their shapes
    are known before it is sampled (`no_samples`)."""
    names = [field.name for field in dataclasses.fields(Rollout)]
    return {name: getattr(rollout, name) for name in names if name not in _OF_PROMPTS}


def no_samples(rows: int, max_new_tokens: int) -> dict[str, np.ndarray]:
    """`samples_of` a rollout of so many rows that has not a token."""
    tokens, scalar = (rows, max_new_tokens), ()
    return dict(
        tokens=np.zeros(tokens, np.int32),
        mask=np.zeros(tokens, bool),
        logprobs=np.zeros(tokens, np.float32),
        sampling_logprobs=np.zeros(tokens, np.float32),
        finished=np.zeros(rows, bool),
        decode_steps=np.zeros(scalar, np.int32),
        slot_occupancy=np.zeros(scalar, np.float32),
        queue_occupancy=np.zeros(scalar, np.float32),
        shared_prefix=np.zeros(scalar, np.int32),
    )


def rollout_of(
    samples: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    samples_per_prompt: int,
    max_prompt_length: int | None = None,
) -> Rollout:
    """A rollout from what `samples_of` keeps and its prompts; the arguments are `generate`'s.

    Raises ValueError for a prompt above `max_prompt_length`, with its index.
    """
    _check_lengths(prompts, max_prompt_length)
    length = max_prompt_length or ladder(max(map(len, prompts)))
    tokens, mask = (
        np.zeros((len(prompts), length), np.int32),
        np.zeros((len(prompts), length), bool),
    )
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    rollout = Rollout(tokens, mask, **samples, group_size=samples_per_prompt)
    if mesh_in_scope() is not None:
        return rollout  # every process has all of it: the next program spreads what it takes
    return jax.device_put(rollout)  # unlike jnp.asarray, compiles nothing


class Work(NamedTuple):
    """What `generate` hands to `decoder.decode`, and what it needs to cut the padding off."""

    requests: decoder.Requests  # NumPy arrays
    shape: decoder.Shape
    limit: int  # most response tokens of any prompt
    prefix: int  # tokens of the shared template


def prepare(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    samples_per_prompt: int = 1,
    max_new_tokens: int | Sequence[int],
    max_prompt_length: int | None = None,
    slots: int | None = None,
) -> Work:
    """The checks and static shapes of `generate`, whose arguments these are: all but the decoding,
    so that its program can also be compiled ahead of time. Both with the same mesh in scope."""
    limits = _limits(max_new_tokens, len(prompts))
    lengths = _check_prompts(prompts, config.vocab_size, max_prompt_length)
    _check_positions(lengths, limits, config.max_positions)
    _check_sizes(samples_per_prompt, slots)
    prefix = shared_prefix(prompts)
    own = [prompt[prefix:] for prompt in prompts]
    own_length = max_prompt_length - prefix if max_prompt_length else ladder(max(map(len, own)))
    copies = _copies(len(prompts), samples_per_prompt, batch_shards())
    shape = _shape(
        len(prompts) * copies,
        samples_per_prompt // copies,
        own_length,
        ladder(int(limits.max())),
        slots,
    )
    requests = _requests(own, limits, sampling, copies, own_length)
    if prefix:
        template = np.asarray(prompts[0][:prefix], np.int32)
        requests = dataclasses.replace(requests, template=template)
    return Work(requests, shape, int(limits.max()), prefix)


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with and of which one copy will do, in whole grains; 0 where
    that is less than `MIN_SHARED_PREFIX` or there is one prompt only. Each prompt keeps a token of
    its own: the decoder feeds every prompt's last token itself."""
    if len(prompts) < 2:
        return 0
    # The common prefix of the least and the greatest in lexical order is that of all.
    first, last = min(map(list, prompts)), max(map(list, prompts))
    limit = min(len(prompt) for prompt in prompts) - 1
    pairs = zip(first[:limit], last[:limit], strict=True)
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), limit)
    common -= common % PREFIX_GRAIN
    return common if common >= MIN_SHARED_PREFIX else 0


def compiled_programs() -> int:
    """Programs this process has compiled for decoding: one per combination of static sizes, and one
    per conversion of parameters. Settings, lengths within their bucket and keys compile nothing."""
    functions: tuple[Any, ...] = (decoder.decode, _unstack, _spread)
    return sum(function._cache_size() for function in functions)


def _shape(
    prompts: int,
    group_size: int,
    prompt_length: int,
    columns: int,
    slots: int | None,
) -> decoder.Shape:
    shards = batch_shards()
    if slots is None or slots >= prompts * group_size:
        lanes = _multiple(ladder(prompts), shards)
        return decoder.Shape(lanes, group_size, group_size, columns, lanes, shards)
    width = min(_lane_width(group_size, prompt_length, columns), slots)
    lanes = _multiple(max(1, slots // width), shards)
    prefill = max(1, min(lanes // shards // 4, -(-PREFILL_TOKENS // prompt_length)))
    return decoder.Shape(lanes, width, group_size, columns, prefill * shards, shards)


def _requests(
    prompts: Sequence[Sequence[int]],
    limits: np.ndarray,
    sampling: Sampling,
    copies: int,
    length: int,
) -> decoder.Requests:
    """Each prompt as so many requests, neighbours, so that the rows of the output stay in order."""
    count = len(prompts) * copies
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)

    def rows(x: np.ndarray) -> np.ndarray:
        return _pad(np.repeat(x, copies, axis=0), ladder(count))

    order = _admission_order(np.repeat(lengths, copies), np.repeat(limits, copies))
    return decoder.Requests(
        tokens=rows(_right_padded(prompts, len(prompts), length)),
        lengths=rows(lengths),
        max_new_tokens=rows(limits),
        order=_pad(order, ladder(count)),
        sampling=jax.tree.map(rows, sampling.per_prompt(len(prompts))),
        count=np.int32(count),
    )


def _copies(prompts: int, group_size: int, shards: int) -> int:
    """The fewest requests to make of each prompt, with equal parts of its samples, for every shard
    to have one: a lane, which has one prompt, lies on one device."""
    divisors = (n for n in range(1, group_size) if group_size % n == 0)
    return next((n for n in divisors if prompts * n >= shards), group_size)


def _multiple(n: int, step: int) -> int:
    return -(-n // step) * step


def _admission_order(lengths: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Longest first: what is begun last is what the others' slots wait for. How long a response
    becomes is not known; its limit bounds it, and long prompts tend to have long responses."""
    return np.lexsort((-lengths, -limits)).astype(np.int32)


def _lane_width(group_size: int, prompt_length: int, columns: int) -> int:
    """Slots per lane where rows wait. Slots on their own are never held up by others of their lane,
    but each lane has a copy of its prompt: as few as leave the copies no more memory than the
    responses, and never more than a quarter of a group."""
    return max(1, min(-(-prompt_length // columns), group_size // 4))


def layout(params: transformer.Params, config: ModelConfig) -> transformer.Params:
    """Parameters as decoding wants them here: one array per layer on CPU (3-7x faster than a scan
    there), stacked elsewhere; in the compute dtype. Call once per policy update. Always a copy, so
    that a train step may donate the original. With a mesh in scope they are stacked, and spread
    over it by their logical axes."""
    if mesh_in_scope() is not None:
        return _spread(params, config)
    if jax.default_backend() == "cpu":
        return _unstack(params, config)
    return jax.tree.map(lambda x: jnp.array(x, config.compute_dtype, copy=True), params)


def ladder(n: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least n: few programs."""
    power = 1 << max(n - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= n else power


_unstack = jax.jit(transformer.unstack, static_argnums=1)


@functools.partial(jax.jit, static_argnums=1)
def _spread(params: transformer.Params, config: ModelConfig) -> transformer.Params:
    def one(x: Array, names: tuple[str | None, ...]) -> Array:
        return constrain(jnp.array(x, config.compute_dtype, copy=True), names)

    return jax.tree.map(one, params, transformer.logical_axes(config))


def _samples(out: decoder.Outputs, rows: int, work: Work) -> dict[str, Any]:
    """Cuts the padding off on the host: sliced on the device, every size would compile anew."""
    limit, shape = work.limit, work.shape
    out = jax.device_get(out)
    counts = out.counts[:rows]
    queued = int(out.queued_steps) * shape.lanes * shape.width
    slot_steps = max(int(out.steps) * shape.lanes * shape.width, 1)
    return dict(
        tokens=out.tokens[:rows, :limit],
        mask=np.arange(limit) < counts[:, None],
        logprobs=out.logprobs[:rows, :limit],
        sampling_logprobs=out.sampling_logprobs[:rows, :limit],
        finished=out.finished[:rows],
        decode_steps=out.steps,
        slot_occupancy=np.float32(counts.sum() / slot_steps),
        queue_occupancy=np.float32(out.queued_tokens / queued if queued else 1.0),
        shared_prefix=np.int32(work.prefix),
    )


def _right_padded(prompts: Sequence[Sequence[int]], rows: int, length: int) -> np.ndarray:
    tokens = np.zeros((rows, length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=False):
        row[: len(prompt)] = prompt
    return tokens


def _check_sizes(samples_per_prompt: int, slots: int | None) -> None:
    for name, value in (("samples_per_prompt", samples_per_prompt), ("slots", slots)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; it must be at least 1")


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
    _check_lengths(prompts, limit)
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; give it at least one token, such as BOS")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"prompt {i} has a token id outside 0..{vocab_size - 1}")
    return np.asarray([len(prompt) for prompt in prompts], np.int32)


def _check_lengths(prompts: Sequence[Sequence[int]], limit: int | None) -> None:
    for i, prompt in enumerate(prompts):
        if limit is not None and len(prompt) > limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, more than max_prompt_length={limit}; "
                "shorten it or raise the limit"
            )


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
