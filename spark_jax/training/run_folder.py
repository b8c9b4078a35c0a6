"""The folder of one run: its configuration, the versions it ran on, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import socket
import time
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from spark_jax.parallel import processes

VISIBLE_WITHIN = 20.0  # seconds that a file system may take to show one host what another wrote
SUBFOLDERS = ("checkpoints", "samples", "plots")


class OtherRun(ValueError):
    """The folder belongs to another run than the one that wants to go on in it."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Made by `open`. `resumed` is true where the folder held this run already; `config` is then
    the configuration that it was started with."""

    path: Path
    config: dict[str, Any]
    resumed: bool

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        config: Any,
        former_defaults: Mapping[str, object] = MappingProxyType({}),
    ) -> RunFolder:
        """Creates the folder, or opens it to go on with the same run. Of several processes the
        first does, and the others wait for it and look whether it is the folder they see.

        `versions.json` names the Python, libraries, platform and device of the last start; where
        they changed since the one before, a warning says so, because then the resumed run need not
        equal the uninterrupted one bit for bit.

        Args:
          path: the folder.
          config: a dict or ConfigDict of JSON values (tuples become lists); it is written,
            resolved, to `config.json` of a new folder.
          former_defaults: see `differences`. With it a folder of an earlier version, whose
            configuration has other fields, holds the same run.

        Raises:
          OtherRun: the folder holds a run with another configuration (each differing field is
            named), or results without a configuration.
          ValueError: `config` holds what is not JSON.
          FileNotFoundError: another process does not see the folder that the first one made.
        """
        path, resolved = Path(path), _json_value(config, "config")
        held = processes.on_main(lambda: _make_or_check(path, resolved, former_defaults))
        _check_shared(path)
        return cls(path=path, config=resolved if held is None else held, resumed=held is not None)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint notes of the run that wrote it: a digest of its configuration, and the
        versions."""
        text = json.dumps(self.config, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return {"config": digest, "versions": versions()}

    def check_identity(self, extra: Mapping[str, Any]) -> None:
        """OtherRun for the `extra` of a checkpoint that a run of another configuration wrote, such
        as one that was copied here."""
        if extra.get("config", self.identity["config"]) != self.identity["config"]:
            raise OtherRun(
                f"the newest checkpoint in {self.checkpoints} was written by a run of another "
                "configuration; remove it, or use another folder"
            )

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    def read_summary(self) -> dict[str, Any] | None:
        """What a finished run left, or None for a run that has not finished."""
        path = self.path / "summary.json"
        return processes.on_main(lambda: json.loads(path.read_text()) if path.exists() else None)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json`, whole or not at all.

        NumPy and JAX scalars are written as numbers, NaN and infinities, which JSON lacks, as
        strings. Of several processes the first writes, and all return when it is there.
        """
        value = _json_value(_plain_scalars(summary), "summary")
        processes.on_main(lambda: _write_json(self.path / "summary.json", value))


def differences(
    config: Mapping[str, Any],
    other: Mapping[str, Any],
    former_defaults: Mapping[str, object] = MappingProxyType({}),
) -> list[str]:
    """Lists the fields in which two configurations differ, a line each, named with dots.

    Args:
      config: a folder's, of JSON values.
      other: the one of now.
      former_defaults: dotted name → the value of a field for the configuration that does not have
        it, since a version added or removed it. An empty section has no fields, so that one
        without it is the same.
    """
    old, new = _fields(config), _fields(_json_value(other, "config"))

    def differs(field: str) -> bool:
        kept = {field: former_defaults[field]} if field in former_defaults else {}
        return _show(kept | old, field) != _show(kept | new, field)

    return [
        f"{field}: {_show(old, field)} in the folder, {_show(new, field)} now"
        for field in sorted(old.keys() | new.keys())
        if differs(field)
    ]


def versions() -> dict[str, str]:
    """What a run's bits depend on besides its configuration. Starts the JAX backend."""
    device, mesh = jax.devices()[0], jax.sharding.get_mesh()
    spread = {"process_count": str(jax.process_count())} if jax.process_count() > 1 else {}
    if not mesh.empty:
        spread["mesh"] = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return {
        "spark_jax": importlib.metadata.version("spark-jax"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "optax")},
        "platform": platform.platform(),
        "backend": device.platform,
        "device_kind": device.device_kind,
        "device_count": str(jax.device_count()),
        **spread,
    }


def _make_or_check(
    path: Path, config: dict[str, Any], former_defaults: Mapping[str, object]
) -> dict[str, Any] | None:
    """The configuration of the run that the folder held already; None for a new folder."""
    path.mkdir(parents=True, exist_ok=True)
    held = None
    if (path / "config.json").exists():
        held = _read_config(path / "config.json")
        _refuse_other_config(path, held, config, former_defaults)
    else:
        _refuse_orphaned_results(path)
        _write_json(path / "config.json", config)
    for name in SUBFOLDERS:
        (path / name).mkdir(exist_ok=True)
    _record_versions(path / "versions.json")
    return held


def _check_shared(path: Path) -> None:
    """Raises, on every process, where one does not see what the first one writes."""
    if jax.process_count() == 1:
        return

    def leave() -> str:
        name = f".shared-{uuid.uuid4().hex}"
        (path / name).touch()
        return name

    token = path / processes.on_main(leave)

    def look() -> None:
        end = time.monotonic() + VISIBLE_WITHIN
        while not token.exists():
            if time.monotonic() > end:
                raise FileNotFoundError(
                    f"process {jax.process_index()}, on {socket.gethostname()}, does not see in "
                    f"{path.absolute()} what process 0 wrote there; run_dir must be a folder that "
                    "all hosts share, under the same name"
                )
            time.sleep(0.1)

    try:
        processes.on_own(look)
    finally:
        if processes.is_main():
            token.unlink(missing_ok=True)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); fix it or use another folder") from error
    return config


def _refuse_other_config(
    path: Path,
    held: dict[str, Any],
    config: dict[str, Any],
    former_defaults: Mapping[str, object],
) -> None:
    if changes := differences(held, config, former_defaults):
        raise OtherRun(
            f"{path} holds a run with another configuration; use another folder, or the "
            "configuration it was started with:\n" + "\n".join(f"  {line}" for line in changes)
        )


def _refuse_orphaned_results(path: Path) -> None:
    orphans = [path / "checkpoints", path / "metrics.jsonl"]
    found = [p.name for p in orphans if p.is_file() or (p.is_dir() and any(p.iterdir()))]
    if found:
        raise OtherRun(
            f"{path} holds {' and '.join(found)} but no config.json, so whose they are is unknown; "
            "use another folder or put the file back"
        )


def _record_versions(path: Path) -> None:
    now = versions()
    if path.exists():
        before = json.loads(path.read_text())
        changes = [
            f"{name} {before.get(name)} -> {now.get(name)}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if changes:
            warnings.warn(
                f"{path.parent} goes on under other versions: {', '.join(changes)}", stacklevel=4
            )
    _write_json(path, now)


def _json_value(value: Any, field: str) -> Any:
    """A strict conversion: what would not come back from the file is refused by its field."""
    if hasattr(value, "to_dict"):  # a ConfigDict, at any depth; the package is not needed here
        value = value.to_dict()
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{field} has the key {key!r}; keys must be strings")
        return {key: _json_value(item, f"{field}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item, f"{field}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError(
        f"{field}={value!r} ({type(value).__name__}) has no place in a JSON file; "
        "use a finite number, string, bool, None, list or dict"
    )


def _plain_scalars(value: Any) -> Any:
    """Turns array scalars into Python numbers and non-finite ones into strings, at any depth."""
    if isinstance(value, Mapping):
        return {key: _plain_scalars(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_scalars(item) for item in value]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _fields(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted name; a list is a leaf, an empty dict has none."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    fields: dict[str, Any] = {}
    for key, item in value.items():
        fields |= _fields(item, f"{prefix}.{key}" if prefix else key)
    return fields


def _show(fields: dict[str, Any], field: str) -> str:
    return json.dumps(fields[field]) if field in fields else "absent"


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    temporary.replace(path)
