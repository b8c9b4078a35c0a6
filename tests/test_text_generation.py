"""Where texts meet the decoder: prompts that a model cannot read."""

import dataclasses

import pytest

from spark_jax.data.records import SamplingSettings
from spark_jax.experiments import configuration, loading
from spark_jax.text_generation import (
    DecodeOptions,
    encode,
    longest_prompt,
    sample_rollout,
    seed_key,
    text_sampler,
)

SETTINGS = SamplingSettings(temperature=1.0, max_new_tokens=8)


@pytest.fixture(scope="module")
def model():
    return loading.text_model(*loading.load_model("arithmetic_chains"), name="base")


@pytest.fixture(scope="module")
def prompts(model):
    """A short one, a long one and a short one, and the length of the short ones."""
    task = loading.load_task(configuration.load_config("configs/demo.py"))
    short = task.text_format.solve_prompt(task.problems(1, 0, "train")[0])
    return [short, " ".join([short] * 3), short], len(encode(model.tokenizer, [short])[0])


def sampled(model, prompts, options=None):
    sample = text_sampler(model, options)
    return sample(prompts, samples_per_prompt=2, settings=SETTINGS, seed=3)


@pytest.mark.parametrize(
    "by", ["max_prompt_length", pytest.param("positions", marks=pytest.mark.slow)]
)
def test_a_prompt_that_does_not_fit_gets_no_text_and_the_others_are_not_touched(
    model, prompts, by, caplog
):
    texts, length = prompts
    options = DecodeOptions(max_prompt_length=length if by == "max_prompt_length" else None)
    if by == "positions":
        shorter = dataclasses.replace(model.config, max_positions=length + SETTINGS.max_new_tokens)
        model = dataclasses.replace(model, config=shorter)
    assert longest_prompt(model.config, SETTINGS.max_new_tokens, options) == length
    first, none, last = sampled(model, texts, options)
    assert [(said.text, said.token_ids, said.finished) for said in none] == [("", (), False)] * 2
    assert [first, last] == sampled(model, [texts[0], texts[2]], options)
    assert all(said.token_ids for said in first + last)
    assert f"1 of 3 prompts have more than {length} tokens" in caplog.text


def test_nothing_is_decoded_where_no_prompt_fits(model, prompts, monkeypatch):
    monkeypatch.setattr("spark_jax.text_generation.sample_rollout", None)
    (none,) = sampled(model, [prompts[0][1]], DecodeOptions(max_prompt_length=prompts[1]))
    assert [said.text for said in none] == ["", ""]


def test_prompts_are_not_padded_beyond_what_the_model_has_positions_for(model, prompts):
    texts, length = prompts
    shorter = dataclasses.replace(model.config, max_positions=length + SETTINGS.max_new_tokens)
    assert longest_prompt(shorter, SETTINGS.max_new_tokens, DecodeOptions()) == length
    rollout = sample_rollout(
        dataclasses.replace(model, config=shorter),
        texts[:1],
        samples_per_prompt=2,
        settings=SETTINGS,
        key=seed_key(3),
        options=DecodeOptions(max_prompt_length=10 * length),
    )
    assert rollout.prompt_tokens.shape == (1, length)
