"""Which pairs an int rng keeps (kvattn/patterns.py), in PyTorch: NumPy draws for the CPU, and int64, which wraps, serves traces
and GPUs."""

from __future__ import annotations

import math

import torch

from kvattn import patterns
from kvattn.kernels.torch import traces


def kept(weights, call):
    """Which of the weights (..., n, m) are kept, bool."""
    if not patterns.is_seed(call.rng):
        return call.rng
    if _drawn_by_numpy(weights):
        return torch.from_numpy(patterns.kept(tuple(weights.shape), call))
    *lead, n, m = weights.shape
    first, skip = divmod(call.first_key, patterns.PER_WORD)
    words = torch.arange(first, -(-(call.first_key + m) // patterns.PER_WORD), device=weights.device)
    words = _output(_rows(call, lead, n, weights.device)[..., None], words)
    bits = torch.stack([words >> patterns.BITS * i & patterns.VALUES - 1 for i in range(patterns.PER_WORD)], dim=-1)
    bits = bits.flatten(-2)[..., skip : skip + m]
    return (bits >= patterns.threshold(call.dropout)).reshape(weights.shape)


def of_selected(call, index):
    """What takes the place of rng where each query lies beside keys of its own, ``index`` (*lead, n, s)."""
    if not (call.dropout and patterns.is_seed(call.rng)):
        return call.rng
    if _drawn_by_numpy(index):
        return torch.from_numpy(patterns.kept_of_selected(index.numpy(), call))[..., None, :]
    *lead, n, _ = index.shape
    rows, keys = _rows(call, lead, n, index.device).reshape(*lead, n, 1), index + call.first_key
    words = _output(rows, keys // patterns.PER_WORD)
    bits = words >> patterns.BITS * (keys % patterns.PER_WORD) & patterns.VALUES - 1
    return (bits >= patterns.threshold(call.dropout))[..., None, :]


def _drawn_by_numpy(x):
    return x.device.type == "cpu" and not traces.tracing()


def _rows(call, lead, n, device):
    """The states of the rows: (batch * heads, n)."""
    seed = call.rng
    if not isinstance(seed, torch.Tensor):
        seed = torch.full((), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=device)
    heads = _output(seed.to(device, torch.int64), torch.arange(math.prod(lead), device=device))
    return _output(heads[:, None], call.first_query + torch.arange(n, device=device))


def _output(states, number):
    z = states + (number + 1) * _signed(patterns.STEP)
    for shift, factor in patterns.MIX:
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return z ^ _shifted(z, patterns.LAST)


def _shifted(z, by):
    return z >> by & 2 ** (64 - by) - 1  # >> keeps the sign


def _signed(x):
    return x - 2**64


def derived(rng, number):
    """The seed of part ``number`` of a layer."""
    return patterns.derived(rng, number) if type(rng) is int else _output(rng.to(torch.int64), number)
