"""The benchmark command runs and leaves both files; what it measures is not judged here."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--small", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def check(folder, printed, names, repeats):
    record = json.loads((folder / "benchmarks.json").read_text())
    tables = (folder / "benchmarks.md").read_text()
    assert tables == printed
    assert {"processor", "threads", "jax"} <= set(record["machine"])
    assert list(record["results"]) == names
    for name, timings in record["results"].items():
        assert f"### {name}\n" in tables
        for timing in timings:
            assert f"| {timing['variant']} | " in tables
            assert all(len(timing[x]) == repeats for x in ("cpu_seconds", "wall_seconds", "speed"))
            assert min(timing["cpu_seconds"]) > 0
            assert timing["tokens"] > 0
            assert timing["recompilations"] == 0, timing["variant"]
        first = timings[0]
        assert first["speed"] == [1.0] * repeats
        assert first["compilations"] > 0
        rate = first["tokens"] / statistics.median(first["cpu_seconds"])
        assert f"| {first['variant']} | {rate:.0f} |" in tables
    return record["results"]


def test_small_run_writes_both_files(tmp_path):
    done = bench("--only=sampling_settings,scoring", "--repeats=2", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    results = check(tmp_path, done.stdout, ["sampling_settings", "scoring"], 2)
    # Sampling settings are traced: what the first variant compiled serves the others.
    assert [t["compilations"] for t in results["sampling_settings"][1:]] == [0, 0, 0, 0]
    assert all(t["temporaries"] > 0 for t in results["scoring"])


def test_unknown_benchmark_is_refused(tmp_path):
    done = bench("--only=decoding", f"--out={tmp_path}")
    assert done.returncode != 0
    assert "'decoding' is unknown; choose from ['sampling_settings'" in done.stderr


@pytest.mark.slow
def test_every_benchmark_runs(tmp_path):
    done = bench("--repeats=1", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    names = list(json.loads((tmp_path / "benchmarks.json").read_text())["results"])
    assert len(names) >= 7
    check(tmp_path, done.stdout, names, 1)
