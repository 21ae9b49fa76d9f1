"""What functions of positions are asked with tells the truth about all pairs, or nothing; without a framework."""

import doctest

import numpy as np
import pytest

from kvattn import positions

N, M, OFFSET = 7, 9, 2
QUERIES, KEYS = OFFSET + np.arange(N)[:, None], np.arange(M)[None]
AHEAD = np.arange(M + OFFSET + N - 1)[None] - (OFFSET + N - 1)


def test_the_examples():
    assert doctest.testmod(positions).failed == 0


OF_DISTANCES = {
    "causal": lambda q, k: k <= q,
    "after": lambda q, k: q < k,
    "not itself": lambda q, k: q != k,
    "itself": lambda q, k: q == k,
    "a window": lambda q, k: (k >= q - 2) & (3 + q > k),
    "dilated": lambda q, k: (q - k) % 3 == 0,
    "moved": lambda q, k: abs((q + 1) - (k - 2)) * 2,
    "numbers": lambda q, k: np.where(k - q > 0, 0.5, -np.abs(q - k)),
}


@pytest.mark.parametrize("name", OF_DISTANCES)
def test_distances_tell_of_every_pair(name):
    function = OF_DISTANCES[name]
    found = positions.of_distances(function, AHEAD)
    np.testing.assert_array_equal(found[0][KEYS - QUERIES - AHEAD[0, 0]], function(QUERIES, KEYS))


OF_MORE = {
    "a first key": lambda q, k: (k <= q) | (k < 2),
    "blocks": lambda q, k: q // 2 == k // 2,
    "a sum": lambda q, k: q + k > 3,
    "two queries": lambda q, k: q - q == k - k,
    "its truth": lambda q, k: k <= q if q else k > q,
    "its shape": lambda q, k: np.tri(q.shape[0], k.shape[1], dtype=bool),
    "a row for each query": lambda q, k: (k <= q) * np.ones((N, 1), bool),
    "turned": lambda q, k: (k <= q).T,
    "far": lambda q, k: k <= q + 2**30,
    "one for all": lambda q, k: np.array(True),
    "an error": lambda q, k: 1 / 0,
}


@pytest.mark.parametrize("name", OF_MORE)
def test_what_asks_for_more_than_a_distance_is_not_served_by_it(name):
    assert positions.of_distances(OF_MORE[name], AHEAD) is None


@pytest.mark.parametrize("name", ["a first key", "blocks", "a sum"])
def test_integers_and_bools_are_asked_of_numpy(name):
    found = positions.of_pairs(OF_MORE[name], QUERIES, KEYS)
    assert type(found) is np.ndarray
    np.testing.assert_array_equal(found, OF_MORE[name](QUERIES, KEYS))


NOT_EXACT = {
    "a quotient": lambda q, k: q / 3 < k / 3,
    "a fraction": lambda q, k: q * 0.5 < k,
    "floats": lambda q, k: q.astype(float) < k,
    "by 0": lambda q, k: q // (k * 0) == 0,
    "a root": lambda q, k: np.sqrt(q) < k,
    "an array of its own": lambda q, k: k < np.full((1, 1), 3),
    "a table": lambda q, k: np.eye(20, dtype=bool)[q, k],
    "a function of NumPy": lambda q, k: np.where(q > k, q, k) > 2,
    "the largest": lambda q, k: k < k.max(),
    "integers": lambda q, k: q - k,
    "beyond int32": lambda q, k: k < 2**40,
    "bools and integers": lambda q, k: (q > k) * k > 0,
    "an error": lambda q, k: q.device,
}


@pytest.mark.parametrize("name", NOT_EXACT)
def test_what_frameworks_may_answer_differently_is_not_asked_of_numpy(name):
    assert positions.of_pairs(NOT_EXACT[name], QUERIES, KEYS) is None


@pytest.mark.parametrize("allowed", [range(-8, 1), range(-2, 4), range(7), [0], range(-8, 7)])
def test_a_window_allows_what_its_distances_do(allowed):
    flags = np.isin(AHEAD[0], allowed)
    left, right = positions.window(flags, AHEAD[0, 0])
    ahead = KEYS - QUERIES
    found = (ahead >= (-99 if left is None else -left)) & (ahead <= (99 if right is None else right))
    np.testing.assert_array_equal(found, np.isin(ahead, allowed))


@pytest.mark.parametrize("allowed", [[], [-2, 0], range(1, 7), range(-8, -1)])
def test_what_is_no_window_of_a_query_itself_is_none(allowed):
    assert positions.window(np.isin(AHEAD[0], allowed), AHEAD[0, 0]) is None
