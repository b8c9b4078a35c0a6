"""The order in which training meets its examples: shuffled, shared out, and resumed exactly."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class BatchOrder(Protocol):
    """`order[t]`: the rows of update t ≥ 0, an int array [batch_size / process_count]."""

    def __getitem__(self, step: int, /) -> Any: ...


def batch_order(
    num_examples: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchOrder:
    """An endless sequence of batches: `order[t]` holds the rows of update t ≥ 0, an int array
    [batch_size / process_count].

    It is a function of the arguments alone, so a run resumes by going on at the next t; there is no
    position to save. Each epoch has an order of its own and every example once. (grain adds the
    epoch to the seed: the second epoch of seed 0 is the first of seed 1.) A batch may hold the end
    of one epoch and the beginning of the next: none is dropped, and an example may stand in such a
    batch twice.

    Args:
        num_examples: the rows are 0 .. num_examples − 1.
        batch_size: rows of one update over all processes.
        seed: of the shuffle.
        process_index: which slice of each batch this process takes, such as `jax.process_index()`.
        process_count: how many processes share a batch. Their slices, one after the other, are the
            batch that a single process would have: the updates do not depend on their number.

    Raises:
        ValueError: nothing to draw from, or a batch that does not divide among the processes.
    """
    import grain  # orbax with it

    if num_examples < 1 or batch_size < 1:
        raise ValueError(
            f"num_examples={num_examples}, batch_size={batch_size}; both must be at least 1"
        )
    if not 0 <= process_index < process_count or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} for process_index={process_index} of "
            f"process_count={process_count}; the index must be below the count, and the batch a "
            "multiple of it"
        )
    size = batch_size // process_count
    own = slice(process_index * size, (process_index + 1) * size)
    rows = grain.MapDataset.range(num_examples).shuffle(seed=seed).repeat()
    return rows.batch(batch_size).map(lambda batch: batch[own])
