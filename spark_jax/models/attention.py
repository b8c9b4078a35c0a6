"""Attention of whole sequences to themselves, and of one query per slot to a cache.

Whole sequences below `LONG` tokens hold their scores, most of [T, T] ("dense"). Longer ones never:
"splash" is the Pallas kernel that ships with jax for TPUs, "cudnn" the fused kernel of cuDNN for
GPUs, fed a block of queries at a time, and "blockwise" is XLA on every platform, a block of queries
at a time, which computes what "dense" does. `ModelConfig.attention` forces one of them.

A decode step's query attends by XLA, or by a Pallas kernel of our own: on TPU, and on GPU where
"triton" asks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spark_jax.kernels.prefix_decode_attention import prefix_decode_attention
from spark_jax.models.cache import Rounded, Segment
from spark_jax.models.dot import activation_dot
from spark_jax.parallel.sharding import mesh_in_scope, platform, spec

LONG = 4096  # tokens
BLOCK_SCORES = 2**19
"""Scores of one head and row that "blockwise" holds at once: 2 MiB."""

_FEWEST_QUERIES = 64  # of a block: fewer make thin products

_MASKED = -1e30  # finite, so that a fully masked row gives uniform weights rather than NaN

Template = tuple[Float[Array, "G K C"], Float[Array, "G C K"]]
"""Keys and values of tokens that stand before every sequence."""


def causal(
    segment_ids: Int[Array, "B T"], implementation: str, dtype: Any, before: int = 0
) -> Callable[[Array, Array, Array, Template | None], Float[Array, "B T H K"]]:
    """A function of queries [B, T, H, K], keys and values [B, T, G, K], and a template or None.

    A token attends to the tokens at or before it in its own segment, and to all of a template.
    Outputs at segment 0, which is padding, are finite and mean nothing.

    Args:
      implementation: a value of `ModelConfig.attention`; "auto" takes "dense" below `LONG` tokens,
        and above it what suits the platform: "splash" on TPU, "cudnn" on GPU in bfloat16, else
        "blockwise". Here "triton" is "auto".
      before: tokens of the template, which count among those.
    """
    if implementation in ("auto", "triton"):
        implementation = _fitting(before + segment_ids.shape[1], dtype)
    if implementation == "dense":
        return functools.partial(_dense, _causal_mask(segment_ids))
    return functools.partial(_LONG[implementation], segment_ids)


def cached(
    q: Float[Array, "S H K"],
    kv: Segment,
    prompt_mask: Bool[Array, "R L"],
    own_mask: Bool[Array, "S T"],
    implementation: str = "auto",
) -> Float[Array, "S H K"]:
    """One query per slot against the template, its lane's prompt and its own tokens.

    Args:
      kv: of one layer; or of all, stacked, as `in_place` wants it.
      prompt_mask: the first tokens of each lane's prompt, as many as count.
      implementation: a value of `ModelConfig.attention`. Where kv is of all layers, "splash" and
        on TPU "auto" are a Pallas kernel for TPU (`kernels.prefix_decode_attention`), "triton" is
        one for GPU; everything else is XLA, and so are a cache in int8 and a mesh whose `tensor`
        does not divide the KV heads.
    """
    kernel = _kernel(implementation, kv)
    if kernel is not None:
        return _cached_by_kernel(kernel, q, kv, prompt_mask, own_mask)
    kv = kv.one_layer()
    queries = q.reshape(len(q), kv.keys.shape[1], -1, q.shape[-1])
    # Batch axes first: in bfloat16 newer XLA:CPU multiplies no other order.
    dot = {"preferred_element_type": jnp.float32}
    keys, key_scale = _wide(kv.keys, q.dtype)
    values, value_scale = _wide(kv.values, q.dtype)
    own = jnp.einsum("sgqk,sgkt->sgqt", queries.astype(keys.dtype), keys, **dot)
    own = _scaled(own * q.shape[-1] ** -0.5, key_scale)
    # Every slot has a token of its own, so the joint maximum is never the masked value.
    own = jnp.where(own_mask[:, None, None], own, _MASKED)

    def weigh(weights: Array) -> Array:
        weights = _scaled(weights, value_scale, axis=-1).astype(values.dtype)
        return jnp.einsum("sgqt,sgtk->sgqk", weights, values, **dot)

    parts: list[_Part] = [
        (own, weigh),
        _shared_part(queries, kv.prompt_keys, kv.prompt_values, prompt_mask),
    ]
    if kv.template is not None:
        parts.append(_template_part(queries, kv.template))
    return _join(parts, q.dtype).reshape(q.shape).astype(q.dtype)


def in_place(implementation: str) -> bool:
    """Whether `cached` is to have the cache of all layers, as it lies, instead of a slice: on
    accelerators, where a slice that is written to, or that a kernel reads, is a copy."""
    return implementation in _KERNELS or platform() != "cpu"


def _fitting(length: int, dtype: Any) -> str:
    if length < LONG:
        return "dense"
    if platform() == "gpu":
        return "cudnn" if dtype == jnp.bfloat16 else "blockwise"
    return "splash" if platform() == "tpu" else "blockwise"


# --- one query per slot --------------------------------------------------------------------------


_KERNELS = {"splash": "pallas_tpu", "triton": "pallas_gpu"}


def _kernel(implementation: str, kv: Segment) -> str | None:
    if kv.layer is None or isinstance(kv.keys, Rounded):
        return None
    mesh = mesh_in_scope()
    if mesh is not None and kv.keys.shape[2] % mesh.shape.get("tensor", 1):
        return None
    if implementation == "auto":
        return "pallas_tpu" if platform() == "tpu" else None
    return _KERNELS.get(implementation)


def _cached_by_kernel(
    kernel: str,
    q: Float[Array, "S H K"],
    kv: Segment,
    prompt_mask: Bool[Array, "R L"],
    own_mask: Bool[Array, "S T"],
) -> Float[Array, "S H K"]:
    """The kernel for prompts and own tokens, on each device for the lanes and heads it holds; the
    template, which all slots share, is joined to it."""
    arrays = (q, kv.prompt_keys, kv.prompt_values, prompt_mask.sum(axis=-1), kv.keys, kv.values)
    slots, cache = ("batch", "heads", None), (None, "batch", "kv_heads", None, None)
    names = (slots, cache, cache, ("batch",), cache, cache, ("batch", None), ())
    attend = functools.partial(prefix_decode_attention, implementation=kernel)
    mesh = mesh_in_scope()
    if mesh is not None:
        specs = tuple(
            spec(x.shape, axes, mesh, "attention")
            for x, axes in zip((*arrays, own_mask, kv.layer), names, strict=True)
        )
        outs = (specs[0], spec(q.shape[:2], slots[:2], mesh, "attention"))
        attend = jax.shard_map(attend, in_specs=specs, out_specs=outs, check_vma=False)
    out, logsumexp = attend(*arrays, own_mask, kv.layer)
    if kv.template is None:
        return out.astype(q.dtype)
    queries = q.reshape(len(q), kv.keys.shape[2], -1, q.shape[-1])
    top = logsumexp.reshape(queries.shape[:-1])[..., None]
    scores, weigh = _template_part(queries, kv.one_layer().template)
    parts: list[_Part] = [  # what the kernel has seen counts as one value, of score `top`
        (top, lambda weights: weights * out.reshape(queries.shape)),
        (scores, lambda weights: weigh(weights.astype(q.dtype))),
    ]
    return _join(parts, jnp.float32).reshape(q.shape).astype(q.dtype)


# --- long sequences ----------------------------------------------------------------------------


def _blockwise(
    segment_ids: Int[Array, "B T"],
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    template: Template | None,
) -> Float[Array, "B T H K"]:
    """`_attend` for a block of queries after the other."""
    return _in_blocks(
        lambda q, k, v, mask: _attend(q, k, v, mask, template), segment_ids, q, k, v, segment_ids
    )


def _cudnn(
    segment_ids: Int[Array, "B T"],
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    template: Template | None,
) -> Float[Array, "B T H K"]:
    """cuDNN's fused attention takes segments as a mask only, which a block of queries keeps small.
    It computes masked scores too, like "blockwise": twice the arithmetic of a causal kernel."""

    def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask[:, None], implementation="cudnn", scale=q.shape[-1] ** -0.5
        )

    def on_one_device(segment_ids: Array, q: Array, k: Array, v: Array, seen: Array) -> Array:
        return _in_blocks(attend, segment_ids, q, k, v, seen)

    return _on_each_device(on_one_device, segment_ids, q, *_after(template, segment_ids, k, v))


def _in_blocks(
    attend: Callable[[Array, Array, Array, Array], Array],
    segment_ids: Int[Array, "B T"],
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    key_segments: Int[Array, "B S"],
) -> Float[Array, "B T H K"]:
    """Scans over blocks of queries, with the mask of each; computed again in the backward pass.

    Where there are more keys than queries, the first S − T stand before all of these.
    """
    b, t, h, d = q.shape
    before = k.shape[1] - t
    block = max(16, min(BLOCK_SCORES // k.shape[1], t))
    padding = ((0, 0), (0, -t % block))
    queries = jnp.pad(q, (*padding, (0, 0), (0, 0))).reshape(b, -1, block, h, d)
    segments = jnp.pad(segment_ids, padding).reshape(b, -1, block)
    # In float32, in which the scan then sums the gradients of its blocks.
    wide_k, wide_v = k.astype(jnp.float32), v.astype(jnp.float32)

    @jax.checkpoint
    def one(inputs: tuple[Array, Array, Array]) -> Array:
        start, q, segments = inputs
        index = start + jnp.arange(block)
        mask = segments[:, :, None] == key_segments[:, None, :]
        mask &= before + index[:, None] >= jnp.arange(k.shape[1])[None, :]
        return attend(q, wide_k.astype(k.dtype), wide_v.astype(v.dtype), mask)

    starts = jnp.arange(0, queries.shape[1] * block, block)
    out = jax.lax.map(one, (starts, jnp.moveaxis(queries, 1, 0), jnp.moveaxis(segments, 1, 0)))
    return jnp.moveaxis(out, 0, 1).reshape(b, -1, h, d)[:, :t]


def _splash(
    segment_ids: Int[Array, "B T"],
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    template: Template | None,
) -> Float[Array, "B T H K"]:
    """`jax.experimental.pallas.ops.tpu.splash_attention`, on each chip for its rows and heads."""
    return _on_each_device(_splash_kernel, segment_ids, q, *_after(template, segment_ids, k, v))


def _splash_kernel(
    segment_ids: Int[Array, "B T"],
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    key_segments: Int[Array, "B S"],
) -> Float[Array, "B T H K"]:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    (_, t, h, d), s = q.shape, k.shape[1]
    q_block, kv_block = _tile(t), _tile(s)
    q = (q.astype(jnp.float32) * d**-0.5).astype(q.dtype)
    q, segment_ids = (_pad_length(x, -t % q_block) for x in (q, segment_ids))
    k, v, key_segments = (_pad_length(x, -s % kv_block) for x in (k, v, key_segments))
    mask = splash_attention_mask.CausalMask((q.shape[1], k.shape[1]), offset=s - t)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=q_block,
        block_kv=kv_block,
        block_q_dkv=q_block,
        block_kv_dkv=kv_block,
        block_q_dq=q_block,
        block_kv_dq=kv_block,
    )
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * h), block_sizes=sizes
    )
    ids = splash_attention_kernel.SegmentIds(segment_ids, key_segments)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)[:, :t]


def _tile(length: int) -> int:
    """Queries or keys of a kernel's tile: whole lanes of 128, and few of them padding."""
    return min(512, -(-length // 128) * 128)


def _pad_length(x: Array, padding: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))


def _after(
    template: Template | None, segment_ids: Array, k: Array, v: Array
) -> tuple[Array, Array, Array]:
    """Keys, values and their segments, the template's before each row's own. Its tokens belong to
    segment 1, the only one that `transformer.prefill` has."""
    if template is None:
        return k, v, segment_ids
    keys, values = template[0].transpose(2, 0, 1), template[1].swapaxes(0, 1)  # [C, G, K]

    def before(first: Array, x: Array) -> Array:
        return jnp.concatenate([jnp.broadcast_to(first, (len(x), *first.shape)), x], axis=1)

    seen = jnp.ones(len(keys), segment_ids.dtype)
    return before(keys, k), before(values, v), before(seen, segment_ids)


def _on_each_device(
    attend: Callable[..., Array],
    segment_ids: Int[Array, "B T"],
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    key_segments: Int[Array, "B S"],
) -> Float[Array, "B T H K"]:
    """A kernel, which XLA cannot partition, on each device for the rows and heads it holds."""
    mesh = mesh_in_scope()
    if mesh is None:
        return attend(segment_ids, q, k, v, key_segments)
    if k.shape[2] < mesh.shape.get("tensor", 1):  # every query head with a copy of its KV head
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    rows, heads = ("batch", None), ("batch", None, "heads", None)
    arguments = (segment_ids, q, k, v, key_segments)
    names = (rows, heads, heads, heads, rows)
    specs = tuple(
        spec(x.shape, axes, mesh, "attention") for x, axes in zip(arguments, names, strict=True)
    )
    return jax.shard_map(attend, in_specs=specs, out_specs=specs[1], check_vma=False)(*arguments)


_LONG: dict[str, Callable[..., Array]] = {
    "blockwise": _blockwise,
    "splash": _splash,
    "cudnn": _cudnn,
}


# --- scores held -------------------------------------------------------------------------------


def _dense(
    mask: Bool[Array, "B T T"],
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    template: Template | None,
) -> Float[Array, "B T H K"]:
    """`_attend` for up to four blocks of queries, each with the keys up to its last one only: four
    compute five eighths of the square of scores, of which a causal mask lets half count."""
    length = q.shape[1]
    block = -(-length // min(4, max(1, length // _FEWEST_QUERIES)))
    # Rounded in products only, so that the gradients of the blocks are added in float32.
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)

    def one(start: int) -> Array:
        rows, seen = slice(start, start + block), slice(start + block)
        return _attend(q[:, rows], k[:, seen], v[:, seen], mask[:, rows, seen], template)

    return jnp.concatenate([one(start) for start in range(0, length, block)], axis=1)


def _causal_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    index = jnp.arange(segment_ids.shape[1])
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same & (index[:, None] >= index[None, :])


def _attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    mask: Bool[Array, "B T S"],
    template: Template | None = None,
) -> Float[Array, "B T H K"]:
    """Grouped-query attention; the queries of one KV head are folded, KV is never repeated.

    With a template's keys and values every query attends to all of them too. Multiplied in q's
    dtype; k and v may be wider.
    """
    b, t, h, d = q.shape
    # Batch axes first, so that scores come as they lie: no transposed copy of them is made.
    queries = jnp.moveaxis(q.reshape(b, t, k.shape[2], -1, d), 1, 3)
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = activation_dot("bgqtk,bgsk->bgqts", queries, keys)
    scores = jnp.where(mask[:, None, None], scores * d**-0.5, _MASKED)

    def weigh(weights: Array) -> Array:
        weights = weights.reshape(scores.shape)
        out = activation_dot("bgqts,bgsk->bgqtk", weights, values)
        return out.reshape(*out.shape[:2], -1, d)

    parts: list[_Part] = [(scores.reshape(b, k.shape[2], -1, k.shape[1]), weigh)]
    if template is not None:
        folded = queries.reshape(b, k.shape[2], -1, d)
        parts.append(_template_part(folded, template))
    out = _join(parts, q.dtype).reshape(b, k.shape[2], -1, t, d)
    return jnp.moveaxis(out, 3, 1).reshape(b, t, h, d).astype(q.dtype)


# Scores [B, G, N, S] of some keys, masked, and what multiplies such weights with their values.
_Part = tuple[Array, Callable[[Array], Array]]


def _template_part(q: Float[Array, "B G N K"], template: Template) -> _Part:
    keys, values = template
    return _shared_part(q, keys[None], values[None], jnp.ones((1, values.shape[1]), jnp.bool_))


def _shared_part(
    q: Float[Array, "B G N K"],
    keys: Float[Array, "R G K L"] | Rounded,
    values: Float[Array, "R G L K"] | Rounded,
    mask: Bool[Array, "R L"],
) -> _Part:
    """B / R neighbours share one set of keys: their queries of one KV head make one plain matrix
    product, so keys and values are read once for all of them."""
    b, g, n, _ = q.shape
    r = keys.shape[0]
    keys, key_scale = _wide(keys, q.dtype)
    values, value_scale = _wide(values, q.dtype)

    def together(x: Array) -> Array:
        return x.reshape(r, b // r, g, n, -1).swapaxes(1, 2).reshape(r, g, b // r * n, -1)

    def apart(x: Array) -> Array:
        return x.reshape(r, g, b // r, n, -1).swapaxes(1, 2).reshape(b, g, n, -1)

    dot = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("rgnk,rgkl->rgnl", together(q), keys, **dot)
    scores = _scaled(scores * q.shape[-1] ** -0.5, key_scale)
    scores = jnp.where(mask[:, None, None], scores, _MASKED)

    def weigh(weights: Array) -> Array:
        weights = _scaled(together(weights), value_scale, axis=-1).astype(values.dtype)
        return apart(jnp.einsum("rgnl,rglk->rgnk", weights, values, **dot))

    return apart(scores), weigh


def _wide(x: Array | Rounded, dtype: Any) -> tuple[Array, Array | None]:
    """Keys or values to multiply with, and their scale, with which scores and weights are
    multiplied instead of them all."""
    return (x.rounded.astype(dtype), x.scale) if isinstance(x, Rounded) else (x, None)


def _scaled(
    x: Float[Array, "*B Q S"], scale: Float[Array, "..."] | None, axis: int = -2
) -> Float[Array, "*B Q S"]:
    """Scores or weights of S keys times these keys' scale, whose only K lies along `axis`."""
    if scale is None:
        return x
    return x * (scale if axis == -2 else jnp.swapaxes(scale, -1, -2))


def _join(parts: list[_Part], dtype: Any) -> Float[Array, "..."]:
    """Attention over several sets of keys, joined by their common maximum and sum: nothing is
    copied or concatenated.

    Weights are rounded to `dtype` before they are normalised, in sampler and scorer alike: in
    bfloat16 they would drift apart otherwise.
    """
    tops = [scores.max(axis=-1, keepdims=True) for scores, _ in parts]
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, tops))
    weights = [jnp.exp(scores - top) for scores, _ in parts]
    out = [weigh(w.astype(dtype)) for w, (_, weigh) in zip(weights, parts, strict=True)]
    total = [w.sum(axis=-1, keepdims=True) for w in weights]
    return functools.reduce(jnp.add, out) / functools.reduce(jnp.add, total)
