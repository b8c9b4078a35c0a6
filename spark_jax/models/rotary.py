"""Rotary frequencies and the ways in which checkpoints stretch them to longer contexts.

Each scaling gives what transformers computes (`transformers.modeling_rope_utils`), in float32.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. Fields and defaults are those of `config.json`.

    - `linear`: all divided by `factor`.
    - `dynamic` (NTK): as without scaling up to the model's `max_positions`, where we stop: beyond,
      the frequencies would change with every token, also those of keys already cached.
    - `llama3`: low ones divided by `factor`, high ones kept, those between interpolated.
    - `yarn` (arXiv 2309.00071): likewise, by the number of turns in the original context; queries
      and keys are also multiplied by an attention factor.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in SCALINGS:
            raise ValueError(
                f"rotary scaling {self.rope_type!r} is not supported; have {sorted(SCALINGS)}"
            )
        for name in SCALINGS[self.rope_type]:
            if getattr(self, name) is None:
                raise ValueError(f"rotary scaling {self.rope_type!r} needs the field {name!r}")
        if self.factor <= 0:
            raise ValueError(f"rotary scaling has factor={self.factor}; it must be positive")


SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
}
"""What a scaling needs besides its factor."""


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Float[Array, "N"]:
    """Radians per position of each of the N = head_dim / 2 pairs of components, float32."""
    half = head_dim // 2
    plain = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None or scaling.rope_type == "dynamic":
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    if scaling.rope_type == "llama3":
        kept = _llama3_kept(plain, scaling)
    else:
        kept = _yarn_kept(head_dim, theta, scaling)
    return plain * kept + plain / scaling.factor * (1 - kept)


def attention_factor(scaling: RopeScaling | None) -> float:
    """What sines and cosines are multiplied by; 1 without YaRN."""
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        wanted, given = scaling.mscale, scaling.mscale_all_dim
        return _yarn_mscale(scaling.factor, wanted) / _yarn_mscale(scaling.factor, given)
    return _yarn_mscale(scaling.factor, 1.0)


def from_hf(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling of a `config.json`, in its old spelling (`rope_theta` and `rope_scaling`
    with `type` or `rope_type`) or its new one (`rope_parameters`).

    Raises:
      ValueError: a scaling that is not supported or not fully given.
    """
    given = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    nested = sorted(name for name, value in given.items() if isinstance(value, Mapping))
    if nested:
        raise ValueError(f"rotary parameters that differ by layer type are not supported: {nested}")
    theta = float(given.pop("rope_theta", None) or hf.get("rope_theta") or 10_000.0)
    if (given.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not supported")
    spelled_type = given.pop("type", None)
    rope_type = given.pop("rope_type", None) or spelled_type or "default"
    if rope_type == "default":
        return theta, None
    known = {field.name for field in dataclasses.fields(RopeScaling)}
    ignored = sorted(set(given) - known)
    if ignored:
        _log.warning("fields of rope scaling %r not known, so ignored: %s", rope_type, ignored)
    fields = {name: value for name, value in given.items() if name in known and value is not None}
    positions = hf.get("max_position_embeddings")
    if rope_type in ("llama3", "yarn"):
        # In transformers' order: beside the scaling, inside it, then the whole context.
        original = (
            hf.get("original_max_position_embeddings")
            or fields.get("original_max_position_embeddings")
            or positions
        )
        fields["original_max_position_embeddings"] = original
    if rope_type == "yarn" and "factor" not in fields and positions:
        fields["factor"] = positions / fields["original_max_position_embeddings"]
    if rope_type in SCALINGS and "factor" not in fields:
        raise ValueError(f"rotary scaling {rope_type!r} needs the field 'factor'")
    return theta, RopeScaling(rope_type, **{"factor": 1.0, **fields})


def to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Fields of `config.json`, in the old spelling: every reader knows it."""
    if scaling is None:
        return {"rope_theta": theta}
    fields = dataclasses.asdict(scaling)
    given = {name: value for name, value in fields.items() if value is not None}
    return {"rope_theta": theta, "rope_scaling": given}


def _llama3_kept(plain: Float[Array, "N"], scaling: RopeScaling) -> Float[Array, "N"]:
    """Share of each frequency that stays: 0 for wavelengths above original / low_freq_factor, 1
    for those below original / high_freq_factor, linear in the number of turns between."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    if low is None or high is None or original is None:
        raise ValueError(f"{scaling} is not complete")
    turns = original * plain / (2 * math.pi)
    return jnp.clip((turns - low) / (high - low), 0.0, 1.0)


def _yarn_kept(head_dim: int, theta: float, scaling: RopeScaling) -> Float[Array, "N"]:
    """Share of each frequency that stays: 1 where it makes more than `beta_fast` turns in the
    original context, 0 below `beta_slow`, linear in the component's index between."""
    original = scaling.original_max_position_embeddings
    if original is None:
        raise ValueError(f"{scaling} is not complete")

    def index(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index(scaling.beta_fast or 32), index(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    return 1 - jnp.clip((jnp.arange(head_dim // 2) - first) / width, 0.0, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
