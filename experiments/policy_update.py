"""From a graded rollout to updates of the policy: what advantages are made of, the batches, and the
compiled programs. `train_rl` runs them, `compile_for_pod` compiles them for other machines."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
from spark_jax.experiments import configuration, programs
from spark_jax.experiments.configuration import Config
from spark_jax.parallel import sharding
from spark_jax.rewards.format import MAX_STEPS
from spark_jax.rewards.prm import Judged
from spark_jax.rewards.process import (
    cumulative_process_reward,
    process_reward_auc,
    step_process_rewards,
)
from spark_jax.scoring import response_logprobs_and_entropy
from spark_jax.training import optimizer, spread
from spark_jax.training.packing import PackedPolicyBatch, pack_policy_batch
from spark_jax.training.policy import Objective, PolicyBatch, policy_step
from spark_jax.training.update import in_micro_batches

NEEDS_PROCESS_REWARDS = ("spro", "masked_step", "prime")
PROCESS_REWARD_AUC = "spro/process_reward_auc"  # what metrics of it begin with


class Logprobs(NamedTuple):
    """Of a rollout's tokens, [B, T], for the advantages; None where they are not needed."""

    policy: jax.Array | None
    reference: jax.Array | None


def score_rollout(
    config: Config, model_config: Any, params: Any, reference: Any, rollout: decoding.Rollout
) -> Logprobs:
    """What advantages compare, under way on the devices when this returns.

    Where process rewards compare the policy with the reference, the scorer scores both: the
    sampler's log-probs differ from it by rounding, which a sum over a long prefix would add up. The
    policy's are None where the update makes the advantages, from log-probs of its own.
    """
    if reference is None:
        return Logprobs(rollout.logprobs, None)
    score = functools.partial(_score, config, model_config, rollout)
    if config.rl.advantage not in NEEDS_PROCESS_REWARDS:
        return Logprobs(rollout.logprobs, score(reference))
    return Logprobs(None if made_in_step(config) else score(params), score(reference))


def advantage_inputs(
    config: Config,
    rollout: decoding.Rollout,
    logprobs: Logprobs,
    rewards: np.ndarray,
    judged: Judged,
    steps: np.ndarray,
) -> AdvantageInputs:
    """All that an advantage may look at: of the groups that are kept, the others masked out."""
    return AdvantageInputs(
        rewards=rewards,
        mask=_kept_groups(config, rollout.mask, rewards),
        group_size=config.rl.group_size,
        policy_logprobs=logprobs.policy,
        ref_logprobs=logprobs.reference,
        verdicts=judged.verdicts,
        step_ids=steps,
    )


def make_batch(
    config: Config, rollout: decoding.Rollout, inputs: AdvantageInputs, unmoved: bool
) -> tuple[PolicyBatch, dict[str, Any]]:
    """What the update needs, and metrics of rewards and advantages. `unmoved`: the policy still is
    the reference, so that no process reward differs from 0, whatever two passes round."""
    options = _advantage_options(config)
    prompt_tokens, prompt_mask = _prompts(config, rollout)
    batch = PolicyBatch(
        prompt_tokens=prompt_tokens,
        prompt_mask=prompt_mask,
        tokens=rollout.tokens,
        mask=inputs.mask,
        old_logprobs=rollout.logprobs,
        advantages=None,
        ref_logprobs=inputs.ref_logprobs,
    )
    metrics = {}
    if made_in_step(config):
        made_of = (inputs, np.bool_(unmoved))
        batch = dataclasses.replace(batch, advantage_inputs=made_of)
    else:
        make = compiled_advantage(config.rl.advantage, options)
        advantages, metrics = make(inputs.policy_logprobs, (inputs, np.False_))
        batch = dataclasses.replace(batch, advantages=advantages)
    of_rollout = (inputs.rewards, rollout.mask, rollout.finished, inputs.mask)
    metrics |= _rollout_metrics(*of_rollout, config.rl.group_size)
    metrics |= {
        "decode/slot_occupancy": rollout.slot_occupancy,
        "decode/queue_occupancy": rollout.queue_occupancy,
        "decode/shared_prefix": rollout.shared_prefix,
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
    return jax.tree.map(np.asarray, shown)


def made_in_step(config: Config) -> bool:
    """Whether the update itself makes the advantages, from the log-probs of its own forward pass.

    It does where an advantage reads the policy's log-probs and there is one update, of the whole
    rollout, which scores it with the policy as it is: a forward pass is saved.
    """
    rl = config.rl
    whole = rl.epochs == rl.minibatches == rl.accumulation_steps == 1 and not rl.pack
    return rl.advantage in NEEDS_PROCESS_REWARDS and whole


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


def packed(config: Config, batch: PolicyBatch) -> PolicyBatch | PackedPolicyBatch:
    """The batch of one update, several responses to a row where `rl.pack` is set; its rows spread
    over the mesh, if there is one."""
    if not config.rl.pack:
        return batch if spread.mesh() is None else spread.rows(batch)
    objective = Objective(**configuration.objective_fields(config))
    multiple = config.rl.accumulation_steps * sharding.batch_shards()
    return spread.rows(pack_policy_batch(batch, objective, rows_multiple_of=multiple))


def update_metrics(updates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of a rollout's updates: means over them; skipped updates summed; and the gap
    between sampler and scorer at the first one, with what the policy had moved before it."""
    if not updates:
        return {"policy/updates": 0}
    means = {name: np.mean([values[name] for values in updates]) for name in updates[0]}
    means |= {name: updates[0][name] for name in ("logprob_gap_max", "logprob_gap_mean")}
    means["update_skipped"] = np.sum([values["update_skipped"] for values in updates])
    named = {name if "/" in name else f"policy/{name}": value for name, value in means.items()}
    return {"policy/updates": len(updates)} | named


def undefined(name: str, value: Any) -> bool:
    """Whether a rollout has no such number: no area under ROC where no step is wrong, or judged."""
    return name.startswith(PROCESS_REWARD_AUC) and bool(np.isnan(value))


def needs_reference_policy(config: Config) -> bool:
    return config.rl.advantage in NEEDS_PROCESS_REWARDS or config.rl.objective.kl_coefficient > 0


@jax.jit
def moved(reference: Any, params: Any, decay: Any) -> Any:
    """The reference policy after an update: decay · itself + (1 − decay) · the policy."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, reference, params)


def compiled_step(model_config: Any, settings: str) -> Any:
    """One compiled policy step per setting and mesh in scope, shared by all runs of a process."""
    return _compiled_step(model_config, settings, spread.mesh())


@programs.shared
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


def update_settings(config: Config) -> dict[str, Any]:
    """What the compiled update depends on, as JSON values."""
    updates = config.rl.steps * config.rl.minibatches * config.rl.epochs
    return {
        "optimizer": {**config.rl.optimizer.to_dict(), "total_steps": updates},
        "objective": configuration.objective_fields(config),
        "accumulation_steps": config.rl.accumulation_steps,
        "made_in_step": [config.rl.advantage, _advantage_options(config)]
        if made_in_step(config)
        else None,
    }


def make_optimizer(config: Config) -> Any:
    return optimizer.make(update_settings(config)["optimizer"])


def _score(config: Config, model_config: Any, rollout: decoding.Rollout, params: Any) -> jax.Array:
    arrays = (*_prompts(config, rollout), rollout.tokens, rollout.mask)
    return compiled_score(model_config, score_parts(config))(params, *spread.rows(arrays))


def _prompts(config: Config, rollout: decoding.Rollout) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of the prompt of every response, [B, L]."""
    tokens, mask = jax.device_get((rollout.prompt_tokens, rollout.prompt_mask))
    size = config.rl.group_size
    return np.repeat(tokens, size, axis=0), np.repeat(mask, size, axis=0)


def score_parts(config: Config) -> int:
    """In how many parts the rows of a rollout are scored: as many rows at a time as an update has,
    where the mesh in scope divides these."""
    rl = config.rl
    rows = rl.prompts_per_step * rl.group_size
    return math.gcd(rl.minibatches * rl.accumulation_steps, rows // sharding.batch_shards())


@programs.shared
def compiled_score(model_config: Any, parts: int) -> Any:
    """Log-probs of responses under a fixed policy, compiled; a part of the rows at a time, and
    whole on every device."""

    def score(params: Any, *arrays: Any) -> Any:
        def logprobs(rows: Any) -> Any:
            return response_logprobs_and_entropy(params, model_config, *rows)[0]

        return sharding.constrain(in_micro_batches(logprobs, arrays, parts), (None, None))

    return jax.jit(score)


@programs.shared
def compiled_advantage(name: str, options: str) -> Any:
    return jax.jit(_advantage_function(name, options))


def _advantage_options(config: Config) -> str:
    return json.dumps(configuration.given(config.rl.advantage_options))


def _advantage_function(name: str, options: str) -> Any:
    """A `policy.AdvantageFunction` of (AdvantageInputs, whether the policy is the reference)."""
    given = json.loads(options)

    def make(policy_logprobs: Any, made_of: tuple[AdvantageInputs, Any]) -> Any:
        inputs, unmoved = made_of
        if inputs.ref_logprobs is not None:
            policy_logprobs = jnp.where(unmoved, inputs.ref_logprobs, policy_logprobs)
        inputs = dataclasses.replace(inputs, policy_logprobs=policy_logprobs)
        advantages = ADVANTAGES[name](inputs, **given)
        metrics = {"advantage/mean_absolute": _per_token(jnp.abs(advantages), inputs)}
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
        "spro/msa_mean_absolute": _per_token(jnp.abs(msa), inputs),
        f"{PROCESS_REWARD_AUC}_verdicts": process_reward_auc(steps, inputs.verdicts),
    }
    if inputs.step_truth is not None:
        metrics[f"{PROCESS_REWARD_AUC}_truth"] = process_reward_auc(steps, inputs.step_truth)
    return metrics


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


def _kept_groups(config: Config, mask: Any, rewards: np.ndarray) -> Any:
    """The mask [B, T], 0 on groups that `rl.filter_low` and `rl.filter_high` leave out."""
    low, high = config.rl.filter_low, config.rl.filter_high
    if low is None and high is None:
        return mask
    low, high = 0.0 if low is None else low, 1.0 if high is None else high
    return _filtered(mask, rewards, config.rl.group_size, low, high)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _filtered(mask: Any, rewards: Any, group_size: int, low: float, high: float) -> jax.Array:
    kept = dynamic_sampling_mask(rewards, group_size, low=low, high=high)
    return mask & kept[:, None]


def _per_token(values: Any, inputs: AdvantageInputs) -> Any:
    """Mean over the tokens trained on, 0 where there are none."""
    return values.sum() / jnp.maximum(inputs.mask.sum(), 1)
