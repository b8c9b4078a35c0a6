"""Shapes of what is measured: on CPU, tiny ones to see that all runs, and on accelerators."""

from __future__ import annotations

import dataclasses

from spark_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes of all jobs; lengths in tokens."""

    model: ModelConfig
    batch: int  # rows decoded at once, and rows of a train step
    prompt: int
    new: int
    large_batch: int
    prefilled: int  # prompt length where prefill is what is measured
    problems: int  # of the stage-I load, each with
    samples: int  # verifications
    template: int  # common to all of its prompts
    shared: int  # length of its prompts
    limit: int  # of its answers
    stop_every: int  # one in so many token ids ends an answer
    slots: int  # rows at a time where rows have to wait
    page: int  # of transformers' paged cache
    requests: int  # for continuous batching, each with its own length from the range below
    shortest: int
    scored: int  # tokens that meet the vocabulary
    product: int  # side of the matrices whose product gives the roofline
    read: int  # bytes whose sum gives it
    trains: bool = True  # whether a train state fits one device


# Tunix 0.1.7 computes rotary angles with this base whatever its configuration says.
ROPE_THETA = 1_000_000.0

CPU = Size(
    model=ModelConfig(  # SmolLM2-135M
        vocab_size=49152,
        width=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_width=1536,
        rope_theta=ROPE_THETA,
    ),
    batch=16,
    prompt=64,
    new=128,
    large_batch=64,
    prefilled=512,
    problems=8,
    samples=16,
    template=384,
    shared=512,
    limit=256,
    stop_every=128,
    slots=32,
    page=128,
    requests=48,
    shortest=32,
    scored=4096,
    product=2048,
    read=1 << 29,
)
QUICK = Size(
    model=ModelConfig(
        vocab_size=64,
        width=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_width=24,
        rope_theta=ROPE_THETA,
    ),
    batch=4,
    prompt=8,
    new=4,
    large_batch=8,
    prefilled=16,
    problems=2,
    samples=4,
    template=12,
    shared=16,
    limit=8,
    stop_every=8,
    slots=4,
    page=8,
    requests=6,
    shortest=2,
    scored=64,
    product=64,
    read=1 << 16,
)
ACCELERATOR = dataclasses.replace(
    CPU,
    model=ModelConfig(  # Qwen2.5-1.5B
        vocab_size=151936,
        width=1536,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        mlp_width=8960,
        qkv_bias=True,
        rope_theta=ROPE_THETA,
    ),
    batch=64,
    prompt=256,
    new=256,
    large_batch=256,
    prefilled=2048,
    problems=32,
    slots=256,
    limit=1024,
    stop_every=512,
    requests=1024,
    product=8192,
    read=1 << 33,
)
QWEN_7B = dataclasses.replace(
    ACCELERATOR,
    model=ModelConfig(
        vocab_size=152064,
        width=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        mlp_width=18944,
        tied_embeddings=False,
        qkv_bias=True,
        rope_theta=ROPE_THETA,
    ),
    large_batch=128,
    trains=False,
)
