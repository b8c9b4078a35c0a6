import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jax.prm.examples import tokenize_examples
from spark_jax.verification.targets import TrainingPair


def test_tokens_and_mask_are_exactly_these(tokenizer):
    a, b, c, yes = (tokenizer.convert_tokens_to_ids(word) for word in ("a", "b", "c", "Yes"))
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    pairs = [("a b", "Yes"), ("c c c", "a b Yes"), TrainingPair("a", "b c", "orm", "p", 0)]
    batch = tokenize_examples(tokenizer, pairs, max_length=7)
    assert batch["tokens"].tolist() == [
        [a, b, yes, end, pad, pad, pad],
        [c, c, c, a, b, yes, end],
        [a, b, c, end, pad, pad, pad],
    ]
    assert batch["loss_mask"].astype(int).tolist() == [
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1],
        [0, 1, 1, 1, 0, 0, 0],
    ]
    assert (batch["tokens"].dtype, batch["loss_mask"].dtype) == (np.int32, np.bool_)
    assert (batch["num_dropped"], batch["kept"].tolist()) == (0, [0, 1, 2])


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "Yes", "No"]), min_size=1, max_size=6).map(
    " ".join
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6), st.integers(3, 13))
def test_examples_are_whole_or_dropped_and_the_loss_is_on_the_target(tokenizer, pairs, limit):
    fits = [i for i, (p, t) in enumerate(pairs) if len((p + " " + t).split()) + 1 <= limit]
    if not fits:
        with pytest.raises(ValueError, match=f"none of {len(pairs)} examples fits.*{limit}"):
            tokenize_examples(tokenizer, pairs, max_length=limit)
        return
    batch = tokenize_examples(tokenizer, pairs, max_length=limit)
    assert batch["kept"].tolist() == fits
    assert batch["num_dropped"] == len(pairs) - len(fits)
    assert batch["tokens"].shape[1] == max(len(" ".join(pairs[i]).split()) + 1 for i in fits)
    for i, tokens, mask in zip(fits, batch["tokens"], batch["loss_mask"]):
        assert tokenizer.decode(tokens[mask]) == pairs[i][1] + " <eos>"
        rest = tokenizer.decode(tokens[~mask]).replace("<pad>", "").split()
        assert rest == pairs[i][0].split()


def test_dropping_is_logged(tokenizer, caplog):
    tokenize_examples(tokenizer, [("a", "b"), ("a b c", "d")], max_length=3)
    assert "1 of 2 examples are longer than 3 tokens and were dropped" in caplog.text


def test_bad_input_is_refused(tokenizer):
    with pytest.raises(ValueError, match="example 1: prompt 'a' or target '' is empty"):
        tokenize_examples(tokenizer, [("a", "b"), ("a", "")], max_length=9)
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    with pytest.raises(ValueError, match="no pad_token_id"):
        tokenize_examples(bare, [("a", "b")], max_length=9)
