"""What CHANGELOG.md says has moved is where it says."""

import importlib
import re
from pathlib import Path

import pytest

CHANGES = (Path(__file__).parents[1] / "CHANGELOG.md").read_text()


def moves():
    """(where it was, where it is) of every line of the table: dotted names below spark_jax."""
    for line in re.findall(r"^\| (`.*`) \| (`.*`) \|$", CHANGES, re.MULTILINE):
        before, now = (re.findall(r"`([\w.*]+)`", cell) for cell in line)
        yield from ((one, now) for one in before)


def there(name):
    """Whether it is a module, or a name of one."""
    module, _, attribute = f"spark_jax.{name}".rpartition(".")
    try:
        importlib.import_module(f"{module}.{attribute}")
    except ModuleNotFoundError:
        return hasattr(importlib.import_module(module), attribute)
    return True


@pytest.mark.parametrize(("before", "now"), list(moves()), ids=str)
def test_what_moved_is_there(before, now):
    leaf = before.rpartition(".")[2]
    for name in now:
        name = name.replace("*", leaf)
        assert there(
            name if "." in name else f"experiments.{name}" if "experiments" in before else name
        )


def test_the_newest_version_is_unreleased_and_the_table_is_read():
    assert re.findall(r"^## (.*)$", CHANGES, re.MULTILINE) == ["Unreleased", "0.1.0"]
    assert len(list(moves())) >= 12
    assert not there("data.tasks_of_old")
