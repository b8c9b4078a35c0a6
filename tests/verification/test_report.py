import dataclasses
import json
import random

import pytest

from spark_jax.data.records import (
    ParseFailure,
    Provenance,
    SamplingSettings,
    Solution,
    Verification,
    VerifiedSolution,
)
from spark_jax.verification.aggregate import AGGREGATIONS, aggregate
from spark_jax.verification.report import report, sampled_detection

PROVENANCE = Provenance("m", SamplingSettings(), 0, 0)
METHODS = ("single", "step_consistency", "reference_guided")


def random_data(seed, num=40):
    rng = random.Random(seed)
    solutions, verified = [], []
    for i in range(num):
        steps = rng.randint(1, 4)
        labels = tuple(rng.random() < 0.6 for _ in range(steps))
        solution = Solution(
            "p",
            i,
            "",
            ("s",) * steps,
            None,
            step_labels=labels if rng.random() < 0.7 else None,
            correct=all(labels) if rng.random() < 0.7 else None,
        )

        def draw(labels=labels):
            if rng.random() < 0.2:
                return ParseFailure(rng.choice(["no_steps", "missing_overall"]), "")
            verdicts = tuple(label ^ (rng.random() < 0.3) for label in labels)
            return Verification("", verdicts, rng.random() < 0.5)

        free, guided = (tuple(draw() for _ in range(3)) for _ in range(2))
        items = tuple(
            aggregate(guided if AGGREGATIONS[m].reference else free, m, key=i) for m in METHODS
        )
        solutions.append(solution)
        verified.append(VerifiedSolution("p", i, free, guided, items, PROVENANCE))
    return verified, solutions


@pytest.mark.parametrize("seed", range(5))
def test_rates_are_those_of_counting_by_hand(seed):
    verified, solutions = random_data(seed)
    result = report(verified, solutions)
    assert tuple(result) == METHODS
    for m, method in enumerate(METHODS):
        steps, overall, derived, agreements, valid, caught = [], [], [], [], [], []
        alarms, exact, yes, consistent, skipped = [], [], [], [], 0
        for record, solution in zip(verified, solutions):
            item = record.aggregated[m]
            samples = record.reference_samples if method == "reference_guided" else record.samples
            skipped += solution.step_labels is None and solution.correct is None
            for sample in samples:
                valid.append(isinstance(sample, Verification))
                if valid[-1] and solution.step_labels is not None:
                    for k, label in enumerate(solution.step_labels):
                        (alarms if label else caught).append(not sample.verdicts[k])
            if item.verification is None:
                continue
            agreements.append(item.agreement)
            exact.append(item.exact_match)
            yes.append(item.verification.overall)
            consistent.append(yes[-1] is (False not in item.verification.verdicts))
            if solution.step_labels is not None:
                for k, label in enumerate(solution.step_labels):
                    steps.append(item.verification.verdicts[k] is label)
            if solution.correct is not None:
                overall.append(item.verification.overall is solution.correct)
                derived.append((False not in item.verification.verdicts) is solution.correct)
        row = result[method]
        for name, values in {
            "step_accuracy": steps,
            "overall_accuracy": overall,
            "derived_outcome_accuracy": derived,
            "agreement": agreements,
            "validity_rate": valid,
            "detection_rate": caught,
            "false_alarm_rate": alarms,
            "yes_rate": yes,
            "consistent_rate": consistent,
        }.items():
            assert row[name] == pytest.approx(sum(values) / len(values)), name
        assert row["exact_match_rate"] == (
            pytest.approx(sum(exact) / len(exact)) if method == "step_consistency" else None
        )
        assert row["num_solutions"] == 40
        assert row["num_without_ground_truth"] == skipped > 0
        assert row["num_with_verification"] == len(agreements)
        assert (row["num_steps"], row["num_with_outcome"]) == (len(steps), len(overall))
        assert row["num_wrong_steps"] == len(caught)
        assert sum(row["reasons"].values()) == 40
        assert sum(row["parse_failures"].values()) == valid.count(False)
        assert row["merges"] == {}


@pytest.mark.parametrize(
    ("caught", "said"),
    [(3, "below one half"), (4, "below one half"), (5, "helps little"), (6, None)],
)
def test_a_verifier_that_misses_errors_is_warned_of(caught, said):
    solution = Solution("p", 0, "", ("s",), None, step_labels=(False,))
    samples = [Verification("", (i >= caught,), True) for i in range(10)]
    result = sampled_detection([([*samples, ParseFailure("no_steps", "")], solution)])
    assert result["detection_rate"] == caught / 10
    assert result["num_wrong_steps"] == 10
    assert result["false_alarm_rate"] is None
    assert (result["warning"] is None) if said is None else (said in result["warning"])


NEEDS_STEP_LABELS = {"step_accuracy", "detection_rate", "false_alarm_rate", "warning"}
NEEDS_ANSWERS = {"overall_accuracy", "derived_outcome_accuracy"}
OVER_STEPS = {"num_steps", "num_wrong_steps", "num_with_step_labels"}


@pytest.mark.parametrize("known", ["answers", "nothing"])
def test_what_is_not_known_is_none_and_changes_nothing_else(known):
    """Real data: no step labels, and maybe no answers. What needs no truth is as with it."""
    verified, solutions = random_data(0)
    blind = [dataclasses.replace(s, step_labels=None) for s in solutions]
    missing, zero = NEEDS_STEP_LABELS, OVER_STEPS
    if known == "nothing":
        blind = [dataclasses.replace(s, correct=None) for s in blind]
        missing, zero = missing | NEEDS_ANSWERS, zero | {"num_with_outcome"}
    for method, row in report(verified, blind).items():
        full = report(verified, solutions)[method]
        assert {name for name, value in row.items() if value is None} - {"exact_match_rate"} == (
            missing
        )
        assert {name: row[name] for name in zero} == dict.fromkeys(zero, 0)
        changed = missing | zero | {"num_without_ground_truth"}
        assert {k: v for k, v in row.items() if k not in changed} == {
            k: v for k, v in full.items() if k not in changed
        }
        json.dumps(row, allow_nan=False)
    assert report([], []) == {}
    assert row["num_without_ground_truth"] == sum(s.correct is None for s in blind)


def test_records_that_do_not_belong_together_are_refused():
    verified, solutions = random_data(0)
    with pytest.raises(ValueError, match=r"\('p', 39\) is not among"):
        report(verified, solutions[:-1])
    longer = [dataclasses.replace(s, step_labels=(True,) * 5) for s in solutions]
    with pytest.raises(ValueError, match="has 5 step labels"):
        report(verified, longer)
