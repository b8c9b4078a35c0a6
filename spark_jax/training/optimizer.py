"""Optimisers and learning-rate schedules from plain configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "adafactor": optax.adafactor,
    "lion": optax.lion,
    "sgd": optax.sgd,
}

_SCHEDULE_FIELDS = ("learning_rate", "schedule", "warmup_steps", "total_steps", "end_fraction")
_OWN_FIELDS = ("name", *_SCHEDULE_FIELDS, "clip_norm", "accumulator_dtype")
_ACCUMULATOR_ARGUMENTS = ("mu_dtype", "accumulator_dtype", "dtype_momentum")  # optax's names for it


def make(config: Any) -> optax.GradientTransformation:
    """An optimiser from a mapping or ConfigDict; a field that is None counts as not given.

    Fields: `name` (a key of OPTIMIZERS; default "adamw"), the fields of `make_schedule`,
    `clip_norm` (global norm the gradient is clipped to, before the optimiser sees it),
    `accumulator_dtype` (of the first moment or momentum; second moments have the parameters' dtype,
    since bfloat16 would round their small steps away), and any argument of the optax factory
    under optax's name with optax's default: `b1`, `b2`, `eps`, `weight_decay`, `momentum`, ...
    Weight decay leaves norms and biases alone.

    Raises:
      ValueError: an unknown name or field, a value out of range, or a field this optimiser ignores.
    """
    given = {field: value for field, value in config.items() if value is not None}
    name = given.get("name", "adamw")
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer name={name!r} is unknown; choose one of {sorted(OPTIMIZERS)}")
    factory = OPTIMIZERS[name]
    arguments = _factory_arguments(name, factory, given)
    transformation = factory(make_schedule(given), **arguments)
    clip_norm = given.get("clip_norm")
    if clip_norm is None:
        return transformation
    if not clip_norm > 0:
        raise ValueError(f"clip_norm={clip_norm} must be positive; leave it out for no clipping")
    return optax.chain(optax.clip_by_global_norm(clip_norm), transformation)


def make_schedule(config: Any) -> optax.Schedule:
    """The learning rate as a function of the number of updates applied so far.

    Fields of the mapping or ConfigDict: `learning_rate` (the peak); `schedule` "constant"
    (default), "cosine" or "linear", of which the last two fall to `end_fraction` (default 0) of the
    peak at update `total_steps` and stay there; `warmup_steps` (default 0): a line that reaches the
    peak at that update and starts one notch above zero, so that no rollout is spent on an update of
    size zero.

    The optimiser counts applied updates only: for logging, call it with
    `state.step - state.skipped`.
    """
    if config.get("learning_rate") is None:
        raise ValueError("learning_rate is missing from the optimizer configuration")
    peak = float(config["learning_rate"])
    kind = config.get("schedule") or "constant"
    warmup = int(config.get("warmup_steps") or 0)
    end_fraction = float(config.get("end_fraction") or 0.0)
    if peak < 0:
        raise ValueError(f"learning_rate={peak} must not be negative")
    if warmup < 0:
        raise ValueError(f"warmup_steps={warmup} must not be negative")
    if kind not in _DECAYS:
        raise ValueError(f"schedule={kind!r} is unknown; choose one of {sorted(_DECAYS)}")
    decay_steps = 0
    if kind != "constant":
        total = config.get("total_steps")
        if total is None or int(total) <= warmup:
            raise ValueError(
                f"schedule={kind!r} needs total_steps greater than warmup_steps={warmup}; "
                f"got total_steps={total}"
            )
        decay_steps = int(total) - warmup
    decay = _DECAYS[kind](peak, decay_steps, end_fraction)
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, decay], [warmup])


_DECAYS: dict[str, Callable[[float, int, float], optax.Schedule]] = {
    "constant": lambda peak, steps, end: optax.constant_schedule(peak),
    "cosine": lambda peak, steps, end: optax.cosine_decay_schedule(peak, steps, alpha=end),
    "linear": lambda peak, steps, end: optax.linear_schedule(peak, peak * end, steps),
}


def _factory_arguments(
    name: str, factory: Callable[..., Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields that go to the optax factory, under the factory's names."""
    takes = set(inspect.signature(factory).parameters) - {"learning_rate", "mask"}
    arguments = {field: given[field] for field in given if field not in _OWN_FIELDS}
    unknown = sorted(set(arguments) - takes)
    if unknown:
        choices = sorted((takes - set(_ACCUMULATOR_ARGUMENTS)) | set(_OWN_FIELDS))
        raise ValueError(f"optimizer {name!r} does not take {unknown}; it takes {choices}")
    if "accumulator_dtype" in given:
        argument = next((a for a in _ACCUMULATOR_ARGUMENTS if a in takes), None)
        if argument is None:
            raise ValueError(f"optimizer {name!r} has no accumulator_dtype; leave it out")
        arguments[argument] = jnp.dtype(given["accumulator_dtype"])
    if "mask" in inspect.signature(factory).parameters:
        arguments["mask"] = _decays
    return arguments


def _decays(params: Any) -> Any:
    """True where weight decay applies: everything but leaves named ...norm or ...bias.

    By name, because stacked layers give a norm's scale two axes, like a matrix.
    """

    def is_matrix(path: tuple[Any, ...], _: Any) -> bool:
        return not jax.tree_util.keystr(path[-1:], simple=True).endswith(("norm", "bias"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)
