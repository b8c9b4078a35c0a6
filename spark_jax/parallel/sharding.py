"""From the names of an array's axes to its place on a mesh: one table."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str | None, str | None] = {
    "layers": None,  # scanned: every device runs every layer
    "vocab": "tensor",
    "width": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    None: None,
}
"""Logical axis → mesh axis. An axis that is not on the mesh counts as one device."""

REPLICATED_WHERE_FEWER = frozenset({"kv_heads"})
"""Axes that every device holds whole where they are shorter than their mesh axis: the one KV head
that a group of query heads reads is on each device that computes one of them."""


def named_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for every array of a pytree.

    Args:
      axes: logical axes, a tuple in each array's place (`transformer.logical_axes`).
      shapes: the arrays, or their shapes and dtypes (`transformer.shapes`).
      mesh: its axes are among `MESH_AXES`.

    Raises:
      ValueError: an unknown mesh axis, or a length that its mesh axis does not divide, with both
        numbers.
    """
    unknown = [name for name in mesh.axis_names if name not in MESH_AXES]
    if unknown:
        raise ValueError(f"mesh axes {unknown} are unknown; name them among {list(MESH_AXES)}")
    return jax.tree_util.tree_map_with_path(
        lambda path, array, names: NamedSharding(mesh, _spec(path, array.shape, names, mesh)),
        shapes,
        axes,
    )


def _spec(
    path: Any, shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Mesh
) -> PartitionSpec:
    return PartitionSpec(
        *(_mesh_axis(path, shape, axis, name, mesh) for axis, name in enumerate(names))
    )


def _mesh_axis(
    path: Any, shape: tuple[int, ...], axis: int, name: str | None, mesh: Mesh
) -> str | None:
    target = RULES[name]
    devices = mesh.shape.get(target, 1)
    if devices == 1 or (name in REPLICATED_WHERE_FEWER and shape[axis] < devices):
        return None
    if shape[axis] % devices:
        divisors = [n for n in range(1, devices + 1) if math.gcd(n, shape[axis]) == n]
        raise ValueError(
            f"{jax.tree_util.keystr(path, simple=True, separator='.')}: axis {axis} ({name}) of "
            f"shape {shape} is not a multiple of mesh axis {target!r}={devices}; "
            f"choose {target} among {divisors}"
        )
    return target
