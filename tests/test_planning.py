"""The plan of a window, in plain integers: what its blocks hold and what cutting them costs."""

import itertools

import numpy as np
import pytest
from near import assert_near

import kvattn
from kvattn import planning


class Counted:
    """An array of this shape that adds up the sizes of the arrays it is cut from: what each slice's gradient fills."""

    def __init__(self, shape, cost):
        self.shape, self.cost = shape, cost

    def __getitem__(self, at):
        self.cost[0] += int(np.prod(self.shape))
        return Counted(np.empty(self.shape, bool)[at].shape, self.cost)


def cost(n, **options):
    cut = [0]
    query, key, value = (Counted((n, 2), cut) for _ in range(3))
    where = {"mask": None, "bias": None, "valid_lens": None, "query_offset": 0} | options
    for _ in planning.cut(planning.window_blocks(n, n, 0, 32, 32), query, key, value, **where):
        pass
    return cut[0]


def test_the_gradients_of_a_windows_slices_are_linear_in_n():
    """But for a logarithm: slices all cut from the whole would be 64 times as many elements for 8 times the queries."""
    assert cost(8 * 8192) < 16 * cost(8192)


def test_cuts_of_cuts_are_the_blocks():
    rng = np.random.default_rng(0)
    n, m, offset = 6000, 5500, -3
    query, key, value, mask = rng.random((n, 2)), rng.random((m, 2)), rng.random((m, 1)), rng.random((n, m)) < 0.5
    row, lens = rng.random((1, m)), rng.integers(0, m, n)
    steps = planning.window_blocks(n, m, offset, 40, 0)
    assert len(steps) > 16
    cuts = planning.cut(steps, query, key, value, mask=mask, bias=row, valid_lens=lens, query_offset=offset)
    for (i, j, k, l), (block, at) in zip(steps, cuts, strict=True):
        for found, expected in zip(
            (*block, at["mask"], at["bias"], at["valid_lens"]),
            (query[i:j], key[k:l], value[k:l], mask[i:j, k:l], row[:, k:l], lens[i:j] - k),
            strict=True,
        ):
            np.testing.assert_array_equal(found, expected)
        assert at["query_offset"] == offset + i - k


@pytest.mark.parametrize("window", [None, (0, 0), (1, 0), (0, 2), (None, 1), (2, None), (None, None)])
@pytest.mark.parametrize("causal", [False, True])
def test_what_causal_and_a_window_cover(causal, window):
    for n, m, offset in itertools.product(range(4), range(5), range(-4, 7)):
        ahead = np.arange(m) - offset - np.arange(n)[:, None]
        left, right = window or (None, None)
        right = 0 if causal else right
        sees = (ahead >= -np.inf if left is None else ahead >= -left) & (ahead <= np.inf if right is None else ahead <= right)
        expected = n > 0 and m > 0 and sees.any(axis=0).all() and sees.any(axis=1).all()
        assert planning.leaves_none_out(n, m, offset, left, right) == expected, (n, m, offset)
    assert not planning.leaves_none_out(None, 4, 0, left, right)
    assert not planning.leaves_none_out(4, 4, np.array([0, 1]), left, right)


def test_a_few_queries_meet_only_the_keys_in_their_window(backend):
    n, m, options = 2, 2 * planning.FEW, {"causal": True, "query_offset": 1500, "window": (5, None)}
    assert planning.window_blocks(n, m, 1500, 5, 0) == [(0, n, 1495, 1502)]
    assert planning.window_blocks(n, planning.FEW, 900, 5, 0) == []
    assert planning.window_blocks(n, m, 1500, m // 2, 0) == []
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 2, length, 4)).astype(np.float32) for length in (n, m, m))
    mask = (np.arange(m) <= 1500 + np.arange(n)[:, None]) & (np.arange(m) >= 1495 + np.arange(n)[:, None])
    for asked in ({}, {"return_lse": True}, {"score": kvattn.cosine_score}, {"normalize": kvattn.sparsemax}):
        found = kvattn.attention(query, key, value, **options, **asked, backend=backend)
        expected = kvattn.attention(query, key, value, mask=mask, **asked, backend="numpy")
        for x, y in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
            assert_near(kvattn.to_numpy(x), y)


def test_a_long_window_is_the_mask_it_stands_for(backend):
    """Long enough for slices of slices."""
    n = 5 * planning.BLOCK + 20
    rng = np.random.default_rng(0)
    query, key, value, grad_output = (rng.standard_normal((1, 2, n, 4)).astype(np.float32) for _ in range(4))
    ahead = np.arange(n) - np.arange(n)[:, None]
    cut, masked = {"window": (9, 5)}, {"mask": (ahead >= -9) & (ahead <= 5)}
    assert len(planning.window_blocks(n, n, 0, *cut["window"])) > planning.SLICES
    found, expected = (
        [
            kvattn.attention(query, key, value, **options, backend=backend),
            *kvattn.attention_grad(query, key, value, grad_output, **options, backend=backend),
        ]
        for options in (cut, masked)
    )
    for x, y in zip(found, expected, strict=True):
        assert_near(kvattn.to_numpy(x), kvattn.to_numpy(y))
