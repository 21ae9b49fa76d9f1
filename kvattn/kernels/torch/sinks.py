"""The CPU's fused kernel with a sink s: with lse the log of the sum of exp(scores) of a row without it, and O its output,

    lse' = log(exp(lse) + exp(s)),    O' = O exp(lse - lse')

The kernel's backward computes weights again, exp(score - lse), and takes each row's sum of grad_output * output off their
gradients. Given lse' and O' it is that of the weights with the sink, whose own gradient is -exp(s - lse') times the sum.

Source of that backward: Dao et al. 2022, "FlashAttention", algorithm 4.
"""

from __future__ import annotations

import math

import torch

from kvattn.kernels.torch.traces import tracing

ATTEND = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)  # private: as read in 2.13
KNOWN = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 11)  # gives zeros for empty rows, and grouped heads
DERIVE = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def obstacle(query, key, value):
    """Why the kernel cannot serve SDPA's calls with a sink; "" where it can."""
    if not query.is_cpu or ATTEND is None or not KNOWN or tracing() or torch.is_autocast_enabled("cpu"):
        return "SDPA gives its lse on a CPU alone, not while a program is recorded, nor under autocast"
    if query.ndim != 4 or not query.shape[0] == key.shape[0] == value.shape[0] or query.shape[-1] != value.shape[-1]:
        return "SDPA gives its lse for four axes, of one batch, and as many features of values as of keys"
    if 0 in (*query.shape, *key.shape) or not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
        return "SDPA gives its lse for rows that lie in one piece"
    return ""


def fused(query, key, value, mask, causal, scale, sink):
    """The output of scaled_dot_product_attention with the sink: of each head, or each query; half precision rounded once."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if mask is not None:
        mask = (torch.where(mask, 0.0, -math.inf) if mask.dtype == torch.bool else mask).to(dtype)
    wide = (x.to(dtype) for x in (query, key, value))
    return _Fused.apply(*wide, sink, mask, causal, scale).to(query.dtype)


def with_lse(query, key, value, causal, scale):
    """The output of scaled_dot_product_attention, and its lse, float32 for half precision."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    output, lse = ATTEND(*(x.detach().to(dtype) for x in (query, key, value)), 0.0, causal, attn_mask=None, scale=scale)
    return output.to(query.dtype), lse


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sink, mask, causal, scale):
        output, lse = ATTEND(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        of_rows = rows(sink, lse)
        both = torch.logaddexp(lse, of_rows)
        left = torch.exp(lse - both)[..., None]
        output = output.mul_(left)
        ctx.save_for_backward(query, key, value, sink, mask, output, both)
        ctx.options = causal, scale
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:  # the formula took the gradient
            return (None,) * 7
        query, key, value, sink, mask, output, lse = ctx.saved_tensors
        causal, scale = ctx.options
        by_sink = None
        if ctx.needs_input_grad[3]:
            sums = torch.linalg.vecdot(grad_output.to(lse.dtype), output.to(lse.dtype))
            by_sink = gradient(sink, lse, sums)
        if not any(ctx.needs_input_grad[:3]):
            return None, None, None, by_sink, None, None, None
        grads = DERIVE(grad_output, query, key, value, output, lse, 0.0, causal, attn_mask=mask, scale=scale)
        return *grads, by_sink, None, None, None


def gradient(sink, lse, sums):
    """The gradient by the sink; ``sums``: of grad_output * output in each row."""
    of_rows = rows(sink, lse)
    by_sink = torch.where(of_rows == -math.inf, 0, -sums * torch.exp(of_rows - lse))  # -inf is none, whatever is NaN
    by_sink = by_sink[..., None] if sink.ndim == 4 else by_sink.sum(dim=-1)
    return by_sink.sum_to_size(sink.shape).to(sink.dtype)


def rows(sink, lse):
    """The sink as it broadcasts to the rows (batch, heads, n)."""
    return (sink[..., 0] if sink.ndim == 4 else sink[..., None]).to(lse.dtype)
