import json
import math

import numpy as np
import pytest

from spark_jax.reports import plots, study, tables
from spark_jax.reports.study import over_seeds


@pytest.mark.parametrize("missing", [None, float("nan"), "nan", "inf", np.float32("nan")])
def test_an_estimate_rests_on_the_seeds_that_have_a_value(missing):
    found = over_seeds([0.2, missing, 0.4])
    assert found.pop("per_seed") == [0.2, None, 0.4]
    assert found.pop("num_seeds") == 2
    half = 12.7062047 * np.std([0.2, 0.4], ddof=1) / math.sqrt(2)  # t of one degree of freedom
    assert found == pytest.approx({"estimate": 0.3, "low": 0.3 - half, "high": 0.3 + half})


@pytest.mark.parametrize(("values", "estimate"), [([None, 0.7], 0.7), (["nan"], None), ([], None)])
def test_there_is_no_interval_of_fewer_than_two_values(values, estimate):
    found = over_seeds(values)
    assert (found["estimate"], found["low"], found["high"]) == (estimate, None, None)
    assert found["num_seeds"] == (estimate is not None)


def test_other_strings_are_refused():
    with pytest.raises(ValueError, match="many"):
        over_seeds([0.1, "many"])


def test_missing_values_come_through_every_stage(pipeline):
    def stage1(seed, summary):
        for report in (summary["methods"], *summary["by_sample_count"].values()):
            report["single"]["step_accuracy"] = None
            report["step_consistency"]["detection_rate"] = None
        return summary

    def prm(seed, method, summary):
        return summary | {"f1": float("nan")} if (seed, method) == (1, "single") else summary

    def rl(seed, arm, step, row):
        if arm == "random":
            row["policy/entropy"] = float("nan") if seed else 0.1
            row["eval/accuracy"] = row.get("eval/accuracy", 0.5) if seed else float("nan")
        return row

    results = pipeline(stage1=stage1, prm=prm, rl=rl)
    assert results["stage1"]["single"]["16"]["step_accuracy"]["estimate"] is None
    assert results["stage2"]["single"]["f1"]["per_seed"] == pytest.approx([0.8, None, 0.82])
    assert results["stage3"]["random"]["gain"]["num_seeds"] == 2
    assert results["stage3"]["random"]["curves"]["policy/entropy"]["values"][1] == [None] * 5
    claims = results["differences"]
    assert claims["I: step accuracy, N=16, step_consistency - single"]["estimate"] is None
    claim = claims["II: F1, step_consistency - single"]
    assert claim["per_seed"] == pytest.approx([0.1, None, 0.1])
    assert claims["III: accuracy, prm_grpo - random"]["num_seeds"] == 2
    json.dumps(results, allow_nan=False)


def test_policies_whose_answers_cannot_be_graded_have_no_accuracy(pipeline, drawn, tmp_path):
    def rl(seed, arm, step, row):
        return {name: value for name, value in row.items() if "accuracy" not in name}

    results = pipeline(rl=rl)
    for scores in results["stage3"].values():
        for figure in ("before", "after", "gain"):
            assert scores[figure]["estimate"] is None
            assert scores[figure]["per_seed"] == [None] * 3
        assert scores["curves"]["response/length"]["step"] == [1, 2, 3, 4]
    assert results["differences"]["III: accuracy, prm_grpo - random"]["estimate"] is None
    assert "prm_grpo - random" in tables.as_text(results)
    plots.draw(results, tmp_path)
    drawn["overview"].canvas.draw()


def test_a_metric_that_a_run_has_at_few_steps_is_missing_at_the_others(pipeline):
    def rl(seed, arm, step, row):
        return row | ({"spro/msa_mean_absolute": 0.5} if step == seed + 1 else {})

    curve = pipeline(rl=rl)["stage3"]["random"]["curves"]["spro/msa_mean_absolute"]
    assert curve == {"step": [1, 2, 3], "values": np.where(np.eye(3), 0.5, None).tolist()}


def test_methods_that_do_more_than_vote_have_the_scores_of_all_samples(pipeline):
    methods = ("single", "step_consistency", "step_consistency+meta_critique", "reference_guided")
    stage1 = pipeline(methods, counts=(1, 4))["stage1"]
    assert list(stage1) == list(methods)
    assert list(stage1["step_consistency"]) == ["1", "4", "16"]
    assert list(stage1["step_consistency+meta_critique"]) == ["16"]
    assert list(stage1["reference_guided"]) == ["1", "4", "16"]
    assert stage1["step_consistency"]["16"]["step_accuracy"]["estimate"] == pytest.approx(0.89)
    assert stage1["step_consistency"]["4"]["step_accuracy"]["estimate"] == pytest.approx(0.83)


def test_detection_is_that_of_samples_without_a_reference(pipeline):
    def stage1(seed, summary):
        summary["methods"]["reference_guided"]["detection_rate"] = 0.99
        return summary

    results = pipeline(("reference_guided", "single"), stage1=stage1)
    assert results["verifier"]["detection_rate"]["estimate"] == pytest.approx(0.7)
    assert pipeline(("reference_guided",))["verifier"]["detection_rate"]["estimate"] is None


def test_orms_are_compared_by_overall_accuracy(pipeline):
    results = pipeline(orm=True)
    assert study.stage2_metric(results["stage2"]) == "overall_accuracy"
    assert "f1" in results["stage2"]["base"]
    claim = results["differences"]["II: overall accuracy, step_consistency - base"]
    assert claim["estimate"] == pytest.approx(0.1)


def test_arms_with_a_reward_model_come_first_and_are_what_others_are_compared_with(pipeline):
    results = pipeline()
    order = ["prm_grpo", "prm_spro", "majority_vote", "random", "rule_based"]
    assert list(results["stage3"]) == order
    pairs = [c["pair"] for c in results["differences"].values() if c["stage"] == "III"]
    assert pairs == [f"{arm}, after - before" for arm in order] + [
        f"prm_grpo - {other}" for other in order[1:]
    ]
    arms = {"rule_based": "rule_based", "random": "random"}
    assert list(pipeline(arms=arms)["stage3"]) == ["rule_based", "random"]


def test_differences_are_paired_by_seed(pipeline):
    results = pipeline()
    after = {arm: scores["after"]["per_seed"] for arm, scores in results["stage3"].items()}
    claim = results["differences"]["III: accuracy, prm_grpo - random"]
    expected = [a - b for a, b in zip(after["prm_grpo"], after["random"], strict=True)]
    assert claim["per_seed"] == pytest.approx(expected)
    assert claim["high"] - claim["low"] < 1e-9  # the seeds move both arms alike
