"""Experiments on a mesh: a whole run is one of a process that has eight devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import small_model

from spark_jax.experiments import checks
from spark_jax.experiments.configuration import ConfigError

HERE = Path(__file__).parent


@pytest.mark.slow
def test_on_eight_devices():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", HERE / "on_eight_devices.py"],
        cwd=HERE.parents[1],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__data": 3}, r"mesh .*spans 3 devices, but there are 8; choose sizes"),
        ({"mesh__data": -1, "mesh__fsdp": -1}, r"mesh .*only one of"),
        ({"mesh__data": 8, "rl__group_size": 3}, r"batch=12 over data\*fsdp=8"),
        ({"mesh__data": 2, "mesh__tensor": 4, "model": "arithmetic_chains"}, "vocab_size=59 over"),
        ({"mesh__tensor": 8}, r"num_heads=4 over tensor=8 \(choose tensor in \[1, 2, 4\]\)"),
        (
            {"mesh__data": 4, "mesh__tensor": 2, "rl__reward_model": "arithmetic_chains"},
            r"mesh and rl.reward_model='arithmetic_chains': .*vocab_size=59 over tensor=2",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_numbers(
    monkeypatch, tmp_path, changes, message
):
    small_model.save(tmp_path)
    devices = jax.devices() * 8  # which need not be here
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(ConfigError, match=message):
        checks.check_rl(small_model.config(**{"model": tmp_path} | changes))
