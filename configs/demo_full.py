"""The full study in the embedded world: every method, seeds, intervals, sweeps.

    make demo-full
    python -m spark_jax.experiments.study --config=configs/demo_full.py
    python -m spark_jax.experiments.study --config=configs/demo_full.py \
        --config.study.parts="('stage1', 'stage2')"

Resumable, run by run: started again it goes on where it stopped, and runs that are done are read,
not repeated. Writes `study.json`, `study.md` and `plots/` after every part. About two CPU-hours.

An arm of RL is named fields of `config.rl`, and which reward model it asks: `reward_model` is one
of `prm_cot/<method>`, `prm/<method>`, `orm/<method>` or `weak`. Arms of a part are compared with
its `baseline`; those in `study.headline` run with all seeds, the others with the first two.
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
CHECKS = ("one_boxed", "one_answer_block", "nothing_after_answer")


def rewards() -> dict[str, object]:
    """Stage III: every reward with every advantage that it has what for."""
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
    """With each format check and without, by a good reward model and by a bad one; twice as long,
    since hacking takes its time."""
    long = dict(reward="process_aware_outcome", steps=40, evaluate_every=10)
    arms: dict[str, object] = {}
    for name, model in (("good", OURS), ("weak", "weak")):
        arms[f"{name}_all_checks"] = long | dict(reward_model=model)
        arms[f"{name}_no_checks"] = long | dict(reward_model=model, format_checks=NO_CHECKS)
    for check in CHECKS:
        others = tuple(c for c in CHECKS if c != check)
        arms[f"good_without_{check}"] = long | dict(format_checks=others)
    arms["good_no_checks_selective"] = long | dict(advantage="selective", format_checks=NO_CHECKS)
    return arms


def spro() -> dict[str, object]:
    """SPRO against other advantages, its sweep, its variants, and what we tried on its collapse."""

    def ruled(advantage: str, options: dict[str, object] | None = None, **rl: object) -> ConfigDict:
        return ConfigDict(
            dict(reward="rule_based", advantage=advantage, advantage_options=options or {}, **rl)
        )

    arms: dict[str, object] = {
        "grpo": ruled("grpo"),
        "spro": ruled("spro"),
        "rloo": ruled("rloo"),
        "reinforce++": ruled("reinforce++"),
        "reinforce++_baseline": ruled("reinforce++", dict(group_baseline=True)),
        "dr_grpo": ruled("dr_grpo", objective=dict(aggregation="sequence_sum_const")),
        "dapo": ruled("grpo", filter_low=0.0, filter_high=1.0, objective=dict(clip_high=0.28)),
        "gspo": ruled("grpo", objective=dict(importance="sequence")),
        "prime": ruled("prime"),
        "spro_pool": ruled("spro", dict(baseline="pool")),
        "spro_steps": ruled("spro", dict(granularity="step")),
        "spro_outcome_half": ruled("spro", dict(outcome_weight=0.5)),
        "spro_outcome_0": ruled("spro", dict(outcome_weight=0.0)),
        "spro_filter": ruled("spro", filter_low=0.2, filter_high=0.8),
        "grpo_filter": ruled("grpo", filter_low=0.2, filter_high=0.8),
    }
    for rate in (2.5e-4, 5e-4, 1e-3):
        for beta in (0.05, 0.2, 0.5, 1.0):
            if (beta, rate) != (0.05, 5e-4):  # which is the arm "spro"
                name = f"spro_beta{beta:g}_lr{rate:g}".replace(".", "_")
                arms[name] = ruled("spro", dict(beta=beta), optimizer=dict(learning_rate=rate))
        if rate != 5e-4:
            name = f"grpo_lr{rate:g}".replace(".", "_")
            arms[name] = ruled("grpo", optimizer=dict(learning_rate=rate))
    far = dict(optimizer=dict(learning_rate=1e-3))  # where it collapses without
    arms["far_clipped"] = ruled("spro", dict(beta=1.0, return_clip=0.5), **far)
    arms["far_standardised"] = ruled("spro", dict(beta=1.0, process_std=0.1), **far)
    arms["far_moving_reference"] = ruled("spro", dict(beta=1.0), reference_decay=0.8, **far)
    return arms


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
                "prime",
            ),
            # A verifier sees the fewer errors the colder it is sampled: from below one half, where
            # voting makes it worse, to what the demo uses and beyond.
            verifier_temperatures=(0.05, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3),
            weak_temperature=0.05,  # whose votes make the weak reward model
            problem_counts=(8, 16, 32, 64, 128),
            kinds=("orm", "prm", "prm_cot"),
            reward_model=OURS,
            baselines=ConfigDict(
                dict(rewards="rule_based", formats="good_all_checks", spro="grpo")
            ),
            arms=ConfigDict(
                {
                    part: ConfigDict(make())
                    for part, make in (("rewards", rewards), ("formats", formats), ("spro", spro))
                }
            ),
        )
    )
    return config
