"""What a run carries from one update to the next: one pytree that goes in and comes out."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from spark_jax.models import transformer
from spark_jax.models.config import ModelConfig
from spark_jax.parallel.sharding import named_shardings, replicated


@flax.struct.dataclass
class TrainState:
    """Parameters, optimiser state and counters: what a resumed run needs but its data position.

    Leaves are `Any` because the same pytree also carries shapes, shardings and restored arrays.
    """

    step: Any  # int32 scalar: updates tried so far, the skipped ones included
    params: Any
    opt_state: Any
    skipped: Any  # int32 scalar: updates left out because loss or gradient was not finite
    key: Any  # the run's PRNG key, typed or raw uint32; never changes; fold `step` in to draw


def create(params: Any, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    """The state before the first update.

    `params` is held, not copied. A step jitted with `donate_argnums=0` frees it: `copy` what must
    outlive the first update (a reference policy).
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        skipped=jnp.zeros((), jnp.int32),
        key=key,
    )


@jax.jit
def copy(params: Any) -> Any:
    """The same arrays in memory of their own, by one program for all of them."""
    return jax.tree.map(jnp.copy, params)


def state_shardings(state_shape: TrainState, config: ModelConfig, mesh: Mesh) -> TrainState:
    """Where every array of a state lies on a mesh, as a state of `NamedSharding`s.

    Parameters by their logical axes; what the optimiser keeps for each parameter in its shape lies
    where the parameter does; all else, counters and keys, on every device.

    Args:
      state_shape: a state, or its shapes and dtypes (`jax.eval_shape`).

    Raises:
      ValueError: a parameter that the mesh does not divide, with the numbers.
    """
    params = state_shape.params
    shardings = named_shardings(transformer.logical_axes(config), params, mesh)
    structure: Any = jax.tree.structure(params)
    everywhere = replicated(mesh)

    def like_params(x: Any) -> bool:
        return bool(structure == jax.tree.structure(x))

    def place(node: Any) -> Any:
        if not like_params(node):
            return everywhere
        return jax.tree.map(
            lambda x, param, where: where if x.shape == param.shape else everywhere,
            node,
            params,
            shardings,
        )

    return TrainState(
        step=everywhere,
        params=shardings,
        opt_state=jax.tree.map(place, state_shape.opt_state, is_leaf=like_params),
        skipped=everywhere,
        key=everywhere,
    )
