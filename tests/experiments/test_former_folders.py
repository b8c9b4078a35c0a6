"""Run folders of version 0.1.0, in `tests/data_010`: what this version makes of them."""

import gzip
import json
import re
import shutil
from base64 import b64decode
from pathlib import Path

import pytest

from spark_jax.experiments import configuration, report, train_rl
from spark_jax.experiments.base_config import FORMER_DEFAULTS, base_config
from spark_jax.reports import runs
from spark_jax.training.run_folder import OtherRun, RunFolder

FOLDERS = Path(__file__).parents[1] / "data_010"
SECTIONS = ("remat_save", "rl", "prm", "generate", "evaluate")  # of a run of train_rl
CHANGES = {
    "rl.reward": "rule_based",
    "rl.advantage": "spro",
    "rl.steps": 2,
    "rl.num_problems": 8,
    "rl.prompts_per_step": 2,
    "rl.group_size": 4,
    "rl.save_every": 1,
    "rl.evaluate_every": 1,
    "rl.record.problems": 0,
    "evaluate.num_problems": 4,
    "evaluate.samples_per_problem": 2,
}


@pytest.fixture
def config():
    return configuration.changed(configuration.load_config("configs/demo.py"), CHANGES)


@pytest.fixture
def folders(tmp_path):
    """A copy of the folders, with the subfolders that a run makes."""
    copy = shutil.copytree(FOLDERS, tmp_path / "runs")
    for folder in ("finished", "unfinished"):
        (copy / folder / "checkpoints").mkdir()
    return copy


def read(file):
    return json.loads(file.read_text())


def test_the_folders_have_other_fields_than_now(config):
    """So that the tests below are of something."""
    now = configuration.sub_config(config, *SECTIONS).to_dict()["rl"]["advantage_options"]
    assert "eps" in now.keys() - read(FOLDERS / "finished/config.json")["rl"]["advantage_options"]


@pytest.mark.filterwarnings("ignore:.*goes on under other versions")
def test_a_finished_run_returns_its_summary(config, folders):
    path = folders / "finished"
    before = {name: (path / name).read_bytes() for name in ("config.json", "metrics.jsonl")}
    assert train_rl.run(config, path) == read(FOLDERS / "finished/summary.json")
    assert {name: (path / name).read_bytes() for name in before} == before


def test_finished_and_unfinished_runs_are_in_a_report(folders):
    found = {run.path.name: run for run in runs.find(folders)}
    assert set(found) == {"finished", "unfinished"}
    (section,) = runs.sections(list(found.values()))
    lines = {line.label: line for line in section.panels[0].lines}
    assert section.panels[0].title == "accuracy, held-out"
    assert lines["finished"].estimate == [0.5, 0.5, 0.625]
    assert lines["unfinished"].estimate == [0.5, 0.5]
    page = report.write(folders)
    packed = re.findall(r'type="application/gzip" id="data-[^"]*">([^<]*)<', page.read_text())
    assert any("accuracy, held-out" in gzip.decompress(b64decode(one)).decode() for one in packed)


@pytest.mark.filterwarnings("ignore:.*goes on under other versions")
def test_an_unfinished_run_is_the_same_run_as_now(config, folders):
    """Its configuration, and what its checkpoint noted of it."""
    stage = configuration.sub_config(config, *SECTIONS)
    folder = RunFolder.open(folders / "unfinished", stage, FORMER_DEFAULTS)
    assert folder.resumed
    assert folder.read_summary() is None
    notes = read(FOLDERS / "unfinished/checkpoint_extra.json")
    assert folder.identity["config"] == notes["config"]
    folder.check_identity(notes)
    with pytest.raises(OtherRun, match=r"rl\.advantage_options\.eps: absent in the folder, null"):
        RunFolder.open(folders / "unfinished", stage)


def test_another_value_of_a_new_field_is_refused_in_one_line(config, folders):
    other = configuration.changed(config, {"rl.advantage": "grpo", "rl.advantage_options.eps": 0.1})
    with pytest.raises(OtherRun, match="another configuration") as caught:
        train_rl.run(other, folders / "unfinished")
    assert str(caught.value).splitlines()[1:] == [
        '  rl.advantage: "spro" in the folder, "grpo" now',
        "  rl.advantage_options.eps: absent in the folder, 0.1 now",
    ]


def test_former_defaults_are_of_fields_that_are_or_were():
    """The value that a field of the schema has now is its former one, unless that changed."""
    schema = base_config()
    for field, value in FORMER_DEFAULTS.items():
        assert configuration.value_of(schema, field) == value, field
