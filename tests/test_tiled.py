"""NumPy's large calls are worked through in tiles: the same numbers as all at once, in less memory.

Tiles of a few rows and blocks of a few keys put every edge within reach of small arrays.
"""

import math
import tracemalloc
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvattn
from kvattn import conformance
from kvattn.backends import numpy as tab
from kvattn.kernels import threads, tiled, tiled_grad, tiles

INF, NAN = np.inf, np.nan
WRT = ("query", "key", "value")
ALWAYS = {"TINY": 0, "SMALLEST": 0, "SMALLEST_ENTRY": 0}
SIZES = [  # of tiles and blocks
    {"ROWS": 4, "COLUMNS": 3, "LONGEST": 5, "EDGE": 2},
    {"ROWS": 2, "COLUMNS": 1, "LONGEST": 3, "EDGE": 1},
    {"ROWS": 3, "COLUMNS": 4, "LONGEST": 100, "EDGE": 3},
]


@contextmanager
def in_tiles(sizes=SIZES[0], workers=2):
    """Every call that tiles can serve is served by small ones; counts them."""
    served = []
    forward, backward = tiled.attention, tiled_grad.attention_grad

    def counted(function):
        return lambda *args, **options: served.append(function) or function(*args, **options)

    with (
        patch.multiple(tiles, **sizes), patch.multiple(tiled, **ALWAYS, attention=counted(forward)),
        patch.object(tiled_grad, "attention_grad", counted(backward)), patch.object(threads, "count", lambda: workers),
    ):  # fmt: skip
        yield served


@contextmanager
def all_at_once():
    with patch.multiple(tiled, SMALLEST=math.inf, SMALLEST_KEYS=math.inf):
        yield


def results(query, key, value, grad_output, **options):
    """Output, lse and gradients."""
    found = kvattn.attention(query, key, value, **options, return_lse=True, backend="numpy")
    alone = kvattn.attention(query, key, value, **options, backend="numpy")
    np.testing.assert_array_equal(alone, found[0])
    return (*found, *kvattn.attention_grad(query, key, value, grad_output, **options, backend="numpy"))


def draw(seed=0, lead=(2,), n=9, m=7, d=3, v=2, kv=None, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = (*lead, n, d), (*(kv or lead), m, d), (*(kv or lead), m, v), (*lead, n, v)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def same(arrays, sizes=SIZES[0], expected=None, loose=1.0, **options):
    """That tiles give what one piece gives in float64, to rounding."""
    wide = [x.astype(np.float64) for x in arrays]
    wide_options = {n: x.astype(np.float64) if n == "bias" else x for n, x in options.items()}
    with all_at_once():
        expected = results(*wide, **wide_options) if expected is None else expected
    with in_tiles(sizes) as served:
        found = results(*arrays, **options)
    assert len(served) >= (2 if options.get("softcap") else 3) or arrays[0].size == 0 or arrays[1].size == 0
    eps = np.finfo(arrays[0].dtype).eps
    for what, x, y in zip(("output", "lse", *WRT), found, expected, strict=True):
        assert x.shape == y.shape
        wide = np.float32 if eps > 1e-4 else arrays[0].dtype.newbyteorder("=")
        assert x.dtype == (wide if what == "lse" else arrays[0].dtype)
        size = max(1.0, abs(y[np.isfinite(y)]).max(initial=0))
        np.testing.assert_allclose(x.astype(np.float64), y, rtol=0, atol=float(loose * 64 * eps * size), err_msg=what)


# ---- edges


RESTRICTIONS = {
    "nothing": lambda n, m: {},
    "causal": lambda n, m: {"causal": True},
    "causal, from the end": lambda n, m: {"causal": True, "query_offset": m - n},
    "causal, before the start": lambda n, m: {"causal": True, "query_offset": -3},
    "causal, offset per batch": lambda n, m: {"causal": True, "query_offset": np.array([2, -1])},
    "window": lambda n, m: {"window": (1, 2)},
    "window, one side": lambda n, m: {"window": (None, 1), "query_offset": 1},
    "window, causal, offset per batch": lambda n, m: {"window": (3, 1), "causal": True, "query_offset": np.array([0, 4])},
    "lengths": lambda n, m: {"valid_lens": np.array([m // 2, m])},
    "lengths of 0": lambda n, m: {"valid_lens": np.array([0, 1])},
    "lengths per query": lambda n, m: {"valid_lens": np.arange(2 * n).reshape(2, n) % (m + 2)},
    "mask": lambda n, m: {"mask": np.arange(n * m).reshape(n, m) % 3 > 0},
    "mask of columns": lambda n, m: {"mask": np.arange(m) % 2 == 0},
    "mask of blocks": lambda n, m: {"mask": (np.arange(n)[:, None] // 4 + np.arange(m) // 3) % 2 == 0},
    "bias": lambda n, m: {"bias": np.linspace(-2, 2, n * m).reshape(n, m)},
    "bias -inf": lambda n, m: {"bias": np.where(np.arange(n * m).reshape(n, m) % 4 == 1, -INF, 0.5)},
    "softcap": lambda n, m: {"softcap": 0.7, "scale": 2.0},
    "all": lambda n, m: {
        "mask": np.arange(n * m).reshape(n, m) % 5 > 0, "bias": np.linspace(-1, 1, m), "causal": True, "window": (4, None),
        "query_offset": 1, "valid_lens": np.array([m - 1, m]),
    },
}  # fmt: skip


@pytest.mark.parametrize("which", RESTRICTIONS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (3, 2), (4, 3), (5, 4), (8, 6), (9, 7), (7, 1), (2, 11)])
def test_lengths_around_those_of_a_tile(n, m, which):
    for seed, sizes in enumerate(SIZES):
        same(draw(seed, n=n, m=m), sizes, **RESTRICTIONS[which](n, m))


@pytest.mark.parametrize("which", RESTRICTIONS)
@pytest.mark.parametrize(("lead", "kv"), [((2, 4), (2, 2)), ((2, 6), (2, 1)), ((2, 2, 2), (2, 1, 2)), ((2, 2), (1, 2))])
def test_heads_groups_and_batches(lead, kv, which):
    same(draw(1, lead=lead, kv=kv, n=5, m=4), SIZES[2], **RESTRICTIONS[which](5, 4))
    same(draw(2, lead=lead, kv=kv, n=2, m=3), {**SIZES[0], "ROWS": 64, "COLUMNS": 64}, **RESTRICTIONS[which](2, 3))


def test_two_and_three_axes():
    arrays = draw(lead=())
    same(arrays)
    same(arrays, causal=True, query_offset=np.array(2), valid_lens=np.array(5), mask=np.eye(9, 7, k=-1) == 0)
    same(arrays, valid_lens=np.arange(9) % 8)
    grouped = draw(lead=(4,), kv=(2,))
    same(grouped)
    same(grouped, valid_lens=np.array([0, 3, 7, 5]), mask=np.arange(4 * 9 * 7).reshape(4, 9, 7) % 3 > 0)
    same(grouped, causal=True, query_offset=np.array([0, 3, -2, 9]), bias=np.linspace(0, 1, 4 * 7).reshape(4, 1, 7))


def test_masks_of_every_shape():
    arrays = draw(lead=(2, 4), kv=(2, 2), n=5, m=4)
    rng = np.random.default_rng(0)
    for shape in ((2, 4, 5, 4), (4, 5, 4), (2, 1, 1, 4), (1, 4, 5, 1), (5, 1), (4,), ()):
        same(arrays, mask=rng.random(shape) < 0.6 if shape else np.array(True))
        same(arrays, bias=np.where(rng.random(shape) < 0.2, -INF, rng.standard_normal(shape)))


def test_no_keys_and_no_queries():
    query, key, value, grad = draw(m=0)
    output, lse = tiled.attention(query, key, value, 1.0, return_lse=True)
    assert (output == 0).all()
    assert (lse == -INF).all()
    grads = tiled_grad.attention_grad(query, key, value, grad, 1.0)
    assert [x.shape for x in grads] == [query.shape, key.shape, value.shape]
    assert not grads[0].any()
    query, key, value, grad = draw(n=0)
    assert tiled.attention(query, key, value, 1.0).shape == (2, 0, 2)
    assert not any(x.any() for x in tiled_grad.attention_grad(query, key, value, grad, 1.0)[1:])


def test_arrays_of_every_layout():
    query, key, value, grad = draw(lead=(2, 3))
    layouts = {
        "heads last but one": lambda x: np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2),
        "Fortran": np.asfortranarray,
        "every other": lambda x: np.repeat(np.repeat(x, 2, axis=-1), 2, axis=-2)[..., ::2, ::2],
        "backwards": lambda x: np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1],
        "big-endian": lambda x: x.astype(">f8"),
        "read-only": lambda x: np.broadcast_to(x, x.shape),
    }
    with all_at_once():
        expected = results(query, key, value, grad, causal=True)
    for layout in layouts.values():
        same([layout(x) for x in (query, key, value, grad)], expected=expected, causal=True)
    shared = [np.broadcast_to(x[:1, :1], x.shape) for x in (query, key, value)]
    same([*shared, grad], causal=True)
    same([query, np.broadcast_to(key[..., :1, :], key.shape), value, grad])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_narrower_dtypes(dtype):
    arrays = draw(lead=(2, 4), kv=(2, 2), dtype=dtype, d=8)
    for options in ({}, {"causal": True}, {"bias": np.linspace(-1, 1, 7).astype(dtype)}, {"softcap": 2.0}):
        same(arrays, **options)
    arrays = [*(x * 200 for x in arrays[:2]), *arrays[2:]]  # products beyond float16
    same(arrays, scale=2.0**-16)


def test_values_may_not_widen_the_batch():
    query, key, value, _ = draw(lead=(1, 2), kv=(1, 2))
    value = np.concatenate([value, -value])
    with patch.multiple(tiled, **ALWAYS):
        assert not tiled.serves(tab, query, key, value)
        assert tiled.serves(tab, query, key, value[:1])
    with in_tiles() as served:
        output = kvattn.attention(query, key, value)
    assert not served
    np.testing.assert_allclose(output[1], -output[0])


# ---- numbers


@pytest.mark.parametrize("size", [1e2, 1e4, -1e4])
@pytest.mark.parametrize("which", ["nothing", "causal", "mask", "bias -inf", "lengths of 0"])
def test_scores_that_need_their_maximum_taken_off(size, which):
    """One key's scores rise above or sink below the range of exp, in some rows only, in the first block or a later one."""
    for at in (0, 5):
        arrays = draw(n=9, m=7)
        arrays[1][:, at] *= size
        arrays[0][:, ::2] *= 0.01
        same(arrays, loose=abs(size), **RESTRICTIONS[which](9, 7))


def test_scores_far_below_zero_lose_nothing():
    query, key, value, grad = draw()
    bias = np.full((9, 7), -600.0)
    bias[2] = 500.0
    same([query, key, value, grad], bias=bias, loose=600)
    same([x.astype(np.float32) for x in (query, key, value, grad)], bias=bias.astype(np.float32), loose=600)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_near_the_largest_number_do_not_overflow(dtype):
    query, key, value, _ = draw(dtype=dtype)
    largest = np.finfo(dtype).max
    with in_tiles():
        output = kvattn.attention(query, key, np.full_like(value, largest / 2))
    np.testing.assert_allclose(output, largest / 2, rtol=1e-5)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["lengths", "lengths per query", "mask", "mask of columns", "causal", "window", "bias -inf"])
def test_what_nobody_sees_reaches_nothing(bad, which):
    options = RESTRICTIONS[which](9, 12)
    if which == "window":
        options["query_offset"] = 2
    clean = draw(n=9, m=12)
    dirty = [x.copy() for x in clean]
    weights = kvattn.attention(*clean[:3], **options, return_weights=True)[1]
    hidden, blind = ~(weights > 0).any(axis=-2), ~(weights > 0).any(axis=-1)
    dirty[1][hidden], dirty[2][hidden], dirty[0][blind] = bad, bad, bad
    for sizes in SIZES:
        with in_tiles(sizes):
            for x, y in zip(results(*dirty, **options), results(*clean, **options), strict=True):
                np.testing.assert_array_equal(x, y)


def test_a_key_that_one_row_of_a_tile_sees_is_hidden_from_other_tiles():
    query, key, value, grad = draw(lead=(), n=8, m=8)
    mask = np.eye(8, dtype=bool)
    key[7], value[7] = NAN, NAN
    with in_tiles():
        found = results(query, key, value, grad, mask=mask)
    assert np.isnan(found[0][7]).all()
    assert np.isfinite(found[0][:4]).all()


def test_nan_that_is_seen_is_not_lost():
    query, key, value, _ = draw(lead=(), n=9, m=7)
    key[3, 0] = NAN
    with in_tiles():
        output, lse = kvattn.attention(query, key, value, return_lse=True, causal=True)
    assert np.isnan(output[3:]).all()
    assert np.isnan(lse[3:]).all()
    assert np.isfinite(output[:3]).all()


def test_infinite_scores_stay_where_they_are():
    query, key, value, _ = draw(lead=(), n=9, m=7)
    query[4] = 1e200
    key[5] = 1e200
    with in_tiles(), all_at_once(), np.errstate(all="ignore"):
        expected = kvattn.attention(query, key, value)
    with in_tiles():
        found = kvattn.attention(query, key, value)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))


def test_nothing_is_warned_of():
    arrays = draw()
    arrays[0][0] *= 1e300
    with in_tiles(), np.errstate(all="raise"):
        results(*arrays, valid_lens=np.array([0, 3]))


def test_arguments_are_not_written_to():
    arrays = draw(lead=(2, 2))
    options = RESTRICTIONS["all"](9, 7) | {"softcap": 2.0}
    given = [*arrays, *(x for x in options.values() if isinstance(x, np.ndarray))]
    before = [x.copy() for x in given]
    with in_tiles():
        results(*arrays, **options)
    for x, y in zip(given, before, strict=True):
        np.testing.assert_array_equal(x, y)


# ---- any call


@st.composite
def calls(draw_):
    leads = [((), ()), ((3,), (3,)), ((4,), (2,)), ((2, 4), (2, 2)), ((2, 2), (1, 1)), ((1, 2, 2), (2, 2, 1))]
    lead, kv = draw_(st.sampled_from(leads))
    n, m = draw_(st.integers(1, 10)), draw_(st.integers(1, 10))
    rng = np.random.default_rng(draw_(st.integers(0, 2**32)))
    arrays = [
        draw_(st.sampled_from((0.1, 1.0, 30.0))) * rng.standard_normal((*lead, n, 2)), rng.standard_normal((*kv, m, 2)),
        rng.standard_normal((*kv, m, 3)),
    ]  # fmt: skip
    full = (*(max(a, b) for a, b in zip(lead[:-1], kv[:-1], strict=True)), *lead[-1:], n, m)
    options, batch = {"causal": draw_(st.booleans())}, full[:-2][:1]

    def some(full):
        return tuple(draw_(st.sampled_from((1, size))) for size in full[draw_(st.integers(0, len(full) - 1)) :])

    if draw_(st.booleans()):
        options["mask"] = rng.random(some(full)) < draw_(st.sampled_from((0.2, 0.9)))
    if draw_(st.booleans()):
        shape = some(full)
        options["bias"] = np.where(rng.random(shape) < 0.2, -INF, rng.standard_normal(shape))
    if draw_(st.booleans()):
        options["valid_lens"] = rng.integers(0, m + 3, draw_(st.sampled_from((batch, (*batch, n)))))
    options["query_offset"] = rng.integers(-4, m + 2, batch) if batch and draw_(st.booleans()) else draw_(st.integers(-12, 12))
    options["window"] = draw_(st.sampled_from((None, 0, 2, (1, None), (None, 1), (0, 5))))
    options["scale"] = draw_(st.sampled_from((None, 1.0, -0.5, 0.0)))
    grad_output = rng.standard_normal((*full[:-1], 3))
    return [*arrays, grad_output], options


@given(call=calls(), sizes=st.sampled_from(SIZES), workers=st.integers(1, 3))
def test_any_call(call, sizes, workers):
    arrays, options = call
    with all_at_once():
        expected = results(*arrays, **options)
    with in_tiles(sizes, workers):
        found = results(*arrays, **options)
    bias = np.nan_to_num(options.get("bias", np.zeros(1)), neginf=0)
    size = 1 + 2 * abs(arrays[0]).max() * abs(arrays[1]).max() + abs(bias).max()
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        most = max(1.0, abs(y[np.isfinite(y)]).max(initial=0))
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-14 * float(size * most))


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: " x ".join(map(str, sizes.values())))
def test_the_conformance_suite(sizes):
    with in_tiles(sizes) as served:
        report = conformance.run("numpy", dtypes=("float64", "float32", "float16"))
    assert not report.failures, "\n".join(result.message for result in report.failures)
    assert len(served) > 900
    assert {function.__name__ for function in served} == {"attention", "attention_grad"}


# ---- memory


def peak(call):
    """Bytes that ``call`` had at most."""
    call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("which", ["nothing", "causal", "window", "lengths per query", "bias of keys"])
def test_memory_beyond_the_output_is_a_few_tiles(which):
    n = 3000
    arrays = draw(lead=(2,), n=n, m=n, d=16, v=16, dtype=np.float32)
    options = RESTRICTIONS[which](n, n) if which in RESTRICTIONS else {"bias": np.zeros(n, np.float32)}
    scores, inputs = 4 * 2 * n * n, sum(x.nbytes for x in arrays[:3])
    few = 2 * threads.count() * 4 * 2**20
    assert peak(lambda: kvattn.attention(*arrays[:3], **options)) < inputs + few < scores / 3
    assert peak(lambda: kvattn.attention_grad(*arrays, **options)) < 4 * inputs + few


def test_memory_of_gradients_grows_with_the_length():
    def needed(n):
        arrays = draw(lead=(1,), n=n, m=n, d=8, v=8, dtype=np.float32)
        return peak(lambda: kvattn.attention_grad(*arrays)), sum(x.nbytes for x in arrays[:3])

    with patch.multiple(tiles, ROWS=64, COLUMNS=64, EDGE=32):
        (short, _), (long, inputs) = needed(1024), needed(4096)
    assert long < 4.5 * short
    assert long < 4 * inputs


# ---- the condition


def test_which_calls_tiles_serve():
    query, key, value, _ = draw(lead=(2,), n=300, m=300, dtype=np.float32)
    serves = partial(tiled.serves, tab, query, key, value)
    assert serves()
    assert serves(score=tab.dot_score, normalize=tab.masked_softmax, mask=np.array(True), softcap=1.0)
    assert not serves(score=tab.distance_score)
    assert not serves(score=partial(tab.dot_score))
    assert not serves(normalize=tab.sparsemax)
    assert not serves(dropout=0.1)
    assert not serves(return_weights=True)
    assert tiled_grad.serves(tab, query, key, value, WRT, causal=True)
    assert not tiled_grad.serves(tab, query, key, value, ("bias",))
    assert not tiled_grad.serves(tab, query, key, value, WRT, softcap=1.0)


def test_small_calls_are_left_to_the_tab_but_for_those_that_would_copy_many_keys():
    query, key, value, _ = draw(lead=(2,), n=50, m=300)
    assert not tiled.serves(tab, query, key, value)
    entries = [np.ones((2000, 1, 10, 2))] * 3
    assert not tiled.serves(tab, *entries)
    long = np.ones((1, 2, 4096, 64))
    assert not tiled.serves(tab, long[..., :1, :], long, long)
    assert tiled.serves(tab, long[..., :1, :], long, long, valid_lens=np.array([9]))


def test_both_bases_of_the_exponential():
    for exp, log, unit in ((np.exp, np.log, 1.0), (np.exp2, np.log2, math.log2(math.e))):
        base = {"EXP": exp, "UNIT": unit}
        with patch.multiple(tiles, **base), patch.multiple(tiled, **base, LOG=log), patch.multiple(tiled_grad, **base):
            for which in ("causal", "bias -inf", "softcap"):
                same(draw(), **RESTRICTIONS[which](9, 7))
