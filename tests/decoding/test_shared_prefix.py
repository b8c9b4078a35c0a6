"""What all prompts begin with is held once: against the same prompts with nothing shared."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_jax import decoding, scoring
from spark_jax.decoding import decoder
from spark_jax.decoding.generate import MIN_SHARED_PREFIX, PREFIX_GRAIN, shared_prefix
from spark_jax.models import cache, transformer
from spark_jax.models.config import ModelConfig

sampler = importlib.import_module("spark_jax.decoding.generate")  # the package has the function
CONFIG = ModelConfig(
    vocab_size=50, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=32
)
TEMPLATE = np.random.default_rng(1).integers(0, 50, 70).tolist()
STOP = decoding.Sampling(stop_ids=(3,))


@pytest.fixture(scope="module")
def params():
    return init(CONFIG, jax.random.key(0))


init = jax.jit(transformer.init, static_argnums=0)
prefill = jax.jit(transformer.prefill, static_argnums=1)
score = jax.jit(scoring.response_logprobs_and_entropy, static_argnums=1)


def generate(params, prompts, config=CONFIG, **options):
    options = {"sampling": STOP, "samples_per_prompt": 3, "max_new_tokens": 12, **options}
    return decoding.generate(params, config, prompts, key=jax.random.key(5), **options)


def unshared(params, prompts, monkeypatch):
    """`generate`, with a prompt's whole template in each prompt's own part."""
    with monkeypatch.context() as patched:
        patched.setattr(sampler, "MIN_SHARED_PREFIX", 10**9)
        return generate(params, prompts)


def endings(*lengths):
    rng = np.random.default_rng(2)
    return [TEMPLATE + rng.integers(0, 50, n).tolist() for n in lengths]


def responses(rollout):
    rows = zip(np.asarray(rollout.tokens), np.asarray(rollout.mask), strict=True)
    return [row[mask].tolist() for row, mask in rows]


def assert_same(shared, alone, prefix):
    assert int(shared.shared_prefix) == prefix
    assert int(alone.shared_prefix) == 0
    assert responses(shared) == responses(alone)
    np.testing.assert_allclose(shared.logprobs, alone.logprobs, atol=1e-5)
    np.testing.assert_array_equal(shared.prompt_tokens, alone.prompt_tokens)
    np.testing.assert_array_equal(shared.prompt_mask, alone.prompt_mask)


@pytest.mark.parametrize("unstacked", [pytest.param(True, marks=pytest.mark.slow), False])
def test_sharing_changes_no_token(params, unstacked, monkeypatch):
    """Ragged remainders; one prompt is the template itself and no more. (Fast tests compare the
    unstacked layout with the scorer.)"""
    prompts = [*endings(1, 9, 4), TEMPLATE]
    layout = decoding.layout(params, CONFIG) if unstacked else params
    assert_same(generate(layout, prompts), unshared(layout, prompts, monkeypatch), prefix=64)


def test_a_prompt_of_one_token_after_the_template(params, monkeypatch):
    """Nothing of it is prefilled: its only own token is the first that is decoded."""
    others = [TEMPLATE[:64] + [n] * 15 for n in (8, 9, 10)]
    prompts = [[*TEMPLATE[:64], 7], *others]  # of the sizes above: the same programs
    assert_same(generate(params, prompts), unshared(params, prompts, monkeypatch), 64)


def test_slots_and_lanes_change_no_token(params, monkeypatch):
    prompts = endings(3, 9, 1, 5)
    together = generate(params, prompts)
    monkeypatch.setattr(sampler, "_lane_width", lambda *_: 2)
    few = generate(params, prompts, slots=4)
    assert int(few.shared_prefix) == 64
    assert responses(few) == responses(together)
    np.testing.assert_allclose(few.logprobs, together.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        ("float32", 1e-4),
        pytest.param("bfloat16", 0.05, marks=pytest.mark.slow),
    ],
)
def test_sampler_agrees_with_scorer(dtype, tolerance):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    params = init(CONFIG, jax.random.key(0))
    rollout = generate(decoding.layout(params, config), endings(1, 9, 4, 2), config)
    assert int(rollout.shared_prefix) == 64
    prompt_tokens, prompt_mask = (
        np.repeat(x, 3, axis=0) for x in (rollout.prompt_tokens, rollout.prompt_mask)
    )
    scored, _ = score(params, config, prompt_tokens, prompt_mask, rollout.tokens, rollout.mask)
    np.testing.assert_allclose(rollout.logprobs, scored, atol=tolerance)


def test_prefill_after_a_template_equals_prefill_of_the_whole(params):
    tokens = jnp.asarray(endings(9, 9))
    whole = prefill(params, CONFIG, tokens, jnp.full(2, 79))
    template = prefill(params, CONFIG, tokens[:1, :70], jnp.full(1, 70)).as_template()
    assert template.length == 70
    rest = prefill(params, CONFIG, tokens[:, 70:], jnp.full(2, 9), template)
    np.testing.assert_allclose(rest.keys, whole.keys[..., 70:], atol=1e-5)
    np.testing.assert_allclose(rest.values, whole.values[..., 70:, :], atol=1e-5)


def test_the_template_is_held_once(params):
    """Its keys have no axis for lanes or slots."""

    def empty(params, tokens):
        params = transformer.unstack(params, CONFIG)
        template = transformer.prefill(params, CONFIG, tokens, jnp.full(1, 70)).as_template()
        return cache.empty(
            CONFIG, lanes=3, width=2, prompt_length=5, columns=4, stacked=False, template=template
        )

    kv = jax.eval_shape(empty, params, jnp.asarray([TEMPLATE]))
    shapes = [tuple(x.shape for x in segment.template) for segment in kv.segments()]
    assert shapes == [((2, 8, 70), (2, 70, 8))] * 2


def test_templates_and_prompts_within_their_bucket_compile_nothing(params):
    generate(params, endings(8, 5, 7, 4))
    before = decoder.decode._cache_size()
    longer = [[*TEMPLATE, *([1] * extra), last] for extra in (5, 6) for last in (2, 3)]
    assert shared_prefix(longer) == 64
    shorter = [[*p[:76], i] for i, p in enumerate(longer)]
    another = [[7, 7, *prompt[2:]] for prompt in endings(7, 8, 2, 5)]  # template of another stage
    for prompts in (another, longer, shorter):
        generate(params, prompts, sampling=decoding.Sampling(top_p=0.9, temperature=0.7))
    padded = [generate(params, p, max_prompt_length=100) for p in (endings(1, 2, 3, 4), longer)]
    assert [int(r.shared_prefix) for r in padded] == [64, 64]
    assert decoder.decode._cache_size() == before + 1


def test_what_is_not_shared():
    other = [TEMPLATE[0] + 1, *TEMPLATE[1:]]
    assert shared_prefix([TEMPLATE]) == 0
    assert shared_prefix([TEMPLATE, other]) == 0
    assert shared_prefix([TEMPLATE, TEMPLATE, TEMPLATE[: MIN_SHARED_PREFIX - 1]]) == 0
    assert shared_prefix([TEMPLATE, TEMPLATE]) == 64
    # The shortest prompt keeps a token of its own.
    assert shared_prefix([[*TEMPLATE, 1][:64], TEMPLATE]) == 0
    assert shared_prefix([TEMPLATE[:65], TEMPLATE]) == 64


@given(seed=st.integers(0, 10**6), grains=st.integers(0, 4), count=st.integers(2, 5))
def test_detection_equals_a_plain_loop(seed, grains, count):
    rng = np.random.default_rng(seed)
    stem = rng.integers(0, 3, grains * PREFIX_GRAIN + rng.integers(0, 9)).tolist()
    prompts = [stem + rng.integers(0, 3, rng.integers(1, 6)).tolist() for _ in range(count)]
    n = 0
    while all(len(p) > n + 1 and p[n] == prompts[0][n] for p in prompts):
        n += 1
    n -= n % PREFIX_GRAIN
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sampler, "MIN_SHARED_PREFIX", 1)
        assert shared_prefix(prompts) == n
    assert shared_prefix(prompts) == (n if n >= MIN_SHARED_PREFIX else 0)
