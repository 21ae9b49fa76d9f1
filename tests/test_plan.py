"""Plans in plain integers: TensorFlow's blocks hold the pairs of a window each once, JAX's reach every key in it."""

import itertools

import numpy as np
import pytest

from kvattn.call import Call
from kvattn.kernels.jax import plans
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


@pytest.mark.parametrize("window", [(None, None), (None, 0), (3, None), (3, 0), (100, 100), (900, 800), (3000, 0)])
@pytest.mark.parametrize("lengths", [None, (2,), (2, 0)])
def test_what_a_tile_of_jax_meets(window, lengths):
    """Also where lengths are given: one for each batch entry, or for each of its queries."""
    left, right = window
    for n, m, heads in itertools.product((1, 255, 3000), (1, 300, 5000), (1, 6)):
        lens = None if lengths is None else np.zeros(tuple(size or n for size in lengths), int)
        call = Call(score=None, normalize=None, left=left, right=right, valid_lens=lens)
        found = plans.plan((2, 2 * heads, n, 8), (2, heads, m, 8), call)
        assert found[:4] == ((2, 2 * heads), heads, n, m)
        assert found.gaps == (left is not None and lengths == (2, 0))
        assert heads % found.heads_at_once == 0
        assert found.heads_at_once == 1 or found.heads_at_once * found.tile * found.cut_block <= 2 * plans.SCORES
        reached = m if left is None or right is None else min(m, left + found.tile + right)
        assert found.cut_blocks * found.cut_block >= reached  # else a key in the window of a query met no block
        assert found.tile <= n
        assert found.block <= m


def test_heads_of_other_lengths_or_offsets_are_tiled_alone():
    one, two, shape = np.zeros(1, int), np.zeros(2, int), (2, 64, 8)
    for given, at_once in (({}, 2), ({"valid_lens": two}, 1), ({"valid_lens": one}, 2), ({"query_offset": two, "right": 0}, 1),
                           ({"query_offset": two}, 2), ({"query_offset": 5, "right": 0}, 2)):  # fmt: skip
        assert plans.plan(shape, shape, Call(score=None, normalize=None, **given)).heads_at_once == at_once
