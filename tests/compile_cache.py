"""The folder in which compiled programs are kept between test runs.

It is `.cache` in the repository, or the folder that SPARK_JAX_TEST_CACHE names, with a subfolder
for each processor: programs are machine code, which another processor may not run.
"""

import hashlib
import os
import shutil
from pathlib import Path

MAX_BYTES = 4 * 2**30


def folder():
    base = os.environ.get("SPARK_JAX_TEST_CACHE") or Path(__file__).parents[1] / ".cache"
    return str(Path(base).resolve() / f"compiled-{_processor()}")


def empty_if_too_big(folder):
    """Programs of changed code are never read again; without a limit they would pile up."""
    if folder.is_dir() and sum(file.stat().st_size for file in folder.iterdir()) > MAX_BYTES:
        shutil.rmtree(folder)


def _processor():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(features.encode()).hexdigest()[:8]
