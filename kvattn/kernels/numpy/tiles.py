"""A call of attention cut into tiles of queries and blocks of keys, which is how tiled.py and tiled_grad.py work it through.

What causal, window and valid_lens allow a query at position p, which is query_offset plus its row, is a range of keys j:

    max(0, p - left) <= j < min(length, p + right + 1)

Blocks of keys outside the range of every query of a tile are left out, and blocks inside all of them need no mask, where no
mask is given: with one, or a bias, each block looks at its own part.

Source: Dao 2023, "FlashAttention-2", section 3.1 (causal masking), for any range.
"""

from __future__ import annotations

import itertools
import math
import sys
from typing import NamedTuple

import numpy as np

from kvattn import patterns, planning

ROWS, COLUMNS = 2048, 256  # queries of a tile, keys of a block: fewer queries meet more keys, or more heads
LONGEST = 8192  # keys of a block
CUT = 256  # keys of a block that is cut: only some queries of the tile see all of it


def _vectorised_exp2():
    core = sys.modules.get("numpy._core._multiarray_umath") or sys.modules.get("numpy.core._multiarray_umath")
    return sys.platform == "linux" and bool(getattr(core, "__cpu_features__", {}).get("AVX512_SKX"))


EXP, LOG, UNIT = (np.exp2, np.log2, math.log2(math.e)) if _vectorised_exp2() else (np.exp, np.log, 1.0)  # the faster


class Tile(NamedTuple):
    at: tuple  # (*batch, key heads, their groups, rows): indices and slices
    entry: int  # of the batch
    position: int  # of the first row
    first: int  # keys that some row sees
    last: int
    inner_first: int  # keys that every row sees
    inner_last: int


def scale_of(call, d):
    """What the dot products of a call are multiplied by; its score is dot_score or scaled_dot_score."""
    if call.scale is not None:
        return call.scale
    return 1.0 if call.score.__name__ == "dot_score" else 1 / math.sqrt(d or 1)


class Tiling:
    """The arguments as views (*batch, key heads, group, rows, features), and what each query may see."""

    def __init__(self, query, key, value, call):
        axes, self.n, self.m = query.ndim, query.shape[-2], key.shape[-2]
        if axes == 2:
            query, key, value = query[None], key[None], value[None]
        self.dtype = np.dtype(np.float64 if query.itemsize == 8 else np.float32)
        self.bits = np.dtype(np.int64 if query.itemsize == 8 else np.int32)
        self.lowest = (np.finfo(self.dtype).minexp + 4) * math.log(2) * UNIT  # below this exp is slow, and as good as 0
        self.ceiling = float(np.finfo(self.dtype).max) ** 0.75
        self.scale, self.softcap = scale_of(call, query.shape[-1]), call.softcap
        self.rate, self.first_key = call.dropout, call.first_key
        self.share = 1 - patterns.exact(call.dropout) if call.dropout else 1  # of the weights, that is kept

        # a query at position p sees the keys p - left <= j <= p + right below the length, each None where there is no limit
        self.left, self.right = call.left, call.right
        self.offsets, self.lengths, self.per_query = np.reshape(call.query_offset, -1).tolist(), [self.m], None
        if call.lengths_per_query(axes):
            self.per_query = np.clip(call.valid_lens, 0, self.m).astype(self.bits).reshape(-1, self.n)
        elif call.valid_lens is not None:
            self.lengths = np.clip(call.valid_lens, 0, self.m).reshape(-1).tolist()

        self.lead = planning.lead(query.shape, key.shape)
        self.heads = (key.shape[-3], self.lead[-1] // key.shape[-3])
        shared = (self.heads[0], 1)
        self.entries = max(len(self.offsets), len(self.lengths), 1 if self.per_query is None else len(self.per_query))
        if axes == 3 and self.entries > 1:  # the heads are batch entries too, and see keys of their own
            self.heads = shared = (*self.heads, 1, 1)
        self.batch = (*self.lead[:-1], *self.heads[:-2])
        self.query = self.split(_broadcast(query, self.lead))
        self.states = self.split(patterns.rows(call, self.lead, self.n), 1) if self.rate else None  # what rows are dropped by
        self.sink = None
        if call.sink is not None:
            sink = call.sink[..., 0] if call.sink.ndim == axes else call.sink[..., None]
            sink = np.where(sink == math.inf, math.nan, sink).astype(self.dtype)
            self.sink = self.split(np.broadcast_to(sink, (*self.lead, self.n)), 1)
        self.key, self.value = (
            _broadcast(x.reshape(*x.shape[:-2], *[1] * (len(shared) - 1), *x.shape[-2:]), (*self.lead[:-1], *shared))
            for x in (key, value)
        )
        self.bias_is_ready = call.bias is not None and _is_by_distance(call.bias)  # in UNITs, and without -inf
        if self.bias_is_ready:
            line = _line_of(call.bias).astype(self.dtype)
            line *= self.dtype.type(UNIT)
            self.bias_is_ready = bool(line.min() > -math.inf)
            call = call._replace(bias=by_distance(line, query, key) if self.bias_is_ready else call.bias)
        self.mask, self.bias = (x if x is None else self.split(_axes(x, len(self.lead) + 2)) for x in (call.mask, call.bias))

    def split(self, x, rest=2):
        """(*batch, heads, rest) -> (*batch, key heads, group, rest), a view; one head may stand for all."""
        at = x.ndim - rest - 1
        return x.reshape(*x.shape[:at], *(self.heads if x.shape[at] > 1 else [1] * len(self.heads)), *x.shape[at + 1 :])

    def tiles(self, workers):
        """The tiles, longest first. Several heads share one where a head alone would be small."""
        each = -(-2 * workers // max(1, math.prod(self.lead)))  # tiles of a head, so that every thread has some
        size = max(1, min(self.n, ROWS, max(CUT, -(-self.n // each))))
        longest = LONGEST if self.left is None and self.right is None else CUT
        many = ROWS * COLUMNS // (size * min(max(COLUMNS, self.m), longest))
        many = min(many, -(-math.prod(self.lead) // (2 * workers)))
        key_heads, group = self.heads[-2:]
        heads, groups = _slices(key_heads, max(1, many // group)), _slices(group, max(1, min(many, group)))
        rows, tiles = _slices(self.n, size), []
        ranges = [[self._range_of_keys(entry, part) for part in rows] for entry in range(self.entries)]
        for number, at in enumerate(np.ndindex(*self.batch)):
            for part, keys in zip(rows, ranges[number * self.entries // math.prod(self.batch)], strict=True):
                tiles += [Tile((*at, *of, part), *keys) for of in itertools.product(heads, groups)]
        return sorted(tiles, key=_cost, reverse=True)

    def _range_of_keys(self, entry, rows):
        """(entry, position, first, last, inner first, inner last) of a batch entry's rows."""
        position = self.offsets[entry % len(self.offsets)] + rows.start
        end, shortest = position + rows.stop - rows.start, self.lengths[entry % len(self.lengths)]
        longest = shortest
        if self.per_query is not None:
            lengths = self.per_query[entry % len(self.per_query), rows]
            shortest, longest = int(lengths.min()), int(lengths.max())
        first, inner_first = (0, 0) if self.left is None else (max(0, position - self.left), max(0, end - 1 - self.left))
        last, inner_last = longest, shortest
        if self.right is not None:
            last, inner_last = min(last, end + self.right), min(inner_last, position + self.right + 1)
        return entry, position, first, max(first, last), inner_first, inner_last

    def lengths_of(self, tile):
        """Of the keys that its rows may see: one for all, or (rows,)."""
        if self.per_query is None:
            return self.lengths[tile.entry % len(self.lengths)]
        return self.per_query[tile.entry % len(self.per_query), tile.at[-1]]

    def bounds(self, tile):
        """low and high, (rows,): each row of the tile sees the keys low <= j < high."""
        rows = tile.at[-1]
        position = np.arange(tile.position, tile.position + rows.stop - rows.start)
        high = self.lengths_of(tile)
        low = np.zeros_like(position) if self.left is None else np.maximum(position - self.left, 0)
        return low, np.minimum(high, position + self.right + 1) if self.right is not None else high


def by_distance(line, query, key, *_):
    """A bias (..., n, m) by how far keys are ahead: a view of what each distance gives, (..., n + m - 1), the least first."""
    return np.lib.stride_tricks.sliding_window_view(line, key.shape[-2], axis=-1)[..., ::-1, :]


def _is_by_distance(bias):
    """Whether a bias is a view in which each row is the one above it, moved by one."""
    return bias.ndim > 1 and min(bias.shape) > 0 and bias.shape[-2] > 1 and bias.strides[-2] == -bias.strides[-1] != 0


def _line_of(bias):
    """What `by_distance` made a view of."""
    last = bias[..., -1, :]
    return np.concatenate([last, bias[..., -2::-1, -1]], axis=-1)


def _cost(tile):
    """In proportion to the scores of a tile."""
    rows = tile.at[-1]
    return (tile.last - tile.first + max(0, tile.inner_last - tile.inner_first)) * (rows.stop - rows.start)


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


def for_blas(x, name, dtype, buffers):
    """``x`` as BLAS takes it: itself, or a copy."""
    width, (row, column) = x.itemsize, x.strides[-2:]
    if x.dtype == dtype and column == width and row >= width * x.shape[-1] and row % width == 0:
        return x
    copy = take(buffers, name, x.shape, dtype)
    copy[...] = x
    return copy


def product(a, b, out):
    """a @ b, (heads, rows, k) @ (heads, k, c); matmul would hold the GIL all along where its output is one short row."""
    if a.shape[1] > 1:
        np.matmul(a, b, out=out)
    else:
        for x, y, into in zip(a, b, out, strict=True):
            np.dot(x, y, out=into)
    return out


def fold(x):
    """(key heads, group, rows, c) -> (key heads, group * rows, c): the queries of one key head lie in a row."""
    return x.reshape(len(x), -1, x.shape[-1])


def scaled_query(tiling, tile, buffers):
    """The tile's queries times what turns their products with keys into scores: (key heads, group, rows, d)."""
    query = tiling.query[tile.at]
    factor = tiling.scale * UNIT if tiling.softcap is None else tiling.scale / tiling.softcap
    return np.multiply(
        query, tiling.dtype.type(factor), out=take(buffers, "query", query.shape, tiling.dtype), dtype=tiling.dtype
    )


class Block(NamedTuple):
    rows: slice  # those of the tile that see any of these keys
    columns: slice  # the keys
    scores: np.ndarray  # (key heads, group, rows, keys), in UNITs: of forbidden pairs as well
    limits: list  # of (rows, bits (..., rows, keys)): ones where these rows may attend and zeros where they may not
    keys: np.ndarray  # (key heads, keys, d)
    values: np.ndarray  # (key heads, keys, v)
    lowered: bool = False  # whether a bias may make scores so low that exp of them is slow
    kept: np.ndarray | None = None  # bits, ones where dropout keeps the weight and zeros where it drops it


def blocks(tiling, tile, query, buffers):
    """The blocks of keys that some row of the tile sees."""
    *at, heads, group, rows = tile.at
    one_head = query.shape[1] == 1  # one head of a group: rows that see nothing can be left out
    width = min(max(COLUMNS, ROWS * COLUMNS // math.prod(query.shape[:3])), LONGEST)
    for start, end in _ranges_of_keys(tile, width, CUT if one_head else width):
        part, columns, limits = slice(0, query.shape[2]), slice(start, end), []
        if start < tile.inner_first or end > tile.inner_last:
            part, limits = _rows_in_reach(tiling, tile, start, end, one_head, buffers)
            if part.start >= part.stop:
                continue
        index = (*at, heads, group, slice(rows.start + part.start, rows.start + part.stop), columns)
        if tiling.mask is not None and not (mask := cut(tiling.mask, index)).all():
            if not mask.any():
                continue
            limits.append((slice(None), _ones(mask, "mask", tiling.bits, buffers)))
        keys = for_blas(tiling.key[(*at, heads, 0, columns)], "keys", tiling.dtype, buffers)
        values = for_blas(tiling.value[(*at, heads, 0, columns)], "values", tiling.dtype, buffers)
        some = query[:, :, part]
        scores = take(buffers, "scores", (*some.shape[:3], end - start), tiling.dtype)
        np.matmul(fold(some), keys.swapaxes(-1, -2), out=fold(scores))
        if tiling.softcap is not None:
            np.tanh(scores, out=scores)
            scores *= tiling.dtype.type(tiling.softcap * UNIT)
        lowered = False
        if tiling.bias is not None:
            bias = cut(tiling.bias, index)
            lowered = not tiling.bias_is_ready or min(bias[..., -1, :].min(), bias[..., 0].min()) < tiling.lowest / 2
            if not tiling.bias_is_ready:
                bias = np.multiply(
                    bias, tiling.dtype.type(UNIT), out=take(buffers, "bias", bias.shape, tiling.dtype), dtype=tiling.dtype
                )
            scores += bias
            if not (tiling.bias_is_ready or bias.min(initial=0) > -math.inf):
                limits.append((slice(None), _ones(bias != -math.inf, "allowed", tiling.bits, buffers)))
        kept = None
        if tiling.rate:
            kept = patterns.kept_of_rows(tiling.states[index[:-1]], tiling.first_key + start, end - start, tiling.rate)
            kept = _ones(kept, "kept", tiling.bits, buffers)
        yield Block(part, columns, scores, limits, keys, values, lowered, kept)


def _ranges_of_keys(tile, width, cut_width):
    """(start, end) of each block of keys; where only some rows see them it is ``cut_width`` wide."""
    first, last = max(tile.first, tile.inner_first), min(tile.last, tile.inner_last)
    if first != tile.first:
        first = tile.first - (tile.first - first) // cut_width * cut_width  # no sliver between the two kinds
    if last != tile.last:
        last = first + max(last - first, 0) // cut_width * cut_width
    if first >= last:
        first = last = tile.last
    for begin, until, step in ((tile.first, first, cut_width), (first, last, width), (last, tile.last, cut_width)):
        for start in range(begin, until, step):
            yield start, min(start + step, until)


def _ones(allowed, name, bits, buffers):
    """A bool array as integers of all ones or all zeros."""
    keep = take(buffers, name, allowed.shape, bits)
    keep[...] = allowed
    return np.negative(keep, out=keep)


def _rows_in_reach(tiling, tile, start, end, one_head, buffers):
    """The rows that see any of the keys start <= j < end, and what limits leave of them: (rows, bits) for each that cuts them.

    Row r stands at tile.position + r: from which row on a limit is met, and of which shape is its triangle, is arithmetic.
    """
    rows, limits = tile.at[-1], []
    first, last = 0, rows.stop - rows.start
    ahead = start - tile.position  # of row 0, by how much
    width = end - start
    if one_head:
        first = first if tiling.right is None else max(first, ahead - tiling.right)
        last = last if tiling.left is None else min(last, ahead + width + tiling.left)
    if tiling.right is not None and (cut_until := min(last, ahead + width - 1 - tiling.right)) > first:
        keep = _triangle("right", cut_until - first, width, first + tiling.right - ahead, tiling.bits, buffers)
        limits.append((slice(0, cut_until - first), keep))
    if tiling.left is not None and (cut_from := max(first, ahead + tiling.left + 1)) < last:
        keep = _triangle("left", last - cut_from, width, cut_from - tiling.left - ahead, tiling.bits, buffers)
        limits.append((slice(cut_from - first, last - first), keep))
    if tiling.per_query is not None and first < last:
        lengths = tiling.lengths_of(tile)[first:last, None]
        keep = take(buffers, "per query", (last - first, width), tiling.bits)
        limits.append((slice(None), _signs(np.subtract(np.arange(start, end, dtype=tiling.bits), lengths, out=keep))))
    return slice(first, last), limits


def _triangle(side, rows, columns, shift, bits, buffers):
    """(rows, columns), all ones where column - row <= shift, or, on the left, >= shift; kept for blocks of the same form."""
    form = (rows, columns, shift)
    if buffers.get((side, "form")) != form:
        keep = take(buffers, side, (rows, columns), bits)
        row, column = np.arange(rows, dtype=bits)[:, None], np.arange(columns, dtype=bits)
        if side == "right":
            np.subtract(column, row + (shift + 1), out=keep)
        else:
            np.subtract(row + (shift - 1), column, out=keep)
        _signs(keep)
        buffers[side, "form"] = form
    return take(buffers, side, (rows, columns), bits)


def _signs(x):
    """All ones for what is negative, all zeros for what is not."""
    return np.right_shift(x, 8 * x.itemsize - 1, out=x)


def clear_forbidden(block):
    """Zeros where a row may not look, whatever stands there, in the block's scores, which are weights by now."""
    bits = block.scores.view(block.limits[0][1].dtype)
    for rows, keep in block.limits:
        bits[..., rows, :] &= keep


def drop(block, weights):
    """Zeros where dropout drops one of the weights, or their gradients."""
    if block.kept is not None:
        weights.view(block.kept.dtype)[...] &= block.kept


def allowed_pairs(block):
    """1 where a row sees a key and 0 where it does not, (key heads, group * rows, keys)."""
    ones = np.ones_like(block.scores)
    clear_forbidden(block._replace(scores=ones))
    return fold(ones)


def small(x):
    """Whether the squares of all numbers have a finite sum: a product of two such arrays overflows nowhere, and has no NaN.

    One product tells, in half the time of looking at each number.
    """
    return math.isfinite(np.vdot(x, x))


def product_of_allowed(weights, x, allowed):
    """weights @ x, where x is not finite: over the pairs that are allowed alone, since 0 * NaN of the others would be NaN."""
    bad = ~np.isfinite(x)
    found = np.where(allowed, weights, 0).astype(x.dtype) @ np.where(bad, 0, x).astype(x.dtype)
    return np.where(allowed.astype(x.dtype) @ bad.astype(x.dtype) > 0, math.nan, found).astype(x.dtype)
