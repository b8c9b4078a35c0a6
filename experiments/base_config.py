"""Every field that a configuration has, with its default: a file in `configs/` changes a few.

    from spark_jax.experiments import base_config

    def get_config():
        config = base_config.base_config()
        config.update(dict(run_dir="runs/mine", task="gsm8k", model="owner/name"))
        config.rl.steps = 200
        return config

`run_dir`, `task`, `model`, `evaluate.generator` and `pipeline.arms` are empty here: every
configuration sets those that its experiments read, and an empty one is refused. A field that is
None takes the default of what reads it, and says so. Which values are valid is checked by what the
fields are made into (`Objective`, `Thresholds`, ...), and by `experiments.checks` where no
constructor checks them.
"""

from __future__ import annotations

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from spark_jax.advantages import all_options

# A value for a field that a run folder may lack, or have and this schema no longer: what the field
# did before it could be set, by its dotted name. A field that is added or removed gets a line here,
# so that the folders of earlier versions are still runs of the same configuration. An option of an
# advantage needs none: None has always meant the advantage's own default.
FORMER_DEFAULTS: dict[str, object] = {
    f"rl.advantage_options.{name}": None for name in all_options()
}


def base_config() -> ConfigDict:
    """Makes the configuration of which all others are changes."""
    return ConfigDict(
        dict(
            run_dir="",  # the folder of the run
            seed=0,
            task="",  # by name: docs/real_models.md and `spark_jax.tasks` list them
            task_options=task_options(),
            # A checkpoint directory, a .gguf file, a hub id, or a name: arithmetic_chains, the base
            # that ships with that task, or smollm2-135m-instruct. Where no other is named below it
            # is generator, verifier and start of the reward models; it is always the start of the
            # policy.
            model="",
            dtype="float32",  # or bfloat16: of computation; trained parameters stay float32
            attention="auto",  # by platform and length; or one of `models.config.ATTENTION`
            # What training stores instead of computing it again, where memory is left, such as
            # ("qkv_proj", "out_proj"): see `ModelConfig.remat_save`.
            remat_save=(),
            chat=chat(),
            # Devices along each axis, of all processes; one may be -1, what the others leave. Rows
            # of batches are spread over data and fsdp, parameters over fsdp and tensor. All 1: one
            # device.
            mesh=dict(data=1, fsdp=1, tensor=1),
            pretrain=False,  # True makes the demo's base afresh first, in run_dir/base
            quick=False,  # True: one seed, fewer problems, fewer steps, in run_dir-quick
            decode=dict(
                max_prompt_length=placeholder(
                    int
                ),  # tokens that prompts are padded to; None: as needed
                max_new_tokens=1024,  # tokens of a response
                slots=placeholder(int),  # responses decoded at the same time; None: all
                cache_dtype=placeholder(str),  # int8 halves bfloat16's cache, for some error
            ),
            sft=sft(),
            generate=generate(),
            verify=verify(),
            prm=prm(),
            rl=rl(),
            evaluate=evaluate(),
            pipeline=dict(
                sft=False,  # True: the sft section first; its model is the start of all stages
                seeds=(0,),  # every stage is run with each
                workers=1,  # runs at a time
                # Name → fields of `rl` that this arm of stage III changes. Those with a reward that
                # asks a reward model get the one of `prm.method`.
                arms=ConfigDict(),
            ),
        )
    )


def task_options() -> ConfigDict:
    """Where problems come from and how they speak: see `spark_jax.tasks.TaskOptions`. None leaves
    the task's own choice; an option that a task does not read is refused."""
    return ConfigDict(
        dict(
            data=placeholder(str),  # a file, a folder or a hub id with the problems
            eval_data=placeholder(str),  # the same for held-out problems
            eval_fraction=placeholder(float),  # or the share of `data` to hold out
            on_bad_row="report",  # or "error"
            references=True,  # False: read no answers
            question_field=placeholder(str),  # of a row of data
            answer_field=placeholder(str),  # of the same row
            answer_form=placeholder(str),  # how the answer is written there
            config=placeholder(str),  # of a dataset on the hub: which of its configurations
            train_split=placeholder(str),  # of it, to train on
            eval_split=placeholder(str),  # of it, to evaluate on
            prompt_dir=placeholder(str),  # prompt files to use in place of the shipped ones
            split_steps=placeholder(str),  # how a response is cut into steps
            generator=ConfigDict(),  # settings of a reasoning_gym dataset
        )
    )


def chat() -> ConfigDict:
    """How prompts are shown to a model: see `spark_jax.tokenizers.ChatOptions`."""
    return ConfigDict(
        dict(
            template="auto",  # the tokenizer's where it has one; or always, never
            system=placeholder(str),  # a first message; None: none
            arguments=ConfigDict(),  # of the template
        )
    )


def optimizer(name: str, learning_rate: float, **fields: object) -> ConfigDict:
    """The fields of an optimiser (`training.optimizer.make`); None leaves optax's default.

    Args:
      name: adam, adamw, adafactor, lion or sgd.
      learning_rate: the peak of the schedule.
      fields: those that are not None.
    """
    none = dict(
        warmup_steps=placeholder(int),  # updates
        schedule=placeholder(str),  # constant, cosine, linear
        end_fraction=placeholder(float),  # of the peak, where the schedule ends
        weight_decay=placeholder(float),  # of matrices alone
        b1=placeholder(float),  # decay of the first moment
        b2=placeholder(float),  # decay of the second
        eps=placeholder(float),  # beside the root of the second moment
        accumulator_dtype=placeholder(str),  # of the first moment; bfloat16 halves its memory
    )
    given = dict(name=name, learning_rate=learning_rate, clip_norm=1.0)  # of the gradient
    return ConfigDict(none | given | fields)


def _keeping(save_every: int, keep_checkpoints: int) -> dict[str, object]:
    """How often a training saves, in updates or RL steps, and what it keeps."""
    return dict(
        save_every=save_every,  # updates or steps
        keep_checkpoints=keep_checkpoints,  # the newest so many
        keep_every=placeholder(int),  # besides, each of so many updates or steps; None: no others
    )


def _supervised(**fields: object) -> ConfigDict:
    """What every supervised fine-tuning has."""
    return ConfigDict(
        dict(
            accumulation_steps=1,  # parts of a batch, one after the other
            **_keeping(save_every=100, keep_checkpoints=2),
            **fields,
        )
    )


def sft() -> ConfigDict:
    """Before stage I, where the model has yet to learn the formats (`experiments.sft`)."""
    return _supervised(
        data="",  # JSON-lines of prompt and target; "": the task's own examples
        num_examples=4000,  # of the task's own
        steps=100,  # updates
        batch_size=8,  # rows of an update
        max_length=384,  # tokens of a row; longer examples are left out
        pack=True,  # several examples to a row
        optimizer=optimizer("adamw", 1e-4, warmup_steps=5),
    )


def generate() -> ConfigDict:
    """Stage I: solutions (`experiments.generate_verifications`)."""
    return ConfigDict(
        dict(
            model=placeholder(str),  # the generator; None: config.model
            num_problems=128,  # None: all that the task has
            samples_per_problem=8,  # solutions
            temperature=1.0,  # of solutions
            top_p=1.0,  # the likeliest tokens of this share; 1: all
            chunk_size=64,  # problems that are sampled and saved together
            # (i, n): this run makes the i-th of n parts, i from 0, in run_dir/shard_i_of_n, and
            # `merge_verifications` joins them. Any number of runs at a time, on any machines.
            shard=(0, 1),
        )
    )


def verify() -> ConfigDict:
    """Stage I: verifications of the solutions, and their aggregation."""
    return ConfigDict(
        dict(
            model=placeholder(str),  # the verifier; None: config.model
            methods=("step_consistency",),  # of `verification.aggregate.AGGREGATIONS`
            samples_per_solution=16,  # verifications
            report_sample_counts=(1, 4, 16),  # how good the methods are with fewer samples
            temperature=0.8,  # of verifications
            top_p=0.95,  # the likeliest tokens of this share; 1: all
            chunk_size=16,  # problems whose solutions are verified and saved together
        )
    )


def prm() -> ConfigDict:
    """Stage II: a generative reward model from one method's verifications."""
    return _supervised(
        model=placeholder(str),  # where the reward model starts; None: config.model
        data="",  # folder of a stage I run
        kind="prm_cot",  # orm, prm, prm_cot
        method="step_consistency",  # one of verify.methods
        balance=False,  # True: of each problem, as many solutions judged Yes as No
        steps=80,  # updates
        batch_size=64,  # rows of an update
        max_length=128,  # tokens of a row; longer examples are left out
        pack=False,  # several examples to a row
        optimizer=optimizer("adamw", 1e-3, warmup_steps=4),
    )


def rl() -> ConfigDict:
    """Stage III: RL. Rewards and advantages by name; docs/method.md lists them."""
    return ConfigDict(
        dict(
            reward="process_aware_outcome",  # of `rewards.prm.REWARDS`
            advantage="grpo",  # of `advantages.ADVANTAGES`
            # None leaves the advantage's own default; an option that it does not have is refused.
            advantage_options={name: placeholder(kind) for name, kind in all_options().items()},
            reward_model="",  # folder of a reward model's checkpoint
            reference_model="",  # π_ref of process rewards and KL; "" is the initial policy
            # Ours: after each update π_ref moves to this · itself + the rest · the policy.
            reference_decay=placeholder(float),
            # Of `response_format.FORMAT_CHECKS`: a response that fails one has reward 0.
            format_checks=("one_boxed", "one_answer_block", "nothing_after_answer"),
            steps=20,  # rollouts
            num_problems=4096,  # None: all that the task has
            prompts_per_step=32,  # in a rollout
            group_size=8,  # responses to a prompt
            temperature=1.0,  # of rollouts; it must be 1
            minibatches=1,  # updates per pass over a rollout
            epochs=1,  # passes over a rollout
            accumulation_steps=1,  # parts of an update's batch, one after the other
            pack=False,  # several responses to a row of an update, where their lengths vary
            # Sample each rollout before the updates of the one before it, while that is graded.
            one_step_off_policy=False,
            # Train on groups whose mean reward lies in [low, high] and whose rewards differ: (0, 1)
            # is DAPO's dynamic sampling, (0.2, 0.8) SPRO's filter. None trains on all.
            filter_low=placeholder(float),
            filter_high=placeholder(float),  # see filter_low
            objective=dict(  # see `training.policy.Objective`
                clip_low=0.2,  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
                clip_high=0.2,  # see clip_low
                aggregation="token_mean",  # how the losses of tokens are added
                importance="token",  # or sequence (GSPO): whose ratio it is
                kl_coefficient=0.0,  # of the divergence from π_ref
                kl_estimator="k3",  # of that divergence
                entropy_coefficient=0.0,  # of a bonus for entropy
            ),
            optimizer=optimizer("adam", 5e-4),
            evaluate_every=5,  # steps, on held-out problems
            # Rollouts kept token by token for the page: of the first and the last step, and of
            # every so many, None: those that evaluate. The first `problems` of a step; 0: none.
            record=dict(every=placeholder(int), problems=32),
            # When to give the alarm (`rewards.monitor`): rises over the start of the run, as means
            # of `window` steps. 1e9 is never reached.
            monitor=dict(
                window=3,  # steps
                step_inflation=0.3,  # relative growth of steps per response, less accuracy's rise
                step_reduction=0.2,  # share of responses with fewer than 3 steps
                solution_appending=0.1,  # share of responses that go on after the answer
                verdict_gaming=0.1,  # rate of Yes above the reward model's own soft score
                reward_above_truth=0.15,  # mean reward above the accuracy of the rollouts
                reward_above_held_out=0.15,  # and above that on held-out problems
            ),
            **_keeping(save_every=5, keep_checkpoints=3),
        )
    )


def evaluate() -> ConfigDict:
    """Evaluation of policies and reward models, during training and by `experiments.evaluate`."""
    return ConfigDict(
        dict(
            what="policy",  # benchmarks, reward_model, processbench
            num_problems=256,  # held-out; None: all that the task has
            samples_per_problem=4,  # responses
            temperature=1.0,  # of responses
            top_p=1.0,  # the likeliest tokens of this share; 1: all
            greedy=False,  # True: one greedy response to each problem
            answer_from="format",  # or last_boxed, for models that were never taught the format
            kind=placeholder(str),  # of reward model, or verifier: any model; None: prm.kind
            votes=1,  # above 1, also reward models by majority over so many sampled judgements
            num_solutions=250,  # held-out solutions that reward models are tried on, one a problem,
            generator="",  # and the model that writes them
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
                samples_per_problem=dict(  # of a benchmark; others: evaluate.samples_per_problem
                    math500=4, aime24=32, aime25=32, amc23=32, olympiadbench=4, minerva=4
                ),
            ),
        )
    )
