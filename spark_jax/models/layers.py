"""The weights of a layer and the products with them, in the two layouts that layers come in.

`Layer` is what is trained and saved, alone or stacked; `FusedLayer` what decoding on CPU wants.
Every product has operands in the compute dtype and comes in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spark_jax.models.dot import dot

QueriesKeysValues = tuple[
    Float[Array, "B T H K"], Float[Array, "B T H_kv K"], Float[Array, "B T H_kv K"]
]


@flax.struct.dataclass
class Layer:
    """Weights of one layer, or of all layers with a leading layer axis.

    Leaves are `Any` because the same pytree also carries gradients, moments, shardings and shapes.
    """

    attention_norm: Any  # [D]
    query: Any  # [D, H, K]
    key: Any  # [D, H_kv, K]
    value: Any  # [D, H_kv, K]
    output: Any  # [H, K, D]
    mlp_norm: Any  # [D]
    gate: Any  # [D, F]
    up: Any  # [D, F]
    down: Any  # [F, D]
    query_bias: Any = None  # [H, K]
    key_bias: Any = None  # [H_kv, K]
    value_bias: Any = None  # [H_kv, K]
    output_bias: Any = None  # [D]
    query_norm: Any = None  # [K]
    key_norm: Any = None  # [K]

    def queries_keys_values(self, h: Float[Array, "B T D"]) -> QueriesKeysValues:
        """What begins attention."""
        q = _plus(_dot("btd,dhk->bthk", h, self.query), self.query_bias)
        k = _plus(_dot("btd,dhk->bthk", h, self.key), self.key_bias)
        v = _plus(_dot("btd,dhk->bthk", h, self.value), self.value_bias)
        return q, k, v

    def attention_output(self, attended: Float[Array, "B T H K"]) -> Float[Array, "B T D"]:
        """What ends attention."""
        return _plus(_dot("bthk,hkd->btd", attended, self.output), self.output_bias)

    def gate_and_up(
        self, h: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"]]:
        """What begins the MLP."""
        return _dot("btd,df->btf", h, self.gate), _dot("btd,df->btf", h, self.up)

    def mlp_output(self, gated: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
        """What ends the MLP."""
        return _dot("btf,fd->btd", gated, self.down)


@flax.struct.dataclass
class FusedLayer:
    """One layer as decoding on CPU wants it: fewer and wider matrix products, of matrices whose
    last axis is the one that is summed over. The methods are those of `Layer`."""

    attention_norm: Any  # [D]
    query_key_value: Any  # [(H + 2 H_kv) K, D]
    output: Any  # [D, H K]
    mlp_norm: Any  # [D]
    gate_up: Any  # [2 F, D]
    down: Any  # [D, F]
    query_key_value_bias: Any = None  # [H + 2 H_kv, K]
    output_bias: Any = None  # [D]
    query_norm: Any = None  # [K]
    key_norm: Any = None  # [K]
    num_kv_heads: int = flax.struct.field(kw_only=True, pytree_node=False)
    head_dim: int = flax.struct.field(kw_only=True, pytree_node=False)

    def queries_keys_values(self, h: Float[Array, "B T D"]) -> QueriesKeysValues:
        out = _turned_dot(h, self.query_key_value).reshape(*h.shape[:2], -1, self.head_dim)
        out = _plus(out, self.query_key_value_bias)
        num_heads = out.shape[2] - 2 * self.num_kv_heads
        q, k, v = jnp.split(out, (num_heads, num_heads + self.num_kv_heads), axis=2)
        return q, k, v

    def attention_output(self, attended: Float[Array, "B T H K"]) -> Float[Array, "B T D"]:
        flat = attended.reshape(*attended.shape[:2], -1)
        return _plus(_turned_dot(flat, self.output), self.output_bias)

    def gate_and_up(
        self, h: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"]]:
        gate, up = jnp.split(_turned_dot(h, self.gate_up), 2, axis=-1)
        return gate, up

    def mlp_output(self, gated: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
        return _turned_dot(gated, self.down)


def fuse(layer: Layer) -> FusedLayer:
    """The same weights, joined and turned; of one layer."""
    width, num_kv_heads, head_dim = layer.key.shape
    weights = jnp.concatenate([layer.query, layer.key, layer.value], axis=1)
    biases = (layer.query_bias, layer.key_bias, layer.value_bias)
    return FusedLayer(
        attention_norm=layer.attention_norm,
        query_key_value=weights.reshape(width, -1).T,
        output=layer.output.reshape(-1, width).T,
        mlp_norm=layer.mlp_norm,
        gate_up=jnp.concatenate([layer.gate.T, layer.up.T]),
        down=layer.down.T,
        query_key_value_bias=None if layer.query_bias is None else jnp.concatenate(biases),
        output_bias=layer.output_bias,
        query_norm=layer.query_norm,
        key_norm=layer.key_norm,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )


def weight_first(
    equation: str, weight: Float[Array, "N D"], x: Float[Array, "*M D"]
) -> Float[Array, "*M N"]:
    """A product that XLA:CPU has done sooner with the weight as its first operand, if that lies
    with its sums along the last axis: 16 rows times a layer's weights take .5 to .95 of the time in
    float32, .3 to .75 in bfloat16. The barrier keeps it from turning the product round."""
    out = jnp.einsum(equation, weight, x, preferred_element_type=jnp.float32)
    return jnp.moveaxis(jax.lax.optimization_barrier(out), 0, -1)


def by_rows(product: Callable[[Array], Array], x: Array) -> Array:
    """product(x), whose rows are those of x. XLA:CPU takes ten times as long for one bfloat16 row
    as for two, so it is computed twice; the barrier keeps XLA from seeing that."""
    row_axes = max(min(x.ndim - 1, 2), 1)  # heads count as columns
    if x.dtype != jnp.bfloat16 or x.shape[:row_axes] != (1,) * row_axes:
        return product(x)
    return jax.lax.optimization_barrier(product(jnp.concatenate([x, x])))[:1]


FEW_ROWS = 64  # up to which a product begun with the weight is the faster one on CPU


def _turned_dot(x: Float[Array, "B T D"], weight: Float[Array, "N D"]) -> Float[Array, "B T N"]:
    """x · weightᵀ in float32: of few rows XLA:CPU makes it sooner from the weight's side."""

    def product(x: Array) -> Array:
        if x.shape[0] * x.shape[1] <= FEW_ROWS:
            return weight_first("nd,btd->nbt", weight, x)
        # Tied to x, lest XLA turn it round before the loop that this is in, and keep it so.
        return dot("btd,nd->btn", *jax.lax.optimization_barrier((x, weight)))

    return by_rows(product, x)


def _dot(equation: str, x: Array, weight: Array) -> Array:
    return by_rows(lambda x: dot(equation, x, weight), x)


def _plus(out: Array, bias: Array | None) -> Array:
    return out if bias is None else out + bias.astype(jnp.float32)
