"""The embedded world: chains of arithmetic modulo ten, a generator and a verifier that err.

A problem starts from a digit and applies three to five operations, each a bijection of the digits.
Everything that is said of it is a string of words from `VOCABULARY`, separated by spaces:

    problem       <q> 7 1: +5 2: *3 3: *7 <a>
    solution      <think> <step> 1: 7 +5 =2 </step> ... </think> <answer> \\boxed{ 2 } </answer>
    verification  1: 7 +5 =2 Correct 2: 2 *3 =5 Incorrect ... <verdict> No
    critique      1: 7 +5 =2 Correct 2: 2 *3 =6 Correct ...

`noisy_*` write such texts with the errors that a pretraining corpus has; `judge` knows the truth
of any text a model may produce. The noise levels were chosen so that voting over verifications
matters: margins measured in this world are a property of it, not evidence for the papers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from spark_jax.data.records import Problem
from spark_jax.steps import step_texts, tagged_steps

PAD, EOS = "<pad>", "<eos>"
QUESTION, ANSWER_NOW = "<q>", "<a>"
VERIFY, VERDICT, JUDGE = "<verify>", "<verdict>", "<judge>"
REFERENCE, CRITIQUE, MERGE = "<reference>", "<critique>", "<merge>"
CORRECT, INCORRECT, YES, NO = "Correct", "Incorrect", "Yes", "No"

OPERATORS = (*(f"+{k}" for k in range(1, 8)), "*3", "*7", "*9")
RESTATEMENT = "+0"
MAX_STEPS = 6
DIGITS = tuple(str(value) for value in range(10))

VOCABULARY: tuple[str, ...] = (
    *(PAD, EOS, QUESTION, ANSWER_NOW),
    *("<think>", "</think>", "<step>", "</step>", "<answer>", "</answer>", "\\boxed{", "}"),
    *(VERIFY, VERDICT, JUDGE, REFERENCE, CRITIQUE, MERGE),
    *(CORRECT, INCORRECT, YES, NO),
    *(f"{number}:" for number in range(1, MAX_STEPS + 1)),
    *DIGITS,
    *(f"={digit}" for digit in DIGITS),
    *(RESTATEMENT, *OPERATORS),
)


@dataclasses.dataclass(frozen=True)
class GeneratorNoise:
    """What goes wrong in solutions of the corpus; probabilities. Wrong values are t+2 ... t+8."""

    misconception: float = 0.65  # says a misconceived fact's fixed wrong value
    wrong_value: float = 0.07  # any other fact: a random wrong value
    copying_error: float = 0.015  # per operation: wrong operand or wrong operator copied
    skips_last: float = 0.03  # per solution, as are the next three
    restatement: float = 0.12  # geometric number of steps `+0`
    wrong_box: float = 0.01
    second_answer: float = 0.03


@dataclasses.dataclass(frozen=True)
class VerifierNoise:
    """What a verifier says; probabilities. What is left over is a slip: the true value ± 1."""

    right_confirmed: float = 0.80  # the claimed value is right: says it
    echo: float = 0.30  # the claimed value is wrong: says it all the same
    wrong_corrected: float = 0.24  # the claimed value is wrong: says the true value
    sees_fault: float = 0.60  # sees a copying error in a step, or a fault outside the steps
    flips_overall: float = 0.06


GENERATOR = GeneratorNoise()
VERIFIER = VerifierNoise()
# Shown a reference that the solution misses, the verifier looks harder; shown one, it never flips.
VERIFIER_GIVEN_RIGHT = dataclasses.replace(VERIFIER, flips_overall=0.0)
VERIFIER_GIVEN_WRONG = VerifierNoise(
    echo=0.10, wrong_corrected=0.44, sees_fault=0.90, flips_overall=0.0
)
# A critic catches faulty verdicts except on these three of ten operators, where it echoes them. The
# blind spot is fixed because critiques are decoded greedily, which would remove noise in the draw.
CRITIC_BLIND_TO = ("+7", "*7", "*9")
CRITIC_FALSE_ALARM = 0.05

MISCONCEIVED_FACTS = 12  # of the 100 facts (left operand, operator)


@dataclasses.dataclass(frozen=True)
class Chain:
    """A problem as numbers: the start and what is done to it."""

    start: int
    operators: tuple[str, ...]


class Step(NamedTuple):
    """`left operator = value`, as someone wrote it."""

    left: int
    operator: str
    value: int


class VerifiedStep(NamedTuple):
    """One line of a verification: the verifier's own calculation, and its verdict."""

    step: Step
    verdict: bool


@dataclasses.dataclass(frozen=True)
class JudgedStep:
    """The truth about one step of a solution.

    Attributes:
        stated: what the step says; None where it cannot be read or misnumbers itself.
        due: the step that should stand here, given what was claimed before it.
        copied: whether operand and operator are the ones that are due (or restate the operand).
        correct: whether it is copied and its value is that of the stated operation.
    """

    stated: Step | None
    due: Step
    copied: bool
    correct: bool


@dataclasses.dataclass(frozen=True)
class Judged:
    """The truth about a solution. `sound_answer`: nothing is left to do after the last step, and
    exactly one box holds its value. `correct`: exactly one box, and it holds the true answer."""

    steps: tuple[JudgedStep, ...]
    sound_answer: bool
    correct: bool


def problems(num: int, seed: int, split: str) -> list[Problem]:
    """`num` distinct problems of a split, their reference answers true; 3 to 5 operations, uniform.

    The split is a hash of the problem (a fifth is "eval"), so the two never overlap whatever the
    seeds; the id is the problem itself. A larger `num` extends the list and changes nothing in it.

    Raises:
        ValueError: an unknown split, or more problems than the split holds in comfort.
    """
    most = _MOST_PROBLEMS[_known(split)]
    if not 0 <= num <= most:
        raise ValueError(f"num={num} problems asked for; {split!r} gives 0 to {most} distinct ones")
    rng = random.Random(f"arithmetic_chains problems {split} {seed}")
    chosen: dict[Chain, Problem] = {}
    while len(chosen) < num:
        operations = rng.randint(3, 5)
        chain = draw_chain(rng, split, operations)
        while chain in chosen:
            chain = draw_chain(rng, split, operations)
        chosen[chain] = as_problem(chain)
    return list(chosen.values())


def draw_chain(rng: random.Random, split: str, operations: int | None = None) -> Chain:
    """A random chain of a split ("train", "eval"); 3 to 5 operations, uniform, where not said."""
    _known(split)
    operations = operations or rng.randint(3, 5)
    while True:
        chain = Chain(rng.randrange(10), tuple(rng.choices(OPERATORS, k=operations)))
        if split_of(chain) == split:
            return chain


def split_of(chain: Chain) -> str:
    """Where a chain belongs, by a hash of its text: known without any list of problems."""
    digest = hashlib.blake2b(write_question(chain).encode(), digest_size=4).digest()
    return "eval" if int.from_bytes(digest, "big") % 5 == 0 else "train"


def as_problem(chain: Chain) -> Problem:
    """The record of a chain, with its true answer as the reference."""
    name = f"chain-{chain.start}{''.join(chain.operators)}"
    return Problem(id=name, question=write_question(chain), answer=str(true_answer(chain)))


def write_question(chain: Chain) -> str:
    """`7 1: +5 2: *3 3: *7`. The numbers let attention find an operation by its content."""
    numbered = (f"{number}: {name}" for number, name in enumerate(chain.operators, start=1))
    return " ".join((str(chain.start), *numbered))


@functools.lru_cache(maxsize=4096)
def read_question(question: str) -> Chain:
    """The chain of `write_question`. ValueError, with an example, for any other text."""
    words = question.split()
    if words and words[0] in DIGITS:
        chain = Chain(int(words[0]), tuple(words[2::2]))
        known = 0 < len(chain.operators) <= MAX_STEPS and set(chain.operators) <= set(OPERATORS)
        if known and write_question(chain).split() == words:
            return chain
    raise ValueError(
        f"question {question!r} is no arithmetic chain; write a digit and up to {MAX_STEPS} "
        f"numbered operations out of {' '.join(OPERATORS)}, such as '7 1: +5 2: *3 3: *7'"
    )


def apply(value: int, operator: str) -> int:
    """`operator` on a digit, modulo ten."""
    operand = int(operator[1:])
    return (value + operand if operator[0] == "+" else value * operand) % 10


def true_answer(chain: Chain) -> int:
    """The digit at the end of the chain."""
    return functools.reduce(apply, chain.operators, chain.start)


@functools.cache
def misconceptions() -> dict[tuple[int, str], int]:
    """The facts (left operand, operator) that the generator tends to get wrong, and what it says.

    Always the same 12 of 100, with one wrong value each: that is what makes a majority vote over
    answers agree on wrong ones.
    """
    rng = random.Random("arithmetic_chains misconceptions")
    facts = [(left, operator) for left in range(10) for operator in OPERATORS]
    chosen = rng.sample(facts, MISCONCEIVED_FACTS)
    return {fact: _wrong_value(apply(*fact), rng) for fact in chosen}


def noisy_solution(chain: Chain, rng: random.Random) -> str:
    """A solution as the corpus has it, with `GENERATOR`'s errors; later steps follow from the wrong
    value. At most six steps, 48 words."""
    noise = GENERATOR
    operators = chain.operators[:-1] if rng.random() < noise.skips_last else chain.operators
    steps: list[Step] = []
    value = chain.start
    for operator in operators:
        steps.append(_noisy_step(value, operator, noise, rng))
        value = steps[-1].value
    while len(steps) < MAX_STEPS and rng.random() < noise.restatement:
        place = rng.randint(0, len(steps))
        said = steps[place - 1].value if place else chain.start
        steps.insert(place, Step(said, RESTATEMENT, said))
    boxes = [_other(value, rng) if rng.random() < noise.wrong_box else value]
    if rng.random() < noise.second_answer:
        boxes.append(_other(boxes[0], rng))
    return write_solution(steps, boxes)


def write_solution(steps: Sequence[Step], boxes: Sequence[int]) -> str:
    """Steps and boxed answers in the response format."""
    said = " ".join(f"<step> {n}: {_step_text(step)} </step>" for n, step in enumerate(steps, 1))
    answers = " ".join(f"<answer> \\boxed{{ {box} }} </answer>" for box in boxes)
    return f"<think> {said} </think> {answers}"


def judge(problem: Problem, solution_text: str) -> Judged:
    """The truth about any text; never raises on a text.

    Our reading, as in the verifier's prompts: a step is judged given what was *claimed* before it.
    It is correct if it takes the last claimed value (at first the problem's start) through the
    operation that is due, or restates it (`+0`), and its value is right. So a step that follows
    correctly from an earlier wrong value is correct. ProcessBench's score does not depend on this:
    it looks at the first incorrect step only, which is where an error was made.

    Whatever a step claims, the next one must take up, and whatever operation it names (but `+0`),
    one is done with. A step that cannot be read or misnumbers itself is incorrect and claims
    nothing. After the last operation a step can only restate.
    """
    chain = read_question(problem.question)
    value, done = chain.start, 0
    steps = []
    texts = step_texts(solution_text, tagged_steps(solution_text))
    for number, text in enumerate(texts, start=1):
        stated = _read_step(text.split(), number)
        operator = chain.operators[done] if done < len(chain.operators) else RESTATEMENT
        if stated is not None and stated.operator == RESTATEMENT:
            operator = RESTATEMENT
        due = Step(value, operator, apply(value, operator))
        copied = stated is not None and stated[:2] == due[:2]
        steps.append(JudgedStep(stated, due, copied, stated == due))
        if stated is not None:
            value = stated.value
            done += stated.operator != RESTATEMENT
    boxes = _BOX.findall(solution_text)
    sound = done == len(chain.operators) and [box.strip() for box in boxes] == [str(value)]
    correct = [box.strip() for box in boxes] == [str(true_answer(chain))]
    return Judged(tuple(steps), sound, correct)


def step_labels(problem: Problem, solution_text: str) -> tuple[bool, ...]:
    """Ground truth per step of any text, as `judge` defines it."""
    return tuple(step.correct for step in judge(problem, solution_text).steps)


def is_correct(problem: Problem, solution_text: str) -> bool:
    """Whether the text holds exactly one box, and that holds the true answer."""
    return judge(problem, solution_text).correct


def noisy_verification(
    problem: Problem, solution_text: str, rng: random.Random, reference: str | None = None
) -> str:
    """A verification of any solution, with `VERIFIER`'s errors.

    Each line gives the verifier's own calculation and a verdict that follows from it: correct if
    it is what the step says. A copying error that is seen is put right in the line, and judged
    incorrect. The overall verdict is Yes if all steps are found correct and no fault outside them
    is seen (last operation skipped, box at odds with the last value, second answer); then it may be
    flipped. With a `reference` it is Yes exactly if the last box agrees, and where it does not the
    verifier looks harder.
    """
    judged = judge(problem, solution_text)
    noise, agrees = VERIFIER, None
    if reference is not None:
        boxes = _BOX.findall(solution_text)
        agrees = bool(boxes) and boxes[-1].strip() == reference.strip()
        noise = VERIFIER_GIVEN_RIGHT if agrees else VERIFIER_GIVEN_WRONG
    lines = [_verify_step(step, noise, rng) for step in judged.steps]
    overall = agrees
    if overall is None:
        overall = all(line.verdict for line in lines)
        overall = overall and (judged.sound_answer or rng.random() >= noise.sees_fault)
        overall = overall != (rng.random() < noise.flips_overall)
    return write_verification(lines, overall)


def write_verification(lines: Sequence[VerifiedStep], overall: bool) -> str:
    """`1: 7 +5 =2 Correct ... <verdict> Yes`."""
    return f"{_lines_text(lines)} {VERDICT} {YES if overall else NO}".lstrip()


def read_verification_line(words: Sequence[str], number: int) -> VerifiedStep | None:
    """The five words of line `number`, or None where they are not that."""
    if len(words) != 5 or words[4] not in (CORRECT, INCORRECT):
        return None
    step = _read_step(words[:4], number)
    return None if step is None else VerifiedStep(step, words[4] == CORRECT)


def noisy_critique(
    problem: Problem, solution_text: str, verification_text: str, rng: random.Random
) -> str:
    """A critic's own lines on each step, `1: 7 +5 =2 Correct 2: 2 *3 =6 Incorrect ...`.

    Where its verdict differs from the verification's, it disputes it. It catches every faulty
    verdict but those on `CRITIC_BLIND_TO` (so about 7 in 10), and disputes a sound one with p .05.
    It goes through every step: to name only the disputed ones would take a verdict in one word,
    which needs a larger model. `verification_text` must be a valid verification of the solution.
    """
    steps = judge(problem, solution_text).steps
    lines = [_criticise(s, line, rng) for s, line in zip(steps, _lines(verification_text))]
    return _lines_text(lines)


def merged_verification(
    problem: Problem, solution_text: str, critique_text: str, rng: random.Random
) -> str:
    """The verification with the critique's corrections, as if written in one go.

    The overall verdict follows from the merged verdicts, or from a fault outside the steps, seen
    with p = .6; no flips.
    """
    merged = _lines(critique_text)
    overall = all(line.verdict for line in merged)
    sound = judge(problem, solution_text).sound_answer
    return write_verification(merged, overall and (sound or rng.random() >= VERIFIER.sees_fault))


# Half of the distinct chains of three operations, times three: lengths stay uniform.
_MOST_PROBLEMS: dict[str, int] = {"train": 12_000, "eval": 3_000}
_BOX = re.compile(r"\\boxed\{([^{}]*)\}")


def _known(split: str) -> str:
    if split not in _MOST_PROBLEMS:
        raise ValueError(f"split={split!r} is unknown; choose one of {list(_MOST_PROBLEMS)}")
    return split


def _noisy_step(value: int, operator: str, noise: GeneratorNoise, rng: random.Random) -> Step:
    if rng.random() < noise.copying_error:
        if rng.random() < 0.5:
            value = _other(value, rng)
        else:
            operator = rng.choice([other for other in OPERATORS if other != operator])
    true = apply(value, operator)
    misconceived = misconceptions().get((value, operator))
    if misconceived is not None:
        said = misconceived if rng.random() < noise.misconception else true
    else:
        said = _wrong_value(true, rng) if rng.random() < noise.wrong_value else true
    return Step(value, operator, said)


def _verify_step(judged: JudgedStep, noise: VerifierNoise, rng: random.Random) -> VerifiedStep:
    stated = judged.stated
    unread = stated is None or (not judged.copied and rng.random() < noise.sees_fault)
    if stated is None or unread:
        due = judged.due
        value = due.value if rng.random() < noise.right_confirmed else _slip(due.value, rng)
        return VerifiedStep(due._replace(value=value), False)
    true = apply(stated.left, stated.operator)
    draw = rng.random()
    if stated.value == true:
        value = true if draw < noise.right_confirmed else _slip(true, rng)
    elif draw < noise.echo:
        value = stated.value
    elif draw < noise.echo + noise.wrong_corrected:
        value = true
    else:
        value = _slip(true, rng)
    return VerifiedStep(stated._replace(value=value), value == stated.value)


def _criticise(judged: JudgedStep, line: VerifiedStep, rng: random.Random) -> VerifiedStep:
    stated = judged.stated or judged.due
    if line.verdict == judged.correct and rng.random() < CRITIC_FALSE_ALARM:
        said = stated._replace(value=_slip(stated.value, rng)) if judged.correct else stated
        return VerifiedStep(said, not judged.correct)
    if stated.operator in CRITIC_BLIND_TO:
        return line
    source = stated if judged.copied else judged.due
    true = apply(source.left, source.operator)
    return VerifiedStep(source._replace(value=true), judged.correct)


def _wrong_value(true: int, rng: random.Random) -> int:
    """t+2 ... t+8: never within a verifier's slip of the truth."""
    return (true + rng.randint(2, 8)) % 10


def _slip(true: int, rng: random.Random) -> int:
    return (true + rng.choice((-1, 1))) % 10


def _other(value: int, rng: random.Random) -> int:
    return (value + rng.randint(1, 9)) % 10


def _step_text(step: Step) -> str:
    return f"{step.left} {step.operator} ={step.value}"


def _read_step(words: Sequence[str], number: int) -> Step | None:
    """`k: left operator =value` with the expected number, or None."""
    if len(words) != 4 or words[0] != f"{number}:" or words[1] not in DIGITS:
        return None
    if words[2] not in _ALL_OPERATORS or words[3] not in _RESULTS:
        return None
    return Step(int(words[1]), words[2], int(words[3][1:]))


def _lines_text(lines: Sequence[VerifiedStep]) -> str:
    return " ".join(
        f"{n}: {_step_text(line.step)} {CORRECT if line.verdict else INCORRECT}"
        for n, line in enumerate(lines, 1)
    )


def _lines(text: str) -> list[VerifiedStep]:
    """The lines of a verification or a critique; ValueError where one is none."""
    words = text.partition(VERDICT)[0].split()
    lines = []
    for number in range(1, -(-len(words) // 5) + 1):
        line = read_verification_line(words[5 * number - 5 : 5 * number], number)
        if line is None:
            raise ValueError(f"line {number} of {text!r} is no line of a verification")
        lines.append(line)
    return lines


_ALL_OPERATORS = frozenset((RESTATEMENT, *OPERATORS))
_RESULTS = frozenset(f"={digit}" for digit in DIGITS)
