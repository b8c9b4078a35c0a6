"""The jitted batched decoder: continuous batching inside one program.

W slots make a lane; the slots of a lane sample from one prompt, whose keys and values they share.
What all prompts begin with, the template, is prefilled once and shared by all lanes.
The outer loop admits waiting prompts into lanes that have no work left (one prefill for several);
once no prompt waits, such a lane takes over half of the samples that another has not begun. The
inner loop decodes one token for every slot, and hands a slot that finished the next sample of
its lane's prompt, which costs no prefill at all.

All slots write their new keys at one common column of a ring, so a write is one slice update. How
many of the ring's latest columns are a slot's own follows from its token count. The inner loop runs
on a ring just large enough for the longest response under way, so attention is bounded to what is
filled; the rings come in a few sizes, each compiled once into the program.

With a mesh in scope the lanes, with their cache, are spread over it, and stay where they are:
prompts are prefilled where they are decoded, and samples are taken over among the lanes of one
device. What is known of lanes and slots, and the outputs, every device has whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spark_jax.decoding.sampling import Sampling, sample
from spark_jax.models import cache as kv_cache
from spark_jax.models import transformer
from spark_jax.models.config import ModelConfig
from spark_jax.parallel.sharding import batch_shards, constrain

TOKENS = "tokens"
"""The name, in compiled programs, of the loop that decodes one token for every slot a trip."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static sizes of a decode program."""

    lanes: int  # R
    width: int  # W, slots per lane
    group_size: int  # G, samples per prompt
    columns: int  # T, most response tokens
    prefill: int  # prompts prefilled at once, and the free lanes that are waited for
    shards: int = 1  # of the lanes, on as many devices; R and `prefill` are multiples of it

    @property
    def rings(self) -> tuple[int, ...]:
        """Ring sizes, ascending: T and its halves down to 64, three at most."""
        sizes = [self.columns]
        while len(sizes) < 3 and sizes[-1] >= 128:
            sizes.append(-(-sizes[-1] // 2))
        return tuple(reversed(sizes))


@flax.struct.dataclass
class Requests:
    tokens: Any  # [P, L] right-padded; what follows the template, at least one token each
    lengths: Any  # [P]
    max_new_tokens: Any  # [P]
    sampling: Sampling  # [P] fields
    order: Any  # [P] prompts in the order of admission
    count: Any  # [] the first `count` of that order are real, the rest padding
    template: Any = None  # [C] what all prompts begin with


@flax.struct.dataclass
class Outputs:
    tokens: Any  # [B, T]
    logprobs: Any  # [B, T]
    sampling_logprobs: Any  # [B, T]
    counts: Any  # [B] response tokens
    finished: Any  # [B] ended by a stop id
    steps: Any  # []
    queued_steps: Any  # [] steps at which a sample still waited for a slot
    queued_tokens: Any  # [] response tokens of those steps


@flax.struct.dataclass
class _Lanes:
    """What each lane and slot is at. A slot with request B is idle."""

    prompt: Any  # [R] index of the lane's prompt
    next_sample: Any  # [R] the next of the prompt's samples to hand out,
    last_sample: Any  # [R] up to this one, exclusive
    request: Any  # [R, W] row of the output, prompt · G + sample
    token: Any  # [R, W] the token to feed next
    count: Any  # [R, W] response tokens so far


_State = tuple[kv_cache.Cache, _Lanes, Outputs]


@partial(jax.jit, static_argnames=("config", "shape"))
def decode(
    params: transformer.Params, requests: Requests, key: Array, *, config: ModelConfig, shape: Shape
) -> Outputs:
    """Runs all requests; see `generate` for the meaning of the results."""
    if shape.shards != batch_shards():
        raise ValueError(
            f"lanes for {shape.shards} devices, but data*fsdp={batch_shards()} in the mesh in "
            "scope; prepare the work with the mesh in scope that it is done with"
        )
    requests = _everywhere(requests)
    num_prompts, prompt_length = requests.tokens.shape
    idle = num_prompts * shape.group_size
    stacked = not isinstance(params.layers, tuple)
    template = None
    if requests.template is not None:
        whole = jnp.full(1, len(requests.template), jnp.int32)
        alone = transformer.prefill(params, config, requests.template[None], whole)
        template = alone.as_template()
    cache = kv_cache.empty(
        config,
        lanes=shape.lanes,
        width=shape.width,
        prompt_length=prompt_length,
        columns=shape.columns,
        stacked=stacked,
        template=template,
    )
    slots = (shape.lanes, shape.width)
    lanes = _Lanes(
        prompt=jnp.zeros(shape.lanes, jnp.int32),
        next_sample=jnp.zeros(shape.lanes, jnp.int32),
        last_sample=jnp.zeros(shape.lanes, jnp.int32),
        request=jnp.full(slots, idle, jnp.int32),
        token=jnp.zeros(slots, jnp.int32),
        count=jnp.zeros(slots, jnp.int32),
    )
    outputs = Outputs(
        tokens=jnp.zeros((idle, shape.columns), jnp.int32),
        logprobs=jnp.zeros((idle, shape.columns), jnp.float32),
        sampling_logprobs=jnp.zeros((idle, shape.columns), jnp.float32),
        counts=jnp.zeros(idle, jnp.int32),
        finished=jnp.zeros(idle, jnp.bool_),
        steps=jnp.int32(0),
        queued_steps=jnp.int32(0),
        queued_tokens=jnp.int32(0),
    )
    run = partial(_step, params, requests, key, config=config, shape=shape)

    def can_admit(lanes: _Lanes, waiting: Array) -> Bool[Array, ""]:
        rows = _rows_of_prefill(_free_lanes(lanes, idle), shape)
        left = requests.count - waiting
        return (left > 0) & (jnp.sum(rows < shape.prefill) >= jnp.minimum(left, shape.prefill))

    def admit(carry: tuple[kv_cache.Cache, _Lanes, Array]) -> tuple[kv_cache.Cache, _Lanes, Array]:
        return _admit(params, requests, *carry, idle=idle, config=config, shape=shape)

    def can_take_over(lanes: _Lanes, waiting: Array) -> Bool[Array, ""]:
        return (waiting >= requests.count) & _can_take_over(lanes, idle, shape.shards)

    def take_over(carry: tuple[kv_cache.Cache, _Lanes]) -> tuple[kv_cache.Cache, _Lanes]:
        return _take_over(requests, *carry, idle=idle, shards=shape.shards)

    def outer(carry: tuple[_State, Array]) -> tuple[_State, Array]:
        (cache, lanes, outputs), waiting = carry
        cache, lanes, waiting = jax.lax.while_loop(
            lambda c: can_admit(c[1], c[2]), admit, (cache, lanes, waiting)
        )
        cache, lanes = jax.lax.while_loop(
            lambda c: can_take_over(c[1], waiting), take_over, (cache, lanes)
        )

        def pause(lanes: _Lanes) -> Bool[Array, ""]:
            return can_admit(lanes, waiting) | can_take_over(lanes, waiting)

        step = partial(run, waiting=waiting)
        return _decode_until(pause, step, (cache, lanes, outputs), idle, shape), waiting

    def unfinished(carry: tuple[_State, Array]) -> Bool[Array, ""]:
        (_, lanes, _), waiting = carry
        return jnp.any(lanes.request < idle) | (waiting < requests.count)

    carry = ((cache, lanes, outputs), jnp.int32(0))
    (_, _, outputs), _ = jax.lax.while_loop(unfinished, outer, carry)
    return _everywhere(outputs)


def _admit(
    params: transformer.Params,
    requests: Requests,
    cache: kv_cache.Cache,
    lanes: _Lanes,
    waiting: Int[Array, ""],
    *,
    idle: int,
    config: ModelConfig,
    shape: Shape,
) -> tuple[kv_cache.Cache, _Lanes, Array]:
    """Prefills the next waiting prompts into free lanes and gives every slot its first sample."""
    row = _rows_of_prefill(_free_lanes(lanes, idle), shape)
    rank = jnp.cumsum(row < shape.prefill) - 1
    admitted = (row < shape.prefill) & (rank < requests.count - waiting)
    row = jnp.where(admitted, row, shape.prefill)
    last = len(requests.order) - 1
    prompt = requests.order[jnp.clip(waiting + rank, 0, last)]  # of each lane
    prompts = jnp.zeros(shape.prefill, jnp.int32).at[row].set(prompt, mode="drop")
    # The last prompt token is not prefilled: it is each sample's first decode step.
    new = transformer.prefill(
        params, config, requests.tokens[prompts], requests.lengths[prompts] - 1, cache.template
    )
    own = jnp.arange(shape.lanes) % (shape.lanes // shape.shards)  # a lane's number in its shard
    into = jnp.full(shape.prefill, shape.lanes).at[row].set(own, mode="drop")
    cache = kv_cache.insert(cache, new, into)
    lanes = dataclasses.replace(
        lanes,
        prompt=jnp.where(admitted, prompt, lanes.prompt),
        next_sample=jnp.where(admitted, 0, lanes.next_sample).astype(jnp.int32),
        last_sample=jnp.where(admitted, shape.group_size, lanes.last_sample).astype(jnp.int32),
    )
    lanes = _everywhere(_hand_out_samples(lanes, requests, idle))
    return cache, lanes, waiting + jnp.sum(admitted).astype(jnp.int32)


def _rows_of_prefill(free: Bool[Array, " R"], shape: Shape) -> Int[Array, " R"]:
    """Which row of the next prefill is for each free lane; `shape.prefill` where none is. The rows,
    like the lanes, are spread over the shards, and each serves a lane of its own shard."""
    own_rows = shape.prefill // shape.shards
    by_shard = free.reshape(shape.shards, -1)
    rank = jnp.cumsum(by_shard, axis=1) - 1
    row = jnp.arange(shape.shards)[:, None] * own_rows + rank
    return jnp.where(by_shard & (rank < own_rows), row, shape.prefill).reshape(-1)


def _take_over(
    requests: Requests, cache: kv_cache.Cache, lanes: _Lanes, *, idle: int, shards: int
) -> tuple[kv_cache.Cache, _Lanes]:
    """Each free lane takes half of the samples not begun of the lane that has most of them, of its
    own shard, with a copy of its prompt."""

    def one(carry: tuple[_Lanes, Array]) -> tuple[_Lanes, Array]:
        lanes, source = carry
        unbegun = lanes.last_sample - lanes.next_sample
        giver, taker = jnp.argmax(unbegun), jnp.argmax(_free_lanes(lanes, idle))
        end = lanes.last_sample[giver]
        border = end - (unbegun[giver] + 1) // 2
        lanes = dataclasses.replace(
            lanes,
            prompt=lanes.prompt.at[taker].set(lanes.prompt[giver]),
            next_sample=lanes.next_sample.at[taker].set(border),
            last_sample=lanes.last_sample.at[giver].set(border).at[taker].set(end),
        )
        return _hand_out_samples(lanes, requests, idle), source.at[taker].set(source[giver])

    def all_of_a_shard(lanes: _Lanes) -> tuple[_Lanes, Array]:
        carry = (lanes, jnp.arange(len(lanes.prompt)))
        return jax.lax.while_loop(lambda c: _can_take_over(c[0], idle, 1), one, carry)

    lanes, source = _everywhere(_in_shards(all_of_a_shard, lanes, shards))
    return kv_cache.rearrange(cache, source), lanes


def _can_take_over(lanes: _Lanes, idle: int, shards: int) -> Bool[Array, ""]:
    def any_can(lanes: _Lanes) -> Bool[Array, "#1"]:
        unbegun = lanes.next_sample < lanes.last_sample
        return (jnp.any(unbegun) & jnp.any(_free_lanes(lanes, idle)))[None]

    return jnp.any(_in_shards(any_can, lanes, shards))


def _in_shards(function: Callable[[_Lanes], Any], lanes: _Lanes, shards: int) -> Any:
    """The function of every shard's lanes alone, its results joined along their first axes."""
    if shards == 1:
        return function(lanes)
    split = jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), lanes)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.vmap(function)(split))


def _everywhere(tree: Any) -> Any:
    """All of it on every device of the mesh in scope."""
    return jax.tree.map(lambda x: constrain(x, (None,) * jnp.ndim(x)), tree)


def _decode_until(
    pause: Callable[[_Lanes], Bool[Array, ""]],
    step: Callable[[_State, int, Array], _State],
    state: _State,
    idle: int,
    shape: Shape,
) -> _State:
    """Decodes until waiting prompts can be admitted, all is done, or the ring is full.

    Outside, the cache is in time order, newest column last. A branch takes the last `ring` columns,
    runs the inner loop on them as a ring, and puts them back in time order.
    """

    def branch(ring: int) -> Callable[[_State], _State]:
        def run(state: _State) -> _State:
            cache, lanes, outputs = state
            window = cache.latest(ring)

            def go_on(carry: tuple[_State, Array]) -> Bool[Array, ""]:
                (_, lanes, _), _ = carry
                room = jnp.max(lanes.count) < ring
                return jnp.any(lanes.request < idle) & room & ~pause(lanes)

            def body(carry: tuple[_State, Array]) -> tuple[_State, Array]:
                state, column = carry
                return step(state, ring, column), (column + 1) % ring

            carry = ((window, lanes, outputs), jnp.int32(0))
            with jax.named_scope(TOKENS):
                (window, lanes, outputs), column = jax.lax.while_loop(go_on, body, carry)

            return cache.with_latest(window, column), lanes, outputs

        return run

    longest = jnp.max(state[1].count)
    which = jnp.sum(longest >= jnp.asarray(shape.rings[:-1], jnp.int32))
    return jax.lax.switch(which, [branch(ring) for ring in shape.rings], state)


def _step(
    params: transformer.Params,
    requests: Requests,
    key: Array,
    state: _State,
    ring: int,
    column: Int[Array, ""],
    *,
    waiting: Int[Array, ""],
    config: ModelConfig,
    shape: Shape,
) -> _State:
    """One token for every slot: forward, sample, write out, stop or hand out the next sample."""
    cache, lanes, outputs = state
    lanes = _everywhere(lanes)
    idle = outputs.counts.shape[0]
    busy = lanes.request < idle
    queued = (waiting < requests.count) | jnp.any(lanes.next_sample < lanes.last_sample)
    age = (column - jnp.arange(ring)) % ring
    own_mask = age < lanes.count[..., None] + 1
    start = 0 if cache.template is None else cache.template.length
    positions = start + requests.lengths[lanes.prompt][:, None] - 1 + lanes.count
    scores, cache = transformer.decode_step(
        params, config, cache, lanes.token, positions, own_mask, column
    )
    per_lane = jax.tree.map(lambda x: x[lanes.prompt], requests.sampling)
    per_slot = jax.tree.map(lambda x: jnp.repeat(x, shape.width, axis=0), per_lane)
    # Whole rows of scores: each device draws the tokens of some slots, and tells them to all.
    rows = constrain(scores.reshape(-1, scores.shape[-1]), ("rows", None))
    drawn = _everywhere(sample(rows, _uniforms(key, lanes).reshape(-1), per_slot))
    token, logprob, sampling_logprob = (x.reshape(busy.shape) for x in drawn)

    stop = busy & jnp.any(token[..., None] == per_lane.stop_ids[:, None], axis=-1)
    count = lanes.count + 1
    done = stop | (count >= requests.max_new_tokens[lanes.prompt][:, None])
    at = (lanes.request, lanes.count)  # idle slots point past the end and are dropped
    outputs = Outputs(
        tokens=outputs.tokens.at[at].set(token, mode="drop"),
        logprobs=outputs.logprobs.at[at].set(logprob, mode="drop"),
        sampling_logprobs=outputs.sampling_logprobs.at[at].set(sampling_logprob, mode="drop"),
        counts=outputs.counts.at[lanes.request].set(count, mode="drop"),
        finished=outputs.finished.at[lanes.request].set(stop, mode="drop"),
        steps=outputs.steps + 1,
        queued_steps=outputs.queued_steps + queued,
        queued_tokens=outputs.queued_tokens + jnp.where(queued, jnp.sum(busy), 0),
    )
    lanes = dataclasses.replace(
        lanes, request=jnp.where(done, idle, lanes.request), token=token, count=count
    )
    lanes = _hand_out_samples(lanes, requests, idle)
    return cache, _everywhere(lanes), _everywhere(outputs)


def _hand_out_samples(lanes: _Lanes, requests: Requests, idle: int) -> _Lanes:
    """Gives each lane's idle slots the next samples of the lane's prompt, while there are any."""
    vacant = lanes.request >= idle
    sample_index = lanes.next_sample[:, None] + jnp.cumsum(vacant, axis=1) - 1
    starts = vacant & (sample_index < lanes.last_sample[:, None])
    last_token = requests.tokens[lanes.prompt, requests.lengths[lanes.prompt] - 1]
    started = jnp.sum(starts, axis=1).astype(jnp.int32)
    group_size = idle // len(requests.tokens)
    request = lanes.prompt[:, None] * group_size + sample_index
    return dataclasses.replace(
        lanes,
        next_sample=lanes.next_sample + started,
        request=jnp.where(starts, request, lanes.request).astype(jnp.int32),
        token=jnp.where(starts, last_token[:, None], lanes.token).astype(jnp.int32),
        count=jnp.where(vacant, 0, lanes.count).astype(jnp.int32),
    )


def _free_lanes(lanes: _Lanes, idle: int) -> Bool[Array, " R"]:
    return jnp.all(lanes.request >= idle, axis=1)


def _uniforms(key: Array, lanes: _Lanes) -> Float[Array, "R W"]:
    """One number in [0, 1) per slot, from (key, row, token index): not from slot or step."""

    def one(request: Array, count: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, request), count))

    return jax.vmap(jax.vmap(one))(lanes.request, lanes.count)
