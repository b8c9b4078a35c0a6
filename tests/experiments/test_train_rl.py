"""RL runs: every reward and advantage, references out of reach, resumed bit for bit.

Runs are shared where tests may (`runs`), and have the same number of steps and one of two learning
rates, since each other optimiser is another program to compile.
"""

import dataclasses
import json
import threading
from functools import partial

import jax
import numpy as np
import pytest
from compilations import Compilations
from experiment_runs import Stop, corrupt_references, metric_rows, stop_at, weights
from flax.core import FrozenDict

from spark_jax import tasks
from spark_jax.advantages import ADVANTAGES, Advantage, AdvantageInputs, AdvantageSettings
from spark_jax.data.records import SamplingSettings
from spark_jax.experiments import configuration, evaluate, loading, rl_log, rl_setup, train_rl
from spark_jax.experiments.configuration import ConfigError
from spark_jax.models import transformer
from spark_jax.response_format import MAX_STEPS
from spark_jax.rewards.prm import REWARDS, judge
from spark_jax.text_generation import SampledText, encode, token_step_ids
from spark_jax.training import spread, state
from spark_jax.training.metrics import read_metrics
from spark_jax.training.policy import Objective, PolicyBatch
from spark_jax.training.run_folder import RunFolder

JUDGE = "arithmetic_chains"  # the base verifies step by step; as an ORM it is never readable
FAST = {"rl.optimizer.learning_rate": 0.02}


@pytest.fixture(scope="module")
def config(tiny):
    return configuration.changed(tiny, {"rl.steps": 3})


def run(config, path, changes):
    return train_rl.run(configuration.changed(config, changes), path)


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    """The folder of the run with such changes, made when a test first asks for it."""
    made = {}

    def folder(changes):
        name = json.dumps(changes, sort_keys=True)
        if name not in made:
            path = tmp_path_factory.mktemp("run")
            run(config, path, changes)
            made[name] = path
        return made[name]

    return folder


def learned(path, config):
    """Whether the policy differs from the one the run began with."""
    policy, *_ = loading.load_model(str(path / "model"))
    base, *_ = loading.load_model(config.model)
    return differ(policy, base)


def differ(params, others):
    return any(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), params, others)))


@pytest.mark.parametrize("reward", REWARDS)
def test_every_reward_runs(config, tmp_path, reward):
    kind = (REWARDS[reward].judges or ("prm_cot",))[-1]
    changes = {"rl.reward": reward, "prm.kind": kind, "rl.reward_model": JUDGE}
    summary = run(config, tmp_path, changes)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["policy/logprob_gap_max"] < 1e-4 for row in rows[1:])
    assert 0 <= summary["evaluation"]["accuracy"]["estimate"] <= 1
    asked = [row["reward_model/called"] for row in rows[1:]]
    assert (max(asked) > 0) == bool(REWARDS[reward].judges)
    assert len(samples(tmp_path, 2)) == 8
    first = (tmp_path / "samples" / "step_000002.jsonl").read_text().splitlines()[0]
    assert set(json.loads(first)) == {"problem", "response", "reward"}


@pytest.fixture(scope="module")
def longest(config):
    """A prompt length that some of the problems exceed, and their ids."""
    base, task = loading.load_model(config.model), loading.load_task(config)
    problems = task.problems(config.rl.num_problems, config.seed, "train")
    prompts = encode(base.tokenizer, [task.text_format.solve_prompt(p) for p in problems])
    limit = min(len(ids) for ids in prompts)
    long = {p.id for p, ids in zip(problems, prompts, strict=True) if len(ids) > limit}
    assert 0 < len(long) < len(problems)
    return limit, long


@pytest.mark.draws
def test_steps_after_the_first_compile_nothing(config, longest, tmp_path):
    """However many tokens their responses have; and problems with too long prompts are counted and
    not trained on."""
    limit, long = longest
    changes = {"rl.reward": "rule_based", "rl.steps": 4, "decode.max_prompt_length": limit}
    by_step = []
    with Compilations() as compiled:
        summary = train_rl.run(
            configuration.changed(config, changes),
            tmp_path,
            lambda *_: by_step.append(len(compiled.names)),
        )
    assert by_step[1:] == by_step[1:2] * 4
    assert summary["data"]["too_long"] == len(long)
    for file in (tmp_path / "samples").iterdir():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert rows
        assert not long & {row["problem"] for row in rows}
    assert (tmp_path / "plots" / "training_curves.png").stat().st_size > 0
    with pytest.raises(ConfigError, match="all 8 prompts have more than 1 tokens"):
        run(config, tmp_path / "none", {**changes, "decode.max_prompt_length": 1})


OPTIONS = {
    "selective": {"discount": 0.5},
    "global_step": {"process_weight": 0.5},
    "spro": {"beta": 0.2, "granularity": "step", "outcome_weight": 0.5},
    "masked_step": {"baseline": "pool"},
    "reinforce++": {"group_baseline": True},
}


@pytest.fixture(scope="module")
def collected(config, tmp_path_factory):
    """One rollout, judged step by step, with rewards that differ within every group; and the state
    that it was sampled from. Two micro-batches: all advantages share one compiled update."""
    changes = {
        "rl.reward": "step_average",
        "rl.reward_model": JUDGE,
        "rl.advantage": "spro",  # scores the reference policy, which others do not read
        "rl.accumulation_steps": 2,
    }
    config = configuration.changed(config, changes)
    loaded = loading.load_trainable(config, config.model)
    folder = RunFolder.open(tmp_path_factory.mktemp("collected"), config)
    setup = rl_setup.make_setup(config, folder, loaded)
    optimizer, key = rl_setup.make_optimizer(config), jax.random.key(0)
    train = spread.new_state(state.copy(loaded.params), optimizer, key, loaded.config)
    rollout, samples = train_rl.sample(setup, loaded.params, 1, rl_log.Stopwatch())
    policy, reference = train_rl.score(setup, train_rl.RLState(train, loaded.params), rollout)
    texts, settings = [sample.text for sample in samples], SamplingSettings(max_new_tokens=52)
    judged = judge(
        setup.reward_sampler(), setup.judge_format, setup.problems_of(1), texts, "prm_cot",
        settings, 1,
    )  # fmt: skip
    assert np.any(judged.verdicts)
    inputs = AdvantageInputs(
        rewards=np.arange(len(texts), dtype=np.float32),
        mask=rollout.mask,
        group_size=config.rl.group_size,
        policy_logprobs=policy,
        ref_logprobs=reference,
        verdicts=judged.verdicts,
        step_ids=step_ids_of(setup.policy.tokenizer, samples, rollout.tokens.shape[1]),
        num_steps=MAX_STEPS,
    )
    return setup, train, rollout, inputs


def step_ids_of(tokenizer, samples, num_tokens):
    split_steps = tasks.load("arithmetic_chains").text_format.split_steps
    return token_step_ids(split_steps, tokenizer, samples, num_tokens, MAX_STEPS)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_every_advantage_teaches(collected, advantage):
    setup, train, rollout, inputs = collected
    options = OPTIONS.get(advantage, {})
    changes = {f"rl.advantage_options.{name}": value for name, value in options.items()}
    config = configuration.changed(setup.config, {"rl.advantage": advantage, **changes})
    settings = rl_setup.advantage_settings(config)
    assert settings.name == advantage
    assert dict(settings.options) == options
    advantages, _ = train_rl.make_advantages(settings, inputs, None)
    after, (metrics,) = train_rl.update(setup, state.copy(train), rollout, inputs, advantages)
    assert metrics["update_skipped"] == 0
    # The masked step advantage alone says nothing while policy and reference are the same, and so
    # they stay the same: not even rounding may move the weights.
    assert differ(after.params, train.params) == (advantage != "masked_step")


def test_metrics_of_process_rewards_are_those_of_the_advantage(collected):
    """With its options: twice the spread, twice the metric."""
    inputs = dataclasses.replace(collected[3], policy_logprobs=0.5 * collected[3].policy_logprobs)

    def size(**options):
        settings = AdvantageSettings("spro", FrozenDict(options))
        return float(train_rl.make_advantages(settings, inputs, None)[1]["spro/msa_mean_absolute"])

    one, two = size(process_std=0.1), size(process_std=0.2)
    assert two == pytest.approx(2 * one, rel=1e-4)
    assert size(return_clip=1e-3) < 0.1 * size()
    assert size(baseline="pool") != size()


def test_an_advantage_that_reads_what_it_does_not_name_is_refused_at_once(
    config, tmp_path, monkeypatch
):
    """It would train on verdicts that are not there."""
    reads = Advantage(lambda inputs: inputs.verdicts.sum() * inputs.mask)
    monkeypatch.setitem(ADVANTAGES, "own", reads)
    with pytest.raises(ConfigError, match=r"'own'.*says that it needs \[\]"):
        run(config, tmp_path / "rl", {"rl.reward": "rule_based", "rl.advantage": "own"})
    named = Advantage(reads.function, needs=frozenset({"verdicts"}))
    monkeypatch.setitem(ADVANTAGES, "own", named)
    with pytest.raises(ConfigError, match="'own' needs step verdicts"):
        run(config, tmp_path / "rl", {"rl.reward": "rule_based", "rl.advantage": "own"})
    assert not (tmp_path / "rl").exists()


def test_another_reference_policy(config, tmp_path):
    """Against another reference than itself, the masked step advantage alone does teach."""
    base = loading.load_model(config.model)
    other = jax.tree.map(lambda x: 0.9 * x, base.params)
    loading.save_model(tmp_path / "other", base._replace(params=other))
    changes = {"rl.reward": "random", "rl.advantage": "masked_step", "rl.accumulation_steps": 2}
    changes["rl.reference_model"] = str(tmp_path / "other")
    run(config, tmp_path / "run", changes)
    assert learned(tmp_path / "run", config)


def test_what_training_stores_is_part_of_the_model_that_is_trained(config):
    config = configuration.changed(config, {"remat_save": ("qkv_proj",)})
    model = loading.load_model(config.model).config
    part = configuration.sub_config(config, "remat_save", "rl")
    assert loading.how_computed(model, part).remat_save == ("qkv_proj",)
    assert loading.how_computed(model, configuration.sub_config(config, "rl")).remat_save == ()


def test_a_reference_policy_that_moves_with_the_policy_gives_no_process_reward(runs):
    sizes = {}
    for decay in (None, 0.0, 0.9):
        changes = {"rl.reward": "rule_based", "rl.advantage": "spro", "rl.reference_decay": decay}
        metrics = read_metrics(runs(changes) / "metrics.jsonl")
        sizes[decay] = metrics[-1]["spro/msa_mean_absolute"]
        assert 0 <= metrics[-1]["spro/process_reward_auc_truth"] <= 1
        assert "spro/process_reward_auc_verdicts" not in metrics[-1]  # nothing judges
    assert sizes[0.0] < 1e-4 * sizes[0.9]
    assert sizes[0.9] < sizes[None]


def test_a_moving_reference_that_nothing_reads_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match=r"reference_decay=0\.5 moves.*does not use"):
        run(config, tmp_path, {"rl.reward": "rule_based", "rl.reference_decay": 0.5})


@pytest.mark.parametrize("field", ["rope_theta", "num_heads"])
def test_a_reference_policy_of_another_shape_is_refused(config, tmp_path, field):
    base = loading.load_model(config.model)
    other = dataclasses.replace(base.config, **{field: getattr(base.config, field) * 2})
    params = transformer.init(other, jax.random.key(0))
    loading.save_model(tmp_path / "other", base._replace(params=params, config=other))
    changes = {"rl.reward": "random", "rl.advantage": "spro"}
    with pytest.raises(ConfigError, match=rf"rl.reference_model=.* has {field}="):
        run(config, tmp_path / "rl", {**changes, "rl.reference_model": str(tmp_path / "other")})


MANY_UPDATES = {
    "rl.reward": "random",
    "rl.minibatches": 2,
    "rl.epochs": 2,
    "rl.accumulation_steps": 2,
    "rl.objective.kl_coefficient": 0.1,
    "rl.objective.kl_estimator": "k2",
    "rl.objective.entropy_coefficient": 0.1,
    "rl.objective.aggregation": "sequence_sum_const",
}


def test_gap_is_measured_before_the_policy_moves(config, runs):
    path = runs(MANY_UPDATES)
    for row in read_metrics(path / "metrics.jsonl")[1:]:
        assert row["policy/logprob_gap_max"] < 1e-4
        assert row["policy/updates"] == 4
        assert row["policy/ratio_max"] > 1.001
    assert learned(path, config)


def test_packed_updates_are_the_unpacked_ones(runs):
    """Weights and metrics of the first rollout; one of KL and entropy, of two minibatches."""
    apart, together = (
        read_metrics(runs(MANY_UPDATES | changes) / "metrics.jsonl")[1]
        for changes in ({}, {"rl.pack": True})
    )
    for name, value in apart.items():
        if name.startswith(("policy/", "advantage/")):
            np.testing.assert_allclose(together[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    assert apart["policy/grad_norm"] > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("aggregation", "sequence_mean"),
        ("importance", "sequence"),
        ("kl_coefficient", 0.01),
        ("kl_estimator", "k2"),
        ("entropy_coefficient", 0.001),
        ("clip_low", 0.1),
        ("clip_high", 0.28),
    ],
)
def test_every_field_of_the_objective_reaches_the_update(config, field, value):
    """What each does there, `tests/training/test_policy.py` holds."""
    changed = configuration.changed(config, {f"rl.objective.{field}": value})
    assert getattr(Objective(**configuration.objective_fields(changed)), field) == value


@pytest.mark.parametrize(
    ("reward", "advantage"),
    [
        ("process_aware_outcome", "spro"),
        ("step_average", "selective"),
        ("majority_vote", "grpo"),
        ("random", "grpo"),
    ],
)
def test_references_are_out_of_reach(config, runs, tmp_path, monkeypatch, reward, advantage):
    """Corrupt every reference: the reference-free run is the same bit for bit."""
    changes = {"rl.reward": reward, "rl.advantage": advantage, "rl.reward_model": JUDGE}
    free = runs(changes)
    corrupt_references(monkeypatch)
    run(config, tmp_path, changes)
    assert weights(tmp_path) == weights(free)
    truth = [read_metrics(p / "metrics.jsonl")[1]["truth/accuracy"] for p in (free, tmp_path)]
    assert truth[0] != truth[1]  # the corruption did reach what looks at references


def test_rule_based_runs_depend_on_references(config, runs, tmp_path, monkeypatch):
    """The test above can fail: with corrupted references RLVR is another run."""
    changes = {"rl.reward": "rule_based"}
    checked = runs(changes)
    corrupt_references(monkeypatch)
    run(config, tmp_path, changes)
    assert weights(tmp_path) != weights(checked)


@pytest.mark.parametrize(
    ("calls", "decay", "ahead"), [(1, None, False), (3, None, False), (3, 0.5, True)]
)
def test_resumed_run_equals_uninterrupted(config, runs, tmp_path, calls, decay, ahead):
    """Killed before the first checkpoint, and between two; started again in the same folder."""
    changes = {
        "rl.reward": "rule_based",
        "rl.advantage": "spro",
        "rl.save_every": 2 - ahead,
        "rl.evaluate_every": 2,
        "rl.reference_decay": decay,
        "rl.one_step_off_policy": ahead,
    }
    whole = runs(changes)
    with pytest.raises(Stop):
        train_rl.run(configuration.changed(config, changes), tmp_path, stop_at(calls))
    run(config, tmp_path, changes)
    assert weights(tmp_path) == weights(whole)
    assert metric_rows(tmp_path) == metric_rows(whole)


def samples(path, step):
    rows = (path / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(row)["response"] for row in rows]


def test_one_step_off_policy_samples_before_the_updates_and_corrects_for_it(runs):
    common, ahead = {"rl.reward": "rule_based"}, {"rl.one_step_off_policy": True}
    still = {"rl.filter_low": 0.999, "rl.filter_high": 0.9999}  # no group is trained on
    on, off, still = (runs(common | more) for more in (FAST, FAST | ahead, still))
    assert samples(on, 1) == samples(off, 1) == samples(still, 1)
    # The second rollout is of the policy that the first one is of, the third is not.
    assert samples(off, 2) == samples(still, 2) != samples(on, 2)
    assert samples(off, 3) != samples(still, 3)
    # Importance ratios are those to the policy that sampled.
    gaps = [[row["policy/logprob_gap_max"] for row in metric_rows(path)[1:]] for path in (on, off)]
    assert max(*gaps[0], gaps[1][0]) < 1e-4
    assert min(gaps[1][1:]) > 0.01


@pytest.mark.parametrize("ahead", [True, False])
def test_one_step_off_policy_grades_while_it_samples(config, tmp_path, monkeypatch, ahead):
    """Graders that wait for the second rollout get it; on policy they wait in vain."""
    second_sampled, came = threading.Event(), []
    grade, reward, sample = evaluate.is_right, REWARDS["rule_based"], train_rl.sample

    def after_the_second(work, *args):
        came.append(second_sampled.wait(60 if ahead else 0.1))
        return work(*args)

    def noted(setup, params, step, stopwatch):
        made = sample(setup, params, step, stopwatch)
        if step == 2:
            second_sampled.set()
        return made

    monkeypatch.setattr(evaluate, "is_right", partial(after_the_second, grade))
    own = dataclasses.replace(reward, function=partial(after_the_second, reward.function))
    monkeypatch.setitem(REWARDS, "rule_based", own)
    monkeypatch.setattr(train_rl, "sample", noted)
    run(config, tmp_path, {"rl.reward": "rule_based", "rl.one_step_off_policy": ahead})
    assert all(came) == ahead


def test_same_seed_same_run_and_another_seed_another(config, runs, tmp_path):
    changes = {"rl.reward": "rule_based"}
    run(config, tmp_path / "again", changes)
    run(config, tmp_path / "other", {**changes, "seed": 1})
    assert weights(tmp_path / "again") == weights(runs(changes)) != weights(tmp_path / "other")


def test_groups_outside_the_filter_are_not_trained_on(config, tmp_path):
    changes = {"rl.reward": "rule_based", "rl.filter_low": 0.2, "rl.filter_high": 0.8}
    run(config, tmp_path, {**changes, "rl.steps": 6})
    rows = read_metrics(tmp_path / "metrics.jsonl")[1:]
    assert any(row["response/trained_on"] < 1 for row in rows)
    assert any(row["response/trained_on"] > 0 for row in rows)
    assert all(row["response/trained_on"] <= 1 - row["reward/zero_variance_groups"] for row in rows)


def test_a_missing_reward_model_is_named(config, tmp_path):
    with pytest.raises(ValueError, match=r"needs rl.reward_model.*train_prm"):
        run(config, tmp_path, {})
    with pytest.raises(ConfigError, match=r"rl.reward_model='runs/a/model' is not a model"):
        run(config, tmp_path / "rl", {"rl.reward_model": "runs/a/model"})
    assert not (tmp_path / "rl").exists()


def test_step_ids_of_tokens():
    """Every token of a step block, tags included, has the step's number; the rest −1."""
    tokenizer = loading.load_model("arithmetic_chains").tokenizer
    text = r"<think> <step> 1: 7 +5 =2 </step> <step> 2: 2 +1 =3 </step> </think>"
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    sample = SampledText(text, (*ids, tokenizer.eos_token_id), True)
    got = step_ids_of(tokenizer, [sample], 18)
    np.testing.assert_array_equal(got[0], [-1] + [0] * 6 + [1] * 6 + [-1] * 5)
    unclosed = tokenizer.encode("<think> <step> 1: 7", add_special_tokens=False)
    sample = SampledText("<think> <step> 1: 7", (*unclosed, tokenizer.eos_token_id), True)
    got = step_ids_of(tokenizer, [sample], 6)
    np.testing.assert_array_equal(got[0], [-1, 0, 0, 0, -1, -1])  # the end is in no step


def test_minibatches_are_whole_groups_and_cover_the_batch(config):
    rows = np.arange(16)
    batch = PolicyBatch(rows, rows, rows, rows, rows, rows)
    config = configuration.changed(config, {"rl.minibatches": 2, "rl.epochs": 2})
    parts = [part.tokens.tolist() for part in train_rl.minibatches(config, batch)]
    assert parts == [list(range(8)), list(range(8, 16))] * 2
