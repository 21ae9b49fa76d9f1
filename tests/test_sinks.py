"""Sinks beside dropout, in the programs that frameworks make of calls, and given in two ways."""

from unittest.mock import patch

import numpy as np
import pytest
from conftest import chosen

import kvattn
from kvattn.kernels.numpy import tiled

rng = np.random.default_rng(0)
QUERY, KEY, VALUE, GRAD = (rng.normal(size=(2, 4, size, 6)).astype("float32") for size in (5, 7, 7, 5))
SINK = np.array([0.5, -1.0, 2.0, -np.inf], "float32")


def seeded(backend):
    """dropout's options for a draw that is the same each time."""
    if backend == "mxnet":
        import mxnet

        mxnet.random.seed(3)
        return {"dropout": 0.4}
    if backend == "torch":
        import torch

        return {"dropout": 0.4, "rng": torch.Generator().manual_seed(3)}
    if backend == "jax":
        import jax

        return {"dropout": 0.4, "rng": jax.random.key(3)}
    return {"dropout": 0.4, "rng": 3 if backend == "tensorflow" else np.random.default_rng(3)}


def left(backend, arrays, **options):
    """What the sinks leave to the keys of each row, (..., n, 1)."""
    lse = kvattn.to_numpy(kvattn.attention(*arrays[:3], return_lse=True, **options)[1])[..., None]
    return 1 / (1 + np.exp(SINK[:, None, None] - lse))


def test_dropout_drops_keys_and_never_the_sink(backend):
    *arrays, grad, sink = (kvattn.asarray(x, backend=backend) for x in (QUERY, KEY, VALUE, GRAD, SINK))
    dropped = kvattn.to_numpy(kvattn.attention(*arrays, causal=True, **seeded(backend)))
    output = kvattn.to_numpy(kvattn.attention(*arrays, causal=True, sink=sink, **seeded(backend)))
    share = left(backend, arrays, causal=True)
    np.testing.assert_allclose(output, share * dropped, rtol=1e-4, atol=1e-5)
    by = kvattn.attention_grad(*arrays, grad, causal=True, sink=sink, wrt=("value", "sink"), **seeded(backend))
    by_value, by_sink = map(kvattn.to_numpy, by)
    np.testing.assert_allclose((by_value * VALUE).sum(), (GRAD * output).sum(), rtol=1e-3)  # the output is linear in values
    expected = -((1 - share) * GRAD * output).sum(axis=(0, 2, 3))
    np.testing.assert_allclose(by_sink, expected, rtol=1e-3, atol=1e-4)
    assert by_sink[3] == 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of a product with -inf
@pytest.mark.parametrize(
    "least", [{}, {"TINY": 0, "SMALLEST": 0, "SMALLEST_ENTRY": 0}], ids=["as it comes", "in NumPy's tiles"]
)
@pytest.mark.parametrize("keys", [7, 28])
def test_a_query_of_inf_whose_scores_are_all_minus_inf_leaves_all_to_the_sink(backend, keys, least):
    key, value = (np.tile(x, (1, 1, keys // 7, 1)) for x in (KEY, VALUE))
    key[..., 0] = abs(key[..., 0]) + 0.5
    query, grad = QUERY.copy(), GRAD.copy()
    grad[:, :, 1] = 0  # what the other rows give keys, values and sinks

    def results(query, grad):
        *arrays, grad, sink = (kvattn.asarray(x, backend=backend) for x in (query, key, value, grad, SINK))
        output, lse = kvattn.attention(*arrays, sink=sink, return_lse=True)
        grads = kvattn.attention_grad(*arrays, grad, sink=sink, wrt=("query", "key", "value", "sink"))
        return [np.array(kvattn.to_numpy(x)) for x in (kvattn.attention(*arrays, sink=sink), output, lse, *grads)]

    expected = results(query, grad)
    query[:, :, 1, 0] = -np.inf
    with patch.multiple(tiled, **least) if least else patch.multiple(tiled, TINY=tiled.TINY):
        found = results(query, GRAD)
    for x in expected[:2]:
        x[:, :, 1] = 0
    expected[2][:, :, 1] = SINK[:, None].T
    expected[3][:, :, 1] = 0
    expected[4][..., 0] = np.nan  # a weight of 0, and of -inf what is summed with it
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("framework", [name for name in ("torch", "tensorflow", "jax") if name in chosen()])
def test_a_recorded_program_takes_a_sink(framework):
    """tf.function, jax.jit and jax.vmap, torch.func: values and gradients are those of the call that runs at once."""
    arrays = [kvattn.asarray(x, backend=framework) for x in (QUERY, KEY, VALUE, SINK)]

    def attend(query, key, value, sink):
        return kvattn.attention(query, key, value, sink=sink, causal=True)

    def by_sink(query, key, value, sink):
        return kvattn.attention_grad(query, key, value, query, causal=True, sink=sink, wrt=("sink",))[0]

    expected, by_expected = (kvattn.to_numpy(f(*arrays)) for f in (attend, by_sink))
    if framework == "tensorflow":
        import tensorflow as tf

        made = [tf.function(attend)(*arrays), tf.function(by_sink)(*arrays)]
    elif framework == "jax":
        import jax

        def each(*given):
            return jax.vmap(attend, in_axes=(0, 0, 0, None))(*(x[:, None] for x in given[:3]), given[3])[:, 0]

        def loss(sink):
            return (attend(*arrays[:3], sink) * arrays[0]).sum()

        np.testing.assert_allclose(each(*arrays), expected, rtol=1e-4, atol=1e-5)
        made = [jax.jit(attend)(*arrays), jax.jit(jax.grad(loss))(arrays[3])]
    else:
        import torch

        def loss(sink):
            return (attend(*arrays[:3], sink) * arrays[0]).sum()

        made = [torch.func.vmap(attend, in_dims=(0, 0, 0, None))(*arrays), torch.func.grad(loss)(arrays[3])]
    np.testing.assert_allclose(kvattn.to_numpy(made[0]), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kvattn.to_numpy(made[1]), by_expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("framework", [name for name in ("mxnet",) if name in chosen()])
def test_a_sink_that_is_none_has_no_gradient_beside_nan_where_autograd_records(framework):
    """attention_grad is asked of it in the suite; MXNet has another way there."""
    query, key, value, grad, sink = (kvattn.asarray(x, backend=framework) for x in (QUERY, KEY, VALUE, GRAD, SINK))
    from mxnet import autograd

    value[0, 3, 2, 1] = np.nan
    sink.attach_grad()
    with autograd.record():
        output = kvattn.attention(query, key, value, sink=sink)
    output.backward(grad)
    by_sink = kvattn.to_numpy(sink.grad)
    assert by_sink[3] == 0
    expected = kvattn.to_numpy(kvattn.attention_grad(query, key, value, grad, sink=sink, wrt=("sink",))[0])
    np.testing.assert_allclose(by_sink, expected, rtol=1e-4, atol=1e-5)


def test_a_sink_among_the_params_and_the_options_is_refused(backend):
    x = kvattn.asarray(QUERY[0, :2], backend=backend)
    square, sink = kvattn.asarray(np.eye(6, dtype="float32"), backend=backend), kvattn.asarray(SINK[:2], backend=backend)
    params = {"W_q": square, "W_k": square, "W_v": square, "W_o": square}
    inside = kvattn.multi_head_attention(x, x, x, params={**params, "sink": sink}, num_heads=2)
    beside = kvattn.multi_head_attention(x, x, x, params=params, num_heads=2, sink=sink)
    np.testing.assert_allclose(kvattn.to_numpy(inside), kvattn.to_numpy(beside), rtol=1e-5)
    with pytest.raises(ValueError, match="sink is among the params, and an option too"):
        kvattn.multi_head_attention(x, x, x, params={**params, "sink": sink}, num_heads=2, sink=sink)
