"""Several real processes on one machine: the runs are those of one process, and outlive deaths."""

import json
import signal
import time

import numpy as np
import pytest
import several
import small_model
from experiment_runs import metric_rows, weights

from spark_jax.experiments import loading

pytestmark = pytest.mark.slow

RL = {**small_model.CHANGES, "decode.slots": 12}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "base"
    small_model.save(path)
    return {"model": path}


@pytest.fixture(scope="module")
def alone(cache, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "rl"
    several.run("train_rl", 1, path, RL | model, cache)
    return path


# How the slots of several devices are filled is not how those of one are.
OF_A_MESH = {"non_finite", "decode/queue_occupancy"}


def assert_same_rows(rows, others):
    for row, expected in zip(rows, others, strict=True):
        assert row.keys() == expected.keys()
        assert row.get("non_finite") == expected.get("non_finite")
        for name in row.keys() - OF_A_MESH:
            if expected[name] is not None:
                np.testing.assert_allclose(row[name], expected[name], rtol=1e-4, atol=1e-5)


def assert_same_run(path, other):
    assert_same_rows(metric_rows(path), metric_rows(other))
    ours, theirs = (loading.load_model(str(p / "model")).params for p in (path, other))
    np.testing.assert_allclose(ours.embedding, theirs.embedding, atol=3e-4)
    np.testing.assert_allclose(ours.layers.down, theirs.layers.down, atol=3e-4)
    for file in sorted((path / "samples").iterdir()):
        assert file.read_text() == (other / "samples" / file.name).read_text()


@pytest.mark.parametrize(("count", "mesh"), [(2, {"data": 2}), (4, {"fsdp": 2, "tensor": 2})])
def test_rollout_reward_update_equals_one_process(count, mesh, alone, cache, model, tmp_path):
    axes = {f"mesh.{axis}": size for axis, size in mesh.items()}
    path = tmp_path / "rl"
    several.run("train_rl", count, path, RL | model | axes, cache)
    assert_same_run(path, alone)
    assert list(path.glob("events.*")) and len(list(path.glob("events.*"))) == 1  # noqa: PT018
    for index in range(1, count):
        assert "step" not in several.output(path, index)  # process 0 alone has something to say


def test_stages_one_and_two_equal_one_process(cache, model, tmp_path):
    common = model | {
        "generate.num_problems": 4,
        "generate.samples_per_problem": 2,
        "generate.chunk_size": 2,
        "verify.samples_per_solution": 3,
        "verify.report_sample_counts": "(1,3)",
        "verify.chunk_size": 2,
        "prm.steps": 2,
        "prm.batch_size": 4,
        "evaluate.num_solutions": 4,
        "evaluate.generator": model["model"],
    }
    for count in (1, 2):
        stage1, mesh = tmp_path / f"stage1_{count}", {"mesh.fsdp": count}
        several.run("generate_verifications", count, stage1, common | mesh, cache)
        data = {"prm.data": tmp_path / "stage1_1"}
        several.run("train_prm", count, tmp_path / f"prm_{count}", common | data | mesh, cache)
    for name in ("solutions.jsonl", "verified.jsonl", "summary.json"):
        one, two = (tmp_path / f"stage1_{count}" / name for count in (1, 2))
        assert two.read_text() == one.read_text()
    one, two = (
        json.loads((tmp_path / f"prm_{count}" / "summary.json").read_text()) for count in (1, 2)
    )
    assert two["held_out"]["f1"] == one["held_out"]["f1"]
    ours, theirs = (
        loading.load_model(str(tmp_path / f"prm_{count}" / "model")).params for count in (1, 2)
    )
    np.testing.assert_allclose(ours.embedding, theirs.embedding, atol=3e-4)


def test_benchmarks_equal_one_process(cache, model, tmp_path):
    """Process 0 samples and writes, the answers are graded by both."""
    wanted = model | {
        "evaluate.what": "benchmarks",
        "evaluate.benchmarks.names": "('arithmetic_chains',)",
        "evaluate.benchmarks.num_problems": 3,
        "evaluate.samples_per_problem": 4,
    }
    for count in (1, 2):
        path = tmp_path / f"benchmarks_{count}"
        several.run("evaluate", count, path, wanted | {"mesh.data": count}, cache)
    one, two = (tmp_path / f"benchmarks_{count}" for count in (1, 2))
    for name in ("summary.json", "table.md", "responses/arithmetic_chains.jsonl"):
        assert (two / name).read_text() == (one / name).read_text()
    scores = json.loads((one / "summary.json").read_text())["benchmarks"]["arithmetic_chains"]
    assert 0 < scores["accuracy"]["estimate"] < 1


@pytest.fixture(scope="module")
def long(model):
    """Its checkpoints hold a rollout too."""
    changes = {"mesh.data": 2, "rl.steps": 10, "rl.evaluate_every": 5}
    return RL | model | changes | {"rl.one_step_off_policy": True}


@pytest.fixture(scope="module")
def uninterrupted(long, cache, tmp_path_factory):
    path = tmp_path_factory.mktemp("uninterrupted") / "rl"
    several.run("train_rl", 2, path, long, cache)
    return path


def test_where_one_dies_the_others_end_and_a_restart_goes_on(uninterrupted, long, cache, tmp_path):
    """Killed, once each of them; and once stopped, as a machine that hangs."""
    path, rows = tmp_path / "rl", 2
    for victim, how in ((1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)):
        processes = several.start("train_rl", 2, path, long, cache)
        several.wait_for_rows(path, rows, processes)
        processes[victim].send_signal(how)
        began = time.monotonic()
        status = processes[1 - victim].wait(timeout=70)
        assert time.monotonic() - began < 60
        several.end(processes)
        said = several.output(path, 1 - victim)
        assert status != 0
        assert "another task died" in said or "If another one died first" in said, said
        rows += 2
    several.run("train_rl", 2, path, long, cache)
    assert weights(path) == weights(uninterrupted)
    assert metric_rows(path) == metric_rows(uninterrupted)


def test_sigterm_to_one_ends_all_well_and_a_run_goes_on_over_another_mesh(
    uninterrupted, long, cache, tmp_path
):
    path = tmp_path / "rl"
    processes = several.start("train_rl", 2, path, long, cache)
    several.wait_for_rows(path, 4, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=300) for process in processes] == [0, 0], several.output(path, 0)
    assert not (path / "summary.json").exists()
    before = metric_rows(path)
    assert before == metric_rows(uninterrupted)[: len(before)]
    assert (path / "checkpoints" / str(len(before) - 1)).is_dir()
    several.run("train_rl", 1, path, long | {"mesh.data": 1}, cache)
    assert "mesh data=2 fsdp=1 tensor=1 -> None" in several.output(path, 0)
    after = metric_rows(path)
    assert len(after) == len(metric_rows(uninterrupted))
    # What two meshes round differently is a sample's next word, some steps on.
    assert_same_rows(after[: len(before) + 1], metric_rows(uninterrupted)[: len(before) + 1])


def test_a_mesh_that_does_not_fit_the_processes_is_refused_by_all(cache, model, tmp_path):
    """Of the number of their devices; `test_on_a_mesh.py` has other reasons."""
    processes = several.start("train_rl", 2, tmp_path / "rl", RL | model, cache)
    assert [process.wait() for process in processes] == [1, 1]
    assert "spans 1 devices, but there are 2" in several.output(tmp_path / "rl", 0)
