import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from spark_jax.training import optimizer


def rates(**config):
    schedule = optimizer.make_schedule(config)
    return np.array([float(schedule(i)) for i in range(12)])


def test_warmup_is_a_line_to_the_peak_that_does_not_start_at_zero():
    got = rates(learning_rate=0.4, warmup_steps=3)
    np.testing.assert_allclose(got[:5], [0.1, 0.2, 0.3, 0.4, 0.4], rtol=1e-6)


def test_cosine_and_linear_fall_to_the_end_fraction_and_stay():
    common = {"learning_rate": 2.0, "warmup_steps": 2, "total_steps": 10, "end_fraction": 0.1}
    share = np.clip((np.arange(12) - 2) / 8, 0, 1)[2:]
    linear = rates(schedule="linear", **common)[2:]
    cosine = rates(schedule="cosine", **common)[2:]
    np.testing.assert_allclose(linear, 2.0 * (1 - 0.9 * share), rtol=1e-5)
    np.testing.assert_allclose(
        cosine, 2.0 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * share))), rtol=1e-5
    )


def test_adamw_equals_the_textbook_with_clipping_and_no_decay_of_norms_and_biases():
    config = ml_collections.ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 0.1,
            "b1": 0.8,
            "b2": 0.9,
            "eps": 1e-3,
            "weight_decay": 0.5,
            "clip_norm": 1.0,
            "momentum": None,
        }
    )
    rng = np.random.default_rng(0)
    names = ("query", "query_bias", "mlp_norm")
    params = {name: rng.normal(size=(2, 3)).astype(np.float32) for name in names}
    transformation = optimizer.make(config)
    got = jax.tree.map(jnp.asarray, params)
    opt_state = transformation.init(got)
    first = second = {name: 0.0 for name in names}
    for step in range(1, 4):
        grads = {name: 3 * rng.normal(size=(2, 3)).astype(np.float32) for name in names}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert norm > 1
        first = {n: 0.8 * first[n] + 0.2 * grads[n] / norm for n in names}
        second = {n: 0.9 * second[n] + 0.1 * (grads[n] / norm) ** 2 for n in names}
        for n in names:
            move = (first[n] / (1 - 0.8**step)) / (np.sqrt(second[n] / (1 - 0.9**step)) + 1e-3)
            decay = 0.5 * params[n] if n == "query" else 0.0
            params[n] = params[n] - 0.1 * (move + decay)
        updates, opt_state = transformation.update(grads, opt_state, got)
        got = optax.apply_updates(got, updates)
    for n in names:
        np.testing.assert_allclose(got[n], params[n], rtol=2e-5, atol=2e-6)


def test_accumulator_dtype_reaches_the_moments():
    for name in ("adamw", "lion", "sgd"):
        extra = {"momentum": 0.9} if name == "sgd" else {}
        made = optimizer.make(
            {"name": name, "learning_rate": 1e-3, "accumulator_dtype": "bfloat16", **extra}
        )
        dtypes = {x.dtype.name for x in jax.tree.leaves(made.init({"w": jnp.ones((2, 2))}))}
        assert "bfloat16" in dtypes


def test_narrow_moments_train_like_wide_ones():
    """The first moment in bfloat16; parameters and second moment, whose steps of a thousandth
    bfloat16 would round away, in float32."""
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
    ends = {}
    for dtype in ("float32", "bfloat16"):
        made = optimizer.make({"learning_rate": 1e-2, "accumulator_dtype": dtype})
        params = {"w": jnp.zeros((8, 8))}
        state = made.init(params)
        for _ in range(50):
            updates, state = made.update({"w": params["w"] - target}, state, params)
            params = optax.apply_updates(params, updates)
        adam = state[0]
        assert (adam.mu["w"].dtype.name, adam.nu["w"].dtype.name) == (dtype, "float32")
        assert params["w"].dtype.name == "float32"
        ends[dtype] = params["w"]
    moved = jnp.abs(ends["float32"]).max()
    np.testing.assert_allclose(ends["bfloat16"], ends["float32"], atol=0.03 * moved)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "adamwx", "learning_rate": 1.0}, r"'adamwx'.*adafactor.*adam.*sgd"),
        ({"name": "sgd", "learning_rate": 1.0, "b1": 0.9}, r"'sgd' does not take \['b1'\]"),
        ({"learning_rate": 1.0, "weigth_decay": 0.1}, r"weigth_decay.*takes.*weight_decay"),
        ({"name": "adam"}, "learning_rate is missing"),
        ({"learning_rate": 1.0, "clip_norm": 0.0}, r"clip_norm=0\.0 must be positive"),
        ({"learning_rate": 1.0, "schedule": "square"}, r"'square'.*constant.*cosine.*linear"),
        ({"learning_rate": 1.0, "schedule": "cosine"}, "total_steps=None"),
        (
            {"learning_rate": 1.0, "schedule": "linear", "warmup_steps": 5, "total_steps": 5},
            "total_steps greater than warmup_steps=5",
        ),
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0"),
        ({"learning_rate": 1.0, "warmup_steps": -2}, "warmup_steps=-2"),
    ],
)
def test_bad_configuration_is_refused_with_the_choices(config, message):
    with pytest.raises(ValueError, match=message):
        optimizer.make(config)
