"""How good a policy or a reward model is, on held-out problems of the task.

    python -m spark_jax.experiments.evaluate --config=configs/demo.py \
        --config.run_dir=runs/evaluate --config.model=runs/demo/seed0/rl_prm_grpo/model
    python -m spark_jax.experiments.evaluate --config=configs/demo.py \
        --config.run_dir=runs/evaluate_prm --config.model=runs/demo/seed0/prm_single/model \
        --config.evaluate.what=reward_model

Prints and writes `summary.json`, with 95 % bootstrap intervals over problems.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spark_jax.data import tasks
from spark_jax.data.formats import RewardKind
from spark_jax.data.records import Problem, SamplingSettings, Solution
from spark_jax.evaluation import intervals
from spark_jax.evaluation.pass_at_k import avg_at_k, maj_at_k, pass_at_k
from spark_jax.experiments import launch
from spark_jax.experiments.launch import Config, OnProgress
from spark_jax.models.config import ModelConfig
from spark_jax.prm.evaluate import evaluate_reward_model
from spark_jax.rewards import format as response_format
from spark_jax.scoring import token_logprobs
from spark_jax.steps import step_texts
from spark_jax.text_generation import SampledText, TextModel, text_sampler
from spark_jax.training.run_folder import RunFolder

HELD_OUT_SEED = 1_000_003  # added to the run's seed: evaluation never samples what training samples


def run(config: Config, path: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Evaluates `config.model` as `config.evaluate.what` says; returns the summary."""
    launch.check_evaluate(config)
    config = launch.sub_config(config, "evaluate", "generate", "verify", "prm")
    task = tasks.load(config.task)
    model = launch.text_model(*launch.load_model(config.model), name=config.model)
    folder = RunFolder.open(path, config)
    if (finished := folder.read_summary()) is not None:
        return finished
    if config.evaluate.what == "policy":
        summary = policy_scores(config, task, model)
    else:
        held_out = held_out_solutions(config, task)
        summary = reward_model_scores(config, task, model, config.prm.kind, *held_out)
    folder.write_summary(summary)
    return summary


def policy_scores(config: Config, task: tasks.Task, model: TextModel) -> dict[str, Any]:
    """Accuracy on held-out problems: avg@k with its interval, pass@k, maj@k; length and format."""
    problems = task.problems(config.evaluate.num_problems, config.seed, "eval")
    k = config.evaluate.samples_per_problem
    samples = text_sampler(model, launch.decode_options(config))(
        [task.text_format.solve_prompt(problem) for problem in problems],
        samples_per_prompt=k,
        settings=SamplingSettings(
            temperature=config.evaluate.temperature, max_new_tokens=config.decode.max_new_tokens
        ),
        seed=config.seed + HELD_OUT_SEED,
    )
    correct = np.array(
        [
            [is_right(task, problem, sample.text) for sample in group]
            for problem, group in zip(problems, samples, strict=True)
        ]
    )
    answers = [[answer(task, sample.text) for sample in group] for group in samples]
    references = [problem.answer for problem in problems if problem.answer is not None]
    flat = [sample for group in samples for sample in group]
    return {
        "accuracy": dataclasses.asdict(intervals.bootstrap_interval(avg_at_k(correct))),
        f"pass@{k}": float(pass_at_k(correct, k).mean()),
        f"maj@{k}": float(maj_at_k(answers, references, task.text_format.same_answer).mean()),
        "response_length": float(np.mean([len(sample.token_ids) for sample in flat])),
        "format_kept": float(np.mean([response_format.format_ok(s.text) for s in flat])),
        "steps": float(np.mean([len(task.text_format.split_steps(s.text)) for s in flat])),
        "num_problems": len(problems),
        "samples_per_problem": k,
        "correct_per_problem": correct.mean(axis=1).tolist(),
    }


def held_out_solutions(config: Config, task: tasks.Task) -> tuple[list[Problem], list[Solution]]:
    """Solutions of held-out problems by the generator, one a problem, with their ground truth."""
    problems = task.problems(config.evaluate.num_solutions, config.seed, "eval")
    name = config.evaluate.generator
    generator = launch.text_model(*launch.load_model(name), name=name)
    samples = text_sampler(generator, launch.decode_options(config))(
        [task.text_format.solve_prompt(problem) for problem in problems],
        samples_per_prompt=1,
        settings=SamplingSettings(
            temperature=config.generate.temperature,
            top_p=config.generate.top_p,
            max_new_tokens=config.decode.max_new_tokens,
        ),
        seed=config.seed + HELD_OUT_SEED,
    )
    solutions = [
        as_solution(task, problem, group[0])
        for problem, group in zip(problems, samples, strict=True)
    ]
    return problems, tasks.with_labels(task, problems, solutions)


def reward_model_scores(
    config: Config,
    task: tasks.Task,
    model: TextModel,
    kind: RewardKind,
    problems: Sequence[Problem],
    solutions: Sequence[Solution],
) -> dict[str, Any]:
    """ProcessBench's scores, greedy and by `evaluate.votes`; overall verdicts; soft scores.

    See `prm.evaluate.evaluate_reward_model`; `overall_accuracy` gets its interval here.
    """

    def score(tokens: np.ndarray) -> np.ndarray:
        return np.asarray(compiled_logprobs(model.config)(model.params, tokens))

    scores = evaluate_reward_model(
        text_sampler(model, launch.decode_options(config)),
        task.text_format,
        kind,
        problems,
        solutions,
        settings=SamplingSettings(
            temperature=config.verify.temperature,
            top_p=config.verify.top_p,
            max_new_tokens=config.decode.max_new_tokens,
        ),
        seed=config.seed + HELD_OUT_SEED,
        votes=config.evaluate.votes,
        token_logprobs=score,
        tokenizer=model.tokenizer,
    )
    right = np.array(scores.pop("per_solution")["overall_right"])
    return scores | {"overall_accuracy": dataclasses.asdict(intervals.bootstrap_interval(right))}


@functools.lru_cache(maxsize=16)
def compiled_logprobs(config: ModelConfig) -> Any:
    return jax.jit(lambda params, tokens: token_logprobs(params, config, tokens))


def is_right(task: tasks.Task, problem: Problem, text: str) -> bool:
    """A right answer in a response that keeps the format: what RL is meant to bring about."""
    return task.text_format.same_answer(answer(task, text), problem.answer)


def answer(task: tasks.Task, text: str) -> str | None:
    """The answer in the valid part; None where the response breaks the format."""
    if not response_format.format_ok(text):
        return None
    return task.text_format.final_answer(response_format.valid_part(text))


def as_solution(task: tasks.Task, problem: Problem, sample: SampledText) -> Solution:
    """The valid part of a response: all that a reward model sees, and so all that is labelled."""
    text = response_format.valid_part(sample.text)
    return Solution(
        problem_id=problem.id,
        index=0,
        text=text,
        steps=step_texts(text, task.text_format.split_steps(text)),
        answer=task.text_format.final_answer(text),
        finished=sample.finished,
    )


if __name__ == "__main__":
    launch.main(
        lambda config, path: print(json.dumps(run(config, path), indent=2)), launch.check_evaluate
    )
