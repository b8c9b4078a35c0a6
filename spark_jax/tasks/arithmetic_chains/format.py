"""How the embedded world speaks: its prompts, and the readers of its texts, as a `TextFormat`.

The prompts are beginnings of the rows of the pretraining corpus, so the pretrained base knows them:

    <q> 7 1: +5 2: *3 3: *7 <a> solution <eos> <verify> verification <eos>
    <q> 7 1: +5 2: *3 3: *7 <a> solution <eos> <reference> 2 Yes <verify> verification <eos>
    ... <verify> verification <eos> <critique> critique <eos> <merge> verification <eos>

A reward model's prompt ends with `<verdict>` (ORM: asks for one word), `<judge>` (PRM: one verdict
a step) or `<verify>` (PRM-CoT: the whole verification, as the base gives it).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from spark_jax.data.formats import RewardKind, TextFormat
from spark_jax.data.records import ParseFailure, Problem, Verification
from spark_jax.steps import tagged_steps
from spark_jax.tasks.arithmetic_chains import world
from spark_jax.tasks.arithmetic_chains.world import (
    ANSWER_NOW,
    CORRECT,
    CRITIQUE,
    EOS,
    INCORRECT,
    JUDGE,
    MERGE,
    NO,
    QUESTION,
    REFERENCE,
    VERDICT,
    VERIFY,
    YES,
)

REWARD_MARKERS: dict[RewardKind, str] = {"orm": VERDICT, "prm": JUDGE, "prm_cot": VERIFY}


def solve_prompt(problem: Problem) -> str:
    """`<q> 7 1: +5 2: *3 3: *7 <a>`. ValueError for a question that is no arithmetic chain."""
    world.read_question(problem.question)
    return f"{QUESTION} {problem.question} {ANSWER_NOW}"


def verify_prompt(problem: Problem, solution_text: str, reference: str | None = None) -> str:
    """Problem and solution; ends with `<verify>`. A reference, where one is handed in, is shown
    with whether the solution's answer agrees: a model this small cannot compare the two itself."""
    solved = _solved(problem, solution_text)
    if reference is None:
        return f"{solved} {VERIFY}"
    agrees = YES if same_answer(final_answer(solution_text), reference) else NO
    return f"{solved} {REFERENCE} {reference.strip()} {agrees} {VERIFY}"


def critique_prompt(problem: Problem, solution_text: str, verification_text: str) -> str:
    """Problem, solution and verification; ends with `<critique>`."""
    verified = f"{verify_prompt(problem, solution_text)} {_words(verification_text)} {EOS}"
    return f"{verified} {CRITIQUE}"


def merge_prompt(
    problem: Problem, solution_text: str, verification_text: str, critique_text: str
) -> str:
    """Problem, solution, verification and critique; ends with `<merge>`."""
    criticised = critique_prompt(problem, solution_text, verification_text)
    return f"{criticised} {_words(critique_text)} {EOS} {MERGE}"


def reward_prompt(kind: RewardKind, problem: Problem, solution_text: str) -> str:
    """Problem and solution; ends with the marker of the kind of reward model."""
    return f"{_solved(problem, solution_text)} {REWARD_MARKERS[_known(kind)]}"


def reward_target(kind: RewardKind, verification: Verification) -> str:
    """What a reward model of this kind is trained to say (method page, section 2)."""
    overall = YES if verification.overall else NO
    if _known(kind) == "orm":
        return overall
    if kind == "prm_cot":
        return _words(verification.text)
    verdicts = (
        f"{number}: {CORRECT if verdict else INCORRECT}"
        for number, verdict in enumerate(verification.verdicts, start=1)
    )
    return " ".join((*verdicts, VERDICT, overall))


def parse_verification(text: str, num_steps: int | None) -> Verification | ParseFailure:
    """Reads `1: 7 +5 =2 Correct ... <verdict> Yes`, exactly one line per step; as many lines as
    there are if `num_steps` is None. Never raises.

    Reasons: missing_overall, text_after_overall, no_steps, step_count_mismatch, malformed_step
    (misnumbered ones included). The calculation in a line is not checked: the verdict counts.
    """
    return _parse_lines(text, num_steps, words_per_line=5)


def parse_judgement(
    kind: RewardKind, text: str, num_steps: int | None
) -> Verification | ParseFailure:
    """Reads what a reward model of this kind says. Never raises on a text.

    Reasons as in `parse_verification`; an ORM's text is one word, else `missing_overall`, or
    `text_after_overall` where it goes on.
    """
    if _known(kind) == "orm":
        words = text.split()
        if not words or words[0] not in (YES, NO):
            return ParseFailure("missing_overall", text)
        if len(words) > 1:
            return ParseFailure("text_after_overall", text)
        return Verification(text, (), words[0] == YES)
    return _parse_lines(text, num_steps, words_per_line=5 if kind == "prm_cot" else 2)


def final_answer(response_text: str) -> str | None:
    """Content of the last `\\boxed{}`, stripped; None where there is none or nothing in it."""
    boxes = _BOX.findall(response_text)
    return (boxes[-1].strip() or None) if boxes else None


def same_answer(a: str | None, b: str | None) -> bool:
    """Whether two answers are the same text. None equals nothing."""
    return a is not None and b is not None and a.strip() == b.strip()


_BOX = re.compile(r"\\boxed\{([^{}]*)\}")


def _solved(problem: Problem, solution_text: str) -> str:
    """The end mark belongs to the solution: in the corpus it separates it from what follows."""
    return f"{solve_prompt(problem)} {_words(solution_text)} {EOS}"


def _parse_lines(
    text: str, num_steps: int | None, words_per_line: int
) -> Verification | ParseFailure:
    words = text.split()
    if VERDICT not in words:
        return ParseFailure("missing_overall", text)
    end = words.index(VERDICT)
    overall = words[end + 1 : end + 2]
    if overall not in ([YES], [NO]):
        return ParseFailure("missing_overall", text)
    if len(words) > end + 2:
        return ParseFailure("text_after_overall", text)
    numbers = sum(word[:-1].isdecimal() and word.endswith(":") for word in words[:end])
    if num_steps is not None and numbers != num_steps:
        return ParseFailure("step_count_mismatch" if numbers else "no_steps", text)
    if end != numbers * words_per_line:
        return ParseFailure("malformed_step", text)
    verdicts = []
    for number in range(1, numbers + 1):
        line = words[(number - 1) * words_per_line : number * words_per_line]
        verdict = _read_verdict(line, number)
        if verdict is None:
            return ParseFailure("malformed_step", text)
        verdicts.append(verdict)
    return Verification(text, tuple(verdicts), overall == [YES])


def _read_verdict(words: Sequence[str], number: int) -> bool | None:
    if len(words) == 5:
        line = world.read_verification_line(words, number)
        return None if line is None else line.verdict
    if words[0] != f"{number}:" or words[1] not in (CORRECT, INCORRECT):
        return None
    return words[1] == CORRECT


def _words(text: str) -> str:
    return " ".join(text.split())


def _known(kind: RewardKind) -> RewardKind:
    if kind not in REWARD_MARKERS:
        raise ValueError(f"reward kind {kind!r} is unknown; choose one of {sorted(REWARD_MARKERS)}")
    return kind


FORMAT = TextFormat(
    name="arithmetic_chains",
    solve_prompt=solve_prompt,
    split_steps=tagged_steps,
    final_answer=final_answer,
    same_answer=same_answer,
    verify_prompt=verify_prompt,
    critique_prompt=critique_prompt,
    merge_prompt=merge_prompt,
    parse_verification=parse_verification,
    reward_prompt=reward_prompt,
    reward_target=reward_target,
    parse_judgement=parse_judgement,
    verdict_words=(YES, NO),
)
