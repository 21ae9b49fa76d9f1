"""What is said of pairs by where they stand, in blocks: the same answers as of one mask and one bias, whatever is cut where."""

import doctest
import math
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from paired import past

import kvattn
from kvattn import conversion, pairs, partition, planning, positions
from kvattn.conformance import check, native, position_functions
from kvattn.partition import Part

SMALL = {"FEW": 0, "BLOCK": 2, "FLAGS_AT_ONCE": 12, "WHOLE_MASK": 0, "GAP": 1, "SHORT_SEGMENT": 2, "BIAS": 24}
SLOW = {"jax": 7, "tensorflow": 4, "mxnet": 3}  # of so many cases one: each block is a program, or waits for an engine


@contextmanager
def in_blocks(**more):
    with patch.multiple(partition, **SMALL, **more):
        yield


def test_every_case_of_functions_and_segments_in_small_blocks(backend):
    cases = [*position_functions.cases(np.random.default_rng(1))]
    cases = cases[:: SLOW.get(backend, 1)]
    with in_blocks():
        report = check.run(backend, cases, dtypes=("float64",))
    assert [x.message for x in report.failures] == []


def _of_the_first_rows(self, query, key, offset, rows, runs, _of=pairs.Pairs.places):
    return _of(self, query, key, offset, (0, rows[1]), runs)


def _of_the_first_keys(self, query, key, offset, rows, runs, _of=pairs.Pairs.places):
    return _of(self, query, key, offset, rows, runs and [(0, sum(last - first for first, last in runs))])


def _one_less(flags, start, call, _of=partition._narrowed):
    part = _of(flags, start, call)
    return part._replace(runs=tuple((first, max(first, last - 1)) for first, last in part.runs))


def _one_more(windows, m, _of=pairs.one_window):
    window = _of(windows, m)
    return window and (window[0], window[1] and window[1] + 1)


def _one_further(*arguments, _of=pairs.window_of):
    window = _of(*arguments)
    return window and (window[0] and window[0] + 1, window[1] and window[1] + 1)


def _without_restrictions(parts, *arguments, _of=partition.cut):
    return _of([part._replace(restricted=False) for part in parts], *arguments)


def _of_the_first_entry(which, *arrays, _of=partition._of_entries):
    first = _of((0, which[1] - which[0]), *arrays)
    return (*arrays[:3], arrays[3]) if arrays[0].shape[0] == 1 else first


BROKEN = {  # what a block may get wrong
    "each block stands where the first does": ("pairs.Pairs.places", _of_the_first_rows),
    "the keys of each block begin at 0": ("pairs.Pairs.places", _of_the_first_keys),
    "a function is forgotten beside a mask": ("pairs.both", lambda mask, other: other if mask is None else mask),
    "a key too few": ("partition._narrowed", _one_less),
    "a window that is wider": ("pairs.one_window", _one_more),
    "a window of distances that is wider": ("pairs.window_of", _one_further),
    "what is restricted is taken as allowed": ("partition.cut", _without_restrictions),
    "each entry is the first": ("partition._of_entries", _of_the_first_entry),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_cases_tell_of_a_fault(what):
    """Of what all tabs share: run once."""
    name, fault = BROKEN[what]
    where, _, name = name.rpartition(".")
    where = {"pairs": pairs, "pairs.Pairs": pairs.Pairs, "partition": partition}[where]
    cases = [*position_functions.cases(np.random.default_rng(1))]
    with in_blocks(), patch.object(where, name, fault):
        assert check.run("numpy", cases, dtypes=("float64",)).failures


SAID = {  # a mask by positions, its array, and what is made of it
    "causal": (lambda q, k: k <= q, "a window"),
    "a window": (lambda q, k: past(k - q - 3) + past(q - k - 39) == 0, "a window"),
    "causal after a prefix": (lambda q, k: past(k - q) * past(k - 200) == 0, "blocks"),
    "a window, and a first key for all": (lambda q, k: past(k - q) + k * past(q - k - 39) == 0, "blocks"),
    "later keys": (lambda q, k: k > q + 500, "blocks"),
    "a block on the diagonal": (lambda q, k: past(q - 299) + past(k - 299) == 0, "blocks"),
    "everything": (lambda q, k: k * q >= 0, "arrays"),
}


@pytest.mark.parametrize("name", SAID)
def test_a_function_gives_what_its_array_gives(backend, tab, name):
    mask, what = SAID[name]
    rng = np.random.default_rng(0)
    query, key, value = (tab.asarray(rng.standard_normal((1, 2, 600, 8))) for _ in range(3))
    whole = tab.asarray(np.broadcast_to(mask(np.arange(600)[:, None], np.arange(600)), (600, 600)))
    with patch.multiple(partition, FEW=0):
        found = kvattn.explain(query, key, value, mask=mask)
        got = kvattn.attention(query, key, value, mask=mask)
    assert what in f"{found.kernel}, {found.why}" or what == "arrays", found
    want = kvattn.to_numpy(kvattn.attention(query, key, value, mask=whole))
    np.testing.assert_allclose(kvattn.to_numpy(got), want, atol=1e-13)


def test_few_positions_are_asked_where_they_tell_of_all(backend, tab):
    """Of a window, distances; of what else is integers and bools, NumPy's, which plans no operations."""
    x, asked = tab.asarray(np.zeros((1, 1, 400, 8))), []

    def window(q, k):
        asked.append(math.prod((q - k).shape))
        return past(k - q) + past(q - k - 39) == 0

    def prefix(q, k):
        asked.append(type(q))
        return past(k - q) * past(k - 200) == 0

    with patch.multiple(partition, FEW=0):
        found = kvattn.explain(x, x, x, mask=window)
        assert "a window" in found.why
        assert sum(asked) <= 1600  # n + m - 1 distances, and the keys beside the first query and the last
        asked.clear()
        kvattn.attention(x, x, x, mask=prefix)
    own = type(tab.places(x))
    assert asked.count(own) <= 1 or own is np.ndarray


def test_a_window_is_asked_for_once_where_nothing_can_change_it(backend, tab):
    x, asked, limits = tab.asarray(np.random.default_rng(0).standard_normal((1, 1, 300, 4))), [], [40]

    def of_distances(*arguments, _of=positions.of_distances):
        asked.append(None)
        return _of(*arguments)

    def asks(mask, left, offset=0):
        asked.clear()
        got, want = (
            kvattn.to_numpy(kvattn.attention(x, x, x, query_offset=offset, **how))
            for how in ({"mask": mask}, {"window": (left, None)})
        )
        np.testing.assert_allclose(got, want, atol=1e-13)
        return bool(asked)

    def back(left):
        return lambda q, k: q - k <= left

    with (
        patch.multiple(partition, FEW=0),
        patch.multiple(pairs, _windows={}),
        patch.object(positions, "of_distances", of_distances),
    ):
        assert asks(back(40), 40)
        assert not asks(back(40), 40)
        assert asks(back(30), 30)
        assert asks(back(40), 40, offset=7)
        assert asks(lambda q, k, left=40: q - k <= left, 40)
        assert asks(lambda q, k: q - k <= limits[0], 40)
        limits[0] = 30
        assert asks(lambda q, k: q - k <= limits[0], 30)
        for _ in range(2):
            assert asks(lambda q, k: past(q - k - 40) == 0, 40)  # a name may be another function the next time


CALLS = {
    "alone": {},
    "causal": {"causal": True},
    "a window": {"window": (40, 9), "query_offset": 30},
    "a window function": {"mask": lambda q, k: past(k - q) + past(q - k - 39) == 0},
    "some see nobody": {"window": (5, 5), "query_offset": 500},
    "before all keys": {"causal": True, "query_offset": -50},
    "lengths": {"valid_lens": [200]},
    "a sink": {"sink": 0.5, "causal": True},
    "the lse": {"return_lse": True},
    "another mask": {"mask": lambda q, k: past(k - q) * past(k - 200) == 0},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_bias_by_distance_is_no_array_of_pairs(backend, tab, name):
    rng, options, asked = np.random.default_rng(0), CALLS[name], []
    query, key, value = (tab.asarray(rng.standard_normal((1, h, 520, 8))) for h in (4, 2, 2))
    ahead = np.arange(520) - np.arange(520)[:, None] - options.get("query_offset", 0)
    slopes = 0.5 ** np.arange(1, 5)[:, None, None]
    own = tab.asarray(slopes)

    def bias(q, k):
        asked.append(math.prod((k - q).shape))
        return -own * tab.asarray(abs(k - q), dtype="float64")

    def attend(bias):
        found = kvattn.attention(query, key, value, bias=bias, **options)
        return [kvattn.to_numpy(x) for x in (found if isinstance(found, tuple) else (found,))]

    for got, want in zip(attend(bias), attend(tab.asarray(-slopes * abs(ahead))), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-13)
    if name in ("alone", "causal", "a window", "a window function"):
        assert max(asked) == 1040  # of all distances, and of the keys beside the first query and the last


@pytest.mark.parametrize("forbidden", [-math.inf, math.nan])
def test_a_bias_by_distance_may_forbid_or_be_no_number(backend, tab, forbidden):
    rng = np.random.default_rng(0)
    query, key, value = (tab.asarray(rng.standard_normal((1, 2, 290, 8))) for _ in range(3))
    line = rng.standard_normal(579)
    line[[3, 288]] = forbidden
    own = tab.asarray(line)
    whole = tab.asarray(line[np.arange(290) - np.arange(290)[:, None] + 289])
    bias = lambda q, k: tab.asarray(kvattn.to_numpy(own)[kvattn.to_numpy(k - q) + 289])  # noqa: E731
    got, want = (kvattn.to_numpy(kvattn.attention(query, key, value, bias=x)) for x in (bias, whole))
    np.testing.assert_allclose(got, want, atol=1e-13)


def test_what_a_mask_function_reads_is_read_in_its_framework(backend, tab):
    own = tab.asarray(np.array([[30]]), dtype=conversion.dtype_name(tab.places(tab.asarray(np.zeros((1, 1))))))
    rng = np.random.default_rng(0)
    query, key, value = (tab.asarray(rng.standard_normal((1, 2, 300, 4))) for _ in range(3))
    places = np.arange(300)
    ahead = places - places[:, None]
    said = {
        "a window": (lambda q, k: past(k - q) + past(q - k + 1 - own) == 0, (ahead <= 0) & (ahead > -30)),
        "some keys": (lambda q, k: k < own, ahead * 0 + places < 30),
        "halves": (lambda q, k: q / 2 < k / 2, places[:, None] < places),
    }
    with patch.multiple(partition, FEW=0):
        for mask, whole in said.values():
            got = kvattn.attention(query, key, value, mask=mask)
            want = kvattn.to_numpy(kvattn.attention(query, key, value, mask=tab.asarray(whole)))
            np.testing.assert_allclose(kvattn.to_numpy(got), want, atol=1e-13)


def resolved(n, m, **options):
    """What a call of these options becomes: the call, and its parts."""
    made, original = [], partition.resolved

    def resolve(*arguments):
        made.append(original(*arguments))
        return made[-1]

    with patch.object(partition, "resolved", resolve):
        kvattn.explain(np.zeros((2, 2, n, 4)), np.zeros((2, 2, m, 4)), np.zeros((2, 2, m, 4)), backend="numpy", **options)
    return made[0]


def test_a_window_is_seen_and_joins_the_window_that_is_given():
    call, parts = resolved(700, 700, mask=lambda q, k: k <= q)
    assert (call.left, call.right, call.mask, [*parts]) == (None, 0, None, [])
    call, parts = resolved(700, 900, mask=lambda q, k: (k <= q) * (q - k <= 30), window=(50, None), query_offset=100)
    assert (call.left, call.right, call.mask) == (30, 0, None)
    call, parts = resolved(700, 900, mask=lambda q, k: (k <= q) * ((k < 699) + (q < 700) > 0), query_offset=100)
    assert call.left is call.right is None  # but for one key, of the last queries


def test_what_nobody_may_attend_to_is_left_out_and_what_all_may_has_no_mask():
    _, parts = resolved(1024, 1024, mask=lambda q, k: (q < 512) * (k < 256) + (q >= 768) * (k >= 700) > 0)
    assert [*parts] == [
        Part(0, 256, ((0, 256),), False), Part(256, 512, ((0, 256),), False), Part(512, 768, ((0, 0),), False),
        Part(768, 1024, ((700, 1024),), False),
    ]  # fmt: skip
    _, parts = resolved(1024, 1024, mask=lambda q, k: (k < 100) + (k >= 900) > 0)
    assert {part.runs for part in parts} == {((0, 100), (900, 1024))}


def test_sorted_segments_cost_the_sum_of_their_squares():
    ids = np.repeat([[3, 1, 2, 7]], [300, 100, 200, 424], axis=1).repeat(2, axis=0)
    _, parts = resolved(1024, 1024, segments=ids)
    runs = [(0, 300), (300, 400), (400, 600), (600, 1024)]
    assert [*parts] == [Part(*run, (run,), False) for run in runs]
    ids[1] = 5
    _, parts = resolved(1024, 1024, segments=ids)
    assert [part.entries for part in parts] == [(0, 1)] * 4 + [(1, 2)]
    of_keys = np.repeat([[7, 3, 2]], [500, 24, 500], axis=1).repeat(2, axis=0)
    ids[1] = ids[0]
    _, parts = resolved(1024, 1024, segments=(ids, of_keys))
    assert [part.runs for part in parts] == [((500, 524),), ((0, 0),), ((524, 1024),), ((0, 500),)]
    short = np.arange(1024)[None].repeat(2, axis=0) // 10
    _, parts = resolved(1024, 1024, segments=short)
    assert all(part.restricted for part in parts)
    assert all(64 <= part.end - part.start < 80 for part in parts[:-1])


def test_a_bias_by_positions_exists_a_block_at_a_time(backend, tab):
    sizes = []

    def bias(q, k):
        sizes.append(q.shape[0] * k.shape[1])
        return tab.asarray(-abs(q - k), dtype="float64") * 0.5

    rng = np.random.default_rng(0)
    query, key, value = (tab.asarray(rng.standard_normal((1, 2, 300, 4))) for _ in range(3))
    places = np.arange(300)
    whole = tab.asarray(-0.5 * abs(places[:, None] - places))
    with patch.multiple(partition, FEW=0, BIAS=50_000):
        got = kvattn.attention(query, key, value, bias=bias, window=100)
    assert max(sizes) <= 25_000
    want = kvattn.to_numpy(kvattn.attention(query, key, value, bias=whole, window=100))
    np.testing.assert_allclose(kvattn.to_numpy(got), want, atol=1e-13)


def test_blocks_whose_keys_go_back_are_cut_where_they_lie():
    blocks = [(i, i + 2, (9 - i) % 10, (9 - i) % 10 + 3) for i in range(0, 20, 2)]
    x, keys = np.arange(20.0)[:, None], np.arange(13.0)[:, None]
    where = dict.fromkeys(("mask", "bias", "valid_lens", "sink")) | {"query_offset": 0}
    for (i, j, k, l), ((q, found, _), at) in zip(blocks, planning.cut(blocks, x, keys, keys, **where), strict=True):
        np.testing.assert_array_equal(q, x[i:j])
        np.testing.assert_array_equal(found, keys[k:l])
        assert at["query_offset"] == i - k


def test_a_function_may_know_the_entries_of_the_batch_beside_segments_that_differ(backend, tab):
    rng = np.random.default_rng(0)
    query, key, value = (tab.asarray(rng.standard_normal((3, 2, 5, 4))) for _ in range(3))
    ids, ends = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 2], [0, 0, 0, 0, 2]]), np.array([3, 2, 4])[:, None, None, None]
    own, offset = tab.asarray(ends, dtype=conversion.dtype_name(tab.places(query))), np.array([0, 1, 2])
    got = kvattn.attention(query, key, value, mask=lambda q, k: k - q < own, segments=ids, query_offset=offset)
    ahead = np.arange(5) - (np.arange(5)[:, None] + offset[:, None, None, None])
    whole = (ids[:, None, :, None] == ids[:, None, None]) & (ahead < ends)
    want = kvattn.to_numpy(kvattn.attention(query, key, value, mask=tab.asarray(whole)))
    np.testing.assert_allclose(kvattn.to_numpy(got), want, atol=1e-13)


def test_functions_of_heads_beside_projections_where_something_is_not_finite(backend, tab):
    """Rows that meet nobody are hidden before they are projected, when there are no heads yet."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 6))
    x[0, 3, 1] = np.nan
    x, lens = tab.asarray(x), np.array([3, 4])
    params = {f"W_{name}": tab.asarray(rng.standard_normal((6, 6))) for name in "qkvo"}
    slopes, ahead = np.array([0.5, 0.25])[:, None, None], abs(np.arange(4)[:, None] - np.arange(4))
    own = tab.asarray(slopes)
    said = {"bias": lambda q, k: -own * tab.asarray(abs(q - k), dtype="float64"), "num_heads": 2, "valid_lens": lens}
    whole = {**said, "bias": tab.asarray(-slopes * ahead)}
    got, want = (kvattn.to_numpy(kvattn.multi_head_attention(x, x, x, params, **how)) for how in (said, whole))
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert np.isfinite(want[1]).all()


def test_what_segments_and_functions_hide_reaches_no_weight_of_a_layer(backend, tab):
    rng = np.random.default_rng(0)
    query, key, grad = (rng.standard_normal((2, 4, 6)) for _ in range(3))
    key[1, 3, 2] = np.nan
    weights = {f"W_{name}": rng.standard_normal((6, 6)) for name in "qkvo"}
    slopes = kvattn.asarray(np.array([0.5, 0.25])[:, None, None], dtype="float32", backend=tab)
    bias = lambda q, k: -slopes * kvattn.asarray(abs(q - k), dtype="float32", backend=tab)  # noqa: E731
    segments = np.zeros((2, 4), int), np.array([[0, 0, 1, 1], [0, 0, 0, 9]])
    config = {"num_hiddens": 6, "num_heads": 2, "num_kv_heads": 2, "bias": False}
    inputs = [query, key, key]
    for how in ({"segments": segments}, {"mask": lambda q, k: k < 3, "bias": bias}):
        found = native.run(tab, "MultiHeadAttention", config, weights, inputs, dtype="float32", grad_output=grad, **how)
        assert all(np.isfinite(kvattn.to_numpy(x)).all() for x in (*found[0], *found[1], *found[2].values()))


def test_a_backend_without_places_is_given_the_positions_that_a_cache_tells():
    tab = kvattn.dispatch.load("numpy")
    other = SimpleNamespace(**{name: x for name, x in vars(tab).items() if name != "places"})
    rng = np.random.default_rng(0)
    x, params = rng.standard_normal((2, 4, 6)), {f"W_{name}": rng.standard_normal((6, 6)) for name in "qkvo"}
    how = {"num_heads": 2, "mask": lambda q, k: (k <= q) * (q - k < 2), "bias": lambda q, k: abs(q - k) * -0.5}
    want, cache, got = kvattn.multi_head_attention(x, x, x, params, **how), kvattn.KVCache(), []
    for i in range(4):
        output, cache = kvattn.multi_head_attention(*[x[:, i : i + 1]] * 3, params, cache=cache, backend=other, **how)
        got.append(output)
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=1e-12)


def test_the_examples_of_the_page():
    page = Path(__file__).parent.parent / "docs" / "reference" / "semantics.md"
    found = doctest.testfile(str(page), module_relative=False)
    assert found.attempted > 10
    assert not found.failed


def test_segments_of_where_sequences_begin(backend, tab):
    ends = tab.asarray(np.array([0, 2, 2, 5], "int32"))
    found = kvattn.segments_from_cu_seqlens(ends, 7)
    assert tab.is_array(found)
    assert kvattn.to_numpy(found).tolist() == [0, 0, 2, 2, 2, 3, 3]
    assert kvattn.to_numpy(kvattn.segments_from_cu_seqlens([0], 2, backend=backend)).tolist() == [0, 0]
    for wrong, words in (([1, 2], "begin with 0"), ([0, 3, 2], "never decrease"), ([[0, 1]], "sequences"), ([], "shape")):
        with pytest.raises((ValueError, TypeError), match=words):
            kvattn.segments_from_cu_seqlens(np.array(wrong, int), backend=backend)
    with pytest.raises(ValueError, match="length must be at least 5"):
        kvattn.segments_from_cu_seqlens([0, 5], 4, backend=backend)


def test_segments_of_queries_and_keys_may_be_lists_without_a_batch():
    query, key = np.ones((4, 3)), np.arange(15.0).reshape(5, 3)
    ids = [0, 0, 1, 1], [0, 1, 1, 1, 0]
    want = kvattn.attention(query, key, key, segments=tuple(map(np.array, ids)))
    assert (kvattn.attention(query, key, key, segments=ids) == want).all()
    want = kvattn.attention(query, query, query, segments=np.array(ids[0]))
    assert (kvattn.attention(query, query, query, segments=[ids[0], ids[0]]) == want).all()


def test_positions_are_wide_where_a_product_of_two_would_not_fit():
    seen = []
    x = np.zeros((1, 8))
    for offset in (0, 46_000, 50_000, -50_000):
        kvattn.attention(x, x, x, mask=lambda q, k: seen.append((q.dtype, int(q[0, 0]))) or k * q >= 0, query_offset=offset)
    assert seen == [("int32", 0), ("int32", 46_000), ("int64", 50_000), ("int64", -50_000)]


def _by_size(query, key):
    ahead = key - query
    return -abs(ahead) / ahead.shape[-1]


def _by_class(query, key):
    return (key - query) * (0.5 if isinstance(query, np.ndarray) else 0.25)


@pytest.mark.parametrize("function", [_by_size, _by_class])
def test_functions_that_look_at_more_than_numbers_are_asked_with_arrays(function):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 300, 3))
    positions = np.arange(300)[:, None], np.arange(300)[None]
    want = kvattn.attention(x, x, x, bias=function(*positions), mask=function(*positions) < 0.1)
    found = kvattn.attention(x, x, x, bias=function, mask=lambda q, k: function(q, k) < 0.1)
    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("offset", [np.array(70_000), np.array([70_000, 2**33])])
def test_offsets_that_are_arrays_make_wide_positions(offset):
    rng = np.random.default_rng(0)
    x, key = rng.normal(size=(2, 1, 3)), rng.normal(size=(2, 40_000, 3))
    position, keys = offset.reshape(-1, 1, 1), np.arange(40_000)
    want = kvattn.attention(x, key, key, mask=position * keys % 7 < 3)
    found = kvattn.attention(x, key, key, mask=lambda q, k: q * k % 7 < 3, query_offset=offset)
    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-12)


def _and(query, key):
    return (key <= query) and (key > 1)


def _if(query, key):
    return key <= query if query < 5 else key > 1


UNFIT = {  # functions that are none of arrays of positions, and the cure that is told
    "one argument": (lambda query: query > 1, r"must take \(query, key\), arrays of positions"),
    "three arguments": (lambda query, key, head: key > query, r"must take \(query, key\), arrays of positions"),
    "and": (_and, "_and, asks whether an array is true.* instead of `and`"),
    "if": (_if, r"_if, asks whether an array is true; it is given integer arrays of query positions \(4, 1\)"),
    "a chain": (lambda query, key: 0 <= query - key < 3, "asks whether an array is true"),
}


@pytest.mark.parametrize("name", ["mask", "bias"])
@pytest.mark.parametrize("unfit", UNFIT)
def test_a_function_that_is_none_of_arrays_is_told_so(backend, tab, unfit, name):
    function, words = UNFIT[unfit]
    x = tab.asarray(np.ones((2, 4, 8)), dtype="float32")
    with pytest.raises(TypeError, match=f"{name}, .*{words}") as caught:
        kvattn.attention(x, x, x, **{name: function})
    if "argument" not in unfit:  # the function's own line is among the tracebacks
        own = caught.value.__cause__
        while own.__traceback__.tb_next is not None and own.__traceback__.tb_frame.f_code is not function.__code__:
            own = own.with_traceback(own.__traceback__.tb_next)
        assert own.__traceback__.tb_frame.f_code is function.__code__


def test_a_functions_own_error_is_raised_as_it_is(backend, tab):
    x = tab.asarray(np.ones((2, 4, 8)), dtype="float32")
    for name in ("mask", "bias"):
        with pytest.raises(ZeroDivisionError) as caught:
            kvattn.attention(x, x, x, **{name: lambda query, key: 1 / 0})
        assert any(entry.name == "<lambda>" for entry in caught.traceback)
