"""Jitted functions that runs share."""

import threading
import time

from spark_jax.training import programs


def test_threads_that_begin_at_once_share_what_one_of_them_makes():
    made = []

    @programs.shared
    def program(setting):
        made.append(setting)
        time.sleep(0.1)  # the others come meanwhile
        return object()

    got = []
    threads = [threading.Thread(target=lambda: got.append(program("a"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["a"]
    assert len(set(map(id, got))) == 1
    assert program("b") is not got[0]
