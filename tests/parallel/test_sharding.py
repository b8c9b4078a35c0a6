"""Meshes need devices: the tests proper run in a process that has eight."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("file", "which"),
    [
        ("on_eight_devices.py", "not slow"),
        ("equal_on_eight_devices.py", "not slow"),
        pytest.param("equal_on_eight_devices.py", "slow", marks=pytest.mark.slow(minutes=5)),
    ],
)
def test_on_eight_devices(file, which):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", which, HERE / file],
        cwd=HERE.parents[1],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
