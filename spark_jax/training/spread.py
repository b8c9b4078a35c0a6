"""State and batches on the mesh in scope (`jax.set_mesh`); without one, as they always were."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from spark_jax.models.config import ModelConfig
from spark_jax.parallel import sharding
from spark_jax.training import state


def mesh() -> Mesh | None:
    """The mesh in scope, with its devices. Not to be called in a jitted program."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def new_state(
    params: Any, optimizer: optax.GradientTransformation, key: Array, config: ModelConfig
) -> state.TrainState:
    """`state.create`, spread over the mesh. The state takes over the memory of `params`."""
    if (where := mesh()) is None:
        return state.create(params, optimizer, key)

    def create(params: Any, key: Array) -> state.TrainState:
        return state.create(params, optimizer, key)

    shardings = state.state_shardings(jax.eval_shape(create, params, key), config, where)
    return jax.jit(create, out_shardings=shardings, donate_argnums=0)(params, key)


def kept_in_place(step: Any, config: ModelConfig) -> Any:
    """A train step `(state, batch) -> (state, metrics)`, to be jitted, whose new state lies on the
    mesh as the old one does."""
    if (where := mesh()) is None:
        return step

    @functools.wraps(step)
    def placed(train: state.TrainState, batch: Any) -> Any:
        new, metrics = step(train, batch)
        shardings = state.state_shardings(new, config, where)
        return jax.lax.with_sharding_constraint(new, shardings), metrics

    return placed


def rows(batch: Any) -> Any:
    """A batch of arrays that are the same on every process, its rows spread over the mesh."""
    if (where := mesh()) is None:
        return jax.device_put(batch)  # unlike jnp.asarray, compiles nothing

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        to = sharding.batch_sharding(where) if x.ndim else sharding.replicated(where)
        return jax.make_array_from_callback(x.shape, to, lambda index: x[index])

    return jax.tree.map(place, batch)
