"""The page of whole folders: a run, a pipeline, a study, and what is not finished."""

import json

import pytest
from rollout_records import record

from spark_jax.data.records import Solution, VerifiedSolution, read_jsonl
from spark_jax.experiments import report
from spark_jax.reports import rollouts, runs
from spark_jax.training.metrics import MetricsWriter
from spark_jax.training.run_folder import RunFolder


@pytest.fixture
def rl(tmp_path):
    """Writes an RL run with records of some steps."""

    def write(name, seed=0, steps=(1, 5), groups=3, **config):
        path = tmp_path / name
        RunFolder.open(path, {"seed": seed, "task": "arithmetic_chains", "rl": {}} | config)
        with MetricsWriter(path, tensorboard=False) as metrics:
            for step in steps:
                metrics.scalars(step, {"reward/mean": 0.5, "monitor/alarms": 0.0})
                rollouts.write(rollouts.step_file(path, step), record(groups=groups))
        return path

    return write


def names(path, max_rollouts=1000):
    return [
        (rollout.name, len(rollout.record.groups))
        for rollout in report.chosen_rollouts(runs.find(path), max_rollouts)
    ]


def test_one_run_shows_its_steps_and_several_their_first_and_last(rl, tmp_path):
    path = rl("a", steps=range(1, 21))
    shown = [int(name.rsplit(" ", 1)[1]) for name, _ in names(path)]
    assert len(shown) == report.MAX_STEPS
    assert (shown[0], shown[-1]) == (1, 20)
    rl("b/seed0")
    rl("b/seed1", seed=1)
    assert [name for name, _ in names(tmp_path)] == [
        "a, step 1", "a, step 20", "b, step 1", "b, step 5",
    ]  # fmt: skip


def test_about_as_many_responses_as_asked_for(rl, tmp_path):
    for name in ("a", "b"):
        rl(name, groups=6)  # of 4 responses
    assert [number for _, number in names(tmp_path, 32)] == [2] * 4
    assert [number for _, number in names(tmp_path, 1)] == [1] * 4
    assert [number for _, number in names(tmp_path, 1000)] == [6] * 4


def test_stage1_is_shown_with_questions_and_truth(stage1, tmp_path):
    file = report.write(stage1, tmp_path / "page.html")
    assert file.stat().st_size < 500_000
    (entry,) = report.chosen_rollouts(runs.find(stage1), 1000)
    solutions = read_jsonl(stage1 / "solutions.jsonl", Solution)
    verified = read_jsonl(stage1 / "verified.jsonl", VerifiedSolution)
    assert entry.record.num_groups == 4
    for response, solution, one in zip(entry.record.responses, solutions, verified, strict=True):
        assert "".join(response.tokens) == solution.text
        assert len(response.verifications) == len(one.samples) + len(one.reference_samples)
        voted = next(item for item in one.aggregated if item.method == "step_consistency")
        if voted.voted_verdicts is not None:
            assert response.verdicts == tuple(1 if v else -1 for v in voted.voted_verdicts)
        for item in one.aggregated:
            if item.chosen is not None and item.merge != "merged":
                chosen = response.verifications[response.chosen[item.method]]
                assert chosen.text == item.verification.text
        assert response.correct is not None
        assert len(response.step_labels) == len(solution.steps)
    assert all(group.question and group.reference for group in entry.record.groups)
    (table,) = report.stage_tables(stage1, runs.find(stage1))
    assert table.rows


def test_problems_that_cannot_be_had_are_left_out_with_a_warning(stage1, tmp_path, caplog):
    copy = tmp_path / "stage1"
    copy.mkdir()
    for file in stage1.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    config["task"] = "no such task"
    (copy / "config.json").write_text(json.dumps(config))
    (entry,) = report.chosen_rollouts(runs.find(copy), 1000)
    assert all(group.question == "" and group.problem_id for group in entry.record.groups)
    assert "questions and labels are left out" in caplog.text


def test_a_folder_of_runs_makes_one_page(rl, browser, tmp_path):
    rl("seed0/rl_a")
    rl("seed1/rl_a", seed=1)
    file = report.write(tmp_path)
    assert file == tmp_path / "page.html"
    with browser(file, tab="rollouts") as tab:
        assert tab.inner_text("#facts") == "2 runs · task arithmetic_chains · seeds 0, 1"
        tab.click("[data-tab=curves]")
        assert tab.inner_text(".quiet") == "No alarm of the monitor."
        assert tab.locator(".panel").count() == 1


def test_reward_models_have_a_table_over_their_seeds_and_a_folder_of_runs_is_no_run(tmp_path):
    def finished(name, summary, seed=0):
        folder = RunFolder.open(tmp_path / name, {"seed": seed, "task": "arithmetic_chains"})
        folder.write_summary(summary)

    def scores(accuracy):
        return {"overall_accuracy": {"estimate": accuracy, "low": 0.0, "high": 1.0}}

    finished("", {"stage": 1})  # as a pipeline's own that has not ended
    finished("prm/seed0", {"held_out": scores(0.5), "num_examples": 3})
    finished("prm/seed1", {"held_out": scores(0.7), "num_examples": 3}, seed=1)
    finished("base", scores(0.25))
    finished("policy", {"accuracy": {"estimate": 0.5, "low": 0.0, "high": 1.0}})
    found = runs.find(tmp_path)
    assert sorted({run.name for run in found}) == ["base", "policy", "prm"]
    (table,) = report.stage_tables(tmp_path, found)
    assert {row[0]: row[1][:5] for row in table.rows} == {"base": "0.250", "prm": "0.600"}


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        report.write(tmp_path)
