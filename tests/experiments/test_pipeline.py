"""The whole sequence on a tiny configuration: what it leaves, and that a second start resumes."""

import contextlib
import functools
import io
import json
import shutil

import pytest
from compilations import Compilations
from experiment_runs import Stop
from PIL import Image
from rich.progress import Progress

from spark_jax.experiments import (
    checks,
    configuration,
    generate_verifications,
    loading,
    pipeline,
    pretrain,
    train_rl,
)
from spark_jax.experiments.configuration import ConfigError
from spark_jax.reports import plots
from spark_jax.tasks.arithmetic_chains import base


@pytest.fixture(scope="module")
def config(tiny):
    changes = {"verify.methods": ("single", "step_consistency")}
    config = configuration.changed(tiny, changes)
    arms = config.pipeline.arms.to_dict()
    kept = ("prm_grpo", "prm_spro")
    with config.unlocked():
        config.pipeline.arms = {name: arms[name] for name in kept}
    return config


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """Folder, summary and output of a run of two seeds that broke in stage III, and went on."""
    path, run, calls = tmp_path_factory.mktemp("pipeline"), train_rl.run, []
    # Two workers would each compile what both need first.
    config = configuration.changed(config, {"pipeline.workers": 1})

    def breaks_once(*args):
        calls.append(args)
        if len(calls) == 3:
            raise Stop
        return run(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rl, "run", breaks_once)
        patch.setattr(plots, "training_curves", lambda metrics, folder: [])
        patch.setattr(plots, "stage1_summary", lambda *summary, **options: None)
        with pytest.raises(Stop):
            pipeline.run(config, path)
        assert not (path / "summary.json").exists()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            results = pipeline.run(config, path)
    return path, results, printed.getvalue()


def test_pipeline_leaves_summary_plots_and_tables(finished):
    path, results, printed = finished
    assert json.loads((path / "summary.json").read_text()).keys() == results.keys()
    assert set(results["stage3"]) == {"prm_grpo", "prm_spro"}
    assert set(results["stage2"]) == {"base", "single", "step_consistency"}
    score = results["stage1"]["step_consistency"]["3"]["step_accuracy"]
    assert score["low"] <= score["estimate"] <= score["high"]
    assert len(score["per_seed"]) == 2
    claim = results["differences"]["III: accuracy, prm_grpo - prm_spro"]
    after = [results["stage3"][f"prm_{a}"]["after"]["per_seed"] for a in ("grpo", "spro")]
    assert claim["per_seed"] == pytest.approx([a - b for a, b in zip(*after, strict=True)])
    for name in ("stage1", "stage2", "stage3", "by_step", "overview"):
        with Image.open(path / "plots" / f"{name}.png") as image:
            assert len(image.getcolors(maxcolors=1 << 24)) > 10
    assert (path / "tables.txt").read_text().strip() in "\n".join(
        line.rstrip() for line in printed.splitlines()
    )
    assert "What shows in this world, and what does not" in printed
    assert "step_consistency" in printed


@pytest.mark.usefixtures("finished")
def test_another_seed_compiles_next_to_nothing(config, tmp_path, monkeypatch):
    """Only what has other sizes: examples of a reward model, and the number of prompts."""
    monkeypatch.setattr(plots, "draw", lambda results, folder: [])
    with Compilations() as compiled:
        changes = {"pipeline.seeds": (2,), "verify.methods": ("step_consistency",)}
        pipeline.run(configuration.changed(config, changes), tmp_path)
    assert set(compiled.names) <= {"jit(decode)", "jit(sft_step)", "jit(scored)"}


def test_impossible_arms_are_refused_before_anything_runs(config, tmp_path):
    impossible = configuration.changed(config, {})
    with impossible.unlocked():
        impossible.pipeline.arms["bad"] = {"reward": "rule_based", "advantage": "global_step"}
    with pytest.raises(ValueError, match="'global_step' needs step verdicts"):
        pipeline.run(impossible, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_base_made_afresh_takes_the_place_of_the_shipped_one(config, tmp_path, monkeypatch):
    """Made once; a copy of the shipped one stands in for what is pretrained."""
    made = []

    def copies_the_shipped_one(path, *, seed, settings, on_progress):
        made.append((seed, settings))
        on_progress(settings.steps, {})
        shutil.copytree(base.PATH, path)

    monkeypatch.setattr(pretrain, "run", copies_the_shipped_one)
    with Progress() as progress:
        for _ in range(2):  # the second time it is there already
            changed = pipeline.make_base(config, tmp_path / "base", progress)
            assert changed.model == changed.evaluate.generator == str(tmp_path / "base")
    assert made == [(config.seed, pretrain.PretrainSettings())]
    assert checks.check_common(changed) is None


@pytest.mark.slow
def test_a_pretrained_base_loads_as_the_shipped_one(config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        pretrain,
        "PretrainSettings",
        functools.partial(pretrain.PretrainSettings, steps=2, warmup_steps=1),
    )
    with Progress() as progress:
        made = pipeline.make_base(config, tmp_path / "base", progress)
    fresh, fresh_config, tokenizer, _ = loading.load_model(made.model)
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


def test_quick_is_smaller_and_has_a_folder_of_its_own(config, tmp_path, monkeypatch):
    """As its first run is given it; `test_demo.py` has a whole one."""
    quick = pipeline.quick_version(config)
    assert quick.pipeline.seeds == (0,)
    assert quick.rl.steps < configuration.load_config("configs/demo.py").rl.steps
    assert quick.generate.num_problems < config.generate.num_problems
    given = []

    def stops(*args):
        given.append(args[:2])
        raise Stop

    monkeypatch.setattr(generate_verifications, "run", stops)
    with pytest.raises(Stop):
        pipeline.run(configuration.changed(config, {"quick": True}), tmp_path / "run")
    ((own, path),) = given
    assert own.generate.num_problems == quick.generate.num_problems
    assert path == tmp_path / "run-quick" / "seed0" / "stage1"
    made = json.loads((tmp_path / "run-quick" / "config.json").read_text())
    assert made["pipeline"]["seeds"] == [0]
    assert not (tmp_path / "run").exists()
