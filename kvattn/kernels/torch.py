"""The PyTorch tab's fast path: scaled_dot_product_attention, with the gaps to kvattn's promises closed."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def serves(query, key, value, bias, scale):
    """Whether the fused kernels keep the promises: they lack gradients by bias, forward derivatives and second ones."""
    if key.shape[-2] == 0:  # they give NaN where a query is NaN, not the zeros of nothing to attend to
        return False
    if bias is not None and bias.requires_grad:
        return False
    if scale is not None and scale <= 0:  # CUDA's flash kernel takes the row maximum before it scales
        return False
    if torch.compiler.is_compiling():
        return True
    if torch._C._are_functorch_transforms_active():
        return False
    return forward_ad._current_level < 0 or all(forward_ad.unpack_dual(x).tangent is None for x in (query, key, value))


def lengths(query, key, value, mask, bias, valid_lens, causal, query_offset, window):
    """valid_lens (batch,) as a list, where it is the only mask but for causal, and can be read without a wait; else None."""
    if valid_lens is None or valid_lens.ndim != 1 or not mask is bias is window is None or torch.compiler.is_compiling():
        return None
    if valid_lens.device.type != "cpu" or (causal and not (isinstance(query_offset, int) and query_offset == 0)):
        return None
    if not query.shape[0] == key.shape[0] == value.shape[0] == len(valid_lens) or query.ndim < 3:
        return None
    lens = [min(length, key.shape[-2]) for length in valid_lens.tolist()]
    return lens if all(lens) else None


def by_length(query, key, value, lens, causal, scale):
    """Each batch entry over its own first keys, entries of one length together: no work on padding, and none to hide."""
    order, parts = [], []
    for length in sorted({*lens}):
        entries = [i for i, of in enumerate(lens) if of == length]
        q, k, v = (x if len(entries) == len(lens) else x[entries] for x in (query, key, value))
        parts.append(attention(q, k[..., :length, :], v[..., :length, :], None, None, causal, scale))
        order += entries
    if len(parts) == 1:
        return parts[0]
    places = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(parts)[places]


def is_triangle(n, m, mask, bias, valid_lens, causal, query_offset, window):
    """Whether the causal mask is the only one and square: what ``is_causal`` means, with no padding to hide."""
    # an if, not one expression: sizes may be symbols, and is_causal takes a bool
    if not causal or n != m or not isinstance(query_offset, int) or query_offset != 0:
        return False
    return mask is None and bias is None and valid_lens is None and window is None


def attention(query, key, value, allowed, bias, triangle, scale):
    """softmax(scale * query @ key.T + bias) @ value: (..., h, n, v). A query with nothing to attend to gets zeros."""
    if allowed is not None:  # an empty row attends to all and is dropped after: CUDA's kernels have given NaN for it
        allowed = allowed.reshape(*[1] * (query.ndim - allowed.ndim), *allowed.shape)
        some = allowed.any(dim=-1, keepdim=True)
        added = allowed | ~some if bias is None else torch.where(allowed, bias, torch.where(some, -math.inf, 0).to(bias.dtype))
    run = partial(_run, causal=triangle, scale=scale)
    inputs = (query, key, value, None if allowed is None else added)
    taped = torch.is_grad_enabled() and any(x.requires_grad for x in inputs[:3]) and not torch.compiler.is_compiling()
    output = _TwiceDifferentiable.apply(run, *inputs) if taped else run(*inputs)
    return output if allowed is None else torch.where(some, output, 0)


def _run(query, key, value, mask, causal, scale):
    """scaled_dot_product_attention on (batch, h, r, c): with another number of axes the CPU's is not the fused one."""
    if query.ndim == 4 and query.shape[0] == key.shape[0] == value.shape[0]:
        grouped = {} if query.shape[1] == key.shape[1] else {"enable_gqa": True}
        return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, **grouped)
    lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    output = _run(*(x if x is None else _four(x, lead) for x in (query, key, value, mask)), causal, scale)
    return output.reshape(*lead, *query.shape[-3:-1], value.shape[-1])


def _four(x, lead):
    x = x if x.ndim > 2 else x[None]
    return x.expand(*lead, *x.shape[-3:]).reshape(math.prod(lead), *x.shape[-3:])


class _TwiceDifferentiable(torch.autograd.Function):
    """_run, whose backward is the fused one, or, under create_graph, the formula's: the fused one has no derivative."""

    @staticmethod
    def forward(ctx, run, query, key, value, mask):
        ctx.save_for_backward(query, key, value, mask)
        ctx.run, ctx.fused = run, _Tape(run, query, key, value, mask, ctx.needs_input_grad[1:4])
        return ctx.fused.output.detach()

    @staticmethod
    def backward(ctx, grad_output):
        *inputs, mask = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():
            inputs = [x.view_as(x) for x in inputs]  # apart, where one tensor is query and key
            with sdpa_kernel(SDPBackend.MATH):
                output = ctx.run(*inputs, mask)
            grads = _grads(output, inputs, wanted, grad_output, create_graph=True)
        else:
            tape, ctx.fused = ctx.fused or _Tape(ctx.run, *inputs, mask, wanted), None  # freed by the first backward
            grads = _grads(tape.output, tape.inputs, wanted, grad_output)
        return None, *grads, None


class _Tape:
    """The fused forward on leaves of its own, kept for the fused backward."""

    def __init__(self, run, query, key, value, mask, wanted):
        with torch.enable_grad():
            self.inputs = [x.detach().requires_grad_(w) for x, w in zip((query, key, value), wanted, strict=True)]
            self.output = run(*self.inputs, mask)


def _grads(output, inputs, wanted, grad_output, create_graph=False):
    chosen = [x for x, w in zip(inputs, wanted, strict=True) if w]
    grads = iter(torch.autograd.grad(output, chosen, grad_output, create_graph=create_graph))
    return [next(grads) if w else None for w in wanted]
