"""Functions of positions and segments under JAX's transformations, and gradients by what a bias function reads."""

import numpy as np
import pytest
from conftest import chosen

if "jax" not in chosen():
    pytest.skip("this run is without JAX", allow_module_level=True)

from unittest.mock import patch

import jax
import jax.numpy as jnp
from paired import SEGMENTS, SLOPES, answers, inputs, looked_at, said

import kvattn
from kvattn.kernels.jax import plans, programs, tiles

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
        assert "segments are compared in its blocks" in kvattn.explain(x, x, x, segments=ragged).why
        assert "arrays" in kvattn.explain(x, x, x, segments=ragged, dropout=0.5, rng=1, return_weights=True).why
        assert "segments are compared in its blocks" in kvattn.explain(x, x, x, segments=ragged, causal=True).why


# ---- segments that tiles compare, since a trace does not show them


IDS = {  # of 3 entries: (queries, keys)
    "sorted": lambda rng, *sizes: [np.sort(rng.integers(0, 5, (3, size))) for size in sizes],
    "apart": lambda rng, *sizes: [rng.integers(-2, 4, (3, size)) for size in sizes],
    "shared by the entries, some without keys": lambda rng, n, m: [
        np.sort(rng.integers(0, 9, (1, n))),
        rng.integers(0, 4, (1, m)),
    ],
}


@pytest.mark.parametrize("ids", IDS)
def test_ranges_of_segments(ids):
    of_queries, of_keys = IDS[ids](np.random.default_rng(0), 40, 30)
    low, high = map(np.asarray, tiles._ranges(jnp.asarray(of_queries), jnp.asarray(of_keys)))
    for entry, i in np.ndindex(*of_queries.shape):
        places = np.flatnonzero(of_keys[entry] == of_queries[entry, i])
        expected = (places[0], places[-1] + 1) if len(places) else (30, 0)
        assert (low[entry, i], high[entry, i]) == expected


BESIDE = [
    {}, {"causal": True, "query_offset": 2}, {"window": (60, 9), "valid_lens": np.array([150, 0, 90])},
    {"sink": np.array([0.5, -1.0])}, {"mask": lambda q, k: (q + k) % 3 > 0},
]  # fmt: skip


@pytest.mark.parametrize(("ids", "options"), [*zip((*IDS, "apart", "apart"), BESIDE, strict=True)])
def test_tiles_compare_segments_in_a_trace(ids, options):
    rng = np.random.default_rng(1)
    shapes = (3, 2, 170, 4), (3, 1, 200, 4), (3, 1, 200, 5)
    arrays, (of_queries, of_keys) = [rng.standard_normal(shape) for shape in shapes], IDS[ids](rng, 170, 200)
    same = np.broadcast_to(of_queries[:, None, :, None] == of_keys[:, None, None, :], (3, 1, 170, 200))
    beside = {"mask": options["mask"](np.arange(170)[:, None], np.arange(200))} if "mask" in options else {}
    whole = {**options, "mask": same & beside.get("mask", True)}

    def attend(query, key, value, of_queries, of_keys):
        segments = [jnp.broadcast_to(x, (3, x.shape[1])) for x in (of_queries, of_keys)]
        with patch.multiple(plans, CAUSAL_TILE=64, BLOCK=40):
            return kvattn.attention(query, key, value, segments=tuple(segments), **options)

    with programs.x64(True):
        given = [jnp.asarray(x) for x in (*arrays, of_queries, of_keys)]
        traced = jax.make_jaxpr(attend)(*given)
        assert "200,200" not in str(traced)
        assert "bool[3,1,170,200]" not in str(traced) or "mask" in options
        output, back = jax.vjp(jax.jit(attend), *given)
        np.testing.assert_allclose(output, kvattn.attention(*arrays, **whole), atol=1e-12)
        grad = rng.standard_normal(output.shape)
        expected = kvattn.attention_grad(*arrays, grad, **whole)
        for found, want in zip(back(jnp.asarray(grad)), expected, strict=False):
            np.testing.assert_allclose(found, want, atol=1e-11)
        if not options and len(of_queries) == 3:  # one head, whose segments are its own
            each = jax.vmap(lambda query, *x: kvattn.attention(query[:1], *x[:2], segments=(x[2][None], x[3][None])))
            np.testing.assert_allclose(jax.jit(each)(*given), output[:, :1], atol=1e-12)
            heads = [x[:, 0] for x in given[:3]]  # of 3 axes: a head for each entry
            found = jax.jit(lambda *x: kvattn.attention(*x[:3], segments=(x[3], x[4])))(*heads, *given[3:])
            np.testing.assert_allclose(found, output[:, 0], atol=1e-12)
            groups = (jnp.concatenate([x, x]) for x in (heads[0], *given[3:]))  # heads that share keys
            query, *ids = groups
            found = jax.jit(lambda *x: kvattn.attention(*x[:3], segments=(x[3], x[4])))(query, heads[1], heads[2], *ids)
            want = kvattn.attention(query, *heads[1:], mask=ids[0][:, :, None] == ids[1][:, None])
            np.testing.assert_allclose(found, want, atol=1e-12)


def test_no_array_of_all_pairs_is_held_for_segments_in_a_trace():
    x, ids = jax.ShapeDtypeStruct((1, 1, 8192, 16), "float32"), jax.ShapeDtypeStruct((1, 8192), "int32")
    for function in (attend := lambda x, ids: kvattn.attention(x, x, x, segments=ids), jax.grad(lambda *x: attend(*x).sum())):
        held = jax.jit(function).lower(x, ids).compile().memory_analysis().temp_size_in_bytes
        assert held < 2**25  # a bool for each pair is 2^26


def test_what_is_not_finite_stays_in_its_segment_where_tiles_compare():
    """Of many shapes, so that no part is a call of its own."""
    rng = np.random.default_rng(2)
    arrays = [rng.standard_normal((1, 1, 300, 4)).astype("float32") for _ in range(3)]
    ids = np.repeat(np.arange(6), [40, 61, 33, 57, 50, 59])[None]
    arrays[2][0, 0, 110] = np.nan
    found = np.asarray(kvattn.attention(*map(jnp.asarray, arrays), segments=ids))
    assert (np.isnan(found).all(axis=-1)[0, 0] == (ids[0] == 2)).all()
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found, kvattn.attention(*arrays, segments=ids), atol=1e-5)
