"""Tasks by name: where problems come from, how they speak, and what is known about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from spark_jax.data.formats import TextFormat
from spark_jax.data.records import Problem, Solution

Split = Literal["train", "eval"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A source of problems.

    Attributes:
        problems: (number, seed, split "train" or "eval") -> problems; the splits share none.
        text_format: prompts and readers.
        labels: (problem, response text) -> (a label per step, is the answer right). The ground
            truth, for evaluation only.
    """

    name: str
    problems: Callable[[int, int, Split], list[Problem]]
    text_format: TextFormat
    labels: Callable[[Problem, str], tuple[tuple[bool, ...], bool]]


def load(name: str) -> Task:
    """The task of that name. ValueError, with the choices, for any other."""
    if name not in TASKS:
        raise ValueError(f"task={name!r} is unknown; choose one of {sorted(TASKS)}")
    return TASKS[name]()


def with_labels(
    task: Task, problems: Sequence[Problem], solutions: Sequence[Solution]
) -> list[Solution]:
    """The solutions with their ground truth filled in, to evaluate what was made without it."""
    by_id = {problem.id: problem for problem in problems}
    labelled = []
    for solution in solutions:
        step_labels, correct = task.labels(by_id[solution.problem_id], solution.text)
        labelled.append(dataclasses.replace(solution, step_labels=step_labels, correct=correct))
    return labelled


def _arithmetic_chains() -> Task:
    from spark_jax.data.arithmetic_chains import format as chains_format
    from spark_jax.data.arithmetic_chains import world

    def labels(problem: Problem, text: str) -> tuple[tuple[bool, ...], bool]:
        judged = world.judge(problem, text)
        return tuple(step.correct for step in judged.steps), judged.correct

    return Task("arithmetic_chains", world.problems, chains_format.FORMAT, labels)


TASKS: dict[str, Callable[[], Task]] = {"arithmetic_chains": _arithmetic_chains}
