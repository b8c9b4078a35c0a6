import io

import pytest
from rich.console import Console

from spark_jax.reports import tables
from spark_jax.reports.study import over_seeds

SEVEN = (
    "single",
    "outcome_consistency",
    "step_consistency",
    "meta_critique",
    "outcome_consistency+meta_critique",
    "step_consistency+meta_critique",
    "reference_guided",
)


def shown(results, **console):
    file = io.StringIO()
    tables.show(results, Console(file=file, **console))
    return file.getvalue()


def squeezed(text):
    return " ".join(text.split())


@pytest.mark.parametrize("console", [{}, {"width": 60}, {"width": 100, "force_terminal": True}])
def test_nothing_is_cut_at_100_columns_nor_in_a_pipe(pipeline, console, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # what a pipe is taken for
    monkeypatch.setenv("NO_COLOR", "1")
    results = pipeline(SEVEN)
    text = shown(results, **console)
    assert "…" not in text
    if "force_terminal" not in console:
        assert max(len(line) for line in text.splitlines()) <= 100
    for name in (*SEVEN, *results["stage3"]):
        assert any(line.startswith(f"{name} ") for line in text.splitlines())
    longest = "step_consistency - outcome_consistency+meta_critique"
    assert any(longest in line and "shows" in line for line in text.splitlines())


def test_claims_stand_by_stage(pipeline):
    text = shown(pipeline())
    places = [text.index(s) for s in ("stage I: step accuracy, N=16", "stage II: F1", "stage III:")]
    assert places == sorted(places)
    assert places[0] < text.index("step_consistency - single") < places[1]


def test_missing_values_show_as_missing(pipeline):
    def stage1(seed, summary):
        for report in (summary["methods"], *summary["by_sample_count"].values()):
            for scores in report.values():
                scores |= {"step_accuracy": None, "detection_rate": None}
        return summary

    def rl(seed, arm, step, row):
        return row | ({"policy/entropy": float("nan")} if arm == "random" else {})

    lines = shown(pipeline(stage1=stage1, rl=rl)).splitlines()
    assert next(line for line in lines if line.startswith("single")).split()[2] == "–"
    assert next(line for line in lines if line.startswith("random ")).split()[-1] == "–"
    claim = next(line for line in lines if "step_consistency - single" in line)
    assert claim.split()[-2:] == ["–", "–"]


def test_orms_are_shown_by_overall_accuracy_alone(pipeline):
    lines = shown(pipeline(orm=True)).splitlines()
    header = next(line for line in lines if line.startswith("targets from"))
    assert header.split() == ["targets", "from", "overall", "acc"]


def test_captions_say_what_is_not_to_be_read_into_the_figures(pipeline):
    text = squeezed(shown(pipeline()))
    assert text.count("a property of this world, tuned so that voting matters") == 2
    assert "with 3 seeds the interval holds 0, which is not to say that there is no effect" in text
    elsewhere = squeezed(shown(pipeline() | {"task": "gsm8k"}))
    assert "tuned" not in elsewhere
    assert "One seed gives no interval" in squeezed(shown(pipeline(seeds=(0,))))


def test_names_with_brackets_are_names_not_markup(pipeline):
    assert "\nrule [red]" in shown(pipeline(arms={"rule [red]": "rule_based"}))


def test_a_pipeline_without_arms_is_shown(pipeline):
    assert "Stage III" in shown(pipeline(arms={}))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.5, 0.5, 0.5], "0.500 [0.50, 0.50]"),
        ([0.5, None, 0.5], "0.500 [0.50, 0.50] n=2"),
        ([0.25], "0.250"),
        ([None, None], "–"),
    ],
)
def test_interval_notation(values, text):
    assert tables.interval(over_seeds(values)) == text


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([0.1, 0.11, 0.12], "shows"),
        ([-0.1, -0.11, -0.12], "reversed"),
        ([0.1, -0.11, 0.12], "does not show"),
        ([0.1], "one seed"),
        ([None, None], "–"),
    ],
)
def test_verdict(values, word):
    assert tables.verdict(over_seeds(values)) == word
