"""GGUF files, written here as llama.cpp lays them out, and the real one of SmolLM2."""

import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from spark_jax.models import gguf

writer_of = pytest.importorskip("gguf")

HEADS, KV_HEADS, HEAD_DIM, WIDTH, MLP, VOCAB = 4, 2, 6, 16, 20, 11


def as_llama_cpp_writes(rows, heads):
    """llama.cpp's converter, row by row: i and i + head_dim / 2 of a head lie side by side."""
    head_dim = len(rows) // heads
    order = []
    for head in range(heads):
        for i in range(head_dim // 2):
            order += [head * head_dim + i, head * head_dim + head_dim // 2 + i]
    return rows[order]


def hf_tensors(architecture, rng):
    shapes = {
        "input_layernorm.weight": (WIDTH,),
        "self_attn.q_proj.weight": (HEADS * HEAD_DIM, WIDTH),
        "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
        "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
        "self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_DIM),
        "post_attention_layernorm.weight": (WIDTH,),
        "mlp.gate_proj.weight": (MLP, WIDTH),
        "mlp.up_proj.weight": (MLP, WIDTH),
        "mlp.down_proj.weight": (WIDTH, MLP),
    }
    if architecture == "qwen2":
        shapes |= {
            f"self_attn.{x}_proj.bias": (n * HEAD_DIM,)
            for x, n in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        }
    if architecture == "qwen3":
        shapes |= {f"self_attn.{x}_norm.weight": (HEAD_DIM,) for x in "qk"}
    names = {f"model.layers.{i}.{name}": s for i in range(2) for name, s in shapes.items()}
    names |= {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    if name == "lm_head.weight":
        return "output.weight"
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[module]}.{kind}"


def write(path, tensors, architecture="llama", extra=(), metadata=()):
    writer = writer_of.GGUFWriter(str(path), architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    for name, value in metadata:
        writer.add_float32(name, value) if isinstance(value, float) else writer.add_string(
            name, value
        )
    for name, array in tensors.items():
        if architecture == "llama" and "q_proj" in name:
            array = as_llama_cpp_writes(array, HEADS)
        if architecture == "llama" and "k_proj" in name:
            array = as_llama_cpp_writes(array, KV_HEADS)
        writer.add_tensor(gguf_name(name), array)
    for name, array in extra:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", gguf.ARCHITECTURES)
def test_a_file_gives_the_tensors_and_the_config_it_was_made_from(tmp_path, architecture):
    tensors = hf_tensors(architecture, np.random.default_rng(0))
    if architecture == "qwen3":
        tensors["lm_head.weight"] = np.ones((VOCAB, WIDTH), np.float32)
    path = write(tmp_path / "model.gguf", tensors, architecture)
    read = dict(gguf.tensors(path))
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(read[name], array, err_msg=name)
    config = gguf.hf_config(path)
    assert config["model_type"] == architecture
    assert config["tie_word_embeddings"] == (architecture != "qwen3")
    assert (config["head_dim"], config["rope_theta"], config["vocab_size"]) == (6, 500.0, VOCAB)
    assert "rope_scaling" not in config


def test_llama_3_scaling_is_read_back_from_its_divisors(tmp_path):
    tensors = hf_tensors("llama", np.random.default_rng(0))
    wavelengths = 2 * np.pi * 500.0 ** (np.arange(3) / 3)
    assert (wavelengths < 8192 / 4).all()  # so short that this scaling divides by nothing
    none = write(tmp_path / "none.gguf", tensors, extra=[("rope_freqs.weight", np.ones(3, "f4"))])
    assert gguf.hf_config(none)["rope_scaling"]["factor"] == 1.0
    odd = np.array([1, 3, 8], np.float32)
    path = write(tmp_path / "odd.gguf", tensors, extra=[("rope_freqs.weight", odd)])
    with pytest.raises(
        ValueError, match=r"rope_freqs.weight is not the rotary scaling of a Llama 3"
    ):
        gguf.hf_config(path)


def test_llama_3_divisors_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 32.0} | gguf._LLAMA3_SCALING
    config = transformers.LlamaConfig(
        hidden_size=2048, num_attention_heads=32, head_dim=64,
        rope_parameters=scaling | {"rope_theta": 500_000.0},
    )  # fmt: skip
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500_000.0 ** (-np.arange(32) / 32)
    ours = gguf._llama3_divisors({"head_dim": 64, "rope_theta": 500_000.0}, scaling)
    np.testing.assert_allclose(plain / frequencies.numpy(), ours, rtol=1e-4)
    assert ours.min() == 1
    assert ours.max() == 32


def test_what_is_not_a_dense_decoder_is_refused_by_name(tmp_path):
    tensors = hf_tensors("llama", np.random.default_rng(0))
    path = write(
        tmp_path / "a.gguf", tensors, extra=[("blk.0.ffn_gate_exps.weight", np.ones(3, "f4"))]
    )
    with pytest.raises(ValueError, match=r"'blk.0.ffn_gate_exps.weight' is not one of a dense"):
        dict(gguf.tensors(path))
    path = write(tmp_path / "b.gguf", tensors, "mamba")
    with pytest.raises(ValueError, match=r"'mamba' is not supported; have \('llama', 'qwen2'"):
        gguf.hf_config(path)
    path = write(tmp_path / "c.gguf", tensors, metadata=[("llama.rope.scaling.type", "longrope")])
    with pytest.raises(ValueError, match=r"rope.scaling.type='longrope' without what is needed"):
        gguf.hf_config(path)


def test_the_extra_that_a_missing_package_is_told_to_come_with_exists(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="needs the gguf package") as raised:
        gguf.hf_config(tmp_path / "a.gguf")
    (extra,) = re.findall(r"spark-jax\[(\w+)\]", str(raised.value))
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert any(need.startswith("gguf") for need in project["optional-dependencies"][extra])
