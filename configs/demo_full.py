"""The full study in the embedded world: every method, seeds, intervals, sweeps.

    make demo-full
    python -m spark_jax.experiments.study --config=configs/demo_full.py
    python -m spark_jax.experiments.study --config=configs/demo_full.py \
        --config.study.parts="('stage1', 'stage2')"

Rerunning the command resumes: runs that are done are read, not repeated. Writes `study.json`,
`study.md` and `plots/` after every part. About two CPU-hours, of which the policies take less than
one.

An arm of RL sets fields of `config.rl`, and three of the study's own: `reward_model` is one of
`prm_cot/<method>`, `prm/<method>`, `orm/<method>` or `weak`; `reference_updates` names the verifier
that is π_ref, by its updates; `baseline` is the arm that it is compared with, of its part or as
`<part>/<arm>` (default: `study.baselines`). Those in `study.headline` run with all seeds, the
others with the first two.
"""

from ml_collections import ConfigDict

from spark_jax.configs import demo

OURS = "prm_cot/step_consistency"
METHODS = (
    "single",
    "outcome_consistency",
    "step_consistency",
    "meta_critique",
    "outcome_consistency+meta_critique",
    "step_consistency+meta_critique",
    "reference_guided",
)
NO_CHECKS: tuple[str, ...] = ()
BETA, RATE = 0.05, 5e-4  # the demo's
BETAS, RATES = (0.05, 0.2, 0.5, 1.0), (2.5e-4, 5e-4, 1e-3)
FAR = (1e-3, 1.0)  # learning rate and β at which SPRO collapses
VERIFIER_UPDATES = (150, 200, 250, 300, 400)
WEAK, EARLY = 200, 400  # of them: whose votes make the weak reward model; another π_ref
CHECKS = ("one_boxed", "one_answer_block", "nothing_after_answer")


def rewards() -> dict[str, object]:
    """Makes the arms of stage III: every reward with every advantage that it suits."""
    return {
        "rule_based": dict(reward="rule_based"),
        "majority_vote": dict(reward="majority_vote"),
        "random": dict(reward="random"),
        "orm": dict(reward="orm", reward_model="orm/step_consistency"),
        "outcome_grpo": dict(reward="process_aware_outcome"),
        "outcome_grpo_from_single": dict(
            reward="process_aware_outcome", reward_model="prm_cot/single"
        ),
        "outcome_grpo_from_reference": dict(
            reward="process_aware_outcome", reward_model="prm_cot/reference_guided"
        ),
        "outcome_selective": dict(reward="process_aware_outcome", advantage="selective"),
        "outcome_selective_half": dict(
            reward="process_aware_outcome",
            advantage="selective",
            advantage_options=dict(discount=0.5),
        ),
        "outcome_global_step": dict(reward="process_aware_outcome", advantage="global_step"),
        "average_grpo": dict(reward="step_average"),
        "average_selective": dict(reward="step_average", advantage="selective"),
        "average_global_step": dict(reward="step_average", advantage="global_step"),
    }


def formats() -> dict[str, object]:
    """Makes arms with each format check and without, by a good reward model and by a bad one; twice
    as long, since hacking takes time."""
    long = dict(reward="process_aware_outcome", steps=40, evaluate_every=10)
    arms: dict[str, object] = {}
    for name, model in (("good", OURS), ("weak", "weak")):
        checked = f"{name}_all_checks"
        arms[checked] = long | dict(reward_model=model)
        arms[f"{name}_no_checks"] = long | dict(
            reward_model=model, format_checks=NO_CHECKS, baseline=checked
        )
    for check in CHECKS:
        others = tuple(c for c in CHECKS if c != check)
        arms[f"good_without_{check}"] = long | dict(format_checks=others)
    arms["good_no_checks_selective"] = long | dict(advantage="selective", format_checks=NO_CHECKS)
    return arms


def ruled(advantage: str, options: dict[str, object] | None = None, **rl: object) -> ConfigDict:
    """Makes an arm whose reward is the truth."""
    return ConfigDict(
        dict(reward="rule_based", advantage=advantage, advantage_options=options or {}, **rl)
    )


def spro() -> dict[str, object]:
    """Makes the arms of SPRO: other advantages, its variants, its sweep, remedies for collapse."""
    arms: dict[str, object] = {
        "grpo": ruled("grpo"),
        "spro": ruled("spro"),
        "rloo": ruled("rloo"),
        "reinforce++": ruled("reinforce++"),
        "reinforce++_baseline": ruled("reinforce++", dict(group_baseline=True)),
        "dr_grpo": ruled("dr_grpo", objective=dict(aggregation="sequence_sum_const")),
        # PRIME's equation for the advantage; no implicit reward model is trained, the policy is it.
        "prime_own_implicit_reward": ruled("prime"),
        "grpo_filter": ruled("grpo", filter_low=0.2, filter_high=0.8),
        "spro_filter": ruled("spro", filter_low=0.2, filter_high=0.8, baseline="grpo_filter"),
    }
    return arms | off_policy() | spro_variants() | spro_sweep()


def off_policy() -> dict[str, object]:
    """Makes arms of four updates per rollout: with one, every ratio is 1 and no clip ever acts."""
    gspo = dict(  # its paper's: arXiv 2507.18071, section 5.1
        importance="sequence", aggregation="sequence_mean", clip_low=3e-4, clip_high=4e-4
    )
    dapo = dict(clip_high=0.28)
    return {
        "grpo_4": ruled("grpo", minibatches=4),
        "gspo_4": ruled("grpo", minibatches=4, objective=gspo, baseline="grpo_4"),
        "dapo_4": ruled(
            "grpo", minibatches=4, objective=dapo, filter_low=0.0, filter_high=1.0,
            baseline="grpo_4",
        ),
    }  # fmt: skip


def spro_variants() -> dict[str, object]:
    """Makes variants of SPRO, each different from "spro" in one thing."""
    return {
        "spro_pool": ruled("spro", dict(baseline="pool"), baseline="spro"),
        "spro_steps": ruled("spro", dict(granularity="step"), baseline="spro"),
        "spro_outcome_half": ruled("spro", dict(outcome_weight=0.5), baseline="spro"),
        "spro_outcome_0": ruled("spro", dict(outcome_weight=0.0), baseline="spro"),
        "spro_moving_reference": ruled("spro", reference_decay=0.8, baseline="spro"),
        "spro_early_reference": ruled("spro", reference_updates=EARLY, baseline="spro"),
        "spro_judged": dict(
            reward="process_aware_outcome", advantage="spro", baseline="rewards/outcome_grpo"
        ),
    }


def swept(rate: float, beta: float | None = None) -> str:
    """Names the arm of that learning rate: SPRO with that β, or GRPO."""
    if rate == RATE and beta in (None, BETA):
        return "grpo" if beta is None else "spro"
    name = f"grpo_lr{rate:g}" if beta is None else f"spro_beta{beta:g}_lr{rate:g}"
    return name.replace(".", "_")


def spro_sweep() -> dict[str, object]:
    """Makes arms of β × learning rate, each against GRPO of that learning rate; and where SPRO
    collapses, what we tried against it."""
    arms: dict[str, object] = {}
    for rate in RATES:
        grpo = swept(rate)
        arms[grpo] = ruled("grpo", optimizer=dict(learning_rate=rate))
        for beta in BETAS:
            arms[swept(rate, beta)] = ruled(
                "spro", dict(beta=beta), optimizer=dict(learning_rate=rate), baseline=grpo
            )
    for name in (swept(RATE), swept(RATE, BETA)):
        del arms[name]  # "grpo" and "spro"
    far = dict(optimizer=dict(learning_rate=FAR[0]), baseline=swept(*FAR))
    arms["far_clipped"] = ruled("spro", dict(beta=FAR[1], return_clip=0.5), **far)
    arms["far_standardised"] = ruled("spro", dict(beta=FAR[1], process_std=0.1), **far)
    arms["far_moving_reference"] = ruled("spro", dict(beta=FAR[1]), reference_decay=0.8, **far)
    return arms


def pictures() -> dict[str, dict[str, tuple[str, ...]]]:
    """Gives part → picture → its arms, by step and by token, besides the part's own picture."""
    groups = {
        f"lr{rate:g}".replace(".", "_"): (swept(rate), *(swept(rate, beta) for beta in BETAS))
        for rate in RATES
    }
    groups["far"] = (swept(*FAR), "far_clipped", "far_standardised", "far_moving_reference")
    groups["variants"] = ("spro", *spro_variants())
    groups["off_policy"] = ("grpo", *off_policy())
    return {"spro": groups}


def get_config() -> ConfigDict:
    config = demo.get_config()
    config.run_dir = "runs/demo_full"
    config.verify.methods = METHODS
    config.verify.report_sample_counts = (1, 2, 4, 8, 16)
    config.evaluate.votes = 8
    config.study = ConfigDict(
        dict(
            parts=("stage1", "stage2", "rewards", "formats", "spro"),
            seeds=(0, 1, 2),
            workers=2,
            headline=(
                "rule_based",
                "majority_vote",
                "random",
                "outcome_grpo",
                "average_grpo",
                "outcome_selective",
                "outcome_global_step",
                "grpo",
                "spro",
                "prime_own_implicit_reward",
            ),
            # The base has learned for 1500 updates. After 200 it detects a third of the wrong
            # steps, and a vote a quarter of them; after 400 two thirds, and a vote more.
            verifier_updates=VERIFIER_UPDATES,
            weak_updates=WEAK,
            problem_counts=(8, 16, 32, 64, 128),
            kinds=("orm", "prm", "prm_cot"),
            reward_model=OURS,
            baselines=ConfigDict(
                dict(rewards="rule_based", formats="good_all_checks", spro="grpo")
            ),
            pictures=ConfigDict(pictures()),
            arms=ConfigDict(
                {
                    part: ConfigDict(make())
                    for part, make in (("rewards", rewards), ("formats", formats), ("spro", spro))
                }
            ),
        )
    )
    return config
