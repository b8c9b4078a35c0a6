"""SPARK with Qwen2.5-0.5B on GSM8K: the smallest relative of `spark_qwen25_math_7b`.

    python -m spark_jax.experiments.pipeline --config=configs/spark_qwen25_0_5b.py

One model family throughout: Qwen2.5-0.5B-Instruct generates, verifies and becomes the reward model,
Qwen2.5-0.5B is the policy. Our own numbers. Needs one device of 24 GB: the policy's float32
parameters and moments are 6 GB, its gradients 2 GB, the initial policy, which is kept, 2 GB.
"""

from ml_collections import ConfigDict

from spark_jax.configs import spark_qwen25_math_7b


def get_config() -> ConfigDict:
    config = spark_qwen25_math_7b.get_config()
    config.run_dir = "runs/spark_qwen25_0_5b"
    config.model = "Qwen/Qwen2.5-0.5B"
    small = "Qwen/Qwen2.5-0.5B-Instruct"
    for section in (config.generate, config.verify, config.prm):
        section.model = small
    config.evaluate.generator = small
    config.task = "gsm8k"
    config.decode.update(dict(max_prompt_length=2048, max_new_tokens=1024, slots=64))
    config.generate.update(dict(num_problems=1000, chunk_size=64))
    config.prm.update(dict(steps=300, batch_size=32, accumulation_steps=4, max_length=3072))
    config.rl.update(
        dict(steps=200, num_problems=7000, prompts_per_step=64, group_size=8, accumulation_steps=16)
    )
    return config
