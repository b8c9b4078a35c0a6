"""The package as a stranger has it: installed, and used from outside the repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NOT_SOURCE = (".git", ".venv*", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
BASE = "spark_jax/tasks/arithmetic_chains/base"


def run(*command, cwd):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tree: building leaves files behind."""
    copy = tmp_path_factory.mktemp("source") / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return copy


@pytest.fixture(scope="module")
def wheel(source):
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, source, tmp_path_factory):
    """The interpreter of a fresh environment that has the package, and dependencies by reference.

    A .pth file names this environment's site-packages; .pth files in there, such as the one of an
    editable install of this repository, are not followed.
    """
    folder = tmp_path_factory.mktemp(request.param)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    scheme = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    site = Path(sysconfig.get_path("purelib", "venv", scheme))
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(libraries)) + "\n")
    what = (
        ["-e", source, "--no-build-isolation"]
        if request.param == "editable"
        else [request.getfixturevalue("wheel")]
    )
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--no-deps", "--ignore-installed", *what, cwd=folder)
    expected = source if request.param == "editable" else site
    return python, expected


@pytest.fixture
def elsewhere(tmp_path):
    assert ROOT not in tmp_path.parents
    return tmp_path


def test_wheel_holds_the_package_and_its_files_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"spark_jax", "spark_jax-0.1.0.dist-info"}
    assert "spark_jax-0.1.0.dist-info/licenses/LICENSE" in names
    sources = {
        f"spark_jax/{file.relative_to(ROOT)}".replace("spark_jax/spark_jax/", "spark_jax/")
        for folder in ("spark_jax", "kernels", "configs", "experiments")
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == sources
    assert {"spark_jax/configs/prompts/verify.txt", "spark_jax/py.typed"} <= sources
    assert f"{BASE}/model.safetensors" in sources


def test_imports_from_elsewhere(installed, elsewhere):
    code = """
import importlib, importlib.util, json
names = ["spark_jax", *(f"spark_jax.{n}" for n in (
    "kernels.linear_logprob", "configs.demo", "experiments.train_rl", "decoding", "advantages"))]
places = [importlib.import_module(name).__file__ for name in names]
own = ("kernels", "configs", "experiments", "benchmarks")
specs = {name: importlib.util.find_spec(name) for name in own}
from importlib.resources import files
folder = files("spark_jax.configs").joinpath("prompts")
prompts = {f.name: f.read_text() for f in folder.iterdir() if f.name.endswith(".txt")}
from spark_jax.tasks.arithmetic_chains import base
params, config, tokenizer = base.load()
print(json.dumps([places, [n for n, s in specs.items() if s], prompts, config.vocab_size]))
"""
    python, expected = installed
    places, top_level, prompts, vocab_size = json.loads(run(python, "-c", code, cwd=elsewhere))
    assert all(expected in Path(place).parents for place in places)
    assert top_level == []
    assert prompts == {f.name: f.read_text() for f in (ROOT / "configs/prompts").glob("*.txt")}
    assert vocab_size == json.loads((ROOT / BASE / "config.json").read_text())["vocab_size"]


def test_experiment_runs_from_elsewhere(installed, elsewhere):
    """`configs/demo.py` is no file here: it resolves to the installed one."""
    settings = {
        "run_dir": "run",
        "rl.reward": "rule_based",
        "rl.steps": 1,
        "rl.num_problems": 2,
        "rl.prompts_per_step": 2,
        "rl.group_size": 2,
        "evaluate.num_problems": 2,
        "evaluate.samples_per_problem": 1,
    }
    run(
        installed[0],
        "-m",
        "spark_jax.experiments.train_rl",
        "--config=configs/demo.py",
        *(f"--config.{name}={value}" for name, value in settings.items()),
        cwd=elsewhere,
    )
    assert {"summary.json", "metrics.jsonl", "model"} <= {f.name for f in elsewhere.glob("run/*")}
