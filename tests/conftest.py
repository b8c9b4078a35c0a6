"""Every test runs with the library's shape and type annotations checked by jaxtyping + beartype.

XLA's optimisations are off: the programs of the tests are small and run a few times, and compiling
them is where the time would go. Compiled programs are kept (`compile_cache`): later runs, the
workers of one run and the processes that tests start load them. A test about compiled programs
uses neither, by the fixture `optimised`.
"""

import collections
import gc
import os
from pathlib import Path

import compile_cache

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compile_cache.folder())

import browsing
import filelock
import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
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


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the first process of a run
        compile_cache.empty_if_too_big(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, worker_id):
    """`made_once(name, make)` is a folder that `make(folder)` filled, once for all workers."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent

    def once(name, make):
        folder, done = root / name, root / f"{name}.done"
        with filelock.FileLock(root / f"{name}.lock"):
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return once


# Files whose fast tests take longest.
LONGEST = ("test_train_rl", "test_pipeline", "test_real_model", "test_generate", "test_sharding")


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no worker is left with one at the end."""
    minutes = collections.Counter()
    for item in items:
        minutes[item.path] += 0
        for mark in item.iter_markers("slow"):
            minutes[item.path] += mark.kwargs.get("minutes", 1)
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda x: (-minutes[x.path], ranks.get(x.path.stem, len(LONGEST))))


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
    """XLA as users run it, and nothing loaded that was compiled before."""
    before = jax.config.read("jax_disable_most_optimizations")
    _configure(jax_disable_most_optimizations=False, jax_enable_compilation_cache=False)
    yield
    _configure(jax_disable_most_optimizations=before, jax_enable_compilation_cache=True)


def _configure(**options):
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # whether it is used is asked once
