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

DEFAULT_CHUNK = 512  # tokens whose scores are held at once; 512 · 152k vocabulary · 4 B = 0.3 GB


def token_logprobs(
    params: transformer.Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk: int = DEFAULT_CHUNK,
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
    chunk: int = DEFAULT_CHUNK,
) -> tuple[Float[Array, "B T-1"], Float[Array, "B T-1"]]:
    """Log-prob of each next token and entropy of its distribution, temperature 1.

    Values are finite everywhere but mean something only where a token and its successor lie in the
    same segment; mask them before use.
    """
    hidden = transformer.forward(params, config, tokens, positions, segment_ids)
    return _next_token(params, config, hidden[:, :-1], tokens[:, 1:], chunk)


def response_logprobs_and_entropy(
    params: transformer.Params,
    config: ModelConfig,
    prompt_tokens: Int[Array, "B L"],
    prompt_mask: Bool[Array, "B L"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    chunk: int = DEFAULT_CHUNK,
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


def _next_token(
    params: transformer.Params,
    config: ModelConfig,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    chunk: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    logprobs, _, entropy = linear_logprob_and_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        transformer.vocab_matrix(params, config),
        targets.reshape(-1),
        block=chunk,
    )
    return logprobs.reshape(targets.shape), entropy.reshape(targets.shape)
