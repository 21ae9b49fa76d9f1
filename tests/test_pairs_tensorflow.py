"""Functions of positions and segments in TensorFlow's graphs, and gradients by what a bias function reads."""

import numpy as np
import pytest
from conftest import chosen

if "tensorflow" not in chosen():
    pytest.skip("this run is without TensorFlow", allow_module_level=True)

import tensorflow as tf
from paired import SEGMENTS, SLOPES, answers, inputs, looked_at, said

import kvattn

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
