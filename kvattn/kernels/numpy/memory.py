"""The formula in blocks: of queries, so that their scores, and of keys, so that the features of scores, bound the memory.

weights = normalize(score(query, key)) needs whole rows of scores, but no other row; and a score that makes several numbers for
each pair, as w . tanh(W_q q + W_k k) does, needs no other pair.

Source: Rabe and Staats 2021, "Self-attention does not need O(n^2) memory".
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from kvattn import planning
from kvattn.kernels.numpy import threads, tiled

PAIRS = 2**22  # numbers that are held at one time: scores, and the features of which they are made
COLUMNS = 64  # keys that a block has at least, where there are as many


# ---- planning, from shapes


def query_blocks(score, query, key):
    """Blocks (first query, end, 0, m) that have at most PAIRS scores and features of them; [] where one block is all."""
    n, m, per_pair = query[-2], key[-2], planning.numbers_per_pair(score, query, key)
    if math.prod(query) * math.prod(key) * per_pair <= PAIRS * query[-1] * key[-1]:
        return []
    size = max(1, PAIRS // (math.prod(planning.lead(query, key)) * max(m, min(m, COLUMNS) * per_pair)))
    return [(i, min(i + size, n), 0, m) for i in range(0, n, size)] if size < n else []


def key_blocks(score, query, key):
    """Blocks (first key, end) whose features a score holds at one time."""
    m = key[-2]
    if tiled.tiny(query, key) or (per_pair := planning.numbers_per_pair(score, query, key)) == 1:
        return [(0, m)]
    size = max(1, PAIRS // max(1, math.prod(query[:-1]) * per_pair))
    return [(i, min(i + size, m)) for i in range(0, m, size)] or [(0, m)]


# ---- computing


@lru_cache(maxsize=64)
def ones(size, dtype):
    """A column, by which a product takes the sums of rows."""
    return np.ones((size, 1), dtype)


@lru_cache(maxsize=64)
def places(size):
    """The positions of keys."""
    found = np.arange(size)
    found.flags.writeable = False
    return found


def scores(score, query, key):
    """score(query, key), in blocks of keys."""
    parts = key_blocks(score, query.shape, key.shape)
    if len(parts) == 1:
        return score(query, key)
    with threads.one_blas_thread():
        return np.concatenate([score(query, key[..., i:j, :]) for i, j in parts], axis=-1)
