"""Stage I in parts: what is merged is, byte for byte, what one run makes."""

import json
import shutil

import pytest

from spark_jax.experiments import (
    checks,
    configuration,
    generate_verifications,
    loading,
    merge_verifications,
    train_prm,
)
from spark_jax.experiments.configuration import ConfigError
from spark_jax.parallel import processes
from spark_jax.training.run_folder import OtherRun

FILES = ("solutions.jsonl", "verified.jsonl", "summary.json", "config.json")


@pytest.fixture(scope="module")
def config(tiny):
    changes = {"generate.num_problems": 8, "verify.methods": ("single", "step_consistency")}
    return configuration.changed(tiny, changes)


def part(config, index, count):
    return configuration.changed(config, {"generate.shard": (index, count)})


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    generate_verifications.run(config, path)
    return path


@pytest.fixture(scope="module")
def shards(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("parts")
    for index in (2, 0, 1):
        generate_verifications.run(part(config, index, 3), path)
    return path


@pytest.fixture
def parts(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "parts")
    return tmp_path / "parts"


def test_merged_parts_are_the_whole_run(config, whole, parts, tiny):
    sizes = [
        json.loads((parts / f"shard_{i}_of_3" / "summary.json").read_text())["num_problems"]
        for i in range(3)
    ]
    assert sizes == [2, 2, 4]
    merge_verifications.run(config, parts)
    for name in FILES:
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    task = loading.load_task(config)
    loaded = generate_verifications.load(
        configuration.changed(tiny, {"prm.data": str(parts)}), task
    )
    assert [len(items) for items in loaded] == [8, 16, 16]
    assert merge_verifications.run(config, parts)["num_problems"] == 8  # again: nothing to do


@pytest.mark.parametrize(
    ("chunks", "count", "sizes"),
    [((2, 1), 3, [2, 2, 3]), ((2, 2), 4, [2, 2, 2, 1]), ((1, 3), 2, [3, 4])],
)
def test_parts_are_whole_chunks_of_both_passes(config, chunks, count, sizes):
    """So that chunks, and the seeds that theirs is among, are those of the whole run."""
    changes = {"generate.chunk_size": chunks[0], "verify.chunk_size": chunks[1]}
    config = configuration.changed(config, changes)
    problems = loading.load_task(config).problems(7, 0, "train")
    parts = [
        generate_verifications.shard_of(part(config, index, count), problems)
        for index in range(count)
    ]
    assert [len(one) for one in parts] == sizes
    assert [problem for one in parts for problem in one] == problems


@pytest.mark.slow
def test_parts_of_chunks_that_are_not_all_full_are_the_whole_run(config, tmp_path):
    config = configuration.changed(config, {"generate.num_problems": 7, "verify.chunk_size": 1})
    generate_verifications.run(config, tmp_path / "whole")
    for index in (2, 0, 1):
        generate_verifications.run(part(config, index, 3), tmp_path / "parts")
    merge_verifications.run(config, tmp_path / "parts")
    for name in FILES:
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "parts" / name).read_bytes() == whole


def test_a_part_is_no_data_for_a_reward_model(tiny, shards, tmp_path):
    changes = {"prm.data": str(shards / "shard_0_of_3")}
    with pytest.raises(ConfigError, match=r"is part 0 of 3; .*merge_verifications"):
        train_prm.run(configuration.changed(tiny, changes), tmp_path)


def test_records_twice_count_once(config, whole, parts, caplog):
    file = parts / "shard_1_of_3" / "verified.jsonl"
    file.write_text(file.read_text() + file.read_text())
    merge_verifications.run(config, parts)
    assert (parts / "verified.jsonl").read_bytes() == (whole / "verified.jsonl").read_bytes()
    assert "verified.jsonl: 4 records were there twice" in caplog.text


def test_missing_and_unfinished_parts_are_named(config, parts):
    shutil.rmtree(parts / "shard_2_of_3")
    (parts / "shard_0_of_3" / "summary.json").unlink()
    message = r"\['shard_0_of_3', 'shard_2_of_3'\] are missing or not finished"
    with pytest.raises(FileNotFoundError, match=message):
        merge_verifications.run(config, parts)
    for shard in parts.iterdir():
        shutil.rmtree(shard)
    with pytest.raises(FileNotFoundError, match="holds no shard_<i>_of_<n>"):
        merge_verifications.run(config, parts)


def test_parts_of_other_runs_are_refused(config, parts):
    with pytest.raises(OtherRun, match=r"shard_0_of_3 .*\n  seed: 0 in the folder, 5 now"):
        merge_verifications.run(configuration.changed(config, {"seed": 5}), parts)
    shutil.rmtree(parts / "shard_2_of_3")
    shutil.copytree(parts / "shard_1_of_3", parts / "shard_2_of_3")
    with pytest.raises(OtherRun, match=r"shard_2_of_3 .*\n  generate.shard: \[1, 3\] in the"):
        merge_verifications.run(config, parts)
    shutil.copytree(parts / "shard_1_of_3", parts / "shard_0_of_2")
    with pytest.raises(ConfigError, match=r"shards of \[2, 3\]; parts of two divisions"):
        merge_verifications.run(config, parts)


def test_contents_that_do_not_fit_are_refused(config, parts):
    file = parts / "shard_1_of_3" / "solutions.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines) + lines[0].replace('"finished": true', '"finished": false'))
    with pytest.raises(ConfigError, match=r"solutions.jsonl:5: .* twice, with different"):
        merge_verifications.run(config, parts)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(ConfigError, match=r"1 records of solutions.jsonl, such as .*missing"):
        merge_verifications.run(config, parts)


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0), (0,), (0.0, 2)])
def test_impossible_shards_are_refused(config, shard):
    with pytest.raises(ConfigError, match=r"generate\.shard="):
        checks.check_stage1(configuration.changed(config, {"generate.shard": shard}))


def test_more_shards_than_blocks_are_refused(config, tmp_path):
    with pytest.raises(ConfigError, match=r"8 problems are 4 blocks of 2.*at most 4 shards"):
        generate_verifications.run(part(config, 0, 5), tmp_path)
    assert not any(tmp_path.iterdir())  # a folder of 5 parts would stop others from being merged


def test_parts_are_merged_without_the_devices_they_were_made_on(config, whole, parts):
    merge_verifications.run(
        configuration.changed(config, {"mesh.fsdp": 16, "mesh.tensor": 4}), parts
    )
    for name in FILES:
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_on_a_tpu_host_one_process_can_merge(monkeypatch):
    """By default it would wait for the other hosts of the slice."""
    monkeypatch.setattr(processes, "_has_tpu", lambda: True)
    assert processes.arguments({}) == {}
    assert processes.arguments({"JAX_PLATFORMS": "cpu"}) is None
