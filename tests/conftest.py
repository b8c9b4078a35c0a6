"""Every test runs with the library's shape and type annotations checked by jaxtyping + beartype."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook("spark_jax", "typechecking.check")
