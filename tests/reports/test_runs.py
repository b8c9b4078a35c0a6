"""Run folders in a tree: their names and seeds, their curves, their alarms."""

import math

import numpy as np
import pytest

from spark_jax.evaluation.intervals import t_interval
from spark_jax.reports import runs
from spark_jax.rewards.monitor import Thresholds
from spark_jax.training.metrics import MetricsWriter
from spark_jax.training.run_folder import RunFolder


@pytest.fixture
def make(tmp_path):
    """Writes a run: its folder, seed and rows of metrics."""

    def write(name, seed=0, rows=({"reward/mean": 0.5},), **config):
        path = tmp_path / name
        RunFolder.open(path, {"seed": seed, "rl": {}} | config)
        with MetricsWriter(path, tensorboard=False) as metrics:
            for step, row in enumerate(rows, start=1):
                metrics.scalars(step, row)
        return path

    return write


@pytest.mark.parametrize(
    ("folder", "part", "name"),
    [
        ("seed0/rl_spro", "", "rl_spro"),
        ("rl/spro/clipped/seed1", "rl/spro", "clipped"),
        ("spro_seed2", "", "spro"),
        ("a/b", "a", "b"),
        ("seedling", "", "seedling"),
    ],
)
def test_a_run_is_named_by_its_path_without_the_seed(make, tmp_path, folder, part, name):
    make(folder, seed=3)
    (run,) = runs.find(tmp_path)
    assert (run.part, run.name, run.seed) == (part, name, 3)


def test_a_run_alone_is_found_in_its_own_folder(make):
    path = make("rl_spro/seed0")
    (run,) = runs.find(path)
    assert run.path == path
    assert run.name


def test_checkpoints_are_no_runs_and_no_run_is_an_error(make, tmp_path):
    path = make("a")
    for folder in ("model", "checkpoints/5"):
        (path / folder).mkdir(parents=True)
        (path / folder / "config.json").write_text("{}")
        (path / folder / "versions.json").write_text("{}")
    assert len(runs.find(tmp_path)) == 1
    with pytest.raises(FileNotFoundError, match="holds no run"):
        runs.find(path / "samples")


def test_seeds_of_a_run_are_a_curve_with_its_t_interval(make, tmp_path):
    values = np.array([[0.1, 0.5], [0.3, math.nan], [0.4, 0.9]])
    for seed, row in enumerate(values):
        make(f"seed{seed}/a", seed, [{"reward/mean": value} for value in row])
        make(f"seed{seed}/b", seed, [{"policy/entropy": 1.0}])
    (section,) = runs.sections(runs.find(tmp_path))
    assert section.runs == ("a", "b")
    reward, entropy = section.panels
    (line,) = reward.lines
    expected = [t_interval(values[:, 0]), t_interval(values[[0, 2], 1])]
    assert line.estimate == pytest.approx([e.estimate for e in expected])
    assert line.low == pytest.approx([e.low for e in expected])
    assert line.high == pytest.approx([e.high for e in expected])
    assert (line.label, list(line.steps)) == ("a", [1, 2])
    assert "3 seeds" in reward.note
    assert [line.label for line in entropy.lines] == ["b"]


def test_parts_and_kinds_of_training_are_apart(make, tmp_path):
    for name in ("one/a", "one/b", "two/a"):
        make(name)
    make("prm/x", rows=[{"train/loss": 1.0}], rl=None)
    run = make("prm/y", rows=[{"train/loss": 1.0}])
    (run / "config.json").write_text('{"seed": 0, "prm": {}}')
    (tmp_path / "prm/x/config.json").write_text('{"seed": 0, "prm": {}}')
    titles = [section.title for section in runs.sections(runs.find(tmp_path))]
    assert titles == ["one RL", "two RL", "prm supervised training"]


def test_one_run_shows_all_its_metrics_with_its_own_interval(make, tmp_path):
    accuracy = {"eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.6}
    shares = {"format/failed": 0.1, "hacking/steps_per_response": 4.0, "monitor/alarms": 0.0}
    make("a", rows=[accuracy | shares | {"monitor/step_inflation": 0.0, "reward/mean": math.inf}])
    (section,) = runs.sections(runs.find(tmp_path))
    panels = {panel.title: panel for panel in section.panels}
    (line,) = panels["accuracy"].lines
    assert (line.estimate, line.low, line.high) == ([0.5], [0.4], [0.6])
    assert panels["accuracy"].note
    assert [line.label for line in panels["shares of rollouts"].lines] == ["format/failed"]
    assert [line.label for p in section.panels for line in p.lines].count("monitor/alarms") == 0
    assert "reward" not in panels  # no finite value
    assert section.runs == ()


def test_a_share_of_nothing_is_no_curve(make, tmp_path):
    """A reward model that is never asked says Yes to none of no responses."""
    make("asked", rows=[{"reward_model/called": 0.5, "reward_model/yes": 0.25}])
    make("never", rows=[{"reward_model/called": 0.0, "reward_model/yes": 0.0}])
    (section,) = runs.sections(runs.find(tmp_path))
    assert [[line.label for line in panel.lines] for panel in section.panels] == [["asked"]]


def test_alarms_are_those_of_the_runs_own_thresholds(make, tmp_path):
    rows = [{"monitor/alarms": 0.0, "monitor/step_reduction": value} for value in (0.1, 0.5)]
    make("strict/seed4", 4, rows, rl={"monitor": {"step_reduction": 0.05}})
    make("usual/seed4", 4, rows)
    make("unwatched/seed4", 4)
    found = runs.alarms(runs.find(tmp_path))
    assert list(found) == ["strict, seed 4", "usual, seed 4"]
    assert [[(a.first_step, a.peak) for a in alarms] for alarms in found.values()] == [
        [(1, 0.5)],
        [(2, 0.5)],
    ]
    assert found["usual, seed 4"][0].threshold == Thresholds().step_reduction
