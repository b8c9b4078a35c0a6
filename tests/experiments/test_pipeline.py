"""The whole sequence on a tiny configuration: what it leaves, and that a second start resumes."""

import json

import pytest
from experiment_runs import Stop
from PIL import Image

from spark_jax.experiments import launch, pipeline, train_rl


@pytest.fixture
def config(tiny):
    changes = {"verify.methods": ("single", "outcome_consistency", "step_consistency")}
    config = launch.changed(tiny, changes)
    arms = config.pipeline.arms.to_dict()
    kept = ("prm_grpo", "prm_spro", "random")
    with config.unlocked():
        config.pipeline.arms = {name: arms[name] for name in kept}
    return config


def test_pipeline_leaves_summary_plots_and_tables(config, tmp_path, capsys, monkeypatch):
    run, calls = train_rl.run, []

    def breaks_once(*args):
        calls.append(args)
        if len(calls) == 3:
            raise Stop
        return run(*args)

    monkeypatch.setattr(train_rl, "run", breaks_once)
    with pytest.raises(Stop):
        pipeline.run(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    results = pipeline.run(config, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()).keys() == results.keys()
    assert set(results["stage3"]) == {"prm_grpo", "prm_spro", "random"}
    assert set(results["stage2"]) == {"base", "single", "outcome_consistency", "step_consistency"}
    score = results["stage1"]["step_consistency"]["3"]["step_accuracy"]
    assert score["low"] <= score["estimate"] <= score["high"]
    assert len(score["per_seed"]) == 2
    claim = results["differences"]["III: accuracy, prm_grpo - prm_spro"]
    after = [results["stage3"][f"prm_{a}"]["after"]["per_seed"] for a in ("grpo", "spro")]
    assert claim["per_seed"] == pytest.approx([a - b for a, b in zip(*after, strict=True)])
    for name in ("stage1", "stage2", "stage3", "by_step", "overview"):
        with Image.open(tmp_path / "plots" / f"{name}.png") as image:
            assert len(image.getcolors(maxcolors=1 << 24)) > 10
    printed = capsys.readouterr().out
    assert (tmp_path / "tables.txt").read_text().strip() in "\n".join(
        line.rstrip() for line in printed.splitlines()
    )
    assert "What shows in this world, and what does not" in printed
    assert "step_consistency" in printed


def test_impossible_arms_are_refused_before_anything_runs(config, tmp_path):
    with config.unlocked():
        config.pipeline.arms["bad"] = {"reward": "rule_based", "advantage": "global_step"}
    with pytest.raises(ValueError, match="'global_step' needs step verdicts"):
        pipeline.run(config, tmp_path)
    assert not any(tmp_path.iterdir())


def test_quick_is_smaller_and_has_a_folder_of_its_own(config, tmp_path):
    quick = pipeline.quick_version(config)
    assert quick.pipeline.seeds == (0,)
    assert quick.rl.steps < launch.load_config("configs/demo.py").rl.steps
    assert quick.generate.num_problems < config.generate.num_problems
    results = pipeline.run(launch.changed(config, {"quick": True}), tmp_path / "run")
    assert results["seeds"] == [0]
    assert (tmp_path / "run-quick" / "summary.json").exists()
    assert not (tmp_path / "run").exists()
