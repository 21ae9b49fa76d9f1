"""What a program that is recorded may know: its values come later, and so may its sizes.

PyTorch has no public question for most of it: the names with an underscore are private, as read in PyTorch 2.13.
"""

from __future__ import annotations

import torch
from torch import Tensor

# by their names: this is asked more than once in every call, and half of what it costs would be looking for them
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack, _len_torch_function_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling


def tracing():
    """Whether a program is recorded that runs with other values later: none of this call's may decide what it does."""
    return (
        is_dynamo_compiling()  # first: torch.compile reads no further
        or _is_tracing()
        or _are_functorch_transforms_active()
        or ((_len_torch_dispatch_stack() or _len_torch_function_stack()) != 0 and _recording_mode())
    )


def _recording_mode():
    """Whether make_fx, FakeTensorMode or a functionalization listens: not every mode that does records a program."""
    keys = torch._C._TorchDispatchModeKey
    modes = [torch._C._get_dispatch_mode(key) for key in (keys.PROXY, keys.FAKE, keys.FUNCTIONAL)]
    modes += [torch._ops._get_dispatch_mode_pre_dispatch(key) for key in (keys.PROXY, keys.FUNCTIONAL)]
    return is_compiling() or any(mode is not None for mode in modes)


def compiling():
    """Whether torch.compile records a program that runs in this process: of no other can an operator of kvattn's be a part."""
    return is_dynamo_compiling() and not torch.compiler.is_exporting()


def transformed():
    """Whether torch.func or forward derivatives are at work: an operator of kvattn's has no rules for either."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def dual(*inputs):
    """Whether one has a tangent."""
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs)


def readable(x):
    """Whether the values of ``x`` may be looked at: they exist, on the CPU, and no program is recorded."""
    return not tracing() and x.is_cpu and (type(x) is Tensor or type(x).__torch_dispatch__ is Tensor.__torch_dispatch__)


def fusible():
    """Whether a program that is recorded may call the fused kernel: ONNX's takes neither every mask nor a size of 0."""
    return is_dynamo_compiling() or not torch.onnx.is_in_onnx_export()


def known(fact):
    """Whether a fact about sizes, such as n == m, is true in every run of the program, if one is recorded."""
    if fact is True or fact is False:
        return fact
    if isinstance(fact, torch.Tensor):  # what torch.jit.trace makes of sizes
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads SymPy, which symbols have loaded

    return statically_known_true(fact)
