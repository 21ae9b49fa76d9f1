"""A mask is built only where it forbids something: one that allows every pair costs many times a decoding step."""

import numpy as np
import pytest
from near import assert_near

import kvattn

RNG = np.random.default_rng(0)
ALL = {  # each of its own sizes: JAX would not trace the same program twice
    "decoding": (1, 11, {"causal": True, "query_offset": 10}),
    "decoding, with a window": (1, 10, {"causal": True, "query_offset": 9, "window": (9, 0)}),
    "two tokens behind a cache": (2, 12, {"window": (11, 1), "query_offset": 10}),
    "one pair": (1, 1, {"causal": True, "window": 0}),
    "a longer window than the keys": (3, 13, {"window": 13, "query_offset": 4}),
}
SOME = {
    "one key short of the last": (1, 14, {"causal": True, "query_offset": 12}),
    "the first of two sees less": (2, 15, {"causal": True, "query_offset": 13}),
    "the window ends before the first key": (1, 16, {"causal": True, "query_offset": 15, "window": (14, 0)}),
    "the window ends before the last key": (2, 17, {"window": (None, 15)}),
    "an array of offsets": (1, 18, {"causal": True, "query_offset": np.array([17])}),
}


@pytest.fixture
def masks(tab, monkeypatch):
    """Every mask that the tab's plain path builds, or NumPy's in its place, None where it needs none."""
    built = []

    def watched(allowed):
        def seen(*args, **options):
            built.append(allowed(*args, **options))
            return built[-1]

        return seen

    for module in {tab, kvattn.dispatch.load("numpy")}:
        monkeypatch.setattr(module, "_allowed", watched(module._allowed))
    return built


def arrays(n, m):
    return [RNG.standard_normal((1, 2, rows, 5)).astype(np.float32) for rows in (n, m, m)]


@pytest.mark.parametrize("normalize", ["softmax", "sparsemax"])  # sparsemax has no fast path
@pytest.mark.parametrize("call", ALL)
def test_no_mask_where_every_pair_is_allowed(backend, masks, call, normalize):
    n, m, options = ALL[call]
    query, key, value = arrays(n, m)
    kvattn.attention(query, key, value, **options, normalize=getattr(kvattn, normalize), backend=backend)
    assert all(mask is None for mask in masks)


@pytest.mark.parametrize("call", ALL)
def test_no_mask_in_the_gradients_either(backend, masks, call):
    n, m, options = ALL[call]
    query, key, value = arrays(n, m)
    kvattn.attention_grad(query, key, value, query, **options, normalize=kvattn.sparsemax, backend=backend)
    assert all(mask is None for mask in masks)


@pytest.mark.parametrize("call", SOME)
def test_a_mask_where_one_pair_is_not(backend, masks, call):
    n, m, options = SOME[call]
    query, key, value = arrays(n, m)
    kvattn.attention(query, key, value, **options, normalize=kvattn.sparsemax, backend=backend)
    assert masks
    assert all(mask is not None for mask in masks)


def test_the_answer_is_the_same_with_the_mask(backend):
    """An array of offsets is not looked into, so the same call with one builds its mask."""
    for n, m, options in ALL.values():
        query, key, value = arrays(n, m)
        masked = {**options, "query_offset": np.array([options.get("query_offset", 0)])}
        found, expected = (kvattn.attention(query, key, value, **given, backend=backend) for given in (options, masked))
        assert_near(kvattn.to_numpy(found), kvattn.to_numpy(expected))
