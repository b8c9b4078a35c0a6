"""What an RL run keeps of a rollout: the numbers it trained with, at the tokens they are of."""

import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest
from experiment_runs import Stop, metric_rows, stop_at

from spark_jax import tasks
from spark_jax.advantages import grpo
from spark_jax.experiments import configuration, recording, report, train_rl
from spark_jax.experiments.configuration import ConfigError
from spark_jax.reports import rollouts
from spark_jax.response_format import format_checks, valid_part
from spark_jax.rewards import monitor
from spark_jax.rewards.prm import Judged
from spark_jax.rewards.records import Judgement
from spark_jax.tasks.arithmetic_chains import world
from spark_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def spro(tiny, reward_models, tmp_path_factory):
    """Three steps with a reward model that judges steps, process rewards and every record."""
    path = tmp_path_factory.mktemp("spro")
    changes = {
        "rl.reward": "step_average",
        "rl.advantage": "spro",
        "rl.advantage_options.beta": 0.5,
        "rl.reward_model": reward_models["prm_cot"],
        "rl.record.every": 1,
    }
    summary = train_rl.run(configuration.changed(tiny, changes), path)
    return path, summary


def step(path, number):
    return rollouts.read(rollouts.step_file(path, number))


def samples(path, number):
    lines = (path / "samples" / f"step_{number:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("number", [1, 3])
def test_records_hold_the_responses_and_their_rewards(spro, tiny, number):
    record, kept = step(spro[0], number), samples(spro[0], number)
    task = tasks.load("arithmetic_chains")
    problems = {p.id: p for p in task.problems(tiny.rl.num_problems, tiny.seed, "train")}
    assert len(record.groups) == record.num_groups == 2
    for response, sample in zip(record.responses, kept, strict=True):
        end = response.tokens[-1:] if response.finished else ()
        assert "".join(response.tokens) == sample["response"] + "".join(end)
        assert not end or end[0].strip() == world.EOS
        assert response.reward == sample["reward"]
        assert response.checks == format_checks(sample["response"])
        problem = problems[sample["problem"]]
        labels, _ = task.labels(problem, valid_part(sample["response"]))
        assert response.step_labels == labels
        said = sample["response"].count("<step>")
        assert said - 1 <= len({s for s in response.steps if s >= 0}) <= said
    assert {g.problem_id for g in record.groups} == {row["problem"] for row in kept}


def test_numbers_fit_together(spro):
    """CPR is the running sum of β times the log-ratio, GRPO the rewards' own, SPRO their sum with
    MSA; at first policy and reference are one."""
    for number in (1, 2, 3):
        record = step(spro[0], number)
        assert list(record.values) == [
            "logprob", "ref_logprob", "cpr", "spro", "grpo", "selective", "global_step",
            "masked_step",
        ]  # fmt: skip
        rewards = jnp.array([response.reward for response in record.responses])
        outcome = np.asarray(grpo(rewards, 4))
        for row, values in enumerate(record.split_values()):
            ratio = values["logprob"] - values["ref_logprob"]
            np.testing.assert_allclose(values["cpr"], 0.5 * np.cumsum(ratio), atol=1e-5)
            np.testing.assert_allclose(values["grpo"], outcome[row], atol=1e-5)
            np.testing.assert_allclose(
                values["spro"], values["grpo"] + values["masked_step"], atol=1e-5
            )
            assert np.all(values["logprob"] <= 0)
            assert np.any(ratio != 0) == (number > 1)


def test_verdicts_are_the_reward_models(spro):
    for response in step(spro[0], 3).responses:
        if not all(response.checks.values()):
            assert (response.verifications, response.overall) == ((), None)
            continue
        (said,) = response.verifications
        assert response.overall == said.overall
        assert response.verdicts == tuple(1 if verdict else -1 for verdict in said.verdicts)
        assert (said.soft_score is None) == (said.failure is not None)
        if said.failure is None:
            assert (said.soft_score > 0.5) == said.overall  # greedy: the likelier word


def test_monitor_and_soft_scores_are_metrics(spro):
    rows = read_metrics(spro[0] / "metrics.jsonl")
    for row in rows[1:]:
        assert {"monitor/step_inflation", "monitor/reward_above_truth"} <= row.keys()
        assert 0 <= row[monitor.SOFT_SCORE] <= 1
        judged = [
            said
            for response in step(spro[0], int(row["step"])).responses
            for said in response.verifications
            if said.failure is None
        ]
        assert row[monitor.SOFT_SCORE] == pytest.approx(np.mean([s.soft_score for s in judged]))
        doubt = 1 - np.mean([said.soft_score for said in judged if said.overall])
        assert row[monitor.YES_ABOVE_SOFT] == pytest.approx(doubt, abs=1e-6)
    low, high = rows[0]["eval/accuracy_low"], rows[0]["eval/accuracy_high"]
    assert low <= rows[0]["eval/accuracy"] <= high


def test_a_run_without_reward_model_or_reference_shows_what_it_has(tiny, tmp_path):
    changes = {"rl.reward": "rule_based", "rl.record.problems": 1}
    config = configuration.changed(tiny, changes | {"rl.evaluate_every": 5})
    train_rl.run(config, tmp_path)
    assert list(rollouts.recorded_steps(tmp_path)) == [1, 3]
    record = step(tmp_path, 3)
    assert list(record.values) == ["logprob", "grpo"]
    assert (len(record.groups), record.num_groups) == (1, 2)
    assert all(response.verifications == () for response in record.responses)
    assert monitor.SOFT_SCORE not in read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert not recording.is_recorded(configuration.changed(config, {"rl.record.problems": 0}), 1)


def test_doubt_is_of_yes_alone():
    """A reward model that is as sure as ever is not gamed by a policy that gets better."""

    def metrics(yes, sure):
        said = tuple(Judgement("prm_cot", 3, hit, (hit,) * 3) for hit in (True,) * yes + (False,))
        n = len(said)
        steps, kept = np.full(n, 3, np.int32), np.ones(n, bool)
        judged = Judged(said, np.zeros((n, 3), np.int8), steps, kept, {})
        return recording.soft_metrics(judged, [sure] * yes + [0.12])

    assert metrics(4, 0.88)[monitor.YES_ABOVE_SOFT] == pytest.approx(0.12)
    assert metrics(40, 0.88)[monitor.YES_ABOVE_SOFT] == pytest.approx(0.12)
    assert metrics(40, 0.55)[monitor.YES_ABOVE_SOFT] == pytest.approx(0.45)
    assert monitor.YES_ABOVE_SOFT not in metrics(0, 1.0)
    assert metrics(0, 1.0)[monitor.SOFT_SCORE] == pytest.approx(0.12)


def test_alarms_are_logged_and_in_the_summary(tiny, tmp_path, caplog, monkeypatch):
    """Alarmed at steps 1 and 3 by a pattern that is made up, and said once."""
    monkeypatch.setitem(monitor.PATTERNS, "step_inflation", lambda rows, _: 1.25 - len(rows) % 2)
    changes = {"rl.reward": "random", "rl.monitor.step_inflation": 0.5}
    with caplog.at_level(logging.WARNING):
        summary = train_rl.run(configuration.changed(tiny, changes), tmp_path)
    (found,) = [alarm for alarm in summary["alarms"] if alarm["pattern"] == "step_inflation"]
    assert (found["first_step"], found["last_step"], found["num_steps"]) == (1, 3, 2)
    assert found["peak"] == 1.25
    said = [record.message for record in caplog.records if "step inflation" in record.message]
    assert [message.partition(": ")[2][:26] for message in said] == ["step inflation at step 1: "]


def test_groups_that_are_filtered_out_are_shown_as_not_trained_on(tiny, tmp_path):
    """And have no advantage, while their process rewards are still there to be seen."""
    changes = {"rl.reward": "rule_based", "rl.advantage": "spro"}
    changes |= {"rl.filter_low": 0.0, "rl.filter_high": 1.0}
    train_rl.run(configuration.changed(tiny, changes | {"rl.record.every": 1}), tmp_path)
    seen = set()
    for number in (1, 2, 3):
        record = step(tmp_path, number)
        for group in record.groups:
            equal = len({response.reward for response in group.responses}) == 1
            assert {response.trained for response in group.responses} == {not equal}
            seen.add(equal)
        for response, values in zip(record.responses, record.split_values(), strict=True):
            assert np.any(values["spro"]) == response.trained or number == 1
    assert True in seen


def test_a_resumed_run_has_the_same_records_and_monitor(tiny, tmp_path):
    changes = {"rl.reward": "rule_based", "rl.advantage": "spro", "rl.save_every": 2}
    config = configuration.changed(tiny, changes | {"rl.record.every": 1})
    train_rl.run(config, tmp_path / "whole")
    with pytest.raises(Stop):
        train_rl.run(config, tmp_path / "broken", stop_at(3))
    train_rl.run(config, tmp_path / "broken")
    assert metric_rows(tmp_path / "broken") == metric_rows(tmp_path / "whole")
    for number in (1, 2, 3):
        one, other = (step(tmp_path / name, number) for name in ("whole", "broken"))
        assert one.groups == other.groups
        for name, array in one.values.items():
            np.testing.assert_array_equal(array, other.values[name])


def test_thresholds_and_records_are_checked_before_anything(tiny, tmp_path):
    for changes, message in (
        ({"rl.monitor.step_reduction": 0.0}, "rl.monitor: step_reduction=0.0"),
        ({"rl.record.every": 0}, "rl.record.every=0"),
        ({"rl.record.problems": -1}, "rl.record.problems=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_rl.run(configuration.changed(tiny, {"rl.reward": "random"} | changes), tmp_path)


def test_its_page_says_what_the_record_holds(spro, browser):
    file = report.write(spro[0])
    values = step(spro[0], 3).split_values()
    with browser(file, tab="rollouts") as tab:
        tab.select_option("select[aria-label='Rollouts']", index=2)
        tab.wait_for_selector("#rollouts:not([data-loading]) .card")
        tab.hover(".card:nth-child(2) .token >> nth=4")
        for row in tab.locator("#tip tr").all():
            shown = float(row.locator("td").nth(1).inner_text())
            name = row.get_attribute("data-value")
            assert shown == pytest.approx(float(values[1][name][4]), rel=5e-4, abs=1e-9)
