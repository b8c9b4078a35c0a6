"""avg@k, pass@k and maj@k against counting all subsets."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_jax.evaluation.pass_at_k import avg_at_k, maj_at_k, pass_at_k


@given(
    st.integers(1, 7).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=3)
    )
)
def test_pass_at_k_is_the_share_of_subsets_with_a_success(rows):
    correct = np.array(rows, bool)
    for k in range(1, correct.shape[1] + 1):
        expected = [np.mean([any(s) for s in itertools.combinations(row, k)]) for row in rows]
        np.testing.assert_allclose(pass_at_k(correct, k), expected, atol=1e-12)
    np.testing.assert_allclose(avg_at_k(correct), pass_at_k(correct, 1), atol=1e-12)


def test_pass_at_k_of_many_samples_is_finite_and_exact_at_the_ends():
    correct = np.zeros((3, 3000), bool)
    correct[1, 0], correct[2] = True, True
    got = pass_at_k(correct, 1500)
    np.testing.assert_allclose(got, [0, 0.5, 1], atol=1e-9)


@pytest.mark.parametrize("k", [0, 4])
def test_impossible_k_is_refused(k):
    with pytest.raises(ValueError, match=f"pass@{k} needs 1 <= k <= n"):
        pass_at_k(np.ones((2, 3), bool), k)


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        avg_at_k(np.ones((2, 0), bool))


def test_maj_at_k():
    def same(a, b):
        return a is not None and b is not None and float(a) == float(b)

    answers = [["1", "2", "2.0"], ["1", "2"], [None, None, "3"], [None], []]
    assert maj_at_k(answers, ["2", "2", "3", "4", "5"], same).tolist() == [1, 0, 1, 0, 0]
    with pytest.raises(ValueError, match="5 problems, 1 references"):
        maj_at_k(answers, ["1"], same)
