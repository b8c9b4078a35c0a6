"""Runs that are killed, anywhere, and started again end as the uninterrupted run does."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from experiment_runs import metric_rows, weights

HERE = Path(__file__).parent
STEPS = 24


class Starter:
    """Starts runs, by `tiny_rl`."""

    def __init__(self, cache, steps, **environment):
        cached = {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, HERE / "tiny_rl.py", str(steps)],
            cwd=HERE.parents[1],
            env=os.environ | cached | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, path):
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def status(self):
        """What the run that was started ended with, when it has."""
        return self.process.stdout.readline().strip()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture
def starter(tmp_path_factory):
    starters = []

    def make(**environment):
        cache = tmp_path_factory.getbasetemp() / "programs"
        starters.append(Starter(cache, STEPS, **environment))
        return starters[-1]

    yield make
    for one in starters:
        one.close()


def rows(path):
    file = path / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def being_saved(path):
    return any(".orbax-checkpoint-tmp" in p.name for p in (path / "checkpoints").glob("*"))


def wait_until(happened, pid, seconds=300):
    """False where the process ended first."""
    end = time.monotonic() + seconds
    while not happened():
        try:
            os.kill(pid, 0)
            assert Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
        except (ProcessLookupError, FileNotFoundError, AssertionError):
            return False
        assert time.monotonic() < end
        time.sleep(0.001)
    return True


def moment(rng, kind, path, pid):
    """Waits for a moment of that kind to kill the run; what is random about it is noted."""
    if kind == "start":  # imports, restoring, the first programs
        delay = rng.uniform(0, 3)
    elif kind == "step":
        before = rows(path)
        wait_until(lambda: rows(path) > before, pid)
        delay = rng.uniform(0, 0.6)
    else:  # while a checkpoint is written
        wait_until(lambda: not being_saved(path), pid)
        wait_until(lambda: being_saved(path), pid)
        delay = rng.uniform(0, 0.03)
    time.sleep(delay)
    return delay


@pytest.mark.slow(minutes=2)
def test_killed_ten_times_and_once_more_while_the_model_is_exported(starter, tmp_path):
    runs = starter()
    runs.start(tmp_path / "whole")
    assert runs.status() == "0"
    rng = random.Random(2024)
    kinds = ["start"] * 2 + ["step"] * 4 + ["save"] * 4
    rng.shuffle(kinds)
    broken = tmp_path / "broken"
    killed = []
    for kind in kinds:
        pid = runs.start(broken)
        delay = moment(rng, kind, broken, pid)
        os.kill(pid, signal.SIGKILL)
        assert runs.status() == "SIGKILL", (kind, killed)
        killed.append((kind, round(delay, 3), rows(broken), being_saved(broken)))
    assert sum(saving for *_, saving in killed) >= 2, killed
    pid = runs.start(broken)
    assert wait_until((broken / "model").exists, pid), killed
    os.kill(pid, signal.SIGKILL)
    assert runs.status() == "SIGKILL"
    runs.start(broken)
    assert runs.status() == "0", (killed, (tmp_path / "broken.err").read_text())
    assert weights(broken) == weights(tmp_path / "whole"), killed
    assert metric_rows(broken) == metric_rows(tmp_path / "whole"), killed


@pytest.mark.slow
def test_sigterm_saves_the_step_under_way_and_ends_well(starter, tmp_path):
    """Once in a step; once with so little grace that what the step began with is saved."""
    runs, hasty = starter(), starter(SPARK_JAX_GRACE_SECONDS="0.002")
    runs.start(tmp_path / "whole")
    assert runs.status() == "0"
    broken = tmp_path / "broken"
    for who, wanted in ((runs, 3), (hasty, 9), (runs, 15)):
        pid = who.start(broken)
        assert wait_until(lambda wanted=wanted: rows(broken) > wanted, pid)
        os.kill(pid, signal.SIGTERM)
        assert who.status() == "0"
        assert not being_saved(broken)
        steps = [int(p.name) for p in (broken / "checkpoints").iterdir()]
        assert max(steps) >= rows(broken) - 2
    runs.start(broken)
    assert runs.status() == "0"
    assert weights(broken) == weights(tmp_path / "whole")
    assert metric_rows(broken) == metric_rows(tmp_path / "whole")
