"""Run by test_attention.py in a process with eight CPU devices: the kernel for a cache, which XLA
cannot partition, runs on each device for its lanes and heads. In Pallas' own interpreter: that of
TPU kernels waits for all devices at once, for which there are too few threads here."""

import functools

import jax
import numpy as np
import pytest
import test_attention

from spark_jax.kernels import prefix_decode_attention as kernels
from spark_jax.kernels import prefix_decode_attention_gpu, prefix_decode_attention_tpu
from spark_jax.models import attention
from spark_jax.parallel import mesh as meshes


@pytest.mark.parametrize(
    ("sizes", "calls"),
    [({"data": 2, "fsdp": 2, "tensor": 2}, 1), ({"fsdp": 2, "tensor": 4}, 0)],
)
@pytest.mark.parametrize(
    ("before", "asked", "kernel"),
    [
        (False, "splash", "pallas_tpu"),
        (True, "splash", "pallas_tpu"),
        (True, "triton", "pallas_gpu"),
    ],
)
def test_each_device_attends_for_its_lanes_and_heads(
    sizes, calls, before, asked, kernel, monkeypatch
):
    """And where four devices share two KV heads, XLA does."""
    module = {"splash": prefix_decode_attention_tpu, "triton": prefix_decode_attention_gpu}[asked]
    interpreted = functools.partial(module.prefix_decode_attention, interpret=True)
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, kernel, interpreted)
    calls *= 1 if asked == "splash" else 2  # prompts, own columns
    q, alone, stacked, *masks = test_attention.cache_of_two_layers(4, 3, 2, before)
    expected = test_attention.cached(q, alone, *masks)
    run = jax.jit(attention.cached, static_argnums=4)
    with jax.set_mesh(meshes.make_mesh(sizes)):
        np.testing.assert_allclose(run(q, stacked, *masks, asked), expected, atol=1e-5)
        traced = str(run.trace(q, stacked, *masks, asked).jaxpr)
    assert traced.count("pallas_call") == calls
