"""SPARK stage I from problems to aggregated verifications (arXiv 2512.03244; method page, section
1).

Both functions sample in chunks of problems and append each finished chunk to a JSON-lines file, as
`data.resumable` says: a run that was killed, wherever that was, is continued by calling the
function again.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from spark_jax.data.formats import Sample, TextFormat
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
from spark_jax.data.resumable import (
    Chunk,
    OnProgress,
    content_seed,
    continue_file,
    in_chunks,
    provenance,
)
from spark_jax.steps import step_texts
from spark_jax.verification.aggregate import AGGREGATIONS, aggregate
from spark_jax.verification.critique import critique_and_merge


def generate_solutions(
    sample: Sample,
    problems: Sequence[Problem],
    text_format: TextFormat,
    *,
    samples_per_problem: int = 8,
    settings: SamplingSettings,
    seed: int,
    path: str | os.PathLike[str],
    model: str,
    chunk_size: int = 32,
    on_progress: OnProgress | None = None,
) -> list[Solution]:
    """Sample M solutions per problem and write them to `path`, or continue the file that is there.

    Args:
        sample: the generator (`data.formats.Sample`).
        problems: with different ids. The reference answers are not read.
        text_format: the task's prompts and readers.
        samples_per_problem: M.
        settings: of the generator (the paper: temperature 0.7).
        seed: of the stage.
        path: the JSON-lines file of `Solution` records.
        model: the generator's name, for provenance.
        chunk_size: problems per call of `sample`; it enters the seeds, as it decides what is
            sampled together.
        on_progress: called with (problems done, problems in all) at the start and after each chunk.

    Returns:
        All solutions, problem by problem, without ground truth (`step_labels` and `correct` None).

    Raises:
        ValueError: equal ids, or a file at `path` that another call with other arguments wrote.
    """
    _require_different([problem.id for problem in problems], "problem id")

    def make(chunk: Chunk) -> list[Solution]:
        prompts = [text_format.solve_prompt(problem.blind()) for problem in chunk.members]
        seed = chunk.provenance.sample_seed
        texts = _sample_all(sample, prompts, samples_per_problem, settings, seed)
        return [
            _read_solution(text_format, problem, index, text, chunk.provenance)
            for problem, samples in zip(chunk.members, texts)
            for index, text in enumerate(samples)
        ]

    return continue_file(
        path,
        Solution,
        [
            Chunk(
                members=chunk,
                keys=[(problem.id, i) for problem in chunk for i in range(samples_per_problem)],
                provenance=provenance(model, settings, seed, "generate", _content(chunk)),
            )
            for chunk in in_chunks(problems, chunk_size)
        ],
        make,
        lambda record: (record.problem_id, record.index),
        on_progress=on_progress,
    )


def verify_solutions(
    sample: Sample,
    problems: Sequence[Problem],
    solutions: Sequence[Solution],
    text_format: TextFormat,
    *,
    methods: Sequence[str],
    samples_per_solution: int = 16,
    settings: SamplingSettings,
    seed: int,
    path: str | os.PathLike[str],
    model: str,
    chunk_size: int = 8,
    on_progress: OnProgress | None = None,
) -> list[VerifiedSolution]:
    """Sample N verifications of every solution, aggregate them by every method, write to `path`.

    All methods share the same N samples, but for `reference_guided`, for which N more are sampled
    with the reference in the prompt; no other method can see an answer, for the prompts of the
    others are made of problems whose answer has been taken out. A solution in which no step is
    found is not verified (reason "no_steps"); a problem without a reference has no guided
    verification (reason "no_reference").

    Args:
        sample: the verifier (`data.formats.Sample`).
        problems: those that the solutions belong to, and maybe others.
        solutions: grouped by problem; the file keeps their order.
        text_format: the task's prompts and readers.
        methods: names in `aggregate.AGGREGATIONS`.
        samples_per_solution: N.
        settings: of the verifier (the paper: temperature 0.8, top-p 0.95). Critique and merge are
            greedy with the same token limit.
        seed: of the stage.
        path: the JSON-lines file of `VerifiedSolution` records.
        model: the verifier's name, for provenance.
        chunk_size: problems per call of `sample`; it enters the seeds.
        on_progress: called with (problems done, problems in all) at the start and after each chunk.

    Returns:
        One record per solution, in order.

    Raises:
        ValueError: an unknown method, a solution of an unknown problem, a problem's solutions not
            standing together, or a file at `path` that a call with other arguments wrote.
    """
    _require_known(methods)
    by_id = {problem.id: problem for problem in problems}
    groups = _by_problem(solutions, by_id)

    def make(chunk: Chunk) -> list[VerifiedSolution]:
        pairs = [(problem, solution) for problem, group in chunk.members for solution in group]
        made = chunk.provenance
        return _verify(
            sample, text_format, pairs, methods, samples_per_solution, settings, seed, made
        )

    def check(record: VerifiedSolution) -> str | None:
        counts = {len(item) for item in (record.samples, record.reference_samples)} - {0}
        if counts - {samples_per_solution}:
            return f"holds {sorted(counts)} samples per solution, not {samples_per_solution}"
        if [item.method for item in record.aggregated] != list(methods):
            return f"was aggregated by {[item.method for item in record.aggregated]}"
        return None

    return continue_file(
        path,
        VerifiedSolution,
        [
            Chunk(
                members=chunk,
                keys=[
                    (problem.id, solution.index) for problem, group in chunk for solution in group
                ],
                provenance=provenance(
                    model,
                    settings,
                    seed,
                    "verify",
                    _content([problem for problem, _ in chunk]),
                    [(solution.index, solution.text) for _, group in chunk for solution in group],
                ),
            )
            for chunk in in_chunks(groups, chunk_size)
        ],
        make,
        lambda record: (record.problem_id, record.solution_index),
        check,
        on_progress,
    )


def aggregate_first(
    record: VerifiedSolution, num_samples: int, methods: Sequence[str], *, seed: int
) -> VerifiedSolution:
    """What the methods would have made of the first `num_samples` of a solution's N samples.

    For methods without critique, which need no model; nothing is sampled. `seed` is the stage's.

    Raises ValueError for an unknown method, and for one with a critique.
    """
    _require_known(methods)
    critiqued = [method for method in methods if AGGREGATIONS[method].critique]
    if critiqued:
        raise ValueError(f"{critiqued} need a model for their critiques; choose voting methods")
    free, guided = record.samples[:num_samples], record.reference_samples[:num_samples]
    key = _aggregation_key(seed, record.problem_id, record.solution_index)
    aggregated = tuple(
        aggregate(guided if AGGREGATIONS[method].reference else free, method, key=key)
        for method in methods
    )
    return dataclasses.replace(
        record, samples=free, reference_samples=guided, aggregated=aggregated
    )


def _verify(
    sample: Sample,
    text_format: TextFormat,
    pairs: Sequence[tuple[Problem, Solution]],
    methods: Sequence[str],
    num_samples: int,
    settings: SamplingSettings,
    seed: int,
    provenance: Provenance,
) -> list[VerifiedSolution]:
    """Verify and aggregate the solutions of one chunk."""

    def verifications(reference: bool) -> list[tuple[Verification | ParseFailure, ...]]:
        return _sample_verifications(
            sample, text_format, pairs, reference, num_samples, settings, provenance.sample_seed
        )

    needs = {AGGREGATIONS[method].reference for method in methods}
    nothing: list[tuple[Verification | ParseFailure, ...]] = [()] * len(pairs)
    free = verifications(False) if False in needs else nothing
    guided = verifications(True) if True in needs else nothing
    chosen = [
        _choose(method, problem, solution, free[i], guided[i], seed)
        for i, (problem, solution) in enumerate(pairs)
        for method in methods
    ]
    critiqued = [i for i, item in enumerate(chosen) if AGGREGATIONS[item.method].critique]
    merged = critique_and_merge(
        sample,
        text_format,
        [(*_blind(pairs[i // len(methods)]), chosen[i]) for i in critiqued],
        settings=settings,
        seed=content_seed(provenance.sample_seed, "critique"),
    )
    for i, item in zip(critiqued, merged):
        chosen[i] = item
    return [
        VerifiedSolution(
            problem.id,
            solution.index,
            free[i],
            guided[i],
            tuple(chosen[i * len(methods) : (i + 1) * len(methods)]),
            provenance,
        )
        for i, (problem, solution) in enumerate(pairs)
    ]


def _sample_verifications(
    sample: Sample,
    text_format: TextFormat,
    pairs: Sequence[tuple[Problem, Solution]],
    reference: bool,
    num_samples: int,
    settings: SamplingSettings,
    sample_seed: int,
) -> list[tuple[Verification | ParseFailure, ...]]:
    """N verifications per solution; () for one without steps, or without the reference needed."""
    asked, prompts = [], []
    for i, (problem, solution) in enumerate(pairs):
        if solution.steps and (problem.answer is not None or not reference):
            shown = problem.answer if reference else None
            asked.append(i)
            prompts.append(text_format.verify_prompt(problem.blind(), solution.text, shown))
    seed = content_seed(sample_seed, "with reference" if reference else "without reference")
    texts = _sample_all(sample, prompts, num_samples, settings, seed)
    results: list[tuple[Verification | ParseFailure, ...]] = [()] * len(pairs)
    for i, samples in zip(asked, texts):
        num_steps = len(pairs[i][1].steps)
        results[i] = tuple(text_format.parse_verification(text.text, num_steps) for text in samples)
    return results


def _choose(
    method: str,
    problem: Problem,
    solution: Solution,
    free: Sequence[Verification | ParseFailure],
    guided: Sequence[Verification | ParseFailure],
    seed: int,
) -> Aggregated:
    """The choice of one method, drawn with the same key for all methods of a solution."""
    reference = AGGREGATIONS[method].reference
    key = _aggregation_key(seed, problem.id, solution.index)
    item = aggregate(guided if reference else free, method, key=key)
    if not solution.steps:
        return dataclasses.replace(item, reason="no_steps")
    if reference and problem.answer is None:
        return dataclasses.replace(item, reason="no_reference")
    return item


def _aggregation_key(seed: int, problem_id: str, solution_index: int) -> int:
    return content_seed(seed, "aggregate", problem_id, solution_index)


def _read_solution(
    text_format: TextFormat, problem: Problem, index: int, sampled: Any, provenance: Provenance
) -> Solution:
    text = sampled.text
    return Solution(
        problem_id=problem.id,
        index=index,
        text=text,
        steps=step_texts(text, text_format.split_steps(text)),
        answer=text_format.final_answer(text),
        finished=sampled.finished,
        provenance=provenance,
    )


def _sample_all(
    sample: Sample, prompts: Sequence[str], count: int, settings: SamplingSettings, seed: int
) -> list[list[Any]]:
    if not prompts:
        return []
    texts = sample(prompts, samples_per_prompt=count, settings=settings, seed=seed)
    if [len(samples) for samples in texts] != [count] * len(prompts):
        raise ValueError(
            f"`sample` gave {[len(samples) for samples in texts]} texts for {len(prompts)} "
            f"prompts, expected {count} each"
        )
    return texts


def _content(problems: Sequence[Problem]) -> list[tuple[str, str]]:
    return [(problem.id, problem.question) for problem in problems]


def _blind(pair: tuple[Problem, Solution]) -> tuple[Problem, Solution]:
    return pair[0].blind(), pair[1]


def _by_problem(
    solutions: Sequence[Solution], problems: dict[str, Problem]
) -> list[tuple[Problem, list[Solution]]]:
    groups: list[tuple[Problem, list[Solution]]] = []
    for solution in solutions:
        if solution.problem_id not in problems:
            raise ValueError(
                f"solution {solution.index} belongs to problem {solution.problem_id!r}, which is "
                "not among the problems given"
            )
        if not groups or groups[-1][0].id != solution.problem_id:
            groups.append((problems[solution.problem_id], []))
        groups[-1][1].append(solution)
    _require_different([problem.id for problem, _ in groups], "group of solutions of problem")
    for problem, group in groups:
        _require_different(
            [solution.index for solution in group], f"problem {problem.id!r}, solution index"
        )
    return groups


def _require_different(values: Sequence[Any], what: str) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{what} {value!r} occurs more than once")
        seen.add(value)


def _require_known(methods: Sequence[str]) -> None:
    unknown = [method for method in methods if method not in AGGREGATIONS]
    if unknown or not methods:
        raise ValueError(f"methods {unknown or 'empty'}: choose from {sorted(AGGREGATIONS)}")
    _require_different(methods, "method")
