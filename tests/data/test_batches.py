import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jax.data.batches import batch_order

SIZES = st.tuples(st.integers(1, 25), st.integers(1, 20), st.integers(0, 9))


@settings(max_examples=12)
@given(SIZES)
def test_every_example_once_per_epoch(sizes):
    num, size, seed = sizes
    order = batch_order(num, size, seed)
    epochs = 3
    batches = [np.asarray(order[t]) for t in range(-(-epochs * num // size))]
    assert {len(batch) for batch in batches} == {size}
    stream = np.concatenate(batches)
    for epoch in range(epochs):
        assert sorted(stream[epoch * num : (epoch + 1) * num]) == list(range(num))


def test_any_step_is_the_same_after_a_restart():
    order = batch_order(23, 4, seed=5)
    through = [order[t].tolist() for t in range(50)]
    for t in (49, 0, 31, 17):  # in any order, each from a fresh start
        assert batch_order(23, 4, seed=5)[t].tolist() == through[t]


def test_epochs_and_seeds_differ():
    def epoch(seed, number):
        return np.concatenate([batch_order(20, 5, seed)[4 * number + i] for i in range(4)]).tolist()

    of_one_seed = [epoch(0, number) for number in range(3)]
    first_of_seeds = [epoch(seed, 0) for seed in range(3)]
    for orders in (of_one_seed, first_of_seeds):
        assert len({tuple(order) for order in orders}) == 3
        assert list(range(20)) not in orders


def test_the_order_is_that_of_the_plain_pipeline():
    """Runs made before this function existed resume with the order they had."""
    plain = grain.MapDataset.range(11).shuffle(seed=3).repeat().batch(4)
    order = batch_order(11, 4, 3)
    for t in range(12):
        np.testing.assert_array_equal(order[t], plain[t])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((0, 4, 0), "num_examples=0"),
        ((4, 0, 0), "batch_size=0"),
    ],
)
def test_empty_data_and_batches_raise(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        batch_order(*arguments)
