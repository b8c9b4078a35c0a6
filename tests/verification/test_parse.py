import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jax.data.records import ParseFailure, Verification
from spark_jax.verification.parse import (
    PARSE_FAILURES,
    format_verification,
    parse_verification,
    verification_body,
)

WORDS = st.lists(
    st.sampled_from(
        [
            "so",
            "3+4=7",
            "the",
            "step is correct",
            "**bold**",
            "Step 2",
            "\n",
            "\n\n",
            "# note",
            "$x$",
        ]
    ),
    max_size=8,
).map(lambda words: "so " + " ".join(words).replace("\n **bold**", "\n bold"))
STEPS = st.lists(st.tuples(WORDS.map(lambda text: text.replace("\n", " ")), WORDS), max_size=6)


def canonical(verdicts=(True, False, True), overall=False):
    steps = [(f"title {i}", f"analysis {i}") for i in range(len(verdicts))]
    return format_verification(steps, verdicts, overall)


def test_the_canonical_text_is_that_of_the_method_page():
    assert format_verification([("add", "3+4 is 7."), ("double", "No.")], [True, False], False) == (
        "## Step 1: add\n3+4 is 7.\n\n**This step is correct.**\n\n"
        "## Step 2: double\nNo.\n\n**This step is incorrect.**\n\n"
        "**Verification: Is the answer correct (Yes/No)? No**"
    )


@settings(max_examples=150, deadline=None)
@given(STEPS, st.randoms(use_true_random=False), st.booleans())
def test_what_is_formatted_is_read_back_exactly(steps, rng, overall):
    verdicts = [rng.random() < 0.5 for _ in steps]
    text = format_verification(steps, verdicts, overall)
    expected = Verification(text, tuple(verdicts), overall)
    assert parse_verification(text, len(steps)) == parse_verification(text, None) == expected
    assert verification_body(text) == text
    for other in (len(steps) - 1, len(steps) + 1):
        if other >= 0:
            assert isinstance(parse_verification(text, other), ParseFailure)


PIECES = [
    *("## Step 1: a\n", "## Step 2: b\n", "### step 3\n", "**Step 1: a**\n"),
    *("**This step is correct.**\n", "**This step is incorrect.**\n", "This step is correct"),
    *("__this STEP is incorrect__", "**Verification: Is the answer correct (Yes/No)? Yes**"),
    *(
        "Verification: Is the answer correct (Yes/No)?",
        " No\n",
        "<think>",
        "</think>",
        "\\boxed{1}",
    ),
    *("Step 99999999999999999999: x\n", "\n", "words ", "**", "\x00", "\ud800", "²"),
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join) | st.text(), st.integers(0, 4))
def test_garbage_never_raises_and_is_never_more_than_it_says(text, num_steps):
    result = parse_verification(text, num_steps)
    assert result.text == text
    anything = parse_verification(text, None)
    if isinstance(anything, Verification):
        assert parse_verification(text, len(anything.verdicts)) == anything
    else:
        assert isinstance(result, ParseFailure)
        assert anything.reason not in ("no_steps", "step_count_mismatch")
    if isinstance(result, ParseFailure):
        assert result.reason in PARSE_FAILURES
    else:
        # An independent count of what a valid text must hold.
        lowered = text.rpartition("</think>")[2].lower()
        assert len(result.verdicts) == num_steps
        assert lowered.count("this step is") >= num_steps
        assert lowered.count("is the answer correct (yes/no)?") >= 1
        assert lowered.count("this step is incorrect") >= result.verdicts.count(False)
        assert lowered.count("this step is correct") >= result.verdicts.count(True)


@pytest.mark.parametrize(
    "variant",
    [
        "**This step is correct.**",
        "**this STEP is Correct.**",
        "**This step is correct**",
        "**This step is correct**.",
        "***This step is correct.***",
        "__This step is correct.__",
        "*This step is correct.*",
        "This step is correct.",
        "  > **This step is correct!**  ",
        "This step is **correct**.",
        "### **This step is correct.**",
        "Both sides agree. **This step is correct.**",
        "**This  step is\tcorrect.**\r",
    ],
)
@pytest.mark.parametrize("word", ["correct", "incorrect"])
def test_case_and_markdown_of_the_step_verdict_are_forgiven(variant, word):
    line = variant.replace("correct", word).replace("Correct", word.upper())
    text = canonical().replace("**This step is incorrect.**", line)
    result = parse_verification(text, 3)
    assert isinstance(result, Verification)
    assert result.verdicts == (True, word == "correct", True)


@pytest.mark.parametrize(
    "line",
    [
        "This step is not correct.",
        "I think this step is correct.",
        "This step is correct?",
        "This step is partially correct.",
        "**This step is mostly correct.**",
        "**This step is correct or incorrect.**",
        "This step is correct because 3+4=7.",
        "**This step is in correct.**",
    ],
)
def test_what_is_no_plain_verdict_is_not_guessed_at(line):
    text = canonical().replace("**This step is incorrect.**", line)
    assert parse_verification(text, 3) == ParseFailure("missing_step_verdict", text)


@pytest.mark.parametrize(
    "variant",
    [
        "**Verification: Is the answer correct (Yes/No)? Yes**",
        "**Verification: Is the answer correct (Yes/No)?** Yes",
        "**Verification:** Is the answer correct (Yes/No)? **YES**.",
        "Verification: is the answer correct (yes/no)? yes",
        "### Verification: Is the answer correct (Yes/No)?: Yes",
        "Verification: Is the answer correct (Yes / No)? `Yes`",
    ],
)
def test_case_and_markdown_of_the_overall_verdict_are_forgiven(variant):
    text = canonical()
    stem = text[: text.index("**Verification")]
    assert parse_verification(stem + variant, 3) == Verification(
        stem + variant, (True, False, True), True
    )
    negated = stem + variant.replace("YES", "Yes").replace("Yes", "No").replace("yes", "no")
    negated = (
        negated.replace("No/No", "Yes/No").replace("No / No", "Yes/No").replace("no/no", "yes/no")
    )
    assert parse_verification(negated, 3) == Verification(negated, (True, False, True), False)


OVERALL = "**Verification: Is the answer correct (Yes/No)? No**"
STEP_3 = "## Step 3: title 2\nanalysis 2\n\n**This step is correct.**\n\n"


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("missing_overall", canonical().replace(OVERALL, "")),
        ("missing_overall", canonical().replace("? No", "?")),
        ("missing_overall", canonical().replace("? No", "? Yes/No")),
        ("missing_overall", canonical().replace("? No", "? Perhaps")),
        ("missing_overall", canonical().replace("? No", "? No, but Yes")),
        ("several_overalls", canonical() + "\n" + OVERALL),
        ("several_overalls", canonical() + "\n" + OVERALL.replace("? No", "? Yes")),
        ("no_steps", "**This step is correct.**\n" * 3 + OVERALL),
        ("step_count_mismatch", canonical((True, True))),
        ("step_count_mismatch", canonical((True,) * 4)),
        ("step_count_mismatch", canonical().replace("## Step 2", "Then step 2")),
        ("steps_out_of_order", canonical().replace("Step 2", "Step 9")),
        ("steps_out_of_order", canonical().replace("Step 2", "Step 1")),
        (
            "steps_out_of_order",
            canonical().replace("Step 2", "Step X").replace("Step 3", "Step 2").replace("X", "3"),
        ),
        ("steps_after_overall", canonical().replace(STEP_3, "") + "\n" + STEP_3),
        ("verdict_outside_steps", "**This step is correct.**\n" + canonical()),
        ("verdict_outside_steps", canonical() + "\n**This step is correct.**"),
        ("missing_step_verdict", canonical().replace("**This step is incorrect.**", "")),
        (
            "conflicting_step_verdicts",
            canonical().replace("analysis 1", "**This step is correct.** No, wait."),
        ),
        (
            "repeated_step_verdict",
            canonical().replace("analysis 0", "**This step is correct.**"),
        ),
        ("unfinished_thinking", "<think> let me see\n" + canonical()),
    ],
)
def test_each_defect_has_its_own_reason(reason, text):
    assert parse_verification(text, 3) == ParseFailure(reason, text)


def test_every_reason_is_covered_above():
    covered = {
        mark.args[1][i][0]
        for mark in test_each_defect_has_its_own_reason.pytestmark
        for i in range(len(mark.args[1]))
    }
    assert covered == set(PARSE_FAILURES)


def test_deliberation_before_and_remarks_after_are_no_part_of_the_verification():
    draft = "<think>" + canonical((False, False, False), True) + "</think>\n"
    text = draft + "Here it is.\n" + canonical() + "\nI hope this helps."
    assert parse_verification(text, 3) == Verification(text, (True, False, True), False)
    assert verification_body(text) == "Here it is.\n" + canonical()


def test_bold_headings_are_read_where_there_are_no_others():
    bold = canonical()
    for number in (1, 2, 3):
        bold = bold.replace(f"## Step {number}: title {number - 1}", f"**Step {number}:** title")
    assert parse_verification(bold, 3) == Verification(bold, (True, False, True), False)
    quoted = canonical().replace("analysis 2", "**Step 1** gave 7.")
    assert isinstance(parse_verification(quoted, 3), Verification)


@pytest.mark.parametrize(
    "step",
    [
        ("a", "**This step is correct.**"),
        ("a", "## Step 2: b"),
        ("a\n## Step 2: c", "d"),
        ("a", OVERALL),
        ("a", "</think>"),
    ],
)
def test_a_text_that_would_not_be_read_back_is_refused(step):
    with pytest.raises(ValueError, match="reword"):
        format_verification([step], [True], True)
    with pytest.raises(ValueError, match="1 steps but 2 verdicts"):
        format_verification([("a", "b")], [True, False], True)


def test_long_texts_are_read_in_linear_time():
    rng = random.Random(0)
    noise = "".join(rng.choice("*_ \t#>(?:yesno/") for _ in range(200_000))
    for text in (noise, "*" * 200_000, "**This step is" + " " * 200_000, noise.replace(" ", "\n")):
        assert isinstance(parse_verification(text, 3), ParseFailure)
