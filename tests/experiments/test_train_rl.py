"""RL runs: every reward and advantage, references out of reach, resumed bit for bit."""

import dataclasses
import json
import threading
from functools import partial

import jax
import numpy as np
import pytest
from compilations import Compilations
from experiment_runs import Stop, corrupt_references, metric_rows, stop_at, weights

from spark_jax.advantages import ADVANTAGES
from spark_jax.data import tasks
from spark_jax.experiments import configuration, evaluate, loading, rollouts, train_rl
from spark_jax.experiments.configuration import ConfigError
from spark_jax.models import transformer
from spark_jax.rewards.prm import REWARDS, REWARDS_THAT_JUDGE
from spark_jax.text_generation import SampledText, encode
from spark_jax.training.metrics import read_metrics
from spark_jax.training.policy import PolicyBatch


def run(tiny, path, changes):
    return train_rl.run(configuration.changed(tiny, changes), path)


def learned(path, tiny):
    """Whether the policy differs from the one the run began with."""
    policy, *_ = loading.load_model(str(path / "model"))
    base, *_ = loading.load_model(tiny.model)
    return any(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), policy, base)))


@pytest.mark.parametrize("reward", REWARDS)
def test_every_reward_runs(tiny, reward_models, tmp_path, reward):
    kind = REWARDS_THAT_JUDGE.get(reward, ("prm_cot",))[-1]
    changes = {"rl.reward": reward, "prm.kind": kind, "rl.reward_model": reward_models[kind]}
    summary = run(tiny, tmp_path, changes)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["policy/logprob_gap_max"] < 1e-4 for row in rows[1:])
    assert 0 <= summary["evaluation"]["accuracy"]["estimate"] <= 1
    asked = [row["reward_model/called"] for row in rows[1:]]
    assert (max(asked) > 0) == (reward in REWARDS_THAT_JUDGE)
    samples = (tmp_path / "samples" / "step_000002.jsonl").read_text().splitlines()
    assert len(samples) == 8
    assert set(json.loads(samples[0])) == {"problem", "response", "reward"}


def test_steps_after_the_first_compile_nothing(tiny, tmp_path):
    """However many tokens their responses have."""
    changes = {"rl.reward": "rule_based", "rl.steps": 4, "decode.max_prompt_length": 32}
    config = configuration.changed(tiny, changes)
    by_step = []
    with Compilations() as compiled:
        train_rl.run(config, tmp_path, lambda *_: by_step.append(len(compiled.names)))
    assert by_step[1:] == by_step[1:2] * 4


OPTIONS = {
    "selective": {"discount": 0.5},
    "global_step": {"process_weight": 0.5},
    "spro": {"beta": 0.2, "granularity": "step", "outcome_weight": 0.5},
    "masked_step": {"baseline": "pool"},
    "reinforce++": {"group_baseline": True},
}


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_every_advantage_runs_and_teaches(tiny, reward_models, tmp_path, advantage):
    options = OPTIONS.get(advantage, {})
    changes = {
        "rl.reward": "step_average",
        "rl.advantage": advantage,
        "rl.reward_model": reward_models["prm_cot"],
        **{f"rl.advantage_options.{name}": value for name, value in options.items()},
    }
    run(tiny, tmp_path, changes)
    # The masked step advantage alone says nothing while policy and reference are the same, and so
    # they stay the same: not even rounding may move the weights.
    assert learned(tmp_path, tiny) == (advantage != "masked_step")


def test_another_reference_policy(tiny, reward_models, tmp_path):
    """Against another reference than itself, the masked step advantage alone does teach; what
    training stores makes no other policy."""
    changes = {"rl.reward": "random", "rl.advantage": "masked_step", "remat_save": ("qkv_proj",)}
    run(tiny, tmp_path, {**changes, "rl.reference_model": reward_models["prm_cot"]})
    assert learned(tmp_path, tiny)
    assert json.loads((tmp_path / "config.json").read_text())["remat_save"] == ["qkv_proj"]


def test_a_reference_policy_that_moves_with_the_policy_gives_no_process_reward(tiny, tmp_path):
    changes = {
        "rl.reward": "rule_based",
        "rl.advantage": "spro",
        "rl.optimizer.learning_rate": 1e-2,
    }
    sizes = {}
    for decay in (None, 0.0, 0.9):
        path = tmp_path / str(decay)
        run(tiny, path, changes | {"rl.reference_decay": decay})
        metrics = read_metrics(path / "metrics.jsonl")
        sizes[decay] = metrics[-1]["spro/msa_mean_absolute"]
        assert 0 <= metrics[-1]["spro/process_reward_auc_truth"] <= 1
        assert "spro/process_reward_auc_verdicts" not in metrics[-1]  # nothing judges
    assert sizes[0.0] < 1e-4 * sizes[0.9]
    assert sizes[0.9] < sizes[None]


def test_a_moving_reference_that_nothing_reads_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"reference_decay=0\.5 moves.*does not use"):
        run(tiny, tmp_path, {"rl.reward": "rule_based", "rl.reference_decay": 0.5})


@pytest.mark.parametrize("field", ["rope_theta", "num_heads"])
def test_a_reference_policy_of_another_shape_is_refused(tiny, tmp_path, field):
    base = loading.load_model(tiny.model)
    other = dataclasses.replace(base.config, **{field: getattr(base.config, field) * 2})
    params = transformer.init(other, jax.random.key(0))
    loading.save_model(tmp_path / "other", base._replace(params=params, config=other))
    changes = {"rl.reward": "random", "rl.advantage": "spro"}
    with pytest.raises(ConfigError, match=rf"rl.reference_model=.* has {field}="):
        run(tiny, tmp_path / "rl", {**changes, "rl.reference_model": str(tmp_path / "other")})


def test_gap_is_measured_before_the_policy_moves(tiny, tmp_path):
    changes = {"rl.reward": "random", "rl.minibatches": 2, "rl.epochs": 2}
    run(tiny, tmp_path, {**changes, "rl.optimizer.learning_rate": 0.05})
    for row in read_metrics(tmp_path / "metrics.jsonl")[1:]:
        assert row["policy/logprob_gap_max"] < 1e-4
        assert row["policy/updates"] == 4
        assert row["policy/ratio_max"] > 1.001


def test_packed_updates_are_the_unpacked_ones(tiny, tmp_path):
    """Weights and metrics of the first update; one of KL and entropy, of two minibatches."""
    changes = {
        "rl.reward": "rule_based",
        "rl.steps": 1,
        "rl.minibatches": 2,
        "rl.accumulation_steps": 2,
        "rl.objective.kl_coefficient": 0.1,
        "rl.objective.entropy_coefficient": 0.1,
        "rl.objective.aggregation": "sequence_mean",
    }
    for pack in (False, True):
        run(tiny, tmp_path / str(pack), changes | {"rl.pack": pack})
    apart, together = (
        read_metrics(tmp_path / name / "metrics.jsonl")[1] for name in ("False", "True")
    )
    for name, value in apart.items():
        if name.startswith(("policy/", "advantage/")):
            np.testing.assert_allclose(together[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    assert apart["policy/grad_norm"] > 0


def test_advantages_made_in_the_update_are_those_made_before_it(tiny, tmp_path):
    """With two micro-batches they are made before it. At first policy and reference are one, and
    what SPRO adds is exactly 0."""
    changes = {"rl.reward": "rule_based", "rl.advantage": "spro", "rl.steps": 2}
    for steps in (1, 2):
        run(tiny, tmp_path / str(steps), changes | {"rl.accumulation_steps": steps})
    inside, before = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("1", "2"))
    assert inside[1].keys() == before[1].keys()
    assert inside[1]["spro/msa_mean_absolute"] == before[1]["spro/msa_mean_absolute"] == 0
    assert inside[2]["spro/msa_mean_absolute"] > 0
    for name in ("spro/msa_mean_absolute", "advantage/mean_absolute", "policy/loss"):
        np.testing.assert_allclose(inside[2][name], before[2][name], rtol=1e-2, atol=1e-6)


def test_no_update_where_every_group_is_filtered_out(tiny, tmp_path):
    changes = {"rl.reward": "rule_based", "rl.filter_low": 0.999, "rl.filter_high": 0.9999}
    run(tiny, tmp_path, changes)
    assert not learned(tmp_path, tiny)
    assert [row["policy/updates"] for row in read_metrics(tmp_path / "metrics.jsonl")[1:]] == [0, 0]


@pytest.mark.parametrize(
    "changes",
    [
        {"aggregation": "sequence_sum_const"},
        {"importance": "sequence", "aggregation": "sequence_mean"},
        {"kl_coefficient": 0.01, "entropy_coefficient": 0.001, "kl_estimator": "k2"},
        {"clip_high": 0.28},
    ],
    ids=str,
)
def test_objectives_run(tiny, tmp_path, changes):
    fields = {f"rl.objective.{name}": value for name, value in changes.items()}
    more = {"rl.reward": "random", "rl.minibatches": 2, "rl.epochs": 2, "rl.accumulation_steps": 2}
    run(tiny, tmp_path, fields | more)
    assert learned(tmp_path, tiny)


@pytest.mark.parametrize(
    ("reward", "advantage"),
    [
        ("process_aware_outcome", "grpo"),
        ("step_average", "selective"),
        ("process_aware_outcome", "spro"),
        ("majority_vote", "grpo"),
        ("random", "grpo"),
    ],
)
def test_references_are_out_of_reach(tiny, reward_models, tmp_path, monkeypatch, reward, advantage):
    """Corrupt every reference: the reference-free run is the same bit for bit, RLVR is not."""
    free = {"rl.reward": reward, "rl.advantage": advantage}
    free["rl.reward_model"] = reward_models["prm_cot"]
    checked = {"rl.reward": "rule_based"}
    run(tiny, tmp_path / "free", free)
    run(tiny, tmp_path / "checked", checked)
    corrupt_references(monkeypatch)
    run(tiny, tmp_path / "free_corrupted", free)
    run(tiny, tmp_path / "checked_corrupted", checked)
    assert weights(tmp_path / "free_corrupted") == weights(tmp_path / "free")
    assert weights(tmp_path / "checked_corrupted") != weights(tmp_path / "checked")
    truth = [
        read_metrics(tmp_path / name / "metrics.jsonl")[1]["truth/accuracy"]
        for name in ("free", "free_corrupted")
    ]
    assert truth[0] != truth[1]  # the corruption did reach what looks at references


@pytest.mark.parametrize(
    ("calls", "decay", "ahead"),
    [(1, None, False), (3, None, False), (3, 0.5, False), (3, None, True), (4, 0.5, True)],
)
def test_resumed_run_equals_uninterrupted(tiny, tmp_path, calls, decay, ahead):
    """Killed before the first checkpoint, and between two; started again in the same folder."""
    changes = {"rl.reward": "rule_based", "rl.advantage": "spro", "rl.steps": 4}
    changes |= {"rl.save_every": 2, "rl.evaluate_every": 2, "rl.reference_decay": decay}
    changes |= {"rl.one_step_off_policy": ahead}
    config = configuration.changed(tiny, changes)
    train_rl.run(config, tmp_path / "whole")
    with pytest.raises(Stop):
        train_rl.run(config, tmp_path / "broken", stop_at(calls))
    train_rl.run(config, tmp_path / "broken")
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert metric_rows(tmp_path / "broken") == metric_rows(tmp_path / "whole")


def samples(path, step):
    rows = (path / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(row)["response"] for row in rows]


def test_one_step_off_policy_samples_before_the_updates_and_corrects_for_it(tiny, tmp_path):
    common = {"rl.reward": "rule_based", "rl.steps": 3, "rl.optimizer.learning_rate": 0.02}
    ahead = {"rl.one_step_off_policy": True}
    still = {"rl.optimizer.learning_rate": 0.0}
    for name, changes in (("on", {}), ("off", ahead), ("still", still)):
        run(tiny, tmp_path / name, common | changes)
    on, off, still = (tmp_path / name for name in ("on", "off", "still"))
    assert samples(on, 1) == samples(off, 1) == samples(still, 1)
    # The second rollout is of the policy that the first one is of, the third is not.
    assert samples(off, 2) == samples(still, 2) != samples(on, 2)
    assert samples(off, 3) != samples(still, 3)
    # Importance ratios are those to the policy that sampled.
    gaps = [[row["policy/logprob_gap_max"] for row in metric_rows(path)[1:]] for path in (on, off)]
    assert max(*gaps[0], gaps[1][0]) < 1e-4
    assert min(gaps[1][1:]) > 0.01


@pytest.mark.parametrize("ahead", [True, False])
def test_one_step_off_policy_grades_while_it_samples(tiny, tmp_path, monkeypatch, ahead):
    """Graders that wait for the second rollout get it; on policy they wait in vain."""
    second_sampled, came = threading.Event(), []
    grade, reward, sample = evaluate.is_right, REWARDS["rule_based"], rollouts.sample

    def after_the_second(work, *args):
        came.append(second_sampled.wait(60 if ahead else 0.1))
        return work(*args)

    def noted(config, task, policy, problems, step):
        made = sample(config, task, policy, problems, step)
        if step == 2:
            second_sampled.set()
        return made

    monkeypatch.setattr(evaluate, "is_right", partial(after_the_second, grade))
    monkeypatch.setitem(REWARDS, "rule_based", partial(after_the_second, reward))
    monkeypatch.setattr(rollouts, "sample", noted)
    run(tiny, tmp_path, {"rl.reward": "rule_based", "rl.one_step_off_policy": ahead})
    assert all(came) == ahead


def test_same_seed_same_run_and_another_seed_another(tiny, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tiny, tmp_path / name, {"rl.reward": "rule_based", "seed": seed})
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_groups_outside_the_filter_are_not_trained_on(tiny, tmp_path):
    changes = {"rl.reward": "rule_based", "rl.filter_low": 0.2, "rl.filter_high": 0.8}
    run(tiny, tmp_path, {**changes, "rl.prompts_per_step": 8})
    rows = read_metrics(tmp_path / "metrics.jsonl")[1:]
    assert any(row["response/trained_on"] < 1 for row in rows)
    assert all(row["response/trained_on"] <= 1 - row["reward/zero_variance_groups"] for row in rows)


def test_a_missing_reward_model_is_named(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"needs rl.reward_model.*train_prm"):
        run(tiny, tmp_path, {})
    with pytest.raises(ConfigError, match=r"rl.reward_model='runs/a/model' is no checkpoint"):
        run(tiny, tmp_path / "rl", {"rl.reward_model": "runs/a/model"})
    assert not (tmp_path / "rl").exists()


def test_problems_with_too_long_prompts_are_counted_and_not_trained_on(tiny, tmp_path):
    base = loading.load_model(tiny.model)
    task = loading.load_task(tiny)
    problems = task.problems(tiny.rl.num_problems, tiny.seed, "train")
    prompts = encode(base.tokenizer, [task.text_format.solve_prompt(p) for p in problems])
    limit = min(len(ids) for ids in prompts)
    long = {p.id for p, ids in zip(problems, prompts, strict=True) if len(ids) > limit}
    assert 0 < len(long) < len(problems)
    changes = {"rl.reward": "random", "decode.max_prompt_length": limit}
    summary = run(tiny, tmp_path, changes)
    assert summary["data"]["too_long"] == len(long)
    for file in (tmp_path / "samples").iterdir():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert rows
        assert not long & {row["problem"] for row in rows}
    with pytest.raises(ConfigError, match="all 8 prompts have more than 1 tokens"):
        run(tiny, tmp_path / "none", {**changes, "decode.max_prompt_length": 1})


def test_step_ids_of_tokens():
    """Every token of a step block, tags included, has the step's number; the rest −1."""
    tokenizer = loading.load_model("arithmetic_chains").tokenizer
    text = r"<think> <step> 1: 7 +5 =2 </step> <step> 2: 2 +1 =3 </step> </think>"
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    sample = SampledText(text, (*ids, tokenizer.eos_token_id), True)
    got = rollouts.token_step_ids(tasks.load("arithmetic_chains"), tokenizer, [sample], 18)
    np.testing.assert_array_equal(got[0], [-1] + [0] * 6 + [1] * 6 + [-1] * 5)
    unclosed = tokenizer.encode("<think> <step> 1: 7", add_special_tokens=False)
    sample = SampledText("<think> <step> 1: 7", (*unclosed, tokenizer.eos_token_id), True)
    got = rollouts.token_step_ids(tasks.load("arithmetic_chains"), tokenizer, [sample], 6)
    np.testing.assert_array_equal(got[0], [-1, 0, 0, 0, -1, -1])  # the end is in no step


def test_minibatches_are_whole_groups_and_cover_the_batch(tiny):
    rows = np.arange(16)
    batch = PolicyBatch(rows, rows, rows, rows, rows, rows)
    config = configuration.changed(tiny, {"rl.minibatches": 2, "rl.epochs": 2})
    parts = [part.tokens.tolist() for part in train_rl.minibatches(config, batch)]
    assert parts == [list(range(8)), list(range(8, 16))] * 2
