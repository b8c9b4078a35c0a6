"""How good a generative reward model is, on solutions about which something is known.

Greedily and by vote over k samples, as ProcessBench asks (arXiv 2412.06559; method page, section
2), and by the soft score of its overall verdict. Any instruct model can be judged in the same way,
as a "verifier": it is then asked with the verification prompt.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from spark_jax.data.formats import REWARD_KINDS, RewardKind, Sample, TextFormat
from spark_jax.data.records import Problem, SamplingSettings, Solution, Verification
from spark_jax.evaluation import processbench
from spark_jax.evaluation.roc import area_under_roc
from spark_jax.prm.soft_score import soft_scores
from spark_jax.response_format import valid_part
from spark_jax.rewards.prm import ask

logger = logging.getLogger(__name__)

JudgeKind = Literal["orm", "prm", "prm_cot", "verifier"]
JUDGE_KINDS: tuple[JudgeKind, ...] = (*REWARD_KINDS, "verifier")
TOO_LONG = "too_long"  # why nothing was said about a solution whose prompt does not fit


@dataclasses.dataclass(frozen=True)
class Judge:
    """A model that judges solutions, and how it is asked.

    Attributes:
        sample: the model.
        text_format: how it is asked and read.
        kind: what it was trained to say; "verifier" is any model, asked with the verification
            prompt.
        settings: of the k samples; of the greedy judgement only `max_new_tokens` matters.
        votes: k. With more than 1, k judgements are sampled besides the greedy one.
        token_logprobs, tokenizer: as `soft_score.soft_scores` takes them, for soft scores. The
            function is called once per call of `judge_solutions`; it may cut its batch.
        fits: whether the model can read a prompt of that text. One that it cannot is not asked and
            counts as unreadable.

    Raises ValueError for votes without randomness, and half of what soft scores need.
    """

    sample: Sample
    text_format: TextFormat
    kind: JudgeKind
    settings: SamplingSettings
    votes: int = 1
    token_logprobs: Callable[[np.ndarray], Any] | None = None
    tokenizer: Any = None
    fits: Callable[[str], bool] = lambda prompt: True

    def __post_init__(self) -> None:
        if self.votes < 1 or (self.votes > 1 and self.settings.greedy):
            raise ValueError(
                f"votes={self.votes} with greedy={self.settings.greedy}: votes are at least 1, and "
                "more than one needs settings that sample (greedy=False)"
            )
        if (self.token_logprobs is None) != (self.tokenizer is None):
            raise ValueError(
                "soft scores need both token_logprobs and tokenizer; pass both or neither"
            )


@dataclasses.dataclass(frozen=True)
class Said:
    """One judgement as it was read. `failure` is why it could not be, else None; `num_tokens`
    were generated, None where the sampler does not tell."""

    text: str
    overall: bool
    verdicts: tuple[bool, ...]
    failure: str | None
    num_tokens: int | None


@dataclasses.dataclass(frozen=True)
class Opinion:
    """What a judge made of one solution of `num_steps` steps: its greedy judgement, the sampled
    ones (none unless it votes), and P(Yes) / (P(Yes) + P(No)) (None unless asked for)."""

    num_steps: int
    greedy: Said
    votes: tuple[Said, ...] = ()
    soft_score: float | None = None


def evaluate_reward_model(
    judge: Judge, problems: Sequence[Problem], solutions: Sequence[Solution], *, seed: int
) -> dict[str, Any]:
    """Scores of a reward model against what is known of `solutions`.

    Args:
        problems: those of the solutions, in any order; shown without their reference answers.
        solutions: with `correct` and `step_labels` where they are known; those without count in no
            score that needs them. Their text must be what a reward model is shown,
            `response_format.valid_part`, so that the labels are of that same text.

    Returns: JSON values, those of `judgement_scores` and num_solutions.

    Raises ValueError for a solution that is not as said above.
    """
    _check(judge.text_format, problems, solutions)
    by_id = {problem.id: problem for problem in problems}
    asked_about = [by_id[solution.problem_id] for solution in solutions]
    opinions = judge_solutions(judge, asked_about, [s.text for s in solutions], seed)
    labels = [
        None if s.step_labels is None else processbench.first_error(s.step_labels)
        for s in solutions
    ]
    scores = judgement_scores(opinions, judge.kind, labels, [s.correct for s in solutions])
    return {"num_solutions": len(solutions), **scores}


def judge_solutions(
    judge: Judge, problems: Sequence[Problem], texts: Sequence[str], seed: int
) -> list[Opinion]:
    """What the judge says of each text, a solution of the problem at the same place.

    The problems are shown without their references. The sampler is called for all texts at once,
    for the greedy judgements and, with votes, once more.
    """
    text_format, kind = judge_format(judge.text_format, judge.kind)
    prompts = [
        text_format.reward_prompt(kind, problem.blind(), text)
        for problem, text in zip(problems, texts, strict=True)
    ]
    asked = [row for row, prompt in enumerate(prompts) if judge.fits(prompt)]
    if len(asked) < len(prompts):
        logger.warning("%d prompts of %d are too long", len(prompts) - len(asked), len(prompts))
    about = (text_format, kind, [problems[row] for row in asked], [texts[row] for row in asked])

    def answers(settings: SamplingSettings, votes: int) -> list[tuple[Said, ...]]:
        rows = [(Said("", False, (), TOO_LONG, 0),) * votes] * len(prompts)
        for row, said in zip(asked, _ask(judge.sample, *about, settings, seed, votes), strict=True):
            rows[row] = said
        return rows

    greedy = [said for (said,) in answers(dataclasses.replace(judge.settings, greedy=True), 1)]
    sampled = answers(judge.settings, judge.votes) if judge.votes > 1 else [()] * len(prompts)
    soft: Sequence[float | None] = [None] * len(prompts)
    if judge.token_logprobs is not None:
        soft = _soft(judge, text_format, kind, prompts, greedy).tolist()
    return [
        Opinion(len(text_format.split_steps(text)), first, votes, score)
        for text, first, votes, score in zip(texts, greedy, sampled, soft, strict=True)
    ]


def judgement_scores(
    opinions: Sequence[Opinion],
    kind: JudgeKind,
    labels: Sequence[int | None],
    correct: Sequence[bool | None],
) -> dict[str, Any]:
    """The scores of n ≥ 1 opinions, all with or all without votes and soft scores.

    Args:
        labels: the first erroneous step of each solution, −1 if none, None where that is unknown.
        correct: whether the overall verdict should be Yes, None where that is unknown.

    Returns: JSON values; None for a share of nothing.
        num_with_outcome, num_with_step_labels: how many `correct` and `labels` are known.
        yes: share of the solutions whose overall verdict is Yes.
        overall_accuracy: share of the solutions whose overall verdict is their truth.
        unparseable: share of the judgements that could not be read.
        other_step_count: share of them that could, but judge another number of steps than the
            solution has; not for an ORM.
        error_acc, correct_acc, f1: `processbench.score` of the first step judged incorrect; not
            for an ORM nor where no label is known. Nan over no samples.
        majority_...: with votes, the same by vote over the k. An even split is No, a tie between
            steps goes to the first sampled; what cannot be read does not vote.
        soft_auc: area under ROC of the soft scores against the solutions' truth, nan where all are
            alike. Read at the verdict that ends the greedy judgement, in the form of its target. A
            judgement that cannot be read scores 1/2: it says nothing.
        soft_accuracy: share of the solutions whose truth lies on their soft score's side of 1/2;
            1/2 is on neither.
        per_solution: a list a figure: `overall_right` (bool; with votes `majority_overall_right`),
            `first_error` and `label` (index, -1 none; not for an ORM; a prediction may be None;
            with votes `majority_first_error`), and `soft_score`. None where the truth is unknown.

    A judgement that cannot be read is wrong, whatever the truth; so is, as to the first error, one
    of another number of steps than the solution has. Its overall verdict counts.
    """
    figures, lists = _scores(
        [(opinion.greedy,) for opinion in opinions], opinions, kind, labels, correct
    )
    if kind != "orm":
        lists["label"] = list(labels)
    if opinions[0].votes:
        voted, voted_lists = _scores(
            [opinion.votes for opinion in opinions], opinions, kind, labels, correct
        )
        figures |= {f"majority_{name}": value for name, value in voted.items()}
        lists |= {f"majority_{name}": value for name, value in voted_lists.items()}
    if opinions[0].soft_score is not None:
        lists["soft_score"] = [opinion.soft_score for opinion in opinions]
        figures |= _soft_figures(lists["soft_score"], correct)
    counts = {
        "num_with_outcome": sum(truth is not None for truth in correct),
        "num_with_step_labels": sum(label is not None for label in labels),
    }
    return {**counts, **figures, "per_solution": lists}


def judge_format(text_format: TextFormat, kind: JudgeKind) -> tuple[TextFormat, RewardKind]:
    """How a judge of that kind is asked and read, as a format and a kind of reward model.

    A verifier is a PRM-CoT that is shown the verification prompt, without a reference.
    """
    if kind != "verifier":
        return text_format, kind

    def target(_: RewardKind, verification: Verification) -> str:
        """All that was said up to the overall verdict, deliberation included."""
        end = text_format.reward_target("prm_cot", verification)
        before, found, _after = verification.text.rpartition(end)
        return before + found if found else end

    return dataclasses.replace(
        text_format,
        reward_prompt=lambda _, problem, text: text_format.verify_prompt(problem, text, None),
        reward_target=target,
        parse_judgement=lambda _, text, num_steps: text_format.parse_verification(text, num_steps),
    ), "prm_cot"


def first_error(said: Said, num_steps: int) -> int | None:
    """The first step judged incorrect, −1 if none; None for a judgement that could not be read or
    is not one to one with the steps."""
    if said.failure is not None or not 0 < len(said.verdicts) == num_steps:
        return None
    return processbench.first_error(said.verdicts)


def vote_overall(judgements: Sequence[Said]) -> bool | None:
    """The majority's overall verdict, an even split No; None if none could be read."""
    said = [judgement.overall for judgement in judgements if judgement.failure is None]
    return 2 * sum(said) > len(said) if said else None


def vote_first_error(judgements: Sequence[Said], num_steps: int) -> int | None:
    """The commonest first error; a judgement that is not one to one with the steps has no vote."""
    return processbench.majority_prediction([first_error(said, num_steps) for said in judgements])


def _ask(
    sample: Sample,
    text_format: TextFormat,
    kind: RewardKind,
    problems: Sequence[Problem],
    texts: Sequence[str],
    settings: SamplingSettings,
    seed: int,
    votes: int,
) -> list[tuple[Said, ...]]:
    """`rewards.prm.ask`, with the number of tokens of each judgement."""
    lengths: list[list[int | None]] = []

    def counted(prompts: Sequence[str], **arguments: Any) -> list[list[Any]]:
        rows = sample(prompts, **arguments)
        lengths.extend([_num_tokens(said) for said in row] for row in rows)
        return rows

    judged = ask(counted, text_format, problems, texts, kind, settings, seed, votes=votes)
    return [
        tuple(
            Said(said.text, said.overall, said.verdicts, said.failure, length)
            for said, length in zip(group, row, strict=True)
        )
        for group, row in zip(judged, lengths, strict=True)
    ]


def _num_tokens(sampled: Any) -> int | None:
    ids = getattr(sampled, "token_ids", None)
    return None if ids is None else len(ids)


def _scores(
    groups: Sequence[Sequence[Said]],
    opinions: Sequence[Opinion],
    kind: JudgeKind,
    labels: Sequence[int | None],
    correct: Sequence[bool | None],
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The figures of one way to ask, and the lists they are made from. A vote of one is itself."""
    overall = [vote_overall(group) for group in groups]
    right = [None if truth is None else said == truth for said, truth in zip(overall, correct)]
    known = [hit for hit in right if hit is not None]
    unread = [said.failure is not None for group in groups for said in group]
    figures = {
        "yes": float(np.mean([said is True for said in overall])),
        "overall_accuracy": float(np.mean(known)) if known else None,
        "unparseable": float(np.mean(unread)),
    }
    lists: dict[str, list[Any]] = {"overall_right": right}
    if kind != "orm":
        pairs = zip(groups, opinions, strict=True)
        lists["first_error"] = [vote_first_error(group, o.num_steps) for group, o in pairs]
        figures["other_step_count"] = float(
            np.mean(
                [
                    said.failure is None and first_error(said, opinion.num_steps) is None
                    for group, opinion in zip(groups, opinions)
                    for said in group
                ]
            )
        )
        labelled = [(p, lab) for p, lab in zip(lists["first_error"], labels) if lab is not None]
        if labelled:
            figures |= processbench.score([p for p, _ in labelled], [lab for _, lab in labelled])
    return figures, lists


def _soft_figures(scores: Sequence[float], correct: Sequence[bool | None]) -> dict[str, Any]:
    known = [(score, truth) for score, truth in zip(scores, correct) if truth is not None]
    if not known:
        return {"soft_auc": None, "soft_accuracy": None}
    soft, truth = np.array([score for score, _ in known]), np.array([yes for _, yes in known], bool)
    right = np.where(truth, soft > 0.5, soft < 0.5)
    return {"soft_auc": area_under_roc(soft, truth), "soft_accuracy": float(right.mean())}


def _soft(
    judge: Judge,
    text_format: TextFormat,
    kind: RewardKind,
    prompts: Sequence[str],
    judgements: Sequence[Said],
) -> np.ndarray:
    """Soft scores [n]; an ORM's verdict stands right after its prompt, whatever it said."""
    yes, _ = text_format.verdict_words
    rows, ends = [], []
    for row, said in enumerate(judgements):
        if said.failure == TOO_LONG:
            continue
        if kind == "orm":
            rows.append(row)
            ends.append(yes)
        elif said.failure is None:
            verification = Verification(said.text, said.verdicts, said.overall)
            rows.append(row)
            ends.append(text_format.reward_target(kind, verification))
    soft = np.full(len(judgements), 0.5)
    if rows and judge.token_logprobs is not None:
        shown = [prompts[row] for row in rows]
        soft[rows] = soft_scores(text_format, judge.tokenizer, judge.token_logprobs, shown, ends)
    return soft


def _check(
    text_format: TextFormat, problems: Sequence[Problem], solutions: Sequence[Solution]
) -> None:
    if not solutions:
        raise ValueError("evaluate_reward_model: no solutions")
    known = {problem.id for problem in problems}
    for solution in solutions:
        wrong = _unfit(text_format, solution, known)
        if wrong:
            place = f"solution {solution.index} of problem {solution.problem_id!r}"
            raise ValueError(f"{place}: {wrong}")


def _unfit(text_format: TextFormat, solution: Solution, known: set[str]) -> str | None:
    """What makes a solution useless here, and the mend; None if nothing does."""
    if solution.problem_id not in known:
        return "its problem is not among those given"
    if valid_part(solution.text) != solution.text:
        return (
            "its text goes on after </answer>, which no reward model is shown; cut it with "
            "response_format.valid_part, then label it"
        )
    num_steps = len(text_format.split_steps(solution.text))
    if solution.step_labels is not None and len(solution.step_labels) != num_steps:
        return (
            f"step_labels={solution.step_labels} for a text of {num_steps} steps; fill in one "
            "label a step (tasks.with_labels), or None where they are unknown"
        )
    return None
