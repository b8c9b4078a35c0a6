"""Checkpoints that restore bit for bit: a thin layer over orbax's CheckpointManager."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

# What orbax raises on a file that is missing, cut short or altered. Not RuntimeError: a device that
# is out of memory says nothing about the checkpoint.
_UNREADABLE = (OSError, ValueError, KeyError)


class TemplateMismatch(ValueError):
    """The checkpoint is whole but holds another model or optimiser than the one asked for."""


class Checkpoints:
    """The checkpoints of one run: `<directory>/<step>/`, each written whole or not at all.

    A step holds the train state and `extra`, a dict of JSON values for what is not an array: the
    data position, counts of rows written. Use as a context manager, or call `close`.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int | None = 3) -> None:
        """Opens or creates `directory`; the newest `keep` checkpoints are kept (None: all)."""
        import orbax.checkpoint as ocp

        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "extra": ocp.JsonCheckpointHandler(),
            },
        )

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, extra: Mapping[str, Any] | None = None) -> None:
        """Writes a checkpoint and returns when it is on disk.

        Raises:
          ValueError: `step` is not after the newest checkpoint, or `extra` does not survive JSON.
        """
        import orbax.checkpoint as ocp

        steps = self.steps()
        if steps and step <= steps[-1]:
            raise ValueError(
                f"cannot save step {step} in {self.directory}: step {steps[-1]} is there already"
            )
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                extra=ocp.args.JsonSave(_json_only(dict(extra or {}))),
            ),
            force=True,
        )

    def restore_latest(self, template: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest readable checkpoint as (state, extra), or None where there is none yet.

        `template` is a state, or its `jax.eval_shape`, with the structure, shapes, dtypes and,
        where it has them, shardings to restore to. A checkpoint that cannot be read is named in a
        warning, set aside as `<step>.torn`, and the one before it is used.

        Raises:
          TemplateMismatch: the checkpoint is of another model or optimiser; nothing is set aside.
          ValueError: checkpoints are there and none can be read.
        """
        torn: dict[int, Exception] = {}
        for step in reversed(self.steps()):
            try:
                restored = self._restore(step, template)
            except TemplateMismatch:
                raise
            except _UNREADABLE as error:
                torn[step] = error
                continue
            for torn_step, reason in torn.items():
                self._set_aside(torn_step, reason, used=step)
            return restored
        if torn:
            reasons = "; ".join(f"step {step}: {_first_line(e)}" for step, e in torn.items())
            raise ValueError(
                f"no checkpoint in {self.directory} can be read ({reasons}); "
                "start in another folder, or delete them to start over"
            )
        return None

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _restore(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
        import orbax.checkpoint as ocp

        metadata = self._manager.item_metadata(step)["state"]
        if metadata is None:
            raise FileNotFoundError("the state's metadata is missing")
        saved = _signature(metadata.tree)
        wanted = _signature(template)
        if saved != wanted:
            raise TemplateMismatch(
                f"checkpoint {self.directory / str(step)} does not fit: "
                + _difference(saved, wanted)
            )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(template), extra=ocp.args.JsonRestore()
            ),
        )
        for (path, leaf), like in zip(
            jax.tree_util.tree_leaves_with_path(restored["state"]), jax.tree.leaves(template)
        ):
            if leaf.dtype != like.dtype:  # orbax types a PRNG key by a side file, if that is there
                raise ValueError(f"{_name(path)} came back as {leaf.dtype}, not {like.dtype}")
        return restored["state"], restored["extra"]

    def _set_aside(self, step: int, error: Exception, *, used: int) -> None:
        source = self.directory / str(step)
        target = self.directory / f"{step}.torn"
        count = 1
        while target.exists():
            count += 1
            target = self.directory / f"{step}.torn{count}"
        source.rename(target)
        self._manager.reload()
        warnings.warn(
            f"checkpoint {source} cannot be read ({_first_line(error)}); moved to {target.name}, "
            f"going on from step {used}",
            stacklevel=3,
        )


def _signature(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every leaf by its path; a typed PRNG key as its raw data, as saved."""
    signature = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        signature[_name(path)] = (tuple(leaf.shape), np.dtype(leaf.dtype).name)
    return signature


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _difference(saved: dict[str, Any], wanted: dict[str, Any], most: int = 5) -> str:
    lines = [
        f"{name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
        for name in sorted(
            saved.keys() | wanted.keys(), key=lambda n: (not n.startswith("params"), n)
        )
        if saved.get(name) != wanted.get(name)
    ]
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more


def _json_only(extra: dict[str, Any]) -> dict[str, Any]:
    try:
        back = json.loads(json.dumps(extra, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra={extra!r} is not JSON: {error}") from error
    if back != extra:
        raise ValueError(
            f"extra={extra!r} would come back as {back!r}; use string keys, and lists for tuples"
        )
    return extra


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
