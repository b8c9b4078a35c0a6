import itertools
from collections import Counter
from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jax.data.records import Aggregated, ParseFailure, Verification
from spark_jax.verification.aggregate import AGGREGATIONS, aggregate, balance

FAILED = ParseFailure("missing_overall", "?")


@st.composite
def samples(draw):
    num_steps = draw(st.integers(0, 5))
    valid = st.builds(
        Verification,
        st.text(max_size=3),
        st.tuples(*[st.booleans()] * num_steps),
        st.booleans(),
    )
    return draw(st.lists(valid | st.just(FAILED), max_size=9))


def loop_votes(valid):
    """The majorities by counting, one vote at a time; a tie is incorrect."""
    voted = []
    for k in range(len(valid[0].verdicts)):
        right = wrong = 0
        for verification in valid:
            if verification.verdicts[k]:
                right += 1
            else:
                wrong += 1
        voted.append(right > wrong)
    yes = Counter(v.overall for v in valid)
    return tuple(voted), yes[True] > yes[False]


@settings(max_examples=200, deadline=None)
@given(samples(), st.integers(0, 2**40), st.sampled_from(sorted(AGGREGATIONS)))
def test_votes_and_choice_agree_with_counting_by_hand(drawn, key, method):
    result = aggregate(drawn, method, key=key)
    valid = [v for v in drawn if isinstance(v, Verification)]
    assert (result.method, result.num_samples, result.num_valid) == (method, len(drawn), len(valid))
    assert result == aggregate(drawn, method, key=key)
    if not valid:
        assert result.verification is None
        assert result.chosen is None
        assert result.reason == "no_valid_verification"
        return
    assert drawn[result.chosen] == result.verification
    voted, overall = loop_votes(valid)
    ballots = [[v.verdicts[k] for v in valid] for k in range(len(voted))] + [
        [v.overall for v in valid]
    ]
    sides = [Fraction(max(b.count(True), b.count(False)), len(b)) for b in ballots]
    assert result.agreement == pytest.approx(float(sum(sides) / len(sides)))
    if method.startswith(("outcome", "step")):
        assert (result.voted_verdicts, result.voted_overall) == (voted, overall)
        assert result.exact_match == (result.verification.verdicts == voted)
    else:
        assert (result.voted_verdicts, result.voted_overall, result.exact_match) == (None,) * 3
        assert result.verification == valid[0]
    if method.startswith("outcome"):
        assert result.verification.overall == overall
    if method.startswith("step"):
        distances = [sum(a != b for a, b in zip(v.verdicts, voted)) for v in valid]
        nearest = [v for v, d in zip(valid, distances) if d == min(distances)]
        assert result.verification in nearest
        assert result.exact_match == (min(distances) == 0)
        assert result.reason == ("exact_match" if result.exact_match else "nearest_match")
        if any(v.overall == overall for v in nearest):
            assert result.verification.overall == overall


def test_an_even_split_votes_incorrect_and_no():
    drawn = [Verification("a", (True, False), True), Verification("b", (False, True), False)]
    for method in ("outcome_consistency", "step_consistency"):
        result = aggregate(drawn, method, key=0)
        assert result.voted_verdicts == (False, False)
        assert result.voted_overall is False
        assert result.verification == drawn[1]  # outcome: agrees; step: nearest, and says No
        assert result.exact_match is False


def test_nearest_match_where_no_sample_says_what_the_vote_says():
    drawn = [
        FAILED,
        Verification("one off, Yes", (False, True, True), True),
        Verification("one off, No", (True, False, True), False),
        Verification("one off, No", (True, True, False), False),
    ]
    results = [aggregate(drawn, "step_consistency", key=key) for key in range(40)]
    assert {result.voted_verdicts for result in results} == {(True, True, True)}
    assert {(result.exact_match, result.reason) for result in results} == {(False, "nearest_match")}
    assert {result.chosen for result in results} == {2, 3}  # the majority says No; then by seed


def test_the_draw_is_seeded_and_uniform():
    drawn = [FAILED, *(Verification(str(i), (True,), i != 2) for i in range(5))]
    chosen = Counter(aggregate(drawn, "outcome_consistency", key=key).chosen for key in range(2000))
    assert set(chosen) == {1, 2, 4, 5}
    assert all(abs(count - 500) < 100 for count in chosen.values())


def test_jax_keys_of_both_styles_are_seeds():
    drawn = [Verification(str(i), (True,), True) for i in range(50)]

    def choose(key):
        return aggregate(drawn, "outcome_consistency", key=key).chosen

    for make in (jax.random.key, jax.random.PRNGKey):
        assert [choose(make(s)) for s in range(5)] == [choose(make(s)) for s in range(5)]
        assert len({choose(make(s)) for s in range(5)}) > 1
    assert choose(jax.random.key(7)) == choose(jax.random.PRNGKey(7))
    assert choose(np.int64(3)) == choose(3)


def test_methods_with_the_same_voter_choose_the_same():
    drawn = [Verification(str(i), (i % 3 == 0, True), i % 2 == 0) for i in range(9)]
    for voter in ("outcome_consistency", "step_consistency"):
        plain = aggregate(drawn, voter, key=5)
        assert aggregate(drawn, f"{voter}+meta_critique", key=5).chosen == plain.chosen
    assert aggregate(drawn, "meta_critique", key=5).chosen == 0


def test_the_table_is_the_seven_methods_and_one_may_read_the_reference():
    assert set(AGGREGATIONS) == {
        "single",
        "outcome_consistency",
        "step_consistency",
        "meta_critique",
        "outcome_consistency+meta_critique",
        "step_consistency+meta_critique",
        "reference_guided",
    }
    assert [name for name, row in AGGREGATIONS.items() if row.reference] == ["reference_guided"]
    assert {name for name, row in AGGREGATIONS.items() if row.critique} == {
        name for name in AGGREGATIONS if name.endswith("meta_critique")
    }


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"unknown aggregation 'vote'.*single"):
        aggregate([], "vote", key=0)
    with pytest.raises(ValueError, match=r"verifications with \[1, 2\] step verdicts"):
        aggregate(
            [Verification("", (True,), True), Verification("", (True, True), True)],
            "step_consistency",
            key=0,
        )


def item(verdict, voted=None):
    verification = None if verdict is None else Verification("", (), verdict)
    return Aggregated("m", verification, None, None, voted, None, 1, 1, "")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.sampled_from([None, True, False]),
            st.sampled_from([None, True, False]),
        ),
        max_size=30,
    ),
    st.integers(0, 99),
)
def test_balance_keeps_as_many_yes_as_no_per_problem(rows, key):
    entries = [(problem, item(own, voted)) for problem, own, voted in rows]
    kept, counts = balance(entries, key=key)
    assert kept == sorted(set(kept))
    assert (kept, counts) == balance(entries, key=key)
    for problem in "abc":
        verdicts = {
            chosen: Counter(
                voted if voted is not None else own
                for i, (p, own, voted) in enumerate(rows)
                if p == problem and own is not None and (i in kept or not chosen)
            )
            for chosen in (True, False)
        }
        smaller = min(verdicts[False][True], verdicts[False][False])
        assert verdicts[True][True] == verdicts[True][False] == smaller
    assert counts["dropped_without_verification"] == sum(own is None for _, own, _ in rows)
    assert counts["kept"] == len(kept)
    assert sum(counts.values()) == len(rows)


def test_balance_draws_from_all_of_the_more_frequent_verdict():
    entries = [("a", item(True)), *(("a", item(False)) for _ in range(4))]
    kept = [balance(entries, key=key)[0] for key in range(60)]
    assert {tuple(k) for k in kept} == {(0, i) for i in range(1, 5)}
    assert all(len(k) == 2 for k in itertools.chain(kept))
