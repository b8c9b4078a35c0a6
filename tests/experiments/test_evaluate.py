"""Evaluation as run from a configuration, with models that answer by rule."""

import dataclasses
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from spark_jax import tasks
from spark_jax.data.records import Problem, SamplingSettings, read_jsonl
from spark_jax.evaluation.benchmarks import Answered, Response
from spark_jax.experiments import checks, configuration, evaluate, loading
from spark_jax.experiments.configuration import ConfigError
from spark_jax.parallel import processes
from spark_jax.prm.processbench import Prediction
from spark_jax.reports.benchmarks import markdown, policy_table, processbench_table
from spark_jax.scoring import token_logprobs
from spark_jax.text_generation import TextModel
from spark_jax.verification.parse import format_verification


class Letters:
    """A tokenizer of characters, without a chat template."""

    pad_token_id, eos_token_id, bos_token_id = 0, 1, None
    chat_template, name_or_path = None, "letters"

    def __call__(self, text):
        return {"input_ids": self.encode(text, True)}

    def encode(self, text, add_special_tokens):
        return [ord(letter) for letter in text]


def text_model(config):
    return TextModel(tiny_model.params(), config, Letters(), (1,), "model")


@pytest.fixture
def ruled(monkeypatch):
    """Puts `rule(prompt, draw)` in the place of every model; draw is -1 for greedy samples."""

    def install(rule, max_positions=100_000):
        calls = []

        def sampler(model, options):
            def sample(prompts, *, samples_per_prompt, settings, seed):
                calls.append((list(prompts), samples_per_prompt, settings))
                draws = [-1] if settings.greedy else range(samples_per_prompt)
                return [[said(rule(prompt, draw)) for draw in draws] for prompt in prompts]

            return sample

        model = text_model(dataclasses.replace(tiny_model.CONFIG, max_positions=max_positions))
        monkeypatch.setattr(loading, "load_text_model", lambda config, name: model)
        monkeypatch.setattr(evaluate, "text_sampler", sampler)
        monkeypatch.setattr(
            evaluate, "score_in_batches", lambda model, tokens: -0.5 * (tokens[:, 1:] % 7)
        )
        return calls

    def said(text):
        return types.SimpleNamespace(text=text, token_ids=(0,) * 5, finished=True)

    return install


def config_of(**changes):
    """`a__b` for `a.b`."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return configuration.changed(
        configuration.load_config("configs/demo.py"), {"task": "gsm8k"} | named
    )


# --- ProcessBench --------------------------------------------------------------------------------

LABELS = {"gsm8k": [0, -1, 1, -1, 2], "math": [2, -1, -1]}


@pytest.fixture
def published(tmp_path):
    """Two of the four splits, with made-up samples whose number is in the problem."""
    folder = tmp_path / "processbench"
    folder.mkdir()
    for split, labels in LABELS.items():
        rows = [
            {
                "id": f"{split}-{i}",
                "generator": "nobody",
                "problem": f"<{split}:{label}>",
                "steps": [f"first of {i}", "then </answer>", "last"],
                "final_answer_correct": label == -1,
                "label": label,
            }
            for i, label in enumerate(labels)
        ]
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder


def finds_errors(prompt, draw):
    label = int(re.search(r"<(?:gsm8k|math):(-?\d)>", prompt)[1])
    return format_verification([("t", "a")] * 3, [k != label for k in range(3)], label == -1)


def processbench_config(folder, **changes):
    return config_of(
        **{"evaluate__what": "processbench", "evaluate__processbench__folder": str(folder)}
        | {"evaluate__chunk_size": 2, "evaluate__kind": "verifier"}
        | changes
    )


def test_processbench_from_a_configuration(ruled, published, tmp_path):
    calls = ruled(finds_errors)
    seen = []
    path = tmp_path / "run"
    config = processbench_config(published, evaluate__votes=3)
    got = evaluate.run(config, path, lambda *done: seen.append(done))
    assert got["mean_f1"]["estimate"] == got["majority_mean_f1"]["estimate"] == 1
    assert {name: (s["erroneous"], s["correct"]) for name, s in got["splits"].items()} == {
        "gsm8k": (3, 2),
        "math": (1, 2),
    }
    assert got["splits"]["gsm8k"]["rewritten"] == 5
    assert set(got["missing"]) == {"olympiadbench", "omnimath"}
    assert got["kind"] == "verifier"
    assert "soft_auc" in got["splits"]["gsm8k"]
    assert seen[-1] == (8, 8)
    assert json.loads((path / "summary.json").read_text()) == got
    assert (path / "table.md").read_text() == markdown(processbench_table(got))
    lines = read_jsonl(path / "predictions" / "math.jsonl", Prediction)
    assert [line.prediction for line in lines] == LABELS["math"]
    verify = loading.load_task(config).text_format.verify_prompt
    before = verify(Problem("p", "<gsm8k"), "", None).partition("<gsm8k")[0]
    assert calls[0][0][0].startswith(before)

    calls.clear()
    assert evaluate.run(config, path) == got
    assert not calls


def test_processbench_goes_on_after_an_interruption(ruled, published, tmp_path):
    config = processbench_config(published)

    def dies(prompt, draw):
        if "<math" in prompt:
            raise KeyboardInterrupt
        return finds_errors(prompt, draw)

    ruled(dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config, tmp_path / "run")
    calls = ruled(finds_errors)
    got = evaluate.run(config, tmp_path / "run")
    assert all("<math" in prompt for prompts, *_ in calls for prompt in prompts)
    ruled(finds_errors)
    assert got == evaluate.run(config, tmp_path / "whole")


def test_splits_asked_for_by_name_are_required(ruled, published, tmp_path):
    ruled(finds_errors)
    named = processbench_config(published, evaluate__processbench__splits=("math", "omnimath"))
    with pytest.raises(FileNotFoundError, match=r"omnimath\.json"):
        evaluate.run(named, tmp_path / "run")
    assert not (tmp_path / "run").exists()  # the mended command may use the folder
    named = processbench_config(published, evaluate__processbench__splits=("math",))
    assert set(evaluate.run(named, tmp_path / "run")["splits"]) == {"math"}


def test_a_subset_is_asked_about(ruled, published, tmp_path):
    calls = ruled(finds_errors)
    config = processbench_config(published, evaluate__processbench__num_samples=2)
    got = evaluate.run(config, tmp_path / "run")
    assert {name: scores["num_samples"] for name, scores in got["splits"].items()} == {
        "gsm8k": 2,
        "math": 2,
    }
    assert sum(len(prompts) for prompts, *_ in calls) == 4


def test_prompts_that_do_not_fit_the_model_are_counted(ruled, published, tmp_path):
    calls = ruled(finds_errors, max_positions=300)
    got = evaluate.run(processbench_config(published), tmp_path / "run")
    assert [scores["too_long"] for scores in got["splits"].values()] == [5, 3]
    assert not calls
    assert got["mean_f1"]["estimate"] == 0
    assert "5 prompts are too long" in (tmp_path / "run" / "table.md").read_text()


def test_the_folder_is_that_of_the_environment_where_none_is_given(
    ruled, published, tmp_path, monkeypatch
):
    ruled(finds_errors)
    config = config_of(evaluate__what="processbench", evaluate__kind="verifier")
    monkeypatch.delenv("SPARK_JAX_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"processbench\.folder.*SPARK_JAX_DATA"):
        evaluate.run(config, tmp_path / "run")
    monkeypatch.setenv("SPARK_JAX_DATA", str(published.parent))
    assert evaluate.run(config, tmp_path / "run")["mean_f1"]["estimate"] == 1


# --- benchmarks ----------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path):
    """math500 with 4 problems, aime24 with 2; the answer to problem n is n."""
    for name, count in (("math500", 4), ("aime24", 2)):
        (tmp_path / name).mkdir()
        rows = [{"problem": f"Say <{n}>.", "answer": str(n)} for n in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "test.jsonl").write_text(text)
    return tmp_path


def half_right(prompt, draw):
    """Even draws are right, and only every second problem's response keeps the format."""
    number = int(re.search(r"<(\d)>", prompt)[1])
    said = f"\\boxed{{{number if draw % 2 == 0 else 7}}}"
    return said if number % 2 else f"<think><step> s </step></think><answer> {said} </answer>"


def benchmark_config(folder, **changes):
    return config_of(
        **{"evaluate__what": "benchmarks", "evaluate__benchmarks__folder": str(folder)}
        | {"evaluate__benchmarks__samples_per_problem__math500": 2}
        | {"evaluate__benchmarks__samples_per_problem__aime24": 4}
        | changes
    )


@pytest.mark.parametrize(("answer_from", "share"), [("format", 0.25), ("last_boxed", 0.5)])
def test_benchmarks_from_a_configuration(ruled, local, tmp_path, answer_from, share):
    calls = ruled(half_right)
    config = benchmark_config(local, evaluate__answer_from=answer_from)
    got = evaluate.run(config, tmp_path / "run")
    assert set(got["benchmarks"]) == {"math500", "aime24"}
    for name, (number, k) in {"math500": (4, 2), "aime24": (2, 4)}.items():
        scores = got["benchmarks"][name]
        assert (scores["num_problems"], scores["samples_per_problem"]) == (number, k)
        assert scores["accuracy"]["estimate"] == share
        assert scores[f"pass@{k}"] == scores[f"maj@{k}"] == 2 * share  # a tie goes to the first
        assert scores["format_kept"] == 0.5
        responses = read_jsonl(tmp_path / "run" / "responses" / f"{name}.jsonl", Response)
        assert len(responses) == number * k
    assert got["mean_accuracy"]["estimate"] == share
    assert set(got["missing"]) == {"aime25", "amc23", "olympiadbench", "minerva"}
    assert str(local / "minerva") in got["missing"]["minerva"]
    assert (tmp_path / "run" / "table.md").read_text() == markdown(policy_table(got))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == got
    assert {settings.temperature for *_, settings in calls} == {1.0}


def test_benchmarks_asked_for_by_name_are_required(ruled, local, tmp_path):
    ruled(half_right)
    config = benchmark_config(local, evaluate__benchmarks__names=("aime24", "minerva"))
    with pytest.raises(FileNotFoundError, match="minerva: no folder"):
        evaluate.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config = benchmark_config(local, evaluate__benchmarks__names=("aime24",))
    assert list(evaluate.run(config, tmp_path / "run")["benchmarks"]) == ["aime24"]
    with pytest.raises(FileNotFoundError, match=r"math500: no folder.*minerva: no folder"):
        evaluate.run(benchmark_config(tmp_path / "nowhere"), tmp_path / "other")


def test_greedy_benchmarks_have_one_response_a_problem_and_may_be_subsets(ruled, local, tmp_path):
    calls = ruled(half_right)
    config = benchmark_config(local, evaluate__greedy=True, evaluate__benchmarks__num_problems=3)
    got = evaluate.run(config, tmp_path / "run")["benchmarks"]
    assert [scores["num_problems"] for scores in got.values()] == [3, 2]  # there are but two
    assert {scores["samples_per_problem"] for scores in got.values()} == {1}
    assert {(k, settings.greedy) for _, k, settings in calls} == {(1, True)}


# --- tasks of which less is known ----------------------------------------------------------------


def chains(labels=None, references=True):
    """The demo's task, as one that knows less."""
    task = tasks.load("arithmetic_chains")

    def problems(*which):
        return [
            problem if references else dataclasses.replace(problem, answer=None)
            for problem in task.problems(*which)
        ]

    known = task.labels if labels is None else lambda problem, text: labels(task, problem, text)
    return dataclasses.replace(task, problems=problems, labels=known)


def outcome_alone(task, problem, text):
    return None, task.labels(problem, text)[1]


def nothing(task, problem, text):
    return None, None


def test_reward_models_are_scored_by_what_is_known(tiny):
    model = loading.load_text_model(tiny, tiny.model)

    def scores(task):
        held_out = evaluate.held_out_solutions(tiny, task)
        return evaluate.reward_model_scores(tiny, task, model, "prm_cot", *held_out)

    everything, outcomes, unknown = map(
        scores, (chains(), chains(outcome_alone), chains(nothing, references=False))
    )
    assert set(everything) - set(outcomes) == {"f1", "error_acc", "correct_acc"}
    same = ("overall_accuracy", "unparseable", "yes", "soft_auc")
    assert [outcomes[name] for name in same] == [everything[name] for name in same]
    assert unknown["overall_accuracy"] == {"estimate": None, "low": None, "high": None}
    assert unknown["yes"] == everything["yes"]
    assert unknown["num_with_outcome"] == 0


def test_policies_are_scored_by_what_is_known(tiny):
    model = loading.load_text_model(tiny, tiny.model)
    known = evaluate.policy_scores(tiny, chains(outcome_alone), model)
    unknown = evaluate.policy_scores(tiny, chains(nothing, references=False), model)
    assert known["accuracy"]["estimate"] is not None
    assert unknown["accuracy"]["estimate"] is None
    for name in ("response_length", "format_kept", "steps", "num_problems"):
        assert known[name] == unknown[name]
    [problem] = chains(references=False).problems(1, 0, "eval")
    assert evaluate.is_right(chains(), problem, "\\boxed{1}") is None


def test_processes_grade_a_share_of_the_problems_each(monkeypatch):
    """Three, each comparing the answers to its own problems, and all have what one finds."""
    problems = [Answered(list("1233"), answer) for answer in "12345"]
    text_format = chains().text_format
    alone = evaluate.graded_together(text_format, problems)
    me, met = [0], {}

    def same_answer(a, b):
        met.setdefault(me[0], set()).update({a, b} & set("45"))
        return text_format.same_answer(a, b)

    def on_own(make):
        made = []
        for me[0] in range(3):
            made.append(make())
        return made

    noted = dataclasses.replace(text_format, same_answer=same_answer)
    monkeypatch.setattr(processes, "on_own", on_own)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: me[0])
    assert evaluate.graded_together(noted, problems) == alone
    assert met == {0: set(), 1: set(), 2: {"4", "5"}}  # references of the last two problems
    assert [sum(problem.correct) for problem in alone] == [1, 1, 2, 0, 0]
    assert [problem.majority for problem in alone] == [False, False, True, False, False]
    assert evaluate.graded_together(noted, problems[:1]) == alone[:1]  # two have nothing to do


# --- soft scores on one device -------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "max_tokens"), [((1, 2), 8), ((7, 13), 8), ((7, 13), 64)])
def test_scoring_in_batches_changes_nothing(shape, max_tokens):
    model = text_model(tiny_model.CONFIG)
    tokens = np.random.default_rng(0).integers(0, 11, shape).astype(np.int32)
    got = evaluate.score_in_batches(model, tokens, max_tokens)
    compute = jax.jit(token_logprobs, static_argnums=1)
    expected = compute(model.params, model.config, jnp.asarray(tokens))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate__what": "all"}, "'all'.*benchmarks.*policy.*processbench.*reward_model"),
        ({"evaluate__answer_from": "box"}, "'box'.*format.*last_boxed"),
        ({"evaluate__kind": "cot"}, "evaluate.kind='cot'.*prm_cot.*verifier"),
        ({"evaluate__chunk_size": 0}, "evaluate.chunk_size=0"),
        ({"evaluate__top_p": 2.0}, "evaluate: top_p=2.0"),
        ({"evaluate__processbench__num_samples": 0}, "processbench.num_samples=0"),
        ({"evaluate__benchmarks__num_problems": 0}, "benchmarks.num_problems=0"),
        ({"evaluate__benchmarks__names": ("chess",)}, "names='chess'.*math500"),
        ({"evaluate__benchmarks__samples_per_problem__amc23": 0}, "amc23=0"),
        (
            {"evaluate__what": "processbench", "task": "arithmetic_chains"},
            "processbench.*'arithmetic_chains'.*gsm8k",
        ),
    ],
)
def test_impossible_evaluations_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        checks.check_evaluate(config_of(**changes))


def test_settings_are_those_of_the_configuration():
    config = config_of(evaluate__top_p=0.9, evaluate__temperature=0.6, decode__max_new_tokens=9)
    assert evaluate.policy_settings(config) == SamplingSettings(
        temperature=0.6, top_p=0.9, max_new_tokens=9
    )
