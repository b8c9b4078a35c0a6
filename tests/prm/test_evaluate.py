"""Reward models whose every word is known, scored by hand and against loops."""

import dataclasses
import json
import math
import random
import types
from collections import Counter

import numpy as np
import pytest

from spark_jax.data.records import Problem, SamplingSettings, Solution
from spark_jax.prm.evaluate import Judge, evaluate_reward_model, judge_format
from spark_jax.tasks.arithmetic_chains import world
from spark_jax.tasks.arithmetic_chains.format import FORMAT
from spark_jax.tasks.arithmetic_chains.tokenizer import load_tokenizer
from spark_jax.verification.parse import format_verification
from spark_jax.verification.prompts import CANONICAL

SETTINGS = SamplingSettings(temperature=0.7, max_new_tokens=50)
WORD = {True: "Correct", False: "Incorrect"}


def solution_of(problem, index, steps, boxes=None):
    text = world.write_solution(steps, boxes or [steps[-1].value])
    labels, correct = world.step_labels(problem, text), world.is_correct(problem, text)
    return Solution(problem.id, index, text, (), None, labels, correct)


# 3 +1 *3: three solutions, the first right, then wrong in step 1 and wrong in step 2.
PROBLEM = Problem("p", "3 1: +1 2: *3", "2")
SOLUTIONS = [
    solution_of(PROBLEM, 0, [world.Step(3, "+1", 4), world.Step(4, "*3", 2)]),
    solution_of(PROBLEM, 1, [world.Step(3, "+1", 7), world.Step(7, "*3", 1)]),
    solution_of(PROBLEM, 2, [world.Step(3, "+1", 4), world.Step(4, "*3", 9)]),
]


def says(*verdicts, overall):
    lines = (f"{k}: {WORD[verdict]}" for k, verdict in enumerate(verdicts, 1))
    return " ".join((*lines, "<verdict>", "Yes" if overall else "No"))


class Scripted:
    """Says what the script has for a solution, found by its last step; remembers the calls."""

    def __init__(self, greedy, sampled=None):
        self.scripts = {True: [[text] for text in greedy], False: sampled}
        self.calls = []

    def __call__(self, prompts, *, samples_per_prompt, settings, seed):
        self.calls.append((list(prompts), samples_per_prompt, settings, seed))
        script = self.scripts[settings.greedy]
        ends = [solution.text for solution in SOLUTIONS]
        rows = [next(i for i, end in enumerate(ends) if end in prompt) for prompt in prompts]
        return [[types.SimpleNamespace(text=text) for text in script[row]] for row in rows]


def evaluate(model, kind="prm", solutions=SOLUTIONS, problems=(PROBLEM,), **more):
    seed, settings = more.pop("seed", 3), more.pop("settings", SETTINGS)
    judge = Judge(model, FORMAT, kind, settings, **more)
    return evaluate_reward_model(judge, problems, solutions, seed=seed)


GREEDY = [
    says(True, True, overall=True),  # right
    says(True, False, overall=False),  # another step, the right outcome
    says(True, True, False, overall=True),  # another number of steps, the wrong outcome
]


def test_the_labels_are_what_the_script_takes_them_for():
    assert [s.step_labels for s in SOLUTIONS] == [(True, True), (False, True), (True, False)]
    assert [s.correct for s in SOLUTIONS] == [True, False, False]


def test_greedy_scores_by_hand():
    model = Scripted(GREEDY)
    got = evaluate(model)
    assert got.pop("per_solution") == {
        "overall_right": [True, True, False],
        "first_error": [-1, 1, None],
        "label": [-1, 0, 1],
    }
    assert got == {
        "num_solutions": 3,
        "num_with_outcome": 3,
        "num_with_step_labels": 3,
        "yes": pytest.approx(2 / 3),
        "overall_accuracy": pytest.approx(2 / 3),
        "unparseable": 0,
        "other_step_count": pytest.approx(1 / 3),
        "error_acc": 0,
        "correct_acc": 1,
        "f1": 0,
    }
    [(prompts, votes, settings, seed)] = model.calls
    assert (votes, settings, seed) == (1, dataclasses.replace(SETTINGS, greedy=True), 3)
    assert prompts == [FORMAT.reward_prompt("prm", PROBLEM, s.text) for s in SOLUTIONS]


def test_an_unreadable_judgement_is_wrong_whatever_the_truth():
    got = evaluate(Scripted([GREEDY[0], "Incorrect", ""]))
    assert got["per_solution"]["overall_right"] == [True, False, False]
    assert got["per_solution"]["first_error"] == [-1, None, None]
    assert got["unparseable"] == pytest.approx(2 / 3)
    assert got["overall_accuracy"] == pytest.approx(1 / 3)


def test_votes_by_hand():
    sampled = [
        [says(True, True, overall=True), "?", says(False, True, overall=False), GREEDY[0]],
        [says(False, True, overall=False), says(False, False, overall=True), "?", "?"],  # a tie: No
        ["?", "?", "?", "?"],
    ]
    model = Scripted(GREEDY, sampled)
    got = evaluate(model, votes=4)
    alone = evaluate(Scripted(GREEDY))
    per_solution, alone_per_solution = got.pop("per_solution"), alone.pop("per_solution")
    assert {name: got[name] for name in alone} == alone
    assert {name: per_solution[name] for name in alone_per_solution} == alone_per_solution
    assert per_solution["majority_overall_right"] == [True, True, False]
    assert per_solution["majority_first_error"] == [-1, 0, None]
    assert got["majority_unparseable"] == pytest.approx(7 / 12)
    assert (got["majority_error_acc"], got["majority_correct_acc"]) == (0.5, 1)
    assert got["majority_f1"] == pytest.approx(2 / 3)
    assert [call[1:] for call in model.calls[1:]] == [(4, SETTINGS, 3)]


def test_an_orm_has_an_outcome_alone():
    got = evaluate(Scripted(["Yes", "No", "Yes Yes"]), kind="orm")
    assert got == {
        "num_solutions": 3,
        "num_with_outcome": 3,
        "num_with_step_labels": 3,
        "yes": pytest.approx(1 / 3),
        "overall_accuracy": pytest.approx(2 / 3),
        "unparseable": pytest.approx(1 / 3),
        "per_solution": {"overall_right": [True, True, False]},
    }


def test_figures_are_json_and_those_of_loops_on_many_solutions():
    rng = random.Random(0)
    problems = world.problems(60, 0, "eval")
    solutions, truth = [], {}
    for problem in problems:
        chain = world.read_question(problem.question)
        text = world.noisy_solution(chain, rng).split("</answer>")[0] + "</answer>"
        labels, correct = world.step_labels(problem, text), world.is_correct(problem, text)
        solutions.append(Solution(problem.id, 0, text, (), None, labels, correct))
        truth[FORMAT.reward_prompt("prm_cot", problem, text)] = (problem, text)

    said = []

    def model(prompts, *, samples_per_prompt, settings, seed):
        rows = [
            [world.noisy_verification(*truth[p], rng) for _ in range(samples_per_prompt)]
            for p in prompts
        ]
        said.append(rows)
        return [[types.SimpleNamespace(text=text) for text in row] for row in rows]

    shuffled = rng.sample(problems, len(problems))
    got = evaluate(model, "prm_cot", solutions, shuffled, votes=5)
    assert json.loads(json.dumps(got)) == got
    hits = {True: [], False: []}
    for i, solution in enumerate(solutions):
        firsts, overalls = [], []
        for text in said[1][i]:
            lines, _, overall = text.partition(" <verdict> ")
            words = lines.split()[4::5]
            firsts.append(words.index("Incorrect") if "Incorrect" in words else -1)
            overalls.append(overall == "Yes")
        voted = Counter(firsts).most_common(1)[0][0]
        label = [*solution.step_labels, False].index(False)
        label = -1 if label == len(solution.step_labels) else label
        assert got["per_solution"]["majority_first_error"][i] == voted
        assert got["per_solution"]["label"][i] == label
        right = (sum(overalls) > 2.5) == solution.correct
        assert got["per_solution"]["majority_overall_right"][i] == right
        hits[label == -1].append(voted == label)
    accuracies = [np.mean(hits[False]), np.mean(hits[True])]
    assert min(accuracies) > 0
    assert got["majority_f1"] == pytest.approx(2 / sum(1 / a for a in accuracies))


def bigram():
    tokenizer = load_tokenizer()
    rng = np.random.default_rng(1)
    table = rng.normal(size=(len(tokenizer), len(tokenizer)))
    table -= np.log(np.exp(table).sum(axis=1, keepdims=True))
    return tokenizer, table


def share_of_yes(tokenizer, table, before):
    yes, no, last = tokenizer.convert_tokens_to_ids(["Yes", "No", before])
    p_yes, p_no = np.exp(table[last, [yes, no]])
    return p_yes / (p_yes + p_no)


def test_soft_scores_are_read_at_the_verdict_of_the_greedy_judgement():
    tokenizer, table = bigram()
    calls = []

    def token_logprobs(tokens):
        calls.append(tokens)
        return table[tokens[:, :-1], tokens[:, 1:]]

    soft = {"token_logprobs": token_logprobs, "tokenizer": tokenizer}
    got = evaluate(Scripted([GREEDY[0], "?", GREEDY[2]]), **soft)
    expected = share_of_yes(tokenizer, table, "<verdict>")
    np.testing.assert_allclose(got["per_solution"]["soft_score"], [expected, 0.5, expected])
    assert got["soft_auc"] == pytest.approx(((expected > 0.5) + 0.5) / 2)
    assert [len(tokens) for tokens in calls] == [4]  # both words, of the two that can be read
    shown = tokenizer.decode(calls[0][1]).replace(" <pad>", "")
    prompt = FORMAT.reward_prompt("prm", PROBLEM, SOLUTIONS[2].text)
    assert shown == f"{prompt} {GREEDY[2]}"

    got = evaluate(Scripted(["Yes", "?", "No"]), kind="orm", **soft)
    np.testing.assert_allclose(got["per_solution"]["soft_score"], [expected] * 3)
    assert got["soft_auc"] == 0.5
    assert math.isnan(evaluate(Scripted(GREEDY), solutions=SOLUTIONS[:1], **soft)["soft_auc"])
    nothing = evaluate(Scripted(["?"] * 3), **soft)
    assert nothing["per_solution"]["soft_score"] == [0.5] * 3


def test_the_reward_model_never_sees_a_reference():
    tokenizer, table = bigram()

    class Watched(Problem):
        def __getattribute__(self, name):
            if name == "answer":
                raise AssertionError("the reference was read")
            return super().__getattribute__(name)

    evaluate(
        Scripted(GREEDY, [[text] * 2 for text in GREEDY]),
        problems=[Watched("p", PROBLEM.question, "2")],
        votes=2,
        token_logprobs=lambda tokens: table[tokens[:, :-1], tokens[:, 1:]],
        tokenizer=tokenizer,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": SOLUTIONS[0].text + " <answer> 1 </answer>"}, "goes on after </answer>.*cut it"),
        ({"step_labels": (True,) * 3}, "for a text of 2 steps"),
        ({"problem_id": "x"}, "problem is not among those given"),
    ],
)
def test_a_solution_whose_labels_are_not_of_what_is_shown_is_refused(change, message):
    model = Scripted(GREEDY)
    bad = [SOLUTIONS[1], dataclasses.replace(SOLUTIONS[0], index=7, **change)]
    with pytest.raises(ValueError, match=f"solution 7 of problem '[px]': .*{message}"):
        evaluate(model, solutions=bad)
    assert not model.calls


def without_labels(solution):
    return dataclasses.replace(solution, step_labels=None)


def without_truth(solution):
    return dataclasses.replace(solution, step_labels=None, correct=None)


def test_without_step_labels_the_overall_verdict_alone_is_scored():
    alone = evaluate(Scripted(GREEDY))
    got = evaluate(Scripted(GREEDY), solutions=[without_labels(s) for s in SOLUTIONS])
    by_steps = {"error_acc", "correct_acc", "f1"}
    assert set(alone) - set(got) == by_steps
    same = set(got) - {"per_solution", "num_with_step_labels"}
    assert {name: got[name] for name in same} == {name: alone[name] for name in same}
    assert (got["num_with_outcome"], got["num_with_step_labels"]) == (3, 0)
    assert got["per_solution"]["label"] == [None] * 3
    assert got["per_solution"]["first_error"] == alone["per_solution"]["first_error"]


def test_solutions_of_unknown_truth_count_in_no_score_that_needs_it():
    tokenizer, table = bigram()
    soft = {
        "token_logprobs": lambda tokens: table[tokens[:, :-1], tokens[:, 1:]],
        "tokenizer": tokenizer,
    }
    some = [SOLUTIONS[0], without_truth(SOLUTIONS[1]), without_labels(SOLUTIONS[2])]
    got = evaluate(Scripted(GREEDY), solutions=some, **soft)
    assert (got["num_with_outcome"], got["num_with_step_labels"]) == (2, 1)
    assert got["per_solution"]["overall_right"] == [True, None, False]
    assert (got["overall_accuracy"], got["yes"]) == (0.5, pytest.approx(2 / 3))
    assert got["correct_acc"] == 1
    assert math.isnan(got["f1"])  # no sample with an error
    assert got["soft_auc"] == 0.5  # equal scores of one right and one wrong solution

    got = evaluate(Scripted(GREEDY), solutions=[without_truth(s) for s in SOLUTIONS], **soft)
    assert got["overall_accuracy"] is got["soft_auc"] is got["soft_accuracy"] is None
    assert got["unparseable"] == 0
    assert "f1" not in got


def test_soft_accuracy_is_on_which_side_of_one_half():
    tokenizer = load_tokenizer()
    yes, no = tokenizer.convert_tokens_to_ids(["Yes", "No"])
    likely = {"2": 0.9, "1": 0.4, "9": 0.5}  # by what the solution's last step gives

    def token_logprobs(tokens):
        logprobs = np.zeros((len(tokens), tokens.shape[1] - 1))
        for row, ids in enumerate(tokens):
            share = next(p for value, p in likely.items() if f"{{ {value} }}" in text_of(ids))
            logprobs[row] = np.where(ids[1:] == yes, np.log(share), 0.0)
            logprobs[row] += np.where(ids[1:] == no, np.log(1 - share), 0.0)
        return logprobs

    def text_of(ids):
        return tokenizer.decode(ids)

    got = evaluate(
        Scripted(["Yes"] * 3), kind="orm", token_logprobs=token_logprobs, tokenizer=tokenizer
    )
    np.testing.assert_allclose(got["per_solution"]["soft_score"], [0.9, 0.4, 0.5])
    assert got["soft_accuracy"] == pytest.approx(2 / 3)  # one half is on neither side
    assert got["soft_auc"] == 1


def test_a_verifier_is_asked_with_the_verification_prompt_and_read_as_a_verification():
    said = [
        "1: 3 +1 =4 Correct 2: 4 *3 =2 Correct <verdict> Yes",
        "1: 3 +1 =4 Incorrect 2: 7 *3 =1 Correct <verdict> No",
        GREEDY[2],  # a PRM's lines are no verification
    ]
    model = Scripted(said)
    got = evaluate(model, kind="verifier")
    assert got["per_solution"]["first_error"] == [-1, 0, None]
    assert got["unparseable"] == pytest.approx(1 / 3)
    [(prompts, *_)] = model.calls
    assert prompts == [FORMAT.verify_prompt(PROBLEM, s.text, None) for s in SOLUTIONS]


def test_a_verifiers_deliberation_stands_before_its_soft_verdict():
    body = format_verification([("a", "b")], [True], True)
    text_format, kind = judge_format(CANONICAL, "verifier")
    said = f"<think> hm </think>\n{body}\nDone."
    verification = text_format.parse_judgement(kind, said, 1)
    assert text_format.reward_target(kind, verification) == f"<think> hm </think>\n{body}"
    assert CANONICAL.reward_target(kind, verification) == body  # as a PRM-CoT is trained


def test_prompts_that_do_not_fit_are_counted_as_unread_and_not_asked_about():
    tokenizer, table = bigram()
    prompts = [FORMAT.reward_prompt("prm", PROBLEM, s.text) for s in SOLUTIONS]
    model = Scripted(GREEDY, [[text] * 2 for text in GREEDY])
    got = evaluate(
        model,
        votes=2,
        fits=lambda prompt: prompt != prompts[1],
        token_logprobs=lambda tokens: table[tokens[:, :-1], tokens[:, 1:]],
        tokenizer=tokenizer,
    )
    assert [call[0] for call in model.calls] == [[prompts[0], prompts[2]]] * 2
    assert got["unparseable"] == got["majority_unparseable"] == pytest.approx(1 / 3)
    assert got["per_solution"]["first_error"] == [-1, None, None]
    assert got["per_solution"]["majority_overall_right"] == [True, False, False]
    assert got["per_solution"]["soft_score"][1] == 0.5


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="no solutions"):
        evaluate(Scripted(GREEDY), solutions=[])
    greedy = SamplingSettings(greedy=True)
    with pytest.raises(ValueError, match="votes=4 with greedy=True"):
        evaluate(Scripted(GREEDY), settings=greedy, votes=4)
    with pytest.raises(ValueError, match="votes=0"):
        evaluate(Scripted(GREEDY), votes=0)
    with pytest.raises(ValueError, match="need both token_logprobs and tokenizer"):
        evaluate(Scripted(GREEDY), tokenizer=load_tokenizer())
