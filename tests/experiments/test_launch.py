"""Configurations that cannot work are refused at once, with the choices."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from spark_jax.experiments import (
    checks,
    configuration,
    launch,
    merge_verifications,
    pipeline,
    study,
)
from spark_jax.experiments.configuration import ConfigError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "chess"}, "task='chess'.*arithmetic_chains"),
        ({"model": "nowhere"}, "model='nowhere' is not a model; give.*smollm2-135m-instruct"),
        ({"dtype": "float16"}, "dtype='float16'.*bfloat16"),
        ({"attention": "flash"}, "attention='flash'.*blockwise"),
        ({"remat_save": ("mlp",)}, "remat_save: .*'mlp'.*out_proj"),
        ({"decode.cache_dtype": "int4"}, "decode.cache_dtype: .*'int4'.*int8"),
        ({"chat.template": "maybe"}, "chat: chat.template='maybe'; choose auto"),
        ({"verify.model": "nowhere"}, "verify.model='nowhere' is not a model"),
        ({"task_options.data": "x"}, "task: .*does not read task_options .'data'."),
        ({"sft.data": "none.jsonl", "pipeline.sft": True}, "sft.data='none.jsonl' is not a file"),
        ({"decode.max_new_tokens": 0}, "decode.max_new_tokens=0; it must be at least 1"),
        ({"verify.methods": ("single", "x")}, "verify.methods='x'.*step_consistency"),
        ({"verify.methods": ()}, "verify.methods is empty"),
        ({"verify.top_p": 2.0}, "verify: top_p=2.0"),
        ({"generate.temperature": 0.0}, "generate: temperature=0.0"),
        ({"generate.num_problems": 0}, "generate.num_problems=0"),
        ({"prm.kind": "cot"}, "prm.kind='cot'.*orm.*prm_cot"),
        ({"prm.method": "vote"}, "prm.method='vote'.*single.*step_consistency"),
        ({"prm.method": "meta_critique"}, "'meta_critique' is not among verify.methods"),
        ({"prm.accumulation_steps": 5}, "prm.batch_size=64 does not divide into 5"),
        ({"prm.optimizer.name": "adamax2"}, "prm.optimizer: .*adamax2.*adamw"),
        ({"evaluate.what": "all"}, "evaluate.what='all'.*policy.*reward_model"),
        ({"evaluate.temperature": -1.0}, "evaluate: temperature=-1.0"),
        ({"pipeline.seeds": ()}, "pipeline.seeds is empty"),
        ({"pipeline.workers": 0}, "pipeline.workers=0"),
        ({"rl.minibatches": 3}, "rl.prompts_per_step=32 does not divide into 3 equal parts"),
        ({"rl.accumulation_steps": 7}, r"group_size\)=256 does not divide into 7"),
        ({"rl.group_size": 1}, "rl.group_size=1; it must be at least 2"),
        ({"rl.keep_every": 0}, "rl.keep_every=0; it must be at least 1"),
        ({"prm.save_every": 0}, "prm.save_every=0; it must be at least 1"),
        ({"generate.shard": (0, 2)}, r"generate.shard=\(0, 2\): a pipeline makes all of stage I"),
        ({"run_dir": "gs://bucket/runs"}, "run_dir='gs://bucket/runs' is not a folder; mount"),
        ({"mesh.tensor": 2}, "^mesh .*spans 2 devices, but there are 1; choose sizes"),
        ({"rl.evaluate_every": 0}, "rl.evaluate_every=0"),
        ({"rl.temperature": 0.7}, "rl.temperature=0.7; it must be 1"),
        ({"rl.filter_low": 0.9, "rl.filter_high": 0.1}, "rl.filter_low=0.9 is above"),
        ({"rl.format_checks": ("boxed",)}, "'boxed'.*one_boxed"),
        ({"rl.objective.aggregation": "mean"}, "rl.objective: .*'mean'.*token_mean"),
        ({"rl.objective.clip_low": -3.0}, "rl.objective: .*clip_low=-3.0"),
        ({"rl.optimizer.schedule": "step"}, "rl.optimizer: .*'step'.*cosine"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    config = configuration.load_config("configs/demo.py")
    with pytest.raises(ConfigError, match=message):
        check_all(configuration.changed(config, changes))


def test_the_demo_itself_is_not_refused():
    check_all(configuration.load_config("configs/demo.py"))


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"reward": "orme"}, "rl.reward='orme'.*majority_vote.*orm.*random"),
        ({"reward": "random", "advantage": "ppo"}, r"'ppo'.*'rloo', 'selective', 'spro'"),
        ({"reward": "orm"}, r"rl.reward='orm' needs a reward model of kind \('orm',\)"),
        (
            {"reward": "rule_based", "advantage": "selective"},
            r"'selective' needs step verdicts.*'process_aware_outcome', 'step_average'",
        ),
        (
            {"reward": "random", "advantage_options.discount": 0.5},
            r"rl.advantage_options=\{'discount': 0.5\} do not fit 'grpo'",
        ),
        (
            {"reward": "random", "advantage": "spro", "advantage_options.baseline": "prompt"},
            "baseline.*prompt",
        ),
    ],
)
def test_impossible_arms_are_refused(arm, message):
    changes = {f"rl.{field}": value for field, value in arm.items()}
    with pytest.raises(ConfigError, match=message):
        checks.check_rl(
            configuration.changed(configuration.load_config("configs/demo.py"), changes)
        )


def test_a_reward_that_judges_needs_a_reward_model_before_anything_is_loaded():
    """A pipeline makes one; a reward that asks none needs none."""
    config = configuration.load_config("configs/demo.py")
    pipeline.check(config)
    with pytest.raises(ConfigError, match=r"'process_aware_outcome' needs rl.reward_model"):
        checks.check_rl(config)
    checks.check_rl(configuration.changed(config, {"rl.reward": "rule_based"}))


def over(monkeypatch, devices):
    """A machine with so many devices, which need not be here."""
    one = jax.devices()[0]
    monkeypatch.setattr(jax, "devices", lambda: [one] * devices)


@pytest.mark.parametrize(
    ("file", "devices", "changes", "message"),
    [
        ("spark_qwen25_1_5b", 16, {}, r"prm.model='Qwen/.*batch=8 over data\*fsdp=16 .*\[1, 2, 4,"),
        ("spark_qwen25_1_5b", 8, {}, None),
        ("spark_qwen25_1_5b", 16, {"prm.accumulation_steps": 2}, None),
        ("spark_qwen25_1_5b", 16, {"prm.model": "owner/unknown"}, "batch=8 over"),
        ("spark_qwen25_1_5b", 8, {"rl.pack": False, "rl.accumulation_steps": 128}, "batch=4 over"),
        ("spark_qwen25_math_7b", 64, {"mesh.tensor": 8}, "mesh and model='Qwen/.*num_heads=28 ov"),
        ("spark_qwen25_math_7b", 64, {"mesh.tensor": 4}, None),
    ],
)
def test_models_of_the_hub_are_checked_against_the_mesh_before_they_are_fetched(
    monkeypatch, file, devices, changes, message
):
    over(monkeypatch, devices)
    config = configuration.changed(configuration.load_config(f"configs/{file}.py"), changes)
    if message is None:
        pipeline.check(config)
    else:
        with pytest.raises(ConfigError, match=message):
            pipeline.check(config)


def check_all(config):
    checks.check_common(config)
    pipeline.check(config)
    checks.check_rl(configuration.changed(config, {"rl.reward_model": "arithmetic_chains"}))


def documented_commands():
    """Every command of the docstrings and the README that starts an experiment."""
    pages = (Path("README.md"), Path("docs/pods.md"))
    files = [*Path("experiments").glob("*.py"), *Path("configs").glob("*.py"), *pages]
    pattern = re.compile(r"python -m spark_jax\.experiments\.(\w+)((?:[^\n`]*\\\n)*[^\n`]*)")
    for file in files:
        for name, rest in pattern.findall(file.read_text()):
            if "--config=" in rest and "<name>" not in rest:
                yield name, tuple(shlex.split(rest.replace("\\\n", " ")))


@pytest.mark.parametrize(("name", "arguments"), sorted(set(documented_commands())), ids=str)
def test_documented_commands_pass_their_checks(name, arguments, tmp_path, monkeypatch):
    """Up to the models and folders that earlier commands leave."""
    checked = launch.check_arguments(["x", *arguments])
    fields = [a.removeprefix("--config.").split("=", 1) for a in checked if "--config." in a]
    changes = {}
    for field, text in fields:
        try:
            changes[field] = ast.literal_eval(text.capitalize() if text == "true" else text)
        except (ValueError, SyntaxError):
            changes[field] = text
    file = next(a.removeprefix("--config=") for a in checked if a.startswith("--config="))
    changes |= {"model": "arithmetic_chains", "evaluate.generator": "arithmetic_chains"}
    config = configuration.changed(configuration.load_config(file), changes)
    by_name = {
        "sft": checks.check_sft,
        "generate_verifications": checks.check_stage1,
        "train_prm": checks.check_prm,
        "train_rl": checks.check_rl,
        "evaluate": checks.check_evaluate,
        "pipeline": pipeline.check,
        "merge_verifications": merge_verifications.check_config,
        "study": study.check,
        "compile_for_pod": checks.check_common,  # its mesh is one of devices that are not here
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples.jsonl").write_text("")
    checks.check_common(config)
    by_name[name](config)
    if file.endswith("demo.py"):  # runs/demo is the pipeline's own
        assert name == "pipeline" or "run_dir" in changes


def test_command_line_names_unknown_fields_and_files():
    with pytest.raises(ValueError, match=r"'rl.advantge' is unknown.*Did you mean .advantage."):
        launch.check_arguments(["x", "--config=configs/demo.py", "--config.rl.advantge=spro"])
    with pytest.raises(FileNotFoundError, match=r"'configs/none.py'.*demo.py"):
        launch.check_arguments(["x", "--config=configs/none.py"])
    assert launch.check_arguments(["x", "--config", "configs/demo.py"])[1].startswith("--config=")
    with pytest.raises(ValueError, match="--config=FILE is missing"):
        launch.check_arguments(["x"])


def test_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configuration.load_config("configs/demo.py").task == "arithmetic_chains"


def test_a_typed_error_ends_the_program_without_a_traceback(tmp_path):
    command = [
        *(sys.executable, "-m", "spark_jax.experiments.train_rl", "--config=configs/demo.py"),
        *(f"--config.run_dir={tmp_path}", "--config.rl.reward=gold"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "error: rl.reward='gold' is unknown; choose one of" in done.stderr
    assert "Traceback" not in done.stderr


def test_changed_copies_and_refuses_unknown_fields():
    config = configuration.load_config("configs/demo.py")
    other = configuration.changed(config, {"rl.steps": 3})
    assert (other.rl.steps, config.rl.steps) == (3, 20)
    with pytest.raises((KeyError, AttributeError)):
        configuration.changed(config, {"rl.stepz": 3})
