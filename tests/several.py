"""Experiments as several processes of one machine, by their command lines."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def flags(config):
    return [f"--config.{name}={value}" for name, value in config.items()]


def start(experiment, count, path, config, cache, only=None):
    """The processes, or those of the indices `only`; their output goes to `<path>.<index>.log`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
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
            environment |= {
                "SPARK_JAX_COORDINATOR": address,
                "SPARK_JAX_NUM_PROCESSES": str(count),
                "SPARK_JAX_PROCESS_ID": str(index),
            }
        with Path(f"{path}.{index}.log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log
            )
        processes.append(process)
    return processes


def output(path, index):
    return Path(f"{path}.{index}.log").read_text()


def run(experiment, count, path, config, cache):
    """Waits for all to end well."""
    processes = start(experiment, count, path, config, cache)
    statuses = [process.wait() for process in processes]
    assert statuses == [0] * count, "\n".join(output(path, i) for i in range(count))


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
