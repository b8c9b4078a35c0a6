"""Policies whose every response is known, scored by hand."""

import dataclasses
import re
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_jax.data.records import Problem, SamplingSettings
from spark_jax.evaluation.benchmarks import (
    BENCHMARKS,
    mean_accuracy,
    policy_scores,
    read_answer,
    sample_responses,
)
from spark_jax.evaluation.intervals import bootstrap_interval
from spark_jax.verification.prompts import CANONICAL

SETTINGS = SamplingSettings(max_new_tokens=30)
FORMAT = dataclasses.replace(CANONICAL, same_answer=lambda a, b: a is not None and a == b)


def response(answer, steps=2, finished=True, tokens=7):
    body = "".join(f"<step> s{i} </step>" for i in range(steps))
    text = f"<think>{body}</think><answer> \\boxed{{{answer}}} </answer>"
    return types.SimpleNamespace(text=text, finished=finished, token_ids=(0,) * tokens)


def problems_of(*answers):
    return [Problem(f"p{i}", f"What is {i}?", answer) for i, answer in enumerate(answers)]


def test_the_papers_six():
    assert BENCHMARKS == ("math500", "aime24", "aime25", "amc23", "olympiadbench", "minerva")


@given(
    st.integers(1, 5).flatmap(
        lambda k: st.lists(
            st.lists(st.sampled_from("abc"), min_size=k, max_size=k), min_size=1, max_size=6
        )
    )
)
def test_figures_are_those_of_counting(answers):
    """The reference of every problem is "a"."""
    k = len(answers[0])
    got = policy_scores(
        FORMAT,
        problems_of(*["a"] * len(answers)),
        [[response(answer) for answer in group] for group in answers],
    )
    shares = [group.count("a") / k for group in answers]
    assert got["correct_per_problem"] == shares
    assert got["accuracy"] == dataclasses.asdict(bootstrap_interval(np.array(shares)))
    assert got[f"pass@{k}"] == pytest.approx(np.mean(["a" in group for group in answers]))
    firsts = [max(group, key=lambda a, g=group: (g.count(a), -g.index(a))) for group in answers]
    assert got[f"maj@{k}"] == pytest.approx(np.mean([first == "a" for first in firsts]))
    assert (got["format_kept"], got["steps"], got["response_length"]) == (1, 2, 7)


def test_every_different_answer_is_graded_once():
    asked = []

    def same_answer(a, b):
        asked.append((a, b))
        return a == b

    counting = dataclasses.replace(CANONICAL, same_answer=same_answer)
    groups = [[response(a) for a in "aab"], [response(a) for a in "xxx"]]
    got = policy_scores(counting, problems_of("a", "x"), groups)
    assert got["accuracy"]["estimate"] == pytest.approx(5 / 6)
    assert {pair: asked.count(pair) for pair in [("a", "a"), ("b", "a")]} == {
        ("a", "a"): 3,  # graded, in the vote of its class, and as its majority
        ("b", "a"): 2,
    }


def test_answers_that_break_the_format_count_only_where_asked_to():
    free = "So it is \\boxed{4}. No wait, \\boxed{5}."
    appended = response("4").text + " Or \\boxed{5}"
    for text, as_trained, last in ((free, None, "5"), (appended, None, "5"), ("none", None, None)):
        assert read_answer(CANONICAL, text, "format") is as_trained
        assert read_answer(CANONICAL, text, "last_boxed") == last
    assert read_answer(CANONICAL, response("4").text, "format") == "4"

    said = [[types.SimpleNamespace(text=free, finished=True, token_ids=(1,))]]
    strict = policy_scores(FORMAT, problems_of("5"), said)
    assert (strict["accuracy"]["estimate"], strict["answered"], strict["format_kept"]) == (0, 0, 0)
    loose = policy_scores(FORMAT, problems_of("5"), said, "last_boxed")
    assert (loose["accuracy"]["estimate"], loose["answered"], loose["format_kept"]) == (1, 1, 0)


def test_without_references_what_is_known_is_reported():
    groups = [[response("a"), response("b", steps=4, finished=False, tokens=9)]]
    got = policy_scores(FORMAT, problems_of(None), groups)
    assert got["accuracy"] == {"estimate": None, "low": None, "high": None}
    assert got["pass@2"] is got["maj@2"] is None
    assert got["correct_per_problem"] == [None]
    assert (got["steps"], got["finished"], got["response_length"]) == (3, 0.5, 8)
    assert (got["num_problems"], got["num_with_reference"]) == (1, 0)

    some = policy_scores(FORMAT, problems_of(None, "a"), groups * 2)
    alone = policy_scores(FORMAT, problems_of("a"), groups)
    for figure in ("accuracy", "pass@2", "maj@2"):
        assert some[figure] == alone[figure]
    assert some["correct_per_problem"] == [None, 0.5]


def test_problems_without_room_for_a_response_count_as_not_answered():
    nothing = types.SimpleNamespace(text="", finished=False, token_ids=())
    got = policy_scores(FORMAT, problems_of("a", "a"), [[response("a")] * 2, [nothing] * 2])
    assert (got["too_long"], got["accuracy"]["estimate"]) == (1, 0.5)
    assert policy_scores(FORMAT, problems_of("a"), [[response("a"), nothing]])["too_long"] == 0


def test_the_mean_of_benchmarks_is_unweighted_and_its_interval_that_of_resampling():
    rng = np.random.default_rng(3)
    shares = {"big": rng.integers(0, 5, 60) / 4, "small": rng.integers(0, 3, 12) / 2}
    got = mean_accuracy({name: values.tolist() for name, values in shares.items()})
    assert got.estimate == pytest.approx((shares["big"].mean() + shares["small"].mean()) / 2)
    draws = [
        np.mean([rng.choice(values, len(values)).mean() for values in shares.values()])
        for _ in range(4000)
    ]
    np.testing.assert_allclose([got.low, got.high], np.quantile(draws, [0.025, 0.975]), atol=0.01)
    alone = bootstrap_interval(shares["small"])
    one = mean_accuracy({"small": shares["small"].tolist()})
    np.testing.assert_allclose([one.low, one.high], [alone.low, alone.high], atol=0.02)
    with pytest.raises(ValueError, match="no benchmarks"):
        mean_accuracy({})


# --- responses in a file -------------------------------------------------------------------------


class Policy:
    """Says of every problem its number and the draw; cannot see a reference in what it is shown."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, *, samples_per_prompt, settings, seed):
        self.calls.append((len(prompts), samples_per_prompt, settings, seed))
        numbers = [int(re.search(r"What is (\d+)\?", prompt)[1]) for prompt in prompts]
        assert not any("secret" in prompt for prompt in prompts)
        return [[response(f"{n}.{d}.{seed}") for d in range(samples_per_prompt)] for n in numbers]


def sampled(policy, path, problems=5, k=2, **changes):
    run = {"settings": SETTINGS, "seed": 1, "model": "m", "chunk_size": 2} | changes
    return sample_responses(
        policy,
        problems_of(*["secret"] * problems),
        CANONICAL,
        samples_per_problem=k,
        path=path,
        **run,
    )


def test_responses_are_grouped_by_problem_and_kept(tmp_path):
    policy, seen = Policy(), []
    got = sampled(policy, tmp_path / "r.jsonl", on_progress=lambda *done: seen.append(done))
    assert [[(r.problem_id, r.index) for r in group] for group in got] == [
        [(f"p{i}", 0), (f"p{i}", 1)] for i in range(5)
    ]
    assert all(f"{{{g[1].problem_id[1:]}.1." in g[1].text for g in got)
    assert {r.num_tokens for group in got for r in group} == {7}
    assert [call[:3] for call in policy.calls] == [(n, 2, SETTINGS) for n in (2, 2, 1)]
    assert len({call[3] for call in policy.calls}) == 3  # a seed of its own for each chunk
    assert (seen[0], seen[-1]) == ((0, 5), (5, 5))

    again = Policy()
    assert sampled(again, tmp_path / "r.jsonl") == got
    assert not again.calls


@pytest.mark.parametrize("lines", [0, 1, 4, 5, 9])
def test_sampling_goes_on_where_it_was_cut(tmp_path, lines):
    whole = tmp_path / "whole.jsonl"
    expected = sampled(Policy(), whole)
    content = whole.read_bytes()
    cut = b"".join(content.splitlines(keepends=True)[:lines]) + b'{"problem_id": "p'
    (tmp_path / "cut.jsonl").write_bytes(cut)
    policy = Policy()
    assert sampled(policy, tmp_path / "cut.jsonl") == expected
    assert (tmp_path / "cut.jsonl").read_bytes() == content
    assert len(policy.calls) == 3 - lines // 4


@pytest.mark.parametrize(
    "changes", [{"seed": 2}, {"k": 3}, {"model": "n"}, {"chunk_size": 3}, {"problems": 4}]
)
def test_responses_of_another_call_are_refused(tmp_path, changes):
    sampled(Policy(), tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match=r"r\.jsonl:\d+: .*another path"):
        sampled(Policy(), tmp_path / "r.jsonl", **changes)
