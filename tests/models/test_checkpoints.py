"""What is written is read back bit for bit, and what does not fit is refused by name."""

import dataclasses
import fnmatch
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_model import params as tiny_params

from spark_jax.models import checkpoints, gguf, placement, transformer
from spark_jax.models.config import ModelConfig, from_hf, to_hf
from spark_jax.models.rotary import RopeScaling

PLAIN = ModelConfig(
    vocab_size=20, width=8, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=12
)
VARIANTS = {
    "llama": PLAIN,
    "llama_biases": dataclasses.replace(PLAIN, qkv_bias=True, output_bias=True),
    "qwen2": dataclasses.replace(PLAIN, qkv_bias=True, rope_scaling=RopeScaling("linear", 2.0)),
    "qwen3": dataclasses.replace(PLAIN, qk_norm=True, tied_embeddings=False, rope_theta=1e6),
}
UP = "model.layers.1.mlp.up_proj.weight"


def random_params(config, dtype="float32"):
    return jax.tree.map(lambda x: x.astype(dtype), tiny_params(config))


def assert_same(loaded, params):
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.fixture
def saved(tmp_path):
    """The plain model in one file."""
    checkpoints.save_hf(tmp_path, random_params(PLAIN), PLAIN)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    """The plain model in several files."""
    checkpoints.save_hf(tmp_path, random_params(PLAIN), PLAIN, max_shard_bytes=1500)
    return tmp_path


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("limit", [10**9, 1000])
def test_round_trip_is_exact(tmp_path, config, dtype, limit):
    config = dataclasses.replace(config, dtype=dtype)
    params = random_params(config, dtype)
    checkpoints.save_hf(tmp_path, params, config, max_shard_bytes=limit)
    loaded, loaded_config = checkpoints.load(tmp_path, dtype=dtype)
    assert loaded_config == config
    assert_same(loaded, params)


def test_shards_are_no_larger_than_asked_and_listed_in_the_index(sharded):
    index = json.loads((sharded / checkpoints.INDEX).read_text())
    files = {file.name: load_file(file) for file in sharded.glob("*.safetensors")}
    assert len(files) > 3
    assert set(files) == {
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    }
    held = index["weight_map"]
    assert held == {name: file for file, tensors in files.items() for name in tensors}
    sizes = [sum(x.nbytes for x in tensors.values()) for tensors in files.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert max(sizes) <= 1500
    # Filled greedily, in the model's order: what opens a shard did not fit in the one before.
    filled = dict.fromkeys(files, 0)
    for (previous, before), (name, file) in itertools.pairwise(held.items()):
        filled[before] += files[before][previous].nbytes
        assert file == before or filled[before] + files[file][name].nbytes > 1500


def test_a_tensor_larger_than_a_shard_is_alone_in_one(tmp_path):
    checkpoints.save_hf(tmp_path, random_params(PLAIN), PLAIN, max_shard_bytes=1)
    assert {len(load_file(file)) for file in tmp_path.glob("*.safetensors")} == {1}
    assert_same(checkpoints.load(tmp_path)[0], random_params(PLAIN))


def test_tensors_have_hugging_face_names_and_layout(saved):
    params, tensors = random_params(PLAIN), load_file(saved / checkpoints.WEIGHTS)
    assert tensors["model.layers.2.self_attn.k_proj.weight"].shape == (2 * 4, 8)
    # Row h·K + k of the query matrix is what head h computes in component k.
    query = tensors["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(query[3 * 4 + 1], params.layers.query[1, :, 3, 1])
    output = tensors["model.layers.0.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(output[:, 3 * 4 + 1], params.layers.output[0, 3, 1])


@pytest.mark.parametrize("size", [1, 7, 30])
def test_blocks_of_any_size_give_the_same(sharded, monkeypatch, size):
    monkeypatch.setattr(placement, "BLOCK_SIZE", size)
    monkeypatch.setattr(checkpoints, "BLOCK_SIZE", size)
    assert_same(checkpoints.load(sharded)[0], random_params(PLAIN))


@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_numbers_are_rounded_once_to_the_dtype_asked_for(saved, stored, dtype):
    def narrow(tensors):
        tensors.update({name: x.astype(stored) for name, x in tensors.items()})

    rewrite(saved / checkpoints.WEIGHTS, narrow)
    params, config = checkpoints.load(saved, dtype=dtype)
    assert config.dtype == dtype
    expected = jax.tree.map(
        lambda x: np.asarray(x).astype(stored).astype(jnp.dtype(dtype)), random_params(PLAIN)
    )
    assert_same(params, expected)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {dtype}


def test_an_older_export_leaves_nothing_behind(sharded):
    checkpoints.save_hf(sharded, random_params(PLAIN), PLAIN)
    assert {file.name for file in sharded.iterdir()} == {
        "config.json",
        "generation_config.json",
        checkpoints.WEIGHTS,
    }
    checkpoints.save_hf(sharded, random_params(PLAIN), PLAIN, max_shard_bytes=4000)
    assert not (sharded / checkpoints.WEIGHTS).exists()
    assert_same(checkpoints.load(sharded)[0], random_params(PLAIN))


def test_an_export_cut_short_is_no_checkpoint(saved, monkeypatch):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    monkeypatch.setattr(checkpoints, "_shard_file", stop)
    with pytest.raises(Stop):
        checkpoints.save_hf(saved, random_params(PLAIN), PLAIN, max_shard_bytes=1000)
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist.*no complete"):
        checkpoints.load(saved)


def test_weights_may_be_read_by_whom_the_config_may(saved):
    modes = {(saved / name).stat().st_mode for name in (checkpoints.WEIGHTS, "config.json")}
    assert len(modes) == 1


def test_tokenizer_and_generation_config_come_along(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    words = {"<s>": 0, "</s>": 1, "<end>": 2, "a": 3}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")),
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{{ messages[0]['content'] }}!",
    )
    checkpoints.save_hf(tmp_path, random_params(PLAIN), PLAIN, tokenizer)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    checkpoints.save_hf(tmp_path, random_params(PLAIN), PLAIN, tokenizer, stop_ids=(2, 1))
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (generation.bos_token_id, generation.eos_token_id) == (0, [2, 1])
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [2, 1]
    back = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert back.get_vocab() == words
    message = [{"role": "user", "content": "a"}]
    assert back.apply_chat_template(message, tokenize=False) == "a!"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.norm.weight"),
            r"model\.safetensors: .*'model\.norm\.weight' is miss",
        ),
        (
            lambda t: t.update(stray=np.zeros(2)),
            r"model\.safetensors: 'stray' is no tensor of this",
        ),
        (
            lambda t: t.update({UP: np.zeros((8, 12))}),
            rf"model\.safetensors: '{UP}' has shape \(8, 12\), needs \(12, 8\)",
        ),
        (
            lambda t: t.update({UP: np.zeros((12, 8), np.int8)}),
            rf"model\.safetensors: '{UP}' is I8; can read \('F64', 'F32', 'BF16', 'F16'\)",
        ),
        (
            lambda t: t.update({"lm_head.weight": np.zeros((20, 8))}),
            r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'.*tie_word_embeddings",
        ),
    ],
    ids=["missing", "extra", "misshaped", "integer", "untied_head"],
)
def test_wrong_tensors_are_refused_by_name(saved, change, message):
    rewrite(saved / checkpoints.WEIGHTS, change)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(saved)


def test_what_older_exports_also_hold_is_accepted(saved):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    rewrite(saved / checkpoints.WEIGHTS, add)
    assert_same(checkpoints.load(saved)[0], random_params(PLAIN))


def test_wrong_shards_are_refused_by_name(sharded):
    files = sorted(sharded.glob("*.safetensors"))
    name = next(iter(load_file(files[2])))
    rewrite(files[0], lambda t: t.update({name: load_file(files[2])[name]}))
    with pytest.raises(ValueError, match=f"{files[2].name}: '{name}' is in .*{files[0].name} too"):
        checkpoints.load(sharded)
    rewrite(files[2], lambda t: t.pop(name))
    assert_same(checkpoints.load(sharded)[0], random_params(PLAIN))  # only moved
    rewrite(files[0], lambda t: t.pop(name))
    with pytest.raises(ValueError, match=f"'{name}' is missing"):
        checkpoints.load(sharded)
    files[1].write_bytes(files[1].read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{files[1].name}: no safetensors file, or a torn one"):
        checkpoints.load(sharded)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{files[1].name} is missing; .*index"):
        checkpoints.load(sharded)


def test_an_index_may_name_no_file_outside(sharded):
    index = sharded / checkpoints.INDEX
    content = json.loads(index.read_text())
    content["weight_map"][UP] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"index\.json: '\.\./elsewhere\.safetensors' is not"):
        checkpoints.load(sharded)


def test_folders_without_a_checkpoint_are_refused(saved):
    (saved / checkpoints.WEIGHTS).rename(saved / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"neither.*pytorch_model\.bin\) are not read"):
        checkpoints.load(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        checkpoints.load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        checkpoints.load(saved)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist, and is no hub id"):
        checkpoints.load(saved / "nowhere")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is no checkpoint"):
        checkpoints.load(saved / "pytorch_model.bin")


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; have .*llama.*qwen2.*qwen3"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            r"Classif.*LlamaForCausalLM.*Qwen2",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "2 layers with.*sliding_attention"),
        ({"layer_types": ["full_attention", "chunked"]}, "1 layers with.*chunked"),
        ({"vocab_size": None}, "'vocab_size' is missing"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2}},
            "'longrope'.*have.*llama3.*yarn",
        ),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs the field 'factor'"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "'llama3' needs the field 'low_freq"),
        ({"rope_scaling": {"type": "linear", "factor": -1.0}}, r"factor=-1\.0"),
        ({"rope_parameters": {"full_attention": YARN}}, "differ by layer type.*full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_unsupported_configs_are_refused_with_their_file(saved, change, message):
    file = saved / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        checkpoints.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1},
        {"use_sliding_window": True, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1},
        {"layer_types": ["full_attention"] * 3},
        {"architectures": None},
        {"pad_token_id": 3, "eos_token_id": [1, 2]},
    ],
)
def test_what_changes_no_number_changes_no_config(change):
    assert from_hf({**to_hf(PLAIN), **change}) == PLAIN


def test_unknown_fields_of_a_scaling_are_named_in_the_log(caplog):
    hf = to_hf(PLAIN) | {"rope_scaling": {**YARN, "finetuned": True, "attn_factor": None}}
    assert from_hf(hf).rope_scaling == RopeScaling(
        "yarn", 4.0, original_max_position_embeddings=PLAIN.max_positions
    )
    assert "'yarn' not known, so ignored: ['attn_factor', 'finetuned']" in caplog.text


@pytest.mark.parametrize(
    ("config", "params", "message"),
    [
        (PLAIN, lambda p: transformer.unstack(p, PLAIN), "decoding layout"),
        (VARIANTS["qwen2"], lambda p: p, r"disagree.*key_bias.*query_bias.*value_bias"),
        (dataclasses.replace(PLAIN, width=16), lambda p: p, r"embedding is.*\(20, 8\), needs.*16"),
        (
            PLAIN,
            lambda p: p.replace(final_norm=p.final_norm.astype("bfloat16")),
            "final_norm is bf",
        ),
        (PLAIN, lambda p: jax.tree.map(lambda x: x.astype("float16"), p), "are float16"),
    ],
    ids=["unstacked", "other_family", "other_shape", "mixed", "float16"],
)
def test_parameters_that_do_not_fit_are_not_saved(saved, config, params, message):
    before = (saved / checkpoints.WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match=message):
        checkpoints.save_hf(saved, params(random_params(PLAIN)), config)
    assert (saved / checkpoints.WEIGHTS).read_bytes() == before


def test_biases_that_no_architecture_has_are_not_saved():
    with pytest.raises(ValueError, match="qkv_bias=True, output_bias=False, qk_norm=True"):
        to_hf(dataclasses.replace(PLAIN, qkv_bias=True, qk_norm=True))


def test_a_gguf_file_goes_the_same_way(saved, tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.touch()
    tensors = load_file(saved / checkpoints.WEIGHTS)
    monkeypatch.setattr(gguf, "hf_config", lambda path: to_hf(PLAIN))
    monkeypatch.setattr(gguf, "tensors", lambda path: iter(tensors.items()))
    params, config = checkpoints.load(file)
    assert config == PLAIN
    assert_same(params, random_params(PLAIN))
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"model\.gguf: tensor 'model\.norm\.weight' is missing"):
        checkpoints.load(file)


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """A stand-in for the hub with one repository; its list says what was fetched."""
    remote, cache, fetched = tmp_path / "remote", tmp_path / "fetched", []
    (remote / "onnx").mkdir(parents=True)
    for file in [*saved.glob("*.json"), saved / checkpoints.WEIGHTS]:
        shutil.copy(file, remote)
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "merges.txt",
        "README.md",
        "pytorch_model.bin",
        "modeling_other.py",
        "onnx/model.safetensors",
        "onnx/config.json",
    ):
        (remote / name).touch()

    def download(repo, *, allow_patterns, ignore_patterns):
        assert repo == "owner/name"
        for file in sorted(x for x in remote.rglob("*") if x.is_file()):
            name = str(file.relative_to(remote))
            if any(fnmatch.fnmatch(name, x) for x in allow_patterns):
                if fnmatch.fnmatch(name, ignore_patterns):
                    continue
                cache.mkdir(exist_ok=True)
                shutil.copy(file, cache / name)
                fetched.append(name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return remote, fetched


def test_of_a_repository_only_safetensors_and_texts_are_fetched(hub):
    assert_same(checkpoints.load("owner/name")[0], random_params(PLAIN))
    assert set(hub[1]) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "merges.txt",
        "model.safetensors",
    }


def test_an_unsupported_repository_is_refused_before_its_weights_are_fetched(hub):
    remote, fetched = hub
    (remote / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="mamba"):
        checkpoints.resolve("owner/name")
    assert "model.safetensors" not in fetched


def test_a_repository_without_safetensors_is_refused(hub):
    (hub[0] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"owner/name on the hub has no safetensors.*pickled"):
        checkpoints.resolve("owner/name")


OFFLINE = """
import json, sys
from spark_jax.models import checkpoints
print(json.dumps(str(checkpoints.resolve("owner/name"))))
params, config = checkpoints.load("owner/name")
print(json.dumps([config.width, float(params.final_norm.sum())]))
try:
    checkpoints.load("owner/other")
except FileNotFoundError as error:
    print(json.dumps(str(error)))
"""


def test_offline_the_cache_of_the_hub_is_enough(saved, tmp_path):
    cached = tmp_path / "hub" / "models--owner--name"
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    for name in ("config.json", checkpoints.WEIGHTS):
        shutil.copy(saved / name, snapshot)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    path, (width, total), refused = map(json.loads, done.stdout.splitlines())
    assert path == str(snapshot)
    assert width == PLAIN.width
    np.testing.assert_allclose(total, random_params(PLAIN).final_norm.sum(), rtol=1e-5)
    assert refused.startswith(
        "'owner/other' is no folder here, and was not found in the hub's cache"
    )
