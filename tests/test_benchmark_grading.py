"""The grading benchmark runs, and every verdict in it is right; its speeds are not judged here."""

import json
from itertools import product

import pytest

from benchmarks import grading


@pytest.mark.slow
def test_it_prints_every_kind_and_every_hostile_answer(capsys):
    grading.main(["--small", "--workers", "2"])
    machine, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert machine["benchmark"] == "machine"
    speeds = [row for row in rows if row["benchmark"] == "throughput"]
    ways = ["in_process", "workers=2"]
    assert [(row["kind"], row["way"]) for row in speeds] == list(
        product([*grading.KINDS, "mixed"], ways)
    )
    assert all(0 < row["least"] <= row["pairs_per_second"] <= row["most"] for row in speeds)
    hostile = [row for row in rows if row["benchmark"] == "hostile"]
    assert [row["answer"] for row in hostile] == list(grading.HOSTILE)
    assert not any(row["verdict"] for row in hostile)
    assert {row["workers_lost"] for row in hostile} == {0, 1}
