"""Several processes of one machine: experiments by their command lines, and scripts of tests."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from spark_jax.parallel.processes import COORDINATOR, NUM_PROCESSES, PROCESS_ID

ROOT = Path(__file__).parents[1]


def flags(config):
    return [f"--config.{name}={value}" for name, value in config.items()]


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def explicit(address, count, index):
    """The variables by which a process finds the others."""
    return {COORDINATOR: address, NUM_PROCESSES: str(count), PROCESS_ID: str(index)}


def run_script(*command, environment, seconds, count=2):
    """What each process of a script says; all have to end well, within so many seconds."""
    address = free_address()
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | environment | explicit(address, count, index),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]
    try:
        said = [process.communicate(timeout=seconds)[0] for process in started]
    finally:
        end(started)
    assert [process.returncode for process in started] == [0] * count, "\n".join(said)
    return said


def start(experiment, count, path, config, cache, only=None):
    """The processes, or those of the indices `only`; their output goes to `<path>.<index>.log`."""
    address = free_address()
    command = [sys.executable, "-m", f"spark_jax.experiments.{experiment}"]
    command += ["--config=configs/demo.py", f"--config.run_dir={path}", *flags(config)]
    processes = []
    for index in range(count) if only is None else only:
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        if count > 1:
            environment |= explicit(address, count, index)
        with Path(f"{path}.{index}.log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log
            )
        processes.append(process)
    return processes


def output(path, index):
    return Path(f"{path}.{index}.log").read_text()


def run(experiment, count, path, config, cache):
    """Waits for all to end well, and without a complaint at the exit."""
    processes = start(experiment, count, path, config, cache)
    statuses = [process.wait() for process in processes]
    said = "\n".join(output(path, i) for i in range(count))
    assert statuses == [0] * count, said
    assert "Traceback" not in said, said


def wait_for_rows(path, number, processes, seconds=600):
    """Until so many metric rows are there."""
    file, end = path / "metrics.jsonl", time.monotonic() + seconds
    while not file.exists() or file.read_text().count("\n") < number:
        assert all(p.poll() is None for p in processes), output(path, 0)
        assert time.monotonic() < end
        time.sleep(0.005)


def end(processes):
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
