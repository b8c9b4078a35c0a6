"""Run by test_sharding.py in a process with eight CPU devices."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_model import params as tiny_params

from spark_jax.models import checkpoints, placement, transformer
from spark_jax.models.config import ModelConfig
from spark_jax.parallel import sharding

CONFIG = ModelConfig(
    vocab_size=24,
    width=16,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    mlp_width=32,
    tied_embeddings=False,
)
FAMILIES = {
    "llama": dataclasses.replace(CONFIG, qkv_bias=True, output_bias=True),
    "qwen2": dataclasses.replace(CONFIG, qkv_bias=True),
    "qwen3": dataclasses.replace(CONFIG, qk_norm=True, tied_embeddings=True),
}
MESHES = {
    "llama": {"tensor": 8},
    "qwen2": {"fsdp": 2, "tensor": 4},
    "qwen3": {"data": 2, "fsdp": 2, "tensor": 2},
}


def make_mesh(sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes))


def shardings(config, mesh):
    return sharding.named_shardings(
        transformer.logical_axes(config), transformer.shapes(config), mesh
    )


def specs(config, mesh):
    return jax.tree.map(lambda x: x.spec, shardings(config, mesh))


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_every_parameter_has_a_name_for_each_axis(config):
    def check(shape, names):
        assert isinstance(names, tuple)
        assert len(names) == len(shape.shape)
        assert set(names) <= set(sharding.RULES)

    # Fails where the trees differ.
    jax.tree.map(check, transformer.shapes(config), transformer.logical_axes(config))


def test_where_parameters_lie():
    got = specs(FAMILIES["qwen2"], make_mesh({"fsdp": 2, "tensor": 4}))
    assert got.embedding == P("tensor", "fsdp")
    assert got.head == P("fsdp", "tensor")
    assert got.layers.query == P(None, "fsdp", "tensor", None)
    assert got.layers.key == P(None, "fsdp", "tensor", None)
    assert got.layers.output == P(None, "tensor", None, "fsdp")
    assert got.layers.gate == got.layers.up == P(None, "fsdp", "tensor")
    assert got.layers.down == P(None, "tensor", "fsdp")
    assert got.layers.query_bias == P(None, "tensor", None)
    assert got.layers.mlp_norm == P(None, None)


def test_axes_that_a_mesh_lacks_and_scarce_kv_heads_are_replicated():
    assert specs(CONFIG, make_mesh({"data": 8})).layers.query == P(None, None, None, None)
    got = specs(CONFIG, make_mesh({"tensor": 8})).layers
    assert got.query == P(None, None, "tensor", None)
    assert got.key == P(None, None, None, None)


def test_what_does_not_divide_is_refused_with_the_numbers():
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    for change, message in (
        ({"mlp_width": 30}, r"layers\.gate: axis 2 \(mlp\).*30\).*'tensor'=4; choose.*\[1, 2, 3\]"),
        ({"num_kv_heads": 6, "num_heads": 12}, r"key: axis 2 \(kv_heads\).*6, 4\).*'tensor'=4"),
        ({"vocab_size": 23}, r"embedding: axis 0 \(vocab\) of shape \(23, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            shardings(dataclasses.replace(CONFIG, **change), mesh)
    with pytest.raises(ValueError, match=r"\['model'\] are unknown.*'data', 'fsdp', 'tensor'"):
        shardings(CONFIG, make_mesh({"model": 8}))


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_onto_a_mesh_and_saved_from_it(tmp_path, monkeypatch, family):
    monkeypatch.setattr(placement, "BLOCK_SIZE", 1000)  # several blocks to a tensor
    config, mesh = FAMILIES[family], make_mesh(MESHES[family])
    params = tiny_params(config)
    checkpoints.save_hf(tmp_path / "one", params, config, max_shard_bytes=4000)
    loaded, _ = checkpoints.load(tmp_path / "one", mesh=mesh)

    def check(array, original, expected):
        assert array.sharding == expected
        assert array.committed
        np.testing.assert_array_equal(array, original)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, original[shard.index])

    jax.tree.map(check, loaded, params, shardings(config, mesh))
    checkpoints.save_hf(tmp_path / "two", loaded, config, max_shard_bytes=4000)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_mesh_that_does_not_divide_is_refused_before_reading(tmp_path):
    config = dataclasses.replace(CONFIG, mlp_width=30)
    checkpoints.save_hf(tmp_path, tiny_params(config), config)
    with pytest.raises(ValueError, match=r"layers\.gate.*'tensor'=8"):
        checkpoints.load(tmp_path, mesh=make_mesh({"tensor": 8}))
