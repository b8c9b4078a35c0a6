"""What the TPU generations are, for estimates: public figures, of one device as JAX sees it.

A device is a chip, but for v4, whose two cores the ahead-of-time compiler takes apart.
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    hbm: float  # GiB that the compiler lets a program have
    clock: float  # GHz
    flops: float  # bfloat16 multiplications and additions a second, in 10^12
    bandwidth: float  # of HBM, GB/s
    links: float  # to the neighbours, GB/s in one direction, all links of an axis's ring together
    accelerator: str  # a TPU_ACCELERATOR_TYPE of this generation
    devices_per_chip: int = 1


CHIPS = {
    "v4": Chip(15.25, 1.05, 137.5, 614, 45, "v4-8", devices_per_chip=2),
    "v5e": Chip(15.75, 1.5, 197, 819, 90, "v5litepod-4"),
    "v5p": Chip(95.74, 1.75, 459, 2765, 180, "v5p-16"),
    "v6e": Chip(31.25, 0.94, 918, 1640, 180, "v6e-8"),
}


def generation(topology: str) -> str:
    """The generation in a topology's name, such as v5p in "v5p:4x4x4".

    Raises:
      ValueError: no such name, with those that are known.
    """
    name, _, size = topology.partition(":")
    if name not in CHIPS or not all(part.isdigit() for part in size.split("x")):
        raise ValueError(
            f"topology={topology!r}; write it as generation:sizes, with a generation of "
            f"{list(CHIPS)}, such as v5e:4x4 or v5p:4x4x4"
        )
    return name
