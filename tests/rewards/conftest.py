"""A tiny text format: a response is tagged, a reward model says `1: ok 2: bad overall: Yes`."""

import re

import pytest

from spark_jax.data.formats import TextFormat
from spark_jax.data.records import ParseFailure, Verification
from spark_jax.response_format import final_answer
from spark_jax.steps import tagged_steps


def parse_judgement(kind, text, num_steps):
    overall = re.search(r"overall: (Yes|No)$", text)
    if not overall:
        return ParseFailure("missing_overall", text)
    verdicts = tuple(word == "ok" for word in re.findall(r"\d+: (ok|bad)", text))
    if kind == "orm":
        verdicts = ()
    elif num_steps is not None and len(verdicts) != num_steps:
        return ParseFailure("step_count_mismatch" if verdicts else "no_steps", text)
    return Verification(text, verdicts, overall[1] == "Yes")


def unused(*arguments):
    raise AssertionError(f"a reward has no business here: {arguments}")


@pytest.fixture
def text_format():
    return TextFormat(
        name="tiny",
        solve_prompt=unused,
        split_steps=tagged_steps,
        final_answer=final_answer,
        same_answer=lambda a, b: a is not None and b is not None and a.strip("+") == b.strip("+"),
        verify_prompt=unused,
        critique_prompt=unused,
        merge_prompt=unused,
        parse_verification=unused,
        reward_prompt=lambda kind, problem, text: f"{kind}|{vars(problem)}|{text}",
        reward_target=unused,
        parse_judgement=parse_judgement,
    )


@pytest.fixture
def respond():
    """(answer, number of steps) -> a response that keeps the format."""
    return lambda answer, num_steps=3: (
        f"<think> {'<step> s </step> ' * num_steps}</think> <answer> \\boxed{{{answer}}} </answer>"
    )
