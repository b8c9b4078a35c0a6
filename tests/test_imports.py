"""What importing costs and needs. Each test asks a fresh interpreter."""

import ast
import graphlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("configs", "experiments", "kernels")
ARRAY_CORE = (
    "models",
    "parallel",
    "decoding",
    "kernels",
    "scoring",
    "advantages",
    "losses",
    "steps",
)


def packages():
    """Import name → folder, as the tree has them."""
    own = [file.parent for file in (ROOT / "spark_jax").rglob("__init__.py")]
    return {".".join(folder.relative_to(ROOT).parts): folder for folder in own} | {
        f"spark_jax.{name}": ROOT / name for name in MAPPED
    }


def modules():
    return sorted(
        name if file.stem == "__init__" else f"{name}.{file.stem}"
        for name, folder in packages().items()
        for file in folder.glob("*.py")
    )


def array_core():
    prefixes = tuple(f"spark_jax.{name}" for name in (*ARRAY_CORE, "rewards.process"))
    return [name for name in modules() if name.startswith(prefixes)]


# Folder (or module beside the folders) → those it may import, by any import statement, inside
# functions too. `experiments` may import all but `configs`, which are read by path.
ARROWS = {
    "losses": [],
    "steps": [],
    "response_format": ["steps"],
    "parallel": [],
    "data": [],
    "advantages": ["rewards.process"],
    "kernels": ["parallel"],
    "models": ["kernels", "parallel"],
    "scoring": ["kernels", "models", "parallel"],
    "decoding": ["models", "parallel"],
    "evaluation": ["data", "response_format"],
    "tokenizers": ["data", "models"],
    "text_generation": ["data", "decoding", "models", "steps"],
    "verification": ["data", "evaluation", "response_format", "steps"],
    "tasks": ["data", "evaluation", "models", "response_format", "steps", "verification"],
    "rewards": ["data", "evaluation", "response_format", "steps"],
    "prm": ["data", "evaluation", "response_format", "rewards", "verification"],
    "training": ["losses", "models", "parallel", "scoring"],
    "reports": [
        "data", "evaluation", "response_format", "rewards", "steps", "tasks", "training",
        "verification",
    ],
}  # fmt: skip
ARROWS["experiments"] = list(ARROWS)
ARROWS["configs"] = ["experiments"]


def imports(file):
    """What a file imports of the project, whole or inside a function, as folder or module."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spark_jax"):
            for name in node.names:
                yield f"{node.module}.{name.name}".removeprefix("spark_jax.")
        elif isinstance(node, ast.Import):
            yield from (
                name.name.removeprefix("spark_jax.")
                for name in node.names
                if name.name.startswith("spark_jax.")
            )


def test_no_folder_imports_another_that_imports_it():
    """Every arrow between folders is one of `ARROWS`, which has no circle."""
    found = {}
    for package, folder in packages().items():
        for file in folder.glob("*.py"):
            own = f"{package}.{file.stem}".removeprefix("spark_jax.").split(".")[0]
            for target in imports(file):
                if target.split(".")[0] not in (own, "spark_jax"):
                    found.setdefault((own, target), []).append(file.name)
    wrong = {
        arrow: files
        for arrow, files in found.items()
        if not any(f"{arrow[1]}.".startswith(f"{allowed}.") for allowed in ARROWS[arrow[0]])
    }
    assert wrong == {}
    graph = {
        name: [target.split(".")[0] for target in targets if target != "rewards.process"]
        for name, targets in ARROWS.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def ask(code, *arguments, cwd=ROOT, **environment):
    """What `code` prints as JSON on its last line."""
    answer = subprocess.run(
        [sys.executable, "-c", code, *map(json.dumps, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


def test_every_package_is_declared():
    """A folder that pyproject.toml forgets would be missing from the wheel only."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(declared["packages"]) == sorted(packages())
    assert declared["package-dir"] == {"spark_jax": "spark_jax"} | {
        f"spark_jax.{name}": name for name in MAPPED
    }


def test_the_package_alone_is_light():
    code = """
import json, sys, time
import jax
before, start = set(sys.modules), time.perf_counter()
import spark_jax
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""
    seconds, loaded = ask(code)
    assert seconds < 0.5
    assert loaded == ["spark_jax"]


# Under this platform whatever starts a backend raises. That is public, unlike jax's own record.
NO_BACKEND = {"JAX_PLATFORMS": "no_such_platform"}

# Prints which names failed and how, the backend, and what was loaded after each list of names.
IMPORT_ALL = """
import importlib, json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
*lists, blocked = map(json.loads, sys.argv[1:])
sys.meta_path.insert(0, Refuse())
failed, loaded = {}, []
for names in lists:
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            failed[name] = repr(error)
    loaded.append(sorted(sys.modules))
import jax
try:
    backend = jax.default_backend()
except RuntimeError as error:
    backend = "none" if "no_such_platform" in str(error) else repr(error)
print(json.dumps([failed, backend, *loaded]))
"""

SLOW_TO_IMPORT = (
    "transformers",
    "datasets",
    "orbax",
    "tensorboardX",
    "math_verify",
    "matplotlib",
)


def test_every_module_imports_and_starts_no_backend_and_library_modules_nothing_slow():
    """Experiments are commands and may."""
    commands = [name for name in modules() if name.startswith("spark_jax.experiments")]
    library = sorted(set(modules()) - set(commands))
    failed, backend, first, loaded = ask(IMPORT_ALL, library, commands, [], **NO_BACKEND)
    assert failed == {}
    assert backend == "none"
    assert not set(SLOW_TO_IMPORT) & set(first)
    assert set(modules()) <= set(loaded)
    assert not {"torch", "tensorflow"} & set(loaded)


def test_array_core_needs_only_jax_flax_optax_numpy_and_jaxtyping():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {line.partition(">=")[0] for line in project["dependencies"]}
    # The last three are what jax, flax and optax import themselves.
    others = declared - {"jax", "flax", "optax", "numpy", "jaxtyping", "scipy", "rich", "absl-py"}
    named = {"orbax-checkpoint": "orbax"}
    blocked = {named.get(name, name.replace("-", "_")) for name in others}
    assert set(SLOW_TO_IMPORT) <= blocked
    failed, backend, loaded = ask(IMPORT_ALL, array_core(), sorted(blocked), **NO_BACKEND)
    assert failed == {}
    assert backend == "none"
    assert set(array_core()) <= set(loaded)
    outside = {name for name in loaded if name.startswith("spark_jax.")} - set(array_core())
    assert outside <= {"spark_jax.rewards"}


def test_a_blocked_module_is_refused():
    """The test above can fail."""
    names = ["transformers", "grain"]
    failed, _, _ = ask(IMPORT_ALL, names, names, **NO_BACKEND)
    assert all("is blocked" in failed[name] for name in names)


@pytest.mark.slow  # `make test` too has the folder on its path and imports transformers
def test_transformers_imports_beside_our_kernels_folder():
    """transformers looks for a package named `kernels`; `python -c` puts the folder on the path."""
    code = """
import importlib.util, json
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, LlamaConfig
here = importlib.util.find_spec("kernels")
print(json.dumps([AutoTokenizer.__name__, LlamaConfig().model_type, here is not None]))
"""
    assert ask(code) == ["AutoTokenizer", "llama", True]
