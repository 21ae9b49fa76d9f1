"""Which kernel serves a call on a CUDA device, and that what surrounds the kernels is right; no device is needed.

flex_attention has a stand-in that reads masks as its documentation tells. What only a device can show, benchmarks/gpu.py shows.
"""

import math
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
from conftest import chosen
from device_calls import CALLS, draw, hidden, run

import kvattn
from kvattn import conformance

if "torch" not in chosen():
    pytest.skip("this run is without PyTorch", allow_module_level=True)

import torch

from kvattn.kernels.torch import gpu as torch_gpu
from kvattn.kernels.torch import sdpa as kernels

OPTIONS = {"mask": None, "bias": None, "valid_lens": None, "causal": False, "query_offset": 0, "window": None, "scale": None}


# ---- the choice


def chosen_for(dtype="bfloat16", n=256, m=256, d=64, v=None, heads=(4, 4), batch=(2, 2), capable=True, **options):
    shapes = ((batch[0], heads[0], n, d), (batch[1], heads[1], m, d), (batch[1], heads[1], m, v or d))
    arrays = [torch.zeros(shape, dtype=getattr(torch, dtype), device="meta") for shape in shapes]
    with patch.object(torch_gpu, "can_compile", lambda device: capable):
        return torch_gpu.choose(*arrays, **OPTIONS | {"softcap": None} | options)


def table():
    """(the kernel, the call)"""
    lens, same = torch.tensor([100, 256]), torch.tensor([100, 100])
    yield None, {}  # scaled_dot_product_attention, nothing around it
    yield None, {"causal": True}  # is_causal
    yield "corner", {"causal": True, "m": 300}
    yield "corner", {"causal": True, "query_offset": 44, "m": 300}
    yield "corner", {"causal": True, "query_offset": -3, "dtype": "float64"}
    yield "flex", {"causal": True, "query_offset": torch.tensor([1, 2])}
    yield "flex", {"valid_lens": lens}
    yield "flex", {"valid_lens": lens, "causal": True, "heads": (8, 2)}
    yield "flex", {"valid_lens": lens[:, None].expand(2, 256)}
    yield None, {"valid_lens": same}  # one length that is known: the tab slices
    yield "flex", {"valid_lens": same, "causal": True, "query_offset": 5}
    yield "slices", {"valid_lens": lens, "dtype": "float32"}
    yield "slices", {"valid_lens": lens, "dtype": "float32", "causal": True}
    yield None, {"valid_lens": torch.tensor([0, 256]), "dtype": "float32"}
    yield "flex", {"valid_lens": lens, "dtype": "float32", "softcap": 5.0}
    yield None, {"valid_lens": lens, "dtype": "float64"}
    for dtype in ("bfloat16", "float16", "float32"):
        yield "flex", {"window": (64, 0), "dtype": dtype}
        yield "flex", {"softcap": 5.0, "dtype": dtype}
    yield "flex", {"window": (64, None), "causal": True, "softcap": 5.0, "valid_lens": lens}
    yield None, {"window": (None, None)}
    for few in (
        {"n": 127},
        {"m": 127},
        {"d": 8},
        {"d": 512},
        {"d": 64, "v": 8},
        {"dtype": "float32", "d": 256},
        {"capable": False},
    ):
        yield None, {"softcap": 5.0, **few}
    yield "flex", {"softcap": 5.0, "n": 128, "m": 128, "d": 16, "v": 256}
    for other in ("mask", "bias"):
        yield None, {"softcap": 5.0, "causal": True, other: torch.zeros(256, 256)}
    yield None, {"softcap": 5.0, "scale": -1.0}
    yield None, {"softcap": 5.0, "batch": (2, 1)}


def test_which_kernel_serves_a_call():
    for kernel, call in table():
        assert chosen_for(**call) == kernel, call


def test_no_kernel_under_autocast_compilation_or_the_transforms_that_fused_kernels_lack():
    with patch.object(torch, "is_autocast_enabled", lambda kind: True):
        assert chosen_for(softcap=5.0) is None
    with patch.object(torch.compiler, "is_compiling", lambda: True):
        assert chosen_for(softcap=5.0) is None
    with patch.object(kernels, "serves", lambda *_: False):
        assert chosen_for(softcap=5.0) is None


# ---- stand-ins for the device


def literal(query, key, value, score_mod, block_mask, scale, grouped):
    """flex_attention as its documentation tells it: of partial blocks what mask_mod allows, full blocks whole, no others."""
    assert grouped == (query.shape[1] != key.shape[1])
    (batch, heads, n, _), m = query.shape, key.shape[-2]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    b, h, i, j = (
        x.reshape([-1 if a == axis else 1 for a in range(4)]) for axis, x in enumerate(map(torch.arange, (batch, heads, n, m)))
    )
    wide = torch.float32 if query.dtype in torch_gpu.HALF else query.dtype
    scores = scale * query.to(wide) @ key.to(wide).transpose(-1, -2)
    scores = scores if score_mod is None else score_mod(scores, b, h, i, j)
    if block_mask is None:
        return (torch.softmax(scores, -1) @ value.to(wide)).to(query.dtype)
    assert block_mask.seq_lengths == (n, m)
    partial_blocks, full = (
        dense(getattr(block_mask, p + "kv_num_blocks"), getattr(block_mask, p + "kv_indices")) for p in ("", "full_")
    )
    for name, blocks in (("", partial_blocks), ("full_", full)):  # what backward reads
        transposed = dense(getattr(block_mask, name + "q_num_blocks"), getattr(block_mask, name + "q_indices"))
        assert torch.equal(transposed, blocks.transpose(-1, -2))
    assert not (partial_blocks & full).any()

    def spread(x):
        return x.repeat_interleave(torch_gpu.BLOCK, -1).repeat_interleave(torch_gpu.BLOCK, -2)[..., :n, :m]

    allowed = spread(full) | (spread(partial_blocks) & block_mask.mask_mod(b, h, i, j))
    some = allowed.any(-1, keepdim=True)
    weights = torch.softmax(torch.where(allowed | ~some, torch.where(allowed, scores, -math.inf).where(some, 0), -math.inf), -1)
    return (torch.where(some, weights, 0) @ value.to(wide)).to(query.dtype)


def dense(count, order):
    found = torch.zeros(order.shape, dtype=torch.bool)
    return found.scatter(-1, order.long(), torch.arange(order.shape[-1]) < count[..., None])


@contextmanager
def on_a_device(block=4, compiled=lambda signature: literal):
    """Tensors say that they are CUDA's; small blocks and a literal flex_attention. Counts the calls of each kernel."""
    called = []

    def attention(kernel, *args, **options):
        called.append(kernel)
        return torch_gpu_attention(kernel, *args, **options)

    torch_gpu_attention = torch_gpu.attention
    torch_gpu._kept.clear()
    with (
        patch.object(torch.Tensor, "is_cuda", property(lambda x: True)),
        patch.multiple(torch_gpu, BLOCK=block, compiled=compiled, attention=attention, _flexible=lambda *_: True),
    ):  # fmt: skip
        yield called
    torch_gpu._kept.clear()


@pytest.mark.parametrize("block", [2, 128])
def test_the_conformance_suite_on_a_stand_in_device(block):
    with on_a_device(block) as called:
        cases = [
            case for case in conformance.cases() if case.group != "not finite"
        ]  # no values are read on a GPU: see known.py
        report = conformance.run("torch", cases)
    assert not report.failures, "\n".join(result.message for result in report.failures)
    assert {*called} == {"corner", "flex", "slices"}


@pytest.mark.parametrize("block", [1, 4, 5])
@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.parametrize("sizes", [(9, 11), (11, 9), (8, 8), (1, 12)], ids=str)
def test_outputs_and_gradients_are_numpys(options, sizes, block):
    n, m = sizes
    options = {name: x[:, :n] if name == "valid_lens" and x.ndim == 2 else x for name, x in options.items()}
    arrays = draw(n, m)
    reached = hidden(arrays, options)
    with on_a_device(block) as called:
        found = run("torch", arrays, options)
        leaking = run("torch", reached, options)
    ordinary = n == m and options == {"causal": True}  # is_causal
    all_seen = kvattn.bands.reaches_all(n, m, "causal" in options, options.get("query_offset", 0), options.get("window"))
    ordinary |= all_seen and not {"valid_lens", "softcap"} & {*options}
    assert len(called) == (0 if ordinary else 4)
    for x, y, z in zip(found, leaking, run("numpy", arrays, options), strict=True):
        np.testing.assert_allclose(x, z, atol=1e-12)
        np.testing.assert_allclose(y, z, atol=1e-12)


@pytest.mark.parametrize("options", [CALLS[1], CALLS[7], CALLS[16]], ids=str)
def test_second_derivatives_are_the_formulas(options):
    arrays = [torch.tensor(x) for x in draw(5, 6, heads=2)[:3]]
    options = {name: torch.tensor(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}

    def attention(*arrays):
        return kvattn.attention(*arrays, **options)

    with on_a_device() as called:
        assert torch.autograd.gradgradcheck(attention, [x.requires_grad_() for x in arrays])
    assert called


def test_lengths_in_float32_are_read_once_and_served_in_slices():
    arrays = draw(6, 9, dtype=np.float32)
    lens = torch.tensor([4, 9, 4])
    with on_a_device() as called:
        found = run("torch", arrays, {"valid_lens": lens})
    assert {*called} == {"slices"}
    for x, y in zip(found, run("numpy", arrays, {"valid_lens": lens.numpy()}), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)


# ---- flex_attention is compiled, once


def test_flex_attention_is_only_ever_called_compiled():
    from torch.nn.attention import flex_attention as module

    def eager(*args, **options):
        if not torch.compiler.is_dynamo_compiling():
            raise AssertionError("flex_attention was called as it is")
        return original(*args, **options)

    original, made = module.flex_attention, []

    def compile_(function, **options):
        made.append(options)
        return real(function, backend="eager", **options)

    real = torch.compile
    arrays = draw(5, 6, d=16, v=16, dtype=np.float32)
    with (
        patch.object(module, "flex_attention", eager), patch.object(torch, "compile", compile_), torch.no_grad(),
        on_a_device(128, torch_gpu.compiled), patch.dict(torch_gpu._programs, clear=True),
    ):  # fmt: skip
        for lens in ([1, 2, 3], [4, 5, 6], [6, 6, 0]):
            options = {"valid_lens": np.array(lens), "softcap": 2.0}
            found = kvattn.to_numpy(kvattn.attention(*map(torch.tensor, arrays[:3]), **options))
            np.testing.assert_allclose(found, kvattn.attention(*arrays[:3], **options), atol=1e-6)
    assert made == [{"fullgraph": True}]  # one program, which a graph break or too many recompilations would make raise


def test_where_flex_attention_does_not_compile_a_warning_says_so_and_the_formula_serves():
    def refuse(*args):
        raise torch._dynamo.exc.FailOnRecompileLimitHit("too often")

    import torch._dynamo

    arrays, options = draw(5, 6), {"softcap": 2.0}
    with (
        on_a_device(4, torch_gpu.compiled),
        patch.object(torch, "compile", lambda *_, **__: refuse),
        patch.dict(torch_gpu._programs, clear=True),
    ):
        with pytest.warns(UserWarning, match="did not compile"):
            first = kvattn.attention(*map(torch.tensor, arrays[:3]), **options)
        again = kvattn.attention(*map(torch.tensor, arrays[:3]), **options)  # in silence
    np.testing.assert_allclose(first, kvattn.attention(*arrays[:3], **options), atol=1e-12)
    assert torch.equal(first, again)


def test_programs_and_masks_are_kept_and_the_oldest_forgotten():
    with (
        patch.dict(torch_gpu._programs, clear=True),
        patch.object(torch_gpu, "PROGRAMS", 2),
        patch.object(torch, "compile", lambda f, **_: f),
    ):
        a, b = torch_gpu.compiled("a"), torch_gpu.compiled("b")
        assert a.__code__ is not b.__code__  # else they would share one limit of recompilations
        assert torch_gpu.compiled("a") is a
        torch_gpu.compiled("c")
        assert {*torch_gpu._programs} == {"b", "c"}
    plan = partial(torch_gpu._planned, 8, 8, torch.device("cpu"), causal=True, query_offset=0, window=None)
    lens = torch.tensor([1, 2])
    with patch.dict(torch_gpu._kept, clear=True):
        first = plan(lens)
        assert plan(lens) is first
        assert plan(lens.clone()) is not first
        lens[0] = 5  # the lengths were written to: the mask is another
        assert plan(lens) is not first
        assert len(torch_gpu._kept) <= torch_gpu.KEPT
        with torch.inference_mode():  # autograd could not save what is made here
            assert plan(lens) is not plan(torch.tensor([1, 2]))
        assert not any(x.is_inference() for x in plan(lens)[0])


@pytest.mark.parametrize("sizes", [(200, 300), (256, 256), (128, 129), (130, 1)], ids=str)
def test_blocks_are_those_of_create_block_mask(sizes):
    from torch.nn.attention.flex_attention import create_block_mask

    n, m = sizes
    for options in (
        {"causal": True},
        {"valid_lens": torch.tensor([0, 128, 999])},
        {"window": (64, 3), "query_offset": torch.tensor([-20, 0, 300])},
    ):
        first, last = torch_gpu.spans(
            n, m, "cpu", **{"valid_lens": None, "causal": False, "query_offset": 0, "window": None} | options
        )
        found = torch_gpu.blocks(first, last, m)
        expected = create_block_mask(torch_gpu.inside(first, last), len(first), 1, n, m, device="cpu")
        for side in ("kv", "full_kv", "q", "full_q"):
            got, wanted = (dense(getattr(x, f"{side}_num_blocks"), getattr(x, f"{side}_indices")) for x in (found, expected))
            assert torch.equal(got, wanted), (options, side)
