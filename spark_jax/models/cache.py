"""The decoder's key-value cache, a tree: a template, one copy of each prompt, the samples' tokens.

A template is what all prompts begin with; a prompt's own part is what follows it. Slots are grouped
in lanes: the W slots of a lane sample from one prompt and share its keys and values. Per-layer
arrays are a tuple (unrolled decoding) or stacked on axis 0 (scanned decoding).

Keys lie as [..., K, columns] and values as [..., columns, K], and lanes and slots share one axis:
both products of attention then read the cache as it is. Otherwise XLA:CPU transposes all keys, or
copies all values (an axis of length 1 is enough), at every step.

With a mesh in scope, lanes and slots are spread over it like the rows of a batch, and KV heads over
`tensor`. A prompt is written to a lane of the device that has prefilled it.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from spark_jax.models.config import ModelConfig
from spark_jax.parallel.sharding import constrain, mesh_in_scope, spec

_AXES = ("batch", "kv_heads", None, None)
"""Of the keys and values of lanes or slots in one layer."""


@flax.struct.dataclass
class Rounded:
    """Keys or values in 8 bits: `rounded` · `scale`, one scale per token and head, which is the
    largest of the K absolute values divided by 127."""

    rounded: Any  # int8, shaped as what it stands for
    scale: Any  # float32, the same with 1 in place of K

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rounded.shape


def round_to_int8(x: Any, axis: int) -> Rounded:
    """Of keys or values whose K numbers lie along `axis`; zeros stay zeros."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=axis, keepdims=True) / 127
    return Rounded(jnp.round(wide / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale)


@flax.struct.dataclass
class Template:
    """Keys and values of the C tokens that all prompts begin with, per layer."""

    keys: Any  # [H_kv, K, C]
    values: Any  # [H_kv, C, K]

    @property
    def length(self) -> int:
        return jax.tree.leaves(self.values)[0].shape[-2]

    def layers(self) -> Any:
        """(keys, values) as `transformer` walks them: a list of pairs, or a stacked pair."""
        if isinstance(self.keys, tuple):
            return list(zip(self.keys, self.values, strict=True))
        return self.keys, self.values


@flax.struct.dataclass
class PromptCache:
    """Keys and values of prompts, per layer."""

    keys: Any  # [P, H_kv, K, L]
    values: Any  # [P, H_kv, L, K]
    lengths: Any  # [P] how many of the L count

    def as_template(self) -> Template:
        """The only prompt (P = 1), every token of it, as a template for others."""
        axis = 0 if isinstance(self.keys, tuple) else 1
        keys, values = jax.tree.map(lambda x: x.squeeze(axis), (self.keys, self.values))
        return Template(keys, values)


class Segment(NamedTuple):
    """One layer's share of the cache, or that of all layers, stacked, and the index of one."""

    prompt_keys: Any  # [R, H_kv, K, L]
    prompt_values: Any  # [R, H_kv, L, K]
    keys: Any  # [R·W, H_kv, K, T]
    values: Any  # [R·W, H_kv, T, K]
    template: Any = None  # (keys [H_kv, K, C], values [H_kv, C, K])
    layer: Any = None  # [] index into the first axis that all of these have; None: there is none

    def write(self, k: Any, v: Any, column: Any) -> Segment:
        """With the new keys and values [R·W, H_kv, K] of all slots in one column: in place."""
        axes: tuple[str | None, ...] = _AXES
        start: tuple[Any, ...] = (0, 0)
        k, v = k[..., None], v[..., None, :]
        if self.layer is not None:
            axes, start = ("layers", *_AXES), (self.layer, 0, 0)
            k, v = k[None], v[None]

        def write(old: Any, new: Any, at: tuple[Any, ...]) -> Any:
            new = jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (*start, *at))
            return constrain(new, axes)

        keys = jax.tree.map(partial(write, at=(0, column)), self.keys, _like(self.keys, k, -2))
        values = jax.tree.map(
            partial(write, at=(column, 0)), self.values, _like(self.values, v, -1)
        )
        return self._replace(keys=keys, values=values)

    def one_layer(self) -> Segment:
        """The arrays of the layer that is meant, cut from those of all."""
        if self.layer is None:
            return self
        cut = partial(jax.lax.dynamic_index_in_dim, index=self.layer, axis=0, keepdims=False)
        return jax.tree.map(cut, self._replace(layer=None))


@flax.struct.dataclass
class Cache:
    """R lanes of W slots: the template, the lanes' prompts after it, and T columns of own tokens
    for each slot."""

    prompt: PromptCache
    keys: Any  # per layer [R·W, H_kv, K, T]
    values: Any  # per layer [R·W, H_kv, T, K]
    template: Template | None = None

    @property
    def prompt_length(self) -> int:
        return jax.tree.leaves(self.prompt.values)[0].shape[-2]

    def latest(self, columns: int) -> Cache:
        """With the last so many columns only."""
        return dataclasses.replace(
            self,
            keys=jax.tree.map(lambda x: x[..., -columns:], self.keys),
            values=jax.tree.map(lambda x: x[..., -columns:, :], self.values),
        )

    def with_latest(self, latest: Cache, shift: Any) -> Cache:
        """With its last columns replaced by those of `latest`, rolled back by `shift`."""
        columns = jax.tree.leaves(latest.values)[0].shape[-2]
        start = jax.tree.leaves(self.values)[0].shape[-2] - columns

        def keys(old: Any, new: Any) -> Any:
            return old.at[..., start:].set(jnp.roll(new, -shift, axis=-1))

        def values(old: Any, new: Any) -> Any:
            return old.at[..., start:, :].set(jnp.roll(new, -shift, axis=-2))

        return dataclasses.replace(
            self,
            keys=jax.tree.map(keys, self.keys, latest.keys),
            values=jax.tree.map(values, self.values, latest.values),
        )

    def segments(self) -> Any:
        """The cache as `transformer` walks it: a list of segments, or stacked segments to scan."""
        parts = (self.prompt.keys, self.prompt.values, self.keys, self.values)
        template = None if self.template is None else self.template.layers()
        if not isinstance(self.keys, tuple):
            return Segment(*parts, template)
        templates = template or [None] * len(self.keys)
        return [Segment(*layer) for layer in zip(*parts, templates, strict=True)]


def empty(
    config: ModelConfig,
    *,
    lanes: int,
    width: int,
    prompt_length: int,
    columns: int,
    stacked: bool,
    template: Template | None = None,
) -> Cache:
    """A cache of zeros with no valid token in it. The slots' own part may be wider than the compute
    dtype; what is written is rounded to that all the same."""

    def of_dtype(*shape: int, dtype: Any) -> Any:
        if stacked:
            return constrain(jnp.zeros((config.num_layers, *shape), dtype), ("layers", *_AXES))
        return tuple(constrain(jnp.zeros(shape, dtype), _AXES) for _ in range(config.num_layers))

    def zeros(*shape: int, axis: int, dtype: Any) -> Any:
        if config.cache_dtype is None:
            return of_dtype(*shape, dtype=dtype)
        one = (*shape[:axis], 1, *shape[axis:][1:])
        parts = of_dtype(*shape, dtype=jnp.int8), of_dtype(*one, dtype=jnp.float32)
        return Rounded(*parts) if stacked else tuple(map(Rounded, *parts))

    heads, head_dim, dtype = config.num_kv_heads, config.head_dim, config.compute_dtype
    # Unrolled decoding is for CPU, where XLA widens the whole of a bfloat16 array to update a part.
    own_dtype = dtype if stacked else jnp.float32
    prompt = PromptCache(
        keys=zeros(lanes, heads, head_dim, prompt_length, axis=2, dtype=dtype),
        values=zeros(lanes, heads, prompt_length, head_dim, axis=3, dtype=dtype),
        lengths=jnp.zeros(lanes, jnp.int32),
    )
    return Cache(
        prompt,
        keys=zeros(lanes * width, heads, head_dim, columns, axis=2, dtype=own_dtype),
        values=zeros(lanes * width, heads, columns, head_dim, axis=3, dtype=own_dtype),
        template=template,
    )


def insert(cache: Cache, prompts: PromptCache, lanes: Any) -> Cache:
    """Writes prompts into lanes; an index outside 0..R-1 drops that prompt. Each shard of the
    prompts goes into the same shard of the lanes, which are counted from its beginning."""
    axis = 0 if isinstance(cache.keys, tuple) else 1

    def write(old: Any, new: Any, lanes: Any) -> Any:
        index = (slice(None),) * axis + (lanes,)
        return old.at[index].set(new, mode="drop")

    def into(old: Any, new: Any) -> Any:
        return _in_shards(write, (old, new), lanes)

    prompt = PromptCache(
        jax.tree.map(into, cache.prompt.keys, _like(cache.prompt.keys, prompts.keys, -2)),
        jax.tree.map(into, cache.prompt.values, _like(cache.prompt.values, prompts.values, -1)),
        _in_shards(
            lambda old, new, lanes: old.at[lanes].set(new, mode="drop"),
            (cache.prompt.lengths, prompts.lengths),
            lanes,
        ),
    )
    return dataclasses.replace(cache, prompt=prompt)


def rearrange(cache: Cache, source: Any) -> Cache:
    """Gives each lane r the prompt that lane source[r] of its shard has."""
    axis = 0 if isinstance(cache.keys, tuple) else 1

    def take(x: Any) -> Any:
        return _in_shards(lambda x, source: jnp.take(x, source, axis=axis), (x,), source)

    keys, values = jax.tree.map(take, (cache.prompt.keys, cache.prompt.values))
    lengths = _in_shards(lambda x, source: x[source], (cache.prompt.lengths,), source)
    return dataclasses.replace(cache, prompt=PromptCache(keys, values, lengths))


def _like(cache: Any, new: Any, axis: int) -> Any:
    """New keys or values, K numbers along `axis`, as the cache holds them: of one layer or
    stacked, or a tuple of layers."""
    if isinstance(cache, tuple):
        return tuple(_like(old, x, axis) for old, x in zip(cache, new, strict=True))
    return round_to_int8(new, axis) if isinstance(cache, Rounded) else new


def _in_shards(function: Any, arrays: tuple[Any, ...], index: Any) -> Any:
    """The function of the arrays and an index into their lanes, by every device for its own lanes:
    XLA, which does not know that the index stays within them, would gather all."""
    mesh = mesh_in_scope()
    if mesh is None:
        return function(*arrays, index)
    axes = {1: _AXES[:1], 4: _AXES, 5: ("layers", *_AXES)}
    specs = tuple(spec(x.shape, axes[x.ndim], mesh, "cache") for x in (*arrays, index))
    run = jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)
    return run(*arrays, index)
