"""`CANONICAL`: the text format for real models (SPARK, arXiv 2512.03244; method page, sections
1-3).

The prompts are the text files of `configs/prompts`. They are data: `canonical_format(prompt_dir)`
takes any of them from a directory of the user's instead. A `$` in a prompt file is written `$$`.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import string
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from spark_jax.data.formats import RewardKind, TextFormat
from spark_jax.data.records import Problem
from spark_jax.evaluation.grading import same_answer
from spark_jax.prm.targets import canonical_target, parse_canonical_judgement
from spark_jax.rewards.format import final_answer
from spark_jax.steps import StepSpan, content_span, tagged_steps
from spark_jax.verification.parse import parse_verification, verification_body

logger = logging.getLogger(__name__)

SplitSteps = Callable[[str], Sequence[StepSpan]]

# Placeholders that each prompt file must hold. `num_steps` may stand wherever `solution` does.
PROMPT_PLACEHOLDERS: dict[str, frozenset[str]] = {
    "solve": frozenset({"problem"}),
    "verify": frozenset({"problem", "solution"}),
    "verify_with_reference": frozenset({"problem", "solution", "reference"}),
    "critique": frozenset({"problem", "solution", "verification"}),
    "merge": frozenset({"problem", "solution", "verification", "critique"}),
    "orm": frozenset({"problem", "solution"}),
    "prm": frozenset({"problem", "solution"}),
    "prm_cot": frozenset({"problem", "solution"}),
}


def canonical_format(
    prompt_dir: str | os.PathLike[str] | None = None,
    split_steps: Callable[[str], list[StepSpan]] = tagged_steps,
) -> TextFormat:
    """The canonical format, with the prompts found in `prompt_dir` in place of the shipped ones.

    `split_steps` says what a step is, for the parsers' counts and for the numbers that the prompts
    show; any splitter of `spark_jax.steps`. (The shipped `solve.txt` asks for tagged steps.)

    Files are named as in `configs/prompts` (`verify.txt`, ...); those that are absent stay as
    shipped. User files are read and checked here, the shipped ones when first used.

    Raises:
        ValueError: the directory holds no prompt file, or a `.txt` that is none, or a file whose
            placeholders are unknown, missing or malformed; the message names the file.
    """
    directory = None if prompt_dir is None else Path(prompt_dir)
    own = _read_directory(directory) if directory is not None else {}

    def fill(name: str, problem: Problem, solution_text: str = "", **values: str) -> str:
        if "solution" in PROMPT_PLACEHOLDERS[name]:
            values["solution"] = number_steps(solution_text, split_steps)
            values["num_steps"] = str(len(split_steps(solution_text)))
        template = own.get(name) or _shipped(name)
        return template.substitute(values, problem=problem.question)

    def verify_prompt(problem: Problem, solution_text: str, reference: str | None) -> str:
        if reference is None:
            return fill("verify", problem, solution_text)
        return fill("verify_with_reference", problem, solution_text, reference=reference)

    def critique_prompt(problem: Problem, solution_text: str, verification_text: str) -> str:
        shown = verification_body(verification_text)
        return fill("critique", problem, solution_text, verification=shown)

    def merge_prompt(
        problem: Problem, solution_text: str, verification_text: str, critique_text: str
    ) -> str:
        shown = verification_body(verification_text)
        return fill("merge", problem, solution_text, verification=shown, critique=critique_text)

    def reward_prompt(kind: RewardKind, problem: Problem, solution_text: str) -> str:
        return fill(kind, problem, solution_text)

    return TextFormat(
        name="canonical",
        solve_prompt=lambda problem: fill("solve", problem),
        split_steps=split_steps,
        final_answer=final_answer,
        same_answer=same_answer,
        verify_prompt=verify_prompt,
        critique_prompt=critique_prompt,
        merge_prompt=merge_prompt,
        parse_verification=parse_verification,
        reward_prompt=reward_prompt,
        reward_target=canonical_target,
        parse_judgement=parse_canonical_judgement,
        verdict_words=("Yes", "No"),
    )


def number_steps(solution_text: str, split_steps: SplitSteps = tagged_steps) -> str:
    """The solution with "Step k:" at the head of each step, so that a verifier need not count.

    A step that begins so already is left as it is.
    """
    pieces, end = [], 0
    for number, span in enumerate(split_steps(solution_text), start=1):
        start, _ = content_span(solution_text, span)
        header = _STEP_HEADER.match(solution_text, start)
        own = header is not None and int(header[1]) == number
        pieces += [solution_text[end:start], "" if own else f"Step {number}: "]
        end = start
    return "".join([*pieces, solution_text[end:]])


_STEP_HEADER = re.compile(r"[#*_\s]*step\s+([0-9]{1,6})\b", re.IGNORECASE)


@functools.cache
def _shipped(name: str) -> string.Template:
    file = resources.files("spark_jax.configs") / "prompts" / f"{name}.txt"
    return _template(name, file.read_text(encoding="utf-8"), str(file))


def _read_directory(directory: Path) -> dict[str, string.Template]:
    if not directory.is_dir():
        raise ValueError(f"prompt_dir {directory} is not a directory")
    files = sorted(directory.glob("*.txt"))
    unknown = [str(file) for file in files if file.stem not in PROMPT_PLACEHOLDERS]
    if unknown or not files:
        expected = ", ".join(f"{name}.txt" for name in PROMPT_PLACEHOLDERS)
        what = f"unknown prompt files {unknown}" if unknown else "no prompt file"
        raise ValueError(f"prompt_dir {directory}: {what}; expected any of {expected}")
    logger.info("prompts taken from %s: %s", directory, ", ".join(file.stem for file in files))
    return {
        file.stem: _template(file.stem, file.read_text(encoding="utf-8"), str(file))
        for file in files
    }


def _template(name: str, text: str, place: str) -> string.Template:
    """The checked template, without the line end that closes the file."""
    template = string.Template(text.rstrip("\n"))
    if not template.is_valid():
        raise ValueError(
            f"{place}: a $ that begins no ${{placeholder}}; write $$ for a dollar sign"
        )
    required = PROMPT_PLACEHOLDERS[name]
    optional = {"num_steps"} if "solution" in required else set()
    found = set(template.get_identifiers())
    missing, unknown = sorted(required - found), sorted(found - required - optional)
    if missing or unknown:
        raise ValueError(
            f"{place}: missing placeholders {missing}, unknown placeholders {unknown}; "
            f"it must hold {sorted(required)} and may hold {sorted(optional)}"
        )
    return template


CANONICAL = canonical_format()
