"""NaN and inf on JAX where a call runs at once: derivatives of any order that JAX takes of it, blocks, scores of one's own.

All that nothing reaches is compared with the same call without NaN, which the conformance suite judges; its group "not
finite" asks for everything else.
"""

from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
from conftest import chosen
from tiling import draw

import kvattn

if "jax" not in chosen():
    pytest.skip("this run has no jax", allow_module_level=True)

import jax
import jax.numpy as jnp

from kvattn.backends import jax as tab
from kvattn.kernels.jax import blocks, nonfinite

NAN, INF, AT = np.nan, np.inf, 3
BEFORE, AFTER, SELF = np.arange(6) < AT, np.arange(6) > AT, np.arange(6) == AT
CAUSAL = {  # what of query AT or key AT and its value reaches, with causal: (by query, by key, by value)
    "query": (SELF, ~AFTER, ~AFTER),
    "key": (~BEFORE, np.ones(6, bool), np.ones(6, bool)),
    "value": (~BEFORE, np.ones(6, bool), np.zeros(6, bool)),
}


@contextmanager
def pair_by_pair(most=blocks.PAIRS):
    """Counts the calls whose pairs are computed apart, in blocks of so many numbers."""
    served, attention = [], nonfinite.attention

    def counted(*args, **options):
        served.append(args)
        return attention(*args, **options)

    jax.clear_caches()
    with patch.object(nonfinite, "attention", counted), patch.object(blocks, "PAIRS", most), tab.programs.x64(True):
        yield served
    jax.clear_caches()


def arrays(lead=(2, 2), n=6):
    return [jnp.asarray(x) for x in draw(lead=lead, n=n, m=6)]


def with_nan(which, x=NAN, lead=(2, 2)):
    """The arrays, and those with ``x`` in row AT of one of them, in its first batch entry and head."""
    clean = arrays(lead)
    place = ["query", "key", "value"].index(which)
    return clean, [y.at[(0, 0, AT, 0)].set(x) if i == place else y for i, y in enumerate(clean)]


def first(qkv, grad, **options):
    output, back = jax.vjp(partial(kvattn.attention, **options), *qkv)
    return [output, *back(grad)]


def same(found, clean, reached, spoiled=True):
    """Numbers where nothing reached, in the first entry and head; and NaN in each other row (``spoiled``)."""
    found, clean = map(np.asarray, (found, clean))
    rows = np.zeros(found.shape[:-1], bool)
    rows[0, 0] = reached
    np.testing.assert_allclose(found[~rows], clean[~rows], rtol=1e-11, atol=1e-13)
    assert not spoiled or np.isnan(found[rows]).any(axis=-1).all()


FEW = 2 * 4 * 6 * 3  # numbers of two queries


@pytest.mark.parametrize(("which", "most"), [("query", FEW), ("key", blocks.PAIRS), ("value", FEW)])
def test_gradients_that_jax_takes_of_a_call_keep_rows_apart(which, most):
    with pair_by_pair(most) as served:
        (*clean, grad), (*given, _) = with_nan(which)
        expected, found = first(clean, grad, causal=True), first(given, grad, causal=True)
        gradients = kvattn.attention_grad(*given, grad, causal=True) if most == FEW else found[1:]  # else the suite asks
    assert served
    same(found[0], expected[0], SELF if which == "query" else ~BEFORE)
    for gradient in (found[1:], gradients):
        for x, y, reached in zip(gradient, expected[1:], CAUSAL[which], strict=True):
            same(x, y, reached)


@pytest.mark.parametrize(
    ("options", "most"),
    [({"causal": True}, FEW), ({"window": (1, 0), "softcap": 2.0, "score": kvattn.distance_score}, blocks.PAIRS)],
    ids=str,
)
def test_second_derivatives_of_pairs_apart_are_differences_of_the_first(options, most):
    """Where all is finite, along one direction; forwards over backwards, and backwards twice."""
    with pair_by_pair(most) as served:
        *qkv, grad = arrays((2,))
        along, eps = tuple(map(jnp.cos, qkv)), 1e-4

        def loss(*qkv):
            with nonfinite.computed_pair_by_pair():
                return (jnp.sin(kvattn.attention(*qkv, **options)) * grad).sum()

        slope = jax.grad(loss, argnums=(0, 1, 2))
        ends = [slope(*(x + e * y for x, y in zip(qkv, along, strict=True))) for e in (-eps, eps)]
        backwards = jax.grad(lambda *x: sum((a * b).sum() for a, b in zip(slope(*x), along, strict=True)), argnums=(0, 1, 2))
        forwards, twice = jax.jvp(slope, tuple(qkv), along)[1], backwards(*qkv)
    assert served
    for low, high, x, y in zip(*ends, forwards, twice, strict=True):
        np.testing.assert_allclose(x, (np.asarray(high) - np.asarray(low)) / (2 * eps), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(y, x, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("which", ["query", "value"])
def test_second_derivatives_keep_rows_apart(which):
    """Of a loss of all rows that do not see the NaN, by all that is in no pair with it."""
    with pair_by_pair() as served:
        (*clean, grad), (*given, _) = with_nan(which, lead=(1, 1))
        rows = ~SELF if which == "query" else BEFORE
        clear = [np.flatnonzero(~x) for x in CAUSAL["query" if which == "query" else "key"]]  # a loss bends NaN outputs too

        def loss(parts, qkv):
            qkv = [x.at[0, 0, at].set(part) for x, at, part in zip(qkv, clear, parts, strict=True)]
            return (jnp.sin(kvattn.attention(*qkv, causal=True)) * grad)[0, 0, rows].sum()

        parts = [x[0, 0, at] for x, at in zip(clean, clear, strict=True)]
        expected, found = (jax.hessian(loss)(parts, qkv) for qkv in (clean, given))
    assert served
    assert any(np.asarray(x).any() for x in jax.tree.leaves(expected))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-13)


def test_what_makes_no_result_nan_leaks_into_no_gradient_either():
    """A key of -inf, whose weight is 0 where it is seen; a score that overflows where nobody looks, before the softcap."""
    with pair_by_pair():
        (*clean, grad), _ = with_nan("key")
        query = clean[0].at[..., 0].set(1.0)
        minus = [query, clean[1].at[0, 0, AT, 0].set(-INF), clean[2]]
        expected, found = (first(x, grad, causal=True) for x in ([query, *clean[1:]], minus))
        for x, y, reached in zip(found, expected, (~BEFORE, *CAUSAL["key"]), strict=True):
            same(x, y, reached, spoiled=False)
        assert np.isfinite(found[0]).all()
        huge = [clean[0].at[0, 0, AT, :2].set(1e200), clean[1].at[0, 0, AT + 1, :2].set(jnp.array([1e200, -1e200])), clean[2]]
        expected, found = (first(x, grad, mask=np.eye(6, dtype=bool), softcap=2.0) for x in (clean, huge))
        for x, y in zip(found, expected, strict=True):
            same(x, y, SELF | (np.arange(6) == AT + 1), spoiled=False)
            assert np.isfinite(x).all()


def test_nan_where_nobody_looks_is_no_work():
    with pair_by_pair() as served:
        query, key, value, _ = with_nan("value")[1]
        for options in ({"valid_lens": np.array([AT, 6])}, {"mask": np.arange(6) != AT}):
            output = kvattn.attention(query, key, value, **options)
            assert np.isfinite(output).all()
    assert not served


def test_a_score_of_ones_own_is_not_traced():
    def score(query, key):
        assert not isinstance(query, jax.core.Tracer)
        return query @ key.swapaxes(-1, -2)

    for most in (blocks.PAIRS, FEW):
        with pair_by_pair(most) as served:
            (*clean, _), (*given, _) = with_nan("value")
            expected, found = (kvattn.attention(*x, score=score, causal=True) for x in (clean, given))
        assert served
        same(found, expected, ~BEFORE)


def test_dropout_draws_the_same_for_other_rows():
    options = {"causal": True, "dropout": 0.4, "rng": jax.random.key(1)}
    with pair_by_pair() as served:
        (*clean, grad), (*given, _) = with_nan("value")
        expected, found = (kvattn.attention(*x, **options) for x in (clean, given))
        by_query = kvattn.attention_grad(*given, grad, **options)[0], kvattn.attention_grad(*clean, grad, **options)[0]
    assert served
    same(found, expected, ~BEFORE, spoiled=False)
    same(*by_query, ~BEFORE, spoiled=False)


def test_programs_that_jax_traces_are_as_they_were():
    """No condition in them, which would be compiled twice and, under vmap, run twice; numbers are those of a call at once."""
    *qkv, _ = arrays()
    attend = partial(kvattn.attention, causal=True)
    for trace in (jax.jit(attend), jax.vmap(attend), jax.checkpoint(attend), jax.jit(jax.vmap(attend))):
        assert "cond" not in str(jax.make_jaxpr(trace)(*qkv))
        np.testing.assert_allclose(trace(*qkv), attend(*qkv), rtol=1e-5, atol=1e-6)
