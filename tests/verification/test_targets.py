import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jax.data.formats import REWARD_KINDS
from spark_jax.data.records import (
    Aggregated,
    ParseFailure,
    Problem,
    Provenance,
    SamplingSettings,
    Solution,
    Verification,
    VerifiedSolution,
)
from spark_jax.verification.parse import format_verification
from spark_jax.verification.prompts import CANONICAL
from spark_jax.verification.targets import training_pair, training_pairs

VERDICTS = st.lists(st.booleans(), max_size=6).map(tuple)


def verification(verdicts, overall):
    steps = [(f"t{k}", f"a{k}") for k in range(len(verdicts))]
    return Verification(format_verification(steps, verdicts, overall), tuple(verdicts), overall)


def test_the_three_targets_are_those_of_the_method_page():
    given_one = verification((True, False), False)
    targets = {kind: CANONICAL.reward_target(kind, given_one) for kind in REWARD_KINDS}
    assert targets == {
        "orm": "No",
        "prm": "Step 1: Correct\nStep 2: Incorrect\n"
        "**Verification: Is the answer correct (Yes/No)? No**",
        "prm_cot": given_one.text,
    }
    noisy = dataclasses.replace(given_one, text=f"<think>hm</think>\n{given_one.text}\n\nDone.")
    assert {kind: CANONICAL.reward_target(kind, noisy) for kind in REWARD_KINDS} == targets


@settings(max_examples=100, deadline=None)
@given(VERDICTS, st.booleans(), st.sampled_from(REWARD_KINDS))
def test_judgements_are_read_back_from_targets(verdicts, overall, kind):
    target = CANONICAL.reward_target(kind, verification(verdicts, overall))
    read = CANONICAL.parse_judgement(kind, target, len(verdicts))
    assert read == Verification(target, () if kind == "orm" else verdicts, overall)
    assert CANONICAL.parse_judgement(kind, target, None) == read
    other = CANONICAL.parse_judgement(kind, target, len(verdicts) + 1)
    assert isinstance(other, ParseFailure) == (kind != "orm")


OVERALL = "**Verification: Is the answer correct (Yes/No)? No**"
LINES = [
    "Step 1: Correct",
    "Step 2: Incorrect",
    "**Step 1:** correct.",
    "step 2 - x",
    OVERALL,
    "Yes",
]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(LINES) | st.text(max_size=8), max_size=6).map("\n".join),
    st.integers(0, 3),
    st.sampled_from(REWARD_KINDS),
)
def test_garbage_judgements_never_raise(text, num_steps, kind):
    result = CANONICAL.parse_judgement(kind, text, num_steps)
    assert result.text == text
    anything = CANONICAL.parse_judgement(kind, text, None)
    if isinstance(anything, Verification):
        assert CANONICAL.parse_judgement(kind, text, len(anything.verdicts)) == anything
    else:
        assert isinstance(result, ParseFailure)
    if isinstance(result, Verification):
        assert len(result.verdicts) == (0 if kind == "orm" else num_steps)
        if kind == "prm":
            assert text.lower().count("correct") >= num_steps + 1
            assert text.count(OVERALL) == 1


@pytest.mark.parametrize(
    ("kind", "reason", "text"),
    [
        ("orm", "not_yes_or_no", "Yes, because 3+4=7."),
        ("orm", "not_yes_or_no", ""),
        ("orm", "not_yes_or_no", "Yes No"),
        ("prm", "missing_overall", "Step 1: Correct\nStep 2: Correct"),
        ("prm", "several_overalls", f"Step 1: Correct\nStep 2: Correct\n{OVERALL}\n{OVERALL}"),
        ("prm", "no_steps", OVERALL),
        ("prm", "step_count_mismatch", f"Step 1: Correct\n{OVERALL}"),
        ("prm", "step_count_mismatch", f"Step 1: Correct\nStep 2: Correct?\n{OVERALL}"),
        ("prm", "step_count_mismatch", f"Step 1: Correct\nStep 2: Not correct\n{OVERALL}"),
        ("prm", "steps_out_of_order", f"Step 2: Correct\nStep 1: Correct\n{OVERALL}"),
        ("prm", "steps_after_overall", f"Step 1: Correct\n{OVERALL}\nStep 2: Correct"),
    ],
)
def test_what_is_no_judgement_has_its_reason(kind, reason, text):
    assert CANONICAL.parse_judgement(kind, text, 2) == ParseFailure(reason, text)


def test_case_and_markdown_of_judgements_are_forgiven():
    assert CANONICAL.parse_judgement("orm", " **yes**.\n", 3).overall is True
    text = f"**Step 1:** CORRECT.\n- Step 2: **incorrect**\n{OVERALL}"
    assert CANONICAL.parse_judgement("prm", text, 2).verdicts == (True, False)


PROBLEMS = [Problem("p", "What is 3+4?", "SECRET")]
SOLUTIONS = [
    Solution("p", i, f"<step>attempt {i}</step>", (f"attempt {i}",), None) for i in range(3)
]


def verified(index, chosen, reason="first_valid"):
    item = Aggregated("single", chosen, 0, None, None, None, 1, 1, reason)
    return VerifiedSolution("p", index, (), (), (item,), Provenance("m", SamplingSettings(), 0, 0))


@pytest.mark.parametrize("kind", REWARD_KINDS)
def test_pairs_are_made_of_what_was_verified_and_show_no_reference(kind):
    good, bad = verification((True,), True), verification((False,), False)
    records = [verified(2, good), verified(0, None, "no_valid_verification"), verified(1, bad)]
    pairs, without = training_pairs(CANONICAL, kind, "single", PROBLEMS, SOLUTIONS, records)
    assert without == {"no_valid_verification": 1}
    assert [(p.solution_index, p.problem_id, p.kind) for p in pairs] == [
        (2, "p", kind),
        (1, "p", kind),
    ]
    assert [p.target for p in pairs] == [CANONICAL.reward_target(kind, v) for v in (good, bad)]
    for pair in pairs:
        assert f"attempt {pair.solution_index}" in pair.prompt
        assert "SECRET" not in pair.prompt
        assert pair.prompt == CANONICAL.reward_prompt(
            kind, PROBLEMS[0], SOLUTIONS[pair.solution_index].text
        )


def test_no_format_function_is_handed_the_answer():
    def refuse(kind, problem, text):
        assert problem.answer is None
        return "prompt"

    watched = dataclasses.replace(CANONICAL, reward_prompt=refuse)
    pair = training_pair(watched, "orm", PROBLEMS[0], SOLUTIONS[0], verification((True,), True))
    assert (pair.prompt, pair.target) == ("prompt", "Yes")


def test_records_that_do_not_belong_together_are_refused():
    records = [verified(7, verification((True,), True))]
    with pytest.raises(ValueError, match=r"\('p', 7\): no such problem or solution"):
        training_pairs(CANONICAL, "orm", "single", PROBLEMS, SOLUTIONS, records)
    with pytest.raises(ValueError, match=r"'step_consistency', only by \['single'\]"):
        training_pairs(CANONICAL, "orm", "step_consistency", PROBLEMS, SOLUTIONS, records)
