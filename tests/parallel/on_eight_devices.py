"""Run by test_sharding.py in a process with eight CPU devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_model import params as tiny_params

from spark_jax.models import checkpoints, placement, transformer
from spark_jax.models.config import ModelConfig
from spark_jax.models.mesh import check_fits
from spark_jax.parallel import mesh as meshes
from spark_jax.parallel import sharding
from spark_jax.training import optimizer, state

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


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        ({}, None),
        ({"data": 8}, (8, 1, 1)),
        ({"data": -1, "tensor": 4}, (2, 1, 4)),
        ({"tensor": -1, "fsdp": 2}, (1, 2, 4)),
        ({"data": 1, "fsdp": 8, "tensor": -1}, (1, 8, 1)),
    ],
)
def test_a_mesh_from_its_configuration(axes, sizes):
    if sizes is None:
        mesh = meshes.make_mesh(axes, jax.devices()[:1])
        sizes = (1, 1, 1)
    else:
        mesh = meshes.make_mesh(axes)
        assert set(mesh.devices.flat) == set(jax.devices())
    assert mesh.axis_names == sharding.MESH_AXES
    assert mesh.devices.shape == sizes


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3}, r"'data': 3} spans 3 devices, but there are 8"),
        ({"data": -1, "fsdp": 3}, r"a multiple of 3 devices, but there are 8"),
        ({"data": -1, "fsdp": 16}, r"a multiple of 16 devices, but there are 8"),
        ({"data": -1, "fsdp": -1}, r"only one of \['data', 'fsdp'\] may be -1"),
        ({"data": 0}, r"at least 1 device"),
        ({"model": 8}, r"\['model'\] are unknown.*'data', 'fsdp', 'tensor'"),
    ],
)
def test_sizes_that_make_no_mesh_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        meshes.make_mesh(axes)


class Chip:
    """As much of a TPU device as makes a mesh."""

    platform, device_kind, core_on_chip = "tpu", "TPU v4", 0

    def __init__(self, number, slice_index):
        self.id = self.process_index = number
        self.slice_index, self.coords = slice_index, (number % 2, number // 2 % 2, 0)


def test_several_slices_are_spanned_by_data():
    chips = [Chip(n, n // 4) for n in range(8)]
    mesh = meshes.make_mesh({"data": 2, "tensor": -1}, chips)
    assert [{chip.slice_index for chip in row.flat} for row in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match="data=1 is not a multiple of the 2 TPU slices"):
        meshes.make_mesh({"fsdp": 8}, chips)


def test_what_does_not_fit_a_mesh_is_named_with_its_numbers():
    mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 4})
    check_fits(mesh, batch=6, config=CONFIG)
    check_fits(mesh, batch=None, config=dataclasses.replace(CONFIG, num_kv_heads=2))
    for batch, change, message in (
        (7, {}, r"batch=7 over data\*fsdp=2 \(choose data\*fsdp in \[1\]\)"),
        (6, {"num_heads": 6, "num_kv_heads": 2}, r"num_heads=6 over tensor=4.*\[1, 2, 3\]"),
        (6, {"num_heads": 24, "num_kv_heads": 6}, r"num_kv_heads=6 over tensor=4"),
        (6, {"vocab_size": 23, "mlp_width": 30}, r"mlp_width=30.*vocab_size=23"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fits(mesh, batch=batch, config=dataclasses.replace(CONFIG, **change))
    wrong = jax.sharding.AbstractMesh((3,), ("fsdp",))
    with pytest.raises(ValueError, match=r"width=16 over fsdp=3"):
        check_fits(wrong, batch=None, config=CONFIG)


def test_constraints_bind_values_and_gradients_on_the_mesh_in_scope():
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})

    def double(x):
        return sharding.constrain(2 * x, ("batch", "length", "mlp"))

    x = jnp.ones((4, 3, 6))
    with jax.set_mesh(mesh):
        expected = P(("data", "fsdp"), None, "tensor")
        assert jax.jit(double)(x).sharding.spec == expected
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(double(x) ** 2)))(x)
        np.testing.assert_array_equal(gradient, 8 * np.ones(x.shape))
        assert sharding.batch_shards() == 4
        with pytest.raises(ValueError, match=r"\(batch\) of shape \(6, 3, 6\).*'data\*fsdp'=4"):
            jax.jit(double)(jnp.ones((6, 3, 6)))
        assert jax.jit(double)(x[:1]).sharding.spec == P(None, None, "tensor")
    assert sharding.batch_shards() == 1
    assert "sharding" not in jax.jit(double).lower(x).as_text()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_a_state_lies_where_its_parameters_do(name):
    mesh = meshes.make_mesh({"fsdp": 2, "tensor": 4})
    adam = optimizer.make(dict(name=name, learning_rate=1e-3, clip_norm=1.0))
    config = FAMILIES["qwen2"]
    shape = jax.eval_shape(
        lambda: state.create(transformer.init(config, jax.random.key(0)), adam, jax.random.key(1))
    )
    got = state.state_shardings(shape, config, mesh)
    assert jax.tree.structure(got) == jax.tree.structure(shape)
    assert got.params == shardings(config, mesh)
    assert got.step.spec == got.key.spec == P()

    def check(array, where):
        where.shard_shape(array.shape)  # fails where it does not divide
        if array.shape == shape.params.layers.gate.shape:
            assert where.spec == P(None, "fsdp", "tensor")

    jax.tree.map(check, shape.opt_state, got.opt_state)
    spread = [x for x in jax.tree.leaves(got.opt_state) if not x.is_fully_replicated]
    assert len(spread) >= (2 * len(jax.tree.leaves(got.params)) - 8 if name == "adamw" else 0)
