"""A soft score from a generative reward model: P(Yes) / (P(Yes) + P(No)) (method page, section 2).

The judgement is written twice, once with each verdict word, and scored in one forward pass. Up to
the first token in which the two differ they are the same, so the two log-probs there are taken from
one and the same next-token distribution, whatever the tokenizer makes of the words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from spark_jax.data.formats import TextFormat


def soft_verdict(
    yes_logprob: Float[np.ndarray, "B"], no_logprob: Float[np.ndarray, "B"]
) -> Float[np.ndarray, "B"]:
    """P(Yes) / (P(Yes) + P(No)) from log-probs in nats, without under- or overflow.

    1/2 where both are -inf, for then the model says nothing about the two words.
    """
    with np.errstate(invalid="ignore"):  # of two -inf, which is not taken
        difference = np.where(yes_logprob == no_logprob, 0.0, yes_logprob - no_logprob)
    return np.exp(-np.logaddexp(0.0, -difference))


def verdict_texts(text_format: TextFormat, judgement: str) -> tuple[str, str]:
    """A judgement up to its verdict word, ended by each of the two words: (yes text, no text).

    The judgement must end with its verdict, markup and case aside; for an ORM that is all there is.
    Raises ValueError if it does not.
    """
    yes, no = text_format.verdict_words
    words = "|".join(re.escape(word) for word in (yes, no))
    verdict = re.search(rf"(?<![^\W_])(?:{words})[\W_]*$", judgement, re.IGNORECASE)
    if verdict is None:
        raise ValueError(f"the judgement does not end with {yes!r} or {no!r}: {judgement!r}")
    before = judgement[: verdict.start()]
    return before + yes, before + no


def soft_scores(
    text_format: TextFormat,
    tokenizer: Any,
    token_logprobs: Callable[[np.ndarray], Any],
    prompts: Sequence[str],
    judgements: Sequence[str],
) -> Float[np.ndarray, "B"]:
    """Soft scores of B judgements, from one call of the scoring function on 2B sequences.

    Args:
        text_format: names the verdict words.
        tokenizer: a Hugging Face tokenizer with a padding token.
        token_logprobs: tokens int32 [2B, T] -> log-probs [2B, T-1] of tokens 1..T-1, such as
            `scoring.token_logprobs` with parameters and config filled in.
        prompts: what the reward model was shown, B texts.
        judgements: what it said, B valid judgements; "Yes" (or any verdict word) for an ORM.

    Returns:
        P(Yes) / (P(Yes) + P(No)) per judgement, float.
    """
    pairs = [
        tuple(
            tokenizer.encode(prompt, add_special_tokens=False)
            + tokenizer.encode(text, add_special_tokens=False)
            for text in verdict_texts(text_format, judgement)
        )
        for prompt, judgement in zip(prompts, judgements, strict=True)
    ]
    positions = np.array([_first_difference(*pair) for pair in pairs])
    sequences = [yes for yes, _ in pairs] + [no for _, no in pairs]
    width = max(len(sequence) for sequence in sequences)
    tokens = np.full((len(sequences), width), tokenizer.pad_token_id, dtype=np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    # In float32 the share of Yes would be 1 for all that are surer than 1 - 6e-8.
    logprobs = np.asarray(token_logprobs(tokens), np.float64)
    at_verdict = logprobs[np.arange(len(sequences)), np.tile(positions, 2) - 1]
    yes_logprob, no_logprob = np.split(at_verdict, 2)
    return soft_verdict(yes_logprob, no_logprob)


def _first_difference(yes: Sequence[int], no: Sequence[int]) -> int:
    for position, (left, right) in enumerate(zip(yes, no)):
        if left != right:
            if position == 0:
                raise ValueError("the prompt is empty: nothing comes before the verdict")
            return position
    raise ValueError(f"the tokenizer does not tell the verdict words apart: {yes} and {no}")
