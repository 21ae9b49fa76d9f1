"""One trace serves every input: TensorFlow's tracers, each given one set of sizes and lengths, and run with others."""

from functools import partial

import numpy as np
import pytest
from conftest import chosen
from near import assert_near

import kvattn

if "tensorflow" not in chosen():
    pytest.skip("this run is without TensorFlow", allow_module_level=True)

import keras
import tensorflow as tf
from traced import RESTRICTIONS, SIZES, D, V, call, draw, empty, full, padded, short

from kvattn import tensorflow as kv
from kvattn.kernels.tensorflow import tiles


def unknown(x):
    """All axes but the features unknown."""
    known = (2, D, V) if x.ndim == 4 else ()
    shape = [size if axis in (1, x.ndim - 1) and size in known else None for axis, size in enumerate(x.shape)]
    return tf.TensorSpec(shape, x.dtype)


def signature(function, *first):
    return tf.function(function, input_signature=[unknown(x) for x in first])


def concrete(function, *first):
    return tf.function(function, autograph=False).get_concrete_function(*[unknown(x) for x in first])


def relaxed(function, *first):
    traced = tf.function(function, reduce_retracing=True)
    traced(*first)
    return traced


def compiled(function, *first):
    return tf.function(function, input_signature=[unknown(x) for x in first], jit_compile=True)


def saved(function, *first, path=None):
    module = tf.Module()
    module.attend = tf.function(function, input_signature=[unknown(x) for x in first])
    tf.saved_model.save(module, path)
    return tf.saved_model.load(path).attend


WAYS = {"signature": signature, "concrete": concrete, "relaxed": relaxed, "compiled": compiled, "saved": saved}
SOME = ("lengths", "an offset for each", "positions", "another score")  # of these every way is tried
PAIRS = [("signature", which) for which in RESTRICTIONS] + [
    (way, which) for way in WAYS if way != "signature" for which in SOME
]


@pytest.mark.parametrize(("way", "which"), PAIRS)
def test_one_trace_serves_every_input(way, which, tmp_path):
    names, options = RESTRICTIONS[which]
    arguments = ["query", "key", "value", "grad", *names.values()]
    made = partial(WAYS[way], path=str(tmp_path)) if way == "saved" else WAYS[way]
    first = draw(*SIZES[0])
    traced = made(partial(call, list(names), options), *[tf.constant(first[name]) for name in arguments])
    changes = [full, short, empty, *[padded] * (which == "lengths")]
    inputs = [change(draw(*SIZES[0], seed=1)) for change in changes]
    for arrays in inputs + [draw(*sizes) for sizes in SIZES[1:]]:
        given = [arrays[name] for name in arguments]
        found = traced(*map(tf.constant, given))
        with kvattn.use_backend("numpy"):
            expected = call(list(names), options, *given)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5, err_msg=str(arrays["query"].shape))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": True, "valid_lens": np.array([3, 0])}], ids=str)
def test_a_trace_of_unknown_numbers_of_heads_serves_grouped_ones(options):
    rng = np.random.default_rng(0)
    options = options | ({"mask": rng.random((2, 4, 5, 6)) < 0.6} if "mask" in options else {})

    def gradients(query, key, value, grad):
        return kvattn.attention(query, key, value, **options), *kvattn.attention_grad(query, key, value, grad, **options)

    traced = tf.function(gradients, input_signature=[tf.TensorSpec([None, None, None, 3], tf.float64)] * 4)
    for kv_heads in (4, 2, 1):
        shapes = (2, 4, 5, 3), (2, kv_heads, 6, 3), (2, kv_heads, 6, 3), (2, 4, 5, 3)
        arrays = [rng.standard_normal(shape) for shape in shapes]
        with kvattn.use_backend("numpy"):
            expected = gradients(*arrays)
        for x, y in zip(traced(*map(tf.constant, arrays)), expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("score", ["cosine_score", "additive_score", "gated_score"])
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
def test_a_trace_of_unknown_sizes_has_no_gradient_where_there_is_no_pair(score, sizes):
    """Of NaN in queries without keys, and in keys without queries, nothing reaches a gradient."""
    n, m = sizes
    W, w = tf.ones((D, D)), tf.ones(D)
    bound = {"additive_score": {"W_q": W, "W_k": W, "w_v": w}, "gated_score": {"w_g": tf.ones(2 * D)}}.get(score, {})
    score = partial(getattr(kvattn, score), **bound)
    wrt = ["query", "key", "value", *bound]

    def gradients(query, key, value, grad):
        return kvattn.attention_grad(query, key, value, grad, score=score, wrt=wrt)

    arrays = draw(2, 4, 5)
    traced = signature(gradients, *[tf.constant(arrays[name]) for name in ("query", "key", "value", "grad")])
    nan = [tf.fill(shape, np.nan) for shape in ((2, 2, n, D), (2, 2, m, D), (2, 2, m, V), (2, 2, n, V))]
    for function in (traced, gradients):
        for x in function(*map(tf.cast, nan, [tf.float32] * 4)):
            assert not np.any(x)


@pytest.mark.parametrize("mapped", [tf.vectorized_map, tf.map_fn])
@pytest.mark.parametrize("which", RESTRICTIONS)
def test_a_map_over_the_batch_gives_each_entry_its_own(which, mapped):
    names, options = RESTRICTIONS[which]
    arrays = draw(4, 3, 5)
    shared = [name for name in names.values() if name in ("bias", "shift")]
    each = {
        name: x
        for name, x in arrays.items()
        if name in ("query", "key", "value", "grad", *names.values()) and name not in shared
    }

    def one(entry):
        entry = {name: x[None] for name, x in entry.items()}
        given = [entry[name] if name in entry else arrays[name] for name in ("query", "key", "value", "grad", *names.values())]
        return call(list(names), options, *given)

    more = {} if mapped is tf.vectorized_map else {"fn_output_signature": (tf.float32,) * 5}
    found = mapped(one, {name: tf.constant(x) for name, x in each.items()}, **more)
    given = [arrays[name] for name in ("query", "key", "value", "grad", *names.values())]
    with kvattn.use_backend("numpy"):
        expected = call(list(names), options, *given)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(tf.squeeze(x, 1), y, rtol=0, atol=1e-5)


LAYERS = {
    "DotProductAttention": ({}, 3, {"causal": True}),
    "AdditiveAttention": ({"num_hiddens": 4}, 3, {}),
    "MultiplicativeAttention": ({}, 3, {"softcap": 1.0}),
    "GatedAttention": ({}, 3, {}),
    "MultiHeadAttention": ({"num_hiddens": 8, "num_heads": 2}, 3, {"window": 2}),
    "TransformerEncoderBlock": ({"num_hiddens": 8, "ffn_num_hiddens": 8, "num_heads": 2}, 1, {"causal": True}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_functional_model_of_unknown_axes_serves_every_input(name, tmp_path):
    sizes, inputs, options = LAYERS[name]
    layer = getattr(kv, name)(**sizes, **({} if name == "DotProductAttention" else {"seed": 1}))
    free = [keras.Input((None, 8)) for _ in range(inputs)] + [keras.Input((), dtype="int32")]
    model = keras.Model(free, layer(*free, **options))
    model.export(str(tmp_path), verbose=False)
    exported = tf.saved_model.load(str(tmp_path))
    rng = np.random.default_rng(0)
    for b, n, m in ((2, 4, 5), (3, 7, 6), (1, 1, 1), (2, 3, 0) if inputs == 3 else (2, 2, 2)):
        arrays = [rng.standard_normal((b, size, 8)).astype("float32") for size in (n, m, m)[:inputs]]
        for lens in (np.full(b, m), rng.integers(0, m + 2, b), np.zeros(b, int)):
            given = [*arrays, lens.astype("int32")]
            expected = layer(*given, **options)
            assert_near(model(given), expected)
            assert_near(exported.serve([*map(tf.constant, given)]), expected)


@pytest.mark.parametrize("which", ["query", "key", "value", "grad"])
@pytest.mark.parametrize("traced", [True, False])
def test_nan_reaches_only_the_rows_that_look(which, traced):
    """In a graph no value is seen while it is traced; a loss's own NaN is not seen before the gradient is taken."""
    arrays = {name: x.astype("float64") for name, x in draw(1, 5, 5).items() if name in ("query", "key", "value", "grad")}
    row = 2
    rows = slice(row, row + 1) if which in ("query", "grad") else slice(row, None)  # that look at the NaN
    keys = slice(None, row + 1) if which in ("query", "grad") else slice(None)  # what these rows look at

    def results(query, key, value, grad):
        return kvattn.attention(query, key, value, causal=True), *kvattn.attention_grad(query, key, value, grad, causal=True)

    expected = results(**{**arrays, "grad": np.where(np.isin(np.arange(5), np.arange(5)[rows])[:, None], 0, arrays["grad"])})
    arrays[which][:, :, row] = np.nan
    function = tf.function(results, autograph=False) if traced else results
    output, by_query, by_key, by_value = (np.array(x) for x in function(**{n: tf.constant(x) for n, x in arrays.items()}))
    for found, looked, wanted in ((output, rows, expected[0]), (by_query, rows, expected[1])):
        if found is not output or which != "grad":
            assert np.isnan(found[:, :, looked]).all()
            np.testing.assert_allclose(np.delete(found, looked, 2), np.delete(wanted, looked, 2), rtol=0, atol=1e-12)
    for found, wanted in ((by_key, expected[2]), (by_value, expected[3])):
        hidden = np.delete(found, keys, 2)
        np.testing.assert_allclose(hidden, np.delete(wanted, keys, 2), rtol=0, atol=1e-12)


LENGTHS = {
    "valid_lens": lambda lens, n: lens[:, 0],
    "per query": lambda lens, n: lens,
    "mask": lambda lens, n: np.arange(n) < lens[:, None, :1, None],
}


@pytest.mark.parametrize("given", LENGTHS)
@pytest.mark.parametrize(("grows", "traces"), [(0, 1), (1, 2)])
def test_few_traces_serve_twenty_lengths(given, grows, traces):
    """One; two where sizes grow, which TensorFlow takes for unknown from the second on. So of what kvattn traces by itself."""
    rng, name = np.random.default_rng(0), "mask" if given == "mask" else "valid_lens"
    attend = tf.function(lambda q, x: kvattn.attention(q, q, q, **{name: x}), reduce_retracing=True)
    own = tiles._compiled.cache_info().misses
    for n in (400 + i * grows for i in range(20)):
        query = tf.constant(rng.standard_normal((2, 1, n, 4)))
        lens = rng.integers(1, n, (2, n)).astype("int32")
        got = attend(query, tf.constant(LENGTHS[given](lens, n)))
        assert got.shape == query.shape
    assert attend.experimental_get_tracing_count() == traces
    assert tiles._compiled.cache_info().misses - own <= traces
