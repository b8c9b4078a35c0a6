"""What rewards are made from: a reward model's judgements, and a batch of responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float32

from spark_jax.data.formats import RewardKind, TextFormat
from spark_jax.data.records import Problem
from spark_jax.response_format import MAX_STEPS, MIN_STEPS


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

    def of_groups(self, start: int, end: int) -> RewardInputs:
        """The rows of the groups [start, end)."""
        rows = slice(start * self.group_size, end * self.group_size)
        judgements = None if self.judgements is None else self.judgements[rows]
        return dataclasses.replace(
            self,
            problems=self.problems[rows],
            responses=self.responses[rows],
            format_ok=self.format_ok[rows],
            judgements=judgements,
        )


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward as `REWARDS` holds it.

    Attributes:
        function: (RewardInputs) -> r, float32 [B]; 0 wherever the format is broken.
        judges: the kinds of reward model whose judgements it reads; () asks no reward model.
        references: whether it reads reference answers. It is handed none where it does not say so.
        grades: whether it compares answers, group by group, which takes its time.
    """

    function: Callable[[RewardInputs], Float32[np.ndarray, "B"]]
    judges: tuple[RewardKind, ...] = ()
    references: bool = False
    grades: bool = False

    @property
    def gives_verdicts(self) -> bool:
        """Whether the reward model it asks judges every step."""
        return any(kind != "orm" for kind in self.judges)

    def __call__(self, inputs: RewardInputs) -> Float32[np.ndarray, "B"]:
        """r of each response, with no more shown than the reward says that it reads.

        Raises ValueError where judgements are missing or of another kind.
        """
        if not self.references:
            inputs = dataclasses.replace(inputs, problems=[p.blind() for p in inputs.problems])
        if not self.judges:
            return self.function(dataclasses.replace(inputs, judgements=None))
        if inputs.judgements is None:
            raise ValueError(
                f"this reward needs judgements of a reward model of kind {self.judges}"
            )
        if wrong := {judgement.kind for judgement in inputs.judgements} - set(self.judges):
            raise ValueError(
                f"this reward needs a reward model of kind {self.judges}, got {sorted(wrong)}; "
                "choose another reward or another reward model"
            )
        return self.function(inputs)
