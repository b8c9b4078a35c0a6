"""What rewards are made from: a reward model's judgements, and a batch of responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from spark_jax.data.formats import RewardKind, TextFormat
from spark_jax.data.records import Problem
from spark_jax.rewards.format import MAX_STEPS, MIN_STEPS


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a reward model made of one response.

    `num_steps` is the response's own number of steps. `verdicts` are as many as the reward model
    judged, which may be another number; () for an ORM and wherever `failure` is set. `failure` is
    None for a judgement that could be read, `format` where the response broke the format and the
    reward model was not called, and otherwise the parser's reason; `overall` is then False.
    """

    kind: RewardKind
    num_steps: int
    overall: bool
    verdicts: tuple[bool, ...] = ()
    failure: str | None = None
    text: str = ""

    @property
    def called(self) -> bool:
        return self.failure != NOT_CALLED

    @property
    def judged_every_step(self) -> bool:
        """Whether the verdicts and the response's steps are one to one."""
        return self.failure is None and 0 < len(self.verdicts) == self.num_steps


NOT_CALLED = "format"


@dataclasses.dataclass(frozen=True)
class RewardInputs:
    """B responses, group-major: row b belongs to prompt b // group_size.

    Attributes:
        problems: the problem of each response, so every problem stands there group_size times.
        responses: the texts, without the end-of-sequence token.
        group_size: responses per problem.
        format: how the task speaks; `final_answer` and `same_answer` are read.
        format_ok: whether each response keeps the format. Where not, every reward is 0.
        judgements: one per response, from `prm.judge`; None for rewards that judge nothing.
        seed: for rewards that draw.
        step_limits: fewest and most steps for which step rewards count, both included.

    Raises ValueError where the rows do not fit together.
    """

    problems: Sequence[Problem]
    responses: Sequence[str]
    group_size: int
    format: TextFormat
    format_ok: Bool[np.ndarray, "B"]
    judgements: Sequence[Judgement] | None = None
    seed: int = 0
    step_limits: tuple[int, int] = (MIN_STEPS, MAX_STEPS)

    def __post_init__(self) -> None:
        rows = {
            "problems": len(self.problems),
            "responses": len(self.responses),
            "format_ok": len(self.format_ok),
        }
        if self.judgements is not None:
            rows["judgements"] = len(self.judgements)
        if len(set(rows.values())) != 1:
            raise ValueError(f"RewardInputs: one row per response is needed, got {rows}")
        if self.group_size < 1 or len(self.responses) % self.group_size:
            raise ValueError(
                f"RewardInputs: {len(self.responses)} responses are no whole number of groups of "
                f"group_size={self.group_size}"
            )
