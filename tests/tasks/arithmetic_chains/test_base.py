"""The shipped base: it loads, and it is the noisy generator and verifier that it should be."""

from __future__ import annotations

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark_jax.experiments import pretrain
from spark_jax.scoring import token_logprobs
from spark_jax.tasks.arithmetic_chains import base, corpus, world
from spark_jax.training.sft import SFTBatch, target_mask


@pytest.fixture(scope="module")
def shipped():
    return base.load()


def test_a_missing_base_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"experiments.pretrain --output={tmp_path}"):
        base.load(tmp_path)


def test_a_base_of_another_vocabulary_is_refused(tmp_path, shipped):
    for file in base.PATH.iterdir():
        shutil.copy(file, tmp_path)
    config = (tmp_path / "config.json").read_text()
    size = f'"vocab_size": {shipped[1].vocab_size}'
    assert size in config
    (tmp_path / "config.json").write_text(config.replace(size, '"vocab_size": 12'))
    with pytest.raises(ValueError, match="embed_tokens"):
        base.load(tmp_path)


def test_the_shipped_base_has_learnt_the_corpus(shipped):
    """Nats per target token, on rows that no run has read."""
    params, config, _ = shipped
    score = jax.jit(functools.partial(token_logprobs, config=config))
    longest = max(corpus.ROW_LENGTHS.values())  # one program for all kinds
    for kind, most in {"plain": 0.145, "guided": 0.14, "criticised": 0.11}.items():
        batch = corpus.pretraining_batch(10**6, 0, 128, cycle=(kind,))
        padding = ((0, 0), (0, longest - corpus.ROW_LENGTHS[kind]))  # its tokens are no targets
        tokens, loss_mask = (np.pad(batch[name], padding) for name in ("tokens", "loss_mask"))
        targets = target_mask(SFTBatch(tokens, loss_mask))
        assert -np.mean(np.asarray(score(params, tokens=jnp.asarray(tokens)))[targets]) < most


def test_the_shipped_base_detects_enough_wrong_steps_for_a_vote(shipped):
    params, config, _ = shipped
    measured = pretrain.measure(params, config, seed=1, num_problems=96)
    assert measured["wrong_steps_detected"] >= pretrain.LEAST_DETECTION
    assert measured["right_steps_doubted"] < 0.3
    assert measured["valid"] > 0.95
    assert 0.35 < measured["accuracy"] < 0.65


@pytest.mark.slow
def test_pretraining_learns_and_gives_the_same_parameters_again():
    settings = pretrain.PretrainSettings(
        width=16, num_layers=1, mlp_width=32, steps=50, warmup_steps=5, batch_size=8
    )
    losses: list[float] = []
    runs = [
        pretrain.pretrain(settings, seed=0, on_progress=lambda _, m: losses.append(m["loss"]))[0]
        for _ in range(2)
    ]
    assert losses[0] == losses[1] < np.log(len(world.VOCABULARY)) - 1  # a nat below uniform
    assert all(map(np.array_equal, *map(jax.tree.leaves, runs)))
