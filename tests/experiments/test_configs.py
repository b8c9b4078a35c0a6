"""The files in `configs/`: what they are made of, and what a run of them does."""

import ast
import itertools
import re
from pathlib import Path

import pytest
from experiment_runs import Stop

from spark_jax.advantages import ADVANTAGES
from spark_jax.experiments import base_config, checks, configuration, pipeline
from spark_jax.experiments.configuration import ConfigError
from spark_jax.reports import study

PAPERS = sorted(p for pattern in ("spark_*", "spro_*") for p in Path("configs").glob(pattern))


def leaves(config, prefix=""):
    """Dotted name → value, of a dict."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize("file", sorted(Path("configs").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_every_config_has_the_fields_of_the_schema(file):
    """And no others: but for the arms, for names of one's own, and for the full study."""
    own = ("pipeline.arms", "chat.arguments", "task_options.generator", "study.")
    made = configuration.load_config(file).to_dict()
    schema = base_config.base_config().to_dict()
    fields, known = (
        {name for name, _ in leaves(config) if not name.startswith(own)}
        for config in (made, schema)
    )
    assert fields == known


def test_the_schema_has_every_option_of_every_advantage():
    options = base_config.base_config().rl.advantage_options
    for name, advantage in ADVANTAGES.items():
        for option, kind in advantage.options.items():
            assert options.get_type(option) is kind, (name, option)
    assert set(options.to_dict().values()) == {None}


def test_every_field_of_the_schema_has_a_comment():
    """On its line, or on the lines above it."""
    lines = Path("experiments/base_config.py").read_text().splitlines()
    schema = lines[lines.index("def base_config() -> ConfigDict:") :]
    fields = [
        (above, line)
        for above, line in itertools.pairwise(schema)
        if re.match(r" {8,}[a-z_0-9]+=.*,( +#.*)?$", line)
        and not re.search(r"=(?!placeholder)\w+\(", line)  # a section
    ]
    assert len(fields) > 100
    assert [line for above, line in fields if "#" not in line and "#" not in above] == []


def test_what_the_schema_leaves_empty_is_refused_by_its_name():
    config = base_config.base_config()
    with pytest.raises(ConfigError, match=r"run_dir=''.*the folder of the run"):
        checks.check_common(config)
    config.run_dir = "runs/x"
    with pytest.raises(ConfigError, match=r"task: .*''"):
        checks.check_common(config)
    config.task = "arithmetic_chains"
    with pytest.raises(ConfigError, match="model='' is not a model"):
        checks.check_common(config)


@pytest.mark.parametrize("file", PAPERS, ids=lambda p: p.stem)
def test_a_papers_config_comes_from_the_schema_and_not_from_a_demo(file):
    imported = {
        name.name
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module != "ml_collections"
        for name in node.names
    }
    assert imported <= {"base_config", *(paper.stem for paper in PAPERS)}
    assert imported


@pytest.mark.parametrize("file", PAPERS, ids=lambda p: p.stem)
def test_a_papers_pipeline_is_one_run_of_its_method(file, tmp_path, monkeypatch):
    """One seed, one method of stage I, one reward model, one policy."""
    jobs = []

    class Recorded:
        def __init__(self, *_):
            pass

        def run(self, _, runs):
            jobs.extend((path, config) for _, config, path in runs)

    def collect(*_, **__):  # there are no runs
        raise Stop

    monkeypatch.setattr(pipeline, "check", lambda _: None)  # of the models and problems on hubs
    monkeypatch.setattr(pipeline, "Jobs", Recorded)
    monkeypatch.setattr(study, "collect", collect)
    config = configuration.load_config(file)
    with pytest.raises(Stop):
        pipeline.run(config, tmp_path)
    made = {str(path.relative_to(tmp_path)): run for path, run in jobs}
    name = file.stem.split("_")[0]
    assert len(jobs) == 4
    assert set(made) == {
        f"seed0/{part}" for part in ("stage1", "prm_base", "prm_step_consistency", f"rl_{name}")
    }
    assert made["seed0/stage1"].verify.methods == ("step_consistency",)
    policy = made[f"seed0/rl_{name}"].rl
    expected = {"spark": ("process_aware_outcome", "grpo"), "spro": ("rule_based", "spro")}[name]
    assert (policy.reward, policy.advantage) == (config.rl.reward, config.rl.advantage) == expected
