"""Meshes need devices: the tests proper run in one process that has eight."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "which", ["not slow", pytest.param("slow", marks=pytest.mark.slow(minutes=4))]
)
def test_on_eight_devices(which):
    files = [HERE / name for name in ("on_eight_devices.py", "equal_on_eight_devices.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", which, *files],
        cwd=HERE.parents[1],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
