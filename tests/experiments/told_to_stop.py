"""Run by test_pods.py as an experiment: trains for as long as the folder `run_dir` holds `wait`."""

import time

from spark_jax.experiments import launch
from spark_jax.training.preemption import Preempted, Watch


def run(config, path):
    with Watch() as watch:
        watch.release()
        print("running", flush=True)
        while (path / "wait").exists():
            time.sleep(0.05)
            if watch.asked():
                raise Preempted(0)


if __name__ == "__main__":
    launch.main(run)
