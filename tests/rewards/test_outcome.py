"""Rewards on the answer: who wins a vote, and what needs a reference."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_jax.data.records import Problem
from spark_jax.rewards import outcome
from spark_jax.rewards.records import RewardInputs


def same(a, b):
    return a is not None and b is not None and a.lower() == b.lower()


@given(st.lists(st.sampled_from(["a", "A", "b", "B", "c", None]), max_size=9))
def test_majority_answer_against_counting(answers):
    given_ = [a for a in answers if a is not None]
    winner = outcome.majority_answer(answers, same)
    if not given_:
        assert winner is None
        return
    counts = {a: sum(same(a, other) for other in given_) for a in given_}
    best = max(counts.values())
    assert winner == next(a for a in given_ if counts[a] == best)  # ties: first appearance


def make(text_format, responses, answers, group_size, ok=None, **more):
    problems = [Problem(f"p{b}", "q", answer) for b, answer in enumerate(answers)]
    ok = np.ones(len(responses), bool) if ok is None else np.array(ok)
    return RewardInputs(problems, responses, group_size, text_format, ok, **more)


def test_rule_based_compares_the_valid_parts_answer(text_format, respond):
    responses = [respond("8"), respond("+8"), respond("9"), respond("9") + " \\boxed{8}"]
    batch = make(text_format, responses, ["8"] * 4, 4)
    assert outcome.rule_based(batch).tolist() == [1, 1, 0, 0]
    assert outcome.rule_based(batch).dtype == np.float32
    broken = make(text_format, responses, ["8"] * 4, 4, ok=[False, True, True, True])
    assert outcome.rule_based(broken).tolist() == [0, 1, 0, 0]


def test_rule_based_names_the_problem_without_a_reference(text_format, respond):
    batch = make(text_format, [respond("8")] * 2, ["8", None], 1)
    with pytest.raises(ValueError, match=r"'p1' \(row 1\) has none"):
        outcome.rule_based(batch)


def test_majority_vote_rewards_the_groups_majority(text_format, respond):
    answers = ["1", "2", "+2", "3", "4", "4", "5", "5", "6"]
    ok = [True] * 3 + [True, False, False] + [True] * 3
    batch = make(text_format, [respond(a) for a in answers], [None] * 9, 3, ok)
    assert outcome.majority_vote(batch).tolist() == [0, 1, 1, 1, 0, 0, 1, 1, 0]


def test_majority_vote_without_any_answer_is_zero(text_format):
    batch = make(text_format, ["no answer"] * 4, [None] * 4, 2)
    assert outcome.majority_vote(batch).tolist() == [0, 0, 0, 0]


def test_random_is_a_fair_seeded_coin_that_respects_the_format(text_format, respond):
    ok = [b % 5 != 0 for b in range(4000)]
    batch = make(text_format, [respond("8")] * 4000, [None] * 4000, 4, ok, seed=3)
    rewards = outcome.random(batch)
    assert set(rewards.tolist()) == {0.0, 1.0}
    assert not rewards[~batch.format_ok].any()
    kept = rewards[batch.format_ok]
    assert abs(kept.mean() - 0.5) < 4 * 0.5 / len(kept) ** 0.5
    np.testing.assert_array_equal(rewards, outcome.random(batch))
    other = make(text_format, [respond("9")] * 4000, [None] * 4000, 4, seed=3)
    np.testing.assert_array_equal(rewards[batch.format_ok], outcome.random(other)[batch.format_ok])
    reseeded = make(text_format, batch.responses, [None] * 4000, 4, ok, seed=4)
    assert (outcome.random(reseeded) != rewards).any()


def test_rows_that_do_not_fit_are_refused(text_format, respond):
    for count, size in itertools.product((3, 5), (2, 4)):
        with pytest.raises(ValueError, match=f"no whole number of groups of group_size={size}"):
            make(text_format, [respond("8")] * count, [None] * count, size)
    with pytest.raises(ValueError, match="one row per response"):
        make(text_format, [respond("8")] * 4, [None] * 2, 2)
