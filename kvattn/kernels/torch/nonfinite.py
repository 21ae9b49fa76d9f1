"""Attention where something is not finite: products that leave out the pairs that may not attend, where 0 * NaN would be NaN:

    (A X)[i, c] = sum of A[i, j] X[j, c] over the j to which i may attend

`sound` tells whether a fused kernel's answer may be given, `attention` is the answer where it may not. `product` and
`score_pair_by_pair` do the same for the formula. Where values cannot be looked at (see `readable`), none of them does anything.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from kvattn.kernels.torch.traces import readable

HALF = (torch.float16, torch.bfloat16)
VECTOR = 16  # keys, below which the CPU's kernel takes the largest of nothing but NaN for -inf, and gives zeros
PAIRS = 2**22  # numbers that are held at one time


def finite(x):
    """Whether all numbers of ``x`` are finite, and their sum."""
    x = x.detach() if x.requires_grad else x
    return math.isfinite(x.sum().item()) or (x.dtype in HALF and math.isfinite(x.sum(dtype=torch.float32).item()))


def sound(output, query, key, masked, causal, known_readable=False):
    """Whether nothing reached a row of the fused kernel's output that it may not see, and no NaN was lost on the way.

    ``known_readable``: the caller has asked already whether there are values, which may be looked at.
    """
    if not known_readable and (not readable(output) or not output.numel()):
        return True
    if query.dtype in HALF:  # their kernel gives zeros where a score is inf
        return finite(query) and finite(key) and not ((masked or causal) and not finite(output))
    if masked or key.shape[-2] >= VECTOR:  # with a mask, no NaN is lost
        return not (masked or causal) or finite(output)
    values = output.detach() if output.requires_grad else output
    zeros = output.numel() > values.count_nonzero().item()  # what was lost left a row of them
    return not (zeros or (causal and not finite(output))) or all(map(finite, (output, query, key)))


def attention(query, key, value, allowed, bias, scale):
    """softmax(scale * query @ key.T + bias) @ value, from the allowed pairs (None: all) alone; differentiable, twice too."""
    n, m, dtype = query.shape[-2], key.shape[-2], query.dtype
    if query.ndim > 2 and query.shape[-3] != key.shape[-3]:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    allowed = query.new_ones((), dtype=torch.bool) if allowed is None else allowed
    if bias is not None:
        allowed = allowed & (bias != -math.inf)
    allowed = allowed.expand(*lead, n, m)
    scale = 1 / math.sqrt(query.shape[-1] or 1) if scale is None else scale
    size = max(1, PAIRS // max(1, m * math.prod(lead)))
    attend = _block if size >= n or not torch.is_grad_enabled() else partial(checkpoint, _block, use_reentrant=False)
    parts = []
    with torch.autocast(query.device.type, enabled=False):
        for i in range(0, max(n, 1), size):
            added = bias if bias is None or bias.ndim < 2 or bias.shape[-2] != n else bias[..., i : i + size, :]
            parts.append(attend(query[..., i : i + size, :], key, value, allowed[..., i : i + size, :], added, scale))
    return torch.cat(parts, dim=-2).to(dtype)


def _block(query, key, value, allowed, bias, scale):
    query, key, value = (x.float() if x.dtype in HALF else x for x in (query, key, value))
    scores = scale * _Scores.apply(query, key, allowed)
    scores = torch.where(allowed, scores if bias is None else scores + bias, -math.inf)
    some = (scores != -math.inf).any(dim=-1, keepdim=True)
    weights = torch.where(allowed & some, torch.softmax(torch.where(some, scores, 0), dim=-1), 0)
    return _Product.apply(weights, value, lambda: allowed)


# ---- the products


def product(weights, value, allowed):
    """weights @ value, from the pairs alone that ``allowed`` (a function of nothing, or None: all) gives."""
    if allowed is None or not readable(weights):
        return weights @ value
    if torch.is_grad_enabled() and (weights.requires_grad or value.requires_grad):
        return _Product.apply(weights, value, allowed)
    return _product(weights, value, allowed)


def _product(weights, value, allowed):
    output = weights @ value
    if finite(output):
        return output
    allowed = allowed()
    odd = ~torch.isfinite(value)
    output = torch.where(allowed, weights, 0) @ torch.where(odd, 0, value)
    return torch.where(allowed.to(weights.dtype) @ odd.to(weights.dtype) > 0, math.nan, output)


def softmax(scores, where):
    """PyTorch's own softmax of the pairs in ``where`` (None: all), one pass forward and one back; None where it gives another
    answer, in rows that are empty or not finite, and where nobody can tell."""
    if not readable(scores) or not scores.numel():
        return None
    scores = scores if where is None else torch.where(where, scores, -math.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32 if scores.dtype in HALF else None)
    return weights if finite(weights) else None


def cleared(weights, allowed):
    """The weights, 0 for what may not attend in a row of NaN too."""
    return weights if readable(weights) and finite(weights) else torch.where(allowed, weights, 0)


class _Product(torch.autograd.Function):
    """weights @ value over the allowed pairs; so are its gradients, and theirs."""

    @staticmethod
    def forward(ctx, weights, value, allowed):
        ctx.save_for_backward(weights, value)
        ctx.allowed = allowed
        return _product(weights, value, allowed)

    @staticmethod
    def backward(ctx, grad):
        weights, value = ctx.saved_tensors
        grad, allowed = grad.to(value.dtype), ctx.allowed
        by_weights = by_value = None
        if ctx.needs_input_grad[0]:
            by_weights = None if torch.is_grad_enabled() else grad @ value.mT
            if by_weights is None or not finite(by_weights):
                by_weights = _Scores.apply(grad, value, allowed())
            by_weights = by_weights.sum_to_size(weights.shape)
        if ctx.needs_input_grad[1] and not torch.is_grad_enabled():
            by_value = _product(weights.mT, grad, lambda: allowed().mT).sum_to_size(value.shape)
        elif ctx.needs_input_grad[1]:
            by_value = _Product.apply(weights.mT, grad, lambda: allowed().mT).sum_to_size(value.shape)
        return by_weights, by_value, None


class _Scores(torch.autograd.Function):
    """query @ key.T of the allowed pairs, 0 for the others; so are its gradients, and theirs."""

    @staticmethod
    def forward(ctx, query, key, allowed):
        ctx.save_for_backward(query, key, allowed)
        return torch.where(allowed, query @ key.mT, 0)

    @staticmethod
    def backward(ctx, grad):
        query, key, allowed = ctx.saved_tensors
        grad = torch.where(allowed, grad, 0)
        by_query = by_key = None
        if ctx.needs_input_grad[0]:
            by_query = _Product.apply(grad, key, lambda: allowed).sum_to_size(query.shape)
        if ctx.needs_input_grad[1]:
            by_key = _Product.apply(grad.mT, query, lambda: allowed.mT).sum_to_size(key.shape)
        return by_query, by_key, None


# ---- the formula with any score


def may_leak(query, key):
    """Whether a score's gradient would multiply the zeros of what may not attend by NaN or inf."""
    return readable(query) and not (finite(query) and finite(key))


def score_pair_by_pair(score, allowed):
    """The score of each allowed pair by itself, of a key of zeros for the others: no gradient passes between them."""

    def rows(query, key, allowed):
        return score(query[..., None, :], torch.where(allowed[..., None], key[..., None, :, :], 0))[..., 0, :]

    def scores(query, key):
        n, size = query.shape[-2], max(1, PAIRS // max(1, math.prod(allowed.shape[:-2]) * key.shape[-2] * key.shape[-1]))
        attend = rows if size >= n else partial(checkpoint, rows, use_reentrant=False)
        blocks = range(0, n, size)
        return torch.cat([attend(query[..., i : i + size, :], key, allowed[..., i : i + size, :]) for i in blocks], dim=-2)

    return scores
