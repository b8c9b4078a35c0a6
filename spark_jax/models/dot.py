"""The matrix product of every layer: operands in the compute dtype, sums in float32, both ways.

Automatic differentiation of a bfloat16 product with float32 sums multiplies the float32 cotangent
by the bfloat16 operand. XLA then widens the operand: on CPU the backward pass runs at the speed of
float32, and a copy of the weights is made. Here the cotangent is rounded to the operands' dtype
first, and the products of the backward pass are of the same kind as that of the forward pass.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spark_jax.parallel.sharding import mesh_in_scope, platform


def dot(equation: str, x: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """einsum(equation, x, weight) in float32, multiplied in x's dtype.

    `weight` may be wider than x, such as the float32 master of a bfloat16 computation: it is
    rounded to x's dtype for the product, and its gradient is the float32 sum, never rounded to
    bfloat16. The gradient of x has x's dtype.

    Args:
      equation: "x,weight->out" without ellipses; every letter stands in two of the three.
    """
    return _product(equation, _over_devices(x.dtype), x, weight)


def activation_dot(
    equation: str, x: Float[Array, "..."], y: Float[Array, "..."]
) -> Float[Array, "..."]:
    """The same of two activations, as in attention, where no device has a part of a sum; letters
    may stand in all three."""
    return _product(equation, jnp.float32, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, dtype: Any, x: Array, y: Array) -> Array:
    """`dtype` is what devices send one another."""
    return _einsum(equation, x, y.astype(x.dtype), dtype).astype(jnp.float32)


def _forward(equation: str, dtype: Any, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(equation, dtype, x, y), (x, y)


def _backward(
    equation: str, dtype: Any, operands: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    x, y = operands
    inputs, out = equation.split("->")
    x_axes, y_axes = inputs.split(",")
    cotangent = cotangent.astype(x.dtype)
    y_gradient = _narrow_first((x_axes, x), (out, cotangent), y_axes)
    x_gradient = _einsum(f"{out},{y_axes}->{x_axes}", cotangent, y.astype(x.dtype), dtype)
    return x_gradient.astype(x.dtype), y_gradient.astype(y.dtype)


_product.defvjp(_forward, _backward)


def _narrow_first(one: tuple[str, Array], other: tuple[str, Array], axes: str) -> Array:
    """A product summed over the rows of both. XLA:CPU transposes its first operand, so that is the
    smaller one, and what comes of it is transposed instead if it has to be. The barrier keeps XLA
    from making one product of the two, of a kind that it has in float32 only."""
    (first, x), (second, y) = (one, other) if one[1].size <= other[1].size else (other, one)
    # As a product comes: the axes of both, then those of the first alone, then of the second.
    order = "".join(sorted(axes, key=lambda a: (a not in first, a not in second)))
    product = _einsum(f"{first},{second}->{order}", x, y, jnp.float32)
    if order == axes:
        return product
    if platform() == "cpu":
        product = jax.lax.optimization_barrier(product)
    return product.transpose([order.index(a) for a in axes])


def _einsum(equation: str, x: Array, y: Array, dtype: Any) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=dtype)


def _over_devices(dtype: Any) -> Any:
    """What the chips of a TPU mesh send one another of products that they add up over its tensor
    axis: what comes of them is rounded to `dtype` anyway, and half the bytes travel. A chip's own
    sums are float32 in any case."""
    mesh = mesh_in_scope()
    several = mesh is not None and mesh.shape.get("tensor", 1) > 1
    return dtype if several and platform() == "tpu" else jnp.float32
