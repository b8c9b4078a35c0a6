"""From N sampled verifications of a solution to one target verification (method page, section 1.3).

A vote takes the majority of the *valid* verifications, per step and overall. An even split votes
"incorrect" / "No": a verifier that cannot agree has not verified. `AGGREGATIONS` is the one table
of methods; a new way of voting is one function and one line in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from spark_jax.data.records import Aggregated, ParseFailure, Verification

Seed = int | np.integer | jax.Array
# (the valid verifications, generator) -> (index of the chosen one, reason)
Voter = Callable[[Sequence[Verification], np.random.Generator], tuple[int, str]]


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """One row of `AGGREGATIONS`: how to choose, and what is done around the choice.

    `voter` chooses among the valid verifications; `votes` says whether it takes a vote; `critique`
    whether the choice is then critiqued and merged; `reference` whether the verifier is shown the
    reference answer (the only methods that may read `Problem.answer`).
    """

    voter: Voter
    votes: bool = False
    critique: bool = False
    reference: bool = False


def aggregate(
    verifications: Sequence[Verification | ParseFailure], method: str, *, key: Seed
) -> Aggregated:
    """Choose one of the N verifications of one solution.

    For a method with a critique this is the choice before it (`critique.critique_and_merge` does
    the rest); methods with the same voter and key choose the same verification.

    Args:
        verifications: the N samples, in order; those that failed to parse are counted, not used.
        method: a name in `AGGREGATIONS`.
        key: an int or a JAX key, the seed of a NumPy generator for the draw. Same key, same draw.

    Returns:
        Aggregated; its `verification` is None where no sample is valid (reason
        "no_valid_verification").

    Raises:
        ValueError: an unknown method, or valid verifications with different numbers of steps.
    """
    if method not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {method!r}: choose one of {sorted(AGGREGATIONS)}")
    valid = [(i, v) for i, v in enumerate(verifications) if isinstance(v, Verification)]
    nothing = Aggregated(
        method, None, None, None, None, None, len(verifications), 0, "no_valid_verification"
    )
    if not valid:
        return nothing
    candidates = [verification for _, verification in valid]
    choice, reason = AGGREGATIONS[method].voter(candidates, _generator(key))
    chosen = candidates[choice]
    votes = AGGREGATIONS[method].votes
    voted = voted_verdicts(candidates) if votes else None
    return dataclasses.replace(
        nothing,
        verification=chosen,
        chosen=valid[choice][0],
        voted_verdicts=voted,
        voted_overall=voted_overall(candidates) if votes else None,
        exact_match=chosen.verdicts == voted if votes else None,
        num_valid=len(valid),
        reason=reason,
        agreement=agreement(candidates),
    )


def first_valid(
    verifications: Sequence[Verification], generator: np.random.Generator
) -> tuple[int, str]:
    """`single`, the baseline: the first valid verification."""
    return 0, "first_valid"


def outcome_consistency(
    verifications: Sequence[Verification], generator: np.random.Generator
) -> tuple[int, str]:
    """One drawn among the verifications whose overall verdict is the majority's."""
    majority = voted_overall(verifications)
    agreeing = [i for i, v in enumerate(verifications) if v.overall == majority]
    return _draw(agreeing, generator), "drawn_from_majority"


def step_consistency(
    verifications: Sequence[Verification], generator: np.random.Generator
) -> tuple[int, str]:
    """A verification whose step verdicts are the voted ones, or else agree with them on most steps.

    Among equals, one whose overall verdict is the majority's is preferred; then one is drawn.
    """
    voted = np.array(voted_verdicts(verifications), dtype=bool)
    verdicts = np.array([v.verdicts for v in verifications], dtype=bool)
    matches = (verdicts == voted).sum(axis=1)
    nearest = [i for i in range(len(verifications)) if matches[i] == matches.max()]
    majority = voted_overall(verifications)
    preferred = [i for i in nearest if verifications[i].overall == majority] or nearest
    reason = "exact_match" if matches.max() == voted.size else "nearest_match"
    return _draw(preferred, generator), reason


AGGREGATIONS: dict[str, Aggregation] = {
    "single": Aggregation(first_valid),
    "outcome_consistency": Aggregation(outcome_consistency, votes=True),
    "step_consistency": Aggregation(step_consistency, votes=True),
    "meta_critique": Aggregation(first_valid, critique=True),
    "outcome_consistency+meta_critique": Aggregation(
        outcome_consistency, votes=True, critique=True
    ),
    "step_consistency+meta_critique": Aggregation(step_consistency, votes=True, critique=True),
    "reference_guided": Aggregation(first_valid, reference=True),
}


def voted_verdicts(verifications: Sequence[Verification]) -> tuple[bool, ...]:
    """Majority per step; an even split votes incorrect. ValueError unless step counts are equal."""
    lengths = sorted({len(v.verdicts) for v in verifications})
    if len(lengths) != 1:
        raise ValueError(
            f"verifications with {lengths} step verdicts: a vote is over the same solution's steps"
        )
    return tuple(_majority(votes) for votes in zip(*(v.verdicts for v in verifications)))


def voted_overall(verifications: Sequence[Verification]) -> bool:
    """Majority over the overall verdicts; an even split votes No."""
    return _majority([v.overall for v in verifications])


def agreement(verifications: Sequence[Verification]) -> float:
    """Share of verifications that side with the majority, mean over the votes: one per step, one
    overall. Between 1/2 and 1; 1 means that all N say the same."""
    ballots = [*zip(*(v.verdicts for v in verifications)), [v.overall for v in verifications]]
    return float(np.mean([max(sum(b), len(b) - sum(b)) / len(b) for b in ballots]))


def balance(
    aggregated: Sequence[tuple[str, Aggregated]], *, key: Seed
) -> tuple[list[int], dict[str, int]]:
    """Keep as many solutions judged Yes as No, per problem (method page, section 1.4).

    The verdict is the voted one (the verification's own where the method takes no vote), never the
    reference. Of the more frequent verdict a seeded draw stays.

    Args:
        aggregated: (problem id, what the method made of one of its solutions), one per solution.
        key: an int or a JAX key, the seed of the draw.

    Returns:
        The positions kept, ascending, and counts: kept, dropped_for_balance,
        dropped_without_verification.
    """
    generator = _generator(key)
    groups: dict[str, dict[bool, list[int]]] = {}
    for i, (problem_id, item) in enumerate(aggregated):
        if item.verification is not None:
            verdict = item.voted_overall
            verdict = item.verification.overall if verdict is None else verdict
            groups.setdefault(problem_id, {True: [], False: []})[verdict].append(i)
    kept: list[int] = []
    for group in groups.values():
        size = min(len(group[True]), len(group[False]))
        for members in (group[True], group[False]):
            kept.extend(members[j] for j in generator.permutation(len(members))[:size].tolist())
    judged = sum(len(members) for group in groups.values() for members in group.values())
    counts = {
        "kept": len(kept),
        "dropped_for_balance": judged - len(kept),
        "dropped_without_verification": len(aggregated) - judged,
    }
    return sorted(kept), counts


def _majority(votes: Sequence[bool]) -> bool:
    return 2 * sum(votes) > len(votes)


def _draw(indices: Sequence[int], generator: np.random.Generator) -> int:
    return indices[int(generator.integers(len(indices)))]


def _generator(key: Seed) -> np.random.Generator:
    if isinstance(key, jax.Array):
        typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
        data = jax.random.key_data(key) if typed else key
        return np.random.default_rng(np.asarray(data, dtype=np.uint32).ravel().tolist())
    return np.random.default_rng(int(key))
