"""`prefix_decode_attention` in plain JAX, the reference: it holds the scores of all slots."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Attended = tuple[Float[Array, "S H K"], Float[Array, "S H"]]

MASKED = -1e30  # finite: differences of masked scores are no NaN
FLOOR = -1e29  # where maxima start: above MASKED, so that masked weights are 0 and not exp(0)
EMPTY = 1e-30  # divides the zeros of a slot that sees nothing


def prefix_decode_attention(
    q: Array,
    prompt_keys: Array,
    prompt_values: Array,
    lengths: Array,
    keys: Array,
    values: Array,
    own_mask: Array,
    layer: Array,
) -> Attended:
    prompt_keys, prompt_values, keys, values = (
        jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
        for x in (prompt_keys, prompt_values, keys, values)
    )
    (r, g, d, length), (s, h, _) = prompt_keys.shape, q.shape
    folded = q.reshape(r, s // r, g, h // g, d)
    dot = {"preferred_element_type": jnp.float32}
    # Batch axes first: a lane's queries of one KV head then make one plain matrix product.
    shared = jnp.einsum("rgwqk,rgkl->rgwql", folded.swapaxes(1, 2), prompt_keys, **dot) * d**-0.5
    own = jnp.einsum("sgqk,sgkt->sgqt", folded.reshape(s, g, -1, d), keys, **dot) * d**-0.5
    prompt_mask = jnp.arange(length) < lengths[:, None]
    shared = jnp.where(prompt_mask[:, None, None, None], shared, MASKED)
    shared = shared.swapaxes(1, 2).reshape(s, g, h // g, length)
    own = jnp.where(own_mask[:, None, None], own, MASKED)
    top = jnp.maximum(
        shared.max(axis=-1, keepdims=True, initial=FLOOR),
        own.max(axis=-1, keepdims=True, initial=FLOOR),
    )
    shared, own = jnp.exp(shared - top), jnp.exp(own - top)
    weights = shared.astype(q.dtype).reshape(r, s // r, g, h // g, length)
    out = jnp.einsum("rwgql,rglk->rwgqk", weights, prompt_values, **dot).reshape(s, h, d)
    out += jnp.einsum("sgqt,sgtk->sgqk", own.astype(q.dtype), values, **dot).reshape(s, h, d)
    total = jnp.maximum((shared.sum(-1) + own.sum(-1))[..., None], EMPTY)
    return out / total.reshape(s, h, 1), (top + jnp.log(total)).reshape(s, h)
