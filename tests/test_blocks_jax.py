"""JAX meets any score and any normaliser in blocks of queries: no array of queries by keys by features ever exists."""

from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
from conftest import chosen
from tiling import draw

import kvattn
from kvattn import conformance

if "jax" not in chosen():
    pytest.skip("this run is without JAX", allow_module_level=True)

import jax
import jax.numpy as jnp

from kvattn.backends import jax as tab
from kvattn.kernels.jax import blocks as jax_blocks


@contextmanager
def in_blocks(pairs=8):
    """Every call is cut into blocks of a few numbers; counts those that were."""
    served, attention = [], jax_blocks.attention

    def counted(*args):
        served.append(args)
        return attention(*args)

    jax.clear_caches()
    with patch.multiple(jax_blocks, PAIRS=pairs, attention=counted):
        yield served
    jax.clear_caches()


def test_options_drawn_together_in_blocks():
    """Of the conformance suite: each of its cases takes JAX a second to compile."""
    cases = [case for case in conformance.cases() if case.group == "combinations"]
    with in_blocks() as served:
        report = conformance.run("jax", cases)
    assert not report.failures, "\n".join(result.message for result in report.failures)
    assert len(served) >= len(cases) / 2


def my_score(query, key):
    return jnp.tanh(query[..., :, None, :] - key[..., None, :, :]).sum(axis=-1)


def additive(d, hidden=32, dtype="float64"):
    rng = np.random.default_rng(0)
    shapes = {"W_q": (d, hidden), "W_k": (d, hidden), "w_v": (hidden,)}
    return partial(kvattn.additive_score, **{name: tab.asarray(rng.standard_normal(x), dtype) for name, x in shapes.items()})


@pytest.mark.parametrize("options", [
    {"causal": True, "query_offset": -2, "valid_lens": np.array([3, 6])},
    {"mask": np.arange(63).reshape(9, 7) % 3 > 0, "valid_lens": np.arange(18).reshape(2, 9) % 8},
    {"causal": True, "query_offset": np.array([1, 0]), "return_weights": True, "return_lse": True},
], ids=lambda options: ", ".join(options))  # fmt: skip
def test_whole_blocks_and_a_smaller_one_are_the_whole(options):
    query, key, value, grad = draw(lead=(2, 4), kv=(2, 2), n=9, m=7)
    bound = {name: x for name, x in options.items() if not name.startswith("return")}
    for score in (my_score, additive(query.shape[-1], 3)):
        arrays = [tab.asarray(x) for x in (query, key, value, grad)]

        def results(arrays=arrays, score=score):
            found = kvattn.attention(*arrays[:3], score=score, **options)
            return [*(found if isinstance(found, tuple) else [found]), *kvattn.attention_grad(*arrays, score=score, **bound)]

        expected = results()
        with in_blocks(2 * 8 * 7 * 3) as served:  # two queries of each head
            found = results()
        assert served
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


def test_a_score_of_ones_own_is_run_as_it_is_where_its_arguments_are_known():
    query, key, value, _ = (tab.asarray(x) for x in draw(lead=(), n=6, m=5))
    seen = []

    def score(query, key):
        seen.append(float(jnp.abs(query).max()))  # no traced array has a float
        return query @ key.swapaxes(-1, -2)

    with in_blocks(2 * 5 * query.shape[-1]):
        found = kvattn.attention(query, key, value, score=score)
    assert len(seen) == 3
    np.testing.assert_allclose(found, kvattn.attention(query, key, value, score=kvattn.dot_score))


def test_dropout_in_blocks_draws_for_each():
    same, eye = jnp.zeros((64, 3), "float32"), jnp.eye(64, dtype="float32")
    with in_blocks(8 * 64):  # and a smaller one
        output, weights = kvattn.attention(same[:60], same, eye, dropout=0.5, rng=jax.random.key(3), return_weights=True)
    kept = np.asarray(output) > 0
    assert len({*map(bytes, kept)}) == 60
    assert 0.4 < kept.mean() < 0.6
    np.testing.assert_allclose(weights, 1 / 64)


def test_every_kind_of_derivative_in_blocks():
    query, key, value, grad = (tab.asarray(x) for x in draw(lead=(2,), n=5, m=4))

    def derivatives():
        def loss(*qkv):
            return (kvattn.attention(*qkv, score=kvattn.distance_score) * grad).sum()

        with tab.programs.x64(True):
            first = jax.grad(loss, argnums=(0, 1, 2))
            hessian = jax.grad(lambda *x: sum((y * jnp.cos(y)).sum() for y in first(*x)), argnums=(0, 1, 2))
            along = tuple(map(jnp.cos, (query, key, value)))
            each = jax.vmap(lambda q: loss(q[None], key[:1], value[:1]))
            return [jax.jvp(loss, (query, key, value), along)[1], *hessian(query, key, value), each(query)]

    expected = derivatives()
    with in_blocks(2 * 2 * 4 * 3) as served:
        found = derivatives()
    assert served
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("what", ["additive", "own", "sparsemax", "dropout"])
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
def test_no_array_of_queries_by_keys(what, gradients):
    n = 1024
    arrays = [jnp.ones((1, n, 16), "float32")] * (4 if gradients else 3)
    options = {
        "additive": {"score": additive(16, dtype="float32")}, "own": {"score": my_score},
        "sparsemax": {"normalize": kvattn.sparsemax}, "dropout": {"dropout": 0.5, "rng": jax.random.key(0)},
    }[what]  # fmt: skip
    function = partial(kvattn.attention_grad if gradients else kvattn.attention, **options)
    with in_blocks(2**15):
        held = jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    assert held < 4 * n * n
