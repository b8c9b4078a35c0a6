"""SIGTERM, sent to real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import several

from spark_jax.training import preemption

HERE = Path(__file__).parent
CASES = {
    "no_run": (143, {}),
    "ends_its_step": (0, {"saved": "the step"}),
    "step_takes_long": (0, {"saved": "what the step began with"}),
    "update_takes_long": (0, {"saved": "the step"}),
    "cannot_save": (1, {}),
    "two_runs": (0, {"one": "saved", "other": "saved"}),
    "before_the_first_step": (0, {}),
    "in_the_last_step": (0, {"saved": "the step"}),
    "busy": (0, {"saved": "what the step began with"}),
}


def test_what_a_process_does_that_is_told_to_end(tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / "told_to_end.py", tmp_path, *CASES],
        env=os.environ | {preemption.GRACE_VARIABLE: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    wanted = [f"{case} {status}" for case, (status, _) in CASES.items()]
    assert done.stdout.splitlines() == wanted, done.stderr
    for case, (_, files) in CASES.items():
        left = {p.name: p.read_text() for p in (tmp_path / case).iterdir() if p.name != "ready"}
        assert left == files, case
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize(
    ("case", "step"),
    [
        ("first_is_in_its_update", 2),
        pytest.param("both_hold", 1, marks=pytest.mark.slow),
        pytest.param("in_the_last_step", 2, marks=pytest.mark.slow),
    ],
)
def test_all_of_several_processes_save_where_one_is_told_to_end(tmp_path, case, step):
    said = several.run_script(
        HERE / "told_to_end_together.py",
        case,
        tmp_path,
        environment={preemption.GRACE_VARIABLE: "2"},
        seconds=200,
    )
    assert not any("went on" in text for text in said)
    assert [path.name for path in tmp_path.iterdir()] == [str(step)]


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan"])
def test_a_grace_period_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv(preemption.GRACE_VARIABLE, text)
    with pytest.raises(ValueError, match=f"SPARK_JAX_GRACE_SECONDS='{text}'; give seconds"):
        preemption.grace_seconds()
    monkeypatch.delenv(preemption.GRACE_VARIABLE)
    assert preemption.grace_seconds() == preemption.GRACE
