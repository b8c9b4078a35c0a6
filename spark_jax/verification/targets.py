"""What a reward model is shown and what it is trained to say (method page, section 2).

One aggregated verification gives three targets: ORM (`Yes`), PRM (`Step 1: Correct`, a line a step,
then the overall line) and PRM-CoT (the whole verification). Which texts these are is the format's
business; the canonical ones stand here.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

from spark_jax.data.formats import RewardKind, TextFormat
from spark_jax.data.records import (
    Aggregated,
    ParseFailure,
    Problem,
    Solution,
    Verification,
    VerifiedSolution,
)
from spark_jax.verification.parse import (
    overall_line,
    parse_verification,
    read_overall_line,
    verification_body,
)


@dataclasses.dataclass(frozen=True)
class TrainingPair:
    """One supervised example, as text: the loss is on the target alone."""

    prompt: str
    target: str
    kind: RewardKind
    problem_id: str
    solution_index: int


def training_pair(
    text_format: TextFormat,
    kind: RewardKind,
    problem: Problem,
    solution: Solution,
    verification: Verification,
) -> TrainingPair:
    """The example of one kind from one verification. The reference answer is not shown."""
    shown = problem.blind()
    return TrainingPair(
        text_format.reward_prompt(kind, shown, solution.text),
        text_format.reward_target(kind, verification),
        kind,
        problem.id,
        solution.index,
    )


def training_pairs(
    text_format: TextFormat,
    kind: RewardKind,
    method: str,
    problems: Sequence[Problem],
    solutions: Sequence[Solution],
    verified: Sequence[VerifiedSolution],
) -> tuple[list[TrainingPair], dict[str, int]]:
    """One example per solution that `method` found a verification for, in the order of `verified`.

    Returns the examples, and how many solutions gave none, by the reason of the aggregation.
    Raises ValueError naming a solution that was not aggregated by `method`, or is not known.
    """
    by_id = {problem.id: problem for problem in problems}
    by_key = {(solution.problem_id, solution.index): solution for solution in solutions}
    pairs: list[TrainingPair] = []
    without: Counter[str] = Counter()
    for record in verified:
        item = aggregated_by(record, method)
        if item.verification is None:
            without[item.reason] += 1
            continue
        key = (record.problem_id, record.solution_index)
        if record.problem_id not in by_id or key not in by_key:
            raise ValueError(f"verified solution {key}: no such problem or solution was given")
        problem, solution = by_id[record.problem_id], by_key[key]
        pairs.append(training_pair(text_format, kind, problem, solution, item.verification))
    return pairs, dict(without)


def aggregated_by(record: VerifiedSolution, method: str) -> Aggregated:
    """What `method` made of a solution; ValueError if it was not among the methods asked for."""
    for item in record.aggregated:
        if item.method == method:
            return item
    raise ValueError(
        f"solution {record.solution_index} of problem {record.problem_id!r} was not aggregated by "
        f"{method!r}, only by {[item.method for item in record.aggregated]}"
    )


def canonical_target(kind: RewardKind, verification: Verification) -> str:
    """The target text of each kind in the canonical format."""
    return _CANONICAL_TARGETS[kind](verification)


def parse_canonical_judgement(
    kind: RewardKind, text: str, num_steps: int | None
) -> Verification | ParseFailure:
    """Read a reward model's judgement; never raises on any text.

    An ORM must say Yes or No and nothing else; its `verdicts` are (). A PRM must give one line a
    step, numbered from 1 in order, and one overall line after them. A PRM-CoT is read as a
    verification. `num_steps` None takes whatever number of steps the judgement has.
    """
    return _CANONICAL_PARSERS[kind](text, num_steps)


def _orm_target(verification: Verification) -> str:
    return "Yes" if verification.overall else "No"


def _prm_target(verification: Verification) -> str:
    lines = [
        f"Step {number}: {'Correct' if verdict else 'Incorrect'}"
        for number, verdict in enumerate(verification.verdicts, start=1)
    ]
    return "\n".join([*lines, overall_line(verification.overall)])


def _prm_cot_target(verification: Verification) -> str:
    return verification_body(verification.text)


_ORM = re.compile(r"[\s*_`]*(yes|no)[\s*_`.!]*", re.IGNORECASE)
_STEP_LINE = re.compile(
    r"[\s*_`#>-]*step\s+([0-9]{1,6})\s*[:.]?[\s*_`:]*(correct|incorrect)[\s*_`.!]*", re.IGNORECASE
)


def _parse_orm(text: str, num_steps: int | None) -> Verification | ParseFailure:
    match = _ORM.fullmatch(text)
    if match is None:
        return ParseFailure("not_yes_or_no", text)
    return Verification(text, (), match[1].lower() == "yes")


def _parse_prm(text: str, num_steps: int | None) -> Verification | ParseFailure:
    """Failure reasons are those of `verification.parse.PARSE_FAILURES`."""
    lines = text.split("\n")
    steps = [(i, match) for i, line in enumerate(lines) if (match := _STEP_LINE.fullmatch(line))]
    overalls = [
        (i, verdict)
        for i, line in enumerate(lines)
        if (verdict := read_overall_line(line)) is not None
    ]
    if len(overalls) != 1:
        return ParseFailure("several_overalls" if overalls else "missing_overall", text)
    if num_steps is not None and len(steps) != num_steps:
        return ParseFailure("step_count_mismatch" if steps else "no_steps", text)
    if [int(match[1]) for _, match in steps] != list(range(1, len(steps) + 1)):
        return ParseFailure("steps_out_of_order", text)
    if steps and steps[-1][0] > overalls[0][0]:
        return ParseFailure("steps_after_overall", text)
    verdicts = tuple(match[2].lower() == "correct" for _, match in steps)
    return Verification(text, verdicts, overalls[0][1])


_CANONICAL_TARGETS = {"orm": _orm_target, "prm": _prm_target, "prm_cot": _prm_cot_target}
_CANONICAL_PARSERS = {"orm": _parse_orm, "prm": _parse_prm, "prm_cot": parse_verification}
