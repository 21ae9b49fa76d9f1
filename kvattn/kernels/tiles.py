"""A call of attention cut into tiles of queries and blocks of keys, which is how tiled.py and tiled_grad.py work it through.

What causal, window and valid_lens allow is a range of keys for each query: blocks outside every range are left out, and
blocks inside all of them need no mask.
"""

from __future__ import annotations

import itertools
import math
import sys
from typing import NamedTuple

import numpy as np

from kvattn import bands

ROWS, COLUMNS = 1024, 256  # queries of a tile, keys of a block: fewer queries meet more keys, or more heads
LONGEST = 8192  # keys of a block
EDGE = 128  # keys of a block that not all queries of the tile see


def _vectorised_exp2():
    core = sys.modules.get("numpy._core._multiarray_umath") or sys.modules.get("numpy.core._multiarray_umath")
    return sys.platform == "linux" and bool(getattr(core, "__cpu_features__", {}).get("AVX512_SKX"))


EXP, LOG, UNIT = (np.exp2, np.log2, math.log2(math.e)) if _vectorised_exp2() else (np.exp, np.log, 1.0)  # the faster


class Tile(NamedTuple):
    at: tuple  # (*batch, key heads, their groups, rows): indices and slices
    entry: int  # of the bounds
    first: int  # keys that some row sees
    last: int
    inner_first: int  # keys that every row sees
    inner_last: int


class Call:
    """The arguments as views (*batch, key heads, group, rows, features); query i may see keys low[i] <= j < high[i]."""

    def __init__(self, query, key, value, scale, mask, bias, valid_lens, causal, query_offset, window, softcap):
        axes, self.n, self.m = query.ndim, query.shape[-2], key.shape[-2]
        if axes == 2:
            query, key, value = query[None], key[None], value[None]
        self.dtype = np.dtype(np.float64 if query.itemsize == 8 else np.float32)
        self.bits = np.dtype(np.int64 if query.itemsize == 8 else np.int32)
        self.lowest = (np.finfo(self.dtype).minexp + 4) * math.log(2) * UNIT  # below this exp is slow, and as good as 0
        self.ceiling = float(np.finfo(self.dtype).max) ** 0.75
        self.scale, self.softcap = scale, softcap
        self.low, self.high = None, None
        if causal or window is not None or valid_lens is not None:
            self.low, self.high = self._bounds(axes, valid_lens, causal, query_offset, window)
        self.lead = bands.lead(query.shape, key.shape)
        self.heads = (key.shape[-3], self.lead[-1] // key.shape[-3])
        shared = (self.heads[0], 1)
        if axes == 3 and self.low is not None and len(self.low) > 1:  # heads are batch entries too, with bounds of their own
            self.heads = shared = (*self.heads, 1, 1)
        self.batch = (*self.lead[:-1], *self.heads[:-2])
        self.query = self.split(_broadcast(query, self.lead))
        self.key, self.value = (
            _broadcast(x.reshape(*x.shape[:-2], *[1] * (len(shared) - 1), *x.shape[-2:]), (*self.lead[:-1], *shared))
            for x in (key, value)
        )
        self.mask, self.bias = (x if x is None else self.split(_axes(x, len(self.lead) + 2)) for x in (mask, bias))

    def split(self, x, rest=2):
        """(*batch, heads, rest) -> (*batch, key heads, group, rest), a view; one head may stand for all."""
        at = x.ndim - rest - 1
        return x.reshape(*x.shape[:at], *(self.heads if x.shape[at] > 1 else [1] * len(self.heads)), *x.shape[at + 1 :])

    def _bounds(self, axes, valid_lens, causal, query_offset, window):
        """low and high, (batch or 1, n or 1)."""
        low, high = np.zeros((1, 1), np.int64), np.full((1, 1), self.m)
        if causal or window is not None:
            left, right = window or (None, None)
            right = 0 if causal else right
            position = np.reshape(query_offset, (-1, 1)) + np.arange(self.n)
            low = low if left is None else position - left
            high = high if right is None else position + right + 1
        if valid_lens is not None:
            high = np.minimum(high, valid_lens.reshape(1 if axes == 2 else len(valid_lens), -1))
        return np.broadcast_arrays(*(np.clip(x, 0, self.m).astype(np.int32) for x in (low, high)))

    def tiles(self, workers):
        """The tiles, longest first. Several heads share one where a head alone would be small."""
        each = -(-2 * workers // max(1, math.prod(self.lead)))  # tiles of a head, so that every thread has some
        size = max(1, min(self.n, ROWS, max(EDGE, -(-self.n // each))))
        many = ROWS * COLUMNS // (size * min(max(COLUMNS, self.m), LONGEST))
        many = min(many, -(-math.prod(self.lead) // (2 * workers)))
        c, g = self.heads[-2:]
        heads, groups = _slices(c, max(1, many // g)), _slices(g, max(1, min(many, g)))
        rows = _slices(self.n, size)
        bounds = self._bounds_of(rows) if rows else []
        tiles = []
        for number, at in enumerate(np.ndindex(*self.batch)):
            here = bounds[number * len(bounds) // math.prod(self.batch)] if rows else []
            for of_heads, of_group, (i, part) in itertools.product(heads, groups, enumerate(rows)):
                cost, *limits = here[i if len(here) > 1 else 0]
                tiles.append((cost * (part.stop - part.start), Tile((*at, of_heads, of_group, part), *limits)))
        return [tile for _, tile in sorted(tiles, key=lambda x: -x[0])]

    def _bounds_of(self, rows):
        """[[(number of keys, entry, first, last, inner first, inner last) of rows] of a batch entry], or one for all."""
        if self.low is None:
            return [[(self.m, 0, 0, self.m, 0, self.m)]]
        starts = [part.start for part in rows] if self.low.shape[1] > 1 else [0]
        sees = self.low < self.high
        found = (
            np.add.reduceat(np.where(sees, self.high - self.low, 0), starts, axis=1),
            np.broadcast_to(np.arange(len(sees))[:, None], (len(sees), len(starts))),
            np.minimum.reduceat(np.where(sees, self.low, self.m), starts, axis=1),
            np.maximum.reduceat(np.where(sees, self.high, 0), starts, axis=1),
            np.maximum.reduceat(self.low, starts, axis=1),
            np.minimum.reduceat(self.high, starts, axis=1),
        )
        return np.stack(found, axis=-1).tolist()

    def bounds(self, tile):
        """low and high of the tile's rows, or one for all of them."""
        rows = tile.at[-1] if self.low.shape[1] > 1 else slice(None)
        return self.low[tile.entry, rows], self.high[tile.entry, rows]


def _broadcast(x, lead):
    return x if x.shape[:-2] == lead else np.broadcast_to(x, (*lead, *x.shape[-2:]))


def _slices(size, step):
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def _axes(x, count):
    return x.reshape(*[1] * (count - x.ndim), *x.shape)


def cut(x, index):
    """x[index], where an axis of size 1 stands for every index."""
    one = slice(0, 1)
    return x[tuple(i if n != 1 else one if type(i) is slice else 0 for n, i in zip(x.shape, index, strict=True))]


def take(buffers, name, shape, dtype):
    """An array of that shape in the memory that goes by ``name``."""
    size = math.prod(shape)
    if name not in buffers or buffers[name].size < size:
        buffers[name] = np.empty(size, dtype)
    return buffers[name][:size].reshape(shape)


def ready(x, name, dtype, buffers):
    """``x`` as BLAS takes it: itself, or a copy."""
    width, (row, column) = x.itemsize, x.strides[-2:]
    if x.dtype == dtype and column == width and row >= width * x.shape[-1] and row % width == 0:
        return x
    copy = take(buffers, name, x.shape, dtype)
    copy[...] = x
    return copy


def fold(x):
    """(key heads, group, rows, c) -> (key heads, group * rows, c): the queries of one key head lie in a row."""
    return x.reshape(len(x), -1, x.shape[-1])


def scaled_query(call, tile, buffers):
    """The tile's queries times what turns their products with keys into scores: (key heads, group, rows, d)."""
    query = call.query[tile.at]
    factor = call.scale * UNIT if call.softcap is None else call.scale / call.softcap
    return np.multiply(query, call.dtype.type(factor), out=take(buffers, "query", query.shape, call.dtype), dtype=call.dtype)


class Block(NamedTuple):
    rows: slice  # those of the tile that see any of these keys
    columns: slice  # the keys
    scores: np.ndarray  # (key heads, group, rows, keys), in UNITs: of forbidden pairs as well
    keeps: list  # of (rows, bits), (..., rows, keys): ones where a row may look and zeros where it may not
    keys: np.ndarray  # (key heads, keys, d)
    values: np.ndarray  # (key heads, keys, v)


def blocks(call, tile, query, buffers):
    """The blocks of keys that some row of the tile sees."""
    *at, heads, group, rows = tile.at
    low, high = (None, None) if call.low is None else call.bounds(tile)
    alone = query.shape[1] == 1  # one head of a group: rows that see nothing can be left out
    width = min(max(COLUMNS, ROWS * COLUMNS // math.prod(query.shape[:3])), LONGEST)
    for start, end in _stretches(tile, width, EDGE if alone else width):
        part, columns = slice(0, query.shape[2]), slice(start, end)
        inside = tile.inner_first <= start and end <= tile.inner_last
        if not inside and alone and len(low) > 1:
            seeing = np.flatnonzero((low < end) & (start < high) & (low < high))
            if not len(seeing):
                continue
            part = slice(int(seeing[0]), int(seeing[-1]) + 1)
        index = (*at, heads, group, slice(rows.start + part.start, rows.start + part.stop), columns)
        keeps = [] if inside else _within(call.bits, low[part], high[part], columns, buffers)
        if call.mask is not None and not (mask := cut(call.mask, index)).all():
            if not mask.any():
                continue
            keeps.append((slice(None), _ones(mask, "mask", call.bits, buffers)))
        keys = ready(call.key[(*at, heads, 0, columns)], "keys", call.dtype, buffers)
        values = ready(call.value[(*at, heads, 0, columns)], "values", call.dtype, buffers)
        some = query[:, :, part]
        scores = take(buffers, "scores", (*some.shape[:3], end - start), call.dtype)
        np.matmul(fold(some), keys.swapaxes(-1, -2), out=fold(scores))
        if call.softcap is not None:
            np.tanh(scores, out=scores)
            scores *= call.dtype.type(call.softcap * UNIT)
        if call.bias is not None:
            bias = cut(call.bias, index)
            bias = np.multiply(bias, call.dtype.type(UNIT), out=take(buffers, "bias", bias.shape, call.dtype), dtype=call.dtype)
            scores += bias
            if not (allowed := bias != -math.inf).all():
                keeps.append((slice(None), _ones(allowed, "allowed", call.bits, buffers)))
                np.maximum(scores, call.lowest, out=scores)
        yield Block(part, columns, scores, keeps, keys, values)


def _stretches(tile, width, edge):
    """(start, end) of each block of keys; where only some rows see them it is ``edge`` wide."""
    first, last = max(tile.first, tile.inner_first), min(tile.last, tile.inner_last)
    if first != tile.first:
        first = tile.first - (tile.first - first) // edge * edge  # no sliver between the two kinds
    if last != tile.last:
        last = first + max(last - first, 0) // edge * edge
    if first >= last:
        first = last = tile.last
    for begin, until, step in ((tile.first, first, edge), (first, last, width), (last, tile.last, edge)):
        for start in range(begin, until, step):
            yield start, min(start + step, until)


def _ones(allowed, name, bits, buffers):
    """A bool array as integers of all ones or all zeros."""
    keep = take(buffers, name, allowed.shape, bits)
    keep[...] = allowed
    return np.negative(keep, out=keep)


def _within(bits, low, high, columns, buffers):
    """What bounds leave of a block, (rows, bits) for each that cuts it, of the rows that it cuts."""
    keeps, position = [], np.arange(columns.start, columns.stop, dtype=bits)
    for name, cuts in (("low", low > columns.start), ("high", high < columns.stop)):
        if cuts.any():
            hit = np.flatnonzero(cuts)
            rows = slice(int(hit[0]), int(hit[-1]) + 1) if len(cuts) > 1 else slice(None)
            bound = (low - 1 if name == "low" else high)[rows, None].astype(bits)
            ahead = (bound, position) if name == "low" else (position, bound)
            keep = np.subtract(*ahead, out=take(buffers, name, (len(bound), len(position)), bits))
            keeps.append((rows, np.right_shift(keep, 8 * bits.itemsize - 1, out=keep)))  # the sign, in every bit
    return keeps


def clear(block):
    """Zeros where a row may not look, whatever stands there, in the block's scores, which are weights by now."""
    bits = block.scores.view(block.keeps[0][1].dtype)
    for rows, keep in block.keeps:
        bits[..., rows, :] &= keep


def hidden(block, x):
    """Keys or values, (key heads, keys, c), with zeros for what no row sees if they are not finite: 0 * NaN is NaN."""
    if not block.keeps or np.isfinite(x).all():
        return x
    return np.where((block.scores != 0).any(axis=(1, 2))[..., None], x, 0).astype(x.dtype)
