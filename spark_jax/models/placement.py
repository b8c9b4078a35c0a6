"""Parameters that are filled on their devices, block by block: the host holds a block at a time."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from spark_jax.models.hf_layout import Index, Leaf

BLOCK_SIZE = 4 * 2**20
"""Numbers in a block: 16 MiB in float32."""


class Target:
    """One parameter on this process's devices, zero until `put`.

    Each device's part is an array of its own until `array` joins them, so nothing here is a
    collective: processes need not agree on an order.
    """

    def __init__(self, shape: jax.ShapeDtypeStruct, sharding: NamedSharding | None) -> None:
        """Without a sharding, the parameter lies whole on the default device."""
        self._shape, self._sharding = shape.shape, sharding
        self._parts: dict[Any, tuple[Index, Any]] = {}
        for device, index in _indices(shape.shape, sharding).items():
            part = tuple(stop - start for start, stop in index)
            self._parts[device] = index, jnp.zeros(part, shape.dtype, device=device)

    def put(self, data: Any, leaf: Leaf, layer: int | None) -> None:
        """Copies a checkpoint's tensor (see `Leaf.blocks`) to its place, cast on the device."""
        outer = () if layer is None else (layer,)
        for index in {index: None for index, _ in self._parts.values()}:
            for start, block in leaf.blocks(data, index[len(outer) :], BLOCK_SIZE):
                self._write(index, block[(None,) * len(outer)], outer + start)

    def array(self) -> Array:
        parts = [part for _, part in self._parts.values()]
        if self._sharding is None:
            return parts[0]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, parts)

    def _write(self, index: Index, block: np.ndarray, start: tuple[int, ...]) -> None:
        """To every device that holds this part. Waits, lest blocks pile up on the host."""
        holders = [device for device, (held, _) in self._parts.items() if held == index]
        for device in holders:
            part = _update(self._parts[device][1], jax.device_put(block, device), start)
            self._parts[device] = index, jax.block_until_ready(part)


def _indices(shape: tuple[int, ...], sharding: NamedSharding | None) -> dict[Any, Index]:
    """What each device of this process holds; the device is None where it does not matter."""
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
