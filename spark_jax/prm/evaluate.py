"""How good a generative reward model is, on held-out solutions whose truth is known.

Greedily and by vote over k samples, as ProcessBench asks (arXiv 2412.06559; method page, section
2), and by the soft score of its overall verdict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from spark_jax.data.formats import RewardKind, Sample, TextFormat
from spark_jax.data.records import Problem, SamplingSettings, Solution, Verification
from spark_jax.evaluation import processbench
from spark_jax.evaluation.roc import area_under_roc
from spark_jax.prm.soft_score import soft_scores
from spark_jax.rewards.format import valid_part
from spark_jax.rewards.prm import ask
from spark_jax.rewards.records import Judgement


def evaluate_reward_model(
    sample: Sample,
    text_format: TextFormat,
    kind: RewardKind,
    problems: Sequence[Problem],
    solutions: Sequence[Solution],
    *,
    settings: SamplingSettings,
    seed: int,
    votes: int = 1,
    token_logprobs: Callable[[np.ndarray], Any] | None = None,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Scores of a reward model against the labels of `solutions`.

    Args:
        sample: the reward model.
        problems: those of the solutions, in any order; shown without their reference answers.
        solutions: with `correct`, and for kinds that judge steps `step_labels`, filled in. Their
            text must be what a reward model is shown, `rewards.format.valid_part`, so that the
            labels are of that same text.
        settings: of the k samples; of the greedy judgement only `max_new_tokens` matters.
        votes: k. With more than 1, k judgements are sampled besides the greedy one.
        token_logprobs, tokenizer: as `soft_score.soft_scores` takes them, for `soft_auc`. The
            function is called once, on all solutions; it may cut its batch as memory asks.

    Returns: JSON values.
        num_solutions.
        overall_accuracy: share of the solutions whose overall verdict is their truth.
        unparseable: share of the judgements that could not be read.
        error_acc, correct_acc, f1: `processbench.score` of the first step judged incorrect; not
            for an ORM. Nan over no samples.
        majority_...: with votes > 1, the same by vote over the k. An even split is No, a tie
            between steps goes to the first sampled; what cannot be read does not vote.
        soft_auc: area under ROC of the soft scores against the solutions' truth, nan where all are
            alike. Read at the verdict that ends the greedy judgement, in the form of its target. A
            judgement that cannot be read scores 1/2: it says nothing.
        per_solution: a list a figure, in the order of `solutions`: `overall_right` (bool; with
            votes `majority_overall_right`), `first_error` and `label` (index, -1 none; not for an
            ORM; a prediction may be None; with votes `majority_first_error`), and `soft_score`.

    A judgement that cannot be read is wrong, whatever the truth; so is, as to the first error, one
    of another number of steps than the solution has. Its overall verdict counts.

    Raises ValueError for a solution that is not as said above, and for votes without randomness.
    """
    _check(text_format, kind, problems, solutions, settings, votes)
    if (token_logprobs is None) != (tokenizer is None):
        raise ValueError("soft scores need both token_logprobs and tokenizer; pass both or neither")
    by_id = {problem.id: problem for problem in problems}
    asked_about = [by_id[solution.problem_id] for solution in solutions]
    texts = [solution.text for solution in solutions]
    about = (sample, text_format, asked_about, texts, kind)
    greedy = ask(*about, dataclasses.replace(settings, greedy=True), seed)
    scores, per_solution = _scores(greedy, solutions, kind)
    if kind != "orm":
        per_solution["label"] = [processbench.first_error(s.step_labels or ()) for s in solutions]
    if votes > 1:
        voted, voted_per_solution = _scores(
            ask(*about, settings, seed, votes=votes), solutions, kind
        )
        scores |= {f"majority_{name}": value for name, value in voted.items()}
        per_solution |= {f"majority_{name}": value for name, value in voted_per_solution.items()}
    if token_logprobs is not None:
        prompts = [
            text_format.reward_prompt(kind, dataclasses.replace(problem, answer=None), text)
            for problem, text in zip(asked_about, texts, strict=True)
        ]
        soft = _soft(text_format, tokenizer, token_logprobs, prompts, [g[0] for g in greedy])
        correct = np.array([bool(solution.correct) for solution in solutions])
        scores["soft_auc"] = area_under_roc(soft, correct)
        per_solution["soft_score"] = soft.tolist()
    return {"num_solutions": len(solutions), **scores, "per_solution": per_solution}


def vote_overall(judgements: Sequence[Judgement]) -> bool | None:
    """The majority's overall verdict, an even split No; None if none could be read."""
    said = [judgement.overall for judgement in judgements if judgement.failure is None]
    return 2 * sum(said) > len(said) if said else None


def vote_first_error(judgements: Sequence[Judgement]) -> int | None:
    """The commonest first error; a judgement that is not one to one with the steps has no vote."""
    return processbench.majority_prediction(
        [processbench.first_error(j.verdicts) if j.judged_every_step else None for j in judgements]
    )


def _scores(
    judgements: Sequence[Sequence[Judgement]], solutions: Sequence[Solution], kind: RewardKind
) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """The figures of one way to ask, and the lists they are made from. A vote of one is itself."""
    pairs = list(zip(judgements, solutions, strict=True))
    right = [vote_overall(group) == solution.correct for group, solution in pairs]
    unread = [judgement.failure is not None for group in judgements for judgement in group]
    figures = {"overall_accuracy": float(np.mean(right)), "unparseable": float(np.mean(unread))}
    lists: dict[str, list[Any]] = {"overall_right": right}
    if kind != "orm":
        labels = [processbench.first_error(solution.step_labels or ()) for solution in solutions]
        lists["first_error"] = [vote_first_error(group) for group in judgements]
        figures |= processbench.score(lists["first_error"], labels)
    return figures, lists


def _soft(
    text_format: TextFormat,
    tokenizer: Any,
    token_logprobs: Callable[[np.ndarray], Any],
    prompts: Sequence[str],
    judgements: Sequence[Judgement],
) -> np.ndarray:
    """Soft scores [n]; an ORM's verdict stands right after its prompt, whatever it said."""
    yes, _ = text_format.verdict_words
    rows, ends = [], []
    for row, said in enumerate(judgements):
        if said.kind == "orm":
            rows.append(row)
            ends.append(yes)
        elif said.failure is None:
            verification = Verification(said.text, said.verdicts, said.overall)
            rows.append(row)
            ends.append(text_format.reward_target(said.kind, verification))
    soft = np.full(len(judgements), 0.5)
    if rows:
        shown = [prompts[row] for row in rows]
        soft[rows] = soft_scores(text_format, tokenizer, token_logprobs, shown, ends)
    return soft


def _check(
    text_format: TextFormat,
    kind: RewardKind,
    problems: Sequence[Problem],
    solutions: Sequence[Solution],
    settings: SamplingSettings,
    votes: int,
) -> None:
    if not solutions:
        raise ValueError("evaluate_reward_model: no solutions")
    if votes < 1 or (votes > 1 and settings.greedy):
        raise ValueError(
            f"votes={votes} with greedy={settings.greedy}: votes are at least 1, and more than one "
            "needs settings that sample (greedy=False)"
        )
    known = {problem.id for problem in problems}
    for solution in solutions:
        wrong = _unfit(text_format, kind, solution, known)
        if wrong:
            place = f"solution {solution.index} of problem {solution.problem_id!r}"
            raise ValueError(f"{place}: {wrong}")


def _unfit(
    text_format: TextFormat, kind: RewardKind, solution: Solution, known: set[str]
) -> str | None:
    """What makes a solution useless here, and the mend; None if nothing does."""
    if solution.problem_id not in known:
        return "its problem is not among those given"
    if valid_part(solution.text) != solution.text:
        return (
            "its text goes on after </answer>, which no reward model is shown; cut it with "
            "rewards.format.valid_part, then label it"
        )
    if solution.correct is None:
        return "correct is None; fill in its ground truth (data.tasks.with_labels)"
    num_steps = len(text_format.split_steps(solution.text))
    if kind != "orm" and len(solution.step_labels or ()) != num_steps:
        return (
            f"step_labels={solution.step_labels} for a text of {num_steps} steps; fill in one "
            "label a step (data.tasks.with_labels)"
        )
    return None
