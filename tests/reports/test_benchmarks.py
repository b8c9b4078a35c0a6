"""What the tables say is what the summaries say."""

import io

import pytest
from rich.console import Console

from spark_jax.reports.benchmarks import markdown, policy_table, processbench_table, show
from spark_jax.reports.tables import MISSING


def interval(value, half=0.05):
    return {"estimate": value, "low": value - half, "high": value + half}


NOTHING = {"estimate": None, "low": None, "high": None}


def policy_scores(accuracy, k):
    return {
        "accuracy": accuracy,
        f"pass@{k}": None if accuracy is NOTHING else accuracy["estimate"] + 0.0625,
        f"maj@{k}": None if accuracy is NOTHING else accuracy["estimate"] - 0.0625,
        "response_length": 812.25,
        "format_kept": 0.9375,
        "finished": 0.875,
        "num_problems": 40,
        "num_with_reference": 0 if accuracy is NOTHING else 40,
        "samples_per_problem": k,
        "too_long": k // 4,
    }


POLICY = {
    "benchmarks": {
        "math500": policy_scores(interval(0.73125), 4),
        "aime24": policy_scores(interval(0.125), 32),
        "rubric": policy_scores(NOTHING, 1),
    },
    "missing": {"aime25": "no file a|b.jsonl", "minerva": "no network"},
    "mean_accuracy": interval(0.428125),
    "answer_from": "last_boxed",
}


def split_scores(votes, soft, orm=False):
    scores = {"num_samples": 400, "erroneous": 207, "correct": 193, "rewritten": 0, "too_long": 0}
    scores |= {"tokens_per_judgement": 311.5, "unparseable": 0.0625}
    scores |= {"overall_accuracy": interval(0.71875)}
    if not orm:
        scores |= {"other_step_count": 0.125}
        scores |= {"error_acc": interval(0.5), "correct_acc": interval(0.875), "f1": interval(0.6)}
    if soft:
        scores |= {"soft_auc": 0.8125, "soft_accuracy": 0.75}
    if votes:
        names = (
            "unparseable",
            "other_step_count",
            "overall_accuracy",
            "error_acc",
            "correct_acc",
            "f1",
        )
        scores |= {f"majority_{n}": scores[n] for n in names if n in scores}
        scores["majority_unparseable"] = 0.03125
    return scores


PROCESSBENCH = {
    "splits": {"gsm8k": split_scores(True, True), "math": split_scores(True, False)},
    "missing": {"omnimath": "no file x"},
    "mean_f1": interval(0.6),
    "majority_mean_f1": interval(0.65),
}


def parsed(text):
    """The rows of the Markdown table as dicts of text, by its columns."""
    rows = [
        [
            cell.strip().replace("\\|", "|")
            for cell in line.strip("|").replace("\\|", "\0").split("|")
        ]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    columns, ruler, *rows = [[cell.replace("\0", "|") for cell in row] for row in rows]
    assert set("".join(ruler)) <= set("-:")
    assert {len(row) for row in rows} == {len(columns)}
    return [dict(zip(columns, row, strict=True)) for row in rows]


def read_number(cell):
    return None if cell == MISSING else float(cell)


def read_interval(cell):
    if cell == MISSING:
        return NOTHING
    estimate, low, high = cell.replace("[", "").replace("]", "").replace(",", "").split()
    return {"estimate": float(estimate), "low": float(low), "high": float(high)}


def close(found, expected):
    if expected is None:
        return found is None
    if isinstance(expected, dict):
        return all(close(found[name], expected[name]) for name in expected)
    return abs(found - expected) <= 0.00051


def test_prompts_without_room_are_said():
    notes = [note for note in policy_table(POLICY).notes if "too long" in note]
    assert [note.partition(" prompts")[0] for note in notes] == ["math500: 1", "aime24: 8"]


def test_the_policys_markdown_read_back_is_the_summary():
    rows = {row["benchmark"]: row for row in parsed(markdown(policy_table(POLICY)))}
    for name, scores in POLICY["benchmarks"].items():
        row, k = rows[name], scores["samples_per_problem"]
        assert (row["k"], row["problems"]) == (str(k), str(scores["num_with_reference"]))
        assert close(read_interval(row["avg@k"]), scores["accuracy"])
        assert close(read_number(row["pass@k"]), scores[f"pass@{k}"])
        assert close(read_number(row["maj@k"]), scores[f"maj@{k}"])
        assert close(read_number(row["format kept"]), scores["format_kept"])
        assert close(read_number(row["finished"]), scores["finished"])
        assert row["tokens"] == "812.2"
    assert close(read_interval(rows["mean"]["avg@k"]), POLICY["mean_accuracy"])


def test_what_is_missing_is_in_the_table_with_its_reason():
    text = markdown(policy_table(POLICY))
    rows = {row["benchmark"]: row for row in parsed(text)}
    for name, reason in POLICY["missing"].items():
        assert rows[name]["problems"] == "missing"
        assert rows[name]["avg@k"] == MISSING
        assert f"missing: {name}: {reason}" in text
    assert "The mean is over 3 of 5 benchmarks." in text
    assert "its last box" in text
    complete = POLICY | {"missing": {}, "answer_from": "format"}
    assert "missing" not in markdown(policy_table(complete))
    assert "as in training" in markdown(policy_table(complete))


def test_processbenchs_markdown_read_back_is_the_summary():
    rows = {
        (r["subset"], r["judged"]): r for r in parsed(markdown(processbench_table(PROCESSBENCH)))
    }
    for split, scores in PROCESSBENCH["splits"].items():
        for how, prefix in (("greedy", ""), ("majority", "majority_")):
            row = rows[split, how]
            assert row["wrong/right"] == "207/193"
            assert close(read_interval(row["F1"]), scores[f"{prefix}f1"])
            for column in ("error acc", "correct acc", "overall acc"):
                name = {"overall acc": "overall_accuracy"}.get(column, column.replace(" ", "_"))
                assert close(read_number(row[column]), scores[f"{prefix}{name}"]["estimate"])
            assert close(read_number(row["unread"]), scores[f"{prefix}unparseable"])
            assert close(read_number(row["miscounted"]), scores[f"{prefix}other_step_count"])
        assert close(read_number(rows[split, "greedy"]["soft AUC"]), scores.get("soft_auc"))
        assert rows[split, "greedy"]["tokens"] == "311.5"
    assert close(read_interval(rows["mean", "greedy"]["F1"]), PROCESSBENCH["mean_f1"])
    assert close(read_interval(rows["mean", "majority"]["F1"]), PROCESSBENCH["majority_mean_f1"])
    assert rows["omnimath", "missing"]["F1"] == MISSING


def test_an_orm_and_undefined_figures_have_cells_too():
    orm = split_scores(False, True, orm=True)
    undefined = split_scores(False, False) | {"f1": NOTHING, "correct_acc": NOTHING}
    undefined |= {"too_long": 3, "rewritten": 2}
    summary = {"splits": {"gsm8k": orm, "math": undefined}, "missing": {}}
    text = markdown(processbench_table(summary))
    gsm8k, math = parsed(text)
    assert (gsm8k["error acc"], gsm8k["F1"], gsm8k["overall acc"]) == (MISSING, MISSING, "0.719")
    assert (math["error acc"], math["correct acc"], math["F1"]) == ("0.500", MISSING, MISSING)
    assert "math: 3 prompts are too long" in text
    assert "math: 2 solutions hold tags" in text


@pytest.mark.parametrize("table", [policy_table(POLICY), processbench_table(PROCESSBENCH)])
def test_the_screen_shows_every_cell_whole_in_100_columns(table, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    file = io.StringIO()
    show(table, Console(file=file, width=80))
    text = file.getvalue()
    assert max(len(line) for line in text.splitlines() if not line.startswith("miss")) <= 100
    squeezed = "".join(text.split())
    for row in table.rows:
        assert row[0] in text
        for cell in row:
            assert cell.replace(" ", "")[:5] in squeezed
    for note in table.notes:
        assert "".join(note.split()) in squeezed
