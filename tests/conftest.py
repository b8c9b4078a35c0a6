"""Every test runs with the library's shape and type annotations checked by jaxtyping + beartype.

XLA's optimisations are off: the programs of the tests are small and run a few times, and compiling
them is where the time would go. A test about compiled programs turns them on with `optimised`.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("spark_jax", "typechecking.check")


@pytest.fixture
def optimised():
    """XLA as users run it."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
