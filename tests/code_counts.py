"""Counts how much code there is, and how much of it one step of RL passes.

    python tests/code_counts.py          # lines by folder
    python tests/code_counts.py step     # functions and files that each step of a tiny run passes

Lines are those of the library, kernels, configs and experiments without blanks, comments and
docstrings. Functions are counted by name and file, lambdas and comprehensions apart; the first step
of a run traces and compiles, later ones do not.
"""

import ast
import collections
import io
import os
import subprocess
import sys
import tempfile
import threading
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("spark_jax", "kernels", "configs", "experiments")
NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def code_lines(source):
    """The number of lines that hold code."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def by_folder():
    """Folder → lines of code, of what git knows of or would."""
    asked = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS]
    files = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    counts = collections.Counter()
    for name in files.split():
        path = ROOT / name
        if name.endswith(".py") and path.is_file():
            top = Path(name).parts[:2] if name.startswith("spark_jax/") else Path(name).parts[:1]
            folder = "/".join(top) if not top[-1].endswith(".py") else top[0]
            counts[folder] += code_lines(path.read_text())
    return counts


def passed_by_steps():
    """(functions, files) of each of two steps of SPRO with a reward model."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    from experiment_runs import TINY

    from spark_jax.experiments import configuration, train_rl

    steps, take_step = [], train_rl.take_step

    def note(frame, event, _):
        name = frame.f_code.co_filename
        ours = name.startswith(str(ROOT)) and ".venv" not in name and "/tests/" not in name
        if event == "call" and ours and not frame.f_code.co_name.startswith("<"):
            steps[-1].add((name, frame.f_code.co_qualname))

    def watched(*arguments):
        steps.append(set())
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            return take_step(*arguments)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    train_rl.take_step = watched
    changes = TINY | {
        "rl.steps": 2,
        "rl.reward": "process_aware_outcome",
        "rl.advantage": "spro",
        "rl.reward_model": "arithmetic_chains",
    }
    config = configuration.changed(configuration.load_config("configs/demo.py"), changes)
    with tempfile.TemporaryDirectory() as folder:
        train_rl.run(config, Path(folder) / "run")
    return [(len(step), len({name for name, _ in step})) for step in steps]


if __name__ == "__main__":
    if "step" in sys.argv[1:]:
        for number, (functions, files) in enumerate(passed_by_steps(), start=1):
            print(f"step {number}: {functions} functions in {files} files")
    else:
        counts = by_folder()
        for folder, lines in counts.most_common():
            print(f"{lines:6d}  {folder}")
        print(f"{sum(counts.values()):6d}  in all")
