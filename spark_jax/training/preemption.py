"""SIGTERM: a training run finishes its step or, where that takes too long, saves what it has.

A machine that is taken away says so with SIGTERM some time before (Kubernetes and preemptible VMs:
30 seconds; SLURM: as `--signal` asks). A run that heard it saves and ends with status 0; started
again, it goes on from there, bit for bit.

Several processes save together, at the end of the step under way: the grace period must outlast a
step. Where it does not, a run goes on from its last checkpoint; `save_every` says how old that is.
"""

from __future__ import annotations

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
    threading.Thread(target=_hear, args=(ear, grace), name="preemption", daemon=True).start()


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

    Several processes always wait for the end of the step. To save earlier they would have to hold
    the same state, which none of them knows of the others while a step is under way.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held while the state is being saved
        self._save: Save | None = lambda: None

    def hold(self, save: Save) -> None:
        """`save` writes the state as it is now, whenever it is called until `release`."""
        with self._lock:
            self._save = save

    def release(self) -> None:
        """The state is about to be taken over by an update."""
        with self._lock:
            self._save = None

    def asked(self) -> bool:
        """Whether the run is to end here. All processes say the same: one that heard is enough."""
        return processes.any_of(_heard.is_set())

    def save_held(self) -> bool:
        """Saves what is held; False where nothing is. Afterwards the process is to end: whoever
        asks for the state waits."""
        self._lock.acquire()
        if self._save is None:
            self._lock.release()
            return False
        self._save()
        return True

    def __enter__(self) -> Watch:
        if self.asked():  # another run of this process, before
            raise Preempted(0)
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


def _hear(ear: socket.socket, grace: float) -> None:
    while ear.recv(1)[0] != signal.SIGTERM:
        pass
    _heard.set()  # before the look at the watches: one that is gone by then has not seen it
    if not _watches:
        os._exit(128 + signal.SIGTERM)  # as a shell says it
    if jax.process_count() > 1:
        logger.warning("SIGTERM: all processes save at the end of the step")
        return
    deadline = time.monotonic() + grace / 2
    while _watches and time.monotonic() < deadline:
        time.sleep(0.05)
    if _watches:
        logger.warning("SIGTERM: the step is not over in time; saving what it began with")
        _save_all_and_end()


def _save_all_and_end() -> None:
    saved: set[int] = set()
    try:
        while left := [watch for watch in list(_watches) if id(watch) not in saved]:
            saved |= {id(watch) for watch in left if watch.save_held()}
            time.sleep(0.05)
    except BaseException:
        logger.exception("SIGTERM: could not save")
        os._exit(1)
    if saved:
        os._exit(0)
