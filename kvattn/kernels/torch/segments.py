"""Segments where torch.compile records a program and nobody can read them: an operator that it does not look into, which reads
them when it runs, and leaves out the blocks that share none, as an eager call does. Backward computes the blocks again.

Derivatives of derivatives are the formula's: the operator is not for torch.func nor for tensors with tangents."""

from __future__ import annotations

from functools import partial

import torch

from kvattn import dispatch, pairs
from kvattn.call import Call, Choice
from kvattn.kernels.torch import sdpa, traces

_library = torch.library.Library("kvattn", "FRAGMENT")
_TAGS = torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order
_GIVEN = "Tensor query, Tensor key, Tensor value, Tensor of_queries, Tensor of_keys"
_REST = "SymInt? left, SymInt? right, SymInt offset, float? scale"
_library.define(f"segments({_GIVEN}, {_REST}) -> Tensor", tags=_TAGS)
_library.define(f"segments_backward({_GIVEN}, {_REST}, Tensor grad) -> (Tensor, Tensor, Tensor)", tags=_TAGS)


def choose(tab, query, key, value, call):
    """The operator for a call whose Pairs have segments and no more; None where it does not serve."""
    said, (n, m) = call.mask, (query.shape[-2], key.shape[-2])
    if said.segments is None or not traces.compiling() or not query.is_cpu or traces.transformed():
        return None
    if said._replace(segments=None) != pairs.Pairs(tab) or call._replace(mask=None).masked or call.sink is not None:
        return None
    if call.beyond_softmax(tab, "dropout", "return_weights", "return_lse", "softcap") or call.positions is not None:
        return None
    if len(query.shape) != 4 or query.shape[0] != key.shape[0] or key.shape[:2] != value.shape[:2]:
        return None
    numbers = type(call.query_offset) is int and (call.scale is None or type(call.scale) in (int, float))
    if not numbers or traces.known(n * m <= pairs.FEW) or sdpa.obstacle(query, key, value, None, call.scale):
        return None
    why = "softmax of scaled dot products; segments are read when the program runs, and blocks that share none left out"
    return Choice("an operator of segments", why, (), partial(_call, said.segments))


def _call(segments, query, key, value, call, _blocks=()):
    scale = None if call.scale is None else float(call.scale)
    return torch.ops.kvattn.segments(query, key, value, *segments, call.left, call.right, call.query_offset, scale)


def _attend(query, key, value, of_queries, of_keys, left, right, offset, scale):
    tab = dispatch.load("torch")  # which imports this
    said = pairs.Pairs(tab, segments=(of_queries, of_keys))
    call = Call(tab.scaled_dot_score, tab.softmax, said, query_offset=offset, left=left, right=right, scale=scale)
    return tab._attend(query, key, value, call).contiguous()


def _backward(query, key, value, *rest):
    *rest, grad = rest
    given = query, key, value, grad
    if (torch.is_grad_enabled() and any(x.requires_grad for x in given)) or traces.dual(*given):
        raise NotImplementedError("kvattn::segments_backward has no derivatives; kvattn::segments has, with create_graph=True")
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        output = _attend(*inputs, *rest)
        return tuple(x.contiguous() for x in torch.autograd.grad(output, inputs, grad, materialize_grads=True))


_library.impl("segments", _attend, "CPU")
_library.impl("segments_backward", _backward, "CPU")


@torch.library.register_fake("kvattn::segments", lib=_library)
def _(query, key, value, *rest):
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@torch.library.register_fake("kvattn::segments_backward", lib=_library)
def _(query, key, value, *rest):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


class _Segments(torch.autograd.Function):
    """The operator with its gradients. PyTorch's own of register_autograd would drop a tangent; this refuses it."""

    @staticmethod
    def forward(*given):
        with torch._C._AutoDispatchBelowAutograd():  # private, as read in PyTorch 2.13
            return torch.ops.kvattn.segments(*given)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5])
        ctx.rest = inputs[5:]

    @staticmethod
    def backward(ctx, grad):
        given = *ctx.saved_tensors, *ctx.rest
        if not torch.is_grad_enabled() and not traces.dual(grad):
            return *torch.ops.kvattn.segments_backward(*given, grad), *[None] * 6
        with torch.enable_grad():  # what is asked is differentiated again, as what an eager call does can be
            inputs = [x.view_as(x) for x in given[:3]]  # one tensor may be query and key: each has its own gradient
            wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(_attend(*inputs, *given[3:]), wanted, grad, create_graph=True))
        return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), *[None] * 6


_library.impl("segments", _Segments.apply, "Autograd")
