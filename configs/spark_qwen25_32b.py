"""SPARK with Qwen2.5-32B throughout, at the paper's lengths.

    python -m spark_jax.experiments.pipeline --config=configs/spark_qwen25_32b.py

As `spark_qwen25_math_7b`, but Qwen2.5-32B-Instruct generates, verifies and becomes the reward
model, and Qwen2.5-32B is the policy. The policy's float32 parameters and moments are 393 GB:
docs/pods.md says which slices hold them.
"""

from ml_collections import ConfigDict

from spark_jax.configs import spark_qwen25_math_7b


def get_config() -> ConfigDict:
    config = spark_qwen25_math_7b.get_config()
    config.run_dir = "runs/spark_qwen25_32b"
    config.model = "Qwen/Qwen2.5-32B"
    for section in (config.generate, config.verify, config.prm):
        section.model = "Qwen/Qwen2.5-32B-Instruct"
    config.evaluate.generator = "Qwen/Qwen2.5-32B-Instruct"
    return config
