"""What an RL run writes down of every step: metrics, responses, times, and the monitor's alarms."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from spark_jax.experiments.configuration import Config
from spark_jax.experiments.policy_update import undefined
from spark_jax.experiments.rollouts import Graded
from spark_jax.parallel import processes
from spark_jax.rewards import monitor
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


def evaluation_metrics(scores: dict[str, Any]) -> dict[str, float]:
    """What `evaluate.policy_scores` found, as metrics; no accuracy where nothing can be graded."""
    sides = {"": "estimate", "_low": "low", "_high": "high"}
    accuracy = {f"eval/accuracy{end}": scores["accuracy"][side] for end, side in sides.items()}
    return {name: value for name, value in accuracy.items() if value is not None} | {
        "eval/response_length": scores["response_length"],
        "eval/format_kept": scores["format_kept"],
        "eval/steps": scores["steps"],
    }


def _write_samples(path: Path, graded: Graded) -> None:
    """The responses of a rollout with their rewards, one JSON line each."""
    with path.open("w") as file:
        for problem, sample, reward in zip(
            graded.problems, graded.samples, graded.rewards, strict=True
        ):
            row = {"problem": problem.id, "response": sample.text, "reward": float(reward)}
            file.write(json.dumps(row) + "\n")
