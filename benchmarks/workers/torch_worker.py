"""transformers' and torch's side of the benchmarks; runs in its own environment. See `serve`.

The number of threads is set from outside, by OMP_NUM_THREADS.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from serve import Probes, Result, Run, serve

Job = dict[str, Any]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    transformers.logging.set_verbosity_error()
    serve(about, lambda job: WORK[job["work"]](job), _probes)


def about() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "devices": device,
    }


def generate(job: Job) -> Run:
    """`model.generate` on batches that run until their longest is done, or, asked for,
    continuous batching with its paged cache and shared prefixes."""
    model, settings = _model(job), _generation(job["sampling"])
    if job.get("continuous"):
        return _continuous(job, model, settings)
    rows = [(p, n) for p, n in zip(job["prompts"], _limits(job)) for _ in range(job["samples"])]
    batches = [rows[i : i + job["slots"]] for i in range(0, len(rows), job["slots"])]
    batches = batches[: job.get("batches") or len(batches)]

    def run(warm: bool) -> Result:
        useful = 0
        few: list[list[int]] = []
        for batch in batches[:1] if warm else batches:
            longest = max(n for _, n in batch)
            prompts, mask = _left_padded([prompt for prompt, _ in batch])
            with torch.inference_mode():
                out = model.generate(
                    prompts, attention_mask=mask, max_new_tokens=longest, **settings
                )
            new = out[:, prompts.shape[1] :].cpu().numpy()
            few = few or new[:4, :32].tolist()
            counts = _counts(new, settings["eos_token_id"])
            useful += sum(min(count, n) for count, (_, n) in zip(counts, batch))
        return {"amount": useful, "tokens": few if job["sampling"].get("greedy") else None}

    return run


def score(job: Job) -> Run:
    """Log-probs of given tokens by the whole model."""
    model = _model(job)
    tokens = torch.tensor(job["tokens"], device=DEVICE)

    def run(warm: bool) -> Result:
        with torch.inference_mode():
            _logprobs(model(tokens, use_cache=False).logits[:, :-1], tokens[:, 1:])
        _wait()
        return {"amount": tokens.numel()}

    return run


def policy(job: Job) -> Run:
    """A clipped policy-gradient step with a KL term and AdamW, written out in torch."""
    prompts, responses = (torch.tensor(job[x], device=DEVICE) for x in ("prompts", "responses"))
    tokens = torch.cat([prompts, responses], dim=1)
    old = torch.full(responses.shape, -math.log(job["model"]["vocab_size"]), device=DEVICE)
    normal = np.random.default_rng(0).normal(size=(len(responses), 1))
    advantages = torch.tensor(normal, dtype=torch.float32, device=DEVICE)

    def loss(model: Any) -> torch.Tensor:
        keep = responses.shape[1] + 1  # scores of the responses only
        logits = model(tokens, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        logprobs = _logprobs(logits, responses)
        ratio = (logprobs - old).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        kl = (old - logprobs).exp() - (old - logprobs) - 1
        return (-gain + job["kl_coefficient"] * kl).mean()

    return _train(job, loss)


def sft(job: Job) -> Run:
    """A supervised step with the model's own loss."""
    prompts, responses = (torch.tensor(job[x], device=DEVICE) for x in ("prompts", "responses"))
    tokens = torch.cat([prompts, responses], dim=1)
    labels = tokens.clone()
    labels[:, : prompts.shape[1]] = -100
    return _train(job, lambda model: model(tokens, labels=labels, use_cache=False).loss)


def load(job: Job) -> Run:
    """A checkpoint from disk."""

    def run(warm: bool) -> Result:
        model = _read(job, job["dtype"])
        return {"amount": sum(x.numel() * x.element_size() for x in model.parameters())}

    return run


def matmul(job: Job) -> Run:
    """Floating-point operations of square matrix products."""
    x = torch.full((job["n"], job["n"]), 0.5, dtype=getattr(torch, job["dtype"]), device=DEVICE)

    def run(warm: bool) -> Result:
        for _ in range(job["times"]):
            x @ x
        _wait()
        return {"amount": 2 * job["n"] ** 3 * job["times"]}

    return run


def bandwidth(job: Job) -> Run:
    """Bytes read from memory, by a sum."""
    x = torch.ones(job["bytes"] // 4, device=DEVICE)

    def run(warm: bool) -> Result:
        for _ in range(job["times"]):
            x.sum()
        _wait()
        return {"amount": x.numel() * 4 * job["times"]}

    return run


WORK: dict[str, Callable[[Job], Run]] = {
    "generate": generate,
    "score": score,
    "policy": policy,
    "sft": sft,
    "load": load,
    "matmul": matmul,
    "bandwidth": bandwidth,
}

_MODELS: dict[tuple[str | None, str], Any] = {}


def _model(job: Job) -> Any:
    key = (job["weights"], job["dtype"])
    if key not in _MODELS:
        _MODELS[key] = _read(job, job["dtype"]).eval()
    return _MODELS[key]


def _read(job: Job, dtype: str) -> Any:
    if job["weights"]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            job["weights"], dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        return torch.nn.Module.to(model, DEVICE)
    config = transformers.AutoConfig.for_model(**job["model"])
    with DEVICE:
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )


def _generation(settings: dict[str, Any]) -> dict[str, Any]:
    stop = {"eos_token_id": settings.get("stop_ids"), "pad_token_id": 0}
    if settings.get("greedy"):
        return stop | {"do_sample": False}
    return stop | {
        "do_sample": True,
        "temperature": settings.get("temperature", 1.0),
        "top_p": settings.get("top_p", 1.0),
        "top_k": settings.get("top_k", 0),
    }


def _continuous(job: Job, model: Any, settings: dict[str, Any]) -> Run:
    """Every sample is a request of its own with its own limit; equal prefixes share pages."""
    limits = _limits(job)
    longest = max(len(prompt) for prompt in job["prompts"]) + max(limits)
    rows = [(p, n) for p, n in zip(job["prompts"], limits) for _ in range(job["samples"])]
    generation = transformers.GenerationConfig(
        **settings | {"eos_token_id": settings["eos_token_id"] or -1}, max_new_tokens=max(limits)
    )
    batching = transformers.ContinuousBatchingConfig(
        page_size=job["page_size"],
        num_blocks=(job["slots"] + 1) * -(-longest // job["page_size"]),
        max_batch_tokens=max(job["slots"], longest),
        max_requests_per_batch=job["slots"],
    )

    def run(warm: bool) -> Result:
        requests = rows[: job["slots"]] if warm else rows
        done: dict[str, int] = {}
        with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=batching
        ) as manager:
            for i, (prompt, limit) in enumerate(requests):
                manager.add_request(
                    prompt,
                    request_id=str(i),
                    max_new_tokens=limit,
                    eos_token_id=generation.eos_token_id,
                )
            while len(done) < len(requests):
                answer = manager.get_result(timeout=1)
                if answer is not None and answer.is_finished():
                    if answer.error is not None:
                        raise RuntimeError(answer.error)
                    done[answer.request_id] = len(answer.generated_tokens)
                elif answer is None and not manager.is_running():
                    raise RuntimeError("continuous batching ended before its requests")
        return {"amount": sum(done.values())}

    return run


def _limits(job: Job) -> list[int]:
    return [job["new"]] * len(job["prompts"]) if isinstance(job["new"], int) else job["new"]


def _left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    tokens = [[0] * (longest - len(x)) + x for x in prompts]
    mask = [[0] * (longest - len(x)) + [1] * len(x) for x in prompts]
    return torch.tensor(tokens, device=DEVICE), torch.tensor(mask, device=DEVICE)


def _counts(new: np.ndarray, stop_ids: list[int] | None) -> list[int]:
    """Tokens of each row, the first stop token included."""
    stops = np.isin(new, stop_ids or [])
    return np.where(stops.any(1), stops.argmax(1) + 1, new.shape[1]).tolist()


def _logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    flat = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return -flat.view(targets.shape)


def _train(job: Job, loss: Callable[[Any], torch.Tensor]) -> Run:
    """AdamW and clipping by norm; "autocast" keeps float32 weights and computes in bfloat16."""
    autocast = job["dtype"] == "autocast"
    model = _read(job, "float32" if autocast else job["dtype"]).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    tokens = sum(len(job[x]) * len(job[x][0]) for x in ("prompts", "responses"))
    if job.get("remat"):
        model.gradient_checkpointing_enable()

    def run(warm: bool) -> Result:
        precision = torch.autocast(DEVICE.type, torch.bfloat16) if autocast else None
        with precision or contextlib.nullcontext():
            value = loss(model)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError("the update was not finite")
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        _wait()
        return {"amount": tokens, "facts": {"loss, nat": float(value.detach())}}

    return run


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _probes() -> Probes:
    if DEVICE.type != "cuda":
        return Probes()
    return Probes(
        reset_device_peak=torch.cuda.reset_peak_memory_stats,
        device_peak=torch.cuda.max_memory_allocated,
    )


if __name__ == "__main__":
    main()
