"""The layers' matrix product: the plain einsum in float32, and narrow both ways in bfloat16."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from spark_jax import scoring
from spark_jax.models import transformer
from spark_jax.models.config import ModelConfig
from spark_jax.models.dot import dot

SIZES = {"b": 2, "t": 3, "d": 4, "f": 5, "h": 2, "k": 6, "g": 2, "q": 3, "s": 7}
EQUATIONS = [
    "btd,dhk->bthk",
    "bthk,hkd->btd",
    "btd,df->btf",
    "btf,fd->btd",
    "btgqk,bsgk->bgqts",
    "bgqts,bsgk->bgqtk",
]
CONFIG = ModelConfig(
    vocab_size=50, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=96
)


def operands(equation, seed=0):
    rng = np.random.default_rng(seed)
    *inputs, out = equation.replace("->", ",").split(",")
    shapes = [tuple(SIZES[axis] for axis in axes) for axes in (*inputs, out)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def plain(equation, x, weight):
    weight = weight.astype(x.dtype)
    return jnp.einsum(equation, x, weight, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradients(product, equation, x, weight, cotangent):
    out, pull = jax.vjp(functools.partial(product, equation), x, weight)
    return out, pull(cotangent)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_float32_is_einsum_and_its_gradient(equation):
    x, weight, cotangent = operands(equation)
    got, gradients = with_gradients(dot, equation, x, weight, cotangent)
    expected, plain_gradients = with_gradients(plain, equation, x, weight, cotangent)
    np.testing.assert_array_equal(got, expected)
    for a, b in zip(gradients, plain_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_bfloat16_rounds_operands_and_nothing_else(equation):
    """Against float64 products of the rounded operands; only x's gradient is rounded after."""
    x, weight, cotangent = operands(equation)
    narrow = x.astype(jnp.bfloat16)
    cotangent = cotangent.astype(jnp.bfloat16).astype(jnp.float32)
    got, (dx, dw) = with_gradients(dot, equation, narrow, weight, cotangent)
    assert (got.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    inputs, out = equation.split("->")
    a, b = inputs.split(",")
    wide = [np.asarray(y.astype(jnp.bfloat16), np.float64) for y in (x, weight, cotangent)]
    np.testing.assert_allclose(got, np.einsum(equation, *wide[:2]), rtol=1e-5, atol=1e-5)
    expected = np.einsum(f"{a},{out}->{b}", wide[0], wide[2])
    np.testing.assert_allclose(dw, expected, rtol=1e-5, atol=1e-5)
    expected = np.einsum(f"{out},{b}->{a}", wide[2], wide[1])
    np.testing.assert_allclose(np.asarray(dx, np.float64), expected, rtol=2**-8, atol=1e-5)


def test_weight_gradients_are_summed_in_float32():
    """1001 ones add up to 256 in bfloat16, and 1001 is not one of its numbers either."""
    x, weight = jnp.ones((1, 1001, 1), jnp.bfloat16), jnp.ones((1, 1))
    gradient = jax.jit(jax.grad(lambda w: dot("btd,df->btf", x, w).sum()))(weight)
    assert float(gradient[0, 0]) == 1001


def products(jaxpr):
    """The operand and result dtypes of every matrix product, inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(v.aval.dtype.name for v in (*equation.invars, *equation.outvars))
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_no_product_of_the_backward_pass_is_wide(equation):
    x, weight, _ = operands(equation)

    def loss(x, weight):
        return jnp.sum(dot(equation, x, weight).astype(jnp.bfloat16).astype(jnp.float32) ** 2)

    traced = jax.make_jaxpr(jax.grad(loss, (0, 1)))(x.astype(jnp.bfloat16), weight)
    assert list(products(traced.jaxpr)) == [("bfloat16", "bfloat16", "float32")] * 3


init = jax.jit(transformer.init, static_argnums=0)


@functools.cache
def model_loss(config):
    tokens = jax.random.randint(jax.random.key(1), (4, 24), 0, config.vocab_size)
    return jax.jit(
        jax.value_and_grad(lambda p: -jnp.mean(scoring.token_logprobs(p, config, tokens)))
    )


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


@pytest.mark.slow
def test_bfloat16_gradients_point_where_float32s_do():
    params = init(CONFIG, jax.random.key(0))
    narrow = dataclasses.replace(CONFIG, dtype="bfloat16")
    (loss, wide), (narrow_loss, got) = model_loss(CONFIG)(params), model_loss(narrow)(params)
    assert abs(float(loss - narrow_loss)) < 0.01
    assert {x.dtype.name for x in jax.tree.leaves(got)} == {"float32"}
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(got), strict=True):
        a, b = flat(a), flat(b)
        assert a @ b > 0.999 * np.linalg.norm(a) * np.linalg.norm(b)


def test_bfloat16_gradients_are_finite_differences():
    """Along the gradient, far enough for the difference to stand out of the rounding."""
    params = init(CONFIG, jax.random.key(0))
    value_and_grad = model_loss(dataclasses.replace(CONFIG, dtype="bfloat16"))
    _, gradient = value_and_grad(params)
    length = np.linalg.norm(flat(gradient))

    def value(distance):
        moved = jax.tree.map(lambda p, g: p + distance / length * g, params, gradient)
        return float(value_and_grad(moved)[0])

    assert length > 0.5
    np.testing.assert_allclose((value(0.05) - value(-0.05)) / 0.1, length, rtol=0.03)


@pytest.mark.parametrize(("axes", "narrow"), [({"tensor": 2}, True), ({"fsdp": 8}, False)])
def test_chips_that_add_up_products_send_them_in_the_compute_dtype(monkeypatch, axes, narrow):
    """On a TPU mesh with a tensor axis; the gradient of the weights is summed in float32 there
    too, over the rows of all devices."""
    monkeypatch.setattr("spark_jax.models.dot.mesh_in_scope", lambda: SimpleNamespace(shape=axes))
    monkeypatch.setattr("spark_jax.models.dot.platform", lambda: "tpu")
    x, weight, cotangent = operands("btf,fd->btd")
    x = x.astype(jnp.bfloat16)
    out, pull = jax.vjp(lambda x, w: dot("btf,fd->btd", x, w), x, weight)
    exact = plain("btf,fd->btd", x, weight.astype(jnp.bfloat16))
    assert out.dtype == jnp.float32
    expected = exact.astype(jnp.bfloat16) if narrow else exact
    np.testing.assert_array_equal(out, expected.astype(jnp.float32))
    _, weight_gradient = pull(cotangent)
    assert weight_gradient.dtype == jnp.float32
    assert np.any(weight_gradient != weight_gradient.astype(jnp.bfloat16))
