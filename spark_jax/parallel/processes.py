"""Several processes that run one program: start-up, who writes, and values they exchange.

Every process runs the same host loop with the same numbers; a mesh spans the devices of all. What
is written (logs, text, metrics, plots) is written by process 0. With one process every function
here is the trivial one, and costs nothing.
"""

from __future__ import annotations

import functools
import glob
import os
import pickle
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

COORDINATOR = "SPARK_JAX_COORDINATOR"
NUM_PROCESSES = "SPARK_JAX_NUM_PROCESSES"
PROCESS_ID = "SPARK_JAX_PROCESS_ID"

HEARTBEAT_TIMEOUT = 30  # seconds without a sign of life after which a process counts as dead
SHUTDOWN_TIMEOUT = 15  # seconds that a process which ends waits for the others; see `finish`
LARGEST_EXCHANGE = 2**30  # bytes, of all processes together: every device holds them for a moment

_WHOLE_GATHERS = "xla_jf_spmd_threshold_for_windowed_einsum_mib"

T = TypeVar("T")


def start() -> None:
    """Joins this process to the others of its run, if there are others; a second call does nothing.

    To be called before anything starts a JAX backend. Looks, in this order, at

    - `SPARK_JAX_COORDINATOR` (host:port of process 0), `SPARK_JAX_NUM_PROCESSES` and
      `SPARK_JAX_PROCESS_ID`: explicit addresses, anywhere;
    - SLURM: a step of several tasks (`srun`);
    - TPU: the chips of this machine are there, alone or as part of a slice. With
      `SPARK_JAX_NUM_PROCESSES=1` a process goes alone wherever it is.

    A process whose heartbeat is missed for `HEARTBEAT_TIMEOUT` seconds is dead: the others end with
    a message and a non-zero status, whatever they were waiting for.

    Raises:
      ValueError: an incomplete or impossible set of addresses, with the variable.
    """
    if jax.distributed.is_initialized():
        return
    os.environ["LIBTPU_INIT_ARGS"] = tpu_flags(os.environ)
    how = arguments(os.environ)
    if how is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # read by the CPU backend alone
    jax.distributed.initialize(
        **how,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
    )
    # The first collective connects them, for which the CPU's have 30 seconds; later ones may come
    # as far apart as they like, as when each has loaded its model.
    exchange(None)


def tpu_flags(environment: Mapping[str, str]) -> str:
    """What XLA's TPU compiler is told in LIBTPU_INIT_ARGS: what stands there already, and to gather
    the weights of a layer before it multiplies with them. It would multiply with each part as it
    arrives, and read and write the float32 sums of all parts so far: twice the time for a policy
    step of 7B, by its own estimate."""
    given = environment.get("LIBTPU_INIT_ARGS", "")
    return given if _WHOLE_GATHERS in given else f"{given} --{_WHOLE_GATHERS}=1000000".strip()


def arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be told; {} lets it ask SLURM or the TPU's metadata,
    None means that this process is alone. ValueError as `start`."""
    given = [name for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if environment.get(name)]
    if given == [NUM_PROCESSES] and environment[NUM_PROCESSES] == "1":
        return None
    if given:
        return _explicit(environment)
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return {}
    wanted = environment.get("JAX_PLATFORMS", "tpu")
    return {} if "tpu" in wanted.split(",") and _has_tpu() else None


def is_main() -> bool:
    """Whether this is process 0, which writes."""
    return jax.process_index() == 0


class TooLarge(ValueError):
    """More is to be exchanged than should go through the devices. Raised on every process."""


def exchange(value: T) -> list[T]:
    """Every process's value, by process, on every process. Values are pickled: small ones, and none
    that hold device arrays. All processes call it; so it is a barrier too. TooLarge, on all, for
    values of more than `LARGEST_EXCHANGE` bytes."""
    if jax.process_count() == 1:
        return [value]
    return [pickle.loads(pickled) for pickled in _gather(pickle.dumps(value))]


def on_main(make: Callable[[], T]) -> T:
    """What `make` gives on process 0, on every process; what it raises is raised on all."""
    result: Any = on_own(lambda: make() if is_main() else None)[0]
    return result


def on_own(make: Callable[[], T]) -> list[T]:
    """What `make` gives on every process, on every process; what any raises is raised on all."""
    if jax.process_count() == 1:
        return [make()]
    own_error: Exception | None = None
    try:
        made = pickle.dumps(_Returned(make()))
    except Exception as error:  # the others must not wait for what will not come
        own_error, made = error, pickle.dumps(_raised(error))
    everyone = [pickle.loads(pickled) for pickled in _gather(made)]
    for index, one in enumerate(everyone):
        if isinstance(one, _Raised):
            if index == jax.process_index() and own_error is not None:
                raise own_error
            raise one.error
    return [one.result for one in everyone]


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    return any(exchange(flag))


def share(rows: Sequence[T], work: Callable[[Sequence[T]], Sequence[Any]]) -> list[Any]:
    """`work(rows)`, a result a row, each process doing an equal run of the rows."""
    return _joined(lambda: list(work(own_part(rows))))


def begin_share(
    rows: Sequence[T], work: Callable[[Sequence[T]], Sequence[Any]]
) -> Callable[[], list[Any]]:
    """`share`, begun: the work is done on a thread of its own, and may not run programs on the
    devices. What is returned waits for the results; all processes call it, in the same order."""
    thread = ThreadPoolExecutor(1, "share")
    own = thread.submit(lambda: list(work(own_part(rows))))
    thread.shutdown(wait=False)
    return lambda: _joined(own.result)


def _joined(own: Callable[[], list[Any]]) -> list[Any]:
    return [result for part in on_own(own) for result in part]


def own_part(rows: Sequence[T]) -> Sequence[T]:
    """This process's run of the rows; those of all processes, in order, are the rows."""
    count, index = jax.process_count(), jax.process_index()
    return rows[index * len(rows) // count : (index + 1) * len(rows) // count]


def lead(work: Callable[..., T], *calls: Callable[..., Any]) -> T:
    """`work(*calls)` on process 0; the others only take part in the calls it makes.

    For work on text, whose files and whose answers from graders one process should see, around
    functions that all processes must run together, such as sampling. The result is on every
    process: a small one; what is large stays where `work` puts it, on process 0 or on disk.
    Arguments of the calls are pickled; with one process, this is `work(*calls)`.
    """
    if jax.process_count() == 1:
        return work(*calls)
    if not is_main():
        return _follow(calls)

    def announced(index: int, *args: Any, **options: Any) -> Any:
        exchange(_Call(index, args, options))
        return calls[index](*args, **options)

    try:
        result = work(*(functools.partial(announced, i) for i in range(len(calls))))
        said = pickle.dumps(_Returned(result))
    except TooLarge:  # the others know
        raise
    except Exception as error:
        _gather(pickle.dumps(_raised(error)))
        raise
    _gather(said)
    return result


def finish() -> None:
    """Waits for the others, however long they take, so that none is missed at the shutdown."""
    exchange(None)


class Board:
    """Short texts that the processes of a run leave for one another, for any thread and at any
    time: they go over the network that started the run, not through programs on the devices."""

    def __init__(self, name: str) -> None:
        """To be made after `start` found several processes; `name` tells one board from another."""
        from jax._src import distributed  # jax has no public way to it; orbax goes the same

        client: Any = distributed.global_state.client
        self._client, self._name = client, f"spark_jax/{name}"

    def post(self, key: str, text: str) -> None:
        """Puts a text where it stays; a second one takes its place."""
        self._client.key_value_set(f"{self._name}/{key}", text, allow_overwrite=True)

    def read(self, folder: str) -> list[str]:
        """The texts of all keys `<folder>/...`; they need not be there yet."""
        return [str(text) for _, text in self._client.key_value_dir_get(f"{self._name}/{folder}/")]

    def meet(self, place: str, seconds: float) -> None:
        """Returns when all processes have called it, once a place. Raises JaxRuntimeError
        where one does not in time."""
        self._client.wait_at_barrier(f"{self._name}/{place}", int(1000 * seconds))


class _Call(NamedTuple):
    number: int
    args: tuple[Any, ...]
    options: dict[str, Any]


class _Returned(NamedTuple):
    result: Any


class _Raised(NamedTuple):
    error: Exception


def _raised(error: Exception) -> _Raised:
    """The error as others can raise it: as text, where it does not survive being pickled."""
    try:
        back = pickle.loads(pickle.dumps(error))
        if type(back) is type(error) and str(back) == str(error):
            return _Raised(error)
    except Exception:  # whatever a class's own __init__ or __reduce__ makes of it
        pass
    trace = "".join(traceback.format_exception(error))
    where = f"process {jax.process_index()}"
    return _Raised(RuntimeError(f"{type(error).__name__} on {where}: {error}\n{trace}"))


def _gather(own: bytes) -> list[bytes]:
    """Every process's bytes, by process. TooLarge, on all, where they are too many."""
    from jax.experimental import multihost_utils

    sizes = multihost_utils.process_allgather(np.int32(min(len(own), np.iinfo(np.int32).max)))
    longest = int(sizes.argmax())
    if int(sizes[longest]) * len(sizes) > LARGEST_EXCHANGE:
        raise TooLarge(
            f"process {longest} has {sizes[longest]} bytes for each of {len(sizes)} processes; "
            f"exchange at most {LARGEST_EXCHANGE} bytes in all, and let the rest go through files "
            "or stay where it is"
        )
    padded = np.zeros(int(sizes[longest]), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def _follow(calls: Sequence[Callable[..., Any]]) -> Any:
    while True:
        said: Any = exchange(None)[0]
        if isinstance(said, _Call):
            calls[said.number](*said.args, **said.options)
        elif isinstance(said, _Raised):
            raise said.error
        else:
            return said.result


def _explicit(environment: Mapping[str, str]) -> dict[str, Any]:
    missing = [n for n in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if not environment.get(n)]
    if missing:
        raise ValueError(f"{' and '.join(missing)} not set; several processes need all three")
    try:
        count, index = int(environment[NUM_PROCESSES]), int(environment[PROCESS_ID])
    except ValueError as error:
        raise ValueError(f"{NUM_PROCESSES}, {PROCESS_ID}: {error}") from error
    if not 0 <= index < count:
        raise ValueError(
            f"{PROCESS_ID}={index} is not among the {count} processes 0 to {count - 1} that "
            f"{NUM_PROCESSES} says there are"
        )
    address = environment[COORDINATOR]
    if not address.rpartition(":")[2].isdigit() or ":" not in address:
        raise ValueError(f"{COORDINATOR}={address!r}; give host:port, where process 0 listens")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _has_tpu() -> bool:
    """Whether the kernel shows chips, as on every TPU machine; nothing is started to find out."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))
