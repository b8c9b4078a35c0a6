"""Whether a mesh of devices divides a model and its batches."""

from __future__ import annotations

import math

from jax.sharding import AbstractMesh, Mesh

from spark_jax.models.config import ModelConfig
from spark_jax.parallel.sharding import REPLICATED_WHERE_FEWER, RULES


def check_fits(mesh: Mesh | AbstractMesh, *, batch: int | None, config: ModelConfig | None) -> None:
    """Refuses a mesh that does not divide what is to be spread over it.

    `batch` is the rows of a batch, or of a micro-batch where gradients are accumulated; None checks
    the model alone, and `config` None the batch alone. KV heads fewer than `tensor` are held by
    every device whole.

    Raises:
      ValueError: naming every length that its mesh axes do not divide, with both numbers and the
        sizes that would do.
    """
    lengths: dict[tuple[str, str], int | None] = {("batch", "batch"): batch}
    if config is not None:
        lengths |= {
            ("heads", "num_heads"): config.num_heads,
            ("kv_heads", "num_kv_heads"): config.num_kv_heads,
            ("mlp", "mlp_width"): config.mlp_width,
            ("vocab", "vocab_size"): config.vocab_size,
            ("width", "width"): config.width,
        }
    wrong = []
    for (name, label), length in lengths.items():
        axes = RULES[name] or ()
        devices = math.prod(mesh.shape.get(axis, 1) for axis in axes)
        if length is None or (name in REPLICATED_WHERE_FEWER and length < devices):
            continue
        if length % devices:
            fitting = [n for n in range(1, devices + 1) if length % n == 0]
            spread = "*".join(axes)
            wrong.append(f"{label}={length} over {spread}={devices} (choose {spread} in {fitting})")
    if wrong:
        raise ValueError(f"mesh {dict(mesh.shape)} does not divide " + "; ".join(wrong))
