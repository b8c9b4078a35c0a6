"""Every test runs with the library's shape and type annotations checked by jaxtyping + beartype.

XLA's optimisations are off: the programs of the tests are small and run a few times, and compiling
them is where the time would go. A test about compiled programs turns them on with `optimised`.
"""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import browsing
import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("spark_jax", "typechecking.check")

# The same examples on every run, and none refused for being slow on a busy machine.
hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")


browser = browsing.browser


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs before they fill the process's memory maps: each takes several, and
    XLA ends with a segmentation fault when there are no more (65530 on Linux)."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def optimised():
    """XLA as users run it."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
