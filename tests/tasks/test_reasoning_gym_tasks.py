import json
import os
import threading
import time

import pytest

from spark_jax.data.problems import question_key
from spark_jax.tasks import TaskOptions, load
from spark_jax.tasks import reasoning_gym_tasks as gym
from spark_jax.verification.prompts import CANONICAL

reasoning_gym = pytest.importorskip("reasoning_gym", reason="the extra `tasks` is not installed")

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # few questions exist


def task(name="chain_sum", **settings):
    return load(f"reasoning_gym:{name}", TaskOptions(generator=settings))


def oracle(problem):
    return json.loads(problem.answer)["answer"]


def test_problems_are_those_of_the_package():
    """In this process, from the same seeds: another run of the package gives the same entries."""
    made = task("gcd").problems(8, 3, "train")
    for problem in made:
        reference = json.loads(problem.answer)
        dataset = reasoning_gym.create_dataset("gcd", seed=reference["seed"], size=gym.BLOCK)
        entry = dataset[reference["index"]]
        assert (problem.question, oracle(problem)) == (entry["question"], entry["answer"])
        assert (
            problem.metadata == {}
        )  # nothing of the answer stays where the reference is taken out


def test_the_same_arguments_give_the_same_problems_and_more_extend_them():
    one = task("gcd")
    found = one.problems(10, 0, "train")
    assert task("gcd").problems(10, 0, "train") == found
    assert one.problems(70, 0, "train")[:10] == found
    assert one.problems(10, 1, "train") != found
    assert len({p.id for p in one.problems(70, 0, "train")}) == 70


def test_settings_reach_the_generator():
    texts = [p.question for p in task(**SMALL).problems(20, 0, "train")]
    assert all(len(text) == len(texts[0]) for text in texts)
    longer = task(min_terms=6, max_terms=6).problems(5, 0, "train")
    assert min(len(p.question) for p in longer) > len(texts[0])


def test_the_splits_share_no_question_even_where_few_exist():
    """About 180 questions: seeds alone would not keep them apart."""
    small = task(**SMALL)
    parts = {
        split: {
            question_key(p.question)
            for seed in range(3)
            for p in small.problems(number, seed, split)
        }
        for split, number in (("train", 60), ("eval", 15))
    }
    assert len(parts["train"]) > 60  # seeds differ
    assert not parts["train"] & parts["eval"]


def test_where_no_more_questions_exist_the_number_is_refused():
    with pytest.raises(ValueError, match=r"num=500 train problems.*only 1\d\d different ones"):
        task(**SMALL).problems(500, 0, "train")


def test_grading_is_the_packages_own():
    """Several answers are right, and the order of the terms is free: no comparison of texts."""
    countdown = task("countdown", min_numbers=3, max_numbers=3)
    same = countdown.text_format.same_answer
    for problem in countdown.problems(3, 0, "eval"):
        answer = oracle(problem)
        for right in (answer, f"({answer})", f" {answer} "):
            assert same(right, problem.answer)
            assert same(problem.answer, right)
        assert not same("1", problem.answer)
        assert not same(f"{answer}+1", problem.answer)
        assert countdown.labels(problem, f"<answer> \\boxed{{({answer})}} </answer>") == (
            None,
            True,
        )


def test_answers_without_an_entry_are_compared_as_texts():
    same = task().text_format.same_answer
    assert same(" 12", "12")
    for a, b in [("12", "12.0"), (None, None), (None, "1"), ("", ""), (" ", " ")]:
        assert not same(a, b)


def test_scores_below_one_are_wrong():
    problem = task().problems(1, 0, "train")[0]
    same = task().text_format.same_answer
    assert same(oracle(problem), problem.answer)
    assert not same(f"it is {oracle(problem)}", problem.answer)  # the package gives this a part


@pytest.mark.parametrize(
    "forged",
    [
        lambda own: own,  # who knows the whole reference knows the answer
        lambda own: own.replace('"index": 0', '"index": 1'),
        lambda own: own.replace('"seed": 0', '"seed": 99999999999999'),
        lambda own: own.replace('"answer": ', '"answer": 1'),
        lambda own: '{"reasoning_gym": ' * 1000,
        lambda own: '{"reasoning_gym": ' + "[" * 50_000,
        lambda own: "9" * 5000,
        lambda own: "\ud800",
        lambda own: "\x00",
        lambda own: "",
    ],
)
def test_hostile_answers_neither_raise_nor_win(forged):
    gcd = task("gcd")
    problem = next(p for p in gcd.problems(20, 0, "train") if p.id.endswith("/0/0"))
    text = forged(problem.answer)
    expected = text == problem.answer
    assert gcd.text_format.same_answer(text, problem.answer) is expected
    assert gcd.text_format.same_answer(problem.answer, text) is expected


def test_an_answer_that_never_ends_costs_one_worker_and_is_wrong(monkeypatch, caplog):
    """Scorers evaluate what they are given."""
    monkeypatch.setitem(gym.LIMITS, "score", 1.0)
    gym._worker.cache_clear()
    countdown = task("countdown", min_numbers=3, max_numbers=3)
    problem = countdown.problems(1, 0, "train")[0]
    began = time.perf_counter()
    assert not countdown.text_format.same_answer("9**9**9**9**9", problem.answer)
    assert time.perf_counter() - began < 30
    assert "over the limit" in caplog.text
    assert countdown.text_format.same_answer(oracle(problem), problem.answer)
    gym._worker.cache_clear()


def test_any_thread_may_grade():
    gcd = task("gcd")
    problems = gcd.problems(12, 0, "train")
    found = {}

    def grade(problem):
        found[problem.id] = [
            gcd.text_format.same_answer(a, problem.answer) for a in (oracle(problem), "none")
        ]

    threads = [threading.Thread(target=grade, args=(problem,)) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [[True, False]] * 12


def test_a_killed_worker_is_replaced():
    gcd = task("gcd")
    before = gcd.problems(2, 5, "train")
    process = gym._worker(os.getpid())._process[0].process
    process.kill()
    process.wait()
    assert gcd.text_format.same_answer(oracle(before[0]), before[0].answer)
    assert gcd.problems(2, 5, "train") == before
    assert gym._worker(os.getpid())._process[0].process is not process


def test_a_shown_reference_is_the_entrys_answer():
    gcd = task("gcd")
    problem = gcd.problems(1, 0, "train")[0]
    text = "<think> <step>a</step> </think> <answer> \\boxed{1} </answer>"
    prompt = gcd.text_format.verify_prompt(problem, text, problem.answer)
    assert prompt == CANONICAL.verify_prompt(problem, text, oracle(problem))
    blind = gcd.text_format.verify_prompt(problem, text, None)
    assert blind == CANONICAL.verify_prompt(problem, text, None)
    assert "reasoning_gym" not in prompt + blind


def test_a_dataset_without_one_right_answer():
    colours = task("graph_color")
    problem = colours.problems(1, 0, "train")[0]
    assert oracle(problem) is None
    assert not colours.text_format.same_answer("none", problem.answer)
    with pytest.raises(ValueError, match="no one right answer"):
        colours.text_format.verify_prompt(problem, "x", problem.answer)


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("chain_some", {}, "there is no dataset 'chain_some'; choose one of .*'chain_sum'"),
        ("chain_sum", {"min_term": 2}, "unexpected keyword argument 'min_term'"),
        ("chain_sum", {"min_terms": -1}, "reasoning_gym:chain_sum with .*AssertionError"),
        ("chain_sum", {"seed": 1}, r"generator\.seed=1"),
        ("chain_sum", {"min_terms": [1]}, r"generator\.min_terms=\[1\]"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(name, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        task(name, **settings).problems(1, 0, "train")


def test_all_of_an_endless_set_is_refused():
    with pytest.raises(ValueError, match="say how many"):
        task().problems(None, 0, "train")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(gym.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"spark-jax\[tasks\]"):
        task()


@pytest.mark.slow(minutes=2)
def test_every_dataset_of_the_package_works():
    """Each dataset gives problems, and grades its own answer right."""
    from reasoning_gym.factory import DATASETS

    failed = {}
    for name in sorted(DATASETS):
        if name == "composite":  # is made of others, which are no single values
            continue
        try:
            one = task(name)
            (problem,) = one.problems(1, 0, "train")
            if (answer := oracle(problem)) is not None and not one.text_format.same_answer(
                answer, problem.answer
            ):
                failed[name] = answer
        except ValueError as error:
            failed[name] = str(error)[:200]
    assert failed == {}
