"""Softmax attention of dot products in tiles, for NumPy arrays: no array of queries by keys ever exists.

With s_ij = scale q_i . k_j (through the soft cap, plus the bias) and any t_i, over the keys j that query i may attend to:
output_i = sum_j exp(s_ij - t_i) v_j / sum_j exp(s_ij - t_i), and lse_i = t_i + log sum_j exp(s_ij - t_i).

A sink is one more term of the sum of exp alone.
With dropout the terms of the first sum are those of the keys that it keeps, divided by the share of these.

A tile of queries meets the keys block by block: the scores, exp and weights @ value of one block lie in buffers that stay
in the cache. While the sums of exp(scores) stay in range no maximum is taken off the scores; a tile where they do not is
done again with a running maximum.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Rabe and Staats 2021, "Self-attention
does not need O(n^2) memory"; Dao 2023, "FlashAttention-2".
"""

from __future__ import annotations

import math

import numpy as np

from kvattn import patterns, planning
from kvattn.kernels.numpy import threads, tiles
from kvattn.kernels.numpy.tiles import EXP, LOG, UNIT, blocks, fold, product, take

TINY = 2**16  # query.size * key.size / d of a call that is the tab's, whatever it asks for
SMALLEST, SMALLEST_ENTRY = 2**17, 2**12  # scores of a call, and of a batch entry, that tiles are worth their own cost for
SMALLEST_KEYS = 2**19  # numbers in keys that mask, valid_lens, causal or window would have the tab copy
FEW = "few scores, for which tiles would cost more than they save"
FLOOR = 2.0**-24  # a sum of exp(scores) below this may have lost small terms


def tiny(query, key):
    """Whether a query and keys of these shapes are so small that neither tiles nor blocks serve them."""
    return math.prod(query) * math.prod(key) <= TINY * query[-1]


def obstacle(tab, query, key, call, wrt=()):
    """Why tiles do not serve a call of ``tab`` on a query and keys of these shapes, or its gradients; "" where they do.

    Small tiles would cost more than they save: so there must be many scores for each batch entry, of which three axes may
    have as many as heads. A call restricted to some of the keys gains by what it does not read.
    """
    n, m, query_size, key_size = query[-2], key[-2], math.prod(query), math.prod(key)
    if query_size * m < SMALLEST * query[-1] and (key_size < SMALLEST_KEYS or not call.restricted):
        return FEW
    if not query_size or not key_size:
        return "there is nothing to compute"
    if call.return_weights or (call.dropout and not patterns.is_seed(call.rng)):
        return "the weights are asked for" if call.return_weights else "dropout that draws one number after another"
    if wrt and (call.softcap is not None or not {*wrt} <= {"query", "key", "value", "sink"}):
        return "gradients through a softcap, by the bias or a score's parameters"
    if call.score not in (tab.scaled_dot_score, tab.dot_score):
        return "the score is no dot product"
    if call.normalize not in (tab.softmax, tab.masked_softmax):
        return "the normaliser is no softmax"
    lead = planning.lead(query, key)
    if n * m * (lead[-1] if len(lead) > 1 else 1) < SMALLEST_ENTRY:
        return "few scores in each batch entry, for which tiles would cost more than they save"
    return ""


def attention(query, key, value, call, blocks=(), output=None):
    """softmax(scale * query @ key.T) @ value, and the log of the softmax's sums on request; ``output``: where to write it."""
    tiling = tiles.Tiling(query, key, value, call)
    output, lse = forward(tiling, query.dtype, threads.count(), call.return_lse, output)
    if query.ndim == 2:
        output, lse = output[0], lse[0] if call.return_lse else None
    return (output, lse) if call.return_lse else output


def forward(tiling, dtype, workers, with_lse, output=None):
    """The output (*batch, heads, n, v) and, or None, the lse."""
    shape = (*tiling.lead, tiling.n, tiling.value.shape[-1])
    output = np.empty(shape, dtype) if output is None else output.reshape(shape)
    lse = np.empty((*tiling.lead, tiling.n), tiling.dtype) if with_lse else None
    into, lse_into = tiling.split(output), tiling.split(lse, 1) if with_lse else None
    threads.share(tiling.tiles(workers), lambda tile, buffers: _attend_tile(tiling, tile, into, lse_into, buffers), workers)
    return output, lse


def _attend_tile(tiling, tile, output, lse, buffers):
    """One tile's output and lse."""
    output, top, empty = output[tile.at], 0, None
    query = tiles.scaled_query(tiling, tile, buffers)
    sums, total = take(buffers, "sums", output.shape[:3], tiling.dtype), take(buffers, "total", output.shape, tiling.dtype)
    _sum(tiling, tile, query, None, sums, total, buffers)
    if not _in_range(tiling, tile, sums, total):
        top, empty = _running_sum(tiling, tile, query, sums, total, buffers)
        if not np.isfinite(total).all():  # values so large that a sum of them overflows, though not their mean
            top += LOG(np.where(sums == 0, 1, sums))
            _sum(tiling, tile, query, top, sums, total, buffers)
        sums[empty] = total[empty] = 0
    if lse is not None or tiling.sink is not None:
        of_rows = (top + LOG(sums)) / tiling.dtype.type(UNIT)
    if tiling.sink is not None:  # a key of this score whose value is 0
        of_keys, of_rows = of_rows, np.logaddexp(of_rows, tiling.sink[tile.at])
        total *= EXP(tiling.dtype.type(UNIT) * (of_keys - np.where(of_keys == -math.inf, 0, of_rows)))[..., None]
    if lse is not None:
        lse[tile.at] = of_rows
    if not sums.all():
        sums[sums == 0] = 1
    if tiling.rate:
        sums *= tiling.dtype.type(tiling.share)
    total = np.divide(total, sums[..., None], out=output if output.dtype == tiling.dtype else total)
    if total is not output:
        output[...] = total


def _in_range(tiling, tile, sums, total):
    """Whether no sum left the range where it is exact."""
    if not (sums.max() <= tiling.ceiling and math.isfinite(total.sum())):
        return False
    if sums.min() >= FLOOR:
        return True
    low, high = tiling.bounds(tile)
    return bool(((sums >= FLOOR) | (low >= high)).all())


def _sum(tiling, tile, query, top, sums, total, buffers):
    """sums = exp(scores - top) @ 1 and total = exp(scores - top) @ values; without top it stops where a sum is too large."""
    started = False
    for block in blocks(tiling, tile, query, buffers):
        if top is not None:
            np.subtract(block.scores, top[:, :, block.rows, None], out=block.scores)
        if top is not None or block.lowered:  # what is this low is as good as 0, and exp of it is slow
            np.maximum(block.scores, tiling.lowest, out=block.scores)
        _add(block, sums, total, started, buffers)
        started = True
        if top is None and not sums.max() <= tiling.ceiling:  # with top a sum is NaN in the rows that are, and others go on
            break
    if not started:
        sums[...] = total[...] = 0


def _add(block, sums, total, started, buffers):
    """Adds exp(scores) @ 1 and exp(scores) @ values of a block."""
    weights, rows = EXP(block.scores, out=block.scores), block.rows
    values, allowed = block.values, None
    if block.limits:
        tiles.clear_forbidden(block)
        allowed = None if np.isfinite(values).all() else tiles.allowed_pairs(block)
    if not started and weights.shape[2] == total.shape[2]:
        _row_sums(weights, sums, buffers)
        tiles.drop(block, weights)
        _product(fold(weights), values, allowed, fold(total))
        return
    if not started:
        sums[...] = total[...] = 0
    sums[:, :, rows] += _row_sums(weights, take(buffers, "sum", weights.shape[:3], weights.dtype), buffers)
    part = take(buffers, "part", (*weights.shape[:3], total.shape[-1]), weights.dtype)
    tiles.drop(block, weights)
    _product(fold(weights), values, allowed, fold(part))
    total[:, :, rows] += part


def _product(weights, values, allowed, out):
    if allowed is None:
        product(weights, values, out=out)
    else:
        out[...] = tiles.product_of_allowed(weights, values, allowed)


def _row_sums(weights, out, buffers):
    """The sums of rows, (key heads, group, rows): by a product with ones, four times as fast as sum()."""
    size = weights.shape[-1]
    if len(buffers.get("ones", ())) < size:
        buffers["ones"] = np.ones(size, weights.dtype)
    np.dot(weights.reshape(-1, size), buffers["ones"][:size], out=out.reshape(-1))
    return out


def _running_sum(tiling, tile, query, sums, total, buffers):
    """The same with the largest score taken off: returns it, and which rows have none, or none above -inf."""
    sums[...] = total[...] = 0
    top = np.full(sums.shape, -math.inf, tiling.dtype)
    for block in blocks(tiling, tile, query, buffers):
        scores, rows = block.scores, block.rows
        for some, keep in block.limits:
            np.copyto(scores[..., some, :], -math.inf, where=keep == 0)
        new = np.maximum(top[:, :, rows], scores.max(axis=-1))
        shift = np.where(new == -math.inf, 0, new).astype(tiling.dtype)
        fade = EXP(top[:, :, rows] - shift)
        sums[:, :, rows] *= fade
        total[:, :, rows] *= fade[..., None]
        top[:, :, rows] = new
        scores -= shift[..., None]
        np.maximum(scores, tiling.lowest, out=scores)
        _add(block, sums, total, True, buffers)
    empty = top == -math.inf
    return np.where(empty, 0, top).astype(tiling.dtype), empty
