"""A bias by how far a key is ahead of a query, as ALiBi's, from one line of n + m - 1 numbers, of which no array n x m is made:

    attention(Q, K, V, bias)[n - 1 - i] = attention(Q turned round, K, V, B)[i]        B_ij = line[i + j]

The fused kernel reads B as a view of the line, whose rows overlap. PyTorch has no strides below 0, so that it is the queries
that are turned round, and their results. A window is -inf in the line, and blocks of queries beside the keys in it.

Source: Press, Smith and Lewis 2022, "Train short, test long" (ALiBi); the kernel is that of `sdpa`.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from kvattn import pairs, partition
from kvattn.call import Choice
from kvattn.kernels.torch import sdpa
from kvattn.kernels.torch.traces import readable

BLOCKS = 8  # of queries, where a window leaves some keys out
FEWEST = 128  # queries of one


def choose(tab, query, key, value, call):
    """The kernel that serves a call whose Pairs have a function for the bias; None where this one does not."""
    said, (n, m) = call.mask, (query.shape[-2], key.shape[-2])
    if said.bias_function is None or said.mask is not None or said.segments is not None or not readable(query):
        return None
    if n * m <= partition.FEW or call.valid_lens is not None or call.positions is not None or call.sink is not None:
        return None
    plain = call._replace(mask=None)
    if plain.beyond_softmax(tab, "dropout", "return_weights", "return_lse", "softcap"):
        return None
    if sdpa.obstacle(query, key, value, None, call.scale) or 0 in (*query.shape, *key.shape, *value.shape):
        return None
    if said.mask_function is not None:
        if (window := pairs.window_of(query, key, call)) is None:
            return None
        plain = partition.in_window(plain, *window, query, key)
    line = pairs.line_of(query, key, call)
    if line is None or line.requires_grad or type(plain.query_offset) is not int:
        return None
    why = "softmax of scaled dot products, and a bias by distance, which is a view of what each distance gives"
    return Choice("SDPA", why, (), partial(attention, tab, line, plain))


def attention(tab, line, plain, query, key, value, _call, _blocks=()):
    """The output, in blocks of queries."""
    n, m = query.shape[-2], key.shape[-2]
    least, size = 1 - plain.query_offset - n, n  # how far the key is ahead that is the least ahead
    if plain.windowed:
        size = max(FEWEST, -(-n // BLOCKS))
        ahead = torch.arange(least, least + n + m - 1)
        beyond = torch.zeros(n + m - 1, dtype=torch.bool) if plain.left is None else ahead < -plain.left
        line = line.masked_fill(beyond if plain.right is None else beyond | (ahead > plain.right), -math.inf)
    outputs = []
    for start in range(0, n, size):
        end = min(start + size, n)
        low = 0 if plain.left is None else min(max(0, start + plain.query_offset - plain.left), m - 1)
        high = m if plain.right is None else min(max(low + 1, end + plain.query_offset + plain.right), m)
        bias = line[..., n - end + low : n - start + high - 1].unfold(-1, high - low, 1)
        rows, keys, values = query[..., start:end, :].flip(-2), key[..., low:high, :], value[..., low:high, :]
        outputs.append(sdpa.masked(rows, keys, values, None, bias, plain.scale, tab._hide_padding).flip(-2))
    return (torch.cat(outputs, dim=-2) if len(outputs) > 1 else outputs[0]).to(query.dtype)  # autocast's is another
