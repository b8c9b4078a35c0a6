"""The same numbers as transformers, for every family and variant, in both directions.

Weights are drawn wide, norms and biases included, so that nothing that is left out stays hidden.
"""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from spark_jax.models import checkpoints, transformer  # noqa: E402

VOCAB, LENGTH = 64, 48
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
VARIANTS = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "rope_theta": 100_000.0}),
    "llama_mha": ("llama", {"num_key_value_heads": 4, "head_dim": 8}),
    "llama_multi_query": ("llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
    "llama_biases": ("llama", {"attention_bias": True}),
    "llama_linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama_dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    "llama_llama3": ("llama", {"rope_scaling": LLAMA3}),
    "llama_yarn": ("llama", {"rope_scaling": YARN | {"beta_fast": 4, "beta_slow": 1.5}}),
    "llama_yarn_factor": ("llama", {"rope_scaling": YARN | {"attention_factor": 1.5}}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window_off": ("qwen2", {"use_sliding_window": False, "sliding_window": 4}),
    "qwen2_yarn": (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "qwen2_yarn_mscale": (
        "qwen2",
        {"rope_scaling": YARN | {"mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False}},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3_biases": ("qwen3", {"attention_bias": True}),
    "qwen3_yarn": ("qwen3", {"rope_parameters": YARN | {"rope_theta": 50_000.0}}),
}
SCALED = [
    name
    for name, (_, fields) in VARIANTS.items()
    if {"rope_scaling", "rope_parameters"} & fields.keys() and name != "llama_dynamic"
]


@pytest.fixture(scope="module", params=VARIANTS)
def exchange(request, tmp_path_factory):
    """A transformers model, the folder it was saved in, and what we load from there."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    family, fields = VARIANTS[request.param]
    config = transformers.AutoConfig.for_model(family, **SHAPE | fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return model, path, *checkpoints.load(path)


def torch_logits(model, *sequences, **inputs):
    with torch.no_grad():
        return [model(torch.tensor([row]), **inputs).logits[0].numpy() for row in sequences]


@partial(jax.jit, static_argnums=1)
def our_logits(params, config, tokens, segment_ids):
    hidden = transformer.forward(params, config, tokens, None, segment_ids)
    return transformer.logits(params, config, hidden)


def random_sequence(length, seed):
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def padded_and_packed():
    """Rows of `LENGTH` tokens: whole, padded left, padded right, two sequences packed; and where
    which sequence lies."""
    whole, short, packed = (random_sequence(n, n) for n in (LENGTH, LENGTH - 9, 20))
    other = random_sequence(LENGTH - 20, 7)
    tokens = [whole, [3] * 9 + short, short + [3] * 9, packed + other]
    segments = [[1] * LENGTH, [0] * 9 + [1] * len(short), [1] * len(short) + [0] * 9]
    segments.append([1] * 20 + [2] * len(other))
    where = [(0, 0, whole), (1, 9, short), (2, 0, short), (3, 0, packed), (3, 20, other)]
    return jnp.asarray(tokens), jnp.asarray(segments), where


def test_logits_of_whole_padded_and_packed_rows(exchange):
    model, _, params, config = exchange
    tokens, segments, where = padded_and_packed()
    got = np.asarray(our_logits(params, config, tokens, segments))
    for (row, start, sequence), expected in zip(
        where, torch_logits(model, *(sequence for _, _, sequence in where)), strict=True
    ):
        assert expected.std() > 0.5
        ours = got[row, start : start + len(sequence)]
        np.testing.assert_allclose(ours, expected, **CLOSE)


def test_transformers_loads_what_we_save(exchange, tmp_path):
    model, _, params, config = exchange
    checkpoints.save_hf(tmp_path, params, config, stop_ids=(5, 6))
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(back) is type(model)
    sequence = random_sequence(LENGTH, 0)
    np.testing.assert_array_equal(
        torch_logits(back.eval(), sequence)[0], torch_logits(model, sequence)[0]
    )
    ours, theirs = back.config.to_dict(), model.config.to_dict()
    for name in SHAPE.keys() | {"rms_norm_eps", "attention_bias", "dtype", "layer_types"}:
        assert ours.get(name) == theirs.get(name), name
    given = {k: v for k, v in theirs["rope_parameters"].items() if k != "type"}
    assert ours["rope_parameters"] == given
    assert back.generation_config.eos_token_id == [5, 6]


def test_our_config_survives_its_own_export(exchange, tmp_path):
    _, _, params, config = exchange
    checkpoints.save_hf(tmp_path, params, config)
    assert checkpoints.load(tmp_path)[1] == config


@pytest.mark.parametrize("exchange", ["llama", "qwen3"], indirect=True)
def test_a_left_padded_batch_as_transformers_takes_it(exchange):
    model, _, params, config = exchange
    tokens, segments, _ = padded_and_packed()
    mask = torch.tensor(np.asarray(segments)[1:2])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = torch_logits(
        model, np.asarray(tokens)[1].tolist(), attention_mask=mask, position_ids=positions
    )[0]
    got = our_logits(params, config, tokens, segments)[1]
    np.testing.assert_allclose(got[9:], expected[9:], **CLOSE)


@pytest.mark.parametrize("exchange", SCALED, indirect=True)
def test_the_scaling_shows_in_these_logits(exchange):
    """Else the tests above would say nothing about it."""
    _, _, params, config = exchange
    assert config.rope_scaling is not None
    tokens, segments, _ = padded_and_packed()
    plain = our_logits(params, dataclasses.replace(config, rope_scaling=None), tokens, segments)
    difference = plain - our_logits(params, config, tokens, segments)
    assert np.abs(difference)[0].max() > 0.05


@pytest.mark.parametrize("exchange", ["llama_dynamic"], indirect=True)
def test_dynamic_scaling_is_refused_beyond_the_positions_it_is_known_for(exchange):
    _, _, params, config = exchange
    with pytest.raises(ValueError, match=r"65 tokens.*max_positions=64.*'dynamic'"):
        transformer.forward(params, config, jnp.zeros((1, 65), jnp.int32))


@pytest.mark.parametrize("exchange", ["llama_yarn"], indirect=True)
def test_a_bfloat16_checkpoint_is_its_rounded_weights(exchange, tmp_path):
    model = exchange[0]
    narrow = transformers.AutoModelForCausalLM.from_config(model.config)
    narrow.load_state_dict(model.state_dict())
    narrow.to(torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    params, config = checkpoints.load(tmp_path)
    tokens, segments, where = padded_and_packed()
    got = our_logits(params, config, tokens, segments)[0]
    expected = torch_logits(rounded.eval(), where[0][2])[0]
    np.testing.assert_allclose(got, expected, **CLOSE)
