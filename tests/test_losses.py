"""Losses against loops, finite differences and closed forms, with garbage under the mask."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark_jax import losses

B, T = 6, 7
MAX_LENGTH = 11
AGGREGATIONS = ["token_mean", "sequence_mean", "sequence_sum_const"]


def make_batch(seed=0, spread=0.4):
    """Ragged rows, the last one empty, and ratios on both sides of both clips."""
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(1.0, (B, T)) - 0.1
    lengths = np.append(rng.integers(1, T + 1, B - 1), 0)
    return {
        "logprobs": logprobs,
        "old": logprobs + spread * rng.standard_normal((B, T)),
        "ref": logprobs + 0.5 * rng.standard_normal((B, T)),
        "entropy": rng.exponential(1.0, (B, T)),
        "advantages": rng.standard_normal((B, T)),
        "mask": np.arange(T) < lengths[:, None],
    }


def arrays(batch, dtype=jnp.float32):
    return {k: jnp.asarray(np.asarray(v, bool if k == "mask" else dtype)) for k, v in batch.items()}


def loop_weights(mask, aggregation):
    weights, rows = np.zeros((B, T)), sum(bool(row.any()) for row in mask)
    for b in range(B):
        for t in range(T):
            if mask[b, t]:
                weights[b, t] = {
                    "token_mean": 1 / mask.sum(),
                    "sequence_mean": 1 / mask[b].sum() / rows,
                    "sequence_sum_const": 1 / MAX_LENGTH / rows,
                }[aggregation]
    return weights


def loop_policy_gradient(batch, aggregation, low, high, importance="token"):
    loss, weights = 0.0, loop_weights(batch["mask"], aggregation)
    for b in range(B):
        gaps = [batch["logprobs"][b, t] - batch["old"][b, t] for t in range(T)
                if batch["mask"][b, t]]  # fmt: skip
        for t in range(T):
            if not batch["mask"][b, t]:
                continue
            gap = np.mean(gaps) if importance == "sequence" else gaps[t]
            ratio, advantage = np.exp(gap), batch["advantages"][b, t]
            clipped = min(max(ratio, 1 - low), 1 + high)
            loss -= weights[b, t] * min(ratio * advantage, clipped * advantage)
    return loss


def policy_gradient(batch, logprobs=None, **options):
    logprobs = batch["logprobs"] if logprobs is None else logprobs
    return _policy_gradient(logprobs, batch["old"], batch["advantages"], batch["mask"], **options)


_policy_gradient = jax.jit(
    losses.policy_gradient,
    static_argnames=("clip_low", "clip_high", "aggregation", "importance", "max_length"),
)
weights_of = jax.jit(
    functools.partial(losses.aggregation_weights, constant=MAX_LENGTH), static_argnums=1
)
cross_entropy = jax.jit(losses.cross_entropy, static_argnames=("aggregation", "max_length"))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_policy_gradient_is_the_loop(aggregation, importance):
    for seed in range(4):
        batch = make_batch(seed)
        actual, _ = policy_gradient(
            arrays(batch),
            clip_low=0.1,
            clip_high=0.3,
            aggregation=aggregation,
            importance=importance,
            max_length=MAX_LENGTH,
        )
        expected = loop_policy_gradient(batch, aggregation, 0.1, 0.3, importance)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def gradient_of(function, **how):
    return jax.jit(jax.grad(function, **how))


def central_differences(function, at, step=1e-6):
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        delta = np.zeros_like(at)
        delta[index] = step
        gradient[index] = (function(at + delta) - function(at - delta)) / (2 * step)
    return gradient


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_objective_gradient_is_the_finite_difference_in_float64(importance):
    """Value and gradient: the loss from the loop, KL and entropy terms written out here."""
    batch = make_batch(3)
    if importance == "sequence":  # GSPO and its token form agree where A is one per sequence
        batch["advantages"] = np.repeat(batch["advantages"][:, :1], T, axis=1)
    weights = loop_weights(batch["mask"], "sequence_mean")

    def expected(logprobs):
        surrogate = loop_policy_gradient(
            {**batch, "logprobs": logprobs}, "sequence_mean", 0.1, 0.3, importance
        )
        d = batch["ref"] - logprobs
        k3 = np.exp(d) - d - 1
        return surrogate + np.sum(weights * (0.7 * k3 - 0.2 * batch["entropy"]))

    with jax.enable_x64(True):
        data = arrays(batch, jnp.float64)

        def actual(logprobs):
            return losses.policy_objective(
                logprobs, data["old"], data["advantages"], data["mask"],
                ref_logprobs=data["ref"], entropy=data["entropy"],
                kl_coefficient=0.7, entropy_coefficient=0.2, clip_low=0.1, clip_high=0.3,
                aggregation="sequence_mean", importance=importance,
            )[0]  # fmt: skip

        value, gradient = jax.jit(jax.value_and_grad(actual))(data["logprobs"])
        gradient = np.asarray(gradient)
    np.testing.assert_allclose(value, expected(batch["logprobs"]), rtol=1e-6)
    differences = central_differences(expected, batch["logprobs"])
    np.testing.assert_allclose(gradient, differences, rtol=1e-5, atol=1e-7)
    assert np.count_nonzero(gradient) == batch["mask"].sum()


def test_entropy_gradient_is_minus_its_weight():
    data = arrays(make_batch())

    def objective(entropy):
        return losses.policy_objective(
            data["logprobs"], data["old"], data["advantages"], data["mask"],
            entropy=entropy, entropy_coefficient=0.2,
        )[0]  # fmt: skip

    expected = -0.2 * loop_weights(np.asarray(data["mask"]), "token_mean")
    np.testing.assert_allclose(gradient_of(objective)(data["entropy"]), expected, rtol=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_first_step_is_reinforce(aggregation, importance):
    """With π = π_old the gradient is −A ∇log π, weighted, for token and sequence ratios alike."""
    batch = make_batch(spread=0.0)
    data = arrays(batch)
    gradient = gradient_of(
        lambda logprobs: policy_gradient(
            data, logprobs, aggregation=aggregation, importance=importance, max_length=MAX_LENGTH
        )[0]
    )(data["logprobs"])
    expected = -loop_weights(batch["mask"], aggregation) * batch["advantages"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


def test_sequence_ratio_keeps_token_credit():
    """GSPO's token form: gradient −w · ρ_sequence · A_t, unclipped, with A_t free within a row."""
    batch = make_batch()
    data = arrays(batch)
    gradient = gradient_of(
        lambda logprobs: policy_gradient(
            data, logprobs, clip_low=0.99, clip_high=99.0, importance="sequence"
        )[0]
    )(data["logprobs"])
    expected = np.zeros((B, T))
    for b in range(B):
        valid = batch["mask"][b]
        ratio = np.exp(np.mean((batch["logprobs"] - batch["old"])[b, valid])) if valid.any() else 0
        expected[b, valid] = -ratio * batch["advantages"][b, valid] / batch["mask"].sum()
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


def test_clipping_removes_gradients_and_the_metrics_count_them():
    # One token each: unclipped; below with A < 0; below with A > 0; above with A > 0; above, A < 0.
    ratios, signs = np.array([[1.0, 0.5, 0.5, 1.5, 1.5]]), np.array([[1.0, -1.0, 1.0, 1.0, -1.0]])
    old = np.full((1, 5), -2.0, np.float32)
    logprobs, mask = jnp.asarray(old + np.float32(np.log(ratios))), jnp.ones((1, 5), bool)
    old = jnp.asarray(old)

    def objective(logprobs):
        return losses.policy_gradient(logprobs, old, jnp.array(signs), mask, clip_high=0.4)

    gradient, metrics = gradient_of(objective, has_aux=True)(logprobs)
    np.testing.assert_allclose(gradient, [[-0.2, 0.0, -0.1, 0.0, 0.3]], atol=1e-6)
    assert metrics["clip_fraction_low"] == pytest.approx(0.2)
    assert metrics["clip_fraction_high"] == pytest.approx(0.2)
    assert metrics["ratio_mean"] == pytest.approx(1.0)
    assert metrics["ratio_max"] == pytest.approx(1.5)
    assert metrics["approx_kl"] == pytest.approx(np.mean(ratios - 1 - np.log(ratios)), rel=1e-5)
    assert metrics["tokens"] == 5


@functools.partial(jax.jit, static_argnums=1)
def all_losses(data, importance):
    def objective(logprobs):
        return losses.policy_objective(
            logprobs, data["old"], data["advantages"], data["mask"],
            ref_logprobs=data["ref"], entropy=data["entropy"],
            kl_coefficient=0.1, entropy_coefficient=0.1, importance=importance,
        )  # fmt: skip

    return (
        jax.value_and_grad(objective, has_aux=True)(data["logprobs"]),
        losses.cross_entropy(data["logprobs"], data["mask"]),
        losses.sampler_gap(data["old"], data["logprobs"], data["mask"]),
    )


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_garbage_under_the_mask_reaches_nothing(importance, garbage):
    batch = make_batch()
    names = ["logprobs", "old", "advantages", "ref", "entropy"]
    dirty = {**batch, **{n: np.where(batch["mask"], batch[n], garbage) for n in names}}

    results = [all_losses(arrays(data), importance) for data in (batch, dirty)]
    jax.tree.map(np.testing.assert_array_equal, results[0], results[1])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(results[1]))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_are_the_loop_and_micro_batches_sum_to_the_whole(aggregation):
    batch = make_batch(1)
    data = arrays(batch)
    weights = np.asarray(weights_of(data["mask"], aggregation))
    np.testing.assert_allclose(weights, loop_weights(batch["mask"], aggregation), rtol=1e-6)

    @jax.jit
    def objective(rows, weights):
        def loss(logprobs):
            return losses.policy_objective(
                logprobs, rows["old"], rows["advantages"], rows["mask"],
                ref_logprobs=rows["ref"], entropy=rows["entropy"], kl_coefficient=0.1,
                entropy_coefficient=0.1, aggregation=aggregation, max_length=MAX_LENGTH,
                weights=weights,
            )[0] + losses.cross_entropy(
                logprobs, rows["mask"], aggregation=aggregation, max_length=MAX_LENGTH,
                weights=weights,
            )  # fmt: skip

        return jax.value_and_grad(loss)(rows["logprobs"])

    whole = objective(data, None)
    parts = [
        objective({k: np.asarray(v)[rows] for k, v in data.items()}, weights[rows])
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))  # unequal, the last with an empty row
    ]
    np.testing.assert_allclose(sum(value for value, _ in parts), whole[0], rtol=1e-5)
    np.testing.assert_allclose(
        np.concatenate([gradient for _, gradient in parts]), whole[1], rtol=1e-5, atol=1e-8
    )


def test_an_empty_batch_weighs_nothing():
    for aggregation in AGGREGATIONS:
        weights = losses.aggregation_weights(jnp.zeros((2, 3)), aggregation, constant=5)
        np.testing.assert_array_equal(weights, np.zeros((2, 3)))
    zeros = jnp.zeros((2, 3))
    loss, metrics = losses.policy_gradient(zeros, zeros, zeros, zeros)
    assert loss == 0
    assert all(value == 0 for value in metrics.values())


def test_kl_estimators_have_their_formulas_and_their_expectations():
    """Over a whole vocabulary: E_π k1 = E_π k3 = KL exactly, and k3 is never negative."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(9)), rng.dirichlet(np.ones(9))
    logprobs, ref = np.log(p)[None], np.log(q)[None]
    true_kl = np.sum(p * np.log(p / q))
    values = {
        name: np.asarray(
            losses.kl(jnp.array(logprobs, jnp.float32), jnp.array(ref, jnp.float32), estimator=name)
        )[0]
        for name in ("k1", "k2", "k3")
    }
    assert np.sum(p * values["k1"]) == pytest.approx(true_kl, rel=1e-5)
    assert np.sum(p * values["k3"]) == pytest.approx(true_kl, rel=1e-5)
    np.testing.assert_allclose(values["k2"], (np.log(p / q)) ** 2 / 2, rtol=1e-4)
    assert np.all(values["k3"] >= 0)
    np.testing.assert_array_equal(
        losses.kl(jnp.zeros((1, 1)), jnp.ones((1, 1))),
        losses.kl(jnp.zeros((1, 1)), jnp.ones((1, 1)), estimator="k3"),
    )


def test_k3_of_a_small_difference_is_not_rounded_away():
    d = 1e-3
    actual = losses.kl(jnp.array([[-1.0]]), jnp.array([[-1.0 + d]]))
    exact_d = float(np.float32(-1.0 + d)) + 1.0
    assert actual[0, 0] == pytest.approx(np.expm1(exact_d) - exact_d, rel=1e-3)


def test_cross_entropy_is_the_loop_and_sampler_gap_too():
    batch = make_batch(2)
    data = arrays(batch)
    for aggregation in AGGREGATIONS:
        actual = cross_entropy(
            data["logprobs"], data["mask"], aggregation=aggregation, max_length=MAX_LENGTH
        )
        expected = -np.sum(loop_weights(batch["mask"], aggregation) * batch["logprobs"])
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
    gaps = np.abs(batch["old"] - batch["logprobs"])[batch["mask"]]
    gap = jax.jit(losses.sampler_gap)(data["old"], data["logprobs"], data["mask"])
    np.testing.assert_allclose([gap["max"], gap["mean"]], [gaps.max(), gaps.mean()], rtol=1e-5)


def test_constants_carry_no_gradient():
    data = arrays(make_batch())

    def objective(old, advantages, ref):
        return losses.policy_objective(
            data["logprobs"], old, advantages, data["mask"], ref_logprobs=ref, kl_coefficient=0.5
        )[0]

    gradients = gradient_of(objective, argnums=(0, 1, 2))(
        data["old"], data["advantages"], data["ref"]
    )
    assert not any(np.any(gradient) for gradient in gradients)


def test_terms_with_coefficient_zero_are_not_in_the_program_but_are_reported():
    data = arrays(make_batch())

    def objective(logprobs, **coefficients):
        return losses.policy_objective(
            logprobs, data["old"], data["advantages"], data["mask"],
            ref_logprobs=data["ref"], entropy=data["entropy"], **coefficients,
        )  # fmt: skip

    loss, metrics = objective(data["logprobs"])
    plain, _ = policy_gradient(data)
    assert loss == plain == metrics["policy_loss"]
    kl = losses.kl(data["logprobs"], data["ref"])[data["mask"]]
    np.testing.assert_allclose(metrics["kl"], np.mean(kl), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["entropy"], np.mean(data["entropy"][data["mask"]]), rtol=1e-5
    )

    def exponentials(**coefficients):
        gradient = jax.grad(lambda logprobs: objective(logprobs, **coefficients)[0])
        return jax.jit(gradient).lower(data["logprobs"]).cost_analysis()["transcendentals"]

    assert exponentials() == data["logprobs"].size  # the ratio's alone
    assert exponentials(kl_coefficient=0.1) > exponentials()


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_jit_and_vmap_change_nothing(importance):
    batches = [arrays(make_batch(seed)) for seed in (0, 1)]

    def objective(data):
        return losses.policy_objective(
            data["logprobs"], data["old"], data["advantages"], data["mask"],
            ref_logprobs=data["ref"], entropy=data["entropy"], kl_coefficient=0.1,
            entropy_coefficient=0.1, importance=importance,
        )  # fmt: skip

    mapped = jax.jit(jax.vmap(objective))(jax.tree.map(lambda *x: np.stack(x), *batches))
    jitted = jax.jit(objective)
    for i, data in enumerate(batches):
        eager = jax.tree.leaves(objective(data))
        np.testing.assert_allclose(jax.tree.leaves(jitted(data)), eager, rtol=1e-5)
        np.testing.assert_allclose([x[i] for x in jax.tree.leaves(mapped)], eager, rtol=1e-5)


def test_bad_options_are_refused_by_name():
    data = arrays(make_batch())
    with pytest.raises(ValueError, match=r"aggregation must be one of .*token_mean.*'tokens'"):
        policy_gradient(data, aggregation="tokens")
    with pytest.raises(ValueError, match=r"pass max_length"):
        policy_gradient(data, aggregation="sequence_sum_const")
    with pytest.raises(ValueError, match=r"importance='sequnce'.*token.*sequence"):
        policy_gradient(data, importance="sequnce")
    with pytest.raises(ValueError, match=r"KL estimator must be one of .*'k4'"):
        losses.kl(data["logprobs"], data["ref"], estimator="k4")
    base = (data["logprobs"], data["old"], data["advantages"], data["mask"])
    with pytest.raises(ValueError, match=r"kl_coefficient is 0.1, but ref_logprobs is None"):
        losses.policy_objective(*base, kl_coefficient=0.1)
    with pytest.raises(ValueError, match=r"entropy_coefficient is 0.1, but entropy is None"):
        losses.policy_objective(*base, entropy_coefficient=0.1)
