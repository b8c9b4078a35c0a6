"""One functional transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Parameters are a pytree; layers are stacked on axis 0 and scanned. `unstack` gives the second
layout, one array per layer, in which decoding is unrolled: 3-7x faster on CPU, where a scan copies
the cache. Every function here takes either layout.

The sampler (`prefill`, `decode_step`) and the scorer (`forward`) run the same `_layer`, so their
log-probabilities agree.

With a mesh in scope (`jax.set_mesh`) everything is spread over it by the names of its axes. Whole
sequences are spread by row, and gather the weights of one layer at a time; a decode step, which has
few tokens, moves those instead: its residual stream lies as the weights do.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from spark_jax.models import attention, rotary
from spark_jax.models.cache import Cache, PromptCache, Segment, Template
from spark_jax.models.config import ModelConfig
from spark_jax.models.layers import FEW_ROWS, FusedLayer, Layer, by_rows, fuse, weight_first
from spark_jax.parallel.sharding import constrain, platform


@flax.struct.dataclass
class Params:
    embedding: Any  # [V, D]
    layers: Any  # Layer with leading axis, or a tuple of FusedLayer (see `unstack`)
    final_norm: Any  # [D]
    head: Any = None  # [D, V]; None where tied to the embedding


def init(config: ModelConfig, key: Array) -> Params:
    """Random float32 parameters, layers stacked: normal with standard deviation 1/sqrt(fan-in);
    what writes to the residual stream is scaled down by sqrt(2 · num_layers) (GPT-2)."""
    n, d, f = config.num_layers, config.width, config.mlp_width
    h, h_kv, k = config.num_heads, config.num_kv_heads, config.head_dim
    keys = iter(jax.random.split(key, 9))

    def normal(shape: tuple[int, ...], fan_in: float) -> Float[Array, "..."]:
        return jax.random.normal(next(keys), shape, jnp.float32) / jnp.sqrt(fan_in)

    layers = Layer(
        attention_norm=jnp.ones((n, d)),
        query=normal((n, d, h, k), d),
        key=normal((n, d, h_kv, k), d),
        value=normal((n, d, h_kv, k), d),
        output=normal((n, h, k, d), h * k * 2 * n),
        mlp_norm=jnp.ones((n, d)),
        gate=normal((n, d, f), d),
        up=normal((n, d, f), d),
        down=normal((n, f, d), f * 2 * n),
        query_bias=jnp.zeros((n, h, k)) if config.qkv_bias else None,
        key_bias=jnp.zeros((n, h_kv, k)) if config.qkv_bias else None,
        value_bias=jnp.zeros((n, h_kv, k)) if config.qkv_bias else None,
        output_bias=jnp.zeros((n, d)) if config.output_bias else None,
        query_norm=jnp.ones((n, k)) if config.qk_norm else None,
        key_norm=jnp.ones((n, k)) if config.qk_norm else None,
    )
    return Params(
        embedding=normal((config.vocab_size, d), d),
        layers=layers,
        final_norm=jnp.ones(d),
        head=None if config.tied_embeddings else normal((d, config.vocab_size), d),
    )


def logical_axes(config: ModelConfig) -> Params:
    """The names of every parameter's axes, as a tuple in the parameter's place; None for an axis
    that is never sharded. `parallel.sharding` says where the names lie on a mesh."""
    heads, kv_heads = ("layers", "heads", None), ("layers", "kv_heads", None)
    layers = Layer(
        attention_norm=("layers", None),
        query=("layers", "width", "heads", None),
        key=("layers", "width", "kv_heads", None),
        value=("layers", "width", "kv_heads", None),
        output=("layers", "heads", None, "width"),
        mlp_norm=("layers", None),
        gate=("layers", "width", "mlp"),
        up=("layers", "width", "mlp"),
        down=("layers", "mlp", "width"),
        query_bias=heads if config.qkv_bias else None,
        key_bias=kv_heads if config.qkv_bias else None,
        value_bias=kv_heads if config.qkv_bias else None,
        output_bias=("layers", None) if config.output_bias else None,
        query_norm=("layers", None) if config.qk_norm else None,
        key_norm=("layers", None) if config.qk_norm else None,
    )
    return Params(
        embedding=("vocab", "width"),
        layers=layers,
        final_norm=(None,),
        head=None if config.tied_embeddings else ("width", "vocab"),
    )


def shapes(config: ModelConfig) -> Params:
    """Shape and dtype (the compute dtype) of every parameter, layers stacked; computes nothing."""
    drawn = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, config.compute_dtype), drawn)


def unstack(params: Params, config: ModelConfig) -> Params:
    """The decoding layout: one `FusedLayer` per layer, in the compute dtype; once per policy
    update."""
    stacked = jax.tree.map(lambda x: x.astype(config.compute_dtype), params.layers)
    one_by_one = (jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(config.num_layers))
    layers = tuple(fuse(layer) for layer in one_by_one)
    rest = jax.tree.map(
        lambda x: x.astype(config.compute_dtype), dataclasses.replace(params, layers=())
    )
    return dataclasses.replace(rest, layers=layers)


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Final hidden states, after the last norm; `logits` turns them into scores.

    A token attends to the tokens at or before it in its own segment. Segment 0 is padding by
    convention: real segments never see it. Where positions are not given they count from the start
    of each segment, so that padded and packed batches give the numbers of separate sequences.
    """
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    if positions is None:
        positions = positions_in_segments(segment_ids)
    causal = attention.causal(segment_ids, config.attention, config.compute_dtype)

    def attend(q: Array, k: Array, v: Array, _: None) -> tuple[Array, None]:
        return causal(q, k, v, None), None

    return _run(params, config, tokens, positions, attend)[0]


def prefill(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "P L"],
    lengths: Int[Array, " P"],
    template: Template | None = None,
) -> PromptCache:
    """Keys and values of right-padded prompts, or of what follows a template in each of them.

    No logits: the decoder feeds each prompt's last token through `decode_step`, so the [P, V]
    scores of a prefill are never needed. The template is attended to, not copied.
    """
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    start = 0 if template is None else template.length
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    segments = valid.astype(jnp.int32)
    causal = attention.causal(segments, config.attention, config.compute_dtype, start)

    def attend(q: Array, k: Array, v: Array, before: Any) -> tuple[Array, tuple[Array, Array]]:
        return causal(q, k, v, before), (k.transpose(0, 2, 3, 1), v.swapaxes(1, 2))

    layers = None if template is None else template.layers()
    _, (keys, values) = _run(params, config, tokens, positions, attend, layers)
    return PromptCache(keys=keys, values=values, lengths=lengths)


def decode_step(
    params: Params,
    config: ModelConfig,
    cache: Cache,
    tokens: Int[Array, "R W"],
    positions: Int[Array, "R W"],
    own_mask: Bool[Array, "R W T"],
    column: Int[Array, ""],
) -> tuple[Float[Array, "R W V"], Cache]:
    """One token for each of W slots in each of R lanes; the slots of a lane share its prompt, and
    all share the template. `positions` count from the template's start.

    The new keys and values are written at `column` of the slots' own cache, the same column for all
    (one in-place slice update, no scatter). `own_mask` marks the columns that hold each slot's own
    tokens, the new one included; positions went into the keys, so columns may be in any order.

    Returns float32 logits and the cache.
    """
    lanes, width = tokens.shape
    prompt_mask = jnp.arange(cache.prompt_length) < cache.prompt.lengths[:, None]
    own_mask = constrain(own_mask.reshape(lanes * width, -1), ("batch", None))

    def attend(q: Array, k: Array, v: Array, kv: Segment) -> tuple[Array, tuple[Any, Any]]:
        kv = kv.write(k[:, 0], v[:, 0], column)
        out = attention.cached(q[:, 0], kv, prompt_mask, own_mask, config.attention)
        return out[:, None], (kv.keys, kv.values)

    hidden, (keys, values) = _run(
        params,
        config,
        tokens.reshape(-1, 1),
        positions.reshape(-1, 1),
        attend,
        cache.segments(),
        _ONE_TOKEN,
    )
    scores = constrain(logits(params, config, hidden[:, 0]), ("batch", "vocab"))
    return scores.reshape(lanes, width, -1), dataclasses.replace(cache, keys=keys, values=values)


def logits(
    params: Params, config: ModelConfig, hidden: Float[Array, "*N D"]
) -> Float[Array, "*N V"]:
    """Float32 scores over the vocabulary. Only for one position per row, as in decoding:
    `scoring` has the blocked form that never holds [B, T, V]."""
    return by_rows(functools.partial(_scores, params, config), hidden)


def _scores(params: Params, config: ModelConfig, hidden: Float[Array, "*N D"]) -> Array:
    if params.head is None:
        table = params.embedding.astype(config.compute_dtype)
        few = math.prod(hidden.shape[:-1]) <= FEW_ROWS // 4  # scores are turned, and are many
        if isinstance(params.layers, tuple) and (few or hidden.dtype == jnp.float32):
            return weight_first("vd,...d->v...", table, hidden)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
    table = params.head.astype(config.compute_dtype)
    return jnp.einsum("...d,dv->...v", hidden, table, preferred_element_type=jnp.float32)


def vocab_matrix(params: Params, config: ModelConfig) -> Float[Array, "D V"]:
    """The output matrix in the compute dtype, whether tied or not."""
    table = params.embedding.T if params.head is None else params.head
    return table.astype(config.compute_dtype)


def positions_in_segments(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """0, 1, 2, ... from the start of each run of equal segment ids."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    starts = jnp.pad(
        segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]

Names = tuple[str | None, str | None, str | None]
"""How a residual stream [B, T, D] is spread over a mesh."""

_SEQUENCES: Names = ("batch", "length", None)
_ONE_TOKEN: Names = ("step_batch", "length", "width")


def _run(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    attend: Attend,
    per_layer: Any = None,
    stream: Names = _SEQUENCES,
) -> tuple[Float[Array, "B T D"], Any]:
    """Embeds, runs every layer, norms. Scans stacked layers and unrolls a tuple of them."""
    angles = tuple(
        constrain(x, ("batch", "length", None, None)) for x in _rotary_table(positions, config)
    )
    x = constrain(_embed(params, config, tokens), stream)

    def step(x: Array, inputs: tuple[Layer | FusedLayer, Any]) -> tuple[Array, Any]:
        layer, own = inputs
        return _layer(x, layer, config, angles, lambda q, k, v: attend(q, k, v, own), stream)

    if isinstance(params.layers, tuple):
        outputs = []
        for i, layer in enumerate(params.layers):
            x, output = step(x, (layer, None if per_layer is None else per_layer[i]))
            outputs.append(output)
        collected = None if outputs[0] is None else tuple(zip(*outputs, strict=True))
    elif isinstance(per_layer, Segment) and attention.in_place(config.attention):
        x, collected = _scan_in_place(step, x, params.layers, per_layer)
    else:
        if config.remat:
            stored = jax.checkpoint_policies.save_only_these_names(*config.remat_save)
            step = jax.checkpoint(step, policy=stored)
        x, collected = jax.lax.scan(step, x, (params.layers, per_layer))
    return _rms_norm(x, params.final_norm, config), collected


def _scan_in_place(
    step: Callable[[Array, tuple[Any, Segment]], tuple[Array, Any]],
    x: Float[Array, "B T D"],
    layers: Layer,
    cache: Segment,
) -> tuple[Float[Array, "B T D"], Any]:
    """A scan over the layers that carries the slots' cache, of which a step writes one column. As
    inputs and outputs of the scan all of it would be copied, out and back, layer by layer."""

    def body(
        carry: tuple[Array, Any], inputs: tuple[Layer, Array]
    ) -> tuple[tuple[Array, Any], None]:
        x, (keys, values) = carry
        layer, index = inputs
        kv = cache._replace(keys=keys, values=values, layer=index)
        return step(x, (layer, kv)), None

    index = jnp.arange(cache.keys.shape[0])
    return jax.lax.scan(body, (x, (cache.keys, cache.values)), (layers, index))[0]


def _embed(params: Params, config: ModelConfig, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Each device looks tokens up in the part of the table that it has."""
    table = constrain(params.embedding, ("vocab", "width"))
    narrow = isinstance(params.layers, tuple) and table.dtype == jnp.bfloat16
    if narrow:  # decoding on CPU, where XLA would widen all of a bfloat16 table to look one up
        table = jax.lax.bitcast_convert_type(table, jnp.uint16)
    rows = jnp.take(table, constrain(tokens, _ONE_TOKEN[:2]), axis=0)
    if narrow:
        rows = jax.lax.bitcast_convert_type(rows, jnp.bfloat16)
    return constrain(rows, _ONE_TOKEN).astype(_between_products(config))


def _layer(
    x: Float[Array, "B T D"],
    layer: Layer | FusedLayer,
    config: ModelConfig,
    angles: tuple[Array, ...],
    attend: Callable[[Array, Array, Array], tuple[Array, Any]],
    stream: Names,
) -> tuple[Float[Array, "B T D"], Any]:
    layer = _constrain_layer(layer, config)
    dtype = _between_products(config)
    h = _rms_norm(x, layer.attention_norm, config)
    projected = tuple(y.astype(dtype) for y in layer.queries_keys_values(h))
    q, k, v = checkpoint_name(projected, "qkv_proj")
    q = constrain(q, ("batch", "length", "heads", None))
    k, v = (constrain(y, ("batch", "length", "kv_heads", None)) for y in (k, v))
    if config.qk_norm:
        q = _rms_norm(q, layer.query_norm, config)
        k = _rms_norm(k, layer.key_norm, config)
    q, k = (_rotate(y, angles).astype(config.compute_dtype) for y in (q, k))
    attended, output = attend(q, k, v.astype(config.compute_dtype))
    attended = constrain(attended, ("batch", "length", "heads", None))
    x = constrain((x + layer.attention_output(attended)).astype(dtype), stream)
    x = checkpoint_name(x, "out_proj")  # the sum, so that it is not made again either
    h = _rms_norm(x, layer.mlp_norm, config)
    gate, up = (constrain(y.astype(dtype), (*stream[:2], "mlp")) for y in layer.gate_and_up(h))
    gate, up = checkpoint_name(gate, "gate_proj"), checkpoint_name(up, "up_proj")
    gated = (jax.nn.silu(gate) * up).astype(config.compute_dtype)
    return constrain((x + layer.mlp_output(gated)).astype(dtype), stream), output


def _between_products(config: ModelConfig) -> Any:
    """The dtype of the residual stream and of what else is no operand of a product. XLA:CPU
    computes all of that in float32, and there it stays so: rounding it between would cost time and
    digits. On accelerators it costs memory not to."""
    return jnp.float32 if platform() == "cpu" else config.compute_dtype


def _constrain_layer(layer: Layer | FusedLayer, config: ModelConfig) -> Layer | FusedLayer:
    """So that the gradients of a layer are spread, like its weights, as soon as they are made. The
    fused layout has no names: it is for one device."""
    if isinstance(layer, FusedLayer):
        return layer
    axes = logical_axes(config).layers
    return jax.tree.map(lambda x, names: constrain(x, names[1:]), layer, axes)


def _rms_norm(x: Array, scale: Array, config: ModelConfig) -> Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_eps)
    return (wide * scale.astype(jnp.float32)).astype(config.compute_dtype)


def _rotary_table(positions: Int[Array, "B T"], config: ModelConfig) -> tuple[Array, Array]:
    """Cosines and sines [B, T, 1, K/2] in float32."""
    scaling = config.rope_scaling
    _refuse_unscaled_positions(positions.shape[1], config)
    frequency = rotary.frequencies(config.head_dim, config.rope_theta, scaling)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    factor = rotary.attention_factor(scaling)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def _refuse_unscaled_positions(length: int, config: ModelConfig) -> None:
    """Dynamic scaling is known up to `max_positions` only; `decoding.generate` checks its own."""
    dynamic = config.rope_scaling is not None and config.rope_scaling.rope_type == "dynamic"
    if dynamic and length > config.max_positions:
        raise ValueError(
            f"sequences of {length} tokens, but the model has max_positions={config.max_positions} "
            "and its 'dynamic' rotary scaling is not computed beyond; shorten them"
        )


def _rotate(x: Float[Array, "B T H K"], angles: tuple[Array, ...]) -> Float[Array, "B T H K"]:
    """Rotary embedding in the half-split layout of Hugging Face checkpoints, in float32."""
    cos, sin = angles
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
