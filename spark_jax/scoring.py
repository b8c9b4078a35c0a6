"""Log-probabilities and entropies of given tokens, never holding [B, T, V].

The same transformer as the sampler's, so the two agree (to 1e-4 nat in float32). All results are
float32 nats; differentiable in the parameters.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spark_jax.kernels.linear_logprob import linear_logprob_and_entropy
from spark_jax.models import transformer
from spark_jax.models.config import ModelConfig
from spark_jax.parallel.sharding import batch_shards, vocab_shards

SCORES_BYTES = 64 * 2**20
"""Bytes of scores [tokens, V] held at once where the caller names no number of tokens."""

_FEWEST = 256  # tokens: fewer make a thin product, and the vocabulary is read more often


def token_logprobs(
    params: transformer.Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk: int | None = None,
) -> Float[Array, "B T-1"]:
    """log p(tokens[:, t+1] | tokens[:, :t+1]) at index t. See `token_logprobs_and_entropy`."""
    return token_logprobs_and_entropy(
        params, config, tokens, positions=positions, segment_ids=segment_ids, chunk=chunk
    )[0]


def token_logprobs_and_entropy(
    params: transformer.Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T-1"], Float[Array, "B T-1"]]:
    """Log-prob of each next token and entropy of its distribution, temperature 1.

    Values are finite everywhere but mean something only where a token and its successor lie in the
    same segment; mask them before use. As many scores as `chunk` tokens have over the vocabulary
    are held at once, by each device of a mesh; None: `tokens_at_once`.
    """
    hidden = transformer.forward(params, config, tokens, positions, segment_ids)
    return _next_token(params, config, hidden[:, :-1], tokens[:, 1:], chunk)


def logprobs_and_entropy_at(
    params: transformer.Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    index: Int[Array, "B S"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """The same for the tokens at `index` alone, each given what stands before it in its row; no
    other position meets the vocabulary.

    An index of 0, or one before which another segment ends, gives a value that is finite and means
    nothing: 0 is what short rows are filled up with.
    """
    hidden = transformer.forward(params, config, tokens, positions, segment_ids)
    before = jnp.take_along_axis(hidden, jnp.maximum(index - 1, 0)[..., None], axis=1)
    targets = jnp.take_along_axis(tokens, index, axis=1)
    return _next_token(params, config, before, targets, chunk)


def response_logprobs_and_entropy(
    params: transformer.Params,
    config: ModelConfig,
    prompt_tokens: Int[Array, "B L"],
    prompt_mask: Bool[Array, "B L"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probs and entropies of responses only; prompt positions never meet the vocabulary.

    Prompts are left-padded, responses right-padded. Exactly 0 where `mask` is 0.
    """
    together = jnp.concatenate([prompt_tokens, tokens], axis=1)
    valid = jnp.concatenate([prompt_mask, mask], axis=1).astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    hidden = transformer.forward(params, config, together, positions, valid)
    before = hidden[:, prompt_tokens.shape[1] - 1 : -1]
    logprobs, entropy = _next_token(params, config, before, tokens, chunk)
    return jnp.where(mask, logprobs, 0.0), jnp.where(mask, entropy, 0.0)


def tokens_at_once(vocab_size: int) -> int:
    """How many tokens' float32 scores fit `SCORES_BYTES`: a multiple of 64, and 256 at least."""
    return max(_FEWEST, SCORES_BYTES // (4 * vocab_size) // 64 * 64)


def _next_token(
    params: transformer.Params,
    config: ModelConfig,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    chunk: int | None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    tied = params.head is None
    own_tokens = -(-targets.size // batch_shards())
    own_vocab = config.vocab_size // vocab_shards()
    matrix = params.embedding if tied else params.head
    logprobs, _, entropy = linear_logprob_and_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        matrix,
        targets.reshape(-1),
        block=min(own_tokens, tokens_at_once(own_vocab)) if chunk is None else chunk,
        vocab_major=tied,  # as it lies in memory: turned, it would be copied
    )
    return logprobs.reshape(targets.shape), entropy.reshape(targets.shape)
