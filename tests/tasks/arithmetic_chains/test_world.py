"""The embedded world's texts against its table of noise, read by a second, independent reader."""

from __future__ import annotations

import collections
import functools
import math
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jax.data.records import Problem
from spark_jax.tasks.arithmetic_chains import world

PROBLEM = Problem("p", "7 1: +5 2: *3 3: *7", "2")  # 7 → 2 → 6 → 2


def test_the_example_in_the_docstring_is_right():
    assert world.__doc__ is not None
    assert f"<q> {PROBLEM.question} <a>" in world.__doc__
    boxed = re.findall(r"boxed\{ (\d) \}", world.__doc__)
    assert boxed == [str(world.true_answer(world.read_question(PROBLEM.question)))]


@functools.cache
def calculate(left: int, operator: str) -> int:
    return eval(f"{left}{operator}") % 10


def expect_rate(hits: int, trials: int, p: float) -> None:
    """`hits` is within 4.5 standard deviations of a binomial's mean (1 in 150 000 by chance)."""
    assert trials > 100, trials
    slack = 4.5 * math.sqrt(trials * p * (1 - p)) + 1
    assert abs(hits - trials * p) <= slack, f"{hits}/{trials} = {hits / trials:.4f}, not {p}"


def read_solution(text: str) -> tuple[list[tuple[int, str, int]], list[int]]:
    steps = re.findall(r"<step> (\d): (\d) (\S+) =(\d) </step>", text)
    assert [int(number) for number, *_ in steps] == list(range(1, len(steps) + 1))
    boxes = re.findall(r"<answer> \\boxed\{ (\d) \} </answer>", text)
    return [(int(a), op, int(v)) for _, a, op, v in steps], [int(box) for box in boxes]


def read_verification(text: str) -> tuple[list[tuple[int, str, int, bool]], bool]:
    lines = re.findall(r"\d: (\d) (\S+) =(\d) (Correct|Incorrect)", text)
    overall = text.split()[-2:]
    assert overall[0] == "<verdict>"
    read = [(int(a), op, int(v), verdict == "Correct") for a, op, v, verdict in lines]
    return read, overall[1] == "Yes"


Sample = tuple[Problem, str, list[dict]]  # with the solution's text, and its steps as `walk` reads


@pytest.fixture(scope="module", params=[6000, pytest.param(20_000, marks=pytest.mark.slow)])
def samples(request) -> list[Sample]:
    """Rates of one in a hundred may be off by a third in a few; the slow tests see them closer."""
    rng = random.Random(1)
    chains = [world.draw_chain(rng, "train") for _ in range(request.param)]
    texts = [(world.as_problem(chain), world.noisy_solution(chain, rng)) for chain in chains]
    return [(problem, text, walk(problem, text)) for problem, text in texts]


def walk(problem: Problem, text: str) -> list[dict]:
    """Every step with what was due and what is true, by its own reading of the text."""
    words = problem.question.split()
    value, operators = int(words[0]), words[2::2]
    steps = []
    for left, operator, said in read_solution(text)[0]:
        restates = operator == "+0"
        due = "+0" if restates else operators.pop(0)
        steps.append(
            {
                "left": left,
                "operator": operator,
                "said": said,
                "true": calculate(left, operator),
                "due": (value, due),
                "restates": restates,
            }
        )
        value = said
    return steps


def test_operators_are_bijections_and_misconceptions_are_wrong_by_two_to_eight():
    for operator in world.OPERATORS:
        assert {world.apply(value, operator) for value in range(10)} == set(range(10))
        assert all(world.apply(v, operator) == calculate(v, operator) for v in range(10))
    wrong = world.misconceptions()
    assert len(wrong) == 12
    assert len(world.OPERATORS) * 10 == 100
    for (left, operator), said in wrong.items():
        assert 2 <= (said - calculate(left, operator)) % 10 <= 8


def test_problems_are_distinct_true_stable_and_uniform_in_length():
    drawn = world.problems(3000, 0, "train")
    assert len({p.question for p in drawn}) == len({p.id for p in drawn}) == 3000
    assert world.problems(100, 0, "train") == drawn[:100]
    assert world.problems(100, 1, "train") != drawn[:100]
    lengths = collections.Counter()
    for problem in drawn:
        words = problem.question.split()
        value = int(words[0])
        for operator in words[2::2]:
            value = calculate(value, operator)
        assert problem.answer == str(value)
        lengths[len(words) // 2] += 1
    assert set(lengths) == {3, 4, 5}
    for count in lengths.values():
        expect_rate(count, 3000, 1 / 3)


def test_splits_never_overlap_whatever_the_seeds():
    train = {p.question for seed in range(3) for p in world.problems(700, seed, "train")}
    held_out = {p.question for seed in range(3) for p in world.problems(350, seed, "eval")}
    assert not train & held_out
    rng = random.Random(0)
    chains = [
        world.Chain(rng.randrange(10), tuple(rng.choices(world.OPERATORS, k=4)))
        for _ in range(5000)
    ]
    expect_rate(sum(world.split_of(chain) == "eval" for chain in chains), 5000, 0.2)


@pytest.mark.parametrize(
    ("num", "split", "named"),
    [
        (4000, "eval", "num=4000"),
        (20_000, "train", "num=20000"),
        (-1, "train", "num=-1"),
        (1, "test", "split='test'"),
    ],
)
def test_problems_refuses_what_it_cannot_give(num, split, named):
    with pytest.raises(ValueError, match=named):
        world.problems(num, 0, split)


@pytest.mark.parametrize(
    "question", ["", "7", "7 +5", "7 1: +8", "7 2: +5", "12 1: +5", "7 1: +0", "<q> 7 1: +5 <a>"]
)
def test_a_question_that_is_no_chain_is_refused_with_an_example(question):
    with pytest.raises(ValueError, match=r"such as '7 1: \+5"):
        world.read_question(question)


def test_generator_frequencies_match_the_table(samples):
    count: collections.Counter[str] = collections.Counter()
    wrong_by: collections.Counter[int] = collections.Counter()
    misconceptions = world.misconceptions()
    for problem, text, steps in samples:
        operations = [step for step in steps if not step["restates"]]
        asked = len(problem.question.split()) // 2
        count["skipped"] += len(operations) == asked - 1
        assert len(operations) in (asked, asked - 1)
        assert len(steps) <= 6
        if asked == 3:  # room for at least two restatements
            count["room"] += 1
            count["restated"] += len(steps) > len(operations)
            count["restated twice"] += len(steps) > len(operations) + 1
        _, boxes = read_solution(text)
        count["wrong box"] += boxes[0] != steps[-1]["said"]
        count["second answer"] += len(boxes) == 2 and boxes[0] != boxes[1]
        assert len(text.split()) <= 48
        for step in steps:
            if step["restates"]:
                assert step["left"] == step["said"] == step["due"][0]
                continue
            count["operations"] += 1
            left, operator = step["left"], step["operator"]
            count["wrong operand"] += left != step["due"][0]
            count["wrong operator"] += operator != step["due"][1]
            kind = "misconceived" if (left, operator) in misconceptions else "other"
            count[kind] += 1
            if step["said"] != step["true"]:
                count[f"{kind} wrong"] += 1
                if kind == "misconceived":
                    assert step["said"] == misconceptions[left, operator]
                else:
                    wrong_by[(step["said"] - step["true"]) % 10] += 1
    expect_rate(count["misconceived wrong"], count["misconceived"], 0.65)
    expect_rate(count["other wrong"], count["other"], 0.07)
    expect_rate(count["wrong operand"], count["operations"], 0.0075)
    expect_rate(count["wrong operator"], count["operations"], 0.0075)
    expect_rate(count["skipped"], len(samples), 0.03)
    expect_rate(count["restated"], count["room"], 0.12)
    expect_rate(count["restated twice"], count["room"], 0.12**2)
    expect_rate(count["wrong box"], len(samples), 0.01)
    expect_rate(count["second answer"], len(samples), 0.03)
    assert set(wrong_by) == set(range(2, 9))
    for hits in wrong_by.values():
        expect_rate(hits, sum(wrong_by.values()), 1 / 7)


def test_labels_agree_with_the_independent_reading(samples):
    for problem, text, steps in samples[: max(1000, len(samples) // 10)]:
        expected = tuple(
            (s["left"], s["operator"]) == s["due"] and s["said"] == s["true"] for s in steps
        )
        assert world.step_labels(problem, text) == expected
        boxes = read_solution(text)[1]
        assert world.is_correct(problem, text) == (boxes == [int(problem.answer or -1)])


def test_verifier_frequencies_match_the_table(samples):
    rng = random.Random(2)
    count: collections.Counter[str] = collections.Counter()
    for problem, text, steps in samples[:12_000]:
        boxes = read_solution(text)[1]
        lines, overall = read_verification(world.noisy_verification(problem, text, rng))
        assert len(lines) == len(steps)
        for step, (left, operator, value, verdict) in zip(steps, lines):
            assert verdict == ((left, operator, value) == tuple(step.values())[:3])
            stated = (step["left"], step["operator"])
            if stated != step["due"]:
                count["copying errors"] += 1
                if (left, operator) == step["due"]:
                    count["copying errors seen"] += 1
                    continue
            assert (left, operator) == stated
            by = (value - step["true"]) % 10
            if step["said"] == step["true"]:
                count["right"] += 1
                count["right confirmed"] += by == 0
                count["right slipped up"] += by == 1
                assert by in (0, 1, 9)
            else:
                count["wrong"] += 1
                count["wrong echoed"] += value == step["said"]
                count["wrong corrected"] += by == 0
                count["wrong slipped"] += by in (1, 9)
                assert value == step["said"] or by in (0, 1, 9)
        all_correct = all(line[3] for line in lines)
        whole = sum(not s["restates"] for s in steps) == len(problem.question.split()) // 2
        if whole and boxes == [steps[-1]["said"]]:
            count["sound"] += 1
            count["flipped"] += overall != all_correct
        elif all_correct:
            count["unsound"] += 1
            count["unsound accepted"] += overall
    expect_rate(count["right confirmed"], count["right"], 0.80)
    expect_rate(count["right slipped up"], count["right"], 0.10)
    expect_rate(count["wrong echoed"], count["wrong"], 0.30)
    expect_rate(count["wrong corrected"], count["wrong"], 0.24)
    expect_rate(count["wrong slipped"], count["wrong"], 0.46)
    expect_rate(count["copying errors seen"], count["copying errors"], 0.6)
    expect_rate(count["flipped"], count["sound"], 0.06)
    expect_rate(count["unsound accepted"], count["unsound"], 0.6 * 0.06 + 0.4 * 0.94)


def test_a_reference_is_never_contradicted_and_makes_the_verifier_look_harder(samples):
    rng = random.Random(3)
    count: collections.Counter[str] = collections.Counter()
    for problem, text, steps in samples[: max(1500, len(samples) // 5)]:
        verification = world.noisy_verification(problem, text, rng, reference=problem.answer)
        lines, overall = read_verification(verification)
        agrees = str(read_solution(text)[1][-1]) == problem.answer
        assert overall == agrees
        for step, (*stated, value, _) in zip(steps, lines):
            if tuple(stated) == step["due"] and step["said"] != step["true"] and not agrees:
                count["wrong"] += 1
                count["echoed"] += value == step["said"]
    expect_rate(count["echoed"], count["wrong"], 0.10)


def test_the_critic_catches_seven_in_ten_and_the_merge_follows_it(samples):
    rng = random.Random(4)
    count: collections.Counter[str] = collections.Counter()
    for problem, text, steps in samples[: max(1000, len(samples) * 3 // 20)]:
        labels = world.step_labels(problem, text)
        verification = world.noisy_verification(problem, text, rng)
        critique = world.noisy_critique(problem, text, verification, rng)
        before = read_verification(verification)[0]
        after = read_verification(f"{critique} <verdict> Yes")[0]
        assert len(after) == len(labels)
        for step, label, line, criticised in zip(steps, labels, before, after):
            kind = "faulty" if line[3] != label else "sound"
            count[kind] += 1
            disputed = criticised[3] != line[3]
            count[f"{kind} disputed"] += disputed
            if kind == "faulty":  # blind, it repeats the line; else it says the truth
                blind = step["operator"] in world.CRITIC_BLIND_TO
                assert disputed != blind
                assert criticised == line if blind else criticised[2] == calculate(*criticised[:2])
        merged = world.merged_verification(problem, text, critique, rng)
        lines, overall = read_verification(merged)
        assert lines == after
        assert not overall or all(line[3] for line in lines)
    assert count["faulty disputed"] / count["faulty"] == pytest.approx(0.7, abs=0.05)
    expect_rate(count["sound disputed"], count["sound"], 0.05)


def solution(*steps: str, box: str = "2") -> str:
    said = " ".join(f"<step> {step} </step>" for step in steps)
    return f"<think> {said} </think> <answer> \\boxed{{ {box} }} </answer>"


@pytest.mark.parametrize(
    ("steps", "labels"),
    [
        (("1: 7 +5 =2", "2: 2 *3 =6", "3: 6 *7 =2"), (True, True, True)),
        # An error propagates: the steps after it follow from what was claimed.
        (("1: 7 +5 =6", "2: 6 *3 =8", "3: 8 *7 =6"), (False, True, True)),
        # Quietly going back to the true value does not follow from the claim.
        (("1: 7 +5 =6", "2: 2 *3 =6", "3: 6 *7 =2"), (False, False, True)),
        # A wrong operator is one step wrong, and that operation is used up.
        (("1: 7 +4 =1", "2: 1 *3 =3", "3: 3 *7 =1"), (False, True, True)),
        (("1: 7 +5 =2", "2: 2 +0 =2", "3: 2 *3 =6", "4: 6 *7 =2"), (True,) * 4),
        (("1: 7 +0 =8", "2: 8 +5 =3", "3: 3 *3 =9", "4: 9 *7 =3"), (False, True, True, True)),
        # Nothing is left to do after the last operation but to restate.
        (("1: 7 +5 =2", "2: 2 *3 =6", "3: 6 *7 =2", "4: 2 +5 =7"), (True, True, True, False)),
        (("1: 7 +5 =2", "2: 2 *3 =6", "3: 6 *7 =2", "4: 2 +0 =2"), (True,) * 4),
        # Misnumbered or unreadable: incorrect, and it claims nothing.
        (("2: 7 +5 =2", "2: 7 +5 =2"), (False, True)),
        (("1: 7 +5 2", "2: 7 +5 =2"), (False, True)),
        (("1: 7 +5 =2 =3", "2: 7 +5 =2"), (False, True)),
        ((), ()),
    ],
)
def test_step_labels_case_by_case(steps, labels):
    assert world.step_labels(PROBLEM, solution(*steps)) == labels


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        (solution(), True),
        (solution(box="02"), False),
        (solution(box="3"), False),
        (solution() + " <answer> \\boxed{ 3 } </answer>", False),
        (solution() + " <answer> \\boxed{ 2 } </answer>", False),
        ("2", False),
        ("", False),
    ],
)
def test_correct_is_exactly_one_box_with_the_truth(text, correct):
    assert world.is_correct(PROBLEM, text) is correct


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(world.VOCABULARY), max_size=40).map(" ".join) | st.text())
def test_truth_and_noise_never_raise_on_a_text(text):
    labels = world.step_labels(PROBLEM, text)
    rng = random.Random(0)
    verification = world.noisy_verification(PROBLEM, text, rng)
    assert len(verification.split()) == 5 * len(labels) + 2
    if len(labels) <= world.MAX_STEPS:
        critique = world.noisy_critique(PROBLEM, text, verification, rng)
        merged = world.merged_verification(PROBLEM, text, critique, rng)
        assert len(merged.split()) == len(verification.split())


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.data())
def test_one_wrong_value_carried_on_is_one_wrong_step_and_a_wrong_answer(seed, shift, data):
    """Operations are bijections, so nothing that follows from one error can heal it."""
    chain = world.draw_chain(random.Random(seed), "train")
    wrong = data.draw(st.integers(0, len(chain.operators) - 1))
    value, steps = chain.start, []
    for index, operator in enumerate(chain.operators):
        result = (calculate(value, operator) + shift * (index == wrong)) % 10
        steps.append(world.Step(value, operator, result))
        value = result
    problem, text = world.as_problem(chain), world.write_solution(steps, [value])
    assert world.step_labels(problem, text) == tuple(i != wrong for i in range(len(steps)))
    assert not world.is_correct(problem, text)
    assert world.judge(problem, text).sound_answer
