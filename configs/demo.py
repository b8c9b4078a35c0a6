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
        accumulator_dtype=placeholder(str),  # of the first moment; bfloat16 halves its memory
    )
    return ConfigDict(none | dict(clip_norm=1.0) | fields)


def task_options() -> ConfigDict:
    """Where problems come from and how they speak: see `spark_jax.tasks.TaskOptions`. None
    leaves the task's own choice; an option that a task does not read is refused."""
    return ConfigDict(
        dict(
            data=placeholder(str),  # a file, a folder or a hub id with the problems
            eval_data=placeholder(str),  # the same for held-out problems
            eval_fraction=placeholder(float),  # or the share of `data` to hold out
            on_bad_row="report",  # or "error"
            references=True,  # False: read no answers
            question_field=placeholder(str),
            answer_field=placeholder(str),
            answer_form=placeholder(str),
            config=placeholder(str),  # of a dataset on the hub, as are the splits
            train_split=placeholder(str),
            eval_split=placeholder(str),
            prompt_dir=placeholder(str),  # prompt files to use in place of the shipped ones
            split_steps=placeholder(str),
            generator=ConfigDict(),  # settings of a reasoning_gym dataset
        )
    )


def chat() -> ConfigDict:
    """How prompts are shown to a model: see `spark_jax.tokenizers.ChatOptions`."""
    return ConfigDict(dict(template="auto", system=placeholder(str), arguments=ConfigDict()))


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.run_dir = "runs/demo"
    config.seed = 0
    config.task = "arithmetic_chains"
    config.task_options = task_options()
    # A checkpoint directory, a .gguf file, a hub id, or a name: arithmetic_chains, the base that
    # ships with that task, or smollm2-135m-instruct. Where no other is named below it is generator,
    # verifier and start of the reward models; it is always the start of the policy.
    config.model = "arithmetic_chains"
    config.dtype = "float32"  # or bfloat16: what is computed in; what is trained stays float32
    config.attention = "auto"  # by platform and length; or one of `models.config.ATTENTION`
    # What training stores instead of computing it again, where memory is left, such as
    # ("qkv_proj", "out_proj"): see `ModelConfig.remat_save`.
    config.remat_save = ()
    config.chat = chat()
    # Devices along each axis, of all processes; one may be -1, what the others leave. Rows of
    # batches are spread over data and fsdp, parameters over fsdp and tensor. All 1: one device.
    config.mesh = ConfigDict(dict(data=1, fsdp=1, tensor=1))
    config.pretrain = False  # True makes the base afresh first, in run_dir/base
    config.quick = False  # True: one seed, fewer problems, fewer steps, in run_dir-quick
    config.decode = ConfigDict(
        dict(
            max_prompt_length=placeholder(int),
            max_new_tokens=52,
            slots=placeholder(int),
            cache_dtype=placeholder(str),  # int8 halves the cache of bfloat16, for some error
        )
    )

    # Before stage I, where the model has yet to learn the formats (`experiments.sft`).
    config.sft = ConfigDict(
        dict(
            data="",  # JSON-lines of prompt and target; "": the task's own examples
            num_examples=4000,
            steps=100,
            batch_size=8,
            accumulation_steps=1,
            max_length=384,
            pack=True,  # several examples to a row of max_length
            optimizer=optimizer(name="adamw", learning_rate=1e-4, warmup_steps=5),
            save_every=100,  # updates
            keep_checkpoints=2,
            keep_every=placeholder(int),  # besides, those of every so many updates; None: no others
        )
    )

    # Stage I: solutions, verifications, aggregation.
    config.generate = ConfigDict(
        dict(
            model=placeholder(str),  # the generator; None: config.model
            num_problems=128,
            samples_per_problem=8,
            temperature=1.0,
            top_p=1.0,
            chunk_size=64,
            # (i, n): this run makes the i-th of n parts, i from 0, in run_dir/shard_i_of_n, and
            # `merge_verifications` joins them. Any number of runs at a time, on any machines.
            shard=(0, 1),
        )
    )
    config.verify = ConfigDict(
        dict(
            model=placeholder(str),  # the verifier; None: config.model
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
            model=placeholder(str),  # where the reward model starts; None: config.model
            data="",  # folder of a stage I run
            kind="prm_cot",  # orm, prm, prm_cot
            method="step_consistency",
            balance=False,
            steps=80,
            batch_size=64,
            accumulation_steps=1,
            max_length=128,
            pack=False,  # several examples to a row of max_length
            optimizer=optimizer(name="adamw", learning_rate=1e-3, warmup_steps=4),
            save_every=100,  # updates
            keep_checkpoints=2,
            keep_every=placeholder(int),  # besides, those of every so many updates; None: no others
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
                process_std=placeholder(float),
                process_weight=placeholder(float),
                return_clip=placeholder(float),
            ),
            reward_model="",  # folder of a reward model's checkpoint
            reference_model="",  # π_ref of process rewards and KL; "" is the initial policy
            # Ours: after each update π_ref moves to this · itself + the rest · the policy.
            reference_decay=placeholder(float),
            format_checks=("one_boxed", "one_answer_block", "nothing_after_answer"),
            steps=20,
            num_problems=4096,
            prompts_per_step=32,
            group_size=8,
            temperature=1.0,
            minibatches=1,  # updates per pass over a rollout
            epochs=1,  # passes over a rollout
            accumulation_steps=1,
            pack=False,  # several responses to a row of an update, where lengths are spread
            # Sample each rollout before the updates of the one before it, while that is graded.
            one_step_off_policy=False,
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
            # Rollouts kept token by token for the page: of the first and the last step, and of
            # every so many, None: those that evaluate. The first `problems` of a step; 0: none.
            record=dict(every=placeholder(int), problems=32),
            # When to give the alarm (`rewards.monitor`): rises over the start of the run, as means
            # of `window` steps. 1e9 is never reached.
            monitor=dict(
                window=3,
                step_inflation=0.3,  # relative growth of steps per response, less accuracy's rise
                step_reduction=0.2,  # share of responses with fewer than 3 steps
                solution_appending=0.1,  # share of responses that go on after the answer
                verdict_gaming=0.1,  # rate of Yes above the reward model's own soft score
                reward_above_truth=0.15,  # mean reward above the accuracy of the rollouts
                reward_above_held_out=0.15,  # and above that on held-out problems
            ),
            save_every=5,
            keep_checkpoints=3,
            keep_every=placeholder(int),  # besides, those of every so many steps; None: no others
        )
    )
    config.evaluate = ConfigDict(
        dict(
            what="policy",  # benchmarks, reward_model, processbench
            num_problems=256,
            samples_per_problem=4,
            temperature=1.0,
            top_p=1.0,
            greedy=False,  # True: one greedy response to each problem
            answer_from="format",  # or last_boxed, for models that were never taught the format
            kind=placeholder(str),  # of reward model, or verifier: any model; None: prm.kind
            votes=1,  # above 1, also reward models by majority over so many sampled judgements
            num_solutions=250,  # held-out solutions that reward models are tried on, one a problem,
            generator="arithmetic_chains",  # and the model that writes them
            chunk_size=16,  # problems that benchmarks and processbench sample and save together
            processbench=dict(
                folder=placeholder(str),  # None: $SPARK_JAX_DATA/processbench
                splits=(),  # all required; none named: those that are there
                num_samples=placeholder(int),  # of each split, drawn by the seed; None: all
            ),
            benchmarks=dict(
                names=(),  # tasks, all required; none named: those of SPARK that are there
                folder=placeholder(str),  # of <name>/...; None: where each task has its problems
                num_problems=placeholder(int),  # None: all
                samples_per_problem=dict(
                    math500=4, aime24=32, aime25=32, amc23=32, olympiadbench=4, minerva=4
                ),
            ),
        )
    )

    # The sequence of runs of `pipeline`.
    config.pipeline = ConfigDict(
        dict(
            sft=False,  # True: the sft section first; its model is what all stages start from
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
