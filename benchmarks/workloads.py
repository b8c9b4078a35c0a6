"""What is measured. One function per question; each returns the variants that answer it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spark_jax import decoding
from spark_jax.decoding import Sampling, generate
from spark_jax.kernels.linear_logprob import linear_logprob
from spark_jax.models import transformer
from spark_jax.models.config import ModelConfig
from spark_jax.training import optimizer, state
from spark_jax.training.policy import Objective, PolicyBatch, policy_step
from spark_jax.training.sft import SFTBatch, sft_step

from .measure import Variant


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes of all workloads; lengths in tokens."""

    model: ModelConfig
    batch: int  # rows decoded at once, and rows of a train step
    prompt: int
    new: int
    group: int  # samples per prompt where prompts are shared
    long_prompt: int
    few: int  # new tokens after a long prompt
    requests: int  # for continuous batching, each with its own length from the range below
    shortest: int
    longest: int
    scored: int  # tokens that meet the vocabulary


FULL = Size(
    model=ModelConfig(  # SmolLM2-135M
        vocab_size=49152,
        width=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_width=1536,
    ),
    batch=16,
    prompt=64,
    new=128,
    group=8,
    long_prompt=512,
    few=32,
    requests=48,
    shortest=32,
    longest=256,
    scored=4096,
)
SMALL = Size(
    model=ModelConfig(
        vocab_size=64,
        width=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_width=24,
    ),
    batch=4,
    prompt=8,
    new=4,
    group=2,
    long_prompt=16,
    few=2,
    requests=6,
    shortest=2,
    longest=8,
    scored=32,
)


def sampling_settings(size: Size) -> list[Variant]:
    """Decoding under different settings: they are traced, so one program serves all."""
    params = decoding.layout(_params(size.model), size.model)
    prompts = _prompts(size, size.batch, size.prompt)
    shorter = _prompts(size, size.batch, size.prompt - 1)

    def variant(name: str, sampling: Sampling, prompts: list[list[int]] = prompts) -> Variant:
        return Variant(name, lambda: _decode(params, size.model, prompts, size.new, sampling))

    return [
        variant("greedy", Sampling(greedy=True)),
        variant("T = 1", Sampling()),
        variant("T = 1, top-p 0.95", Sampling(top_p=0.95)),
        variant("T = 1, top-k 50", Sampling(top_k=50)),
        variant(
            "T = 0.7, min-p 0.05, stop ids, prompts one shorter",
            Sampling(temperature=0.7, min_p=0.05, stop_ids=(0, 1)),
            shorter,
        ),
    ]


def layouts(size: Size) -> list[Variant]:
    """Decoding with layers unrolled or scanned, in float32 and bfloat16."""
    stacked = _params(size.model)
    prompts = _prompts(size, size.batch, size.prompt)

    def variant(name: str, dtype: str, change: Callable[..., transformer.Params]) -> Variant:
        config = dataclasses.replace(size.model, dtype=dtype)
        params = jax.jit(change, static_argnums=1)(stacked, config)
        sampling = Sampling(greedy=True)
        return Variant(name, lambda: _decode(params, config, prompts, size.new, sampling))

    return [
        variant("unrolled, float32", "float32", transformer.unstack),
        variant("scanned, float32", "float32", _cast),
        variant("unrolled, bfloat16", "bfloat16", transformer.unstack),
        variant("scanned, bfloat16", "bfloat16", _cast),
    ]


def shared_prompts(size: Size) -> list[Variant]:
    """Groups of samples that share their prompt's keys and values, or each with its own copy."""
    params = decoding.layout(_params(size.model), size.model)
    prompts = _prompts(size, size.batch // size.group, size.long_prompt)
    copies = [prompt for prompt in prompts for _ in range(size.group)]

    def run(prompts: list[list[int]], samples: int) -> int:
        return _decode(
            params, size.model, prompts, size.few, Sampling(), samples_per_prompt=samples
        )

    return [
        Variant("each its own copy", functools.partial(run, copies, 1)),
        Variant(f"{size.group} share one", functools.partial(run, prompts, size.group)),
    ]


def continuous_batching(size: Size) -> list[Variant]:
    """Responses of spread lengths: batches that wait for their longest, or slots refilled."""
    params = decoding.layout(_params(size.model), size.model)
    prompts = _prompts(size, size.requests, size.prompt)
    spread = np.random.default_rng(1).uniform(
        np.log(size.shortest), np.log(size.longest), size.requests
    )
    lengths = np.exp(spread).astype(int).tolist()

    def batches() -> int:
        parts = [slice(i, i + size.batch) for i in range(0, size.requests, size.batch)]
        return sum(
            _decode(params, size.model, prompts[part], lengths[part], Sampling()) for part in parts
        )

    def continuous() -> int:
        return _decode(params, size.model, prompts, lengths, Sampling(), slots=size.batch)

    return [
        Variant(f"batches of {size.batch}", batches),
        Variant(f"{size.batch} slots, refilled", continuous),
    ]


def scoring(size: Size) -> list[Variant]:
    """Log-probs of given tokens from hidden states: full log-softmax, or by blocks."""
    return [
        _head_variant("full log-softmax", _full_log_softmax, size),
        _head_variant("blocks of 512", functools.partial(_blocked, block=512), size),
        _head_variant("blocks of 256", functools.partial(_blocked, block=256), size),
    ]


def scoring_gradient(size: Size) -> list[Variant]:
    """The same, forward and backward, with gradients for hidden states and embedding."""

    def gradient(log_probs: Callable[..., jax.Array]) -> Callable[..., Any]:
        return jax.value_and_grad(lambda *args: jnp.mean(log_probs(*args)), argnums=(0, 1))

    return [
        _head_variant("full log-softmax", gradient(_full_log_softmax), size),
        _head_variant("blocks of 512", gradient(functools.partial(_blocked, block=512)), size),
        _head_variant("blocks of 256", gradient(functools.partial(_blocked, block=256)), size),
    ]


def train_steps(size: Size) -> list[Variant]:
    """One update with AdamW: policy gradient with a KL term, and supervised fine-tuning."""
    adamw = optimizer.make(dict(name="adamw", learning_rate=1e-5, clip_norm=1.0))
    train = state.create(jax.tree.map(jnp.copy, _params(size.model)), adamw, jax.random.key(0))
    carried = [train]  # all variants go on from one another's state, so that memory holds one
    policy, supervised = _policy_batch(size), _sft_batch(size)

    def variant(
        name: str, step: Callable[..., Any], batch: Any, remat: bool, **how: Any
    ) -> Variant:
        bound = functools.partial(
            step,
            model_config=dataclasses.replace(size.model, remat=remat),
            optimizer=adamw,
            **how,
        )
        program = _lazily_compiled(bound, carried[0], batch, donate_argnums=0)

        def run() -> int:
            carried[0], metrics = jax.block_until_ready(program()(carried[0], batch))
            if metrics["update_skipped"]:
                raise FloatingPointError(f"{name}: the update was not finite")
            return size.batch * (size.prompt + size.new)

        return Variant(name, run, lambda: _temporaries(program()))

    objective = Objective(kl_coefficient=0.01)
    return [
        variant("policy", policy_step, policy, True, objective=objective),
        variant(
            "policy, 4 parts", policy_step, policy, True, objective=objective, accumulation_steps=4
        ),
        variant("policy, no remat", policy_step, policy, False, objective=objective),
        variant("SFT", sft_step, supervised, True),
    ]


BENCHMARKS: dict[str, Callable[[Size], list[Variant]]] = {
    "sampling_settings": sampling_settings,
    "layouts": layouts,
    "shared_prompts": shared_prompts,
    "continuous_batching": continuous_batching,
    "scoring": scoring,
    "scoring_gradient": scoring_gradient,
    "train_steps": train_steps,
}


@functools.cache
def _params(config: ModelConfig) -> transformer.Params:
    return jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(0))


def _cast(params: transformer.Params, config: ModelConfig) -> transformer.Params:
    return jax.tree.map(lambda x: x.astype(config.compute_dtype), params)


def _prompts(size: Size, count: int, length: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return rng.integers(2, size.model.vocab_size, (count, length)).tolist()


def _decode(
    params: transformer.Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    new: int | list[int],
    sampling: Sampling,
    **how: Any,
) -> int:
    rollout = generate(
        params,
        config,
        prompts,
        key=jax.random.key(1),
        sampling=sampling,
        max_new_tokens=new,
        **how,
    )
    return int(jax.block_until_ready(rollout).mask.sum())


def _head_variant(name: str, function: Callable[..., Any], size: Size) -> Variant:
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(size.scored, size.model.width)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, size.model.vocab_size, size.scored), jnp.int32)
    arguments = (hidden, _params(size.model).embedding, targets)
    program = _lazily_compiled(function, *arguments)

    def run() -> int:
        jax.block_until_ready(program()(*arguments))
        return size.scored

    return Variant(name, run, lambda: _temporaries(program()))


def _full_log_softmax(hidden: jax.Array, embedding: jax.Array, targets: jax.Array) -> jax.Array:
    scores = jnp.dot(hidden, embedding.T, preferred_element_type=jnp.float32)
    return jnp.take_along_axis(jax.nn.log_softmax(scores), targets[:, None], axis=-1)[:, 0]


def _blocked(
    hidden: jax.Array, embedding: jax.Array, targets: jax.Array, *, block: int
) -> jax.Array:
    return linear_logprob(hidden, embedding.T, targets, block=block)[0]


def _policy_batch(size: Size) -> PolicyBatch:
    rng = np.random.default_rng(0)
    shape = (size.batch, size.new)
    vocab = size.model.vocab_size
    logprobs = jnp.full(shape, -np.log(vocab), jnp.float32)
    return PolicyBatch(
        prompt_tokens=jnp.asarray(rng.integers(0, vocab, (size.batch, size.prompt)), jnp.int32),
        prompt_mask=jnp.ones((size.batch, size.prompt), bool),
        tokens=jnp.asarray(rng.integers(0, vocab, shape), jnp.int32),
        mask=jnp.ones(shape, bool),
        old_logprobs=logprobs,
        advantages=jnp.asarray(rng.normal(size=shape), jnp.float32),
        ref_logprobs=logprobs,
    )


def _sft_batch(size: Size) -> SFTBatch:
    rng = np.random.default_rng(0)
    shape = (size.batch, size.prompt + size.new)
    tokens = jnp.asarray(rng.integers(0, size.model.vocab_size, shape), jnp.int32)
    return SFTBatch(tokens=tokens, loss_mask=jnp.arange(shape[1]) >= jnp.full(shape, size.prompt))


def _lazily_compiled(
    function: Callable[..., Any], *arguments: Any, donate_argnums: Any = ()
) -> Callable[[], Any]:
    """A callable that compiles on its first call, so that the first run is what compiles."""
    shapes = jax.eval_shape(lambda *x: x, *arguments)

    @functools.cache
    def program() -> Any:
        return jax.jit(function, donate_argnums=donate_argnums).lower(*shapes).compile()

    return program


def _temporaries(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes
