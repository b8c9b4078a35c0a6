"""SPARK (arXiv 2512.03244) with the paper's models and numbers.

    python -m spark_jax.experiments.pipeline --config=configs/spark_qwen25_math_7b.py

One run of the method, with one seed: stage I by step consistency, one reward model of its
verifications (and what that starts from, evaluated), one policy by the process-aware outcome reward
and GRPO.

Generator Qwen2.5-14B-Instruct, verifier Qwen3-32B, reward model from Qwen2.5-14B-Instruct, policy
Qwen2.5-Math-7B. From the paper: 8 solutions at temperature 0.7, 16 verifications at 0.8 and top-p
0.95, groups of 16, batches of 256 prompts, learning rate 1e-6 with 1 % warm-up, KL 0.001 (k3) to
the initial policy, prompts and responses of 2048 tokens. Our reading, where it is silent: the
number of problems, the fine-tuning of the reward model, 400 RL steps, AdamW's weight decay.

The verifier alone is 64 GB in bfloat16, and the policy with its moments 91 GB. That is more than
one device holds, so everything is sharded over all devices of all processes (`mesh`).
"""

from ml_collections import ConfigDict

from spark_jax.experiments import base_config


def get_config() -> ConfigDict:
    config = base_config.base_config()
    config.run_dir = "runs/spark_qwen25_math_7b"
    config.model = "Qwen/Qwen2.5-Math-7B"
    config.dtype = "bfloat16"
    # Parameters, moments and rows over all devices: least memory, and each layer's weights travel.
    # docs/pods.md says which mesh suits which slice, such as --config.mesh.tensor=2.
    config.mesh.fsdp = -1
    config.task = "math"
    config.chat.arguments = ConfigDict({"enable_thinking": False})  # Qwen3 alone reads it
    config.decode.update(dict(max_prompt_length=4096, max_new_tokens=2048, slots=256))

    config.generate.update(
        dict(
            model="Qwen/Qwen2.5-14B-Instruct",
            num_problems=7000,
            samples_per_problem=8,
            temperature=0.7,
            chunk_size=256,
        )
    )
    config.verify.update(
        dict(
            model="Qwen/Qwen3-32B",
            methods=("step_consistency",),
            samples_per_solution=16,
            temperature=0.8,
            top_p=0.95,
            chunk_size=64,
        )
    )
    config.prm.update(
        dict(
            model="Qwen/Qwen2.5-14B-Instruct",
            kind="prm_cot",
            method="step_consistency",
            steps=1000,
            batch_size=64,
            accumulation_steps=1,
            max_length=6144,
            pack=True,
        )
    )
    config.prm.optimizer.update(dict(learning_rate=1e-5, schedule="cosine", warmup_steps=30))

    config.rl.update(
        dict(
            reward="process_aware_outcome",
            advantage="grpo",
            steps=400,
            num_problems=7000,
            prompts_per_step=256,
            group_size=16,
            accumulation_steps=64,
            pack=True,
            evaluate_every=20,
            save_every=20,
        )
    )
    config.rl.objective.update(dict(kl_coefficient=0.001, kl_estimator="k3"))
    config.rl.optimizer.update(
        dict(name="adamw", learning_rate=1e-6, warmup_steps=4, weight_decay=0.01)
    )
    config.evaluate.update(
        dict(num_problems=500, samples_per_problem=4, generator="Qwen/Qwen2.5-14B-Instruct")
    )
    config.pipeline.arms = ConfigDict(
        dict(spark=dict(reward="process_aware_outcome", advantage="grpo"))
    )
    return config
