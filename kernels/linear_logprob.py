"""Hidden states × vocabulary matrix → log-probabilities, without ever holding [N, V].

The reference ("xla") walks the tokens in blocks: a block's [block, V] scores live only while its
log-sum-exp, entropy and target score are taken, and are computed again in the backward pass. Peak
temporaries are a few block · V floats instead of N · V.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LogProbs = tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]


def linear_logprob(
    hidden: Float[Array, "N D"],
    vocab_matrix: Float[Array, "D V"],
    targets: Int[Array, " N"],
    *,
    implementation: str | None = None,
    block: int = 256,
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """log softmax(hidden · vocab_matrix)[targets] and the log-sum-exp, in nats and float32.

    Differentiable in hidden and vocab_matrix. `block` is the number of tokens whose scores are held
    at once. `implementation` is a key of IMPLEMENTATIONS; None takes the best for the platform.
    """
    logprob, logsumexp, _ = linear_logprob_and_entropy(
        hidden, vocab_matrix, targets, implementation=implementation, block=block
    )
    return logprob, logsumexp


def linear_logprob_and_entropy(
    hidden: Float[Array, "N D"],
    vocab_matrix: Float[Array, "D V"],
    targets: Int[Array, " N"],
    *,
    implementation: str | None = None,
    block: int = 256,
) -> LogProbs:
    """As `linear_logprob`, with the entropy −Σ p log p of each row's distribution, in nats.

    Raises:
      ValueError: an unknown implementation.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}; choose from {list(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[implementation or "xla"](hidden, vocab_matrix, targets, block)


def _xla(hidden: Array, vocab_matrix: Array, targets: Array, block: int) -> LogProbs:
    n, width = hidden.shape
    block = max(1, min(block, n))  # no tokens: no blocks, and empty arrays
    padding = -n % block
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, block, width)
    targets = jnp.pad(targets, (0, padding)).reshape(-1, block)

    @jax.checkpoint
    def one_block(rows: tuple[Array, Array]) -> LogProbs:
        h, target = rows
        scores = jnp.dot(h, vocab_matrix, preferred_element_type=jnp.float32)
        logsumexp = jax.nn.logsumexp(scores, axis=-1)
        chosen = jnp.take_along_axis(scores, target[:, None], axis=-1)[:, 0]
        mean_score = jnp.sum(jnp.exp(scores - logsumexp[:, None]) * scores, axis=-1)
        return chosen - logsumexp, logsumexp, logsumexp - mean_score

    logprob, logsumexp, entropy = jax.lax.map(one_block, (hidden, targets))
    return logprob.reshape(-1)[:n], logsumexp.reshape(-1)[:n], entropy.reshape(-1)[:n]


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array, int], LogProbs]] = {"xla": _xla}
