"""Reading in parts gives the whole, and touches only what the parts need."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from spark_jax.models.hf_layout import Leaf

LEAVES = (
    Leaf("embedding", (6,), (4,), lookup=True),
    Leaf("head", (6,), (4,)),
    Leaf("query", (6, 2), (4,)),
    Leaf("output", (4,), (6, 2)),
    Leaf("bias", (6, 2)),
    Leaf("norm", (4,)),
)


class Recorded:
    """An array that counts how often each of its numbers was read."""

    def __init__(self, array):
        self.array, self.reads = array, np.zeros(array.shape, int)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.array[index]


def our_layout(leaf, array):
    """Number by number, from what a linear layer computes: y[o] = Σ_i x[i] · W[o, i]."""
    if not leaf.into:
        return array.reshape(leaf.out)
    ours = np.empty(leaf.out + leaf.into if leaf.lookup else leaf.into + leaf.out)
    for o, out in enumerate(np.ndindex(leaf.out)):
        for i, into in enumerate(np.ndindex(leaf.into)):
            ours[out + into if leaf.lookup else into + out] = array[o, i]
    return ours


@st.composite
def parts(draw):
    """A leaf and a part of it, cut along the first axis of its rows, its columns, or both."""
    leaf = draw(st.sampled_from(LEAVES))
    cut = []
    for axes in (leaf.out, leaf.into):
        count = draw(st.sampled_from((1, 2)))
        number = draw(st.integers(0, count - 1))
        for position, n in enumerate(axes):
            whole = (0, n)
            cut.append((number * n // count, (number + 1) * n // count) if not position else whole)
    rows, columns = cut[: len(leaf.out)], cut[len(leaf.out) :]
    index = rows + columns if leaf.lookup else columns + rows
    return leaf, tuple(index), draw(st.integers(1, 100))


@given(parts())
def test_blocks_make_up_the_part_asked_for(case):
    leaf, index, size = case
    array = np.random.default_rng(0).normal(size=leaf.hf_shape)
    data = Recorded(array)
    sizes = []
    got = np.full([stop - start for start, stop in index], np.nan)
    for start, block in leaf.blocks(data, index, size):
        got[tuple(slice(a, a + n) for a, n in zip(start, block.shape, strict=True))] = block
        sizes.append(block.size)
    # As large as asked for or smaller, unless that is less than the rows of one head.
    rows = got.shape[0 if leaf.lookup else len(leaf.into)]
    assert max(sizes) <= max(size, got.size // rows)
    where = tuple(slice(start, stop) for start, stop in index)
    np.testing.assert_array_equal(got, our_layout(leaf, array)[where])
    # What was read, once each, is exactly the part.
    assert data.reads.max() == 1
    assert data.reads.sum() == got.size


@given(st.sampled_from(LEAVES))
def test_writing_undoes_reading(leaf):
    array = np.random.default_rng(0).normal(size=leaf.hf_shape)
    back = leaf.to_hf(our_layout(leaf, array))
    np.testing.assert_array_equal(back, array)
    assert back.flags.c_contiguous
