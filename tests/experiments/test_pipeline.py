"""The whole sequence on a tiny configuration: what it leaves, and that a second start resumes."""

import functools
import json

import pytest
from compilations import Compilations
from experiment_runs import Stop
from PIL import Image
from rich.progress import Progress

from spark_jax.experiments import configuration, loading, pipeline, pretrain, train_rl
from spark_jax.experiments.configuration import ConfigError


@pytest.fixture
def config(tiny):
    changes = {"verify.methods": ("single", "outcome_consistency", "step_consistency")}
    config = configuration.changed(tiny, changes)
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


def test_another_seed_compiles_next_to_nothing(config, tmp_path):
    """Only what has other sizes: examples of a reward model, and the number of prompts."""
    changes = {"decode.max_prompt_length": 96, "verify.methods": ("step_consistency",)}
    config = configuration.changed(config, changes)
    for seed in (0, 1):
        with Compilations() as compiled:
            own = configuration.changed(config, {"pipeline.seeds": (seed,)})
            pipeline.run(own, tmp_path / str(seed))
    assert set(compiled.names) <= {"jit(decode)", "jit(sft_step)", "jit(scored)"}


def test_impossible_arms_are_refused_before_anything_runs(config, tmp_path):
    with config.unlocked():
        config.pipeline.arms["bad"] = {"reward": "rule_based", "advantage": "global_step"}
    with pytest.raises(ValueError, match="'global_step' needs step verdicts"):
        pipeline.run(config, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_base_made_afresh_takes_the_place_of_the_shipped_one(config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        pretrain,
        "PretrainSettings",
        functools.partial(pretrain.PretrainSettings, steps=2, warmup_steps=1),
    )
    made = []
    with Progress() as progress:
        for _ in range(2):  # the second time it is there already
            made.append(pipeline.make_base(config, tmp_path / "base", progress))
    assert made[0].model == made[0].evaluate.generator == str(tmp_path / "base")
    assert made[0].to_dict() == made[1].to_dict()
    fresh, fresh_config, tokenizer, _ = loading.load_model(made[0].model)
    shipped, shipped_config, *_ = loading.load_model(config.model)
    assert fresh_config == shipped_config
    assert tokenizer.eos_token_id == 1
    assert float(abs(fresh.embedding - shipped.embedding).max()) > 0.1


def test_what_stage_two_has_to_beat_is_what_it_starts_from(config):
    changes = {"prm.model": "owner/start", "evaluate.kind": "orm", "prm.kind": "orm"}
    for start, given in (("owner/start", changes), (config.model, {})):
        asked = pipeline.base_as_reward_model(configuration.changed(config, given), 3)
        assert (asked.model, asked.seed) == (start, 3)
        assert (asked.evaluate.what, asked.evaluate.kind) == ("reward_model", None)
        assert asked.prm.kind == "prm_cot"


def test_quick_needs_numbers_to_take_a_share_of(config):
    everything = configuration.changed(config, {"evaluate.num_problems": None})
    with pytest.raises(ConfigError, match=r"a share of evaluate.num_problems, which is None"):
        pipeline.quick_version(everything)


def test_quick_is_smaller_and_has_a_folder_of_its_own(config, tmp_path):
    quick = pipeline.quick_version(config)
    assert quick.pipeline.seeds == (0,)
    assert quick.rl.steps < configuration.load_config("configs/demo.py").rl.steps
    assert quick.generate.num_problems < config.generate.num_problems
    results = pipeline.run(configuration.changed(config, {"quick": True}), tmp_path / "run")
    assert results["seeds"] == [0]
    assert (tmp_path / "run-quick" / "summary.json").exists()
    assert not (tmp_path / "run").exists()
