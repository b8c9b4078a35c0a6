"""The full study on a tiny configuration: what it leaves, that it resumes, and what it refuses."""

import itertools
import json
import shutil

import numpy as np
import pytest
from experiment_runs import TINY, Stop
from ml_collections import ConfigDict
from PIL import Image

from spark_jax.data.records import Verification, VerifiedSolution, read_jsonl
from spark_jax.experiments import configuration, loading, study, train_rl
from spark_jax.experiments.configuration import ConfigError
from spark_jax.tasks.arithmetic_chains import base, world

SPRO_FAR = dict(
    reward="rule_based", advantage="spro", advantage_options=dict(beta=1.0, return_clip=0.5)
)
JUDGED = dict(
    reward="process_aware_outcome",
    advantage="spro",
    reference_updates=5,
    baseline="formats/good_all_checks",
)
WEAK = dict(reward="process_aware_outcome", reward_model="weak", format_checks=())


@pytest.fixture
def config():
    changes = {name: value for name, value in TINY.items() if name != "verify.methods"}
    config = configuration.changed(configuration.load_config("configs/demo_full.py"), changes)
    with config.unlocked():
        config.verify.methods = ("single", "outcome_consistency", "step_consistency")
        config.evaluate.votes = 2
        config.study.kinds = ("prm_cot",)
        config.study.seeds = (0, 1, 2)
        config.study.verifier_updates = (3, 5)
        config.study.weak_updates = 3
        config.study.pictures = ConfigDict(dict(spro=dict(far=("grpo", "far"))))
        config.study.problem_counts = (2, 4)
        config.study.headline = ("grpo",)
        rule_based = dict(reward="rule_based")
        config.study.arms = ConfigDict(
            dict(
                rewards=dict(rule_based=rule_based),
                formats=dict(good_all_checks=dict(reward="process_aware_outcome"), weak=WEAK),
                spro=dict(grpo=rule_based, far=SPRO_FAR, judged=JUDGED),
            )
        )
    return config


@pytest.fixture
def early_models(monkeypatch):
    """Verifiers that can be read, for what has learned for five updates writes nothing that can."""
    made = []

    def copies_the_base(path, updates):
        made.append((path.parent.name, updates))
        shutil.copytree(base.PATH, path, dirs_exist_ok=True)

    monkeypatch.setattr(study, "make_early_model", copies_the_base)
    return made


def final_accuracy(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["eval/accuracy"] for row in rows if "eval/accuracy" in row][-1]


def paired_p_value(first, second):
    """By hand: how many of all sign flips of the problems' differences are as extreme."""
    differences = []
    for seed in (0, 1):
        shares = []
        for arm in (first, second):
            found = json.loads((arm / f"seed{seed}" / "summary.json").read_text())["evaluation"]
            shares.append(dict(zip(found["problem_ids"], found["correct_per_problem"])))
        differences += [float(shares[0][problem] - shares[1][problem]) for problem in shares[0]]
    observed = abs(sum(differences))
    flips = [
        abs(sum(sign * d for sign, d in zip(signs, differences)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(flip >= observed - 1e-9 for flip in flips) / len(flips)


def voted_detection(folder):
    """By hand: the share of wrong steps that step_consistency's vote marks incorrect."""
    texts = {}
    for line in (folder / "solutions.jsonl").read_text().splitlines():
        row = json.loads(line)
        texts[row["problem_id"], row["index"]] = row["text"]
    config = json.loads((folder / "config.json").read_text())
    problems = world.problems(config["generate"]["num_problems"], config["seed"], "train")
    by_id = {problem.id: problem for problem in problems}
    seen = []
    for record in read_jsonl(folder / "verified.jsonl", VerifiedSolution):
        key = record.problem_id, record.solution_index
        labels = world.step_labels(by_id[record.problem_id], texts[key])
        valid = [v.verdicts for v in record.samples if isinstance(v, Verification)]
        for step, right in enumerate(labels):
            if valid and not right:
                seen.append(2 * sum(verdicts[step] for verdicts in valid) <= len(valid))
    return np.mean(seen) if seen else None


@pytest.mark.slow(minutes=3)
def test_a_study_resumes_and_says_what_its_runs_found(config, tmp_path, monkeypatch, early_models):
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
        "spro": ["grpo", "far", "judged"],
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
    runs = tmp_path / "rl"
    assert far["p_value"] == pytest.approx(paired_p_value(runs / "spro/far", runs / "spro/grpo"))
    assert far["baseline"] == "grpo"
    assert "difference" not in grpo
    judged, good = found["rl"]["spro"]["judged"], found["rl"]["formats"]["good_all_checks"]
    expected = np.subtract(judged["after"]["per_seed"], good["after"]["per_seed"])
    assert judged["difference"]["per_seed"] == pytest.approx(expected)
    assert judged["baseline"] == "formats/good_all_checks"

    trained = json.loads((tmp_path / "rl/spro/far/seed1/config.json").read_text())["rl"]
    assert trained["advantage_options"]["return_clip"] == 0.5
    weak = json.loads((tmp_path / "rl/formats/weak/seed0/config.json").read_text())["rl"]
    assert weak["reward_model"].endswith("prm/weak/seed0/model")
    assert weak["format_checks"] == []

    asked = json.loads((runs / "spro/judged/seed1/config.json").read_text())["rl"]
    assert asked["reference_model"].endswith("verifier/updates_5/model")
    assert asked["reward_model"].endswith("prm/prm_cot/step_consistency/seed1/model")

    assert set(early_models) == {("updates_3", 3), ("updates_5", 5)}
    assert [row["updates"] for row in found["verifier"]] == [3, 5, "base"]
    row = found["verifier"][1]
    gain = np.subtract(row["voted_accuracy"]["per_seed"], row["accuracy"]["per_seed"])
    assert row["accuracy_gain"]["per_seed"] == pytest.approx(gain)
    folders = [tmp_path / "verifier" / "updates_5" / f"seed{seed}" for seed in (0, 1)]
    assert row["voted_detection"]["per_seed"] == [voted_detection(folder) for folder in folders]
    assert set(found["stage2"]) == {"base", "weak", "prm_cot"}
    assert set(found["problems"]) == {"2", "4"}
    text = (tmp_path / "study.md").read_text()
    for expected in (
        "step_consistency",
        "good_all_checks",
        "| far |",
        "| 3 |",
        "a verifier of 3 updates",
    ):
        assert expected in text
    for name in ("stages", "rewards", "formats", "spro", "spro_far"):
        with Image.open(tmp_path / "plots" / f"{name}.png") as image:
            assert len(image.getcolors(maxcolors=1 << 24)) > 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study.parts": ("stage4",)}, "stage4.*unknown"),
        ({"study.seeds": (0,)}, "at least 2"),
        ({"study.weak_updates": 4}, "not among"),
        ({"study.baselines.spro": "ppo"}, "study.baselines.spro='ppo' is no arm of that part"),
        (
            {"study.arms.spro.judged.baseline": "formats/grpo"},
            "arm 'judged': baseline='formats/grpo'",
        ),
        ({"study.arms.spro.judged.reference_updates": 4}, "reference_updates=4 is not among"),
        ({"study.pictures.spro.far": ("grpo", "near")}, "pictures.spro.far='near' is no arm"),
        (
            {"study.headline": ("weak",)},
            r"arm 'weak' is in study.headline.*\(0, 1, 2\).*\(0, 1\) only",
        ),
        ({"study.reward_model": "orm/single"}, r"reward_model='orm/single'; have \['weak'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(config, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        study.run(configuration.changed(config, changes), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_part_without_a_baseline_is_named(config, tmp_path):
    with config.unlocked():
        del config.study.baselines["formats"]
    with pytest.raises(ConfigError, match=r"study.baselines has no entry.*arms\.formats"):
        study.run(config, tmp_path)


def test_arms_of_no_part_are_named(config, tmp_path):
    with config.unlocked():
        config.study.arms.stage1 = ConfigDict(dict(grpo=dict(reward="rule_based")))
        config.study.arms.more = ConfigDict(dict(grpo=dict(reward="rule_based")))
    with pytest.raises(ConfigError, match=r"is no part of study.arms"):
        study.run(config, tmp_path)


@pytest.mark.slow
def test_an_early_model_is_made_once(tmp_path):
    path = study.early_model(tmp_path, updates=51)
    study.make_early_model(path, updates=51)
    assert loading.load_model(str(path)).config.num_layers == 2
    (path / "model.safetensors").write_bytes(b"kept")
    study.make_early_model(path, updates=51)
    assert (path / "model.safetensors").read_bytes() == b"kept"


def test_an_arm_with_an_unknown_option_is_named(config, tmp_path):
    with config.unlocked():
        config.study.arms.spro.far.advantage_options = dict(betta=1.0)
    with pytest.raises(ConfigError, match=r"arm 'far'.*betta"):
        study.run(config, tmp_path)


def test_the_shipped_study_can_work():
    config = configuration.load_config("configs/demo_full.py")
    study.check(config)
    assert study.baselines(config, "spro")["far_clipped"] == "spro_beta1_lr0_001"
    assert sum(len(arms) for arms in config.study.arms.values()) > 40
