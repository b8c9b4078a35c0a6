"""SPARK's three stages and SPRO in the embedded world of arithmetic chains, on a laptop.

    make demo
    python -m spark_jax.experiments.pipeline --config=configs/demo.py

Single fields from the command line, for instance the half-discounted selective advantage:

    python -m spark_jax.experiments.train_rl --config=configs/demo.py \
        --config.run_dir=runs/selective --config.rl.advantage=selective \
        --config.rl.advantage_options.discount=0.5 \
        --config.rl.reward_model=runs/demo/seed0/prm_step_consistency/model
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def optimizer(**fields: object) -> ConfigDict:
    """The fields of an optimiser; None leaves optax's default."""
    none = dict(
        warmup_steps=placeholder(int),
        schedule=placeholder(str),  # constant, cosine, linear
        end_fraction=placeholder(float),
        weight_decay=placeholder(float),
        b1=placeholder(float),
        b2=placeholder(float),
        eps=placeholder(float),
    )
    return ConfigDict(none | dict(clip_norm=1.0) | fields)


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.run_dir = "runs/demo"
    config.seed = 0
    config.task = "arithmetic_chains"
    # A checkpoint directory, or the name of a task for the base that ships with it. The base is
    # generator, verifier, start of the reward models and start of the policy.
    config.model = "arithmetic_chains"
    config.pretrain = False  # True makes the base afresh first, in run_dir/base
    config.quick = False  # True: one seed, fewer problems, fewer steps, in run_dir-quick
    config.decode = ConfigDict(
        dict(max_prompt_length=placeholder(int), max_new_tokens=52, slots=placeholder(int))
    )

    # Stage I: solutions, verifications, aggregation.
    config.generate = ConfigDict(
        dict(num_problems=128, samples_per_problem=8, temperature=1.0, top_p=1.0, chunk_size=64)
    )
    config.verify = ConfigDict(
        dict(
            methods=("single", "outcome_consistency", "step_consistency"),
            samples_per_solution=16,
            report_sample_counts=(1, 4, 16),
            temperature=0.8,
            top_p=0.95,
            chunk_size=16,
        )
    )

    # Stage II: a generative reward model from one method's verifications.
    config.prm = ConfigDict(
        dict(
            data="",  # folder of a stage I run
            kind="prm_cot",  # orm, prm, prm_cot
            method="step_consistency",
            balance=False,
            steps=80,
            batch_size=64,
            accumulation_steps=1,
            max_length=128,
            optimizer=optimizer(name="adamw", learning_rate=1e-3, warmup_steps=4),
        )
    )

    # Stage III: RL. Rewards and advantages by name; docs/method.md lists them.
    config.rl = ConfigDict(
        dict(
            reward="process_aware_outcome",
            advantage="grpo",
            # None leaves the advantage's own default; an option that it does not have is refused.
            advantage_options=dict(
                baseline=placeholder(str),
                beta=placeholder(float),
                discount=placeholder(float),
                granularity=placeholder(str),
                group_baseline=placeholder(bool),
                normalize_std=placeholder(bool),
                outcome_weight=placeholder(float),
                process_weight=placeholder(float),
            ),
            reward_model="",  # folder of a reward model's checkpoint
            reference_model="",  # π_ref of process rewards and KL; "" is the initial policy
            format_checks=("one_boxed", "one_answer_block", "nothing_after_answer"),
            steps=20,
            num_problems=4096,
            prompts_per_step=32,
            group_size=8,
            temperature=1.0,
            minibatches=1,  # updates per pass over a rollout
            epochs=1,  # passes over a rollout
            accumulation_steps=1,
            # Train on groups whose mean reward lies in [low, high] and whose rewards differ: (0, 1)
            # is DAPO's dynamic sampling, (0.2, 0.8) SPRO's filter. None trains on all.
            filter_low=placeholder(float),
            filter_high=placeholder(float),
            objective=dict(
                clip_low=0.2,
                clip_high=0.2,
                aggregation="token_mean",
                importance="token",
                kl_coefficient=0.0,
                kl_estimator="k3",
                entropy_coefficient=0.0,
            ),
            optimizer=optimizer(name="adam", learning_rate=5e-4),
            evaluate_every=5,
            save_every=5,
        )
    )
    config.evaluate = ConfigDict(
        dict(
            what="policy",  # or reward_model
            num_problems=256,
            samples_per_problem=4,
            temperature=1.0,
            votes=1,  # above 1, also reward models by majority over so many sampled judgements
            num_solutions=250,  # held-out solutions that reward models are tried on,
            generator="arithmetic_chains",  # and the model that writes them
        )
    )

    # The sequence of runs of `pipeline`.
    config.pipeline = ConfigDict(
        dict(
            seeds=(0, 1, 2),
            workers=2,
            arms=ConfigDict(
                {
                    "prm_grpo": dict(reward="process_aware_outcome", advantage="grpo"),
                    "prm_spro": dict(reward="process_aware_outcome", advantage="spro"),
                    "rule_based": dict(reward="rule_based", advantage="grpo"),
                    "majority_vote": dict(reward="majority_vote", advantage="grpo"),
                    "random": dict(reward="random", advantage="grpo"),
                }
            ),
        )
    )
    return config
