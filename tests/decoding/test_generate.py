"""The decoder: against full forwards, against itself one by one, and against the scorer.

Every program takes seconds to compile. Most tests share two: four samples each of all of `prompts`
at once, and one each in `WAITING`, where rows wait; both for at most 20 tokens.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import Compilations

from spark_jax import decoding, scoring
from spark_jax.decoding import decoder
from spark_jax.decoding.generate import ladder
from spark_jax.models import cache as kv_cache
from spark_jax.models import transformer
from spark_jax.models.config import ModelConfig
from spark_jax.text_generation import rollout_texts

sampler = importlib.import_module("spark_jax.decoding.generate")  # the package has the function
CONFIG = ModelConfig(
    vocab_size=50, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=32
)
GREEDY = decoding.Sampling(greedy=True, stop_ids=(3, 4))
RANDOM = decoding.Sampling(stop_ids=(3, 4))
KEY = jax.random.key(5)
WAITING = {"slots": 6, "samples_per_prompt": 1}

init = jax.jit(transformer.init, static_argnums=0)
score = jax.jit(scoring.response_logprobs_and_entropy, static_argnums=1)


@pytest.fixture(scope="module")
def params():
    params = init(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda x: 1.5 * x, params)  # sharper than at initialisation


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 50, n).tolist() for n in (1, 4, 8, 2, 5, 7, 3)]


def generate(params, prompts, sampling=RANDOM, config=CONFIG, **options):
    options = {"key": KEY, "samples_per_prompt": 4, "max_new_tokens": 20, **options}
    return decoding.generate(params, config, prompts, sampling=sampling, **options)


def responses(rollout):
    rows = zip(np.asarray(rollout.tokens), np.asarray(rollout.mask), strict=True)
    return [row[mask].tolist() for row, mask in rows]


@jax.jit
def full_logits(params, tokens):
    return transformer.logits(params, CONFIG, transformer.forward(params, CONFIG, tokens))


def greedy_by_full_forward(params, prompt, limit, stop_ids):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + limit:
        padded = jnp.asarray([tokens + [0] * (32 - len(tokens))])  # causal: the rest is not seen
        tokens.append(int(jnp.argmax(full_logits(params, padded)[0, len(tokens) - 1])))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


def test_greedy_equals_full_forwards(params, prompts):
    got = responses(generate(params, prompts, GREEDY))
    expected = [greedy_by_full_forward(params, p, 20, (3, 4)) for p in prompts]
    assert got == [response for response in expected for _ in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "width"), [(1, 1), (6, 1), (9, 2), (15, 5)])
def test_scheduling_changes_no_token(params, prompts, slots, width, monkeypatch):
    """100 tokens need both ring sizes, so slots of very different age share the cache. One row in
    three is greedy: continuous batching there is compared token for token at temperature 0."""
    assert decoder.Shape(1, 1, 1, ladder(100), 1).rings == (64, 128)
    sampling = decoding.Sampling(greedy=np.arange(7) % 3 == 0, stop_ids=(3,))
    common = {"samples_per_prompt": 5, "max_new_tokens": 100}
    together = generate(params, prompts, sampling, **common)
    monkeypatch.setattr(sampler, "_lane_width", lambda *_: width)
    scheduled = generate(params, prompts, sampling, **common, slots=slots)
    lengths = list(map(len, responses(together)))
    assert max(lengths) > 64
    assert min(lengths) < 20
    assert responses(scheduled) == responses(together)
    np.testing.assert_allclose(scheduled.logprobs, together.logprobs, atol=1e-4)
    np.testing.assert_array_equal(scheduled.finished, together.finished)
    assert int(scheduled.decode_steps) >= int(together.decode_steps)


def test_group_equals_replicated_prompts_and_slots_are_a_limit(params, prompts):
    """Row b draws from (key, b), so G samples of one prompt are G copies of it, one sample each;
    and so they are where rows wait for slots, sampled or greedy."""
    greedy = np.asarray([False, True] + [False] * 5)
    group = generate(params, prompts, decoding.Sampling(greedy=greedy, stop_ids=(3, 4)))
    copies = generate(
        params,
        [p for p in prompts[:2] for _ in range(4)],
        decoding.Sampling(greedy=greedy[:2].repeat(4), stop_ids=(3, 4)),
        max_prompt_length=8,
        **WAITING,
    )
    assert responses(group)[:8] == responses(copies)
    np.testing.assert_allclose(group.logprobs[:8], copies.logprobs, atol=1e-5)
    np.testing.assert_array_equal(group.finished[:8], copies.finished)
    assert len({tuple(r) for r in responses(group)[:4]}) > 1
    steps = int(copies.mask.sum()) / float(copies.slot_occupancy) / int(copies.decode_steps)
    assert round(steps) == 6
    assert float(group.queue_occupancy) == 1


@pytest.mark.slow
def test_layouts_agree(params, prompts):
    stacked = generate(params, prompts)
    unrolled = generate(decoding.layout(params, CONFIG), prompts)
    assert responses(stacked) == responses(unrolled)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "how", "tolerance"),
    [
        ("float32", None, {"slots": 6, "max_new_tokens": 100}, 1e-4),
        ("float32", "int8", {}, 0.02),
        pytest.param("bfloat16", None, {"max_new_tokens": 40}, 0.05, marks=pytest.mark.slow),
    ],
)
def test_sampler_agrees_with_scorer(prompts, dtype, cache_dtype, how, tolerance):
    """100 tokens need both ring sizes, so slots of very different age share the cache."""
    assert decoder.Shape(1, 1, 1, ladder(100), 1).rings == (64, 128)
    config = dataclasses.replace(CONFIG, dtype=dtype, cache_dtype=cache_dtype)
    params = init(CONFIG, jax.random.key(0))
    rollout = generate(
        decoding.layout(params, config),
        prompts,
        decoding.Sampling(temperature=0.8, top_p=0.9, stop_ids=(3,)),
        config,
        samples_per_prompt=3,
        **how,
    )
    lengths = list(map(len, responses(rollout)))
    assert min(lengths) < 20
    assert max(lengths) > 64 or "slots" not in how
    prompt_tokens, prompt_mask = (
        np.repeat(x, 3, axis=0) for x in (rollout.prompt_tokens, rollout.prompt_mask)
    )
    scored, _ = score(
        params,
        CONFIG if dtype == "float32" else config,
        prompt_tokens,
        prompt_mask,
        rollout.tokens,
        rollout.mask,
    )
    np.testing.assert_allclose(rollout.logprobs, scored, atol=tolerance)
    assert np.all(np.asarray(rollout.logprobs)[~np.asarray(rollout.mask)] == 0)


WITH_ALL = {"slots": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "how"), [("stacked", {}), ("stacked", WITH_ALL), ("unrolled", WITH_ALL)], ids=str
)
def test_a_cache_in_int8_costs_little(prompts, layout, how):
    """With all: rows that wait for lanes, lanes that take over prompts, a shared template. (The
    unrolled layout on its own is compared with the scorer above.)

    At initialisation, not sharper: logits that grow with the weights multiply the rounding (1.5 ×
    the weights: a gap of .19 in 127 levels, .002 in 32767).
    """
    params = init(CONFIG, jax.random.key(0))
    if how:
        prompts = [[*range(40), *range(30), *prompt] for prompt in prompts]
    config = dataclasses.replace(CONFIG, cache_dtype="int8")
    exact = generate(params, prompts, samples_per_prompt=4, **how)
    laid = params if layout == "stacked" else decoding.layout(params, config)
    rollout = generate(laid, prompts, config=config, samples_per_prompt=4, **how)
    assert int(rollout.shared_prefix) == (64 if how else 0)
    same = np.cumprod(np.asarray(rollout.tokens) == np.asarray(exact.tokens), axis=1)
    same = same.astype(bool) & np.asarray(exact.mask)
    assert same.sum() > 0.4 * np.asarray(exact.mask).sum()  # nearly equal scores, by chance
    gap = np.abs(np.asarray(rollout.logprobs) - np.asarray(exact.logprobs))[same]
    assert 0 < gap.max() < 0.06
    assert gap.mean() < 0.01


def test_a_cache_in_int8_is_half_of_bfloat16():
    def size(config):
        cache = jax.eval_shape(
            lambda: kv_cache.empty(
                config, lanes=2, width=3, prompt_length=32, columns=64, stacked=True
            )
        )
        leaves = jax.tree.leaves((cache.keys, cache.values, cache.prompt.keys))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    of_scales = 4 / CONFIG.head_dim  # float32, one to each head_dim numbers
    narrow = size(dataclasses.replace(CONFIG, dtype="bfloat16"))
    in_int8 = size(dataclasses.replace(CONFIG, cache_dtype="int8"))
    assert in_int8 == narrow / 2 * (1 + of_scales)


def test_stop_token_belongs_to_the_response(params, prompts):
    rollout = generate(params, prompts)
    for response, finished in zip(responses(rollout), rollout.finished, strict=True):
        assert (response[-1] in (3, 4)) == bool(finished)
        assert not {3, 4} & set(response[:-1])
        assert len(response) == 20 or finished
    assert np.any(rollout.finished)
    assert not np.all(rollout.finished)


def test_a_stop_id_that_equals_padding_counts_too(params, prompts):
    """Id 0 fills the arrays past the end; the mask alone says what is response."""
    rollout = generate(params, prompts, decoding.Sampling(stop_ids=(0,)))
    ended = [r for r, f in zip(responses(rollout), rollout.finished, strict=True) if f]
    assert ended
    assert all(r[-1] == 0 and 0 not in r[:-1] for r in ended)


def test_limits_and_stop_ids_by_row(params, prompts):
    limits = [1, 2, 3, 20, 5, 6, 7]
    rollout = generate(params, prompts, decoding.Sampling(greedy=True), max_new_tokens=limits)
    assert list(map(len, responses(rollout))) == np.repeat(limits, 4).tolist()
    stops = np.asarray([[r[0]] for r in responses(rollout)[::4]])
    stops[0] = -1
    sampling = decoding.Sampling(greedy=True, stop_ids=stops)
    short = generate(params, prompts, sampling, max_new_tokens=limits)
    assert list(map(len, responses(short))) == [1] * 28
    np.testing.assert_array_equal(short.finished, [False] * 4 + [True] * 24)


def test_rollout_layout_and_occupancy(params, prompts):
    rollout = generate(params, prompts, **WAITING)
    lengths = list(map(len, prompts))
    np.testing.assert_array_equal(rollout.prompt_mask.sum(axis=1), lengths)
    for row, prompt in zip(np.asarray(rollout.prompt_tokens), prompts, strict=True):
        assert row[-len(prompt) :].tolist() == prompt
    tokens = int(rollout.mask.sum())
    assert float(rollout.slot_occupancy) == pytest.approx(tokens / (6 * int(rollout.decode_steps)))


def test_same_key_same_rollout_and_another_key_another(params, prompts):
    first, again = (responses(generate(params, prompts)) for _ in range(2))
    assert first == again
    assert responses(generate(params, prompts, key=jax.random.key(6))) != first


def test_settings_and_prompts_within_a_bucket_compile_nothing(params, prompts):
    """Not the decoder, and not the handling of its results either."""

    def run(some, sampling=RANDOM, **options):
        return rollout_texts(generate(params, some, sampling, **options), IdsAsText())

    run(prompts)
    keys = [jax.random.key(seed) for seed in (1, 2)]
    with Compilations() as compiled:
        run(prompts[::-1], decoding.Sampling(temperature=0.3, stop_ids=(9,)), key=keys[0])
        run(prompts, decoding.Sampling(top_p=0.5), max_new_tokens=24, key=keys[1])
        run(prompts, decoding.Sampling(top_k=4, min_p=0.1, stop_ids=tuple(range(8))))
        mixed = {"greedy": np.arange(7) % 2 == 0, "temperature": np.linspace(0.5, 2, 7)}
        run(prompts, decoding.Sampling(**mixed), max_new_tokens=[17, 18, 19, 20, 21, 22, 23])
        run([[*p[:6], 1] for p in prompts])  # same rung
        assert len(run([*prompts, [9]])) == 32  # and of the number of prompts
    assert compiled.names == []
    with Compilations() as compiled:
        jax.jit(lambda x: x + 3)(len(prompts))
    assert compiled.names != []


class IdsAsText:
    def batch_decode(self, rows, **_):
        return [" ".join(map(str, row)) for row in rows]


@pytest.mark.slow
def test_a_stage_of_groups_keeps_its_slots_busy_while_any_sample_waits(params, monkeypatch):
    """Samples of unknown length, of more prompts than fit: no slot waits for its neighbours, and
    when no prompt waits any more, free slots take over samples of groups under way."""
    rng = np.random.default_rng(3)
    many = [rng.integers(0, 50, n).tolist() for n in rng.integers(4, 9, 10)]
    options = {"samples_per_prompt": 6, "max_new_tokens": 60}
    few = generate(params, many, slots=8, **options)
    monkeypatch.setattr(sampler, "_lane_width", lambda *_: 4)
    wide = generate(params, many, slots=8, **options)
    assert responses(few) == responses(wide)
    assert float(few.queue_occupancy) > 0.9
    assert float(few.slot_occupancy) > 0.75
    assert float(wide.queue_occupancy) < float(few.queue_occupancy)


def test_the_longest_are_begun_first(params):
    """In the order given, the last would begin where the others end: 25 steps."""
    limits = [5] * 6 + [20]
    rollout = generate(
        params,
        [[i + 5] for i in range(7)],
        decoding.Sampling(),
        max_new_tokens=limits,
        max_prompt_length=8,
        **WAITING,
    )
    assert int(rollout.decode_steps) == 20
    assert np.asarray(rollout.mask).sum(axis=1).tolist() == limits


@pytest.mark.slow
def test_a_run_of_several_stages_compiles_little(params):
    """Stages differ in settings, templates and prompts; each has its sizes, and few programs."""
    before = decoding.compiled_programs()
    rng = np.random.default_rng(4)
    for template in rng.integers(0, 50, (3, 70)).tolist():
        for count in (5, 6, 5):
            prompts = [
                template + rng.integers(0, 50, n).tolist() for n in rng.integers(9, 16, count)
            ]
            sampling = decoding.Sampling(temperature=rng.uniform(0.5, 1), top_p=rng.uniform(0.5, 1))
            rollout = generate(params, prompts, sampling, slots=3, max_new_tokens=9)
            assert int(rollout.shared_prefix) == 64
    assert decoding.compiled_programs() - before == 1


def test_ladder_is_short_and_never_too_small():
    rungs = {ladder(n) for n in range(1, 5000)}
    assert all(ladder(n) >= n and ladder(n) <= 1.5 * n + 1 for n in range(1, 5000))
    assert len(rungs) < 30


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts is empty"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [1, 2, 3]], {"max_prompt_length": 2}, "prompt 1 has 3 tokens.*max_prompt_length=2"),
        ([[1, 50]], {}, r"prompt 0 has a token id outside 0\.\.49"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"max_new_tokens": [1, 2]}, r"max_new_tokens has shape \(2,\)"),
        ([[1]], {"samples_per_prompt": 0}, "samples_per_prompt=0"),
        ([[1]], {"slots": 0}, "slots=0"),
        ([[1], [1, 2]], {"max_new_tokens": 4095}, "prompt 1 has 2 tokens.*max_positions=4096"),
    ],
)
def test_bad_requests_are_refused(params, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(params, prompts, **options)


def test_no_vocabulary_sort_and_no_wide_scores_in_the_program(params):
    """What the decode loop must not hold: a sort of the vocabulary, or scores of a whole prompt."""
    config = dataclasses.replace(CONFIG, vocab_size=1031)
    params = transformer.shapes(config)
    shape = decoder.Shape(lanes=2, width=3, group_size=3, columns=16, prefill=2)
    sampling = decoding.Sampling(top_p=0.9, top_k=5).per_prompt(2)
    requests = decoder.Requests(
        np.ones((2, 24), np.int32),
        np.full(2, 9),
        np.full(2, 16),
        sampling,
        np.arange(2),
        np.int32(2),
    )
    text = decoder.decode.lower(params, requests, KEY, config=config, shape=shape).as_text()
    assert "1031" in text
    assert "stablehlo.sort" not in text
    assert "x24x1031x" not in text


@pytest.mark.slow
def test_bfloat16_decodes_long_shared_prompts():
    """Some orders of a matrix product's axes do not run in bfloat16 on CPU, from some size on."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16", head_dim=16, num_layers=1)
    params = decoding.layout(init(config, jax.random.key(0)), config)
    rollout = decoding.generate(
        params,
        config,
        [list(range(40)) * 2, [1, 2]],
        key=KEY,
        sampling=RANDOM,
        samples_per_prompt=8,
        max_new_tokens=4,
    )
    assert len({tuple(r) for r in responses(rollout)[:8]}) > 1
    assert np.all(np.asarray(rollout.logprobs)[np.asarray(rollout.mask)] < 0)


def test_a_rollout_is_made_again_from_its_samples(params, prompts):
    rollout = generate(params, prompts)
    samples = decoding.samples_of(rollout)
    again = decoding.rollout_of(samples, prompts, 4)
    assert jax.tree.structure(again) == jax.tree.structure(rollout)
    for made, first in zip(jax.tree.leaves(again), jax.tree.leaves(rollout), strict=True):
        np.testing.assert_array_equal(made, first)
    empty = decoding.no_samples(*rollout.tokens.shape)
    for name, array in samples.items():
        assert (empty[name].shape, empty[name].dtype) == (array.shape, array.dtype), name
    assert empty.keys() == samples.keys()
