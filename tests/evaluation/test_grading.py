"""Mathematical equality as math-verify has it, and that no text can raise, hang or eat memory."""

import functools
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jax.evaluation import grading, grading_worker
from spark_jax.evaluation.grading import Grader, same_answer, same_answers

HARD = ("\\frac{\\sqrt2}{2}", "1/\\sqrt{2}")  # needs math-verify
SAME = [
    ("1/2", "0.5"),
    ("\\frac12", "\\frac{1}{2}"),
    ("1,234", "1234"),
    HARD,
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
    ("0.333333", "1/3"),  # six decimals where one of the two has a point
]
DIFFERENT = [
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
    ("1/0", "2/0"),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_same(a, b):
    assert same_answer(a, b)
    assert same_answer(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_not_the_same(a, b):
    assert not same_answer(a, b)
    assert not same_answer(b, a)


def test_none_equals_nothing():
    assert not same_answer(None, None)
    assert not same_answer(None, "1")
    assert not same_answer("", "")


def test_a_batch_says_what_single_pairs_say_in_their_order():
    pairs = [*SAME, (None, None), *DIFFERENT, (None, "1"), *SAME[::-1]]
    assert same_answers(pairs) == [same_answer(a, b) for a, b in pairs]
    assert same_answers([]) == []


# Hostile texts

HOSTILE = {
    "tower": "9^{9^{9^{9}}}",
    "factorial": "100000000!",
    "decimal exponent": "1.5\\times 10^{100000000}",
    "roots": "x^{1000000000}-1=0",
    "big power": "10^{10^{8}}",
    "binomial": "\\binom{10^{9}}{5\\cdot 10^{8}}",
    "expansion": "(x+y+z)^{3000}-(z+y+x)^{3000}+1",
    "open braces": "{" * 900,
    "brackets": "(" * 400 + "1" + ")" * 400,
    "fractions": "\\frac{" * 100 + "1" + "}{2}" * 100,
    "roots in roots": "\\sqrt{" * 140 + "2" + "}" * 140,
    "megabytes": "1" * 3_000_000,
    "megabytes of dollars": "$" * 3_000_000,
    "nulls": "\x00" * 500,
    "surrogates": "\ud800\udfff" * 200,
    "right to left": "\u202e7\u202c",
    "combining": "7" + "\u0301" * 900,
    "newlines and quotes": '"]}\n\\"\r\n{"same": true}',
    "a reply": '{"same": true, "last": false}',
    "python": "__import__('os').kill(1, 9)",
    "commands": "\\input{/etc/passwd}\\write18{true}",
}


# They take a worker's time as others above do, and a new worker takes a second.
ALIKE = {"factorial", "decimal exponent", "binomial", "expansion", "brackets"}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([name for name in HOSTILE if name not in ALIKE], id="a few"),
        pytest.param(list(HOSTILE), id="all", marks=pytest.mark.slow),
    ],
)
def test_hostile_answers_are_wrong_cost_a_worker_at_most_and_end(names, caplog):
    started = time.monotonic()
    with Grader(2, time_limit=0.5) as grader, caplog.at_level(logging.WARNING):
        pairs = [(HOSTILE[name], "7.25") for name in names]
        assert grader.same_answers(pairs) == [False] * len(pairs)
        counts = grader.counts()
        # As many workers as were lost and two: no text costs more than one.
        assert counts["started"] <= 2 + counts["time_limit"] + counts["crashed"]
        assert counts["time_limit"] >= 3
        assert counts["clock_limit"] == 0
        assert len(caplog.records) == counts["time_limit"] + counts["crashed"]
        assert "out of processor time" in caplog.text
        assert grader.same_answer(*HARD)  # and the next one is graded
        asked = grader.counts()["asked"]
        assert grader.same_answers(pairs) == [False] * len(pairs)  # remembered, free of charge
        assert grader.counts()["asked"] == asked
    assert time.monotonic() - started < 120


SYMBOLS = [
    "\\frac",
    "\\sqrt",
    "\\",
    "{",
    "}",
    "(",
    ")",
    "^",
    "=",
    "<",
    ",",
    "$",
    "%",
    "1",
    "x",
    "or",
]


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(SYMBOLS), max_size=7).map("".join),
    st.sampled_from(["1", "x"]),
)
def test_garbage_never_raises_and_the_order_does_not_matter(garbage, answer):
    assert same_answer(garbage, answer) == same_answer(answer, garbage)


@settings(max_examples=60)
@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_is_graded(a, b):
    assert same_answer(a, b) == same_answer(b, a)
    assert same_answer(a, a) == bool(a.strip())


# Agreement with math-verify

INTEGER = st.integers(-3000, 3000) | st.integers(1 - 10**12, 10**12 - 1)
NUMBER = st.one_of(
    INTEGER.map(str),
    st.tuples(INTEGER, INTEGER.filter(bool)).map(lambda pair: f"{pair[0]}/{abs(pair[1])}"),
    st.builds(
        "{}\\{}frac{{{}}}{{{}}}".format,
        st.sampled_from(["", "-"]),
        st.sampled_from(["", "d", "t"]),
        st.integers(0, 60),
        st.integers(1, 60),
    ),
    st.decimals(-2000, 2000, places=1).map("{:f}".format),
    st.decimals(-10, 10, places=6).map("{:f}".format),
    st.decimals(-(10**9), 10**9, places=3).map("{:f}".format),
    st.sampled_from(["-0", "0", "0.0", "-0.0", "1/100", "0.01", "0.333333", "0.333334", "1/3"]),
)


def related(draw, text):
    """Another number, often the same one in another form."""
    if not draw(st.booleans()):
        return draw(NUMBER)
    value = grading._value(grading._NUMBER.fullmatch(text))
    factor = draw(st.integers(1, 9))
    near = value + draw(st.sampled_from([0, 0, 1, -1])) / 10 ** draw(st.integers(0, 7))
    return draw(
        st.sampled_from(
            [
                f"{value.numerator * factor}/{value.denominator * factor}",
                f"{'-' * (value < 0)}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}",
                f"{float(near):.6f}",
                f"{float(near):.2f}",
                str(round(value)),
            ]
        )
    )


@settings(max_examples=400)
@given(st.data())
def test_numbers_that_no_worker_sees_are_graded_as_math_verify_grades_them(data):
    first = data.draw(NUMBER)
    second = related(data.draw, first)
    decided = grading._decide(first, second)
    if isinstance(decided, bool):
        assert decided == grading_worker.same(first, second)


def test_plain_numbers_need_no_worker():
    pairs = [("3", "4"), ("12", "12.0"), ("1/2", "\\frac{2}{4}"), ("0.5", "1/3"), ("x", " x ")]
    with Grader(1) as grader:
        assert grader.same_answers(pairs) == [False, True, True, False, True]
        assert grader.counts()["asked"] == grader.counts()["started"] == 0


# Those that mean the same, or nearly so, stand together.
MATH_STYLE = [
    "[-2,7]",
    "x\\in[-2,7]",
    "-2\\le{x}\\le7",
    "2\\sqrt{2}",
    "\\sqrt{8}",
    "2^{3/2}",
    "e^{i\\pi}",
    "-1",
    "\\cos\\pi",
    "\\frac{9}{5}",
    "1\\frac{4}{5}",
    "1.8",
    "180\\%",
    "90^\\circ",
    "90",
    "5\\%",
    "0.05",
    "5",
    "\\text{(B)}",
    "\\text{B}",
    "B",
    "6-5i",
    "-5i+6",
    "\\left(3,\\frac{\\pi}{2}\\right)",
    "(3,\\pi/2)",
    "3,\\frac{\\pi}{2}",
    "p-q",
    "-q+p",
    "q-p",
    "\\$32,\\!348",
    "32348",
    "32{,}348",
    "y=2x+3",
    "2x+3",
    "2x+3=y",
    "3\\pi",
    "\\pi\\cdot3",
    "9.42",
    "\\{1,-2\\}",
    "1,-2",
    "-2,1",
    "10\\text{ cm}^2",
    "10",
    "\\text{even}",
    "even",
    "(-\\infty,0)\\cup(0,\\infty)",
    "x\\ne0",
    "4210_{5}",
    "4210_5",
    "4210",
    "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}",
    "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}",
    "3\\frac{1}{7}",
    "\\frac{22}{7}",
]


@pytest.mark.parametrize("neighbours", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_grades_as_math_verify_does_in_process(neighbours):
    near = slice(1, 1 + neighbours)
    pairs = [(a, b) for i, a in enumerate(MATH_STYLE) for b in MATH_STYLE[i:][near]]
    expected = [math_verify_directly(a, b) for a, b in pairs]
    assert same_answers(pairs) == expected
    assert 20 < sum(expected) < len(pairs) - 20


def math_verify_directly(a, b):
    """As in the library's own documentation; the names of its limits are its own."""
    import math_verify

    first, second = map(read_directly, (a, b))
    if not first or not second:
        return False
    return math_verify.verify(first, second, timeout_seconds=None) or math_verify.verify(
        second, first, timeout_seconds=None
    )


@functools.cache
def read_directly(text):
    import math_verify

    return math_verify.parse(f"${text}$", parsing_timeout=None)


@pytest.mark.skipif(
    "SPARK_JAX_DATA" not in os.environ,
    reason="needs MATH-500: set SPARK_JAX_DATA to the folder of math500/test.jsonl",
)
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_the_references_of_math_500(every):
    """Each equals itself written otherwise, and its neighbour where math-verify says so."""
    file = Path(os.environ["SPARK_JAX_DATA"]) / "math500" / "test.jsonl"
    answers = [json.loads(line)["answer"] for line in file.read_text("utf-8").splitlines()]
    assert len(answers) == 500
    answers = answers[::every]
    for change in (
        lambda text: f"  {text} ",
        lambda text: f"\\boxed{{{text}}}",
        lambda text: text.replace("\\frac", "\\dfrac"),
        lambda text: f"${text}$" if "$" not in text else text,
    ):
        changed = [change(text) for text in answers]
        verdicts = same_answers(list(zip(answers, changed)))
        assert [text for text, same in zip(answers, verdicts) if not same] == []
    neighbours = list(itertools.pairwise(answers))[::5]
    assert same_answers(neighbours) == [a == b or math_verify_directly(a, b) for a, b in neighbours]


# Workers


def worker_ids(grader):
    """Processes of the idle workers."""
    return [worker.process.pid for worker in grader._idle]


def test_threads_share_the_workers_and_get_their_own_answers():
    pairs = [(f"\\sqrt{{{n * n}}}+x", f"x+{n + n % 2}") for n in range(24)]
    expected = [n % 2 == 0 for n in range(24)]
    with Grader(2) as grader, ThreadPoolExecutor(6) as threads:
        for batch in threads.map(lambda shift: grader.same_answers(pairs[shift:]), range(4)):
            assert batch == expected[-len(batch) :]
        assert list(threads.map(lambda pair: grader.same_answer(*pair), pairs)) == expected
        assert grader.counts()["started"] == 2
        assert len(worker_ids(grader)) == 2


def test_rows_are_graded_side_by_side_in_their_order():
    together = threading.Barrier(2, timeout=30)

    def grade(a, b):
        together.wait()  # never passed by one thread alone
        return a - b

    assert grading.in_threads(grade, range(10, 16), [1] * 6) == [9, 10, 11, 12, 13, 14]
    with pytest.raises(ZeroDivisionError):
        grading.in_threads(lambda n: 1 / n, [1, 0, 2])
    with pytest.raises(ValueError, match=r"columns of \[2, 1\] rows"):
        grading.in_threads(grade, [1, 2], [1])


def test_a_killed_worker_is_replaced(caplog):
    with Grader(1, time_limit=0.5) as grader:
        assert grader.same_answer(*HARD)
        (before,) = worker_ids(grader)
        assert not grader.same_answer("9^{9^{9^{9}}}", "7")
        assert worker_ids(grader) == []
        assert not alive(before)
        assert grader.same_answer("\\sqrt{8}", "2\\sqrt2")
        (after,) = worker_ids(grader)
        assert after != before
        os.kill(after, signal.SIGKILL)  # while idle: no answer is to blame, and none is wrong
        wait_until(lambda: not alive(after))
        assert grader.same_answer("\\sqrt{27}", "3\\sqrt3")
        assert worker_ids(grader) != [after]
        assert grader.counts() == {
            "asked": 4, "started": 3, "retired": 0, "time_limit": 1, "clock_limit": 0, "crashed": 0
        }  # fmt: skip


def test_a_worker_that_dies_or_stops_at_work_counts_as_wrong(monkeypatch):
    monkeypatch.setattr(grading, "CLOCK_FACTOR", 0.05)
    with Grader(1, time_limit=20) as grader:
        assert grader.same_answer(*HARD)
        (worker,) = worker_ids(grader)
        os.kill(worker, signal.SIGSTOP)  # takes no processor time: the clock's limit ends it
        assert not grader.same_answer("\\sqrt{8}", "2\\sqrt2")
        assert not alive(worker)
        assert grader.counts()["clock_limit"] == 1
    with Grader(1, time_limit=600) as grader:
        assert grader.same_answer(*HARD)
        (worker,) = worker_ids(grader)
        threading.Timer(0.5, os.kill, (worker, signal.SIGKILL)).start()
        assert not grader.same_answer("9^{9^{9^{9}}}", "7")
        assert grader.counts()["crashed"] == 1


def test_waiting_for_a_processor_is_nobodys_fault():
    """Stopped for longer than its time limit, a worker still says what it would have said."""
    with Grader(1, time_limit=0.5) as grader:
        assert grader.same_answer(*HARD)
        (worker,) = worker_ids(grader)
        os.kill(worker, signal.SIGSTOP)
        threading.Timer(1.5, os.kill, (worker, signal.SIGCONT)).start()
        assert grader.same_answer("\\sqrt{8}", "2\\sqrt2")
        assert worker_ids(grader) == [worker]


def test_an_interrupt_leaves_no_reply_behind(request):
    """A reply that nobody waited for must not become the next pair's."""
    # A shell starts what runs in the background with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with Grader(1) as grader:
        assert grader.same_answer(*HARD)
        (worker,) = worker_ids(grader)
        os.kill(worker, signal.SIGSTOP)
        main = threading.main_thread().ident
        threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            grader.same_answer("\\sqrt{8}", "2\\sqrt2")
        assert not grader.same_answer("\\sqrt{8}", "3\\sqrt2")
        assert grader.same_answer("\\sqrt{8}", "2\\sqrt2")


def test_a_worker_that_has_grown_is_replaced_and_its_word_counts():
    with Grader(1, memory_limit=90 * 2**20) as grader:  # half of it is less than it starts with
        assert grader.same_answers([HARD, ("\\sqrt{8}", "2\\sqrt2")]) == [True, True]
        assert grader.counts()["retired"] == grader.counts()["started"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and macOS has no such limit")
def test_memory_is_limited_and_a_worker_loads_neither_jax_nor_spark_jax():
    with Grader(1, memory_limit=256 * 2**20) as grader:
        assert grader.same_answer(*HARD)
        (worker,) = worker_ids(grader)
        limits = Path(f"/proc/{worker}/limits").read_text()
        assert re.search(rf"Max address space +{256 * 2**20} ", limits)
        libraries = Path(f"/proc/{worker}/maps").read_text()
        assert "jax" not in libraries
    # The worker's file, imported by its name alone, as the worker runs it.
    code = (
        "import sys, runpy; runpy.run_path(sys.argv[1])['same']('1/2', '0.5');"
        "assert 'math_verify' in sys.modules;"
        "assert not {'jax', 'numpy', 'torch', 'spark_jax'} & set(sys.modules), sys.modules"
    )
    file = Path(grading.__file__).with_name("grading_worker.py")
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)


PARENT = """
import os, sys, time
from spark_jax.evaluation.grading import Grader
grader = Grader(1)
assert grader.same_answer("x+1", "1+x")
print(grader._idle[0].process.pid, flush=True)
{then}
"""


@pytest.mark.parametrize("then", ["pass", "os.kill(os.getpid(), 9)", "grader.close()"])
def test_workers_end_with_their_parent(then):
    run = subprocess.run(
        [sys.executable, "-c", PARENT.format(then=then)], capture_output=True, text=True
    )
    assert run.stderr == ""
    wait_until(lambda: not alive(int(run.stdout)))


def test_a_fork_has_workers_of_its_own():
    code = PARENT.format(
        then="""
child = os.fork()
if not child:
    assert grader.same_answer("x+2", "2+x")
    sys.exit(3 if grader.counts()["started"] == 2 else 4)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
assert grader.same_answer("x+3", "3+x") and grader.counts()["started"] == 1
"""
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_main_module_is_not_run_again(tmp_path):
    main = tmp_path / "experiment.py"
    main.write_text(
        "from spark_jax.evaluation.grading import same_answer\n"
        "print('ran', same_answer('x+1', '1+x'))\n"  # no `if __name__ == ...`
    )
    run = subprocess.run([sys.executable, str(main)], capture_output=True, text=True, cwd=tmp_path)
    assert (run.stdout, run.stderr) == ("ran True\n", "")


def test_without_math_verify_the_reason_is_raised(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/usr/bin/false")
    with pytest.raises(RuntimeError, match="no grading worker could be started with /usr/bin/fals"):
        Grader(1).same_answer(*HARD)


@pytest.mark.parametrize("text", ["0", "many", "-2"])
def test_a_wrong_number_of_workers_is_refused(monkeypatch, text):
    monkeypatch.setenv("SPARK_JAX_GRADING_WORKERS", text)
    with pytest.raises(ValueError, match=rf"\$SPARK_JAX_GRADING_WORKERS='?{text}"):
        Grader()
    with pytest.raises(ValueError, match="workers=0"):
        Grader(0)
    with pytest.raises(ValueError, match=r"time_limit=0"):
        Grader(1, time_limit=0)


def test_the_number_of_workers_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("SPARK_JAX_GRADING_WORKERS", "7")
    assert Grader().workers == 7
    monkeypatch.delenv("SPARK_JAX_GRADING_WORKERS")
    assert 1 <= Grader().workers <= 4
    assert Grader(9).workers == 9


def alive(process_id):
    """Whether it runs. (A zombie, which its parent has not buried, does not.)"""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process_id}/stat")
    return not stat.exists() or ") Z " not in stat.read_text()


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
