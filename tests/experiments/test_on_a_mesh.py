"""Experiments on a mesh: the tests proper run in a process that has eight devices."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


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
