"""How good stage I's verifications are, where the data has ground truth, and what is known of them
where it has none (method page, section 1.5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from spark_jax.data.records import (
    Aggregated,
    ParseFailure,
    Solution,
    Verification,
    VerifiedSolution,
)
from spark_jax.verification.aggregate import AGGREGATIONS

# Voting amplifies whatever side of 1/2 the verifier is on. Between 1/2 and this it helps little.
SAFE_DETECTION_RATE = 0.6


def report(
    verified: Sequence[VerifiedSolution], solutions: Sequence[Solution]
) -> dict[str, dict[str, Any]]:
    """Per method, how its verifications compare with the ground truth of the solutions.

    Steps and answers are compared each where they are known: data with answers and no step labels
    has the two outcome accuracies, data with neither has the rates below that need no truth. A rate
    is None, never NaN, where there is nothing to divide by. Per method:

    - `step_accuracy`: share of steps whose verdict equals the step's label;
    - `overall_accuracy`: share of solutions whose overall verdict equals `correct`;
    - `derived_outcome_accuracy`: the same for "Yes iff every step is judged correct";
    - `validity_rate`: share of the sampled verifications that are valid;
    - `agreement`: mean of `Aggregated.agreement`;
    - `exact_match_rate`: share of votes that a chosen verification equals;
    - `yes_rate`: share of the verifications whose overall verdict is Yes;
    - `consistent_rate`: share of them whose overall verdict is Yes iff every step is judged
      correct;
    - `num_solutions`, `num_with_verification`, `num_with_step_labels`, `num_with_outcome`,
      `num_steps`: what the rates are over;
    - `num_without_ground_truth`: verified solutions with neither label, skipped in the accuracies;
    - `reasons`, `parse_failures`, `merges`: counts by name;
    - `detection_rate`, `false_alarm_rate`, `num_wrong_steps`, `warning`: `sampled_detection` of the
      samples that the method chose from.

    Args:
        verified: of `pipeline.verify_solutions`.
        solutions: those verified, with `step_labels` and `correct` where known.

    Raises:
        ValueError: a verified solution that is not among `solutions`, or labels of another length.
    """
    by_key = {(solution.problem_id, solution.index): solution for solution in solutions}
    pairs = [(record, _solution(record, by_key)) for record in verified]
    methods = dict.fromkeys(item.method for record in verified for item in record.aggregated)
    return {method: _report_method(method, pairs) for method in methods}


def sampled_detection(
    samples: Iterable[tuple[Sequence[Verification | ParseFailure], Solution]],
) -> dict[str, Any]:
    """How often single sampled verifications mark a truly wrong step incorrect.

    Below 1/2 a vote over samples makes verdicts worse, not better (Condorcet), so the number is to
    be looked at before voting; `warning` says so in words, or is None.

    Args:
        samples: (the N samples of a solution, the solution); without `step_labels` it is skipped.

    Returns:
        detection_rate: share of (valid sample, truly wrong step) marked incorrect, or None;
        false_alarm_rate: share of (valid sample, truly right step) marked incorrect, or None;
        num_wrong_steps: number of (valid sample, truly wrong step); warning: a sentence or None.
    """
    marked: Counter[tuple[bool, bool]] = Counter()
    for verifications, solution in samples:
        for verification in verifications:
            if isinstance(verification, Verification) and solution.step_labels is not None:
                marked.update(zip(_labels(solution, verification), verification.verdicts))
    wrong = marked[False, False] + marked[False, True]
    detection = _rate(marked[False, False], wrong)
    return {
        "detection_rate": detection,
        "false_alarm_rate": _rate(marked[True, False], marked[True, False] + marked[True, True]),
        "num_wrong_steps": wrong,
        "warning": _detection_warning(detection),
    }


def _report_method(
    method: str, pairs: Sequence[tuple[VerifiedSolution, Solution]]
) -> dict[str, Any]:
    items = [
        (item, record, solution)
        for record, solution in pairs
        for item in record.aggregated
        if item.method == method
    ]
    chosen_from = [(_samples(method, record), solution) for _, record, solution in items]
    samples = [verification for group, _ in chosen_from for verification in group]
    failures = [sample.reason for sample in samples if isinstance(sample, ParseFailure)]
    agreements = [item.agreement for item, _, _ in items if item.agreement is not None]
    exact = [item.exact_match for item, _, _ in items if item.exact_match is not None]
    chosen = [item.verification for item, _, _ in items if item.verification is not None]
    return {
        "num_solutions": len(items),
        "num_with_verification": len(chosen),
        "num_without_ground_truth": sum(
            solution.step_labels is None and solution.correct is None for _, _, solution in items
        ),
        **_accuracies([(item, solution) for item, _, solution in items]),
        "validity_rate": _rate(len(samples) - len(failures), len(samples)),
        "agreement": _rate(sum(agreements), len(agreements)),
        "exact_match_rate": _rate(sum(exact), len(exact)),
        "yes_rate": _rate(sum(v.overall for v in chosen), len(chosen)),
        "consistent_rate": _rate(sum(v.overall == all(v.verdicts) for v in chosen), len(chosen)),
        "reasons": dict(Counter(item.reason for item, _, _ in items)),
        "parse_failures": dict(Counter(failures)),
        "merges": dict(Counter(item.merge for item, _, _ in items if item.merge is not None)),
        **sampled_detection(chosen_from),
    }


def _accuracies(items: Sequence[tuple[Aggregated, Solution]]) -> dict[str, Any]:
    """Against `step_labels` and `correct`, each over the solutions that have it."""
    judged = [(item.verification, solution) for item, solution in items if item.verification]
    steps = [
        verdict == label
        for verification, solution in judged
        if solution.step_labels is not None
        for verdict, label in zip(verification.verdicts, _labels(solution, verification))
    ]
    outcomes = [(v, solution.correct) for v, solution in judged if solution.correct is not None]
    overall = [verification.overall == correct for verification, correct in outcomes]
    derived = [all(verification.verdicts) == correct for verification, correct in outcomes]
    return {
        "num_with_step_labels": sum(solution.step_labels is not None for _, solution in judged),
        "num_with_outcome": len(outcomes),
        "num_steps": len(steps),
        "step_accuracy": _rate(sum(steps), len(steps)),
        "overall_accuracy": _rate(sum(overall), len(overall)),
        "derived_outcome_accuracy": _rate(sum(derived), len(derived)),
    }


def _samples(method: str, record: VerifiedSolution) -> Sequence[Verification | ParseFailure]:
    return record.reference_samples if AGGREGATIONS[method].reference else record.samples


def _solution(record: VerifiedSolution, by_key: dict[tuple[str, int], Solution]) -> Solution:
    key = (record.problem_id, record.solution_index)
    if key not in by_key:
        raise ValueError(f"verified solution {key} is not among the solutions given")
    return by_key[key]


def _labels(solution: Solution, verification: Verification) -> Sequence[bool]:
    labels = solution.step_labels or ()
    if len(labels) != len(verification.verdicts):
        raise ValueError(
            f"solution {solution.index} of problem {solution.problem_id!r} has {len(labels)} step "
            f"labels, its verification {len(verification.verdicts)} verdicts"
        )
    return labels


def _rate(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _detection_warning(detection: float | None) -> str | None:
    if detection is None or detection >= SAFE_DETECTION_RATE:
        return None
    found = f"sampled verifications mark only {detection:.1%} of the truly wrong steps incorrect"
    if detection < 0.5:
        return f"{found}: below one half voting makes step verdicts worse; use a better verifier"
    return f"{found}: voting helps little below {SAFE_DETECTION_RATE:.0%}"
