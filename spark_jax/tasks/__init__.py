"""Tasks by name: where problems come from, how they speak, and what is known about them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from spark_jax.data.formats import TextFormat
from spark_jax.data.records import Example, Problem, Solution
from spark_jax.response_format import valid_part
from spark_jax.steps import StepSpan, blank_line_steps, numbered_steps, tagged_steps
from spark_jax.tasks.problem_sets import PROBLEM_SETS, DataOptions, Split, splits

REASONING_GYM = "reasoning_gym"  # the name before the colon

STEP_SPLITTERS: dict[str, Callable[[str], list[StepSpan]]] = {
    "tagged": tagged_steps,
    "numbered": numbered_steps,
    "paragraphs": blank_line_steps,
}

Labels = tuple[tuple[bool, ...] | None, bool | None]


@dataclasses.dataclass(frozen=True)
class TaskOptions(DataOptions):
    """What a task is made of and how it speaks. None is the task's own choice.

    Attributes:
        prompt_dir: a folder with prompt files of your own (`configs/prompts/README.md`).
        split_steps: what a step is, a name in `STEP_SPLITTERS`.
        generator: of `reasoning_gym:<dataset>`: settings of that dataset, such as
            `{"min_terms": 2}`.
    """

    prompt_dir: str | None = None
    split_steps: str | None = None
    generator: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """A source of problems.

    Attributes:
        problems: (number or None for all, seed, split "train" or "eval") -> problems. The splits
            share none; the same arguments give the same problems.
        text_format: prompts and readers.
        labels: (problem, response text) -> (a label per step, is the answer right), None where it
            is not known. The ground truth, for evaluation only.
        has_references: whether problems have an answer.
        data_counts: (split) -> what was found in its data and what was skipped, as metrics; {} for
            a task that makes its problems.
        examples: (number, seed, text format) -> examples of its formats for a first fine-tuning;
            None where it has none.
    """

    name: str
    problems: Callable[[int | None, int, Split], list[Problem]]
    text_format: TextFormat
    labels: Callable[[Problem, str], Labels]
    has_references: bool = True
    data_counts: Callable[[Split], dict[str, int]] = lambda split: {}
    examples: Callable[[int, int, TextFormat], list[Example]] | None = None


def load(name: str, options: TaskOptions | None = None) -> Task:
    """The task of that name. ValueError, with the choices, for any other, and for options that the
    task does not read."""
    options = options or TaskOptions()
    head, colon, dataset = name.partition(":")
    if colon and head == REASONING_GYM:
        return _reasoning_gym(dataset, options)
    if name not in TASKS:
        raise ValueError(f"task={name!r} is unknown; choose one of {choices()}")
    return TASKS[name](options)


def known(name: str) -> bool:
    """Whether `load` has a task of that name. Of reasoning-gym's, any name is taken for known."""
    return name in TASKS or name.startswith(f"{REASONING_GYM}:")


def choices() -> list[str]:
    """The names of all tasks."""
    return [*sorted(TASKS), f"{REASONING_GYM}:<dataset>"]


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


def step_labels(
    task: Task, problems: Sequence[Problem], texts: Sequence[str], num_steps: int
) -> np.ndarray | None:
    """[B, K] int8: which of the first K = `num_steps` steps of each response are right (+1) and
    wrong (−1), 0 where there is none, for evaluation only. None for a task that does not know."""
    known = [task.labels(problem, text)[0] for problem, text in zip(problems, texts, strict=True)]
    if any(labels is None for labels in known):
        return None
    truth = np.zeros((len(known), num_steps), np.int8)
    for row, labels in zip(truth, known, strict=True):
        signs = np.where(np.array(labels, bool), 1, -1)[:num_steps]
        row[: len(signs)] = signs
    return truth


def choose(problems: Sequence[Problem], num: int | None, seed: int, what: str) -> list[Problem]:
    """`num` of the problems, drawn by the seed; None: all of them, in their order.

    Who is drawn depends on seed and ids alone: a larger `num` extends the list, and problems added
    or taken away elsewhere change nothing but their own places.

    Raises ValueError for more problems than there are, naming `what` they are of.
    """
    if num is None:
        return list(problems)
    if not 0 <= num <= len(problems):
        raise ValueError(
            f"{what}: num={num} problems asked for, there are {len(problems)}; None means all"
        )

    def rank(problem: Problem) -> bytes:
        return hashlib.blake2b(f"{seed}/{problem.id}".encode(), digest_size=16).digest()

    return sorted(problems, key=rank)[:num]


def refuse_options(name: str, options: TaskOptions, reads: Sequence[str] = ()) -> None:
    """ValueError naming the options that were given and that the task, which reads `reads` alone,
    would ignore."""
    defaults = TaskOptions()
    given = [
        field.name
        for field in dataclasses.fields(TaskOptions)
        if getattr(options, field.name) != getattr(defaults, field.name)
    ]
    ignored = sorted(set(given) - set(reads))
    if ignored:
        raise ValueError(
            f"task {name!r} does not read task_options {ignored}; it reads {sorted(reads)}"
        )


def canonical(options: TaskOptions, *, rubric: bool = False) -> TextFormat:
    """The format for real text with the prompts and the steps that the options name."""
    from spark_jax.verification.prompts import canonical_format, rubric_format

    split_steps = options.split_steps or "tagged"
    if split_steps not in STEP_SPLITTERS:
        raise ValueError(
            f"split_steps={split_steps!r} is unknown; choose one of {sorted(STEP_SPLITTERS)}"
        )
    make = rubric_format if rubric else canonical_format
    return make(options.prompt_dir, STEP_SPLITTERS[split_steps])


def answer_labels(text_format: TextFormat) -> Callable[[Problem, str], Labels]:
    """Labels where only the reference answer is known, or nothing: no step labels."""

    def labels(problem: Problem, text: str) -> Labels:
        if problem.answer is None:
            return None, None
        answer = text_format.final_answer(valid_part(text))
        return None, text_format.same_answer(answer, problem.answer)

    return labels


def _arithmetic_chains(options: TaskOptions) -> Task:
    from spark_jax.tasks.arithmetic_chains import format as chains_format
    from spark_jax.tasks.arithmetic_chains import world

    refuse_options("arithmetic_chains", options)

    def problems(num: int | None, seed: int, split: Split) -> list[Problem]:
        if num is None:
            raise ValueError("task 'arithmetic_chains' makes its problems: say how many, not all")
        return world.problems(num, seed, split)

    def labels(problem: Problem, text: str) -> Labels:
        judged = world.judge(problem, text)
        return tuple(step.correct for step in judged.steps), judged.correct

    return Task("arithmetic_chains", problems, chains_format.FORMAT, labels)


def _word_problems(options: TaskOptions) -> Task:
    from spark_jax.tasks import word_problems

    refuse_options("word_problems", options, reads=("prompt_dir",))
    text_format = canonical(options)
    labels = functools.partial(word_problems.labels, text_format=text_format)
    return Task(
        "word_problems",
        word_problems.problems,
        text_format,
        labels,
        examples=word_problems.examples,
    )


def _problem_set(name: str, options: TaskOptions) -> Task:
    """A task of `PROBLEM_SETS`."""
    if options.generator:
        raise ValueError(f"task {name!r} does not read task_options.generator")
    rows = PROBLEM_SETS[name]
    text_format = canonical(options, rubric=rows.rubrics)
    split = splits(name, options)

    def problems(num: int | None, seed: int, which: Split) -> list[Problem]:
        return choose(split(which).problems, num, seed, f"task {name} ({which})")

    return Task(
        name,
        problems,
        text_format,
        answer_labels(text_format),
        has_references=bool(rows.answers) and options.references,
        data_counts=lambda which: split(which).counts(),
    )


def _reasoning_gym(dataset: str, options: TaskOptions) -> Task:
    """Any dataset of reasoning-gym (extra `tasks`), graded by its own `score_answer`."""
    from spark_jax.tasks import reasoning_gym_tasks as gym

    name = f"{REASONING_GYM}:{dataset}"
    refuse_options(name, options, reads=("prompt_dir", "split_steps", "generator"))
    source = gym.Source(dataset, dict(options.generator))
    text_format = gym.graded_by(source, canonical(options))

    def problems(num: int | None, seed: int, split: Split) -> list[Problem]:
        return gym.problems(source, num, seed, split)

    return Task(name, problems, text_format, answer_labels(text_format))


TASKS: dict[str, Callable[[TaskOptions], Task]] = {
    "arithmetic_chains": _arithmetic_chains,
    "word_problems": _word_problems,
    **{name: functools.partial(_problem_set, name) for name in PROBLEM_SETS},
}
