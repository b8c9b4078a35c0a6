"""The text formats for real models (SPARK, arXiv 2512.03244; method page, sections 1-3):
`CANONICAL`, and `rubric_format` for tasks without ground truth.

The prompts are the text files of `configs/prompts`, which its README explains. They are data:
`canonical_format(prompt_dir)` takes any of them from a directory of the user's instead. A `$` in a
prompt file is written `$$`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
import string
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path

from spark_jax.data.formats import RewardKind, SameAnswer, TextFormat
from spark_jax.data.records import Problem
from spark_jax.evaluation.grading import same_answer
from spark_jax.response_format import final_answer
from spark_jax.steps import (
    StepSpan,
    blank_line_steps,
    content_span,
    numbered_steps,
    tagged_steps,
)
from spark_jax.verification.parse import parse_verification, verification_body
from spark_jax.verification.targets import canonical_target, parse_canonical_judgement

logger = logging.getLogger(__name__)

SplitSteps = Callable[[str], list[StepSpan]]

# Placeholders that each prompt file must hold. `num_steps` may stand wherever `solution` does, and
# `response_format` in `solve`.
PROMPT_PLACEHOLDERS: dict[str, frozenset[str]] = {
    "solve": frozenset({"problem"}),
    "response_format": frozenset(),
    "verify": frozenset({"problem", "solution"}),
    "verify_with_reference": frozenset({"problem", "solution", "reference"}),
    "critique": frozenset({"problem", "solution", "verification"}),
    "merge": frozenset({"problem", "solution", "verification", "critique"}),
    "orm": frozenset({"problem", "solution"}),
    "prm": frozenset({"problem", "solution"}),
    "prm_cot": frozenset({"problem", "solution"}),
}

# The shipped file that tells the policy how to write its steps, by what reads them.
RESPONSE_FORMATS: dict[SplitSteps, str] = {
    tagged_steps: "response_format",
    numbered_steps: "response_format_numbered",
    blank_line_steps: "response_format_paragraphs",
}


def canonical_format(
    prompt_dir: str | os.PathLike[str] | None = None,
    split_steps: SplitSteps = tagged_steps,
) -> TextFormat:
    """The canonical format, with the prompts found in `prompt_dir` in place of the shipped ones. It
    is a directory, or the name of a set in `configs/prompts`, such as "short".

    `split_steps` says what a step is, for the parsers' counts and for the numbers that the prompts
    show. For a splitter of `spark_jax.steps`, the shipped `solve.txt` asks for such steps; for any
    other it asks for tagged ones, so bring a `solve.txt` or `response_format.txt` along.

    Files are named as in `configs/prompts` (`verify.txt`, ...); those that are absent stay as
    shipped. User files are read and checked here, the shipped ones when first used.

    Raises:
        ValueError: the directory holds no prompt file, or a `.txt` that is none, or a file whose
            placeholders are unknown, missing or malformed; the message names the file.
    """
    return _text_format(_CANONICAL_PROMPTS, prompt_dir, split_steps, same_answer)


def rubric_format(
    prompt_dir: str | os.PathLike[str] | None = None,
    split_steps: SplitSteps = tagged_steps,
) -> TextFormat:
    """The canonical format for problems that have a rubric, in `metadata["rubric"]`, and no answer.

    The shipped prompts are those of `configs/prompts/rubric`. All but `solve` and `response_format`
    must hold `${rubric}`, and `solve` may. Two answers are the same if their words are. Arguments
    and errors as in `canonical_format`; a prompt of a problem without a rubric, or with a
    reference, raises ValueError.
    """
    return _text_format(_RUBRIC_PROMPTS, prompt_dir, split_steps, same_words)


def same_words(a: str | None, b: str | None) -> bool:
    """Whether two texts are the same but for white space. None and empty texts equal nothing."""
    return bool(a and b and a.split() and a.split() == b.split())


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


@dataclasses.dataclass(frozen=True)
class _PromptSet:
    """The shipped files of a format, and what a problem fills in.

    Attributes:
        folder: below `configs/prompts`; a file that is not there is the canonical one.
        required: file name → placeholders that it must hold.
        optional: file name → placeholders that it may hold.
        values: problem → placeholder → what stands there.
    """

    name: str
    folder: str
    required: Mapping[str, frozenset[str]]
    optional: Mapping[str, frozenset[str]]
    values: Callable[[Problem], dict[str, str]]


def _text_format(
    prompts: _PromptSet,
    prompt_dir: str | os.PathLike[str] | None,
    split_steps: SplitSteps,
    same: SameAnswer,
) -> TextFormat:
    own = {} if prompt_dir is None else _read_directory(_prompt_directory(prompt_dir), prompts)

    def fill(name: str, problem: Problem, solution_text: str = "", **values: str) -> str:
        values |= prompts.values(problem)
        if "solution" in prompts.required[name]:
            values["solution"] = number_steps(solution_text, split_steps)
            values["num_steps"] = str(len(split_steps(solution_text)))
        if name == "solve":
            shipped = RESPONSE_FORMATS.get(split_steps, "response_format")
            form = own.get("response_format") or _shipped(prompts.name, shipped)
            values["response_format"] = form.substitute()
        template = own.get(name) or _shipped(prompts.name, name)
        return template.substitute(values)

    def verify_prompt(problem: Problem, solution_text: str, reference: str | None) -> str:
        if reference is None:
            return fill("verify", problem, solution_text)
        if "verify_with_reference" not in prompts.required:
            raise ValueError(f"problem {problem.id!r}: a {prompts.name} task has no references")
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
        name=prompts.name,
        solve_prompt=lambda problem: fill("solve", problem),
        split_steps=split_steps,
        final_answer=final_answer,
        same_answer=same,
        verify_prompt=verify_prompt,
        critique_prompt=critique_prompt,
        merge_prompt=merge_prompt,
        parse_verification=parse_verification,
        reward_prompt=reward_prompt,
        reward_target=canonical_target,
        parse_judgement=parse_canonical_judgement,
        verdict_words=("Yes", "No"),
    )


def _rubric_values(problem: Problem) -> dict[str, str]:
    rubric = problem.metadata.get("rubric")
    if not isinstance(rubric, str) or not rubric.strip():
        raise ValueError(
            f"problem {problem.id!r} has no rubric: metadata['rubric'] is {rubric!r}, must be text"
        )
    return {"problem": problem.question, "rubric": rubric}


_OPTIONAL = {
    "solve": frozenset({"response_format"}),
    **{
        name: frozenset({"num_steps"})
        for name, required in PROMPT_PLACEHOLDERS.items()
        if "solution" in required
    },
}

_CANONICAL_PROMPTS = _PromptSet(
    name="canonical",
    folder="",
    required=PROMPT_PLACEHOLDERS,
    optional=_OPTIONAL,
    values=lambda problem: {"problem": problem.question},
)

_RUBRIC_PROMPTS = _PromptSet(
    name="rubric",
    folder="rubric",
    required={
        name: required | {"rubric"} if "solution" in required else required
        for name, required in PROMPT_PLACEHOLDERS.items()
        if name != "verify_with_reference"
    },
    optional=_OPTIONAL | {"solve": frozenset({"response_format", "rubric"})},
    values=_rubric_values,
)

_PROMPT_SETS = {prompts.name: prompts for prompts in (_CANONICAL_PROMPTS, _RUBRIC_PROMPTS)}


@functools.cache
def _shipped(set_name: str, file_name: str) -> string.Template:
    prompts = _PROMPT_SETS[set_name]
    folder = resources.files("spark_jax.configs") / "prompts"
    file = folder / prompts.folder / f"{file_name}.txt"
    if not file.is_file():
        file = folder / f"{file_name}.txt"
    role = "response_format" if file_name in RESPONSE_FORMATS.values() else file_name
    return _template(prompts, role, file.read_text(encoding="utf-8"), str(file))


def _prompt_directory(name: str | os.PathLike[str]) -> Path:
    """The directory of that name, else the shipped set of that name (such as "short")."""
    shipped = Path(str(resources.files("spark_jax.configs") / "prompts")) / Path(name).name
    return shipped if not Path(name).is_dir() and shipped.is_dir() else Path(name)


def _read_directory(directory: Path, prompts: _PromptSet) -> dict[str, string.Template]:
    if not directory.is_dir():
        raise ValueError(f"prompt_dir {directory} is not a directory")
    files = sorted(directory.glob("*.txt"))
    unknown = [str(file) for file in files if file.stem not in prompts.required]
    if unknown or not files:
        expected = ", ".join(f"{name}.txt" for name in prompts.required)
        what = f"unknown prompt files {unknown}" if unknown else "no prompt file"
        raise ValueError(f"prompt_dir {directory}: {what}; expected any of {expected}")
    logger.info("prompts taken from %s: %s", directory, ", ".join(file.stem for file in files))
    return {
        file.stem: _template(prompts, file.stem, file.read_text(encoding="utf-8"), str(file))
        for file in files
    }


def _template(prompts: _PromptSet, name: str, text: str, place: str) -> string.Template:
    """The checked template, without the line end that closes the file."""
    template = string.Template(text.rstrip("\n"))
    if not template.is_valid():
        raise ValueError(
            f"{place}: a $ that begins no ${{placeholder}}; write $$ for a dollar sign"
        )
    required, optional = prompts.required[name], prompts.optional.get(name, frozenset())
    found = set(template.get_identifiers())
    missing, unknown = sorted(required - found), sorted(found - required - optional)
    if missing or unknown:
        raise ValueError(
            f"{place}: missing placeholders {missing}, unknown placeholders {unknown}; "
            f"it must hold {sorted(required)} and may hold {sorted(optional)}"
        )
    return template


CANONICAL = canonical_format()
