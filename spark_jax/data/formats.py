"""How a task speaks: the functions that turn records into prompts and texts back into records.

Stages I to III are written against `TextFormat` alone, so the same code runs on real text and on
the words of the embedded demonstration task. A format is data: plain functions in a dataclass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from spark_jax.data.records import ParseFailure, Problem, SamplingSettings, Verification

RewardKind = Literal["orm", "prm", "prm_cot"]
REWARD_KINDS: tuple[RewardKind, ...] = ("orm", "prm", "prm_cot")

# Whether two final answers are the same; None, the lack of an answer, equals nothing.
SameAnswer = Callable[[str | None, str | None], bool]


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """The prompts and texts of one task (method page, sections 1 to 3).

    Attributes:
        name: what the format is called in logs and records.
        solve_prompt: (problem) -> prompt of the generator and of the policy.
        split_steps: (response_text) -> character spans [start, end) of the steps, in order.
        final_answer: (response_text) -> content of the last `\\boxed{}`, stripped, or None.
        same_answer: (a, b) -> whether two answers are the same. Symmetric; None equals nothing.
        verify_prompt: (problem, solution_text, reference or None) -> prompt of the verifier. Must
            not read `problem.answer`: a reference is shown only where it is handed in.
        critique_prompt: (problem, solution_text, verification_text) -> prompt.
        merge_prompt: (problem, solution_text, verification_text, critique_text) -> prompt.
        parse_verification: (text, num_steps) -> Verification, or ParseFailure; never raises.
            `num_steps` None: whatever number of steps the text holds.
        reward_prompt: (kind, problem, solution_text) -> prompt of the reward model.
        reward_target: (kind, verification) -> the text a reward model is trained to give.
        parse_judgement: (kind, text, num_steps or None) -> Verification, or ParseFailure; never
            raises. An ORM gives no step verdicts: `verdicts == ()`.
        verdict_words: the two words at the overall-verdict position, (yes, no), for soft scores.
    """

    name: str
    solve_prompt: Callable[[Problem], str]
    split_steps: Callable[[str], list[tuple[int, int]]]
    final_answer: Callable[[str], str | None]
    same_answer: SameAnswer
    verify_prompt: Callable[[Problem, str, str | None], str]
    critique_prompt: Callable[[Problem, str, str], str]
    merge_prompt: Callable[[Problem, str, str, str], str]
    parse_verification: Callable[[str, int | None], Verification | ParseFailure]
    reward_prompt: Callable[[RewardKind, Problem, str], str]
    reward_target: Callable[[RewardKind, Verification], str]
    parse_judgement: Callable[[RewardKind, str, int | None], Verification | ParseFailure]
    verdict_words: tuple[str, str] = ("Yes", "No")


@runtime_checkable
class Sample(Protocol):
    """Text in, sampled text out: all that a stage knows of a model.

    Returns, per prompt, `samples_per_prompt` objects with `.text` (without the end token) and
    `.finished` (ended by itself rather than by the token limit), such as
    `text_generation.SampledText`. The same arguments give the same texts.
    """

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        samples_per_prompt: int,
        settings: SamplingSettings,
        seed: int,
    ) -> list[list[Any]]: ...
