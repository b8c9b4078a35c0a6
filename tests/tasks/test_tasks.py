import dataclasses
import json
import random
import re

import pytest

from spark_jax import tasks
from spark_jax.data.records import ParseFailure, Problem, SamplingSettings, Solution
from spark_jax.response_format import format_ok
from spark_jax.steps import step_texts
from spark_jax.tasks import TaskOptions, load
from spark_jax.tasks.arithmetic_chains import format as chains_format
from spark_jax.tasks.arithmetic_chains import world
from spark_jax.tasks.problem_sets import DATA_VARIABLE, PROBLEM_SETS
from spark_jax.verification.parse import format_verification
from spark_jax.verification.pipeline import generate_solutions, verify_solutions
from spark_jax.verification.prompts import CANONICAL
from spark_jax.verification.report import report

METHODS = ("step_consistency", "outcome_consistency+meta_critique", "reference_guided")


@pytest.fixture
def sums(tmp_path, monkeypatch):
    """Options that name a folder with made-up problems."""
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    for split, numbers in (("train", range(1, 41)), ("test", range(50, 60))):
        rows = [{"question": f"What is {n}+{n}?", "answer": str(2 * n)} for n in numbers]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return TaskOptions(data=str(tmp_path))


def response(answer, steps=("a", "b", "c")):
    body = "\n".join(f"<step>{step}</step>" for step in steps)
    return f"<think>\n{body}\n</think>\n<answer> \\boxed{{{answer}}} </answer>"


# --- names and options ---------------------------------------------------------------------------


def test_every_name_is_known_and_every_other_is_refused_with_the_choices():
    assert {"arithmetic_chains", *PROBLEM_SETS} <= set(tasks.TASKS)
    assert all(tasks.known(name) for name in tasks.TASKS)
    assert tasks.known("reasoning_gym:chain_sum")
    for name in ("gsm9k", "", "reasoning_gym", "gsm8k:main", "Gsm8k"):
        assert not tasks.known(name)
        with pytest.raises(
            ValueError, match=r"is unknown; choose one of .*'gsm8k'.*reasoning_gym:"
        ):
            load(name)


@pytest.mark.parametrize("name", [name for name in PROBLEM_SETS if name != "problems"])
def test_a_named_task_is_made_without_reading_any_data(name, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, "/nowhere")
    task = load(name)
    assert task.name == name
    assert task.has_references == (name != "rubric")


def test_options_are_json_values():
    options = TaskOptions(data="x", generator={"a": 1})
    assert TaskOptions(**json.loads(json.dumps(dataclasses.asdict(options)))) == options


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("arithmetic_chains", {"data": "x"}, r"does not read task_options \['data'\]"),
        ("arithmetic_chains", {"prompt_dir": "x"}, "prompt_dir"),
        ("reasoning_gym:chain_sum", {"data": "x"}, r"does not read task_options \['data'\]"),
        ("gsm8k", {"generator": {"a": 1}}, r"does not read task_options\.generator"),
        ("gsm8k", {"split_steps": "lines"}, "split_steps='lines' is unknown; choose one of"),
        ("gsm8k", {"prompt_dir": "/nowhere"}, "prompt_dir /nowhere is not a directory"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(name, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        load(name, TaskOptions(**changes))


def test_arithmetic_chains_are_as_they_were():
    task = load("arithmetic_chains")
    assert task.problems(20, 3, "train") == world.problems(20, 3, "train")
    assert task.text_format is chains_format.FORMAT
    problem = task.problems(1, 0, "eval")[0]
    text = "<think> <step> 1: 7 +5 =2 </step> </think> <answer> \\boxed{ 2 } </answer>"
    judged = world.judge(problem, text)
    assert task.labels(problem, text) == (
        tuple(step.correct for step in judged.steps),
        judged.correct,
    )
    assert task.has_references
    with pytest.raises(ValueError, match="say how many"):
        task.problems(None, 0, "train")


def test_prompts_and_steps_are_the_users(sums, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "verify.txt").write_text("MINE ${problem} ${solution} ${num_steps}")
    options = dataclasses.replace(
        sums, prompt_dir=str(tmp_path / "prompts"), split_steps="numbered"
    )
    task = load("problems", options)
    problem = task.problems(1, 0, "train")[0]
    text = "Step 1: add\nStep 2: done"
    assert (
        task.text_format.verify_prompt(problem, text, None) == f"MINE {problem.question} {text} 2"
    )
    assert "Begin each step on a new line" in task.text_format.solve_prompt(problem)


# --- which problems ------------------------------------------------------------------------------


def test_none_is_all_problems_in_their_order(sums):
    task = load("problems", sums)
    found = task.problems(None, 5, "train")
    assert [p.question for p in found] == [f"What is {n}+{n}?" for n in range(1, 41)]
    assert len(task.problems(None, 5, "eval")) == 10
    assert task.data_counts("train") == {"problems": 40, "bad_rows": 0, "duplicates": 0}


def test_the_choice_follows_the_seed_and_grows_with_the_number(sums):
    task = load("problems", sums)
    chosen = {seed: task.problems(10, seed, "train") for seed in range(20)}
    for seed, found in chosen.items():
        assert load("problems", sums).problems(10, seed, "train") == found
        assert task.problems(25, seed, "train")[:10] == found
        assert len({p.id for p in found}) == 10
    assert len({tuple(p.id for p in found) for found in chosen.values()}) == 20
    times = [sum(p in found for found in chosen.values()) for p in task.problems(None, 0, "train")]
    assert min(times) > 0  # 20 draws of a quarter: nobody is left out, nobody always drawn
    assert max(times) < 15


def test_a_problem_added_changes_only_its_own_place(sums, tmp_path):
    before = load("problems", sums).problems(40, 1, "train")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"question": "new", "answer": "0"}))
    after = load("problems", sums).problems(41, 1, "train")
    assert [p for p in after if p.question != "new"] == before


def test_more_problems_than_there_are_are_refused(sums):
    task = load("problems", sums)
    assert len(task.problems(10, 0, "eval")) == 10
    with pytest.raises(ValueError, match=r"problems \(eval\): num=11 .*there are 10"):
        task.problems(11, 0, "eval")


# --- labels --------------------------------------------------------------------------------------


def test_labels_know_the_answer_and_no_step(sums):
    task = load("problems", sums)
    problem = next(p for p in task.problems(None, 0, "train") if p.answer == "6")
    for text, correct in [
        (response("6"), True),
        (response("6.0"), True),
        (response("7"), False),
        ("no box", False),
        (response("7") + response("6"), False),  # what comes after the answer is not read
    ]:
        assert task.labels(problem, text) == (None, correct)


def test_without_references_nothing_is_known(sums):
    task = load("problems", dataclasses.replace(sums, references=False))
    assert not task.has_references
    problem = task.problems(1, 0, "train")[0]
    assert problem.answer is None
    assert task.labels(problem, response(6)) == (None, None)


def test_with_labels_keeps_what_is_not_known_as_none(sums):
    task = load("problems", sums)
    problems = [*task.problems(2, 0, "train"), Problem("p", "no answer")]
    solutions = [
        Solution(p.id, i, response(a), ("a", "b", "c"), str(a))
        for p in problems
        for i, a in enumerate((p.answer, "-1"))
    ]
    labelled = tasks.with_labels(task, problems, solutions)
    assert [s.correct for s in labelled] == [True, False, True, False, None, None]
    assert [s.step_labels for s in labelled] == [None] * 6
    assert [dataclasses.replace(s, correct=None) for s in labelled] == solutions


# --- the whole of stage I on tasks without step labels, and without any truth --------------------


@dataclasses.dataclass(frozen=True)
class Text:
    text: str
    finished: bool = True


def obliging_model(prompts, *, samples_per_prompt, settings, seed):
    """Solves with three steps, verifies what it is shown; keeps to every form."""

    def write(prompt, i):
        rng = random.Random(f"{prompt} {i} {seed}")
        steps = max(map(int, re.findall(r"<step>Step (\d+):", prompt)), default=0)
        if not steps:
            return response(rng.randrange(100))
        if prompt.endswith("\nCritique:"):
            return "All is well."
        verdicts = [rng.random() < 0.7 for _ in range(steps)]
        return format_verification([("t", "x")] * steps, verdicts, all(verdicts))

    return [[Text(write(prompt, i)) for i in range(samples_per_prompt)] for prompt in prompts]


def stage1(task, tmp_path):
    problems = task.problems(5, 0, "train")
    common = {"settings": SamplingSettings(), "seed": 1, "model": "m"}
    solutions = generate_solutions(
        obliging_model,
        problems,
        task.text_format,
        samples_per_problem=2,
        path=tmp_path / "solutions.jsonl",
        **common,
    )
    verified = verify_solutions(
        obliging_model,
        problems,
        solutions,
        task.text_format,
        methods=METHODS,
        samples_per_solution=4,
        path=tmp_path / "verified.jsonl",
        **common,
    )
    labelled = tasks.with_labels(task, problems, solutions)
    return problems, solutions, verified, report(verified, labelled)


def test_stage_one_runs_where_only_answers_are_known(sums, tmp_path):
    _, _, verified, rows = stage1(load("problems", sums), tmp_path)
    for method in METHODS:
        assert rows[method]["num_with_verification"] == len(verified) == 10
        assert rows[method]["num_with_outcome"] == 10
        assert rows[method]["overall_accuracy"] is not None
        assert rows[method]["step_accuracy"] is None


def test_stage_one_runs_on_the_rubric_task_unchanged(tmp_path, monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    task = load("rubric")
    problems, solutions, verified, rows = stage1(task, tmp_path)
    assert all(p.answer is None for p in problems)
    assert all(format_ok(s.text) and len(s.steps) == 3 for s in solutions)
    for method in METHODS[:2]:
        row = rows[method]
        assert row["num_with_verification"] == row["num_without_ground_truth"] == 10
        assert row["validity_rate"] == row["consistent_rate"] == 1
        assert row["overall_accuracy"] is None
    assert rows["reference_guided"]["reasons"] == {"no_reference": 10}
    assert not any(isinstance(s, ParseFailure) for v in verified for s in v.samples)
    assert task.labels(problems[0], solutions[0].text) == (None, None)


def test_a_free_text_answer_keeps_the_response_format():
    """A letter in the box: read whole, and counted as one answer."""
    letter = "Dear Ann,\n\nthank you. I cannot come.\n\nYours, B."
    text = response(f"\n{letter}\n")
    task_format = load("rubric").text_format
    assert format_ok(text)
    assert task_format.final_answer(text) == letter
    spans = task_format.split_steps(text)
    assert step_texts(text, spans) == ("a", "b", "c")
    assert task_format.same_answer(letter, letter.replace("\n\n", "\n"))
    assert CANONICAL.split_steps(text) == spans
