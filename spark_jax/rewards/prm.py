"""Rewards from a generative reward model (SPARK, arXiv 2512.03244; method page, section 3).

`judge` asks the reward model about responses in training (`ask` about any text), `REWARDS` turns
judgements into r per response. No function here can see a reference answer: the reward model is
shown the problem without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int8, Int32

from spark_jax.data.formats import RewardKind, Sample, TextFormat
from spark_jax.data.records import ParseFailure, Problem, SamplingSettings
from spark_jax.response_format import (
    FORMAT_CHECKS,
    MAX_STEPS,
    MIN_STEPS,
    format_metrics,
    format_ok,
    step_count_ok,
    valid_part,
)
from spark_jax.rewards import outcome
from spark_jax.rewards.records import NOT_CALLED, Judgement, Reward, RewardInputs

# --- r from judgements ---------------------------------------------------------------------------


def overall_verdict(batch: RewardInputs) -> Float32[np.ndarray, "B"]:
    """1 where the reward model's overall verdict is Yes; a PRM gives it after its step verdicts."""
    yes = np.array([judgement.overall for judgement in _judgements(batch)], bool)
    return (yes & batch.format_ok).astype(np.float32)


def step_average(batch: RewardInputs) -> Float32[np.ndarray, "B"]:
    """0.4 · (share of steps judged correct) + 0.6 · (overall verdict is Yes).

    The step part is 0 where the response has fewer or more steps than `step_limits` allow, and
    where the reward model judged another number of steps than the response has.
    """
    shares = [
        np.mean(judgement.verdicts) if _steps_count(judgement, batch.step_limits) else 0.0
        for judgement in _judgements(batch)
    ]
    step_part = np.where(batch.format_ok, np.asarray(shares, np.float32), 0.0)
    return (0.4 * step_part + 0.6 * overall_verdict(batch)).astype(np.float32)


# A reward is one function of `RewardInputs` and one line here, which says what it needs.
REWARDS: dict[str, Reward] = {
    "orm": Reward(overall_verdict, judges=("orm",)),
    "process_aware_outcome": Reward(overall_verdict, judges=("prm", "prm_cot")),
    "step_average": Reward(step_average, judges=("prm", "prm_cot")),
    "rule_based": Reward(outcome.rule_based, references=True, grades=True),
    "majority_vote": Reward(outcome.majority_vote, grades=True),
    "random": Reward(outcome.random),
}


# --- asking the reward model ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Judged:
    """B responses judged.

    Attributes:
        judgements: one per response.
        verdicts: [B, K] +1 correct, −1 incorrect, 0 no verdict, for the advantages that use steps.
            A row is all 0 where the step part does not count (see `step_average`).
        num_steps: [B] the steps of each response.
        format_ok: [B] whether each response keeps the enforced checks.
        metrics: those of `format.format_metrics`, and shares: `reward_model/called` (of the
            responses); of the calls `reward_model/unparseable`, `reward_model/other_step_count` and
            `reward_model/yes`; and of the step verdicts given `reward_model/steps_correct`. A share
            of nothing is 0.
    """

    judgements: tuple[Judgement, ...]
    verdicts: Int8[np.ndarray, "B K"]
    num_steps: Int32[np.ndarray, "B"]
    format_ok: Bool[np.ndarray, "B"]
    metrics: dict[str, float]


def judge(
    sample: Sample | None,
    format: TextFormat,
    problems: Sequence[Problem],
    responses: Sequence[str],
    kind: RewardKind,
    settings: SamplingSettings,
    seed: int,
    *,
    checks: Sequence[str] = tuple(FORMAT_CHECKS),
    step_limits: tuple[int, int] = (MIN_STEPS, MAX_STEPS),
    max_steps: int = MAX_STEPS,
) -> Judged:
    """Ask a reward model about the valid part of every response that keeps the format.

    Args:
        sample: the reward model. Always called greedily, whatever `settings` say; of these only
            `max_new_tokens` matters. Not called at all if no response keeps the format. None asks
            nobody: for rewards that judge nothing, whose format checks and metrics count as well.
        problems: the problem of each response. Shown without its reference answer.
        kind: what the reward model was trained to say.
        checks: the format checks that are enforced, names of `FORMAT_CHECKS`.
        step_limits: fewest and most steps for which the verdicts count.
        max_steps: K, the width of `verdicts`; a response with more steps has none.

    A judgement that cannot be read is not Yes, and is counted. One that is in order but for its
    number of steps keeps its overall verdict; its step verdicts do not count.

    Raises ValueError if problems and responses differ in number, for an unknown check, and if
    `sample` does not give one text per prompt.
    """
    if len(problems) != len(responses):
        raise ValueError(f"judge: {len(problems)} problems for {len(responses)} responses")
    kept = np.array([format_ok(text, checks) for text in responses], bool)
    shown = [valid_part(text) for text in responses]
    num_steps = np.array([len(format.split_steps(text)) for text in shown], np.int32)
    judgements = [Judgement(kind, int(steps), False, (), NOT_CALLED) for steps in num_steps]
    if sample is not None:
        called = np.flatnonzero(kept).tolist()
        greedy = dataclasses.replace(settings, greedy=True)
        asked_about = [problems[b] for b in called]
        given = ask(sample, format, asked_about, [shown[b] for b in called], kind, greedy, seed)
        for b, (judgement,) in zip(called, given, strict=True):
            judgements[b] = judgement
    metrics = format_metrics(responses, format.split_steps, step_limits) if responses else {}
    return Judged(
        tuple(judgements),
        verdict_matrix(judgements, max_steps, step_limits),
        num_steps,
        kept,
        metrics | judgement_metrics(judgements),
    )


def ask(
    sample: Sample,
    format: TextFormat,
    problems: Sequence[Problem],
    texts: Sequence[str],
    kind: RewardKind,
    settings: SamplingSettings,
    seed: int,
    *,
    votes: int = 1,
) -> list[tuple[Judgement, ...]]:
    """`votes` judgements of each text, sampled as `settings` say, whatever the text's format.

    The reward model sees the text as it stands (cut it with `format.valid_part` first) and the
    problem, `problems[b]` for `texts[b]`, without its reference. It is not called for no texts.

    Raises ValueError if `sample` does not give `votes` texts per prompt.
    """
    prompts = [
        format.reward_prompt(kind, problem.blind(), text)
        for problem, text in zip(problems, texts, strict=True)
    ]
    if not prompts:
        return []
    samples = sample(prompts, samples_per_prompt=votes, settings=settings, seed=seed)
    given = [len(group) for group in samples]
    if given != [votes] * len(prompts):
        raise ValueError(
            f"sample gave {given} texts for {len(prompts)} prompts; votes={votes} were asked for "
            "of each"
        )
    return [
        tuple(_read(format, kind, said.text, len(format.split_steps(text))) for said in group)
        for text, group in zip(texts, samples, strict=True)
    ]


def verdict_matrix(
    judgements: Sequence[Judgement],
    max_steps: int,
    step_limits: tuple[int, int] = (MIN_STEPS, MAX_STEPS),
) -> Int8[np.ndarray, "B K"]:
    """The step verdicts as +1 / −1, padded with 0 to K = `max_steps`.

    A row is all 0 where the step part does not count, or where the response has more than K steps.
    """
    verdicts = np.zeros((len(judgements), max_steps), np.int8)
    for row, judgement in zip(verdicts, judgements):
        if _steps_count(judgement, step_limits) and judgement.num_steps <= max_steps:
            row[: judgement.num_steps] = np.where(judgement.verdicts, 1, -1)
    return verdicts


def judgement_metrics(judgements: Sequence[Judgement]) -> dict[str, float]:
    """The `reward_model/…` metrics of `Judged`."""
    calls = [judgement for judgement in judgements if judgement.called]
    verdicts = [verdict for judgement in calls for verdict in judgement.verdicts]
    unparseable = [judgement.failure is not None for judgement in calls]
    other_count = [
        judgement.kind != "orm" and judgement.failure is None and not judgement.judged_every_step
        for judgement in calls
    ]
    return {
        "reward_model/called": _share([judgement.called for judgement in judgements]),
        "reward_model/unparseable": _share(unparseable),
        "reward_model/other_step_count": _share(other_count),
        "reward_model/yes": _share([judgement.overall for judgement in calls]),
        "reward_model/steps_correct": _share(verdicts),
    }


def disagreement(
    judgements: Sequence[Judgement], correct: Bool[np.ndarray, "B"]
) -> dict[str, float]:
    """How a reward model differs from the truth, where evaluation has it (method page, section 3).

    `reward_model/disagreement` is a share of the responses it was asked about; `false_yes` a share
    of the wrong ones among them (what a policy can exploit), `false_no` of the right ones. For
    evaluation only: `correct` comes from references.
    """
    if len(judgements) != len(correct):
        raise ValueError(f"disagreement: {len(judgements)} judgements, {len(correct)} labels")
    asked = [(j.overall, bool(right)) for j, right in zip(judgements, correct) if j.called]
    return {
        "reward_model/disagreement": _share([yes != right for yes, right in asked]),
        "reward_model/false_yes": _share([yes for yes, right in asked if not right]),
        "reward_model/false_no": _share([not yes for yes, right in asked if right]),
    }


# --- helpers -------------------------------------------------------------------------------------


def _judgements(batch: RewardInputs) -> Sequence[Judgement]:
    if batch.judgements is None:
        raise ValueError("this reward reads judgements, and RewardInputs.judgements is None")
    return batch.judgements


def _steps_count(judgement: Judgement, step_limits: tuple[int, int]) -> bool:
    return judgement.judged_every_step and step_count_ok(judgement.num_steps, *step_limits)


def _read(format: TextFormat, kind: RewardKind, text: str, num_steps: int) -> Judgement:
    """Parsed once, whatever its number of steps; `Judgement` compares that with `num_steps`."""
    parsed = format.parse_judgement(kind, text, None)
    if isinstance(parsed, ParseFailure):
        return Judgement(kind, num_steps, False, (), parsed.reason, text)
    return Judgement(kind, num_steps, parsed.overall, parsed.verdicts, None, text)


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0
