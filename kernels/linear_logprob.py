"""Hidden states × vocabulary matrix → log-probabilities, without ever holding [N, V].

The reference ("xla") walks the tokens in blocks: a block's [block, V] scores live only while its
log-sum-exp, entropy and target score are taken, and are computed again in the backward pass. Peak
temporaries are a few block · V floats instead of N · V.

"pallas_tpu" holds scores in VMEM only, in tiles of the vocabulary too, and needs no temporaries. It
is faster where the scores of a block do not fit in VMEM, and slower where they do and XLA keeps
them there (docs/performance.md). "pallas_gpu" needs no temporaries in the forward pass; it has been
lowered for CUDA and interpreted but not timed on a GPU, and is taken only where it is asked for.
A kernel is not partitioned by XLA: over several chips, call it inside `jax.shard_map`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_VMEM_FOR_SCORES = 100 * 2**20  # bytes, of the 128 MiB of v5e and v6e

LogProbs = tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]


def linear_logprob(
    hidden: Float[Array, "N D"],
    vocab_matrix: Float[Array, "D V"] | Float[Array, "V D"],
    targets: Int[Array, " N"],
    *,
    implementation: str | None = None,
    block: int = 256,
    vocab_major: bool = False,
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """log softmax(hidden · vocab_matrix)[targets] and the log-sum-exp, in nats and float32.

    Differentiable in hidden and vocab_matrix. `block` is the number of tokens whose scores are held
    at once ("xla" only; the kernels choose). With `vocab_major` the matrix is [V, D], as a tied
    embedding lies in memory: transposing one before a kernel would copy it. `implementation` is a
    key of IMPLEMENTATIONS; None takes `default_implementation`.
    """
    logprob, logsumexp, _ = linear_logprob_and_entropy(
        hidden,
        vocab_matrix,
        targets,
        implementation=implementation,
        block=block,
        vocab_major=vocab_major,
    )
    return logprob, logsumexp


def linear_logprob_and_entropy(
    hidden: Float[Array, "N D"],
    vocab_matrix: Float[Array, "D V"] | Float[Array, "V D"],
    targets: Int[Array, " N"],
    *,
    implementation: str | None = None,
    block: int = 256,
    vocab_major: bool = False,
) -> LogProbs:
    """As `linear_logprob`, with the entropy −Σ p log p of each row's distribution, in nats.

    Raises:
      ValueError: an unknown implementation, or a matrix that does not fit hidden's width.
    """
    if implementation is None:
        implementation = default_implementation(vocab_matrix.shape[not vocab_major], block)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}; choose from {list(IMPLEMENTATIONS)}")
    if vocab_matrix.shape[1 if vocab_major else 0] != hidden.shape[1]:
        expected = "[V, D]" if vocab_major else "[D, V] (for [V, D] pass vocab_major=True)"
        raise ValueError(
            f"vocab_matrix of shape {vocab_matrix.shape} with hidden of shape {hidden.shape}; "
            f"expected {expected}"
        )
    return IMPLEMENTATIONS[implementation](hidden, vocab_matrix, targets, block, vocab_major)


def default_implementation(vocab: int, block: int) -> str:
    """The kernel on a single TPU chip if a block's scores exceed its VMEM, else "xla".

    On several devices "xla" too: a mesh may shard the arguments, and a kernel cannot follow that.
    """
    one_tpu = jax.default_backend() == "tpu" and jax.device_count() == 1
    return "pallas_tpu" if one_tpu and 4 * block * vocab > _VMEM_FOR_SCORES else "xla"


def _xla(
    hidden: Array, vocab_matrix: Array, targets: Array, block: int, vocab_major: bool
) -> LogProbs:
    n, width = hidden.shape
    equation = "nd,vd->nv" if vocab_major else "nd,dv->nv"
    block = max(1, min(block, n))  # no tokens: no blocks, and empty arrays
    padding = -n % block
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, block, width)
    targets = jnp.pad(targets, (0, padding)).reshape(-1, block)

    @jax.checkpoint
    def one_block(rows: tuple[Array, Array]) -> LogProbs:
        h, target = rows
        scores = jnp.einsum(equation, h, vocab_matrix, preferred_element_type=jnp.float32)
        logsumexp = jax.nn.logsumexp(scores, axis=-1)
        chosen = jnp.take_along_axis(scores, target[:, None], axis=-1)[:, 0]
        mean_score = jnp.sum(jnp.exp(scores - logsumexp[:, None]) * scores, axis=-1)
        return chosen - logsumexp, logsumexp, logsumexp - mean_score

    logprob, logsumexp, entropy = jax.lax.map(one_block, (hidden, targets))
    return logprob.reshape(-1)[:n], logsumexp.reshape(-1)[:n], entropy.reshape(-1)[:n]


def _pallas_tpu(
    hidden: Array, vocab_matrix: Array, targets: Array, block: int, vocab_major: bool
) -> LogProbs:
    from spark_jax.kernels import linear_logprob_tpu

    dtype = jnp.promote_types(hidden.dtype, vocab_matrix.dtype)
    return linear_logprob_tpu.linear_logprob_and_entropy(
        hidden.astype(dtype), vocab_matrix.astype(dtype), targets, vocab_major
    )


def _pallas_gpu(
    hidden: Array, vocab_matrix: Array, targets: Array, block: int, vocab_major: bool
) -> LogProbs:
    from spark_jax.kernels import linear_logprob_gpu

    dtype = jnp.promote_types(hidden.dtype, vocab_matrix.dtype)
    return linear_logprob_gpu.linear_logprob_and_entropy(
        hidden.astype(dtype), vocab_matrix.astype(dtype), targets, block, vocab_major
    )


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array, int, bool], LogProbs]] = {
    "xla": _xla,
    "pallas_tpu": _pallas_tpu,
    "pallas_gpu": _pallas_gpu,
}
