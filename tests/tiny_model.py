"""A transformer of about a thousand parameters, for tests of what is built on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from spark_jax.models import transformer
from spark_jax.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=11, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=24
)


@functools.cache
def params(config: ModelConfig = CONFIG) -> transformer.Params:
    """Random parameters, norms included; drawn by NumPy, since compiling `init` takes seconds."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / 2, s.dtype), shapes)
