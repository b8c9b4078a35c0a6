"""SIGTERM: a training run finishes its step or, where that takes too long, saves what it has.

A machine that is taken away says so with SIGTERM some time before (Kubernetes and preemptible VMs:
30 seconds; SLURM: as `--signal` asks). A run that heard it saves and ends with status 0; started
again, it goes on from there, bit for bit.

Several processes save together, and so the same state. One that hears SIGTERM tells the others over
the network that started them; each says what it holds, process 0 decides, and all save or, where
one is in its update already, all go on to the end of the step.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

import jax

from spark_jax.parallel import processes

GRACE_VARIABLE = "SPARK_JAX_GRACE_SECONDS"
GRACE = 25.0  # seconds from SIGTERM to SIGKILL, with something in hand
SECONDS_BETWEEN_LOOKS = 1.0  # of a process, whether another one was told to end
SECONDS_TO_ANSWER = 10.0  # of all processes, after which a step goes on

logger = logging.getLogger(__name__)

Save = Callable[[], None]  # returns when the checkpoint is on disk


class Preempted(SystemExit):
    """The run has saved and ends with status 0."""


def listen() -> None:
    """Hears SIGTERM from here on. To be called once, by the main thread, after `processes.start`.

    While no run has a `Watch`, SIGTERM ends the process at once, with status 143.

    Raises:
      ValueError: `SPARK_JAX_GRACE_SECONDS` is not a positive number.
    """
    grace = grace_seconds()
    # Python runs a handler when the main thread is back from the device, which may take minutes;
    # the byte in this pipe is there at once.
    ear, mouth = socket.socketpair()
    mouth.setblocking(False)
    signal.set_wakeup_fd(mouth.detach(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    board = processes.Board("preemption") if several else None
    hear = threading.Thread(target=_hear, args=(ear, grace, board), name="preemption", daemon=True)
    hear.start()
    if board is not None:
        others = _Others(board, jax.process_index(), jax.process_count(), grace)
        # It ends before the interpreter does, which may not find it within a call of the board's.
        atexit.register(others.stop)
        others.start()


def grace_seconds() -> float:
    """How long this process has from SIGTERM on. Raises as `listen`."""
    text = os.environ.get(GRACE_VARIABLE, str(GRACE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{GRACE_VARIABLE}={text!r}; give seconds, such as {GRACE:g}")
    return seconds


class Watch:
    """A training run that wants to save before it ends. A context manager around its loop and the
    checkpoints that it closes; where the run was told to end, it raises `Preempted` as it is
    entered, and as it is left without another error.

    The first half of the grace period is for the step under way: `asked`, at its end, says that it
    is to be the last. If it is not over by then, what it began with (`hold`) is saved on another
    thread, and the process ends; an update, which takes over the memory of the state, is waited
    for. Before the first `hold` or `release` there is nothing to save.

    Several processes save what they hold if all hold the state of the same `hold`: they count them.
    Of each, one run at a time is watched.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held while the state is being saved
        self._save: Save | None = lambda: None
        self._number = 0  # of what is held, among all that this process held

    def hold(self, save: Save) -> None:
        """`save` writes the state as it is now, whenever it is called until `release`."""
        with self._lock:
            self._save, self._number = save, next(_numbers)

    def release(self) -> None:
        """The state is about to be taken over by an update."""
        with self._lock:
            self._save = None

    def asked(self) -> bool:
        """Whether the run is to end here. All processes say the same: one that heard is enough."""
        return processes.any_of(_heard.is_set())

    def seize(self) -> int | None:
        """Keeps what is held from being released, and says its number; None where nothing is."""
        self._lock.acquire()
        if self._save is None:
            self._lock.release()
            return None
        return self._number

    def let_go(self) -> None:
        """The step may go on."""
        self._lock.release()

    def save_seized(self) -> None:
        """Saves it. Afterwards the process is to end: whoever asks for the state waits."""
        assert self._save is not None
        self._save()

    def __enter__(self) -> Watch:
        if self.asked():  # another run of this process, before
            raise Preempted(0)
        self._number = next(_numbers)
        _watches.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            _watches.remove(self)
        if error is None and self.asked():
            raise Preempted(0)


_heard = threading.Event()
_watches: list[Watch] = []  # of several runs, where a pipeline has several threads
_numbers = itertools.count(1)


def _hear(ear: socket.socket, grace: float, board: processes.Board | None) -> None:
    while ear.recv(1)[0] != signal.SIGTERM:
        pass
    _heard.set()  # before the look at the watches: one that is gone by then has not seen it
    if not _watches:
        os._exit(128 + signal.SIGTERM)  # as a shell says it
    if board is not None:
        board.post("told/SIGTERM", "heard")
        return
    _wait_for_the_step(grace)
    if _watches:
        logger.warning("SIGTERM: the step is not over in time; saving what it began with")
        _save_all_and_end()


def _wait_for_the_step(grace: float) -> None:
    deadline = time.monotonic() + grace / 2
    while _watches and time.monotonic() < deadline:
        time.sleep(0.05)


def _save_all_and_end() -> None:
    saved: set[int] = set()
    try:
        while left := [watch for watch in list(_watches) if id(watch) not in saved]:
            for watch in left:
                if watch.seize() is not None:
                    watch.save_seized()
                    saved.add(id(watch))
            time.sleep(0.05)
    except BaseException:
        logger.exception("SIGTERM: could not save")
        os._exit(1)
    if saved:
        os._exit(0)


class _Others(threading.Thread):
    """Of several processes: waits until one was told to end, and saves with them if all can."""

    def __init__(self, board: processes.Board, index: int, count: int, grace: float) -> None:
        super().__init__(name="preemption of others", daemon=True)
        self._board, self._index, self._count, self._grace = board, index, count, grace
        self._over = threading.Event()

    def stop(self) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        try:
            while not self._board.read("told"):
                if self._over.wait(SECONDS_BETWEEN_LOOKS):
                    return
            _heard.set()
            _wait_for_the_step(self._grace)
            number = 0
            while not self._over.is_set():
                self._save_together_or_go_on(number)
                number += 1
                self._over.wait(SECONDS_BETWEEN_LOOKS)
        except jax.errors.JaxRuntimeError:  # process 0 is gone, and so is the run
            logger.warning("SIGTERM: no answer from the others", exc_info=True)

    def _save_together_or_go_on(self, number: int) -> None:
        """One round: what all hold is kept until process 0, which alone decides, has seen all."""
        watch = next(iter(list(_watches)), None)
        held, save = None if watch is None else watch.seize(), False
        try:
            self._board.post(f"held/{number}/{self._index}", str(held))
            if self._index == 0:
                self._board.post(f"save/{number}/decided", str(self._all_hold_the_same(number)))
            save = self._read(f"save/{number}", 1, 6 * SECONDS_TO_ANSWER) == [str(True)]
        finally:
            if watch is not None and held is not None and not save:
                watch.let_go()
        if watch is not None and save:
            self._save_and_end(watch)

    def _all_hold_the_same(self, number: int) -> bool:
        held = self._read(f"held/{number}", self._count, SECONDS_TO_ANSWER)
        return len(held) == self._count and len(set(held)) == 1 and held[0] != str(None)

    def _read(self, folder: str, count: int, seconds: float) -> list[str]:
        """What is there when all is there, or when the time is over."""
        deadline = time.monotonic() + seconds
        while len(texts := self._board.read(folder)) < count and time.monotonic() < deadline:
            if self._over.wait(0.05):
                break
        return texts

    def _save_and_end(self, watch: Watch) -> None:
        try:
            logger.warning("SIGTERM: the step is not over in time; all save what it began with")
            watch.save_seized()
            self._board.meet("saved", 60 * SECONDS_TO_ANSWER)
        except BaseException:
            logger.exception("SIGTERM: could not save")
            os._exit(1)
        if self._index == 0:
            time.sleep(2 * SECONDS_BETWEEN_LOOKS)  # with it goes what the others are connected to
        os._exit(0)
