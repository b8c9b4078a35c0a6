"""A step's rollout: sampled, judged by the reward model, rewarded, and compared with the truth for
metrics alone. Answers are graded on threads, while the devices do something else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from spark_jax import decoding
from spark_jax.data import tasks
from spark_jax.data.records import Problem, SamplingSettings
from spark_jax.evaluation.grading import in_threads
from spark_jax.experiments import configuration, evaluate
from spark_jax.experiments.configuration import Config
from spark_jax.models.config import ModelConfig
from spark_jax.parallel import processes
from spark_jax.rewards.format import MAX_STEPS
from spark_jax.rewards.prm import (
    REWARDS,
    REWARDS_THAT_GRADE,
    REWARDS_THAT_JUDGE,
    REWARDS_THAT_NEED_REFERENCES,
    Judged,
    disagreement,
    judge,
)
from spark_jax.rewards.records import RewardInputs
from spark_jax.steps import step_ids, token_offsets
from spark_jax.text_generation import (
    SampledText,
    TextModel,
    rollout_again,
    rollout_texts,
    sample_rollout,
    text_sampler,
)


class Sampled(NamedTuple):
    """B responses, as arrays and as texts."""

    rollout: decoding.Rollout
    samples: list[SampledText]


@dataclasses.dataclass(frozen=True)
class Graded:
    """A rollout of B responses, and what was made of it."""

    problems: list[Problem]
    rollout: decoding.Rollout
    samples: list[SampledText]
    judged: Judged
    rewards: np.ndarray  # [B]


def sample(
    config: Config, task: tasks.Task, policy: TextModel, problems: Sequence[Problem], step: int
) -> Sampled:
    """G responses to every G-th of the B problems (they stand there once per response)."""
    rollout = sample_rollout(
        policy,
        _prompts(config, task, problems),
        samples_per_prompt=config.rl.group_size,
        settings=SamplingSettings(
            temperature=config.rl.temperature, max_new_tokens=config.decode.max_new_tokens
        ),
        key=jax.random.fold_in(jax.random.key(config.seed), step),
        options=configuration.decode_options(config),
    )
    return Sampled(rollout, rollout_texts(rollout, policy.tokenizer))


def sampled_before(
    config: Config,
    task: tasks.Task,
    model_config: ModelConfig,
    tokenizer: Any,
    problems: Sequence[Problem],
    samples: Mapping[str, Any],
) -> Sampled:
    """What `sample` gave, from the arrays that were saved of it (`decoding.samples_of`)."""
    rollout = rollout_again(
        model_config,
        tokenizer,
        _prompts(config, task, problems),
        samples,
        samples_per_prompt=config.rl.group_size,
        max_new_tokens=config.decode.max_new_tokens,
        options=configuration.decode_options(config),
    )
    return Sampled(rollout, rollout_texts(rollout, tokenizer))


def _prompts(config: Config, task: tasks.Task, problems: Sequence[Problem]) -> list[str]:
    different = problems[:: config.rl.group_size]
    return [task.text_format.solve_prompt(problem) for problem in different]


def judge_responses(
    config: Config,
    task: tasks.Task,
    reward_model: TextModel | None,
    problems: Sequence[Problem],
    samples: Sequence[SampledText],
    step: int,
) -> Judged:
    """Format checks, and the reward model's judgements where the reward needs them."""
    options = configuration.decode_options(config)
    return judge(
        None if reward_model is None else text_sampler(reward_model, options),
        task.text_format,
        problems,
        [sample.text for sample in samples],
        config.prm.kind,
        SamplingSettings(greedy=True, max_new_tokens=config.decode.max_new_tokens),
        seed=step,
        checks=tuple(config.rl.format_checks),
    )


def begin_rewards(
    config: Config,
    task: tasks.Task,
    problems: Sequence[Problem],
    samples: Sequence[SampledText],
    judged: Judged,
    step: int,
) -> Callable[[], np.ndarray]:
    """Begins to make r [B]; what is returned waits for it. Only a reward that needs references is
    handed problems that still have them."""
    if config.rl.reward not in REWARDS_THAT_NEED_REFERENCES:
        problems = [dataclasses.replace(problem, answer=None) for problem in problems]
    inputs = RewardInputs(
        problems=problems,
        responses=[sample.text for sample in samples],
        group_size=config.rl.group_size,
        format=task.text_format,
        format_ok=judged.format_ok,
        judgements=judged.judgements if config.rl.reward in REWARDS_THAT_JUDGE else None,
        seed=config.seed * 1_000_003 + step,
    )
    if config.rl.reward in REWARDS_THAT_GRADE:
        return _begin_grading(config.rl.reward, inputs)
    rewards = REWARDS[config.rl.reward](inputs)
    return lambda: rewards


def _begin_grading(reward: str, inputs: RewardInputs) -> Callable[[], np.ndarray]:
    """A reward whose rows depend on their own group alone, every process grading its share."""

    def grade(groups: Sequence[int]) -> list[Any]:
        if not groups:
            return []
        size = inputs.group_size
        rows = slice(groups[0] * size, (groups[-1] + 1) * size)
        names = ("problems", "responses", "format_ok")
        part = {name: getattr(inputs, name)[rows] for name in names}
        return np.split(REWARDS[reward](dataclasses.replace(inputs, **part)), len(groups))

    graded = processes.begin_share(range(len(inputs.responses) // inputs.group_size), grade)
    return lambda: np.concatenate(graded())


def step_truth(
    task: tasks.Task, problems: Sequence[Problem], samples: Sequence[SampledText]
) -> np.ndarray | None:
    """[B, K]: which steps are right (+1) and wrong (−1), 0 where there is none, for metrics alone.
    None for a task that does not know."""
    known = [task.labels(p, s.text)[0] for p, s in zip(problems, samples, strict=True)]
    if any(labels is None for labels in known):
        return None
    truth = np.zeros((len(known), MAX_STEPS), np.int8)
    for row, labels in zip(truth, known, strict=True):
        signs = np.where(np.array(labels, bool), 1, -1)[:MAX_STEPS]
        row[: len(signs)] = signs
    return truth


def token_step_ids(
    task: tasks.Task, tokenizer: Any, samples: Sequence[SampledText], num_tokens: int
) -> np.ndarray:
    """[B, T]: which step each sampled token belongs to, −1 outside any, as at the stop token."""
    bodies = [s.token_ids[:-1] if s.finished else s.token_ids for s in samples]
    texts, offsets = zip(*(token_offsets(tokenizer, body) for body in bodies), strict=True)
    spans = [task.text_format.split_steps(text)[:MAX_STEPS] for text in texts]
    return step_ids(spans, offsets, num_tokens)


def begin_truths(
    task: tasks.Task, problems: Sequence[Problem], samples: Sequence[SampledText]
) -> Callable[[], list[bool | None]]:
    """Begins to find whether each answer is right, None without a reference: what the run may look
    at but never learn from. What is returned waits for it."""

    def grade(rows: Sequence[tuple[Problem, SampledText]]) -> list[bool | None]:
        texts = [sample.text for _, sample in rows]
        is_right = partial(evaluate.is_right, task)
        return in_threads(is_right, [problem for problem, _ in rows], texts)

    return processes.begin_share(list(zip(problems, samples, strict=True)), grade)


def truth_metrics(right: Sequence[bool | None], judged: Judged) -> dict[str, float]:
    """Accuracy against the references, and how often the reward model disagrees with it; {} where a
    problem has no reference."""
    known = [hit for hit in right if hit is not None]
    if len(known) < len(right):
        return {}
    metrics = {"truth/accuracy": float(np.mean(known))}
    if any(judgement.called for judgement in judged.judgements):
        metrics |= disagreement(judged.judgements, np.array(known, bool))
    return metrics
