"""How sure a figure is: bootstrap over problems, Student's t over seeds, two runs in pairs.

Whatever draws, draws from a seed, so the same figures give the same interval.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import bdtr, stdtrit

Values = Float[np.ndarray, "n"] | Int[np.ndarray, "n"] | Bool[np.ndarray, "n"]
ValuesOfSeeds = Float[np.ndarray, "S n"] | Int[np.ndarray, "S n"] | Bool[np.ndarray, "S n"]
OtherSeeds = Float[np.ndarray, "R m"] | Int[np.ndarray, "R m"] | Bool[np.ndarray, "R m"]


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval [low, high], in the unit of the values."""

    estimate: float
    low: float
    high: float


def bootstrap_interval(
    values: Values, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean over n problems (Efron & Tibshirani 1993, §13.3).

    It says how the figure would vary with other problems of the same kind, for one trained model;
    how it varies with the seed of training, `t_interval` says; with both, `crossed_interval`.
    """
    values = _checked(values, 1, level)
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: at least one is needed")
    rng, n = np.random.default_rng(seed), len(values)
    means = [values[rng.integers(n, size=(k, n))].mean(axis=1) for k in _blocks(resamples, n)]
    return percentile_interval(float(values.mean()), np.concatenate(means), level)


def percentile_interval(estimate: float, draws: Float[np.ndarray, "k"], level: float) -> Interval:
    """Return the estimate with the central share `level` of its k resampled values."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high))


def t_interval(values: Values, *, level: float = 0.95) -> Interval:
    """Student-t interval of the mean over n ≥ 2 independent runs (seeds).

    mean ± t(n−1) · s / √n with s the standard deviation with n−1. Raises ValueError for fewer
    than 2.
    """
    values = _checked(values, 2, level)
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / len(values) ** 0.5
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * error
    return Interval(mean, mean - half, mean + half)


def paired_bootstrap_interval(
    first: Values,
    second: Values,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of mean(first) − mean(second), both runs on the same n problems."""
    difference = _difference(first, second)
    return bootstrap_interval(difference, level=level, resamples=resamples, seed=seed)


def crossed_interval(
    values: ValuesOfSeeds, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Bootstrap interval of the mean over S ≥ 2 seeds and n problems, the same for every seed.

    Seeds and problems are drawn anew, each kind by itself: the figure would vary with both. (The
    pigeonhole bootstrap, Owen 2007, arXiv 0712.1111. Drawing problems within each seed would treat
    a hard problem as bad luck of one seed.) It is a little too wide in what a seed does on single
    problems, and too narrow by √((S−1)/S) in what it does on all: with two or three seeds that
    differ much, take `t_interval` of the seeds' means too.

    Raises ValueError for fewer than 2 seeds and for no problems.
    """
    return _crossed([values], level, resamples, seed)


def paired_crossed_interval(
    first: ValuesOfSeeds,
    second: OtherSeeds,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """`crossed_interval` of mean(first) − mean(second), both runs on the same n problems.

    Their S and R seeds have nothing to do with one another and are drawn apart, problems together.
    """
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"runs on {first.shape[1]} and {second.shape[1]} problems are no pairs")
    return _crossed([first, second], level, resamples, seed)


def paired_permutation_test(
    first: Values, second: Values, *, resamples: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p-value of "the two runs do not differ", both on the same n problems.

    Under that hypothesis the sign of each problem's difference is a coin toss. Exact where all
    differences are equally large, as those of right and wrong are (the sign test; McNemar 1947),
    and where at most 2^12 sign patterns differ; else from `resamples` drawn ones, the observed one
    counted in, so that p is never 0 (Phipson & Smyth 2010).

    For runs of several seeds give each problem's mean over them: the test is then about these
    seeds' models, not about the seeds that might have been.
    """
    difference = _difference(first, second)
    difference = difference[difference != 0]  # a sign there changes nothing
    if len(set(abs(difference))) <= 1:
        fewer = min(np.sum(difference > 0), np.sum(difference < 0))
        return min(1.0, 2 * float(bdtr(fewer, len(difference), 0.5))) if len(difference) else 1.0
    observed = abs(difference.sum()) * (1 - 1e-9)  # equal sums in another order count as equal
    if len(difference) <= 12:
        patterns = itertools.product((-1.0, 1.0), repeat=len(difference))
        return float(np.mean([abs(np.dot(signs, difference)) >= observed for signs in patterns]))
    rng = np.random.default_rng(seed)
    n, as_extreme = len(difference), 0
    for k in _blocks(resamples, n):
        signs = rng.integers(0, 2, (k, n)) * 2.0 - 1.0
        as_extreme += int(np.sum(abs(signs @ difference) >= observed))
    return (1 + as_extreme) / (1 + resamples)


def _crossed(runs: list[np.ndarray], level: float, resamples: int, seed: int) -> Interval:
    """Of the first run's mean, less the second's if there is one."""
    for values in runs:
        if len(values) < 2:
            raise ValueError(
                f"{len(values)} seed: an interval over seeds needs at least 2; for one, "
                f"bootstrap_interval says how the figure varies with the problems"
            )
        _checked(values.reshape(-1), 1, level)
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: at least one is needed")
    rng, n = np.random.default_rng(seed), runs[0].shape[1]
    drawn = []
    for k in _blocks(resamples, n):
        problems = _drawn_shares(rng, n, k)
        means = [_drawn_shares(rng, len(values), k) @ values * problems for values in runs]
        drawn.append(means[0].sum(axis=1) - sum(other.sum(axis=1) for other in means[1:]))
    estimate = float(runs[0].mean()) - sum(float(other.mean()) for other in runs[1:])
    return percentile_interval(estimate, np.concatenate(drawn), level)


def _drawn_shares(rng: np.random.Generator, n: int, k: int) -> Float[np.ndarray, "k n"]:
    """k times: the share of each of n things among n draws with replacement."""
    return rng.multinomial(n, np.full(n, 1 / n), size=k) / n


_BLOCK = 2**18  # draws at once: a few MB, and few enough Python steps that threads need not wait


def _blocks(resamples: int, n: int) -> Iterator[int]:
    """Numbers of resamples, of n draws each, to take at a time; they sum to `resamples`."""
    size = max(1, _BLOCK // n)
    for start in range(0, resamples, size):
        yield min(size, resamples - start)


def _checked(values: Values, least: int, level: float) -> Float[np.ndarray, "n"]:
    if len(values) < least:
        raise ValueError(f"an interval needs at least {least} values, got {len(values)}")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: a confidence level lies between 0 and 1, such as 0.95")
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"value {int(np.argmin(np.isfinite(values)))} is not finite: {values}")
    return values


def _difference(first: Values, second: Values) -> Float[np.ndarray, "n"]:
    if len(first) != len(second):
        raise ValueError(f"runs on {len(first)} and {len(second)} problems are no pairs")
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return _checked(difference, 1, 0.5)
