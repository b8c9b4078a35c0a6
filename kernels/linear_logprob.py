"""Hidden states × vocabulary matrix → log-probabilities, without ever holding [N, V].

The reference ("xla") walks tiles of tokens and words, whose scores live only while their
log-sum-exp, entropy and target score are taken, and are computed again in the backward pass. Peak
temporaries are a few block · V floats instead of N · V.

"pallas_tpu" holds scores in VMEM only, in tiles of the vocabulary too, and needs no temporaries. It
is taken where the scores of a block do not fit in VMEM; where they do, XLA may keep them there, or
may not (docs/performance.md). "pallas_gpu" needs no temporaries in the forward pass; it has been
lowered for CUDA and interpreted but not timed on a GPU, and is taken only where it is asked for.

With a mesh in scope each device walks its own tokens against its own share of the vocabulary, with
any implementation; what is summed over devices is [N], never scores.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jaxtyping import Array, Bool, Float, Int

from spark_jax.kernels import linear_logprob_xla
from spark_jax.parallel.sharding import mesh_in_scope, platform, spec, vocab_shards

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

    Differentiable in hidden and vocab_matrix. Multiplied in hidden's dtype, summed in float32: a
    matrix that is wider, such as the float32 master of a bfloat16 computation, is rounded for it.
    `block · V` is the number of scores held at once ("xla" only; the kernels choose). With
    `vocab_major` the matrix is [V, D], as a tied embedding lies in memory: transposing one before a
    kernel would copy it. `implementation` is a key of IMPLEMENTATIONS; None takes
    `default_implementation`.
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
      ValueError: an unknown implementation, a matrix that does not fit hidden's width, or tokens or
        a vocabulary that the mesh in scope does not divide.
    """
    if implementation is None:
        vocab = vocab_matrix.shape[not vocab_major] // vocab_shards()
        implementation = default_implementation(vocab, block)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}; choose from {list(IMPLEMENTATIONS)}")
    if vocab_matrix.shape[1 if vocab_major else 0] != hidden.shape[1]:
        expected = "[V, D]" if vocab_major else "[D, V] (for [V, D] pass vocab_major=True)"
        raise ValueError(
            f"vocab_matrix of shape {vocab_matrix.shape} with hidden of shape {hidden.shape}; "
            f"expected {expected}"
        )
    compute, mesh = IMPLEMENTATIONS[implementation], mesh_in_scope()
    if mesh is not None or implementation != "xla":
        vocab_matrix = vocab_matrix.astype(hidden.dtype)
    if mesh is None:
        return compute(hidden, vocab_matrix, targets, block, vocab_major)
    return _on_mesh(compute, mesh, hidden, vocab_matrix, targets, block, vocab_major)


def default_implementation(vocab: int, block: int) -> str:
    """The kernel on TPU if the scores of a block over one chip's vocabulary exceed its VMEM, else
    "xla".

    Without a mesh on several chips "xla" too: the arguments may be sharded all the same, and XLA
    does not partition a kernel.
    """
    told = mesh_in_scope() is not None or jax.device_count() == 1
    large = 4 * block * vocab > _VMEM_FOR_SCORES
    return "pallas_tpu" if told and large and platform() == "tpu" else "xla"


def _on_mesh(
    compute: Callable[[Array, Array, Array, int, bool], LogProbs],
    mesh: AbstractMesh,
    hidden: Array,
    vocab_matrix: Array,
    targets: Array,
    block: int,
    vocab_major: bool,
) -> LogProbs:
    """Each device's tokens over each device's part of the vocabulary, which it gathers over `fsdp`
    (so that the gradient is scattered over it); then the parts are joined over `tensor`."""
    names = ("vocab", "width") if vocab_major else ("width", "vocab")
    tokens = spec(hidden.shape, ("batch", None), mesh, "hidden")
    matrix = spec(vocab_matrix.shape, names, mesh, "vocab_matrix")
    vocab_axis, width_axis = names.index("vocab"), names.index("width")

    def on_one_device(hidden: Array, matrix_part: Array, targets: Array) -> LogProbs:
        if (over := matrix[width_axis]) is not None:
            matrix_part = jax.lax.all_gather(matrix_part, over, axis=width_axis, tiled=True)
        own, over = matrix_part.shape[vocab_axis], matrix[vocab_axis]
        if over is None:
            return compute(hidden, matrix_part, targets, block, vocab_major)
        index = targets - own * jax.lax.axis_index(over)
        here = (index >= 0) & (index < own)
        part = compute(hidden, matrix_part, jnp.clip(index, 0, own - 1), block, vocab_major)
        return _join(part, here, over)

    # So that the gradient of the matrix is scattered before that of hidden goes on: XLA would keep
    # it whole until all layers have theirs.
    hidden, vocab_matrix = jax.lax.optimization_barrier((hidden, vocab_matrix))
    rows = jax.sharding.PartitionSpec(tokens[0])
    run = jax.shard_map(
        on_one_device, in_specs=(tokens, matrix, rows), out_specs=(rows,) * 3, check_vma=False
    )
    return run(hidden, vocab_matrix, targets)


def _join(part: LogProbs, here: Bool[Array, " N"], axis: str) -> LogProbs:
    """From the numbers of parts of the vocabulary, one on each device of a mesh axis, those of the
    whole. `here` says where the target lies in this device's part."""
    logprob, part_logsumexp, entropy = part
    top = jax.lax.pmax(jax.lax.stop_gradient(part_logsumexp), axis)
    logsumexp = top + jnp.log(jax.lax.psum(jnp.exp(part_logsumexp - top), axis))
    chosen = jax.lax.psum(jnp.where(here, logprob + part_logsumexp, 0.0), axis)
    mean_score = jax.lax.psum(
        jnp.exp(part_logsumexp - logsumexp) * (part_logsumexp - entropy), axis
    )
    return chosen - logsumexp, logsumexp, logsumexp - mean_score


def _pallas_tpu(
    hidden: Array, vocab_matrix: Array, targets: Array, block: int, vocab_major: bool
) -> LogProbs:
    from spark_jax.kernels import linear_logprob_tpu

    return linear_logprob_tpu.linear_logprob_and_entropy(hidden, vocab_matrix, targets, vocab_major)


def _pallas_gpu(
    hidden: Array, vocab_matrix: Array, targets: Array, block: int, vocab_major: bool
) -> LogProbs:
    from spark_jax.kernels import linear_logprob_gpu

    return linear_logprob_gpu.linear_logprob_and_entropy(
        hidden, vocab_matrix, targets, block, vocab_major
    )


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array, int, bool], LogProbs]] = {
    "xla": linear_logprob_xla.linear_logprob_and_entropy,
    "pallas_tpu": _pallas_tpu,
    "pallas_gpu": _pallas_gpu,
}
