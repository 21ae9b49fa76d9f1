"""JAX's large calls are worked through in tiles: the same numbers as all at once, in less memory.

Tiles of a few rows and blocks of a few keys put every edge within reach of small arrays.
"""

from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
from conftest import chosen
from test_tiled import RESTRICTIONS, all_at_once, draw, results

import kvattn
from kvattn import conformance

if "jax" not in chosen():
    pytest.skip("this run has no jax", allow_module_level=True)

import jax
import jax.numpy as jnp

from kvattn.backends import jax as tab
from kvattn.kernels import jax as tiles

INF, NAN = np.inf, np.nan
SIZES = {"ROWS": 4, "COLUMNS": 3, "EDGE": 3, "BAND": 2}
ALWAYS = {"SMALLEST": 0, "FEWEST": 0}


@contextmanager
def in_tiles(**sizes):
    """Every call that tiles can serve is served by small ones; counts the programs that use them."""
    served, attention = [], tiles.attention

    def counted(*args, **options):
        served.append(options)
        return attention(*args, **options)

    jax.clear_caches()
    with patch.multiple(tiles, **{**SIZES, **ALWAYS, **sizes}, attention=counted):
        yield served
    jax.clear_caches()


def given(options):
    return {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}


def found(query, key, value, grad_output, **options):
    """Output, lse and gradients, in float64, from one program."""

    @jax.jit
    def run(query, key, value, grad_output, options):
        forward = partial(kvattn.attention, **fixed, **options, return_lse=True)
        (output, lse), back = jax.vjp(forward, query, key, value)
        return output, lse, *back((grad_output, jnp.zeros_like(lse)))

    with tab._x64(True):
        fixed = {name: x for name, x in options.items() if not isinstance(x, np.ndarray)}
        arrays = given({name: x for name, x in options.items() if name not in fixed})
        return [np.asarray(x) for x in run(*map(jnp.asarray, (query, key, value, grad_output)), arrays)]


def same(arrays, **options):
    with all_at_once():
        expected = results(*arrays, **options)
    with in_tiles() as served:
        got = found(*arrays, **options)
    assert served
    for what, x, y in zip(("output", "lse", "query", "key", "value"), got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12, err_msg=what)


# ---- edges


@pytest.mark.parametrize("which", RESTRICTIONS)
def test_more_than_one_tile(which):
    same(draw(n=9, m=7), **RESTRICTIONS[which](9, 7))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (3, 2), (4, 3), (5, 4), (2, 11)])
def test_lengths_around_those_of_a_tile(n, m):
    same(draw(n=n, m=m))
    same(draw(n=n, m=m), causal=True, window=(1, None), valid_lens=np.array([m // 2, m]))


@pytest.mark.parametrize("which", ["nothing", "lengths per query", "mask of blocks", "bias", "all"])
@pytest.mark.parametrize(("lead", "kv"), [((2, 4), (2, 2)), ((2, 2, 2), (2, 1, 2)), ((2, 2), (1, 2))])
def test_heads_groups_and_batches(lead, kv, which):
    same(draw(1, lead=lead, kv=kv, n=5, m=4), **RESTRICTIONS[which](5, 4))


def test_two_and_three_axes():
    same(draw(lead=()), causal=True, query_offset=np.array(2), valid_lens=np.array(5), mask=np.eye(9, 7, k=-1) == 0)
    grouped = draw(lead=(4,), kv=(2,))
    same(grouped, valid_lens=np.array([0, 3, 7, 5]), mask=np.arange(4 * 9 * 7).reshape(4, 9, 7) % 3 > 0)
    same(grouped, causal=True, query_offset=np.array([0, 3, -2, 9]), bias=np.linspace(0, 1, 4 * 7).reshape(4, 1, 7))


def test_a_window_in_long_arrays_skips_and_keeps_the_right_blocks():
    for offset in (-3, 0, 17):
        same(draw(n=23, m=31), window=(2, 1), query_offset=offset, valid_lens=np.array([20, 31]))


@pytest.mark.parametrize("size", [1e2, 1e4, -1e4])
def test_scores_that_need_their_maximum_taken_off(size):
    for at in (0, 5):
        arrays = draw(n=9, m=7)
        arrays[1][:, at] *= size
        with all_at_once():
            expected = results(*arrays, causal=True)
        with in_tiles():
            got = found(*arrays, causal=True)
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-13 * abs(size) * max(1, abs(y).max()))


@pytest.mark.parametrize("which", ["lengths", "lengths per query", "mask", "causal", "window", "bias -inf"])
def test_what_nobody_sees_reaches_nothing(which):
    options = RESTRICTIONS[which](9, 12)
    if which == "window":
        options |= {"query_offset": 2, "valid_lens": np.tile([9, 9, 9, 0, 0, 0, 0, 9, 12], (2, 1))}  # with holes
    clean = draw(n=9, m=12)
    weights = kvattn.attention(*clean[:3], **options, return_weights=True)[1]
    hidden, blind = ~(weights > 0).any(axis=-2), ~(weights > 0).any(axis=-1)
    with in_tiles():
        expected = found(*clean, **options)
        for bad in (NAN, INF):
            dirty = [x.copy() for x in clean]
            dirty[1][hidden], dirty[2][hidden], dirty[0][blind] = bad, bad, bad
            for x, y in zip(found(*dirty, **options), expected, strict=True):
                np.testing.assert_array_equal(x, y)


def test_rows_that_see_nothing_give_zeros():
    arrays = draw()
    with in_tiles():
        output, lse, *grads = found(*arrays, valid_lens=np.array([0, 3]))
    assert not output[0].any()
    assert (lse[0] == -INF).all()
    assert not any(x[0].any() for x in grads)


def test_nan_that_is_seen_is_not_lost():
    query, key, value, grad = draw(lead=(), n=9, m=7)
    key[3, 0] = NAN
    with in_tiles():
        output, lse, *_ = found(query, key, value, grad, causal=True)
    assert np.isnan(output[3:]).all()
    assert np.isnan(lse[3:]).all()
    assert np.isfinite(output[:3]).all()


# ---- derivatives


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 2.0}], ids=["plain", "causal, softcap"])
def test_every_kind_of_derivative(options):
    """Forwards, and twice either way, by query, key, value and lse: those of the plain path."""
    arrays = [x[0] for x in draw(n=7, m=5)]

    def derivatives():
        def loss(*qkv):
            output, lse = kvattn.attention(*qkv, **options, return_lse=True)
            return (output * g).sum() + jnp.sin(lse).sum()

        with tab._x64(True):
            *qkv, g = map(jnp.asarray, arrays)
            along = [jnp.cos(x) for x in qkv]
            first = partial(jax.grad(loss, argnums=(0, 1, 2)))
            second = jax.grad(lambda *x: sum((a * b).sum() for a, b in zip(first(*x), along, strict=True)), argnums=(0, 1, 2))
            return [jax.jvp(loss, qkv, along)[1], *jax.jvp(first, qkv, along)[1], *second(*qkv)]

    with in_tiles() as served:
        found = derivatives()
    assert served
    with patch.object(tiles, "SMALLEST", INF):
        jax.clear_caches()
        expected = derivatives()
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-11)


def test_the_gradient_by_the_bias():
    query, key, value, grad = draw(lead=(2, 2))
    for shape in ((9, 7), (2, 1, 7), (2, 2, 9, 7), (7,)):
        bias = np.linspace(-1, 1, np.prod(shape)).reshape(shape)
        options = {"bias": bias, "wrt": ["query", "bias"], "causal": True}
        expected = kvattn.attention_grad(query, key, value, grad, **options, backend="numpy")
        with in_tiles() as served:
            found = kvattn.attention_grad(query, key, value, grad, **options, backend="jax")
        assert served
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


def test_vmap_over_lengths():
    query, key, value, _ = (x.astype(np.float32) for x in draw(n=9, m=7))
    lens = np.array([3, 6])
    one = lambda q, k, v, n: kvattn.attention(q, k, v, valid_lens=n, causal=True, query_offset=1)  # noqa: E731
    with in_tiles() as served:
        found = jax.vmap(one)(*map(jnp.asarray, (query, key, value, lens)))
    assert served
    expected = kvattn.attention(query, key, value, valid_lens=lens, causal=True, query_offset=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32(dtype):
    arrays = [jnp.asarray(x, dtype) for x in draw(lead=(2, 4), kv=(2, 2), d=8)[:3]]
    wide = [np.asarray(x, np.float64) for x in arrays]
    with in_tiles() as served:
        output, lse = kvattn.attention(*(x * 256 for x in arrays[:2]), arrays[2], scale=2.0**-18, return_lse=True)
    assert served
    expected, expected_lse = kvattn.attention(*wide, scale=0.25, return_lse=True)
    assert (output.dtype, lse.dtype) == (dtype, np.float32)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(output, np.float64), expected, rtol=float(jnp.finfo(dtype).eps), atol=1e-5)


# ---- conformance


GROUPS = ("plain", "masks", "bias", "lengths", "causal", "window", "softcap", "padding", "grouped heads", "empty rows")


def test_conformance():
    """Two cases of each group that tiles have a part in; all of them take minutes to compile."""
    by_group = {group: [case for case in conformance.cases() if case.group == group] for group in GROUPS}
    assert all(by_group.values())
    with in_tiles() as served:
        report = conformance.run("jax", [case for cases in by_group.values() for case in (cases[0], cases[-1])])
    assert not report.failures, "\n".join(result.message for result in report.failures)
    assert len(served) >= len(GROUPS)


# ---- memory and choice


def test_memory_beyond_inputs_and_output_is_a_few_tiles():
    x = jax.ShapeDtypeStruct((1, 2, 8192, 64), jnp.float32)
    inputs = 3 * x.size * 4

    def temporary(function):
        return jax.jit(function).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    for options in ({}, {"causal": True}, {"window": 256}):
        call = partial(kvattn.attention, **options)
        assert temporary(call) < 40e6, options
        assert temporary(lambda *qkv, call=call: jax.vjp(call, *qkv)[1](qkv[0])) < 4 * inputs + 40e6, options


def test_which_calls_tiles_serve():
    query = jnp.zeros((2, 256, 8))
    serves = partial(tiles.serves, tab, query, query, query)
    assert serves(tab.scaled_dot_score, tab.softmax)
    assert not serves(tab.cosine_score, tab.softmax)
    assert not serves(tab.scaled_dot_score, tab.sparsemax)
    assert not serves(tab.scaled_dot_score, tab.softmax, dropout=0.1)
    assert not serves(tab.scaled_dot_score, tab.softmax, return_weights=True)
    assert not tiles.serves(tab, query[:, :1], query, query, tab.dot_score, tab.softmax)
    wider = jnp.zeros((2, 1, 256, 8))
    assert not tiles.serves(tab, wider[:1], wider[:1], wider, tab.dot_score, tab.softmax)
