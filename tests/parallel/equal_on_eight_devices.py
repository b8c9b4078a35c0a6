"""Run by test_sharding.py in a process with eight CPU devices: a mesh computes what one device
does, and gathers nothing that it need not."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import params as tiny_params

from spark_jax import decoding, scoring
from spark_jax.decoding import Sampling, decoder, generate
from spark_jax.decoding.generate import prepare
from spark_jax.models import attention, transformer
from spark_jax.models.config import ModelConfig
from spark_jax.parallel import mesh as meshes
from spark_jax.parallel import sharding
from spark_jax.training import optimizer, state
from spark_jax.training.policy import Objective, PolicyBatch, policy_step
from spark_jax.training.sft import SFTBatch, sft_step

# No length of an array that is spread equals another's, nor a part of another's.
ROWS, PROMPT, TOKENS, VOCABULARY = 24, 7, 10, 104
UNTIED = ModelConfig(
    vocab_size=VOCABULARY,
    width=16,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    mlp_width=40,
    tied_embeddings=False,
    qkv_bias=True,
)
TIED = dataclasses.replace(UNTIED, tied_embeddings=True, qkv_bias=False, qk_norm=True)
MULTI_QUERY = dataclasses.replace(TIED, num_kv_heads=1)
IN_INT8 = dataclasses.replace(UNTIED, cache_dtype="int8")
GRID = {
    "8x1x1": (8, 1, 1),
    "2x2x2": (2, 2, 2),
    "1x4x2": (1, 4, 2),
    "1x1x8": (1, 1, 8),
}
CONFIGS = (("untied", UNTIED), ("tied", TIED), ("multi_query", MULTI_QUERY))
ADAM = optimizer.make(dict(name="adamw", learning_rate=1e-2, clip_norm=1.0, weight_decay=0.1))


def make_mesh(name):
    return meshes.make_mesh(dict(zip(sharding.MESH_AXES, GRID[name], strict=True)))


def spread(params, config, mesh):
    axes = transformer.logical_axes(config)
    return jax.device_put(params, sharding.named_shardings(axes, params, mesh))


@functools.cache
def policy_batch():
    rng = np.random.default_rng(0)
    response = (ROWS, TOKENS)
    return PolicyBatch(
        prompt_tokens=rng.integers(1, VOCABULARY, (ROWS, PROMPT)),
        prompt_mask=np.arange(PROMPT) >= rng.integers(0, PROMPT - 1, ROWS)[:, None],
        tokens=rng.integers(1, VOCABULARY, response),
        mask=np.arange(TOKENS) < rng.integers(0, TOKENS + 1, ROWS)[:, None],
        old_logprobs=rng.normal(size=response).astype(np.float32) - 4,
        advantages=rng.normal(size=response).astype(np.float32),
        ref_logprobs=rng.normal(size=response).astype(np.float32) - 4,
    )


def score(params, batch, config):
    """(loss, (log-probs, entropies, logits of some tokens)); chunks are not full."""
    logprobs, entropy = scoring.response_logprobs_and_entropy(
        params, config, batch.prompt_tokens, batch.prompt_mask, batch.tokens, batch.mask, chunk=16
    )
    hidden = transformer.forward(params, config, batch.tokens)
    logits = transformer.logits(params, config, hidden[:, -1])
    return jnp.sum(logprobs * batch.advantages + entropy), (logprobs, entropy, logits)


def close(got, expected, tolerance=1e-5):
    """Up to a share of each array's largest number, since sums of many have an error of that."""

    def check(a, b):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, atol=tolerance * max(np.abs(b).max(initial=0), 1.0))

    jax.tree.map(check, got, expected)


@functools.cache
def scored_by_one(config):
    compute = jax.value_and_grad(functools.partial(score, config=config), has_aux=True)
    return jax.jit(compute)(tiny_params(config), policy_batch())


@pytest.mark.slow  # three updates, below, have them
@pytest.mark.parametrize(
    ("name", "config"),
    [
        pytest.param(name, config, id=f"{name}-{label}")
        for name in GRID
        for label, config in CONFIGS
        if label == "untied" or name in ("2x2x2", "1x1x8")
    ],
)
def test_scores_and_gradients(name, config):
    mesh = make_mesh(name)
    compute = jax.value_and_grad(functools.partial(score, config=config), has_aux=True)
    params = spread(tiny_params(config), config, mesh)
    batch = jax.device_put(policy_batch(), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        got = jax.jit(compute)(params, batch)
    close(got, scored_by_one(config))


def train(step, config, batch, mesh=None, updates=3):
    """The state and the metrics of every update, and the compiled step."""
    # Copied, since the step frees what it is given.
    params = jax.tree.map(jnp.copy, tiny_params(config))
    first = state.create(params, ADAM, jax.random.key(0))
    how = {}
    if mesh is not None:
        places = state.state_shardings(first, config, mesh)
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        first = jax.device_put(first, places)
        how = {"out_shardings": (places, sharding.replicated(mesh))}
    step = functools.partial(step, model_config=config, optimizer=ADAM, accumulation_steps=3)
    compiled = jax.jit(step, donate_argnums=0, **how).lower(first, batch).compile()
    metrics = []
    for _ in range(updates):
        first, values = compiled(first, batch)
        metrics.append(jax.device_get(values))
    return jax.device_get((first.params, first.opt_state)), metrics, compiled


STEPS = {
    "policy": functools.partial(
        policy_step, objective=Objective(kl_coefficient=0.1, entropy_coefficient=0.1)
    ),
    "sft": sft_step,
}


@functools.cache
def batch_for(work):
    if work == "policy":
        return policy_batch()
    rng = np.random.default_rng(1)
    whole = (ROWS, 2 * TOKENS)
    packed = np.broadcast_to(np.repeat([1, 2, 0], [8, 9, 3]), whole).astype(np.int32)
    return SFTBatch(
        tokens=rng.integers(1, VOCABULARY, whole),
        loss_mask=rng.random(whole) < 0.5,
        segment_ids=packed,
    )


@functools.cache
def trained_by_one(work, config):
    return train(STEPS[work], config, batch_for(work))[:2]


@functools.cache
def trained(work, name, config):
    mesh = make_mesh(name)
    with jax.set_mesh(mesh):
        return train(STEPS[work], config, batch_for(work), mesh)


@pytest.mark.parametrize(
    ("work", "name", "config"),
    [
        # Only the policy step, which has all of the other, in fast tests.
        pytest.param("policy", "2x2x2", UNTIED, id="policy-2x2x2-untied"),
        *(
            pytest.param(work, name, config, id=f"{work}-{name}-{label}", marks=pytest.mark.slow)
            for work in STEPS
            for name, config, label in (
                ("8x1x1", UNTIED, "untied"),
                ("1x4x2", TIED, "tied"),
                ("1x1x8", UNTIED, "untied"),
                ("1x1x8", MULTI_QUERY, "multi_query"),
            )
        ),
        pytest.param("sft", "2x2x2", TIED, id="sft-2x2x2-tied", marks=pytest.mark.slow),
    ],
)
def test_three_updates(work, name, config):
    """Adam's first steps are as large for the least gradient as for the greatest: where one is all
    rounding they differ, by as much as they are large."""
    (params, moments), metrics, _ = trained(work, name, config)
    (expected_params, expected_moments), expected_metrics = trained_by_one(work, config)
    close(metrics, expected_metrics, 2e-5)
    close(moments, expected_moments, 2e-5)
    close(params, expected_params, 2e-4)


PROMPTS = [
    np.random.default_rng(i).integers(1, VOCABULARY, 3 + (5 * i) % 7).tolist() for i in range(13)
]
TEMPLATE = np.random.default_rng(99).integers(1, VOCABULARY, 64).tolist()
REQUESTS = {
    "all_at_once": (PROMPTS[:5], dict(samples_per_prompt=4)),
    "few_prompts": (PROMPTS[:1], dict(samples_per_prompt=12)),
    "in_turn": (
        PROMPTS,
        dict(samples_per_prompt=3, slots=6, max_new_tokens=[3 + i for i in range(13)]),
    ),
    "after_a_template": (
        [TEMPLATE + prompt for prompt in PROMPTS[:9]],
        dict(samples_per_prompt=4, slots=12),
    ),
}


# Rows in turn on every mesh, the other kinds on two.
DECODED = {("in_turn", name) for name in GRID}
DECODED |= {(kind, name) for kind in REQUESTS for name in ("2x2x2", "1x4x2")}


def decode(kind, config, mesh=None):
    prompts, how = REQUESTS[kind]
    params = tiny_params(config)
    if mesh is not None:
        params = spread(params, config, mesh)
    return generate(
        decoding.layout(params, config),
        config,
        prompts,
        key=jax.random.key(3),
        sampling=Sampling(temperature=1.5, top_p=0.95, top_k=60, stop_ids=(5, 6, 7, 8)),
        **{"max_new_tokens": 9} | how,
    )


decode_by_one = functools.cache(decode)


@pytest.mark.parametrize(
    ("kind", "name", "config"),
    [
        pytest.param(
            kind,
            name,
            config,
            id=f"{kind}-{name}-kv{config.num_kv_heads}-{config.cache_dtype or 'exact'}",
            marks=[]
            if (kind, name, config) == ("in_turn", "2x2x2", UNTIED)
            else [pytest.mark.slow],
        )
        for kind in REQUESTS
        for name in GRID
        for config in (UNTIED, MULTI_QUERY, IN_INT8)
        if (kind, name) in DECODED
        if config is UNTIED or (kind, name) in (("in_turn", "2x2x2"), ("in_turn", "1x1x8"))
    ],
)
def test_decoding_draws_the_same_tokens(kind, name, config):
    expected = decode_by_one(kind, config)
    mesh = make_mesh(name)
    with jax.set_mesh(mesh):
        got = decode(kind, config, mesh)
    np.testing.assert_array_equal(got.mask, expected.mask)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.finished, expected.finished)
    np.testing.assert_array_equal(got.prompt_tokens, expected.prompt_tokens)
    assert got.group_size == expected.group_size
    close(got.logprobs, expected.logprobs, 3e-5)
    close(got.sampling_logprobs, expected.sampling_logprobs, 3e-5)
    assert isinstance(got.tokens, np.ndarray)  # whole, on every process
    slots = REQUESTS[kind][1].get("slots", 1)
    assert int(got.decode_steps) <= 2 * int(expected.decode_steps) or slots < mesh.size


def collectives(text):
    """(kind, lengths of every result) of all that devices tell each other."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for line in text.splitlines():
        found = re.search(rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", line)
        if found:
            for lengths in re.findall(r"\w+\[([\d,]*)\]", found[1]):
                yield found[2], [int(n) for n in lengths.split(",") if n]


def test_a_train_step_gathers_weights_alone():
    """The whole batch, or the whole vocabulary's scores, are on no device; gradients and moments
    lie where their parameters do, and are updated in place."""
    *_, compiled = trained("policy", "2x2x2", UNTIED)
    text = compiled.as_text()
    lengths = {int(n) for shape in re.findall(r"f32\[([\d,]+)\]", text) for n in shape.split(",")}
    assert not lengths & {VOCABULARY, ROWS}
    assert {VOCABULARY // 2, UNTIED.mlp_width // 2} <= lengths
    head = VOCABULARY // 2 * UNTIED.width
    gathered = [math.prod(x) for kind, x in collectives(text) if kind == "all-gather"]
    assert head in gathered
    assert max(gathered) == head
    whole = trained_by_one("policy", UNTIED)[0]
    bytes_of_one = sum(x.nbytes for x in jax.tree.leaves(whole))
    assert bytes_of_one / 5 <= compiled.memory_analysis().alias_size_in_bytes <= bytes_of_one / 3


def decode_work(kind, config, mesh):
    prompts, how = REQUESTS[kind]
    with jax.set_mesh(mesh):
        return prepare(config, prompts, sampling=Sampling(), **{"max_new_tokens": 9} | how)


def decode_program(kind, name, config):
    mesh = make_mesh(name)
    work = decode_work(kind, config, mesh)
    with jax.set_mesh(mesh):
        params = spread(tiny_params(config), config, mesh)
        key = jax.random.key(0)
        run = decoder.decode.lower(params, work.requests, key, config=config, shape=work.shape)
    return run.compile().as_text()


@pytest.mark.slow
def test_a_decode_step_gathers_neither_cache_nor_weights():
    """Prompts are prefilled where they are decoded, and what a step tells other devices is of its
    own tokens: their activations, scores, and what was drawn."""
    text = decode_program("in_turn", "2x2x2", UNTIED)
    work = decode_work("in_turn", UNTIED, make_mesh("2x2x2"))
    slots = work.shape.lanes * work.shape.width
    # Whole rows of scores are of the slots that a device draws for.
    shapes = re.findall(r"f32\[([\d,]+)\]", text)
    scores = [x for x in ([int(n) for n in y.split(",")] for y in shapes) if VOCABULARY in x]
    assert max(map(math.prod, scores)) == VOCABULARY * slots // 8
    # Weights are gathered for a prefill alone, once; in a step activations are summed instead.
    weights = [UNTIED.width, UNTIED.mlp_width // 2]
    assert list(collectives(text)).count(("all-gather", weights)) == 2
    # No device has the keys of all lanes or slots, or of all heads.
    lengths = f"{work.shape.columns}|{work.requests.tokens.shape[1]}"
    keys = re.findall(rf"f32\[2,(\d+),(\d+),4,(?:{lengths})\]", text)
    assert max(int(lanes) for lanes, _ in keys) == slots // 4
    assert {int(heads) for _, heads in keys} == {UNTIED.num_kv_heads // 2}


def test_work_prepared_for_another_mesh_is_refused():
    work = prepare(UNTIED, PROMPTS, sampling=Sampling(), max_new_tokens=4)
    mesh = make_mesh("2x2x2")
    params = spread(tiny_params(UNTIED), UNTIED, mesh)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"for 1 devices.*data\*fsdp=4"):
        decoder.decode(params, work.requests, jax.random.key(0), config=UNTIED, shape=work.shape)


def test_rows_that_the_mesh_does_not_divide_are_refused():
    """18 rows are, in three micro-batches of 6; four devices do not share those."""
    train_state = state.create(tiny_params(UNTIED), ADAM, jax.random.key(0))
    step = functools.partial(
        STEPS["policy"], model_config=UNTIED, optimizer=ADAM, accumulation_steps=3
    )
    batch = jax.tree.map(lambda x: x[:18], policy_batch())
    jax.eval_shape(step, train_state, batch)
    with jax.set_mesh(make_mesh("2x2x2")), pytest.raises(ValueError, match=r"\(6,.*data\*fsdp'=4"):
        jax.eval_shape(step, train_state, batch)


@pytest.mark.parametrize("kv_heads", [pytest.param(4, marks=pytest.mark.slow), 2])
def test_a_kernel_runs_on_each_device_for_its_heads(kv_heads, monkeypatch):
    """Where KV heads are fewer than the devices they are spread over, each has those it needs."""
    kernel = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, implementation, **how: kernel(*a, **how)
    )
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(4, 12, heads, 4)), jnp.float32)
        for heads in (8, kv_heads, kv_heads)
    )
    segments = jnp.asarray(np.repeat([[1, 2, 0]], [5, 5, 2], axis=1).repeat(4, axis=0))

    def run(name):
        return attention.causal(segments, name, q.dtype)(q, k, v, None)

    expected = jax.jit(run, static_argnums=0)("dense")
    with jax.set_mesh(meshes.make_mesh({"data": 2, "tensor": 4})):
        close(jax.jit(run, static_argnums=0)("cudnn"), expected)
