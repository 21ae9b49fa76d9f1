"""A mask is built only where it forbids something: one that allows every pair costs many times a decoding step."""

import itertools

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


# ---- restrictions together, of small calls that ask for nothing beside the output: a tab may have a shorter way for these

RESTRICTIONS = {
    "mask": np.array([[1, 0, 1, 1, 1], [1, 1, 1, 0, 1], [0, 1, 1, 1, 1], [1, 1, 0, 1, 1]], bool),
    "bias": np.array([[0, 1, -np.inf, 2, 0.5]] * 4),
    "valid_lens": np.array([3, 4]),
    "causal": {"causal": True, "query_offset": 1},
    "window": (2, 1),
}


@pytest.mark.parametrize("names", [*itertools.combinations(RESTRICTIONS, 2), tuple(RESTRICTIONS)], ids=", ".join)
def test_restrictions_compose_where_the_output_is_all_that_is_asked_for(backend, names):
    rng = np.random.default_rng(5)
    query, key, value = (rng.standard_normal((2, 3, size, 4)) for size in (4, 5, 5))
    options = {name: RESTRICTIONS[name] for name in names}
    options |= options.pop("causal", {})
    found = kvattn.attention(*(kvattn.asarray(x, backend=backend) for x in (query, key, value)), **options)
    at, to = np.arange(4)[:, None] + options.get("query_offset", 0), np.arange(5)
    allowed = (
        np.ones((2, 1, 4, 5), bool)
        & options.get("mask", True)
        & (to < options.get("valid_lens", np.array([5, 5]))[:, None, None, None])
    )
    allowed &= (to <= at) | ("causal" not in options)
    allowed &= ((to >= at - 2) & (to <= at + 1)) | ("window" not in options)
    scores = np.where(allowed, query @ key.swapaxes(-1, -2) / 2 + options.get("bias", 0), -np.inf)
    weights = np.exp(scores)
    expected = weights @ value / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    np.testing.assert_allclose(kvattn.to_numpy(found), expected, rtol=1e-12, atol=1e-12)
