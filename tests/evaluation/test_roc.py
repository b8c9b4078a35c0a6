"""The area under ROC against comparing all pairs."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_jax.evaluation.roc import area_under_roc

SCORES = st.sampled_from([0.0, 0.25, 0.5, 1.0, -np.inf])


@given(st.lists(st.tuples(SCORES, st.booleans()), max_size=12))
def test_against_all_pairs(rows):
    wins = [(a > b) + (a == b) / 2 for a, x in rows for b, y in rows if x and not y]
    got = area_under_roc(np.array([a for a, _ in rows]), np.array([x for _, x in rows], bool))
    if wins:
        assert got == pytest.approx(sum(wins) / len(wins))
    else:
        assert math.isnan(got)


def test_a_nan_score_is_refused():
    with pytest.raises(ValueError, match="score 1 is nan"):
        area_under_roc(np.array([0.0, np.nan]), np.ones(2, bool))
