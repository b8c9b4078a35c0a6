"""ProcessBench scores against counting by hand, and the published files' counts."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_jax import steps
from spark_jax.evaluation import processbench
from spark_jax.evaluation.intervals import bootstrap_interval
from spark_jax.response_format import valid_part

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
        ("[3]", "sample 0: .*expected an object"),
        (json.dumps([SAMPLE, SAMPLE | {"label": 2}]), "sample 1: label 2 is no step's index"),
        (json.dumps([SAMPLE | {"label": "1"}]), "label: expected int, got '1'"),
        (json.dumps([SAMPLE | {"label": True}]), "label: expected int, got True"),
        (json.dumps([SAMPLE | {"steps": [1]}]), r"steps\[0\]: expected str"),
        (json.dumps([{"id": "x"}]), r"missing fields \['problem'"),
    ],
)
def test_load_names_the_place(tmp_path, content, message):
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        processbench.load(file)
    assert str(file) in str(error.value)


# --- intervals -----------------------------------------------------------------------------------


def test_intervals_are_those_of_resampling_the_samples_themselves():
    rng = np.random.default_rng(5)
    labels = rng.integers(-1, 3, 80)
    predictions = [label if rng.random() < 0.6 else 3 for label in labels.tolist()]
    got = processbench.score_intervals(predictions, labels.tolist())
    hits = np.array(predictions) == labels
    wrong, right = hits[labels >= 0], hits[labels < 0]
    for name, group in (("error_acc", wrong), ("correct_acc", right)):
        expected = bootstrap_interval(group)
        assert got[name].estimate == expected.estimate
        np.testing.assert_allclose(
            [got[name].low, got[name].high], [expected.low, expected.high], atol=0.02
        )
    draws = []
    for _ in range(4000):
        a, b = (rng.choice(group, len(group)).mean() for group in (wrong, right))
        draws.append(2 * a * b / (a + b))
    np.testing.assert_allclose(
        [got["f1"].low, got["f1"].high], np.quantile(draws, [0.025, 0.975]), atol=0.015
    )
    assert got["f1"].estimate == processbench.score(predictions, labels.tolist())["f1"]


def test_intervals_of_the_perfect_the_hopeless_and_the_undefined():
    perfect = processbench.score_intervals([1, -1], [1, -1])
    assert {(i.low, i.estimate, i.high) for i in perfect.values()} == {(1, 1, 1)}
    hopeless = processbench.score_intervals([None, None], [1, -1])
    assert {(i.low, i.estimate, i.high) for i in hopeless.values()} == {(0, 0, 0)}
    one_class = processbench.score_intervals([1, 0], [1, 1])
    assert (one_class["error_acc"].estimate, one_class["error_acc"].low) == (0.5, 0)
    assert math.isnan(one_class["correct_acc"].low)
    assert math.isnan(one_class["f1"].high)


def test_the_mean_of_two_subsets_is_surer_than_either():
    half = ([0, 1] * 50 + [-1, 0] * 50, [0] * 100 + [-1] * 100)  # both accuracies 1/2
    one = processbench.score_intervals(*half)["f1"]
    mean = processbench.mean_f1_interval({"a": half, "b": half, "c": half, "d": half})
    assert one.estimate == mean.estimate == 0.5
    assert (mean.high - mean.low) == pytest.approx((one.high - one.low) / 2, rel=0.1)


# --- files, subsets, texts -----------------------------------------------------------------------


def files(folder, *splits):
    for split in splits:
        (folder / f"{split}.json").write_text(json.dumps([SAMPLE]))
    return folder


def test_splits_that_are_not_there_are_named(tmp_path):
    found, missing = processbench.find(files(tmp_path, "gsm8k", "math"))
    assert found == {name: tmp_path / f"{name}.json" for name in ("gsm8k", "math")}
    assert set(missing) == {"olympiadbench", "omnimath"}
    assert str(tmp_path / "omnimath.json") in missing["omnimath"]


def test_splits_that_were_asked_for_are_required(tmp_path):
    files(tmp_path, "gsm8k", "math")
    assert list(processbench.find(tmp_path, ["math"])[0]) == ["math"]
    with pytest.raises(FileNotFoundError, match=r"omnimath\.json.*Qwen/ProcessBench"):
        processbench.find(tmp_path, ["math", "omnimath"])
    with pytest.raises(FileNotFoundError, match=r"gsm8k\.json"):
        processbench.find(tmp_path / "nowhere")


def sample_of(*steps, label=-1, id="a"):
    return processbench.ProcessBenchSample(id, "p", steps, label, True)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 60), st.integers(0, 3))
def test_a_subset_keeps_the_share_of_errors(wrong, right, number, seed):
    samples = [sample_of("x", label=0, id=f"w{i}") for i in range(wrong)]
    samples += [sample_of("x", id=f"r{i}") for i in range(right)]
    got = processbench.subset(samples, number, seed)
    counts = processbench.counts(got)
    assert len({sample.id for sample in got}) == len(got) == min(number, wrong + right)
    if samples:
        assert abs(counts["erroneous"] - len(got) * wrong / len(samples)) <= 1
    if len(got) > 1 and wrong and right:
        assert min(counts.values()) >= 1


def test_a_subset_is_drawn_by_its_seed_and_keeps_the_order():
    samples = [sample_of("x", id=str(i), label=-(i % 3 > 0)) for i in range(100)]
    first = processbench.subset(samples, 10, 1)
    assert first == processbench.subset(samples, 10, 1)
    assert first != processbench.subset(samples, 10, 2)
    ids = [int(sample.id) for sample in first]
    assert ids == sorted(set(ids))
    assert len(ids) == 10
    assert ids != list(range(10))
    assert processbench.subset(samples, None, 1) == processbench.subset(samples, 101, 1) == samples
    with pytest.raises(ValueError, match="subset of 0"):
        processbench.subset(samples, 0, 1)


SPLITTERS = {
    "tagged": steps.tagged_steps,
    "numbered": steps.numbered_steps,
    "paragraphs": steps.blank_line_steps,
}
TAGS = ("<step>", "</step>", "</answer>", "<think>")
HEADERS = ("Step 2: ", "\n## Step 1", "1. ", "Answer: 3", "\nThe answer is 3.")
ODD = st.sampled_from([*TAGS, *HEADERS, "\n\n", " ", "$x<y$", "\\boxed{3}", "a", "b"])
STEP = st.lists(ODD, max_size=5).map("".join)


@pytest.mark.parametrize("name", SPLITTERS)
@given(st.lists(STEP, min_size=1, max_size=5))
def test_a_solutions_text_has_exactly_its_steps(name, texts):
    sample = sample_of(*texts)
    text = processbench.solution_text(sample, SPLITTERS[name])
    spans = SPLITTERS[name](text)
    assert len(spans) == len(texts)
    assert valid_part(text) == text  # what a reward model is shown
    for step, (start, end) in zip(texts, spans):
        shown = step
        for tag in TAGS:
            shown = shown.replace(tag, f"&lt;{tag[1:-1]}&gt;")
        assert "".join(shown.split()) in "".join(text[start:end].split())
    if name == "tagged" and not processbench.is_rewritten(sample):
        assert steps.step_texts(text, spans) == tuple(step.strip() for step in texts)
    assert processbench.is_rewritten(sample) == any(
        not step.strip() or any(tag in step for tag in TAGS) for step in texts
    )


def test_a_splitter_that_finds_other_steps_is_refused():
    with pytest.raises(ValueError, match=r"sample 'a': .*does not find its 2 steps"):
        processbench.solution_text(sample_of("x", "y"), lambda text: [(0, len(text))])


# --- the published files -------------------------------------------------------------------------


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
    for name, splitter in SPLITTERS.items():
        for sample in samples[::7]:
            text = processbench.solution_text(sample, splitter)
            assert len(splitter(text)) == len(sample.steps), (name, sample.id)
    assert not any(processbench.is_rewritten(sample) for sample in samples)
