"""A policy on problems whose answers can be graded: avg@k, pass@k, maj@k (method page, section 3).

`sample_responses` fills a file that goes on where it stopped, `policy_scores` scores any responses:
also those to problems without references, of which it reports what is known.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from spark_jax.data.formats import SameAnswer, Sample, TextFormat
from spark_jax.data.records import Problem, Provenance, SamplingSettings
from spark_jax.data.resumable import Chunk, OnProgress, continue_file, in_chunks, provenance
from spark_jax.evaluation.grading import in_threads
from spark_jax.evaluation.intervals import Interval, bootstrap_interval, percentile_interval
from spark_jax.evaluation.pass_at_k import avg_at_k, maj_at_k, pass_at_k
from spark_jax.response_format import format_ok, valid_part

# The six of SPARK (arXiv 2512.03244): names of tasks.
BENCHMARKS = ("math500", "aime24", "aime25", "amc23", "olympiadbench", "minerva")

AnswerFrom = Literal["format", "last_boxed"]
ANSWER_FROM: tuple[AnswerFrom, ...] = ("format", "last_boxed")


@dataclasses.dataclass(frozen=True)
class Response:
    """One sampled response. `num_tokens` were generated, None where the sampler does not tell."""

    problem_id: str
    index: int
    text: str
    num_tokens: int | None
    finished: bool
    provenance: Provenance


class Answered(NamedTuple):
    """What is graded of a problem: the answers of its k responses, and the reference."""

    answers: Sequence[str | None]
    reference: str


class Graded(NamedTuple):
    correct: list[bool]  # of the k responses
    majority: bool  # whether the answer that most of them give is right


def sample_responses(
    sample: Sample,
    problems: Sequence[Problem],
    text_format: TextFormat,
    *,
    samples_per_problem: int,
    settings: SamplingSettings,
    seed: int,
    path: str | os.PathLike[str],
    model: str,
    chunk_size: int = 32,
    on_progress: OnProgress | None = None,
) -> list[list[Response]]:
    """k responses to each problem, in a JSON-lines file that is made or continued.

    Args:
        problems: with different ids. The reference answers are not read.
        samples_per_problem: k.
        model: its name, for provenance.
        chunk_size: problems per call of `sample`; it enters the seeds.
        on_progress: (problems done, problems in all).

    Raises ValueError for a file that another call wrote.
    """
    k = samples_per_problem

    def chunk(members: Sequence[Problem]) -> Chunk:
        prompts = [text_format.solve_prompt(problem.blind()) for problem in members]
        keys = [(problem.id, index) for problem in members for index in range(k)]
        return Chunk(list(zip(members, prompts)), keys, provenance(model, settings, seed, prompts))

    def make(chunk: Chunk) -> list[Response]:
        made = chunk.provenance
        groups = sample(
            [prompt for _, prompt in chunk.members],
            samples_per_prompt=k,
            settings=settings,
            seed=made.sample_seed,
        )
        return [
            Response(problem.id, index, said.text, _num_tokens(said), said.finished, made)
            for (problem, _), group in zip(chunk.members, groups, strict=True)
            for index, said in enumerate(group)
        ]

    rows = continue_file(
        path,
        Response,
        [chunk(members) for members in in_chunks(problems, chunk_size)],
        make,
        lambda record: (record.problem_id, record.index),
        on_progress=on_progress,
    )
    return [rows[start : start + k] for start in range(0, len(rows), k)]


def read_answer(text_format: TextFormat, text: str, answer_from: AnswerFrom) -> str | None:
    """The answer that counts in a response.

    "format", as in training: that in the valid part, None where the response breaks the format
    (`response_format.FORMAT_CHECKS`). "last_boxed", for models that were never taught the format:
    the last box of the whole text.
    """
    if answer_from == "last_boxed":
        return text_format.final_answer(text)
    return text_format.final_answer(valid_part(text)) if format_ok(text) else None


def policy_scores(
    text_format: TextFormat,
    problems: Sequence[Problem],
    responses: Sequence[Sequence[Any]],
    answer_from: AnswerFrom = "format",
    grade: Callable[[Sequence[Answered]], Sequence[Graded]] | None = None,
) -> dict[str, Any]:
    """How good k responses to each problem are, as JSON values.

    Args:
        responses: per problem k ≥ 1, each with `.text`, `.finished` and `.num_tokens` or
            `.token_ids`.
        answer_from: how answers are read (`read_answer`).
        grade: who compares answers; None: `grade_answers`, here and now.

    Returns: over the problems that have a reference, None where none has:
        accuracy: avg@k, {"estimate", "low", "high"} with its 95 % bootstrap interval over problems.
        pass@k, maj@k: means.
        problem_ids, correct_per_problem: each problem's share of right responses, None without a
            reference.
      over all responses:
        response_length: mean, in tokens; None where the sampler does not tell.
        format_kept, finished, answered: shares; `answered` has an answer to be graded.
        steps: mean number of steps.
      num_problems, num_with_reference, samples_per_problem (k); too_long: the problems that the
        model had no room for, whose empty responses count like any others.
    """
    k = len(responses[0])
    answers = [[read_answer(text_format, said.text, answer_from) for said in g] for g in responses]
    known = [row for row, problem in enumerate(problems) if problem.answer is not None]
    answered = [Answered(answers[row], problems[row].answer or "") for row in known]
    graded = list((grade or functools.partial(grade_answers, text_format.same_answer))(answered))
    shares = dict(zip(known, (float(np.mean(problem.correct)) for problem in graded), strict=True))
    said_all = [said for group in responses for said in group]
    lengths = [_num_tokens(said) for said in said_all]
    return {
        **_figures(graded, k),
        "response_length": None if None in lengths else _mean(lengths),
        "format_kept": _mean([format_ok(said.text) for said in said_all]),
        "finished": _mean([said.finished for said in said_all]),
        "answered": _mean([answer is not None for group in answers for answer in group]),
        "steps": _mean([len(text_format.split_steps(said.text)) for said in said_all]),
        "num_problems": len(problems),
        "num_with_reference": len(known),
        "too_long": sum(all(_num_tokens(said) == 0 for said in group) for group in responses),
        "samples_per_problem": k,
        "problem_ids": [problem.id for problem in problems],
        "correct_per_problem": [shares.get(row) for row in range(len(problems))],
    }


def grade_answers(same_answer: SameAnswer, problems: Sequence[Answered]) -> list[Graded]:
    """Compares each different answer to a problem with its reference, once; and the majority's."""
    if not problems:
        return []
    pairs = list(
        dict.fromkeys((a, problem.reference) for problem in problems for a in problem.answers)
    )
    same = dict(zip(pairs, in_threads(same_answer, *zip(*pairs)), strict=True))
    majority = maj_at_k([p.answers for p in problems], [p.reference for p in problems], same_answer)
    return [
        Graded([same[answer, problem.reference] for answer in problem.answers], bool(hit))
        for problem, hit in zip(problems, majority, strict=True)
    ]


def mean_accuracy(
    shares: Mapping[str, Sequence[float]],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The unweighted mean of benchmarks' accuracies, with its bootstrap interval.

    Problems are resampled within each benchmark. `shares`: benchmark -> share of right responses to
    each problem. Raises ValueError for no benchmarks.
    """
    if not shares:
        raise ValueError("mean_accuracy: no benchmarks")
    rng = np.random.default_rng(seed)
    draws = []
    for values in shares.values():
        # How often each different share is drawn is multinomial: no need to draw problems.
        different, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
        drawn = rng.multinomial(len(values), counts / len(values), size=resamples)
        draws.append(drawn @ different / len(values))
    estimate = _mean([np.mean(values) for values in shares.values()])
    return percentile_interval(estimate, np.mean(draws, axis=0), level)


def _figures(graded: Sequence[Graded], k: int) -> dict[str, Any]:
    if not graded:
        nothing = {"estimate": None, "low": None, "high": None}
        return {"accuracy": nothing, f"pass@{k}": None, f"maj@{k}": None}
    correct = np.array([problem.correct for problem in graded], bool)
    return {
        "accuracy": dataclasses.asdict(bootstrap_interval(avg_at_k(correct))),
        f"pass@{k}": _mean(pass_at_k(correct, k)),
        f"maj@{k}": _mean([problem.majority for problem in graded]),
    }


def _num_tokens(said: Any) -> int | None:
    ids = getattr(said, "token_ids", None)
    return getattr(said, "num_tokens", None) if ids is None else len(ids)


def _mean(values: Any) -> float:
    return float(np.mean(values))
