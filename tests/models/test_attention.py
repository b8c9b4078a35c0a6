"""Attention of long sequences against attention with all scores held."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from spark_jax.models import attention

ROWS, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 75, 4, 2, 8
DTYPE = jnp.dtype("float32")
SEGMENTS = {
    "whole": np.ones((ROWS, LENGTH), np.int32),
    "packed": np.stack([np.arange(LENGTH) // 20 + 1, np.repeat([1, 2, 0], [3, 60, 12])]),
    "left_padded": (np.arange(LENGTH) >= np.array([[30], [0]])).astype(np.int32),
}


def arrays(rows):
    """Queries, keys and values."""
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.normal(size=(rows, LENGTH, heads, WIDTH)), jnp.float32)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def template(length=9):
    rng = np.random.default_rng(5)
    keys, values = rng.normal(size=(2, KV_HEADS, WIDTH, length)).astype(np.float32)
    return jnp.asarray(keys), jnp.asarray(values.swapaxes(1, 2))


@pytest.fixture
def small_blocks(monkeypatch):
    """20 queries a block: the last one is not full."""
    monkeypatch.setattr(attention, "BLOCK_SCORES", 20 * LENGTH)


@pytest.fixture
def without_cudnn(monkeypatch):
    """What cuDNN is asked for is computed by XLA."""
    asked = jax.nn.dot_product_attention

    def by_xla(*arguments, implementation, **how):
        assert implementation == "cudnn"
        return asked(*arguments, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)


@pytest.fixture
def interpreted():
    with pltpu.force_tpu_interpret_mode():
        yield
    pltpu.reset_tpu_interpret_mode_state()


def check(name, segments, before=None, *, gradients=True, tolerance=2e-5):
    """Values, and gradients by all that has one, at every token that is not padding."""
    qkv = arrays(len(segments))
    weights = np.random.default_rng(9).normal(size=qkv[0].shape) * (segments > 0)[..., None, None]

    @functools.partial(jax.jit, static_argnums=0)
    def run(name, qkv, before):
        def total(qkv, before):
            out = attention.causal(jnp.asarray(segments), name, DTYPE)(*qkv, before)
            return jnp.sum(out * weights), out

        if not gradients:
            return total(qkv, before)[1], None
        return jax.grad(total, argnums=(0, 1), has_aux=True)(qkv, before)[::-1]

    got, expected = run(name, qkv, before), run("dense", qkv, before)
    real = np.asarray(segments > 0)
    np.testing.assert_allclose(got[0][real], expected[0][real], atol=tolerance)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=5 * tolerance), got[1], expected[1]
    )
    assert np.all(np.isfinite(got[0]))


@pytest.mark.parametrize("kind", SEGMENTS)
@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_queries_attend_as_all_of_them(kind):
    check("blockwise", SEGMENTS[kind])


@pytest.mark.usefixtures("small_blocks", "without_cudnn")
@pytest.mark.parametrize("name", ["blockwise", "cudnn"])
def test_a_template_is_seen_by_every_query(name):
    right_padded = (np.arange(LENGTH) < np.array([[LENGTH], [31]])).astype(np.int32)
    check(name, right_padded, template())


@pytest.mark.usefixtures("small_blocks", "without_cudnn")
def test_what_cudnn_is_asked_for():
    check("cudnn", SEGMENTS["packed"])


@pytest.mark.usefixtures("interpreted")
def test_splash_attends_as_all_scores_do():
    """In the interpreter of TPU kernels, which sees races and reads out of bounds; it takes one row
    at a time."""
    check("splash", SEGMENTS["packed"][1:], tolerance=1e-4)


@pytest.mark.usefixtures("interpreted")
def test_splash_with_a_template_and_padding():
    right_padded = (np.arange(LENGTH) < np.array([[31]])).astype(np.int32)
    check("splash", right_padded, template(), gradients=False, tolerance=1e-4)


def test_length_and_platform_choose(monkeypatch):
    def chosen(length, platform, dtype="bfloat16"):
        monkeypatch.setattr(attention, "platform", lambda: platform)
        return attention._fitting(length, jnp.dtype(dtype))

    long = attention.LONG
    for platform in ("cpu", "gpu", "tpu"):
        assert chosen(long - 1, platform) == "dense"
    assert [chosen(long, platform) for platform in ("cpu", "gpu", "tpu")] == [
        "blockwise",
        "cudnn",
        "splash",
    ]
    assert chosen(long, "gpu", "float32") == "blockwise"


@pytest.mark.usefixtures("optimised")
def test_long_sequences_hold_few_scores():
    """Forwards and backwards; all scores would be 0.5 GB in float32."""
    length, heads = attention.LONG, 8
    sizes = [(1, length, heads, 16), (1, length, 2, 16), (1, length, 2, 16)]
    shapes = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    segments = jnp.ones((1, length), jnp.int32)

    def total(*qkv):
        return jnp.sum(attention.causal(segments, "auto", DTYPE)(*qkv, None) ** 2)

    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*shapes).compile()
    scores = 4 * heads * length**2
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 6
