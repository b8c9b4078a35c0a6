"""The shared update, on a quadratic loss whose gradient is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spark_jax.training import state as train_state
from spark_jax.training.update import accumulate_gradients, apply_update, in_micro_batches


def loss_function(params, inputs):
    x, weights = inputs
    error = x @ params["w"]
    return jnp.sum(weights * error**2), (error, weights)


def problem(rows=12):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    weights = rng.uniform(size=rows).astype(np.float32)
    return {"w": jnp.asarray([1.0, -2.0, 0.5])}, (jnp.asarray(x), jnp.asarray(weights))


@pytest.mark.parametrize("steps", [1, 2, 3, 12])
def test_gradient_is_the_closed_form_and_rows_keep_their_order(steps):
    params, (x, weights) = problem()
    loss, grads, (error, seen) = accumulate_gradients(loss_function, params, (x, weights), steps)
    x64, w64, p64 = (np.asarray(a, np.float64) for a in (x, weights, params["w"]))
    np.testing.assert_allclose(loss, (w64 * (x64 @ p64) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(grads["w"], 2 * x64.T @ (w64 * (x64 @ p64)), rtol=1e-5)
    np.testing.assert_allclose(error, x64 @ p64, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(seen, weights)


@pytest.mark.parametrize("steps", [1, 3, 12])
def test_micro_batches_give_what_the_batch_gives_in_its_order(steps):
    params, (x, weights) = problem()

    def function(rows):
        x, weights = rows
        return {"error": x @ params["w"], "weights": 2 * weights}

    got = in_micro_batches(function, (x, weights), steps)
    np.testing.assert_allclose(got["error"], x @ params["w"], rtol=1e-6)
    np.testing.assert_array_equal(got["weights"], 2 * weights)
    with pytest.raises(ValueError, match="steps=5 does not divide the batch of 12 rows"):
        in_micro_batches(function, (x, weights), 5)


def test_bfloat16_parameters_accumulate_in_float32_and_keep_their_dtype():
    # 256 gradients of 1 stop growing at 256 in bfloat16 (8 bits); 512 of them show it.
    params = {"w": jnp.zeros(3, jnp.bfloat16)}

    def linear(params, x):
        return jnp.sum(x @ params["w"].astype(jnp.float32)), ()

    _, grads, _ = accumulate_gradients(linear, params, jnp.ones((512, 3)), 512)
    assert grads["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(grads["w"].astype(jnp.float32), 512.0)


@pytest.mark.parametrize("steps", [0, 5, 24])
def test_impossible_split_names_the_numbers(steps):
    params, batch = problem()
    with pytest.raises(ValueError, match=rf"accumulation_steps={steps} .* batch of 12 rows"):
        accumulate_gradients(loss_function, params, batch, steps)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])  # 1e30: the square overflows
def test_non_finite_update_is_skipped_bit_for_bit_and_the_next_one_trains(bad):
    params, (x, weights) = problem()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    state = train_state.create(params, optimizer, jax.random.key(0))
    step = jax.jit(lambda s, b: apply_update(s, b, loss_function, optimizer, 3))
    state, _, _ = step(state, (x, weights))

    after, _, metrics = step(state, (x.at[5, 1].set(bad), weights))
    assert (int(after.step), int(after.skipped)) == (2, 1)
    assert float(metrics["update_skipped"]) == 1
    for new, old in zip(
        jax.tree.leaves((after.params, after.opt_state)),
        jax.tree.leaves((state.params, state.opt_state)),
        strict=True,
    ):
        assert new.dtype == old.dtype
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes()

    good, _, metrics = step(after, (x, weights))
    expected, _, _ = step(state, (x, weights))
    assert (int(good.step), int(good.skipped)) == (3, 1)
    assert float(metrics["update_skipped"]) == 0
    np.testing.assert_array_equal(good.params["w"], expected.params["w"])
    assert not np.array_equal(good.params["w"], state.params["w"])


def test_grad_norm_is_the_one_before_clipping():
    params, batch = problem()
    optimizer = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    state = train_state.create(params, optimizer, jax.random.key(0))
    after, _, metrics = apply_update(state, batch, loss_function, optimizer)
    _, grads, _ = accumulate_gradients(loss_function, params, batch)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(grads["w"]), rtol=1e-6)
    moved = np.linalg.norm(np.asarray(after.params["w"]) - np.asarray(params["w"]))
    np.testing.assert_allclose(moved, 1e-3, rtol=1e-3)


def test_state_can_be_donated_and_typed_or_raw_keys_pass_through():
    params, batch = problem()
    optimizer = optax.adamw(0.1)
    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        state = train_state.create(jax.tree.map(jnp.copy, params), optimizer, key)
        step = jax.jit(
            lambda s, b: apply_update(s, b, loss_function, optimizer)[0], donate_argnums=0
        )
        keys = [jax.random.normal(jax.random.fold_in(state.key, state.step))]
        for _ in range(2):
            state = step(state, batch)
            keys.append(jax.random.normal(jax.random.fold_in(state.key, state.step)))
        assert int(state.step) == 2
        assert len({float(k) for k in keys}) == 3
