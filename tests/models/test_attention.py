"""Attention of long sequences against all scores held; attention to a cache by kernel and XLA."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from jax.experimental.pallas import tpu as pltpu

from spark_jax.kernels import prefix_decode_attention as kernels
from spark_jax.kernels import prefix_decode_attention_gpu
from spark_jax.models import attention, transformer
from spark_jax.models.cache import Segment, Template

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


@functools.cache
def program(name, gradients, *blocks):
    """Of "whole", or of an implementation as it is with blocks of these sizes."""

    def total(qkv, before, segments, weights):
        if name == "whole":
            out = attention._attend(*qkv, attention._causal_mask(segments), before)
        else:
            out = attention.causal(segments, name, DTYPE)(*qkv, before)
        return jnp.sum(out * weights), out

    if not gradients:
        return jax.jit(lambda *arguments: (total(*arguments)[1], None))
    compute = jax.grad(total, argnums=(0, 1), has_aux=True)
    return jax.jit(lambda *arguments: compute(*arguments)[::-1])


def check(name, segments, before=None, *, gradients=True, tolerance=2e-5):
    """Values, and gradients by all that has one, at every token that is not padding."""
    qkv = arrays(len(segments))
    weights = np.random.default_rng(9).normal(size=qkv[0].shape) * (segments > 0)[..., None, None]
    arguments = (qkv, before, jnp.asarray(segments), jnp.asarray(weights, jnp.float32))
    blocks = (attention.BLOCK_SCORES, attention._FEWEST_QUERIES)
    got = program(name, gradients, *blocks)(*arguments)
    expected = program("whole", gradients)(*arguments)
    real = np.asarray(segments > 0)
    got, expected = jax.tree.map(np.asarray, (got, expected))
    np.testing.assert_allclose(got[0][real], expected[0][real], atol=tolerance)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=5 * tolerance), got[1], expected[1]
    )
    assert np.all(np.isfinite(got[0]))


@pytest.mark.parametrize("kind", SEGMENTS)
@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_queries_attend_as_all_of_them(kind):
    check("blockwise", SEGMENTS[kind])


@pytest.mark.parametrize("kind", SEGMENTS)
@pytest.mark.parametrize("before", [0, 9])
def test_four_blocks_attend_as_one(kind, before, monkeypatch):
    monkeypatch.setattr(attention, "_FEWEST_QUERIES", 8)
    check("dense", SEGMENTS[kind], template(before) if before else None)


def test_blocks_add_their_gradients_in_float32(monkeypatch):
    """Those of keys and values, to which all blocks contribute, in bfloat16."""
    wide = arrays(ROWS)
    narrow = tuple(x.astype(jnp.bfloat16) for x in wide)

    def gradients(qkv, fewest):
        monkeypatch.setattr(attention, "_FEWEST_QUERIES", fewest)
        attend = attention.causal(jnp.asarray(SEGMENTS["whole"]), "dense", qkv[0].dtype)

        def total(qkv):
            return jnp.sum(jnp.sin(attend(*qkv, None).astype(jnp.float32)))

        return [np.asarray(x, np.float32) for x in jax.jit(jax.grad(total))(qkv)[1:]]

    exact = gradients(wide, LENGTH)

    def error(fewest):
        pairs = zip(gradients(narrow, fewest), exact, strict=True)
        return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]

    for four, one in zip(error(8), error(LENGTH), strict=True):
        assert four <= 1.02 * one


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


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_splash_with_a_template_and_padding():
    right_padded = (np.arange(LENGTH) < np.array([[31]])).astype(np.int32)
    check("splash", right_padded, template(), gradients=False, tolerance=1e-4)


def cache_of_two_layers(lanes, slots, kv_heads, before, dtype="float32"):
    """Queries, the cache's second layer on its own and as one of two, and masks: of a prompt
    without a token, a whole one and others; slots that have one token or more."""
    length, columns = 5, 6
    rng = np.random.default_rng(3)

    def normal(*shape):
        return rng.normal(size=shape).astype(jnp.dtype(dtype))

    stacked = Segment(
        normal(2, lanes, kv_heads, WIDTH, length),
        normal(2, lanes, kv_heads, length, WIDTH),
        normal(2, lanes * slots, kv_heads, WIDTH, columns),
        normal(2, lanes * slots, kv_heads, columns, WIDTH),
        (normal(2, kv_heads, WIDTH, 9), normal(2, kv_heads, 9, WIDTH)) if before else None,
    )
    prompt_mask = np.arange(length) < np.resize([0, length, 3, 1], lanes)[:, None]
    own_mask = rng.random((lanes * slots, columns)) < 0.5
    own_mask[:, 2] = True
    alone = jax.tree.map(lambda x: x[1], stacked)
    q = normal(lanes * slots, HEADS, WIDTH)
    inputs = (q, alone, stacked._replace(layer=np.int32(1)), prompt_mask, own_mask)
    return jax.tree.map(jnp.asarray, inputs)


cached = jax.jit(attention.cached, static_argnums=4)


@pytest.mark.parametrize(
    ("kv_heads", "before"), [pytest.param(2, False, marks=pytest.mark.slow), (1, True)]
)
@pytest.mark.usefixtures("interpreted")
def test_a_cache_is_attended_to_alike_by_kernel_and_xla(kv_heads, before):
    q, alone, stacked, *masks = cache_of_two_layers(4, 3, kv_heads, before)
    expected = cached(q, alone, *masks)
    np.testing.assert_allclose(cached(q, stacked, *masks, "splash"), expected, atol=1e-5)
    np.testing.assert_array_equal(cached(q, stacked, *masks, "dense"), expected)


@pytest.mark.parametrize(
    ("kv_heads", "before"), [(2, False), pytest.param(1, True, marks=pytest.mark.slow)]
)
def test_the_kernel_for_gpus_attends_alike(kv_heads, before, monkeypatch):
    interpreted = functools.partial(
        prefix_decode_attention_gpu.prefix_decode_attention, interpret=True
    )
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, "pallas_gpu", interpreted)
    q, alone, stacked, *masks = cache_of_two_layers(4, 3, kv_heads, before)
    expected = cached(q, alone, *masks)
    np.testing.assert_allclose(cached(q, stacked, *masks, "triton"), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_the_kernel_rounds_as_xla_does():
    """In bfloat16 the two differ by their roundings of sums alone."""
    q, alone, stacked, *masks = cache_of_two_layers(4, 3, 2, True, "bfloat16")
    got = cached(q, stacked, *masks, "splash")
    assert got.dtype == jnp.bfloat16
    got, expected = (np.asarray(x, np.float32) for x in (got, cached(q, alone, *masks)))
    np.testing.assert_allclose(got, expected, atol=0.03)


@pytest.mark.slow
def test_a_cache_over_eight_devices():
    """The tests of `cached_on_eight_devices.py`, in a process that has so many."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", here / "cached_on_eight_devices.py"],
        cwd=here.parents[1],
        env=os.environ
        | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(here)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_platform_and_what_is_forced_choose_the_kernel_of_a_stacked_cache(monkeypatch):
    _, alone, stacked, *_ = cache_of_two_layers(1, 1, 1, False)

    def chosen(platform, implementation):
        monkeypatch.setattr(attention, "platform", lambda: platform)
        assert attention._kernel(implementation, alone) is None
        return attention._kernel(implementation, stacked), attention.in_place(implementation)

    assert chosen("tpu", "auto") == chosen("cpu", "splash") == ("pallas_tpu", True)
    assert chosen("gpu", "triton") == chosen("cpu", "triton") == ("pallas_gpu", True)
    assert chosen("tpu", "dense") == chosen("gpu", "auto") == chosen("gpu", "cudnn") == (None, True)
    assert chosen("cpu", "auto") == chosen("cpu", "dense") == (None, False)


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


def test_a_template_counts_as_length():
    """A prefill that follows one holds no more scores at once than one of the whole length."""
    template, own = 64, attention.LONG - 64
    config = tiny_model.CONFIG
    heads, width = config.num_kv_heads, config.head_dim
    before = Template(
        jnp.zeros((config.num_layers, heads, width, template)),
        jnp.zeros((config.num_layers, heads, template, width)),
    )
    tokens, lengths = jnp.zeros((1, own), jnp.int32), jnp.full(1, own)

    def prefill(before):
        arguments = (tiny_model.params(), config, tokens, lengths, before)
        return str(jax.make_jaxpr(lambda: transformer.prefill(*arguments))())

    last = own // 4  # queries, whose scores are held together below the limit
    assert f",{last},{own}]" in prefill(None)
    assert f",{last},{own}]" not in prefill(before)
    assert f",{last},{attention.LONG}]" not in prefill(before)


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
