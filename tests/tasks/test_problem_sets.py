import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jax.data import problems
from spark_jax.data.problems import Loaded, question_key
from spark_jax.tasks import problem_sets
from spark_jax.tasks.problem_sets import DATA_VARIABLE, PROBLEM_SETS, DataOptions, splits

TEST_ONLY = ("math500", "aime24", "aime25", "amc23", "olympiadbench", "minerva")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(numbers):
    return [{"question": f"What is {n}+{n}?", "answer": str(2 * n)} for n in numbers]


def questions(loaded):
    return {problem.question for problem in loaded.problems}


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)


@pytest.fixture
def hub(monkeypatch, no_data):
    """A hub that gives what a test puts in; keeps what it was asked for."""
    import datasets

    class Hub(dict):
        def load_dataset(self, path, name=None, *, split):
            self.asked.append((path, name, split))
            return datasets.Dataset.from_list(self[path])

    fake = Hub()
    fake.asked = []
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    return fake


# --- the table -----------------------------------------------------------------------------------

# A made-up row in the fields that each set has on the hub, and the answer that is in it.
HUB_ROWS = {
    "gsm8k": ({"question": "Q?", "answer": "So <<2*3=6>>6.\n#### 1,006"}, "1006", "main"),
    "math": (
        {"problem": "Q?", "level": "Level 5", "type": "Algebra",
         "solution": "First \\boxed{1}, so $\\boxed{\\frac{1}{2}}$."},
        "\\frac{1}{2}",
        None,
    ),
    "math500": (
        {"problem": "Q?", "solution": "\\boxed{3}", "answer": "3", "subject": "Algebra",
         "level": 2, "unique_id": "test/algebra/1.json"},
        "3",
        None,
    ),
    "aime24": ({"id": 7, "problem": "Q?", "solution": "...", "answer": "033"}, "033", None),
    "aime25": ({"problem": "Q?", "answer": "70", "id": "0"}, "70", None),
    "amc23": ({"id": 0, "question": "Q?", "answer": "27.0", "url": "u"}, "27.0", None),
    "olympiadbench": (
        {"id": 9, "question": "Q?", "final_answer": ["$2$", "$\\$ 3$"], "subfield": "Algebra",
         "is_multiple_answer": True, "unit": None},
        "2, \\$ 3",
        None,
    ),
    "minerva": ({"question": "Q?", "answer": "1.2e4"}, "1.2e4", None),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HUB_ROWS))
def test_where_no_local_file_is_the_hub_is_asked_and_its_fields_are_read(name, hub):
    row, answer, config = HUB_ROWS[name]
    hub[PROBLEM_SETS[name].hub] = [row]
    loaded = splits(name, DataOptions())("eval")
    (problem,) = loaded.problems
    assert (problem.question, problem.answer) == ("Q?", answer)
    assert problem.id.startswith(f"{name}/")
    eval_split = PROBLEM_SETS[name].hub_splits["eval"]
    assert (PROBLEM_SETS[name].hub, config, eval_split) in hub.asked
    told = json.dumps(problem.metadata)
    assert not any(word in told for word in ("solution", "answer", "boxed"))


def test_every_named_set_is_in_the_test_above():
    assert set(HUB_ROWS) | {"problems", "rubric"} == set(PROBLEM_SETS)


@pytest.mark.parametrize(
    ("form", "text", "answer"),
    [
        ("after_hashes", "a\n#### 72", "72"),
        ("after_hashes", "#### 1 #### -1,234,567.5 ", "-1234567.5"),
        ("after_hashes", "no mark", None),
        ("after_hashes", "####  ", None),
        ("boxed", "\\boxed{a{b}c} then \\boxed{ x }", "x"),
        ("boxed", "so \\fbox{7}.", "7"),
        ("boxed", "so $x = \\boxed 3$.", "3"),
        ("boxed", "\\boxed{never closed", None),
        ("boxed", "none", None),
        ("without_dollars", "$x=1$, $y$", "x=1, y"),
        ("without_dollars", "$\\$5$", "\\$5"),
        ("without_dollars", "$$", None),
        ("plain", "as it is", "as it is"),
    ],
)
def test_answers_are_read_in_the_form_they_stand_in(form, text, answer):
    assert problem_sets.ANSWER_FORMS[form](text) == answer


def test_a_row_whose_answer_has_another_form_is_bad(tmp_path, no_data):
    rows = [{"question": "a", "answer": "#### 1"}, {"question": "b", "answer": "2"}]
    path = write(tmp_path / "train.jsonl", rows)
    loaded = splits("gsm8k", DataOptions(data=path))("train")
    assert [bad.place for bad in loaded.bad_rows] == [f"{path}:2"]
    assert "no answer of the form 'after_hashes'" in loaded.bad_rows[0].reason


# --- where a split is ----------------------------------------------------------------------------


def test_a_local_folder_comes_before_the_hub(tmp_path, monkeypatch, hub):
    write(tmp_path / "gsm8k" / "test.jsonl", [{"question": "local", "answer": "#### 1"}])
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    hub["openai/gsm8k"] = [{"question": "far", "answer": "#### 1"}]
    split = splits("gsm8k", DataOptions())
    assert questions(split("eval")) == {"local"}
    assert questions(split("train")) == {"far"}
    assert hub.asked == [("openai/gsm8k", "main", "train")]


def test_two_local_files_for_one_split_are_refused(tmp_path, no_data):
    write(tmp_path / "train.jsonl", sums([1]))
    write(tmp_path / "train.json", [])
    with pytest.raises(ValueError, match=r"train\.jsonl or train\.json"):
        splits("problems", DataOptions(data=str(tmp_path)))("train")


def test_a_folder_of_the_users(tmp_path, no_data):
    write(tmp_path / "train.jsonl", sums(range(5)))
    write(tmp_path / "test.jsonl", sums(range(10, 13)))
    write(tmp_path / "dev.jsonl", sums(range(20, 22)))
    split = splits("problems", DataOptions(data=str(tmp_path)))
    assert (len(split("train").problems), len(split("eval").problems)) == (5, 3)
    split = splits("problems", DataOptions(data=str(tmp_path), eval_split="dev"))
    assert (len(split("train").problems), len(split("eval").problems)) == (5, 2)
    assert split("eval").problems[0].id == "problems/dev/1"


def test_a_folder_without_a_train_split_has_none(tmp_path, no_data):
    write(tmp_path / "test.jsonl", sums(range(3)))
    with pytest.raises(ValueError, match="has no 'train' problems"):
        splits("problems", DataOptions(data=str(tmp_path)))("train")


def test_a_hub_id_of_the_users_with_its_own_names(hub):
    hub["me/sums"] = [{"prompt": "1+1", "gold": "so \\boxed{2}"}]
    options = DataOptions(
        data="me/sums",
        config="small",
        eval_split="validation",
        question_field="prompt",
        answer_field="gold",
        answer_form="boxed",
    )
    (problem,) = splits("problems", options)("eval").problems
    assert (problem.question, problem.answer) == ("1+1", "2")
    assert set(hub.asked) == {("me/sums", "small", "validation")}


def test_files_for_each_split(tmp_path, no_data):
    train = write(tmp_path / "mine.jsonl", sums(range(6)))
    held_out = write(tmp_path / "other.jsonl", sums(range(4, 9)))
    split = splits("problems", DataOptions(data=train, eval_data=held_out))
    assert questions(split("eval")) == {row["question"] for row in sums(range(4, 9))}
    assert questions(split("train")) == {row["question"] for row in sums(range(4))}
    assert split("train").counts() == {"problems": 4, "bad_rows": 0, "duplicates": 2}
    assert [p.id for p in split("train").problems] == [f"problems/mine/{n}" for n in range(1, 5)]


@pytest.mark.parametrize("name", TEST_ONLY)
def test_what_is_only_for_evaluation_is_not_trained_on_unasked(name, hub):
    hub[PROBLEM_SETS[name].hub] = [
        HUB_ROWS[name][0] | {"question": f"Q{n}", "problem": f"Q{n}"} for n in range(30)
    ]
    split = splits(name, DataOptions())
    assert len(split("eval").problems) == 30
    with pytest.raises(ValueError, match=rf"{name} has no 'train' problems.*eval_fraction=0\.2"):
        split("train")
    parts = splits(name, DataOptions(eval_fraction=0.5))
    assert len(parts("train").problems) + len(parts("eval").problems) == 30
    assert not questions(parts("train")) & questions(parts("eval"))


def test_a_train_file_alone_has_no_held_out_problems(tmp_path, no_data):
    train = write(tmp_path / "mine.jsonl", sums(range(6)))
    split = splits("problems", DataOptions(data=train))
    assert len(split("train").problems) == 6
    with pytest.raises(ValueError, match=r"no 'eval' problems.*mine\.jsonl.*eval_data"):
        split("eval")


@settings(max_examples=30)
@given(st.sets(st.integers(0, 500), min_size=40, max_size=80), st.sampled_from([0.2, 0.5]))
def test_holding_out_a_part_depends_on_the_question_alone(tmp_path_factory, numbers, fraction):
    folder = tmp_path_factory.mktemp("parts")
    some = write(folder / "some.jsonl", sums(sorted(numbers)))
    more = write(folder / "more.jsonl", sums(sorted(numbers, reverse=True)) + sums([501, 502]))
    of_some, of_more = (
        splits("problems", DataOptions(data=data, eval_fraction=fraction)) for data in (some, more)
    )
    train, held_out = questions(of_some("train")), questions(of_some("eval"))
    assert train | held_out == {row["question"] for row in sums(numbers)}
    assert not train & held_out
    assert train <= questions(of_more("train"))
    assert held_out <= questions(of_more("eval"))


def test_the_share_held_out_is_about_the_fraction(tmp_path, no_data):
    data = write(tmp_path / "all.jsonl", sums(range(2000)))
    held_out = splits("problems", DataOptions(data=data, eval_fraction=0.2))("eval")
    assert 340 < len(held_out.problems) < 460  # 400 ± 3.4 standard deviations


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("problems", {}, "made of your own problems"),
        ("problems", {"data": "x", "eval_fraction": 1.0}, r"eval_fraction=1\.0"),
        ("problems", {"data": "x", "answer_form": "guess"}, "answer_form='guess'"),
        ("problems", {"data": "x", "on_bad_row": "ignore"}, "on_bad_row='ignore'"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_read(name, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        splits(name, DataOptions(**changes))


def test_a_fraction_beside_a_held_out_split_is_refused(tmp_path, no_data):
    write(tmp_path / "train.jsonl", sums(range(5)))
    write(tmp_path / "test.jsonl", sums(range(5, 8)))
    split = splits("problems", DataOptions(data=str(tmp_path), eval_fraction=0.5))
    with pytest.raises(ValueError, match=r"held-out split already: .*test\.jsonl"):
        split("train")


def test_bad_rows_end_the_reading_if_asked_to(tmp_path, no_data):
    data = write(tmp_path / "mine.jsonl", [*sums([1]), {"question": "no answer"}])
    assert len(splits("problems", DataOptions(data=data))("train").bad_rows) == 1
    with pytest.raises(ValueError, match=r"mine\.jsonl:2: field 'answer' is missing"):
        splits("problems", DataOptions(data=data, on_bad_row="error"))("train")


def test_without_references_no_answer_is_read(tmp_path, no_data):
    data = write(
        tmp_path / "mine.jsonl", [{"question": "a"}, {"question": "b", "answer": "SECRET"}]
    )
    loaded = splits("problems", DataOptions(data=data, references=False))("train")
    assert [p.answer for p in loaded.problems] == [None, None]
    assert "SECRET" not in repr(loaded)


def test_a_rubric_is_a_text_or_a_list_of_points(tmp_path, no_data):
    rows = [
        {"question": "a", "rubric": ["short", "kind"], "answer": "SECRET"},
        {"question": "b", "rubric": " be kind "},
        {"question": "c"},
        {"question": "d", "rubric": []},
        {"question": "e", "rubric": ["x", ""]},
    ]
    data = write(tmp_path / "mine.jsonl", rows)
    loaded = splits("rubric", DataOptions(data=data, eval_data=data))("eval")
    assert [p.metadata["rubric"] for p in loaded.problems] == ["1. short\n2. kind", "be kind"]
    assert [bad.place for bad in loaded.bad_rows] == [f"{data}:{n}" for n in (3, 4, 5)]
    assert "SECRET" not in repr(loaded)


def test_the_rubric_example_can_be_tried_as_it_is(no_data):
    split = splits("rubric", DataOptions())
    train, held_out = split("train"), split("eval")
    assert len(train.problems) >= 8
    assert held_out.problems
    assert train.counts() == {"problems": len(train.problems), "bad_rows": 0, "duplicates": 0}
    assert not questions(train) & questions(held_out)
    assert all(p.answer is None and p.metadata["rubric"] for p in train.problems)


# --- real data -----------------------------------------------------------------------------------

real_data = pytest.mark.skipif(
    DATA_VARIABLE not in os.environ, reason=f"${DATA_VARIABLE} does not name a folder of real data"
)


@real_data
@pytest.mark.parametrize(
    ("name", "which", "count"),
    [
        ("gsm8k", "train", 7473),
        ("gsm8k", "eval", 1319),
        ("math500", "eval", 500),
        ("aime24", "eval", 30),
        ("amc23", "eval", 40),
    ],
)
def test_the_published_files_are_read_whole_and_every_answer_can_be_graded(name, which, count):
    folder = Path(os.environ[DATA_VARIABLE]) / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    import math_verify

    loaded: Loaded = splits(name, DataOptions(on_bad_row="error"))(which)
    assert loaded.counts() == {"problems": count, "bad_rows": 0, "duplicates": 0}
    assert len({p.id for p in loaded.problems}) == count
    assert len({question_key(p.question) for p in loaded.problems}) == count
    for problem in loaded.problems:
        if name == "math500":
            assert math_verify.parse(f"${problem.answer}$", parsing_timeout=None), problem
        else:
            assert float(problem.answer).is_integer()
        assert "####" not in problem.question
    if name == "math500":  # answers are in the files twice: in a field and in the solution's box
        lines = (folder / "test.jsonl").read_text().splitlines()
        boxes = [problem_sets.last_box(json.loads(line)["solution"]) for line in lines]
        assert boxes == [problem.answer for problem in loaded.problems]


@real_data
def test_the_splits_of_gsm8k_share_no_problem():
    split = splits("gsm8k", DataOptions())
    train, held_out = (
        {problems.question_key(p.question) for p in split(which).problems}
        for which in ("train", "eval")
    )
    assert not train & held_out


def test_held_out_problems_in_a_file_called_train_are_not_trained_on(tmp_path, no_data):
    """As in a snapshot of aime_2024; and a folder with both files is read the same every time."""
    write(tmp_path / "train.jsonl", [{"problem": "1?", "answer": "1"}])
    options = DataOptions(data=str(tmp_path))
    found = splits("aime24", options)
    assert [p.question for p in found("eval").problems] == ["1?"]
    with pytest.raises(ValueError, match="train"):
        found("train")
    write(tmp_path / "test.jsonl", [{"problem": "2?", "answer": "2"}])
    both = splits("aime24", options)
    assert [p.question for p in both("eval").problems] == ["2?"]
    assert [p.question for p in both("train").problems] == ["1?"]
