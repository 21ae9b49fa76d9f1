"""What is TensorFlow's own in its blocks: traces of every kind, Keras, further derivatives, memory, which calls they serve.

What every backend's fast path promises is in test_tiled.py.
"""

import subprocess
import sys
from functools import partial, wraps
from unittest.mock import patch

import numpy as np
import pytest
from conftest import chosen
from near import assert_near

if "tensorflow" not in chosen():
    pytest.skip("this run is without TensorFlow", allow_module_level=True)

import keras
import tensorflow as tf
from tiling import RESTRICTIONS, WRT, allowed, call, draw, functions, judge, made, subject, with_arrays

import kvattn
from kvattn import partition
from kvattn.backends import tensorflow as tab
from kvattn.call import Call
from kvattn.conformance import check, position_functions
from kvattn.kernels.tensorflow import distances
from kvattn.kernels.tensorflow import tiles as tiled

SUBJECT = subject("tensorflow")


def in_blocks():
    """Every call that blocks can serve is served by small ones; names the passes that were."""
    return SUBJECT.forced(SUBJECT.sizes["blocks of 12 scores"])


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


@pytest.mark.parametrize("which", ["mask of columns", "lengths per query", "mask"])
def test_what_nobody_sees_reaches_nothing_in_a_graph(which):
    def way(subject, arrays, options):
        return graph(lambda *arrays: functions(subject, arrays, options))(*arrays)

    case = call(which, 9, 12)
    unseen = ~allowed(case).any(axis=-2)
    dirty = {name: case.arguments[name].copy() for name in WRT}
    dirty["query"][~allowed(case).any(axis=-1)] = dirty["key"][unseen] = dirty["value"][unseen] = np.nan
    with in_blocks() as served:
        judge(case, "float64", SUBJECT.found(with_arrays(case, **dirty), way=way))
    assert served


@pytest.mark.parametrize(
    "options",
    [
        {}, {"causal": True}, {"window": (None, 2), "query_offset": -3}, {"valid_lens": np.array([7, 0])},
        {"causal": True, "scale": 60.0}, {"window": (2, 1), "softcap": 5.0}, {"valid_lens": np.arange(18).reshape(2, 9) % 12},
        {"causal": True, "valid_lens": np.array([0, 9]), "query_offset": np.array([2, -4])}, {"score": kvattn.dot_score},
    ],
    ids=str,
)  # fmt: skip
def test_a_sink_joins_the_sums(options):
    """And nothing else of a call changes: rows without keys, grouped heads, a sink of each query, one far above the scores."""
    rng = np.random.default_rng(0)
    shapes = (2, 4, 9, 3), (2, 2, 11, 3), (2, 2, 11, 5)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    given = [tf.constant(x) for x in arrays]
    for sink in (rng.standard_normal(4), rng.standard_normal((2, 4, 9, 1)), np.array([50.0, -50.0, 0.0, 1.0])):
        expected = kvattn.attention(*arrays, sink=sink, **options)
        with in_blocks() as served:
            assert_near(kvattn.attention(*given, sink=tf.constant(sink), **options), expected)
            assert "joins each block's sums" in kvattn.explain(*given, sink=tf.constant(sink), **options).why
        assert served


@pytest.mark.parametrize("broken", ["query", "key", "sink"])
def test_a_sink_joins_no_sums_where_something_is_not_finite(broken):
    rng = np.random.default_rng(0)
    arrays = {"query": rng.standard_normal((1, 2, 9, 3)), "key": rng.standard_normal((1, 2, 9, 3)), "sink": np.zeros(2)}
    if broken == "sink":
        arrays["sink"][1] = -np.inf
    else:
        arrays[broken][..., -2:, 0] = -np.inf
    with np.errstate(invalid="ignore"):
        expected = kvattn.attention(arrays["query"], arrays["key"], arrays["key"], sink=arrays["sink"], causal=True)
    query, key, sink = map(tf.constant, arrays.values())
    with in_blocks():
        assert_near(kvattn.attention(query, key, key, sink=sink, causal=True), expected)


@pytest.mark.parametrize("scores", [(-86.0, -88.5), (88.5, 88.25)], ids=str)
@pytest.mark.parametrize("given", [{"return_lse": True}, {"sink": np.full(2, -88.0, "float32")}], ids=["lse", "sink"])
@pytest.mark.parametrize("width", [3, 0])
def test_exponentials_that_vanish_or_have_no_sum(width, given, scores):
    """exp(-86) is a number of float32, exp(-88.5) is none; each of the others is one, their sum is not."""
    rng = np.random.default_rng(0)
    query, value = np.ones((2, 9, 1), "float32"), rng.standard_normal((2, 2, width)).astype("float32") / 64
    key = np.broadcast_to(np.array(scores, "float32")[:, None], (2, 2, 1)).copy()
    wide = {name: x if x is True else x.astype("float64") for name, x in given.items()}
    expected = kvattn.attention(*(x.astype("float64") for x in (query, key, value)), **wide)
    with in_blocks() as served:
        found = kvattn.attention(*map(tf.constant, (query, key, value)), **given)
    assert served
    for x, y in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5)  # scores of 88 in float32


@pytest.mark.parametrize("which", ["nothing", "window"])
def test_scores_beyond_the_range_of_exp_in_a_graph(which):
    """Where nobody sees that exponentials overflow, no row goes without its maximum."""

    def way(subject, arrays, options):
        return graph(lambda *arrays: functions(subject, arrays, options))(*arrays)

    query, key, value = (call().arguments[name].copy() for name in WRT)
    key[:, 5] *= 2.0**13
    query[:, ::2] /= 64
    case = made(query, key, value, dtypes=("float64",), **RESTRICTIONS[which](9, 7))
    with in_blocks() as served:
        judge(case, "float64", SUBJECT.found(case, way=way))
    assert served


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
        assert_near(model(x), expected)
        model.compile("sgd", "mse", jit_compile=False)
        first = model.evaluate(x, tf.zeros_like(x), verbose=0)
        model.fit(x, tf.zeros_like(x), epochs=3, verbose=0)
        assert model.evaluate(x, tf.zeros_like(x), verbose=0) < first
        assert "_backward" in served
        tf.saved_model.save(Attend(), str(tmp_path))
    assert_near(tf.saved_model.load(str(tmp_path))(x), expected)


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


def test_one_compilation_serves_half_precision_and_float32():
    traced = []

    def noted(name, function):
        def run(call):
            traced.append(name)
            return function(call)

        return wraps(function)(run)

    passes = {name: noted(name, getattr(tiled, name)) for name in ("_forward", "_backward")}
    with in_blocks(), patch.multiple(tiled, **passes):
        for dtype in ("float16", "bfloat16", "float32"):
            arrays = [tf.cast(x, dtype) for x in draw(n=9, m=8)]
            kvattn.attention_grad(*arrays, causal=True, query_offset=3, softcap=1.25)
    assert sorted(traced) == ["_backward", "_forward"]


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


@pytest.mark.parametrize("way", ["eager", "tf.function"])
def test_second_derivatives_by_one_tensor_as_query_key_and_value(way):
    x, *_, grad = (tf.constant(x) for x in draw(lead=(2, 2), m=9, v=3))

    def second(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            first = kvattn.attention_grad(x, x, x, grad, causal=True)
        return outer.gradient(first, x)

    expected = second(x)
    with in_blocks() as served:
        np.testing.assert_allclose(WAYS[way](second)(x), expected, rtol=0, atol=1e-12)
    assert "_backward" in served


def test_a_repeated_call_finds_nothing_of_the_last():
    arrays = [tf.constant(x) for x in draw(lead=(2, 2))]
    with in_blocks():
        call = graph(partial(gradients, causal=True))
        first = [x.numpy() for x in call(*arrays)]
        for x, y in zip(call(*arrays), first, strict=True):
            np.testing.assert_array_equal(x, y)


# ---- a bias by distance


def test_a_bias_by_distance_is_one_line_in_small_blocks():
    """Of every size of blocks, beside every option, grouped heads and sinks among them."""
    cases = [
        case
        for case in position_functions.cases(np.random.default_rng(1))
        if case.name.startswith(("bias function", "heads: func"))
    ]
    lines, original = [], distances.by_distance

    def by_distance(*arguments):
        lines.append(original(*arguments))
        return lines[-1]

    with in_blocks(), patch.multiple(partition, FEW=0), patch.object(distances, "by_distance", by_distance):
        report = check.run("tensorflow", cases, dtypes=("float64",))
    assert [x.message for x in report.failures] == []
    assert sum(line is not None for line in lines) > len(cases) // 2


def _attend_by_distance(query, key, value, slope, whole=False):
    """attention with a bias of each distance times slope; ``whole``: an array of all pairs."""
    bias = lambda q, k: -slope * tf.cast(abs(q - k), slope.dtype)  # noqa: E731
    if whole:
        bias = bias(tf.range(query.shape[-2])[:, None], tf.range(key.shape[-2]))
    return kvattn.attention(query, key, value, bias=bias, softcap=2.0)


def test_derivatives_beside_a_bias_by_distance():
    """Once, twice, forwards, and by what the function reads."""
    query, key, value, _ = (tf.constant(x) for x in draw(lead=(2, 2), n=9, m=7))
    slope = tf.constant([[[0.5]], [[0.25]]], tf.float64)

    def derivatives(whole):
        with tf.GradientTape() as outer:
            outer.watch([query, key])
            with tf.GradientTape() as tape:
                tape.watch([query, value])
                loss = tf.reduce_sum(_attend_by_distance(query, key, value, slope, whole) ** 2)
            firsts = tape.gradient(loss, [query, value])
        yield from firsts
        yield from outer.gradient(firsts, [query, key])
        with tf.GradientTape() as tape:
            tape.watch(slope)
            loss = tf.reduce_sum(_attend_by_distance(query, key, value, slope, whole) ** 2)
        yield tape.gradient(loss, slope)
        with tf.autodiff.ForwardAccumulator(slope, tf.ones_like(slope)) as forward:
            output = _attend_by_distance(query, key, value, slope, whole)
        yield forward.jvp(output)

    expected = [*derivatives(whole=True)]
    with in_blocks() as served, patch.multiple(partition, FEW=0):
        for x, y in zip(derivatives(whole=False), expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)
    assert "_backward" in served


@pytest.mark.parametrize("everywhere", [800.0, -800.0])
def test_a_bias_by_distance_beyond_the_range_of_exp(everywhere):
    """exp(800) is inf and exp(-800) is 0, in float64 too: the sums that take no maximum are not used then."""
    arrays = draw(lead=(2, 2))
    bias = lambda q, k: everywhere - 0.5 * tf.cast(abs(q - k), tf.float64)  # noqa: E731
    with in_blocks() as served, patch.multiple(partition, FEW=0):
        got = kvattn.attention(*map(tf.constant, arrays[:3]), bias=bias)
    ahead = np.arange(arrays[1].shape[-2]) - np.arange(arrays[0].shape[-2])[:, None]
    want = kvattn.attention(*arrays[:3], bias=everywhere - 0.5 * abs(ahead))
    assert served == ["_forward", "_forward"]  # again, with a maximum
    assert_near(got, want)


def test_nan_beside_a_bias_by_distance_stays_with_its_pairs():
    rng, ahead = np.random.default_rng(0), np.arange(520) - np.arange(520)[:, None]
    query, key, value = rng.standard_normal((3, 1, 2, 520, 4)).astype("float32")
    key[0, :, 200], value[0, :, 250] = np.nan, np.inf
    own = tf.constant([0.5, 0.25])[:, None, None]
    bias = lambda q, k: -own * tf.cast(abs(q - k), tf.float32)  # noqa: E731
    assert kvattn.explain(*map(tf.constant, (query, key, value)), bias=bias, causal=True).kernel == "blocks"
    got = kvattn.attention(*map(tf.constant, (query, key, value)), bias=bias, causal=True)
    want = kvattn.attention(query, key, value, bias=-own.numpy() * abs(ahead).astype("float32"), causal=True)
    assert_near(got, want)
    assert np.isfinite(want[..., :200, :]).all()


# ---- memory


def test_a_window_makes_blocks_of_fewer_queries():
    sizes = {}

    def noted(function, kind, specs, compiled=tiled._compiled):
        sizes[kind.right] = kind.most
        return compiled(function, kind, specs)

    with patch.multiple(tiled, SMALLEST=0, _compiled=noted):
        for options in ({}, {"causal": True}):
            kvattn.attention(*map(tf.constant, draw()[:3]), **options)
    assert sizes == {None: tiled.ROWS, 0: tiled.BAND_ROWS}


def test_blocks_of_the_way_back_are_larger():
    scores, compiled = {}, tiled._compiled

    def noted(function, kind, specs):
        scores[function.__name__] = kind.scores
        return compiled(function, kind, specs)

    with patch.multiple(tiled, SMALLEST=0, _compiled=noted):
        kvattn.attention_grad(*map(tf.constant, draw()))
    assert scores == {"_forward": tiled.SCORES, "_backward": tiled.GRAD_SCORES}
    assert tiled.GRAD_SCORES > tiled.SCORES


PEAK = """
import os, resource, sys
import tensorflow as tf, kvattn

def peak(n, grad, options):
    arrays = [tf.random.normal((1, 8, n, 64)) for _ in range(4 if grad else 3)]
    call = kvattn.attention_grad if grad else kvattn.attention
    few = [x[:, :, :512] for x in arrays]
    kept = call(*few, **options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = call(*arrays, **options)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

for options in {}, {"causal": True}:
    for grad in False, True:
        if not os.fork():  # a peak of its own, without another import
            print(peak(int(sys.argv[1]), grad, options), flush=True)
            os._exit(0)
        assert os.wait()[1] == 0
"""


def test_memory_is_a_few_blocks():
    n = 4096
    each, scores = 4 * 8 * n * 64, 4 * 8 * n * n
    said = subprocess.run([sys.executable, "-c", PEAK, str(n)], capture_output=True, text=True, check=True).stdout
    peaks = list(map(int, said.split()))
    assert len(peaks) == 4  # of nothing, then of causal
    for forward, gradients in (peaks[:2], peaks[2:]):
        assert forward < each + 64 * 2**20 < scores / 6
        assert gradients < 12 * each < scores / 5


# ---- the condition


def serves(query, key, value, score=tab.dot_score, normalize=tab.softmax, **options):
    return not tiled.obstacle(tab, query, key, value, Call(score, normalize, **options))


def test_which_calls_blocks_serve():
    query, key, value, _ = (tf.constant(x) for x in draw(lead=(2,), n=600, m=600))
    assert serves(query, key, value, tab.scaled_dot_score)
    assert serves(query, key, value, tab.dot_score, tab.masked_softmax)
    assert not serves(query, key, value, tab.distance_score)
    assert not serves(query, key, value, partial(tab.dot_score))
    assert not serves(query, key, value, normalize=tab.sparsemax)
    assert not serves(query, key, value, dropout=0.1)
    assert not serves(query, key, value, return_weights=True)
    assert not serves(query, key, value, bias=tf.zeros(500))
    assert serves(query, key, value, bias=distances.Line(tf.zeros(1199)))
    assert not serves(query[:, :1], key, value)
    assert not serves(query, key[:1], value)
    with patch.object(tf.config, "list_physical_devices", lambda kind: [kind]):
        assert not serves(query, key, value)


def test_calls_that_look_at_every_key_are_cut_when_they_are_larger():
    query, key, value, _ = (tf.constant(x) for x in draw(lead=(2,), n=500, m=500))
    assert not serves(query, key, value)
    for restriction in ({"causal": True}, {"valid_lens": [3, 4]}, {"window": 2}):
        assert kvattn.explain(query, key, value, **restriction).kernel == "blocks"
    for restriction in ({"mask": np.ones((500, 500), bool)}, {"valid_lens": np.ones((2, 500), int)}):  # these leave out none
        assert kvattn.explain(query, key, value, **restriction).kernel != "blocks"
    assert kvattn.explain(query, key, value).kernel != "blocks"
    with patch.object(tiled, "AT_ONCE", 499_999):
        assert kvattn.explain(query, key, value).kernel == "blocks"
        assert not serves(query[:1], key[:1], value[:1])
    unknown = [tf.TensorSpec((None, 2, 500, 3))] * 3
    assert serves(*unknown)
