"""Prompt and target texts as token arrays for supervised fine-tuning (method page, section 2)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from spark_jax.verification.targets import TrainingPair

logger = logging.getLogger(__name__)


def tokenize_examples(
    tokenizer: Any, pairs: Sequence[TrainingPair | tuple[str, str]], *, max_length: int
) -> dict[str, Any]:
    """Tokens of prompt, target and the end token, right-padded; the loss on target and end alone.

    Prompt and target are encoded apart, as they are when the model is asked: the prompt is encoded,
    then the model continues. No special token is added but the end token.

    Args:
        tokenizer: a Hugging Face tokenizer with an end token and a padding token.
        pairs: the examples, or plain (prompt, target) tuples.
        max_length: in tokens. Longer examples are dropped, counted and logged, never cut.

    Returns:
        tokens: int32 [N, T], T the length of the longest example kept.
        loss_mask: bool [N, T], true on target tokens and the end token. A token's loss is on its
            own prediction, so next-token log-probs [N, T-1] pair with `loss_mask[:, 1:]`.
        num_dropped: how many were too long.
        kept: int64 [N], the positions in `pairs` of the examples kept.

    Raises:
        ValueError: no end or padding token; an empty prompt or target; nothing short enough.
    """
    end, pad = _token_id(tokenizer, "eos_token_id"), _token_id(tokenizer, "pad_token_id")
    kept, rows = [], []
    for position, pair in enumerate(pairs):
        prompt, target = pair if isinstance(pair, tuple) else (pair.prompt, pair.target)
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        target_ids = tokenizer.encode(target, add_special_tokens=False)
        if not prompt_ids or not target_ids:
            raise ValueError(f"example {position}: prompt {prompt!r} or target {target!r} is empty")
        if len(prompt_ids) + len(target_ids) + 1 <= max_length:
            kept.append(position)
            rows.append((prompt_ids, [*target_ids, end]))
    num_dropped = len(pairs) - len(rows)
    if not rows:
        raise ValueError(f"none of {len(pairs)} examples fits into max_length={max_length} tokens")
    if num_dropped:
        logger.warning(
            "%d of %d examples are longer than %d tokens and were dropped",
            num_dropped,
            len(pairs),
            max_length,
        )
    width = max(len(prompt_ids) + len(target_ids) for prompt_ids, target_ids in rows)
    tokens = np.full((len(rows), width), pad, dtype=np.int32)
    loss_mask = np.zeros((len(rows), width), dtype=bool)
    for row, (prompt_ids, target_ids) in enumerate(rows):
        length = len(prompt_ids) + len(target_ids)
        tokens[row, :length] = [*prompt_ids, *target_ids]
        loss_mask[row, len(prompt_ids) : length] = True
    return {
        "tokens": tokens,
        "loss_mask": loss_mask,
        "num_dropped": num_dropped,
        "kept": np.array(kept),
    }


def _token_id(tokenizer: Any, name: str) -> int:
    token_id = getattr(tokenizer, name)
    if token_id is None:
        raise ValueError(f"the tokenizer has no {name}: set it before making examples")
    return int(token_id)
