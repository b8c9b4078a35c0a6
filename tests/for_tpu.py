"""Compiling for TPUs where there is none."""

import pytest

from spark_jax.kernels import ahead_of_time


def has_libtpu():
    """Whether this machine can compile for TPUs."""
    try:
        return ahead_of_time.libtpu_path().is_file()
    except RuntimeError:
        return False


needs_libtpu = pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed: make pods")
