"""Every stage on GSM8K with SmolLM2-135M, small enough for two cores: a smoke test, not a result.

    make smollm2
    python -m spark_jax.experiments.sft --config=configs/smollm2_word_problems.py \
        --config.run_dir=runs/smollm2_gsm8k/sft
    python -m spark_jax.experiments.generate_verifications --config=configs/smollm2_gsm8k.py \
        --config.run_dir=runs/smollm2_gsm8k/stage1
    python -m spark_jax.experiments.train_prm --config=configs/smollm2_gsm8k.py \
        --config.run_dir=runs/smollm2_gsm8k/prm
    python -m spark_jax.experiments.evaluate --config=configs/smollm2_gsm8k.py \
        --config.run_dir=runs/smollm2_gsm8k/processbench \
        --config.model=runs/smollm2_gsm8k/prm/model --config.evaluate.what=processbench
    python -m spark_jax.experiments.train_rl --config=configs/smollm2_gsm8k.py \
        --config.run_dir=runs/smollm2_gsm8k/rl

A model of this size solves almost nothing of GSM8K. The first command teaches it the formats, on
arithmetic in words. GSM8K: SPARK_JAX_DATA or the hub;
ProcessBench: SPARK_JAX_DATA alone.
"""

from ml_collections import ConfigDict

from spark_jax.configs import smollm2_word_problems

RUNS = "runs/smollm2_gsm8k"


def get_config() -> ConfigDict:
    config = smollm2_word_problems.get_config()
    config.run_dir = RUNS
    config.task = "gsm8k"
    config.model = f"{RUNS}/sft/model"
    config.generate.update(dict(num_problems=50, samples_per_problem=2, chunk_size=25))
    config.verify.update(dict(samples_per_solution=4, report_sample_counts=(1, 4)))
    config.prm.update(
        dict(data=f"{RUNS}/stage1", steps=6, batch_size=4, max_length=768, balance=False)
    )
    config.rl.update(
        dict(reward_model=f"{RUNS}/prm/model", steps=4, evaluate_every=4, save_every=4)
    )
    config.evaluate.update(
        dict(num_problems=32, samples_per_problem=1, num_solutions=32, generator=config.model)
    )
    config.evaluate.processbench.update(dict(splits=("gsm8k",), num_samples=40))
    return config
