import json
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_jax.data import problems
from spark_jax.data.problems import BadRow, Content, Source, load


def read(row):
    for name in ("question", "answer"):
        if name not in row:
            raise ValueError(f"field {name!r} is missing")
    question = problems.as_text(row["question"], "question")
    return Content(question, problems.as_text(row["answer"], "answer"), row.get("id"), {})


def row(question, answer="1", **more):
    return json.dumps({"question": question, "answer": answer, **more})


def source(tmp_path, *lines, name="sums.jsonl"):
    path = tmp_path / name
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    )
    return Source(str(path), path.stem)


BAD_LINES = [
    ("{not json", "not JSON"),
    ('{"question": "a", "answer": "1"', "not JSON"),
    ('{"question": "a"}{"answer": "1"}', "not JSON: Extra data"),
    ('{"question": "a", "answer": NaN}', "NaN is no JSON number"),
    (b'{"question": "\xff", "answer": "1"}', "not UTF-8"),
    ("[" * 100_000, "nested too deeply"),
    ('{"answer": ' + "1" * 5000 + "}", "not JSON"),
    ("[1, 2]", r"not an object but \[1, 2\]"),
    ('"question"', "not an object"),
    ("null", "not an object but None"),
    (row("a", None), "field 'answer' is None"),
    ('{"question": "a"}', "field 'answer' is missing"),
    (row(" \t"), "field 'question' is empty"),
    (row("a", ""), "field 'answer' is empty"),
    (row("a", []), "field 'answer' is empty"),
    (row("a", True), "field 'answer' is True"),
    (row("a", {"value": 1}), "must be text or a number"),
    (row("half a pair \ud800"), "not text"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_row_is_named_by_file_and_line_and_costs_no_other(tmp_path, line, reason, caplog):
    where = source(tmp_path, row("first"), "", line, row("last"))
    with caplog.at_level(logging.WARNING):
        loaded = load(where, read, name="sums")
    assert [(p.id, p.question) for p in loaded.problems] == [
        ("sums/sums/1", "first"),
        ("sums/sums/4", "last"),
    ]
    (bad,) = loaded.bad_rows
    assert bad.place == f"{where.name}:3"
    assert re.search(reason, bad.reason)
    assert loaded.counts() == {"problems": 2, "bad_rows": 1, "duplicates": 0}
    assert f"{where.name}:3" in caplog.text
    assert "2 problems; 1 bad rows" in caplog.text
    with pytest.raises(ValueError, match=rf"sums\.jsonl:3: .*{reason}"):
        load(where, read, name="sums", on_bad_row="error")


def test_many_bad_rows_are_all_counted_and_few_are_logged(tmp_path, caplog):
    where = source(tmp_path, *["{"] * 40, row("good"))
    loaded = load(where, read, name="sums")
    assert [bad.place for bad in loaded.bad_rows] == [f"{where.name}:{n}" for n in range(1, 41)]
    assert len(caplog.records) == problems.NAMED_IN_THE_LOG + 1
    assert "40 bad rows" in caplog.records[-1].getMessage()


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["a", "b", "c d", " c  d ", "e\u2028f"]).map(row),
            st.sampled_from([line for line, _ in BAD_LINES if len(line) < 1000]),
            st.just(" \t"),
        ),
        max_size=12,
    )
)
def test_every_line_is_a_problem_a_duplicate_bad_or_blank(tmp_path_factory, lines):
    where = source(tmp_path_factory.mktemp("rows"), *lines, row("z"))
    loaded = load(where, read, name="s")
    blank = sum(line == " \t" for line in lines)
    assert sum(loaded.counts().values()) + blank == len(lines) + 1
    good = [
        line for line in lines if line in {row(q) for q in ("a", "b", "c d", " c  d ", "e\u2028f")}
    ]
    first = {}
    for line in good:
        text = json.loads(line)["question"]
        first.setdefault(" ".join(text.split()), text.strip())
    assert [p.question for p in loaded.problems] == [*first.values(), "z"]
    for problem in loaded.problems[:-1]:  # the id is the line of its first appearance
        line = int(problem.id.rpartition("/")[2])
        assert json.loads(lines[line - 1])["question"].strip() == problem.question


def test_ids_are_the_rows_own_and_never_twice(tmp_path):
    lines = [row("a", id="x"), row("b"), row("c", id="x"), row("a", "2", id="y"), row("d", id="2")]
    loaded = load(source(tmp_path, *lines), read, name="n")
    ids = [problem.id for problem in loaded.problems]
    assert ids == ["n/sums/x", "n/sums/2", "n/sums/x, line 3", "n/sums/2, line 5"]
    assert loaded.duplicates == 1
    assert loaded.problems[0].answer == "1"  # the first of two rows with one question counts


def test_line_ends_and_marks_of_other_systems(tmp_path):
    text = "\ufeff" + "\r\n".join([row("a"), row("b\u2028c"), ""])
    loaded = load(source(tmp_path, text), read, name="n")
    assert [p.question for p in loaded.problems] == ["a", "b\u2028c"]
    assert not loaded.bad_rows


def test_the_other_kinds_of_file_give_the_same_problems(tmp_path):
    import datasets

    rows = [{"question": f"q{n}", "answer": str(n), "id": f"i{n}"} for n in range(5)]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "all.parquet"))
    loaded = [
        load(Source(str(tmp_path / f"all{suffix}"), "all"), read, name="n")
        for suffix in problems.SUFFIXES
    ]
    assert loaded[0] == loaded[1] == loaded[2]
    assert [p.id for p in loaded[0].problems] == [f"n/all/i{n}" for n in range(5)]


def test_rows_without_lines_are_counted(tmp_path):
    path = tmp_path / "all.json"
    path.write_text(json.dumps([{"question": "a", "answer": 1}, 3, {"question": "b"}]))
    loaded = load(Source(str(path), "all"), read, name="n")
    assert loaded.bad_rows == (
        BadRow(f"{path}: row 2", "not an object but 3"),
        BadRow(f"{path}: row 3", "field 'answer' is missing"),
    )


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("x.json", b'{"question": "a"}\n{"question": "b"}', r"x\.json: not JSON.* named \.jsonl"),
        ("x.json", b'{"question": "a"}', r"x\.json: not a list"),
        ("x.jsonl", b"\n\n", r"x\.jsonl: no usable problem$"),
        ("x.jsonl", b"{\n", r"no usable problem; the first of 1 bad rows.*x\.jsonl:1"),
        ("x.csv", b"question,answer", r"x\.csv: files of problems end in"),
        ("x.parquet", b"PAR1 and no more", r"x\.parquet: not a parquet file"),
    ],
)
def test_files_that_hold_no_problems_are_refused(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        load(Source(str(tmp_path / name), "x"), read, name="n")


def test_what_is_nowhere_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file, no folder, and no hub id"):
        load(Source(str(tmp_path / "absent.jsonl"), "absent"), read, name="n")
    with pytest.raises(ValueError, match="on_bad_row='ignore'"):
        load(source(tmp_path, row("a")), read, name="n", on_bad_row="ignore")


def test_a_folder_of_datasets_is_read_by_datasets(tmp_path):
    import datasets

    folder = tmp_path / "downloaded" / "data"
    folder.mkdir(parents=True)
    for split, words in (("train", "ab"), ("test", "c")):
        rows = [{"question": word, "answer": 1.5} for word in words]
        file = folder / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    for split, words in (("train", "ab"), ("test", "c")):
        loaded = load(Source(str(folder.parent), split), read, name="n")
        assert [(p.question, p.answer) for p in loaded.problems] == [(w, "1.5") for w in words]
        assert loaded.problems[0].id == f"n/{split}/1"
    with pytest.raises(FileNotFoundError, match=r"dev.*could not be loaded"):
        load(Source(str(folder.parent), "dev"), read, name="n")


def test_a_hub_id_goes_to_datasets_with_config_and_split(monkeypatch):
    import datasets

    asked = []

    def fake(path, name=None, *, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list([{"question": "a", "answer": "1"}, {"question": ""}])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    loaded = load(Source("owner/set", "test", "main"), read, name="n")
    assert asked == [("owner/set", "main", "test")]
    assert [p.id for p in loaded.problems] == ["n/test/1"]
    assert loaded.bad_rows[0].place == "owner/set (main, test): row 2"


def test_without_a_network_the_message_says_what_to_do(tmp_path):
    """The real client of the hub, told to stay offline, in a process of its own: it reads that at
    import."""
    import os
    import subprocess
    import sys

    code = (
        "from spark_jax.data.problems import *\n"
        "try: load(Source('openai/gsm8k', 'test', 'main'), lambda row: None, name='n')\n"
        "except FileNotFoundError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "openai/gsm8k (main, test) could not be loaded" in done.stdout
    assert "task_options.data" in done.stdout
    assert "SPARK_JAX_DATA" in done.stdout


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("openai/gsm8k", True),
        ("gsm8k", True),
        ("a-b/c_d.e", True),
        ("./gsm8k", False),
        ("/data/gsm8k", False),
        ("data/gsm8k.jsonl", False),
        ("a/b/c", False),
        ("../x", False),
        ("", False),
    ],
)
def test_hub_ids_are_told_from_paths(name, is_id):
    assert problems.is_hub_id(name) is is_id


@given(st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers()))
def test_numbers_as_text_are_the_same_numbers(value):
    text = problems.as_text(value, "answer")
    assert float(text) == value
    if float(value).is_integer():
        assert text.lstrip("-").isdecimal()
