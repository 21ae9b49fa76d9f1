"""TensorFlow's plan of blocks, in plain integers: a window's pairs, counted, are the pairs of its blocks, each once."""

import itertools

import numpy as np
import pytest

from kvattn.kernels.tensorflow import plan


@pytest.mark.parametrize("every_query", [False, True])
@pytest.mark.parametrize("left", [None, 0, 1, 3])
@pytest.mark.parametrize("right", [None, 0, 1, 3])
def test_blocks_hold_the_pairs_of_the_window_each_once(left, right, every_query):
    for n, m, size in itertools.product((1, 4, 7), (1, 3, 8), (1, 2, 5)):
        lengths = np.array([[0], [m - 1], [m]])
        offset = np.array([[0], [2], [-3]])
        start = np.arange(0, n, size)[None] + 0 * offset
        found = plan.blocks(
            np, start, np.minimum(start + size, n), plan.Heads(n, m, offset, lengths), left, right, every_query=every_query
        )
        for head, (at, length) in enumerate(zip(offset.ravel(), lengths.ravel(), strict=True)):
            ahead = np.arange(m) - at - np.arange(n)[:, None]
            may = (ahead >= -(n + m + 9 if left is None else left)) & (ahead <= (n + m + 9 if right is None else right))
            may &= np.arange(m) < length
            count = np.zeros((n, m), int)
            for i, j, low, high, below, above in zip(*(np.broadcast_to(x, start.shape)[head] for x in found), strict=True):
                if every_query:  # which of its pairs may attend is asked of each
                    count[i:j, low:high] += may[i:j, low:high]
                    continue
                assert may[i:j].any(axis=1).all()
                assert may[i:j, low:high].any(axis=0).all()  # it reads no key for nothing
                rows, columns = np.arange(j - i)[:, None], np.arange(high - low)
                kept = np.ones((j - i, high - low), bool)
                kept &= (left is None) | (rows - columns <= below)
                kept &= (right is None) | (columns - rows <= above)
                assert i == j or (below >= 0 and above >= 0)  # below 0, tf.linalg.band_part would keep all
                count[i:j, low:high] += kept
            np.testing.assert_array_equal(count, may)


def test_queries_of_a_block():
    assert [plan.size(np, m, 1000, 50, 4) for m in (0, 10, 25, 1000)] == [50, 50, 40, 4]
    assert plan.size(np, 1000, 20_000, 50, 4) == 20
