"""The decoder's key-value cache, a tree: a template, one copy of each prompt, the samples' tokens.

A template is what all prompts begin with; a prompt's own part is what follows it. Slots are grouped
in lanes: the W slots of a lane sample from one prompt and share its keys and values. Per-layer
arrays are a tuple (unrolled decoding) or stacked on axis 0 (scanned decoding).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from spark_jax.models.config import ModelConfig


@flax.struct.dataclass
class Template:
    """Keys and values of the C tokens that all prompts begin with, per layer [H_kv, C, K]."""

    keys: Any
    values: Any

    @property
    def length(self) -> int:
        return jax.tree.leaves(self.keys)[0].shape[-2]

    def layers(self) -> Any:
        """(keys, values) as `transformer` walks them: a list of pairs, or a stacked pair."""
        if isinstance(self.keys, tuple):
            return list(zip(self.keys, self.values, strict=True))
        return self.keys, self.values


@flax.struct.dataclass
class PromptCache:
    """Keys and values of prompts, per layer [P, H_kv, L, K]; `lengths` [P] says how many count."""

    keys: Any
    values: Any
    lengths: Any

    def as_template(self) -> Template:
        """The only prompt (P = 1), every token of it, as a template for others."""
        axis = 0 if isinstance(self.keys, tuple) else 1
        keys, values = jax.tree.map(lambda x: x.squeeze(axis), (self.keys, self.values))
        return Template(keys, values)


class Segment(NamedTuple):
    """One layer's share of the cache."""

    prompt_keys: Any  # [R, H_kv, L, K]
    prompt_values: Any
    keys: Any  # [R, W, H_kv, T, K]
    values: Any
    template: Any = None  # (keys, values), each [H_kv, C, K]


@flax.struct.dataclass
class Cache:
    """R lanes of W slots: the template, the lanes' prompts after it, and T columns of own tokens
    for each slot."""

    prompt: PromptCache
    keys: Any  # per layer [R, W, H_kv, T, K]
    values: Any
    template: Template | None = None

    @property
    def prompt_length(self) -> int:
        return jax.tree.leaves(self.prompt.keys)[0].shape[-2]

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
    """A cache of zeros with no valid token in it."""

    def zeros(*shape: int) -> Any:
        shape = (*shape, config.head_dim)
        if stacked:
            return jnp.zeros((config.num_layers, *shape), config.compute_dtype)
        return tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(config.num_layers))

    prompt_shape = (lanes, config.num_kv_heads, prompt_length)
    own_shape = (lanes, width, config.num_kv_heads, columns)
    prompt = PromptCache(zeros(*prompt_shape), zeros(*prompt_shape), jnp.zeros(lanes, jnp.int32))
    return Cache(prompt, zeros(*own_shape), zeros(*own_shape), template)


def insert(cache: Cache, prompts: PromptCache, lanes: Any) -> Cache:
    """Writes prompts into lanes; an index outside 0..R-1 drops that prompt."""
    axis = 0 if isinstance(cache.keys, tuple) else 1

    def write(old: Any, new: Any) -> Any:
        index = (slice(None),) * axis + (lanes,)
        return old.at[index].set(new, mode="drop")

    prompt = PromptCache(
        jax.tree.map(write, cache.prompt.keys, prompts.keys),
        jax.tree.map(write, cache.prompt.values, prompts.values),
        cache.prompt.lengths.at[lanes].set(prompts.lengths, mode="drop"),
    )
    return dataclasses.replace(cache, prompt=prompt)
