"""Which calls cuDNN serves on a CUDA device, and that what surrounds it is right; no device is needed.

cuDNN has a stand-in here: a formula with its arguments, whose backward pass has no derivative.
"""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from conftest import chosen
from device_calls import CALLS, draw, hidden, run
from near import assert_near

import kvattn

if "jax" not in chosen():
    pytest.skip("this run is without JAX", allow_module_level=True)

import jax

from kvattn.backends import jax as tab
from kvattn.call import Call
from kvattn.kernels.jax import decoding
from kvattn.kernels.jax import gpu as jax_gpu
from kvattn.kernels.jax.programs import x64


def served(device=((9, 0), 91500), dtype="bfloat16", n=64, m=64, d=64, v=None, batch=(2, 2), heads=(4, 4), few=0, **options):
    shapes = ((batch[0], heads[0], n, d), (batch[1], heads[1], m, d), (batch[1], heads[1], m, v or d))
    arrays = [SimpleNamespace(shape=shape, ndim=4, dtype=jax.numpy.dtype(dtype)) for shape in shapes]
    options = {"causal": False, "window": None, "query_offset": 0} | options
    call = Call.of(*arrays[:2], **{"score": tab.scaled_dot_score, "normalize": tab.softmax} | options)
    with patch.multiple(jax_gpu, device=lambda: device, FEW=few):
        return not jax_gpu.obstacle(tab, *arrays, call)


def test_which_calls_cudnn_serves():
    lens, ampere = np.array([3, 64]), ((8, 0), 90000)
    for call in (
        {}, {"dtype": "float16"}, {"heads": (8, 2)}, {"n": 1}, {"d": 8}, {"d": 256}, {"d": 128, "device": ampere},
        {"causal": True}, {"causal": True, "m": 80}, {"valid_lens": lens}, {"valid_lens": lens, "causal": True},
        {"window": (8, 0)}, {"window": (8, None), "causal": True}, {"window": (None, 0)}, {"scale": 0.3},
        {"mask": lens}, {"bias": lens, "heads": (8, 2)}, {"mask": lens, "window": (8, 8), "valid_lens": lens[:, None]},
        {"bias": lens, "causal": True, "query_offset": lens, "m": 80},
        {"few": 2 * 4 * 64 * 64 - 1},
        {"n": 1, "causal": True, "query_offset": lens}, {"n": 1, "causal": True, "query_offset": 7, "valid_lens": lens},
    ):  # fmt: skip
        assert served(**call), call
    for call in (
        {"device": None}, {"device": ((7, 5), 91500)}, {"device": ((9, 0), 8906)}, {"d": 256, "device": ampere},
        {"dtype": "float32"}, {"dtype": "float64"}, {"d": 12}, {"d": 264}, {"v": 32}, {"batch": (2, 1)}, {"m": 0},
        {"mask": lens, "dtype": "float16"}, {"bias": lens, "n": 1}, {"bias": lens, "m": 63}, {"mask": lens, "n": 63},
        {"mask": lens, "softcap": 5.0}, {"softcap": 5.0}, {"valid_lens": lens[:, None]}, {"scale": lens}, {"scale": -1.0},
        {"causal": True, "n": 80}, {"causal": True, "query_offset": 1}, {"causal": True, "query_offset": lens},
        {"window": (8, 8)}, {"window": (8, None)}, {"window": (8, 0), "valid_lens": lens},
        {"few": 2 * 4 * 64 * 64},
        {"n": 1, "window": (8, 0), "query_offset": lens}, {"n": 1, "window": (None, 1), "query_offset": lens},
    ):  # fmt: skip
        assert not served(**call), call


@contextmanager
def cudnn_stand_in(version=91900):
    """A process whose "CUDA" is the CPU, and a kernel with cuDNN's arguments, limits and lack of further derivatives."""
    called = []

    def kernel(query, key, value, *, bias, q_seqlen, kv_seqlen, scale, mask_type, qkv_layout, sliding_window_length):
        called.append(mask_type if bias is None else "BIAS")
        assert qkv_layout == "BNTH"
        assert bias is None or (bias.shape[2:] == (query.shape[2], key.shape[2]) and mask_type == "NO_MASK")
        assert ("PADDING" in mask_type) == (q_seqlen is not None) == (kv_seqlen is not None)
        how = {"causal": "CAUSAL" in mask_type, "left": sliding_window_length and sliding_window_length - 1, "scale": scale}

        def plain(query, key, value, bias, lens):
            """An entry without keys has zeros, whatever is in its queries; from an older cuDNN, nobody knows."""
            if lens is None:
                return jax_gpu.formula(query, key, value, bias, lens, **how)
            some = (lens > 0)[:, None, None, None]
            query, key = jax.numpy.where(some, query, 0), jax.numpy.where(some, key, 0)
            empty = 0 if version >= jax_gpu.EMPTY else np.nan
            return jax.numpy.where(some, jax_gpu.formula(query, key, value, bias, lens, **how), empty)

        @jax.custom_vjp
        def once(query, key, value, bias, lens):
            return plain(query, key, value, bias, lens)

        @jax.custom_vjp
        def pull(arrays, bias, lens, grad):
            return jax.vjp(lambda *arrays: plain(*arrays, bias, lens), *arrays)[1](grad)

        def refuse(*_):
            raise AssertionError("cuDNN's backward pass has no derivative")

        once.defvjp(lambda *given: (once(*given), given), lambda given, grad: (*pull(given[:3], *given[3:], grad), None, None))
        pull.defvjp(refuse, refuse)
        return once(query, key, value, bias, kv_seqlen)

    names = SimpleNamespace(NO_MASK="NO_MASK", CAUSAL="CAUSAL", PADDING="PADDING", PADDING_CAUSAL="PADDING_CAUSAL")
    halves = (*jax_gpu.HALF, "float32", "float64")
    jax.clear_caches()
    with (
        patch.multiple(jax_gpu, device=lambda: ((9, 0), version), HALF=halves, BIASED=halves, PLATFORM="cpu", FEW=0),
        patch.object(jax_gpu, "_fused", lambda: SimpleNamespace(MaskType=names, dot_product_attention=kernel)),
    ):  # fmt: skip
        yield called
    jax.clear_caches()


@pytest.mark.parametrize(
    "options",
    [{}, CALLS[0], CALLS[7], CALLS[8], {"window": (2, 0)}, {"window": (0, None), "causal": True, "scale": 0.3}],
    ids=str,
)
def test_cudnn_is_given_what_numpy_computes(options):
    arrays = draw(9, 11, d=8, v=8, dtype=np.float32)
    with cudnn_stand_in() as called:
        found, leaking = run("jax", arrays, options), run("jax", hidden(arrays, options), options)
    assert called
    for x, y, z in zip(found, leaking, run("numpy", arrays, options), strict=True):
        assert_near(x, z)
        assert_near(y, z)


def test_an_older_cudnn_is_given_no_entry_without_keys():
    arrays, options = draw(9, 11, d=8, v=8, dtype=np.float32), {"valid_lens": np.array([0, 4, 11])}
    with cudnn_stand_in(version=91500) as called:
        found, leaking = run("jax", arrays, options), run("jax", hidden(arrays, options), options)
    assert called
    for x, y, z in zip(found, leaking, run("numpy", arrays, options), strict=True):
        assert_near(x, z)
        assert_near(y, z)


def _biases():
    rng = np.random.default_rng(1)
    mask, holes = rng.random((3, 4, 10, 12)) < 0.6, rng.standard_normal((4, 10, 12)).astype("float32")
    mask[1, :, 3], mask[0, 2, :, 5], holes[:, 7], holes[1, 2, :6] = False, False, -np.inf, -np.inf
    keys = (np.arange(12) < np.array([0, 5, 12])[:, None])[:, None, None, :]
    yield {"mask": keys}
    yield {"mask": mask}
    yield {"mask": mask[0, 0], "valid_lens": np.array([3, 12, 0])}
    yield {"bias": holes}
    yield {"bias": holes[:1], "causal": True, "query_offset": np.array([-4, 0, 2])}
    yield {"bias": holes[None], "mask": keys, "window": (3, 2), "scale": 0.3}


@pytest.mark.parametrize("options", [*_biases()], ids=lambda options: ", ".join(options))
def test_masks_and_biases_are_given_to_cudnn_as_one_bias(options):
    arrays = draw(10, 12, d=8, v=8, dtype=np.float32)
    with cudnn_stand_in() as called:
        found, leaking = run("jax", arrays, options), run("jax", hidden(arrays, options), options)
        given = [jax.numpy.asarray(x) for x in arrays[:3]]
        found.append(jax.vjp(lambda *given: kvattn.attention(*given, **options), *given)[0])  # beside its gradients
        leaking.append(found[0])
        by = None
        if "bias" in options:
            by = kvattn.attention_grad(*map(jax.numpy.asarray, arrays), wrt=["bias"], **options)[0]
    assert set(called) == {"BIAS"}
    expected = run("numpy", arrays, options)
    for x, y, z in zip(found, leaking, [*expected, expected[0]], strict=True):
        assert_near(x, z)
        assert_near(y, z)
    if by is not None:
        assert_near(by, kvattn.attention_grad(*arrays, wrt=["bias"], **options)[0])


def test_second_derivatives_by_a_bias_are_the_formulas():
    jnp = jax.numpy
    query, key, value, grad = map(jnp.asarray, draw(4, 6, d=8, v=8, batch=1, heads=2, dtype=np.float32))
    bias = jnp.asarray(np.random.default_rng(2).standard_normal((2, 4, 6)).astype("float32")).at[0, 1].set(-jnp.inf)

    def slope(bias, query):
        def loss(bias, query):
            return (grad[:, :2] * jnp.sin(kvattn.attention(query, key[:, :2], value[:, :2], bias=bias))).sum()

        return sum((x**2).sum() for x in jax.grad(loss, argnums=(0, 1))(bias, query))

    expected = jax.grad(slope, argnums=(0, 1))(bias, query)
    with cudnn_stand_in() as called:
        found = jax.grad(slope, argnums=(0, 1))(bias, query)
    assert set(called) == {"BIAS"}
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_forward_hides_values_only():
    """A pass over an array costs 5 % of cuDNN's time; of lengths, cuDNN keeps NaN in keys to itself, until backward."""
    arrays, lens, seen = [jax.numpy.ones((2, 4, 8, 8))] * 3, jax.numpy.array([3, 8]), []

    def kernel(query, key, value, *_, **__):
        jax.debug.callback(lambda *sums: seen.append([float(x) for x in sums]), query.sum(), key.sum(), value.sum())
        return query

    with cudnn_stand_in(), patch.object(jax_gpu, "cudnn", kernel):
        jax.block_until_ready(kvattn.attention(*arrays, valid_lens=lens))
        jax.effects_barrier()
    whole, padded = 2.0 * 4 * 8 * 8, (3.0 + 8) * 4 * 8
    assert seen == [[whole, whole, padded]]


def test_second_derivatives_of_what_cudnn_serves_are_the_formulas():
    jnp = jax.numpy
    query, key, value, grad = map(jnp.asarray, draw(5, 6, d=8, v=8, batch=1, heads=2, dtype=np.float32))
    lens = jnp.array([4])

    def loss(query):
        return (grad * jnp.sin(kvattn.attention(query, key, value, valid_lens=lens))).sum()

    def slope(query):
        return (jax.grad(loss)(query) ** 2).sum()

    expected = jax.grad(slope)(query), jax.hessian(loss)(query)
    with cudnn_stand_in() as called:
        found = jax.grad(slope)(query), jax.jit(jax.hessian(loss))(query)
    assert called
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_on_another_platform_the_same_program_takes_the_formula():
    arrays = draw(5, 6, d=8, v=8, dtype=np.float32)
    with cudnn_stand_in(), patch.object(jax_gpu, "PLATFORM", "cuda"):
        found = run("jax", arrays, {"valid_lens": np.array([2, 6, 0])})
        text = jax.jit(kvattn.attention).lower(*map(jax.numpy.asarray, arrays[:3])).compile().as_text()
    assert "conditional" not in text
    for x, y in zip(found, run("numpy", arrays, {"valid_lens": np.array([2, 6, 0])}), strict=True):
        assert_near(x, y)


ONE = [
    {},
    {"valid_lens": np.array([0, 17, 70])},
    {"valid_lens": np.array([32, 1, 99]), "scale": 0.3},
    {"causal": True, "query_offset": np.array([-3, 20, 80])},
    {"causal": True, "query_offset": 40, "valid_lens": np.array([0, 60, 9])},
]


@contextmanager
def interpreted():
    """The kernel of one query, run without a device, from few keys on."""
    names = {"INTERPRET": True, "FEWEST": 64, "BLOCK": 16}
    with cudnn_stand_in() as called, patch.multiple(decoding, **names), patch.object(decoding, "_alone", lambda: True):
        yield called


@pytest.mark.parametrize("options", ONE, ids=str)
def test_one_query_beside_many_keys_has_a_kernel_of_its_own(options):
    arrays = draw(1, 70, d=16, v=16, heads=6, dtype=np.float32)
    with interpreted() as called:
        found, leaking = run("jax", arrays, options), run("jax", hidden(arrays, options), options)
    assert not called
    for x, y, z in zip(found, leaking, run("numpy", arrays, options), strict=True):
        assert_near(x, z)
        assert_near(y, z)


@pytest.mark.parametrize("options", ONE[1::3], ids=str)
def test_few_keys_of_one_query_are_cudnns(options):
    arrays = draw(1, 70, d=8, v=8, dtype=np.float32)
    with cudnn_stand_in() as called:
        found, leaking = run("jax", arrays, options), run("jax", hidden(arrays, options), options)
    assert set(called) == {"PADDING"}
    for x, y, z in zip(found, leaking, run("numpy", arrays, options), strict=True):
        assert_near(x, z)
        assert_near(y, z)


def test_a_row_that_is_not_finite_stays_so_in_the_kernel_of_one_query():
    query, key, value, _ = draw(1, 70, d=16, v=16, dtype=np.float32)
    query[0, 1], key[1, 0, 5], value[2, 1, 3, 4] = np.nan, np.inf, np.nan
    lens = np.array([70, 20, 3])  # so that nobody looks at the value
    with interpreted():
        found = np.asarray(kvattn.attention(*map(jax.numpy.asarray, (query, key, value)), valid_lens=lens))
    wrong = np.isnan(found).any(axis=-1)[..., 0]
    expected = np.zeros((3, 4), bool)
    expected[0, 1] = expected[1, :2] = True
    np.testing.assert_array_equal(wrong, expected)


@pytest.mark.parametrize("wide", [False, True])
def test_the_kernel_of_one_query_is_lowered_for_a_gpu(wide):
    """``wide``: with jax_enable_x64, where integers of two sizes do not meet in the kernel."""
    shapes = (2, 8, 1, 64), (2, 2, 4096, 64), (2, 2, 4096, 64)
    arrays = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
    program = jax.jit(partial(decoding.attention, scale=0.125))
    with x64(wide):
        text = program.trace(*arrays, jax.ShapeDtypeStruct((2,), "int32")).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton") == 1


def test_where_cudnn_serves_projections_stay_in_bfloat16():
    """In float32, which cuDNN does not take, a layer takes ten times as long. A cache holds float32 all the same."""
    rng = np.random.default_rng(0)

    def rounded(x):
        return np.asarray(jax.numpy.asarray(x, "bfloat16").astype("float32"))

    x, W, b, lens = (
        rounded(rng.standard_normal((2, 6, 16))),
        rounded(rng.standard_normal((16, 16)) / 4),
        rounded(np.ones(16)),
        [4, 6],
    )
    heads = rounded(x @ W + b).reshape(2, 6, 2, 8).swapaxes(1, 2)
    joined = kvattn.attention(heads, heads, heads, valid_lens=lens).swapaxes(1, 2).reshape(2, 6, 16)
    given, half_W, half_b = (jax.numpy.asarray(each, "bfloat16") for each in (x, W, b))
    params = {f"{kind}_{name}": y for name in "qkvo" for kind, y in (("W", half_W), ("b", half_b))}
    with cudnn_stand_in() as called, patch.object(jax_gpu, "HALF", ("float16", "bfloat16")):
        found = kvattn.multi_head_attention(given, given, given, params, num_heads=2, valid_lens=lens)
        kvattn.self_attention(given[:, None], half_W, half_W, half_W)
        assert called == ["PADDING", "NO_MASK"]
        *_, cache = kvattn.multi_head_attention(given, given, given, params, num_heads=2, cache=kvattn.KVCache())
    assert (found.dtype, cache.key.dtype) == ("bfloat16", "float32")
    expected = rounded(joined) @ W + b
    np.testing.assert_allclose(np.asarray(found, "float32"), expected, rtol=0, atol=2**-6 * np.abs(expected).max())


def test_without_a_cuda_device_cudnn_serves_nothing():
    jax_gpu.device.cache_clear()
    assert (jax_gpu.device() is None) == all(device.platform != "gpu" for device in jax.devices())
