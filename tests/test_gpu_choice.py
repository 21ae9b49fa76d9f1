"""Which kernel serves a call on a CUDA device, and that what surrounds the kernels is right; no device is needed.

The kernel in Triton has a test of its own, test_triton_torch.py. What only a device can show, benchmarks/gpu.py shows.
"""

from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
from conftest import chosen
from device_calls import CALLS, draw, hidden, run
from near import assert_near

import kvattn
from kvattn import conformance
from kvattn.conformance import known_differences

if "torch" not in chosen():
    pytest.skip("this run is without PyTorch", allow_module_level=True)

import torch

from kvattn.call import Call
from kvattn.kernels.torch import gpu, plan, sdpa

OPTIONS = {"score": None, "normalize": None, "causal": False, "query_offset": 0, "window": None}
NAMES = {"SDPA, corner": "corner", "SDPA, slices": "slices", "kvattn's kernel in Triton": "flash"}


# ---- the choice


def chosen_for(dtype="bfloat16", n=256, m=256, d=64, v=None, heads=(4, 4), batch=(2, 2), capable=True, grad=False, **options):
    shapes = ((batch[0], heads[0], n, d), (batch[1], heads[1], m, d), (batch[1], heads[1], m, v or d))
    arrays = [torch.zeros(shape, dtype=getattr(torch, dtype), device="meta", requires_grad=grad) for shape in shapes]
    with patch.object(gpu, "can_compile", lambda device: capable):
        choice = gpu.choose(*arrays, Call.of(*arrays[:2], **OPTIONS | options))
    return choice and NAMES[choice.kernel]


def table():
    """(the kernel, the call)"""
    lens, same, offsets = torch.tensor([100, 256]), torch.tensor([100, 100]), torch.tensor([1, 2])
    yield None, {}  # scaled_dot_product_attention, nothing around it
    yield None, {"causal": True}  # is_causal
    yield None, {"window": (None, None)}
    yield "corner", {"causal": True, "m": 300}
    yield "corner", {"causal": True, "query_offset": 44, "m": 300}
    yield "corner", {"causal": True, "query_offset": -3, "dtype": "float64"}
    yield None, {"valid_lens": same}  # one length that is known: the tab slices
    yield "slices", {"valid_lens": lens, "dtype": "float32"}
    yield "slices", {"valid_lens": lens, "dtype": "float32", "causal": True}
    yield None, {"valid_lens": torch.tensor([0, 256]), "dtype": "float32"}
    mask, bias = (lens > 0).to("meta"), (lens / 2).to("meta")  # where the arrays are; lengths may lie elsewhere
    everything = {"window": (64, None), "causal": True, "softcap": 5.0, "valid_lens": lens, "mask": mask, "bias": bias}
    for dtype in ("bfloat16", "float16", "float32"):
        for call in ({"window": (64, 0)}, {"softcap": 5.0}, {"causal": True, "query_offset": offsets}, everything):
            yield "flash", {"dtype": dtype, **call}
    for call in ({"return_lse": True}, {"mask": mask}, {"bias": bias}, {"valid_lens": lens}):
        yield "flash", call
        yield "flash", {"heads": (8, 2), "causal": True, "n": 1, "m": 128, **call}
        if "valid_lens" not in call:
            yield None, {"dtype": "float32", **call}  # exact products without tensor cores: SDPA's mask
        yield None, {"dtype": "float64", **call}
    yield "flash", {"valid_lens": lens[:, None].expand(2, 256)}
    yield "flash", {"valid_lens": same, "causal": True, "query_offset": 5}
    for few in (
        {"d": 257},
        {"v": 512},
        {"dtype": "float32", "d": 256},
        {"n": 0},
        {"m": 0},
        {"n": 127, "m": 127},
        {"batch": (0, 0)},
        {"batch": (2, 1)},
    ):
        yield None, {"softcap": 5.0, **few}
    yield None, {"softcap": 5.0, "capable": False}
    for grad, kernel in ((True, None), (False, "flash")):
        yield kernel, {"valid_lens": lens, "d": 256, "grad": grad}
        yield "flash", {"valid_lens": lens, "d": 256, "window": (64, 0), "grad": grad}
        yield "flash", {"valid_lens": lens, "d": 128, "grad": grad}
    yield "flash", {"softcap": 5.0, "d": 1, "v": 256}
    yield None, {"softcap": 5.0, "scale": -1.0}
    yield None, {"bias": torch.zeros(256, requires_grad=True, device="meta")}
    yield None, {"mask": lens > 0}  # of another device, which the kernel would read as if it were its own
    yield None, {"bias": lens / 2}


def test_which_kernel_serves_a_call():
    for kernel, call in table():
        assert chosen_for(**call) == kernel, call


@pytest.mark.parametrize("which", range(3))
def test_what_is_prepared_serves_no_arrays_of_two_devices(which):
    arrays = [torch.zeros(2, 4, 256, 64, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    call = Call.of(*arrays[:2], **OPTIONS | {"window": (64, 0)})
    with patch.object(gpu, "can_compile", lambda device: True), patch.dict(gpu._ready, {gpu._name(*arrays, call): gpu.FLASH}):
        assert gpu.choose(*arrays, call) is gpu.FLASH
        arrays[which] = torch.zeros(2, 4, 256, 64, dtype=torch.bfloat16)
        assert gpu.choose(*arrays, call) is None  # PyTorch's own error is better than an address of another memory


def test_no_kernel_under_autocast_compilation_or_the_transforms_that_fused_kernels_lack():
    with patch.object(torch, "is_autocast_enabled", lambda kind: True):
        assert chosen_for(softcap=5.0) is None
    with patch.object(gpu, "tracing", lambda: True):  # torch.func, make_fx
        assert chosen_for(softcap=5.0) is None
        with patch.object(torch.compiler, "is_compiling", lambda: True):  # torch.compile keeps the kernel's operator
            assert chosen_for(softcap=5.0) == "flash"
            assert chosen_for(causal=True, query_offset=3) == "flash"
            with patch.object(torch.compiler, "is_exporting", lambda: True):  # where kvattn may not be
                assert chosen_for(softcap=5.0) is None
    with patch.object(sdpa, "obstacle", lambda *_: "it cannot"):
        assert chosen_for(softcap=5.0) is None


# ---- stand-ins for the device


@contextmanager
def on_a_device():
    """Tensors say that they are CUDA's, where Triton is not. Counts the calls of each kernel."""
    called = []

    def choose(*call):
        choice = choose_as_it_is(*call)
        called.extend([NAMES[choice.kernel]] if choice else [])
        return choice

    choose_as_it_is = gpu.choose
    gpu._kept.clear()
    with (
        patch.object(torch.Tensor, "is_cuda", property(lambda x: True)),
        patch.multiple(gpu, choose=choose, can_compile=lambda device: False),
        patch.object(plan, "FEW", 0),  # small calls on a CPU have a way of their own
    ):  # fmt: skip
        yield called
    gpu._kept.clear()


def test_the_conformance_suite_on_a_stand_in_device():
    with on_a_device() as called:
        cases = [
            case
            for case in conformance.cases()
            if not known_differences.difference("torch", "*", case.name, case.group, "cuda")
        ]
        report = conformance.run("torch", cases)
    assert not report.failures, "\n".join(result.message for result in report.failures)
    assert {*called} == {"corner", "slices"}


@pytest.mark.parametrize("options", [call for call in CALLS if {*call} <= {"causal", "query_offset"}], ids=str)
@pytest.mark.parametrize("sizes", [(9, 11), (11, 9), (1, 12)], ids=str)
def test_outputs_and_gradients_are_numpys(options, sizes):
    n, m = sizes
    arrays = draw(n, m)
    reached = hidden(arrays, options)
    with on_a_device() as called:
        found = run("torch", arrays, options)
        leaking = run("torch", reached, options)
    all_seen = kvattn.planning.allows_all(n, m, options.get("query_offset", 0), None, 0)
    assert len(called) == (0 if all_seen or isinstance(options.get("query_offset"), np.ndarray) else 4)
    for x, y, z in zip(found, leaking, run("numpy", arrays, options), strict=True):
        np.testing.assert_allclose(x, z, atol=1e-12)
        np.testing.assert_allclose(y, z, atol=1e-12)


def test_second_derivatives_are_the_formulas():
    arrays = [torch.tensor(x) for x in draw(5, 6, heads=2)[:3]]
    with on_a_device() as called:
        attention = partial(kvattn.attention, causal=True, query_offset=2)
        assert torch.autograd.gradgradcheck(attention, [x.requires_grad_() for x in arrays])
    assert called


def test_lengths_in_float32_are_read_once_and_served_in_slices():
    arrays = draw(6, 9, dtype=np.float32)
    lens = torch.tensor([4, 9, 4])
    with on_a_device() as called:
        found = run("torch", arrays, {"valid_lens": lens})
    assert {*called} == {"slices"}
    for x, y in zip(found, run("numpy", arrays, {"valid_lens": lens.numpy()}), strict=True):
        assert_near(x, y)
