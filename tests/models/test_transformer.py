"""The transformer against an independent NumPy loop, and its cached form against its full form."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark_jax.models import attention, cache, transformer
from spark_jax.models.config import PROJECTIONS, ModelConfig

PLAIN = ModelConfig(
    vocab_size=50,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=24,
)
# Between them, every option on and off.
VARIANTS = {
    "grouped": dataclasses.replace(PLAIN, qkv_bias=True, qk_norm=True, tied_embeddings=False),
    "multi_query": dataclasses.replace(PLAIN, num_kv_heads=1, remat=False),
}

unstack = jax.jit(transformer.unstack, static_argnums=1)
prefill = jax.jit(transformer.prefill, static_argnums=1)
insert = jax.jit(cache.insert)


@pytest.fixture(params=VARIANTS)
def model(request):
    config = VARIANTS[request.param]
    return random_params(config), config


def random_params(config):
    """By NumPy, since compiling `init` takes seconds; norms and biases are random too, so that
    leaving them out would show."""
    rng = np.random.default_rng(1)

    def draw(path, x):
        norm = "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(norm + rng.normal(size=x.shape) / (10 if norm else 4), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, transformer.shapes(config))


def random_tokens(shape, seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, PLAIN.vocab_size)


def numpy_logits(params, config, tokens):
    """One sequence, one token, one head at a time, keys and values of a head looked up plainly."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x * x) + config.norm_eps) * scale

    def rotate(x, position):
        half = config.head_dim // 2
        out = np.empty_like(x)
        for i in range(half):
            angle = position * config.rope_theta ** (-i / half)
            out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
            out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
        return out

    xs = [p.embedding[t] for t in tokens]
    for n in range(config.num_layers):
        layer = jax.tree.map(lambda x, n=n: x[n], p.layers)
        queries, keys, values = [], [], []
        for t, x in enumerate(xs):
            h = norm(x, layer.attention_norm)
            q, k, v = (np.einsum("d,dhk->hk", h, w) for w in (layer.query, layer.key, layer.value))
            if config.qkv_bias:
                q, k, v = q + layer.query_bias, k + layer.key_bias, v + layer.value_bias
            if config.qk_norm:
                q = np.stack([norm(row, layer.query_norm) for row in q])
                k = np.stack([norm(row, layer.key_norm) for row in k])
            queries.append([rotate(row, t) for row in q])
            keys.append([rotate(row, t) for row in k])
            values.append(v)
        for t in range(len(xs)):
            x, heads = xs[t], []
            for head in range(config.num_heads):
                kv = head // (config.num_heads // config.num_kv_heads)
                scores = np.array([queries[t][head] @ keys[s][kv] for s in range(t + 1)])
                weights = np.exp(scores / np.sqrt(config.head_dim))
                weights /= weights.sum()
                heads.append(sum(w * values[s][kv] for s, w in enumerate(weights)))
            x = x + np.einsum("hk,hkd->d", np.stack(heads), layer.output)
            h = norm(x, layer.mlp_norm)
            gate = h @ layer.gate
            x = x + (gate / (1 + np.exp(-gate)) * (h @ layer.up)) @ layer.down
            xs[t] = x
    head = p.embedding.T if p.head is None else p.head
    return np.stack([norm(x, p.final_norm) @ head for x in xs])


@partial(jax.jit, static_argnums=1)
def full_logits(params, config, tokens, *args):
    return transformer.logits(params, config, transformer.forward(params, config, tokens, *args))


def test_forward_equals_numpy_loop(model):
    params, config = model
    tokens = random_tokens((2, 6))
    expected = np.stack([numpy_logits(params, config, row) for row in np.asarray(tokens)])
    np.testing.assert_allclose(full_logits(params, config, tokens), expected, atol=2e-5)


def test_unstacked_layout_gives_the_same_numbers(model):
    params, config = model
    tokens = random_tokens((2, 6))
    np.testing.assert_allclose(
        full_logits(unstack(params, config), config, tokens),
        full_logits(params, config, tokens),
        atol=1e-5,
    )


def test_left_and_right_padding_change_nothing(model):
    params, config = model
    tokens = random_tokens((1, 5))
    alone = full_logits(params, config, tokens)
    for left, right in ((3, 0), (0, 3), (2, 1)):
        width = ((0, 0), (left, right))
        padded = jnp.pad(tokens, width, constant_values=7)
        segments = jnp.pad(jnp.ones_like(tokens), width)
        got = full_logits(params, config, padded, None, segments)
        np.testing.assert_allclose(got[:, left : left + 5], alone, atol=2e-5)
        assert np.all(np.isfinite(got))


def test_packed_segments_equal_separate_sequences(model):
    params, config = model
    first, second = random_tokens((1, 5), 1), random_tokens((1, 5), 2)
    packed = jnp.concatenate([first, second[:, :3]], axis=1)
    segments = jnp.asarray([[1] * 5 + [2] * 3])
    got = full_logits(params, config, packed, None, segments)
    np.testing.assert_allclose(got[:, :5], full_logits(params, config, first), atol=2e-5)
    alone = full_logits(params, config, second)[:, :3]
    np.testing.assert_allclose(got[:, 5:], alone, atol=2e-5)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("grouped", "stacked"),
        ("grouped", "in_place"),
        ("multi_query", "unstacked"),
        pytest.param("multi_query", "stacked", marks=pytest.mark.slow),
        pytest.param("multi_query", "in_place", marks=pytest.mark.slow),
        pytest.param("grouped", "unstacked", marks=pytest.mark.slow),
    ],
    indirect=["model"],
)
def test_cached_decoding_equals_full_forward(model, layout, monkeypatch):
    """In place is for TPU: a scan that carries the cache of all layers."""
    params, config = model
    monkeypatch.setattr(attention, "in_place", lambda _: layout == "in_place")
    stacked = layout != "unstacked"
    lengths, total = np.array([3, 5, 1]), 9
    tokens = random_tokens((3, total))
    expected = full_logits(params, config, tokens)
    params = params if stacked else unstack(params, config)
    decode_step = jax.jit(partial(transformer.decode_step), static_argnums=1)  # of this layout
    kv = cache.empty(config, lanes=3, width=1, prompt_length=5, columns=4, stacked=stacked)
    prompts = prefill(params, config, tokens[:, :5], jnp.asarray(lengths))
    kv = insert(kv, prompts, jnp.arange(3))
    for i in range(4):
        at = lengths + i
        fed = tokens[jnp.arange(3), at][:, None]
        own = jnp.broadcast_to(jnp.arange(4) <= i, (3, 1, 4))
        scores, kv = decode_step(
            params, config, kv, fed, jnp.asarray(at)[:, None], own, jnp.int32(i)
        )
        np.testing.assert_allclose(scores[:, 0], expected[jnp.arange(3), at], atol=2e-5)


def test_inserting_drops_lanes_out_of_range_and_keeps_the_others():
    kv = cache.empty(PLAIN, lanes=3, width=1, prompt_length=2, columns=2, stacked=False)
    params = unstack(random_params(PLAIN), PLAIN)
    new = prefill(params, PLAIN, random_tokens((2, 2)), jnp.asarray([2, 1]))
    kv = insert(kv, new, jnp.asarray([3, 1]))
    np.testing.assert_array_equal(kv.prompt.lengths, [0, 1, 0])
    np.testing.assert_array_equal(kv.prompt.keys[0][1], new.keys[0][1])
    assert not np.any(kv.prompt.keys[0][jnp.asarray([0, 2])])


def test_bfloat16_accumulates_in_float32(model):
    params, config = model
    narrow = dataclasses.replace(config, dtype="bfloat16")
    tokens = random_tokens((2, 6))
    got, expected = full_logits(params, narrow, tokens), full_logits(params, config, tokens)
    assert got.dtype == jnp.float32
    assert np.max(np.abs(got - expected)) < 0.05 * np.std(expected) + 0.05
    program = jax.make_jaxpr(lambda p: full_logits(p, narrow, tokens))(params)
    dots = [line for line in str(program).splitlines() if "dot_general[" in line]
    assert dots
    assert str(program).count("dot_general[") == str(program).count(
        "preferred_element_type=float32"
    )


@pytest.mark.parametrize(
    ("model", "stored"),
    [
        ("grouped", ((),)),  # what is stored counts products in test_performance_guards.py
        pytest.param("grouped", (("qkv_proj", "out_proj"),), marks=pytest.mark.slow),
        pytest.param("multi_query", ((), PROJECTIONS), marks=pytest.mark.slow),
    ],
    indirect=["model"],
)
def test_remat_changes_no_gradient(model, stored):
    params, config = model
    tokens = random_tokens((2, 6))

    def loss(p, config):
        return jnp.sum(jnp.sin(full_logits(p, config, tokens)))

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    without = grad(params, dataclasses.replace(config, remat=False))
    for names in stored:
        again = grad(params, dataclasses.replace(config, remat=True, remat_save=names))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), again, without)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remat_save": ("qkv_proj", "down_proj")}, r"has \['down_proj'\]; .*'qkv_proj'"),
        ({"remat_save": ("qkv_proj",), "remat": False}, "remat=False, which stores everything"),
    ],
)
def test_what_remat_may_store_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **changes)


def test_config_refuses_impossible_heads():
    with pytest.raises(ValueError, match="num_heads=4 is not a multiple of num_kv_heads=3"):
        dataclasses.replace(PLAIN, num_kv_heads=3)
    with pytest.raises(ValueError, match="head_dim=7"):
        dataclasses.replace(PLAIN, head_dim=7)
    with pytest.raises(ValueError, match="float16"):
        dataclasses.replace(PLAIN, dtype="float16")


@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        ("float32", 1),
        ("bfloat16", 2),
        pytest.param("float32", 2, marks=pytest.mark.slow),
        pytest.param("bfloat16", 1, marks=pytest.mark.slow),
    ],
)
def test_a_step_on_cpu_neither_copies_nor_transposes_the_cache(optimised, dtype, width):
    """In a loop, as in decoding: each of these would be a pass over the whole cache per token."""
    config = dataclasses.replace(PLAIN, dtype=dtype, num_layers=1)
    empty = partial(cache.empty, lanes=4, width=width, prompt_length=32, columns=96, stacked=False)
    params, kv = jax.eval_shape(
        lambda: (transformer.unstack(random_params(config), config), empty(config))
    )
    slots = (4, width)

    @partial(jax.jit, donate_argnums=1)
    def steps(params, kv, tokens):
        mask = jnp.ones((*slots, 96), bool)

        def body(i, carry):
            kv, tokens = carry
            scores, kv = transformer.decode_step(params, config, kv, tokens, tokens, mask, i)
            return kv, jnp.argmax(scores, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, 8, body, (kv, tokens))

    tokens = jax.ShapeDtypeStruct(slots, jnp.int32)
    text = steps.lower(params, kv, tokens).compile().as_text()
    assert "dynamic-update-slice" in text
    shapes = (f"[{4 * width},2,8,96]", f"[{4 * width},2,96,8]", f"[4,{width},2,96,8]")
    whole = [line for line in text.splitlines() if any(s in line.split("(")[0] for s in shapes)]
    assert whole
    for operation in (" copy(", " transpose(", " convert("):
        assert not [line for line in whole if operation in line], operation


def test_one_bfloat16_row_alone_equals_itself_among_others():
    """It goes through another program on CPU: see `layers.by_rows`."""
    config = dataclasses.replace(PLAIN, dtype="bfloat16")
    params = unstack(random_params(PLAIN), config)
    tokens = random_tokens((3, 1))
    alone = full_logits(params, config, tokens[:1])
    assert alone.shape == (1, 1, 50)
    np.testing.assert_allclose(alone, full_logits(params, config, tokens)[:1], atol=1e-2)
    vector = jnp.ones(16, jnp.bfloat16)
    assert transformer.logits(params, config, vector).shape == (50,)
