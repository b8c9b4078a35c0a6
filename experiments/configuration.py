"""An experiment's configuration: read from a file, changed, and made into what it describes."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import ml_collections
from jax.sharding import Mesh

from spark_jax import tokenizers
from spark_jax.parallel import mesh as meshes
from spark_jax.text_generation import DecodeOptions

Config = Any  # ml_collections.ConfigDict


class ConfigError(ValueError):
    """A configuration that cannot work: the message is for the user, a traceback would not help."""


def make_or_refuse(field: str, make: Callable[[], object]) -> None:
    """Makes what a field or section describes; ConfigError where its constructor refuses it.

    Args:
      field: its name, for the message.
      make: constructs it, and raises ValueError for a bad value.
    """
    try:
        make()
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from error


def config_path(name: str) -> Path:
    """`name` itself where it is a file, else the file of that name among the installed configs."""
    installed = Path(str(importlib.resources.files("spark_jax.configs"))) / Path(name).name
    for path in (Path(name), installed):
        if path.is_file():
            return path
    have = sorted(p.name for p in installed.parent.glob("*.py") if p.name != "__init__.py")
    raise FileNotFoundError(f"config {name!r} is not a file; give one, or one of {have}")


def load_config(name: str | Path) -> Config:
    """The ConfigDict of a config file."""
    path = config_path(str(name))
    namespace: dict[str, Any] = {"__file__": str(path)}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    return namespace["get_config"]()


def make_mesh(config: Config) -> Mesh | None:
    """The mesh of `config.mesh` over all devices of all processes; None where one device, the
    first, is all that is asked for. ConfigError for one that does not fit, with the numbers."""
    sizes = config.mesh.to_dict()
    if jax.process_count() == 1 and set(sizes.values()) == {1}:
        return None
    try:
        mesh = meshes.make_mesh(sizes)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return None if mesh.size == 1 else mesh


Run = TypeVar("Run", bound=Callable[..., Any])


def on_mesh(run: Run) -> Run:
    """An experiment's `run(config, ...)`, in the scope of the mesh that its configuration asks for.

    The mesh is no part of what a run is: its folder does not depend on it, and a run may go on over
    another one.
    """

    @functools.wraps(run)
    def in_scope(config: Config, *args: Any, **options: Any) -> Any:
        mesh = make_mesh(config)
        if mesh is None:
            return run(config, *args, **options)
        with jax.set_mesh(mesh):
            return run(config, *args, **options)

    return cast(Run, in_scope)


def chat_options(config: Config) -> tokenizers.ChatOptions:
    return tokenizers.ChatOptions(**config.chat.to_dict())


def decode_options(config: Config) -> DecodeOptions:
    return DecodeOptions(config.decode.max_prompt_length, config.decode.slots)


def objective_fields(config: Config) -> dict[str, Any]:
    """`config.rl.objective` with the constant that "sequence_sum_const" divides by."""
    fields = config.rl.objective.to_dict()
    if fields["aggregation"] == "sequence_sum_const":
        fields["sequence_constant"] = config.decode.max_new_tokens
    return fields


def sub_config(config: Config, *sections: str, **changes: Any) -> Config:
    """What one stage needs of a larger configuration: its folder depends on nothing else, not on
    the mesh either."""
    names = ("seed", "task", "task_options", "model", "dtype", "attention", "chat", "decode")
    part = ml_collections.ConfigDict({name: config[name] for name in (*names, *sections)})
    return changed(part, changes)


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with other values in some fields, named with dots. KeyError for an unknown field."""
    copy = ml_collections.ConfigDict(config.to_dict()).lock()
    copy.update_from_flattened_dict(dict(changes))
    return copy


def given(options: Config) -> dict[str, Any]:
    """The fields that are not None: what was asked for beyond the defaults."""
    return {name: value for name, value in options.items() if value is not None}


def value_of(config: Config, field: str) -> Any:
    """A field named with dots."""
    return functools.reduce(lambda part, name: part[name], field.split("."), config)
