"""Parameters that are filled on their devices, block by block: the host holds a block at a time."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from spark_jax.models.hf_layout import Index, Leaf

BLOCK_SIZE = 4 * 2**20
"""Numbers on the host at a time: 16 MiB in float32."""


class Target:
    """One parameter, zero until `put`. A process reads what its own devices hold and no more.

    Every device has an equal part and gets its block of it at the same place, so one program serves
    them all, and it has no collectives.
    """

    def __init__(self, shape: jax.ShapeDtypeStruct, sharding: NamedSharding | None) -> None:
        """Without a sharding, the parameter lies whole on the default device."""
        self.array = jnp.zeros(shape.shape, shape.dtype, device=sharding)
        self._sharding = sharding
        self._indices = _indices(shape.shape, sharding)

    def put(self, data: Any, leaf: Leaf, layer: int | None) -> None:
        """Copies a checkpoint's tensor (see `Leaf.blocks`) to its place, cast on the devices."""
        outer = () if layer is None else (layer,)
        parts = list(dict.fromkeys(self._indices.values()))
        size = BLOCK_SIZE // len(parts)
        readers = [leaf.blocks(data, index[len(outer) :], size) for index in parts]
        for blocks in zip(*readers, strict=True):
            start = outer + blocks[0][0]
            by_part = {
                index: block[(None,) * len(outer)]
                for index, (_, block) in zip(parts, blocks, strict=True)
            }
            # Waits, lest blocks pile up on the host.
            self.array = jax.block_until_ready(self._updated(by_part, start))

    def _updated(self, by_part: dict[Index, Any], start: tuple[int, ...]) -> Array:
        if self._sharding is None:
            return _update(self.array, jnp.asarray(next(iter(by_part.values()))), start)
        local = [jax.device_put(by_part[index], device) for device, index in self._indices.items()]
        part = self._sharding.shard_shape(self.array.shape)
        whole = [
            n * total // own
            for n, total, own in zip(local[0].shape, self.array.shape, part, strict=True)
        ]
        block = jax.make_array_from_single_device_arrays(tuple(whole), self._sharding, local)
        return _update_parts(self.array, block, start, self._sharding)


def _indices(shape: tuple[int, ...], sharding: NamedSharding | None) -> dict[Any, Index]:
    """Which part each device of this process holds; None stands for the default device."""
    if sharding is None:
        return {None: tuple((0, n) for n in shape)}
    return {
        device: tuple(part.indices(n)[:2] for part, n in zip(index or (), shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }


@functools.partial(jax.jit, donate_argnums=0)
def _update(
    array: Float[Array, "..."], block: Float[Array, "..."], start: tuple[Any, ...]
) -> Float[Array, "..."]:
    return jax.lax.dynamic_update_slice(array, block.astype(array.dtype), start)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _update_parts(
    array: Float[Array, "..."],
    block: Float[Array, "..."],
    start: tuple[Any, ...],
    sharding: NamedSharding,
) -> Float[Array, "..."]:
    """Each device writes its part of the block into its part of the array, at `start` of it."""
    spec = sharding.spec
    update = jax.shard_map(
        _update, mesh=sharding.mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec
    )
    return update(array, block, start)
