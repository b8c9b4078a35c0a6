"""The embedded world's prompts and readers."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jax.data.formats import REWARD_KINDS
from spark_jax.data.records import ParseFailure, Problem, Verification
from spark_jax.tasks.arithmetic_chains import world
from spark_jax.tasks.arithmetic_chains.format import FORMAT

PROBLEM = Problem("p", "7 1: +5 2: *3 3: *7", "2")
SOLUTION = (
    "<think> <step> 1: 7 +5 =2 </step> <step> 2: 2 *3 =6 </step> <step> 3: 6 *7 =2 </step> "
    "</think> <answer> \\boxed{ 2 } </answer>"
)
VERIFICATION = "1: 7 +5 =2 Correct 2: 2 *3 =5 Incorrect 3: 6 *7 =2 Correct <verdict> No"
CRITIQUE = "1: 7 +5 =2 Correct 2: 2 *3 =6 Correct 3: 6 *7 =2 Correct"


DIGIT = st.integers(0, 9)
STEP = st.builds(world.Step, DIGIT, st.sampled_from(world.OPERATORS), DIGIT)
LINES = st.lists(st.builds(world.VerifiedStep, STEP, st.booleans()), max_size=world.MAX_STEPS)


def as_verification(lines: list[world.VerifiedStep], overall: bool) -> Verification:
    verdicts = tuple(line.verdict for line in lines)
    return Verification(world.write_verification(lines, overall), verdicts, overall)


def test_prompts_are_these_words():
    question = "<q> 7 1: +5 2: *3 3: *7 <a>"
    assert FORMAT.solve_prompt(PROBLEM) == question
    solved = f"{question} {SOLUTION} <eos>"
    assert FORMAT.verify_prompt(PROBLEM, SOLUTION, None) == f"{solved} <verify>"
    guided = FORMAT.verify_prompt(PROBLEM, SOLUTION, "2")
    assert guided == f"{solved} <reference> 2 Yes <verify>"
    unfinished = FORMAT.verify_prompt(PROBLEM, "<think>", "2")
    assert unfinished == f"{question} <think> <eos> <reference> 2 No <verify>"
    criticised = f"{solved} <verify> {VERIFICATION} <eos> <critique>"
    assert FORMAT.critique_prompt(PROBLEM, SOLUTION, VERIFICATION) == criticised
    merge = FORMAT.merge_prompt(PROBLEM, SOLUTION, VERIFICATION, CRITIQUE)
    assert merge == f"{criticised} {CRITIQUE} <eos> <merge>"
    markers = [FORMAT.reward_prompt(kind, PROBLEM, SOLUTION) for kind in REWARD_KINDS]
    assert markers == [f"{solved} {end}" for end in ("<verdict>", "<judge>", "<verify>")]


def test_no_prompt_but_the_reference_guided_one_knows_the_answer():
    def prompts(answer: str | None) -> list[str]:
        problem = Problem(PROBLEM.id, PROBLEM.question, answer)
        return [
            FORMAT.solve_prompt(problem),
            FORMAT.verify_prompt(problem, SOLUTION, None),
            FORMAT.critique_prompt(problem, SOLUTION, VERIFICATION),
            FORMAT.merge_prompt(problem, SOLUTION, VERIFICATION, CRITIQUE),
            *(FORMAT.reward_prompt(kind, problem, SOLUTION) for kind in REWARD_KINDS),
        ]

    assert prompts("2") == prompts("9") == prompts(None)


def test_a_question_of_another_task_is_refused():
    with pytest.raises(ValueError, match="no arithmetic chain"):
        FORMAT.solve_prompt(Problem("x", "What is 2+2?"))


@settings(max_examples=100, deadline=None)
@given(LINES, st.booleans())
def test_valid_verifications_are_read_back(lines, overall):
    verification = as_verification(lines, overall)
    steps = len(verification.verdicts)
    assert FORMAT.parse_verification(verification.text, steps) == verification
    assert FORMAT.parse_verification(verification.text, None) == verification
    for other in {steps - 1, steps + 1}:
        assert isinstance(FORMAT.parse_verification(verification.text, other), ParseFailure)


@settings(max_examples=200, deadline=None)
@given(LINES, st.booleans(), st.data())
def test_a_lost_or_added_word_makes_a_verification_invalid(lines, overall, data):
    verification = as_verification(lines, overall)
    words = verification.text.split()
    place = data.draw(st.integers(0, len(words) - 1))
    steps = len(verification.verdicts)
    lost = " ".join(words[:place] + words[place + 1 :])
    assert isinstance(FORMAT.parse_verification(lost, steps), ParseFailure)
    added = data.draw(st.sampled_from(world.VOCABULARY))
    more = " ".join([*words[:place], added, *words[place:]])
    assert isinstance(FORMAT.parse_verification(more, steps), ParseFailure)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "missing_overall"),
        ("1: 7 +5 =2 Correct", "missing_overall"),
        ("1: 7 +5 =2 Correct <verdict>", "missing_overall"),
        ("1: 7 +5 =2 Correct <verdict> Correct", "missing_overall"),
        ("1: 7 +5 =2 Correct <verdict> Yes No", "text_after_overall"),
        ("<verdict> Yes", "no_steps"),
        ("1: 7 +5 =2 Correct 2: 2 +5 =7 Correct <verdict> Yes", "step_count_mismatch"),
        ("2: 7 +5 =2 Correct <verdict> Yes", "malformed_step"),
        ("1: 7 +5 2 Correct <verdict> Yes", "malformed_step"),
        ("1: 7 +5 =2 Yes <verdict> Yes", "malformed_step"),
        ("1: 7 +5 =2 <verdict> Yes", "malformed_step"),
    ],
)
def test_failures_are_named(text, reason):
    assert FORMAT.parse_verification(text, 1) == ParseFailure(reason, text)
    assert FORMAT.parse_judgement("prm_cot", text, 1) == ParseFailure(reason, text)


@settings(max_examples=100, deadline=None)
@given(LINES, st.booleans())
def test_reward_targets_are_read_back(lines, overall):
    verification = as_verification(lines, overall)
    steps = len(verification.verdicts)
    for kind in REWARD_KINDS:
        target = FORMAT.reward_target(kind, verification)
        verdicts = () if kind == "orm" else verification.verdicts
        read = FORMAT.parse_judgement(kind, target, steps)
        assert read == Verification(target, verdicts, verification.overall)
        assert FORMAT.parse_judgement(kind, target, None) == read
        more = FORMAT.parse_judgement(kind, f"{target} Yes", steps)
        assert isinstance(more, ParseFailure)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(world.VOCABULARY), max_size=40).map(" ".join) | st.text(),
    st.integers(0, 8),
)
def test_readers_never_raise(text, steps):
    for kind in REWARD_KINDS:
        read = FORMAT.parse_judgement(kind, text, steps)
        assert isinstance(read, ParseFailure) or len(read.verdicts) == steps * (kind != "orm")
        anything = FORMAT.parse_judgement(kind, text, None)
        if isinstance(anything, Verification):
            assert FORMAT.parse_judgement(kind, text, len(anything.verdicts)) == anything
        else:
            assert isinstance(read, ParseFailure)
    answer = FORMAT.final_answer(text)
    assert FORMAT.same_answer(answer, answer) == (answer is not None)


def test_steps_and_answers_of_a_response():
    spans = FORMAT.split_steps(SOLUTION)
    assert [SOLUTION[a:b] for a, b in spans] == [
        "<step> 1: 7 +5 =2 </step>",
        "<step> 2: 2 *3 =6 </step>",
        "<step> 3: 6 *7 =2 </step>",
    ]
    assert FORMAT.final_answer(SOLUTION) == "2"
    assert FORMAT.final_answer(f"{SOLUTION} <answer> \\boxed{{ 3 }} </answer>") == "3"
    assert FORMAT.final_answer("<answer> \\boxed{ } </answer>") is None
    assert FORMAT.final_answer("<answer> 3 </answer>") is None
    assert FORMAT.same_answer(" 3", "3 ")
    assert not FORMAT.same_answer("3", "4")
    assert not FORMAT.same_answer(None, None)
    assert not FORMAT.same_answer(None, "3")


def test_the_world_speaks_its_format():
    rng = random.Random(0)
    for problem in world.problems(200, 0, "eval"):
        text = world.noisy_solution(world.read_question(problem.question), rng)
        steps = FORMAT.split_steps(text)
        assert len(steps) == len(world.step_labels(problem, text)) >= 2
        verification = world.noisy_verification(problem, text, rng)
        read = FORMAT.parse_verification(verification, len(steps))
        assert isinstance(read, Verification)
        critique = world.noisy_critique(problem, text, verification, rng)
        merged = world.merged_verification(problem, text, critique, rng)
        assert isinstance(FORMAT.parse_verification(merged, len(steps)), Verification)
