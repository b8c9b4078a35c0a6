"""Packed policy steps are the unpacked ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import CONFIG, params

from spark_jax.training import state as train_state
from spark_jax.training.packing import first_fit, pack_policy_batch
from spark_jax.training.policy import Objective, PolicyBatch, policy_step

ROWS, PROMPT, LENGTH = 8, 5, 9
EVERY_TERM = {"kl_coefficient": 0.3, "entropy_coefficient": 0.2, "clip_low": 0.1, "clip_high": 0.3}
OBJECTIVES = [
    Objective(aggregation="token_mean", **EVERY_TERM),
    Objective(aggregation="sequence_mean", **EVERY_TERM),
    Objective(aggregation="sequence_mean", importance="sequence", **EVERY_TERM),
    Objective(aggregation="sequence_sum_const", sequence_constant=LENGTH, **EVERY_TERM),
    Objective(),
]
SGD = optax.sgd(0.1)
STEP = jax.jit(
    policy_step, static_argnames=("model_config", "optimizer", "objective", "accumulation_steps")
)


def ragged_batch(seed=0):
    """Prompts of 1 to 5 tokens, responses of 1 to 9, one without any; nan under the masks."""
    rng = np.random.default_rng(seed)
    mask = np.arange(LENGTH) < np.array([9, 1, 4, 0, 2, 6, 3, 1])[:, None]
    prompt_mask = np.arange(PROMPT) >= np.array([0, 3, 1, 2, 0, 3, 4, 2])[:, None]
    values = {
        name: jnp.asarray(np.where(mask, rng.normal(size=mask.shape) + shift, np.nan), jnp.float32)
        for name, shift in (("old_logprobs", -2), ("ref_logprobs", -2), ("advantages", 0))
    }
    return PolicyBatch(
        prompt_tokens=jnp.asarray(rng.integers(0, 11, (ROWS, PROMPT))),
        prompt_mask=jnp.asarray(prompt_mask),
        tokens=jnp.asarray(rng.integers(0, 11, (ROWS, LENGTH))),
        mask=jnp.asarray(mask),
        **values,
    )


def one_step(batch, objective, **options):
    state = train_state.create(params(), SGD, jax.random.key(0))
    return STEP(state, batch, model_config=CONFIG, optimizer=SGD, objective=objective, **options)


FAST = [(OBJECTIVES[2], 23, 2)]  # tokens and sequences have their weights from NumPy, below
SLOW = [(o, length, steps) for o in OBJECTIVES for length, steps in ((None, 1), (23, 2))]


@pytest.mark.parametrize(
    ("objective", "length", "accumulation_steps"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case not in FAST)],
    ids=lambda x: f"{x.aggregation}-{x.importance}" if isinstance(x, Objective) else None,
)
def test_packed_update_and_metrics_equal_the_unpacked(objective, length, accumulation_steps):
    batch = ragged_batch()
    packed = pack_policy_batch(batch, objective, length=length, rows_multiple_of=accumulation_steps)
    assert len(packed.tokens) < ROWS
    whole, metrics = one_step(batch, objective)
    got, got_metrics = one_step(packed, objective, accumulation_steps=accumulation_steps)
    assert metrics.keys() == got_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(got_metrics[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    moved = 0.0
    for a, b, old in zip(*map(jax.tree.leaves, (whole.params, got.params, params())), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
        moved += np.sum((np.asarray(a) - np.asarray(old)) ** 2)
    assert moved > 1e-4


def test_every_sequence_is_there_whole_and_once_with_what_belongs_to_it():
    batch = jax.tree.map(np.asarray, ragged_batch())
    packed = pack_policy_batch(batch, Objective(aggregation="sequence_mean"))
    found = []
    for row in range(len(packed.tokens)):
        for segment in range(1, packed.segment_ids[row].max() + 1):
            here, scored = packed.segment_ids[row] == segment, packed.sequences[row] == segment
            assert (packed.segment_ids[row, packed.index[row, scored]] == segment).all()
            response = packed.tokens[row, packed.index[row, scored]]
            np.testing.assert_allclose(packed.weights[row, scored].sum(), 1 / 7, rtol=1e-6)
            fields = (packed.old_logprobs, packed.ref_logprobs, packed.advantages)
            found.append(
                (packed.tokens[row, here], response, *(field[row, scored] for field in fields))
            )
    expected = []
    for b in np.flatnonzero(batch.mask.any(axis=1)):
        prompt, response = (
            batch.prompt_tokens[b, batch.prompt_mask[b]],
            batch.tokens[b, batch.mask[b]],
        )
        fields = (batch.old_logprobs, batch.ref_logprobs, batch.advantages)
        expected.append(
            (np.concatenate([prompt, response]), response, *(f[b, batch.mask[b]] for f in fields))
        )
    assert sorted(map(str, found)) == sorted(map(str, expected))
    assert not packed.weights[packed.sequences == 0].any()


@pytest.mark.slow
def test_a_batch_without_tokens_changes_nothing():
    batch = ragged_batch()
    packed = pack_policy_batch(batch.replace(mask=jnp.zeros_like(batch.mask)), Objective())
    after, metrics = one_step(packed, Objective())
    assert float(metrics["loss"]) == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, params())


def test_shapes_come_from_few_rungs():
    """200 batches of random lengths: at most 8 · 8 shapes, and little padding."""
    rng = np.random.default_rng(0)
    shapes, filled = set(), []
    b, prompt, new = 32, 16, 48
    zeros = np.zeros((b, new), np.float32)
    for _ in range(200):
        mask = np.arange(new) < rng.integers(1, new + 1, (b, 1))
        prompt_mask = np.arange(prompt) >= rng.integers(0, prompt, (b, 1))
        batch = PolicyBatch(np.zeros((b, prompt)), prompt_mask, zeros, mask, zeros, zeros)
        packed = pack_policy_batch(batch, Objective(), rows_multiple_of=2)
        m, n = packed.tokens.shape
        assert (n, m % 4, packed.index.shape[1] % 8) == (prompt + new, 0, 0)
        shapes.add((m, packed.index.shape[1]))
        filled.append((packed.segment_ids > 0).mean())
    assert len(shapes) <= 8
    assert np.mean(filled) > 0.8 > (prompt + new) / 2 / (prompt + new)


def test_first_fit_fills_rows_and_refuses_what_fits_none():
    rows = first_fit([5, 3, 9, 2, 4, 7, 2, 6], 12)
    assert rows == [[2, 1], [5, 0], [7, 4, 3], [6]]
    assert first_fit([], 4) == []
    with pytest.raises(ValueError, match="a sequence has 9 tokens; rows of 8 cannot hold it"):
        first_fit([5, 9], 8)
    with pytest.raises(ValueError, match="a sequence has 14 tokens; rows of 10 cannot hold it"):
        pack_policy_batch(ragged_batch(), Objective(), length=10)
