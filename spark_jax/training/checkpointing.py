"""Checkpoints that restore bit for bit, onto any mesh: a thin layer over orbax's CheckpointManager.

Several processes write one checkpoint together, each what its own devices hold, and agree on the
step they restore. They need a folder that all of them see.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spark_jax.parallel import processes
from spark_jax.training import digests

# What says something about the machine and nothing about the checkpoint: memory that is short, a
# device that failed. Whatever else orbax raises while it reads is damage; it has no type for that.
_OF_THE_MACHINE = (MemoryError, jax.errors.JaxRuntimeError)


class _Unreadable(ValueError):
    """The checkpoint is damaged."""


class TemplateMismatch(ValueError):
    """The checkpoint is whole but holds another model or optimiser than the one asked for."""


class Checkpoints:
    """The checkpoints of one run: `<directory>/<step>/`, each written whole or not at all.

    A step holds the train state and `extra`, a dict of JSON values for what is not an array: the
    data position, counts of rows written. Use as a context manager, or call `close`. Where there
    are several processes, all of them make every call, with the same arguments.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        keep_every: int | None = None,
    ) -> None:
        """Opens or creates `directory`. The newest `keep` checkpoints are kept (None: all), and
        every one whose step is a multiple of `keep_every`."""
        import orbax.checkpoint as ocp

        self.directory = Path(directory).absolute()
        processes.on_main(lambda: self.directory.mkdir(parents=True, exist_ok=True))
        # Orbax's barriers would be collectives on the devices; with the processes named they are
        # messages, which a save on another thread than the programs' (`preemption`) can wait for.
        several = jax.process_count() > 1
        everyone = set(range(jax.process_count())) if several else None
        together = ocp.options.MultiprocessingOptions(primary_host=0, active_processes=everyone)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every,
                create=False,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                # Made asynchronously, folders are waited for under a number that all managers of a
                # process share, and of two that save at once one waits in vain.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                multiprocessing_options=together,
            ),
            item_handlers=_handlers(together),
        )

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, extra: Mapping[str, Any] | None = None) -> None:
        """Begins to write a checkpoint and returns when the state may be donated or changed; `wait`
        and the next call wait until it is on disk, and raise what kept it from getting there.

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

    def ensure(self, step: int, state: Any, extra: Mapping[str, Any] | None = None) -> None:
        """Returns when a checkpoint of the step is on disk."""
        if step not in self.steps():
            self.save(step, state, extra)
        self.wait()

    def wait(self) -> None:
        """Returns when every checkpoint is on disk."""
        self._manager.wait_until_finished()

    def restore_latest(self, template: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest readable checkpoint as (state, extra), or None where there is none yet.

        `template` is a state, or its `jax.eval_shape`, with the structure, shapes, dtypes and,
        where it has them, shardings to restore to; the checkpoint may have been written from other
        shardings, devices and processes. A checkpoint that cannot be read, by any process, or whose
        files are not those that were written (`digests`; older checkpoints have none), is named in
        a warning, set aside as `<step>.torn`, and the one before it is used.

        Raises:
          TemplateMismatch: the checkpoint is of another model or optimiser; nothing is set aside.
          ValueError: checkpoints are there and none can be read.
          MemoryError, JaxRuntimeError: there is no room for the state; nothing is set aside.
        """
        self.wait()
        torn: dict[int, str] = {}
        for step in reversed(processes.exchange(self.steps())[0]):
            restored, problem = self._try_to_restore(step, template)
            problems = [found for found in processes.exchange(problem) if found is not None]
            for found in problems:
                if not isinstance(found, _Unreadable):
                    raise found
            if problems:
                torn[step] = str(problems[0])
                continue
            for torn_step, reason in torn.items():
                self._set_aside(torn_step, reason, used=step)
            return restored
        if torn:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in torn.items())
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

    def _try_to_restore(self, step: int, template: Any) -> tuple[Any, Exception | None]:
        """The checkpoint, or why this process cannot read it."""
        try:
            return self._restore(step, template), None
        except Exception as error:
            if isinstance(error, TemplateMismatch):
                return None, error
            if isinstance(cause := _root(error), _OF_THE_MACHINE):
                return None, cause
            return None, _Unreadable(_first_line(error))

    def _restore(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
        """What this process's devices are to hold, read on its own: where one process cannot read,
        the others are not kept waiting."""
        import orbax.checkpoint as ocp

        index = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
            **_handlers(alone),
        )
        folder = self.directory / str(step)
        for item in ("state", "extra"):
            digests.check_index(folder / item)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            metadata = reader.metadata(folder).item_metadata["state"]
            if metadata is None:
                raise FileNotFoundError("the state's metadata is missing")
            saved, wanted = _signature(metadata.tree), _signature(template)
            if saved != wanted:
                raise TemplateMismatch(
                    f"checkpoint {folder} does not fit: {_difference(saved, wanted)}"
                )
            digests.check_data(folder / "state", part=index, parts=jax.process_count())
            parts = ocp.args.Composite(
                state=ocp.args.StandardRestore(template), extra=ocp.args.JsonRestore()
            )
            restored = reader.restore(folder, args=parts)
        for (path, leaf), like in zip(
            jax.tree_util.tree_leaves_with_path(restored["state"]), jax.tree.leaves(template)
        ):
            if leaf.dtype != like.dtype:  # orbax types a PRNG key by a side file, if that is there
                raise ValueError(f"{_name(path)} came back as {leaf.dtype}, not {like.dtype}")
        return restored["state"], restored["extra"]

    def _set_aside(self, step: int, reason: str, *, used: int) -> None:
        source = self.directory / str(step)

        def move() -> str:
            place, count = self.directory / f"{step}.torn", 1
            while place.exists():
                count += 1
                place = self.directory / f"{step}.torn{count}"
            source.rename(place)
            return place.name

        name = processes.on_main(move)
        self._manager.reload()
        if processes.is_main():
            warnings.warn(
                f"checkpoint {source} cannot be read ({reason}); moved to {name}, "
                f"going on from step {used}",
                stacklevel=3,
            )


def _handlers(options: Any) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    handlers = {
        "state": ocp.StandardCheckpointHandler(multiprocessing_options=options),
        "extra": ocp.JsonCheckpointHandler(multiprocessing_options=options),
    }
    for handler in handlers.values():
        digests.attach(handler, jax.process_index())
    return handlers


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


def _root(error: BaseException) -> BaseException:
    """The first error of those that led to this one; orbax wraps what it meets."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
