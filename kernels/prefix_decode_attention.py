"""Attention of decoding: one query per slot, against its lane's shared prompt and its own tokens.

The reference ("xla") holds the scores of all slots; "pallas_tpu" and "pallas_gpu" stream keys and
values once and hold none (docs/performance.md says what that saves on TPU; on a GPU it has not been
measured). All read the decoder's cache as it lies (`models.cache`): that of all layers, of which
they take one.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spark_jax.kernels import prefix_decode_attention_xla
from spark_jax.kernels.prefix_decode_attention_xla import Attended


def prefix_decode_attention(
    q: Float[Array, "S H K"],
    prompt_keys: Float[Array, "N R G K L"],
    prompt_values: Float[Array, "N R G L K"],
    lengths: Int[Array, " R"],
    keys: Float[Array, "N S G K T"],
    values: Float[Array, "N S G T K"],
    own_mask: Bool[Array, "S T"],
    layer: Int[Array, ""] | int = 0,
    *,
    implementation: str = "xla",
) -> Attended:
    """Softmax attention of S slots, S / R neighbours in each of R lanes, in one of N layers; G KV
    heads serve H / G query heads each.

    A slot sees the first `lengths` tokens of its lane's prompt and the columns of its own cache
    that `own_mask` marks, in any order.

    Returns, both in float32, the attended values, 0 where a slot sees nothing, and the log-sum-exp
    of the scaled scores in nats, by which further parts can be joined (about -1e29 where a slot
    sees nothing).

    Raises:
      ValueError: an unknown implementation, heads that KV heads do not divide, or slots that lanes
        do not.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}; choose from {list(IMPLEMENTATIONS)}")
    slots, lanes = len(q), prompt_keys.shape[1]
    if q.shape[1] % keys.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {keys.shape[2]} KV heads evenly")
    if slots % lanes:
        raise ValueError(f"{slots} slots cannot be spread over {lanes} lanes evenly")
    return IMPLEMENTATIONS[implementation](
        q, prompt_keys, prompt_values, lengths, keys, values, own_mask, jnp.asarray(layer)
    )


def _pallas_tpu(*arguments: Array) -> Attended:
    from spark_jax.kernels import prefix_decode_attention_tpu

    return prefix_decode_attention_tpu.prefix_decode_attention(*arguments)


def _pallas_gpu(*arguments: Array) -> Attended:
    from spark_jax.kernels import prefix_decode_attention_gpu

    return prefix_decode_attention_gpu.prefix_decode_attention(*arguments)


IMPLEMENTATIONS: dict[str, Callable[..., Attended]] = {
    "xla": prefix_decode_attention_xla.prefix_decode_attention,
    "pallas_tpu": _pallas_tpu,
    "pallas_gpu": _pallas_gpu,
}
