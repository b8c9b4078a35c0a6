"""Short arithmetic in words, for small language models: problems, their truth, and examples.

    A box holds 4 apples. Then 5 apples are added. Then the number of apples is doubled. Then 8
    apples are taken out. How many apples are in the box?

Three or four operations on small whole numbers. A response is a chain of equations, one a step, so
that the truth of every step of any text can be told. The examples teach a pretrained model the
formats of solutions and verifications, and to err now and then, so that there is something to
verify and to learn.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from itertools import zip_longest
from typing import NamedTuple

from spark_jax.data.formats import TextFormat
from spark_jax.data.records import Example, Problem, Verification
from spark_jax.response_format import final_answer, one_boxed
from spark_jax.steps import step_texts
from spark_jax.verification.parse import format_verification

OPERATIONS = (3, 4)  # per problem
# No value of a right solution is larger, or smaller than 2: facts that small models know.
LARGEST = 20
# Shares of wrong steps in the examples' solutions: in those to be imitated, so that a policy errs
# in more than one way and its groups differ; in every other of those to be verified, so that
# copying does not pay. The rest are right, so that the overall verdict is as often Yes as No.
WRONG_STEP = 0.15
WRONG_STEP_VERIFIED = 0.5
# How those differ from the right value or operand.
SLIPS = (-1, 1, -2, 2, -3, 3)

_THINGS = ("apples", "books", "coins", "eggs", "pencils", "shells", "stamps", "stones")
_PLACES = ("bag", "basket", "box", "chest", "drawer", "jar")
_TIMES = {"doubled": 2, "tripled": 3}
_OPERATION = re.compile(
    r"Then (?:(?P<added>\d+) \w+ are added|(?P<taken>\d+) \w+ are taken out"
    r"|the number of \w+ is (?P<times>doubled|tripled))\."
)
_START = re.compile(r"A \w+ holds (\d+) \w+\.")
_EQUATION = re.compile(r"(\d+) *([-+*]) *(\d+) *= *(-?\d+)(?!\d)")


class Operation(NamedTuple):
    """What is done to the number so far."""

    operator: str
    operand: int

    def __call__(self, value: int) -> int:
        if self.operator == "*":
            return value * self.operand
        return value + self.operand if self.operator == "+" else value - self.operand


class Chain(NamedTuple):
    """A problem as numbers."""

    start: int
    operations: tuple[Operation, ...]

    def answer(self) -> int:
        value = self.start
        for operation in self.operations:
            value = operation(value)
        return value


class Step(NamedTuple):
    """`left operator operand = value`, as a solution states it."""

    left: int
    operation: Operation
    value: int

    def __str__(self) -> str:
        return f"{self.left} {self.operation.operator} {self.operation.operand} = {self.value}"


def problems(num: int | None, seed: int, split: str) -> list[Problem]:
    """`num` distinct problems, their reference answers true.

    The split is a hash of the problem (a fifth is "eval"), so the two never overlap whatever the
    seeds. A larger `num` extends the list and changes nothing in it.

    Raises:
        ValueError: `num` is None (the problems are drawn, there is no "all") or negative, or the
            split is unknown.
    """
    if num is None or num < 0 or split not in ("train", "eval"):
        raise ValueError(f"word_problems: num={num}, split={split!r}; give a number, train or eval")
    rng = random.Random(f"word problems {split} {seed}")
    chosen: dict[str, Problem] = {}
    while len(chosen) < num:
        problem = draw(rng)
        if split_of(problem.question) == split:
            chosen.setdefault(problem.id, problem)
    return list(chosen.values())


def draw(rng: random.Random) -> Problem:
    """A random problem, of either split."""
    start = rng.randint(3, 12)
    operations: list[Operation] = []
    value, count = start, rng.choice(OPERATIONS)
    while len(operations) < count:
        operator = rng.choice("++--*")
        operand = rng.choice((2, 3)) if operator == "*" else rng.randint(2, 9)
        operation = Operation(operator, operand)
        if 2 <= operation(value) <= LARGEST:
            value = operation(value)
            operations.append(operation)
    chain = Chain(start, tuple(operations))
    question = write_question(chain, rng.choice(_THINGS), rng.choice(_PLACES))
    name = "".join(f"{operator}{operand}" for operator, operand in operations)
    return Problem(f"words-{start}{name}", question, answer=str(chain.answer()))


def split_of(question: str) -> str:
    """Where a problem belongs, by its numbers alone: the same chain in other words moves along."""
    digest = hashlib.blake2b(repr(read_question(question)).encode(), digest_size=4).digest()
    return "eval" if int.from_bytes(digest, "big") % 5 == 0 else "train"


def write_question(chain: Chain, things: str, place: str) -> str:
    """The problem in words."""
    sentences = [f"A {place} holds {chain.start} {things}."]
    for operator, operand in chain.operations:
        if operator == "*":
            times = next(word for word, factor in _TIMES.items() if factor == operand)
            sentences.append(f"Then the number of {things} is {times}.")
        else:
            done = "added" if operator == "+" else "taken out"
            sentences.append(f"Then {operand} {things} are {done}.")
    return " ".join([*sentences, f"How many {things} are in the {place}?"])


def read_question(question: str) -> Chain:
    """The numbers of `write_question`. ValueError, with the text, for any other."""
    start, found = _START.search(question), list(_OPERATION.finditer(question))
    if start is None or len(found) != question.count("Then "):
        raise ValueError(f"question {question!r} is none of the task word_problems")
    operations = []
    for match in found:
        if match["times"]:
            operations.append(Operation("*", _TIMES[match["times"]]))
        else:
            operator = "+" if match["added"] else "-"
            operations.append(Operation(operator, int(match["added"] or match["taken"])))
    return Chain(int(start[1]), tuple(operations))


def labels(problem: Problem, text: str, text_format: TextFormat) -> tuple[tuple[bool, ...], bool]:
    """The truth about any response: a label per step, and whether its one boxed answer is right.

    A step is correct if it states exactly one equation, and that is the operation that is due,
    applied to the value claimed before, with the right result. A step too many is incorrect.
    """
    chain = read_question(problem.question)
    stated = [read_step(step) for step in step_texts(text, text_format.split_steps(text))]
    verdicts = tuple(step is not None and step == due for step, due in with_due(chain, stated))
    right = one_boxed(text) and final_answer(text) == str(chain.answer())
    return verdicts, right


def with_due(chain: Chain, stated: list[Step | None]) -> Iterator[tuple[Step | None, Step | None]]:
    """Each step with the one that should stand there, given what was claimed before it.

    A step that cannot be read claims what was due; after the last operation nothing is due.
    """
    value = chain.start
    for step, operation in zip_longest(stated, chain.operations[: len(stated)]):
        due = None if operation is None else Step(value, operation, operation(value))
        yield step, due
        claimed = step or due
        value = claimed.value if claimed else value


def read_step(text: str) -> Step | None:
    """The one equation of a step; None where there is none or more than one."""
    found = _EQUATION.findall(text)
    if len(found) != 1:
        return None
    left, operator, operand, value = found[0]
    return Step(int(left), Operation(operator, int(operand)), int(value))


def write_solution(steps: list[Step], answer: int) -> str:
    """A response: one equation a step, and the boxed answer."""
    lines = "".join(f"<step> {step} </step>\n" for step in steps)
    return f"<think>\n{lines}</think>\n<answer> \\boxed{{{answer}}} </answer>"


def noisy_solution(chain: Chain, wrong: float, rng: random.Random) -> list[Step]:
    """Each step wrong with probability `wrong`, in its value or, one time in four, by a wrong
    operand; what follows goes on from what was claimed."""
    steps: list[Step] = []
    value = chain.start
    for operation in chain.operations:
        slip = 0
        if rng.random() < wrong:
            slip = rng.choice(SLIPS)
            if rng.random() < 0.25 and operation.operand + slip > 0:
                operation, slip = Operation(operation.operator, operation.operand + slip), 0
        steps.append(Step(value, operation, max(operation(value) + slip, 0)))
        value = steps[-1].value
    return steps


def write_verification(chain: Chain, steps: list[Step]) -> Verification:
    """The true verification of a solution of readable steps, in the canonical form."""
    parts, verdicts = [], []
    for step, due in with_due(chain, list(steps)):
        if step is None or due is None:
            raise ValueError(f"steps {steps} are not one to one with the operations of {chain}")
        title = f"{due.operation.operator} {due.operation.operand}"
        same = step == due
        parts.append((title, f"{due}" if same else f"{due}, but the step says {step}"))
        verdicts.append(same)
    overall = steps[-1].value == chain.answer()
    text = format_verification(parts, verdicts, overall)
    return Verification(text, tuple(verdicts), overall)


def examples(num: int, seed: int, text_format: TextFormat) -> list[Example]:
    """`num` supervised examples from train problems: a solution and two verifications in turn.

    Solutions err in `WRONG_STEP` of their steps; the verifications are true ones, of a right
    solution and of one that errs in `WRONG_STEP_VERIFIED`.
    """
    rng = random.Random(f"word problems examples {seed}")
    made = []
    for position, problem in enumerate(problems(num, seed, "train")):
        chain = read_question(problem.question)
        shown = problem.blind()
        solving = position % 3 == 0
        wrong = (WRONG_STEP, 0.0, WRONG_STEP_VERIFIED)[position % 3]
        steps = noisy_solution(chain, wrong, rng)
        solution = write_solution(steps, steps[-1].value)
        if solving:
            made.append(Example(text_format.solve_prompt(shown), solution))
        else:
            prompt = text_format.verify_prompt(shown, solution, None)
            made.append(Example(prompt, write_verification(chain, steps).text))
    return made
