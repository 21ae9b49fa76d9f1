"""What scores are given by distance: ALiBi's slopes and T5's buckets."""

from types import SimpleNamespace

import numpy as np
import pytest

import kvattn
from kvattn import distances


def test_slopes_are_a_geometric_sequence(backend):
    slopes = kvattn.to_numpy(kvattn.alibi_slopes(8, backend=backend))
    assert slopes.dtype == "float32"
    assert slopes.tolist() == [2.0**-i for i in range(1, 9)]


def test_slopes_of_heads_that_are_no_power_of_two():
    """The numbers of the paper's code for 12 heads, those of BLOOM-like models for 112 at the seam, and for one head."""
    assert distances.slopes(12) == pytest.approx([2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)])
    assert distances.slopes(112)[63:65] == pytest.approx([2.0**-8, 2.0**-0.0625])
    assert distances.slopes(1) == [2.0**-8]


def test_a_score_of_positions_is_attention_with_alibis_bias(backend):
    """As the docstring has it."""
    rng, n, heads = np.random.default_rng(3), 7, 4
    q, k, v = (rng.normal(size=(2, heads, n, d)) for d in (3, 3, 2))
    slopes, places = kvattn.alibi_slopes(heads, dtype="float64", backend="numpy"), np.arange(n, dtype=float)
    bias = -slopes[:, None, None] * abs(places[:, None] - places)
    expected = kvattn.attention(q, k, v, bias=bias, causal=True, backend="numpy")

    def alibi(query, key):
        near = query[..., -2:-1] * abs(query[..., -1:] - key[..., None, :, -1])
        return kvattn.scaled_dot_score(query[..., :-2], key[..., :-1]) - near

    def ended(x, *features):
        return np.concatenate([x, *(np.broadcast_to(f, (*x.shape[:-1], 1)) for f in features)], axis=-1)

    query, key = ended(q, slopes[:, None, None], places[:, None]), ended(k, places[:, None])
    query, key, value = (kvattn.asarray(x, backend=backend) for x in (query, key, v))
    output = kvattn.attention(query, key, value, score=alibi, causal=True)
    np.testing.assert_allclose(kvattn.to_numpy(output), expected, atol=1e-12)


def test_buckets_of_the_defaults_in_every_framework(backend):
    """Both sides of every edge: 8, 16, 32, 64 and 128 are powers, where logarithms round either way."""
    known = {
        0: 0,
        7: 7,
        8: 8,
        11: 8,
        12: 9,
        15: 9,
        16: 10,
        22: 10,
        23: 11,
        32: 12,
        45: 12,
        46: 13,
        64: 14,
        90: 14,
        91: 15,
        1000: 15,
    }
    places = kvattn.asarray(np.array([*known, *(-x for x in known)]), backend=backend)
    found = kvattn.relative_position_bucket(places)
    assert kvattn.to_numpy(found).tolist() == [*(x + 16 * (d > 0) for d, x in known.items()), *known.values()]
    behind = kvattn.relative_position_bucket(np.array([5, 1, 0, -3, -16]), bidirectional=False, backend=backend)
    assert kvattn.to_numpy(behind).tolist() == [0, 0, 0, 3, 16]


def test_the_farthest_distance_of_all_is_in_the_last_bucket():
    assert kvattn.relative_position_bucket(np.array([-(2**63), 2**63 - 1])).tolist() == [15, 31]


def test_buckets_of_a_backend_of_four_functions():
    numpy = kvattn.dispatch.load("numpy")
    four = SimpleNamespace(**{name: getattr(numpy, name) for name in kvattn.registry.REQUIRED})
    assert kvattn.relative_position_bucket([0, 1, 900], backend=four).tolist() == [0, 17, 31]


BAD = {
    "heads of 0": (lambda: kvattn.alibi_slopes(0), ValueError, "num_heads must be at least 1, not 0"),
    "heads that are no int": (lambda: kvattn.alibi_slopes(2.0), TypeError, "num_heads must be an int, not 2.0"),
    "distances that are floats": (lambda: kvattn.relative_position_bucket([1.0]), TypeError, "has dtype float64"),
    "distances that no int32 holds": (
        lambda: kvattn.relative_position_bucket([2**31]), ValueError, "2147483648 to 2147483648; expected int32"),
    "slopes that are integers": (lambda: kvattn.alibi_slopes(4, dtype="int32"), TypeError, "dtype must be one of float64"),
    "a dtype that is unknown": (lambda: kvattn.alibi_slopes(4, dtype="half"), TypeError, "dtype must be one of .*, not 'half'"),
    "no bucket": (lambda: kvattn.relative_position_bucket([1], num_buckets=2), ValueError, "num_buckets must be at least 4"),
    "too near": (lambda: kvattn.relative_position_bucket([1], max_distance=8), ValueError, "max_distance must be at least 9"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what):
    call, error, words = BAD[what]
    with pytest.raises(error, match=words):
        call()
