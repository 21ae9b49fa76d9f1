"""Operators that a program of torch.compile holds on a CPU: it does not look into them, so that they look at values when they
run, as an eager call does, where the program's own code would have to hide what nobody may attend to in copies.

They are not for torch.func nor for tensors with tangents. Derivatives of derivatives are the formula's.
"""

from __future__ import annotations

import math

import torch

from kvattn.kernels.torch import nonfinite, plan, sinks, traces

_library = torch.library.Library("kvattn", "FRAGMENT")
_TAGS = torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order


def define(name, arrays, options, results, attend, derive, formula, like):
    """The operator kvattn::name(arrays, options) -> results, and its gradients by query, key and value, its first arrays.

    ``attend``: (*arrays, *options) -> the output, or a tuple of it and of what its gradients need beside the arrays.
    ``derive``: (*arrays, *options, *results where there are several, grad) -> the gradients. ``formula``: as ``attend``, the
    output alone, which PyTorch can differentiate twice. ``like``: as ``attend``, of arrays that have no values.
    """
    count = len(arrays)
    schema = ", ".join([*arrays, *options])
    several = results if len(results) > 1 else ()
    _library.define(f"{name}({schema}) -> ({', '.join('Tensor' for _ in results)})", tags=_TAGS)
    backward = ", ".join([schema, *(f"Tensor {x}" for x in (*several, "grad"))])
    _library.define(f"{name}_backward({backward}) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
    run, run_backward = getattr(torch.ops.kvattn, name), getattr(torch.ops.kvattn, f"{name}_backward")

    class Recorded(torch.autograd.Function):
        """The operator with its gradients. PyTorch's own of register_autograd would drop a tangent; this refuses it."""

        @staticmethod
        def forward(*given):
            with torch._C._AutoDispatchBelowAutograd():  # private, as read in PyTorch 2.13
                return run(*given)

        @staticmethod
        def setup_context(ctx, inputs, output):
            kept = output if several else ()
            ctx.mark_non_differentiable(*kept[1:])
            ctx.save_for_backward(*inputs[:count], *kept)
            ctx.rest = inputs[count:]

        @staticmethod
        def backward(ctx, grad, *_):
            given, kept = (*ctx.saved_tensors[:count], *ctx.rest), ctx.saved_tensors[count:]
            nothing = [None] * (len(given) - 3)
            if not torch.is_grad_enabled() and not traces.dual(grad):
                return *run_backward(*given, *kept, grad), *nothing
            with torch.enable_grad():  # what is asked is differentiated again, as what an eager call does can be
                inputs = [x.view_as(x) for x in given[:3]]  # one tensor may be query and key: each has its own gradient
                wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
                found = iter(torch.autograd.grad(formula(*inputs, *given[3:]), wanted, grad, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), *nothing

    def recorded(*given):
        inputs = [x for x in given if isinstance(x, torch.Tensor)]
        if (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)) or traces.transformed():
            return Recorded.apply(*given)
        with torch._C._AutoDispatchBelowAutograd():  # as above; what is kept for nobody takes a twentieth of a call's time
            return run(*given)

    def refusing(*given):
        of_values = *given[:3], given[-1]
        if (torch.is_grad_enabled() and any(x.requires_grad for x in of_values)) or traces.dual(*of_values):
            words = f"kvattn::{name}_backward has no derivatives; kvattn::{name} has, with create_graph=True"
            raise NotImplementedError(words)
        return derive(*given)

    _library.impl(name, attend, "CPU")
    _library.impl(f"{name}_backward", refusing, "CPU")
    _library.impl(name, recorded, "Autograd")
    torch.library.register_fake(f"kvattn::{name}", like, lib=_library)
    torch.library.register_fake(f"kvattn::{name}_backward", _gradients_like, lib=_library)


def _gradients_like(query, key, value, *rest):
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value))


def _heads_last(x):
    """x (batch, heads, n, c) as the CPU's kernel lays out gradients: the heads of a row side by side."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def differentiated(formula, query, key, value, grad):
    """The gradients by query, key and value of what ``formula`` gives for them."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        return tuple(map(_heads_last, torch.autograd.grad(formula(*inputs), inputs, grad, materialize_grads=True)))


# ---- softmax of scaled dot products with a mask


def obstacle(query, key, value, scale):
    """Why the operator of masks does not serve what a program is to compute; "" where it does."""
    if not traces.compiling() or not query.is_cpu or traces.transformed() or sinks.ATTEND is None or not sinks.KNOWN:
        return "an operator of masks is for programs of torch.compile on a CPU"
    if torch.is_autocast_enabled("cpu") or not (scale is None or type(scale) in (int, float)):
        return "an operator of masks is not for autocast, and takes a number for the scale"
    if (
        query.ndim != 4
        or query.shape[0] != key.shape[0]
        or key.shape[:-1] != value.shape[:-1]
        or query.shape[-1] != value.shape[-1]
    ):
        return "the CPU's kernel takes four axes, of one batch, and as many features of values as of keys"
    if traces.known(math.prod(query.shape[:-1]) * key.shape[-2] <= plan.FEW):
        return "calls of few numbers have their arrays hidden in less time"
    return ""


def masked(query, key, value, mask, bias, scale):
    """softmax(scale * query @ key.T + bias) @ value over the pairs that ``mask`` (None: all) and a bias above -inf allow."""
    if mask is not None and bias is None:  # here, where torch.compile makes one loop of it and of what the mask is made of
        mask, bias = None, torch.where(mask, 0.0, -math.inf).to(query.dtype)
    return torch.ops.kvattn.masked(query, key, value, bias, mask, None if scale is None else float(scale))[0]


def _masked(query, key, value, bias, mask, scale):
    """The output, the lse of each row that has a key, and the bias with what the mask forbids, where both are given."""
    query, key, value = map(_in_rows, (query, key, value))
    added = bias
    if mask is not None:  # a sum, here: the loop that torch.compile makes of the two takes longer
        added = bias + torch.where(mask, bias.new_zeros(()), -math.inf)
    output, lse = sinks.ATTEND(query, key, value, 0.0, False, attn_mask=added, scale=scale)
    if not nonfinite.sound(output, query, key, True, False):
        output = torch.empty_like(output).copy_(_formula(query, key, value, bias, mask, scale))
    return output, lse, query.new_empty(0) if mask is None else added


def _masked_backward(query, key, value, bias, mask, scale, output, lse, added, grad):
    query, key, value, grad = map(_in_rows, (query, key, value, grad))
    added = bias if mask is None else added
    grads = sinks.DERIVE(grad, query, key, value, output, lse, 0.0, False, attn_mask=added, scale=scale)
    # what was not finite, and met a zero, is in the gradient by the query: of keys, values and grad; or by the key: of queries
    if all(map(nonfinite.finite, grads[:2])):
        return tuple(map(_heads_last, grads))
    return differentiated(lambda *given: _formula(*given, bias, mask, scale), query, key, value, grad)


def _in_rows(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _formula(query, key, value, bias, mask, scale):
    return nonfinite.attention(query, key, value, mask, bias, scale)


def _like(query, key, value, bias, mask, scale):
    output, lse = sinks.ATTEND(_in_rows(query), key, value, 0.0, False, attn_mask=None, scale=scale)
    return output, lse, query.new_empty(0) if mask is None else bias.new_empty(torch.broadcast_shapes(bias.shape, mask.shape))


define(
    "masked", ("Tensor query", "Tensor key", "Tensor value", "Tensor? bias", "Tensor? mask"), ("float? scale",),
    ("output", "lse", "added"),
    _masked, _masked_backward, _formula, _like,
)  # fmt: skip
