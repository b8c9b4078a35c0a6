"""SPARK's three stages and SPRO in the embedded world of arithmetic chains, on a laptop.

    make demo
    python -m spark_jax.experiments.pipeline --config=configs/demo.py

Single fields from the command line, for instance the half-discounted selective advantage:

    python -m spark_jax.experiments.train_rl --config=configs/demo.py \
        --config.run_dir=runs/selective --config.rl.advantage=selective \
        --config.rl.advantage_options.discount=0.5 \
        --config.rl.reward_model=runs/demo/seed0/prm_step_consistency/model

`experiments/base_config.py` has all fields, with what they mean.
"""

from ml_collections import ConfigDict

from spark_jax.experiments import base_config


def get_config() -> ConfigDict:
    config = base_config.base_config()
    config.update(dict(run_dir="runs/demo", task="arithmetic_chains", model="arithmetic_chains"))
    config.decode.max_new_tokens = 52

    config.generate.update(dict(num_problems=128, samples_per_problem=8, chunk_size=64))
    config.verify.methods = ("single", "outcome_consistency", "step_consistency")
    config.prm.update(dict(steps=80, batch_size=64, max_length=128))
    config.prm.optimizer.update(dict(name="adamw", learning_rate=1e-3, warmup_steps=4))

    config.rl.update(dict(steps=20, num_problems=4096, prompts_per_step=32, group_size=8))
    config.rl.optimizer.update(dict(name="adam", learning_rate=5e-4))
    config.evaluate.update(
        dict(num_problems=256, samples_per_problem=4, generator="arithmetic_chains")
    )

    config.pipeline.update(dict(seeds=(0, 1, 2), workers=2))
    config.pipeline.arms = ConfigDict(
        {
            "prm_grpo": dict(reward="process_aware_outcome", advantage="grpo"),
            "prm_spro": dict(reward="process_aware_outcome", advantage="spro"),
            "rule_based": dict(reward="rule_based", advantage="grpo"),
            "majority_vote": dict(reward="majority_vote", advantage="grpo"),
            "random": dict(reward="random", advantage="grpo"),
        }
    )
    return config
