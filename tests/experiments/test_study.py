"""The full study on a tiny configuration: what it leaves, that it resumes, and what it refuses."""

import json

import numpy as np
import pytest
from experiment_runs import TINY, Stop
from ml_collections import ConfigDict
from PIL import Image

from spark_jax.experiments import launch, study, train_rl

SPRO_FAR = dict(
    reward="rule_based", advantage="spro", advantage_options=dict(beta=1.0, return_clip=0.5)
)
WEAK = dict(reward="process_aware_outcome", reward_model="weak", format_checks=())


@pytest.fixture
def config():
    changes = {name: value for name, value in TINY.items() if name != "verify.methods"}
    config = launch.changed(launch.load_config("configs/demo_full.py"), changes)
    with config.unlocked():
        config.verify.methods = ("single", "outcome_consistency", "step_consistency")
        config.evaluate.votes = 2
        config.study.kinds = ("prm_cot",)
        config.study.seeds = (0, 1, 2)
        config.study.verifier_temperatures = (0.05, 0.8)
        config.study.problem_counts = (2, 4)
        config.study.headline = ("grpo",)
        rule_based = dict(reward="rule_based")
        config.study.arms = ConfigDict(
            dict(
                rewards=dict(rule_based=rule_based),
                formats=dict(good_all_checks=dict(reward="process_aware_outcome"), weak=WEAK),
                spro=dict(grpo=rule_based, far=SPRO_FAR),
            )
        )
    return config


def final_accuracy(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["eval/accuracy"] for row in rows if "eval/accuracy" in row][-1]


@pytest.mark.slow
def test_a_study_resumes_and_says_what_its_runs_found(config, tmp_path, monkeypatch):
    run, calls = train_rl.run, []

    def breaks_once(given, path, on_progress):
        calls.append(path)
        if len(calls) == 4:
            raise Stop
        return run(given, path, on_progress)

    monkeypatch.setattr(train_rl, "run", breaks_once)
    with pytest.raises(Stop):
        study.run(config, tmp_path)
    early = json.loads((tmp_path / "study.json").read_text())
    assert set(early["rl"]) == {"rewards"}  # what had finished is told before the rest has

    found = study.run(config, tmp_path)
    assert json.loads((tmp_path / "study.json").read_text()) == found
    assert {part: list(arms) for part, arms in found["rl"].items()} == {
        "rewards": ["rule_based"],
        "formats": ["good_all_checks", "weak"],  # the baseline first
        "spro": ["grpo", "far"],
    }
    far, grpo = found["rl"]["spro"]["far"], found["rl"]["spro"]["grpo"]
    assert (grpo["after"]["num_seeds"], far["after"]["num_seeds"]) == (3, 2)
    ends = {
        arm: [final_accuracy(tmp_path / "rl" / "spro" / arm / f"seed{seed}") for seed in (0, 1)]
        for arm in ("far", "grpo")
    }
    assert far["after"]["per_seed"] == pytest.approx(ends["far"])
    expected = np.subtract(ends["far"], ends["grpo"])
    assert far["difference"]["per_seed"] == pytest.approx(expected)
    assert 0 < far["p_value"] <= 1
    assert "difference" not in grpo

    trained = json.loads((tmp_path / "rl/spro/far/seed1/config.json").read_text())["rl"]
    assert trained["advantage_options"]["return_clip"] == 0.5
    weak = json.loads((tmp_path / "rl/formats/weak/seed0/config.json").read_text())["rl"]
    assert weak["reward_model"].endswith("prm/weak/seed0/model")
    assert weak["format_checks"] == []

    assert [row["temperature"] for row in found["verifier"]] == [0.05, 0.8]
    row = found["verifier"][1]
    gain = np.subtract(row["voted"]["per_seed"], row["single"]["per_seed"])
    assert row["gain"]["per_seed"] == pytest.approx(gain)
    assert set(found["stage2"]) == {"base", "weak", "prm_cot"}
    assert set(found["problems"]) == {"2", "4"}
    text = (tmp_path / "study.md").read_text()
    for expected in ("step_consistency", "good_all_checks", "| far |", "| 0.05 |", "prm_cot"):
        assert expected in text
    for name in ("stages", "rewards", "formats", "spro"):
        with Image.open(tmp_path / "plots" / f"{name}.png") as image:
            assert len(image.getcolors(maxcolors=1 << 24)) > 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study.parts": ("stage4",)}, "stage4.*unknown"),
        ({"study.seeds": (0,)}, "at least 2"),
        ({"study.weak_temperature": 0.1}, "not among"),
        ({"study.baselines.spro": "ppo"}, "no arm of that part"),
        ({"study.reward_model": "orm/single"}, r"reward_model='orm/single'; have \['weak'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(config, tmp_path, changes, message):
    with pytest.raises(launch.ConfigError, match=message):
        study.run(launch.changed(config, changes), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_an_arm_with_an_unknown_option_is_named(config, tmp_path):
    with config.unlocked():
        config.study.arms.spro.far.advantage_options = dict(betta=1.0)
    with pytest.raises(launch.ConfigError, match=r"arm 'far'.*betta"):
        study.run(config, tmp_path)


def test_the_shipped_study_can_work():
    config = launch.load_config("configs/demo_full.py")
    study.check(config)
    assert sum(len(arms) for arms in config.study.arms.values()) > 40
