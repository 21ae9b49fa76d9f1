"""softmax(scale * query @ key.T + bias) @ value and its gradients where scores are few, in as few steps as keep the promises.

A call of few scores takes the time in which Python and NumPy begin their steps. These are the formula's, without what it does
for other scores, normalisers and options. Nothing leaks from pairs that may not attend, whose weights are 0, where the squares
of all numbers have finite sums: no product of two such arrays holds NaN or inf. The formula serves the other calls.

Source: Vaswani et al. 2017, "Attention is all you need", equation 1; the gradients are those of gradients.py.
"""

from __future__ import annotations

import math

import numpy as np

from kvattn import planning
from kvattn.kernels.numpy import memory, tiled, tiles
from kvattn.pairs import Pairs

MOST = 2**14  # numbers of a query or a key: a look at all of them takes a microsecond or two


def serves(tab, query, key, call):
    """Whether these functions may serve a call, of a query and a key of these shapes."""
    if call.score is not tab.scaled_dot_score or call.normalize is not tab.softmax or query[:-2] != key[:-2]:
        return False
    if call.positions is not None or call.sink is not None or call.dropout or call.return_scores or type(call.mask) is Pairs:
        return False
    return tiled.tiny(query, key) and math.prod(query) <= MOST and math.prod(key) <= MOST and key[-2] <= planning.FEW


def attention(tab, query, key, value, call):
    """The results of attention; None where numbers are not finite or half precision."""
    if (found := _weights(tab, query, key, call, value)) is None:
        return None
    weights, lse = found
    output = weights @ value
    if not (call.return_weights or call.return_lse):
        return output
    return output, *[weights] * call.return_weights, *[lse] * call.return_lse


def attention_grad(tab, query, key, value, grad_output, call):
    """The gradients by name, that by the bias before it is summed to its shape; or None."""
    if call.softcap is not None or value.shape[:-2] != key.shape[:-2]:
        return None
    if (found := _weights(tab, query, key, call, value, grad_output)) is None:
        return None
    weights = found[0]
    slope = grad_output @ value.swapaxes(-1, -2)  # by the weights, and then by the scores
    slope -= (weights * slope) @ memory.ones(key.shape[-2], slope.dtype)
    slope *= weights
    if call.bias is not None and not tiles.small(slope):  # a bias of NaN or inf reached it
        return None
    scaled = slope / math.sqrt(query.shape[-1] or 1) if call.scale is None else slope * call.scale
    by_query, by_key, by_value = scaled @ key, scaled.swapaxes(-1, -2) @ query, weights.swapaxes(-1, -2) @ grad_output
    return {"query": by_query, "key": by_key, "value": by_value, "bias": slope}


def _weights(tab, query, key, call, *others):
    """The weights and, if it is asked for, the lse; None where numbers, those of ``others`` too, are not finite or half."""
    if query.itemsize == 2:
        return None
    allowed = None
    if call.restricted:
        allowed = tab._allowed(query.shape[-2], memory.places(key.shape[-2]), query.ndim, call)
        for x in () if allowed is None else (query, key, *others):
            if not tiles.small(x):
                return None
    scores = query @ key.swapaxes(-1, -2)
    if call.scale is None:
        scores /= math.sqrt(query.shape[-1] or 1)
    else:
        scores *= call.scale
    if call.softcap is not None:
        scores = call.softcap * np.tanh(scores / call.softcap)
    if call.bias is not None:
        scores += call.bias
    return tab._softmax_lse(scores, allowed, call.return_lse)
