"""Programs compiled for TPU slices that are not there, and what is read from them."""

import io
import json
import math
from types import SimpleNamespace

import jax
import pytest
from experiment_runs import Stop
from for_tpu import needs_libtpu
from rich.console import Console

from spark_jax.decoding.decoder import TOKENS
from spark_jax.experiments import (
    compile_for_pod,
    configuration,
    pod_plan,
    pod_programs,
    pod_worker,
    rl_setup,
    train_rl,
)
from spark_jax.experiments.configuration import ConfigError
from spark_jax.experiments.pod_programs import Program
from spark_jax.kernels import ahead_of_time, hlo
from spark_jax.parallel.mesh import make_mesh

SMALL = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32768,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
PARAMETERS = 2 * 32768 * 256 + 2 * (256 * (256 + 128 + 128) + 256 * 256 + 3 * 256 * 512)  # matrices


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run with a model of which nothing is there but its shape."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text(json.dumps(SMALL))
    changes = {
        "model": str(folder),
        "dtype": "bfloat16",
        "decode.max_prompt_length": 64,
        "decode.max_new_tokens": 64,
        "decode.slots": 16,
        "rl.objective.kl_coefficient": 0.1,
        "rl.accumulation_steps": 4,
        "generate.num_problems": 1000,
    }
    return configuration.changed(configuration.load_config("configs/demo.py"), changes)


@pytest.fixture
def one_device():
    return make_mesh({}, jax.devices()[:1])


def score_arrays(text, vocab, tensor, tokens, weights=()):
    """Arrays of a program with an axis as long as the vocabulary, or a device's part of it, and so
    many numbers to each of its entries, other than so many weights."""
    found = []
    for size, name in hlo.largest_arrays(text, 100_000):
        axes = list(map(int, name.partition("[")[2].rstrip("]").split(",")))
        longest = next((axis for axis in (vocab, vocab // tensor) if axis in axes), None)
        if longest and size // longest >= tokens and size // longest not in weights:
            found.append(name)
    return found


@pytest.fixture(scope="module")
def compiled(small, tmp_path_factory):
    """The rows by program, and the policy step as text."""
    programs = ("rl/policy_step", "generate/prefill", "generate/decode")
    folder = tmp_path_factory.mktemp("hlo")
    rows = compile_for_pod.compile_programs(
        small, "v5e:2x2", {"fsdp": 2, "tensor": 2}, programs=programs, hlo_folder=str(folder)
    )
    assert [row.get("error") for row in rows] == [None] * 3
    text = (folder / "rl_policy_step_v5e_2x2_1x2x2.hlo").read_text()
    return {row["program"]: row for row in rows}, text


def rows_a_device(config):
    """Of a micro-batch of the policy step, over fsdp=2."""
    return config.rl.prompts_per_step * config.rl.group_size / config.rl.accumulation_steps / 2


@pytest.mark.slow
@needs_libtpu
def test_a_small_run_fits_a_small_slice(compiled):
    step = compiled[0]["rl/policy_step"]
    assert all(row["fits"] and row["over"] < 0 for row in compiled[0].values())
    assert step["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    # Parameters and two moments in float32, a quarter on each device; norms and biases are whole.
    state = 12 * PARAMETERS / 4
    assert state < step["arguments"] < 1.1 * state
    assert step["output"] < 2**20  # the new state takes the place of the old one
    beside = step["beside"]
    assert beside["policy to sample from"] == pytest.approx(2 * PARAMETERS / 4, rel=0.05)
    assert beside["reference policy"] == pytest.approx(4 * PARAMETERS / 4, rel=0.05)
    assert beside["reward model"] == beside["policy to sample from"]
    sizes = ("arguments", "temporaries", "output", "code")
    assert step["total"] == sum(step[name] for name in sizes) + sum(beside.values())


@pytest.mark.slow
@needs_libtpu
def test_no_scores_of_all_tokens_on_any_device(compiled, small):
    _, text = compiled
    tokens = int(rows_a_device(small) * small.decode.max_new_tokens)
    assert not score_arrays(text, SMALL["vocab_size"], 2, tokens)
    # The same text has smaller ones, which the test would find.
    assert score_arrays(text, SMALL["vocab_size"], 2, 64)


@pytest.mark.slow
@needs_libtpu
def test_what_a_program_does_is_counted(compiled, small):
    step, decode = compiled[0]["rl/policy_step"], compiled[0]["generate/decode"]
    assert step["cycles"] > 10_000
    moved = {kind: one["bytes"] for kind, one in step["collectives"].items()}
    # Each micro-batch gathers the layers' weights, over fsdp, forward and backward.
    assert sum(moved.values()) > 4 * 2 * (PARAMETERS - 2 * 32768 * 256) / 2 * 2
    # Two sums over tensor a layer and pass (forward, again, backward), and one more, in bfloat16.
    activations = rows_a_device(small) * 128 * SMALL["hidden_size"] * 2
    assert moved["all-reduce"] < 4 * 2 * 7 * activations * 1.2
    token = pod_plan.decoder_step(decode)
    assert 0 < token["cycles"] < decode["cycles"]
    assert step["versions"] == {"jax": jax.__version__, "libtpu": ahead_of_time.libtpu_version()}


@pytest.mark.slow
@needs_libtpu
def test_a_plan_of_stage_one(compiled, small):
    """Twice the problems take twice the time; what is assumed is printed."""
    rows = [
        row | {"program": f"{stage}/{row['program'].partition('/')[2]}"}
        for stage in ("generate", "verify")
        for row in compiled[0].values()
    ]
    plan = pod_plan.stage_one(small, rows, {"occupancy": 0.5})
    assert plan["generate"]["tokens"] == 1000 * 8 * 32  # half of 64 tokens, as nothing else is said
    assert plan["verify"]["tokens"] == plan["generate"]["tokens"] * 16
    assert plan["together"]["chip_hours"] == pytest.approx(4 * plan["together"]["hours"])
    twice = configuration.changed(small, {"generate.num_problems": 2000})
    longer = pod_plan.stage_one(twice, rows, {"occupancy": 0.5})
    assert longer["together"]["hours"] == pytest.approx(2 * plan["together"]["hours"])
    printed = io.StringIO()
    pod_plan.print_plan(plan, Console(file=printed, width=120))
    assert "--occupancy=0.5" in printed.getvalue()


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "mesh", "programs", "of_any_mesh", "message"),
    [
        ("v5e:2x2", {"tensor": 4}, ["rl/fly"], True, r"\['rl/fly'\] are none of"),
        ("v9:2x2", {"fsdp": 4}, [], False, r"'v9:2x2'.*'v5p'"),
        pytest.param(
            *("v5e:2x2", {"fsdp": 3}, [], False, r"'fsdp': 3.* there are 4"), marks=pytest.mark.slow
        ),
        pytest.param(*("v5e:2x99", {"fsdp": -1}, [], True, "v5e:2x99"), marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_is_refused(small, topology, mesh, programs, of_any_mesh, message):
    with pytest.raises(ValueError, match=message) as caught:
        compile_for_pod.compile_programs(small, topology, mesh, programs=programs)
    assert isinstance(caught.value, ConfigError) == of_any_mesh


def test_a_plan_needs_its_programs(small):
    with pytest.raises(ConfigError, match="generate/prefill, which was not compiled"):
        pod_plan.stage_one(small, [], {})


def plan_row(program, *, mesh=(1, 4, 1), cycles=1e6, fits=True, **fields):
    cost = {"cycles": cycles, "kernel_flops": 0, "collectives": {}}
    found = {"program": program, "topology": "v5e:2x2", "devices": 4, "rows": 4, "fits": fits}
    found |= {"mesh": dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))} | cost
    return found | {"loops": {f"jit(decode)/{TOKENS}/while": cost}} | fields


def plan_rows(**fields):
    stages = ("generate", "verify")
    return [plan_row(f"{s}/{p}", **fields) for s in stages for p in ("prefill", "decode")]


def test_a_plan_counts_a_prompt_for_all_that_is_asked(small):
    """As `verify_solutions` asks: once without references, once with, and twice a critique."""
    found = {}
    for methods in (("single", "step_consistency"), ("single", "reference_guided"),
                    ("single", "meta_critique")):  # fmt: skip
        config = configuration.changed(small, {"verify.methods": methods})
        found[methods[1]] = pod_plan.stage_one(config, plan_rows(), {})["verify"]
    solutions = 1000 * 8
    prompts = {name: plan["prompts"] // solutions for name, plan in found.items()}
    assert prompts == {"step_consistency": 1, "reference_guided": 2, "meta_critique": 3}
    texts = {name: plan["tokens"] // (solutions * 32) for name, plan in found.items()}
    assert texts == {"step_consistency": 16, "reference_guided": 32, "meta_critique": 18}
    assert found["meta_critique"]["hours"] > found["step_consistency"]["hours"]


def test_a_plan_names_what_it_leaves_out(small):
    rows = plan_rows(kernels_without_estimate=0)
    rows[3] |= {"kernels_without_estimate": 2}
    rows.append(plan_row("rl/policy_step", kernels_without_estimate=9))
    printed = io.StringIO()
    pod_plan.print_plan(pod_plan.stage_one(small, rows, {}), Console(file=printed, width=120))
    (line,) = (x for x in printed.getvalue().splitlines() if "no time for" in x)
    assert "no time for 2 kernels (attention) of verify/decode" in line
    assert "the network between slices" in printed.getvalue()
    assert "the largest cache" in printed.getvalue()


def test_a_plan_refuses_programs_that_do_not_fit(small):
    rows = plan_rows()
    rows[1] |= {"fits": False, "over": 2**31}
    message = r"generate/decode does not fit v5e:2x2 over 1·4·1: 2\.00 GiB a device are missing"
    with pytest.raises(ConfigError, match=message):
        pod_plan.stage_one(small, rows, {})


def command_line(tmp_path, **options):
    given = {
        "programs": [], "num_slices": 1, "search": False, "plan": False, "hlo": "",
        "topology": "v5e:2x2", "mesh": "", "output": str(tmp_path / "rows.json"),
    }  # fmt: skip
    nothing = {name: default for name, (default, _) in pod_plan.ASSUMPTIONS.items()}
    return SimpleNamespace(**given | nothing | options)


def test_a_plan_is_for_the_best_mesh_of_a_search(small, tmp_path, monkeypatch):
    def compile_programs(config, topology, mesh, **_):
        cycles = {1: 4e6, 2: 1e6, 4: 2e6}[mesh["tensor"]]
        fields = {"beside": {}, "hbm": 2**34, "seconds_to_compile": 1.0, "total": 2**30}
        return plan_rows(mesh=tuple(mesh.values()), cycles=cycles, **fields)

    monkeypatch.setattr(compile_for_pod, "compile_programs", compile_programs)
    compile_for_pod.run(small, command_line(tmp_path, search=True, plan=True))
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["programs"][0]["mesh"]["tensor"] == 2
    best = [row for row in found["programs"] if row["mesh"] == found["programs"][0]["mesh"]]
    expected = pod_plan.stage_one(small, best, {})
    assert found["plan"]["together"] == expected["together"]


@pytest.mark.parametrize("mesh", ["fsdp=3", "data=-1", "foo=2", "fsdp=8"])
def test_a_search_over_no_mesh_is_refused(small, tmp_path, mesh):
    with pytest.raises(ValueError, match=r"--mesh=.* with --search: no mesh over 4 devices"):
        compile_for_pod.run(small, command_line(tmp_path, search=True, mesh=mesh))


def test_a_search_says_once_what_is_wrong_with_every_mesh(small, tmp_path, monkeypatch):
    """An unknown program at the first mesh; and where each is refused for itself, in the end."""
    calls = []

    def compile_programs(config, topology, mesh, hlo_folder, **_):
        calls.append(hlo_folder)
        raise error

    monkeypatch.setattr(compile_for_pod, "compile_programs", compile_programs)
    error = ConfigError("programs ['fly'] are none")
    with pytest.raises(ConfigError, match="fly"):
        compile_for_pod.run(small, command_line(tmp_path, search=True, hlo="texts"))
    assert calls == ["texts"]
    error = ValueError("heads")
    with pytest.raises(ValueError, match="all 6 meshes are refused"):
        compile_for_pod.run(small, command_line(tmp_path, search=True))
    with pytest.raises(ValueError, match=r"topology='v9:2x2'"):
        compile_for_pod.run(small, command_line(tmp_path, search=True, topology="v9:2x2"))
    assert len(calls) == 1 + 6


def test_open_sizes_are_refused(small, one_device):
    with pytest.raises(ConfigError, match=r"decode\.max_prompt_length is None"):
        pod_programs.programs(configuration.load_config("configs/demo.py"), one_device)


def test_by_how_much_a_program_does_not_fit(one_device):
    """From the compiler's own words, and what else would lie on the device."""

    def fails(message):
        def lower():
            raise RuntimeError(message)

        program = Program("x", "m", lower, {"reference policy": 2**30}, rows=1, positions=1)
        return pod_worker.compile_program(program, one_device, "v5e:2x2", "")

    row = fails("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
                "temporaries (22.75G) exceeds available HBM (15.75G).")  # fmt: skip
    assert (row["fits"], row["total"], row["over"]) == (False, 23.75 * 2**30, 8 * 2**30)
    row = fails("Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm. Exceeded")
    assert row["over"] == 1.75 * 2**30
    row = fails("heads do not divide")
    assert not row["fits"]
    assert "over" not in row
    assert "heads do not divide" in row["error"]


def test_meshes_of_a_topology():
    found = list(compile_for_pod.meshes(8, {}))
    assert len(found) == 10  # triples of powers of 2 that multiply to 2^3
    assert all(math.prod(mesh.values()) == 8 for mesh in found)
    assert len({tuple(mesh.values()) for mesh in found}) == 10
    assert [mesh["fsdp"] for mesh in compile_for_pod.meshes(8, {"data": 2})] == [1, 2, 4]


@pytest.mark.parametrize(
    ("topology", "slices", "devices"),
    [("v5p:4x4x4", 1, 64), ("v6e:16x16", 2, 512), ("v4:2x2x1", 1, 8)],
)
def test_devices_of_a_topology(topology, slices, devices):
    assert compile_for_pod.device_count(topology, slices) == devices


def test_a_search_goes_on_past_meshes_that_are_refused(small, monkeypatch):
    def compile_programs(config, topology, mesh, **_):
        if mesh["tensor"] == 4:
            raise ValueError("heads")
        return [{"fits": mesh["tensor"] == 2, "over": 1, "topology": topology, "mesh": mesh,
                 "cycles": 1, "kernel_flops": 0, "collectives": {}}]  # fmt: skip

    monkeypatch.setattr(compile_for_pod, "compile_programs", compile_programs)
    rows, refused = compile_for_pod.searched(
        small, "v5e:2x2", 4, fixed={"data": 1}, programs=["rl/policy_step"]
    )
    assert [row["mesh"]["tensor"] for (row,) in rows] == [2, 1]
    assert refused == {"1·1·4": "heads"}


def test_meshes_are_ranked_by_fit_then_by_time():
    def rows(fits, cycles=0, over=0):
        cost = {"cycles": cycles, "kernel_flops": 0, "collectives": {}}
        return [{"fits": fits, "over": over, "topology": "v5e:2x2"} | cost]

    slow, fast, small_miss, large_miss = (
        rows(True, 1000), rows(True, 10), rows(False, over=5), rows(False, over=50)
    )  # fmt: skip
    ranked = sorted([large_miss, slow, small_miss, fast], key=compile_for_pod.rank)
    assert ranked == [fast, slow, small_miss, large_miss]


def test_a_run_calls_the_policy_step_with_these_shapes(
    small, one_device, tiny, tmp_path, monkeypatch
):
    """What is compiled ahead of time is what a run compiles: shapes and types of every array."""
    config = configuration.changed(
        tiny, {"rl.reward": "rule_based", "rl.objective.kl_coefficient": 0.1}
    )
    called = []

    def call(train, batch):
        called.append((train, batch))
        raise Stop

    shape = lambda x: (x.shape, x.dtype)  # noqa: E731
    (program,) = (
        p for p in pod_programs.programs(config, one_device) if p.name == "rl/policy_step"
    )
    lowered = program.lower()
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), lowered.args_info[0])
    monkeypatch.setattr(rl_setup, "compiled_step", lambda *settings: call)
    with pytest.raises(Stop):
        train_rl.run(config, tmp_path)
    assert jax.tree.map(shape, called[0]) == expected


def test_the_command_line_prints_a_table_and_writes_json(small, tmp_path, monkeypatch, capsys):
    rows = [
        {
            "program": "generate/prefill",
            "mesh": {"data": 1, "fsdp": 2, "tensor": 2},
            "topology": "v5e:2x2",
            "hbm": 2**34,
            "beside": {"reward model": 2**30},
            "fits": False,
            "total": 2**34 + 2**31,
            "over": 2**31,
            "error": "RESOURCE_EXHAUSTED",
            "seconds_to_compile": 3.0,
        }
    ]
    monkeypatch.setattr(compile_for_pod, "compile_programs", lambda *_, **__: rows)
    options = command_line(tmp_path, mesh="fsdp=2,tensor=2")
    compile_for_pod.run(configuration.load_config("configs/demo.py"), options)
    assert "no: 2.00 over" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text()) == {"programs": rows}


def test_a_mesh_on_the_command_line():
    assert compile_for_pod.parse_mesh("fsdp=16, tensor=4") == {"fsdp": 16, "tensor": 4}
    assert compile_for_pod.parse_mesh("") == {}
    with pytest.raises(ValueError, match="--mesh='16x4'; write it as fsdp=16,tensor=4"):
        compile_for_pod.parse_mesh("16x4")


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "num_slices", "mesh"),
    [
        ("v4:2x2x1", 1, {"fsdp": 4, "tensor": 2}),
        ("v5e:2x2", 2, {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_two_cores_a_chip_and_several_slices(small, topology, num_slices, mesh):
    (row,) = compile_for_pod.compile_programs(
        small, topology, mesh, num_slices=num_slices, programs=["rl/policy_step"]
    )
    assert row.get("error") is None
    assert row["fits"]
    assert row["collectives"]


RECORDED_WITH = {"jax": "0.10.2", "libtpu": "0.0.42.1"}


@pytest.mark.slow(minutes=2)
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "mesh", "temporaries"),  # GiB of a device
    [
        ("v5p:4x4x4", {"fsdp": 16, "tensor": 4}, 7.53),
        ("v6e:16x16", {"fsdp": 64, "tensor": 4}, 2.25),
    ],
)
def test_the_policy_step_of_7b_fits(tmp_path, topology, mesh, temporaries):
    """4096 responses, 64 at a time, of 2048 tokens to prompts of 2048; beside it lie the policy to
    sample from, the reference policy and a reward model of 14B."""
    have = {"jax": jax.__version__, "libtpu": ahead_of_time.libtpu_version()}
    if have != RECORDED_WITH:
        pytest.skip(f"the figures were recorded with {RECORDED_WITH}, not {have}")
    config = configuration.load_config("configs/spark_qwen25_math_7b.py")
    (row,) = compile_for_pod.compile_programs(
        config, topology, mesh, programs=["rl/policy_step"], hlo_folder=str(tmp_path)
    )
    assert row["fits"], row
    assert row["temporaries"] / 2**30 == pytest.approx(temporaries, rel=0.03)
    (text,) = [file.read_text() for file in tmp_path.iterdir()]
    tokens = 64 // mesh["fsdp"] * config.decode.max_new_tokens
    # The vocabulary's matrix is wider than a row is long; gathered, each part is padded to tiles.
    part = 3584 // mesh["fsdp"]
    weights = (3584, -(-part // 16) * 16 * mesh["fsdp"])
    assert not score_arrays(text, 152064, mesh["tensor"], tokens, weights)
