"""The records of an RL run, and how checkpoints hold what a step begins with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from spark_jax import decoding
from spark_jax.data.records import Problem
from spark_jax.experiments.configuration import Config
from spark_jax.rewards.prm import Judged
from spark_jax.text_generation import SampledText
from spark_jax.training.checkpointing import Checkpoints
from spark_jax.training.run_folder import RunFolder
from spark_jax.training.state import TrainState


class Sampled(NamedTuple):
    """B responses, as arrays and as texts."""

    rollout: decoding.Rollout
    samples: list[SampledText]


@dataclasses.dataclass(frozen=True)
class Graded:
    """A rollout of B responses, judged and rewarded."""

    problems: list[Problem]
    rollout: decoding.Rollout
    samples: list[SampledText]
    judged: Judged
    rewards: np.ndarray  # [B]


class RLState(NamedTuple):
    """After `done` rollouts and their updates."""

    train: TrainState
    reference: Any  # parameters of π_ref; None where nothing compares with it
    done: int = 0
    pending: Sampled | None = None  # the next rollout, where it is sampled already


SampledBefore = Callable[[int, Mapping[str, Any]], Sampled]  # of a rollout's number, and its arrays


def contents(config: Config, folder: RunFolder, at: RLState) -> tuple[Any, dict[str, Any]]:
    """What a checkpoint of the state holds: arrays, and what it notes beside them."""
    return _arrays(config, at), _notes(config, folder, at)


def restore(
    config: Config,
    folder: RunFolder,
    saved: Checkpoints,
    initial: RLState,
    sampled_before: SampledBefore,
) -> tuple[RLState, bool]:
    """The state of the last checkpoint, and True; the initial one, and False, where there is none.

    Raises what `Checkpoints.restore_latest` raises, and OtherRun for a checkpoint of another run.
    """
    restored = saved.restore_latest(_arrays(config, initial))
    if restored is None:
        return initial, False
    kept, notes = restored
    folder.check_identity(notes)
    done, parts = notes["rollouts"], kept if isinstance(kept, dict) else {"train": kept}
    pending = None
    if notes["pending_rollout"].get("sampled"):
        pending = sampled_before(done + 1, parts["pending"])
    return RLState(parts["train"], parts.get("reference", initial.reference), done, pending), True


def _arrays(config: Config, at: RLState) -> Any:
    """The train state; with it the reference policy where it moves, and the pending rollout where
    it is not drawn from the policy as it is."""
    parts: dict[str, Any] = {"train": at.train}
    if config.rl.reference_decay is not None:
        parts["reference"] = at.reference
    if config.rl.one_step_off_policy:
        if at.pending is None:
            rows = config.rl.prompts_per_step * config.rl.group_size
            parts["pending"] = decoding.no_samples(rows, config.decode.max_new_tokens)
        else:
            parts["pending"] = decoding.samples_of(at.pending.rollout)
    return parts if len(parts) > 1 else at.train


def _notes(config: Config, folder: RunFolder, at: RLState) -> dict[str, Any]:
    """Which run it is of, and where that run stands.

    The pending rollout is drawn from a seed and its own number, and the problems it is drawn for
    are the batch of that number: unless it is sampled already, these are all there is to know.
    """
    pending = {"seed": config.seed, "step": at.done + 1, "batch": at.done}
    if at.pending is not None:
        pending["sampled"] = True
    return folder.identity | {"rollouts": at.done, "pending_rollout": pending}
