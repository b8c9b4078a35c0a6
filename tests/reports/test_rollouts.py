"""Records of rollouts: what is written is read, and no number comes to stand at another token."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rollout_records import HOSTILE, record

from spark_jax.data.records import (
    Aggregated,
    ParseFailure,
    Problem,
    Provenance,
    SamplingSettings,
    Solution,
    Verification,
    VerifiedSolution,
)
from spark_jax.reports import rollouts
from spark_jax.steps import token_offsets
from spark_jax.tasks.arithmetic_chains import base


def assert_same(one, other):
    assert dataclasses.replace(one, values={}) == dataclasses.replace(other, values={})
    assert one.values.keys() == other.values.keys()
    for name, array in one.values.items():
        assert other.values[name].dtype == array.dtype == np.float32
        np.testing.assert_array_equal(other.values[name], array)


def test_a_record_comes_back_as_it_was(tmp_path):
    texts = [HOSTILE, "\ud800 half a pair", "𝄞\u2028\0", ""]
    made = record(text=lambda b, t: texts[(b + t) % 4])
    made.values["cpr"][:3] = np.nan, np.inf, -np.inf
    path = rollouts.step_file(tmp_path, made.step)
    rollouts.write(path, made)
    assert_same(rollouts.read(path), made)
    assert rollouts.recorded_steps(tmp_path) == {7: path}
    assert [file.name for file in path.parent.iterdir()] == ["step_000007.npz"]


def test_recorded_steps_are_in_order(tmp_path):
    for step in (100, 5, 20):
        rollouts.write(rollouts.step_file(tmp_path, step), record(groups=1))
    assert list(rollouts.recorded_steps(tmp_path)) == [5, 20, 100]
    assert rollouts.recorded_steps(tmp_path / "none") == {}


def test_what_is_no_record_is_refused_by_name(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.zeros(2))
    rollouts.write(tmp_path / "whole.npz", record(groups=1))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:900])
    (tmp_path / "text.npz").write_text("{}")
    for name in ("other", "torn", "text"):
        with pytest.raises(ValueError, match=f"{name}.npz is no rollout record"):
            rollouts.read(tmp_path / f"{name}.npz")


def test_numbers_must_be_as_many_as_tokens():
    made = record(groups=1, size=2)
    with pytest.raises(ValueError, match=r"values\['cpr'\] has shape"):
        dataclasses.replace(made, values={"cpr": made.values["cpr"][:-1]})
    (group,) = made.groups
    short = dataclasses.replace(group.responses[1], steps=(0,))
    groups = (dataclasses.replace(group, responses=(group.responses[0], short)),)
    with pytest.raises(ValueError, match=r"response 1 has .* tokens"):
        dataclasses.replace(made, groups=groups)


def test_fewer_groups_keep_their_numbers():
    made = record(groups=3)
    fewer = made.first_groups(2)
    assert [group.problem_id for group in fewer.groups] == ["problem-0", "problem-1"]
    assert fewer.num_groups == 3
    for ours, all_of_it in zip(fewer.split_values(), made.split_values(), strict=False):
        for name, array in ours.items():
            np.testing.assert_array_equal(array, all_of_it[name])


def test_padding_is_left_out():
    padded = np.arange(12, dtype=np.float32).reshape(3, 4)
    flat = rollouts.flat_values({"x": padded}, [2, 0])  # of the first two rows alone
    np.testing.assert_array_equal(flat["x"], [0, 1])
    made = record(groups=1, size=3)
    lengths = [len(response.tokens) for response in made.responses]
    rows = np.zeros((3, max(lengths)), np.float32)
    for row, values in zip(rows, made.split_values(), strict=True):
        row[: len(values["cpr"])] = values["cpr"]
    np.testing.assert_array_equal(
        rollouts.flat_values({"cpr": rows}, lengths)["cpr"], made.values["cpr"]
    )


@given(st.text(max_size=30), st.lists(st.integers(0, 30), max_size=8))
def test_tokens_are_the_whole_text_whatever_the_offsets(text, ends):
    ends = sorted(min(end, len(text)) for end in ends)
    offsets = np.array(list(zip([0, *ends], ends, strict=False)), np.int32).reshape(-1, 2)
    pieces = rollouts.token_texts(text, offsets)
    assert len(pieces) == len(ends)
    assert not pieces or "".join(pieces) == text


def test_tokens_of_a_tokenizer():
    _, _, tokenizer = base.load()
    ids = tokenizer.encode(r"<think> <step> 1: 7 +5 =2 </step>", add_special_tokens=False)
    text, offsets = token_offsets(tokenizer, ids)
    pieces = rollouts.token_texts(text, offsets)
    assert "".join(pieces) == text
    assert [piece.strip() for piece in pieces] == text.split()


def test_bytes_of_one_character_are_one_text_and_empty_ones():
    offsets = np.array([(0, 1), (2, 3), (2, 3), (2, 3), (4, 5)], np.int32)
    assert rollouts.token_texts("a € b", offsets) == ("a", " €", "", "", " b")


# --- stage I -------------------------------------------------------------------------------------

TEXT = "<think> <step> a </step> so <step>a b</step> </think> <answer> \\boxed{ 1 } </answer>"
GOOD, BAD = Verification("good", (True, True), True), Verification("bad", (True, False), False)
FAILED = ParseFailure("no_steps", "gibberish")
MADE = Provenance("m", SamplingSettings(), 0, 0)


def verified(method, chosen, voted, samples=(GOOD, FAILED, BAD), guided=()):
    verification = None if chosen is None else (guided or samples)[chosen]
    item = Aggregated(method, verification, chosen, voted, voted and all(voted), None, 3, 2, "why")
    solution = Solution("p", 0, TEXT, ("a", "a b"), "1", (True, False), False)
    one = VerifiedSolution("p", 0, samples, guided, (item,), MADE)
    made = rollouts.from_stage1([Problem("p", "Why?", "1")], [solution], [one], method)
    (group,) = made.groups
    (response,) = group.responses
    assert (group.question, group.reference) == ("Why?", "1")
    return response


def test_steps_of_a_solution_are_pieces_with_their_tags():
    response = verified("step_consistency", 2, (True, False))
    assert "".join(response.tokens) == TEXT
    steps = {
        step: piece
        for piece, step in zip(response.tokens, response.steps, strict=True)
        if step >= 0
    }
    assert steps == {0: "<step> a </step>", 1: "<step>a b</step>"}


def test_votes_are_shown_where_there_are_any_and_all_samples():
    response = verified("step_consistency", 2, (True, False))
    assert (response.verdicts, response.overall) == ((1, -1), False)
    assert [(v.overall, v.failure) for v in response.verifications] == [
        (True, None), (None, "no_steps"), (False, None),
    ]  # fmt: skip
    assert response.chosen == {"step_consistency": 2}
    assert (response.correct, response.step_labels) == (False, (True, False))
    assert response.flags == ("step_reduction",)
    response = verified("single", 0, None)
    assert (response.verdicts, response.overall) == ((1, 1), True)
    response = verified("outcome_consistency", None, None)
    assert (response.verdicts, response.overall, response.chosen) == ((), None, {})


def test_guided_samples_stand_behind_the_others():
    response = verified("reference_guided", 1, None, samples=(GOOD,) * 2, guided=(GOOD, BAD))
    assert response.chosen == {"reference_guided": 3}
    assert response.verifications[3].text == "bad"


def test_a_solution_that_was_not_verified_is_shown_without():
    solution = Solution("q", 0, "no steps", (), None)
    (group,) = rollouts.from_stage1([], [solution], [], "single").groups
    assert (group.problem_id, group.question, group.reference) == ("q", "", None)
    assert group.responses[0].tokens == ("no steps",)
    assert group.responses[0].verifications == ()
