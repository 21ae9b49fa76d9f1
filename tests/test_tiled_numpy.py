"""What is NumPy's own in its tiles: layouts, floating-point warnings, memory, and which calls they serve.

What every backend's fast path promises is in test_tiled.py.
"""

import math
import tracemalloc
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
from tiling import ARRAYS, RESTRICTIONS, all_at_once, cached, draw, in_tiles, judge, right, subject, with_arrays

import kvattn
from kvattn.backends import numpy as tab
from kvattn.call import Call
from kvattn.kernels.numpy import threads, tiled, tiled_grad, tiles

SUBJECT = subject("numpy")


def results(query, key, value, grad_output, **options):
    """Output, lse and gradients."""
    found = kvattn.attention(query, key, value, **options, return_lse=True, backend="numpy")
    alone = kvattn.attention(query, key, value, **options, backend="numpy")
    np.testing.assert_array_equal(alone, found[0])
    return (*found, *kvattn.attention_grad(query, key, value, grad_output, **options, backend="numpy"))


# ---- arrays


def test_no_keys_and_no_queries():
    query, key, value, grad = draw(m=0)
    call = Call.of(query, key, score=tab.dot_score, normalize=tab.softmax, causal=False, window=None, query_offset=0)
    output, lse = tiled.attention(query, key, value, call._replace(return_lse=True))
    assert (output == 0).all()
    assert (lse == -np.inf).all()
    grads = tiled_grad.attention_grad(query, key, value, grad, call)
    assert [x.shape for x in grads] == [query.shape, key.shape, value.shape]
    assert not grads[0].any()
    query, key, value, grad = draw(n=0)
    assert tiled.attention(query, key, value, call).shape == (2, 0, 2)
    assert not any(x.any() for x in tiled_grad.attention_grad(query, key, value, grad, call)[1:])


def test_layouts_that_no_other_framework_has():
    layouts = {
        "backwards": lambda x: np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1],
        "big-endian": lambda x: x.astype(">f8"),
        "writeable": np.copy,  # as the table's own arrays are not
    }
    case = cached("causal", lead=(2, 3))
    for layout in layouts.values():
        laid = with_arrays(case, **{name: layout(case.arguments[name]) for name in ARRAYS})
        for sizes in SUBJECT.few:
            with SUBJECT.forced(sizes) as served:
                found = SUBJECT.found(laid, array=SUBJECT.laid)
            assert served
            assert {x.dtype for x in found.values()} == {np.dtype("float64")}  # of this machine's byte order
            judge(case, "float64", found)


@pytest.mark.parametrize("which", RESTRICTIONS)
def test_small_heads_share_a_tile(which):
    large = {"sizes": {**SUBJECT.sizes["4 by 3"]["sizes"], "ROWS": 64, "COLUMNS": 64}}
    for lead, kv in (((2, 4), (2, 2)), ((2, 6), (2, 1)), ((2, 2, 2), (2, 1, 2)), ((2, 2), (1, 2))):
        right(SUBJECT, cached(which, 2, 3, lead=lead, kv=kv), [large])


def test_a_triangle_is_kept_for_blocks_of_its_form_alone():
    buffers = {}
    for side, compare in (("right", np.less_equal), ("left", np.greater_equal)):
        for rows, columns, shift in ((2, 3, 0), (2, 3, 1), (2, 3, 1), (3, 2, 1), (2, 3, -1)):
            row, column = np.ogrid[:rows, :columns]
            kept = tiles._triangle(side, rows, columns, shift, np.dtype(np.int32), buffers)
            np.testing.assert_array_equal(kept, np.where(compare(column - row, shift), -1, 0))


def test_what_blas_takes_is_not_copied_and_what_it_does_not_take_is():
    x = np.arange(2 * 6 * 8.0).reshape(2, 6, 8)
    for taken in (x, x[:, 1:4], x[..., 2:5], x[:, ::2], np.broadcast_to(x[:1], x.shape)):
        assert tiles.for_blas(taken, "keys", x.dtype, {}) is taken
    others = x[..., ::-1], x[:, ::-1], x[..., ::2], x.swapaxes(-1, -2), np.broadcast_to(x[:, :1], x.shape)
    for other in (*others, x.astype(">f8"), x.astype("float32")):
        copy = tiles.for_blas(other, "keys", x.dtype, {})
        assert copy.flags.c_contiguous
        assert copy.dtype == x.dtype
        np.testing.assert_array_equal(copy, other)


# ---- numbers


def test_a_key_that_one_row_of_a_tile_sees_is_hidden_from_other_tiles():
    query, key, value, grad = draw(lead=(), n=8, m=8)
    mask = np.eye(8, dtype=bool)
    key[7], value[7] = np.nan, np.nan
    with in_tiles():
        found = results(query, key, value, grad, mask=mask)
    assert np.isnan(found[0][7]).all()
    assert np.isfinite(found[0][:4]).all()


def test_infinite_scores_stay_where_they_are():
    query, key, value, _ = draw(lead=(), n=9, m=7)
    query[4] = 1e200
    key[5] = 1e200
    with in_tiles(), all_at_once(), np.errstate(all="ignore"):
        expected = kvattn.attention(query, key, value)
    with in_tiles():
        found = kvattn.attention(query, key, value)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": np.tri(9, 7, -1, dtype=bool)}, {"valid_lens": [3, 0]}])
def test_keys_are_told_of_a_query_of_minus_inf_whose_scores_are_all_minus_inf(options):
    arrays = [np.abs(x) + 0.5 for x in draw(n=9, m=7)]
    arrays[0][:, [0, 4]] = -np.inf  # which sees no key in some of these calls
    with np.errstate(all="ignore"):
        with in_tiles(), all_at_once():
            expected = kvattn.attention_grad(*arrays, **options, backend="numpy")
        with in_tiles():
            found = kvattn.attention_grad(*arrays, **options, backend="numpy")
    assert np.isnan(expected[1]).any()
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-9)


def test_nothing_is_warned_of():
    arrays = draw()
    arrays[0][0] *= 1e300
    with in_tiles(), np.errstate(all="raise"):
        results(*arrays, valid_lens=np.array([0, 3]))


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

    with patch.multiple(tiles, ROWS=64, COLUMNS=64, CUT=32):
        (short, _), (long, inputs) = needed(1024), needed(4096)
    assert long < 4.5 * short
    assert long < 4 * inputs


# ---- the condition


def tiles_serve(query, key, **options):
    return kvattn.explain(query, key, key, **options).kernel == "tiles"


def test_which_calls_tiles_serve():
    query, key, value, grad = draw(lead=(2,), n=300, m=300, dtype=np.float32)
    serves = partial(tiles_serve, query, key)
    assert serves()
    assert serves(score=kvattn.dot_score, normalize=kvattn.masked_softmax, mask=np.array(True), softcap=1.0)
    assert not serves(score=kvattn.distance_score)
    assert not serves(score=partial(tab.dot_score))
    assert not serves(normalize=kvattn.sparsemax)
    assert not serves(dropout=0.1)
    assert not serves(return_weights=True)
    with in_tiles() as served:
        kvattn.attention_grad(query, key, value, grad, causal=True)
        assert served == ["attention_grad"]
        kvattn.attention_grad(query, key, value, grad, wrt=("bias",), bias=np.zeros((300, 300), np.float32))
        kvattn.attention_grad(query, key, value, grad, softcap=1.0)
        assert served == ["attention_grad"]


def test_small_calls_are_left_to_the_tab_but_for_those_that_would_copy_many_keys():
    query, key, *_ = draw(lead=(2,), n=50, m=300)
    assert not tiles_serve(query, key)
    assert not tiles_serve(*[np.ones((2000, 1, 10, 2))] * 2)
    long = np.ones((1, 2, 4096, 64))
    assert not tiles_serve(long[..., :1, :], long)
    assert tiles_serve(long[..., :1, :], long, valid_lens=np.array([9]))


@pytest.mark.parametrize("score", [kvattn.scaled_dot_score, kvattn.distance_score])
@pytest.mark.parametrize(("n", "m", "size", "d"), [(3, 4, 2, 2), (300, 900, 64, 2), (256, 9, 64, 64), (2, 0, 3, 2)])
def test_the_kernel_of_selected_keys_is_planned_as_if_they_were_selected(score, n, m, size, d):
    query, key = np.ones((1, 2, n, d)), np.ones((1, 1, m, d))
    positions = np.arange(n * size).reshape(n, size)
    call = Call.of(query, key, score=getattr(tab, score.__name__), normalize=tab.softmax, positions=positions)
    planned, expected = tab.choose(query, key, key, call), tab.choose(*tab._select(query, key, key, call))
    assert planned.kernel == f"{expected.kernel}, of selected keys"
    assert planned.why.startswith(expected.why)
    assert planned.run.args == (expected,)


def test_both_bases_of_the_exponential():
    for exp, log, unit in ((np.exp, np.log, 1.0), (np.exp2, np.log2, math.log2(math.e))):
        base = {"EXP": exp, "UNIT": unit}
        with patch.multiple(tiles, **base), patch.multiple(tiled, **base, LOG=log), patch.multiple(tiled_grad, **base):
            for which in ("causal", "bias -inf", "softcap"):
                right(SUBJECT, cached(which))
