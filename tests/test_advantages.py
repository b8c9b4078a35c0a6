"""Every advantage against a loop written from the method page, and the cases that break them.

The loops are in Python floats (float64) and know nothing of masks by multiplication: they visit
valid positions only. Inputs are random ragged groups with nan and inf under the mask.

What is compared with them is computed by one program for each group size (`computed`): operations
on their own would each compile. Both ways give the same (`test_jit_and_vmap_change_nothing...`).
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jax import advantages
from spark_jax.advantages import ADVANTAGES, Advantage, AdvantageInputs, all_options

EPS = 1e-6
SHAPES = [(3, 4), (6, 2), (12, 1)]  # prompts, group size; one B, so that most programs are shared
T, K = 13, 4


class Batch:
    """Random ragged groups, in float64 for the loops, and as arrays with garbage under the mask."""

    def __init__(self, seed, prompts, group_size):
        rng = np.random.default_rng(seed)
        self.group_size, self.batch = group_size, prompts * group_size
        self.rewards = rng.choice([0.0, 0.1, 0.3, 1.0], self.batch).astype(np.float32)
        self.policy = -rng.exponential(1.0, (self.batch, T)).astype(np.float32)
        self.ref = -rng.exponential(1.0, (self.batch, T)).astype(np.float32)
        self.lengths = rng.integers(1, T + 1, self.batch)
        self.mask = np.arange(T) < self.lengths[:, None]
        self.step_ids = np.full((self.batch, T), -1, np.int32)
        self.verdicts = np.zeros((self.batch, K), np.int32)
        for b in range(self.batch):
            position = 0
            for step in range(rng.integers(0, K + 1)):
                position += rng.integers(0, 2)
                width = rng.integers(1, 4)
                self.step_ids[b, position : position + width] = step
                position += width
                self.verdicts[b, step] = rng.choice([-1, 1, 1, 0])

    def group(self, b):
        start = b // self.group_size * self.group_size
        return range(start, start + self.group_size)

    def valid(self, b):
        return range(self.lengths[b])

    def inputs(self) -> AdvantageInputs:
        policy, ref = self.policy.copy(), self.ref.copy()
        policy[~self.mask], ref[~self.mask] = np.nan, -np.inf
        return AdvantageInputs(
            rewards=jnp.array(self.rewards),
            mask=jnp.array(self.mask),
            group_size=self.group_size,
            policy_logprobs=jnp.array(policy),
            ref_logprobs=jnp.array(ref),
            verdicts=jnp.array(self.verdicts),
            step_ids=jnp.array(self.step_ids),
            num_steps=K,
        )


BATCHES = [Batch(seed, *SHAPES[seed % len(SHAPES)]) for seed in range(9)]
every_batch = pytest.mark.parametrize("batch", BATCHES, ids=range(9))
BETA, BOUND, SPREAD = 0.4, 0.3, 0.1
SPRO = {"beta": BETA}


@functools.cache
def computed(batch):
    """All that is compared with loops, by names of our own."""
    returns = jnp.array(loop_returns(batch, BETA), jnp.float32)
    return jax.device_get(_compute(batch.inputs(), returns))


@jax.jit
def _compute(inputs, returns):
    rewards, mask, size = inputs.rewards, inputs.mask, inputs.group_size
    found = {
        "grpo": advantages.grpo(rewards, size),
        "grpo_plain": advantages.grpo(rewards, size, normalize_std=False),
        "dr_grpo": advantages.dr_grpo(rewards, size),
        "rloo": advantages.rloo(rewards, size),
    }
    for by_token, group in itertools.product((False, True), (None, size)):
        found[f"reinforce++ {by_token} {group is None}"] = advantages.reinforce_plus_plus(
            rewards, mask if by_token else None, group_size=group
        )
    cumulative = jnp.where(mask, returns, jnp.nan)
    found["msa"] = advantages.masked_step(cumulative, mask, size)
    found["pooled"] = advantages.pooled_step(cumulative, mask, size)
    for granularity, baseline in itertools.product(("token", "step"), ("step", "pool")):
        chosen = {"granularity": granularity, "baseline": baseline, **SPRO}
        key = f"{granularity} {baseline}"
        found[f"spro {key}"] = ADVANTAGES["spro"](inputs, **chosen)
        found[f"half {key}"] = ADVANTAGES["spro"](inputs, outcome_weight=0.5, **chosen)
        found[f"process {key}"] = ADVANTAGES["masked_step"](inputs, **chosen)
    found["clipped"] = ADVANTAGES["masked_step"](inputs, return_clip=BOUND, **SPRO)
    for granularity in ("token", "step"):
        found[f"scaled {granularity}"] = ADVANTAGES["masked_step"](
            inputs, granularity=granularity, process_std=SPREAD, **SPRO
        )
    found["prime"] = ADVANTAGES["prime"](inputs, beta=BETA)
    for discount in (0.0, 0.5):
        found[f"selective {discount}"] = ADVANTAGES["selective"](inputs, discount=discount)
    found["global"] = advantages.global_step(inputs.verdicts, inputs.step_ids, mask, size)
    found["both"] = ADVANTAGES["global_step"](inputs, outcome_weight=2.0, process_weight=0.5)
    for name, options in OUTCOMES:
        found[f"entry {name}"] = ADVANTAGES[name](inputs, **options)
    return found


OUTCOMES = [("grpo", {}), ("dr_grpo", {}), ("rloo", {}), ("reinforce++", {"group_baseline": True})]


def check(actual, expected):
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4)


# --- loops ---------------------------------------------------------------------------------------


def loop_grpo(batch, normalize_std=True):
    expected = np.zeros(batch.batch)
    for b in range(batch.batch):
        group = [float(batch.rewards[i]) for i in batch.group(b)]
        if len(set(group)) == 1:
            continue
        expected[b] = group[b % batch.group_size] - np.mean(group)
        if normalize_std:
            expected[b] /= np.std(group, ddof=1) + EPS
    return expected


def loop_rloo(batch):
    expected = np.zeros(batch.batch)
    for b in range(batch.batch):
        others = [float(batch.rewards[i]) for i in batch.group(b) if i != b]
        if others:
            expected[b] = float(batch.rewards[b]) - np.mean(others)
    return expected


def to_tokens(batch, per_response):
    return np.array([[per_response[b] * batch.mask[b, t] for t in range(T)]
                     for b in range(batch.batch)])  # fmt: skip


def loop_returns(batch, beta):
    returns = np.zeros((batch.batch, T))
    for b in range(batch.batch):
        total = 0.0
        for t in batch.valid(b):
            total += beta * (float(batch.policy[b, t]) - float(batch.ref[b, t]))
            returns[b, t] = total
    return returns


def loop_masked_step(batch, returns):
    expected = np.zeros((batch.batch, T))
    for b in range(batch.batch):
        for t in batch.valid(b):
            survivors = [i for i in batch.group(b) if t < batch.lengths[i]]
            expected[b, t] = returns[b, t] - np.mean([returns[i, t] for i in survivors])
    return expected


def loop_pooled_step(batch, returns):
    expected = np.zeros((batch.batch, T))
    for b in range(batch.batch):
        pool = [returns[i, t] for i in batch.group(b) for t in batch.valid(i)]
        for t in batch.valid(b):
            expected[b, t] = returns[b, t] - np.mean(pool)
    return expected


def loop_by_steps(batch, returns, baseline):
    ends = {}
    for b in range(batch.batch):
        for t in batch.valid(b):
            if batch.step_ids[b, t] >= 0:
                ends[b, batch.step_ids[b, t]] = returns[b, t]  # the last one wins
    expected = np.zeros((batch.batch, T))
    for b in range(batch.batch):
        for t in batch.valid(b):
            step = batch.step_ids[b, t]
            if step >= 0:
                pool = [value for (i, k), value in ends.items()
                        if i in batch.group(b) and (baseline == "pool" or k == step)]  # fmt: skip
                expected[b, t] = ends[b, step] - np.mean(pool)
    return expected


def loop_prime(batch, beta):
    token = [[beta * (float(batch.policy[b, t]) - float(batch.ref[b, t])) for t in batch.valid(b)]
             for b in range(batch.batch)]  # fmt: skip
    expected = to_tokens(batch, loop_rloo(batch))
    for b in range(batch.batch):
        others = [np.mean(token[i]) for i in batch.group(b) if i != b]
        for t in batch.valid(b):
            if others:
                expected[b, t] += sum(r - np.mean(others) for r in token[b][t:])
    return expected


def loop_selective(batch, discount):
    response, expected = loop_grpo(batch), np.zeros((batch.batch, T))
    for b in range(batch.batch):
        for t in batch.valid(b):
            step = batch.step_ids[b, t]
            verdict = batch.verdicts[b, step] if step >= 0 else 0
            agrees = verdict == 0 or (verdict > 0) == (response[b] > 0)
            expected[b, t] = response[b] * (1.0 if agrees else discount)
    return expected


def loop_global_step(batch):
    expected = np.zeros((batch.batch, T))
    for b in range(batch.batch):
        step_rewards = {}
        for i in batch.group(b):
            judged = [k for k in range(K) if batch.verdicts[i, k] != 0]
            step_rewards |= {(i, k): batch.verdicts[i, k] / len(judged) for k in judged}
        values = list(step_rewards.values())
        if len(set(values)) < 2:
            continue
        for (i, k), value in step_rewards.items():
            tokens = [t for t in batch.valid(b) if batch.step_ids[b, t] == k]
            if i == b and tokens:
                standard = (value - np.mean(values)) / (np.std(values, ddof=1) + EPS)
                expected[b, : tokens[-1] + 1] += standard
    return expected


@every_batch
def test_outcome_advantages_are_the_loops(batch):
    found = computed(batch)
    plain = loop_grpo(batch, normalize_std=False)
    check(found["grpo"], loop_grpo(batch))
    check(found["grpo_plain"], plain)
    check(found["dr_grpo"], plain)
    check(found["rloo"], loop_rloo(batch))


@every_batch
def test_reinforce_plus_plus_whitens_the_batch_by_responses_or_by_tokens(batch):
    rewards = np.array(batch.rewards, np.float64)
    group_centred = loop_grpo(batch, normalize_std=False)
    for values, whole in [(rewards, True), (group_centred, False)]:
        by_token = np.concatenate([[values[b]] * batch.lengths[b] for b in range(batch.batch)])
        for votes, tokens in [(values, False), (by_token, True)]:
            flat = len(set(votes)) < 2
            std = 0.0 if flat else np.std(votes, ddof=1)
            expected = np.zeros(batch.batch) if flat else (values - votes.mean()) / (std + EPS)
            check(computed(batch)[f"reinforce++ {tokens} {whole}"], expected)


def test_reinforce_plus_plus_leaves_rows_without_tokens_out():
    rewards, mask = jnp.array([1.0, 0.0, 50.0]), jnp.array([[1, 1], [1, 0], [0, 0]])
    actual = advantages.reinforce_plus_plus(rewards, mask)
    votes = np.array([1.0, 1.0, 0.0])
    expected = (np.array([1.0, 0.0]) - votes.mean()) / (votes.std(ddof=1) + EPS)
    check(actual, [*expected, 0.0])


@every_batch
def test_spro_and_its_variants_are_the_loops(batch):
    found = computed(batch)
    returns, outcome = loop_returns(batch, BETA), to_tokens(batch, loop_grpo(batch))
    msa, pooled = loop_masked_step(batch, returns), loop_pooled_step(batch, returns)
    check(found["msa"], msa)
    check(found["pooled"], pooled)
    expected = {
        "token step": msa,
        "token pool": pooled,
        "step step": loop_by_steps(batch, returns, "step"),
        "step pool": loop_by_steps(batch, returns, "pool"),
    }
    for key, process in expected.items():
        check(found[f"spro {key}"], outcome + process)
        check(found[f"half {key}"], 0.5 * outcome + process)
        check(found[f"process {key}"], process)


@every_batch
def test_bounded_returns_and_a_fixed_spread_are_the_loops(batch):
    found, returns = computed(batch), loop_returns(batch, BETA)
    clipped = loop_masked_step(batch, np.clip(returns, -BOUND, BOUND))
    check(found["clipped"], clipped)
    for granularity in ("token", "step"):
        plain, scaled = found[f"process {granularity} step"], found[f"scaled {granularity}"]
        for first in range(0, batch.batch, batch.group_size):
            group = range(first, first + batch.group_size)
            # A value a token, or one a step that has tokens, not one for each of its tokens.
            seen = {
                (b, t if granularity == "token" else int(batch.step_ids[b, t])): plain[b, t]
                for b in group
                for t in batch.valid(b)
                if granularity == "token" or 0 <= batch.step_ids[b, t] < K
            }
            values = list(seen.values())
            differ = len(set(values)) > 1
            spread = np.std(values, ddof=1) if differ else 0.0
            check(scaled[group], plain[group] * SPREAD / (spread + EPS))
    if batch.group_size > 1:
        assert np.abs(clipped - loop_masked_step(batch, returns)).max() > 0


def test_a_fixed_spread_does_not_hang_on_beta():
    inputs = Batch(1, 3, 4).inputs()
    small, large = (
        jax.jit(functools.partial(ADVANTAGES["masked_step"], beta=beta, process_std=0.1))(inputs)
        for beta in (0.1, 10.0)
    )
    np.testing.assert_allclose(small, large, rtol=1e-3, atol=1e-5)
    assert float(jnp.abs(large).max()) > 0.05


@every_batch
def test_prime_is_the_loop(batch):
    check(computed(batch)["prime"], loop_prime(batch, BETA))


@every_batch
def test_advantages_from_verdicts_are_the_loops(batch):
    found, outcome = computed(batch), to_tokens(batch, loop_grpo(batch))
    for discount in (0.0, 0.5):
        check(found[f"selective {discount}"], loop_selective(batch, discount))
    check(found["global"], loop_global_step(batch))
    check(found["both"], 2.0 * outcome + 0.5 * loop_global_step(batch))


def test_outcome_entries_give_every_token_the_response_advantage():
    batch = BATCHES[0]
    found = {name: computed(batch)[f"entry {name}"] for name, _ in OUTCOMES}
    check(found["grpo"], to_tokens(batch, loop_grpo(batch)))
    check(found["dr_grpo"], to_tokens(batch, loop_grpo(batch, normalize_std=False)))
    check(found["rloo"], to_tokens(batch, loop_rloo(batch)))
    by_token = computed(batch)["reinforce++ True False"]
    check(found["reinforce++"], to_tokens(batch, by_token))


# --- the rules that hold in all of them ----------------------------------------------------------


def outcomes(rewards, group_size):
    every = (advantages.grpo, advantages.dr_grpo, advantages.rloo)
    found = [function(rewards, group_size) for function in every]
    return [*found, advantages.reinforce_plus_plus(rewards)]


jitted_outcomes = jax.jit(outcomes, static_argnums=1)
jitted_grpo = jax.jit(advantages.grpo, static_argnums=1)


@settings(max_examples=60, deadline=None)
@given(
    value=st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30),
    group_size=st.sampled_from([1, 3, 7]),
)
def test_equal_rewards_give_exactly_zero(value, group_size):
    rewards = np.full((2 * group_size,), value, np.float32)
    for found in jitted_outcomes(rewards, group_size):
        np.testing.assert_array_equal(found, np.zeros(2 * group_size))


@pytest.mark.parametrize("value", [0.1, -1 / 3, 77.7])
def test_equal_rewards_give_exactly_zero_without_jit(value):
    for found in outcomes(jnp.full(6, value, jnp.float32), 3):
        np.testing.assert_array_equal(found, np.zeros(6))


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 0.7])
def test_the_case_that_needs_the_rule_is_real(value):
    """A mean of equal float32 numbers does round, and dividing by the std would blow that up."""
    reward = np.float32(value)
    rounding = [
        n for n in (3, 5, 6, 7, 12, 13) if reward != np.full(n, reward).sum() / np.float32(n)
    ]
    for n in rounding:
        assert not np.any(jitted_grpo(np.full(n, reward), n))
    assert rounding


def test_equal_step_rewards_and_a_single_step_give_exactly_zero():
    step_ids = jnp.array([[0, 0, 1, 1, 2, 2, -1]] * 2, jnp.int32)
    mask = jnp.ones((2, 7), bool)
    for verdicts in ([[1, 1, 1]] * 2, [[-1, -1, -1]] * 2, [[0, 1, 0], [0, 0, 0]], [[0] * 3] * 2):
        for function in (advantages.global_step, jax.jit(advantages.global_step, static_argnums=3)):
            actual = function(jnp.array(verdicts, jnp.int32), step_ids, mask, 2)
            np.testing.assert_array_equal(actual, np.zeros((2, 7)))


@pytest.mark.parametrize(
    ("jitted", "value"), [(False, 0.1), (True, 0.1), (True, 1 / 3), (True, 0.7)]
)
def test_equal_process_rewards_give_prime_exactly_the_outcome(value, jitted):
    """A mean of equal rewards rounds, and the sum over the rest of the response adds that up."""
    mask = jnp.arange(31) < jnp.array([[31], [7], [1], [20], [13], [5]])
    logprobs = jnp.where(mask, value, jnp.nan)
    compute = jitted_prime if jitted else advantages.prime
    for rewards in (jnp.full(6, 0.1), jnp.array([0.0, 1.0, 1.0, 0.1, 0.1, 0.1])):
        outcome = jnp.where(mask, advantages.rloo(rewards, 3)[:, None], 0.0)
        actual = compute(rewards, logprobs, jnp.zeros((6, 31)), mask, 3)
        np.testing.assert_array_equal(actual, outcome)


jitted_prime = jax.jit(advantages.prime, static_argnums=4)


def test_recipes_whose_own_part_is_in_the_loss_are_no_advantages():
    assert not {"dapo", "gspo"} & set(ADVANTAGES)


def test_a_lone_survivor_and_a_shared_prefix_give_exactly_zero():
    returns = jnp.array([[0.1, 0.3, 0.7, 0.9], [0.1, 0.5, 9.0, 9.0], [0.1, 0.2, 9.0, 9.0]])
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]])
    actual = np.asarray(jax.jit(advantages.masked_step, static_argnums=2)(returns, mask, 3))
    np.testing.assert_array_equal(actual[:, [0, 2, 3]], np.zeros((3, 3)))
    np.testing.assert_allclose(actual[:, 1], [-1 / 30, 1 / 6, -2 / 15], atol=1e-6)


def test_same_policies_leave_the_outcome_alone():
    batch = Batch(0, 3, 4)
    inputs = batch.inputs().replace(ref_logprobs=batch.inputs().policy_logprobs)
    for baseline in ("step", "pool"):
        np.testing.assert_array_equal(
            ADVANTAGES["spro"](inputs, baseline=baseline), ADVANTAGES["grpo"](inputs)
        )
    np.testing.assert_array_equal(ADVANTAGES["prime"](inputs), ADVANTAGES["rloo"](inputs))


def test_masked_step_sums_to_zero_over_the_survivors_of_each_position():
    batch = Batch(4, 3, 4)
    returns = jnp.array(loop_returns(batch, 1.0), jnp.float32)
    actual = advantages.masked_step(returns, jnp.array(batch.mask), 4).reshape(3, 4, T)
    np.testing.assert_allclose(actual.sum(axis=1), np.zeros((3, T)), atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4), st.floats(0.5, 4, width=32))
def test_grpo_ignores_shift_and_scale_and_is_antisymmetric(rewards, scale):
    rewards = np.round(np.array(rewards, np.float32) * 4) / 4
    base = np.asarray(jitted_grpo(rewards, 4))
    moved = np.float32(rewards * scale + 3.0)
    np.testing.assert_allclose(jitted_grpo(moved, 4), base, atol=2e-3)
    np.testing.assert_allclose(jitted_grpo(-rewards, 4), -base, atol=1e-5)
    assert abs(float(base.sum())) < 1e-4


def test_selective_keeps_the_whole_advantage_where_there_is_no_verdict():
    step_ids = jnp.array([[-1, 0, 1, 2, 9, -1]] * 2, jnp.int32)  # 9: beyond the verdicts
    verdicts = jnp.array([[1, 0, -1]] * 2, jnp.int32)
    mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    actual = advantages.selective(jnp.array([2.0, -1.0]), verdicts, step_ids, mask, discount=0.5)
    expected = [[2.0, 2.0, 2.0, 1.0, 2.0, 2.0], [-1.0, -0.5, -1.0, -1.0, -1.0, 0.0]]
    np.testing.assert_array_equal(actual, expected)


def test_global_step_by_hand():
    """Rewards +½ −½ | +1: mean 1/3, variance 7/12; each reaches back from its step's end."""
    verdicts = jnp.array([[1, -1], [1, 0]], jnp.int32)
    step_ids = jnp.array([[-1, 0, 0, 1, -1], [0, 0, 0, -1, -1]], jnp.int32)
    z = (np.array([0.5, -0.5, 1.0]) - 1 / 3) / np.sqrt(7 / 12)
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    expected = [[z[0] + z[1]] * 3 + [z[1], 0.0], [z[2]] * 3 + [0.0, 0.0]]
    check(advantages.global_step(verdicts, step_ids, mask, 2), expected)


# --- jit, vmap, gradients, bad input -------------------------------------------------------------

EVERY_ENTRY = [(name, {}) for name in ADVANTAGES] + [
    ("spro", {"granularity": "step"}),
    ("spro", {"baseline": "pool", "granularity": "step"}),
    ("reinforce++", {"group_baseline": True}),
]


def every_entry(inputs):
    return [ADVANTAGES[name](inputs, **options) for name, options in EVERY_ENTRY]


@functools.cache
def jitted_and_mapped():
    """Of two batches: their inputs, what each gives under jit, and what both under vmap."""
    inputs = [Batch(seed, 3, 4).inputs() for seed in (1, 2)]
    alone = [jax.jit(every_entry)(x) for x in inputs]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *inputs)
    return inputs, alone, jax.jit(jax.vmap(every_entry))(stacked)


@pytest.mark.parametrize("index", range(len(EVERY_ENTRY)), ids=lambda i: str(EVERY_ENTRY[i]))
def test_jit_and_vmap_change_nothing_and_masked_tokens_get_zero(index):
    name, options = EVERY_ENTRY[index]
    (inputs, _), (jitted, other), mapped = jitted_and_mapped()
    eager = np.asarray(ADVANTAGES[name](inputs, **options))
    assert eager.shape == inputs.mask.shape
    assert np.all(np.isfinite(eager))
    np.testing.assert_array_equal(np.where(inputs.mask, 0.0, eager), np.zeros(eager.shape))
    assert np.any(eager)
    np.testing.assert_allclose(jitted[index], eager, atol=1e-5)
    np.testing.assert_allclose(mapped[index][0], eager, atol=1e-5)
    np.testing.assert_allclose(mapped[index][1], other[index], atol=1e-5)


@functools.cache
def gradients_of_every_entry():
    """With an all-equal group: a std of 0 makes a careless gradient nan."""
    batch = Batch(1, 3, 4)
    batch.rewards[:4] = 0.1
    inputs = batch.inputs()

    def gradients(name, options, by):
        def total(rewards, policy, ref):
            replaced = inputs.replace(rewards=rewards, policy_logprobs=policy, ref_logprobs=ref)
            return jnp.sum(ADVANTAGES[name](replaced, **options) * jnp.arange(1.0, T + 1))

        return jax.grad(total, argnums=(0, 1, 2))(*by)

    by = (inputs.rewards, inputs.policy_logprobs, inputs.ref_logprobs)
    return jax.jit(lambda by: [gradients(*entry, by) for entry in EVERY_ENTRY])(by)


@pytest.mark.parametrize("index", range(len(EVERY_ENTRY)), ids=lambda i: str(EVERY_ENTRY[i]))
def test_gradients_are_finite_in_rewards_and_zero_in_logprobs(index):
    grads = gradients_of_every_entry()[index]
    assert np.all(np.isfinite(grads[0]))
    np.testing.assert_array_equal(grads[1], np.zeros((12, T)))
    np.testing.assert_array_equal(grads[2], np.zeros((12, T)))


def test_a_nan_reward_is_not_hidden():
    actual = advantages.grpo(jnp.array([1.0, jnp.nan, 0.0, 1.0]), 2)
    assert np.all(np.isnan(actual[:2]))
    assert np.all(np.isfinite(actual[2:]))


def test_bad_input_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"group_size=3 for B=4"):
        advantages.grpo(jnp.zeros(4), 3)
    with pytest.raises(ValueError, match=r"group_size=0"):
        advantages.rloo(jnp.zeros(4), 0)
    inputs = Batch(0, 3, 4).inputs()
    with pytest.raises(ValueError, match=r"needs step_ids and num_steps"):
        ADVANTAGES["spro"](inputs.replace(step_ids=None), granularity="step")
    with pytest.raises(ValueError, match=r"AdvantageInputs\.verdicts"):
        ADVANTAGES["selective"](inputs.replace(verdicts=None))
    with pytest.raises(ValueError, match=r"AdvantageInputs\.ref_logprobs"):
        ADVANTAGES["prime"](inputs.replace(ref_logprobs=None))
    with pytest.raises(TypeError, match="no_such_option"):
        ADVANTAGES["grpo"](inputs, no_such_option=1)


# --- which groups carry a signal -----------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def masks(rewards, group_size):
    both = [
        advantages.dynamic_sampling_mask(rewards, group_size, **bounds)
        for bounds in ({}, {"low": 0.2, "high": 0.8})
    ]
    return *both, advantages.zero_variance_groups(rewards, group_size)


@pytest.mark.parametrize("seed", range(4))
def test_dynamic_sampling_drops_groups_as_dapo_and_spro_do(seed):
    rng = np.random.default_rng(seed)
    for group_size in (2, 5, 15):
        correct = rng.integers(0, group_size + 1, 20)
        rewards = np.concatenate(
            [rng.permutation(np.arange(group_size) < count) for count in correct]
        ).astype(np.float32)
        dapo = [0 < count < group_size for count in correct]
        spro = [group_size <= 5 * count <= 4 * group_size for count in correct]
        *keep, equal = masks(rewards, group_size)
        np.testing.assert_array_equal(keep[0], np.repeat(dapo, group_size))
        np.testing.assert_array_equal(keep[1], np.repeat(spro, group_size))
        assert equal == 20 - sum(dapo)


def test_equal_fractional_rewards_are_a_group_without_variance():
    rewards = jnp.array([0.3] * 3 + [0.3, 0.3, 0.1])
    assert advantages.zero_variance_groups(rewards, 3) == 1
    keep = jax.jit(advantages.dynamic_sampling_mask, static_argnums=1)(rewards, 3)
    np.testing.assert_array_equal(keep, [False] * 3 + [True] * 3)


def test_bounds_hold_where_the_mean_rounds():
    for group_size in (10, 16):  # in float32 one mean comes out above 0.2, the other below
        rewards = jnp.array([0.1, 0.3] * (group_size // 2))
        assert jnp.mean(rewards) != jnp.float32(0.2)
        for bounds in ({"low": 0.2}, {"high": 0.2}):
            keep = jax.jit(
                functools.partial(advantages.dynamic_sampling_mask, **bounds), static_argnums=1
            )
            assert np.all(keep(rewards, group_size))


def test_an_advantage_is_handed_what_it_says_it_needs_and_nothing_else():
    """One that reads verdicts without saying so would train on zeros under a reward that asks no
    reward model."""
    inputs = BATCHES[0].inputs()
    seen = {}

    def reads(inputs):
        seen.update({name: getattr(inputs, name) is not None for name in seen_fields})
        return inputs.mask * 1.0

    seen_fields = ("verdicts", "policy_logprobs", "ref_logprobs", "step_ids")
    Advantage(reads)(inputs)
    assert seen == dict.fromkeys(seen_fields, False) | {"step_ids": True}
    Advantage(reads, needs=frozenset({"verdicts"}))(inputs)
    assert seen == dict.fromkeys(seen_fields, False) | {"step_ids": True, "verdicts": True}


def test_process_rewards_are_those_of_the_advantage():
    """SPRO's advantage is GRPO's and what its process rewards say; so are its variants'."""
    inputs = BATCHES[0].inputs()
    for options in ({}, {"process_std": 0.1}, {"return_clip": 0.01}, {"baseline": "pool"}):
        whole, process = ADVANTAGES["spro"].with_process_rewards(inputs, beta=BETA, **options)
        check(whole - ADVANTAGES["grpo"](inputs), np.asarray(process.advantages))
    assert ADVANTAGES["grpo"].with_process_rewards(inputs)[1] is None
    assert (
        np.max(np.abs(ADVANTAGES["spro"].with_process_rewards(inputs, return_clip=0.01)[1][0]))
        <= 0.01
    )


def test_options_are_the_functions_keyword_arguments():
    assert ADVANTAGES["selective"].options == {
        "discount": float,
        "normalize_std": bool,
        "eps": float,
    }
    assert all_options()["process_std"] is float
    assert all_options()["granularity"] is str
