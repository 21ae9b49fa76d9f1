"""TensorFlow's large calls are worked through in blocks: the same numbers as all at once, in less memory.

Blocks of a few queries put every edge within reach of small arrays.
"""

import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
from conftest import chosen

if "tensorflow" not in chosen():
    pytest.skip("this run is without TensorFlow", allow_module_level=True)

import keras
import tensorflow as tf

import kvattn
from kvattn import conformance
from kvattn.backends import tensorflow as tab
from kvattn.kernels import tensorflow as tiled

INF, NAN = np.inf, np.nan
SIZES = [
    {"SCORES": 12, "ROWS": 4, "BAND_ROWS": 3, "FEWEST": 2},
    {"SCORES": 1, "ROWS": 1, "BAND_ROWS": 1, "FEWEST": 1},
    {"SCORES": 1000, "ROWS": 5, "BAND_ROWS": 8, "FEWEST": 1},
]


@contextmanager
def in_blocks(sizes=SIZES[0]):
    """Every call that blocks can serve is served by small ones; names the passes that were."""
    served, compiled = [], tiled._compiled

    def counted(function, kind, specs):
        served.append(function.__name__)
        return compiled(function, kind, specs)

    with patch.multiple(tiled, **sizes, SMALLEST=0, _compiled=counted):
        yield served


def results(*arrays, **options):
    """Output, lse and gradients of a loss of both, as NumPy arrays."""
    arrays = [tf.constant(x) for x in arrays]
    with tf.GradientTape() as tape:
        tape.watch(arrays)
        output, lse = kvattn.attention(*arrays[:3], **options, return_lse=True)
        finite = tf.where(tf.math.is_finite(lse), lse, 0)
        loss = tf.reduce_sum(tf.cast(output * arrays[3], finite.dtype)) + tf.reduce_sum(tf.sin(finite))
    alone = kvattn.attention(*arrays[:3], **options)
    near = 64 * np.finfo(arrays[0].dtype.as_numpy_dtype).eps
    np.testing.assert_allclose(kvattn.to_numpy(alone), kvattn.to_numpy(output), rtol=near, atol=near)
    return [kvattn.to_numpy(x) for x in (output, lse, *tape.gradient(loss, arrays[:3]))]


def draw(seed=0, lead=(2,), n=9, m=7, d=3, v=2, kv=None, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = (*lead, n, d), (*(kv or lead), m, d), (*(kv or lead), m, v), (*lead, n, v)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def same(arrays, sizes=SIZES[0], loose=1.0, **options):
    """That blocks give what the plain path gives, to rounding."""
    expected = results(*arrays, **options)
    with in_blocks(sizes) as served:
        found = results(*arrays, **options)
    assert served == ["_forward", "_forward", "_backward"]
    for what, x, y in zip(("output", "lse", "query", "key", "value"), found, expected, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        eps, size = np.finfo(arrays[0].dtype).eps, max(1.0, abs(y[np.isfinite(y)]).max(initial=0))
        np.testing.assert_allclose(x, y, rtol=0, atol=float(loose * 64 * eps * size), err_msg=what)


# ---- edges


RESTRICTIONS = {
    "nothing": lambda n, m: {},
    "causal": lambda n, m: {"causal": True},
    "causal, from the end": lambda n, m: {"causal": True, "query_offset": m - n},
    "causal, before the start": lambda n, m: {"causal": True, "query_offset": -3},
    "causal, out of sight": lambda n, m: {"causal": True, "query_offset": -(10**12)},
    "causal, offset per batch": lambda n, m: {"causal": True, "query_offset": np.array([2, -1])},
    "causal, padded": lambda n, m: {"causal": True, "valid_lens": np.array([0, m - 1], "int8")},
    "window": lambda n, m: {"window": (1, 2)},
    "window, one side": lambda n, m: {"window": (None, 1), "query_offset": 1},
    "window, causal, offset per batch": lambda n, m: {"window": (3, 1), "causal": True, "query_offset": np.array([0, 4])},
    "window, past the end": lambda n, m: {"window": (1, 0), "query_offset": m + 2},
    "window, without end": lambda n, m: {"window": (2**40, 0)},
    "lengths": lambda n, m: {"valid_lens": np.array([m // 2, m])},
    "lengths of 0": lambda n, m: {"valid_lens": np.array([0, 2**40])},
    "lengths per query": lambda n, m: {"valid_lens": np.arange(2 * n).reshape(2, n) % (m + 2)},
    "lengths per query, window": lambda n, m: {"valid_lens": np.arange(2 * n).reshape(2, n) % (m + 2), "window": (2, 1)},
    "mask": lambda n, m: {"mask": np.arange(n * m).reshape(n, m) % 3 > 0},
    "mask of columns": lambda n, m: {"mask": np.arange(m) % 2 == 0},
    "mask of blocks": lambda n, m: {"mask": (np.arange(n)[:, None] // 4 + np.arange(m) // 3) % 2 == 0},
    "softcap": lambda n, m: {"softcap": 0.7, "scale": 2.0, "causal": True},
    "all": lambda n, m: {
        "mask": np.arange(n * m).reshape(n, m) % 5 > 0, "causal": True, "window": (4, None), "query_offset": 1,
        "valid_lens": np.array([m - 1, m]), "scale": -0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("which", RESTRICTIONS)
def test_lengths_around_those_of_a_block(which):
    for sizes in SIZES:
        for n, m in ((1, 1), (1, 7), (3, 2), (4, 3), (5, 4), (9, 7), (7, 1)):
            same(draw(n, n=n, m=m), sizes, **RESTRICTIONS[which](n, m))


@pytest.mark.parametrize("which", RESTRICTIONS)
def test_heads_groups_and_batches(which):
    for lead, kv in (((2, 4), (2, 2)), ((2, 6), (2, 1)), ((2, 2, 2), (2, 1, 2)), ((2, 2), (1, 2))):
        same(draw(1, lead=lead, kv=kv, n=5, m=4), **RESTRICTIONS[which](5, 4))


def test_a_query_of_every_batch_entry():
    query, key, value, grad = draw(lead=(2, 2))
    same([query[:1], key, value, grad], causal=True)
    same([query[:1], key, value, grad], valid_lens=np.array([3, 0]))


def test_two_and_three_axes():
    arrays = draw(lead=())
    same(arrays)
    same(arrays, causal=True, query_offset=np.array(2), valid_lens=np.array(5), mask=np.eye(9, 7, k=-1) == 0)
    same(arrays, valid_lens=np.arange(9) % 8)
    grouped = draw(lead=(4,), kv=(2,))
    same(grouped, valid_lens=np.array([0, 3, 7, 5]), mask=np.arange(4 * 9 * 7).reshape(4, 9, 7) % 3 > 0)
    same(grouped, causal=True, query_offset=np.array([0, 3, -2, 9]))


def test_masks_of_every_shape():
    arrays = draw(lead=(2, 4), kv=(2, 2), n=5, m=4)
    rng = np.random.default_rng(0)
    for shape in ((2, 4, 5, 4), (4, 5, 4), (2, 1, 1, 4), (1, 4, 5, 1), (5, 1), (4,), ()):
        same(arrays, mask=rng.random(shape) < 0.6 if shape else np.array(True))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_narrower_dtypes(dtype):
    arrays = draw(lead=(2, 4), kv=(2, 2), dtype=dtype, d=8)
    for options in ({}, {"causal": True}, {"softcap": 2.0}):
        same(arrays, **options)
    same([*(x * 200 for x in arrays[:2]), *arrays[2:]], scale=2.0**-16)  # products beyond float16


# ---- numbers


@pytest.mark.parametrize("size", [1e2, 1e4, -1e4])
@pytest.mark.parametrize("which", ["nothing", "causal", "window", "mask", "lengths of 0"])
def test_scores_that_rise_outside_what_a_row_may_see(size, which):
    """What is left of the softmax would be rounding, or nothing."""
    for at in (0, 5):
        arrays = draw(n=9, m=7)
        arrays[1][:, at] *= size
        arrays[0][:, ::2] *= 0.01
        same(arrays, loose=abs(size), **RESTRICTIONS[which](9, 7))


def test_values_near_the_largest_number_do_not_overflow():
    query, key, value, _ = draw(dtype="float32")
    largest = np.finfo("float32").max
    with in_blocks():
        output = kvattn.attention(*map(tf.constant, (query, key, np.full_like(value, largest / 2))), causal=True)
    np.testing.assert_allclose(output, largest / 2, rtol=1e-5)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["lengths", "lengths per query", "lengths per query, window", "mask", "mask of columns",
                                   "causal", "causal, before the start", "window", "all"])  # fmt: skip
def test_what_nobody_sees_reaches_nothing(bad, which):
    options = RESTRICTIONS[which](9, 12)
    clean = draw(n=9, m=12)
    dirty = [x.copy() for x in clean]
    weights = kvattn.attention(*clean[:3], **options, return_weights=True, backend="numpy")[1]
    hidden, blind = ~(weights > 0).any(axis=-2), ~(weights > 0).any(axis=-1)
    dirty[1][hidden], dirty[2][hidden], dirty[0][blind] = bad, bad, bad
    for sizes in SIZES:
        with in_blocks(sizes):
            for x, y in zip(results(*dirty, **options), results(*clean, **options), strict=True):
                np.testing.assert_array_equal(x, y)


def test_nan_that_is_seen_is_not_lost():
    query, key, value, _ = draw(lead=(), n=9, m=7)
    key[3, 0] = NAN
    with in_blocks():
        output, lse = kvattn.attention(*map(tf.constant, (query, key, value)), return_lse=True, causal=True)
    assert np.isnan(output[3:]).all()
    assert np.isnan(lse[3:]).all()
    assert np.isfinite(output[:3]).all()


# ---- the conformance suite


def test_the_conformance_suite():
    with in_blocks() as served:
        report = conformance.run("tensorflow")
    assert not report.failures, "\n".join(result.message for result in report.failures)
    assert served.count("_forward") > 250
    assert served.count("_backward") > 50


# ---- TensorFlow's own ways to call


def graph(function, jit_compile=False):
    return tf.function(function, autograph=False, jit_compile=jit_compile)


def ragged(function, axes):
    """``function`` with these axes unknown."""
    return lambda *arrays: tf.function(
        function,
        [
            tf.TensorSpec([None if axis - x.ndim in axes else size for axis, size in enumerate(x.shape)], x.dtype)
            for x in arrays
        ],
        autograph=False,
    )(*arrays)


def gradients(query, key, value, grad_output, **options):
    return kvattn.attention_grad(query, key, value, grad_output, **options)


WAYS = {
    "eager": lambda f: f,
    "tf.function": graph,
    "jit_compile": partial(graph, jit_compile=True),
    "unknown batch": lambda f: ragged(f, (-4,)),
    "unknown lengths": lambda f: ragged(f, (-4, -2)),
    "unknown heads": lambda f: ragged(f, (-3,)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", ["nothing", "causal, padded", "mask of columns"])
def test_ways_to_call(way, which):
    arrays = draw(lead=(2, 4), kv=(2, 4), n=9, m=7)
    options = RESTRICTIONS[which](9, 7)
    expected = [kvattn.attention(*arrays[:3], **options, backend="numpy")]
    expected += kvattn.attention_grad(*arrays, **options, backend="numpy")
    with in_blocks() as served:
        tensors = [tf.constant(x) for x in arrays]
        found = [
            WAYS[way](partial(kvattn.attention, **options))(*tensors[:3]),
            *WAYS[way](partial(gradients, **options))(*tensors),
        ]
    assert bool(served) == (way in ("eager", "tf.function", "unknown batch"))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


def test_a_trace_knows_the_shapes_of_results():
    @tf.function(input_signature=[tf.TensorSpec((None, 4, 9, 3))] * 2, autograph=False)
    def traced(query, key):
        output, lse = kvattn.attention(query, key, key, return_lse=True)
        by_query, by_key, _ = kvattn.attention_grad(query, key, key, output)
        assert output.shape.as_list() == by_query.shape.as_list() == by_key.shape.as_list() == [None, 4, 9, 3]
        assert lse.shape.as_list() == [None, 4, 9]
        return output

    with in_blocks() as served:
        traced(tf.zeros((2, 4, 9, 3)), tf.zeros((2, 4, 9, 3)))
    assert served


def test_a_keras_model_of_any_batch_trains_and_is_saved(tmp_path):
    class Attend(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 2, 9, 4))])
        def __call__(self, x):
            return kvattn.attention(x, x, x, causal=True)

    class Layer(keras.layers.Layer):
        def call(self, x):
            return kvattn.attention(x, x, x, causal=True)

    x = tf.constant(draw(lead=(3, 2), d=4, dtype="float32")[0])
    expected = kvattn.attention(*[x.numpy()] * 3, causal=True, backend="numpy")
    with in_blocks() as served:
        inputs = keras.Input((2, 9, 4))
        model = keras.Model(inputs, Layer()(keras.layers.Dense(4, kernel_initializer="identity")(inputs)))
        np.testing.assert_allclose(model(x), expected, atol=1e-6)
        model.compile("sgd", "mse", jit_compile=False)
        first = model.evaluate(x, tf.zeros_like(x), verbose=0)
        model.fit(x, tf.zeros_like(x), epochs=3, verbose=0)
        assert model.evaluate(x, tf.zeros_like(x), verbose=0) < first
        assert "_backward" in served
        tf.saved_model.save(Attend(), str(tmp_path))
    np.testing.assert_allclose(tf.saved_model.load(str(tmp_path))(x), expected, atol=1e-6)


def test_one_compilation_serves_every_length():
    traced = []

    def _forward(call, forward=tiled._forward):
        traced.append(call)
        return forward(call)

    with in_blocks() as served, patch.object(tiled, "_forward", _forward):
        for n, m in ((5, 6), (7, 9), (8, 30), (1, 2)):
            arrays = [tf.constant(x) for x in draw(n=n, m=m)]
            kvattn.attention_grad(*arrays, causal=True, query_offset=m - n - 1, valid_lens=[m, m - 1])
    assert len(served) == 8
    assert len(traced) == 1


def second(query, key, value, grad, direction, **options):
    """The derivative of the gradients along a direction."""
    with tf.GradientTape() as outer:
        outer.watch([query, grad])
        with tf.GradientTape() as inner:
            inner.watch([query, key])
            loss = tf.reduce_sum(kvattn.attention(query, key, value, **options) * grad)
        firsts = inner.gradient(loss, [query, key])
        loss = sum(tf.reduce_sum(x * way) for x, way in zip(firsts, direction, strict=True))
    return outer.gradient(loss, [query, grad])


@pytest.mark.parametrize("way", ["eager", "tf.function"])
def test_second_derivatives(way):
    arrays = [tf.constant(x) for x in draw(lead=(2, 2))]
    direction = [tf.constant(x) for x in draw(5, lead=(2, 2))[:2]]
    for which in ("nothing", "causal, padded"):
        call = partial(second, **RESTRICTIONS[which](9, 7))
        expected = call(*arrays, direction)
        with in_blocks() as served:
            found = WAYS[way](call)(*arrays, direction)
        assert "_backward" in served
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


def test_forward_derivatives_and_jacobians():
    query, key, value, _ = (tf.constant(x) for x in draw(lead=(), n=4, m=3))

    def jvp():
        with tf.autodiff.ForwardAccumulator(query, tf.ones_like(query)) as forward:
            output = kvattn.attention(query, key, value)
        return forward.jvp(output)

    def jacobian():
        with tf.GradientTape() as tape:
            tape.watch(query)
            output = kvattn.attention(query, key, value)
        return tape.jacobian(output, query)

    for derivative in (jvp, jacobian):
        expected = derivative()
        with in_blocks() as served:
            found = derivative()
        assert served
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_a_variable_and_one_tensor_as_query_key_and_value():
    x = tf.Variable(draw(lead=(2, 2))[0])

    def by_x():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(kvattn.attention(x, x, x, causal=True) ** 2)
        return tape.gradient(loss, x)

    expected = by_x()
    with in_blocks() as served:
        np.testing.assert_allclose(by_x(), expected, rtol=0, atol=1e-12)
    assert served == ["_forward", "_backward"]


def test_a_repeated_call_finds_nothing_of_the_last():
    arrays = [tf.constant(x) for x in draw(lead=(2, 2))]
    with in_blocks():
        call = graph(partial(gradients, causal=True))
        first = [x.numpy() for x in call(*arrays)]
        for x, y in zip(call(*arrays), first, strict=True):
            np.testing.assert_array_equal(x, y)


# ---- memory


PEAK = """
import resource, sys
import tensorflow as tf, kvattn
n, grad, options = int(sys.argv[1]), sys.argv[2] == "grad", {"nothing": {}, "causal": {"causal": True}}[sys.argv[3]]
arrays = [tf.random.normal((1, 8, n, 64)) for _ in range(4 if grad else 3)]
call = kvattn.attention_grad if grad else kvattn.attention
few = [x[:, :, :512] for x in arrays]
kept = call(*few, **options)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kept = call(*arrays, **options)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.parametrize("which", ["nothing", "causal"])
def test_memory_is_a_few_blocks(which):
    n = 4096
    each, scores = 4 * 8 * n * 64, 4 * 8 * n * n

    def peak(*how):
        said = subprocess.run([sys.executable, "-c", PEAK, str(n), *how], capture_output=True, text=True, check=True).stdout
        return int(said.splitlines()[-1])

    assert peak("forward", which) < each + 64 * 2**20 < scores / 6
    assert peak("grad", which) < 12 * each < scores / 5


# ---- the condition


def test_which_calls_blocks_serve():
    query, key, value, _ = (tf.constant(x) for x in draw(lead=(2,), n=500, m=500))
    serves = partial(tiled.serves, tab, query, key, value)
    assert serves(tab.scaled_dot_score, tab.softmax)
    assert serves(tab.dot_score, tab.masked_softmax)
    assert not serves(tab.distance_score, tab.softmax)
    assert not serves(partial(tab.dot_score), tab.softmax)
    assert not serves(tab.dot_score, tab.sparsemax)
    assert not serves(tab.dot_score, tab.softmax, dropout=0.1)
    assert not serves(tab.dot_score, tab.softmax, return_weights=True)
    assert not serves(tab.dot_score, tab.softmax, bias=tf.zeros(500))
    assert not tiled.serves(tab, query[:, :1], key, value, tab.dot_score, tab.softmax)
    assert not tiled.serves(tab, query, key[:1], value, tab.dot_score, tab.softmax)
    with patch.object(tf.config, "list_physical_devices", lambda kind: [kind]):
        assert not serves(tab.dot_score, tab.softmax)
