"""Functions of positions and segments in TensorFlow's graphs, and gradients by what a bias function reads."""

import numpy as np
import pytest
from conftest import chosen

if "tensorflow" not in chosen():
    pytest.skip("this run is without TensorFlow", allow_module_level=True)

from unittest.mock import patch

import tensorflow as tf
from paired import SEGMENTS, SLOPES, answers, inputs, looked_at, said

import kvattn
from kvattn.kernels.tensorflow import tiles

TENSORS = [tf.constant(x) for x in inputs()]
UNKNOWN = [tf.TensorSpec((None, 2, None, 4))] * 3
FLOATS = lambda x: tf.cast(x, tf.float32)  # noqa: E731
SAID = said(tf.constant(SLOPES), tf.constant(SEGMENTS), FLOATS)


@pytest.mark.parametrize("how", [{}, {"input_signature": UNKNOWN}, {"jit_compile": True}], ids=["known", "unknown", "XLA"])
@pytest.mark.parametrize("name", SAID)
def test_a_graph_gives_the_answer(name, how):
    with looked_at():
        got = tf.function(lambda *tensors: kvattn.attention(*tensors, **SAID[name]), **how)(*TENSORS)
    np.testing.assert_allclose(got, answers()[name], atol=1e-5)


def test_segments_may_come_later():
    signature = [tf.TensorSpec((None, None), tf.int32), *UNKNOWN]
    attend = tf.function(lambda ids, *tensors: kvattn.attention(*tensors, segments=ids), input_signature=signature)
    np.testing.assert_allclose(attend(SEGMENTS, *TENSORS), answers()["segments"], atol=1e-5)


@pytest.mark.parametrize("most", [10**6, 2000])
def test_what_a_bias_function_reads_has_its_gradient(most):
    slopes = tf.Variable(SLOPES)
    with looked_at(BIAS=most), tf.GradientTape() as tape:
        loss = tf.reduce_sum(kvattn.attention(*TENSORS, **said(slopes, None, FLOATS)["bias"]))
    np.testing.assert_allclose(tape.gradient(loss, slopes), answers()["by the slopes"], rtol=1e-4)


# ---- segments that blocks compare, since a graph does not show them


IDS = {  # of 3 entries: (queries, keys)
    "sorted": lambda rng, *sizes: [np.sort(rng.integers(0, 5, (3, size))) for size in sizes],
    "apart": lambda rng, *sizes: [rng.integers(-2, 4, (3, size)) for size in sizes],
    "some without keys": lambda rng, n, m: [np.sort(rng.integers(0, 9, (3, n))), rng.integers(0, 4, (3, m))],
}
BESIDE = [
    {}, {"causal": True, "query_offset": 2}, {"window": (60, 9), "valid_lens": np.array([150, 0, 90])},
    {"sink": np.array([0.5, -1.0])}, {"mask": lambda q, k: (q + k) % 3 > 0},
]  # fmt: skip
FEW = {"SMALLEST": 1000, "AT_ONCE": 0, "SCORES": 2**13, "GRAD_SCORES": 2**13, "FEWEST": 8}


@pytest.mark.parametrize("ids", IDS)
def test_ranges_of_segments(ids):
    of_queries, of_keys = IDS[ids](np.random.default_rng(0), 40, 30)
    low, high = (x.numpy() for x in tiles._ranges(tf.constant(of_queries), tf.constant(of_keys), 3, 16))
    assert low.shape == high.shape == (3, 3)
    for entry, i in np.ndindex(3, 3):
        wanted = of_queries[entry, 16 * i : 16 * i + 16]
        places = np.flatnonzero(np.isin(of_keys[entry], wanted))
        assert (low[entry, i], high[entry, i]) == ((places[0], places[-1] + 1) if len(places) else (30, 0))


@pytest.mark.parametrize(("ids", "options"), [*zip((*IDS, "apart", "apart"), BESIDE, strict=True)])
def test_blocks_compare_segments_in_a_graph(ids, options):
    rng = np.random.default_rng(1)
    shapes = (3, 2, 170, 4), (3, 1, 200, 4), (3, 1, 200, 5)
    arrays, (of_queries, of_keys) = [rng.standard_normal(shape) for shape in shapes], IDS[ids](rng, 170, 200)
    same = of_queries[:, None, :, None] == of_keys[:, None, None, :]
    beside = {"mask": options["mask"](np.arange(170)[:, None], np.arange(200))} if "mask" in options else {}
    whole = {**options, "mask": same & beside.get("mask", True)}
    grad = rng.standard_normal((3, 2, 170, 5))

    @tf.function
    def both(tensors, of_queries, of_keys, grad):
        said.append(kvattn.explain(*tensors, segments=(of_queries, of_keys), **options))
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            output = kvattn.attention(*tensors, segments=(of_queries, of_keys), **options)
        return output, tape.gradient(output, tensors, grad)

    said = []
    with patch.multiple(tiles, **FEW):
        output, grads = both([tf.constant(x) for x in arrays], *(tf.constant(x) for x in (of_queries, of_keys, grad)))
    assert "segments are compared in its blocks" in said[0].why
    np.testing.assert_allclose(output, kvattn.attention(*arrays, **whole), atol=1e-12)
    for found, want in zip(grads, kvattn.attention_grad(*arrays, grad, **whole), strict=True):
        np.testing.assert_allclose(found, want, atol=1e-11)


@pytest.mark.parametrize("lead", [(), (3,), (3, 1, 2)])
def test_blocks_compare_segments_of_any_number_of_axes(lead):
    rng = np.random.default_rng(2)
    x, ids = rng.standard_normal((*lead, 90, 4)), rng.integers(0, 4, (*lead[:1], 90))
    with patch.multiple(tiles, **FEW):
        found = tf.function(lambda x, ids: kvattn.attention(x, x, x, segments=ids))(tf.constant(x), tf.constant(ids))
    np.testing.assert_allclose(found, kvattn.attention(x, x, x, segments=ids), atol=1e-12)


def test_second_derivatives_beside_segments_in_a_graph():
    rng = np.random.default_rng(3)
    x, ids = tf.constant(rng.standard_normal((1, 60, 3))), rng.integers(0, 3, (1, 60))
    same = tf.constant(ids[:, :, None] == ids[:, None])

    def twice(**options):
        def second(x, ids):
            options.update({} if "mask" in options else {"segments": ids})
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    loss = tf.reduce_sum(kvattn.attention(x, x, x, **options) ** 2)
                first = inner.gradient(loss, x)
                total = tf.reduce_sum(first**2)
            return outer.gradient(total, x)

        return tf.function(second)(x, tf.constant(ids))

    with patch.multiple(tiles, **FEW):
        np.testing.assert_allclose(twice(), twice(mask=same), atol=1e-10)


def test_what_is_not_finite_stays_in_its_segment():
    rng = np.random.default_rng(4)
    arrays = [rng.standard_normal((1, 1, 120, 4)).astype("float32") for _ in range(3)]
    ids = rng.integers(0, 4, (1, 120))
    arrays[2][0, 0, 50] = np.nan
    with patch.multiple(tiles, **FEW):
        found = kvattn.attention(*map(tf.constant, arrays), segments=ids).numpy()
    assert (np.isnan(found).all(axis=-1)[0, 0] == (ids[0] == ids[0, 50])).all()
