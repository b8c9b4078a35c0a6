"""The truth of word problems: against a solver of its own, and on solutions that err."""

import random
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from spark_jax.tasks import word_problems as words
from spark_jax.verification.parse import parse_verification
from spark_jax.verification.prompts import CANONICAL


def answer_by_reading(question):
    """An independent reader: sentence by sentence."""
    sentences = question.split(". ")
    value = int(re.search(r"\d+", sentences[0])[0])
    for sentence in sentences[1:-1]:
        number = re.search(r"\d+", sentence)
        if "added" in sentence:
            value += int(number[0])
        elif "taken" in sentence:
            value -= int(number[0])
        else:
            value *= {"doubled": 2, "tripled": 3}[sentence.split()[-1]]
    return value


def test_reference_answers_are_right_and_numbers_small():
    problems = words.problems(300, 0, "train")
    assert {q.count("Then") for q in (p.question for p in problems)} == {3, 4}
    for problem in problems:
        assert problem.answer == str(answer_by_reading(problem.question))
        assert 2 <= int(problem.answer) <= words.LARGEST


def test_splits_share_no_numbers_and_longer_lists_extend_shorter_ones():
    train, held_out = (words.problems(400, seed, s) for seed, s in ((1, "train"), (2, "eval")))
    chains = [{words.read_question(p.question) for p in part} for part in (train, held_out)]
    assert not chains[0] & chains[1]
    assert words.problems(50, 1, "train") == train[:50]
    assert len({p.id for p in train}) == 400
    for arguments in ((None, 0, "train"), (-1, 0, "train"), (5, 0, "test")):
        with pytest.raises(ValueError, match="give a number, train or eval"):
            words.problems(*arguments)


@hypothesis.given(st.integers(0, 10**6))
def test_questions_are_read_back(seed):
    rng = random.Random(seed)
    chain = words.read_question(words.draw(rng).question)
    assert words.read_question(words.write_question(chain, "eggs", "jar")) == chain


def test_a_foreign_question_is_refused():
    with pytest.raises(ValueError, match="'What is 2 \\+ 2\\?' is none of the task word_problems"):
        words.read_question("What is 2 + 2?")
    halved = "A jar holds 8 eggs. Then the number of eggs is halved. How many eggs are in the jar?"
    with pytest.raises(ValueError, match="halved"):
        words.read_question(halved)


PROBLEM = words.Problem(
    "p",
    "A jar holds 10 eggs. Then 5 eggs are added. Then the number of eggs is doubled. Then 7 eggs "
    "are taken out. How many eggs are in the jar?",
    answer="23",
)


@pytest.mark.parametrize(
    ("steps", "answer", "verdicts", "right"),
    [
        (["10 + 5 = 15", "15 * 2 = 30", "30 - 7 = 23"], "23", (True, True, True), True),
        (["10 + 5 = 16", "16 * 2 = 32", "32 - 7 = 25"], "25", (False, True, True), False),
        (["10 + 5 = 15", "15 * 3 = 45", "45 - 7 = 38"], "38", (True, False, True), False),
        (["10 + 5 = 15", "15 * 2 = 30"], "23", (True, True), True),  # right without its last step
        (["5 + 10 = 15", "15 * 2 = 30", "30 - 7 = 23"], "23", (False, True, True), True),
        (["10 + 5 = 15", "so 30", "30 - 7 = 23"], "23", (True, False, True), True),
        (["10 + 5 = 15 and 15 * 2 = 30", "30 - 7 = 23"], "23", (False, False), True),
        (
            ["10 + 5 = 15", "15 * 2 = 30", "30 - 7 = 23", "23 - 7 = 16"],
            "16",
            (True, True, True, False),
            False,
        ),
        ([], "23", (), True),
    ],
)
def test_the_truth_of_steps_and_answers(steps, answer, verdicts, right):
    text = "<think>" + "".join(f"<step> {step} </step>" for step in steps)
    text += f"</think><answer> \\boxed{{{answer}}} </answer>"
    assert words.labels(PROBLEM, text, CANONICAL) == (verdicts, right)


def test_two_boxes_are_no_answer():
    text = "<answer> \\boxed{23} \\boxed{23} </answer>"
    assert words.labels(PROBLEM, text, CANONICAL) == ((), False)


def test_examples_are_solutions_that_err_at_times_and_true_verifications():
    by_prompt = {}
    for problem in words.problems(600, 3, "train"):
        by_prompt[problem.question] = problem
    errors, yes = {"imitated": 0, "verified": 0}, 0
    for position, example in enumerate(words.examples(600, 3, CANONICAL)):
        problem = next(p for q, p in by_prompt.items() if q in example.prompt)
        if position % 3 == 0:
            verdicts, _ = words.labels(problem, example.target, CANONICAL)
            assert len(verdicts) == len(words.read_question(problem.question).operations)
            assert example.prompt == CANONICAL.solve_prompt(problem)
            errors["imitated"] += verdicts.count(False)
        else:
            shown = example.prompt[example.prompt.index("<think>\n<step>") :]
            solution = shown[: shown.index("</answer>") + len("</answer>")]
            verdicts, right = words.labels(problem, solution, CANONICAL)
            read = parse_verification(example.target, len(verdicts))
            assert (read.verdicts, read.overall) == (verdicts, right)
            errors["verified"] += verdicts.count(False)
            yes += right
    assert 0.7 * words.WRONG_STEP < errors["imitated"] / (200 * 3.5) < 1.3 * words.WRONG_STEP
    wrong = words.WRONG_STEP_VERIFIED
    assert 0.8 * wrong < errors["verified"] / (200 * 3.5) < 1.2 * wrong
    assert 0.5 <= yes / 400 < 0.6
