"""The type checker of the tests: beartype, where an int may stand for a float (PEP 484).

jaxtyping's wrapper binds a function's arguments to its parameters at every call, to know the sizes
of its arrays. That takes far longer than the check itself and is needed by functions whose
annotations give shapes; all others are checked by beartype alone.

A function inside a function is decorated anew at every call of the outer one, which took a tenth of
the tests' time; it is checked only if its annotations give shapes.
"""

import functools
import inspect
import re

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_SHAPED = re.compile(r"\b(Float|Float32|Float64|Int|Int8|Int32|Bool|Shaped|UInt8)\[")
_with_sizes = jaxtyping.jaxtyped


def _jaxtyped(function=None, **options):
    """What jaxtyping's import hook decorates all functions and classes with."""
    if function is None:
        return functools.partial(_jaxtyped, **options)
    if not inspect.isfunction(function):
        return _with_sizes(function, **options)
    annotations = [_meaning(x, function) for x in getattr(function, "__annotations__", {}).values()]
    if any(_SHAPED.search(str(annotation)) for annotation in annotations):
        return _with_sizes(function, **options)
    if "<locals>" in function.__qualname__:
        return function
    if any(isinstance(annotation, str) for annotation in annotations):
        return _with_sizes(function, **options)  # which takes what nobody imports for anything
    return check(function)


jaxtyping.jaxtyped = _jaxtyped


def _meaning(annotation, function):
    """A string's in the function's module; the string where it has none there."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, function.__globals__)
    except Exception:
        return annotation
