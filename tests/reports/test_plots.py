"""What is drawn, read back from matplotlib's own objects at the moment of saving."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from spark_jax.reports import plots
from spark_jax.reports.study import over_seeds
from spark_jax.training.metrics import MetricsWriter

NAMES = ("stage1", "stage2", "stage3", "by_step", "overview")


def lines(axes):
    """label → (x, y) of the lines that have one."""
    found = {line.get_label(): line.get_data() for line in axes.lines}
    return {label: data for label, data in found.items() if not label.startswith("_")}


def metrics_file(path, rows):
    with MetricsWriter(path, tensorboard=False) as metrics:
        for step, row in rows:
            metrics.scalars(step, row)
    return path / "metrics.jsonl"


def test_a_pipeline_is_drawn_in_five_files(pipeline, tmp_path):
    paths = plots.draw(pipeline(), tmp_path)
    assert [path.name for path in paths] == [f"{name}.png" for name in NAMES]
    for path in paths:
        with Image.open(path) as image:
            assert len(image.getcolors(maxcolors=1 << 24)) > 50


def test_critique_methods_alone_are_points_at_all_samples(pipeline, drawn, tmp_path):
    plots.draw(pipeline(("meta_critique",)), tmp_path)
    (axes,) = drawn["stage1"].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["16"]
    assert lines(axes)["meta_critique"][1] == pytest.approx([0.81])


def test_critique_methods_stand_beside_votes_at_all_samples(pipeline, drawn, tmp_path):
    plots.draw(pipeline(("single", "step_consistency+meta_critique")), tmp_path)
    (axes,) = drawn["stage1"].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4", "16"]
    x, y = lines(axes)["step_consistency+meta_critique"]
    assert np.round(x) == pytest.approx([2])
    assert y == pytest.approx([0.81])


def test_a_pipeline_without_arms_is_drawn(pipeline, drawn, tmp_path):
    assert len(plots.draw(pipeline(arms={}), tmp_path)) == 5
    assert [text.get_text() for text in drawn["stage3"].axes[0].texts] == ["no runs"]
    drawn["overview"].canvas.draw()


def test_missing_values_are_left_out(pipeline, drawn, tmp_path):
    def stage1(seed, summary):
        for report in (summary["methods"], *summary["by_sample_count"].values()):
            report["single"]["step_accuracy"] = None
        return summary

    def prm(seed, method, summary):
        return summary | {"overall_accuracy": {"estimate": None}} if method == "base" else summary

    def rl(seed, arm, step, row):
        return row | ({"truth/accuracy": float("nan")} if step in (0, 3) else {})

    plots.draw(pipeline(orm=True, stage1=stage1, prm=prm, rl=rl), tmp_path)
    assert list(lines(drawn["stage1"].axes[0])) == ["step_consistency"]
    bars = drawn["stage2"].axes[0]
    assert [text.get_text() for text in bars.texts] == ["–", "0.81", "0.91"]
    y = drawn["by_step"].axes[0].lines[0].get_ydata()
    assert np.isnan(y).tolist() == [True, False, False, True, False]
    drawn["overview"].canvas.draw()


def test_no_two_of_many_arms_look_alike(pipeline, drawn, tmp_path):
    arms = {f"arm{i}": "random" for i in range(12)}
    plots.draw(pipeline(arms=arms), tmp_path)
    axes = drawn["by_step"].axes[0]
    looks = {
        (line.get_color(), line._unscaled_dash_pattern, line.get_marker()) for line in axes.lines
    }
    assert len(axes.lines) == len(looks) == 12
    assert len(drawn["stage3"].axes[0].patches) == 13
    assert [text.get_text() for text in drawn["by_step"].legends[0].texts] == list(arms)


def test_equal_lines_are_both_seen(pipeline, drawn, tmp_path):
    def rl(seed, arm, step, row):
        return {"eval/accuracy": 0.5, "truth/accuracy": 0.5 + step / 10}

    plots.draw(pipeline(arms=dict.fromkeys(["a", "b"], "random"), rl=rl), tmp_path)
    drawn["by_step"].canvas.draw()
    pixels = np.asarray(drawn["by_step"].canvas.buffer_rgba())[:, :, :3]
    panel = pixels[: int(0.8 * len(pixels))]  # without the legend
    for colour in plots.COLOURS[:2]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (panel == rgb).all(axis=2).sum() > 100


def test_steps_are_whole_and_names_end_at_their_bars(pipeline, drawn, tmp_path):
    plots.draw(pipeline(), tmp_path)
    for axes in drawn["by_step"].axes:
        assert all(tick == int(tick) for tick in axes.get_xticks())
    for label in drawn["stage3"].axes[0].get_xticklabels():
        assert (label.get_ha(), label.get_rotation_mode()) == ("right", "anchor")


def test_orms_are_drawn_by_overall_accuracy(pipeline, drawn, tmp_path):
    plots.draw(pipeline(orm=True), tmp_path)
    (axes,) = drawn["stage2"].axes
    assert axes.get_ylabel() == "overall verdicts right"
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.81, 0.81, 0.91])


def test_one_stage1_run(drawn, tmp_path):
    def report(methods, score):
        names = ("step_accuracy", "overall_accuracy", "derived_outcome_accuracy")
        return {method: dict.fromkeys(names, score) for method in methods}

    summary = {
        "methods": report(("single", "meta_critique"), 0.9),
        "by_sample_count": {"2": report(("single",), 0.7)},
    }
    assert plots.stage1_summary(summary, tmp_path) == tmp_path / "stage1.png"
    for axes in drawn["stage1"].axes:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "all"]
        assert lines(axes)["single"][1] == pytest.approx([0.7, 0.9])
    plots.stage1_summary(summary, tmp_path, num_samples=8)
    assert [t.get_text() for t in drawn["stage1"].axes[0].get_xticklabels()] == ["2", "8"]

    unknown = {"methods": report(("single",), None), "by_sample_count": {}}
    plots.stage1_summary(unknown, tmp_path)
    assert [t.get_text() for t in drawn["stage1"].axes[0].texts] == ["no ground truth"]


def test_training_curves_have_a_panel_for_what_is_there(drawn, tmp_path):
    rows = [
        (0, {"eval/accuracy": 0.5}),
        (1, {"truth/accuracy": 0.4, "policy/loss": 2.0, "hacking/steps_per_response": 4.0}),
        (2, {"truth/accuracy": 0.6, "policy/loss": float("nan"), "hacking/too_few_steps": 0.1}),
        (3, {"policy/loss": 1.0, "format/failed": 0.2, "decode/slot_occupancy": 0.5}),
    ]
    paths = plots.training_curves(metrics_file(tmp_path, rows), tmp_path)
    assert paths == [tmp_path / "training_curves.png"]
    accuracy, loss, steps, shares = drawn["training_curves"].axes
    assert loss.get_title() == "policy/loss (1 not finite)"
    assert [list(values) for values in lines(loss)["policy/loss"]] == [[1, 3], [2.0, 1.0]]
    assert set(lines(accuracy)) == {"eval/accuracy", "truth/accuracy"}
    assert set(lines(shares)) == {"hacking/too_few_steps", "format/failed"}
    assert set(lines(steps)) == {"hacking/steps_per_response"}


def test_training_curves_of_a_reward_model(drawn, tmp_path):
    rows = [(i, {"train/loss": 1 / i, "train/grad_norm": 0.1}) for i in range(1, 50)]
    plots.training_curves(metrics_file(tmp_path, rows), tmp_path)
    titles = [axes.get_title() for axes in drawn["training_curves"].axes]
    assert titles == ["train/loss", "train/grad_norm"]


def test_a_run_with_nothing_to_draw_leaves_no_file(tmp_path):
    path = metrics_file(tmp_path, [(1, {"decode/slot_occupancy": 0.5})])
    assert plots.training_curves(path, tmp_path) == []
    assert not list(tmp_path.glob("*.png"))


def test_drawing_in_threads_is_the_same_as_one_by_one(tmp_path):
    rows = [(i, {"train/loss": 1 / i, "policy/logprob_gap_max": 1e-6 * i}) for i in range(1, 9)]
    path = metrics_file(tmp_path, rows)
    folders = [tmp_path / str(i) for i in range(5)]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda folder: plots.training_curves(path, folder), folders))
    assert len({paths[0].read_bytes() for paths in made}) == 1


def test_matplotlib_is_imported_only_to_draw_and_pyplot_never(tmp_path):
    code = (
        "import sys; from pathlib import Path; from spark_jax.reports import plots, tables; "
        "assert 'matplotlib' not in sys.modules; "
        "plots.stage1_summary({'methods': {}, 'by_sample_count': {}}, Path(sys.argv[1])); "
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_bars_hold_every_seed(drawn, pipeline, tmp_path):
    plots.draw(pipeline(), tmp_path)
    dots = [line.get_ydata() for line in drawn["stage2"].axes[0].lines]
    assert [len(y) for y in dots] == [3, 3, 3]
    assert dots[0] == pytest.approx(over_seeds([0.8, 0.81, 0.82])["per_seed"])
