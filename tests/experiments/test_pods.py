"""The launch scripts, by their dry runs: these print all that would be done and do nothing."""

import os
import subprocess
import time
from pathlib import Path

import pytest

PODS = Path(__file__).parents[2] / "experiments" / "pods"
ACTIONS = {
    "tpu_vm": "create setup start watch status stop delete",
    "gke": "image cluster start watch stop apply",
    "slurm": "setup start watch status stop",
}
COMMANDS = {  # what each action comes down to
    "tpu_vm": ["tpu-vm create", "scp", "pip install", "nohup", "tail", "kill -0", "kill -TERM"],
    "gke": ["docker build", "cluster create", "workload create", "logs", "delete", "kubectl apply"],
    "slurm": ["pip install", "sbatch", "srun", "tail", "squeue", "scancel"],
}


def run(script, *arguments, **variables):
    return subprocess.run(
        ["bash", PODS / f"{script}.sh", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": "/home/me"} | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def no_tools(tmp_path):
    """A PATH on which every tool of a cluster is there and leaves a trace when it is called."""
    for tool in (
        "gcloud",
        "docker",
        "xpk",
        "kubectl",
        "sbatch",
        "scancel",
        "squeue",
        "git",
        "mkdir",
    ):
        fake = tmp_path / tool
        fake.write_text(f"#!/bin/sh\necho {tool} >> {tmp_path}/called\n")
        fake.chmod(0o755)
    return tmp_path, f"{tmp_path}:{os.environ['PATH']}"


@pytest.mark.parametrize("script", ACTIONS)
def test_a_dry_run_prints_every_command_and_calls_none(script, no_tools):
    folder, path = no_tools
    settings = {"CONFIG": "configs/x.py", "ARGS": "--config.mesh.fsdp=16", "BUCKET": "things"}
    done = run(script, "--dry-run", *ACTIONS[script].split(), PATH=path, **settings)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS[script])
    assert "--config=configs/x.py" in done.stdout
    assert "--config.mesh.fsdp=16" in done.stdout
    assert not (folder / "called").exists()
    # What is printed is a script: quoted so that a shell reads it back.
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


@pytest.mark.parametrize("script", ACTIONS)
def test_without_dry_run_the_printed_commands_are_called(script, no_tools):
    folder, path = no_tools
    action = {"tpu_vm": "delete", "gke": "stop", "slurm": "status"}[script]
    assert run(script, action, PATH=path).returncode == 0
    assert len((folder / "called").read_text().split()) == 1


@pytest.mark.parametrize("script", ACTIONS)
def test_unknown_actions_are_refused_and_no_action_explains(script):
    done = run(script, "--dry-run", "fly")
    assert done.returncode == 2
    assert "unknown action 'fly'; choose among" in done.stderr
    done = run(script)
    assert done.returncode == 2
    assert f"experiments/pods/{script}.sh [--dry-run] ACTION" in done.stderr


def test_several_processes_of_one_machine(tmp_path):
    """Each with its number; a dry run starts none."""
    done = run("local", "--dry-run", "2", "train_rl", "--config=x.py", LOGS=str(tmp_path / "logs"))
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(f"SPARK_JAX_PROCESS_ID={i}" in line for i, line in enumerate(lines))
    assert all("spark_jax.experiments.train_rl --config=x.py" in line for line in lines)
    assert not (tmp_path / "logs").exists()


def test_statuses_and_signals_of_processes_are_passed_on(tmp_path):
    """With a stand-in for Python: process 1 fails, process 0 waits to be told to stop."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        "if [[ $SPARK_JAX_PROCESS_ID == 1 ]]; then exit 3; fi\n"
        "trap 'exit 0' TERM\necho ready\nwhile true; do sleep 0.1; done\n"
    )
    python.chmod(0o755)
    child = subprocess.Popen(
        ["bash", PODS / "local.sh", "2", "train_rl"],
        env=os.environ | {"LOGS": str(tmp_path / "logs"), "PYTHON": str(python)},
        stdout=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "logs" / "process_0.log"
    deadline = time.monotonic() + 30
    while not (log.exists() and "ready" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.terminate()
    output, _ = child.communicate(timeout=30)
    assert child.returncode == 3
    assert "process 0 ended with status 0" in output
    assert "process 1 ended with status 3" in output
