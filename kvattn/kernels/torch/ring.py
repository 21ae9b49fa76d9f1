"""Attention whose keys travel round a ring of processes. With (output, lse) of each part of the keys, L = log(sum of exp(lse)),

    output = sum over parts of exp(lse - L) * output

Backward the keys travel again, and their gradients with them, home in the end. The tab differentiates each part, given the
gradients of this sum, where w = exp(lse - L) and ' is of the sum:

    by output:  w * grad'        by lse:  w * (grad' . (output - output') + grad_lse')

Source: Liu et al. 2023, "Ring attention with blockwise transformers" (https://arxiv.org/abs/2310.01889).
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from kvattn.kernels.torch import nonfinite, sinks
from kvattn.pairs import Pairs

HALF = (torch.float16, torch.bfloat16)


class Ring(NamedTuple):
    """The processes of a group, by their ranks in it, and how many seconds to wait for one; where their arrays lie."""

    group: dist.ProcessGroup
    rank: int
    size: int
    timeout: float
    device: torch.device

    def source(self, step):
        """Whose keys are here."""
        return (self.rank - step) % self.size

    def turn(self, x, count):
        """Start to send x to the next process; what comes from the one before, so many numbers, and what to wait for."""
        coming = x.new_empty(count)
        return coming, self.post([(x, (self.rank + 1) % self.size)], [(coming, (self.rank - 1) % self.size)])

    def gathered(self, x, shapes):
        """The array of every process, of these shapes; sent to each, since a collective of gloo cannot be given up in time."""
        x = x.contiguous()
        found = [x if rank == self.rank else x.new_empty(shape) for rank, shape in enumerate(shapes)]
        others = [rank for rank in range(self.size) if rank != self.rank]
        self.wait(self.post([(x, rank) for rank in others], [(found[rank], rank) for rank in others]))
        return found

    def post(self, sent, received):
        """Start to send and to receive these arrays, (array, rank), of which empty ones are not sent."""
        ways = [(dist.isend, *x) for x in sent] + [(dist.irecv, *x) for x in received]
        calls = [dist.P2POp(way, x, dist.get_global_rank(self.group, rank), self.group) for way, x, rank in ways if x.numel()]
        try:
            return dist.batch_isend_irecv(calls) if calls else []
        except RuntimeError as error:
            raise self._lost(error) from error

    def wait(self, works):
        """Until all that was posted has come and gone.

        NCCL's `wait` lets the stream wait, and this process go on; only given a timeout, as here, does it wait until it knows.
        Of what is computed, nothing waits for that: it is in the stream already.
        """
        try:
            for work in works:
                work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error):
        return ConnectionError(
            f"rank {self.rank} of {self.size} waits for another in vain: it is lost, or has sent nothing for "
            f"{self.timeout:g} s (timeout=), as where not every process makes the same calls: {error}"
        )


def attention(query, key, value, bias, sink, ring, plan):
    """(output, lse) of this process's queries and the keys of all. ``plan``: kvattn/distributed/torch.py's."""
    return _Attention.apply(query, key, value, bias, sink, ring, plan)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bias, sink, ring, plan):
        wide, shape = torch.promote_types(query.dtype, torch.float32), plan.scores[:-1]
        # each row's largest lse so far, and the sums of exp(lse - largest) and of exp(lse - largest) * output
        largest = query.new_full(shape, -math.inf, dtype=wide)
        total, summed = torch.zeros_like(largest), query.new_zeros((*shape, value.shape[-1]), dtype=wide)
        for source, *parts in _round(ring, plan, key, value):
            for piece in plan.pieces(source):
                rows = piece.rows
                part = [_wide(x) for x in _cut(query, *parts, piece)]
                output, lse = _fused(plan, piece, part, bias) or _attend(plan, piece, part, _of_pairs(bias, piece))
                most, kept, new = _shares(largest[..., rows], lse)
                largest[..., rows] = most
                total[..., rows] = kept * total[..., rows] + new
                summed[..., rows, :] = kept[..., None] * summed[..., rows, :] + new[..., None] * output
        empty = largest == -math.inf
        if sink is not None:  # a part whose output is 0
            largest, kept, new = _shares(largest, _rows(sink, shape).to(wide))
            total, summed = kept * total + new, kept[..., None] * summed
        total = torch.where(total == 0, 1, total)
        output, lse = torch.where(empty[..., None], 0, summed / total[..., None]), largest + total.log()
        returned = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, bias, sink, output, lse)
        ctx.ring, ctx.plan = ring, plan
        ctx.set_materialize_grads(False)
        return returned, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):
        if torch.is_grad_enabled():
            raise RuntimeError("ring_attention has no second derivatives: its gradients are taken without create_graph=True")
        query, key, value, bias, sink, output, lse = ctx.saved_tensors
        ring, plan = ctx.ring, ctx.plan
        grad = torch.zeros_like(output) if grad is None else grad.to(output.dtype)
        delta = torch.linalg.vecdot(grad, output)
        delta = delta if grad_lse is None else delta - grad_lse
        by_query, by_bias, by_sink = _zeros(query, lse), None, None
        if bias is not None and ctx.needs_input_grad[3]:
            by_bias = _zeros(bias, lse)
        if sink is not None and ctx.needs_input_grad[4]:
            by_sink = _by_sink(sink, lse, delta).to(sink.dtype)
        width = math.prod(key.shape[:-2]) * key.shape[-1] + math.prod(value.shape[:-2]) * value.shape[-1]
        coming, works = None, []
        for step, (source, *parts) in enumerate(_round(ring, plan, key, value)):
            by_parts = [_zeros(x, lse) for x in parts]
            for piece in plan.pieces(source):
                rows = piece.rows
                part, asked = _cut(query, *parts, piece), (grad[..., rows, :], delta[..., rows], lse[..., rows])
                pairs = _of_pairs(bias, piece), _of_pairs(by_bias, piece)
                found = None if grad_lse is not None else _fused_derived(plan, piece, part, bias, output[..., rows, :], *asked)
                found = found or _derived(plan, piece, part, *pairs, *asked)
                for whole, x in zip(_cut(by_query, *by_parts, piece), found, strict=True):
                    whole += x
            ring.wait(works)  # what was sent is kept until then
            travelling = torch.cat([x.reshape(-1) for x in by_parts])
            if coming is not None:
                travelling += coming
            coming, works = travelling, []
            if ring.size > 1:  # after the keys; with the last step they come home
                coming, works = ring.turn(travelling, width * plan.count(ring.source(step + 1)))
        ring.wait(works)
        by_key, by_value = coming.split([key.numel(), value.numel()])
        by_bias = None if by_bias is None else by_bias.to(bias.dtype)
        by_key, by_value = by_key.reshape(key.shape).to(key.dtype), by_value.reshape(value.shape).to(value.dtype)
        return by_query.to(query.dtype), by_key, by_value, by_bias, by_sink, None, None


def _round(ring, plan, key, value):
    """Whose keys are here, the keys and the values, step by step; those of the next step are on their way meanwhile."""
    shapes = [(x.shape[:-2], x.shape[-1]) for x in (key, value)]
    sent = torch.cat([key.reshape(-1), value.reshape(-1)]) if ring.size > 1 else None
    for step in range(ring.size):
        last = step + 1 == ring.size
        if not last:
            rows = plan.count(ring.source(step + 1))
            coming, works = ring.turn(sent, sum(math.prod(lead) * rows * width for lead, width in shapes))
        yield ring.source(step), key, value
        if not last:
            ring.wait(works)
            sent = coming
            key, value = sent.split([math.prod(lead) * rows * width for lead, width in shapes])
            key, value = (x.view(*lead, rows, width) for x, (lead, width) in zip((key, value), shapes, strict=True))


def _shares(largest, lse):
    """The larger, and the exp of each less it."""
    most = torch.maximum(largest, lse)
    finite = torch.where(most == -math.inf, 0, most)
    return most, torch.exp(largest - finite), torch.exp(lse - finite)


def _cut(query, key, value, piece):
    return query[..., piece.rows, :], key[..., piece.cols, :], value[..., piece.cols, :]


def _of_pairs(x, piece):
    """The rows and columns of a piece, of what broadcasts to (..., n, m); or None."""
    if x is None or not x.ndim:
        return x
    x = x[..., piece.places] if x.shape[-1] > 1 else x
    return x[..., piece.rows, :] if x.ndim > 1 and x.shape[-2] > 1 else x


def _mask(mask, piece):
    """The mask of a piece; functions of positions are asked for those in the whole sequence, segments are of its own rows."""
    if type(mask) is not Pairs:
        return _of_pairs(mask, piece)
    if mask.segments is not None:
        of_queries, of_keys = mask.segments
        mask = mask._replace(segments=(of_queries[:, piece.rows], of_keys[:, piece.places]))
    moved = {name: _moved(getattr(mask, name), piece.places.start) for name in ("mask_function", "bias_function")}
    return mask._replace(mask=_of_pairs(mask.mask, piece), **moved)


def _moved(function, start):
    return function and (lambda queries, keys: function(queries + start, keys + start))


def _wide(x):
    """Half precision in float32, so that results are rounded once; on a GPU as it is, which its kernels take."""
    return x.float() if x.dtype in HALF and not x.is_cuda else x


def _zeros(x, like):
    return torch.zeros(x.shape, dtype=like.dtype, device=x.device)


def _attend(plan, piece, part, bias):
    """(output, lse) of a piece by the tab."""
    with torch.autocast(part[0].device.type, enabled=False):
        bias = None if bias is None else _wide(bias)
        return plan.attend(*part, bias=bias, mask=_mask(plan.mask, piece), **plan.options(piece))


def _fused(plan, piece, part, bias):
    """The same by SDPA's kernel on a CPU, in a quarter of the time; None where it does not serve, or not all is finite."""
    causal = plan.fused(piece) if bias is None else None
    if causal is None or sinks.obstacle(*part):
        return None
    output, lse = sinks.ATTEND(*part, 0.0, causal, scale=plan.given["scale"])
    return (output, lse) if all(map(nonfinite.finite, (*part[:2], output, lse))) else None


def _fused_derived(plan, piece, part, bias, output, grad, delta, lse):
    """What `_derived` gives, of that kernel: given the whole's output and lse, its backward is that of the whole."""
    causal, part = plan.fused(piece) if bias is None else None, [_wide(x) for x in part]
    if causal is None or sinks.obstacle(*part) or not all(map(nonfinite.finite, (*part, output, lse, grad))):
        return None
    grad, output, lse = (x.contiguous() for x in (grad, output, lse))
    return sinks.DERIVE(grad, *part, output, lse, 0.0, causal, scale=plan.given["scale"])


def _derived(plan, piece, part, bias, by_bias, grad, delta, lse):
    """The gradients of the whole by query, key and value of a piece; that by bias is added to ``by_bias``, if it is there."""
    inputs = [_wide(x).detach().requires_grad_() for x in part]
    if by_bias is not None:
        bias = _wide(bias).detach().requires_grad_()
    with torch.enable_grad():
        output, own = _attend(plan, piece, inputs, bias)
    nothing = own == -math.inf  # rows that see none of these keys: NaN of theirs is nothing to them
    weight = torch.where(nothing, 0, torch.exp(own.detach() - lse))
    by_output = torch.where(nothing[..., None], 0, weight[..., None] * grad)
    by_lse = torch.where(nothing, 0, weight * (torch.linalg.vecdot(grad, output.detach().to(grad.dtype)) - delta))
    inputs += [] if by_bias is None else [bias]
    found = torch.autograd.grad((output, own), inputs, (by_output.to(output.dtype), by_lse), materialize_grads=True)
    if by_bias is not None:
        by_bias += found[3]
    return found[:3]


def _rows(sink, shape):
    """The sink as one logit for each row (..., h, n); inf makes NaN."""
    x = (sink[..., 0] if sink.ndim == len(shape) + 1 else sink[..., None]).expand(shape)
    return torch.where(x == math.inf, math.nan, x)


def _by_sink(sink, lse, delta):
    rows = _rows(sink, lse.shape)
    found = torch.where(rows == -math.inf, 0, -torch.exp(rows - lse) * delta)
    return (found[..., None] if sink.ndim == lse.ndim + 1 else found.sum(dim=-1)).sum_to_size(sink.shape)
