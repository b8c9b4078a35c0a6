"""ProcessBench scores against counting by hand, and the published files' counts."""

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_jax.evaluation import processbench

SAMPLE = {
    "id": "a-0",
    "generator": "m",
    "problem": "p",
    "steps": ["x", "y"],
    "label": 1,
    "final_answer_correct": False,
}
INDEX = st.integers(-1, 3)


@given(st.lists(st.tuples(st.one_of(st.none(), INDEX), INDEX), max_size=20))
def test_score_against_counting(pairs):
    got = processbench.score([p for p, _ in pairs], [label for _, label in pairs])
    wrong = [(p, label) for p, label in pairs if label >= 0]
    right = [(p, label) for p, label in pairs if label < 0]
    if not wrong or not right:
        assert math.isnan(got["f1"])
        return
    error_acc = sum(p == label for p, label in wrong) / len(wrong)
    correct_acc = sum(p == -1 for p, _ in right) / len(right)
    assert got["error_acc"] == pytest.approx(error_acc)
    assert got["correct_acc"] == pytest.approx(correct_acc)
    if error_acc and correct_acc:
        assert got["f1"] == pytest.approx(1 / ((1 / error_acc + 1 / correct_acc) / 2))
    else:
        assert got["f1"] == 0


def test_score_refuses_what_is_no_index():
    with pytest.raises(ValueError, match="prediction 1 is -2"):
        processbench.score([0, -2], [0, 1])
    with pytest.raises(ValueError, match="label 0 is -3"):
        processbench.score([0], [-3])
    with pytest.raises(ValueError, match="1 predictions for 2 labels"):
        processbench.score([0], [0, 1])


@given(st.lists(st.booleans(), max_size=8))
def test_first_error(verdicts):
    index = processbench.first_error(verdicts)
    if index == -1:
        assert all(verdicts)
    else:
        assert all(verdicts[:index])
        assert not verdicts[index]


def test_majority_prediction():
    assert processbench.majority_prediction([2, -1, -1, None, None, None]) == -1
    assert processbench.majority_prediction([2, 1, 1, 2]) == 2
    assert processbench.majority_prediction([None]) is None
    assert processbench.majority_prediction([]) is None


def test_mean_over_subsets_is_unweighted():
    assert processbench.mean_f1({"a": {"f1": 0.5}, "b": {"f1": 1.0}}) == 0.75
    with pytest.raises(ValueError, match="no subsets"):
        processbench.mean_f1({})


def test_load(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([SAMPLE, SAMPLE | {"label": -1}]))
    samples = processbench.load(file)
    assert samples[0] == processbench.ProcessBenchSample("a-0", "p", ("x", "y"), 1, False, "m")
    assert processbench.counts(samples) == {"erroneous": 1, "correct": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing", "no JSON"),
        ("{}", "expected a list"),
        ("[3]", "sample 0: expected an object"),
        (json.dumps([SAMPLE, SAMPLE | {"label": 2}]), "sample 1: label 2 is no step's index"),
        (json.dumps([SAMPLE | {"label": "1"}]), "'label' must be of type int"),
        (json.dumps([SAMPLE | {"label": True}]), "'label' must be of type int"),
        (json.dumps([SAMPLE | {"steps": [1]}]), "'steps' must hold texts"),
        (json.dumps([{"id": "x"}]), "'problem' must be of type str"),
    ],
)
def test_load_names_the_place(tmp_path, content, message):
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        processbench.load(file)
    assert str(file) in str(error.value)


@pytest.mark.skipif(
    "SPARK_JAX_DATA" not in os.environ,
    reason="needs the published files: set SPARK_JAX_DATA to the folder of processbench/*.json",
)
@pytest.mark.parametrize(
    ("subset", "erroneous", "correct"), [("gsm8k", 207, 193), ("math", 594, 406)]
)
def test_published_counts(subset, erroneous, correct):
    samples = processbench.load(
        Path(os.environ["SPARK_JAX_DATA"]) / "processbench" / f"{subset}.json"
    )
    assert processbench.counts(samples) == {"erroneous": erroneous, "correct": correct}
    labels = [sample.label for sample in samples]
    assert processbench.score(labels, labels) == {"error_acc": 1, "correct_acc": 1, "f1": 1}
