"""The log of an RL run: metrics of every step, responses, times, and the monitor's alarms."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spark_jax import decoding, tasks
from spark_jax.advantages import AdvantageInputs, ProcessRewards, zero_variance_groups
from spark_jax.data.records import Problem
from spark_jax.evaluation.grading import in_threads
from spark_jax.experiments import evaluate
from spark_jax.experiments.configuration import Config
from spark_jax.experiments.rl_state import Graded
from spark_jax.parallel import processes
from spark_jax.rewards import monitor
from spark_jax.rewards.prm import Judged, disagreement
from spark_jax.rewards.process import process_reward_auc, step_process_rewards
from spark_jax.text_generation import SampledText
from spark_jax.training.metrics import MetricsWriter, read_metrics
from spark_jax.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


class Stopwatch:
    """Seconds of each part of a step, from one lap to the next, and tokens per second."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, name: str, tokens: int | None = None) -> None:
        """The time since the last lap is that of a part, of which a step may have several; tokens
        per second are those of the last."""
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        self.laps[name] = self.laps.get(name, 0.0) + seconds
        if tokens is not None:
            self.laps[f"{name}_tokens_per_second"] = tokens / max(seconds, 1e-9)


class Log:
    """What a run writes down of every step, and what the monitor makes of it."""

    def __init__(
        self, config: Config, folder: RunFolder, metrics: MetricsWriter, done: int | None
    ) -> None:
        """Goes on after `done` steps: what was written of later ones is dropped."""
        self._config, self._folder, self._metrics = config, folder, metrics
        self._thresholds = monitor.Thresholds(**config.rl.monitor)
        metrics.truncate_after(-1 if done is None else done)
        self._history = read_metrics(metrics.path) if processes.is_main() else []

    def write(
        self,
        step: int,
        values: dict[str, Any],
        seconds: Mapping[str, float] | None = None,
        graded: Graded | None = None,
    ) -> None:
        """Metrics, alarms and the responses of a step; step 0 has none."""
        values = {n: v for n, v in jax.device_get(values).items() if not undefined(n, v)}
        if graded is not None:
            values |= monitor.metrics([*self._history, values], self._thresholds)
        self._metrics.scalars(step, values, seconds=seconds)
        self._history.append({"step": step, **values})
        if graded is None:
            return
        for alarm in monitor.raised(self._history, self._thresholds):
            logger.warning("%s: %s", self._folder.path, alarm)
        if processes.is_main():
            _write_samples(self._folder.samples / f"step_{step:06d}.jsonl", graded)
            self._show(step, graded)

    def usual_steps(self, values: dict[str, Any]) -> float | None:
        """Steps per response at the start of the run, `values` being those of a step to come."""
        return monitor.usual_steps([*self._history, values], self._thresholds)

    def alarms(self) -> list[monitor.Alarm]:
        return monitor.alarms(self._history, self._thresholds)

    def _show(self, step: int, graded: Graded) -> None:
        """Histograms, and the first problem's responses, in TensorBoard."""
        # On the host: on a device, every number of tokens would compile its own selection.
        mask, logprobs = jax.device_get((graded.rollout.mask, graded.rollout.logprobs))
        self._metrics.histogram(step, "reward", graded.rewards)
        self._metrics.histogram(step, "response/length", mask.sum(axis=1))
        self._metrics.histogram(step, "response/logprob", logprobs[mask])
        self._metrics.histogram(step, "response/steps", graded.judged.num_steps)
        if step % self._config.rl.evaluate_every == 0:
            self._metrics.text(step, "responses", _as_markdown(graded))


# --- metrics -------------------------------------------------------------------------------------

PROCESS_REWARD_AUC = "spro/process_reward_auc"  # what metrics of it begin with


def undefined(name: str, value: Any) -> bool:
    """Whether a rollout has no such number: no area under ROC where no step is wrong, or judged."""
    return name.startswith(PROCESS_REWARD_AUC) and bool(np.isnan(value))


def advantage_metrics(
    advantages: Any, process: ProcessRewards | None, inputs: AdvantageInputs, step_truth: Any
) -> dict[str, Any]:
    """Size of the advantages and of the part that process rewards add to them; whether these agree
    with the verdicts on the same steps, and with the truth where it is known. For a jitted
    function."""

    def per_token(values: Any) -> Any:  # 0 where no token is trained on
        return values.sum() / jnp.maximum(inputs.mask.sum(), 1)

    metrics = {"advantage/mean_absolute": per_token(jnp.abs(advantages))}
    if process is None:
        return metrics
    metrics["spro/msa_mean_absolute"] = per_token(jnp.abs(process.advantages))
    assert inputs.num_steps is not None
    steps = step_process_rewards(process.returns, inputs.step_ids, num_steps=inputs.num_steps)
    for name, verdicts in (("verdicts", inputs.verdicts), ("truth", step_truth)):
        if verdicts is not None:
            metrics[f"{PROCESS_REWARD_AUC}_{name}"] = process_reward_auc(steps, verdicts)
    return metrics


def rollout_metrics(
    rollout: decoding.Rollout, rewards: np.ndarray, trained_on: Any, group_size: int
) -> dict[str, Any]:
    """Of rewards and lengths, and of how busy the decoder was. `trained_on` [B, T] is the mask of
    the groups that are trained on."""
    return _rollout_metrics(rewards, rollout.mask, rollout.finished, trained_on, group_size) | {
        "decode/slot_occupancy": rollout.slot_occupancy,
        "decode/queue_occupancy": rollout.queue_occupancy,
        "decode/shared_prefix": rollout.shared_prefix,
    }


@functools.partial(jax.jit, static_argnums=4)
def _rollout_metrics(
    rewards: Any, mask: Any, finished: Any, trained_on: Any, group_size: int
) -> dict[str, jax.Array]:
    groups = len(rewards) // group_size
    return {
        "reward/mean": rewards.mean(),
        "reward/std": rewards.std(),
        "reward/zero_variance_groups": zero_variance_groups(rewards, group_size) / groups,
        "response/length": mask.sum(axis=1).mean(),
        "response/finished": finished.mean(),
        "response/trained_on": trained_on.any(axis=1).mean(),
    }


def update_metrics(updates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of a rollout's updates: means over them; skipped updates summed; and the gap
    between sampler and scorer at the first one, with what the policy had moved before it."""
    if not updates:
        return {"policy/updates": 0}
    means = {name: np.mean([values[name] for values in updates]) for name in updates[0]}
    means |= {name: updates[0][name] for name in ("logprob_gap_max", "logprob_gap_mean")}
    means["update_skipped"] = np.sum([values["update_skipped"] for values in updates])
    named = {f"policy/{name}": value for name, value in means.items()}
    return {"policy/updates": len(updates)} | named


def begin_truths(
    task: tasks.Task, problems: Sequence[Problem], samples: Sequence[SampledText]
) -> Callable[[], list[bool | None]]:
    """Begins to find whether each answer is right, None without a reference: what the run may look
    at but never learn from. The function that is returned waits for it."""

    def grade(rows: Sequence[tuple[Problem, SampledText]]) -> list[bool | None]:
        texts = [sample.text for _, sample in rows]
        is_right = functools.partial(evaluate.is_right, task)
        return in_threads(is_right, [problem for problem, _ in rows], texts)

    return processes.begin_share(list(zip(problems, samples, strict=True)), grade)


def evaluation_metrics(scores: dict[str, Any]) -> dict[str, float]:
    """What `evaluate.policy_scores` found, as metrics; no accuracy where nothing can be graded."""
    sides = {"": "estimate", "_low": "low", "_high": "high"}
    accuracy = {f"eval/accuracy{end}": scores["accuracy"][side] for end, side in sides.items()}
    return {name: value for name, value in accuracy.items() if value is not None} | {
        "eval/response_length": scores["response_length"],
        "eval/format_kept": scores["format_kept"],
        "eval/steps": scores["steps"],
    }


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


# --- files ---------------------------------------------------------------------------------------


def _as_markdown(graded: Graded) -> str:
    """The first problem, two of its responses, and what the reward model said of them."""
    parts = [f"**{graded.problems[0].question}**"]
    for sample, reward, judgement in zip(
        graded.samples[:2], graded.rewards, graded.judged.judgements, strict=False
    ):
        parts += [f"reward {reward:g}", _indented(sample.text)]
        if judgement.called:
            parts += ["the reward model:", _indented(judgement.text)]
    return "\n\n".join(parts)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _write_samples(path: Path, graded: Graded) -> None:
    """The responses of a rollout with their rewards, one JSON line each."""
    with path.open("w") as file:
        for problem, sample, reward in zip(
            graded.problems, graded.samples, graded.rewards, strict=True
        ):
            row = {"problem": problem.id, "response": sample.text, "reward": float(reward)}
            file.write(json.dumps(row) + "\n")
