"""The shipped base model: generator, verifier and start of every reward model of the world."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spark_jax.tasks.arithmetic_chains.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from transformers import PreTrainedTokenizerFast

    from spark_jax.models.config import ModelConfig
    from spark_jax.models.transformer import Params

PATH = Path(__file__).parent / "base"
MAKE = "python -m spark_jax.experiments.pretrain --output={path}"


def load(
    path: str | Path = PATH, *, mesh: Mesh | None = None
) -> tuple[Params, ModelConfig, PreTrainedTokenizerFast]:
    """Parameters, configuration and tokenizer of a base, by default the one shipped; with a mesh,
    the parameters lie spread over it.

    Raises:
        FileNotFoundError: no checkpoint in `path`; names the command that makes it.
        ValueError: a checkpoint whose vocabulary is not the world's.
    """
    from spark_jax.models import checkpoints

    if not (Path(path) / checkpoints.WEIGHTS).is_file():
        command = MAKE.format(path=path)
        raise FileNotFoundError(f"no base model in {path}; make it (some minutes): {command}")
    params, config = checkpoints.load(path, mesh=mesh)
    tokenizer = load_tokenizer()
    if config.vocab_size != len(tokenizer):
        raise ValueError(
            f"{path} has a vocabulary of {config.vocab_size} words, the world has "
            f"{len(tokenizer)}; make it afresh: {MAKE.format(path=path)}"
        )
    return params, config, tokenizer
