"""Run by test_pods.py as an experiment: waits for as long as the folder `run_dir` holds `wait`."""

import time

from spark_jax.experiments import launch


def run(config, path):
    print("running", flush=True)
    while (path / "wait").exists():
        time.sleep(0.05)


if __name__ == "__main__":
    launch.main(run)
