"""Segments where torch.compile records a program and nobody can read them: an operator that it does not look into, which reads
them when it runs, and leaves out the blocks that share none, as an eager call does. Backward computes the blocks again.

Derivatives of derivatives are the formula's: the operator is not for torch.func nor for tensors with tangents."""

from __future__ import annotations

from functools import partial

import torch

from kvattn import pairs, partition, registry
from kvattn.call import Call, Choice
from kvattn.kernels.torch import operators, sdpa, traces


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
    if not numbers or traces.known(n * m <= partition.FEW) or sdpa.obstacle(query, key, value, None, call.scale):
        return None
    why = "softmax of scaled dot products; segments are read when the program runs, and blocks that share none left out"
    return Choice("an operator of segments", why, (), partial(_call, said.segments))


def _call(segments, query, key, value, call, _blocks=()):
    scale = None if call.scale is None else float(call.scale)
    return torch.ops.kvattn.segments(query, key, value, *segments, call.left, call.right, call.query_offset, scale)


def _attend(query, key, value, of_queries, of_keys, left, right, offset, scale):
    tab = registry.load("torch")  # which imports this
    said = pairs.Pairs(tab, segments=(of_queries, of_keys))
    call = Call(tab.scaled_dot_score, tab.softmax, said, query_offset=offset, left=left, right=right, scale=scale)
    return tab._attend(query, key, value, call).contiguous()


def _backward(query, key, value, *rest):
    *rest, grad = rest
    return operators.differentiated(lambda *given: _attend(*given, *rest), query, key, value, grad)


def _like(query, key, value, *rest):
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


operators.define(
    "segments", ("Tensor query", "Tensor key", "Tensor value", "Tensor of_queries", "Tensor of_keys"),
    ("SymInt? left", "SymInt? right", "SymInt offset", "float? scale"), ("output",), _attend, _backward, _attend, _like,
)  # fmt: skip
