"""Meta-critique: critique the chosen verification, then merge both (method page, section 1.3).

Both are greedy. A merged text that is no valid verification, or that speaks of the critique, is not
used: the un-merged verification stands, and the record and the log say so.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Sequence

from spark_jax.data.formats import Sample, TextFormat
from spark_jax.data.records import (
    Aggregated,
    ParseFailure,
    Problem,
    SamplingSettings,
    Solution,
    Verification,
)

logger = logging.getLogger(__name__)


def critique_and_merge(
    sample: Sample,
    text_format: TextFormat,
    items: Sequence[tuple[Problem, Solution, Aggregated]],
    *,
    settings: SamplingSettings,
    seed: int,
) -> list[Aggregated]:
    """The aggregated records after critique and merge, in order.

    Records without a verification pass through. `settings` gives the token limit; sampling is
    greedy whatever it says. The same question is asked only once.

    Of each record, `verification` is the merged one, `critique` the critique's text, `merge` is
    "merged" or "not_merged_<reason>", which is also appended to `reason`, and `exact_match` is that
    of the merged verdicts. A `<reason>` is one of the parser's or "mentions_critique".
    """
    greedy = dataclasses.replace(settings, greedy=True)
    verified = [
        (i, problem, solution, item.verification)
        for i, (problem, solution, item) in enumerate(items)
        if item.verification is not None
    ]
    critiques = _sample_once(
        sample,
        [text_format.critique_prompt(p, s.text, v.text) for _, p, s, v in verified],
        greedy,
        seed,
    )
    merges = _sample_once(
        sample,
        [
            text_format.merge_prompt(p, s.text, v.text, critique)
            for (_, p, s, v), critique in zip(verified, critiques)
        ],
        greedy,
        seed,
    )
    results = [item for _, _, item in items]
    failures: Counter[str] = Counter()
    for (i, problem, solution, before), critique, text in zip(verified, critiques, merges):
        merged = read_merge(text_format, problem, solution, before, text)
        outcome = "merged"
        if isinstance(merged, ParseFailure):
            outcome = f"not_merged_{merged.reason}"
            failures[merged.reason] += 1
        results[i] = _with_merge(results[i], merged, critique, outcome)
    if failures:
        logger.warning(
            "%d of %d merges not used, the un-merged verification stands: %s",
            failures.total(),
            len(verified),
            dict(failures),
        )
    return results


def read_merge(
    text_format: TextFormat,
    problem: Problem,
    solution: Solution,
    before: Verification,
    text: str,
) -> Verification | ParseFailure:
    """The merged verification, or why it cannot be used."""
    merged = text_format.parse_verification(text, len(solution.steps))
    if isinstance(merged, ParseFailure):
        return merged
    known = mentions_of_critique("\n".join((problem.question, solution.text, before.text)))
    if mentions_of_critique(text) - known:
        return ParseFailure("mentions_critique", text)
    return merged


def mentions_of_critique(text: str) -> set[str]:
    """The phrases of a text, lower case, by which a merged verification gives away that there was a
    critique or an earlier verification."""
    return {" ".join(match[0].lower().split()) for match in _MENTION.finditer(text)}


_MENTION = re.compile(
    r"\b(?:critiqu(?:e|es|ed|ing)|critics?|criticisms?|meta-?critiques?"
    r"|(?:previous|prior|earlier|original|initial|first)\s+verifications?"
    r"|verification\s+(?:above|below)|merged\s+verification)\b",
    re.IGNORECASE,
)


def _with_merge(
    item: Aggregated, merged: Verification | ParseFailure, critique: str, outcome: str
) -> Aggregated:
    verification = item.verification if isinstance(merged, ParseFailure) else merged
    exact_match = item.exact_match
    if verification is not None and item.voted_verdicts is not None:
        exact_match = verification.verdicts == item.voted_verdicts
    return dataclasses.replace(
        item,
        verification=verification,
        exact_match=exact_match,
        reason=f"{item.reason}+{outcome}",
        critique=critique,
        merge=outcome,
    )


def _sample_once(
    sample: Sample, prompts: Sequence[str], settings: SamplingSettings, seed: int
) -> list[str]:
    """One text per prompt; equal prompts share theirs, for several methods may choose the same."""
    different = list(dict.fromkeys(prompts))
    if not different:
        return []
    texts = sample(different, samples_per_prompt=1, settings=settings, seed=seed)
    if [len(samples) for samples in texts] != [1] * len(different):
        raise ValueError(
            f"`sample` gave {[len(samples) for samples in texts]} texts for {len(different)} "
            "prompts, expected one each"
        )
    answer = {prompt: samples[0].text for prompt, samples in zip(different, texts)}
    return [answer[prompt] for prompt in prompts]
