import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compilation():
    """These programs are tiny and run a few times: compiling them is where the time goes."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
