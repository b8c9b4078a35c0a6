"""Configurations that cannot work are refused at once, with the choices."""

import subprocess
import sys

import pytest

from spark_jax.experiments import launch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "chess"}, "task='chess'.*arithmetic_chains"),
        ({"rl.reward": "orme"}, "rl.reward='orme'.*majority_vote.*orm.*random"),
        ({"rl.advantage": "ppo"}, r"rl.advantage='ppo'.*'rloo', 'selective', 'spro'"),
        ({"prm.kind": "cot"}, "prm.kind='cot'.*orm.*prm_cot"),
        ({"prm.method": "vote"}, "prm.method='vote'.*single.*step_consistency"),
        ({"prm.method": "meta_critique"}, "'meta_critique' is not among verify.methods"),
        ({"verify.methods": ("single", "x")}, "verify.methods='x'"),
        ({"rl.format_checks": ("boxed",)}, "'boxed'.*one_boxed"),
        ({"rl.reward": "orm"}, r"rl.reward='orm' needs a reward model of kind \('orm',\)"),
        (
            {"rl.reward": "rule_based", "rl.advantage": "selective"},
            r"'selective' needs step verdicts.*'process_aware_outcome', 'step_average'",
        ),
        ({"rl.minibatches": 3}, "rl.prompts_per_step=32 does not divide into 3 equal parts"),
        ({"rl.accumulation_steps": 7}, r"group_size\)=256 does not divide into 7"),
        ({"prm.accumulation_steps": 5}, "prm.batch_size=64 does not divide into 5"),
        ({"rl.group_size": 0}, "rl.group_size=0"),
        (
            {"rl.advantage_options.discount": 0.5},
            r"rl.advantage_options=\{'discount': 0.5\} do not fit 'grpo'",
        ),
        (
            {"rl.advantage": "spro", "rl.advantage_options.baseline": "prompt"},
            "baseline.*prompt",
        ),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    config = launch.load_config("configs/demo.py")
    launch.validate(config)
    with pytest.raises(ValueError, match=message):
        launch.validate(launch.changed(config, changes))


def test_command_line_names_unknown_fields_and_files():
    with pytest.raises(ValueError, match=r"'rl.advantge' is unknown.*'rl.advantage'"):
        launch.check_arguments(["x", "--config=configs/demo.py", "--config.rl.advantge=spro"])
    with pytest.raises(FileNotFoundError, match=r"'configs/none.py'.*demo.py"):
        launch.check_arguments(["x", "--config=configs/none.py"])
    with pytest.raises(ValueError, match="--config=FILE is missing"):
        launch.check_arguments(["x"])


def test_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch.load_config("configs/demo.py").task == "arithmetic_chains"


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
    config = launch.load_config("configs/demo.py")
    other = launch.changed(config, {"rl.steps": 3})
    assert (other.rl.steps, config.rl.steps) == (3, 20)
    with pytest.raises((KeyError, AttributeError)):
        launch.changed(config, {"rl.stepz": 3})
