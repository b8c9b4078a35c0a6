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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spark_jax.advantages import AdvantageInputs
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
    rl_state,
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
    update_metrics,
    update_settings,
)
from spark_jax.experiments.progress import OnProgress
from spark_jax.experiments.rl_log import Log, Stopwatch, evaluation_metrics
from spark_jax.experiments.rl_state import RLState
from spark_jax.experiments.rollouts import Graded, Sampled
from spark_jax.models.config import ModelConfig
from spark_jax.parallel import processes
from spark_jax.reports import plots
from spark_jax.rewards.prm import REWARDS_THAT_GRADE, REWARDS_THAT_JUDGE
from spark_jax.text_generation import (
    TextModel,
    encode,
    longest_prompt,
)
from spark_jax.training import spread, state
from spark_jax.training.checkpointing import Checkpoints
from spark_jax.training.metrics import MetricsWriter
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

    def policy(self, params: Any) -> TextModel:
        return loading.text_model(*self.model._replace(params=params), name="policy")

    def problems_of(self, step: int) -> list[Problem]:
        """The problem of each response of a step's rollout."""
        chosen = self.order[step - 1]
        return [self.problems[i] for i in chosen for _ in range(self.config.rl.group_size)]

    def sample(self, params: Any, step: int, stopwatch: Stopwatch) -> Sampled:
        """A step's rollout."""
        problems = self.problems_of(step)
        sampled = rollouts.sample(self.config, self.task, self.policy(params), problems, step)
        stopwatch.lap("rollout", tokens=sum(len(s.token_ids) for s in sampled.samples))
        return sampled

    def sampled_before(self, step: int, samples: Mapping[str, Any]) -> Sampled:
        """What `sample` gave, from the arrays that were saved of it."""
        problems, tokenizer = self.problems_of(step), self.model.tokenizer
        return rollouts.sampled_before(
            self.config, self.task, self.model.config, tokenizer, problems, samples
        )


@configuration.on_mesh
def run(config: Config, path: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """One RL run in the folder `path`; returns its summary. Progress is in rollouts."""
    checks.check_rl(config)
    if config.rl.reward in REWARDS_THAT_JUDGE:  # of a pipeline it is made before this run begins
        checks.model_exists("rl.reward_model", config.rl.reward_model)
    config = configuration.sub_config(config, "remat_save", "rl", "prm", "generate", "evaluate")
    loaded = loading.load_trainable(config, config.model)
    reference = _reference_policy(config, loaded.params, loaded.config)
    folder = RunFolder.open(path, config)
    if (finished := folder.read_summary()) is not None:
        return finished
    setting = make_setting(config, folder, loaded)
    initial = loaded.params
    if reference is initial:  # the updates take over the memory of what they start from
        initial = state.copy(initial)
    key = jax.random.key(config.seed)
    train = spread.new_state(initial, make_optimizer(config), key, loaded.config)
    at = RLState(train, reference)
    del loaded, initial, train, reference

    keep = {"keep": config.rl.keep_checkpoints, "keep_every": config.rl.keep_every}
    with (
        Watch() as watch,
        Checkpoints(folder.checkpoints, **keep) as saved,
        MetricsWriter(path) as metrics,
    ):
        at, resumed = rl_state.restore(config, folder, saved, at, setting.sampled_before)
        log = Log(config, folder, metrics, at.done if resumed else None)
        scores: dict[str, Any] = {}
        if not resumed or at.done == config.rl.steps:  # else the last step evaluates
            policy = setting.policy(at.train.params)
            scores = evaluate.policy_scores(config, setting.task, policy)
        if not resumed:
            log.write(0, evaluation_metrics(scores))
        if on_progress:
            on_progress(at.done, config.rl.steps)

        while at.done < config.rl.steps:
            watch.hold(partial(saved.ensure, at.done, *rl_state.contents(config, folder, at)))
            at, found = take_step(setting, at, log, watch)
            scores = found or scores
            last, stop = at.done == config.rl.steps, watch.asked()
            if at.done % config.rl.save_every == 0 or last or stop:
                saved.save(at.done, *rl_state.contents(config, folder, at))
            if on_progress:
                on_progress(at.done, config.rl.steps)
            if stop:
                saved.wait()
                raise Preempted(0)

    loading.save_model(path / "model", setting.model._replace(params=at.train.params))
    summary = {
        "evaluation": scores,
        "data": setting.task.data_counts("train") | {"too_long": setting.too_long},
        "skipped_updates": int(at.train.skipped),
        "alarms": [dataclasses.asdict(alarm) for alarm in log.alarms()],
    }
    folder.write_summary(summary)
    if processes.is_main():
        plots.training_curves(path / "metrics.jsonl", folder.plots)
    return summary


def take_step(
    setting: Setting, at: RLState, log: Log, watch: Watch
) -> tuple[RLState, dict[str, Any] | None]:
    """Rollout, rewards, advantages, updates; the state after them, and the scores of a step that
    evaluates. The updates take over the memory of the train state."""
    config, stopwatch, step = setting.config, Stopwatch(), at.done + 1
    train, reference = at.train, at.reference
    graded, logprobs, truths, ahead = collect(setting, at, stopwatch)
    inputs = inputs_of(setting, graded, logprobs)
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
    correct = truths()  # while the devices work on the updates, for which nothing has waited yet
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
    return RLState(train, reference, step, ahead), scores


def collect(
    setting: Setting, at: RLState, stopwatch: Stopwatch
) -> tuple[Graded, Logprobs, Callable[[], list[bool | None]], Sampled | None]:
    """A step's rollout, judged and rewarded; its log-probs, which the devices work on; what gives
    the truth about it, which graders work on; and the next rollout.

    That one is None, to be sampled from the policy that this step's updates make, unless
    `rl.one_step_off_policy` has it sampled before them, while this one is graded.
    """
    config, step = setting.config, at.done + 1
    problems = setting.problems_of(step)
    rollout, samples = at.pending or setting.sample(at.train.params, step, stopwatch)
    logprobs = score_rollout(config, setting.model.config, at.train.params, at.reference, rollout)
    begin_truths = partial(rollouts.begin_truths, setting.task, problems, samples)
    # A reward that grades has the graders to itself.
    truths = None if config.rl.reward in REWARDS_THAT_GRADE else begin_truths()
    judged = rollouts.judge_responses(
        config, setting.judged_task, setting.reward_model, problems, samples, step
    )
    rewards = rollouts.begin_rewards(config, setting.task, problems, samples, judged, step)
    stopwatch.lap("rewards")
    ahead = None
    if config.rl.one_step_off_policy and step < config.rl.steps:
        ahead = setting.sample(at.train.params, step + 1, stopwatch)
    graded = Graded(problems, rollout, samples, judged, rewards())
    stopwatch.lap("grading")
    return graded, logprobs, truths or begin_truths(), ahead


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
    )


def inputs_of(setting: Setting, graded: Graded, logprobs: Logprobs) -> AdvantageInputs:
    """What the rollout's advantages are made of; for process rewards, with the truth to compare."""
    config, rollout = setting.config, graded.rollout
    steps = rollouts.token_step_ids(
        setting.task, setting.model.tokenizer, graded.samples, rollout.tokens.shape[1]
    )
    inputs = advantage_inputs(config, rollout, logprobs, graded.rewards, graded.judged, steps)
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
        if np.any(np.asarray(part.mask)):  # groups may all have been filtered out
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


if __name__ == "__main__":
    launch.main(run, checks.check_rl, unit="rollouts")
