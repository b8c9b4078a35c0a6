import dataclasses
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jax.data.records import (
    Aggregated,
    ParseFailure,
    Problem,
    Provenance,
    SamplingSettings,
    Solution,
    Verification,
    VerifiedSolution,
    append_jsonl,
    read_jsonl,
)

TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates included
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
VERDICTS = st.lists(st.booleans(), max_size=4).map(tuple)
SETTINGS = st.builds(SamplingSettings, temperature=st.floats(0, 2), greedy=st.booleans())
PROVENANCE = st.builds(Provenance, TEXT, SETTINGS, st.integers(), st.integers())
PROBLEM = st.builds(
    Problem, TEXT, TEXT, st.none() | TEXT, metadata=st.dictionaries(TEXT, JSON, max_size=3)
)
SOLUTION = st.builds(
    Solution,
    problem_id=TEXT,
    index=st.integers(0, 9),
    text=TEXT,
    steps=st.lists(TEXT, max_size=3).map(tuple),
    answer=st.none() | TEXT,
    step_labels=st.none() | VERDICTS,
    correct=st.none() | st.booleans(),
    provenance=st.none() | PROVENANCE,
)
VERIFICATION = st.builds(Verification, TEXT, VERDICTS, st.booleans())
SAMPLES = st.lists(VERIFICATION | st.builds(ParseFailure, TEXT, TEXT), max_size=3).map(tuple)
AGGREGATED = st.builds(
    Aggregated,
    method=TEXT,
    verification=st.none() | VERIFICATION,
    chosen=st.none() | st.integers(0, 9),
    voted_verdicts=st.none() | VERDICTS,
    voted_overall=st.none() | st.booleans(),
    exact_match=st.none() | st.booleans(),
    num_samples=st.integers(0, 9),
    num_valid=st.integers(0, 9),
    reason=TEXT,
    agreement=st.none() | st.floats(0, 1),
)
VERIFIED = st.builds(
    VerifiedSolution,
    TEXT,
    st.integers(0, 9),
    SAMPLES,
    SAMPLES,
    st.lists(AGGREGATED, max_size=2).map(tuple),
    PROVENANCE,
)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([PROBLEM, SOLUTION, VERIFIED]).flatmap(
        lambda records: st.tuples(st.lists(records, min_size=1, max_size=3), st.lists(records))
    )
)
def test_what_is_written_is_read_back_exactly(tmp_path_factory, batches):
    path = tmp_path_factory.mktemp("records") / "new folder" / "records.jsonl"
    for batch in batches:
        append_jsonl(path, batch)
    records = [record for batch in batches for record in batch]
    assert read_jsonl(path, type(records[0])) == records
    assert path.read_bytes().count(b"\n") == len(records)


def test_a_torn_last_line_is_dropped_and_logged_wherever_it_is_torn(tmp_path, caplog):
    records = [Problem("a", "1+1 \u2028 é", "2", {"n": [1]}), Problem("b", "2+2", None)]
    whole = tmp_path / "whole.jsonl"
    append_jsonl(whole, records)
    content = whole.read_bytes()
    first = content.index(b"\n") + 1
    for cut in range(len(content) + 1):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(content[:cut])
        caplog.clear()
        expected = (cut >= first - 1) + (cut >= len(content) - 1)
        assert read_jsonl(path, Problem) == records[:expected]
        torn = cut not in (0, first - 1, first, len(content) - 1, len(content))
        assert ("torn last line" in caplog.text) == torn
        append_jsonl(path, records[expected:])
        assert read_jsonl(path, Problem) == records
        if expected < 2:
            assert path.read_bytes() == content


def test_appending_looks_far_back_for_the_beginning_of_a_long_torn_line(tmp_path):
    path = tmp_path / "long.jsonl"
    records = [Problem(str(i), "x" * 200_000) for i in range(2)]
    append_jsonl(path, records)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    append_jsonl(path, records[1:])
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{torn", "Expecting property name"),
        ("", "Expecting value"),
        ('{"id": "a"}', r"missing fields \['question'\]"),
        ('{"id": "a", "question": "q", "anwser": "1"}', r"unknown fields \['anwser'\]"),
        ('{"id": 3, "question": "q"}', "Problem.id: expected str, got 3"),
        ('{"id": "a", "question": "q", "answer": 4}', "Problem.answer: expected str, got 4"),
        ("[1]", "expected an object"),
    ],
)
def test_a_bad_line_is_refused_with_file_line_and_field(tmp_path, line, complaint):
    path = tmp_path / "bad.jsonl"
    good = '{"id": "a", "question": "q"}\n'
    path.write_text(good + line + "\n" + good)
    with pytest.raises(ValueError, match=rf"bad.jsonl:2: not a Problem: .*{complaint}"):
        read_jsonl(path, Problem)


@pytest.mark.parametrize("metadata", [{"a": (1, 2)}, {"a": float("nan")}, {"n": {1: "a"}}])
def test_metadata_that_json_would_change_is_refused_and_nothing_written(tmp_path, metadata):
    path = tmp_path / "records.jsonl"
    with pytest.raises(ValueError, match="JSON"):
        append_jsonl(path, [Problem("a", "q"), Problem("b", "q", metadata=metadata)])
    assert not path.exists()


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Problem("a", "q").answer = "1"  # type: ignore[misc]


def test_nothing_is_logged_for_whole_files(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    append_jsonl(tmp_path / "r.jsonl", [Problem("a", "q")])
    read_jsonl(tmp_path / "r.jsonl", Problem)
    assert caplog.text == ""
