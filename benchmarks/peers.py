"""The programs that are measured: ours, and the peers in environments of their own.

A worker is a process that keeps models and compiled programs between the turns, so that ours and
the peers' runs alternate; `workers/serve.py` has the protocol. What cannot be installed or started
is `Missing`, with the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / ".peers"
WORKERS = Path(__file__).parent / "workers"
LONGEST_WAIT = 3600.0  # seconds for one answer; then the worker is ended and counts as missing

JAX_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


@dataclasses.dataclass(frozen=True)
class Peer:
    script: str
    requirements: dict[str, tuple[str, ...]]  # by platform; one that is not here is not measured


_TORCH = ("torch==2.13.0", "transformers==5.23.0", "psutil")
PEERS = {
    "tunix": Peer("tunix_worker.py", {"cpu": ("google-tunix==0.1.7",)}),
    "transformers": Peer("torch_worker.py", {"cpu": _TORCH, "gpu": _TORCH}),
}


class Missing(Exception):
    """Why something was not measured."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """Starts workers. `peers` are those that may be installed and measured."""

    platform: str
    peers: tuple[str, ...]
    folder: Path  # for environments
    logs: Path

    def start(self, name: str, threads: int | None = None) -> Worker:
        """A worker, on that many cores if `threads` says how many. Raises Missing."""
        if name == "ours":
            python, script = Path(sys.executable), "ours_worker.py"
        else:
            python, script = self.environment(name), PEERS[name].script
        variables = {
            "JAX_PLATFORMS": JAX_PLATFORMS[self.platform],
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # ours and the peers' share the device
            "HF_HUB_OFFLINE": "1",
        }
        if self.platform == "cpu":
            variables["CUDA_VISIBLE_DEVICES"] = ""
        if threads is not None:
            variables["OMP_NUM_THREADS"] = str(threads)
        log = self.logs / f"{name}.log"
        with _on_cores(threads):
            return Worker([str(python), str(WORKERS / script)], os.environ | variables, log)

    def environment(self, name: str) -> Path:
        """The interpreter of a peer's environment, which is made where it is not there yet.

        Raises Missing: left out, no such platform, or the package index refuses.
        """
        if name not in self.peers:
            raise Missing("left out by --peers")
        requirements = PEERS[name].requirements.get(self.platform)
        if requirements is None:
            raise Missing(f"not measured on {self.platform}")
        folder = self.folder / f"{name}-{self.platform}"
        python, stamp = folder / "bin" / "python", folder / ".installed"
        wanted = "\n".join(requirements) + "\n"
        if not stamp.exists() or stamp.read_text() != wanted:
            _install(folder, requirements, self.logs / f"{name}-install.log")
            stamp.write_text(wanted)
        return python


class Worker:
    """A running worker process."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Raises Missing where the worker says that it failed, ends, or takes too long."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        limit = threading.Timer(LONGEST_WAIT, self.process.kill)
        limit.start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            limit.cancel()
        if not line:
            raise Missing(f"its process ended with {self.process.wait()}; see {self.log}")
        answer = json.loads(line)
        if "error" in answer:
            raise Missing(f"{answer['error'][:300]}; see {self.log}")
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):  # what it never read
                if pipe:
                    pipe.close()


@contextlib.contextmanager
def _on_cores(count: int | None) -> Iterator[None]:
    """What is started inside keeps to so many cores: XLA takes a thread for each that it sees."""
    if count is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(every)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, every)


def _install(folder: Path, requirements: tuple[str, ...], log: Path) -> None:
    print(f"installing {', '.join(requirements)} into {folder}", file=sys.stderr, flush=True)
    try:
        venv.create(folder, with_pip=True, clear=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Missing(f"no virtual environment in {folder}: {error}") from error
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    with log.open("w") as output:
        done = subprocess.run(
            [*pip, *requirements], stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        errors = [x for x in log.read_text().splitlines() if x.startswith("ERROR")]
        raise Missing(f"could not be installed: {' '.join(errors[-1:])[:300]} (see {log})")
