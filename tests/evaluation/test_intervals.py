"""Intervals against scipy, and their coverage."""

import numpy as np
import pytest
import scipy.stats

from spark_jax.evaluation.intervals import (
    Interval,
    bootstrap_interval,
    paired_bootstrap_interval,
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
    with pytest.raises(ValueError, match="resamples=0"):
        bootstrap_interval(np.ones(4), resamples=0)
