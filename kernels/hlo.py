"""What a compiled program does, read from the text of its optimised HLO.

Loops count by their trips where the program says how many there are; a loop whose end depends on
data (the decoder's) counts once, and is named. Of a conditional the costliest branch counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


class Instruction(NamedTuple):
    """One instruction of a computation that runs."""

    name: str
    kind: str  # its opcode
    shape: str  # of its result, as written
    operands: tuple[str, ...]  # shapes, as far as they are known
    line: str
    trips: int  # of the loops around it, those of unknown length counted once
    loops: tuple[str, ...]  # the loops of unknown length around it, outermost first
    inside: str = ""  # the fusion that it is part of

    @property
    def estimated_cycles(self) -> int:
        """XLA:TPU's own estimate for one execution; 0 where it makes none."""
        cycles = re.search(r'estimated_cycles":"(\d+)"', self.line)
        return int(cycles[1]) if cycles else 0

    @property
    def op_name(self) -> str:
        """Where in the JAX program it comes from."""
        name = re.search(r'op_name="([^"]*)"', self.line)
        return name[1] if name else ""


class Collective(NamedTuple):
    """One operation between chips."""

    kind: str  # of COLLECTIVES
    name: str
    op_name: str
    trips: int
    bytes: int  # of one execution on one chip: the larger of what goes in and what comes out
    loops: tuple[str, ...]


def instructions(text: str) -> list[Instruction]:
    """Every instruction that runs outside of fusions, in the order of the text, and the collectives
    inside them."""
    computations = _computations(text)
    return _walk(computations, "ENTRY", 1, ())


def collectives(found: list[Instruction]) -> list[Collective]:
    """The operations between chips among the instructions of a program."""
    own = [i for i in found if _is_collective(i.kind)]
    chains: dict[str, Instruction] = {}
    for i in own:
        # XLA:TPU spreads an asynchronous one over fusions, each of which names all of it.
        if i.inside and (chain := re.search(r'chain_id="\d+"', i.line)):
            known = chains.setdefault(chain[0], i)
            chains[chain[0]] = min(known, i, key=lambda one: one.trips)
    apart = {id(i) for i in chains.values()}
    return [
        Collective(_collective_kind(i), i.name, i.op_name, i.trips, _moved_bytes(i), i.loops)
        for i in own
        if id(i) in apart or not (i.inside and 'chain_id="' in i.line)
    ]


def estimated_cycles(found: Iterable[Instruction]) -> int:
    """The sum of XLA's estimates, by trips. Collectives, and kernels, have none."""
    return sum(i.trips * i.estimated_cycles for i in found)


def kernel_flops(found: list[Instruction]) -> tuple[int, int]:
    """What Pallas kernels say that they multiply and add, by trips; and the number of kernels that
    say nothing."""
    kernels = [i for i in found if i.kind == "custom-call" and "tpu_custom_call" in i.line]
    told = [(i, re.search(r'"flops":"?(\d+)', i.line)) for i in kernels]
    return sum(i.trips * int(t[1]) for i, t in told if t), sum(t is None for _, t in told)


def largest_arrays(text: str, count: int = 5) -> list[tuple[int, str]]:
    """(numbers, type) of the largest different arrays that the program names, fusions' insides
    included."""
    sizes = {
        f"{dtype}[{axes}]": math.prod(int(n) for n in axes.split(",") if n)
        for dtype, axes in set(re.findall(r"\b(\w+)\[([\d,]+)\]", text))
        if dtype in ITEM_BYTES
    }
    return sorted(((n, name) for name, n in sizes.items()), reverse=True)[:count]


ITEM_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}


def shape_bytes(shape: str, *, hbm_only: bool = False) -> int:
    """Of a type, or of a tuple of types; `hbm_only` leaves out what lies in VMEM, S(1)."""
    return sum(
        ITEM_BYTES[dtype] * math.prod(int(x) for x in sizes.split(",") if x)
        for dtype, sizes, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shape)
        if dtype in ITEM_BYTES and not (hbm_only and "S(1)" in layout)
    )


_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")


def _computations(text: str) -> dict[str, list[str]]:
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = computations.setdefault("ENTRY" if header[1] else header[2], [])
        else:
            lines.append(line)
    return computations


def _walk(
    computations: dict[str, list[str]], name: str, trips: int, loops: tuple[str, ...]
) -> list[Instruction]:
    found = []
    for i in _parsed(computations[name], trips, loops):
        if i.kind == "while":
            parts = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", i.line))
            count = _trip_count(computations[parts["condition"]])
            inner = loops if count else (*loops, i.op_name or i.name)
            found += _walk(computations, parts["body"], trips * (count or 1), inner)
        elif i.kind == "conditional":
            branches = [_walk(computations, b, trips, loops) for b in _branches(i.line)]
            found += max(branches, key=estimated_cycles)
        elif i.kind == "call":
            (called,) = re.findall(r"to_apply=%?([\w.\-]+)", i.line)
            found += _walk(computations, called, trips, loops)
        else:
            found.append(i)
            for called in re.findall(r"calls=%?([\w.\-]+)", i.line):
                inside = _parsed(computations.get(called, []), trips, loops)
                found += [x._replace(inside=called) for x in inside if _is_collective(x.kind)]
    return found


def _parsed(lines: list[str], trips: int, loops: tuple[str, ...]) -> Iterator[Instruction]:
    shapes: dict[str, str] = {}
    for line in lines:
        if match := _INSTRUCTION.match(line):
            name, shape, kind, rest = match.groups()
            shapes[name] = shape
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            known = tuple(shapes.get(x, "") for x in operands)
            yield Instruction(name, kind, shape, known, line, trips, loops)


def _trip_count(condition: list[str]) -> int | None:
    """Where all that is asked is whether a counter is below a constant, as in a scan."""
    root = next((line for line in condition if line.lstrip().startswith("ROOT")), "")
    compared = re.search(r"compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", root)
    if compared is None:
        return None
    name = re.escape(compared[1])
    bound = re.search(rf"%?{name} = [^\n]*? constant\((\d+)\)", "\n".join(condition))
    return int(bound[1]) if bound else None


def _branches(line: str) -> list[str]:
    if several := re.search(r"branch_computations=\{([^}]*)\}", line):
        return re.findall(r"%?([\w.\-]+)", several[1])
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)


def _is_collective(kind: str) -> bool:
    return kind.removesuffix("-start") in COLLECTIVES


def _collective_kind(i: Instruction) -> str:
    # XLA:TPU writes a reduce-scatter as an all-reduce of which each chip keeps a slice, fused.
    if "reduce-scatter" in i.inside:
        return "reduce-scatter"
    return i.kind.removesuffix("-start")


def _moved_bytes(i: Instruction) -> int:
    taken, given = sum(shape_bytes(shape) for shape in i.operands), shape_bytes(i.shape)
    # The result of a start names its operands again.
    return max(taken, given - taken if i.kind.endswith("-start") else given)
