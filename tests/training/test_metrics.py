import json
import os
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from spark_jax.training import metrics
from spark_jax.training.metrics import MetricsWriter, read_metrics


def steps(path):
    return [row["step"] for row in read_metrics(path)]


def test_rows_are_floats_with_clocks_that_go_on_over_a_resumption(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.scalars(1, {"loss": jnp.float32(0.5), "half": jnp.bfloat16(2), "n": 3, "b": True})
        sum(i * i for i in range(300_000))  # some CPU time
        writer.scalars(2, {"loss": np.float64(0.25)})
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.scalars(3, {"loss": 0})
    rows = read_metrics(writer.path)
    assert [row["loss"] for row in rows] == [0.5, 0.25, 0.0]
    assert (rows[0]["half"], rows[0]["n"], rows[0]["b"]) == (2.0, 3.0, 1.0)
    assert all(type(v) is float for row in rows for name, v in row.items() if name != "step")
    for clock in ("wall_time", "cpu_time"):
        times = [row[clock] for row in rows]
        assert times == sorted(times)
        assert times[1] - times[0] > 1e-3


def test_non_finite_values_are_valid_json_and_come_back(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.scalars(1, {"loss": jnp.nan, "norm": -jnp.inf, "fine": 1.0})

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    json.loads(writer.path.read_text(), parse_constant=refuse)
    (row,) = read_metrics(writer.path)
    assert np.isnan(row["loss"])
    assert (row["norm"], row["fine"]) == (-np.inf, 1.0)
    assert "non_finite" not in row


def test_truncation_leaves_no_duplicate_rows(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 6):
            writer.scalars(step, {"loss": step})
        writer.scalars(3, {"accuracy": 0.5})  # a late evaluation of step 3 stays
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        assert writer.truncate_after(3) == 2
        for step in (4, 5):
            writer.scalars(step, {"loss": 10 * step})
    assert steps(writer.path) == [1, 2, 3, 3, 4, 5]
    assert [r.get("loss") for r in read_metrics(writer.path)] == [1, 2, 3, None, 40, 50]


def test_rows_are_synced_but_not_more_often_than_a_bucket_takes(tmp_path, monkeypatch):
    """What is only flushed is lost with the machine: in a bucket, all since the file was opened."""
    on_disk = []
    monkeypatch.setattr("os.fsync", lambda file: on_disk.append(os.fstat(file).st_size))
    monkeypatch.setattr(metrics, "SECONDS_BETWEEN_SYNCS", 0.0)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2):
            writer.scalars(step, {"loss": step})
            assert on_disk[-1] == writer.path.stat().st_size
        monkeypatch.setattr(metrics, "SECONDS_BETWEEN_SYNCS", 60.0)
        before = len(on_disk)
        for step in (3, 4):
            writer.scalars(step, {"loss": step})
        assert len(on_disk) == before
    assert on_disk[-1] == writer.path.stat().st_size


def test_a_lost_row_of_the_restored_step_is_said(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2):
            writer.scalars(step, {"loss": step})
    lost = r"metrics\.jsonl has no row of step 4, .* rows after step 2 were lost"
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        with pytest.warns(UserWarning, match=lost):
            writer.truncate_after(4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for whole in (2, 0, -1):
                writer.truncate_after(whole)


def test_a_line_cut_short_by_a_crash_is_dropped_and_reported(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.scalars(1, {"loss": 1.0})
        writer.scalars(2, {"loss": 2.0})
    writer.path.write_text(writer.path.read_text()[:-7])
    with (
        pytest.warns(UserWarning, match="dropped the last line, cut short"),
        MetricsWriter(tmp_path, tensorboard=False) as writer,
    ):
        writer.scalars(2, {"loss": 3.0})
    assert [row["loss"] for row in read_metrics(writer.path)] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"ratios": np.ones(3)}, r"'ratios' is not a scalar number: shape \(3,\)"),
        ({"name": "grpo"}, "'name' is not a scalar number"),
        ({"step": 3}, "'step' is taken"),
    ],
)
def test_what_is_not_a_scalar_is_refused_by_name(tmp_path, metrics, message):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(ValueError, match=message):
            writer.scalars(1, metrics)
        assert writer.path.read_text() == ""


def events(directory):
    """(step, tag, kind) of every TensorBoard event, read back from the files."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for file in sorted(directory.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == SessionLog.START:
                found.append((event.step, None, "purge"))
            found += [
                (event.step, v.tag, v.WhichOneof("value"), v.simple_value)
                for v in event.summary.value
            ]
    return found


def test_tensorboard_gets_scalars_histograms_texts_and_the_purge(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.scalars(1, {"loss": 0.5})
        writer.histogram(1, "ratio", np.array([1.0, np.nan, 2.0]))
        writer.histogram(1, "nothing", np.array([np.nan]))
        writer.text(1, "sample", "7 + 5 = 2")
    got = events(tmp_path)
    assert (1, "loss", "simple_value", 0.5) in got
    assert [e[:2] for e in got if e[2] == "histo"] == [(1, "ratio")]
    assert [e[0] for e in got if e[1] and e[1].startswith("sample") and e[2] == "tensor"] == [1]
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_after(1)
        writer.scalars(8, {"loss": 0.25})
        with pytest.raises(ValueError, match="before the first TensorBoard event"):
            writer.truncate_after(1)
    assert (2, None, "purge") in events(tmp_path)
