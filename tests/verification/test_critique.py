import dataclasses
import logging

import pytest

from spark_jax.data.records import Problem, SamplingSettings, Solution, Verification
from spark_jax.verification.aggregate import aggregate
from spark_jax.verification.critique import critique_and_merge, mentions_of_critique
from spark_jax.verification.parse import format_verification
from spark_jax.verification.prompts import CANONICAL

PROBLEM = Problem("p", "What is 3+4?")
TEXT = "<step>a</step><step>b</step> \\boxed{7}"
SOLUTION = Solution("p", 0, TEXT, ("a", "b"), "7")
BEFORE = Verification(
    format_verification([("a", "x"), ("b", "y")], [True, True], True), (True, True), True
)
SETTINGS = SamplingSettings(temperature=0.8, top_p=0.95, max_new_tokens=77)


@dataclasses.dataclass(frozen=True)
class Text:
    text: str
    finished: bool = True


class Scripted:
    """Gives the critiques asked for, then the merges; keeps the calls."""

    def __init__(self, *rounds):
        self.rounds = list(rounds)
        self.calls = []

    def __call__(self, prompts, *, samples_per_prompt, settings, seed):
        assert samples_per_prompt == 1
        assert settings == dataclasses.replace(SETTINGS, greedy=True)
        self.calls.append(list(prompts))
        texts = self.rounds.pop(0)
        assert len(texts) == len(prompts)
        return [[Text(text)] for text in texts]


def run(sample, items):
    return critique_and_merge(sample, CANONICAL, items, settings=SETTINGS, seed=3)


def merge_into(text, solution=SOLUTION, before=BEFORE):
    item = aggregate([before, before], "step_consistency+meta_critique", key=0)
    sample = Scripted(["Step 2 is wrong."], [text])
    (result,) = run(sample, [(PROBLEM, solution, item)])
    assert BEFORE.text in sample.calls[0][0]
    assert "Step 2 is wrong." in sample.calls[1][0]
    assert result.critique == "Step 2 is wrong."
    assert (result.chosen, result.voted_verdicts) == (item.chosen, (True, True))
    return result


def test_a_good_merge_takes_the_place_of_the_verification():
    text = format_verification([("a", "x"), ("b", "no: 3+4=7")], [True, False], False)
    result = merge_into(text)
    assert result.verification == Verification(text, (True, False), False)
    assert (result.merge, result.reason) == ("merged", "exact_match+merged")
    assert result.exact_match is False  # the merged verdicts are not those voted for


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("It is all fine.", "missing_overall"),
        (format_verification([("a", "x")], [True], True), "step_count_mismatch"),
        (
            format_verification(
                [("a", "The CRITIQUE is right."), ("b", "y")], [True, False], False
            ),
            "mentions_critique",
        ),
        (
            format_verification(
                [("a", "x"), ("b", "The previous\nverification")], [True] * 2, True
            ),
            "mentions_critique",
        ),
    ],
)
def test_a_bad_merge_is_counted_and_the_verification_stands(text, reason, caplog):
    result = merge_into(text)
    assert result.verification == BEFORE
    assert result.exact_match is True
    assert result.merge == f"not_merged_{reason}"
    assert result.reason == f"exact_match+not_merged_{reason}"
    assert f"1 of 1 merges not used, the un-merged verification stands: {{'{reason}': 1}}" in (
        caplog.text
    )


def test_words_of_the_problem_or_the_solution_do_not_give_a_merge_away():
    solution = dataclasses.replace(SOLUTION, text=TEXT + " A critic said so.")
    text = format_verification([("a", "the critic"), ("b", "y")], [True, True], True)
    assert merge_into(text, solution).merge == "merged"
    assert merge_into(text).merge == "not_merged_mentions_critique"


def test_plain_verifications_mention_no_critique():
    assert mentions_of_critique("A critical point; the first step; verification of 3+4=7") == set()
    assert mentions_of_critique("As critiqued, the Original  Verification") == {
        "critiqued",
        "original verification",
    }


def test_records_without_a_verification_pass_and_equal_questions_are_asked_once(caplog):
    caplog.set_level(logging.WARNING)
    chosen = aggregate([BEFORE], "meta_critique", key=0)
    other = aggregate([BEFORE], "step_consistency+meta_critique", key=0)
    nothing = aggregate([], "meta_critique", key=0)
    sample = Scripted(["fine"], [BEFORE.text])
    items = [(PROBLEM, SOLUTION, item) for item in (chosen, nothing, other)]
    results = run(sample, items)
    assert [len(prompts) for prompts in sample.calls] == [1, 1]
    assert results[1] == nothing
    assert [result.merge for result in results] == ["merged", None, "merged"]
    assert [result.method for result in results] == [chosen.method, nothing.method, other.method]
    assert caplog.text == ""
    assert run(Scripted(), [(PROBLEM, SOLUTION, nothing)]) == [nothing]
