"""Rotary embeddings, what the suite cannot ask: gradients by each framework, programs, bad input, and the tables kept."""

import importlib
import math

import numpy as np
import pytest
from conftest import chosen
from near import assert_near

import kvattn
from kvattn import rotation

RNG = np.random.default_rng(11)
X, GRAD = RNG.normal(size=(2, 3, 4, 8)), RNG.normal(size=(2, 3, 4, 8))
PLACES = np.array([3, 0, 1000, 7])
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
FORMS = {
    "halves": {},
    "interleaved": {"interleaved": True},
    "some features": {"rotary_dim": 6},
    "yarn": {"scaling": YARN},
}


def gradient(backend, x, grad_output, **how):
    """The gradient of sum(grad_output * rotary(x)) by x, by the framework's own autodiff; NumPy has none: it turns back."""
    if backend == "torch":
        import torch

        leaf = torch.from_numpy(x.copy()).requires_grad_()
        return torch.autograd.grad(kvattn.rotary(leaf, **how), leaf, torch.from_numpy(grad_output))[0].numpy()
    if backend == "tensorflow":
        import tensorflow as tf

        leaf = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(leaf)
            output = kvattn.rotary(leaf, **how)
        return tape.gradient(output, leaf, tf.constant(grad_output)).numpy()
    if backend == "jax":
        import jax

        x, grad_output = (kvattn.asarray(y, backend="jax") for y in (x, grad_output))
        with importlib.import_module("kvattn.kernels.jax.programs").x64(True):
            return np.asarray(jax.vjp(lambda y: kvattn.rotary(y, **how), x)[1](grad_output)[0])
    if backend == "mxnet":
        mx = kvattn.dispatch.load("mxnet").mx
        mx.npx.set_np()
        leaf = mx.np.array(x, dtype="float64")
        leaf.attach_grad()
        with mx.autograd.record():
            output = kvattn.rotary(leaf, **how)
        output.backward(mx.np.array(grad_output, dtype="float64"))
        return leaf.grad.asnumpy()
    return kvattn.rotary(grad_output, **how | {"positions": -how["positions"]})


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_the_transposed_map(backend, form):
    how = FORMS[form] | {"positions": PLACES}
    rows = np.eye(8)[:, None, None, None, :] + np.zeros((8, 1, 1, 4, 1))  # each feature by itself: the columns of the map
    columns = kvattn.rotary(rows, **how)[:, 0, 0]  # (8, n, 8)
    expected = np.einsum("bhnj,inj->bhni", GRAD, columns)
    assert_near(gradient(backend, X, GRAD, **how), expected)


def test_scores_depend_on_how_far_apart_rows_stand_alone(backend):
    q, k = (kvattn.asarray(x, backend=backend) for x in (X, GRAD))
    near = kvattn.dot_score(kvattn.rotary(q, 5), kvattn.rotary(k, 2))
    far = kvattn.dot_score(kvattn.rotary(q, 50_005), kvattn.rotary(k, 50_002))
    assert np.abs(kvattn.to_numpy(far) - kvattn.to_numpy(near)).max() < 1e-9


def test_a_position_of_a_million_costs_float32_no_precision(backend):
    x = np.zeros((3, 2), "float32") + np.array([1, 0], "float32")
    places = np.array([10**6, 10**6 + 1, 16_777_217])
    turned = kvattn.to_numpy(kvattn.rotary(kvattn.asarray(x, backend=backend), places))
    expected = np.array([[math.cos(p), math.sin(p)] for p in (10**6, 10**6 + 1, 16_777_217)])
    assert np.abs(turned - expected).max() < 4 * np.finfo("float32").eps


BAD = {
    "an odd width": ({"x": np.zeros((3, 5))}, ValueError, ["x has 5 features", "odd", "rotary_dim=4"]),
    "one axis": ({"x": np.zeros(4)}, ValueError, ["x has shape (4,)", "at least 2 axes"]),
    "integers": ({"x": np.zeros((3, 4), int)}, TypeError, ["x has dtype int64", "floating"]),
    "an odd rotary_dim": ({"rotary_dim": 3}, ValueError, ["rotary_dim must be even", "3"]),
    "a rotary_dim beyond d": ({"rotary_dim": 10}, ValueError, ["rotary_dim", "8 features", "10"]),
    "a rotary_dim of text": ({"rotary_dim": "4"}, TypeError, ["rotary_dim must be an int", "'4'"]),
    "positions that do not broadcast": ({"positions": np.arange(3)}, ValueError, ["positions", "(3,)", "(2, 3, 4)", "axis -1"]),
    "positions without heads": (
        {"positions": np.zeros((2, 4), int)}, ValueError, ["positions", "(2, 4)", "alike it is positions[:, None]"]),
    "positions of too many axes": ({"positions": np.zeros((1, 1, 1, 4), int)}, ValueError, ["positions", "of more axes"]),
    "positions that are floats": ({"positions": np.arange(4.0)}, TypeError, ["positions", "float", "integer"]),
    "a position that is a float": ({"positions": 1.5}, TypeError, ["positions", "integer"]),
    "positions that are flags": ({"positions": np.ones(4, bool)}, TypeError, ["positions", "bool", "integer"]),
    "a position that is a flag": ({"positions": True}, TypeError, ["positions", "bool", "integer"]),
    "a position beyond float64's integers": ({"positions": 2**53 + 1}, ValueError, ["positions", "9007199254740993", "2^53"]),
    "unsigned positions that no int32 holds": (
        {"positions": np.array([0, 1, 2, 2**31], "uint32")}, ValueError, ["positions", "0 to 2147483648", "int32"]),
    "positions in a list that no int32 holds": (
        {"positions": [0, 1, 2, -(2**31) - 1]}, ValueError, ["positions", "-2147483649 to 2", "int32"]),
    "a base of 0": ({"base": 0}, ValueError, ["base", "above 0"]),
    "a base of text": ({"base": "1e4"}, TypeError, ["base", "number", "str"]),
    "interleaved of a number": ({"interleaved": 1}, TypeError, ["interleaved", "True or False"]),
    "a scaling of text": ({"scaling": "yarn"}, TypeError, ["scaling must be a dict", "str"]),
    "an unknown scaling": ({"scaling": {"rope_type": "su"}}, ValueError, ["'su'", "known: default, linear, ntk", "llama3"]),
    "a scaling without its type": ({"scaling": {"factor": 2.0}}, ValueError, ["rope_type None", "linear"]),
    "a scaling that lacks a number": (
        {"scaling": {"rope_type": "llama3", "factor": 8.0}}, ValueError, ["'llama3' lacks", "low_freq_factor"]),
    "a scaling with a number too many": (
        {"scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, ValueError, ["'linear' has beta", "factor"]),
    "a factor of text": ({"scaling": {"type": "linear", "factor": "2"}}, TypeError, ["factor", "number"]),
    "a factor of 0": ({"scaling": {"type": "linear", "factor": 0}}, ValueError, ["factor", "above 0"]),
    "a factor of True": ({"scaling": {"type": "linear", "factor": True}}, TypeError, ["factor must be a number", "bool"]),
    "a rope_type that is a list": ({"scaling": {"rope_type": ["linear"]}}, ValueError, ["['linear']", "known: default"]),
    "yarn by a base of 1": ({"base": 1.0, "scaling": YARN}, ValueError, ["base", "above 1", "yarn"]),
    "llama3 without a span": (
        {"scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 4.0,
                     "high_freq_factor": 4.0}}, ValueError, ["high_freq_factor", "4.0", "above low_freq_factor"]),
    "longrope, too few factors": (
        {"scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4,
                     "original_max_position_embeddings": 4}}, ValueError, ["short_factor", "1 numbers", "expected 4"]),
    "longrope, no list": (
        {"scaling": {"rope_type": "longrope", "short_factor": 2.0, "long_factor": [1.0] * 4,
                     "original_max_position_embeddings": 4}}, TypeError, ["short_factor", "list of numbers", "2.0"]),
    "longrope, a factor of 0": (
        {"scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 0.0, 1.0, 1.0],
                     "original_max_position_embeddings": 4}}, ValueError, ["long_factor[1]", "above 0"]),
    "two bases": (
        {"base": 500.0, "scaling": {"rope_type": "default", "rope_theta": 1e6}}, ValueError, ["base is 500.0", "rope_theta"]),
    "two widths": (
        {"rotary_dim": 6, "scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ValueError, ["is 6", "4"]),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(backend, what):
    given, error, words = BAD[what]
    with pytest.raises(error) as caught:
        kvattn.rotary(**{"x": X, **given}, backend=backend)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_unsigned_positions_beyond_those_of_valid_lens_are_not_clipped(backend):
    places = np.array([2**30 + 1, 2**31 - 1, 2**30 + 77, 5])
    x = kvattn.asarray(X, backend=backend)
    found = kvattn.to_numpy(kvattn.rotary(x, places.astype("uint32")))
    assert np.abs(found - kvattn.rotary(X, places)).max() < 1e-6


@pytest.mark.parametrize("how", [{}, {"rotary_dim": 6}], ids=str)
def test_pairs_whose_numbers_do_not_lie_together_are_turned(backend, how):
    """PyTorch's are turned as complex numbers where they do."""
    x = kvattn.asarray(np.concatenate([X[..., :1], X], -1), backend=backend)[..., 1:]
    found = kvattn.to_numpy(kvattn.rotary(x, PLACES, interleaved=True, **how))
    assert np.abs(found - kvattn.rotary(X, PLACES, interleaved=True, **how)).max() < 1e-6


def test_a_models_rope_parameters_say_everything():
    given = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0, "partial_rotary_factor": 0.5, "attention_factor": None}
    expected = kvattn.rotary(X, base=500.0, rotary_dim=4, scaling={"type": "linear", "factor": 2.0})
    assert (kvattn.rotary(X, scaling=given) == expected).all()
    assert (kvattn.rotary(X, scaling={"rope_theta": 500.0}) == kvattn.rotary(X, base=500.0)).all()


def test_tables_that_are_kept_are_few_and_are_not_written_to(backend, tab):
    x = kvattn.asarray(X, backend=backend)
    first = kvattn.to_numpy(kvattn.rotary(x)).copy()
    for start in range(2 * rotation.KEPT):
        kvattn.rotary(x, start)
    assert len(tab._tables) <= rotation.KEPT
    assert (kvattn.to_numpy(kvattn.rotary(x)) == first).all()
    assert (kvattn.to_numpy(kvattn.rotary(x)) == first).all()


# ---- programs, whose positions and sizes come later


def _jitted(x, places, **how):
    import jax

    return np.asarray(jax.jit(lambda x, p: kvattn.rotary(x, p, **how))(x, places.astype("int32")))


def _compiled(x, places, **how):
    import torch

    program = torch.compile(lambda x, p: kvattn.rotary(x, p, **how), fullgraph=True, backend="aot_eager")
    return program(torch.from_numpy(x), torch.from_numpy(places)).numpy()


def _in_a_function(x, places, **how):
    import tensorflow as tf

    sizes = [tf.TensorSpec((None, None, None, 8)), tf.TensorSpec([None] * np.ndim(places), tf.int64)]
    return tf.function(lambda x, p: kvattn.rotary(x, p, **how), input_signature=sizes)(x, places).numpy()


PROGRAMS = {"jax": _jitted, "torch": _compiled, "tensorflow": _in_a_function}
compiling = pytest.mark.parametrize("framework", [name for name in chosen() if name in PROGRAMS])


@compiling
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_program_takes_positions_that_come_later(framework, interleaved):
    x = X.astype("float32")
    for places in (PLACES, PLACES + 10**6, np.array(9)):
        expected = kvattn.rotary(x.astype("float64"), places, interleaved=interleaved)
        assert_near(PROGRAMS[framework](x, places, interleaved=interleaved), expected)


@compiling
def test_dynamic_needs_positions_that_are_known(framework):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    for kind, more in (("dynamic", {"factor": 2.0}), ("longrope", factors)):
        scaling = {"rope_type": kind, "original_max_position_embeddings": 4, **more}
        with pytest.raises(Exception, match=f'scaling "{kind}" depends on the largest position'):
            PROGRAMS[framework](X.astype("float32"), PLACES, scaling=scaling)
