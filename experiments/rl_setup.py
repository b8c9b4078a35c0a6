"""What an RL run is made of: task, problems, models, and the settings of its compiled programs.

`train_rl` runs these programs, `compile_for_pod` compiles them for other machines.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import typing
from collections.abc import Sequence
from typing import Any

import optax
from flax.core import FrozenDict

from spark_jax import tasks
from spark_jax.advantages import ADVANTAGES, AdvantageSettings
from spark_jax.data.batches import BatchOrder, batch_order
from spark_jax.data.formats import Sample, TextFormat
from spark_jax.data.records import Problem
from spark_jax.experiments import configuration, loading
from spark_jax.experiments.configuration import Config, ConfigError
from spark_jax.models.config import ModelConfig
from spark_jax.parallel import sharding
from spark_jax.rewards.prm import REWARDS
from spark_jax.text_generation import TextModel, encode, longest_prompt, text_sampler
from spark_jax.training import optimizer, programs
from spark_jax.training.policy import Objective, policy_step
from spark_jax.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that stays as it is throughout a run."""

    config: Config
    folder: RunFolder
    policy: loading.Loaded  # without its parameters
    task: tasks.Task  # as the policy is shown it
    reward_model: TextModel | None
    judge_format: TextFormat  # the task's, as the reward model is shown it
    problems: list[Problem]
    too_long: int  # problems that are left out
    order: BatchOrder  # which problems each step is about

    def problems_of(self, step: int) -> list[Problem]:
        """The problem of each response of a step's rollout."""
        chosen = self.order[step - 1]
        return [self.problems[i] for i in chosen for _ in range(self.config.rl.group_size)]

    def prompts_of(self, step: int) -> list[str]:
        """The prompts of a step's rollout, one for each group of responses."""
        return [self.task.text_format.solve_prompt(self.problems[i]) for i in self.order[step - 1]]

    def text_model(self, params: Any) -> TextModel:
        """The policy with these parameters, to sample from."""
        return loading.text_model(*self.policy._replace(params=params), name="policy")

    def reward_sampler(self) -> Sample | None:
        """The reward model, to be asked; None for a reward that asks none."""
        if self.reward_model is None:
            return None
        return text_sampler(self.reward_model, configuration.decode_options(self.config))


def make_setup(config: Config, folder: RunFolder, loaded: loading.Loaded) -> Setup:
    """Task, problems and reward model of a run; ConfigError where one of them cannot be."""
    task = loading.for_model(loading.load_task(config), loaded.tokenizer, config)
    reward_model, judge_format = None, task.text_format
    if REWARDS[config.rl.reward].judges:
        reward_model = loading.load_text_model(config, config.rl.reward_model)
        shown = loading.for_model(loading.load_task(config), reward_model.tokenizer, config)
        judge_format = shown.text_format
    problems = task.problems(config.rl.num_problems, config.seed, "train")
    kept = without_too_long(config, task, loaded, problems)
    return Setup(
        config=config,
        folder=folder,
        policy=loaded._replace(params=typing.cast(Any, None)),
        task=task,
        reward_model=reward_model,
        judge_format=judge_format,
        problems=kept,
        too_long=len(problems) - len(kept),
        order=batch_order(len(kept), config.rl.prompts_per_step, config.seed),
    )


def without_too_long(
    config: Config, task: tasks.Task, model: loading.Loaded, problems: Sequence[Problem]
) -> list[Problem]:
    """The problems whose prompts leave room for a response; the others are counted in the log.

    Raises ConfigError where none is left.
    """
    options = configuration.decode_options(config)
    limit = longest_prompt(model.config, config.decode.max_new_tokens, options)
    texts = encode(model.tokenizer, [task.text_format.solve_prompt(p) for p in problems])
    kept = [p for p, ids in zip(problems, texts, strict=True) if len(ids) <= limit]
    if not kept:
        raise ConfigError(
            f"all {len(problems)} prompts have more than {limit} tokens; raise "
            "decode.max_prompt_length or lower decode.max_new_tokens"
        )
    if len(kept) < len(problems):
        logger.warning(
            "%d of %d problems have prompts of more than %d tokens and are not trained on",
            len(problems) - len(kept), len(problems), limit,
        )  # fmt: skip
    return kept


def load_reference(config: Config, initial: Any, model_config: ModelConfig) -> Any:
    """Parameters of π_ref, the initial policy unless `rl.reference_model` names another; None where
    nothing compares with it. They are computed with the policy's configuration."""
    if not needs_reference(config):
        if config.rl.reference_decay is not None:
            raise ConfigError(
                f"rl.reference_decay={config.rl.reference_decay} moves a reference policy that "
                f"rl.advantage={config.rl.advantage!r} without a KL term does not use; leave it out"
            )
        return None
    if not config.rl.reference_model:
        return initial
    other = loading.load_model(config.rl.reference_model, dtype=config.dtype)
    loading.check_same_shape("rl.reference_model", config.rl.reference_model, other, model_config)
    return other.params


def needs_reference(config: Config) -> bool:
    needs = ADVANTAGES[config.rl.advantage].needs
    return "ref_logprobs" in needs or config.rl.objective.kl_coefficient > 0


# --- settings of compiled programs ---------------------------------------------------------------


def advantage_settings(config: Config) -> AdvantageSettings:
    options = configuration.given(config.rl.advantage_options)
    return AdvantageSettings(config.rl.advantage, FrozenDict(options))


def compiled_step(config: Config, model_config: ModelConfig) -> Any:
    """The compiled policy update; see `programs.train_step`."""
    return programs.train_step(
        policy_step,
        model_config,
        optimizer_settings(config),
        objective=Objective(**configuration.objective_fields(config)),
        accumulation_steps=config.rl.accumulation_steps,
    )


def make_optimizer(config: Config) -> optax.GradientTransformation:
    return optimizer.make(optimizer_settings(config))


def optimizer_settings(config: Config) -> FrozenDict[str, Any]:
    updates = config.rl.steps * config.rl.minibatches * config.rl.epochs
    return FrozenDict({**config.rl.optimizer.to_dict(), "total_steps": updates})


def score_parts(config: Config) -> int:
    """In how many parts the rows of a rollout are scored: as many rows at a time as an update has,
    where the mesh in scope divides these."""
    rl = config.rl
    rows = rl.prompts_per_step * rl.group_size
    return math.gcd(rl.minibatches * rl.accumulation_steps, rows // sharding.batch_shards())
