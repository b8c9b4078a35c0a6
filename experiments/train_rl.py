"""SPARK stage III and SPRO: reinforcement learning with rewards and advantages by name.

    python -m spark_jax.experiments.train_rl --config=configs/demo.py --config.run_dir=runs/rl \
        --config.rl.reward_model=runs/prm/model --config.rl.advantage=grpo
    python -m spark_jax.experiments.train_rl --config=configs/demo.py --config.run_dir=runs/rlvr \
        --config.rl.reward=rule_based --config.rl.advantage=spro

`run` prepares and loops; `take_step` is the algorithm: rollout, judgements, rewards, advantages,
updates, log. Writes metrics, sampled responses, checkpoints, the trained policy (`model/`) and
`summary.json`. Rerunning the command resumes from the last checkpoint, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spark_jax import decoding, tasks
from spark_jax.advantages import (
    ADVANTAGES,
    AdvantageInputs,
    AdvantageSettings,
    dynamic_sampling_mask,
)
from spark_jax.data.records import Problem, SamplingSettings
from spark_jax.experiments import (
    checks,
    configuration,
    evaluate,
    launch,
    loading,
    recording,
    rl_log,
    rl_setup,
    rl_state,
)
from spark_jax.experiments.base_config import FORMER_DEFAULTS
from spark_jax.experiments.configuration import Config
from spark_jax.experiments.progress import OnProgress
from spark_jax.experiments.rl_setup import Setup
from spark_jax.experiments.rl_state import Graded, RLState, Sampled
from spark_jax.parallel import processes, sharding
from spark_jax.reports import plots
from spark_jax.response_format import MAX_STEPS
from spark_jax.rewards.prm import REWARDS, judge
from spark_jax.rewards.records import RewardInputs
from spark_jax.text_generation import (
    rollout_again,
    rollout_texts,
    sample_rollout,
    token_step_ids,
)
from spark_jax.training import spread, state
from spark_jax.training.checkpointing import Checkpoints
from spark_jax.training.metrics import MetricsWriter
from spark_jax.training.packing import pack_policy_batch
from spark_jax.training.policy import Objective, PolicyBatch, compiled_score
from spark_jax.training.preemption import Preempted, Watch
from spark_jax.training.run_folder import RunFolder


@configuration.on_mesh
def run(config: Config, path: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """One RL run in the folder `path`; returns its summary. Progress is in rollouts."""
    checks.check_rl(config)
    if REWARDS[config.rl.reward].judges:  # of a pipeline it is made before this run begins
        checks.model_exists("rl.reward_model", config.rl.reward_model)
    config = configuration.sub_config(config, "remat_save", "rl", "prm", "generate", "evaluate")
    loaded = loading.load_trainable(config, config.model)
    reference = rl_setup.load_reference(config, loaded.params, loaded.config)
    folder = RunFolder.open(path, config, FORMER_DEFAULTS)
    if (finished := folder.read_summary()) is not None:
        return finished
    setup = rl_setup.make_setup(config, folder, loaded)
    initial = loaded.params
    if reference is initial:  # the updates take over the memory of what they start from
        initial = state.copy(initial)
    key = jax.random.key(config.seed)
    train = spread.new_state(initial, rl_setup.make_optimizer(config), key, loaded.config)
    at = RLState(train, reference)
    del loaded, initial, train, reference

    keep = {"keep": config.rl.keep_checkpoints, "keep_every": config.rl.keep_every}
    with (
        Watch() as watch,
        Checkpoints(folder.checkpoints, **keep) as saved,
        MetricsWriter(path) as metrics,
    ):
        at, resumed = rl_state.restore(config, folder, saved, at, partial(sampled_before, setup))
        log = rl_log.Log(config, folder, metrics, at.done if resumed else None)
        scores: dict[str, Any] = {}
        if not resumed or at.done == config.rl.steps:  # else the last step evaluates
            scores = evaluate.policy_scores(config, setup.task, setup.text_model(at.train.params))
        if not resumed:
            log.write(0, rl_log.evaluation_metrics(scores))
        if on_progress:
            on_progress(at.done, config.rl.steps)

        while at.done < config.rl.steps:
            watch.hold(partial(saved.ensure, at.done, *rl_state.contents(config, folder, at)))
            at, found = take_step(setup, at, log, watch)
            scores = found or scores
            last, stop = at.done == config.rl.steps, watch.asked()
            if at.done % config.rl.save_every == 0 or last or stop:
                saved.save(at.done, *rl_state.contents(config, folder, at))
            if on_progress:
                on_progress(at.done, config.rl.steps)
            if stop:
                saved.wait()
                raise Preempted(0)

    loading.save_model(path / "model", setup.policy._replace(params=at.train.params))
    summary = {
        "evaluation": scores,
        "data": setup.task.data_counts("train") | {"too_long": setup.too_long},
        "skipped_updates": int(at.train.skipped),
        "alarms": [dataclasses.asdict(alarm) for alarm in log.alarms()],
    }
    folder.write_summary(summary)
    if processes.is_main():
        plots.training_curves(path / "metrics.jsonl", folder.plots)
    return summary


def take_step(
    setup: Setup, at: RLState, log: rl_log.Log, watch: Watch
) -> tuple[RLState, dict[str, Any] | None]:
    """One step; the state after it, and the scores of a step that evaluates. The updates take over
    the memory of the train state."""
    config, rl, step, stopwatch = setup.config, setup.config.rl, at.done + 1, rl_log.Stopwatch()
    reward = REWARDS[rl.reward]

    # Rollout: G responses to each problem, and their log-probs, which the devices work on.
    problems = setup.problems_of(step)
    rollout, samples = at.pending or sample(setup, at.train.params, step, stopwatch)
    policy_logprobs, ref_logprobs = score(setup, at, rollout)

    # Rewards: format checks, the reward model's judgements, and r of each response. Answers are
    # graded on threads; a reward that grades has them to itself. The truth is for the log alone.
    begin_truths = partial(rl_log.begin_truths, setup.task, problems, samples)
    truths = None if reward.grades else begin_truths()
    judged = judge(
        setup.reward_sampler(),
        setup.judge_format,
        problems,
        [sample.text for sample in samples],
        config.prm.kind,
        SamplingSettings(greedy=True, max_new_tokens=config.decode.max_new_tokens),
        seed=step,
        checks=tuple(rl.format_checks),
    )
    rewards = begin_rewards(setup, problems, samples, judged, step)
    stopwatch.lap("rewards")
    ahead = None
    if rl.one_step_off_policy and step < rl.steps:  # while answers are graded
        ahead = sample(setup, at.train.params, step + 1, stopwatch)
    graded = Graded(problems, rollout, samples, judged, rewards())
    stopwatch.lap("grading")
    truths = truths or begin_truths()

    # Advantages, of the groups that are trained on.
    inputs = AdvantageInputs(
        rewards=graded.rewards,
        mask=kept_groups(config, rollout.mask, graded.rewards),
        group_size=rl.group_size,
        policy_logprobs=policy_logprobs,
        ref_logprobs=ref_logprobs,
        verdicts=judged.verdicts if reward.gives_verdicts else None,
        step_ids=token_step_ids(
            setup.task.text_format.split_steps,
            setup.policy.tokenizer,
            samples,
            rollout.tokens.shape[1],
            MAX_STEPS,
        ),
        num_steps=MAX_STEPS,
    )
    step_truth = None  # grading takes its time: only where process rewards are compared with it
    if "ref_logprobs" in ADVANTAGES[rl.advantage].needs:
        texts = [sample.text for sample in samples]
        step_truth = tasks.step_labels(setup.task, problems, texts, MAX_STEPS)
    advantages, values = make_advantages(rl_setup.advantage_settings(config), inputs, step_truth)
    values |= rl_log.rollout_metrics(rollout, graded.rewards, inputs.mask, rl.group_size)
    kept = recording.is_recorded(config, step)
    inputs = jax.tree.map(np.asarray, inputs) if kept else inputs  # before memory is taken over

    # Updates: `epochs` passes over `minibatches` slices of the rollout.
    watch.release()
    train, updates = update(setup, at.train, rollout, inputs, advantages)
    reference = at.reference
    if rl.reference_decay is not None:
        reference = move_reference(train.params, reference, 1 - rl.reference_decay)

    # Log.
    correct = truths()  # while the devices work on the updates, for which nothing has waited yet
    values |= rl_log.update_metrics(updates) | judged.metrics
    values |= rl_log.truth_metrics(correct, judged)
    stopwatch.lap("update")
    if kept:
        values |= recording.record(
            setup.folder.path, config, step, setup.task, setup.policy.tokenizer, graded, inputs,
            correct, reward_model=setup.reward_model, judge_format=setup.judge_format,
            usual_steps=log.usual_steps(values),
        )  # fmt: skip
    scores = None
    if step % rl.evaluate_every == 0 or step == rl.steps:
        scores = evaluate.policy_scores(config, setup.task, setup.text_model(train.params))
        values |= rl_log.evaluation_metrics(scores)
        stopwatch.lap("evaluate")
    log.write(step, values, stopwatch.laps, graded)
    return RLState(train, reference, step, ahead), scores


# --- rollout -------------------------------------------------------------------------------------


def sample(setup: Setup, params: Any, step: int, stopwatch: rl_log.Stopwatch) -> Sampled:
    """A step's rollout, group-major."""
    config = setup.config
    rollout = sample_rollout(
        setup.text_model(params),
        setup.prompts_of(step),
        samples_per_prompt=config.rl.group_size,
        settings=SamplingSettings(
            temperature=config.rl.temperature, max_new_tokens=config.decode.max_new_tokens
        ),
        key=jax.random.fold_in(jax.random.key(config.seed), step),
        options=configuration.decode_options(config),
    )
    samples = rollout_texts(rollout, setup.policy.tokenizer)
    stopwatch.lap("rollout", tokens=sum(len(s.token_ids) for s in samples))
    return Sampled(rollout, samples)


def sampled_before(setup: Setup, step: int, samples: Mapping[str, Any]) -> Sampled:
    """What `sample` gave, from the arrays that were saved of it (`decoding.samples_of`)."""
    rollout = rollout_again(
        setup.policy.config,
        setup.policy.tokenizer,
        setup.prompts_of(step),
        samples,
        samples_per_prompt=setup.config.rl.group_size,
        max_new_tokens=setup.config.decode.max_new_tokens,
        options=configuration.decode_options(setup.config),
    )
    return Sampled(rollout, rollout_texts(rollout, setup.policy.tokenizer))


def score(setup: Setup, at: RLState, rollout: decoding.Rollout) -> tuple[Any, Any]:
    """Log-probs [B, T] under the policy and the reference (None where nothing compares with it).

    Process rewards compare the two: then the scorer scores both, since the sampler's log-probs
    differ from it by rounding, which a sum over a long prefix would add up.
    """
    if at.reference is None:
        return rollout.logprobs, None
    program = compiled_score(setup.policy.config, rl_setup.score_parts(setup.config))
    arrays = spread.rows((*prompts(setup.config, rollout), rollout.tokens, rollout.mask))
    reference = program(at.reference, *arrays)
    if "ref_logprobs" not in ADVANTAGES[setup.config.rl.advantage].needs:
        return rollout.logprobs, reference
    return program(at.train.params, *arrays), reference


def prompts(config: Config, rollout: decoding.Rollout) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of the prompt of every response, [B, L]."""
    tokens, mask = jax.device_get((rollout.prompt_tokens, rollout.prompt_mask))
    size = config.rl.group_size
    return np.repeat(tokens, size, axis=0), np.repeat(mask, size, axis=0)


# --- rewards and advantages ----------------------------------------------------------------------


def begin_rewards(
    setup: Setup, problems: list[Problem], samples: Sequence[Any], judged: Any, step: int
) -> Callable[[], np.ndarray]:
    """Begins to make r [B]; the function that is returned waits for it. Every process grades its
    share of the groups."""
    reward = REWARDS[setup.config.rl.reward]
    inputs = RewardInputs(
        problems=problems,
        responses=[sample.text for sample in samples],
        group_size=setup.config.rl.group_size,
        format=setup.task.text_format,
        format_ok=judged.format_ok,
        judgements=judged.judgements if reward.judges else None,
        seed=setup.config.seed * 1_000_003 + step,
    )
    if not reward.grades:
        rewards = reward(inputs)
        return lambda: rewards

    def grade(groups: Sequence[int]) -> list[Any]:
        if not groups:
            return []
        return np.split(reward(inputs.of_groups(groups[0], groups[-1] + 1)), len(groups))

    graded = processes.begin_share(range(len(samples) // inputs.group_size), grade)
    return lambda: np.concatenate(graded())


def kept_groups(config: Config, mask: Any, rewards: np.ndarray) -> Any:
    """The mask [B, T], 0 on groups that `rl.filter_low` and `rl.filter_high` leave out."""
    low, high = config.rl.filter_low, config.rl.filter_high
    if low is None and high is None:
        return mask
    low, high = 0.0 if low is None else low, 1.0 if high is None else high
    return (
        mask
        & np.asarray(
            dynamic_sampling_mask(jnp.asarray(rewards), config.rl.group_size, low=low, high=high)
        )[:, None]
    )


@functools.partial(jax.jit, static_argnames="advantage")
def make_advantages(
    advantage: AdvantageSettings, inputs: AdvantageInputs, step_truth: Any
) -> tuple[Any, dict[str, Any]]:
    """Advantages [B, T] and their metrics; those of process rewards are of the ones trained with.

    `step_truth` [B, K] is as verdicts are; None where the task does not know it.
    """
    advantages, process = advantage(inputs)
    return advantages, rl_log.advantage_metrics(advantages, process, inputs, step_truth)


# --- updates -------------------------------------------------------------------------------------


def update(
    setup: Setup, train: state.TrainState, rollout: decoding.Rollout, inputs: Any, advantages: Any
) -> tuple[state.TrainState, list[dict[str, Any]]]:
    """The updates of one rollout, and the metrics of each. They are under way when this returns."""
    config, metrics = setup.config, []
    prompt_tokens, prompt_mask = prompts(config, rollout)
    batch = PolicyBatch(
        prompt_tokens=prompt_tokens,
        prompt_mask=prompt_mask,
        tokens=rollout.tokens,
        mask=inputs.mask,
        old_logprobs=rollout.logprobs,
        advantages=advantages,
        ref_logprobs=inputs.ref_logprobs,
    )
    step = rl_setup.compiled_step(config, setup.policy.config)
    for part in minibatches(config, batch):
        if np.any(np.asarray(part.mask)):  # groups may all have been filtered out
            train, values = step(train, in_rows(config, part))
            metrics.append(values)
    return train, metrics


def minibatches(config: Config, batch: PolicyBatch) -> list[PolicyBatch]:
    """The batches of a rollout's updates: `epochs` passes over `minibatches` slices of groups."""
    n = config.rl.minibatches
    slices = [
        jax.tree.map(lambda x, i=i: x[i * len(x) // n : (i + 1) * len(x) // n], batch)
        for i in range(n)
    ]
    return slices * config.rl.epochs


def in_rows(config: Config, batch: PolicyBatch) -> Any:
    """The batch of one update, several responses to a row where `rl.pack` is set; its rows spread
    over the mesh, if there is one."""
    if not config.rl.pack:
        return batch if spread.mesh() is None else spread.rows(batch)
    objective = Objective(**configuration.objective_fields(config))
    multiple = config.rl.accumulation_steps * sharding.batch_shards()
    return spread.rows(pack_policy_batch(batch, objective, rows_multiple_of=multiple))


move_reference = jax.jit(optax.incremental_update)


if __name__ == "__main__":
    launch.main(run, checks.check_rl, unit="rollouts")
