"""A Python file that runs in a process of its own, for what must not break this one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


class WorkerProcess:
    """One process and the pipe to it. Both ways a message is one JSON value."""

    def __init__(self, file: Path, *arguments: Any) -> None:
        """Starts the process.

        Args:
            file: what it runs.
            arguments: its arguments, after the pipe's file descriptor and this process's id.
        """
        self.connection, theirs = multiprocessing.Pipe()
        given = [theirs.fileno(), os.getpid(), *arguments]
        with theirs:
            # -P: neither the file's folder nor the working directory hides an installed module.
            # One hash seed: no result depends on the order of a set.
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(file), *map(str, given)],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONHASHSEED": "0"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def alive(self) -> bool:
        """Tell whether the process still runs."""
        return self.process.poll() is None

    def ask(self, request: Any, seconds: float) -> dict[str, Any]:
        """Send a request and return the reply, as `receive` does."""
        try:
            self.connection.send_bytes(json.dumps(request).encode())
        except OSError:
            return {"failure": "crashed"}
        return self.receive(seconds)

    def receive(self, seconds: float) -> dict[str, Any]:
        """Return the next message, or `failure`, after which the worker is of no use.

        `failure` is "clock_limit" where nothing came within `seconds`, "time_limit" where SIGPROF
        ended the process, else "crashed".
        """
        try:
            if not self.connection.poll(seconds):
                return {"failure": "clock_limit"}
            return json.loads(self.connection.recv_bytes())
        except (EOFError, OSError, ValueError):
            self.connection.close()
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"failure": "crashed"}
        return {"failure": "time_limit" if code == -signal.SIGPROF else "crashed"}

    def stop(self) -> None:
        """End the process and close the pipe."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


def stop_all(workers: list[WorkerProcess]) -> None:
    """Stop the workers and empty the list."""
    while workers:
        workers.pop().stop()
