import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_jax.prm.soft_score import soft_scores, soft_verdict, verdict_texts
from spark_jax.verification.parse import format_verification
from spark_jax.verification.prompts import CANONICAL

LOGPROBS = st.floats(-800, 0)


@given(LOGPROBS, LOGPROBS)
def test_soft_verdict_is_the_share_of_yes_without_overflow(yes, no):
    score, reverse = soft_verdict(np.array([yes, no]), np.array([no, yes]))
    assert score + reverse == pytest.approx(1)
    # Scaling both by the larger one leaves the share as it is and keeps it in range.
    top = max(yes, no)
    p_yes, p_no = np.exp(yes - top), np.exp(no - top)
    assert score == pytest.approx(p_yes / (p_yes + p_no))


def test_soft_verdict_of_impossible_words():
    impossible = np.array([-np.inf, -np.inf, -1.0])
    scores = soft_verdict(impossible, np.array([-np.inf, -1.0, -np.inf]))
    assert scores.tolist() == [0.5, 0.0, 1.0]


def test_verdict_texts_differ_in_the_verdict_alone():
    text = format_verification([("Yes", "No"), ("b", "Yes No")], [True, False], False)
    stem = text.removesuffix("No**")
    assert verdict_texts(CANONICAL, text) == (stem + "Yes", stem + "No")
    assert verdict_texts(CANONICAL, "__Verdict: YES__.") == ("__Verdict: Yes", "__Verdict: No")
    assert verdict_texts(CANONICAL, "No") == verdict_texts(CANONICAL, "Yes") == ("Yes", "No")
    for text in ("", "Nothing", "Yes, because", "Noes"):
        with pytest.raises(ValueError, match="does not end with 'Yes' or 'No'"):
            verdict_texts(CANONICAL, text)


@pytest.mark.parametrize("seed", range(3))
def test_soft_scores_read_the_model_at_the_verdict(tokenizer, seed):
    """Against a bigram model, of which every probability is known."""
    rng = np.random.default_rng(seed)
    size = len(tokenizer)
    table = rng.normal(size=(size, size))
    table -= np.log(np.exp(table).sum(axis=1, keepdims=True))
    calls = []

    def token_logprobs(tokens):
        calls.append(tokens)
        return table[tokens[:, :-1], tokens[:, 1:]]

    prompts = ["a b", "a", "c d a b c", "d"]
    judgements = ["Yes", "Step 1 : Correct is it ? No", "a b : Yes *", "No a ! No !"]
    before = ["b", "?", ":", "!"]
    scores = soft_scores(CANONICAL, tokenizer, token_logprobs, prompts, judgements)
    yes, no = tokenizer.convert_tokens_to_ids(["Yes", "No"])
    last = tokenizer.convert_tokens_to_ids(before)
    p_yes, p_no = np.exp(table[last, yes]), np.exp(table[last, no])
    np.testing.assert_allclose(scores, p_yes / (p_yes + p_no), rtol=1e-12)
    assert len(calls) == 1
    assert calls[0].shape[0] == 8


def test_sure_scores_stay_apart(tokenizer):
    """A model's log-probs are float32, in which 1 - 1e-9 is 1."""
    [no] = tokenizer.convert_tokens_to_ids(["No"])

    def token_logprobs(tokens):
        surer = np.where(tokens[:, :1] == tokens[0, 0], -20.0, -25.0)
        return np.where(tokens[:, 1:] == no, surer, 0.0).astype(np.float32)

    sure, surer = soft_scores(CANONICAL, tokenizer, token_logprobs, ["a", "b"], ["Yes", "Yes"])
    assert sure < surer < 1


def test_words_that_the_tokenizer_cannot_tell_apart_are_refused(tokenizer):
    unknown = dataclasses.replace(CANONICAL, verdict_words=("Ja", "Nein"))
    with pytest.raises(ValueError, match="does not tell the verdict words apart"):
        soft_scores(unknown, tokenizer, lambda tokens: tokens, ["a"], ["Ja"])
    with pytest.raises(ValueError, match="the prompt is empty"):
        soft_scores(CANONICAL, tokenizer, lambda tokens: tokens, [""], ["Yes"])
