"""How far, how fast, how long: by a clock that the tests move."""

import io

import pytest
from rich.console import Console

from spark_jax.experiments import progress
from spark_jax.experiments.progress import Bar, Jobs, Pace, bars, duration, speed


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def log():
    """A console that is no terminal, and what it was told."""
    text = io.StringIO()
    return Console(file=text, width=200), text


def test_the_pace_is_of_this_start_and_without_the_first_unit():
    clock = Clock()
    pace = Pace(clock)
    assert pace.seconds_per_unit() is None
    pace.report(40)  # what an earlier start did
    clock.now += 30  # compiles
    pace.report(41)
    assert pace.seconds_per_unit() == 30  # all that is known
    clock.now += 4
    pace.report(43)
    assert pace.seconds_per_unit() == 2
    clock.now += 16
    pace.report(45)
    assert pace.seconds_per_unit() == 5


def test_a_log_has_a_line_a_minute_with_pace_and_time_left(clock):
    console, text = log()
    with bars(console) as shown:
        bar = Bar(shown, "runs/rl", "rollouts")
        bar.report(40, 100)
        clock.now += 30
        bar.report(41, 100)
        assert not text.getvalue()
        clock.now += 90
        bar.report(42, 100)
        clock.now += 20
        bar.report(43, 100)
        clock.now += 100
        bar.report(44, 100)
    assert text.getvalue().splitlines() == [
        "runs/rl: 42 of 100 rollouts, 90.0 s per rollout, left: 1:27:00",
        "runs/rl: 44 of 100 rollouts, 70.0 s per rollout, left: 1:05:20",
    ]


def test_the_end_is_said_once_and_nothing_of_a_run_that_had_ended(clock):
    console, text = log()
    with bars(console) as shown:
        Bar(shown, "old", "updates").report(8, 8)
        bar = Bar(shown, "new", "updates")
        bar.report(0, 2)
        for done in (1, 2):
            clock.now += 0.25
            bar.report(done, 2)
    assert text.getvalue().splitlines() == ["new: 2 of 2 updates, 4.0 updates/s, left: 0:00:00"]


def test_jobs_that_were_done_do_not_make_the_others_look_faster(clock, tmp_path):
    console, text = log()

    def finished(config, path, on_progress):
        return

    def half_done(config, path, on_progress):
        on_progress(5, 10)
        for done in range(6, 11):
            clock.now += 100
            on_progress(done, 10)

    with bars(console) as shown:
        done_before = [(finished, None, tmp_path)] * 3
        Jobs(shown, 1).run("Stage", [*done_before, (half_done, None, tmp_path)])
    lines = text.getvalue().splitlines()
    assert lines[1] == "Stage: 3.7 of 4 runs, 1000.0 s per run, left: 0:05:00"
    assert lines[-1] == "Stage: 4 of 4 runs, 1000.0 s per run, left: 0:00:00"
    assert lines[-2] != lines[-1]  # once done, nothing more is said


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_an_error_in_a_job_ends_the_stage_and_no_other_begins(tmp_path, error):
    def breaks(config, path, on_progress):
        raise error("no such thing")

    def begins(config, path, on_progress):
        begun.append(path)

    begun = []
    jobs = [(breaks, None, tmp_path), *[(begins, None, tmp_path)] * 50]
    console, text = log()
    with bars(console) as shown, pytest.raises(error, match="no such thing"):
        Jobs(shown, 1).run("Stage", jobs)
    assert not begun
    assert "stopping: what is under way is finished first" in text.getvalue()


def test_a_terminal_has_a_bar_with_the_time_left(clock):
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True)
    with bars(console) as shown:
        bar = Bar(shown, "runs/rl", "rollouts")
        bar.report(0, 10)
        clock.now += 12
        bar.report(1, 10)
        shown.refresh()
    assert "12.0 s per rollout  left: 0:01:48" in text.getvalue()


def test_words():
    assert speed(None, "updates") == speed(2.0, "") == ""
    assert speed(0.125, "updates") == "8.0 updates/s"
    assert duration(None) == "unknown"
    assert duration(3661.2) == "1:01:01"
