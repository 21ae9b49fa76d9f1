"""Segments where torch.compile records a program and nobody can read them: an operator that it does not look into, which reads
them when it runs, and leaves out the blocks that share none, as an eager call does. Backward computes the blocks again."""

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
    if said.segments is None or not traces.compiling() or not query.is_cpu:
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


def _backward(query, key, value, *given):
    *rest, grad = given
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


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _gradients(ctx, grad):
    return *torch.ops.kvattn.segments_backward(*ctx.saved_tensors, *ctx.rest, grad), *[None] * 6


torch.library.register_autograd("kvattn::segments", _gradients, setup_context=_keep, lib=_library)
