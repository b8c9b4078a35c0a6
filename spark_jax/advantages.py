"""Advantages: from rewards to a weight for every token. One idea, one function.

Shapes, as on the method page: P prompts with G = `group_size` responses each, B = P·G rows laid out
group-major (row b belongs to prompt b // G), T response tokens, K steps. `mask[b,t]` (bool or
{0,1}) is 1 on response tokens. Rewards and log-probabilities are float32, and so are advantages;
advantages are 0 where the mask is 0, whatever stands there (inf and nan included). Everything is
jit-, vmap- and grad-safe; no gradient reaches the log-probabilities.

Two rules hold in all of them. Values to be compared that are *all equal* give exactly 0, in
floating point too: a mean rounds (that of three 0.1 is not 0.1), and a rounding error divided by
its own standard deviation is an advantage of 1. And a group of one has nothing to be compared with:
exactly 0.

To add an advantage: write the function, and one line in `ADVANTAGES` at the bottom of this file.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Bool, Float, Int, Shaped

from spark_jax.rewards.process import cumulative_process_reward, last_token_of_step

# --- one number per response -------------------------------------------------------------------


def grpo(
    rewards: Float[Array, "B"], group_size: int, *, normalize_std: bool = True, eps: float = 1e-6
) -> Float[Array, "B"]:
    """Group-relative advantage (GRPO, arXiv 2402.03300, §4.1.2; method page §3).

    A_b = (r_b − mean_G r) / (std_G r + eps), std with G − 1. Without `normalize_std`, the numerator
    alone.
    """
    groups = _in_groups(rewards, group_size)
    centred, count = _centred(groups, jnp.ones_like(groups, dtype=bool), axes=(1,))
    if normalize_std:
        centred = centred / (_std(centred, count, axes=(1,)) + eps)
    return centred.reshape(rewards.shape)


def dr_grpo(rewards: Float[Array, "B"], group_size: int) -> Float[Array, "B"]:
    """Dr. GRPO's advantage: A_b = r_b − mean_G r (arXiv 2503.20783, §3.2).

    No division by the standard deviation, which favours prompts that are too easy or too hard. The
    paper's other half is a loss: `aggregation="sequence_sum_const"` in `spark_jax.losses`.
    """
    return grpo(rewards, group_size, normalize_std=False)


def rloo(rewards: Float[Array, "B"], group_size: int) -> Float[Array, "B"]:
    """REINFORCE leave-one-out: A_b = r_b − the mean reward of the group's others.

    arXiv 2402.14740. Computed as G/(G−1) · (r_b − mean_G r), which is the same number.
    """
    return grpo(rewards, group_size, normalize_std=False) * (group_size / max(group_size - 1, 1))


def reinforce_plus_plus(
    rewards: Float[Array, "B"],
    mask: Shaped[Array, "B T"] | None = None,
    *,
    group_size: int | None = None,
    eps: float = 1e-6,
) -> Float[Array, "B"]:
    """REINFORCE++: the reward whitened over the *whole batch* (arXiv 2501.03262).

    A_b = (r_b − μ) / (σ + eps), μ and σ (n − 1) over the batch: every response counts once, or,
    given a `mask`, once per token, which is how the authors' code does it (each token carries r_b);
    rows without tokens are then left out and get 0. The paper's KL penalty inside the reward is the
    caller's: subtract it from `rewards` first.

    With `group_size`, the paper's "REINFORCE++ w/ Baseline": the group's mean is subtracted first,
    then the differences are whitened over the batch.
    """
    votes = jnp.ones_like(rewards) if mask is None else jnp.sum(mask.astype(bool), axis=1)
    present = votes > 0
    if group_size is not None:
        groups, present_groups = _in_groups(rewards, group_size), _in_groups(present, group_size)
        rewards = _centred(groups, present_groups, axes=(1,))[0].reshape(rewards.shape)
    centred, count = _centred(rewards, present, axes=(0,), weights=votes)
    return centred / (_std(centred, count, axes=(0,), weights=votes) + eps)


# --- one number per token: SPRO ----------------------------------------------------------------


def masked_step(
    process_returns: Float[Array, "B T"], mask: Shaped[Array, "B T"], group_size: int
) -> Float[Array, "B T"]:
    """Masked step advantage (SPRO, arXiv 2507.01551; method page §4).

    MSA[b,t] = R̃[b,t] − the mean of R̃[i,t] over the responses i of the group that still have a token
    at t. A lone survivor gets 0, which removes the reward for merely being longer. Columns may be
    steps instead of tokens: [B, K] and whether each step exists.
    """
    present = _in_groups(mask, group_size).astype(bool)
    centred, _ = _centred(_in_groups(process_returns, group_size), present, axes=(1,))
    return centred.reshape(process_returns.shape)


def pooled_step(
    process_returns: Float[Array, "B T"], mask: Shaped[Array, "B T"], group_size: int
) -> Float[Array, "B T"]:
    """The baseline SPRO argues against: one pool for the group, whatever the position.

    A[b,t] = R̃[b,t] − the mean of R̃[i,s] over all tokens s of all responses i of the group: PRIME's
    grouping (arXiv 2502.01456) of SPRO's returns (method page §4, point 2).
    """
    present = _in_groups(mask, group_size).astype(bool)
    centred, _ = _centred(_in_groups(process_returns, group_size), present, axes=(1, 2))
    return centred.reshape(process_returns.shape)


def step_end_returns(
    process_returns: Float[Array, "B T"],
    step_ids: Int[Array, "B T"],
    mask: Shaped[Array, "B T"],
    *,
    num_steps: int,
) -> tuple[Float[Array, "B K"], Bool[Array, "B K"]]:
    """R̃ at the last token of each step (0 for a step without one), and which steps have one."""
    last = last_token_of_step(step_ids, mask, num_steps=num_steps)
    returns = jnp.take_along_axis(process_returns, jnp.maximum(last, 0), axis=1)
    return jnp.where(last >= 0, returns, 0.0), last >= 0


class ProcessRewards(NamedTuple):
    """What an advantage makes of process rewards, as it is trained with."""

    returns: Float[Array, "B T"]  # R̃, the cumulative process reward of every prefix
    advantages: Float[Array, "B T"]  # what they add to the outcome's advantage


def process_advantages(
    policy_logprobs: Float[Array, "B T"],
    ref_logprobs: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    group_size: int,
    *,
    beta: float = 0.05,
    baseline: Literal["step", "pool"] = "step",
    granularity: Literal["token", "step"] = "token",
    step_ids: Int[Array, "B T"] | None = None,
    num_steps: int | None = None,
    return_clip: float | None = None,
    process_std: float | None = None,
    eps: float = 1e-6,
) -> ProcessRewards:
    """SPRO's process rewards and the masked step advantage of them (2507.01551; method page §4).

    R̃ is the cumulative process reward with `beta` (reward per nat); the advantage is `masked_step`
    of it, or `pooled_step` with `baseline="pool"`.

    `granularity="step"`: segments instead of tokens. R̃ is read at the last token of step k,
    compared across the group at equal k (or pooled over all of the group's steps), and given to
    every token of the step. Needs `step_ids` (0..K−1, −1 outside any step) and `num_steps` = K.
    Our reading: tokens outside any step (tags, answer; ids ≥ K) have no process advantage.

    Two options are ours, not SPRO's, against its collapse at large β · learning rate, where what
    has drifted most is rewarded most. `return_clip` (reward) bounds R̃ to ± itself. `process_std`
    (reward) rescales each group's advantages to that standard deviation over its tokens, or steps,
    so that drift and β change which tokens are preferred, not by how much.

    Raises ValueError for an unknown baseline or granularity, and for missing step ids.
    """
    if baseline not in ("step", "pool"):
        raise ValueError(f'baseline must be "step" or "pool", got {baseline!r}')
    if granularity not in ("token", "step"):
        raise ValueError(f'granularity must be "token" or "step", got {granularity!r}')
    compare = masked_step if baseline == "step" else pooled_step
    returns = cumulative_process_reward(policy_logprobs, ref_logprobs, mask, beta=beta)
    if return_clip is not None:
        returns = jnp.clip(returns, -return_clip, return_clip)

    def compared(returns: Array, present: Array) -> Array:
        process = compare(returns, present, group_size)
        if process_std is None:
            return process
        return process_std * _standardised(process, present, group_size, eps)

    if granularity == "token":
        process = compared(returns, mask)
    elif step_ids is None or num_steps is None:
        raise ValueError('granularity="step" needs step_ids and num_steps; pass both')
    else:
        ends, exists = step_end_returns(returns, step_ids, mask, num_steps=num_steps)
        process = _given_to_tokens(compared(ends, exists), step_ids)
    return ProcessRewards(returns, jnp.where(mask.astype(bool), process, 0.0))


def spro(
    rewards: Float[Array, "B"],
    policy_logprobs: Float[Array, "B T"],
    ref_logprobs: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    group_size: int,
    *,
    beta: float = 0.05,
    outcome_weight: float = 1.0,
    baseline: Literal["step", "pool"] = "step",
    granularity: Literal["token", "step"] = "token",
    step_ids: Int[Array, "B T"] | None = None,
    num_steps: int | None = None,
    return_clip: float | None = None,
    process_std: float | None = None,
    eps: float = 1e-6,
) -> Float[Array, "B T"]:
    """SPRO's advantage: the outcome's, plus the masked step advantage (2507.01551; method page §4).

    A[b,t] = outcome_weight · GRPO(r)_b + MSA[b,t]; MSA and the options are those of
    `process_advantages`, which raises ValueError for the ones that do not fit.
    """
    process = process_advantages(
        policy_logprobs,
        ref_logprobs,
        mask,
        group_size,
        beta=beta,
        baseline=baseline,
        granularity=granularity,
        step_ids=step_ids,
        num_steps=num_steps,
        return_clip=return_clip,
        process_std=process_std,
        eps=eps,
    ).advantages
    outcome = outcome_weight * grpo(rewards, group_size, eps=eps)
    return jnp.where(mask.astype(bool), outcome[:, None] + process, 0.0)


def implicit_process_advantages(
    prm_logprobs: Float[Array, "B T"],
    ref_logprobs: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    group_size: int,
    *,
    beta: float = 0.05,
) -> ProcessRewards:
    """The process part of PRIME's advantage (2502.01456): see `prime`."""
    mask = mask.astype(bool)
    rewards_per_token = beta * jnp.where(mask, prm_logprobs - ref_logprobs, 0.0)
    returns = jax.lax.stop_gradient(jnp.cumsum(rewards_per_token, axis=1))
    # The equation does not change when all of a group's p move together; centred, equal ones are 0.
    groups, tokens = _in_groups(rewards_per_token, group_size), _in_groups(mask, group_size)
    rewards_per_token = _centred(groups, tokens, axes=(1, 2))[0].reshape(mask.shape)
    lengths = _in_groups(jnp.sum(mask, axis=1), group_size)
    means = _in_groups(jnp.sum(rewards_per_token, axis=1), group_size) / jnp.maximum(lengths, 1)
    present = lengths > 0
    others = jnp.sum(present, axis=1, keepdims=True) - present
    other_means = (jnp.sum(means, axis=1, keepdims=True) - means) / jnp.maximum(others, 1)
    baseline, compared = other_means.reshape(-1, 1), (others > 0).reshape(-1, 1)
    above_baseline = jnp.where(mask & compared, rewards_per_token - baseline, 0.0)
    process = jnp.where(mask, jnp.cumsum(above_baseline[:, ::-1], axis=1)[:, ::-1], 0.0)
    return ProcessRewards(returns, jax.lax.stop_gradient(process))


def prime(
    rewards: Float[Array, "B"],
    prm_logprobs: Float[Array, "B T"],
    ref_logprobs: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    group_size: int,
    *,
    beta: float = 0.05,
    outcome_weight: float = 1.0,
) -> Float[Array, "B T"]:
    """PRIME's advantage: leave-one-out of implicit process rewards and of outcomes (2502.01456).

    With the token reward p[b,t] = β (log π_prm − log π_ref) and its mean over the response p̄_b
    (the paper's equation for A_t, γ = 1 as in its runs):

        A[b,t] = Σ_{s ≥ t} ( p[b,s] − mean_{j ≠ b} p̄_j ) + outcome_weight · RLOO(r)_b

    mean over the group's *other* responses that have tokens; with no other, the process part is 0.
    One baseline for every position, so long responses collect it more often: what SPRO removes. The
    authors' code differs from their equation (p[b,s] stands where p̄_b is subtracted from the
    group's sum, and the result is whitened over the batch); this is the equation.
    """
    process = implicit_process_advantages(prm_logprobs, ref_logprobs, mask, group_size, beta=beta)
    outcome = outcome_weight * rloo(rewards, group_size)
    return jnp.where(mask.astype(bool), outcome[:, None] + process.advantages, 0.0)


# --- one number per token: a reward model's verdicts -------------------------------------------


def selective(
    advantages: Float[Array, "B"],
    verdicts: Int[Array, "B K"],
    step_ids: Int[Array, "B T"],
    mask: Shaped[Array, "B T"],
    *,
    discount: float = 0.0,
) -> Float[Array, "B T"]:
    """A response's advantage, kept on the steps whose verdict agrees with its sign.

    SPARK's selective advantage (arXiv 2512.03244; method page §3): positive advantages stay on
    correct steps (+1), negative ones on incorrect steps (−1); on the other judged steps they are
    multiplied by `discount` (0, or 0.5 for the half-discount variant).

    Our reading: the advantage stays whole wherever the reward model gave no verdict, on tokens
    outside any step and on steps with verdict 0 (or beyond K). Otherwise a response that the reward
    model could not judge, malformed ones above all, would escape its negative advantage.
    """
    verdict = _given_to_tokens(verdicts, step_ids)
    disagrees = verdict * jnp.sign(advantages)[:, None] < 0
    kept = advantages[:, None] * jnp.where(disagrees, discount, 1.0)
    return jnp.where(mask.astype(bool), kept, 0.0)


def global_step(
    verdicts: Int[Array, "B K"],
    step_ids: Int[Array, "B T"],
    mask: Shaped[Array, "B T"],
    group_size: int,
    *,
    eps: float = 1e-6,
) -> Float[Array, "B T"]:
    """The process part of the global step advantage (RL-Tango, arXiv 2505.15034; method page §3).

    Each step that has a verdict is rewarded ±1/K_b at its last token, K_b the number of response
    b's steps that have one. Rewards are standardised with the mean and std (n − 1) over all such
    steps of all responses in the group; A[b,t] = Σ of the standardised rewards at positions ≥ t. A
    verdict on a step without tokens counts in the statistics and is given to no token.
    """
    judged = verdicts != 0
    steps_per_response = jnp.sum(judged, axis=1, keepdims=True)
    rewards = jnp.sign(verdicts) / jnp.maximum(steps_per_response, 1)
    groups, present = _in_groups(rewards, group_size), _in_groups(judged, group_size)
    centred, count = _centred(groups, present, axes=(1, 2))
    standardised = (centred / (_std(centred, count, axes=(1, 2)) + eps)).reshape(verdicts.shape)
    last = last_token_of_step(step_ids, mask, num_steps=verdicts.shape[1])
    at_or_after = last[:, None, :] >= jnp.arange(step_ids.shape[1])[None, :, None]
    to_go = jnp.sum(jnp.where(at_or_after, standardised[:, None, :], 0.0), axis=2)
    return jnp.where(mask.astype(bool), to_go, 0.0)


# --- which groups carry a signal ---------------------------------------------------------------


def dynamic_sampling_mask(
    rewards: Float[Array, "B"], group_size: int, *, low: float = 0.0, high: float = 1.0
) -> Bool[Array, "B"]:
    """Which responses to train on: True for whole groups that carry a signal.

    A group stays if its rewards are not all equal and low ≤ mean reward ≤ high. The defaults, on
    0/1 rewards, are DAPO's dynamic sampling (arXiv 2503.14476, §3.2); low = 0.2 and high = 0.8 are
    SPRO's online filter on group accuracy. The bounds hold up to 1e-6, so 3 right of 15 is 0.2.
    """
    groups = _in_groups(rewards, group_size)
    mean = jnp.mean(groups, axis=1)
    keep = ~_all_equal(groups) & (mean >= low - 1e-6) & (mean <= high + 1e-6)
    return jnp.repeat(keep, group_size, total_repeat_length=rewards.shape[0])


def zero_variance_groups(rewards: Float[Array, "B"], group_size: int) -> Int[Array, ""]:
    """How many groups have rewards that are all equal, and so teach nothing through the outcome."""
    return jnp.sum(_all_equal(_in_groups(rewards, group_size)))


# --- helpers -----------------------------------------------------------------------------------


def _in_groups(values: Shaped[Array, "B *rest"], group_size: int) -> Shaped[Array, "P G *rest"]:
    """Rows as [P, G, ...]; refuses a batch that is not made of whole groups."""
    batch = values.shape[0]
    if group_size < 1 or batch % group_size:
        raise ValueError(
            f"group_size must divide B: got group_size={group_size} for B={batch} responses; "
            "pass whole groups, group-major"
        )
    return values.reshape(batch // group_size, group_size, *values.shape[1:])


def _centred(
    values: Float[Array, "*shape"],
    present: Bool[Array, "*shape"],
    axes: tuple[int, ...],
    weights: Shaped[Array, "*shape"] | None = None,
) -> tuple[Float[Array, "*shape"], Shaped[Array, "..."]]:
    """Present values minus their (weighted) mean along axes, and their count (total weight).

    Exactly 0 where absent, and where all the present ones are equal. The test is on the extremes,
    not on the standard deviation, because only it is exact; written so that a nan stays a nan.
    """
    values = jnp.where(present, values, 0.0)
    weights = present if weights is None else jnp.where(present, weights, 0)
    count = jnp.sum(weights, axis=axes, keepdims=True)
    mean = jnp.sum(values * weights, axis=axes, keepdims=True) / jnp.maximum(count, 1)
    lowest = jnp.min(jnp.where(present, values, jnp.inf), axis=axes, keepdims=True)
    highest = jnp.max(jnp.where(present, values, -jnp.inf), axis=axes, keepdims=True)
    differ = ~(lowest == highest)
    return jnp.where(present & differ, values - mean, 0.0), count


def _std(
    centred: Float[Array, "*shape"],
    count: Shaped[Array, "..."],
    axes: tuple[int, ...],
    weights: Shaped[Array, "*shape"] | None = None,
) -> Float[Array, "..."]:
    """Standard deviation (n − 1) of what `_centred` gave; 0 for fewer than two.

    The root's infinite slope at 0 goes no further: `_centred` stops gradients where all are equal.
    """
    squares = centred**2 if weights is None else centred**2 * weights
    variance = jnp.sum(squares, axis=axes, keepdims=True) / jnp.maximum(count - 1, 1)
    return jnp.sqrt(variance)


def _standardised(
    values: Float[Array, "B T"], present: Shaped[Array, "B T"], group_size: int, eps: float
) -> Float[Array, "B T"]:
    """Over their standard deviation among all that is present in the group; not centred."""
    groups, there = _in_groups(values, group_size), _in_groups(present, group_size).astype(bool)
    std = _std(*_centred(groups, there, axes=(1, 2)), axes=(1, 2))
    return (groups / (std + eps)).reshape(values.shape)


def _all_equal(groups: Float[Array, "P G"]) -> Bool[Array, "P"]:
    return jnp.min(groups, axis=1) == jnp.max(groups, axis=1)


def _given_to_tokens(
    per_step: Shaped[Array, "B K"], step_ids: Int[Array, "B T"]
) -> Shaped[Array, "B T"]:
    """Each token gets its step's value; tokens outside any of the K steps get 0."""
    num_steps = per_step.shape[1]
    in_step = (step_ids >= 0) & (step_ids < num_steps)
    values = jnp.take_along_axis(per_step, jnp.clip(step_ids, 0, num_steps - 1), axis=1)
    return jnp.where(in_step, values, 0)


# --- the names a config may use ----------------------------------------------------------------


@flax.struct.dataclass
class AdvantageInputs:
    """All that an advantage may look at; what it does not need may be None."""

    # Any, not shapes: a pytree's leaves may also be stacked arrays, specs or shardings.
    rewards: Any  # Float[B]
    mask: Any  # [B, T]
    group_size: int = flax.struct.field(pytree_node=False)
    policy_logprobs: Any = None  # Float[B, T]
    ref_logprobs: Any = None  # Float[B, T]
    verdicts: Any = None  # Int[B, K]: +1 correct, −1 incorrect, 0 no verdict
    step_ids: Any = None  # Int[B, T]: 0..K−1, −1 outside any step
    num_steps: int | None = flax.struct.field(pytree_node=False, default=None)  # K


Need = Literal["verdicts", "ref_logprobs"]
_FIELDS: dict[Need, tuple[str, ...]] = {
    "verdicts": ("verdicts",),
    "ref_logprobs": ("policy_logprobs", "ref_logprobs"),
}


@dataclasses.dataclass(frozen=True)
class Advantage:
    """An advantage as `ADVANTAGES` holds it.

    Attributes:
        function: (AdvantageInputs, **options) -> Float[B, T], or a pair of that and the
            `ProcessRewards` in it. Its keyword arguments are the options of the config.
        needs: what it reads beyond rewards, mask and step ids: "verdicts", a reward model's step
            verdicts, and "ref_logprobs", log-probs of policy and reference. It is handed nothing
            else, so one that reads what it does not name fails before a run begins.
    """

    function: Callable[..., Any]
    needs: frozenset[Need] = frozenset()

    def __call__(self, inputs: AdvantageInputs, **options: Any) -> Float[Array, "B T"]:
        return self.with_process_rewards(inputs, **options)[0]

    def with_process_rewards(
        self, inputs: AdvantageInputs, **options: Any
    ) -> tuple[Float[Array, "B T"], ProcessRewards | None]:
        """The advantages, and the process rewards in them; None where there are none.

        Raises ValueError for inputs without what it needs.
        """
        unread: dict[str, Any] = {}
        for need, fields in _FIELDS.items():
            if need not in self.needs:
                unread |= dict.fromkeys(fields)
            elif missing := [field for field in fields if getattr(inputs, field) is None]:
                raise ValueError(f"this advantage needs AdvantageInputs.{missing[0]}; it is None")
        inputs = dataclasses.replace(inputs, **unread)
        made = self.function(inputs, **options)
        return made if isinstance(made, tuple) else (made, None)

    @property
    def options(self) -> dict[str, type]:
        """Its options and their types: bool, int, float or str."""
        hints = typing.get_type_hints(self.function)
        parameters = inspect.signature(self.function).parameters.values()
        names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        return {name: _plain_type(hints[name]) for name in names}


def all_options() -> dict[str, type]:
    """The options of all advantages and their types, by name."""
    found = {name: kind for one in ADVANTAGES.values() for name, kind in one.options.items()}
    return dict(sorted(found.items()))


@dataclasses.dataclass(frozen=True)
class AdvantageSettings:
    """An advantage by name, with its options: hashable, a static argument of compiled programs."""

    name: str
    options: FrozenDict[str, Any]

    @property
    def advantage(self) -> Advantage:
        return ADVANTAGES[self.name]

    def __call__(
        self, inputs: AdvantageInputs
    ) -> tuple[Float[Array, "B T"], ProcessRewards | None]:
        """See `Advantage.with_process_rewards`."""
        return self.advantage.with_process_rewards(inputs, **self.options)


def _grpo(inputs: AdvantageInputs, *, normalize_std: bool = True, eps: float = 1e-6) -> Array:
    advantages = grpo(inputs.rewards, inputs.group_size, normalize_std=normalize_std, eps=eps)
    return _to_tokens(advantages, inputs)


def _dr_grpo(inputs: AdvantageInputs) -> Array:
    return _to_tokens(dr_grpo(inputs.rewards, inputs.group_size), inputs)


def _rloo(inputs: AdvantageInputs) -> Array:
    return _to_tokens(rloo(inputs.rewards, inputs.group_size), inputs)


def _reinforce_plus_plus(
    inputs: AdvantageInputs, *, group_baseline: bool = False, eps: float = 1e-6
) -> Array:
    group_size = inputs.group_size if group_baseline else None
    advantages = reinforce_plus_plus(inputs.rewards, inputs.mask, group_size=group_size, eps=eps)
    return _to_tokens(advantages, inputs)


def _selective(
    inputs: AdvantageInputs,
    *,
    discount: float = 0.0,
    normalize_std: bool = True,
    eps: float = 1e-6,
) -> Array:
    advantages = grpo(inputs.rewards, inputs.group_size, normalize_std=normalize_std, eps=eps)
    step_ids = _step_ids(inputs)
    return selective(advantages, inputs.verdicts, step_ids, inputs.mask, discount=discount)


def _global_step(
    inputs: AdvantageInputs,
    *,
    outcome_weight: float = 1.0,
    process_weight: float = 1.0,
    eps: float = 1e-6,
) -> Array:
    step_ids = _step_ids(inputs)
    process = global_step(inputs.verdicts, step_ids, inputs.mask, inputs.group_size, eps=eps)
    return outcome_weight * _grpo(inputs, eps=eps) + process_weight * process


def _spro(
    inputs: AdvantageInputs,
    *,
    beta: float = 0.05,
    outcome_weight: float = 1.0,
    baseline: str = "step",
    granularity: str = "token",
    return_clip: float | None = None,
    process_std: float | None = None,
    eps: float = 1e-6,
) -> tuple[Array, ProcessRewards]:
    process = process_advantages(
        inputs.policy_logprobs,
        inputs.ref_logprobs,
        inputs.mask,
        inputs.group_size,
        beta=beta,
        baseline=typing.cast(Any, baseline),
        granularity=typing.cast(Any, granularity),
        step_ids=inputs.step_ids,
        num_steps=inputs.num_steps,
        return_clip=return_clip,
        process_std=process_std,
        eps=eps,
    )
    return outcome_weight * _grpo(inputs, eps=eps) + process.advantages, process


def _masked_step(
    inputs: AdvantageInputs,
    *,
    beta: float = 0.05,
    baseline: str = "step",
    granularity: str = "token",
    return_clip: float | None = None,
    process_std: float | None = None,
    eps: float = 1e-6,
) -> tuple[Array, ProcessRewards]:
    _, process = _spro(
        inputs,
        beta=beta,
        baseline=baseline,
        granularity=granularity,
        return_clip=return_clip,
        process_std=process_std,
        eps=eps,
    )
    return process.advantages, process


def _prime(
    inputs: AdvantageInputs, *, beta: float = 0.05, outcome_weight: float = 1.0
) -> tuple[Array, ProcessRewards]:
    process = implicit_process_advantages(
        inputs.policy_logprobs, inputs.ref_logprobs, inputs.mask, inputs.group_size, beta=beta
    )
    return outcome_weight * _rloo(inputs) + process.advantages, process


def _to_tokens(advantages: Float[Array, "B"], inputs: AdvantageInputs) -> Float[Array, "B T"]:
    return jnp.where(inputs.mask.astype(bool), advantages[:, None], 0.0)


def _step_ids(inputs: AdvantageInputs) -> Any:
    if inputs.step_ids is None:
        raise ValueError("this advantage needs AdvantageInputs.step_ids; it is None")
    return inputs.step_ids


def _plain_type(hint: Any) -> type:
    """bool of `bool`, float of `float | None`."""
    plain = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return plain[0] if plain else hint


_OF_VERDICTS: frozenset[Need] = frozenset({"verdicts"})
_OF_LOGPROBS: frozenset[Need] = frozenset({"ref_logprobs"})

# Options are the keyword arguments of the function above of the same name, and:
# - "reinforce++" counts tokens (the mask), and takes group_baseline=True for the paper's variant;
# - "global_step" is the whole: outcome_weight · GRPO + process_weight · process part;
# - "masked_step" is "spro" without its outcome term;
# - "prime" takes the policy itself as the implicit reward model (no third model is scored).
# DAPO and GSPO are no advantages: theirs is GRPO's, and what is their own are settings of the loss
# (an asymmetric clip and dynamic sampling; the sequence's importance ratio).
ADVANTAGES: dict[str, Advantage] = {
    "grpo": Advantage(_grpo),
    "dr_grpo": Advantage(_dr_grpo),
    "rloo": Advantage(_rloo),
    "reinforce++": Advantage(_reinforce_plus_plus),
    "selective": Advantage(_selective, needs=_OF_VERDICTS),
    "global_step": Advantage(_global_step, needs=_OF_VERDICTS),
    "masked_step": Advantage(_masked_step, needs=_OF_LOGPROBS),
    "spro": Advantage(_spro, needs=_OF_LOGPROBS),
    "prime": Advantage(_prime, needs=_OF_LOGPROBS),
}
