"""The benchmark command runs and leaves both files; what it measures is not judged here."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import jobs, peers, roofline, run, sizes, targets
from benchmarks.measure import Contender, Timing, compare, markdown
from benchmarks.peers import FOLDER, PEERS, Missing, Programs, Worker

ROOT = Path(__file__).parents[1]
SETTING = jobs.Setting(sizes.QUICK, "cpu", "nowhere")


def bench(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--quick", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def check(folder, printed, names, repeats):
    record = json.loads((folder / "benchmarks.json").read_text())
    tables = (folder / "benchmarks.md").read_text()
    assert tables == printed
    assert {"processor", "threads", "load", "ours", *PEERS} <= set(record["machine"])
    assert list(record["results"]) == names
    for name, result in record["results"].items():
        assert f"### {name}\n" in tables
        assert len(result["load"]) == 2
        for timing in result["timings"]:
            assert timing["contender"] in tables
            if timing["missing"]:
                continue
            rounds = min(repeats, 2) if name in jobs.LONG else repeats
            lists = ("amounts", "cpu_seconds", "wall_seconds", "rates", "speed")
            assert all(len(timing[x]) == rounds for x in lists)
            assert min(timing["cpu_seconds"]) > 0
            assert timing["peak_bytes"] > 1 << 20
            if timing["worker"] == "ours":
                assert timing["recompilations"] == 0, timing["contender"]
    return {name: result["timings"] for name, result in record["results"].items()}


@pytest.mark.slow
def test_ours_alone(tmp_path):
    """Peers that are left out are missing, and their targets neither reached nor missed."""
    asked = ["settings", "head", "decode_attention"]
    done = bench("--peers=none", f"--only={','.join(asked)}", "--repeats=2", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    results = check(tmp_path, done.stdout, asked, 2)
    ours = [x for x in results["settings"] if x["worker"] == "ours"]
    # Sampling settings are traced: what the first compiled serves the others.
    assert ours[0]["compilations"] > 0
    assert [x["compilations"] for x in ours[1:]] == [0] * 6
    assert ours[0]["speed"] == [1.0, 1.0]
    rate = statistics.median(ours[1]["rates"])
    assert f"| {ours[1]['contender']} | {rate:.4g} |" in done.stdout
    assert ours[1]["rates"][0] == ours[1]["amounts"][0] / ours[1]["cpu_seconds"][0]
    heads = [x for y in asked[1:] for x in results[y] if x["unit"] == "tokens"]
    assert len(heads) == 5
    assert all(x["temporaries"] > 0 for x in heads)
    assert all(min(x["roofline"]) > 0 for x in heads)
    theirs = [x for y in results.values() for x in y if x["worker"] != "ours"]
    assert theirs
    assert all(x["missing"] == "left out by --peers" and not x["speed"] for x in theirs)
    assert "| programs compiled when settings change or a prompt within its bucket |" in done.stdout
    row = next(x for x in done.stdout.splitlines() if "greedy, to Tunix" in x)
    assert "| not measured |" in row
    assert done.stdout.endswith(targets.table(targets.read(tmp_path / "benchmarks.json")))


def answering(name, threads=None):
    """A worker of ours that measures nothing."""
    if name != "ours":
        raise Missing("left out by --peers")
    return Worker([sys.executable, "-S", "-c", ANSWERS], dict(os.environ), Path(os.devnull))


ANSWERS = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] in ("about", "rest"):
        answer = {}
    elif request["do"] == "prepare":
        answer = {"id": 0}
    else:
        warm = request["do"] == "warm"
        answer = dict(amount=8, cpu_seconds=2.0, wall_seconds=1.0, peak_bytes=2 << 20, facts={},
                      device_peak_bytes=None, compilations=int(warm), compile_seconds=0.5,
                      temporaries=1, tokens=None)
    print(json.dumps(answer), flush=True)
"""


def test_a_run_leaves_what_it_prints_and_what_it_measured(tmp_path, monkeypatch, capsys):
    """The command with a worker that computes nothing; `test_ours_alone` has the real one."""
    monkeypatch.setattr(Programs, "start", lambda _, *asked: answering(*asked))
    monkeypatch.setattr(run, "_weights", lambda *_: None)
    asked = ["settings", "head", "decode_attention"]
    only = f"--only={','.join(asked)}"
    run.main(["--quick", "--peers=none", only, "--repeats=2", f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    results = check(tmp_path, printed, asked, 2)
    ours, theirs = (
        [x for y in results.values() for x in y if (x["worker"] == "ours") == own]
        for own in (True, False)
    )
    assert all(x["rates"] == [4.0, 4.0] and x["speed"] == [1.0, 1.0] for x in ours)
    assert theirs
    assert all(x["missing"] == "left out by --peers" and not x["speed"] for x in theirs)
    row = next(x for x in printed.splitlines() if "greedy, to Tunix" in x)
    assert "| not measured |" in row
    assert printed.endswith(targets.table(targets.read(tmp_path / "benchmarks.json")))


def test_a_peer_that_pip_refuses_is_missing_with_pips_last_error(tmp_path, monkeypatch):
    """`test_what_cannot_be_installed_is_missing_with_the_reason` asks the real pip."""

    def create(folder, **_):
        python = folder / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text("#!/bin/sh\necho ERROR: first\necho ERROR: No such thing\nexit 1\n")
        python.chmod(0o755)

    monkeypatch.setattr(peers.venv, "create", create)
    programs = Programs("cpu", ("tunix",), tmp_path / "peers", tmp_path)
    with pytest.raises(Missing, match=r"could not be installed: ERROR: No such thing \(see"):
        programs.start("tunix")
    assert not list(tmp_path.rglob(".installed"))


@pytest.mark.slow
def test_what_cannot_be_installed_is_missing_with_the_reason(tmp_path):
    done = bench(
        "--peers=tunix",
        f"--peers-folder={tmp_path / 'peers'}",
        "--only=loading",
        "--repeats=1",
        f"--out={tmp_path}",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS="",
    )
    assert done.returncode == 0, done.stderr
    timings = check(tmp_path, done.stdout, ["loading"], 1)["loading"]
    reasons = {x["worker"]: x["missing"] for x in timings}
    assert reasons["ours"] is None
    assert reasons["tunix"].startswith("could not be installed: ERROR: No matching distribution")
    assert reasons["transformers"] == "left out by --peers"
    assert f"| tunix | missing: {reasons['tunix']} |" in done.stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--only=decoding", "'decoding' is unknown; choose from ['settings'"),
        ("--peers=vllm", "'vllm' is unknown; choose from ['tunix'"),
        ("--repeats=0", "--repeats: 0; it must be at least 1"),
    ],
)
def test_bad_options_are_refused(tmp_path, capsys, argument, message):
    with pytest.raises(SystemExit) as ended:
        run.main(["--quick", argument, f"--out={tmp_path}"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


WORKER = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "prepare":
        answer = {"id": request["job"]["id"]}
    elif request["do"] == "rest":
        answer = {}
    elif request["id"] == 3 and request["do"] == "run":
        sys.exit(7)
    elif request["id"] == 2:
        answer = {"error": "ValueError: no such thing"}
    else:
        print(request["id"], file=sys.stderr)
        seconds = 2.0 if request["id"] else 1.0
        answer = dict(amount=10, cpu_seconds=seconds, wall_seconds=9.0, peak_bytes=1,
                      device_peak_bytes=None, compilations=1, compile_seconds=0.5,
                      temporaries=None, facts={}, tokens=[[1, 2, request["id"], 4]])
    print(json.dumps(answer), flush=True)
"""


def test_turns_ratios_and_failures(tmp_path):
    """Contenders alternate, in another order each round; who fails is missing, others go on."""

    def start(name, threads):
        if name == "absent":
            raise Missing("not here")
        return Worker([sys.executable, "-c", WORKER], dict(os.environ), tmp_path / "log")

    contenders = [
        Contender("fast", "ours", {"id": 0}),
        Contender("slow", "ours", {"id": 1}, in_a_row=True),
        Contender("refused", "ours", {"id": 2}),
        Contender("gone", "peer", {"id": 3}),
        Contender("never", "absent", {"id": 4}),
    ]
    told = []
    fast, slow, refused, gone, never = compare(contenders, start, repeats=3, on_run=told.append)
    assert slow.speed == [0.5] * 3
    assert slow.rates == [5.0] * 3
    assert fast.facts == {}
    assert slow.facts == {"same greedy text": 0.5}
    assert fast.compilations == 1
    assert fast.recompilations == 3
    assert slow.recompilations == 6
    assert refused.missing.startswith("ValueError: no such thing")
    assert gone.missing.startswith("its process ended with 7")
    assert never.missing == "not here"
    order = (tmp_path / "log").read_text().split()
    assert order == ["0", "1", "3", "0", "1", "1", "1", "1", "0", "0", "1", "1"]
    assert markdown([fast, gone]).count("\n") == 4
    assert [line.partition(":")[0] for line in told] == [
        *(f"first run, {x.name}" for x in contenders),
        *(f"round 1 of 3, {name}" for name in ("fast", "slow", "gone")),
        *(f"round 2 of 3, {name}" for name in ("slow", "fast")),
        *(f"round 3 of 3, {name}" for name in ("fast", "slow")),
    ]
    assert told[6] == "round 1 of 3, slow: 10 tokens in 2.0 CPU seconds, 9.0 by the clock"
    assert "missing, its process ended with 7" in told[7]


def test_the_roofline_is_the_slower_of_operations_and_bytes():
    cost = roofline.Cost(flops=100.0, bytes=10.0, dtype="float32")
    peaks = [{"float32": 50.0, "bytes": 10.0}, {"float32": 1000.0, "bytes": 5.0}]
    assert roofline.shares(cost, [4.0, 4.0], peaks) == [0.5, 0.5]
    assert roofline.shares(cost, [4.0], [{"bytes": 10.0}]) is None


def test_costs_count_every_weight():
    """Against a count of the parameters themselves."""
    import jax

    from spark_jax.models import transformer

    model = SETTING.model
    shapes = transformer.shapes(sizes.QUICK.model)
    weights = sum(x.size for x in jax.tree.leaves(shapes) if x.ndim > 1)
    norms = 2 * sizes.QUICK.model.num_layers * sizes.QUICK.model.width
    assert roofline.decode(model, "bfloat16", 1, 1, 1).bytes > 2 * (weights - norms)
    once = roofline.forward(model, "float32", 1, 1, 1)
    pair = 4 * sizes.QUICK.model.num_layers * sizes.QUICK.model.num_heads * 8
    assert once.flops == 2 * (weights - norms) + pair
    assert roofline.train(model, "float32", 1, 1, 1).flops == 3 * once.flops


def timing(name, rates, **more):
    return Timing(contender=name, worker="", unit="tokens", dtype="", rates=rates, **more)


def test_targets_take_the_fastest_of_a_peer():
    results = {
        "policy_step_bfloat16": [
            timing("ours, bfloat16", [4.0, 8.0, 6.0]),
            timing("ours, bfloat16, projections stored", [8.0, 8.0, 8.0]),
            timing("transformers, autocast, 1 thread", [2.0, 2.0, 2.0]),
            timing("transformers, bfloat16, 1 thread", [4.0, 2.0, 4.0]),
            timing("transformers, bfloat16, 2 threads", [], missing="no"),
        ]
    }
    row = next(x for x in targets.table(results).splitlines() if "transformers, bfloat16 |" in x)
    assert "not measured" in row  # decode's

    def rows():
        return [x for x in targets.table(results).splitlines() if "--only policy_step_bf" in x][:2]

    as_it_comes, stored = rows()
    assert "| 1.5 × | yes |" in as_it_comes
    assert "stored" in stored
    assert "| 2 × | yes |" in stored
    results["policy_step_bfloat16"].append(timing("transformers, other", [6.0, 9.0, 8.0]))
    assert "| 0.75 × | no |" in rows()[0]


def test_every_target_names_contenders_that_exist():
    """With all contenders measured, no target is open but those of a GPU."""
    results = {}
    for platform, label in (("cpu", ""), ("gpu", "1.5B ")):
        setting = jobs.Setting(sizes.QUICK, platform, "nowhere")
        for name in jobs.BENCHMARKS:
            results[label + name] = [
                timing(
                    x.name,
                    [1.0],
                    roofline=[1.0],
                    peak_bytes=1,
                    temporaries=1,
                    facts={"largest gap, nat": 1.0},
                )
                for x in jobs.contenders(name, setting)
            ]
    assert "not measured" not in targets.table(results)


@pytest.mark.parametrize("name", [x for x in jobs.BENCHMARKS if x not in jobs.CPU_ONLY])
def test_ours_share_the_one_process_that_a_tpu_serves(name):
    setting = jobs.Setting(sizes.QUICK, "tpu", None)
    places = {x.place for x in jobs.contenders(name, setting) if x.worker == "ours"}
    assert places <= {("ours", "", None)}


@pytest.fixture
def lasting_workers(monkeypatch):
    """One process serves all benchmarks: it starts once, and once compiles what several share."""
    start, workers = Programs.start, {}

    def shared(programs, name, threads=None):
        if (name, threads) not in workers:
            workers[name, threads] = start(programs, name, threads)
        return workers[name, threads]

    close = Worker.close
    monkeypatch.setattr(Programs, "start", shared)
    monkeypatch.setattr(Worker, "close", lambda worker: None)
    yield
    for worker in workers.values():
        close(worker)


@pytest.mark.slow(minutes=2)
def test_every_benchmark_runs(tmp_path, monkeypatch, lasting_workers, capsys):
    """Of a model of one layer."""
    one_layer = dataclasses.replace(sizes.QUICK.model, num_layers=1)
    monkeypatch.setattr(sizes, "QUICK", dataclasses.replace(sizes.QUICK, model=one_layer))
    run.main(["--quick", "--repeats=1", "--peers=none", f"--out={tmp_path}"])
    check(tmp_path, capsys.readouterr().out, list(jobs.BENCHMARKS), 1)


@pytest.mark.slow
@pytest.mark.skipif(
    not all((FOLDER / f"{name}-cpu" / ".installed").exists() for name in PEERS),
    reason="no environments of the peers: `make bench` makes them",
)
def test_every_peer_runs_and_computes_the_same(tmp_path):
    done = bench("--repeats=1", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    results = check(tmp_path, done.stdout, list(jobs.BENCHMARKS), 1)
    assert [x for y in results.values() for x in y if x["missing"]] == []
    for x in results["decode"]:
        if "float32" in x["contender"] and "same greedy text" in x["facts"]:
            assert x["facts"]["same greedy text"] == 1.0, x["contender"]
    for name in ("policy_step", "sft_step"):
        single = [x for x in results[name] if x["unit"] == "tokens" and x["dtype"] == "float32"]
        losses = [x["facts"]["loss, nat"] for x in single]
        assert max(losses) - min(losses) < 1e-3, results[name]


def test_programs_start_only_what_they_may(tmp_path):
    programs = Programs("tpu", ("tunix",), tmp_path, tmp_path)
    with pytest.raises(Missing, match="not measured on tpu"):
        programs.start("tunix")
    with pytest.raises(Missing, match="left out by --peers"):
        programs.start("transformers")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_a_worker_of_one_thread_has_one_core(tmp_path):
    before = os.sched_getaffinity(0)
    worker = Programs("cpu", (), tmp_path, tmp_path).start("ours", 1)
    try:
        assert len(os.sched_getaffinity(worker.process.pid)) == 1
    finally:
        worker.close()
    assert os.sched_getaffinity(0) == before
