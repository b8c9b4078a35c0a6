"""What several processes say to one another, and what they find out about themselves."""

from pathlib import Path

import pytest
import several

from spark_jax.parallel import processes
from spark_jax.parallel.processes import (
    COORDINATOR,
    NUM_PROCESSES,
    PROCESS_ID,
    arguments,
    tpu_flags,
)

HERE = Path(__file__).parent
THREE = {COORDINATOR: "host:1234", NUM_PROCESSES: "4", PROCESS_ID: "3"}
CPU = {"JAX_PLATFORMS": "cpu"}


def test_explicit_addresses_come_first():
    wanted = {"coordinator_address": "host:1234", "num_processes": 4, "process_id": 3}
    assert arguments(THREE) == wanted
    assert arguments({**THREE, "SLURM_STEP_NUM_TASKS": "8"}) == wanted


def test_slurm_is_asked_within_a_step_of_several_tasks_only():
    assert arguments({**CPU, "SLURM_STEP_NUM_TASKS": "8"}) == {}
    assert arguments({**CPU, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert arguments({**CPU, "SLURM_NTASKS": "8"}) is None  # a batch script, before srun


def test_a_tpu_is_asked_unless_the_process_is_to_go_alone(monkeypatch):
    assert arguments(CPU) is None
    monkeypatch.setattr(processes, "_has_tpu", lambda: True)
    assert arguments({}) == arguments({"JAX_PLATFORMS": "tpu,cpu"}) == {}
    assert arguments(CPU) is None
    assert arguments({NUM_PROCESSES: "1"}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({COORDINATOR: ""}, "SPARK_JAX_COORDINATOR not set; several processes need all three"),
        ({PROCESS_ID: "4"}, "SPARK_JAX_PROCESS_ID=4 is not among the 4 processes 0 to 3"),
        ({NUM_PROCESSES: "many"}, "SPARK_JAX_NUM_PROCESSES, SPARK_JAX_PROCESS_ID: .*'many'"),
        ({COORDINATOR: "host"}, "SPARK_JAX_COORDINATOR='host'; give host:port"),
    ],
)
def test_incomplete_addresses_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(THREE | changes)


def test_what_the_tpu_compiler_is_told_leaves_what_it_was_told_before():
    assert tpu_flags({}) == "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
    told = {"LIBTPU_INIT_ARGS": "--other=1"}
    assert tpu_flags(told) == f"--other=1 {tpu_flags({})}"
    otherwise = {"LIBTPU_INIT_ARGS": "--xla_jf_spmd_threshold_for_windowed_einsum_mib=0"}
    assert tpu_flags(otherwise) == otherwise["LIBTPU_INIT_ARGS"]
    again = {"LIBTPU_INIT_ARGS": tpu_flags(told)}
    assert tpu_flags(again) == again["LIBTPU_INIT_ARGS"]


def test_one_process_needs_nobody():
    assert processes.exchange(3) == [3]
    assert processes.on_main(lambda: 3) == 3
    assert processes.share([1, 2, 3], lambda rows: [-row for row in rows]) == [-1, -2, -3]
    assert processes.lead(lambda f, g: f(2) + g(3), lambda x: x, lambda x: 10 * x) == 32
    with pytest.raises(ZeroDivisionError):
        processes.on_main(lambda: 1 // 0)


def test_several_processes(tmp_path):
    """`together.py` in two processes: what they exchange, and checkpoints that they share."""
    said = several.run_script(
        HERE / "together.py", tmp_path, environment={"PYTHONPATH": str(HERE.parent)}, seconds=300
    )
    assert all("all is well" in text for text in said)
