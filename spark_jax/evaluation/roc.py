"""How well a score tells right from wrong, whatever the threshold."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def area_under_roc(scores: Float[np.ndarray, "n"], labels: Bool[np.ndarray, "n"]) -> float:
    """The chance that a true one has a higher score than a false one; ties count half.

    Both drawn at random (Mann and Whitney 1947). 1/2 is no relation, 1 is perfect. Nan where all
    labels are the same: the area is then undefined. Raises ValueError for a nan score.
    """
    if np.isnan(scores).any():
        raise ValueError(f"score {int(np.argmax(np.isnan(scores)))} is nan")
    true, false = scores[labels], np.sort(scores[~labels])
    if not len(true) or not len(false):
        return float("nan")
    below, not_above = (np.searchsorted(false, true, side) for side in ("left", "right"))
    return float(np.mean(below + not_above) / 2 / len(false))
