"""Softmax attention of dot products in tiles, for NumPy arrays: no array of queries by keys ever exists.

A tile of queries meets the keys block by block: the scores, exp and weights @ value of one block lie in buffers that stay
in the cache. While the sums of exp(scores) stay in range no maximum is taken off the scores; a tile where they do not is
done again with a running maximum.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Rabe and Staats 2021, "Self-attention
does not need O(n^2) memory"; Dao 2023, "FlashAttention-2".
"""

from __future__ import annotations

import math

import numpy as np

from kvattn import bands
from kvattn.kernels.numpy import threads, tiles
from kvattn.kernels.numpy.tiles import EXP, LOG, UNIT, blocks, clear, fold, product, seen, seen_product, take

TINY = 2**14  # query.size * key.size of a call that need not be looked at: all is the tab's
SMALLEST, SMALLEST_ENTRY = 2**17, 2**12  # scores of a call, and of a batch entry, that tiles are worth their own cost for
SMALLEST_KEYS = 2**19  # numbers in keys that mask, valid_lens, causal or window would have the tab copy
FLOOR = 2.0**-24  # a sum of exp(scores) below this may have lost small terms


def serves(tab, query, key, value, **options):
    """Whether tiles serve a call of ``tab``: softmax of dot products, large, weights not asked for."""
    return not obstacle(tab, query, key, value, **options)


def obstacle(tab, query, key, value, *, score=None, normalize=None, dropout=0.0, return_weights=False, mask=None, bias=None,
             valid_lens=None, causal=False, window=None, **_):  # fmt: skip
    """Why tiles do not serve a call of ``tab``; "" where they do.

    Small tiles would cost more than they save: so there must be many scores for each batch entry, of which three axes may
    have as many as heads. A call restricted to some of the keys gains by what it does not read.
    """
    n, m = query.shape[-2], key.shape[-2]
    if query.size * m < SMALLEST * query.shape[-1]:
        restricted = mask is not None or bias is not None or valid_lens is not None or causal or window is not None
        if key.size < SMALLEST_KEYS or not restricted:
            return "few scores, for which tiles would cost more than they save"
    if not query.size or not key.size:
        return "there is nothing to compute"
    if dropout or return_weights:
        return "dropout" if dropout else "the weights are asked for"
    if score not in (None, tab.scaled_dot_score, tab.dot_score):
        return "the score is no dot product"
    if normalize not in (None, tab.softmax, tab.masked_softmax):
        return "the normaliser is no softmax"
    lead = bands.lead(query.shape, key.shape)
    if n * m * (lead[-1] if len(lead) > 1 else 1) < SMALLEST_ENTRY:
        return "few scores in each batch entry, for which tiles would cost more than they save"
    return ""


def scale_of(tab, query, score, scale):
    """What the dot products of a call are multiplied by."""
    if scale is not None:
        return scale
    return 1.0 if score is tab.dot_score else 1 / math.sqrt(query.shape[-1] or 1)


def attention(query, key, value, scale, *, mask=None, bias=None, valid_lens=None, causal=False, query_offset=0, window=None,
              softcap=None, return_lse=False, output=None):  # fmt: skip
    """softmax(scale * query @ key.T) @ value, and the log of the softmax's sums on request; ``output``: where to write it."""
    call = tiles.Call(query, key, value, scale, mask, bias, valid_lens, causal, query_offset, window, softcap)
    output, lse = forward(call, query.dtype, threads.count(), return_lse, output)
    if query.ndim == 2:
        output, lse = output[0], lse[0] if return_lse else None
    return (output, lse) if return_lse else output


def forward(call, dtype, workers, with_lse, output=None):
    """The output (*batch, heads, n, v) and, or None, the lse."""
    shape = (*call.lead, call.n, call.value.shape[-1])
    output = np.empty(shape, dtype) if output is None else output.reshape(shape)
    lse = np.empty((*call.lead, call.n), call.dtype) if with_lse else None
    into, lse_into = call.split(output), call.split(lse, 1) if with_lse else None
    threads.share(call.tiles(workers), lambda tile, buffers: _attend(call, tile, into, lse_into, buffers), workers)
    return output, lse


def _attend(call, tile, output, lse, buffers):
    """One tile's output and lse."""
    output, top, empty = output[tile.at], 0, None
    query = tiles.scaled_query(call, tile, buffers)
    sums, total = take(buffers, "sums", output.shape[:3], call.dtype), take(buffers, "total", output.shape, call.dtype)
    _sum(call, tile, query, None, sums, total, buffers)
    if not _sound(call, tile, sums, total):
        top, empty = _running_sum(call, tile, query, sums, total, buffers)
        if not np.isfinite(total).all():  # values so large that a sum of them overflows, though not their mean
            top += LOG(np.where(sums == 0, 1, sums))
            _sum(call, tile, query, top, sums, total, buffers)
        sums[empty] = total[empty] = 0
    if lse is not None:
        lse[tile.at] = (top + LOG(sums)) / call.dtype.type(UNIT)
    if not sums.all():
        sums[sums == 0] = 1
    total = np.divide(total, sums[..., None], out=output if output.dtype == call.dtype else total)
    if total is not output:
        output[...] = total


def _sound(call, tile, sums, total):
    """Whether no sum left the range where it is exact."""
    if not (sums.max() <= call.ceiling and math.isfinite(total.sum())):
        return False
    if sums.min() >= FLOOR:
        return True
    low, high = call.bounds(tile)
    return bool(((sums >= FLOOR) | (low >= high)).all())


def _sum(call, tile, query, top, sums, total, buffers):
    """sums = exp(scores - top) @ 1 and total = exp(scores - top) @ values; without top it stops where a sum is too large."""
    started = False
    for block in blocks(call, tile, query, buffers):
        if top is not None:
            np.subtract(block.scores, top[:, :, block.rows, None], out=block.scores)
            np.maximum(block.scores, call.lowest, out=block.scores)
        _add(block, sums, total, started, buffers)
        started = True
        if top is None and not sums.max() <= call.ceiling:  # with top a sum is NaN in the rows that are, and others go on
            break
    if not started:
        sums[...] = total[...] = 0


def _add(block, sums, total, started, buffers):
    """Adds exp(scores) @ 1 and exp(scores) @ values of a block."""
    weights, rows = EXP(block.scores, out=block.scores), block.rows
    values, sees = block.values, None
    if block.keeps:
        clear(block)
        sees = None if np.isfinite(values).all() else seen(block)
    if not started and weights.shape[2] == total.shape[2]:
        _row_sums(weights, sums, buffers)
        _product(fold(weights), values, sees, fold(total))
        return
    if not started:
        sums[...] = total[...] = 0
    sums[:, :, rows] += _row_sums(weights, take(buffers, "sum", weights.shape[:3], weights.dtype), buffers)
    part = take(buffers, "part", (*weights.shape[:3], total.shape[-1]), weights.dtype)
    _product(fold(weights), values, sees, fold(part))
    total[:, :, rows] += part


def _product(weights, values, sees, out):
    return product(weights, values, out=out) if sees is None else seen_product(weights, values, sees, out)


def _row_sums(weights, out, buffers):
    """The sums of rows, (key heads, group, rows): by a product with ones, four times as fast as sum()."""
    size = weights.shape[-1]
    if len(buffers.get("ones", ())) < size:
        buffers["ones"] = np.ones(size, weights.dtype)
    np.dot(weights.reshape(-1, size), buffers["ones"][:size], out=out.reshape(-1))
    return out


def _running_sum(call, tile, query, sums, total, buffers):
    """The same with the largest score taken off: returns it, and which rows have none, or none above -inf."""
    sums[...] = total[...] = 0
    top = np.full(sums.shape, -math.inf, call.dtype)
    for block in blocks(call, tile, query, buffers):
        scores, rows = block.scores, block.rows
        for some, keep in block.keeps:
            np.copyto(scores[..., some, :], -math.inf, where=keep == 0)
        new = np.maximum(top[:, :, rows], scores.max(axis=-1))
        shift = np.where(new == -math.inf, 0, new).astype(call.dtype)
        fade = EXP(top[:, :, rows] - shift)
        sums[:, :, rows] *= fade
        total[:, :, rows] *= fade[..., None]
        top[:, :, rows] = new
        scores -= shift[..., None]
        np.maximum(scores, call.lowest, out=scores)
        _add(block, sums, total, True, buffers)
    empty = top == -math.inf
    return np.where(empty, 0, top).astype(call.dtype), empty
