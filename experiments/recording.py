"""What an RL run leaves for the page (`experiments.report`): every so often a rollout, token by
token, with its log-probs, advantages, verdicts and flags, and the reward model's soft scores."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.core import FrozenDict

from spark_jax import tasks
from spark_jax.advantages import ADVANTAGES, AdvantageInputs, AdvantageSettings
from spark_jax.data.formats import TextFormat
from spark_jax.data.records import Verification
from spark_jax.experiments import evaluate, rl_setup
from spark_jax.experiments.configuration import Config
from spark_jax.experiments.rl_state import Graded
from spark_jax.parallel import processes
from spark_jax.prm.soft_score import soft_scores
from spark_jax.reports import rollouts
from spark_jax.reports.rollouts import Group, Response, RolloutRecord
from spark_jax.response_format import format_checks, valid_part
from spark_jax.rewards import monitor
from spark_jax.rewards.prm import Judged
from spark_jax.rewards.records import Judgement
from spark_jax.steps import token_offsets
from spark_jax.text_generation import SampledText, TextModel

SHOWN = ("grpo", "selective", "global_step", "masked_step")  # beside the one that is trained with


def is_recorded(config: Config, step: int) -> bool:
    """The first and the last step, and every `rl.record.every`-th (None: those that evaluate)."""
    every = config.rl.record.every or config.rl.evaluate_every
    return bool(config.rl.record.problems) and (step in (1, config.rl.steps) or step % every == 0)


def record(
    path: Path,
    config: Config,
    step: int,
    task: tasks.Task,
    tokenizer: Any,
    graded: Graded,
    inputs: AdvantageInputs,
    correct: Sequence[bool | None],
    *,
    reward_model: TextModel | None,
    judge_format: TextFormat,
    usual_steps: float | None,
) -> dict[str, float]:
    """Keeps a rollout in the run folder `path`; returns metrics of the reward model's soft scores.

    Arguments as in `soft_verdicts` and `rollout_record`. All processes call it, the first writes.
    """
    soft = soft_verdicts(config, reward_model, judge_format, graded)
    made = rollout_record(config, step, task, tokenizer, graded, soft, inputs, correct, usual_steps)
    if processes.is_main():
        rollouts.write(rollouts.step_file(path, step), made)
    return soft_metrics(graded.judged, soft)


def soft_verdicts(
    config: Config, model: TextModel | None, judge_format: TextFormat, graded: Graded
) -> list[float | None]:
    """P(Yes) / (P(Yes) + P(No)) at the verdict of each readable judgement; one forward pass.

    `model` is the reward model, None for a reward that asks none, and `judge_format` how prompts
    are shown to it.
    """
    judgements = graded.judged.judgements
    readable = [b for b, judgement in enumerate(judgements) if judgement.failure is None]
    found: list[float | None] = [None] * len(judgements)
    if model is None or not readable:
        return found
    kind = config.prm.kind
    prompts, said = [], []
    for b in readable:
        shown, judgement = valid_part(graded.samples[b].text), judgements[b]
        prompts.append(judge_format.reward_prompt(kind, graded.problems[b].blind(), shown))
        verification = Verification(judgement.text, judgement.verdicts, judgement.overall)
        said.append(judge_format.reward_target(kind, verification))
    score = functools.partial(evaluate.score_in_batches, model)
    for b, soft in zip(readable, soft_scores(judge_format, model.tokenizer, score, prompts, said)):
        found[b] = float(soft)
    return found


def soft_metrics(judged: Judged, soft: Sequence[float | None]) -> dict[str, float]:
    """The mean soft score of the readable judgements, and how far Yes is above it where the verdict
    is Yes; {} without any."""
    pairs = [(j.overall, s) for j, s in zip(judged.judgements, soft) if s is not None]
    if not pairs:
        return {}
    metrics = {monitor.SOFT_SCORE: float(np.mean([score for _, score in pairs]))}
    if of_yes := [score for overall, score in pairs if overall]:
        metrics[monitor.YES_ABOVE_SOFT] = 1.0 - float(np.mean(of_yes))
    return metrics


def rollout_record(
    config: Config,
    step: int,
    task: tasks.Task,
    tokenizer: Any,
    graded: Graded,
    soft: Sequence[float | None],
    inputs: AdvantageInputs,
    correct: Sequence[bool | None],
    usual_steps: float | None,
) -> RolloutRecord:
    """The first `rl.record.problems` groups of a rollout of B responses.

    Args:
        inputs: what advantages are made of, log-probs of the policy that sampled included; what it
            lacks is shown by no advantage.
        correct: whether each answer is right, None where unknown.
        usual_steps: per response, at the start of the run.
    """
    problems, samples, judged = graded.problems, graded.samples, graded.judged
    size = config.rl.group_size
    number = min(config.rl.record.problems, len(problems) // size)
    step_ids = np.asarray(inputs.step_ids)
    trained: np.ndarray = np.any(np.asarray(inputs.mask), axis=1)

    def response(b: int) -> Response:
        judgement, text = judged.judgements[b], samples[b].text
        labels, _ = task.labels(problems[b], valid_part(text))
        tokens = _tokens(tokenizer, samples[b])
        return Response(
            tokens=tokens,
            steps=tuple(step_ids[b, : len(tokens)].tolist()),
            finished=samples[b].finished,
            overall=judgement.overall if judgement.failure is None else None,
            verdicts=tuple(judged.verdicts[b][: len(judgement.verdicts)].tolist()),
            verifications=_said(judgement, soft[b]),
            chosen={},
            reward=float(graded.rewards[b]),
            checks=format_checks(text),
            flags=monitor.flags(
                text,
                int(judged.num_steps[b]),
                judgement=judgement,
                soft_score=soft[b],
                reward=float(graded.rewards[b]),
                correct=correct[b],
                usual_steps=usual_steps,
            ),
            trained=bool(trained[b]),
            correct=correct[b],
            step_labels=labels,
        )

    groups = tuple(
        Group(
            problems[first].id,
            problems[first].question,
            problems[first].answer,
            tuple(response(b) for b in range(first, first + size)),
        )
        for first in range(0, number * size, size)
    )
    lengths = [len(r.tokens) for group in groups for r in group.responses]
    values = rollouts.flat_values(token_values(config, inputs), lengths)
    return RolloutRecord(step, config.rl.advantage, len(problems) // size, groups, values)


def token_values(config: Config, inputs: AdvantageInputs) -> dict[str, np.ndarray]:
    """Log-probs, the cumulative process reward, and the advantages that can be made of what the run
    has, each [B, T]; all with the options of the run that they have."""
    trained = rl_setup.advantage_settings(config)
    has = {
        "ref_logprobs": inputs.ref_logprobs is not None,
        "verdicts": inputs.verdicts is not None and bool(np.any(inputs.verdicts)),
    }
    found = {"logprob": inputs.policy_logprobs, "ref_logprob": inputs.ref_logprobs, "cpr": None}
    for name in dict.fromkeys((trained.name, *SHOWN)):
        shown = ADVANTAGES[name]
        if name != trained.name and not all(has[need] for need in shown.needs):
            continue
        options = {key: x for key, x in trained.options.items() if key in shown.options}
        if name == "grpo" != trained.name:
            options = {}
        found[name], process = _advantages(AdvantageSettings(name, FrozenDict(options)), inputs)
        if found["cpr"] is None and process is not None:
            found["cpr"] = process.returns
    return {name: np.asarray(array) for name, array in found.items() if array is not None}


@functools.partial(jax.jit, static_argnums=0)
def _advantages(settings: AdvantageSettings, inputs: AdvantageInputs) -> Any:
    return settings(inputs)


def _tokens(tokenizer: Any, sample: SampledText) -> tuple[str, ...]:
    """The text of each token, the stop token's at the end."""
    body = sample.token_ids[:-1] if sample.finished else sample.token_ids
    text, offsets = token_offsets(tokenizer, body)
    end = [tokenizer.decode(list(sample.token_ids[-1:]))] if sample.finished else []
    return (*rollouts.token_texts(text, offsets), *end)


def _said(judgement: Judgement, soft: float | None) -> tuple[rollouts.Judged, ...]:
    """The reward model's judgement, if it was asked."""
    if not judgement.called:
        return ()
    overall = judgement.overall if judgement.failure is None else None
    said = rollouts.Judged(judgement.text, overall, judgement.verdicts, judgement.failure, soft)
    return (said,)
