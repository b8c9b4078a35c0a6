"""Run by test_preemption.py, as two processes, of which the second is sent SIGTERM in a step that
takes longer than there is time."""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spark_jax.parallel import processes
from spark_jax.parallel.mesh import make_mesh
from spark_jax.training import preemption
from spark_jax.training.checkpointing import Checkpoints


def both_hold(me, watch, saved, state):
    """What the step began with."""
    watch.hold(lambda: saved.ensure(1, state))
    tell(me)
    time.sleep(60)


def first_is_in_its_update(me, watch, saved, state):
    """It is waited for; and the second, which holds its state still, may join it."""
    watch.hold(lambda: saved.ensure(1, state))
    tell(me)
    if me == 1:
        time.sleep(4)
    watch.release()
    processes.exchange(None)  # as the update does
    assert watch.asked()
    saved.save(2, state)


def in_the_last_step(me, watch, saved, state):
    """Its end is the end of the run: nobody asks, and the watch does."""
    watch.release()
    tell(me)
    time.sleep(3)
    saved.save(2, state)


def tell(me):
    processes.exchange(None)
    if me == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def main():
    case, path = sys.argv[1:]
    processes.start()
    preemption.listen()
    where = NamedSharding(make_mesh({"fsdp": 2}), P("fsdp"))
    full = np.arange(8, dtype=np.float32)
    state = {"array": jax.make_array_from_callback(full.shape, where, lambda index: full[index])}
    with preemption.Watch() as watch, Checkpoints(Path(path)) as saved:
        globals()[case](jax.process_index(), watch, saved, state)
    print("went on")


if __name__ == "__main__":
    main()
