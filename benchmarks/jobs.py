"""What is measured. One function per question; each says who takes part and with which job.

A job is plain JSON, so that a peer in another environment can read it: shapes, tokens, settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from spark_jax.models import config

from . import roofline
from .measure import Contender
from .sizes import Size

Job = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the jobs of one run have in common."""

    size: Size
    platform: str
    weights: str | None  # a checkpoint that every program loads; None: each draws its own

    @property
    def one_thread(self) -> int | None:
        """What is compared with peers has one thread on CPU; None: as many as it takes."""
        return 1 if self.platform == "cpu" else None

    @property
    def model(self) -> dict[str, Any]:
        return config.to_hf(self.size.model)


def settings(setting: Setting) -> list[Contender]:
    """What changes of sampling settings and prompts compile: every program keeps what it has
    compiled for the settings before."""
    size, jobs = setting.size, []
    for name, sampling, length in (
        ("greedy", {"greedy": True}, size.prompt),
        ("T = 1", {}, size.prompt),
        ("T = 0.7", {"temperature": 0.7}, size.prompt),
        ("top-p 0.95", {"top_p": 0.95}, size.prompt),
        ("top-k 50", {"top_k": 50}, size.prompt),
        ("min-p 0.05, stop ids", {"min_p": 0.05, "stop_ids": [0, 1]}, size.prompt),
        ("prompts one shorter", {}, size.prompt - 1),
    ):
        prompts = _tokens(size, size.batch, length)
        job = _generate(setting, prompts, min(size.new, 16), sampling, "float32")
        jobs.append((name, job))
    ours = [Contender(f"ours, {name}", "ours", job) for name, job in jobs]
    tunix = [Contender(f"tunix, {name}", "tunix", job) for name, job in jobs]
    return ours + [x for x in tunix if "min_p" not in x.job["sampling"]]


def decode(setting: Setting) -> list[Contender]:
    """Greedy, T = 1, top-p and top-k: batch by batch of equal lengths."""
    size = setting.size
    prompts = _tokens(size, size.batch, size.prompt)
    contenders = []
    for name, sampling in (
        ("greedy", {"greedy": True}),
        ("T = 1", {}),
        ("T = 1, top-p 0.95", {"top_p": 0.95}),
        ("T = 1, top-k 50", {"top_k": 50}),
    ):
        for program, worker, dtype, threads in _decoders(setting, name == "greedy"):
            job = _generate(setting, prompts, size.new, sampling, dtype)
            cost = roofline.decode(setting.model, dtype, size.batch, size.prompt, size.new)
            contenders.append(
                Contender(f"{program}, {name}", worker, job, dtype, threads, cost=cost)
            )
    return [*contenders, *_decoded_products(setting, size.batch), *_probes(setting)]


def decode_large(setting: Setting) -> list[Contender]:
    """Greedy decoding of a large batch, and its share of the roofline."""
    size = setting.size
    prompts = _tokens(size, size.large_batch, size.prompt)
    contenders = []
    for program, worker, dtype, threads in _decoders(setting, False):
        job = _generate(setting, prompts, size.new, {"greedy": True}, dtype)
        cost = roofline.decode(setting.model, dtype, size.large_batch, size.prompt, size.new)
        contenders.append(Contender(program, worker, job, dtype, threads, cost=cost))
    return [*contenders, *_decoded_products(setting, size.large_batch), *_probes(setting)]


def layouts(setting: Setting) -> list[Contender]:
    """Greedy decoding with layers unrolled or scanned; `decoding.layout` chooses by platform."""
    size = setting.size
    prompts = _tokens(size, size.batch, size.prompt)
    return [
        Contender(
            f"ours, {layers}, {dtype}",
            "ours",
            _generate(setting, prompts, size.new, {"greedy": True}, dtype) | {"layers": layers},
            dtype,
        )
        for dtype in ("float32", "bfloat16")
        for layers in ("unstacked", "stacked")
    ]


def stage_one(setting: Setting) -> list[Contender]:
    """Verifications: a template common to all prompts, groups of samples of one prompt, T = 0.8 and
    top-p 0.95, answers that end by chance. Tokens count up to the stop token. The peers that work
    batch by batch run the first batch only: theirs are all alike."""
    size = setting.size
    template, *rest = _tokens(size, 1 + size.problems, size.template)
    own = size.shared - size.template
    prompts = [template + row[:own] for row in rest]
    sampling = {
        "temperature": 0.8,
        "top_p": 0.95,
        "stop_ids": list(range(0, size.model.vocab_size, size.stop_every)),
    }

    def job(dtype: str, **how: Any) -> Job:
        generate = _generate(setting, prompts, size.limit, sampling, dtype, slots=size.slots)
        return generate | {"samples": size.samples} | how

    return _scheduled(setting, job, part=1)


def continuous_batching(setting: Setting) -> list[Contender]:
    """Answers of spread, prescribed lengths (log-uniform), so many at a time. Tokens beyond a
    row's own length do not count."""
    size = setting.size
    prompts = _tokens(size, size.requests, size.prompt)
    logs = np.random.default_rng(1).uniform(
        np.log(size.shortest), np.log(size.limit), size.requests
    )
    lengths = np.exp(logs).astype(int).tolist()

    def job(dtype: str, **how: Any) -> Job:
        return _generate(setting, prompts, lengths, {}, dtype, slots=size.batch) | how

    return _scheduled(setting, job, part=None)


def prefill(setting: Setting) -> list[Contender]:
    """Long prompts, all different, and one token each. Tokens count the prompts."""
    size = setting.size
    prompts = _tokens(size, size.batch, size.prefilled)
    contenders = []
    for program, worker, dtype, threads in _decoders(setting, True):
        job = _generate(setting, prompts, 1, {"greedy": True}, dtype)
        cost = roofline.decode(setting.model, dtype, size.batch, size.prefilled, 1)
        scale = size.prefilled  # a worker counts the one new token
        contenders.append(Contender(program, worker, job, dtype, threads, scale=scale, cost=cost))
    return [*contenders, *_probes(setting)]


def scoring(setting: Setting) -> list[Contender]:
    """Log-probs of given tokens by the whole model."""
    size = setting.size
    rows = max(1, size.scored // 256)
    tokens = _tokens(size, rows, size.scored // rows)
    contenders = []
    for program, worker, dtype, threads in _decoders(setting, False):
        job = _common(setting, "score", dtype) | {"tokens": tokens}
        length = len(tokens[0])
        cost = roofline.forward(setting.model, dtype, rows, length, length)
        contenders.append(Contender(program, worker, job, dtype, threads, cost=cost))
    return [*contenders, *_probes(setting)]


def head(setting: Setting) -> list[Contender]:
    """Log-probs from hidden states and the vocabulary: full log-softmax, or ours."""
    return _head(setting, gradient=False)


def head_gradient(setting: Setting) -> list[Contender]:
    """The same with gradients for hidden states and vocabulary matrix."""
    return _head(setting, gradient=True)


def decode_attention(setting: Setting) -> list[Contender]:
    """A decode step's attention to the cache, of one layer: ours by XLA, and by the platform's
    kernel where there is one. Prompts are whole, of the slots' own columns half are written."""
    size = setting.size
    dtype = "float32" if setting.platform == "cpu" else "bfloat16"
    kernels = {"gpu": {"triton": "kernel"}, "tpu": {"splash": "kernel"}}
    contenders = []
    for attention, name in ({"dense": "xla"} | kernels.get(setting.platform, {})).items():
        job = _common(setting, "decode_attention", dtype) | {
            "attention": attention,
            "lanes": size.large_batch // 4,
            "slots": size.large_batch,
            "prompt": size.prefilled,
            "columns": size.limit,
            "calls": 32,
        }
        written = job["columns"] // 2
        tokens = job["lanes"] * job["prompt"] + job["slots"] * written
        pairs = job["slots"] * (job["prompt"] + written)
        cost = roofline.decode_attention(setting.model, dtype, tokens, pairs, job["calls"])
        contenders.append(Contender(f"ours, {name}", "ours", job, cost=cost))
    return [*contenders, *_probes(setting)]


def policy_step(setting: Setting) -> list[Contender]:
    """One policy-gradient update: ratio, clipping, KL, AdamW, clipping by norm; weights and moments
    in float32, a thread each. Tunix is `algo_core.grpo_loss_fn` under its trainer, as it comes and
    with rematerialisation."""
    contenders = [
        _training(setting, "policy", "ours, float32", "ours", "float32", 1),
        _training(setting, "policy", "tunix, float32", "tunix", "float32", 1),
        _training(setting, "policy", "tunix, float32, remat", "tunix", "float32", 1, remat=True),
    ]
    return [*contenders, *_probes(setting)]


def policy_step_bfloat16(setting: Setting) -> list[Contender]:
    """The same, computed in bfloat16. "autocast" keeps float32 weights as ours does; the other
    peers hold weights and moments in bfloat16. "projections stored" makes none of a layer's
    products again in the backward pass; the peers store all."""
    contenders = []
    for worker, variant, most in (
        ("ours", "bfloat16", 2),
        ("ours", "bfloat16, projections stored", 1),
        ("transformers", "autocast", 1),
        ("transformers", "bfloat16", 2),
    ):
        dtype, how = variant.split(",")[0], VARIANTS.get(variant, {})
        for threads in range(1, 1 + most) if setting.platform == "cpu" else (None,):
            name = f"{worker}, {variant}{_threads(threads)}"
            contenders.append(_training(setting, "policy", name, worker, dtype, threads, **how))
    size = setting.size
    job = {"rows": size.batch, "length": size.prompt + size.new, "scored": size.new}
    products = _products(setting, "train_products", job, ("bfloat16",))
    return [*contenders, *products, *_probes(setting)]


def sft_step(setting: Setting) -> list[Contender]:
    """One supervised update: cross-entropy of the responses, AdamW, clipping by norm."""
    threads = setting.one_thread
    return [
        _training(setting, "sft", f"{worker}, {dtype}{_threads(threads)}", worker, dtype, threads)
        for worker, dtype in (
            ("ours", "float32"),
            ("ours", "bfloat16"),
            ("tunix", "float32"),
            ("transformers", "bfloat16"),
        )
    ]


def train_variants(setting: Setting) -> list[Contender]:
    """Ours: all rows at once, in parts, with the outputs of a layer's products stored, and without
    rematerialisation."""
    return [
        _training(setting, "policy", f"ours, {name}", "ours", name.split(",")[0], **how)
        for name, how in VARIANTS.items()
    ]


VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, 4 parts": {"parts": 4},
    "float32, projections stored": {"remat_save": config.PROJECTIONS},
    "float32, no remat": {"remat": False},
    "bfloat16": {},
    "bfloat16, projections stored": {"remat_save": config.PROJECTIONS},
}


def advantages(setting: Setting) -> list[Contender]:
    """Those of as many tokens as `scoring` scores, beside the policy step: is a kernel worth it?"""
    size = setting.size
    sizes = {"rows": size.batch, "new": size.scored // size.batch, "group": size.batch // 2}
    contenders = [
        Contender(f"ours, {name}", "ours", {"work": "advantages", "advantage": name} | sizes)
        for name in ("grpo", "selective", "global_step", "spro")
    ]
    return [*contenders, _training(setting, "policy", "ours, policy step", "ours", "float32")]


def agreement(setting: Setting) -> list[Contender]:
    """The sampler's log-probs against the scorer's, on the same tokens."""
    size = setting.size
    prompts = _tokens(size, 2, size.prompt)
    return [
        Contender(
            f"ours, {dtype}" + (f", cache in {cache}" if cache else ""),
            "ours",
            _generate(setting, prompts, size.new, {}, dtype)
            | {"work": "agreement", "samples": size.batch // 2, "cache_dtype": cache},
            dtype,
        )
        for dtype in ("float32", "bfloat16")
        for cache in (None, "int8")
    ]


def weight_layout(setting: Setting) -> list[Contender]:
    """From the train state's weights to those that decoding wants."""
    return [
        Contender(f"ours, {dtype}", "ours", _common(setting, "layout", dtype), dtype, unit="bytes")
        for dtype in ("float32", "bfloat16")
    ]


def loading(setting: Setting) -> list[Contender]:
    """The same checkpoint from disk; its file is in the page cache."""
    if setting.weights is None:
        return []
    job = _common(setting, "load", "float32")
    return [
        Contender("ours", "ours", job, unit="bytes"),
        Contender("tunix", "tunix", job, unit="bytes"),
        Contender("transformers, 1 thread", "transformers", job, threads=1, unit="bytes"),
    ]


BENCHMARKS: dict[str, Callable[[Setting], list[Contender]]] = {
    "settings": settings,
    "decode": decode,
    "decode_large": decode_large,
    "stage_one": stage_one,
    "continuous_batching": continuous_batching,
    "prefill": prefill,
    "scoring": scoring,
    "head": head,
    "head_gradient": head_gradient,
    "decode_attention": decode_attention,
    "policy_step": policy_step,
    "policy_step_bfloat16": policy_step_bfloat16,
    "sft_step": sft_step,
    "train_variants": train_variants,
    "advantages": advantages,
    "agreement": agreement,
    "layouts": layouts,
    "weight_layout": weight_layout,
    "loading": loading,
}
CPU_ONLY = {"settings", "loading", "policy_step"}  # comparisons with Tunix and with files
LONG = {"stage_one", "continuous_batching"}  # two rounds at most
TRAINING = {"policy_step", "policy_step_bfloat16", "sft_step", "train_variants", "advantages"}

Program = tuple[str, str, str, int | None]  # name, worker, dtype, threads


def contenders(name: str, setting: Setting) -> list[Contender]:
    """Of the benchmark of that name. A TPU serves one process, so that ours share one there."""
    chosen = BENCHMARKS[name](setting)
    if setting.platform == "tpu":
        return [dataclasses.replace(x, process="") for x in chosen]
    return chosen


def _decoders(setting: Setting, everyone: bool) -> list[Program]:
    """Ours and the peers that decode, on CPU a thread each: a second one costs all of them CPU
    time. `everyone` adds two threads, and dtypes in which a peer is expected to be slower."""
    if setting.platform != "cpu":
        return [
            ("ours, bfloat16", "ours", "bfloat16", None),
            ("transformers, bfloat16", "transformers", "bfloat16", None),
        ]
    one: list[tuple[str, str]] = [
        ("ours", "float32"),
        ("ours", "bfloat16"),
        ("tunix", "float32"),
        ("transformers", "bfloat16"),
    ]
    more = [("tunix", "bfloat16"), ("transformers", "float32")]
    chosen = [(*program, 1) for program in one + more * everyone]
    chosen += [(*program, 2) for program in one * everyone]
    return [
        (f"{worker}, {dtype}{_threads(threads)}", worker, dtype, threads)
        for worker, dtype, threads in chosen
    ]


def _decoded_products(setting: Setting, rows: int) -> list[Contender]:
    job = {"rows": rows, "new": setting.size.new}
    return _products(setting, "products", job, ("float32", "bfloat16"))


def _products(setting: Setting, work: str, job: Job, dtypes: tuple[str, ...]) -> list[Contender]:
    """On CPU, the matrix products alone: what XLA leaves to be gained by anything else."""
    if setting.platform != "cpu":
        return []
    return [
        Contender(
            f"XLA, the products alone, {dtype}",
            "ours",
            _common(setting, work, dtype) | job,
            dtype,
            threads=1,
        )
        for dtype in dtypes
    ]


def _scheduled(setting: Setting, job: Callable[..., Job], part: int | None) -> list[Contender]:
    contenders = []
    for program, worker, dtype, threads in _decoders(setting, False):
        how = {} if worker == "ours" else {"batches": part}
        contenders.append(Contender(program, worker, job(dtype, **how), dtype, threads))
    pages = job("bfloat16", continuous=True, page_size=setting.size.page)
    threads = setting.one_thread
    name = f"transformers, bfloat16, continuous batching{_threads(threads)}"
    return [*contenders, Contender(name, "transformers", pages, "continuous", threads)]


def _head(setting: Setting, gradient: bool) -> list[Contender]:
    size = setting.size
    contenders = []
    for dtype in ("float32", "bfloat16"):
        programs = {"full": "full log-softmax", "blocks": "linear_logprob"}
        if setting.platform == "gpu":
            programs["pallas_gpu"] = "linear_logprob by Triton"
        for implementation, name in programs.items():
            job = _common(setting, "head", dtype) | {
                "rows": size.scored,
                "implementation": implementation,
                "gradient": gradient,
            }
            cost = roofline.head(setting.model, dtype, size.scored, 3 if gradient else 1)
            contenders.append(
                Contender(f"ours, {name}, {dtype}", "ours", job, name + dtype, cost=cost)
            )
    return [*contenders, *_probes(setting)]


def _training(
    setting: Setting,
    work: str,
    name: str,
    worker: str,
    dtype: str,
    threads: int | None = None,
    **how: Any,
) -> Contender:
    """Every contender has a process of its own, so that its peak memory is its own. Its steps come
    in a row, as in training: after a pause they would pay for memory that the system took back."""
    size = setting.size
    job = _common(setting, work, dtype) | {
        "prompts": _tokens(size, size.batch, size.prompt),
        "responses": _tokens(size, size.batch, size.new, seed=2),
        "kl_coefficient": 0.01,
    }
    computed = "float32" if dtype == "float32" else "bfloat16"
    length = size.prompt + size.new
    cost = roofline.train(setting.model, computed, size.batch, length, size.new)
    return Contender(name, worker, job | how, name, threads, cost=cost, in_a_row=True)


def _threads(count: int | None) -> str:
    return "" if count is None else f", {count} thread" + "s" * (count > 1)


def _probes(setting: Setting) -> list[Contender]:
    """The rates that the roofline is made of, by whoever may be fastest."""
    size = setting.size
    contenders = []
    one = setting.one_thread
    for worker, program in (("ours", "XLA"), ("transformers", "torch")):
        for dtype in ("float32", "bfloat16"):
            job = {"work": "matmul", "dtype": dtype, "n": size.product, "times": 2}
            name = f"matrix products in {dtype}, {program}"
            contenders.append(Contender(name, worker, job, "probe", one, unit="FLOP"))
        job = {"work": "bandwidth", "bytes": size.read, "times": 2}
        reader = "NumPy" if (worker, setting.platform) == ("ours", "cpu") else program
        name = f"reading memory, {reader}"
        contenders.append(Contender(name, worker, job, "probe", one, unit="B"))
    return contenders


def _common(setting: Setting, work: str, dtype: str) -> Job:
    return {"work": work, "model": setting.model, "weights": setting.weights, "dtype": dtype}


def _generate(
    setting: Setting,
    prompts: list[list[int]],
    new: int | list[int],
    sampling: dict[str, Any],
    dtype: str,
    slots: int | None = None,
) -> Job:
    return _common(setting, "generate", dtype) | {
        "prompts": prompts,
        "samples": 1,
        "new": new,
        "sampling": sampling,
        "slots": slots or len(prompts),
    }


def _tokens(size: Size, rows: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(2, size.model.vocab_size, (rows, length)).tolist()
