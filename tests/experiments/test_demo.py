"""What the demo is there to show, in its quick form: one fixed seed."""

import jax
import pytest

from spark_jax.experiments import configuration, launch, pipeline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    config = configuration.changed(configuration.load_config("configs/demo.py"), {"quick": True})
    compiled = launch.CompiledPrograms()
    yield pipeline.run(config, tmp_path_factory.mktemp("demo")) | {"compiled": compiled.programs}
    jax.config.update("jax_disable_most_optimizations", before)


def after(results, arm):
    return results["stage3"][arm]["after"]["estimate"]


def test_few_programs_are_compiled(results):
    """Jitted functions, each once for every size that a stage has; few single operations."""
    assert results["compiled"] <= 60


def test_verifier_is_good_enough_to_vote(results):
    assert results["verifier"]["detection_rate"]["estimate"] >= 0.6
    assert results["verifier"]["warnings"] == []


def test_step_votes_beat_single_verifications(results):
    scores = {method: by_n["16"] for method, by_n in results["stage1"].items()}
    step, single = (scores[m]["step_accuracy"]["estimate"] for m in ("step_consistency", "single"))
    assert step - single >= 0.06


def test_step_vote_targets_make_the_better_reward_model(results):
    f1 = {method: scores["f1"]["estimate"] for method, scores in results["stage2"].items()}
    assert f1["step_consistency"] > f1["single"]


def test_reward_model_trains_a_better_policy(results):
    assert results["stage3"]["prm_grpo"]["gain"]["estimate"] >= 0.2


def test_random_reward_does_not_improve_the_policy(results):
    assert results["stage3"]["random"]["gain"]["estimate"] <= 0.02


def test_majority_vote_stays_below_the_reward_model(results):
    assert after(results, "majority_vote") < after(results, "prm_grpo")


def test_spro_is_neither_much_better_nor_much_worse(results):
    assert abs(after(results, "prm_spro") - after(results, "prm_grpo")) <= 0.05


def test_sampler_and_scorer_agree_all_along(results):
    for arm in results["stage3"].values():
        (gaps,) = arm["curves"]["policy/logprob_gap_max"]["values"]
        assert max(gaps) < 1e-4
