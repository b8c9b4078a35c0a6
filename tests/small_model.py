"""The shipped base with a vocabulary that meshes divide, and small runs of it."""

import dataclasses

import jax.numpy as jnp

from spark_jax.experiments import configuration, loading

CHANGES = {
    "rl.reward": "rule_based",
    "rl.advantage": "spro",
    "rl.steps": 3,
    "rl.num_problems": 16,
    "rl.prompts_per_step": 4,
    "rl.group_size": 4,
    "rl.evaluate_every": 3,
    "rl.save_every": 1,
    "evaluate.num_problems": 4,
    "evaluate.samples_per_problem": 2,
    "decode.max_prompt_length": 32,
}


def save(path):
    """Writes the base with 64 rows of embedding; no text has the ones that are added."""
    base = loading.load_model("arithmetic_chains")
    extra = 64 - base.config.vocab_size
    embedding = jnp.pad(base.params.embedding, ((0, extra), (0, 0)))
    # Far from what the model says: a hidden state's logits are products with these rows.
    embedding = embedding.at[-extra:].set(-10 * base.params.embedding.mean(axis=0))
    config = dataclasses.replace(base.config, vocab_size=64)
    params = dataclasses.replace(base.params, embedding=embedding)
    loading.save_model(path, base._replace(params=params, config=config))


def config(model, **changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    both = CHANGES | {"model": str(model)} | changes
    return configuration.changed(configuration.load_config("configs/demo.py"), both)
