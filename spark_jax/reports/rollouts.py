"""What a run leaves for the page: the responses of one step, token by token, and what was made of
them.

A record is one `.npz` file: the texts as JSON, the numbers as flat float32 arrays. Stage I's files
become such records too, without numbers per token.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from spark_jax.data.records import (
    Aggregated,
    ParseFailure,
    Problem,
    Solution,
    Verification,
    VerifiedSolution,
    from_json,
    to_json,
)
from spark_jax.response_format import format_checks
from spark_jax.rewards import monitor
from spark_jax.steps import STEP_CLOSE, STEP_OPEN
from spark_jax.verification.aggregate import AGGREGATIONS

FOLDER = "rollouts"  # in a run folder


@dataclasses.dataclass(frozen=True)
class Judged:
    """One verification or judgement of a response. `failure` is why it could not be read, if so:
    it then says neither Yes nor No and judges no step."""

    text: str
    overall: bool | None
    verdicts: tuple[bool, ...]
    failure: str | None = None
    soft_score: float | None = None


@dataclasses.dataclass(frozen=True)
class Response:
    """One response to a problem.

    Attributes:
        tokens: the text of each token; together they are the response, the stop token's included.
        steps: the step that each token belongs to, 0..K−1, −1 outside any.
        finished: whether it ended by itself rather than at the token limit.
        overall: the overall verdict, None where there is none.
        verdicts: of each step, +1 correct, −1 incorrect, 0 not judged.
        verifications: all that were made of it, N in stage I, at most one in RL.
        chosen: method → position of the verification that it chose.
        reward: None where none was given.
        checks: format check → whether it holds.
        flags: patterns of `rewards.monitor` that the response shows.
        trained: false where the update left its group out.
        correct: whether the answer is right; `step_labels` the truth of each step. None where
            unknown; nothing is trained on either.
    """

    tokens: tuple[str, ...]
    steps: tuple[int, ...]
    finished: bool
    overall: bool | None = None
    verdicts: tuple[int, ...] = ()
    verifications: tuple[Judged, ...] = ()
    chosen: dict[str, int] = dataclasses.field(default_factory=dict)
    reward: float | None = None
    checks: dict[str, bool] = dataclasses.field(default_factory=dict)
    flags: tuple[str, ...] = ()
    trained: bool = True
    correct: bool | None = None
    step_labels: tuple[bool, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """All responses to one problem; `reference` is its answer, if it has one."""

    problem_id: str
    question: str
    reference: str | None
    responses: tuple[Response, ...]


@dataclasses.dataclass(frozen=True)
class RolloutRecord:
    """The recorded groups of one step.

    Attributes:
        step: of training.
        advantage: the one that the run trains with; "" where none is.
        num_groups: how many the step had; the record may hold fewer.
        groups: those that were recorded.
        values: name → a float32 number for every token of all responses, one response after the
            other: `logprob`, `ref_logprob` (nats), `cpr` and advantages by name.

    Raises ValueError where tokens, steps and values differ in number.
    """

    step: int
    advantage: str
    num_groups: int
    groups: tuple[Group, ...]
    values: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        responses = self.responses
        for row, response in enumerate(responses):
            if len(response.tokens) != len(response.steps):
                raise ValueError(
                    f"response {row} has {len(response.tokens)} tokens, but steps for "
                    f"{len(response.steps)}"
                )
        total = sum(len(response.tokens) for response in responses)
        for name, array in self.values.items():
            if array.shape != (total,):
                raise ValueError(f"values[{name!r}] has shape {array.shape} for {total} tokens")

    @property
    def responses(self) -> list[Response]:
        return [response for group in self.groups for response in group.responses]

    def first_groups(self, number: int) -> RolloutRecord:
        """The record with its first groups alone."""
        groups = self.groups[:number]
        tokens = sum(len(r.tokens) for group in groups for r in group.responses)
        values = {name: array[:tokens] for name, array in self.values.items()}
        return dataclasses.replace(self, groups=groups, values=values)

    def split_values(self) -> list[dict[str, np.ndarray]]:
        """name → numbers of its tokens, for each response."""
        ends = np.cumsum([len(response.tokens) for response in self.responses])[:-1]
        split = {name: np.split(array, ends) for name, array in self.values.items()}
        return [
            {name: parts[row] for name, parts in split.items()}
            for row in range(len(self.responses))
        ]


# --- files ---------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], record: RolloutRecord) -> None:
    """Writes a record, whole or not at all; makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = to_json(dataclasses.replace(record, values={}))
    encoded = np.frombuffer(json.dumps(texts, allow_nan=False).encode("ascii"), np.uint8)
    temporary = path.with_suffix(".npz.tmp")
    with temporary.open("wb") as file:
        arrays = {f"values/{name}": array for name, array in record.values.items()}
        np.savez_compressed(file, allow_pickle=False, texts=encoded, **arrays)
    temporary.replace(path)


def read(path: str | os.PathLike[str]) -> RolloutRecord:
    """What `write` wrote. ValueError, with the file, for another."""
    try:
        with np.load(path, allow_pickle=False) as file:
            texts = json.loads(file["texts"].tobytes())
            values = {
                name.removeprefix("values/"): file[name] for name in file.files if name != "texts"
            }
        return dataclasses.replace(from_json(texts, RolloutRecord), values=values)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no rollout record: {error}") from error


def step_file(run: Path, step: int) -> Path:
    """Where a run keeps the record of a step."""
    return run / FOLDER / f"step_{step:06d}.npz"


def recorded_steps(run: Path) -> dict[int, Path]:
    """step → file of the records that a run left, in order."""
    files = sorted((run / FOLDER).glob("step_*.npz"))
    return {int(file.stem.removeprefix("step_")): file for file in files}


# --- making one ----------------------------------------------------------------------------------


def token_texts(text: str, offsets: Int[np.ndarray, "T 2"]) -> tuple[str, ...]:
    """A text cut into its tokens, white space with the token after it; "" for a token that holds
    no more than some bytes of a character that stands in the one before."""
    ends = np.maximum.accumulate(np.asarray(offsets, np.int64).reshape(-1, 2)[:, 1])
    if not len(ends):
        return ()
    ends[-1] = len(text)
    starts = [0, *ends[:-1].tolist()]
    return tuple(text[start:end] for start, end in zip(starts, ends.tolist()))


def flat_values(
    arrays: Mapping[str, Float[np.ndarray, "B T"]], lengths: Sequence[int]
) -> dict[str, np.ndarray]:
    """Arrays of B padded rows as the flat arrays of a record: the first `lengths[b]` of row b."""
    width = max((array.shape[1] for array in arrays.values()), default=0)
    kept = np.arange(width) < np.asarray(lengths)[:, None]
    return {name: np.asarray(a, np.float32)[: len(kept)][kept] for name, a in arrays.items()}


def from_stage1(
    problems: Sequence[Problem],
    solutions: Sequence[Solution],
    verified: Sequence[VerifiedSolution],
    method: str,
) -> RolloutRecord:
    """Stage I as a record: solutions by problem, their N verifications, what each method chose.

    Args:
        problems: those of the solutions, or some of them: of the others the id alone is known.
        solutions: with labels where they are known.
        method: whose verdicts are shown: those it voted, else of what it chose.
    """
    by_id = {problem.id: problem for problem in problems}
    records = {(v.problem_id, v.solution_index): v for v in verified}
    rows: dict[str, list[Response]] = {}
    for solution in solutions:
        record = records.get((solution.problem_id, solution.index))
        rows.setdefault(solution.problem_id, []).append(
            _verified_response(solution, record, method)
        )
    groups = []
    for problem_id, responses in rows.items():
        problem = by_id.get(problem_id, Problem(problem_id, ""))
        groups.append(Group(problem_id, problem.question, problem.answer, tuple(responses)))
    return RolloutRecord(0, "", len(groups), tuple(groups), {})


def _verified_response(
    solution: Solution, record: VerifiedSolution | None, method: str
) -> Response:
    pieces, steps = _pieces(solution.text, solution.steps)
    samples = (*record.samples, *record.reference_samples) if record else ()
    aggregated = {item.method: item for item in record.aggregated} if record else {}
    overall, verdicts = _verdicts(aggregated.get(method))
    guided = len(record.samples) if record else 0  # these stand behind the others
    return Response(
        tokens=pieces,
        steps=steps,
        finished=solution.finished,
        overall=overall,
        verdicts=tuple(1 if verdict else -1 for verdict in verdicts),
        verifications=tuple(_said(sample) for sample in samples),
        chosen={
            name: item.chosen + (guided if AGGREGATIONS[name].reference else 0)
            for name, item in aggregated.items()
            if item.chosen is not None
        },
        checks=format_checks(solution.text),
        flags=monitor.flags(solution.text, len(solution.steps)),
        correct=solution.correct,
        step_labels=solution.step_labels,
    )


def _verdicts(item: Aggregated | None) -> tuple[bool | None, Sequence[bool]]:
    """What a method says of a solution: what was voted, where it votes, else what it chose."""
    if item is None or item.verification is None:
        return None, ()
    voted, chosen = item.voted_overall, item.verification
    return (
        chosen.overall if voted is None else voted,
        chosen.verdicts if item.voted_verdicts is None else item.voted_verdicts,
    )


def _pieces(text: str, contents: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The text in pieces, each step with its tags one of them, and the step of each piece."""
    pieces, steps, position = [], [], 0
    for number, content in enumerate(contents):
        block = re.compile(rf"({STEP_OPEN}\s*)?{re.escape(content)}(\s*{STEP_CLOSE})?")
        if (found := block.search(text, position)) is None:
            continue
        pieces += [text[position : found.start()], found.group()]
        steps += [-1, number]
        position = found.end()
    pieces.append(text[position:])
    steps.append(-1)
    kept = [(piece, step) for piece, step in zip(pieces, steps) if piece]
    return tuple(piece for piece, _ in kept), tuple(step for _, step in kept)


def _said(sample: Verification | ParseFailure) -> Judged:
    if isinstance(sample, ParseFailure):
        return Judged(sample.text, None, (), sample.reason)
    return Judged(sample.text, sample.overall, sample.verdicts)
