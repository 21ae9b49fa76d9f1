"""The one description of a call: its answers in plain integers, against pairs that are counted."""

import itertools

import numpy as np
import pytest

from kvattn.call import Call

SIDES = [None, (0, 0), (1, 0), (0, 2), (None, 1), (2, None), (None, None)]


def described(n, m, **options):
    query, key = np.zeros((n, 2)), np.zeros((m, 2))
    return Call.of(
        query, key, **{"score": None, "normalize": None, "causal": False, "window": None, "query_offset": 0} | options
    )


def sees(n, m, causal, window, query_offset):
    """Which pairs may attend: bool (n, m)."""
    ahead = np.arange(m) - query_offset - np.arange(n)[:, None]
    left, right = window or (None, None)
    allowed = np.ones((n, m), bool) if left is None else ahead >= -left
    allowed = allowed if right is None else allowed & (ahead <= right)
    return allowed & (ahead <= 0) if causal else allowed


@pytest.mark.parametrize("window", SIDES)
@pytest.mark.parametrize("causal", [False, True])
def test_a_description_allows_the_pairs_that_causal_and_the_window_allow(causal, window):
    for n, m, query_offset in itertools.product(range(4), range(5), range(-4, 7)):
        call = described(n, m, causal=causal, window=window, query_offset=query_offset)
        expected = sees(n, m, causal, window, query_offset)
        again = call.keywords
        np.testing.assert_array_equal(sees(n, m, again["causal"], again["window"], again["query_offset"]), expected)
        assert call.windowed or expected.all()
        triangle = n > 0 and m > 0 and np.array_equal(expected, np.tri(n, m, dtype=bool)) and not expected.all()
        assert not call.only_causal or triangle or not expected.size
        if causal and window is None and query_offset == 0 and triangle:
            assert call.only_causal
        everyone = n > 0 and m > 0 and expected.any(axis=0).all() and expected.any(axis=1).all()
        assert call.leaves_none_out(n, m) == everyone
        covered = np.zeros((n, m), bool)
        for first, end, start, stop in call.window_blocks(n, m) or [(0, n, 0, m)]:
            covered[first:end, start:stop] = True
        assert (covered >= expected).all()


def test_what_may_forbid_a_pair():
    nothing, array = described(2, 3), np.ones((2, 3), bool)
    assert not (nothing.restricted)
    assert not (nothing.masked)
    assert not (nothing.windowed)
    assert not (nothing.only_causal)
    for name in ("mask", "bias", "valid_lens"):
        call = described(2, 3, **{name: array}, causal=True)
        assert call.masked
        assert call.restricted
        assert call.windowed
        assert not call.only_causal
    each = described(2, 3, valid_lens=np.ones(2, int))
    assert each.lengths_per_query(2)
    assert not each.lengths_per_query(3)
    assert described(2, 3, valid_lens=array).lengths_per_query(3)
    moved = described(2, 3, causal=True, query_offset=np.zeros(1, int))
    assert moved.windowed
    assert not (moved.only_causal)
    assert not (moved.from_the_first)


def test_a_cut_call_counts_from_its_blocks_first_key():
    rng = np.random.default_rng(0)
    n, m, offset = 6000, 5500, -3
    query, key, value, mask = rng.random((n, 2)), rng.random((m, 2)), rng.random((m, 1)), rng.random((n, m)) < 0.5
    row, lens = rng.random((1, m)), rng.integers(0, m, n)
    call = Call.of(query, key, score=None, normalize=None, mask=mask, bias=row, valid_lens=lens, causal=True,
                   query_offset=offset, window=(40, 7), softcap=2.0)  # fmt: skip
    blocks = call.window_blocks(n, m)
    assert len(blocks) > 16
    for (i, j, k, l), (q, found_key, v, part) in zip(blocks, call.cut(blocks, query, key, value), strict=True):
        np.testing.assert_array_equal(q, query[i:j])
        np.testing.assert_array_equal(found_key, key[k:l])
        np.testing.assert_array_equal(v, value[k:l])
        np.testing.assert_array_equal(part.mask, mask[i:j, k:l])
        np.testing.assert_array_equal(part.bias, row[:, k:l])
        np.testing.assert_array_equal(part.valid_lens, lens[i:j] - k)
        assert (part.query_offset, part.left, part.right, part.softcap) == (offset + i - k, 40, 0, 2.0)
        assert (part.first_query, part.first_key) == (i, k)
    ((*arrays, part),) = call.cut([(3000, 3600, 2900, 3700)], query, key, value)  # a block of a block
    ((_, _, _, inner),) = part.cut([(100, 300, 20, 400)], *arrays)
    assert (inner.first_query, inner.first_key) == (3100, 2920)


def test_a_query_cut_out_with_the_keys_in_its_window_needs_no_mask():
    query, key = np.zeros((1, 2)), np.zeros((4096, 2))
    call = described(1, 4096, window=(9, 0), query_offset=3000)
    blocks = call.window_blocks(1, 4096)
    ((_, found, _, part),) = call.cut(blocks, query, key, key)
    assert found.shape[-2] == 10
    assert not part.windowed
