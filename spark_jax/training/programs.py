"""Compiled programs that all runs of a process share, whatever threads these are on."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
from flax.core import FrozenDict

from spark_jax.models.config import ModelConfig
from spark_jax.training import spread
from spark_jax.training.optimizer import make as make_optimizer


def shared(make: Callable[..., Any]) -> Callable[..., Any]:
    """`functools.lru_cache` for a function that makes a jitted function of hashable settings.

    Runs that start at once then wait for one jitted function; with `lru_cache` alone each would
    make its own, and XLA compile it as often.
    """
    made, making = functools.lru_cache(maxsize=16)(make), threading.Lock()

    @functools.wraps(make)
    def found(*settings: Any) -> Any:
        with making:
            return made(*settings)

    return found


def train_step(
    step: Callable[..., Any],
    model_config: ModelConfig,
    optimizer: FrozenDict[str, Any],
    **settings: Any,
) -> Any:
    """`policy.policy_step` or `sft.sft_step` compiled: (state, batch) -> (state, metrics), in
    place. One program for all that is given here and the mesh in scope.

    Args:
        optimizer: fields of `training.optimizer.make`.
        settings: the step's other arguments, hashable.
    """
    return _train_step(step, model_config, optimizer, FrozenDict(settings), spread.mesh())


@shared
def _train_step(
    step: Callable[..., Any],
    model_config: ModelConfig,
    optimizer: FrozenDict[str, Any],
    settings: FrozenDict[str, Any],
    _: Any,
) -> Any:
    bound = functools.partial(
        step, model_config=model_config, optimizer=make_optimizer(optimizer), **settings
    )
    return jax.jit(spread.kept_in_place(bound, model_config), donate_argnums=0)
