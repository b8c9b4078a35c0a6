"""The launch scripts, by their dry runs: these print all that would be done and do nothing."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from spark_jax.experiments import checks, configuration, pipeline

HERE = Path(__file__).parent
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


ODD = {  # what it stands for → how it is written in ARGS
    "--config.generate.shard=(0,8)": "--config.generate.shard=(0,8)",
    "--config.verify.methods=('single', 'x')": """--config.verify.methods="('single', 'x')\"""",
    '--config.chat.system=say "it" for $(2)': """'--config.chat.system=say "it" for $(2)'""",
}
ARGS = "  ".join(ODD.values())


def heredoc(text):
    """What a dry run hands to a command on its standard input."""
    return text.partition("<<")[2].partition("\n")[2].rpartition("\n")[0].rpartition("\n")[0]


def test_arguments_reach_the_program_word_by_word():
    """Parentheses, spaces, quotes and dollars: through a batch script, YAML, and two shells."""
    expected = list(ODD)
    job = heredoc(run("slurm", "--dry-run", "start", ARGS=ARGS).stdout)
    subprocess.run(["bash", "-n"], input=job, text=True, check=True)
    (line,) = (line for line in job.splitlines() if line.startswith("srun"))
    assert shlex.split(line)[-4:] == [*expected, "&"]

    (line,) = run("gke", "--dry-run", "start", ARGS=ARGS).stdout.splitlines()
    (command,) = (word for word in shlex.split(line) if word.startswith("--command="))
    assert shlex.split(command)[-3:] == expected

    manifest = heredoc(run("gke", "--dry-run", "apply", ARGS=ARGS).stdout)
    (line,) = (line for line in manifest.splitlines() if " command: " in line)
    words = json.loads(line.partition("command: ")[2])  # JSON is YAML
    assert [word.replace("$$(", "$(") for word in words[-3:]] == expected

    text = run("tpu_vm", "--dry-run", "start", ARGS=ARGS, BUCKET="things").stdout
    (command,) = (word for word in shlex.split(text) if word.startswith("--command="))
    words = shlex.split(command)
    first = words.index("--config=configs/spark_qwen25_math_7b.py") + 1
    assert words[first : first + 3] == expected

    (line,) = run("local", "--dry-run", "1", "train_rl", *expected).stdout.splitlines()
    assert shlex.split(line.partition(" >> ")[0])[-3:] == expected


def test_a_manifest_is_yaml():
    yaml = pytest.importorskip("yaml")
    made = yaml.safe_load(heredoc(run("gke", "--dry-run", "apply", ARGS=ARGS).stdout))
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"][:3] == ["bash", "experiments/pods/complete.sh", "python"]
    assert pod["serviceAccountName"] == "default"
    assert "hostNetwork" not in pod  # with it the bucket is mounted with the node's rights


DEVICES = {"tpu_vm": 64, "gke": 64, "slurm": 16, "local": 2}  # of the commands in docs/pods.md


def documented_starts():
    """The blocks of docs/pods.md that call a launch script, as dry runs that only start."""
    text = (PODS.parents[1] / "docs" / "pods.md").read_text().replace("\\\n", " ")
    for block in re.findall(r"(?:^    .*\n)+", text, flags=re.MULTILINE):
        lines = [
            line for line in block.splitlines() if re.match(" *(export|[A-Z_]+=.*pods/)", line)
        ]
        lines += re.findall(r".*pods/(?:local|\w+\.sh start).*", block)
        if script := re.search(r"pods/(\w+)\.sh", block):
            dry = [
                re.sub(r"pods/(\w+)\.sh", r"pods/\1.sh --dry-run", x) for x in dict.fromkeys(lines)
            ]
            yield script[1], "\n".join(dry)


def program(line):
    """Name and fields of the experiment that a printed command starts, through any quoting."""
    words = shlex.split(line)
    for word in words:
        if " -m spark_jax.experiments." in word:
            return program(word.removeprefix("--command="))
    first = words.index("-m") + 1
    fields = [word for word in words[first:] if word.startswith("--config")]
    return words[first].rpartition(".")[2], dict(word.split("=", 1) for word in fields)


def test_documented_commands_pass_their_checks_on_their_devices(monkeypatch):
    """With rewards, models, meshes and rows that fit, before anything is fetched or loaded."""
    by_name = {
        "pipeline": pipeline.check,
        "generate_verifications": checks.check_stage1,
        "train_prm": checks.check_prm,
        "train_rl": checks.check_rl,
    }
    checked, one = [], jax.devices()[0]
    for script, block in documented_starts():
        printed = subprocess.run(
            ["bash", "-euc", block], cwd=PODS.parents[1], capture_output=True, text=True, check=True
        )
        monkeypatch.setattr(jax, "devices", lambda count=DEVICES[script]: [one] * count)
        for line in printed.stdout.splitlines():
            if "spark_jax.experiments." not in line:
                continue
            name, fields = program(re.sub(r" (>>|&).*", "", line) if script == "local" else line)
            config = configuration.load_config(fields.pop("--config"))
            texts = {field.removeprefix("--config."): text for field, text in fields.items()}
            changes = {}
            for field, text in texts.items():
                old = configuration.value_of(config, field)
                changes[field] = type(old)(text)
            checks.check_common(config)
            by_name[name](configuration.changed(config, changes))
            checked.append((script, name))
    assert set(checked) == {
        *((script, "pipeline") for script in ("tpu_vm", "gke", "slurm")),
        *(("gke", name) for name in ("generate_verifications", "train_prm", "train_rl")),
        ("local", "train_rl"),
    }


@pytest.mark.parametrize("script", ACTIONS)
def test_an_open_quote_is_refused(script):
    done = run(script, "--dry-run", "start", ARGS="--config.x='a", BUCKET="things")
    assert done.returncode == 2
    assert "ARGS=--config.x='a: a quote is not closed" in done.stderr


@pytest.mark.parametrize("action", ["create", "setup", "start"])
def test_several_hosts_need_a_folder_that_all_of_them_see(action):
    done = run("tpu_vm", "--dry-run", action, ACCELERATOR="v5litepod-16")
    assert done.returncode == 2
    assert "v5litepod-16 is several hosts" in done.stderr
    for settings in ({"BUCKET": "b"}, {"RUN_DIR": "/nfs/run"}, {"ACCELERATOR": "v6e-8"}):
        settings = {"ACCELERATOR": "v5litepod-16"} | settings
        assert run("tpu_vm", "--dry-run", action, **settings).returncode == 0
    assert run("tpu_vm", "--dry-run", "delete", ACCELERATOR="v5litepod-16").returncode == 0


def test_the_bucket_is_mounted_before_a_run_starts():
    """With gcsfuse, which is installed where it is missing; what hosts are sent is a script."""
    text = run("tpu_vm", "--dry-run", "setup", "start", BUCKET="things").stdout
    commands = [word for word in shlex.split(text) if word.startswith("--command=")]
    for command in commands:
        script = command.removeprefix("--command=")
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert any("command -v gcsfuse" in c and "install --yes gcsfuse" in c for c in commands)
    assert "mountpoint -q bucket ||" in commands[-1]


def test_an_image_has_no_environments_and_no_runs():
    """What git ignores, docker ignores, and the history."""
    ignored = (PODS.parents[1] / ".gitignore").read_text().split()
    docker = (PODS.parents[1] / ".dockerignore").read_text().split("\n")[1:]
    names = {name.strip("/").removesuffix("/").removeprefix("**/") for name in docker}
    assert {name.strip("/") for name in ignored} | {".git"} <= names


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


def wait_for(text, file):
    deadline = time.monotonic() + 120
    while not (file.exists() and text in file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_that_is_told_to_stop_is_not_complete(tmp_path):
    """Through complete.sh, which passes SIGTERM on: another status than that of a complete run."""
    (tmp_path / "wait").touch()
    command = ["bash", PODS / "complete.sh", sys.executable, HERE / "told_to_stop.py"]
    command += ["--config=configs/demo.py", f"--config.run_dir={tmp_path}"]
    environment = os.environ | {"SPARK_JAX_GRACE_SECONDS": "1"}
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        wait_for("running", tmp_path / "log")
        child.terminate()
        assert child.wait(timeout=60) == 75, (tmp_path / "log").read_text()
        (tmp_path / "wait").unlink()
        assert subprocess.run(command, env=environment, stdout=log, stderr=log).returncode == 0


@pytest.mark.parametrize(
    ("program", "status"),
    [("exit 0", 75), ("touch $SPARK_JAX_COMPLETED", 0), ("exit 3", 3), ("kill -9 $$", 137)],
)
def test_only_a_complete_run_ends_well(program, status):
    done = subprocess.run(["bash", PODS / "complete.sh", "bash", "-c", program], check=False)
    assert done.returncode == status


def test_a_program_that_ends_as_the_signal_comes_keeps_its_status(tmp_path):
    """It sends the signal itself, last of all: the waiting shell hears both at once."""
    program = "kill -TERM $PPID; exit 0"
    for _ in range(10):
        command = ["bash", PODS / "complete.sh", "bash", "-c", f"trap '' TERM; {program}"]
        assert subprocess.run(command, check=False).returncode == 75


SRUN = """#!/bin/bash
echo started >> calls
while [[ -e wait ]]; do
  if [[ -e told ]]; then exit 0; fi
  sleep 0.05
done
if [[ -e crash ]]; then exit 3; fi
touch $SPARK_JAX_COMPLETED
"""


@pytest.mark.parametrize(
    ("files", "signalled", "status", "requeued"),
    [
        ((), False, 0, False),
        (("crash",), False, 3, False),
        (("wait",), True, 0, True),  # by SLURM, as the time ends
        (("wait", "told"), False, 0, False),  # by `stop`: the tasks alone
    ],
)
def test_a_slurm_job_goes_on_until_the_run_is_complete(
    tmp_path, files, signalled, status, requeued
):
    """The batch script, with stand-ins for SLURM's commands."""
    tools = {"srun": SRUN, "scancel": "#!/bin/sh\ntouch told\n"}
    tools["scontrol"] = '#!/bin/sh\necho "$@" >> calls\n'
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for name in files:
        (tmp_path / name).touch()
    job = heredoc(run("slurm", "--dry-run", "start", RUN_DIR=str(tmp_path)).stdout)
    job = job.replace(f"cd {PODS.parents[1]}\n", "")
    path = f"{tmp_path}:{os.environ['PATH']}"
    child = subprocess.Popen(
        ["bash", "-c", job], cwd=tmp_path, env={"PATH": path, "SLURM_JOB_ID": "7"}
    )
    if signalled:
        wait_for("started", tmp_path / "calls")
        child.terminate()
    assert child.wait(timeout=60) == status
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["started", *(["requeue 7"] if requeued else [])]
    assert not (tmp_path / "completed_7").exists()


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
        'failing="$(dirname "$0")/failing"\n'
        "if [[ $SPARK_JAX_PROCESS_ID == 1 ]]; then\n"
        "    trap '' TERM; touch \"$failing\"; exit 3\nfi\n"
        "trap 'exit 0' TERM\nuntil [[ -e $failing ]]; do sleep 0.1; done\n"
        "echo ready\nwhile true; do sleep 0.1; done\n"
    )
    python.chmod(0o755)
    child = subprocess.Popen(
        ["bash", PODS / "local.sh", "2", "train_rl"],
        env=os.environ | {"LOGS": str(tmp_path / "logs"), "PYTHON": str(python)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert [child.stdout.readline()[:10] for _ in range(2)] == ["process 0:", "process 1:"]
    wait_for("ready", tmp_path / "logs" / "process_0.log")
    child.terminate()
    output, _ = child.communicate(timeout=30)
    assert child.returncode == 3
    assert "process 0 ended with status 0" in output
    assert "process 1 ended with status 3" in output
