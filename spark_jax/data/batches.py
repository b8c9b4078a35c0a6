"""The order in which training meets its examples: shuffled, shared out, and resumed exactly."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class BatchOrder(Protocol):
    """`order[t]`: the rows of update t ≥ 0, an int array [batch_size]."""

    def __getitem__(self, step: int, /) -> Any: ...


def batch_order(num_examples: int, batch_size: int, seed: int) -> BatchOrder:
    """An endless sequence of batches: `order[t]` holds the rows of update t ≥ 0, an int array
    [batch_size].

    It is a function of the arguments alone, so a run resumes by going on at the next t; there is no
    position to save. Each epoch has an order of its own and every example once. (grain adds the
    epoch to the seed: the second epoch of seed 0 is the first of seed 1.) A batch may hold the end
    of one epoch and the beginning of the next: none is dropped, and an example may stand in such a
    batch twice.

    Args:
        num_examples: the rows are 0 .. num_examples − 1.
        batch_size: rows of one update over all processes, each of which has the same order.
        seed: of the shuffle.

    Raises:
        ValueError: no examples, or a batch of none.
    """
    import grain  # orbax with it

    if num_examples < 1 or batch_size < 1:
        raise ValueError(
            f"num_examples={num_examples}, batch_size={batch_size}; both must be at least 1"
        )
    rows = grain.MapDataset.range(num_examples).shuffle(seed=seed).repeat()
    return rows.batch(batch_size)
