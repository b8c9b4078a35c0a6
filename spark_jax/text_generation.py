"""The only place where tokenizers meet the decoder: prompts in as text, samples out as text."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from spark_jax import decoding
from spark_jax.data.formats import Sample
from spark_jax.data.records import SamplingSettings
from spark_jax.models import transformer
from spark_jax.models.config import ModelConfig
from spark_jax.steps import StepSpan, step_ids, token_offsets

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A model with its words. `params` are in the decoding layout (`decoding.layout`)."""

    params: transformer.Params
    config: ModelConfig
    tokenizer: Any  # Hugging Face API
    stop_ids: tuple[int, ...]  # each ends a response
    name: str


@dataclasses.dataclass(frozen=True)
class SampledText:
    """One sample. `text` is without the stop token, `token_ids` with it; `finished` says that the
    sample ended with a stop token rather than at the length limit."""

    text: str
    token_ids: tuple[int, ...]
    finished: bool


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """Sizes that decide speed and memory, not results: see `decoding.generate`."""

    max_prompt_length: int | None = None
    slots: int | None = None


class DecodeStatistics:
    """How busy the decoder was over several rollouts: means over its steps."""

    def __init__(self) -> None:
        self._steps = 0
        self._sums = dict.fromkeys(("slot_occupancy", "queue_occupancy", "shared_prefix"), 0.0)

    def add(self, rollout: decoding.Rollout) -> None:
        steps = int(rollout.decode_steps)
        self._steps += steps
        for name in self._sums:
            self._sums[name] += steps * float(getattr(rollout, name))

    def means(self) -> dict[str, float]:
        """As `Rollout` has them; {} where nothing was decoded."""
        if not self._steps:
            return {}
        means = {name: total / self._steps for name, total in self._sums.items()}
        return {"decode_steps": self._steps} | means


def text_sampler(
    model: TextModel,
    options: DecodeOptions | None = None,
    statistics: DecodeStatistics | None = None,
) -> Sample:
    """The function through which a stage sees a model: texts and settings in, samples out.

    A prompt that is too long for the model (`longest_prompt`) gets samples without a text, not
    finished, so that no run dies of one; they are counted in the log. `statistics` sees all that is
    decoded.
    """
    options = options or DecodeOptions()

    def sample(
        prompts: Sequence[str],
        *,
        samples_per_prompt: int,
        settings: SamplingSettings,
        seed: int,
    ) -> list[list[SampledText]]:
        limit = longest_prompt(model.config, settings.max_new_tokens, options)
        lengths = [len(ids) for ids in encode(model.tokenizer, prompts)]
        asked = [row for row, length in enumerate(lengths) if length <= limit]
        if len(asked) < len(prompts):
            logger.warning(
                "%s: %d of %d prompts have more than %d tokens (up to %d); nothing is sampled",
                model.name, len(prompts) - len(asked), len(prompts), limit, max(lengths),
            )  # fmt: skip
        groups = [[SampledText("", (), False)] * samples_per_prompt for _ in prompts]
        if not asked:
            return groups
        rollout = sample_rollout(
            model,
            [prompts[row] for row in asked],
            samples_per_prompt=samples_per_prompt,
            settings=settings,
            key=seed_key(seed),
            options=options,
        )
        if statistics is not None:
            statistics.add(rollout)
        samples = iter(rollout_texts(rollout, model.tokenizer))
        for row in asked:
            groups[row] = [next(samples) for _ in range(samples_per_prompt)]
        return groups

    return sample


def longest_prompt(
    config: ModelConfig, max_new_tokens: int, options: DecodeOptions | None = None
) -> int:
    """How many tokens a prompt may have: the response needs its positions too."""
    limit = config.max_positions - max_new_tokens
    given = options.max_prompt_length if options else None
    return limit if given is None else min(limit, given)


def sample_rollout(
    model: TextModel,
    prompts: Sequence[str],
    *,
    samples_per_prompt: int,
    settings: SamplingSettings,
    key: Array,
    options: DecodeOptions | None = None,
) -> decoding.Rollout:
    """Encodes the prompts as they stand (no special tokens added) and decodes.

    A `max_prompt_length` beyond what the model has positions for is cut to that.

    Raises:
      ValueError: what `decoding.generate` refuses, with the prompt's index.
    """
    sizes = dataclasses.asdict(options or DecodeOptions())
    sizes["max_prompt_length"] = _padded_length(model.config, settings.max_new_tokens, options)
    return decoding.generate(
        model.params,
        model.config,
        encode(model.tokenizer, prompts),
        key=key,
        sampling=decoding.Sampling(
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            greedy=settings.greedy,
            stop_ids=model.stop_ids,
        ),
        samples_per_prompt=samples_per_prompt,
        max_new_tokens=settings.max_new_tokens,
        **sizes,
    )


def rollout_again(
    config: ModelConfig,
    tokenizer: Any,
    prompts: Sequence[str],
    samples: Mapping[str, Any],
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    options: DecodeOptions | None = None,
) -> decoding.Rollout:
    """What `sample_rollout` gave, from its saved samples (`decoding.samples_of`), bit for bit."""
    length = _padded_length(config, max_new_tokens, options)
    ids = encode(tokenizer, prompts)
    return decoding.rollout_of(samples, ids, samples_per_prompt, length)


def _padded_length(
    config: ModelConfig, max_new_tokens: int, options: DecodeOptions | None
) -> int | None:
    """The prompt length that is asked for, cut to what the model has positions for."""
    given = options.max_prompt_length if options else None
    limit = longest_prompt(config, max_new_tokens, options)
    return limit if given is not None and limit > 0 else given


def rollout_texts(rollout: decoding.Rollout, tokenizer: Any) -> list[SampledText]:
    """The B samples of a rollout as text, group-major."""
    tokens, mask, finished = jax.device_get((rollout.tokens, rollout.mask, rollout.finished))
    ids = [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
    bodies = [row[:-1] if done else row for row, done in zip(ids, finished, strict=True)]
    texts = tokenizer.batch_decode(bodies, skip_special_tokens=False)
    return [
        SampledText(text, tuple(row), bool(done))
        for text, row, done in zip(texts, ids, finished, strict=True)
    ]


def token_step_ids(
    split_steps: Callable[[str], list[StepSpan]],
    tokenizer: Any,
    samples: Sequence[SampledText],
    num_tokens: int,
    num_steps: int,
) -> np.ndarray:
    """[B, T]: which of its text's first `num_steps` steps each sampled token belongs to, −1 outside
    any, as at the stop token. T is `num_tokens`."""
    bodies = [s.token_ids[:-1] if s.finished else s.token_ids for s in samples]
    texts, offsets = zip(*(token_offsets(tokenizer, body) for body in bodies), strict=True)
    spans = [split_steps(text)[:num_steps] for text in texts]
    return step_ids(spans, offsets, num_tokens)


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, nothing added."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def seed_key(seed: int) -> Array:
    """A JAX key from an integer seed of any size."""
    low, high = np.random.SeedSequence(seed).generate_state(2)
    return jax.random.fold_in(jax.random.key(low), high)
