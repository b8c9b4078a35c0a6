"""Mathematical equality, and that no text can raise or hang."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jax.evaluation import grading
from spark_jax.evaluation.grading import same_answer


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1/2", "0.5"),
        ("\\frac12", "\\frac{1}{2}"),
        ("1,234", "1234"),
        ("\\frac{\\sqrt2}{2}", "1/\\sqrt{2}"),
        ("x=3", "3"),
        ("\\{1, 2\\}", "\\{2, 1\\}"),
        ("(1, 2)", "(1,2)"),
        ("(1,2)", "1<x<2"),  # math-verify finds this in one direction
        ("[1,2)", "1\\le x<2"),
        ("$5$", "5"),
        ("$5", "5"),
        ("\\$5", "5"),
        ("\\text{Evelyn}", " \\text{Evelyn} "),
        ("-5", "- 5"),
        ("x+1", "1+x"),
        ("nothing readable }{", "nothing readable }{"),
    ],
)
def test_same(a, b):
    assert same_answer(a, b)
    assert same_answer(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1", "2"),
        ("(1,2)", "(2,1)"),
        ("3 or 4", "4"),
        ("$3$ and $4$", "4"),
        ("$3$ and $4$", "3"),
        ("4$ $3", "3"),
        ("\\{3, 4\\}", "4"),
        ("34", "3 4"),
        ("x+1", "x+2"),
        ("0.33", "1/3"),
        ("", "0"),
        ("  ", "0"),
        ("$", "0"),
        ("}{", "4"),
        ("\\frac{1}{2", "7"),
        ("\x00\ud800", "4"),
        ("nan", "0"),
        ("(" * 5000, "4"),
        ("1" * 5000, "4"),
        ("1" + "+0" * 600, "1"),
    ],
)
def test_not_the_same(a, b):
    assert not same_answer(a, b)
    assert not same_answer(b, a)


def test_none_equals_nothing():
    assert not same_answer(None, None)
    assert not same_answer(None, "1")
    assert not same_answer("", "")


def test_what_takes_too_long_is_wrong_and_ends(monkeypatch):
    monkeypatch.setattr(grading, "TIME_LIMIT", 1)
    started = time.monotonic()
    assert not same_answer("9^{9^{9^{9}}}", "7")
    assert time.monotonic() - started < 10


SYMBOLS = [
    "\\frac",
    "{",
    "}",
    "1",
    "x",
    "^",
    "(",
    ")",
    ",",
    "=",
    "$",
    "\\sqrt",
    "<",
    "\\",
    "%",
    "or",
]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(SYMBOLS), max_size=7).map("".join), st.sampled_from(["1", "x"]))
def test_garbage_never_raises_and_the_order_does_not_matter(garbage, answer):
    assert same_answer(garbage, answer) == same_answer(answer, garbage)


def test_other_threads_are_told_where_to_grade():
    raised = []

    def grade():
        try:
            same_answer("1/2", "0.5000")
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
    assert "worker process" in raised[0]
