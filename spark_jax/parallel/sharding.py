"""From the names of an array's axes to its place on a mesh: one table."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str | None, tuple[str, ...] | None] = {
    # of parameters
    "layers": None,  # scanned: every device runs every layer
    "width": ("fsdp",),
    # of parameters and of activations
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    # of activations
    "batch": ("data", "fsdp"),
    "step_batch": ("data",),  # of a decode step, whose width lies as that of the weights
    "rows": MESH_AXES,  # that each device deals with alone
    "length": None,
    None: None,
}
"""Logical axis → mesh axes. An axis that is not on the mesh counts as one device."""

UNEVEN = frozenset({"rows"})
"""Axes that XLA fills up where their mesh axes do not divide them."""

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

    def one(path: Any, array: Any, names: tuple[str | None, ...]) -> NamedSharding:
        place = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, spec(array.shape, names, mesh, place))

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


def constrain(x: Any, names: tuple[str | None, ...]) -> Any:
    """The array, laid over the mesh in scope by the names of its axes, in a jitted program; so is
    its gradient. Where no mesh is in scope, the array itself: no operation is added.

    Raises:
      ValueError: a length that its mesh axes do not divide, with the numbers.
    """
    mesh = mesh_in_scope()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, names, mesh, "activation"))


def mesh_in_scope() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` set, or None if there is none or it is of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def platform() -> str:
    """What programs are compiled for: "cpu", "gpu" or "tpu"; that of the mesh in scope, which need
    not be of this machine's devices, or else of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    return {"TPU": "tpu", "cpu": "cpu"}.get(device.device_kind[:3], "gpu")


def batch_shards() -> int:
    """Over how many devices of the mesh in scope the rows of a batch are spread; 1 without one."""
    return _shards("batch")


def vocab_shards() -> int:
    """The same for the vocabulary."""
    return _shards("vocab")


def _shards(name: str) -> int:
    mesh = mesh_in_scope()
    return 1 if mesh is None else _devices(name, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows, the first axis, over the devices; other axes whole."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def spec(
    shape: tuple[int, ...],
    names: tuple[str | None, ...],
    mesh: Mesh | AbstractMesh,
    place: str,
) -> PartitionSpec:
    """Where the axes of an array lie, by their names. An axis of length 1 is never spread; `place`
    is what an error calls the array.

    Raises:
      ValueError: a length that its mesh axes do not divide, with the numbers.
    """
    return PartitionSpec(
        *(_mesh_axes(place, shape, axis, name, mesh) for axis, name in enumerate(names))
    )


def _mesh_axes(
    place: str, shape: tuple[int, ...], axis: int, name: str | None, mesh: Mesh | AbstractMesh
) -> str | tuple[str, ...] | None:
    devices, length = _devices(name, mesh), shape[axis]
    if devices == 1 or length == 1 or (name in REPLICATED_WHERE_FEWER and length < devices):
        return None
    targets = tuple(target for target in RULES[name] or () if mesh.shape.get(target, 1) > 1)
    if length % devices and name not in UNEVEN:
        divisors = [n for n in range(1, devices + 1) if math.gcd(n, length) == n]
        spread = "*".join(targets)
        raise ValueError(
            f"{place}: axis {axis} ({name}) of shape {shape} is not a multiple of mesh axis "
            f"{spread!r}={devices}; choose {spread} among {divisors}"
        )
    return targets if len(targets) > 1 else targets[0]


def _devices(name: str | None, mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape.get(target, 1) for target in RULES[name] or ())
