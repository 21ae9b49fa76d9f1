"""Calls whose masks meet every edge, for the kernels that only a device runs: their stand-ins must give NumPy's numbers."""

import math

import numpy as np

import kvattn

NAN = math.nan


def draw(n=9, m=11, d=3, v=2, batch=3, heads=4, kv_heads=2, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = ((batch, heads, n, d), (batch, kv_heads, m, d), (batch, kv_heads, m, v), (batch, heads, n, v))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


CALLS = [
    {"causal": True},
    {"causal": True, "query_offset": 2},
    {"causal": True, "query_offset": -4},
    {"causal": True, "query_offset": 5},
    {"causal": True, "query_offset": -20},
    {"causal": True, "query_offset": 20},
    {"causal": True, "query_offset": np.array([-4, 0, 20])},
    {"valid_lens": np.array([0, 4, 11])},
    {"valid_lens": np.array([3, 5, 99]), "causal": True},
    {"valid_lens": np.array([3, 5, 8]), "causal": True, "query_offset": -3},
    {"valid_lens": np.arange(33).reshape(3, 11) % 13, "softcap": 2.0},
    {"window": (2, 1)},
    {"window": (0, 0), "softcap": 0.5},
    {"window": (3, None), "query_offset": 9},
    {"window": (None, 2), "query_offset": np.array([-20, -3, 6]), "valid_lens": np.array([1, 7, 11])},
    {"window": (2, 2), "causal": True, "scale": 0.3},
    {"softcap": 1.5, "scale": 2.0},
]


def run(backend, arrays, options):
    given = [kvattn.asarray(x, backend=backend) for x in arrays]
    found = kvattn.attention(*given[:3], **options), *kvattn.attention_grad(*given, **options)
    return [kvattn.to_numpy(x) for x in found]


def hidden(arrays, options):
    """The arrays with NaN in every key that no query sees, and in every query that sees none."""
    query, key, value, grad = (x.copy() for x in arrays)
    options = {n: x for n, x in options.items() if n not in ("scale", "softcap")}
    n, m = query.shape[2], key.shape[2]
    blank = (np.zeros((*query.shape[:2], rows, 1), query.dtype) for rows in (n, m, m))
    pairs = kvattn.attention(*blank, return_weights=True, **options)[1] > 0  # (batch, heads, n, m)
    seen = pairs.reshape(len(key), key.shape[1], -1, m).any(axis=-2)  # by any of the heads that share a key
    key[~seen], value[~seen], query[~pairs.any(axis=-1)] = NAN, NAN, NAN
    return query, key, value, grad
