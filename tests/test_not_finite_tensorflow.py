"""NaN that only a loss brings, under a tape of the user's own: the forward pass was finite, and was computed as such.

What it does not reach is compared with kvattn.attention_grad without NaN, which the conformance suite judges.
"""

import numpy as np
import pytest
from conftest import chosen
from tiling import draw

import kvattn

if "tensorflow" not in chosen():
    pytest.skip("this run is without TensorFlow", allow_module_level=True)

import tensorflow as tf

AT, N = 3, 6
SEES = np.tri(N, dtype=bool)
BIAS = np.where(SEES, np.cos(np.arange(N)), -np.inf)
WAYS = {"eager": lambda f: f, "tf.function": tf.function(autograph=False)}
WITH_XLA = tf.function(autograph=False, jit_compile=True)


def by_own_tape(query, key, value, grad, **options):
    with tf.GradientTape() as tape:
        by = [query, key, value, *[x for name, x in options.items() if name == "bias"]]
        tape.watch(by)
        output = kvattn.attention(query, key, value, **options)
    return tape.gradient(output, by, grad)


@pytest.mark.parametrize("way", WAYS.values(), ids=[*WAYS])
@pytest.mark.parametrize("kv", [(2, 4), (2, 2), (1, 1)], ids="{0[0]} x {0[1]} heads of keys".format)
@pytest.mark.parametrize("options", [
    {"bias": BIAS},
    {"bias": BIAS, "normalize": kvattn.identity},
    {"bias": BIAS[None], "valid_lens": np.array([6, 6])},
    {"bias": BIAS, "score": kvattn.distance_score},
    {"bias": np.where(SEES, BIAS, 0), "mask": SEES},
    {"mask": SEES, "dropout": 0.2, "rng": 3},
    {"causal": True, "score": kvattn.distance_score},
    {"valid_lens": np.arange(1, 7) * np.ones((2, 1), int), "normalize": kvattn.proportional, "score": kvattn.gaussian_kernel},
], ids=", ".join)  # fmt: skip
def test_nan_of_a_loss_stays_with_its_query_and_what_it_sees(options, kv, way):
    arrays = [tf.constant(x) for x in draw(lead=(2, 4), kv=kv, n=N, m=N)]
    options = {name: tf.constant(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    wrt = ["query", "key", "value", *["bias"] * ("bias" in options)]
    clean = kvattn.attention_grad(*arrays, wrt=wrt, **options)
    nan = arrays[-1].numpy()
    nan[:, :, AT] = np.nan
    found = way(lambda *arrays: by_own_tape(*arrays, **options))(*arrays[:3], tf.constant(nan))
    after, others = np.arange(N) > AT, np.arange(N) != AT
    for x, y, untouched in zip(found[:3], clean, (others, after, after), strict=False):
        np.testing.assert_allclose(x.numpy()[..., untouched, :], y.numpy()[..., untouched, :], rtol=1e-9, atol=1e-12)
        assert np.isnan(x.numpy()[..., ~untouched, :]).any(axis=-1).all()
    for x in found[3:]:
        assert np.isfinite(x.numpy()[..., ~SEES]).all()


@pytest.mark.parametrize("options", [{"bias": BIAS}, {"bias": np.where(SEES, BIAS, 0), "mask": SEES}], ids=", ".join)
def test_nan_of_a_loss_stays_there_with_xla(options):
    test_nan_of_a_loss_stays_with_its_query_and_what_it_sees(options, (2, 2), WITH_XLA)


@pytest.mark.parametrize("options", [{"bias": BIAS}, {"mask": SEES}, {"valid_lens": np.array([6, 3])}], ids=", ".join)
def test_no_condition_copies_scores_with_xla(options):
    """XLA computes what leaves pairs out along with the softmax, but copies what a condition hands through."""
    arrays = [tf.constant(x) for x in draw(lead=(2, 4), n=N, m=N)]
    options = {name: tf.constant(x) for name, x in options.items()}
    graph = WITH_XLA(lambda *arrays: by_own_tape(*arrays, **options)).get_concrete_function(*arrays).graph
    found = [x.shape[-2:] for op in graph.get_operations() if op.type in ("If", "StatelessIf") for x in op.outputs]
    assert found
    assert [N, N] not in found


def test_nan_of_a_loss_in_one_head_changes_no_other():
    arrays = [tf.constant(x) for x in draw(lead=(2, 4), n=N, m=N)]
    nan = arrays[-1].numpy()
    nan[1, 2, AT, 0] = np.nan
    options = {"bias": tf.constant(BIAS)}
    clean = kvattn.attention_grad(*arrays, **options)
    found = by_own_tape(*arrays[:3], tf.constant(nan), **options)
    head = np.zeros((2, 4, 1, 1), bool)
    head[1, 2] = True
    for x, y in zip(found, clean, strict=False):
        np.testing.assert_allclose(np.where(head, 0, x), np.where(head, 0, y), rtol=1e-9, atol=1e-12)
    assert np.isnan(found[2].numpy()[1, 2, : AT + 1, 0]).all()
    np.testing.assert_allclose(found[2][1, 2, :, 1], clean[2][1, 2, :, 1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"bias": BIAS}, {"mask": SEES}], ids=", ".join)
def test_every_kind_of_derivative_under_tapes(options):
    """Those of attention where all is finite, and a tape records, are those of the formula written out."""
    query, key, value, grad = (tf.constant(x) for x in draw(lead=(2, 4), n=N, m=N))
    options = {name: tf.constant(x) for name, x in options.items()}

    def written_out(query, key, value):
        scores = tf.matmul(query, key, transpose_b=True) / np.sqrt(query.shape[-1])
        bias = tf.where(SEES, options.get("bias", tf.zeros((), tf.float64)), -np.inf)
        return tf.matmul(tf.nn.softmax(scores + bias), value)

    def derivatives(function):
        arrays = [query, key, value]
        with tf.GradientTape() as outer:
            outer.watch(arrays)
            with tf.GradientTape() as tape:
                tape.watch(arrays)
                output = tf.reduce_sum(function(*arrays) * grad)
            firsts = tape.gradient(output, arrays)
            along = sum(tf.reduce_sum(x * tf.cos(x)) for x in firsts)
        with tf.autodiff.ForwardAccumulator(arrays, [tf.cos(x) for x in arrays]) as forward:
            output = function(*arrays)
        results = [*firsts, *outer.gradient(along, arrays), forward.jvp(output)]
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            output = function(*arrays)
        return [*results, *tape.jacobian(output, arrays)]

    found = derivatives(lambda *qkv: kvattn.attention(*qkv, **options))
    for x, y in zip(found, derivatives(written_out), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
