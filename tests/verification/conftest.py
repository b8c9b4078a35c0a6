"""A reproducible stand-in for a model that speaks the canonical format."""

import dataclasses
import hashlib
import random
import re

import pytest

from spark_jax.verification.parse import format_verification


@dataclasses.dataclass(frozen=True)
class Text:
    text: str
    finished: bool = True


class FakeModel:
    """Texts that depend on prompt, sample number, settings and seed alone; keeps what it was asked.

    One in four solutions has no steps and one in six verifications is cut short.
    """

    def __init__(self, die_after=None):
        self.calls = []
        self.die_after = die_after

    def __call__(self, prompts, *, samples_per_prompt, settings, seed):
        if self.die_after is not None and len(self.calls) >= self.die_after:
            raise KeyboardInterrupt
        self.calls.append((tuple(prompts), samples_per_prompt, settings, seed))
        return [
            [Text(self.write(prompt, i, settings, seed)) for i in range(samples_per_prompt)]
            for prompt in prompts
        ]

    def write(self, prompt, i, settings, seed):
        seed = 0 if settings.greedy else seed
        content = repr((prompt, i, settings, seed)).encode()
        rng = random.Random(hashlib.sha256(content).digest())
        if "critique the verification" in prompt:
            return f"Step 1 is fine. ({rng.random():.3f})"
        steps = max((int(n) for n in re.findall(r"<step>Step (\d+):", prompt)), default=0)
        if not steps:
            return self.solution(rng)
        verdicts = [rng.random() < 0.6 for _ in range(steps)]
        analyses = [(f"title {k}", f"thought {rng.random():.3f}") for k in range(steps)]
        text = format_verification(analyses, verdicts, rng.random() < 0.5)
        if rng.random() < 1 / 6:
            text = text[: len(text) // 2]
        if "Critique:" in prompt and rng.random() < 0.3:
            text = text.replace("thought", "as the critique says")
        return text

    def solution(self, rng):
        if rng.random() < 1 / 4:
            return "I do not know."
        steps = "\n".join(f"<step>{rng.randrange(99)} é</step>" for _ in range(rng.randint(1, 4)))
        return f"<think>\n{steps}\n</think>\n<answer> \\boxed{{{rng.randrange(9)}}} </answer>"


@pytest.fixture
def fake_model():
    return FakeModel
