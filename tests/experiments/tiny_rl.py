"""A tiny RL run, and a way to start it many times: what is imported stays, all else is new.

Run as a script, it reads run folders, a line each, and runs in a child process whatever is not done
there yet; it prints the child's process id and, when it has ended, its exit status.
"""

import contextlib
import io
import os
import signal
import sys
from pathlib import Path

from spark_jax.experiments import configuration, train_rl
from spark_jax.training import preemption

CHANGES = {
    "rl.reward": "rule_based",
    "rl.advantage": "spro",
    "rl.num_problems": 16,
    "rl.prompts_per_step": 2,
    "rl.group_size": 4,
    "rl.save_every": 1,
    "evaluate.num_problems": 4,
    "evaluate.samples_per_problem": 2,
}


def config(steps):
    changes = CHANGES | {"rl.steps": steps, "rl.evaluate_every": steps // 2}
    return configuration.changed(configuration.load_config("configs/demo.py"), changes)


def child(path, steps):
    """As `launch.main` runs it."""
    preemption.listen()
    sys.stderr = io.TextIOWrapper((path.parent / f"{path.name}.err").open("ab"), write_through=True)
    train_rl.run(config(steps), path)


def main():
    steps = int(sys.argv[1])
    for line in sys.stdin:
        pid = os.fork()  # no backend has been started: JAX has no threads yet
        if pid == 0:
            status = 1
            with contextlib.suppress(Exception):
                try:
                    child(Path(line.strip()), steps)
                    status = 0
                except SystemExit as stop:
                    status = stop.code
            os._exit(status)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        print(signal.Signals(-code).name if code < 0 else code, flush=True)


if __name__ == "__main__":
    main()
