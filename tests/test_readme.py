"""The README's example runs as it stands."""

import ast
import re
from pathlib import Path

import jax
import numpy as np
import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLE, *_ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.slow
def test_example_runs_and_gives_a_gradient():
    names = {}
    exec(EXAMPLE, names)
    leaves = jax.tree.leaves(names["gradient"])
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves)
    assert any(np.any(np.asarray(leaf) != 0) for leaf in leaves)


def test_what_the_example_uses_exists():
    imports, used = {}, []
    for node in ast.walk(ast.parse(EXAMPLE)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), imports)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.append((node.value.id, node.attr))
    of_modules = [(name, attribute) for name, attribute in used if name in imports]
    assert len(of_modules) > 10
    assert [x for x in of_modules if not hasattr(imports[x[0]], x[1])] == []


def test_files_it_points_to_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
