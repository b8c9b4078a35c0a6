"""The tests' own type checker is on, for shapes and for everything else."""

import jax.numpy as jnp
import pytest

from spark_jax.data.batches import batch_order
from spark_jax.losses import aggregation_weights


def test_a_wrong_type_is_refused():
    with pytest.raises(Exception, match="num_examples"):
        batch_order("many", 4, 0)


def test_a_wrong_shape_is_refused():
    aggregation_weights(jnp.ones((2, 3), bool), "token_mean")
    with pytest.raises(Exception, match="mask"):
        aggregation_weights(jnp.ones((2, 3, 4), bool), "token_mean")
