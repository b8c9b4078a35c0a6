import dataclasses
import logging

import pytest

from spark_jax.data.records import (
    ParseFailure,
    Problem,
    SamplingSettings,
    Solution,
    Verification,
    VerifiedSolution,
    read_jsonl,
)
from spark_jax.verification.aggregate import AGGREGATIONS
from spark_jax.verification.pipeline import generate_solutions, verify_solutions
from spark_jax.verification.prompts import CANONICAL

PROBLEMS = [Problem(f"p{i}", f"What is {i}+4?", str(i + 4)) for i in range(5)]
SETTINGS = SamplingSettings(temperature=0.8, top_p=0.95, max_new_tokens=300)
METHODS = tuple(AGGREGATIONS)


def generate(sample, path, problems=PROBLEMS, **changes):
    arguments = dict(samples_per_problem=3, settings=SETTINGS, seed=2, model="m", chunk_size=2)
    return generate_solutions(sample, problems, CANONICAL, path=path, **(arguments | changes))


def verify(sample, path, solutions, problems=PROBLEMS, **changes):
    arguments = dict(
        methods=METHODS, samples_per_solution=4, settings=SETTINGS, seed=2, model="v", chunk_size=2
    )
    return verify_solutions(
        sample, problems, solutions, CANONICAL, path=path, **(arguments | changes)
    )


@pytest.fixture
def solutions(fake_model, tmp_path):
    return generate(fake_model(), tmp_path / "solutions.jsonl")


def test_generated_solutions_are_read_as_the_format_says(fake_model, tmp_path):
    path = tmp_path / "solutions.jsonl"
    solutions = generate(fake_model(), path)
    assert read_jsonl(path, Solution) == solutions
    assert [(s.problem_id, s.index) for s in solutions] == [
        (p.id, i) for p in PROBLEMS for i in range(3)
    ]
    for solution in solutions:
        contents = [piece.partition("</step>")[0] for piece in solution.text.split("<step>")[1:]]
        assert list(solution.steps) == contents
        assert solution.answer == (solution.text.split("{")[1].split("}")[0] if contents else None)
        assert (solution.step_labels, solution.correct) == (None, None)
        assert (solution.provenance.model, solution.provenance.settings) == ("m", SETTINGS)
        assert solution.provenance.seed == 2
    assert len({s.provenance.sample_seed for s in solutions}) == 3  # one per chunk
    assert any(not s.steps for s in solutions)  # the fake model's odd case occurs


def test_verified_records_hold_all_samples_and_every_method(fake_model, tmp_path, solutions):
    path = tmp_path / "verified.jsonl"
    sample = fake_model()
    verified = verify(sample, path, solutions)
    assert read_jsonl(path, VerifiedSolution) == verified
    assert [(v.problem_id, v.solution_index) for v in verified] == [
        (s.problem_id, s.index) for s in solutions
    ]
    kinds = set()
    for solution, record in zip(solutions, verified):
        assert tuple(item.method for item in record.aggregated) == METHODS
        assert (record.provenance.model, record.provenance.settings) == ("v", SETTINGS)
        by_method = {item.method: item for item in record.aggregated}
        if not solution.steps:
            assert record.samples == record.reference_samples == ()
            assert {item.reason for item in record.aggregated} == {"no_steps"}
            continue
        assert len(record.samples) == len(record.reference_samples) == 4
        kinds |= {type(s) for s in record.samples}
        for item in record.aggregated:
            shared = record.reference_samples if "reference" in item.method else record.samples
            if item.verification is not None and item.merge != "merged":
                assert shared[item.chosen] == item.verification
            assert (item.critique is None) == (
                "critique" not in item.method or item.verification is None
            )
        for voter in ("outcome_consistency", "step_consistency"):
            plain, merged = by_method[voter], by_method[f"{voter}+meta_critique"]
            assert (plain.chosen, plain.voted_verdicts) == (merged.chosen, merged.voted_verdicts)
    assert kinds == {Verification, ParseFailure}
    merges = {item.merge for record in verified for item in record.aggregated}
    assert {"merged", "not_merged_mentions_critique"} <= merges
    # Two sampling calls per chunk (free, guided), then critiques and merges, greedy.
    assert [(n, s.greedy) for _, n, s, _ in sample.calls] == [
        (4, False),
        (4, False),
        (1, True),
        (1, True),
    ] * 3


def test_samples_do_not_depend_on_the_methods_asked_for(fake_model, tmp_path, solutions):
    every = verify(fake_model(), tmp_path / "every.jsonl", solutions)
    one = verify(fake_model(), tmp_path / "one.jsonl", solutions, methods=["step_consistency"])
    assert [record.samples for record in one] == [record.samples for record in every]
    position = METHODS.index("step_consistency")
    assert [r.aggregated[0] for r in one] == [r.aggregated[position] for r in every]
    assert all(record.reference_samples == () for record in one)
    guided = verify(
        fake_model(), tmp_path / "guided.jsonl", solutions, methods=["reference_guided"]
    )
    assert all(record.samples == () for record in guided)
    assert [r.reference_samples for r in guided] == [r.reference_samples for r in every]


def interruptions(content, numbers):
    """The boundaries of lines of these numbers, and tears at the beginning and at the end of each;
    each with the number of whole records before it."""
    cuts, start = {0: 0}, 0
    for number, line in enumerate(content.splitlines(keepends=True)):
        end = start + len(line)
        if number in numbers:
            torn = [start + 1, end - 2]
            cuts |= dict.fromkeys(torn, number) | dict.fromkeys([end - 1, end], number + 1)
        start = end
    return cuts


# Both continue by one function; verifying takes long, and is cut where a chunk ends and at the end.
@pytest.mark.parametrize(("stage", "numbers"), [("generate", range(15)), ("verify", (5, 14))])
def test_a_run_cut_anywhere_continues_to_the_same_file(
    fake_model, tmp_path, solutions, stage, numbers, monkeypatch
):
    monkeypatch.setattr("os.fsync", lambda fd: None)  # slow, and no part of the property

    def run(sample, path):
        if stage == "generate":
            return generate(sample, path)
        methods = ["step_consistency", "meta_critique", "reference_guided"]
        return verify(sample, path, solutions, methods=methods, samples_per_solution=2)

    whole, path, uninterrupted = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl", fake_model()
    records = run(uninterrupted, whole)
    content, calls = whole.read_bytes(), uninterrupted.calls
    for cut, num_whole in interruptions(content, numbers).items():
        path.write_bytes(content[:cut])
        sample = fake_model()
        assert run(sample, path) == records
        assert path.read_bytes() == content
        # Chunks of 6 records that stood there whole (the last has 3) were not sampled again.
        chunks_left = 3 - num_whole // 6 - (num_whole == 15)
        assert sample.calls == calls[len(calls) - chunks_left * (len(calls) // 3) :]


def test_a_run_that_dies_between_calls_continues(fake_model, tmp_path, solutions):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    verify(fake_model(), whole, solutions)
    died = 0
    for calls in (3, 5, 3, 7, 99):
        try:
            verify(fake_model(die_after=calls), path, solutions)
        except KeyboardInterrupt:
            died += 1
            assert whole.read_bytes().startswith(path.read_bytes() if path.exists() else b"")
    assert died == 4
    assert path.read_bytes() == whole.read_bytes()


def test_progress_counts_problems_and_starts_where_the_file_stands(fake_model, tmp_path):
    path, steps = tmp_path / "s.jsonl", []
    generate(fake_model(), path, on_progress=lambda done, total: steps.append((done, total)))
    assert steps == [(0, 5), (2, 5), (4, 5), (5, 5)]
    content = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(content[:7]))
    steps.clear()
    generate(fake_model(), path, on_progress=lambda done, total: steps.append((done, total)))
    assert steps == [(2, 5), (4, 5), (5, 5)]


def test_a_sampler_that_is_not_reproducible_is_reported(fake_model, tmp_path, caplog):
    path = tmp_path / "s.jsonl"
    generate(fake_model(), path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:1]))

    class Other(fake_model):
        def write(self, *arguments):
            return super().write(*arguments) + "!"

    caplog.set_level(logging.WARNING)
    solutions = generate(Other(), path)
    assert "not reproducible" in caplog.text
    assert [s.text.endswith("!") for s in solutions] == [False] + [True] * 14
    assert read_jsonl(path, Solution) == solutions


def test_no_method_but_reference_guided_reads_an_answer(fake_model, tmp_path):
    """Poisoned answers give identical files and prompts, and poison nothing but the ceiling."""
    poisoned = [dataclasses.replace(p, answer=f"POISON {i}") for i, p in enumerate(PROBLEMS)]
    absent = [dataclasses.replace(p, answer=None) for p in PROBLEMS]
    free = [method for method in METHODS if method != "reference_guided"]
    files, prompts = [], []
    for name, problems in (("true", PROBLEMS), ("poisoned", poisoned), ("absent", absent)):
        sample = fake_model()
        one, two = tmp_path / f"{name}-1.jsonl", tmp_path / f"{name}-2.jsonl"
        solutions = generate(sample, one, problems)
        verify(sample, two, solutions, problems, methods=free)
        files.append((one.read_bytes(), two.read_bytes()))
        prompts.append(sample.calls)
    assert files[0] == files[1] == files[2]
    assert prompts[0] == prompts[1] == prompts[2]
    everything = verify(sample := fake_model(), tmp_path / "all.jsonl", solutions, poisoned)
    shown = [p for asked, _, _, _ in sample.calls for p in asked if "POISON" in p]
    assert shown
    assert all("You are given the right answer" in p for p in shown)
    baseline = read_jsonl(tmp_path / "true-2.jsonl", VerifiedSolution)
    assert [r.samples for r in everything] == [r.samples for r in baseline]
    assert [r.aggregated[:-1] for r in everything] == [r.aggregated for r in baseline]


def test_no_format_function_is_handed_an_answer(fake_model, tmp_path):
    def refuse(function):
        def checked(problem, *rest):
            assert problem.answer is None
            return function(problem, *rest)

        return checked

    names = ("solve_prompt", "verify_prompt", "critique_prompt", "merge_prompt")
    watched = dataclasses.replace(
        CANONICAL, **{name: refuse(getattr(CANONICAL, name)) for name in names}
    )
    arguments = dict(settings=SETTINGS, seed=0, model="m")
    solutions = generate_solutions(
        fake_model(), PROBLEMS, watched, path=tmp_path / "1.jsonl", **arguments
    )
    verify_solutions(
        fake_model(),
        PROBLEMS,
        solutions,
        watched,
        methods=METHODS,
        path=tmp_path / "2.jsonl",
        **arguments,
    )


def test_a_problem_without_a_reference_has_no_guided_verification(fake_model, tmp_path, solutions):
    problems = [dataclasses.replace(PROBLEMS[0], answer=None), *PROBLEMS[1:]]
    verified = verify(
        fake_model(), tmp_path / "v.jsonl", solutions, problems, methods=["reference_guided"]
    )
    reasons = {}
    for solution, record in zip(solutions, verified):
        if solution.steps:
            reasons.setdefault(solution.problem_id, set()).add(record.aggregated[0].reason)
            assert len(record.reference_samples) == (0 if solution.problem_id == "p0" else 4)
        else:
            assert record.aggregated[0].reason == "no_steps"
    assert reasons == {p.id: {"first_valid"} for p in PROBLEMS} | {"p0": {"no_reference"}}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"seed": 9}, "seed=9"),
        ({"model": "other"}, "model='other'"),
        ({"settings": SamplingSettings()}, "temperature=1.0"),
        ({"chunk_size": 3}, "chunk_size"),
        ({"samples_per_problem": 2}, r"is of \('p0', 2\), expected \('p1', 0\)"),
        ({"problems": PROBLEMS[1:]}, r"is of \('p0', 0\)"),
        ({"problems": [*PROBLEMS[:4], Problem("p4", "changed")]}, ":13: .*sample_seed"),
        ({"problems": PROBLEMS[:4]}, ":13: the file holds 15 records, this call makes 12"),
    ],
)
def test_a_file_of_another_call_is_refused_and_left_alone(fake_model, tmp_path, changes, complaint):
    path = tmp_path / "s.jsonl"
    generate(fake_model(), path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=complaint):
        generate(fake_model(), path, **changes)
    assert path.read_bytes() == content


def test_verified_files_of_another_call_are_refused(fake_model, tmp_path, solutions):
    path = tmp_path / "v.jsonl"
    verify(fake_model(), path, solutions)
    with pytest.raises(ValueError, match="holds \\[4\\] samples per solution, not 2"):
        verify(fake_model(), path, solutions, samples_per_solution=2)
    with pytest.raises(ValueError, match="was aggregated by"):
        verify(fake_model(), path, solutions, methods=["single"])
    changed = [dataclasses.replace(solutions[0], text="<step>new</step>"), *solutions[1:]]
    with pytest.raises(ValueError, match="sample_seed"):
        verify(fake_model(), path, changed)


def test_bad_arguments_are_refused_before_anything_is_sampled(fake_model, tmp_path, solutions):
    sample, path = fake_model(), tmp_path / "x.jsonl"
    with pytest.raises(ValueError, match=r"methods \['vote'\]: choose from"):
        verify(sample, path, solutions, methods=["single", "vote"])
    with pytest.raises(ValueError, match="empty"):
        verify(sample, path, solutions, methods=[])
    with pytest.raises(ValueError, match="method 'single' occurs more than once"):
        verify(sample, path, solutions, methods=["single", "single"])
    with pytest.raises(ValueError, match="problem id 'p0' occurs more than once"):
        generate(sample, path, [*PROBLEMS, PROBLEMS[0]])
    with pytest.raises(ValueError, match="problem 'p4', which is not among"):
        verify(sample, path, solutions, PROBLEMS[:4])
    with pytest.raises(ValueError, match="'p0' occurs more than once"):
        verify(sample, path, [*solutions, solutions[0]])
    with pytest.raises(ValueError, match="chunk_size is 0"):
        generate(sample, path, chunk_size=0)
    with pytest.raises(ValueError, match="expected 3 each"):
        generate(lambda prompts, **_: [[] for _ in prompts], path)
    assert not path.exists()
    assert sample.calls == []
