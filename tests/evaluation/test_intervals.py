"""Intervals against scipy, and their coverage."""

import itertools

import numpy as np
import pytest
import scipy.stats

from spark_jax.evaluation.intervals import (
    Interval,
    bootstrap_interval,
    crossed_interval,
    paired_bootstrap_interval,
    paired_crossed_interval,
    paired_permutation_test,
    t_interval,
)


def test_t_interval_against_scipy():
    for n, level in ((2, 0.95), (3, 0.9), (10, 0.99)):
        values = np.random.default_rng(n).normal(2, 3, n)
        got = t_interval(values, level=level)
        low, high = scipy.stats.t.interval(level, n - 1, values.mean(), scipy.stats.sem(values))
        np.testing.assert_allclose([got.estimate, got.low, got.high], [values.mean(), low, high])


def test_bootstrap_against_scipy():
    values = np.random.default_rng(0).exponential(size=60)
    got = bootstrap_interval(values, level=0.9)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, method="percentile", n_resamples=10_000
    ).confidence_interval
    np.testing.assert_allclose([got.low, got.high], [theirs.low, theirs.high], atol=0.02)
    assert got.estimate == values.mean()


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        got = bootstrap_interval(rng.random(100) < 0.3, resamples=300, seed=trial)
        hits += got.low <= 0.3 <= got.high
    assert 175 <= hits <= 198  # 95 % of 200 is 190


def test_bootstrap_is_seeded_and_exact_for_equal_values():
    values = np.random.default_rng(2).random(30)
    first, again = (bootstrap_interval(values, resamples=50, seed=7) for _ in range(2))
    assert first == again
    assert bootstrap_interval(values, resamples=50, seed=8) != first
    assert bootstrap_interval(np.ones(9)) == Interval(1.0, 1.0, 1.0)


@pytest.mark.parametrize("n", [40, 5_000, 400_000])
def test_draws_are_made_in_few_blocks_of_bounded_size(monkeypatch, n):
    sizes = []
    make = np.random.default_rng

    class Counting:
        def __init__(self, seed):
            self.rng = make(seed)

        def integers(self, *arguments, size):
            sizes.append(int(np.prod(size)))
            return self.rng.integers(*arguments, size=size)

    monkeypatch.setattr(np.random, "default_rng", Counting)
    resamples = 10_000 if n <= 5_000 else 20
    bootstrap_interval(np.ones(n), resamples=resamples)
    assert sum(sizes) == resamples * n
    assert max(sizes) <= max(n, 2**18)
    assert len(sizes) <= max(20, 2 * resamples * n / 2**18)


def test_a_paired_interval_uses_the_pairs():
    hard = np.random.default_rng(3).normal(0, 10, 200)  # problems differ far more than the runs do
    better = hard + 1 + np.random.default_rng(4).normal(0, 0.1, 200)
    got = paired_bootstrap_interval(better, hard, resamples=500)
    assert 0.9 < got.low < got.estimate < got.high < 1.1


def test_a_crossed_interval_against_all_resamples():
    values = np.random.default_rng(5).normal(size=(2, 3))
    means = [
        values[np.ix_(seeds, problems)].mean()
        for seeds in itertools.product(range(2), repeat=2)
        for problems in itertools.product(range(3), repeat=3)
    ]
    got = crossed_interval(values, level=0.8, resamples=40_000)
    np.testing.assert_allclose([got.low, got.high], np.quantile(means, [0.1, 0.9]), atol=0.02)
    assert got.estimate == pytest.approx(values.mean())
    assert got == crossed_interval(values, level=0.8, resamples=40_000)
    assert got != crossed_interval(values, level=0.8, resamples=40_000, seed=1)


@pytest.mark.parametrize("runs", [1, 2])
def test_a_crossed_intervals_width_is_that_of_both_sources_of_variance(runs):
    """Seeds a and problems b add up: var = var(a) / S + var(b) / n; b cancels between two runs."""
    rng = np.random.default_rng(6)
    problems = rng.normal(0, 3, 400)
    of_seeds = [rng.normal(0, 0.5, count) for count in (30, 20)]
    values = [seeds[:, None] + problems for seeds in of_seeds]
    variances = [seeds.var() / len(seeds) for seeds in of_seeds]
    if runs == 1:
        got = crossed_interval(values[0])
        deviation = (variances[0] + problems.var() / 400) ** 0.5
    else:
        got = paired_crossed_interval(*values)
        deviation = sum(variances) ** 0.5
        assert got.estimate == pytest.approx(of_seeds[0].mean() - of_seeds[1].mean())
    half = scipy.stats.norm.ppf(0.975) * deviation
    np.testing.assert_allclose([got.high - got.low], [2 * half], rtol=0.04)
    np.testing.assert_allclose([(got.high + got.low) / 2], [got.estimate], atol=0.1 * half)


def test_a_crossed_interval_covers_where_one_over_problems_alone_does_not():
    rng = np.random.default_rng(7)
    crossed = problems_only = 0
    for trial in range(150):
        chance = 0.5 + rng.normal(0, 0.08, 6)[:, None] + rng.normal(0, 0.1, 60)
        values = rng.random((6, 60)) < chance
        got = crossed_interval(values, resamples=300, seed=trial)
        crossed += got.low <= 0.5 <= got.high
        got = bootstrap_interval(values.mean(axis=0), resamples=300, seed=trial)
        problems_only += got.low <= 0.5 <= got.high
    assert 132 <= crossed <= 149  # 95 % of 150 is 142
    assert problems_only < 125


@pytest.mark.parametrize("n", [8, 60])
def test_permutation_test_against_scipy(n):
    rng = np.random.default_rng(n)
    first = rng.normal(0.25, 1, n)
    second = rng.normal(0, 1, n)
    theirs = scipy.stats.permutation_test(
        (first, second),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=10_000,
    ).pvalue
    assert paired_permutation_test(first, second) == pytest.approx(
        theirs, abs=0 if n == 8 else 0.03
    )


def test_permutation_test_by_hand():
    first, second = np.array([True, True, True, False]), np.array([False, False, False, False])
    assert paired_permutation_test(first, second) == 0.25  # 2 of 2^3 patterns are as extreme
    assert paired_permutation_test(first, first) == 1.0
    assert 0 < paired_permutation_test(np.ones(50), np.zeros(50), resamples=100) <= 1 / 101 + 1e-12


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (3, 2), (2, 2), (9, 41), (200, 150)])
def test_right_and_wrong_are_compared_exactly(better, worse):
    first = np.array([True] * better + [False] * worse + [True, False] * 30)
    second = np.array([False] * better + [True] * worse + [True, False] * 30)
    n = better + worse
    expected = scipy.stats.binomtest(better, n).pvalue if n else 1.0
    assert paired_permutation_test(first, second, resamples=1) == pytest.approx(expected)
    if n <= 5:
        patterns = itertools.product((-1, 1), repeat=n)
        shares = [abs(sum(signs)) >= abs(better - worse) for signs in patterns]
        assert expected == np.mean(shares)


@pytest.mark.parametrize("seed", range(20))
def test_equal_sums_count_as_equal_whatever_their_rounding(seed):
    difference = np.random.default_rng(seed).choice([0.1, 0.2, 0.3, 0.7, 1 / 3], 8)
    assert paired_permutation_test(difference, np.zeros(8)) == 2 / 2**8  # all + and all -


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least 2 values"):
        t_interval(np.ones(1))
    with pytest.raises(ValueError, match="at least 1 values"):
        bootstrap_interval(np.ones(0))
    with pytest.raises(ValueError, match=r"level=95"):
        bootstrap_interval(np.ones(4), level=95.0)
    with pytest.raises(ValueError, match="value 1 is not finite"):
        bootstrap_interval(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="1 seed: an interval over seeds needs at least 2"):
        crossed_interval(np.ones((1, 9)))
    with pytest.raises(ValueError, match="runs on 9 and 8 problems"):
        paired_crossed_interval(np.ones((2, 9)), np.ones((3, 8)))
    with pytest.raises(ValueError, match="at least 1 values"):
        crossed_interval(np.ones((2, 0)))
    with pytest.raises(ValueError, match="resamples=0"):
        bootstrap_interval(np.ones(4), resamples=0)
