"""What is JAX's own in its tiles: every kind of derivative, vmap, memory, and which calls they serve.

What every backend's fast path promises is in test_tiled.py.
"""

from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
from conftest import chosen
from near import assert_near

if "jax" not in chosen():
    pytest.skip("this run has no jax", allow_module_level=True)

import jax
import jax.numpy as jnp
from tiling import INF, call, draw, right, subject

import kvattn
from kvattn import partition
from kvattn.backends import jax as tab
from kvattn.call import Call
from kvattn.conformance import check, position_functions
from kvattn.kernels.jax import distances, plans, tiles

SUBJECT = subject("jax")


def in_tiles(**sizes):
    """Every call that tiles can serve is served by small ones; counts the programs that use them."""
    return SUBJECT.forced({**SUBJECT.sizes["4 by 3"], **sizes})


# ---- derivatives


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 2.0}], ids=["plain", "causal, softcap"])
def test_every_kind_of_derivative(options):
    """Forwards, and twice either way, by query, key, value and lse: those of the plain path."""
    arrays = [x[0] for x in draw(n=7, m=5)]

    def derivatives():
        def loss(*qkv):
            output, lse = kvattn.attention(*qkv, **options, return_lse=True)
            return (output * g).sum() + jnp.sin(lse).sum()

        with tab.programs.x64(True):
            *qkv, g = map(jnp.asarray, arrays)
            along = [jnp.cos(x) for x in qkv]
            first = partial(jax.grad(loss, argnums=(0, 1, 2)))
            second = jax.grad(lambda *x: sum((a * b).sum() for a, b in zip(first(*x), along, strict=True)), argnums=(0, 1, 2))
            return [jax.jvp(loss, qkv, along)[1], *jax.jvp(first, qkv, along)[1], *second(*qkv)]

    with in_tiles() as served:
        found = derivatives()
    assert served
    with patch.object(plans, "FEWEST_SCORES", INF):
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
    assert_near(found, expected)


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
    def obstacle(query=(2, 256, 8), key=(2, 256, 8), value=(2, 256, 8), **options):
        return plans.obstacle(tab, query, key, value, Call(**{"score": tab.dot_score, "normalize": tab.softmax} | options))

    assert not obstacle()
    assert not obstacle(score=tab.scaled_dot_score, normalize=tab.masked_softmax, return_lse=True)
    for options, word in (
        ({"score": tab.cosine_score}, "score"), ({"normalize": tab.sparsemax}, "normaliser"), ({"dropout": 0.1}, "dropout"),
        ({"return_weights": True}, "return_weights"), ({"query": (2, 1, 8)}, "few scores"), ({"key": (2, 0, 8)}, "few scores"),
        ({"query": (1, 1, 256, 8), "key": (1, 1, 256, 8), "value": (2, 1, 256, 8)}, "values"),
        ({"query": (2, None, 8)}, "sizes"),
    ):  # fmt: skip
        assert word in obstacle(**options), options


def test_few_queries_are_served_where_they_leave_much_unread():
    few, keys = jnp.zeros((2, 1, 8)), jnp.zeros((2, plans.MANY_KEYS, 8))
    for restriction in ({"valid_lens": [1, 2]}, {"window": 3}, {"causal": True, "query_offset": 9}):
        assert kvattn.explain(few, keys, keys, **restriction).kernel == "tiles"
        assert kvattn.explain(few, keys[:, 1:], keys[:, 1:], **restriction).kernel != "tiles"
    for all_seen in ({}, {"causal": True, "query_offset": plans.MANY_KEYS - 1}):
        assert kvattn.explain(few, keys, keys, **all_seen).kernel != "tiles"


# ---- the loops


@pytest.mark.parametrize("window", [(3, 4), (5, None), (None, 3)])
def test_a_window_too_wide_for_one_block(window):
    for offset in (-3, 9):
        with patch.object(plans, "WINDOW", 0):
            right(SUBJECT, call(n=11, m=13, window=window, query_offset=offset, valid_lens=np.array([8, 13])))


@pytest.mark.parametrize("area", [0, 3 * 4 * 3, 2**20])
def test_heads_at_once(area):
    """One, three or six heads of the keys."""
    bias = (np.arange(2 * 12 * 9 * 7).reshape(2, 12, 9, 7) % 32 - 16) / 16
    with patch.object(plans, "SCORES", area):
        for options in ({}, {"bias": bias}, {"which": "all"}, {"which": "lengths per query, window"}):
            right(SUBJECT, call(lead=(2, 12), kv=(2, 6), **options))


def test_heads_of_other_lengths_or_offsets_are_computed_alone():
    found, attend = [], tiles._attend

    def seen(plan, *args):
        found.append(plan.heads_at_once)
        return attend(plan, *args)

    with patch.object(tiles, "_attend", seen):
        for options in ({"valid_lens": np.array([3, 0, 7])}, {"causal": True, "query_offset": np.array([0, 3, -2])}):
            right(SUBJECT, call(lead=(3,), kv=(3,), **options))
        assert {*found} == {1}
        right(SUBJECT, call(lead=(3,), kv=(3,)))
        assert found[-1] == 3


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 8])
def test_one_query_with_lengths_around_those_of_a_block(length):
    right(SUBJECT, call(n=1, m=9, valid_lens=np.array([length, 9])))


LENGTHS = {
    "valid_lens": lambda lens, n: lens[:, 0],
    "per query": lambda lens, n: lens,
    "mask": lambda lens, n: np.arange(n) < lens[:, None, :1, None],
}


@pytest.mark.parametrize("given", LENGTHS)
@pytest.mark.parametrize("n", [12, 400], ids=["few", "tiles"])
def test_one_program_serves_twenty_lengths(given, n):
    """A user's own, and those that kvattn makes of calls at once; sizes that grow are other programs in JAX."""
    rng, name, traced = np.random.default_rng(0), "mask" if given == "mask" else "valid_lens", []

    def attend(query, x):
        traced.append(x)
        return kvattn.attention(query, query, query, **{name: x})

    program, query = jax.jit(attend), jnp.asarray(rng.standard_normal((2, 1, n, 4)), jnp.float32)
    before = tab.programs._run._cache_size()
    for _ in range(20):
        x = jnp.asarray(LENGTHS[given](rng.integers(1, n, (2, n)), n))
        at_once = kvattn.attention(query, query, query, **{name: x})
        np.testing.assert_allclose(program(query, x), at_once, atol=1e-5)
    assert len(traced) == 1
    assert tab.programs._run._cache_size() - before <= 2


def test_a_bias_by_distance_is_one_line_in_small_tiles():
    """Of every size of tiles, beside every option, grouped heads and sinks among them."""
    cases = [
        case
        for case in position_functions.cases(np.random.default_rng(1))
        if case.name.startswith(("bias function", "heads: func"))
    ]
    lines, original = [], distances.by_distance

    def by_distance(*arguments):
        lines.append(original(*arguments))
        return lines[-1]

    with in_tiles(), patch.multiple(partition, FEW=0), patch.object(distances, "by_distance", by_distance):
        report = check.run("jax", cases, dtypes=("float64",))
    assert [x.message for x in report.failures] == []
    assert sum(line is not None for line in lines) > len(cases) // 2


def test_nan_beside_a_bias_by_distance_stays_with_its_pairs():
    rng, ahead = np.random.default_rng(0), np.arange(300) - np.arange(300)[:, None]
    query, key, value = rng.standard_normal((3, 1, 2, 300, 4)).astype("float32")
    key[0, :, 200], value[0, :, 250] = np.nan, np.inf
    own = jnp.asarray([0.5, 0.25])[:, None, None]
    bias = lambda q, k: -own * abs(q - k).astype("float32")  # noqa: E731
    got = kvattn.attention(*map(jnp.asarray, (query, key, value)), bias=bias, causal=True)
    want = kvattn.attention(query, key, value, bias=-np.asarray(own) * abs(ahead).astype("float32"), causal=True)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.isfinite(want[..., :200, :]).all()


@pytest.mark.parametrize("compiled", [False, True], ids=["at once", "jitted"])
def test_gradients_beside_a_bias_by_distance(compiled):
    """In blocks of one line, of heads that share keys, beside a window; a line that is learned has its gradient too."""
    query, key, value, grad = (jnp.asarray(x, "float32") for x in draw(lead=(2, 4), kv=(2, 2)))
    slopes, lines, original = jnp.asarray(0.5 ** np.arange(1, 5)[:, None, None], "float32"), [], distances.by_distance

    def by_distance(*arguments):
        lines.append(original(*arguments))
        return lines[-1]

    def bias(own):
        return lambda q, k: own * jnp.minimum(abs(k - q), 4).astype("float32")

    def loss(query, key, value, own, given=slopes, **options):
        output = kvattn.attention(query, key, value, bias=bias(given if own is None else own), **options)
        return (output * grad).sum()

    run = jax.jit if compiled else lambda x: x
    ahead = np.arange(7) - np.arange(9)[:, None]
    for options in ({}, {"window": (4, 1), "query_offset": 1}, {"softcap": 1.0, "valid_lens": np.array([3, 7])}):
        array = np.asarray(slopes) * np.minimum(abs(ahead - options.get("query_offset", 0)), 4)
        wrt, given = ("query", "key", "value", "bias"), {**options, "bias": array.astype("float32")}
        *want, by_bias = kvattn.attention_grad(*map(np.asarray, (query, key, value, grad)), wrt=wrt, **given, backend="numpy")
        with in_tiles() as served, patch.multiple(partition, FEW=0), patch.object(distances, "by_distance", by_distance):
            found = run(jax.grad(partial(loss, **options), argnums=(0, 1, 2)))(query, key, value, None)
            assert type(lines[-1]) is distances.Line
            learned = run(jax.grad(partial(loss, **options), argnums=3))(query, key, value, slopes)
        assert served
        for x, y in zip(found, want, strict=True):
            assert_near(x, y)
        assert_near(learned, (by_bias * array / np.asarray(slopes)).sum(axis=(-2, -1), keepdims=True))


def test_no_array_of_all_pairs_is_held_for_a_bias_by_distance_in_a_trace():
    x, slopes = jax.ShapeDtypeStruct((1, 2, 8192, 8), jnp.float32), jnp.asarray([0.5, 0.25])[:, None, None]

    def attend(*arrays):
        return kvattn.attention(*arrays, bias=lambda q, k: -slopes * abs(q - k).astype("float32"))

    for function in (attend, lambda *arrays: jax.vjp(attend, *arrays)[1](arrays[0])):
        held = jax.jit(function).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
        assert held < 60e6  # the bias of all pairs is 512 MB


def test_keys_between_those_that_a_tile_sees_reach_nothing():
    """The first of two queries in a tile has the length 0: nobody sees the key at which its window begins."""
    query, key, value, grad = (x.astype("float32") for x in draw(n=9, m=12))
    lens = np.tile(np.where(np.isin(np.arange(9), [1, 2, 3, 4]), 0, 11), (2, 1))  # query 5 sees keys 6 to 9

    @jax.jit  # at once, a call with NaN is computed again, pair by pair
    def found(*arrays):
        output, back = jax.vjp(partial(kvattn.attention, window=(1, 2), query_offset=2, valid_lens=lens), *arrays)
        return output, *back(grad)

    with in_tiles() as served:
        clean = found(query, key, value)
        key[:, 5], value[:, 5] = np.nan, np.inf
        for x, y in zip(found(query, key, value), clean, strict=True):
            np.testing.assert_array_equal(x, y)
    assert served
