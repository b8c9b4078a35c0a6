"""Attention of decoding: one query per sample, against its lane's shared prompt and its own tokens.

The reference ("xla") holds the scores of all samples; "pallas_tpu" streams keys and values through
VMEM once and holds none (docs/performance.md says where that pays).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Attended = tuple[Float[Array, "R W H K"], Float[Array, "R W H"]]

MASKED = -1e30  # finite: differences of masked scores are no NaN
FLOOR = -1e29  # where maxima start: above MASKED, so that masked weights are 0 and not exp(0)
_EMPTY = 1e-30  # divides the zeros of a slot that sees nothing


def prefix_decode_attention(
    q: Float[Array, "R W H K"],
    prompt_keys: Float[Array, "R G L K"],
    prompt_values: Float[Array, "R G L K"],
    lengths: Int[Array, " R"],
    keys: Float[Array, "R W G T K"],
    values: Float[Array, "R W G T K"],
    own_mask: Bool[Array, "R W T"],
    *,
    implementation: str | None = None,
) -> Attended:
    """Softmax attention of W slots in each of R lanes; G KV heads serve H / G query heads each.

    A slot sees the first `lengths` tokens of its lane's prompt and the columns of its own cache
    that `own_mask` marks, in any order.

    Returns the attended values in q's dtype, 0 where a slot sees nothing, and the float32
    log-sum-exp of the scaled scores in nats, by which further parts can be joined (about -1e29
    where a slot sees nothing).

    Raises:
      ValueError: an unknown implementation, or heads that KV heads do not divide.
    """
    if implementation is None:
        one_tpu = jax.default_backend() == "tpu" and jax.device_count() == 1
        implementation = "pallas_tpu" if one_tpu else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}; choose from {list(IMPLEMENTATIONS)}")
    if q.shape[2] % keys.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {keys.shape[2]} KV heads evenly")
    return IMPLEMENTATIONS[implementation](
        q, prompt_keys, prompt_values, lengths, keys, values, own_mask
    )


def _xla(
    q: Array,
    prompt_keys: Array,
    prompt_values: Array,
    lengths: Array,
    keys: Array,
    values: Array,
    own_mask: Array,
) -> Attended:
    r, w, h, d = q.shape
    # Batch axes first: the lane's W · Q queries of one KV head then make one plain matrix product.
    folded = q.reshape(r, w, keys.shape[2], -1, d).swapaxes(1, 2)
    dot = {"preferred_element_type": jnp.float32}
    shared = jnp.einsum("rgwqk,rglk->rgwql", folded, prompt_keys, **dot) * d**-0.5
    own = jnp.einsum("rgwqk,rwgtk->rgwqt", folded, keys, **dot) * d**-0.5
    prompt_mask = jnp.arange(prompt_keys.shape[2]) < lengths[:, None]
    shared = jnp.where(prompt_mask[:, None, None, None], shared, MASKED)
    own = jnp.where(own_mask[:, None, :, None], own, MASKED)
    top = jnp.maximum(
        shared.max(axis=-1, keepdims=True, initial=FLOOR),
        own.max(axis=-1, keepdims=True, initial=FLOOR),
    )
    shared, own = jnp.exp(shared - top), jnp.exp(own - top)
    out = jnp.einsum("rgwql,rglk->rgwqk", shared.astype(q.dtype), prompt_values, **dot)
    out += jnp.einsum("rgwqt,rwgtk->rgwqk", own.astype(q.dtype), values, **dot)
    total = jnp.maximum((shared.sum(-1) + own.sum(-1))[..., None], _EMPTY)
    logsumexp = (top + jnp.log(total)).swapaxes(1, 2).reshape(r, w, h)
    return (out / total).swapaxes(1, 2).reshape(r, w, h, d).astype(q.dtype), logsumexp


def _pallas_tpu(*arguments: Array) -> Attended:
    from spark_jax.kernels import prefix_decode_attention_tpu

    return prefix_decode_attention_tpu.prefix_decode_attention(*arguments)


IMPLEMENTATIONS: dict[str, Callable[..., Attended]] = {"xla": _xla, "pallas_tpu": _pallas_tpu}
