"""Hugging Face checkpoints in and out, one tensor at a time.

What `save_hf` writes, transformers loads, and what else reads such folders. Only safetensors and
GGUF files are read: no pickle, no code of the checkpoint's.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from spark_jax.models import config as model_config
from spark_jax.models import hf_layout, transformer
from spark_jax.models.config import ModelConfig
from spark_jax.models.hf_layout import EMBEDDING, HEAD, Place
from spark_jax.models.layers import Layer
from spark_jax.models.placement import BLOCK_SIZE, Target
from spark_jax.models.transformer import Params
from spark_jax.parallel import processes, sharding

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_TEXTS = ("*.json", "*.jinja", "tokenizer.model", "merges.txt")
HUB_WEIGHTS = "model*.safetensors"


def load(
    path_or_repo: str | Path, *, dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[Params, ModelConfig]:
    """Parameters (layers stacked) and configuration of a checkpoint; both in `dtype`.

    Tensors go block by block from the file into their place on the devices. With a mesh, each
    parameter gets the `NamedSharding` that `parallel.sharding` has for it, and a process reads only
    what its own devices hold.

    Args:
      path_or_repo: see `resolve`. A directory holds `config.json` and `model.safetensors`, or
        `model.safetensors.index.json` and its shards.

    Raises:
      FileNotFoundError: no such checkpoint, or a file of it is missing.
      ValueError: an unsupported architecture; a missing, extra, mis-shaped or unreadable tensor, by
        name and file; a mesh that does not divide the parameters.
    """
    path = resolve(path_or_repo)
    config = read_config(path, dtype=dtype)
    stored: Iterable[_Stored]
    if path.is_file():
        from spark_jax.models import gguf

        stored = (_Stored(name, path, array) for name, array in gguf.tensors(path))
    else:
        files = _weight_files(path)
        _check_files(files, config)
        stored = _stored(files)
    return _assemble(stored, config, mesh, source=path), config


def read_config(path: Path, *, dtype: str = "float32") -> ModelConfig:
    """The configuration alone of a checkpoint directory or GGUF file. Raises as `load`."""
    if path.is_file():
        from spark_jax.models import gguf

        return _config(path, gguf.hf_config(path), dtype)
    return _config(path / "config.json", _read_json(path / "config.json"), dtype)


def save_hf(
    path: str | Path,
    params: Params,
    config: ModelConfig,
    tokenizer: Any = None,
    *,
    max_shard_bytes: int = 5 * 10**9,
    stop_ids: Sequence[int] = (),
) -> None:
    """Writes what transformers and vLLM load: weights, config, generation config, tokenizer.

    Weights keep the parameters' dtype and go in files of at most `max_shard_bytes` (one tensor at
    least), one file in memory at a time. An export already in `path` is removed first; config.json
    comes last, so a folder that has it is complete. Of several processes all call it, and gather
    tensor by tensor what the first one writes; all return when it is there, or raise what kept the
    first one from writing it.

    Args:
      params: stacked layers, in float32 or bfloat16.
      tokenizer: saved along with its chat template.
      stop_ids: tokens that end a response, for the generation config; the tokenizer's
        end-of-sequence token where none is given.

    Raises:
      ValueError: parameters that are unstacked, or whose dtype or shapes are not the config's.
    """
    hf = model_config.to_hf(config)
    dtype = _check_params(params, config).name
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}; it must be at least 1")
    path = Path(path)
    processes.on_main(lambda: _make_room(path))
    _write_weights(path, params, config, max_shard_bytes)

    def write_texts() -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        generation = _generation(tokenizer, stop_ids)
        _write_json(path / "generation_config.json", generation)
        # transformers before 4.56 and older releases of vLLM read the first of both names.
        names = {"torch_dtype": dtype, "dtype": dtype}
        _write_json(path / "config.json", {**hf, **names, **generation})

    processes.on_main(write_texts)


def resolve(path_or_repo: str | Path) -> Path:
    """Where a checkpoint lies: a directory, a `.gguf` file, or a hub id (`owner/name`), which is
    taken from the hub's cache or fetched. `HF_HUB_OFFLINE`, `HF_HOME` and `HF_TOKEN` are honoured.

    Of a repository only safetensors, JSON and tokenizer files are fetched, and the weights only
    after its config was found to be supported.

    Raises:
      FileNotFoundError: neither; says what was tried.
      ValueError: a file that is not GGUF, or a repository without safetensors or with an
        unsupported architecture.
    """
    path = Path(path_or_repo)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is no checkpoint: give its folder, a .gguf file or a hub id")
        return path
    name = str(path_or_repo)
    if path.suffix == ".gguf" or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"{name} does not exist, and is no hub id (owner/name) either")
    return _from_hub(name)


def _config(source: Path, hf: Mapping[str, Any], dtype: str) -> ModelConfig:
    try:
        return model_config.from_hf(hf, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


class _Stored(NamedTuple):
    """A tensor of a file. `data` is an array, or can be sliced like one (safetensors)."""

    name: str
    file: Path
    data: Any

    @property
    def shape(self) -> tuple[int, ...]:
        array = isinstance(self.data, np.ndarray)
        return tuple(self.data.shape if array else self.data.get_shape())


def _assemble(
    tensors: Iterable[_Stored], config: ModelConfig, mesh: Mesh | None, *, source: Path
) -> Params:
    """Puts every tensor, as it comes, into its place in the parameters."""
    shapes = transformer.shapes(config)
    lie: dict[str, Any] = {}
    if mesh is not None:
        axes = transformer.logical_axes(config)
        lie = _fields(sharding.named_shardings(axes, shapes, mesh))
    targets = {name: Target(shape, lie.get(name)) for name, shape in _fields(shapes).items()}
    places = hf_layout.places(config)
    seen = set()
    for stored in tensors:
        if not hf_layout.is_ignored(stored.name, config):
            field, layer, leaf = _check(stored, places)
            targets[field].put(stored.data, leaf, layer)
            seen.add(stored.name)
    _check_complete(seen, places, source)
    arrays = {name: target.array for name, target in targets.items()}
    outer = {name: arrays.pop(name) for name in _OUTER if name in arrays}
    return Params(layers=Layer(**arrays), **outer)


_OUTER = ("embedding", "final_norm", "head")


def _fields(params: Params) -> dict[str, Any]:
    """The parameters by name, those of the layers stacked."""
    outer = {name: getattr(params, name) for name in _OUTER}
    layers = {field.name: getattr(params.layers, field.name) for field in fields(Layer)}
    return {name: value for name, value in (outer | layers).items() if value is not None}


def _stored(files: Iterable[Path]) -> Iterator[_Stored]:
    """Tensors file by file. Files are mapped; each is closed again after every tensor, because the
    pages that were read stay in memory as long as it is open."""
    for file in files:
        with _opened(file) as tensors:
            names = list(tensors.keys())
        for name in names:
            with _opened(file) as tensors:
                yield _Stored(name, file, tensors.get_slice(name))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: no safetensors file, or a torn one: {error}") from error


def _weight_files(path: Path) -> list[Path]:
    """The files that hold the weights, as transformers chooses them."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if not (path / INDEX).is_file():
        pickled = [file.name for file in sorted(path.glob("*.bin"))]
        also = f"; pickled weights ({pickled[0]}) are not read: convert them" if pickled else ""
        raise FileNotFoundError(f"{path} has neither {WEIGHTS} nor {INDEX}{also}")
    weight_map = _read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path / INDEX}: the field 'weight_map' is missing or empty")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{path / INDEX}: {name!r} is not the name of a file beside it")
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} is missing; {INDEX} lists it")
    return [path / name for name in names]


def _check_files(files: Sequence[Path], config: ModelConfig) -> None:
    """Names, shapes and dtypes by the files' headers, before any weight is read."""
    places = hf_layout.places(config)
    seen: dict[str, Path] = {}
    for stored in _stored(files):
        if stored.name in seen:
            raise ValueError(f"{stored.file}: {stored.name!r} is in {seen[stored.name]} too")
        seen[stored.name] = stored.file
        if hf_layout.is_ignored(stored.name, config):
            continue
        _check(stored, places)
        dtype = stored.data.get_dtype()
        if dtype not in _DTYPES:
            raise ValueError(f"{stored.file}: {stored.name!r} is {dtype}; can read {_DTYPES}")
    _check_complete(seen, places, files[0] if len(files) == 1 else files[0].parent)
    if config.tied_embeddings and HEAD in seen:
        _check_tied_head(seen)


_DTYPES = ("F64", "F32", "BF16", "F16")


def _check(stored: _Stored, places: Mapping[str, Place]) -> Place:
    if stored.name not in places:
        raise ValueError(f"{stored.file}: {stored.name!r} is no tensor of this architecture")
    place = places[stored.name]
    if stored.shape != place.leaf.hf_shape:
        raise ValueError(
            f"{stored.file}: {stored.name!r} has shape {stored.shape}, needs {place.leaf.hf_shape}"
        )
    return place


def _check_complete(seen: Collection[str], places: Mapping[str, Place], source: Path) -> None:
    missing = [name for name in places if name not in seen]
    if missing:
        others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise ValueError(f"{source}: tensor {missing[0]!r}{others} is missing")


def _check_tied_head(files: Mapping[str, Path]) -> None:
    """Refuses a head of its own beside a config that ties it to the embedding."""
    with _opened(files[EMBEDDING]) as one, _opened(files[HEAD]) as other:
        embedding, head = one.get_slice(EMBEDDING), other.get_slice(HEAD)
        rows, columns = embedding.get_shape()
        step = max(1, BLOCK_SIZE // columns)
        blocks = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
        same = embedding.get_shape() == head.get_shape() and all(
            np.array_equal(embedding[block], head[block]) for block in blocks
        )
    if not same:
        raise ValueError(
            f"{files[HEAD]}: {HEAD!r} differs from {EMBEDDING!r}, but config.json ties them; "
            "set tie_word_embeddings to false if the head is a matrix of its own"
        )


def _from_hub(name: str) -> Path:
    import huggingface_hub

    def fetch(patterns: Sequence[str]) -> Path:
        # No folders: they hold the same weights for other programs.
        only: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": "*/*"}
        return Path(huggingface_hub.snapshot_download(name, **only))

    try:
        path = fetch(HUB_TEXTS)
        _config(path / "config.json", _read_json(path / "config.json"), "float32")
        path = fetch((*HUB_TEXTS, HUB_WEIGHTS))
    except (OSError, huggingface_hub.errors.HFValidationError) as error:
        raise FileNotFoundError(
            f"{name!r} is no folder here, and was not found in the hub's cache or fetched: {error}"
        ) from error
    if not (path / WEIGHTS).is_file() and not (path / INDEX).is_file():
        raise ValueError(
            f"{name} on the hub has no safetensors, and pickled weights are not read; convert it "
            "(https://huggingface.co/spaces/safetensors/convert) and give the folder"
        )
    return path


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {path.parent} is no complete checkpoint")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def _check_params(params: Params, config: ModelConfig) -> np.dtype:
    """The parameters' dtype."""
    if isinstance(params.layers, tuple):
        raise ValueError(
            "parameters in the decoding layout (unstacked) are not saved; give the stacked ones"
        )
    given, needed = _fields(params), _fields(transformer.shapes(config))
    if set(given) != set(needed):
        names = sorted(set(given) ^ set(needed))
        raise ValueError(f"parameters and config disagree about there being {names}")
    dtype = jnp.dtype(params.embedding.dtype)
    if dtype.name not in ("float32", "bfloat16"):
        raise ValueError(f"parameters are {dtype.name}; save them as float32 or bfloat16")
    for name, array in given.items():
        shape = needed[name].shape
        if (array.shape, array.dtype) != (shape, dtype):
            raise ValueError(f"{name} is {array.dtype} {array.shape}, needs {dtype} {shape}")
    return dtype


def _generation(tokenizer: Any, stop_ids: Sequence[int]) -> dict[str, Any]:
    """What ends and pads a text, as both config files of a checkpoint say it."""
    names = [f"{name}_token_id" for name in ("bos", "eos", "pad")]
    ids = {name: getattr(tokenizer, name, None) for name in names}
    if stop_ids:
        ids["eos_token_id"] = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    return {name: value for name, value in ids.items() if value is not None}


def _make_room(path: Path) -> None:
    """Makes the folder, and removes an export that is there."""
    path.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", INDEX, WEIGHTS):
        (path / name).unlink(missing_ok=True)
    for shard in path.glob("model-*-of-*.safetensors"):
        shard.unlink()


def _write_weights(path: Path, params: Params, config: ModelConfig, max_shard_bytes: int) -> None:
    arrays = _fields(params)
    places = hf_layout.places(config)
    itemsize = params.embedding.dtype.itemsize
    sizes = {name: math.prod(place.leaf.hf_shape) * itemsize for name, place in places.items()}
    shards = _shards(sizes, max_shard_bytes)
    files = (
        [WEIGHTS] if len(shards) == 1 else [_shard_file(i, len(shards)) for i in range(len(shards))]
    )
    for file, names in zip(files, shards, strict=True):
        tensors = {}
        for name in names:
            field, layer, leaf = places[name]
            array = _gathered(arrays[field] if layer is None else _layer(arrays[field], layer))
            if processes.is_main():
                tensors[name] = leaf.to_hf(np.asarray(array))
        processes.on_main(functools.partial(_write_shard, path / file, tensors))
    if len(shards) > 1:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        processes.on_main(lambda: _write_json(path / INDEX, index))


def _write_shard(file: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    file.touch()
    mode = file.stat().st_mode  # safetensors puts a file in its place for us alone
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in runs of at most `limit` bytes; a larger tensor is alone."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _shard_file(index: int, count: int) -> str:
    return f"model-{index + 1:05}-of-{count:05}.safetensors"


@jax.jit
def _layer(stacked: Float[Array, "N *shape"], index: Int[Array, ""]) -> Float[Array, "*shape"]:
    return jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False)


def _gathered(array: Array) -> Array:
    """An array of which other processes hold a part, whole on every device; others as they are."""
    if array.is_fully_addressable:
        return array
    lies: Any = array.sharding  # over several processes: a NamedSharding
    return _gather(sharding.replicated(lies.mesh))(array)


@functools.lru_cache(maxsize=4)
def _gather(where: NamedSharding) -> Any:
    return jax.jit(lambda array: array, out_shardings=where)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
