"""Stages I and II as run from a configuration: every method, every kind, resumed exactly."""

import json
import shutil

import pytest
from experiment_runs import Stop, corrupt_references, metric_rows, stop_at, weights

from spark_jax import tasks
from spark_jax.data.records import Solution, VerifiedSolution, read_jsonl
from spark_jax.experiments import (
    configuration,
    evaluate,
    generate_verifications,
    loading,
    train_prm,
)
from spark_jax.parallel import processes
from spark_jax.verification.aggregate import AGGREGATIONS


def test_stage1_says_how_busy_the_decoder_was(stage1):
    busy = json.loads((stage1 / "decoding.json").read_text())
    for what in ("generate", "verify"):
        assert busy[what]["decode_steps"] > 0
        assert 0 < busy[what]["slot_occupancy"] <= busy[what]["queue_occupancy"] <= 1


def test_stage1_reports_every_method(tiny, stage1):
    summary = json.loads((stage1 / "summary.json").read_text())
    assert set(summary["methods"]) == set(AGGREGATIONS)
    assert set(summary["by_sample_count"]) == {"1", "3"}
    for report in summary["methods"].values():
        assert 0 <= report["step_accuracy"] <= 1
    assert len(read_jsonl(stage1 / "solutions.jsonl", Solution)) == 8
    records = read_jsonl(stage1 / "verified.jsonl", VerifiedSolution)
    assert [len(record.aggregated) for record in records] == [7] * 8
    assert any(item.merge == "merged" for record in records for item in record.aggregated)


def test_what_training_stores_is_no_part_of_sampling(tiny):
    config = configuration.changed(tiny, {"remat_save": ("qkv_proj", "out_proj")})
    model = loading.load_trainable(config, config.model).config
    assert model.remat_save == ("qkv_proj", "out_proj")
    assert "remat_save" not in configuration.sub_config(config, "generate", "verify")


@pytest.mark.parametrize("calls", [2, 4])
def test_stage1_resumes_to_the_same_files(tiny, stage1, tmp_path, calls):
    with pytest.raises(Stop):
        generate_verifications.run(tiny, tmp_path, stop_at(calls))
    generate_verifications.run(tiny, tmp_path)
    for name in ("solutions.jsonl", "verified.jsonl", "summary.json"):
        assert (tmp_path / name).read_bytes() == (stage1 / name).read_bytes()


def test_stage1_sends_no_records_to_other_processes(tiny, tmp_path, monkeypatch):
    """They would be gigabytes: what `lead` returns goes to every process."""
    lead, sent = processes.lead, []
    monkeypatch.setattr(processes, "lead", lambda *given: sent.append(lead(*given)))
    config = configuration.changed(tiny, {"verify.methods": ("single",)})
    assert generate_verifications.run(config, tmp_path)["num_solutions"] == 8
    assert sent == [None, None]


def test_reference_free_verifications_do_not_see_references(tiny, tmp_path, monkeypatch):
    """Every reference is made wrong; only the reference-guided verifications may change."""
    config = configuration.changed(
        tiny, {"verify.methods": ("step_consistency", "reference_guided")}
    )
    honest = generate_verifications.run(config, tmp_path / "honest")
    corrupt_references(monkeypatch)
    corrupted = generate_verifications.run(config, tmp_path / "corrupted")
    read = [
        read_jsonl(tmp_path / name / "verified.jsonl", VerifiedSolution)
        for name in ("honest", "corrupted")
    ]
    for before, after in zip(*read, strict=True):
        assert before.samples == after.samples
        assert before.aggregated[0] == after.aggregated[0]
    assert any(a.reference_samples != b.reference_samples for a, b in zip(*read, strict=True))
    assert honest["num_solutions"] == corrupted["num_solutions"]


@pytest.mark.parametrize("kind", ["orm", "prm", "prm_cot"])
def test_every_kind_of_reward_model_trains(tiny, reward_models, kind):
    params, config, tokenizer, _ = loading.load_model(reward_models[kind])
    assert config.vocab_size == len(tokenizer)
    base, *_ = loading.load_model(tiny.model)
    assert float(abs(params.embedding - base.embedding).max()) > 1e-4


@pytest.mark.parametrize("method", AGGREGATIONS)
def test_every_method_gives_targets(tiny, stage1, method):
    changes = {"prm.data": str(stage1), "prm.method": method, "prm.balance": True}
    pairs, counts = train_prm.examples(
        configuration.changed(tiny, changes), tasks.load("arithmetic_chains")
    )
    assert len(pairs) == counts["balance"]["kept"]


def test_stage2_resumes_bit_for_bit(tiny, stage1, tmp_path):
    changes = {"prm.data": str(stage1), "prm.save_every": 2}
    config = configuration.changed(tiny, changes)
    train_prm.run(config, tmp_path / "whole")
    with pytest.raises(Stop):
        train_prm.run(config, tmp_path / "broken", stop_at(4))  # after a save at 2, before one at 4
    train_prm.run(config, tmp_path / "broken")
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert metric_rows(tmp_path / "broken") == metric_rows(tmp_path / "whole")


def test_missing_stage1_is_named(tiny, tmp_path):
    config = configuration.changed(tiny, {"prm.data": str(tmp_path / "nowhere")})
    with pytest.raises(FileNotFoundError, match=r"prm.data=.*nowhere.*generate_verifications"):
        train_prm.run(config, tmp_path / "prm")
    assert not (tmp_path / "prm").exists()  # the mended command may use the folder


def test_an_unfinished_stage1_is_refused(tiny, stage1, tmp_path):
    shutil.copytree(stage1, tmp_path / "stage1")
    (tmp_path / "stage1" / "summary.json").unlink()
    config = configuration.changed(tiny, {"prm.data": str(tmp_path / "stage1")})
    with pytest.raises(FileNotFoundError, match=r"no summary.json, so it is no finished stage I"):
        train_prm.run(config, tmp_path / "prm")


def test_stage2_may_have_another_seed_than_its_data(tiny, stage1):
    changes = {"prm.data": str(stage1), "seed": 7, "generate.num_problems": 1}
    task = tasks.load("arithmetic_chains")
    other, _ = train_prm.examples(configuration.changed(tiny, changes), task)
    same, _ = train_prm.examples(configuration.changed(tiny, {"prm.data": str(stage1)}), task)
    assert other == same


def test_evaluate_both_ways(tiny, reward_models, tmp_path):
    policy = evaluate.run(tiny, tmp_path / "policy")
    assert policy["accuracy"]["low"] <= policy["accuracy"]["estimate"] <= policy["accuracy"]["high"]
    assert len(policy["correct_per_problem"]) == 2
    changes = {"model": reward_models["prm_cot"], "evaluate.what": "reward_model"}
    changes |= {"evaluate.votes": 3, "evaluate.num_solutions": 4}
    scores = evaluate.run(configuration.changed(tiny, changes), tmp_path / "reward_model")
    assert scores["num_solutions"] == 4
    assert "f1" in scores
    assert 0 <= scores["majority_overall_accuracy"] <= 1
    assert "soft_auc" in scores
