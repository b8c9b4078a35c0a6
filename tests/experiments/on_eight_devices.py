"""Run by test_on_a_mesh.py in a process with eight CPU devices."""

import jax
import numpy as np
import pytest
import small_model
from experiment_runs import Stop, metric_rows, stop_at

from spark_jax.experiments import launch, train_rl
from spark_jax.training.checkpointing import Checkpoints

MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small_model.save(path)
    return path


def assert_close(rows, others):
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"non_finite"}:
            if other[name] is not None:
                np.testing.assert_allclose(row[name], other[name], 1e-4, 1e-5, err_msg=name)


def test_rl_on_a_mesh_is_rl_on_one_device_and_may_change_the_mesh_between(model, tmp_path):
    """Metrics and weights of two steps; the one on the mesh is stopped after the first, and goes on
    over another mesh."""
    train_rl.run(small_model.config(model), tmp_path / "one")
    with pytest.raises(Stop):
        train_rl.run(small_model.config(model, **MESH), tmp_path / "eight", stop_at(1))
    other = {"mesh__fsdp": -1, "mesh__tensor": 1}
    with pytest.warns(UserWarning, match="mesh data=2 fsdp=2 tensor=2 -> data=1 fsdp=8 tensor=1"):
        train_rl.run(small_model.config(model, **other), tmp_path / "eight")
    assert_close(metric_rows(tmp_path / "eight"), metric_rows(tmp_path / "one"))
    ours, theirs = (launch.load_model(str(tmp_path / n / "model")).params for n in ("eight", "one"))
    base = launch.load_model(str(model)).params
    moved = 0.0
    for a, b, c in zip(*map(jax.tree.leaves, (ours, theirs, base)), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-4)
        moved = max(moved, float(abs(a - c).max()))
    assert moved > 5e-4


def test_state_and_batch_lie_spread(model, tmp_path, monkeypatch):
    seen = []

    def save(self, step, state, extra=None):
        seen.append((state, extra))

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(Stop):
        train_rl.run(small_model.config(model, **MESH), tmp_path, stop_at(1))
    ((state, extra),) = seen
    down, moment = state.params.layers.down, state.opt_state[1][0].mu.layers.down
    for array in (down, moment):
        assert array.sharding.spec == jax.P(None, "tensor", "fsdp")
        assert array.addressable_shards[0].data.size == array.size // 4
    assert extra["pending_rollout"] == {"seed": 0, "step": 2, "batch": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__data": 3}, r"mesh: .*spans 3 devices, but there are 8; choose sizes"),
        ({"mesh__data": -1, "mesh__fsdp": -1}, r"mesh: .*only one of"),
        ({"mesh__data": 8, "rl__group_size": 3}, r"batch=12 over data\*fsdp=8"),
        ({"mesh__tensor": 8}, r"num_heads=4 over tensor=8 \(choose tensor in \[1, 2, 4\]\)"),
        (
            {"mesh__data": 4, "mesh__tensor": 2, "rl__reward_model": "arithmetic_chains"},
            r"mesh and rl.reward_model='arithmetic_chains': .*vocab_size=59 over tensor=2",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_numbers(model, changes, message):
    with pytest.raises(launch.ConfigError, match=message):
        launch.check_rl(small_model.config(model, **changes))
