"""The type checker of the tests: beartype, where an int may stand for a float (PEP 484).

A function inside a function is decorated anew at every call of the outer one, which took a tenth of
the tests' time; it is checked only if its annotations give shapes.
"""

import re

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_SHAPED = re.compile(r"\b(Float|Float32|Int|Int8|Int32|Bool|Shaped|UInt8)\[")


def check(function):
    if "<locals>" in function.__qualname__ and not _shaped(function):
        return function
    return _check(function)


def _shaped(function):
    annotations = getattr(function, "__annotations__", {})
    return any(_SHAPED.search(str(annotation)) for annotation in annotations.values())
