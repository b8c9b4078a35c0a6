"""Lowering for a GPU where there is none."""

import jax
import jax.export
from jax.sharding import AbstractDevice, AbstractMesh

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def text(function, *shapes):
    """The StableHLO of a jitted function for CUDA, with its Triton kernels."""
    no_promise = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=H100)):
        export = jax.export.export(function, platforms=["cuda"], disabled_checks=[no_promise])
        return export(*shapes).mlir_module()
