"""Run by test_on_a_mesh.py in a process with eight CPU devices."""

import jax
import numpy as np
import pytest
import small_model
from experiment_runs import metric_rows

from spark_jax.experiments import loading, train_rl
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


def test_rl_on_a_mesh_is_rl_on_one_device(model, tmp_path, monkeypatch):
    """Metrics and weights of every step; and where state and moments lie."""
    train_rl.run(small_model.config(model), tmp_path / "one")
    saved = []
    save = Checkpoints.save

    def noted(self, step, state, extra):
        saved.append((jax.tree.map(lambda x: x.sharding, state), extra))
        save(self, step, state, extra)

    monkeypatch.setattr(Checkpoints, "save", noted)
    train_rl.run(small_model.config(model, **MESH), tmp_path / "eight")
    assert_close(metric_rows(tmp_path / "eight"), metric_rows(tmp_path / "one"))
    ours, theirs = (
        loading.load_model(str(tmp_path / n / "model")).params for n in ("eight", "one")
    )
    base = loading.load_model(str(model)).params
    moved = 0.0
    for a, b, c in zip(*map(jax.tree.leaves, (ours, theirs, base)), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-4)
        moved = max(moved, float(abs(a - c).max()))
    assert moved > 5e-4
    for number, (state, extra) in enumerate(saved, start=1):
        assert state.params.layers.down.spec == jax.P(None, "tensor", "fsdp")
        assert state.opt_state[1][0].mu.layers.down == state.params.layers.down
        assert state.step.spec == jax.P()
        pending = {"seed": 0, "step": number + 1, "batch": number}
        assert extra["pending_rollout"] == pending
