"""SPRO with Qwen2.5-1.5B on GSM8K: a small relative of `spro_eurus2_7b`.

    python -m spark_jax.experiments.train_rl --config=configs/spro_qwen25_1_5b.py

One run, with one seed. Our own numbers, smaller than the paper's; its learning rate, group size,
filter and beta. Needs one device of 80 GB: 19 GB of float32 parameters and moments, 6 GB of
gradients, 6 GB of reference.
"""

from ml_collections import ConfigDict

from spark_jax.configs import spro_eurus2_7b


def get_config() -> ConfigDict:
    config = spro_eurus2_7b.get_config()
    config.run_dir = "runs/spro_qwen25_1_5b"
    config.model = "Qwen/Qwen2.5-1.5B"
    config.evaluate.generator = config.model
    config.task = "gsm8k"
    config.decode.update(dict(max_prompt_length=512, max_new_tokens=1024, slots=128))
    config.rl.update(dict(steps=200, num_problems=7000, prompts_per_step=64, accumulation_steps=8))
    return config
