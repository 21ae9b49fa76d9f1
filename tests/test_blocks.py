"""NumPy meets any score and any normaliser block by block: no array of queries by keys by features ever exists."""

import math
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
from test_tiled_numpy import peak
from tiling import draw

import kvattn
from kvattn import conformance
from kvattn.backends import numpy as tab
from kvattn.kernels.numpy import memory, tiled


@contextmanager
def in_blocks():
    """Every call that is not served in tiles is cut into blocks of a few numbers."""
    with (
        patch.multiple(memory, PAIRS=8, COLUMNS=2),
        patch.multiple(tiled, TINY=0, SMALLEST=math.inf, SMALLEST_KEYS=math.inf),
    ):
        yield


def test_the_conformance_suite_in_blocks():
    with in_blocks():
        report = conformance.run("numpy", dtypes=("float64", "float32"))
    assert not report.failures, "\n".join(result.message for result in report.failures)


def my_score(query, key):
    return np.tanh(query[..., :, None, :] - key[..., None, :, :]).sum(axis=-1)


def my_normalizer(scores, where=None):
    return tab.softmax(2 * scores, where) ** 2


def test_a_score_and_a_normaliser_of_ones_own_in_blocks():
    query, key, value, _ = draw(lead=(2, 4), kv=(2, 2), n=9, m=7)
    options = {"score": my_score, "normalize": my_normalizer, "causal": True, "valid_lens": np.array([3, 6]), "scale": 0.5}
    expected = kvattn.attention(query, key, value, **options, return_weights=True)
    with in_blocks():
        found = kvattn.attention(query, key, value, **options, return_weights=True)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15)


def test_dropout_in_blocks_is_the_same_forward_and_back():
    query, key, value, _ = draw(lead=(), n=6, m=5)
    ones = np.ones((6, 2))
    with in_blocks():
        output, weights = kvattn.attention(query, key, value, dropout=0.5, rng=np.random.default_rng(3), return_weights=True)
        alone = kvattn.attention(query, key, value, dropout=0.5, rng=np.random.default_rng(3))
        (by_value,) = kvattn.attention_grad(query, key, value, ones, dropout=0.5, rng=np.random.default_rng(3), wrt=["value"])
    np.testing.assert_array_equal(output, alone)
    np.testing.assert_allclose((by_value * value).sum(), output.sum())  # the output is linear in the values
    np.testing.assert_allclose(weights.sum(axis=-1), 1)


@pytest.mark.parametrize("what", ["additive", "distance", "own", "sparsemax"])
def test_no_array_of_queries_by_keys_by_features(what):
    query, key, value, grad = draw(lead=(), n=512, m=512, d=16, v=4, dtype=np.float32)
    rng = np.random.default_rng(0)
    shapes = {"W_q": (16, 32), "W_k": (16, 32), "w_v": (32,)}
    bound = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    options = {
        "additive": {"score": partial(kvattn.additive_score, **bound)}, "distance": {"score": kvattn.distance_score},
        "own": {"score": my_score}, "sparsemax": {"normalize": kvattn.sparsemax},
    }[what]  # fmt: skip
    with patch.object(memory, "PAIRS", 2**15):
        assert peak(lambda: kvattn.attention(query, key, value, **options)) < 512 * 512 * 4
        if what != "own":
            assert peak(lambda: kvattn.attention_grad(query, key, value, grad, **options)) < 2 * 512 * 512 * 4


def test_gradients_of_blocks_of_keys_of_unequal_size():
    query, key, value, _ = draw(lead=(), n=4, m=7)
    rng = np.random.default_rng(5)
    score = partial(kvattn.additive_score, W_q=rng.random((query.shape[-1], 3)), W_k=rng.random((key.shape[-1], 3)),
                    w_v=rng.random(3))  # fmt: skip
    arguments = (query, key, value, np.ones((4, value.shape[-1])))
    names = ["query", "key", "value", "W_k"]
    expected = kvattn.attention_grad(*arguments, score=score, wrt=names)
    with patch.object(memory, "key_blocks", lambda *given: [(0, 5), (5, 7)]):
        found = kvattn.attention_grad(*arguments, score=score, wrt=names)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15)
