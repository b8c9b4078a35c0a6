"""One of two processes of test_processes.py: they exchange values and write checkpoints."""

import contextlib
import dataclasses
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tiny_model
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spark_jax.models import checkpoints, transformer
from spark_jax.parallel import processes
from spark_jax.parallel.mesh import make_mesh
from spark_jax.parallel.sharding import named_shardings
from spark_jax.training import run_folder
from spark_jax.training.checkpointing import Checkpoints
from spark_jax.training.metrics import MetricsWriter
from spark_jax.training.run_folder import OtherRun, RunFolder


def exchanged(me):
    assert processes.exchange({"me": me, "text": "x" * 1000 * me}) == [
        {"me": 0, "text": ""},
        {"me": 1, "text": "x" * 1000},
    ]
    assert processes.any_of(me == 1)
    assert not processes.any_of(False)
    assert processes.on_main(lambda: f"of {me}") == "of 0"
    for rows in ([], [1], [1, 2, 3, 4, 5]):
        begun = processes.begin_share(rows, lambda part: [(row, me) for row in part])
        for done in (processes.share(rows, lambda part: [(row, me) for row in part]), begun()):
            assert [row for row, _ in done] == rows
            if len(rows) == 5:
                assert [who for _, who in done] == [0, 0, 1, 1, 1]


def errors_are_everyones(me):
    for call in (
        lambda: processes.on_main(lambda: 1 // 0),
        lambda: processes.share([1, 2], lambda part: [1 // (part[0] - 2)]),  # the second one's
        lambda: processes.begin_share([1, 2], lambda part: [1 // (part[0] - 1)])(),  # the first's
        lambda: processes.lead(lambda led: 1 // led(0), lambda x: processes.exchange(x)[1]),
    ):
        try:
            call()
        except ZeroDivisionError:
            continue
        raise AssertionError(f"process {me} did not hear of it")


class Fragile(Exception):
    """Its arguments are not those it was made with: it cannot be unpickled."""

    def __init__(self, code, place):
        super().__init__(f"failed with {code} at {place}")


def errors_that_do_not_pickle(me):
    """The others have the type, the message and where it was; the process itself has the error."""

    def fail(of):
        if me == of:
            raise Fragile(7, "the end")

    for index, call in enumerate(
        (
            lambda: processes.on_main(lambda: fail(0)),
            lambda: processes.on_own(lambda: fail(1)),
            lambda: processes.lead(lambda: fail(0)),
            lambda: processes.on_main(lambda: lambda: None),  # a result that does not pickle
            lambda: processes.lead(lambda: lambda: None),
        )
    ):
        try:
            call()
        except Exception as error:
            said = repr(error)
            if index < 3:
                assert "failed with 7 at the end" in said, said
                own = me == (1 if index == 1 else 0)
                assert isinstance(error, Fragile if own else RuntimeError), said  # noqa: PT017
                assert own or ("Fragile on process" in said and "together.py" in said), said
            else:
                assert "pickle" in said, said
        else:
            raise AssertionError(f"process {me} did not hear of {index}")


def too_large(me):
    """Refused by all, wherever it came from, and they go on together."""
    whole, processes.LARGEST_EXCHANGE = processes.LARGEST_EXCHANGE, 2**16
    large = b"x" * 2**16
    for call in (
        lambda: processes.exchange(large if me == 1 else None),
        lambda: processes.on_main(lambda: large),
        lambda: processes.share([1, 2], lambda part: [large]),
        lambda: processes.lead(lambda send: large, lambda x: None),
        lambda: processes.lead(lambda send: send(large), lambda x: None),
    ):
        try:
            call()
        except processes.TooLarge as error:
            assert "exchange at most 65536 bytes in all" in str(error)  # noqa: PT017
        else:
            raise AssertionError(f"process {me} took it")
    assert processes.exchange(me) == [0, 1]
    processes.LARGEST_EXCHANGE = whole


def led(me):
    """The second process follows, and has the result."""
    calls = []

    def call(x, *, times):
        calls.append(x)
        return sum(processes.exchange(x * times))

    def work(call):
        assert me == 0
        return [call(x, times=2) for x in (1, 2, 3)]

    assert processes.lead(work, call) == [4, 8, 12]
    assert calls == [1, 2, 3]


def state_on(mesh, spec, scale=1):
    where = NamedSharding(mesh, spec)
    full = scale * np.arange(32, dtype=np.float32).reshape(8, 4)
    array = jax.make_array_from_callback(full.shape, where, lambda index: full[index])
    count = jax.device_put(np.int32(scale), NamedSharding(mesh, P()))
    return {"array": array, "count": count}, full


def shared_checkpoints(me, path):
    one, other = make_mesh({"fsdp": 2}), make_mesh({"data": 2})
    with Checkpoints(path, keep=None) as saved:
        for step in (1, 2, 3):
            saved.save(step, state_on(one, P("fsdp"), step)[0], {"step": step})
    if me == 0:  # a file of the newest one is cut
        values = max((path / "3").rglob("d/*"), key=lambda file: file.stat().st_size)
        values.write_bytes(values.read_bytes()[: values.stat().st_size // 2])
    processes.exchange(None)
    template, _ = state_on(other, P(None, "data"))
    with Checkpoints(path, keep=None) as saved, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state, extra = saved.restore_latest(template)
        said = [str(w.message) for w in caught if "3.torn, going on from step 2" in str(w.message)]
        assert len(said) == (1 if me == 0 else 0)
        assert extra == {"step": 2}
        assert state["array"].sharding == template["array"].sharding
        _, full = state_on(other, P(), 2)
        for shard in state["array"].addressable_shards:
            np.testing.assert_array_equal(shard.data, full[shard.index])
        saved.save(3, state, {"step": 3})
    assert (path / "3.torn").is_dir()


def unreadable_for_one(me, path):
    """What one process cannot read is skipped by both."""
    mesh = make_mesh({"fsdp": 2})
    with Checkpoints(path) as saved:
        for step in (1, 2):
            saved.save(step, state_on(mesh, P("fsdp"), step)[0])
        saved.wait()
        whole = saved._restore
        if me == 1:

            def fails_once(step, template):
                if step == 2:
                    raise OSError("no such bucket")
                return whole(step, template)

            saved._restore = fails_once
        state, _ = saved.restore_latest(state_on(mesh, P("fsdp"))[0])
        assert int(state["count"]) == 1


def files(me, path):
    folder = RunFolder.open(path, {"a": 1})
    assert not folder.resumed
    with MetricsWriter(path) as metrics:
        metrics.scalars(1, {"me": jnp.float32(me)})
    assert RunFolder.open(path, {"a": 1}).resumed
    try:
        RunFolder.open(path, {"a": 2})
    except OtherRun as error:
        assert "a: 1 in the folder, 2 now" in str(error)  # noqa: PT017
    else:
        raise AssertionError("another configuration was taken")
    with slowly(run_folder, "_write_json"):
        folder.write_summary({"me": me})
    assert (path / "summary.json").exists()
    assert folder.read_summary() == {"me": 0}
    rows = (path / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 1
    assert '"me": 0.0' in rows[0]


def exported(me, path):
    """A model that is spread over both processes is written whole, by the first."""
    mesh = make_mesh({"tensor": 2})
    config = dataclasses.replace(tiny_model.CONFIG, vocab_size=12)
    params = tiny_model.params(config)
    places = named_shardings(transformer.logical_axes(config), params, mesh)
    arrays = jax.tree.map(np.asarray, params)
    spread = jax.tree.map(
        lambda x, to: jax.make_array_from_callback(x.shape, to, lambda index: x[index]),
        arrays,
        places,
    )
    assert not spread.embedding.is_fully_addressable
    with slowly(checkpoints, "_write_json"):
        checkpoints.save_hf(path, spread, config, max_shard_bytes=2000)
    back, _ = checkpoints.load(path)
    assert len(list(path.glob("*.safetensors"))) > 1
    for got, expected in zip(jax.tree.leaves(back), jax.tree.leaves(arrays), strict=True):
        np.testing.assert_array_equal(got, expected)


def not_shared(me, path):
    """A folder of the same name on two disks, one name for each here, is refused by both."""
    run_folder.VISIBLE_WITHIN = 0.5
    own = path / f"disk_{me}"
    try:
        RunFolder.open(own, {"a": 1})
    except FileNotFoundError as error:
        assert "process 1, on " in str(error)  # noqa: PT017
        assert "disk_1 what process 0 wrote there" in str(error)  # noqa: PT017
    else:
        raise AssertionError(f"process {me} took a folder that is not shared")
    assert me == 1 or not list(own.glob(".shared-*"))


@contextlib.contextmanager
def slowly(module, name):
    """What a module writes comes late; who goes on before it is there is found out."""
    write = getattr(module, name)

    def late(*args):
        time.sleep(0.5)
        write(*args)

    setattr(module, name, late)
    yield
    setattr(module, name, write)


def not_exported(me, path):
    """What keeps the first process from writing ends both, at whichever file."""
    config = dataclasses.replace(tiny_model.CONFIG, vocab_size=12)
    params = tiny_model.params(config)

    def full(*args):
        assert me == 0
        raise OSError(28, "No space left on device")

    for name in ("_make_room", "_write_shard", "_write_json"):
        whole = getattr(checkpoints, name)
        setattr(checkpoints, name, full)
        try:
            checkpoints.save_hf(path, params, config)
        except OSError as error:
            assert "No space left" in str(error)  # noqa: PT017
        else:
            raise AssertionError(f"process {me} did not hear of it")
        setattr(checkpoints, name, whole)


def main():
    path = Path(sys.argv[1])
    exchange, met = processes.exchange, []
    processes.exchange = lambda value: met.append(value) or exchange(value)
    processes.start()
    processes.start()  # the second call does nothing
    assert met == [None]  # one collective, before anything sets them apart
    processes.exchange = exchange
    me = jax.process_index()
    assert jax.process_count() == 2
    with jax.set_mesh(make_mesh({"data": 2})):
        exchanged(me)
        led(me)
        errors_are_everyones(me)
        errors_that_do_not_pickle(me)
        too_large(me)
        files(me, path / "run")
        not_shared(me, path)
    shared_checkpoints(me, path / "checkpoints")
    unreadable_for_one(me, path / "others")
    exported(me, path / "model")
    not_exported(me, path / "none")
    processes.finish()
    print("all is well")


if __name__ == "__main__":
    main()
