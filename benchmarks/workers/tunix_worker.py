"""google-tunix's side of the benchmarks; runs in its own environment. See `serve`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from serve import Result, Run, jax_probes, serve
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params
from tunix.rl import algo_core, common
from tunix.rl.grpo.grpo_learner import GRPOConfig, TrainExample
from tunix.sft import peft_trainer
from tunix.sft import utils as sft_utils

Job = dict[str, Any]

PAD = 0
NEVER = 1 << 30  # a stop id that no vocabulary has


def main() -> None:
    serve(about, lambda job: WORK[job["work"]](job), jax_probes)


def about() -> dict[str, Any]:
    kinds = sorted({device.device_kind for device in jax.devices()})
    names = ("google-tunix", "jax", "flax")
    versions = {name: importlib.metadata.version(name) for name in names}
    return versions | {"devices": ", ".join(kinds)}


def generate(job: Job) -> Run:
    """The vanilla sampler. It knows neither groups nor waiting requests: rows come in batches that
    run until their longest is done, and every sample's prompt is prefilled."""
    model, tokenizer = _model(job), _Numbers()
    rows = [(p, n) for p, n in zip(job["prompts"], _limits(job)) for _ in range(job["samples"])]
    batches = [rows[i : i + job["slots"]] for i in range(0, len(rows), job["slots"])]
    batches = batches[: job.get("batches") or len(batches)]
    longest = max(len(prompt) for prompt, _ in rows)
    limit = max(n for _, n in rows)
    settings = _sampling(job["sampling"], job["model"]["vocab_size"])
    sampler = _sampler(job["weights"], job["dtype"], longest + limit, model, tokenizer)

    def run(warm: bool) -> Result:
        useful = 0
        few: list[list[int]] = []
        for batch in batches:  # in the warm-up too: another length is another program
            out = sampler(
                [tokenizer.decode(prompt) for prompt, _ in batch],
                max_generation_steps=max(n for _, n in batch),
                max_prompt_length=longest,
                seed=1,
                **settings,
            )
            few = few or [x[:32].tolist() for x in out.tokens[:4]]
            useful += sum(min(len(x), n) for x, (_, n) in zip(out.tokens, batch))
        return {"amount": useful, "tokens": few if job["sampling"].get("greedy") else None}

    return run


def score(job: Job) -> Run:
    """Log-probs of given tokens by the whole model."""
    from flax import nnx

    graph, state = nnx.split(_model(job))
    tokens = jnp.asarray(job["tokens"], jnp.int32)

    def run(warm: bool) -> Result:
        logprobs = common.compute_per_token_logps(
            graph, state, tokens[:, :1], tokens[:, 1:], pad_id=-1, eos_id=NEVER
        )
        jax.block_until_ready(logprobs)
        return {"amount": tokens.size}

    return run


def policy(job: Job) -> Run:
    """The train step of the GRPO learner's trainer, with its GRPO loss and a KL term."""
    settings = GRPOConfig(beta=job["kl_coefficient"], kl_loss_mode="low_var_kl")
    settings.temperature = 1.0  # GRPOLearner sets it from the rollout's

    def loss(model: Any, train_example: Any) -> Any:
        return algo_core.grpo_loss_fn(model, train_example, settings, pad_id=-1, eos_id=NEVER)

    prompts, responses = (jnp.asarray(job[x], jnp.int32) for x in ("prompts", "responses"))
    logprobs = jnp.full(responses.shape, -np.log(job["model"]["vocab_size"]), jnp.float32)
    example = TrainExample(
        prompt_ids=prompts,
        prompt_mask=jnp.ones(prompts.shape, bool),
        completion_ids=responses,
        completion_mask=jnp.ones(responses.shape, bool),
        advantages=jnp.asarray(np.random.default_rng(0).normal(size=len(responses)), jnp.float32),
        ref_per_token_logps=logprobs,
        old_per_token_logps=logprobs,
    )
    trainer = _trainer(job).with_loss_fn(loss, has_aux=True)
    trainer.with_gen_model_input_fn(lambda x: {"train_example": x})
    return _train(trainer, example, job)


def sft(job: Job) -> Run:
    """The train step of the PEFT trainer, with its default loss, on all parameters."""
    prompts, responses = (jnp.asarray(job[x], jnp.int32) for x in ("prompts", "responses"))
    tokens = jnp.concatenate([prompts, responses], axis=1)
    targets = jnp.broadcast_to(jnp.arange(tokens.shape[1]) >= prompts.shape[1], tokens.shape)
    trainer = _trainer(job)

    def inputs(batch: Any) -> dict[str, Any]:
        everything = jnp.ones(batch.input_tokens.shape, bool)
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": sft_utils.build_positions_from_mask(everything),
            "attention_mask": sft_utils.make_causal_attn_mask(everything),
        }

    trainer.with_gen_model_input_fn(inputs)
    batch = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=targets)
    return _train(trainer, batch, job)


def load(job: Job) -> Run:
    """A checkpoint from disk."""
    from flax import nnx

    def run(warm: bool) -> Result:
        leaves = jax.tree.leaves(nnx.state(_read(job)))
        return {"amount": sum(x.nbytes for x in jax.block_until_ready(leaves))}

    return run


WORK: dict[str, Callable[[Job], Run]] = {
    "generate": generate,
    "score": score,
    "policy": policy,
    "sft": sft,
    "load": load,
}


class _Numbers:
    """A tokenizer whose text is the token ids themselves."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(str(i) for i in ids)

    def bos_id(self) -> int:
        return 0  # the sampler takes 0 for "there is none"

    def eos_id(self) -> int:
        return NEVER

    def pad_id(self) -> int:
        return PAD


def _sampling(settings: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    stop = {"eos_tokens": settings["stop_ids"]} if settings.get("stop_ids") else {}
    if settings.get("greedy"):
        return stop
    return stop | {
        "temperature": settings.get("temperature", 1.0),
        "top_p": settings.get("top_p", 1.0),
        "top_k": settings.get("top_k") or None,
    }


def _limits(job: Job) -> list[int]:
    return [job["new"]] * len(job["prompts"]) if isinstance(job["new"], int) else job["new"]


def _read(job: Job, remat: bool = False) -> Any:
    hf = job["model"]
    config = llama.ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["head_dim"],
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=1_000_000,  # 0.1.7 computes with this whatever is said here
        norm_eps=hf["rms_norm_eps"],
        weight_tying=hf["tie_word_embeddings"],
        remat_config=llama.RematConfig.DECODER if remat else llama.RematConfig.NONE,
    )
    return params.create_model_from_safe_tensors(
        job["weights"], config, dtype=jnp.dtype(job["dtype"])
    )


_MODELS: dict[tuple[str, str], Any] = {}
_SAMPLERS: dict[tuple[str, str, int], Sampler] = {}


def _model(job: Job) -> Any:
    key = (job["weights"], job["dtype"])
    if key not in _MODELS:
        _MODELS[key] = _read(job)
    return _MODELS[key]


def _sampler(weights: str, dtype: str, size: int, model: Any, tokenizer: Any) -> Sampler:
    """One for all settings, as a user would keep it: what it recompiles is counted."""
    key = (weights, dtype, size)
    if key not in _SAMPLERS:
        attention = model.layers[0].attn
        cache = CacheConfig(
            cache_size=size,
            num_layers=len(model.layers),
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
        )
        _SAMPLERS[key] = Sampler(model, tokenizer, cache)
    return _SAMPLERS[key]


def _trainer(job: Job) -> peft_trainer.PeftTrainer:
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))
    config = peft_trainer.TrainingConfig(eval_every_n_steps=1 << 30)
    return peft_trainer.PeftTrainer(_read(job, remat=job.get("remat", False)), adamw, config)


def _train(trainer: peft_trainer.PeftTrainer, batch: Any, job: Job) -> Run:
    step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    tokens = sum(len(job[x]) * len(job[x][0]) for x in ("prompts", "responses"))

    def run(warm: bool) -> Result:
        if warm:
            step(batch)  # the second call compiles once more
        loss, _, grad_norm = jax.block_until_ready(step(batch))
        if not np.isfinite(grad_norm):
            raise FloatingPointError("the update was not finite")
        return {"amount": tokens, "facts": {"loss, nat": float(loss)}}

    return run


if __name__ == "__main__":
    main()
