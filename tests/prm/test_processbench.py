"""Judges that answer by rule, so that what they score on ProcessBench is known in closed form."""

import json
import math
import re
import types

import numpy as np
import pytest

from spark_jax import steps
from spark_jax.data.records import SamplingSettings, read_jsonl
from spark_jax.evaluation.processbench import ProcessBenchSample
from spark_jax.prm.evaluate import Judge
from spark_jax.prm.processbench import Prediction, evaluate_processbench
from spark_jax.verification.parse import format_verification
from spark_jax.verification.prompts import CANONICAL, canonical_format

SETTINGS = SamplingSettings(temperature=0.7, max_new_tokens=50)
LABELS = {"gsm8k": [0, 2, -1, 1, -1, 2, -1, 0], "math": [-1, 1, 1, 3, -1]}


def samples_of(split):
    return [
        ProcessBenchSample(
            f"{split}-{i}", f"<{split}-{i}>", tuple(f"s{k} of {i}" for k in range(4)), label, True
        )
        for i, label in enumerate(LABELS[split])
    ]


SPLITS = {split: samples_of(split) for split in LABELS}
LABEL_OF = {sample.id: sample.label for split in SPLITS.values() for sample in split}


def verdicts(prediction, num_steps=4):
    return [k != prediction for k in range(num_steps)]


def as_verification(prediction):
    given = verdicts(prediction)
    return format_verification([("t", "a")] * len(given), given, prediction == -1)


def as_lines(prediction):
    lines = [
        f"Step {k}: {'Correct' if right else 'Incorrect'}"
        for k, right in enumerate(verdicts(prediction), start=1)
    ]
    overall = "Yes" if prediction == -1 else "No"
    return "\n".join([*lines, f"Verification: Is the answer correct (Yes/No)? {overall}"])


WRITERS = {
    "prm": as_lines,
    "prm_cot": as_verification,
    "verifier": lambda prediction: f"<think> hm </think>\n{as_verification(prediction)}",
    "orm": lambda prediction: "Yes" if prediction == -1 else "No",
}


class Ruled:
    """Predicts `rule(id, draw)` (None: says nothing that can be read), written down as the kind of
    judge does; draw is -1 for the greedy judgement. Its texts hang on nothing but that."""

    def __init__(self, kind, rule):
        self.write, self.rule, self.asked = WRITERS[kind], rule, []

    def __call__(self, prompts, *, samples_per_prompt, settings, seed):
        ids = [re.search(r"<((?:gsm8k|math)-\d+)>", prompt)[1] for prompt in prompts]
        self.asked += ids
        draws = [-1] if settings.greedy else range(samples_per_prompt)
        return [[self.said(id, draw) for draw in draws] for id in ids]

    def said(self, id, draw):
        prediction = self.rule(id, draw)
        text = "?" if prediction is None else self.write(prediction)
        return types.SimpleNamespace(text=text, token_ids=tuple(range(10)), finished=True)


def evaluate(folder, rule, kind="prm_cot", text_format=CANONICAL, splits=SPLITS, **more):
    run = {name: more.pop(name) for name in ("seed", "chunk_size", "on_progress") if name in more}
    sample = more.pop("sample", None) or Ruled(kind, rule)
    judge = Judge(sample, text_format, kind, SETTINGS, **more)
    return evaluate_processbench(judge, splits, folder=folder, model="m", **{"seed": 0} | run)


def perfect(id, draw):
    return LABEL_OF[id]


@pytest.mark.parametrize("kind", ["prm", "prm_cot", "verifier"])
@pytest.mark.parametrize("splitter", [steps.tagged_steps, steps.numbered_steps])
def test_a_perfect_judge_in_every_format(tmp_path, kind, splitter):
    got = evaluate(tmp_path, perfect, kind, canonical_format(split_steps=splitter), votes=3)
    certain = {"estimate": 1.0, "low": 1.0, "high": 1.0}
    assert got["mean_f1"] == got["majority_mean_f1"] == certain
    for split, labels in LABELS.items():
        scores = got["splits"][split]
        assert scores["f1"] == scores["majority_error_acc"] == scores["overall_accuracy"] == certain
        assert (scores["unparseable"], scores["num_samples"]) == (0, len(labels))
        assert scores["erroneous"] == sum(label >= 0 for label in labels)
        assert scores["tokens_generated"] == 10 * 4 * len(labels)
        assert scores["tokens_per_judgement"] == 10
        lines = read_jsonl(tmp_path / f"{split}.jsonl", Prediction)
        assert [line.prediction for line in lines] == labels
        assert [line.majority_prediction for line in lines] == labels


def test_a_judge_to_whom_all_is_right_finds_no_error(tmp_path):
    got = evaluate(tmp_path, lambda id, draw: -1)
    for split, labels in LABELS.items():
        scores = got["splits"][split]
        assert scores["error_acc"]["estimate"] == scores["f1"]["estimate"] == 0
        assert scores["correct_acc"]["estimate"] == 1
        assert scores["overall_accuracy"]["estimate"] == labels.count(-1) / len(labels)
    assert got["mean_f1"] == {"estimate": 0.0, "low": 0.0, "high": 0.0}


def test_a_judge_that_is_right_about_some_scores_the_harmonic_mean(tmp_path):
    """gsm8k: 3 of 5 errors found, 2 of 3 right ones; math: 1 of 3 and 1 of 2."""
    right = {"gsm8k-0", "gsm8k-1", "gsm8k-3", "gsm8k-2", "gsm8k-4", "math-1", "math-0"}
    got = evaluate(tmp_path, lambda id, draw: LABEL_OF[id] if id in right else None)
    f1 = [2 / (5 / 3 + 3 / 2), 2 / (3 / 1 + 2 / 1)]
    assert got["splits"]["gsm8k"]["f1"]["estimate"] == pytest.approx(f1[0])
    assert got["splits"]["math"]["f1"]["estimate"] == pytest.approx(f1[1])
    assert got["mean_f1"]["estimate"] == pytest.approx(np.mean(f1))
    assert got["mean_f1"]["low"] < np.mean(f1) < got["mean_f1"]["high"]
    assert got["splits"]["gsm8k"]["unparseable"] == 3 / 8
    assert got["splits"]["math"]["overall_accuracy"]["estimate"] == 2 / 5


def test_a_vote_mends_what_single_judgements_get_wrong(tmp_path):
    """Two of five judgements of each sample are off, never both by the same; the greedy one too."""

    def noisy(id, draw):
        return (LABEL_OF[id] + 1 + (draw + 3) // 2) % 5 - 1 if draw in (-1, 1, 3) else LABEL_OF[id]

    got = evaluate(tmp_path, noisy, votes=5)
    assert got["mean_f1"]["estimate"] < 1
    assert got["majority_mean_f1"]["estimate"] == 1
    assert evaluate(tmp_path / "one", noisy, votes=5)["splits"] == got["splits"]


def test_a_step_too_many_or_too_few_is_no_prediction(tmp_path):
    class Short(Ruled):
        def said(self, id, draw):
            text = format_verification([("t", "a")] * 3, [True] * 3, True)
            return types.SimpleNamespace(text=text)

    got = evaluate(tmp_path, perfect, sample=Short("prm_cot", perfect))["splits"]["gsm8k"]
    assert got["f1"]["estimate"] == got["unparseable"] == 0
    assert got["overall_accuracy"]["estimate"] == 3 / 8  # Yes counts: three have no error
    assert got["tokens_generated"] is got["tokens_per_judgement"] is None


def test_an_orm_names_no_step(tmp_path):
    got = evaluate(tmp_path, perfect, "orm")
    assert "mean_f1" not in got
    scores = got["splits"]["math"]
    assert scores["overall_accuracy"]["estimate"] == 1
    assert "f1" not in scores
    assert {p.prediction for p in read_jsonl(tmp_path / "math.jsonl", Prediction)} == {None}


class Letters:
    """A tokenizer of characters."""

    pad_token_id = 0

    def encode(self, text, add_special_tokens):
        return [ord(letter) for letter in text]


def test_soft_scores_are_compared_with_there_being_no_error(tmp_path):
    """A judge that always says Yes, but with less confidence where there is an error."""
    sure = {True: 0.9, False: 0.6}

    def token_logprobs(tokens):
        rows = []
        for row in tokens:
            id = re.search(r"<([a-z0-9]+-\d+)>", "".join(map(chr, row)))[1]
            share = sure[LABEL_OF[id] == -1]
            p = np.full(len(row), 0.5)
            p[row == ord("Y")], p[row == ord("N")] = share, 1 - share
            rows.append(np.log(p[1:]))
        return np.array(rows)

    soft = {"token_logprobs": token_logprobs, "tokenizer": Letters()}
    for kind in ("orm", "prm", "verifier"):
        got = evaluate(tmp_path / kind, lambda id, draw: -1, kind, **soft)["splits"]["gsm8k"]
        assert got["soft_auc"] == 1
        assert got["soft_accuracy"] == got["overall_accuracy"]["estimate"] == 3 / 8
    sure[False] = 0.3
    got = evaluate(tmp_path / "surer", lambda id, draw: -1, "orm", **soft)["splits"]["gsm8k"]
    assert (got["soft_auc"], got["soft_accuracy"]) == (1, 1)
    lines = read_jsonl(tmp_path / "surer" / "gsm8k.jsonl", Prediction)
    assert [line.opinion.soft_score for line in lines] == pytest.approx(
        [0.9 if label == -1 else 0.3 for label in LABELS["gsm8k"]]
    )


def test_prompts_that_do_not_fit_are_counted(tmp_path):
    got = evaluate(tmp_path, perfect, fits=lambda prompt: "gsm8k-1>" not in prompt)
    scores = got["splits"]["gsm8k"]
    assert scores["too_long"] == 1
    assert scores["error_acc"]["estimate"] == 4 / 5


def test_one_class_alone_has_no_f1(tmp_path):
    erroneous = [sample for sample in SPLITS["gsm8k"] if sample.label >= 0]
    got = evaluate(tmp_path, perfect, splits={"gsm8k": erroneous})
    nothing = {"estimate": None, "low": None, "high": None}
    assert got["splits"]["gsm8k"]["f1"] == got["mean_f1"] == nothing
    assert json.loads(json.dumps(got, allow_nan=False)) == got


# --- going on where it stopped -------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, evaluate(folder, perfect, votes=2, chunk_size=3)


def test_a_run_cut_anywhere_goes_on_to_the_same_file(whole, tmp_path):
    folder, expected = whole
    content = (folder / "gsm8k.jsonl").read_bytes()
    ends = [m.end() for m in re.finditer(b"\n", content)]
    for cut in (0, ends[1], ends[2] - 1, ends[4] - 9, ends[5], ends[7] - 9, ends[7] - 1, ends[7]):
        (tmp_path / "gsm8k.jsonl").write_bytes(content[:cut])
        (tmp_path / "math.jsonl").unlink(missing_ok=True)
        sample = Ruled("prm_cot", perfect)
        got = evaluate(tmp_path, None, sample=sample, votes=2, chunk_size=3)
        assert got == expected
        for split in SPLITS:
            assert (tmp_path / f"{split}.jsonl").read_bytes() == (
                folder / f"{split}.jsonl"
            ).read_bytes()
        kept = content[:cut].count(b"\n") + (cut + 1 in ends)
        again = kept // 3 * 3 if kept < 8 else 8  # a chunk begun is asked again, a whole one not
        assert sample.asked.count(f"gsm8k-{again}") == (2 if again < 8 else 0)
        assert all(f"gsm8k-{i}" not in sample.asked for i in range(again))


def test_progress_is_in_samples_over_all_splits(tmp_path):
    seen = []
    evaluate(tmp_path, perfect, chunk_size=3, on_progress=lambda *done: seen.append(done))
    assert seen[0] == (0, 13)
    assert seen[-1] == (13, 13)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({done for done, _ in seen}) == 6  # after each chunk


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "was sampled with"),
        ({"chunk_size": 2}, "was sampled with"),
        ({"kind": "verifier"}, "was sampled with"),
        ({"votes": 3}, r"has \(votes, soft score\) \(2, False\), expected \(3, False\)"),
        ({"text_format": canonical_format(split_steps=steps.numbered_steps)}, "was sampled with"),
        ({"splits": {"gsm8k": SPLITS["gsm8k"][1:]}}, "is of 'gsm8k-0', expected 'gsm8k-1'"),
        ({"splits": {"gsm8k": SPLITS["gsm8k"][:6]}}, "holds 8 records, this call makes 6"),
    ],
)
def test_a_file_of_another_call_is_refused(whole, tmp_path, changes, message):
    for file in whole[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=rf"gsm8k\.jsonl:\d+: .*{message}"):
        evaluate(tmp_path, perfect, **{"votes": 2, "chunk_size": 3} | changes)


def test_a_sample_that_cannot_be_written_down_is_refused_before_anything_is_asked(tmp_path):
    sample = Ruled("prm", perfect)
    bad = canonical_format(split_steps=lambda text: [])
    with pytest.raises(ValueError, match=r"sample 'gsm8k-0': .*does not find its 4 steps"):
        evaluate(tmp_path, perfect, text_format=bad, sample=sample)
    assert not sample.asked
    assert not list(tmp_path.iterdir())


def test_noise_scores_what_chance_gives(tmp_path):
    """Predictions drawn from {-1, 0, 1, 2, 3}: both accuracies are 1/5 in expectation."""
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 4, 300).tolist()
    many = [
        ProcessBenchSample(f"gsm8k-{i}", f"<gsm8k-{i}>", tuple("abcd"), label, True)
        for i, label in enumerate(labels)
    ]
    got = evaluate(
        tmp_path,
        lambda id, draw: int(rng.integers(-1, 4)),
        "prm",
        splits={"n": many},
        chunk_size=64,
    )
    scores = got["splits"]["n"]
    for name in ("error_acc", "correct_acc", "f1"):
        assert abs(scores[name]["estimate"] - 0.2) < 3 * math.sqrt(0.16 / labels.count(-1))
    assert scores["f1"]["low"] < 0.2 < scores["f1"]["high"]
