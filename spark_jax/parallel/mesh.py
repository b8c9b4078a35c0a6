"""The mesh of devices that a run spans.

A program finds its mesh in jax's own scope, `with jax.set_mesh(mesh):`; where none is set, it runs
on one device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from spark_jax.parallel.sharding import MESH_AXES


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with all of `MESH_AXES` over the devices (None: every one of every process).

    `axes` says how many devices each axis spans; one may be -1, which is what the others leave, and
    one that is missing spans 1. Neighbours on the last axis, `tensor`, are neighbours in the
    network. Where the devices are several TPU slices, `data` spans the slices, since the network
    between them is the slower one (a hybrid mesh).

    Raises:
      ValueError: an unknown axis, sizes whose product is not the number of devices, or a `data`
        that the number of slices does not divide, with the numbers.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _sizes(axes, len(devices))
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if devices[0].platform == "tpu" and sizes[0] % len(slices):
        raise ValueError(
            f"mesh axis data={sizes[0]} is not a multiple of the {len(slices)} TPU slices that it "
            f"spans; choose a multiple of {len(slices)}"
        )
    if any(getattr(device, "core_on_chip", 0) for device in devices):
        # Only a compiler without a TPU has the two cores of a v4 chip as devices of their own, for
        # which jax knows no mesh; they come slice by slice.
        array = np.array(devices).reshape(sizes)
    elif devices[0].platform != "tpu" or len(slices) == 1:
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        array = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // len(slices), *sizes[1:]),
            (len(slices), 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    return Mesh(np.asarray(array), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _sizes(axes: Mapping[str, int], devices: int) -> tuple[int, ...]:
    asked = dict(axes)
    if unknown := sorted(set(asked) - set(MESH_AXES)):
        raise ValueError(f"mesh axes {unknown} are unknown; name them among {list(MESH_AXES)}")
    if any(size < 1 and size != -1 for size in asked.values()):
        raise ValueError(f"mesh {asked}: an axis spans at least 1 device, or -1: what is left")
    open_axes = [name for name, size in asked.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"mesh {asked}: only one of {open_axes} may be -1, what the others leave")
    known = math.prod(size for size in asked.values() if size != -1)
    if devices % known if open_axes else devices != known:
        raise ValueError(
            f"mesh {asked} spans {'a multiple of ' * bool(open_axes)}{known} devices, but there "
            f"are {devices}; choose sizes whose product is {devices}"
        )
    asked |= dict.fromkeys(open_axes, devices // known)
    return tuple(asked.get(name, 1) for name in MESH_AXES)
