"""The benchmark runs and counts what it says; figures of a tiny model are not judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_small_run_prints_a_line_per_case():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.checkpoint_memory", "--small"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    narrow, wide, on_mesh = map(json.loads, done.stdout.splitlines())
    assert narrow["files"] > 1
    assert wide["parameters_on_host"] == 2 * narrow["parameters_on_host"]
    assert on_mesh["fsdp"] == 4
    for case in (narrow, wide, on_mesh):
        bound = 1.3 * case["largest_file"] + case["parameters_on_host"]
        assert case["bound"] == int(bound)
        assert case["within_bound"] == (case["peak"] <= bound)
