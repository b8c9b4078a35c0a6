"""What is written is read back bit for bit, and what does not fit is refused by name."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

from spark_jax.models import checkpoints, transformer
from spark_jax.models.config import ModelConfig, from_hf

PLAIN = ModelConfig(
    vocab_size=20, width=8, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=12
)
VARIANTS = [
    PLAIN,
    dataclasses.replace(PLAIN, qkv_bias=True),
    dataclasses.replace(PLAIN, qk_norm=True, tied_embeddings=False, rope_theta=1e6),
]


def random_params(config, dtype=jnp.float32):
    shapes = jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), shapes)


@pytest.mark.parametrize("config", VARIANTS, ids=["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_exact(tmp_path, config, dtype):
    config = dataclasses.replace(config, dtype=dtype)
    params = random_params(config, jnp.dtype(dtype))
    checkpoints.save_hf(tmp_path, params, config)
    loaded, loaded_config = checkpoints.load(tmp_path, dtype=dtype)
    assert loaded_config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_tensors_have_hugging_face_names_and_layout(tmp_path):
    params = random_params(PLAIN)
    tensors = checkpoints.to_hf_tensors(params, PLAIN)
    assert tensors["model.layers.2.self_attn.k_proj.weight"].shape == (2 * 4, 8)
    # Row h·K + k of the query matrix is what head h computes in component k.
    query = tensors["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(query[3 * 4 + 1], params.layers.query[1, :, 3, 1])
    output = tensors["model.layers.0.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(output[:, 3 * 4 + 1], params.layers.output[0, 3, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "'model.norm.weight' is missing"),
        (lambda t: t.update(stray=jnp.zeros(2)), r"does not have: \['stray'\]"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": jnp.zeros((8, 12))}),
            r"'model.layers.1.mlp.up_proj.weight' has shape \(8, 12\), needs \(12, 8\)",
        ),
    ],
    ids=["missing", "extra", "misshaped"],
)
def test_wrong_tensors_are_refused_by_name(tmp_path, change, message):
    checkpoints.save_hf(tmp_path, random_params(PLAIN), PLAIN)
    tensors = load_file(tmp_path / checkpoints.WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / checkpoints.WEIGHTS)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(tmp_path)


def test_unsupported_configs_are_refused(tmp_path):
    checkpoints.save_hf(tmp_path, random_params(PLAIN), PLAIN)
    hf = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "gpt2"}, "gpt2.*llama.*qwen2.*qwen3"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"use_sliding_window": True}, "use_sliding_window"),
    ):
        with pytest.raises(ValueError, match=message):
            from_hf({**hf, **change})


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        checkpoints.load(tmp_path)
