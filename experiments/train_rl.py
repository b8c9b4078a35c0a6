"""SPARK stage III and SPRO: reinforcement learning with rewards and advantages by name.

    python -m spark_jax.experiments.train_rl --config=configs/demo.py --config.run_dir=runs/rl \
        --config.rl.reward_model=runs/prm/model --config.rl.advantage=grpo
    python -m spark_jax.experiments.train_rl --config=configs/demo.py --config.run_dir=runs/rlvr \
        --config.rl.reward=rule_based --config.rl.advantage=spro

Writes metrics, sampled responses, checkpoints, the trained policy (`model/`) and `summary.json`.
Started again, it goes on from the last checkpoint, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spark_jax import decoding
from spark_jax.advantages import (
    AdvantageInputs,
)
from spark_jax.data import tasks
from spark_jax.data.batches import BatchOrder, batch_order
from spark_jax.data.records import Problem
from spark_jax.experiments import (
    checks,
    configuration,
    evaluate,
    launch,
    loading,
    recording,
    rollouts,
)
from spark_jax.experiments.configuration import Config, ConfigError
from spark_jax.experiments.policy_update import (
    NEEDS_PROCESS_REWARDS,
    Logprobs,
    advantage_inputs,
    as_sampled,
    compiled_step,
    make_batch,
    make_optimizer,
    minibatches,
    moved,
    needs_reference_policy,
    packed,
    score_rollout,
    undefined,
    update_metrics,
    update_settings,
)
from spark_jax.experiments.progress import OnProgress
from spark_jax.models.config import ModelConfig
from spark_jax.parallel import processes
from spark_jax.reports import plots
from spark_jax.rewards import monitor
from spark_jax.rewards.prm import (
    REWARDS_THAT_JUDGE,
    Judged,
)
from spark_jax.text_generation import (
    SampledText,
    TextModel,
    encode,
    longest_prompt,
)
from spark_jax.training import spread, state
from spark_jax.training.checkpointing import Checkpoints
from spark_jax.training.metrics import MetricsWriter, read_metrics
from spark_jax.training.policy import PolicyBatch
from spark_jax.training.preemption import Preempted, Watch
from spark_jax.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What stays as it is throughout a run."""

    config: Config
    folder: RunFolder
    model: loading.Loaded  # the policy's, without its parameters
    task: tasks.Task  # as the policy is shown it
    reward_model: TextModel | None
    judged_task: tasks.Task  # as the reward model is shown it
    problems: list[Problem]
    too_long: int  # problems that are left out
    order: BatchOrder  # which problems each step is about
    thresholds: monitor.Thresholds

    def policy(self, params: Any) -> TextModel:
        return loading.text_model(*self.model._replace(params=params), name="policy")

    def problems_of(self, step: int) -> list[Problem]:
        """The problem of each response of a step's rollout."""
        chosen = self.order[step - 1]
        return [self.problems[i] for i in chosen for _ in range(self.config.rl.group_size)]


@dataclasses.dataclass(frozen=True)
class Graded:
    """A rollout of B responses, and what was made of them."""

    problems: list[Problem]
    rollout: decoding.Rollout
    logprobs: Logprobs
    samples: list[SampledText]
    judged: Judged
    rewards: np.ndarray  # [B]


@configuration.on_mesh
def run(config: Config, path: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """One RL run in the folder `path`; returns its summary. Progress is in rollouts."""
    checks.check_rl(config)
    if config.rl.reward in REWARDS_THAT_JUDGE:  # of a pipeline it is made before this run begins
        checks.model_exists("rl.reward_model", config.rl.reward_model)
    config = configuration.sub_config(config, "rl", "prm", "generate", "evaluate")
    loaded = loading.load_trainable(config, config.model)
    reference = _reference_policy(config, loaded.params, loaded.config)
    folder = RunFolder.open(path, config)
    if (finished := folder.read_summary()) is not None:
        return finished
    setting = make_setting(config, folder, loaded)
    initial = loaded.params
    if reference is initial:  # the updates take over the memory of what they start from
        initial = jax.tree.map(jnp.copy, initial)
    train = spread.new_state(initial, make_optimizer(config), _key(config), loaded.config)
    del loaded, initial

    keep = {"keep": config.rl.keep_checkpoints, "keep_every": config.rl.keep_every}
    with (
        Watch() as watch,
        Checkpoints(folder.checkpoints, **keep) as saved,
        MetricsWriter(path) as metrics,
    ):
        train, reference, done = restore(setting, saved, train, reference)
        log = Log(setting, metrics, done)
        scores: dict[str, Any] = {}
        if done in (None, config.rl.steps):  # else the last step evaluates
            scores = evaluate.policy_scores(config, setting.task, setting.policy(train.params))
        if done is None:
            log.write(0, evaluation_metrics(scores))
        if on_progress:
            on_progress(done or 0, config.rl.steps)

        for step in range((done or 0) + 1, config.rl.steps + 1):
            at = position(config, folder, step - 1)
            watch.hold(partial(saved.ensure, step - 1, to_save(config, train, reference), at))
            train, reference, found = take_step(setting, train, reference, step, log, watch)
            scores = found or scores
            last, stop = step == config.rl.steps, watch.asked()
            if step % config.rl.save_every == 0 or last or stop:
                at = position(config, folder, step)
                saved.save(step, to_save(config, train, reference), at)
            if on_progress:
                on_progress(step, config.rl.steps)
            if stop:
                saved.wait()
                raise Preempted(0)

    loading.save_model(path / "model", setting.model._replace(params=train.params))
    summary = {
        "evaluation": scores,
        "data": setting.task.data_counts("train") | {"too_long": setting.too_long},
        "skipped_updates": int(train.skipped),
        "alarms": [dataclasses.asdict(alarm) for alarm in log.alarms()],
    }
    folder.write_summary(summary)
    if processes.is_main():
        plots.training_curves(path / "metrics.jsonl", folder.plots)
    return summary


def take_step(
    setting: Setting,
    train: state.TrainState,
    reference: Any,
    step: int,
    log: Log,
    watch: Watch,
) -> tuple[state.TrainState, Any, dict[str, Any] | None]:
    """Rollout, rewards, advantages, updates; the new state and reference policy, and the scores of
    a step that evaluates. The updates take over the memory of `train`."""
    config, stopwatch = setting.config, Stopwatch()
    graded = collect(setting, train.params, reference, step, stopwatch)
    inputs = inputs_of(setting, graded)
    unmoved = int(train.step) == 0 and not config.rl.reference_model
    batch, values = make_batch(config, graded.rollout, inputs, unmoved)
    if kept := recording.is_recorded(config, step):
        shown = as_sampled(
            config, setting.model.config, train.params, graded.rollout, inputs, unmoved
        )
    watch.release()
    train, updates = update_policy(setting, train, batch)
    if config.rl.reference_decay is not None:
        reference = moved(reference, train.params, config.rl.reference_decay)
    # Graded while the devices still work on the updates, for which nothing has waited yet.
    correct = rollouts.truths(setting.task, graded.problems, graded.samples)
    values |= update_metrics(updates) | graded.judged.metrics
    values |= rollouts.truth_metrics(correct, graded.judged)
    stopwatch.lap("update")
    if kept:
        values |= record(setting, step, graded, shown, correct, log.usual_steps(values))
    scores = None
    if step % config.rl.evaluate_every == 0 or step == config.rl.steps:
        scores = evaluate.policy_scores(config, setting.task, setting.policy(train.params))
        values |= evaluation_metrics(scores)
        stopwatch.lap("evaluate")
    log.write(step, values, stopwatch.laps, graded)
    return train, reference, scores


def make_setting(config: Config, folder: RunFolder, loaded: loading.Loaded) -> Setting:
    """Task, problems and reward model of a run; ConfigError where one of them cannot be."""
    task = loading.for_model(loading.load_task(config), loaded.tokenizer, config)
    reward_model, judged_task = _reward_model(config, task)
    problems = task.problems(config.rl.num_problems, config.seed, "train")
    problems, too_long = without_too_long(config, task, loaded, problems)
    return Setting(
        config=config,
        folder=folder,
        model=loaded._replace(params=None),
        task=task,
        reward_model=reward_model,
        judged_task=judged_task,
        problems=problems,
        too_long=too_long,
        order=batch_order(len(problems), config.rl.prompts_per_step, config.seed),
        thresholds=monitor.Thresholds(**config.rl.monitor),
    )


def restore(
    setting: Setting, saved: Checkpoints, train: state.TrainState, reference: Any
) -> tuple[state.TrainState, Any, int | None]:
    """State, reference policy and number of rollouts of the last checkpoint; None without one."""
    restored = saved.restore_latest(to_save(setting.config, train, reference))
    if restored is None:
        return train, reference, None
    kept, extra = restored
    setting.folder.check_identity(extra)
    return *from_saved(setting.config, kept, reference), extra["rollouts"]


def collect(
    setting: Setting, params: Any, reference: Any, step: int, stopwatch: Stopwatch
) -> Graded:
    """A step's rollout, judged and rewarded."""
    config, problems = setting.config, setting.problems_of(step)
    rollout, samples = rollouts.sample(config, setting.task, setting.policy(params), problems, step)
    stopwatch.lap("rollout", tokens=sum(len(sample.token_ids) for sample in samples))
    # The devices score the rollout while its responses are graded.
    logprobs = score_rollout(config, setting.model.config, params, reference, rollout)
    judged = rollouts.judge_responses(
        config, setting.judged_task, setting.reward_model, problems, samples, step
    )
    rewards = rollouts.rewards(config, setting.task, problems, samples, judged, step)
    stopwatch.lap("rewards")
    return Graded(problems, rollout, logprobs, samples, judged, rewards)


def inputs_of(setting: Setting, graded: Graded) -> AdvantageInputs:
    """What the rollout's advantages are made of; for process rewards, with the truth to compare."""
    config, rollout = setting.config, graded.rollout
    steps = rollouts.token_step_ids(
        setting.task, setting.model.tokenizer, graded.samples, rollout.tokens.shape[1]
    )
    inputs = advantage_inputs(
        config, rollout, graded.logprobs, graded.rewards, graded.judged, steps
    )
    if config.rl.advantage not in NEEDS_PROCESS_REWARDS:
        return inputs
    known = rollouts.step_truth(setting.task, graded.problems, graded.samples)
    return dataclasses.replace(inputs, step_truth=known)


def update_policy(
    setting: Setting, train: state.TrainState, batch: PolicyBatch
) -> tuple[state.TrainState, list[dict[str, Any]]]:
    """The updates of one rollout, and the metrics of each. They are under way when this returns."""
    config, updates = setting.config, []
    update = compiled_step(setting.model.config, json.dumps(update_settings(config)))
    for part in minibatches(config, batch):
        if part.mask.any():  # groups may all have been filtered out
            train, values = update(train, packed(config, part))
            updates.append(values)
    return train, updates


def record(
    setting: Setting,
    step: int,
    graded: Graded,
    inputs: AdvantageInputs,
    correct: Sequence[bool | None],
    usual_steps: float | None,
) -> dict[str, float]:
    """Keeps the rollout for the page; see `recording.record`."""
    return recording.record(
        setting.folder.path,
        setting.config,
        step,
        setting.task,
        setting.model.tokenizer,
        graded.problems,
        graded.samples,
        graded.judged,
        graded.rewards,
        inputs,
        correct,
        reward_model=setting.reward_model,
        asked=setting.judged_task.text_format,
        usual_steps=usual_steps,
    )


class Stopwatch:
    """Seconds of each part of a step, from one lap to the next, and tokens per second."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, name: str, tokens: int | None = None) -> None:
        now = time.monotonic()
        self.laps[name] = now - self._since
        if tokens is not None:
            self.laps[f"{name}_tokens_per_second"] = tokens / max(self.laps[name], 1e-9)
        self._since = now


class Log:
    """What a run writes down of every step, and what the monitor makes of it."""

    def __init__(self, setting: Setting, metrics: MetricsWriter, done: int | None) -> None:
        """Goes on after `done` steps: what was written of later ones is dropped."""
        self._setting, self._metrics = setting, metrics
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
        thresholds = self._setting.thresholds
        values = {n: v for n, v in jax.device_get(values).items() if not undefined(n, v)}
        if graded is not None:
            values |= monitor.metrics([*self._history, values], thresholds)
        self._metrics.scalars(step, values, seconds=seconds)
        self._history.append({"step": step, **values})
        if graded is None:
            return
        for alarm in monitor.raised(self._history, thresholds):
            logger.warning("%s: %s", self._setting.folder.path, alarm)
        if processes.is_main():
            _write_samples(self._setting.folder.samples / f"step_{step:06d}.jsonl", graded)
            self._show(step, graded)

    def usual_steps(self, values: dict[str, Any]) -> float | None:
        """Steps per response at the start of the run, `values` being those of a step to come."""
        return monitor.usual_steps([*self._history, values], self._setting.thresholds)

    def alarms(self) -> list[monitor.Alarm]:
        return monitor.alarms(self._history, self._setting.thresholds)

    def _show(self, step: int, graded: Graded) -> None:
        """Histograms, and the first problem's responses, in TensorBoard."""
        rollout = graded.rollout
        self._metrics.histogram(step, "reward", graded.rewards)
        self._metrics.histogram(step, "response/length", rollout.mask.sum(axis=1))
        self._metrics.histogram(step, "response/logprob", rollout.logprobs[rollout.mask])
        self._metrics.histogram(step, "response/steps", graded.judged.num_steps)
        if step % self._setting.config.rl.evaluate_every == 0:
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


def position(config: Config, folder: RunFolder, done: int) -> dict[str, Any]:
    """What a checkpoint notes beside the state: which run it is of, and where that run stands.

    The rollout that is pending is drawn from a seed and its own number alone, and the problems it
    is drawn for are the batch of that number: these are all there is to know of it.
    """
    return folder.identity | {
        "rollouts": done,
        "pending_rollout": {"seed": config.seed, "step": done + 1, "batch": done},
    }


def to_save(config: Config, train: state.TrainState, reference: Any) -> Any:
    """What a checkpoint holds: the train state, and the reference policy where it moves."""
    moves = config.rl.reference_decay is not None
    return {"train": train, "reference": reference} if moves else train


def from_saved(config: Config, saved: Any, reference: Any) -> tuple[state.TrainState, Any]:
    """The train state and the reference policy of a checkpoint."""
    moves = config.rl.reference_decay is not None
    return (saved["train"], saved["reference"]) if moves else (saved, reference)


def without_too_long(
    config: Config, task: tasks.Task, model: loading.Loaded, problems: Sequence[Problem]
) -> tuple[list[Problem], int]:
    """The problems whose prompts leave room for a response, and how many do not, which is logged.

    Raises ConfigError where none is left.
    """
    options = configuration.decode_options(config)
    limit = longest_prompt(model.config, config.decode.max_new_tokens, options)
    prompts = encode(model.tokenizer, [task.text_format.solve_prompt(p) for p in problems])
    kept = [p for p, ids in zip(problems, prompts, strict=True) if len(ids) <= limit]
    too_long = len(problems) - len(kept)
    if not kept:
        raise ConfigError(
            f"all {too_long} prompts have more than {limit} tokens; raise decode.max_prompt_length "
            "or lower decode.max_new_tokens"
        )
    if too_long:
        logger.warning(
            "%d of %d problems have prompts of more than %d tokens and are not trained on",
            too_long, len(problems), limit,
        )  # fmt: skip
    return kept, too_long


def _reward_model(config: Config, task: tasks.Task) -> tuple[TextModel | None, tasks.Task]:
    """The reward model, and the task as it is shown it."""
    if config.rl.reward not in REWARDS_THAT_JUDGE:
        return None, task
    model = loading.load_text_model(config, config.rl.reward_model)
    shown = loading.for_model(loading.load_task(config), model.tokenizer, config)
    return model, shown


def _reference_policy(config: Config, initial: Any, model_config: ModelConfig) -> Any:
    """Parameters of π_ref, the initial policy unless `rl.reference_model` names another; None where
    nothing compares with it. They are computed with the policy's configuration."""
    if not needs_reference_policy(config):
        if config.rl.reference_decay is not None:
            raise ConfigError(
                f"rl.reference_decay={config.rl.reference_decay} moves a reference policy that "
                f"rl.advantage={config.rl.advantage!r} without a KL term does not use; leave it out"
            )
        return None
    if not config.rl.reference_model:
        return initial
    other = loading.load_model(config.rl.reference_model, dtype=config.dtype)
    for field in dataclasses.fields(ModelConfig):
        given, needed = getattr(other.config, field.name), getattr(model_config, field.name)
        if given != needed and field.name not in loading.HOW_COMPUTED:
            raise ConfigError(
                f"rl.reference_model={config.rl.reference_model!r} has {field.name}={given}, the "
                f"policy {needed}; a reference policy must be of the policy's shape"
            )
    return other.params


def evaluation_metrics(scores: dict[str, Any]) -> dict[str, float]:
    """What `evaluate.policy_scores` found, as metrics; no accuracy where nothing can be graded."""
    sides = {"": "estimate", "_low": "low", "_high": "high"}
    accuracy = {f"eval/accuracy{end}": scores["accuracy"][side] for end, side in sides.items()}
    return {name: value for name, value in accuracy.items() if value is not None} | {
        "eval/response_length": scores["response_length"],
        "eval/format_kept": scores["format_kept"],
        "eval/steps": scores["steps"],
    }


def _key(config: Config) -> jax.Array:
    return jax.random.key(config.seed)


def _write_samples(path: Path, graded: Graded) -> None:
    """The responses of a rollout with their rewards, one JSON line each."""
    with path.open("w") as file:
        for problem, sample, reward in zip(
            graded.problems, graded.samples, graded.rewards, strict=True
        ):
            row = {"problem": problem.id, "response": sample.text, "reward": float(reward)}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    launch.main(run, checks.check_rl, unit="rollouts")
