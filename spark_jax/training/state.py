"""What a run carries from one update to the next: one pytree that goes in and comes out."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array


@flax.struct.dataclass
class TrainState:
    """Parameters, optimiser state and counters: what a resumed run needs but its data position.

    Leaves are `Any` because the same pytree also carries shapes, shardings and restored arrays.
    """

    step: Any  # int32 scalar: updates tried so far, the skipped ones included
    params: Any
    opt_state: Any
    skipped: Any  # int32 scalar: updates left out because loss or gradient was not finite
    key: Any  # the run's PRNG key, typed or raw uint32; it never changes: see `step_key`


def create(params: Any, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    """The state before the first update.

    `params` is held, not copied. A step jitted with `donate_argnums=0` frees it: copy what must
    outlive the first update (a reference policy) with `jax.tree.map(jnp.copy, params)`.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        skipped=jnp.zeros((), jnp.int32),
        key=key,
    )


def step_key(state: TrainState) -> Array:
    """The key of the coming update: a function of the run's key and the step alone, so that a
    resumed run draws what the uninterrupted one would have drawn."""
    return jax.random.fold_in(state.key, state.step)
