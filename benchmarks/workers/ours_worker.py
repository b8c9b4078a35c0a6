"""This library's side of the benchmarks; see `serve` for the protocol."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from serve import Result, Run, jax_probes, serve

from spark_jax import decoding, scoring
from spark_jax.advantages import ADVANTAGES, AdvantageInputs
from spark_jax.kernels.linear_logprob import linear_logprob
from spark_jax.models import attention, checkpoints, config, transformer
from spark_jax.models.cache import Segment
from spark_jax.models.config import ModelConfig
from spark_jax.models.dot import dot
from spark_jax.models.layers import FusedLayer, Layer
from spark_jax.response_format import MAX_STEPS
from spark_jax.training import optimizer, state
from spark_jax.training.policy import Objective, PolicyBatch, policy_step
from spark_jax.training.sft import SFTBatch, sft_step

Job = dict[str, Any]


def main() -> None:
    serve(about, lambda job: WORK[job["work"]](job), jax_probes)


def about() -> dict[str, Any]:
    kinds = sorted({device.device_kind for device in jax.devices()})
    return {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "devices": ", ".join(kinds)}


def generate(job: Job) -> Run:
    """`decoding.generate`, in the layout that decoding wants, or in the one asked for."""
    model = _config(job)
    if job.get("layers"):
        change = transformer.unstack if job["layers"] == "unstacked" else _cast
        params = jax.jit(change, static_argnums=1)(_stacked(job), model)
    else:
        params = _decoding_params(job["weights"], model)
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in job["sampling"].items()}

    def run(warm: bool) -> Result:
        rollout = decoding.generate(
            params,
            model,
            job["prompts"],
            key=jax.random.key(1),
            sampling=decoding.Sampling(**settings),
            samples_per_prompt=job["samples"],
            max_new_tokens=job["new"],
            slots=job.get("slots"),
        )
        jax.block_until_ready(rollout)
        return {
            "amount": int(rollout.mask.sum()),
            "facts": {
                "slots busy": float(rollout.slot_occupancy),
                "while any sample waits": float(rollout.queue_occupancy),
            },
            "tokens": _few(rollout.tokens) if settings.get("greedy") else None,
        }

    return run


def products(job: Job) -> Run:
    """What decoding multiplies with weights, as it does, and next to nothing else: the least time
    that is left to it by XLA. Each row's scores are its next input."""
    model = _config(job)
    params, dtype = _decoding_params(job["weights"], model), model.compute_dtype

    def step(params: transformer.Params, x: jax.Array) -> jax.Array:
        for layer in params.layers:
            x = (x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True))).astype(dtype)
            x = _layer_products(x, layer, model)
        scores = transformer.logits(params, model, x[:, 0].astype(dtype))
        return scores[:, None, : model.width] + scores.max(axis=-1)[:, None, None]

    rows, new = job["rows"], job["new"]
    first = jax.random.normal(jax.random.key(0), (rows, 1, model.width))
    program = _compiled_once(
        lambda params, x: jax.lax.fori_loop(0, new, lambda _, x: step(params, x), x), params, first
    )

    def run(warm: bool) -> Result:
        jax.block_until_ready(program()(params, first))
        return {"amount": rows * new}

    return run


def _layer_products(h: jax.Array, layer: Layer | FusedLayer, model: ModelConfig) -> jax.Array:
    """A layer's products with its weights, each made of the one before, in float32."""
    dtype = model.compute_dtype
    queries, keys, values = layer.queries_keys_values(h)
    mixed = (queries + (keys + values).sum(axis=2, keepdims=True)).astype(dtype)
    h = layer.attention_output(mixed).astype(dtype)
    gate, up = layer.gate_and_up(h)
    return layer.mlp_output((gate + up).astype(dtype))


def train_products(job: Job) -> Run:
    """The same of a train step: what it multiplies with weights, forwards, once more and
    backwards, but not its attention."""
    model = _config(job)
    params = _loaded(job["weights"], dataclasses.replace(model, dtype="float32"))
    dtype, length = model.compute_dtype, job["length"]

    def body(x: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
        return _layer_products(x.astype(dtype), layer, model), None

    def scores(params: transformer.Params, x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(jax.checkpoint(body), x, params.layers)
        x = x[:, -job["scored"] :].reshape(-1, model.width).astype(dtype)
        part = model.vocab_size // 8  # as `linear_logprob` does, a few words at a time

        @jax.checkpoint
        def highest(words: jax.Array) -> jax.Array:
            return dot("nd,vd->nv", x, words).max()

        words = params.embedding[: 8 * part].reshape(8, part, -1)
        return jax.lax.map(highest, words).sum()

    first = jax.random.normal(jax.random.key(0), (job["rows"], length, model.width))
    program = _compiled_once(jax.grad(scores, argnums=(0, 1)), params, first)

    def run(warm: bool) -> Result:
        jax.block_until_ready(program()(params, first))
        return {"amount": job["rows"] * length}

    return run


def score(job: Job) -> Run:
    """Log-probs of given tokens by the whole model."""
    model, params = _config(job), _stacked(job)
    tokens = jnp.asarray(job["tokens"], jnp.int32)
    function = functools.partial(scoring.token_logprobs, config=model)
    program = _compiled_once(lambda p, t: function(p, tokens=t), params, tokens)

    def run(warm: bool) -> Result:
        jax.block_until_ready(program()(params, tokens))
        return {"amount": tokens.size, "temporaries": _temporaries(program())}

    return run


def head(job: Job) -> Run:
    """Log-probs from hidden states and the vocabulary matrix, without the model before them."""
    model = _config(job)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(job["rows"], model.width)), model.compute_dtype)
    targets = jnp.asarray(rng.integers(0, model.vocab_size, job["rows"]), jnp.int32)
    matrix = transformer.vocab_matrix(_stacked(job), model)
    logprobs = {
        "full": _full_log_softmax,
        "blocks": lambda *inputs: linear_logprob(*inputs)[0],
        "pallas_gpu": lambda *inputs: linear_logprob(*inputs, implementation="pallas_gpu")[0],
    }[job["implementation"]]
    function: Callable[..., Any] = logprobs
    if job["gradient"]:
        function = jax.value_and_grad(lambda *args: jnp.mean(logprobs(*args)), argnums=(0, 1))
    program = _compiled_once(function, hidden, matrix, targets)

    def run(warm: bool) -> Result:
        jax.block_until_ready(program()(hidden, matrix, targets))
        return {"amount": job["rows"], "temporaries": _temporaries(program())}

    return run


def decode_attention(job: Job) -> Run:
    """Attention of a decode step, one layer's of a cache of two: one query per slot."""
    model = _config(job)
    lanes, slots, length, columns = (job[n] for n in ("lanes", "slots", "prompt", "columns"))
    heads, width, dtype = model.num_kv_heads, model.head_dim, model.compute_dtype
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (
        (slots, model.num_heads, width),
        (2, lanes, heads, width, length),
        (2, lanes, heads, length, width),
        (2, slots, heads, width, columns),
        (2, slots, heads, columns, width),
    )
    q, prompt_keys, prompt_values, own_keys, own_values = (
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    cache = Segment(prompt_keys, prompt_values, own_keys, own_values, layer=jnp.int32(1))
    if not attention.in_place(job["attention"]):
        cache = cache.one_layer()
    seen = jnp.ones((lanes, length), bool)
    written = jnp.broadcast_to(jnp.arange(columns) < columns // 2, (slots, columns))
    arguments = (q, cache, seen, written)
    attend = functools.partial(attention.cached, implementation=job["attention"])
    program = _compiled_once(attend, *arguments)

    def run(warm: bool) -> Result:
        for _ in range(job["calls"]):
            out = program()(*arguments)
        jax.block_until_ready(out)
        return {"amount": slots * job["calls"], "temporaries": _temporaries(program())}

    return run


def agreement(job: Job) -> Run:
    """The largest difference between the sampler's log-probs and the scorer's, in nats."""
    model, stacked = _config(job), _stacked(job)
    params = _decoding_params(job["weights"], model)
    score = jax.jit(functools.partial(scoring.response_logprobs_and_entropy, config=model))

    def run(warm: bool) -> Result:
        rollout = decoding.generate(
            params,
            model,
            job["prompts"],
            key=jax.random.key(1),
            sampling=decoding.Sampling(**job["sampling"]),
            samples_per_prompt=job["samples"],
            max_new_tokens=job["new"],
        )
        scored, _ = score(
            stacked,
            prompt_tokens=jnp.repeat(rollout.prompt_tokens, job["samples"], axis=0),
            prompt_mask=jnp.repeat(rollout.prompt_mask, job["samples"], axis=0),
            tokens=rollout.tokens,
            mask=rollout.mask,
        )
        gap = jnp.where(rollout.mask, jnp.abs(scored - rollout.logprobs), 0.0)
        return {
            "amount": int(rollout.mask.sum()),
            "facts": {
                "largest gap, nat": float(gap.max()),
                "mean gap, nat": float(gap.sum() / rollout.mask.sum()),
            },
        }

    return run


def policy(job: Job) -> Run:
    """One update with clipping, a KL term and AdamW."""
    rng = np.random.default_rng(0)
    prompts, responses = (jnp.asarray(job[x], jnp.int32) for x in ("prompts", "responses"))
    logprobs = jnp.full(responses.shape, -np.log(job["model"]["vocab_size"]), jnp.float32)
    batch = PolicyBatch(
        prompt_tokens=prompts,
        prompt_mask=jnp.ones(prompts.shape, bool),
        tokens=responses,
        mask=jnp.ones(responses.shape, bool),
        old_logprobs=logprobs,
        advantages=jnp.asarray(rng.normal(size=(len(responses), 1)) + 0 * logprobs, jnp.float32),
        ref_logprobs=logprobs,
    )
    objective = Objective(kl_coefficient=job["kl_coefficient"])
    return _train(job, functools.partial(policy_step, objective=objective), batch)


def advantages(job: Job) -> Run:
    """Advantages of given log-probs, rewards, verdicts and steps, by name."""
    rng = np.random.default_rng(0)
    shape, group = (job["rows"], job["new"]), job["group"]
    inputs = AdvantageInputs(
        rewards=jnp.asarray(rng.integers(0, 2, shape[0]), jnp.float32),
        mask=jnp.asarray(np.arange(shape[1]) < rng.integers(1, 1 + shape[1], (shape[0], 1))),
        group_size=group,
        policy_logprobs=jnp.asarray(-rng.exponential(size=shape), jnp.float32),
        ref_logprobs=jnp.asarray(-rng.exponential(size=shape), jnp.float32),
        verdicts=jnp.asarray(rng.choice([-1, 1], (shape[0], MAX_STEPS)), jnp.int8),
        step_ids=jnp.asarray(np.broadcast_to(np.arange(shape[1]) * MAX_STEPS // shape[1], shape)),
    )
    program = _compiled_once(ADVANTAGES[job["advantage"]], inputs)

    def run(warm: bool) -> Result:
        jax.block_until_ready(program()(inputs))
        return {"amount": int(inputs.mask.sum()), "temporaries": _temporaries(program())}

    return run


def sft(job: Job) -> Run:
    """One supervised update: cross-entropy on the responses, AdamW."""
    prompts, responses = (jnp.asarray(job[x], jnp.int32) for x in ("prompts", "responses"))
    tokens = jnp.concatenate([prompts, responses], axis=1)
    targets = jnp.broadcast_to(jnp.arange(tokens.shape[1]) >= prompts.shape[1], tokens.shape)
    return _train(job, sft_step, SFTBatch(tokens=tokens, loss_mask=targets))


def layout(job: Job) -> Run:
    """Parameters from the train state to the form that decoding wants; once per policy update."""
    model, params = _config(job), _stacked(job)

    def run(warm: bool) -> Result:
        converted = jax.block_until_ready(decoding.layout(params, model))
        return {"amount": sum(x.nbytes for x in jax.tree.leaves(converted))}

    return run


def load(job: Job) -> Run:
    """A checkpoint from disk."""

    def run(warm: bool) -> Result:
        params, _ = checkpoints.load(job["weights"], dtype=job["dtype"])
        return {"amount": sum(x.nbytes for x in jax.tree.leaves(jax.block_until_ready(params)))}

    return run


def matmul(job: Job) -> Run:
    """Floating-point operations of square matrix products, accumulated in float32."""
    n = job["n"]
    x = jnp.full((n, n), 0.5, job["dtype"])
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))

    def run(warm: bool) -> Result:
        for _ in range(job["times"]):
            jax.block_until_ready(product(x, x))
        return {"amount": 2 * n**3 * job["times"]}

    return run


def bandwidth(job: Job) -> Run:
    """Bytes read from memory: a sum, by NumPy on CPU and by XLA on accelerators."""
    on_cpu = jax.default_backend() == "cpu"
    x = np.ones(job["bytes"] // 4, np.float32)
    array = x if on_cpu else jax.device_put(x)
    add = np.sum if on_cpu else jax.jit(jnp.sum)

    def run(warm: bool) -> Result:
        for _ in range(job["times"]):
            jax.block_until_ready(add(array))
        return {"amount": x.nbytes * job["times"]}

    return run


WORK: dict[str, Callable[[Job], Run]] = {
    "generate": generate,
    "products": products,
    "train_products": train_products,
    "score": score,
    "head": head,
    "decode_attention": decode_attention,
    "agreement": agreement,
    "policy": policy,
    "sft": sft,
    "advantages": advantages,
    "layout": layout,
    "load": load,
    "matmul": matmul,
    "bandwidth": bandwidth,
}


def _config(job: Job) -> ModelConfig:
    model = config.from_hf(job["model"], dtype=job["dtype"])
    return dataclasses.replace(
        model,
        remat=job.get("remat", True),
        remat_save=tuple(job.get("remat_save", ())),
        cache_dtype=job.get("cache_dtype"),
    )


@functools.cache
def _loaded(weights: str | None, model: ModelConfig) -> transformer.Params:
    """Stacked, from the checkpoint or random."""
    if weights:
        return checkpoints.load(weights, dtype=model.dtype)[0]

    def draw() -> transformer.Params:
        return _cast(transformer.init(model, jax.random.key(0)), model)

    return jax.jit(draw)()


def _stacked(job: Job) -> transformer.Params:
    return _loaded(job["weights"], _config(job))


@functools.cache
def _decoding_params(weights: str | None, model: ModelConfig) -> transformer.Params:
    params = decoding.layout(_loaded(weights, model), model)
    _loaded.cache_clear()
    return params


def _cast(params: transformer.Params, model: ModelConfig) -> transformer.Params:
    return jax.tree.map(lambda x: x.astype(model.compute_dtype), params)


def _train(job: Job, step: Callable[..., Any], batch: Any) -> Run:
    """Master weights and moments are float32 whatever the compute dtype."""
    master = dataclasses.replace(_config(job), dtype="float32")
    adamw = optimizer.make(dict(name="adamw", learning_rate=1e-6, clip_norm=1.0))
    params = state.copy(_loaded(job["weights"], master))
    _loaded.cache_clear()
    carried = [state.create(params, adamw, jax.random.key(0))]
    del params
    bound = functools.partial(
        step,
        model_config=_config(job),
        optimizer=adamw,
        accumulation_steps=job.get("parts", 1),
    )
    program = _compiled_once(bound, carried[0], batch, donate_argnums=0)
    tokens = sum(len(job[x]) * len(job[x][0]) for x in ("prompts", "responses"))

    def run(warm: bool) -> Result:
        carried[0], metrics = jax.block_until_ready(program()(carried[0], batch))
        if metrics["update_skipped"]:
            raise FloatingPointError("the update was not finite")
        facts = {"loss, nat": float(metrics["loss"])}
        return {"amount": tokens, "temporaries": _temporaries(program()), "facts": facts}

    return run


def _full_log_softmax(hidden: jax.Array, matrix: jax.Array, targets: jax.Array) -> jax.Array:
    scores = jnp.dot(hidden, matrix, preferred_element_type=jnp.float32)
    return jnp.take_along_axis(jax.nn.log_softmax(scores), targets[:, None], axis=-1)[:, 0]


def _compiled_once(
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


def _few(tokens: jax.Array) -> list[list[int]]:
    return np.asarray(tokens)[:4, :32].tolist()


if __name__ == "__main__":
    main()
