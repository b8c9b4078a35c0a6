"""SPRO (arXiv 2507.01551) with the paper's policy and numbers: process rewards from the policy.

    python -m spark_jax.experiments.train_rl --config=configs/spro_eurus2_7b.py

One run, with one seed. `pipeline` makes the same run, after a stage I and a reward model that it
does not need.

Policy Eurus-2-7B-SFT. From the paper: rule-based outcome rewards, 4 samples a prompt at temperature
1, learning rate 5e-7, no KL term, groups of an accuracy in [0.2, 0.8]; the reference of the process
rewards is the initial policy. Our reading, where it is silent: beta 0.05 (PRIME's), 256 prompts a
step, responses of 3072 tokens, 240 steps, the problems of MATH.

There is no reward model, only the policy: 91 GB of float32 parameters and moments, 30 GB of
gradients, 30 GB of the initial policy, the reference. That is more than one device holds, so
everything is sharded over all devices of all processes (`mesh`).
"""

from ml_collections import ConfigDict

from spark_jax.experiments import base_config


def get_config() -> ConfigDict:
    config = base_config.base_config()
    config.run_dir = "runs/spro_eurus2_7b"
    config.model = "PRIME-RL/Eurus-2-7B-SFT"
    config.dtype = "bfloat16"
    # Parameters, moments and rows over all devices: least memory, and each layer's weights travel.
    config.mesh.fsdp = -1
    config.task = "math"
    config.decode.update(dict(max_prompt_length=1024, max_new_tokens=3072, slots=256))
    config.rl.update(
        dict(
            reward="rule_based",
            advantage="spro",
            steps=240,
            num_problems=7000,
            prompts_per_step=256,
            group_size=4,
            accumulation_steps=32,
            pack=True,
            filter_low=0.2,
            filter_high=0.8,
            evaluate_every=16,
            save_every=16,
        )
    )
    config.rl.advantage_options.update(dict(beta=0.05, outcome_weight=1.0, baseline="step"))
    config.rl.objective.update(dict(kl_coefficient=0.0, aggregation="token_mean"))
    config.rl.optimizer.update(dict(name="adamw", learning_rate=5e-7, weight_decay=0.0))
    config.evaluate.update(dict(num_problems=500, samples_per_problem=4, generator=config.model))
    config.pipeline.arms = ConfigDict(dict(spro=dict(reward="rule_based", advantage="spro")))
    return config
