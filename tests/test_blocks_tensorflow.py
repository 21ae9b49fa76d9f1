"""TensorFlow meets any score and any normaliser in blocks of queries: no array of queries by keys by features ever exists."""

import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
from conftest import chosen
from tiling import draw

import kvattn
from kvattn import conformance

if "tensorflow" not in chosen():
    pytest.skip("this run is without TensorFlow", allow_module_level=True)

import tensorflow as tf

from kvattn.kernels.tensorflow import blocks

graph = partial(tf.function, autograph=False)
WAYS = {"eager": lambda f: f, "tf.function": graph}


@contextmanager
def in_blocks(numbers=8):
    """Every call is cut into blocks of a few numbers; notes the scores of those that were."""
    served, attention = [], blocks.attention

    def noted(tab, serve, query, key, value, call, plan):
        served.append(call.score)
        return attention(tab, serve, query, key, value, call, plan)

    with patch.multiple(blocks, MOST=numbers, attention=noted):
        yield served


def test_options_drawn_together_in_blocks():
    cases = [case for case in conformance.cases() if case.group == "combinations"]
    with in_blocks() as served:
        report = conformance.run("tensorflow", cases)
    assert not report.failures, "\n".join(result.message for result in report.failures)
    assert len(served) > len(cases) / 2


def my_score(query, key):
    return tf.reduce_sum(tf.tanh(query[..., :, None, :] - key[..., None, :, :]), axis=-1)


def additive(d, hidden=32, dtype="float64"):
    rng = np.random.default_rng(0)
    shapes = {"W_q": (d, hidden), "W_k": (d, hidden), "w_v": (hidden,)}
    return partial(kvattn.additive_score, **{name: tf.constant(rng.standard_normal(x), dtype) for name, x in shapes.items()})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [
    {"causal": True, "query_offset": -2, "valid_lens": np.array([3, 6])},
    {"mask": np.arange(63).reshape(9, 7) % 3 > 0, "valid_lens": np.arange(18).reshape(2, 9) % 8},
    {"causal": True, "query_offset": np.array([1, 0]), "return_weights": True, "return_lse": True},
], ids=lambda options: ", ".join(options))  # fmt: skip
def test_whole_blocks_and_a_smaller_one_are_the_whole(way, options):
    arrays = [tf.constant(x) for x in draw(lead=(2, 4), kv=(2, 2), n=9, m=7)]
    bound = {name: x for name, x in options.items() if not name.startswith("return")}
    for score, more in ((my_score, []), (additive(arrays[0].shape[-1], 3), ["W_k", "w_v"])):

        def results(*arrays, score=score, more=more):
            found = kvattn.attention(*arrays[:3], score=score, **options)
            grads = kvattn.attention_grad(*arrays, score=score, wrt=["query", "key", "value", *more], **bound)
            return [*(found if isinstance(found, tuple) else [found]), *grads]

        expected = results(*arrays)
        with in_blocks(2 * 8 * 7 * 3) as served:  # two queries of each head
            found = WAYS[way](results)(*arrays)
        assert served
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{"mask": [True] * 5 + [False] * 2}, {"valid_lens": [3, 6]}], ids=", ".join)
def test_a_graph_may_close_over_a_mask_or_lengths(options):
    arrays = [tf.constant(x) for x in draw(lead=(2,))]
    call = partial(kvattn.attention_grad, **{name: tf.constant(x) for name, x in options.items()}, score=kvattn.distance_score)
    expected = call(*arrays)
    with in_blocks() as served:
        found = graph(call)(*arrays)
    assert served
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


def test_a_block_may_hold_as_many_numbers_as_a_bias_has():
    query, key, value, _ = (tf.constant(x) for x in draw(lead=(2, 4), n=9, m=7))
    for lead, whole in (((2, 4), True), ((), False)):
        with in_blocks() as served:
            found = kvattn.attention(query, key, value, bias=np.ones((*lead, 9, 7)))
        assert bool(served) != whole
        np.testing.assert_allclose(found, kvattn.attention(query, key, value), rtol=1e-12)


def test_unknown_sizes_are_served_whole():
    arrays = [tf.constant(x) for x in draw(n=6, m=5)[:3]]
    lens = tf.constant([[1, 2, 3, 4, 5, 0]] * 2)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None, None], lens.dtype)])
    def call(lens):
        return kvattn.attention(*arrays, score=kvattn.distance_score, valid_lens=lens)

    expected = kvattn.attention(*arrays, score=kvattn.distance_score, valid_lens=lens)
    with in_blocks() as served:
        np.testing.assert_allclose(call(lens), expected, rtol=1e-12)
        assert not served
        kvattn.attention(*arrays, score=kvattn.distance_score, valid_lens=lens)
        assert served


@pytest.mark.parametrize("way", WAYS)
def test_what_a_score_of_ones_own_reads_has_its_gradient(way):
    query, key, value, grad = (tf.constant(x) for x in draw(lead=(), n=6, m=5))
    captured, variable = tf.constant(0.5, tf.float64), tf.Variable(2.0, dtype=tf.float64)

    def score(query, key):
        return captured * variable * my_score(query, key)

    def grads(query, key, value):
        with tf.GradientTape() as tape:
            tape.watch([captured, key])
            output = kvattn.attention(query, key, value, score=score)
        return tape.gradient(output, [captured, variable, key], grad)

    expected = [*grads(query, key, value), *kvattn.attention_grad(query, key, value, grad, score=score)]
    with in_blocks(2 * 5 * 3) as served:
        found = WAYS[way](grads)(query, key, value)
        found += [*WAYS[way](partial(kvattn.attention_grad, score=score))(query, key, value, grad)]
    assert served
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


def test_a_scores_parameter_may_have_the_name_of_an_option():
    arrays = [tf.constant(x) for x in draw(lead=(), n=3, m=3, v=3)]
    options, factor, shift = {"mask": np.tri(3, dtype=bool), "bias": np.eye(3)}, tf.constant(2.0, tf.float64), np.arange(3.0)

    def score(query, key, mask, bias):
        return mask * my_score(query, key) + bias

    def results(score):
        grads = kvattn.attention_grad(*arrays, score=score, wrt=["query", "key", "value", "bias"], **options)
        return kvattn.attention(*arrays[:3], score=score, **options), *grads

    expected = results(lambda query, key: score(query, key, factor, shift))
    for numbers in (8, 2**24):
        with in_blocks(numbers) as served:
            found = results(partial(score, mask=factor, bias=tf.constant(shift)))
        assert bool(served) == (numbers == 8)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_of_a_normaliser_of_ones_own_meets_no_value_that_is_hidden(way):
    """It may spread NaN over a row, wherever the row's NaN stands."""
    query, key, value, grad = draw(n=5, m=5)
    value[:, 4] = np.nan
    arrays = [tf.constant(x) for x in (query, key, value, grad)]

    def normalize(scores, where):
        return tf.nn.softmax(tf.where(where, scores, -np.inf))

    found, expected = (
        WAYS[way](partial(kvattn.attention_grad, causal=True, normalize=x))(*arrays) for x in (normalize, kvattn.softmax)
    )
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)
    assert np.isfinite(found[0][:, :4]).all()


@pytest.mark.parametrize("way", WAYS)
def test_parameters_that_are_variables_are_trained(way):
    query, key, value, grad = (tf.constant(x) for x in draw(lead=(), n=6, m=5))
    bound = {name: tf.Variable(x) for name, x in additive(query.shape[-1], 3).keywords.items()}

    def grads():
        with tf.GradientTape() as tape:
            output = kvattn.attention(query, key, value, score=partial(kvattn.additive_score, **bound))
        return tape.gradient(output, [*bound.values()], grad)

    expected = grads()
    with in_blocks(2 * 5 * 3) as served:
        found = WAYS[way](grads)()
    assert served
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rng", [None, 3], ids=["TensorFlow's own state", "a seed"])
def test_dropout_in_blocks_draws_for_each_and_the_same_for_the_gradient(rng):
    same, eye = tf.zeros((64, 3)), tf.eye(64)
    with in_blocks(8 * 64), tf.GradientTape() as tape:
        tape.watch(eye)
        output, weights = kvattn.attention(same, same, eye, dropout=0.5, rng=rng, return_weights=True)
        total = tf.linalg.trace(output)
    kept = output.numpy() > 0
    assert len({*map(bytes, kept)}) == 64
    assert 0.4 < kept.mean() < 0.6
    np.testing.assert_allclose(weights, 1 / 64)
    np.testing.assert_allclose(tf.linalg.diag_part(tape.gradient(total, eye)), tf.linalg.diag_part(output))


def test_every_kind_of_derivative_in_blocks():
    arrays = [tf.constant(x) for x in draw(lead=(2,), n=5, m=4, v=3)]
    grad = arrays.pop()

    def loss(*qkv):
        return tf.reduce_sum(kvattn.attention(*qkv, score=kvattn.distance_score) * grad)

    def derivatives():
        with tf.GradientTape() as outer:
            outer.watch(arrays)
            with tf.GradientTape() as tape:
                tape.watch(arrays)
                output = loss(*arrays)
            firsts = tape.gradient(output, arrays)
            along = sum(tf.reduce_sum(x * tf.cos(x)) for x in firsts)
        with tf.autodiff.ForwardAccumulator(arrays, [tf.cos(x) for x in arrays]) as forward:
            output = loss(*arrays)
        x = arrays[0]
        with tf.GradientTape() as tape:
            tape.watch(x)
            thrice = loss(x, x, x)
        return [*firsts, *outer.gradient(along, arrays), forward.jvp(output), tape.gradient(thrice, x)]

    expected = derivatives()
    with in_blocks(2 * 2 * 4 * 3) as served:
        found = derivatives()
    assert served
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


PEAK = """
import os, resource
from functools import partial
import tensorflow as tf, kvattn

def peak(what, grad, n=3000):
    tf.random.set_seed(0)
    bound = {"W_q": tf.random.normal((16, 32)), "W_k": tf.random.normal((16, 32)), "w_v": tf.random.normal((32,))}
    own = lambda query, key: tf.reduce_sum(tf.abs(query[..., :, None, :] - key[..., None, :, :]), axis=-1)
    score = {"additive": partial(kvattn.additive_score, **bound), "own": own}[what]
    arrays = [tf.random.normal((1, n, 16)) for _ in range(4 if grad else 3)]
    call = partial(kvattn.attention_grad if grad else kvattn.attention, score=score)
    call(*[x[:, :64] for x in arrays])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call(*arrays)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

for what in "additive", "own":
    for grad in False, True:
        if not os.fork():  # a peak of its own, without another import
            print(what, peak(what, grad), flush=True)
            os._exit(0)
        assert os.wait()[1] == 0
"""


def test_memory_is_that_of_a_block():
    said = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout.split()
    assert said[::2] == ["additive", "additive", "own", "own"]  # forward and with gradients
    for what, held in zip(said[::2], map(int, said[1::2]), strict=True):
        features = {"additive": 32, "own": 16}[what]
        assert held < 8 * 4 * blocks.MOST < 4 * features * 3000**2
