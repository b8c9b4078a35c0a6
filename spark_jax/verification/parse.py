"""The canonical verification text: writing it and reading it back (method page, section 1.2).

    ## Step 1: <title>
    <analysis>

    **This step is correct.**          (or: **This step is incorrect.**)
    ...
    **Verification: Is the answer correct (Yes/No)? Yes**

The reader forgives letter case and markdown, and nothing else: what does not hold one verdict per
step, in order, and exactly one overall verdict is a `ParseFailure` with a reason that can be
counted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

from spark_jax.data.records import ParseFailure, Verification

# Everything that can be wrong with a text, in the order in which it is looked for.
PARSE_FAILURES = {
    "unfinished_thinking": "begins with a <think> block that is never closed",
    "missing_overall": "no overall verdict line",
    "several_overalls": "more than one overall verdict line",
    "no_steps": "no step heading although the solution has steps",
    "step_count_mismatch": "not as many step headings as the solution has steps",
    "steps_out_of_order": "step headings are not numbered 1, 2, 3, ...",
    "verdict_outside_steps": "a step verdict before the first heading or after the overall verdict",
    "steps_after_overall": "a step heading after the overall verdict",
    "missing_step_verdict": "a step without a verdict",
    "conflicting_step_verdicts": "a step called both correct and incorrect",
    "repeated_step_verdict": "a step with the same verdict twice",
}


def parse_verification(text: str, num_steps: int | None) -> Verification | ParseFailure:
    """Read one verification of a solution with `num_steps` steps. Never raises on any text.

    Valid are texts with exactly `num_steps` headings `## Step k: ...` (any number of them if that
    is None) numbered from 1 in order, one verdict in each, and exactly one overall verdict after
    them. A verdict counts where it is bold, or alone on its line. Text before the last `</think>`
    is the model's own deliberation and is not read. A failure's reason is a key of
    `PARSE_FAILURES`, the first that applies.
    """
    body = _after_thinking(text)
    if body is None:
        return ParseFailure("unfinished_thinking", text)
    found = _find_parts(body)
    reason = _structure_failure(found, num_steps)
    if reason is not None:
        return ParseFailure(reason, text)
    verdicts: list[list[bool]] = []
    for part in found:
        if part.kind == "step":
            verdicts.append([])
        elif part.kind == "verdict":
            verdicts[-1].append(part.value == 1)
    for step in verdicts:
        if len(step) != 1:
            return ParseFailure(_verdict_failure(step), text)
    overall = next(part.value == 1 for part in found if part.kind == "overall")
    return Verification(text, tuple(step[0] for step in verdicts), overall)


def format_verification(
    steps: Sequence[tuple[str, str]], verdicts: Sequence[bool], overall: bool
) -> str:
    """The canonical text for (title, analysis) per step; `parse_verification` reads it back
    exactly.

    Raises ValueError if the counts differ, or if a title or an analysis holds a line that would
    itself be read as a heading or a verdict.
    """
    if len(steps) != len(verdicts):
        raise ValueError(
            f"{len(steps)} steps but {len(verdicts)} verdicts: give one verdict a step"
        )
    parts = [
        f"## Step {number}: {title}\n{analysis}\n\n**This step is {_word(verdict)}.**\n"
        for number, ((title, analysis), verdict) in enumerate(zip(steps, verdicts), start=1)
    ]
    text = "\n".join([*parts, overall_line(overall)])
    if parse_verification(text, len(steps)) != Verification(text, tuple(verdicts), overall):
        raise ValueError(
            "a title or an analysis reads as a step heading, a verdict or a thinking tag; reword "
            f"it: {list(steps)!r}"
        )
    return text


def overall_line(overall: bool) -> str:
    """The line that ends a canonical verification."""
    return f"**Verification: Is the answer correct (Yes/No)? {'Yes' if overall else 'No'}**"


def read_overall_line(line: str) -> bool | None:
    """The overall verdict that a line states, or None."""
    match = _OVERALL.match(_without_markup(line))
    return match[1].lower() == "yes" if match else None


def verification_body(text: str) -> str:
    """A valid verification without the model's deliberation before it and any text after its
    overall verdict: what a reward model is trained to write and a critique is shown."""
    body = _after_thinking(text)
    ends = [part.end for part in _find_parts(body or "") if part.kind == "overall"]
    if body is None or not ends:
        raise ValueError(f"not a valid verification, parse it first: {text!r}")
    return body[: ends[-1]].strip()


@dataclasses.dataclass(frozen=True)
class _Part:
    """A line that says something: heading (value: its number), verdict or overall (value: 0 or
    1)."""

    kind: Literal["step", "verdict", "overall"]
    value: int
    end: int  # where its line ends in the text


_MARKUP = re.compile(r"[*_`#>~]+")
_HASH_HEADING = re.compile(r"\s{0,3}#{1,6}[\s*_]*step\s+([0-9]{1,6})\b", re.IGNORECASE)
_BOLD_HEADING = re.compile(r"\s{0,3}(?:\*\*|__)\s*step\s+([0-9]{1,6})\b", re.IGNORECASE)
_BOLD_VERDICT = re.compile(
    r"(?:\*\*|__)\s*this\s+step\s+is\s+(correct|incorrect)\s*[.!]?\s*(?:\*\*|__)", re.IGNORECASE
)
_PLAIN_VERDICT = re.compile(r"\s*this\s+step\s+is\s+(correct|incorrect)\s*[.!]?\s*$", re.IGNORECASE)
_OVERALL = re.compile(
    r"\s*verification\s*:?\s*is\s+the\s+answer\s+correct\s*\(?\s*yes\s*/\s*no\s*\)?\s*[?:]*\s*"
    r"(yes|no)\s*[.!]?\s*$",
    re.IGNORECASE,
)


def _after_thinking(text: str) -> str | None:
    """What follows the model's deliberation; None if that never ends."""
    body = text.rpartition("</think>")[2]
    return None if body.lstrip().startswith("<think>") else body


def _find_parts(text: str) -> list[_Part]:
    """Headings, step verdicts and overall verdicts, in the order of the text. Bold headings count
    only where no heading is written with `#`, for a bold "Step 1" may also begin a line of an
    analysis."""
    lines = [(match[0], match.end()) for match in re.finditer(r"[^\n]+", text)]
    hashes = any(_HASH_HEADING.match(line) for line, _ in lines)
    heading_pattern = _HASH_HEADING if hashes else _BOLD_HEADING
    parts = []
    for line, end in lines:
        heading = heading_pattern.match(line)
        overall = read_overall_line(line)
        if heading:
            parts.append(_Part("step", int(heading[1]), end))
        elif overall is not None:
            parts.append(_Part("overall", int(overall), end))
        else:
            parts.extend(_Part("verdict", value, end) for value in _verdicts_in(line))
    return parts


def _verdicts_in(line: str) -> list[int]:
    bold = _BOLD_VERDICT.findall(line)
    plain = _PLAIN_VERDICT.match(_without_markup(line))
    words = bold or ([plain[1]] if plain else [])
    return [int(word.lower() == "correct") for word in words]


def _structure_failure(parts: Sequence[_Part], num_steps: int | None) -> str | None:
    overalls = [i for i, part in enumerate(parts) if part.kind == "overall"]
    if len(overalls) != 1:
        return "several_overalls" if overalls else "missing_overall"
    numbers = [part.value for part in parts if part.kind == "step"]
    if num_steps is not None and len(numbers) != num_steps:
        return "step_count_mismatch" if numbers else "no_steps"
    if numbers != list(range(1, len(numbers) + 1)):
        return "steps_out_of_order"
    after = {part.kind for part in parts[overalls[0] + 1 :]}
    if "step" in after:
        return "steps_after_overall"
    if "verdict" in after or (parts and parts[0].kind == "verdict"):
        return "verdict_outside_steps"
    return None


def _verdict_failure(verdicts: Sequence[bool]) -> str:
    if not verdicts:
        return "missing_step_verdict"
    return "conflicting_step_verdicts" if len(set(verdicts)) > 1 else "repeated_step_verdict"


def _without_markup(line: str) -> str:
    return _MARKUP.sub("", line)


def _word(verdict: bool) -> str:
    return "correct" if verdict else "incorrect"
