"""The response format of RL and its constraints (SPARK, arXiv 2512.03244; method page, section 3).

    <think> <step> … </step> … </think> <answer> \\boxed{…} </answer>

The constraints are what keeps the reward from being hacked. Each is its own named check on the
whole response, with its own metric, so that a run may switch one off and show what then happens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from spark_jax.steps import ANSWER_CLOSE, ANSWER_OPEN

MIN_STEPS, MAX_STEPS = 3, 20


def valid_part(text: str) -> str:
    """All that a reward model may see: up to and including the first `</answer>`.

    The whole text where there is no closing tag. It is a prefix, so character offsets stay true.
    """
    before, tag, _ = text.partition(ANSWER_CLOSE)
    return before + tag


def final_answer(text: str) -> str | None:
    """Content of the last `\\boxed{…}`, stripped. Escaped braces (`\\{`) need not balance.

    None where there is no box, where the last one is never closed, and where it is empty.
    """
    boxes = list(_BOX.finditer(text))
    opening = _OPENING_BRACE.match(text, boxes[-1].end()) if boxes else None
    if opening is None:
        return None
    end = _closing_brace(text, opening.end())
    return None if end is None else text[opening.end() : end].strip() or None


def one_boxed(text: str) -> bool:
    """Exactly one `\\boxed` in the response, closed and not empty. A nested box makes two."""
    return len(_BOX.findall(text)) == 1 and final_answer(text) is not None


def one_answer_block(text: str) -> bool:
    """Exactly one `<answer>` and one `</answer>`, in this order."""
    return (
        text.count(ANSWER_OPEN) == 1
        and text.count(ANSWER_CLOSE) == 1
        and text.index(ANSWER_OPEN) < text.index(ANSWER_CLOSE)
    )


def nothing_after_answer(text: str) -> bool:
    """Nothing but white space after the first `</answer>`.

    Holds where there is no closing tag: that is `one_answer_block`'s failure, and so the failures
    of this check count appended solutions alone.
    """
    return not text.partition(ANSWER_CLOSE)[2].strip()


FORMAT_CHECKS: dict[str, Callable[[str], bool]] = {
    "one_boxed": one_boxed,
    "one_answer_block": one_answer_block,
    "nothing_after_answer": nothing_after_answer,
}


def format_checks(text: str) -> dict[str, bool]:
    """Every check's result by its name."""
    return {name: check(text) for name, check in FORMAT_CHECKS.items()}


def format_ok(text: str, checks: Sequence[str] = tuple(FORMAT_CHECKS)) -> bool:
    """Whether the named checks all hold. ValueError for a name that is no check."""
    unknown = [name for name in checks if name not in FORMAT_CHECKS]
    if unknown:
        raise ValueError(f"unknown format checks {unknown}; choose from {list(FORMAT_CHECKS)}")
    return all(FORMAT_CHECKS[name](text) for name in checks)


def step_count_ok(num_steps: int, low: int = MIN_STEPS, high: int = MAX_STEPS) -> bool:
    """Whether step rewards count: low ≤ steps ≤ high (both included)."""
    return low <= num_steps <= high


def format_metrics(
    responses: Sequence[str],
    split_steps: Callable[[str], Sequence[tuple[int, int]]],
    step_limits: tuple[int, int] = (MIN_STEPS, MAX_STEPS),
) -> dict[str, float]:
    """How the format is kept, and the three hacks of method page section 3, over B ≥ 1 responses.

    Shares of the responses, whichever checks a run enforces: `format/failed` (any check),
    `format/<check>_failed`, `hacking/appended_after_answer`, `hacking/too_few_steps` (step
    reduction) and `hacking/too_many_steps` (step inflation). `hacking/steps_per_response` is a
    mean.
    """
    results = [format_checks(text) for text in responses]
    steps = [len(split_steps(text)) for text in responses]
    low, high = step_limits
    metrics = {"format/failed": _share(not all(result.values()) for result in results)}
    for name in FORMAT_CHECKS:
        metrics[f"format/{name}_failed"] = _share(not result[name] for result in results)
    metrics["hacking/appended_after_answer"] = metrics["format/nothing_after_answer_failed"]
    metrics["hacking/too_few_steps"] = _share(number < low for number in steps)
    metrics["hacking/too_many_steps"] = _share(number > high for number in steps)
    metrics["hacking/steps_per_response"] = sum(steps) / len(steps)
    return metrics


_BOX = re.compile(r"\\boxed(?![A-Za-z])")
_OPENING_BRACE = re.compile(r"\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def _closing_brace(text: str, start: int) -> int | None:
    """Position of the brace that closes the one opened just before `start`."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values)
