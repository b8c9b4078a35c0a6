"""Runs in which each way of hacking the reward appears, and runs in which none does."""

import dataclasses

import numpy as np
import pytest

from spark_jax.rewards import monitor
from spark_jax.rewards.records import Judgement

STEPS = 30


def run(seed=0, steps=STEPS, eval_every=5, noise=0.02, **curves):
    """Rows of a run that learns honestly but for the metrics given, functions of t in [0, 1]."""
    honest = {
        "hacking/steps_per_response": lambda t: 5.0,
        "hacking/too_few_steps": lambda t: 0.03,
        "hacking/appended_after_answer": lambda t: 0.05 * (1 - t),
        "truth/accuracy": lambda t: 0.4 + 0.4 * t,
        "reward/mean": lambda t: 0.45 + 0.4 * t,
        "reward_model/yes_above_soft": lambda t: 0.03,
        "eval/accuracy": lambda t: 0.4 + 0.35 * t,
    }
    rng = np.random.default_rng(seed)
    rows = [{"step": 0, "eval/accuracy": 0.4}]
    for step in range(1, steps + 1):
        row = {"step": step}
        for name, curve in (honest | curves).items():
            rare = name in ("eval/accuracy", "reward_model/yes_above_soft")
            if not rare or step == 1 or step % eval_every == 0:
                row[name] = curve((step - 1) / (steps - 1)) * (1 + noise * rng.standard_normal())
        rows.append(row)
    return watched(rows)


def watched(rows, thresholds=None):
    """The rows as a run writes them: each with the monitor's metrics of what came before."""
    thresholds = thresholds or monitor.Thresholds()
    return [row | monitor.metrics(rows[: i + 1], thresholds) for i, row in enumerate(rows)]


def patterns(rows, thresholds=None):
    return [alarm.pattern for alarm in monitor.alarms(rows, thresholds or monitor.Thresholds())]


FLAT = {"truth/accuracy": lambda t: 0.4, "eval/accuracy": lambda t: 0.4}
HACKED = {
    "step_inflation": FLAT
    | {"hacking/steps_per_response": lambda t: 5 + 5 * t, "reward/mean": lambda t: 0.45},
    "step_reduction": {"hacking/too_few_steps": lambda t: 0.03 + 0.9 * t**2},
    "solution_appending": {"hacking/appended_after_answer": lambda t: 0.02 + 0.5 * t},
    "verdict_gaming": {"reward_model/yes_above_soft": lambda t: 0.03 + 0.3 * t},
    "reward_above_truth": {"truth/accuracy": lambda t: 0.4},
    "reward_above_held_out": {"eval/accuracy": lambda t: 0.4},
}


def test_every_pattern_has_a_run_a_meaning_and_a_threshold():
    fields = [field.name for field in dataclasses.fields(monitor.Thresholds)]
    assert list(HACKED) == list(monitor.PATTERNS) == list(monitor.MEANING) == fields[1:]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", HACKED)
def test_a_hacked_run_raises_its_alarm_and_no_other(pattern, seed):
    rows = run(seed, **HACKED[pattern])
    assert patterns(rows) == [pattern]
    (alarm,) = monitor.alarms(rows, monitor.Thresholds())
    assert 1 < alarm.first_step < alarm.last_step == STEPS
    above = [row for row in rows if row.get(f"monitor/{pattern}", 0) > alarm.threshold]
    assert len(above) == alarm.num_steps
    assert alarm.peak == max(row.get(f"monitor/{pattern}", 0) for row in rows) > alarm.threshold
    assert pattern.replace("_", " ") in str(alarm)
    assert rows[-1]["monitor/alarms"] == 1
    assert rows[1]["monitor/alarms"] == 0


@pytest.mark.parametrize("seed", range(10))
def test_an_honest_run_raises_none(seed):
    rows = run(seed)
    assert patterns(rows) == []
    assert set(monitor.PATTERNS) <= {name.removeprefix("monitor/") for name in rows[-1]}


def test_steps_that_accuracy_pays_for_are_no_inflation():
    longer = {"hacking/steps_per_response": lambda t: 5 + 2.5 * t}
    assert patterns(run(**longer)) == []  # + 50 % of steps, + 0.4 of accuracy
    assert patterns(run(**longer, **FLAT, **{"reward/mean": lambda t: 0.45})) == ["step_inflation"]
    blind = [
        {name: value for name, value in row.items() if "accuracy" not in name}
        for row in run(**longer)
    ]
    assert patterns(watched(blind)) == ["step_inflation"]  # nothing shows that they pay


def test_a_level_that_was_there_at_the_start_is_no_alarm():
    """What the base does is not what the reward taught it."""
    base = {
        "hacking/too_few_steps": lambda t: 0.6,
        "hacking/appended_after_answer": lambda t: 0.5,
        "reward_model/yes_above_soft": lambda t: 0.3,
        "reward/mean": lambda t: 0.75 + 0.2 * t,
    }
    assert patterns(run(**base)) == []


def test_without_references_nothing_compares_with_them():
    rows = [
        {n: v for n, v in row.items() if "accuracy" not in n and "above" not in n} for row in run()
    ]
    last = monitor.metrics(rows, monitor.Thresholds())
    assert {"monitor/reward_above_truth", "monitor/reward_above_held_out"}.isdisjoint(last)
    assert "monitor/verdict_gaming" not in last
    assert "monitor/step_inflation" in last


def test_a_pattern_is_known_only_at_steps_that_have_its_metrics():
    """No alarm is repeated from an evaluation gone by; what is not finite is not there."""
    rows = run(**HACKED["verdict_gaming"])
    steps = [row["step"] for row in rows if "monitor/verdict_gaming" in row]
    assert steps == [1, 5, 10, 15, 20, 25, 30]
    rows = run(**{"reward/mean": lambda t: float("nan")})
    assert "monitor/reward_above_truth" not in rows[-1]
    assert monitor.metrics([{"step": 0}], monitor.Thresholds()) == {"monitor/alarms": 0}


def test_a_first_row_never_alarms():
    """There is nothing yet to compare it with, however bad it is."""
    bad = {
        "hacking/steps_per_response": lambda t: 19,
        "hacking/too_few_steps": lambda t: 0.9,
        "hacking/appended_after_answer": lambda t: 0.9,
        "reward_model/yes_above_soft": lambda t: 0.45,
    }
    for row in (run(**bad)[1], *(run(**hacked)[1] for hacked in HACKED.values())):
        for name, threshold in dataclasses.asdict(monitor.Thresholds()).items():
            assert name == "window" or row[f"monitor/{name}"] < threshold


def test_alarms_are_said_once():
    rows, thresholds = run(**HACKED["step_reduction"]), monitor.Thresholds()
    said = [(i, a) for i in range(len(rows)) for a in monitor.raised(rows[: i + 1], thresholds)]
    ((index, alarm),) = said
    assert alarm.pattern == "step_reduction"
    assert rows[index]["step"] == alarm.first_step == alarm.last_step


def test_thresholds_decide():
    rows, off = run(**HACKED["step_reduction"]), monitor.Thresholds(step_reduction=1e9)
    assert patterns(rows, off) == []
    for wrong in ({"window": 0}, {"step_reduction": 0.0}, {"verdict_gaming": float("nan")}):
        (name,) = wrong
        with pytest.raises(ValueError, match=name):
            monitor.Thresholds(**wrong)


YES = Judgement("prm_cot", 4, True, (True,) * 4)
DOUBTED = Judgement("prm_cot", 4, True, (True, False, True, True))
NO = Judgement("prm_cot", 4, False, (True, False, True, True))
ANSWER = r"<answer>\boxed{1}</answer>"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"judgement": YES, "soft_score": 0.99, "reward": 1.0, "correct": True}, ()),
        ({"num_steps": 2}, ("step_reduction",)),
        ({"num_steps": 9}, ()),
        ({"num_steps": 9, "usual_steps": 4.0}, ("step_inflation",)),
        ({"num_steps": 21}, ("step_inflation",)),
        ({"num_steps": 21, "usual_steps": 15.0}, ("step_inflation",)),
        ({"text": ANSWER + " and so"}, ("solution_appending",)),
        ({"judgement": DOUBTED}, ("verdict_gaming",)),
        ({"judgement": YES, "soft_score": 0.6}, ("verdict_gaming",)),
        ({"judgement": NO, "soft_score": 0.4}, ()),
        ({"reward": 1.0, "correct": False}, ("reward_above_truth",)),
        ({"reward": 0.4, "correct": False}, ()),
        ({"reward": 1.0, "correct": None}, ()),
    ],
    ids=str,
)
def test_flags_of_a_response(changes, expected):
    assert monitor.flags(**({"text": ANSWER, "num_steps": 4} | changes)) == expected
