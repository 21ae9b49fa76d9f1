"""The gradients of tiled.attention, in the same tiles: weights are computed again from the scores and the lse.

With P the weights, O = P V the output and G the gradient of a loss by it: dV = P^T G, dP = G V^T,
dS = P (dP - row sums of G O), dQ = scale dS K, dK = scale dS^T Q.

Source: Dao et al. 2022, "FlashAttention", algorithm 4.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kvattn.kernels.numpy import threads, tiled, tiles
from kvattn.kernels.numpy.tiles import EXP, UNIT, blocks, fold, product, take


class Known(NamedTuple):
    """What attention returned, which need not be computed again then; and the gradients by the lse and by the scores that
    return_scores names, where there are such."""

    output: np.ndarray | None = None
    lse: np.ndarray | None = None
    grad_lse: np.ndarray | None = None
    grad_scores: np.ndarray | None = None


NOTHING = Known()


def attention_grad(query, key, value, grad_output, call, known=NOTHING):
    """The gradients by query, key and value of sum(grad_output * attention(...)), float32 for half precision.

    Each has its argument's heads and every batch entry. With a gradient by the lse it is of sum(grad_lse * lse) as well.
    """
    output, lse, grad_lse, _ = known
    tiling = tiles.Tiling(query, key, value, call)
    workers = threads.count()
    if output is None:
        output, lse = tiled.forward(tiling, tiling.dtype, workers, True)
    output, grad_output = (tiling.split(x.reshape(*tiling.lead, *x.shape[-2:])) for x in (output, grad_output))
    lse, grad_lse = (x if x is None else tiling.split(x.reshape(*tiling.lead, tiling.n), 1) for x in (lse, grad_lse))
    known = Known(output, lse, grad_lse)

    # the tiles of one key head add to the same gradients: they are one task, or several with arrays of their own
    by_head = {}
    for tile in tiling.tiles(workers):
        by_head.setdefault((*tile.at[:-3], tile.at[-3].start), []).append(tile)
    parts = -(-workers // max(len(by_head), 1))
    tasks = [(part, group[part::parts]) for group in by_head.values() for part in range(parts)]
    by_query = np.empty((*tiling.lead, *query.shape[-2:]), tiling.dtype)
    by_key, by_value = (np.zeros((parts, *x.shape), tiling.dtype) for x in (tiling.key, tiling.value))
    into = tiling.split(by_query)

    def work(task, buffers):
        part, group = task
        for tile in group:
            _add(tiling, tile, known, grad_output, (into, by_key[part], by_value[part]), buffers)

    threads.share(tasks, work, workers)
    by_key *= tiling.dtype.type(1 / UNIT)
    grads = (by_query, _of_all_parts(tiling, by_key), _of_all_parts(tiling, by_value))
    return tuple(x[0] for x in grads) if query.ndim == 2 else grads


def _of_all_parts(tiling, x):
    """(parts, *batch, key heads, group or 1, ..., m, c) -> (*batch, key heads, m, c), summed."""
    x = x.reshape(len(x), *tiling.lead[:-1], tiling.heads[0], tiling.heads[1] if len(tiling.heads) > 2 else 1, *x.shape[-2:])
    return x.sum(axis=(0, -3)) if len(x) > 1 or x.shape[-3] > 1 else x[0, ..., 0, :, :]


def _add(tiling, tile, known, grad_output, grads, buffers):
    """Writes the gradient by the tile's queries and adds those by the keys and values that they see."""
    by_query, by_key, by_value = grads
    *at, heads, _, _ = tile.at
    query, lse = tiles.scaled_query(tiling, tile, buffers), known.lse[tile.at] * tiling.dtype.type(UNIT)
    grad_output = tiles.for_blas(grad_output[tile.at], "grad_output", tiling.dtype, buffers)
    delta = (grad_output * known.output[tile.at]).sum(axis=-1)
    if tiling.rate:
        grad_output = grad_output / tiling.dtype.type(tiling.share)
    if known.grad_lse is not None:
        delta -= known.grad_lse[tile.at]
    scored, finite = query, True
    if (empty := lse == -math.inf).any():  # weights of 0, which times a query of -inf are NaN for the keys that it sees
        lse[empty] = delta[empty] = 0
        scored, grad_output = (np.where(empty[..., None], 0, x).astype(tiling.dtype) for x in (query, grad_output))
        finite = np.isfinite(query).all()
    finite = finite and np.isfinite(lse).all() and np.isfinite(delta).all()  # else a row of NaN is among them
    # beside a sink a row of scores of -inf has weights of 0, not nearly: times a query of -inf they are NaN for its keys
    lowest = tiling.lowest if tiling.sink is None or tiles.small(query) else -math.inf
    total = take(buffers, "total", query.shape, tiling.dtype)
    total[...] = 0
    for block in blocks(tiling, tile, scored, buffers):
        rows, weights = block.rows, block.scores
        weights -= lse[:, :, rows, None]
        np.maximum(weights, lowest, out=weights)
        EXP(weights, out=weights)
        if block.limits:
            tiles.clear_forbidden(block)
        keys, values = block.keys, block.values
        leave_out = bool(block.limits) and not (finite and np.isfinite(keys).all() and np.isfinite(values).all())
        some_queries, some_grads = fold(query[:, :, rows]), fold(grad_output[:, :, rows])
        grad = take(buffers, "grad", weights.shape, tiling.dtype)  # by the weights, then by the scores
        np.matmul(some_grads, values.swapaxes(-1, -2), out=fold(grad))
        tiles.drop(block, grad)
        grad -= delta[:, :, rows, None]
        grad *= weights
        tiles.drop(block, weights)
        here = (*at, heads, 0, block.columns)
        part = take(buffers, "part", (*weights.shape[:3], query.shape[-1]), tiling.dtype)
        if leave_out:  # the pairs that may not attend: their weights are 0, and 0 * NaN would be NaN
            tiles.clear_forbidden(block._replace(scores=grad))
            allowed = tiles.allowed_pairs(block)
            by_value[here] += tiles.product_of_allowed(_t(fold(weights)), some_grads, _t(allowed))
            by_key[here] += tiles.product_of_allowed(_t(fold(grad)), some_queries, _t(allowed))
            fold(part)[...] = tiles.product_of_allowed(fold(grad), keys, allowed)
        else:
            by_value[here] += np.matmul(_t(fold(weights)), some_grads)
            by_key[here] += np.matmul(_t(fold(grad)), some_queries)
            product(fold(grad), keys, out=fold(part))
        total[:, :, rows] += part
    np.multiply(total, tiling.dtype.type(tiling.scale), out=by_query[tile.at])


def _t(x):
    return x.swapaxes(-1, -2)
