"""Run by test_preemption.py: what a process does that is sent SIGTERM; prints its exit status."""

import hashlib
import os
import sys
import time
from pathlib import Path

from spark_jax.parallel import processes
from spark_jax.training import preemption


def no_run(folder):
    time.sleep(60)


def ends_its_step(folder):
    with preemption.Watch() as watch:
        watch.release()
        while not watch.asked():
            time.sleep(0.01)
        (folder / "saved").write_text("the step")
        raise preemption.Preempted(0)


def step_takes_long(folder):
    with preemption.Watch() as watch:
        watch.hold(lambda: (folder / "saved").write_text("what the step began with"))
        time.sleep(60)


def update_takes_long(folder):
    """It has taken over the state: it is waited for, and the step with it."""
    with preemption.Watch() as watch:
        watch.hold(lambda: (folder / "saved").write_text("what the step began with"))
        watch.release()
        time.sleep(1.5)
        (folder / "saved").write_text("the step")
        assert watch.asked()
        raise preemption.Preempted(0)


def cannot_save(folder):
    def save():
        raise OSError("No space left on device")

    with preemption.Watch() as watch:
        watch.hold(save)
        time.sleep(60)


def two_runs(folder):
    """Of a pipeline: the state of the one, the end of the other's update."""
    with preemption.Watch() as one, preemption.Watch() as other:
        one.hold(lambda: (folder / "one").write_text("saved"))
        other.release()
        time.sleep(1.5)
        other.hold(lambda: (folder / "other").write_text("saved"))
        time.sleep(60)


def before_the_first_step(folder):
    with preemption.Watch():
        time.sleep(60)


def in_the_last_step(folder):
    """Nobody asks any more: the end of the watch says so, once all is written, and the next run."""
    try:
        with preemption.Watch() as watch:
            watch.release()
            time.sleep(1.5)
            (folder / "saved").write_text("the step")
        (folder / "exported").touch()
    except preemption.Preempted as end:
        assert end.code == 0  # noqa: PT017
    with preemption.Watch():
        (folder / "went_on").touch()


def busy(folder):
    """In code that gives the interpreter no chance to run a handler, as a program on a device."""
    with preemption.Watch() as watch:
        watch.hold(lambda: (folder / "saved").write_text("what the step began with"))
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, without the interpreter's lock


def main():
    folder = Path(sys.argv[1])
    for case in sys.argv[2:]:
        (folder / case).mkdir()
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                preemption.listen()
                processes.exchange(None)  # jax starts; after it a watch is entered at once
                (folder / case / "ready").touch()
                globals()[case](folder / case)
            except SystemExit as end:
                status = end.code
            os._exit(status)
        while not (folder / case / "ready").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(pid, 15)
        _, status = os.waitpid(pid, 0)
        print(case, os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
