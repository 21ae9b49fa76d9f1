"""Functions of positions and segments under JAX's transformations, and gradients by what a bias function reads."""

import numpy as np
import pytest
from conftest import chosen

if "jax" not in chosen():
    pytest.skip("this run is without JAX", allow_module_level=True)

import jax
import jax.numpy as jnp
from paired import SEGMENTS, SLOPES, answers, inputs, looked_at, said

import kvattn

ARRAYS = [jnp.asarray(x) for x in inputs()]
SAID = said(jnp.asarray(SLOPES), jnp.asarray(SEGMENTS), lambda x: x)


@pytest.mark.parametrize("name", SAID)
def test_a_traced_call_gives_the_answer(name):
    with looked_at():
        got = jax.jit(lambda *arrays: kvattn.attention(*arrays, **SAID[name]))(*ARRAYS)
    np.testing.assert_allclose(got, answers()[name], atol=1e-5)


def test_segments_may_be_traced():
    got = jax.jit(lambda ids, *arrays: kvattn.attention(*arrays, segments=ids))(SEGMENTS, *ARRAYS)
    np.testing.assert_allclose(got, answers()["segments"], atol=1e-5)


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_each_entry_of_vmap_is_its_own(name):
    with looked_at():
        got = jax.vmap(lambda *arrays: kvattn.attention(*arrays, **SAID[name]))(*ARRAYS)
    np.testing.assert_allclose(got, answers()[name], atol=1e-5)


def test_a_function_is_read_anew_by_every_call():
    bounds = []
    for bound in (3, 30):
        mask = lambda q, k: k <= bound  # noqa: B023, E731
        bounds.append(kvattn.attention(*ARRAYS, mask=mask))
    for bound, got in zip((3, 30), bounds, strict=True):
        want = kvattn.attention(*inputs(), mask=np.arange(40) <= bound)
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(("most", "wrapped"), [(10**6, jax.jit), (2000, lambda f: f)])
def test_what_a_bias_function_reads_has_its_gradient(most, wrapped):
    def loss(slopes):
        return kvattn.attention(*ARRAYS, **said(slopes, None, lambda x: x)["bias"]).sum()

    with looked_at(BIAS=most):
        got = wrapped(jax.grad(loss))(jnp.asarray(SLOPES))
    np.testing.assert_allclose(got, answers()["by the slopes"], rtol=1e-4)


def test_parts_of_many_shapes_would_be_many_programs():
    x = jnp.zeros((1, 1, 600, 4))
    alike, ragged = np.repeat([0, 1, 2], 200)[None], np.repeat(np.arange(6), [90, 110, 70, 130, 85, 115])[None]
    with looked_at():
        assert "3 blocks" in kvattn.explain(x, x, x, segments=alike).why
        assert "arrays" in kvattn.explain(x, x, x, segments=ragged).why
        assert "arrays" in kvattn.explain(x, x, x, segments=ragged, backend="jax", causal=True).why
