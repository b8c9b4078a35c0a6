"""The embedded world's tokenizer: one word, one token, and back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jax.steps import token_offsets
from spark_jax.tasks.arithmetic_chains import world
from spark_jax.tasks.arithmetic_chains.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_ids_are_the_order_of_the_vocabulary(tokenizer):
    text = " ".join(world.VOCABULARY)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == list(range(len(world.VOCABULARY)))
    assert len(tokenizer) == len(ids)
    assert len(set(world.VOCABULARY)) == len(ids)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert (tokenizer.eos_token, tokenizer.pad_token) == (world.EOS, world.PAD)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, len(world.VOCABULARY) - 1)))
def test_ids_and_text_are_each_others_image(ids):
    tokenizer = load_tokenizer()
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == " ".join(world.VOCABULARY[i] for i in ids)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    _, offsets = token_offsets(tokenizer, ids)
    assert [text[a:b] for a, b in offsets] == [world.VOCABULARY[i] for i in ids]


def test_a_word_of_another_world_is_refused(tokenizer):
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("seven", add_special_tokens=False)


def test_a_saved_tokenizer_is_loaded_by_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<q> 7 1: +5 <a> <think> </think> <answer> \\boxed{ 2 } </answer> <eos> <verify>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert loaded.encode(text, add_special_tokens=False) == ids
    assert loaded.decode(ids, skip_special_tokens=False) == text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (1, 0)
