"""One optimiser update, whatever the loss: micro-batches, non-finite guard, counters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from spark_jax.parallel.sharding import constrain, mesh_in_scope
from spark_jax.training.state import TrainState

LossFunction = Callable[[Any, Any], tuple[Float[Array, ""], Any]]
"""(params, rows) -> (these rows' share of the loss, arrays with the rows on their first axis).

The shares of all rows of a batch must *add up* to its loss, so normalise by the whole batch
beforehand and hand each row its weights: a mean of means would weigh ragged rows wrongly.
"""


def apply_update(
    state: TrainState,
    batch: Any,
    loss_function: LossFunction,
    optimizer: optax.GradientTransformation,
    accumulation_steps: int = 1,
) -> tuple[TrainState, Any, dict[str, Float[Array, ""]]]:
    """One update of the parameters from a pytree of arrays with B rows on their first axis.

    Where the loss or the gradient's global norm is not finite, parameters and optimiser state stay
    as they are, bit for bit, and `skipped` counts it; `step` advances either way.

    Returns:
      the new state; the loss function's arrays for all B rows, in their order; and the metrics
      `loss` (nats), `grad_norm` (before clipping) and `update_skipped` (0 or 1).

    Raises:
      ValueError: B is not a multiple of `accumulation_steps`, or of the mesh in scope.
    """
    loss, grads, per_row = accumulate_gradients(
        loss_function, state.params, batch, accumulation_steps
    )
    grad_norm = _global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    def keep_if_finite(new: Array, old: Array) -> Array:
        return jnp.where(finite, new, old)

    new_state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=jax.tree.map(keep_if_finite, params, state.params),
        opt_state=jax.tree.map(keep_if_finite, opt_state, state.opt_state),
        skipped=state.skipped + (~finite).astype(state.skipped.dtype),
    )
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "update_skipped": (~finite).astype(jnp.float32),
    }
    return new_state, per_row, metrics


def accumulate_gradients(
    loss_function: LossFunction, params: Any, batch: Any, accumulation_steps: int = 1
) -> tuple[Float[Array, ""], Any, Any]:
    """Loss, gradient and per-row arrays of a batch of B rows, `B / accumulation_steps` at a time.

    Gradients are summed in float32 and returned in the parameters' dtype. With a mesh in scope the
    rows of each micro-batch are spread over it.

    Raises:
      ValueError: rows that `accumulation_steps` or the mesh do not divide, with the numbers.
    """
    value_and_grad = jax.value_and_grad(loss_function, has_aux=True)
    rows = jax.tree.leaves(batch)[0].shape[0]
    if accumulation_steps < 1 or rows % accumulation_steps:
        raise ValueError(
            f"accumulation_steps={accumulation_steps} does not divide the batch of {rows} rows; "
            "choose a divisor"
        )
    if accumulation_steps == 1:
        (loss, per_row), grads = value_and_grad(params, _spread_rows(batch, rows))
        return loss, grads, per_row

    def add(total: tuple[Array, Any], micro_batch: Any) -> tuple[tuple[Array, Any], Any]:
        rows_at_once = _spread_rows(micro_batch, rows // accumulation_steps)
        (loss, per_row), grads = value_and_grad(params, rows_at_once)
        if mesh_in_scope() is not None:
            # XLA:TPU would sum over devices after the last micro-batch instead of at each, and ends
            # with an internal error where that sum is widened before it is added (libtpu 0.0.42).
            grads = jax.lax.optimization_barrier(grads)
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, (loss, grads)), per_row

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    micro_batches = jax.tree.map(lambda x: _split_rows(x, accumulation_steps), batch)
    (loss, grads), per_row = jax.lax.scan(add, (jnp.zeros(()), zeros), micro_batches)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    return loss, grads, jax.tree.map(_join_rows, per_row)


def in_micro_batches(function: Callable[[Any], Any], batch: Any, steps: int) -> Any:
    """`function(rows)`, arrays with the rows on their first axis, for all B rows of a batch,
    `B / steps` at a time; with a mesh in scope these are spread over it.

    Raises:
      ValueError: rows that `steps` or the mesh do not divide, with the numbers.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if steps < 1 or rows % steps:
        raise ValueError(f"steps={steps} does not divide the batch of {rows} rows")
    if steps == 1:
        return function(_spread_rows(batch, rows))
    micro_batches = jax.tree.map(lambda x: _split_rows(x, steps), batch)
    scored = jax.lax.map(lambda x: function(_spread_rows(x, rows // steps)), micro_batches)
    return jax.tree.map(_join_rows, scored)


def _global_norm(tree: Any) -> Float[Array, ""]:
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def _spread_rows(batch: Any, rows: int) -> Any:
    """The arrays of so many rows, laid over the mesh in scope by row."""

    def spread(x: Array) -> Array:
        if jnp.ndim(x) == 0 or len(x) != rows:
            return x
        return constrain(x, ("batch", *[None] * (x.ndim - 1)))

    return jax.tree.map(spread, batch)


def _split_rows(x: Array, steps: int) -> Array:
    """[B, ...] -> [steps, B / steps, ...]. Micro-batch i takes rows i, i + steps, ...: where rows
    are sharded over devices, every device keeps a share of every micro-batch."""
    return x.reshape(x.shape[0] // steps, steps, *x.shape[1:]).swapaxes(0, 1)


def _join_rows(x: Array) -> Array:
    """The inverse of `_split_rows`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
