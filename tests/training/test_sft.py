from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import CONFIG, params

from spark_jax.models import transformer
from spark_jax.training import state as train_state
from spark_jax.training.sft import (
    SFTBatch,
    index_targets,
    pack,
    sft_step,
    target_mask,
)

ROWS, LENGTH = 6, 9


def ragged_batch():
    """Targets from 0 to 7 a row, so that a mean of means is far from the mean."""
    rng = np.random.default_rng(0)
    mask = np.arange(LENGTH) >= np.array([1, 8, 9, 3, 5, 7])[:, None]
    mask[0, 0] = True  # has nothing before it: not a target
    mask[3, 8] = False
    return SFTBatch(
        tokens=jnp.asarray(rng.integers(0, 11, (ROWS, LENGTH))), loss_mask=jnp.asarray(mask)
    )


def packed_batch():
    """Each row: two sequences and padding."""
    batch = ragged_batch()
    ids = np.repeat([[1, 1, 1, 1, 2, 2, 2, 0, 0]], ROWS, axis=0)
    return batch.replace(segment_ids=jnp.asarray(ids), loss_mask=jnp.ones((ROWS, LENGTH), bool))


SGD = optax.sgd(0.3)
STEP = jax.jit(
    partial(sft_step, model_config=CONFIG, optimizer=SGD), static_argnames="accumulation_steps"
)


@partial(jax.jit, static_argnames="chunk")
def loss_of(params, batch, chunk=None):
    state = train_state.create(params, SGD, jax.random.key(0))
    return sft_step(state, batch, model_config=CONFIG, optimizer=SGD, chunk=chunk)[1]["loss"]


@jax.jit
def full_scores(params, tokens):
    hidden = transformer.forward(params, CONFIG, tokens[None])
    return transformer.logits(params, CONFIG, hidden)[0]


def full_logprobs(tokens):
    """[T, V] log-probabilities of one unpadded sequence, from the whole matrix of scores."""
    padded = np.pad(tokens, (0, LENGTH - len(tokens)))  # causal: what is added is not seen
    scores = np.asarray(full_scores(params(), padded), np.float64)[: len(tokens)]
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def test_loss_is_numpy_cross_entropy_over_the_whole_batch():
    batch = ragged_batch()
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.loss_mask)
    terms = []
    for b in range(ROWS):
        logprobs = full_logprobs(tokens[b])
        terms += [-logprobs[t - 1, tokens[b, t]] for t in range(1, LENGTH) if mask[b, t]]
    got = loss_of(params(), batch, chunk=5)
    np.testing.assert_allclose(got, np.mean(terms), rtol=1e-5)


def test_packed_sequences_cost_what_they_cost_apart():
    batch = packed_batch()
    tokens = np.asarray(batch.tokens)
    terms = []
    for b in range(ROWS):
        for part in (tokens[b, :4], tokens[b, 4:7]):
            logprobs = full_logprobs(part)
            terms += [-logprobs[t - 1, part[t]] for t in range(1, len(part))]
    assert int(target_mask(batch).sum()) == len(terms)
    got = loss_of(params(), batch)
    np.testing.assert_allclose(got, np.mean(terms), rtol=1e-5)


@pytest.mark.parametrize(
    ("make_batch", "steps"),
    [(ragged_batch, 6), pytest.param(packed_batch, 2, marks=pytest.mark.slow)],
)
def test_accumulated_update_equals_the_whole_one(make_batch, steps):
    state = train_state.create(params(), SGD, jax.random.key(0))
    whole, metrics = STEP(state, make_batch())
    split, split_metrics = STEP(state, make_batch(), accumulation_steps=steps)
    assert float(metrics["target_tokens"]) == float(target_mask(make_batch()).sum())
    for name, value in metrics.items():
        np.testing.assert_allclose(split_metrics[name], value, rtol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(split.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_training_learns_the_targets_and_nothing_else():
    batch = ragged_batch()
    optimizer = optax.adam(1e-2)
    own = jax.tree.map(jnp.copy, params())
    state = train_state.create(own, optimizer, jax.random.key(0))
    step = jax.jit(partial(sft_step, model_config=CONFIG, optimizer=optimizer), donate_argnums=0)
    losses = []
    for _ in range(200):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 2
    assert losses[-1] < 0.5
    # Tokens after the last target have no influence: changing them changes no gradient.
    other = batch.replace(tokens=batch.tokens.at[3, 8].set((batch.tokens[3, 8] + 1) % 11))
    np.testing.assert_array_equal(
        loss_of(state.params, other),
        loss_of(state.params, batch),
    )


def test_a_batch_without_targets_changes_nothing():
    batch = ragged_batch()
    state = train_state.create(params(), SGD, jax.random.key(0))
    empty = batch.replace(loss_mask=jnp.zeros_like(batch.loss_mask))
    after, metrics = STEP(state, empty)
    assert float(metrics["loss"]) == 0
    assert float(metrics["grad_norm"]) == 0
    assert int(after.skipped) == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def padded_examples(lengths, width, seed=0):
    """Rows as `tokenize_examples` makes them: some prompt, a target up to the end, padding."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths)[:, None]
    prompt = rng.integers(1, lengths)
    place = np.arange(width)
    return {
        "tokens": np.where(place < lengths, rng.integers(0, 11, (len(lengths), width)), 0),
        "loss_mask": (place >= prompt) & (place < lengths),
    }


def test_packing_changes_the_rows_and_not_the_loss():
    examples = padded_examples([5, 3, 9, 2, 4, 7, 2, 6], LENGTH)
    packed = pack(examples, 12)
    assert packed.tokens.shape == (4, 12)  # 38 tokens: as few rows as there can be
    apart = loss_of(params(), SFTBatch(**jax.tree.map(jnp.asarray, examples)))
    together = loss_of(params(), jax.tree.map(jnp.asarray, packed))
    np.testing.assert_allclose(together, apart, rtol=1e-5)


def test_packing_keeps_every_example_whole_and_once():
    lengths = np.random.default_rng(1).integers(2, 30, 200)
    examples = padded_examples(lengths, 29, seed=1)
    packed = pack(examples, 32)
    found = []
    for tokens, mask, ids in zip(packed.tokens, packed.loss_mask, packed.segment_ids):
        for segment in range(1, ids.max() + 1):
            found.append((tuple(tokens[ids == segment]), tuple(mask[ids == segment])))
        assert not mask[ids == 0].any()
    rows = zip(examples["tokens"], examples["loss_mask"], lengths)
    assert sorted(found) == sorted((tuple(t[:n]), tuple(m[:n])) for t, m, n in rows)
    assert len(packed.tokens) <= 1.1 * lengths.sum() / 32


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a sequence has 9 tokens; rows of 8 cannot hold it"):
        pack(padded_examples([5, 9], LENGTH), 8)


@pytest.mark.parametrize("make_batch", [ragged_batch, packed_batch])
def test_indexed_targets_give_the_same_loss(make_batch):
    batch = make_batch().replace(positions=None)
    indexed = index_targets(batch)
    got = loss_of(params(), jax.tree.map(jnp.asarray, indexed))
    np.testing.assert_allclose(got, loss_of(params(), batch), rtol=1e-5)
    for row, index in enumerate(indexed.target_index):
        expected = [t for t in range(1, LENGTH) if target_mask(batch)[row, t - 1]]
        assert index[index > 0].tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("make_batch", [ragged_batch, packed_batch])
def test_indexed_targets_give_the_same_update(make_batch):
    state = train_state.create(params(), SGD, jax.random.key(0))
    batch = make_batch().replace(positions=None)
    indexed = index_targets(batch)
    whole, metrics = STEP(state, batch)
    got, got_metrics = STEP(state, jax.tree.map(jnp.asarray, indexed), accumulation_steps=2)
    for name, value in metrics.items():
        np.testing.assert_allclose(got_metrics[name], value, rtol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(got.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_no_targets_at_all_have_an_index_too():
    batch = ragged_batch()
    empty = index_targets(batch.replace(loss_mask=jnp.zeros_like(batch.loss_mask)))
    assert not empty.target_index.any()
    assert float(loss_of(params(), jax.tree.map(jnp.asarray, empty))) == 0


def test_prompts_do_not_meet_the_vocabulary():
    """As many scores are made as rows have targets at most, rounded up to 8: 6 rows of 8."""
    batch = ragged_batch()
    indexed = jax.tree.map(jnp.asarray, index_targets(batch.replace(positions=None)))
    assert indexed.target_index.shape == (ROWS, 8)
    few = indexed.replace(target_index=indexed.target_index[:, :3])
    for rows, b in ((48, indexed), (18, few)):
        text = loss_of.lower(params(), b).as_text()
        assert f"tensor<{rows}x11xf32>" in text
        assert f"tensor<{ROWS * LENGTH}x11xf32>" not in text
