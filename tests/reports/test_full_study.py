"""What a full study makes of the folders of its RL runs, written by hand here."""

import json

import pytest

from spark_jax.reports import full_study, plots

SEEDS = (0, 1, 2)
CLOSE = "intervals may end outside the picture"


@pytest.fixture
def study_folder(tmp_path):
    """Makes `rl/<part>/<arm>/seed<i>` folders from metrics by step; returns what is collected."""
    arms, baselines = {}, {}

    def add(part, arm, *runs, baseline=None, alarms=(), right=(1.0, 0.0)):
        arms.setdefault(part, {})[arm] = SEEDS[: len(runs)]
        baselines.setdefault(part, {})
        if baseline:
            baselines[part][arm] = baseline
        for seed, rows in enumerate(runs):
            folder = tmp_path / "rl" / part / arm / f"seed{seed}"
            folder.mkdir(parents=True)
            lines = [json.dumps({"step": step, **row}) for step, row in rows.items()]
            (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
            scores = {"problem_ids": ["a", "b"], "correct_per_problem": right}
            given = [{"pattern": name, "first_step": step} for name, step in alarms]
            (folder / "summary.json").write_text(
                json.dumps({"evaluation": scores, "alarms": given})
            )

    def collect(pictures=None):
        outline = full_study.Outline(
            seeds=SEEDS,
            fewer=SEEDS[:2],
            num_samples=4,
            verifier_updates=(),
            weak_updates=0,
            problem_counts=(),
            kinds=(),
            methods=(),
            arms=arms,
            baselines=baselines,
            pictures=pictures or {},
        )
        return full_study.collect(tmp_path, outline)

    add.collect, add.path = collect, tmp_path
    return add


def held_out(*accuracies):
    """An evaluation every five steps, from step 0."""
    return {5 * i: {"eval/accuracy": accuracy} for i, accuracy in enumerate(accuracies)}


def table(found, title):
    (chosen,) = [t for t in full_study.tables(found) if title in t.title]
    return chosen


@pytest.mark.parametrize(
    ("accuracies", "fell"),
    [
        ((0.5, 0.6, 0.7), None),
        ((0.5, 0.6, 0.551, 0.6), None),
        ((0.5, 0.6, 0.55), (5, 10)),
        ((0.5, 0.44, 0.9, 0.1), (0, 5)),  # the first fall counts
        ((0.5, 0.48, 0.46, 0.44), (10, 15)),  # below the maximum, not below the one before
        ((0.5, None, 0.4), (0, 10)),
    ],
)
def test_accuracy_has_fallen_where_it_is_well_below_its_maximum_so_far(
    study_folder, accuracies, fell
):
    study_folder("spro", "grpo", held_out(*accuracies))
    (watched,) = study_folder.collect()["rl"]["spro"]["grpo"]["watched"]
    assert watched["fell"] == (fell and {"after": fell[0], "seen": fell[1]})


def test_the_lead_of_the_monitor_is_told_run_by_run(study_folder):
    falls, stays = held_out(0.5, 0.8, 0.7), held_out(0.5, 0.8, 0.8)
    study_folder("formats", "before", falls, alarms=[("verdict_gaming", 7), ("step_reduction", 4)])
    study_folder("formats", "meanwhile", falls, alarms=[("step_inflation", 8)])
    study_folder("formats", "later", falls, alarms=[("step_inflation", 11)])
    study_folder("formats", "never", falls)
    study_folder("formats", "no_fall", stays, alarms=[("step_inflation", 3)])
    study_folder("formats", "quiet", stays)
    made = table(study_folder.collect(), "monitor")
    cells = {row[0]: row[1:] for row in made.rows}
    assert "quiet" not in cells
    assert cells["before"][:5] == ("1", "5 to 10", "4", "6", "before")
    assert "verdict gaming 7" in cells["before"][5]
    assert cells["meanwhile"][1:5] == ("5 to 10", "8", "2", "meanwhile")
    assert cells["later"][1:5] == ("5 to 10", "11", "-1", "after")
    assert cells["never"][1:5] == ("5 to 10", "–", "–", "never")
    assert cells["no_fall"][1:5] == ("–", "3", "–", "no fall")
    counts = "4 of 6 runs fell; there was an alarm before in 1, between the two evaluations in 1"
    assert counts in made.notes[1]
    assert "later in 1, never in 1. Of the 2 that did not fall, 1 had one" in made.notes[1]


def test_arms_are_compared_with_their_own_baseline_over_the_seeds_of_both(study_folder):
    flat = held_out(0.5, 0.5)
    study_folder("rewards", "judged", *[flat] * 2, right=[1.0, 0.5])
    study_folder("spro", "grpo", *[flat] * 3, right=[0.0, 0.0])
    study_folder("spro", "far", flat, flat, baseline="grpo", right=[0.5, 0.0])
    study_folder("spro", "remedy", *[flat] * 3, baseline="far", right=[1.0, 0.5])
    study_folder("spro", "other", flat, baseline="rewards/judged", right=[1.0, 0.0])
    arms = study_folder.collect()["rl"]["spro"]
    assert next(iter(arms)) == "grpo"
    assert "difference" not in arms["grpo"]
    assert arms["far"]["difference"]["per_seed"] == [0.25, 0.25]
    assert arms["remedy"]["difference"]["per_seed"] == [0.5, 0.5]
    assert arms["other"]["difference"]["per_seed"] == [-0.25]
    cells = {row[0]: row for row in table(study_folder.collect(), "spro: accuracy").rows}
    assert cells["other"][5] == "rewards/judged"


def test_a_baseline_that_has_not_run_leaves_the_difference_out(study_folder):
    study_folder("spro", "grpo", held_out(0.5, 0.5))
    study_folder("spro", "far", held_out(0.5, 0.5), baseline="grpo")
    (study_folder.path / "rl/spro/grpo/seed0/summary.json").unlink()
    arms = study_folder.collect()["rl"]["spro"]
    assert "difference" not in arms["far"]
    assert full_study.as_markdown(study_folder.collect())


def test_process_rewards_are_told_by_step_against_truth_and_verdicts(study_folder):
    def run(*truths, verdicts):
        rows = {i + 1: {"spro/process_reward_auc_truth": x} for i, x in enumerate(truths)}
        for step in rows if verdicts else ():
            rows[step]["spro/process_reward_auc_verdicts"] = 0.25
        return held_out(0.5) | rows

    study_folder("spro", "spro", run(0.1, 0.5, 0.5, 0.9, verdicts=False))
    study_folder("spro", "judged", run(0.5, 0.5, 0.5, 0.5, verdicts=True))
    study_folder("spro", "grpo", held_out(0.5, 0.5))
    found = study_folder.collect()
    cells = {row[0]: row[1:] for row in table(found, "process rewards").rows}
    assert cells == {
        "spro": ("0.500", "0.100", "0.900", "–", "–", "–"),
        "judged": ("0.500", "0.500", "0.500", "0.250", "0.250", "0.250"),
    }


def test_clips_that_act_are_seen(study_folder):
    clip = {"policy/clip_fraction_low": 0.1, "policy/clip_fraction_high": 0.2}
    study_folder("spro", "grpo_4", held_out(0.5) | {1: clip, 2: {name: 0.0 for name in clip}})
    found = study_folder.collect()
    assert found["rl"]["spro"]["grpo_4"]["clipped"]["estimate"] == pytest.approx(0.15)
    assert table(found, "what the policies do").rows[0][-1] == "0.15"


def test_pictures_show_the_arms_that_are_asked_for_and_how_many_seeds_they_have(
    study_folder, monkeypatch
):
    study_folder("spro", "grpo", *[held_out(0.5, 0.6)] * 3)
    study_folder("spro", "far", *[held_out(0.5, 0.1)] * 2, baseline="grpo")
    study_folder("spro", "near", *[held_out(0.5, 0.1)] * 2, baseline="grpo")
    pictures = {"spro": {"sweep": ["grpo", "far", "not_run_yet"], "none": ["not_run_yet"]}}
    legends = {}

    def save(panels, columns, path, *, size=None, legend=None):
        legends[path.name] = legend
        return path

    monkeypatch.setattr(plots, "_save", save)
    plots.draw_study(study_folder.collect(pictures), study_folder.path)
    assert legends == {
        "spro.png": ("3 seeds", ["grpo"]),
        "spro_sweep.png": (f"2 to 3 seeds; {CLOSE}", ["grpo", "far"]),
    }
