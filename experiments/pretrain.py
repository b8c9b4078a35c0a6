"""Makes the embedded world's base model: generator, verifier and start of every reward model.

    python -m spark_jax.experiments.pretrain --output=spark_jax/tasks/arithmetic_chains/base

About five minutes on two busy cores (300 CPU-seconds). The same seed gives the same checkpoint,
bit for bit, on one platform. Seed 0, sampled at temperature 1 on 3 · 256 problems it was not
trained on: accuracy .49 [.47-.53], verifications that can be read .99, wrong steps detected .77
[.74-.80], right steps doubted .19 [.17-.20] (means, and ranges over three sets of problems).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from spark_jax.data.records import SamplingSettings, Verification
from spark_jax.experiments import loading
from spark_jax.models import checkpoints, transformer
from spark_jax.models.config import ModelConfig
from spark_jax.tasks.arithmetic_chains import corpus, world
from spark_jax.tasks.arithmetic_chains.format import FORMAT
from spark_jax.tasks.arithmetic_chains.tokenizer import load_tokenizer
from spark_jax.text_generation import text_sampler
from spark_jax.training import optimizer, sft, state

LEAST_DETECTION = 0.6  # voting amplifies a verifier that sees less than half of the wrong steps


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
    """Shape of the base and how long it learns."""

    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    mlp_width: int = 256
    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 7e-3
    warmup_steps: int = 50
    clip_norm: float = 1.0


OnProgress = Callable[[int, dict[str, float]], None]  # (updates done, metrics)


def run(
    path: str | Path,
    *,
    seed: int,
    settings: PretrainSettings | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, float]:
    """Pretrains, measures (see `measure`) and writes the checkpoint, tokenizer included, to `path`.

    Logs a warning where the verifier detects too few wrong steps for voting to help.
    """
    params, config = pretrain(settings or PretrainSettings(), seed=seed, on_progress=on_progress)
    measured = measure(params, config, seed=seed)
    detected = measured["wrong_steps_detected"]
    if detected < LEAST_DETECTION:
        logging.warning(
            "the verifier detects %.2f of the wrong steps, less than %.2f: voting over its "
            "verifications will not help; pretrain for longer",
            detected,
            LEAST_DETECTION,
        )
    checkpoints.save_hf(path, params, config, load_tokenizer())
    return measured


def pretrain(
    settings: PretrainSettings, *, seed: int, on_progress: OnProgress | None = None
) -> tuple[transformer.Params, ModelConfig]:
    """Learns the corpus by next-token cross-entropy on all that generator and verifier say.

    AdamW, cosine from `learning_rate` to 0. `on_progress` is called every 50 updates with `loss`
    (nats per target token) and `grad_norm`.
    """
    config = model_config(settings)
    adamw = optimizer.make(
        {
            "name": "adamw",
            "learning_rate": settings.learning_rate,
            "schedule": "cosine",
            "warmup_steps": settings.warmup_steps,
            "total_steps": settings.steps,
            "clip_norm": settings.clip_norm,
        }
    )
    key = jax.random.key(seed)
    train = state.create(transformer.init(config, key), adamw, key)
    chunk = settings.batch_size * max(corpus.ROW_LENGTHS.values())  # a small vocabulary: one block
    step = functools.partial(sft.sft_step, model_config=config, optimizer=adamw, chunk=chunk)
    update = jax.jit(step, donate_argnums=0)
    for i in range(settings.steps):
        batch = corpus.pretraining_batch(seed, i, settings.batch_size)
        arrays = sft.SFTBatch(jnp.asarray(batch["tokens"]), jnp.asarray(batch["loss_mask"]))
        train, metrics = update(train, arrays)
        if on_progress is not None and (i + 1) % 50 == 0:
            on_progress(i + 1, {name: float(np.asarray(x)) for name, x in metrics.items()})
    return train.params, config


def measure(
    params: transformer.Params, config: ModelConfig, *, seed: int, num_problems: int = 256
) -> dict[str, float]:
    """What the base does when sampled at temperature 1, on problems it was not trained on.

    Returns:
        `accuracy` of its solutions and, of its verifications of them, one each: `valid`, the share
        that can be read; `wrong_steps_detected` and `right_steps_doubted`, the shares of wrong and
        of right steps that are judged incorrect.
    """
    tokenizer = load_tokenizer()
    sample = text_sampler(
        loading.text_model(params, config, tokenizer, (tokenizer.eos_token_id,), name="base")
    )
    settings = SamplingSettings(max_new_tokens=64)
    problems = world.problems(num_problems, seed, "eval")
    prompts = [FORMAT.solve_prompt(problem) for problem in problems]
    drawn = sample(prompts, samples_per_prompt=1, settings=settings, seed=seed)
    solutions = [texts[0].text for texts in drawn]
    prompts = [FORMAT.verify_prompt(p, text, None) for p, text in zip(problems, solutions)]
    drawn = sample(prompts, samples_per_prompt=1, settings=settings, seed=seed + 1)

    labels = [world.step_labels(p, text) for p, text in zip(problems, solutions)]
    read = [FORMAT.parse_verification(texts[0].text, len(of)) for texts, of in zip(drawn, labels)]
    judged = [
        (label, verdict)
        for step_labels, verification in zip(labels, read)
        if isinstance(verification, Verification)
        for label, verdict in zip(step_labels, verification.verdicts)
    ]
    return {
        "accuracy": _mean(world.is_correct(p, text) for p, text in zip(problems, solutions)),
        "valid": _mean(isinstance(verification, Verification) for verification in read),
        "wrong_steps_detected": _mean(not verdict for label, verdict in judged if not label),
        "right_steps_doubted": _mean(not verdict for label, verdict in judged if label),
    }


def model_config(settings: PretrainSettings) -> ModelConfig:
    """The base's shape: a Llama with the world's vocabulary and tied embeddings."""
    return ModelConfig(
        vocab_size=len(world.VOCABULARY),
        width=settings.width,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        num_kv_heads=settings.num_heads,
        head_dim=settings.width // settings.num_heads,
        mlp_width=settings.mlp_width,
        max_positions=256,
        remat=False,
    )


def _mean(outcomes: Iterable[bool]) -> float:
    """NaN where there is nothing to average."""
    values = list(outcomes)
    return sum(values) / len(values) if values else float("nan")


def _print_progress(step: int, metrics: dict[str, float]) -> None:
    print(f"{step:5d} updates: {metrics['loss']:.3f} nats per token", flush=True)


def main(_: Sequence[str]) -> None:
    settings = PretrainSettings(steps=_STEPS.value)
    measured = run(_OUTPUT.value, seed=_SEED.value, settings=settings, on_progress=_print_progress)
    print("   ".join(f"{name} {value:.3f}" for name, value in measured.items()))
    print(f"written to {_OUTPUT.value}")


if __name__ == "__main__":
    _OUTPUT = flags.DEFINE_string("output", None, "Folder of the checkpoint.", required=True)
    _SEED = flags.DEFINE_integer("seed", 0, "Seed of parameters and corpus.")
    _STEPS = flags.DEFINE_integer("steps", PretrainSettings.steps, "Updates.")
    app.run(main)
