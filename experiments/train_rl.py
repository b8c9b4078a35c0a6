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
import functools
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spark_jax import decoding
from spark_jax.advantages import (
    ADVANTAGES,
    AdvantageInputs,
    dynamic_sampling_mask,
    masked_step,
    zero_variance_groups,
)
from spark_jax.data import tasks
from spark_jax.data.batches import batch_order
from spark_jax.data.records import Problem, SamplingSettings
from spark_jax.evaluation.grading import in_threads
from spark_jax.experiments import evaluate, launch, recording
from spark_jax.experiments.launch import Config, OnProgress
from spark_jax.models.config import ModelConfig
from spark_jax.parallel import processes, sharding
from spark_jax.reports import plots
from spark_jax.rewards import monitor
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
from spark_jax.rewards.process import (
    cumulative_process_reward,
    process_reward_auc,
    step_process_rewards,
)
from spark_jax.rewards.records import RewardInputs
from spark_jax.scoring import response_logprobs_and_entropy
from spark_jax.steps import step_ids, token_offsets
from spark_jax.text_generation import (
    SampledText,
    TextModel,
    encode,
    longest_prompt,
    rollout_texts,
    sample_rollout,
    text_sampler,
)
from spark_jax.training import optimizer, spread, state
from spark_jax.training.checkpointing import Checkpoints
from spark_jax.training.metrics import MetricsWriter, read_metrics
from spark_jax.training.packing import PackedPolicyBatch, pack_policy_batch
from spark_jax.training.policy import Objective, PolicyBatch, policy_step
from spark_jax.training.preemption import Preempted, Watch
from spark_jax.training.run_folder import RunFolder
from spark_jax.training.update import in_micro_batches

logger = logging.getLogger(__name__)

NEEDS_PROCESS_REWARDS = ("spro", "masked_step", "prime")


@launch.on_mesh
def run(config: Config, path: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """One RL run in the folder `path`; returns its summary. Progress is in rollouts."""
    launch.check_rl(config)
    config = launch.sub_config(config, "rl", "prm", "generate", "evaluate")
    loaded = launch.load_trainable(config, config.model)
    initial, model_config, tokenizer, _ = loaded
    reference = _reference_policy(config, initial, model_config)
    folder = RunFolder.open(path, config)
    if (finished := folder.read_summary()) is not None:
        return finished
    task = launch.for_model(launch.load_task(config), tokenizer, config)
    reward_model, judged_task = _reward_model(config, task)
    problems = task.problems(config.rl.num_problems, config.seed, "train")
    problems, too_long = without_too_long(config, task, loaded, problems)
    order = batch_order(len(problems), config.rl.prompts_per_step, config.seed)
    thresholds = monitor.Thresholds(**config.rl.monitor)

    update = compiled_step(model_config, json.dumps(update_settings(config)))
    if reference is initial:  # the updates take over the memory of what they start from
        initial = jax.tree.map(jnp.copy, initial)
    train = spread.new_state(initial, make_optimizer(config), _key(config), model_config)

    keep = {"keep": config.rl.keep_checkpoints, "keep_every": config.rl.keep_every}
    with (
        Checkpoints(folder.checkpoints, **keep) as saved,
        MetricsWriter(path) as metrics,
        Watch() as watch,
    ):
        restored = saved.restore_latest(to_save(config, train, reference))
        if restored is not None:
            state_of_run, extra = restored
            train, reference = from_saved(config, state_of_run, reference)
            folder.check_identity(extra)
        first = 1 + (extra["rollouts"] if restored is not None else 0)
        metrics.truncate_after(first - 1 if restored is not None else -1)
        history = read_metrics(metrics.path) if processes.is_main() else []
        policy = launch.text_model(*loaded._replace(params=train.params), name="policy")
        if restored is None or first > config.rl.steps:  # else the last step evaluates
            scores = evaluate.policy_scores(config, task, policy)
        if restored is None:
            metrics.scalars(0, evaluation_metrics(scores))
            history.append({"step": 0, **evaluation_metrics(scores)})

        for step in range(first, config.rl.steps + 1):
            at = position(config, folder, step - 1)
            state_of_run = to_save(config, train, reference)
            watch.hold(functools.partial(saved.ensure, step - 1, state_of_run, at))
            batch_problems = [
                problems[i] for i in order[step - 1] for _ in range(config.rl.group_size)
            ]
            rollout, samples = roll_out(config, task, policy, batch_problems, step)
            judged = judge_responses(
                config, judged_task, reward_model, batch_problems, samples, step
            )
            rewards = compute_rewards(config, task, batch_problems, samples, judged, step)
            steps = token_step_ids(task, tokenizer, samples, rollout.tokens.shape[1])
            inputs = advantage_inputs(
                config, model_config, train.params, reference, rollout, rewards, judged, steps
            )
            if config.rl.advantage in NEEDS_PROCESS_REWARDS:
                known = step_truth(task, batch_problems, samples)
                inputs = dataclasses.replace(inputs, step_truth=known)
            unmoved = int(train.step) == 0 and not config.rl.reference_model
            batch, values = make_batch(config, rollout, inputs, unmoved)
            if kept := recording.is_recorded(config, step):
                shown = as_sampled(config, model_config, train.params, rollout, inputs, unmoved)
            updates = []
            watch.release()
            for part in minibatches(config, batch):
                if part.mask.any():  # groups may all have been filtered out
                    train, update_values = update(train, packed(config, part))
                    updates.append(update_values)
            policy = launch.text_model(*loaded._replace(params=train.params), name="policy")
            if config.rl.reference_decay is not None:
                reference = moved(reference, train.params, config.rl.reference_decay)
            # Graded while the devices still work on the updates, for which nothing has waited yet.
            correct = truths(task, batch_problems, samples)

            values |= update_metrics(updates) | judged.metrics | truth_metrics(correct, judged)
            if kept:
                values |= recording.record(
                    path, config, step, task, tokenizer, batch_problems, samples, judged, rewards,
                    shown, correct, reward_model=reward_model, asked=judged_task.text_format,
                    usual_steps=monitor.usual_steps([*history, values], thresholds),
                )  # fmt: skip
            if step % config.rl.evaluate_every == 0 or step == config.rl.steps:
                scores = evaluate.policy_scores(config, task, policy)
                values |= evaluation_metrics(scores)
            values = jax.device_get(values)
            values |= monitor.metrics([*history, values], thresholds)
            metrics.scalars(step, values)
            history.append({"step": step, **values})
            for alarm in monitor.raised(history, thresholds):
                logger.warning("%s: %s", path, alarm)
            if processes.is_main():
                samples_path = folder.samples / f"step_{step:06d}.jsonl"
                _write_samples(samples_path, batch_problems, samples, rewards)
            last, stop = step == config.rl.steps, watch.asked()
            if step % config.rl.save_every == 0 or last or stop:
                state_of_run = to_save(config, train, reference)
                saved.save(step, state_of_run, position(config, folder, step))
            if on_progress:
                on_progress(step, config.rl.steps)
            if stop and not last:
                saved.wait()
                raise Preempted(0)

    launch.save_model(path / "model", loaded._replace(params=train.params))
    summary = {
        "evaluation": scores,
        "data": task.data_counts("train") | {"too_long": too_long},
        "skipped_updates": int(train.skipped),
        "alarms": [dataclasses.asdict(alarm) for alarm in monitor.alarms(history, thresholds)],
    }
    folder.write_summary(summary)
    if processes.is_main():
        plots.training_curves(path / "metrics.jsonl", folder.plots)
    return summary


def position(config: Config, folder: RunFolder, rollouts: int) -> dict[str, Any]:
    """What a checkpoint notes beside the state: which run it is of, and where that run stands.

    The rollout that is pending is drawn from a seed and its own number alone, and the problems it
    is drawn for are the batch of that number: these are all there is to know of it.
    """
    return folder.identity | {
        "rollouts": rollouts,
        "pending_rollout": {"seed": config.seed, "step": rollouts + 1, "batch": rollouts},
    }


def to_save(config: Config, train: state.TrainState, reference: Any) -> Any:
    """What a checkpoint holds: the train state, and the reference policy where it moves."""
    moves = config.rl.reference_decay is not None
    return {"train": train, "reference": reference} if moves else train


def from_saved(config: Config, saved: Any, reference: Any) -> tuple[state.TrainState, Any]:
    """The train state and the reference policy of a checkpoint."""
    moves = config.rl.reference_decay is not None
    return (saved["train"], saved["reference"]) if moves else (saved, reference)


@jax.jit
def moved(reference: Any, params: Any, decay: Any) -> Any:
    """The reference policy after an update: decay · itself + (1 − decay) · the policy."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, reference, params)


def without_too_long(
    config: Config, task: tasks.Task, model: launch.Loaded, problems: Sequence[Problem]
) -> tuple[list[Problem], int]:
    """The problems whose prompts leave room for a response, and how many do not, which is logged.

    Raises ConfigError where none is left.
    """
    options = launch.decode_options(config)
    limit = longest_prompt(model.config, config.decode.max_new_tokens, options)
    prompts = encode(model.tokenizer, [task.text_format.solve_prompt(p) for p in problems])
    kept = [p for p, ids in zip(problems, prompts, strict=True) if len(ids) <= limit]
    too_long = len(problems) - len(kept)
    if not kept:
        raise launch.ConfigError(
            f"all {too_long} prompts have more than {limit} tokens; raise decode.max_prompt_length "
            "or lower decode.max_new_tokens"
        )
    if too_long:
        logger.warning(
            "%d of %d problems have prompts of more than %d tokens and are not trained on",
            too_long, len(problems), limit,
        )  # fmt: skip
    return kept, too_long


def roll_out(
    config: Config, task: tasks.Task, policy: TextModel, problems: Sequence[Problem], step: int
) -> tuple[decoding.Rollout, list[SampledText]]:
    """G responses to every G-th of the B problems (they stand there once per response)."""
    different = problems[:: config.rl.group_size]
    rollout = sample_rollout(
        policy,
        [task.text_format.solve_prompt(problem) for problem in different],
        samples_per_prompt=config.rl.group_size,
        settings=SamplingSettings(
            temperature=config.rl.temperature, max_new_tokens=config.decode.max_new_tokens
        ),
        key=jax.random.fold_in(_key(config), step),
        options=launch.decode_options(config),
    )
    return rollout, rollout_texts(rollout, policy.tokenizer)


def judge_responses(
    config: Config,
    task: tasks.Task,
    reward_model: TextModel | None,
    problems: Sequence[Problem],
    samples: Sequence[SampledText],
    step: int,
) -> Judged:
    """Format checks, and the reward model's judgements where the reward needs them."""
    options = launch.decode_options(config)
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


def compute_rewards(
    config: Config,
    task: tasks.Task,
    problems: Sequence[Problem],
    samples: Sequence[SampledText],
    judged: Judged,
    step: int,
) -> np.ndarray:
    """r [B]. Only a reward that needs references is handed problems that still have them."""
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
        return graded_together(config.rl.reward, inputs)
    return REWARDS[config.rl.reward](inputs)


def graded_together(reward: str, inputs: RewardInputs) -> np.ndarray:
    """A reward whose rows depend on their own group alone, every process grading its share."""

    def grade(groups: Sequence[int]) -> list[Any]:
        if not groups:
            return []
        size = inputs.group_size
        rows = slice(groups[0] * size, (groups[-1] + 1) * size)
        names = ("problems", "responses", "format_ok")
        part = {name: getattr(inputs, name)[rows] for name in names}
        return np.split(REWARDS[reward](dataclasses.replace(inputs, **part)), len(groups))

    groups = range(len(inputs.responses) // inputs.group_size)
    return np.concatenate(processes.share(groups, grade))


def advantage_inputs(
    config: Config,
    model_config: Any,
    params: Any,
    reference: Any,
    rollout: decoding.Rollout,
    rewards: np.ndarray,
    judged: Judged,
    steps: np.ndarray,
) -> AdvantageInputs:
    """All that an advantage may look at.

    Where process rewards compare the policy with the reference, the scorer scores both: the
    sampler's log-probs differ from it by rounding, which a sum over a long prefix would add up. The
    policy's are None where the update makes the advantages, from log-probs of its own.
    """
    ref_logprobs, policy_logprobs = None, rollout.logprobs
    if reference is not None:
        score = functools.partial(_score, config, model_config, rollout)
        ref_logprobs = score(reference)
        if config.rl.advantage in NEEDS_PROCESS_REWARDS:
            policy_logprobs = None if made_in_step(config) else score(params)
    return AdvantageInputs(
        rewards=jnp.asarray(rewards),
        mask=rollout.mask,
        group_size=config.rl.group_size,
        policy_logprobs=policy_logprobs,
        ref_logprobs=ref_logprobs,
        verdicts=jnp.asarray(judged.verdicts),
        step_ids=jnp.asarray(steps),
    )


def make_batch(
    config: Config, rollout: decoding.Rollout, inputs: AdvantageInputs, unmoved: bool
) -> tuple[PolicyBatch, dict[str, Any]]:
    """What the update needs, and metrics of rewards and advantages. `unmoved`: the policy still is
    the reference, so that no process reward differs from 0, whatever two passes round."""
    options = _advantage_options(config)
    mask = rollout.mask & _kept_groups(config, inputs.rewards)[:, None]
    batch = PolicyBatch(
        prompt_tokens=jnp.repeat(rollout.prompt_tokens, config.rl.group_size, axis=0),
        prompt_mask=jnp.repeat(rollout.prompt_mask, config.rl.group_size, axis=0),
        tokens=rollout.tokens,
        mask=mask,
        old_logprobs=rollout.logprobs,
        advantages=None,
        ref_logprobs=inputs.ref_logprobs,
    )
    metrics = {}
    if made_in_step(config):
        made_of = (inputs, jnp.asarray(unmoved))
        batch = dataclasses.replace(batch, advantage_inputs=made_of)
    else:
        make = compiled_advantage(config.rl.advantage, options)
        advantages, metrics = make(inputs.policy_logprobs, (inputs, jnp.asarray(False)))
        batch = dataclasses.replace(batch, advantages=advantages)
    metrics |= {
        "reward/mean": inputs.rewards.mean(),
        "reward/std": inputs.rewards.std(),
        "reward/zero_variance_groups": zero_variance_groups(inputs.rewards, config.rl.group_size)
        / config.rl.prompts_per_step,
        "response/length": rollout.mask.sum(axis=1).mean(),
        "response/finished": rollout.finished.mean(),
        "response/trained_on": mask.any(axis=1).mean(),
        "decode/slot_occupancy": rollout.slot_occupancy,
    }
    return batch, metrics


def as_sampled(
    config: Config,
    model_config: Any,
    params: Any,
    rollout: decoding.Rollout,
    inputs: AdvantageInputs,
    unmoved: bool,
) -> AdvantageInputs:
    """What this rollout's advantages are made of, to be shown: with the log-probs that the update
    makes of its own, and those of the reference for a policy that still is the reference. Arrays of
    this process alone, whatever the mesh."""
    logprobs = inputs.policy_logprobs
    if inputs.ref_logprobs is not None and unmoved:
        logprobs = inputs.ref_logprobs
    elif logprobs is None:
        logprobs = _score(config, model_config, rollout, params)
    shown = dataclasses.replace(inputs, policy_logprobs=logprobs)
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), shown)


def made_in_step(config: Config) -> bool:
    """Whether the update itself makes the advantages, from the log-probs of its own forward pass.

    It does where an advantage reads the policy's log-probs and the update sees the whole rollout,
    once, with the policy that sampled it: a forward pass is saved.
    """
    rl = config.rl
    whole = rl.epochs == rl.minibatches == rl.accumulation_steps == 1 and not rl.pack
    return rl.advantage in NEEDS_PROCESS_REWARDS and whole


def packed(config: Config, batch: PolicyBatch) -> PolicyBatch | PackedPolicyBatch:
    """The batch of one update, several responses to a row where `rl.pack` is set; its rows spread
    over the mesh, if there is one."""
    if not config.rl.pack:
        return batch if spread.mesh() is None else spread.rows(batch)
    objective = Objective(**launch.objective_fields(config))
    multiple = config.rl.accumulation_steps * sharding.batch_shards()
    return spread.rows(pack_policy_batch(batch, objective, rows_multiple_of=multiple))


def update_metrics(updates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of a rollout's updates: means over them; skipped updates summed; and the gap
    between sampler and scorer at the first one, before the policy has moved."""
    if not updates:
        return {"policy/updates": 0}
    means = {name: np.mean([values[name] for values in updates]) for name in updates[0]}
    means |= {name: updates[0][name] for name in ("logprob_gap_max", "logprob_gap_mean")}
    means["update_skipped"] = np.sum([values["update_skipped"] for values in updates])
    named = {name if "/" in name else f"policy/{name}": value for name, value in means.items()}
    return {"policy/updates": len(updates)} | named


def minibatches(config: Config, batch: PolicyBatch) -> list[PolicyBatch]:
    """The batches of a rollout's updates: `epochs` passes over `minibatches` slices of groups."""
    n = config.rl.minibatches
    if n == 1:  # not all that belongs to a whole batch has rows
        return [batch] * config.rl.epochs
    slices = [
        jax.tree.map(lambda x, i=i: x[i * len(x) // n : (i + 1) * len(x) // n], batch)
        for i in range(n)
    ]
    return slices * config.rl.epochs


def step_truth(
    task: tasks.Task, problems: Sequence[Problem], samples: Sequence[SampledText]
) -> jax.Array | None:
    """[B, K]: which steps are right (+1) and wrong (−1), 0 where there is none, for metrics alone.
    None for a task that does not know."""
    known = [task.labels(p, s.text)[0] for p, s in zip(problems, samples, strict=True)]
    if any(labels is None for labels in known):
        return None
    truth = np.zeros((len(known), MAX_STEPS), np.int8)
    for row, labels in zip(truth, known, strict=True):
        signs = np.where(np.array(labels, bool), 1, -1)[:MAX_STEPS]
        row[: len(signs)] = signs
    return jnp.asarray(truth)


def token_step_ids(
    task: tasks.Task, tokenizer: Any, samples: Sequence[SampledText], num_tokens: int
) -> np.ndarray:
    """[B, T]: which step each sampled token belongs to, −1 outside any, as at the stop token."""
    bodies = [s.token_ids[:-1] if s.finished else s.token_ids for s in samples]
    texts, offsets = zip(*(token_offsets(tokenizer, body) for body in bodies), strict=True)
    spans = [task.text_format.split_steps(text)[:MAX_STEPS] for text in texts]
    return step_ids(spans, offsets, num_tokens)


def truths(
    task: tasks.Task, problems: Sequence[Problem], samples: Sequence[SampledText]
) -> list[bool | None]:
    """Whether each answer is right, None without a reference: what the run may look at but never
    learn from."""

    def grade(rows: Sequence[tuple[Problem, SampledText]]) -> list[bool | None]:
        texts = [sample.text for _, sample in rows]
        is_right = functools.partial(evaluate.is_right, task)
        return in_threads(is_right, [problem for problem, _ in rows], texts)

    return processes.share(list(zip(problems, samples, strict=True)), grade)


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


def needs_reference_policy(config: Config) -> bool:
    return config.rl.advantage in NEEDS_PROCESS_REWARDS or config.rl.objective.kl_coefficient > 0


def compiled_step(model_config: Any, settings: str) -> Any:
    """One compiled policy step per setting and mesh in scope, shared by all runs of a process."""
    return _compiled_step(model_config, settings, spread.mesh())


@functools.lru_cache(maxsize=16)
def _compiled_step(model_config: Any, settings: str, _: Mesh | None) -> Any:
    values = json.loads(settings)
    step = functools.partial(
        policy_step,
        model_config=model_config,
        optimizer=optimizer.make(values["optimizer"]),
        objective=Objective(**values["objective"]),
        accumulation_steps=values["accumulation_steps"],
        advantage_function=_advantage_function(*values["made_in_step"])
        if values["made_in_step"]
        else None,
    )
    return jax.jit(spread.kept_in_place(step, model_config), donate_argnums=0)


@functools.lru_cache(maxsize=16)
def compiled_score(model_config: Any, parts: int) -> Any:
    """Log-probs of responses under a fixed policy, compiled; a part of the rows at a time, and
    whole on every device."""

    def score(params: Any, *arrays: Any) -> Any:
        def logprobs(rows: Any) -> Any:
            return response_logprobs_and_entropy(params, model_config, *rows)[0]

        return sharding.constrain(in_micro_batches(logprobs, arrays, parts), (None, None))

    return jax.jit(score)


def score_parts(config: Config) -> int:
    """In how many parts the rows of a rollout are scored: as many rows at a time as an update has,
    where the mesh in scope divides these."""
    rl = config.rl
    rows = rl.prompts_per_step * rl.group_size
    return math.gcd(rl.minibatches * rl.accumulation_steps, rows // sharding.batch_shards())


@functools.lru_cache(maxsize=16)
def compiled_advantage(name: str, options: str) -> Any:
    return jax.jit(_advantage_function(name, options))


def _advantage_function(name: str, options: str) -> Any:
    """A `policy.AdvantageFunction` of (AdvantageInputs, whether the policy is the reference)."""
    given = json.loads(options)

    def make(policy_logprobs: Any, made_of: tuple[AdvantageInputs, Any]) -> Any:
        inputs, unmoved = made_of
        if inputs.ref_logprobs is not None:
            policy_logprobs = jnp.where(unmoved, inputs.ref_logprobs, policy_logprobs)
        inputs = dataclasses.replace(inputs, policy_logprobs=policy_logprobs)
        advantages = ADVANTAGES[name](inputs, **given)
        metrics = {"advantage/mean_absolute": jnp.abs(advantages).sum() / inputs.mask.sum()}
        if name in NEEDS_PROCESS_REWARDS:
            metrics |= _process_metrics(inputs, given.get("beta"))
        return advantages, metrics

    return make


def _process_metrics(inputs: AdvantageInputs, beta: float | None) -> dict[str, Any]:
    """Size of the masked step advantage; whether process rewards agree with step verdicts."""
    given = {} if beta is None else {"beta": beta}
    returns = cumulative_process_reward(
        inputs.policy_logprobs, inputs.ref_logprobs, inputs.mask, **given
    )
    msa = masked_step(returns, inputs.mask, inputs.group_size)
    steps = step_process_rewards(returns, inputs.step_ids, num_steps=MAX_STEPS)
    metrics = {
        "spro/msa_mean_absolute": jnp.abs(msa).sum() / inputs.mask.sum(),
        "spro/process_reward_auc_verdicts": process_reward_auc(steps, inputs.verdicts),
    }
    if inputs.step_truth is not None:
        metrics["spro/process_reward_auc_truth"] = process_reward_auc(steps, inputs.step_truth)
    return metrics


def _advantage_options(config: Config) -> str:
    return json.dumps(launch.given(config.rl.advantage_options))


def _reward_model(config: Config, task: tasks.Task) -> tuple[TextModel | None, tasks.Task]:
    """The reward model, and the task as it is shown it."""
    if config.rl.reward not in REWARDS_THAT_JUDGE:
        return None, task
    if not config.rl.reward_model:
        raise launch.ConfigError(
            f"rl.reward={config.rl.reward!r} needs rl.reward_model, the checkpoint folder of a "
            "reward model; train_prm makes one in its run_dir/model"
        )
    model = launch.load_text_model(config, config.rl.reward_model)
    shown = launch.for_model(launch.load_task(config), model.tokenizer, config)
    return model, shown


def _reference_policy(config: Config, initial: Any, model_config: ModelConfig) -> Any:
    """Parameters of π_ref, the initial policy unless `rl.reference_model` names another; None where
    nothing compares with it. They are computed with the policy's configuration."""
    if not needs_reference_policy(config):
        if config.rl.reference_decay is not None:
            raise launch.ConfigError(
                f"rl.reference_decay={config.rl.reference_decay} moves a reference policy that "
                f"rl.advantage={config.rl.advantage!r} without a KL term does not use; leave it out"
            )
        return None
    if not config.rl.reference_model:
        return initial
    other = launch.load_model(config.rl.reference_model, dtype=config.dtype)
    for field in dataclasses.fields(ModelConfig):
        given, needed = getattr(other.config, field.name), getattr(model_config, field.name)
        if given != needed and field.name not in ("dtype", "max_positions", "remat"):
            raise launch.ConfigError(
                f"rl.reference_model={config.rl.reference_model!r} has {field.name}={given}, the "
                f"policy {needed}; a reference policy must be of the policy's shape"
            )
    return other.params


def _score(config: Config, model_config: Any, rollout: decoding.Rollout, params: Any) -> jax.Array:
    prompts = (rollout.prompt_tokens, rollout.prompt_mask)
    tokens, mask = (jnp.repeat(x, config.rl.group_size, axis=0) for x in prompts)
    arrays = (tokens, mask, rollout.tokens, rollout.mask)
    return compiled_score(model_config, score_parts(config))(params, *spread.rows(arrays))


def evaluation_metrics(scores: dict[str, Any]) -> dict[str, float]:
    """What `evaluate.policy_scores` found, as metrics; no accuracy where nothing can be graded."""
    sides = {"": "estimate", "_low": "low", "_high": "high"}
    accuracy = {f"eval/accuracy{end}": scores["accuracy"][side] for end, side in sides.items()}
    return {name: value for name, value in accuracy.items() if value is not None} | {
        "eval/response_length": scores["response_length"],
        "eval/format_kept": scores["format_kept"],
        "eval/steps": scores["steps"],
    }


def _kept_groups(config: Config, rewards: jax.Array) -> jax.Array:
    low, high = config.rl.filter_low, config.rl.filter_high
    if low is None and high is None:
        return jnp.ones(len(rewards), bool)
    low, high = 0.0 if low is None else low, 1.0 if high is None else high
    return dynamic_sampling_mask(rewards, config.rl.group_size, low=low, high=high)


def update_settings(config: Config) -> dict[str, Any]:
    """What the compiled update depends on, as JSON values."""
    updates = config.rl.steps * config.rl.minibatches * config.rl.epochs
    return {
        "optimizer": {**config.rl.optimizer.to_dict(), "total_steps": updates},
        "objective": launch.objective_fields(config),
        "accumulation_steps": config.rl.accumulation_steps,
        "made_in_step": [config.rl.advantage, _advantage_options(config)]
        if made_in_step(config)
        else None,
    }


def make_optimizer(config: Config) -> Any:
    return optimizer.make(update_settings(config)["optimizer"])


def _key(config: Config) -> jax.Array:
    return jax.random.key(config.seed)


def _write_samples(
    path: Path, problems: Sequence[Problem], samples: Sequence[SampledText], rewards: np.ndarray
) -> None:
    """The responses of a rollout with their rewards, one JSON line each."""
    with path.open("w") as file:
        for problem, sample, reward in zip(problems, samples, rewards, strict=True):
            row = {"problem": problem.id, "response": sample.text, "reward": float(reward)}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    launch.main(run, launch.check_rl)
