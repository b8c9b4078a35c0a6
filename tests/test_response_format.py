"""Each format constraint catches its own hack and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_jax import response_format
from spark_jax.steps import tagged_steps

GOOD = "<think> <step> a </step> </think> <answer> \\boxed{ 8 } </answer>"


@pytest.mark.parametrize(
    ("text", "failing"),
    [
        (GOOD, set()),
        (GOOD + " \n", set()),
        (GOOD + " and more", {"nothing_after_answer"}),
        (GOOD + "\\boxed{9}", {"nothing_after_answer", "one_boxed"}),
        (GOOD + " <answer> 9 </answer>", {"nothing_after_answer", "one_answer_block"}),
        (GOOD.replace("<step> a", "<step> \\boxed{7}"), {"one_boxed"}),
        (GOOD.replace("\\boxed{ 8 }", "8"), {"one_boxed"}),
        (GOOD.replace("\\boxed{ 8 }", "\\boxed{ 8"), {"one_boxed"}),
        (GOOD.replace("\\boxed{ 8 }", "\\boxed{ }"), {"one_boxed"}),
        (GOOD.replace("8", "\\boxed{8}"), {"one_boxed"}),
        (GOOD.replace("8 }", "8 } \\boxed 9"), {"one_boxed"}),
        (GOOD.replace("</answer>", ""), {"one_answer_block"}),
        (GOOD.replace("<answer>", ""), {"one_answer_block"}),
        ("</answer> <answer> \\boxed{8}", {"one_answer_block", "nothing_after_answer"}),
        ("", {"one_boxed", "one_answer_block"}),
    ],
)
def test_checks(text, failing):
    checks = response_format.format_checks(text)
    assert {name for name, holds in checks.items() if not holds} == failing
    assert response_format.format_ok(text) == (not failing)


def test_a_constraint_can_be_switched_off_alone():
    appended = GOOD + " more"
    others = [name for name in response_format.FORMAT_CHECKS if name != "nothing_after_answer"]
    assert not response_format.format_ok(appended)
    assert response_format.format_ok(appended, others)
    assert not response_format.format_ok(appended.replace("8", ""), others)
    with pytest.raises(ValueError, match=r"\['nice'\]; choose from \['one_boxed'"):
        response_format.format_ok(GOOD, ["nice"])


@given(st.text(), st.text(), st.text())
def test_nothing_appended_changes_the_valid_part(before, after, more):
    text = before + "</answer>" + after
    valid = response_format.valid_part(text)
    assert text.startswith(valid)
    assert valid.endswith("</answer>")
    assert valid.count("</answer>") == 1
    assert response_format.valid_part(valid + more) == valid
    assert tagged_steps(text) == tagged_steps(valid)


def test_valid_part_without_an_answer_is_everything():
    assert response_format.valid_part("<step> a") == "<step> a"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{8}", "8"),
        ("\\boxed{ 8 }", "8"),
        ("\\boxed {8}", "8"),
        ("\\boxed{\\frac{1}{2}} }", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{a\\\\{b}}", "a\\\\{b}"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{1} then \\boxed{2", None),
        ("\\boxed{1} then \\boxed 2", None),
        ("\\boxedx{1}", None),
        ("\\boxed{}", None),
        ("boxed{1}", None),
        ("\\boxed", None),
        ("\\boxed{1\\", None),
    ],
)
def test_final_answer(text, answer):
    assert response_format.final_answer(text) == answer


@given(
    st.recursive(
        st.text("ab\\", max_size=3), lambda s: st.lists(s).map("".join).map("{{{}}}".format)
    )
)
def test_final_answer_gives_back_any_balanced_content(content):
    content = content.replace("\\", "\\\\")  # no brace escaped by accident
    assert response_format.final_answer(f"x \\boxed{{{content}}} y") == (content.strip() or None)


def test_step_count_limits_are_inclusive():
    counts = [n for n in range(30) if response_format.step_count_ok(n)]
    assert counts == list(range(3, 21))
    assert [n for n in range(9) if response_format.step_count_ok(n, 1, 2)] == [1, 2]


def test_format_metrics_count_each_hack():
    inflated = GOOD.replace("<step> a </step>", "<step> a </step>" * 25)
    usual = GOOD.replace("<step> a </step>", "<step> a </step>" * 4)
    metrics = response_format.format_metrics(
        [usual, inflated, GOOD + " more", "nothing"], tagged_steps
    )
    assert metrics == {
        "format/failed": 0.5,
        "format/one_boxed_failed": 0.25,
        "format/one_answer_block_failed": 0.25,
        "format/nothing_after_answer_failed": 0.25,
        "hacking/appended_after_answer": 0.25,
        "hacking/too_few_steps": 0.5,
        "hacking/too_many_steps": 0.25,
        "hacking/steps_per_response": (4 + 25 + 1 + 0) / 4,
    }
    assert (
        response_format.format_metrics([GOOD], tagged_steps, (1, 1))["hacking/too_few_steps"] == 0
    )
