"""Softmax attention of dot products on the CPU, in blocks of queries: no array of queries by keys exists. For a block Q of a
head's queries and the keys K and values V that it can reach,

    S = softcap(scale Q K^T),  P = exp(S) where a pair may attend, else 0,  O = P V / row sums of P,  lse = log(row sums of P)

and the gradients by _backward's formulas, for which the weights of each block are computed again. Causal, window and lengths
are limits of the slice of keys, and so are the first and the last key of the queries' segments; what of it lies outside the
window is taken out of P, or where that would lose precision, of S.

Sources: Rabe and Staats 2021, "Self-attention does not need O(n^2) memory"; the gradients: Dao et al. 2022, "FlashAttention".
"""

from __future__ import annotations

import math
from functools import lru_cache, partial, reduce
from typing import NamedTuple

import tensorflow as tf
from tensorflow.python.eager import record  # private; read in TensorFlow 2.21

from kvattn import planning
from kvattn.kernels.tensorflow import distances, plan, quirks
from kvattn.kernels.tensorflow.nonfinite import AllowedPairs, absent
from kvattn.pairs import Segments

SMALLEST = 2**17  # scores of a head that blocks are worth their own cost for; twice that, if they save no work
AT_ONCE = 2**24  # scores of a call that may be held all at once
SCORES, GRAD_SCORES = 2**20, 2**22  # of a block, forward and backward: there each adds to all the keys in its reach
ROWS, BAND_ROWS, FEWEST = 512, 256, 32  # queries of a block: at most, at most where a window limits it, at least
IN_FLIGHT = 3  # blocks: one works while another waits for a core
LOSSLESS = 2.0**-24  # where less than this share of the softmax is left inside the window, small terms may be lost
LEAST = 2.0**-64  # a sum of exponentials beside which all that vanish, each below 2^-126, are nothing
FAR = 2**29  # no array is as long: positions stay within int32
KINDS = 256  # kinds of call that are kept compiled


class Kind(NamedTuple):
    """What a program is compiled for, beside dtypes and numbers of axes: it serves all lengths."""

    scale: float
    softcap: float | None
    left: int | None
    right: int | None
    padded: bool  # whether valid lengths are given, and a mask
    masked: bool
    with_lse: bool
    scores: int  # of a block; its queries, at most and at least
    most: int
    fewest: int
    segmented: bool = False  # whether segments are given, which are compared, and a bias by distance
    biased: bool = False
    careful: bool = False  # whether something is NaN or inf
    sunk: bool = False  # whether a sink joins the sums
    unshifted: bool = False  # whether exp(scores) may overflow or vanish: then the output says so by NaN

    @property
    def windowed(self):
        return self.left is not None or self.right is not None


def obstacle(tab, query, key, value, call):
    """Why blocks do not serve a call, in words; "" where they do.

    Gradients by a bias, and by values that widen a batch axis, are left to the formula; XLA and GPUs lack operations in place.
    """
    n, m = query.shape[-2], key.shape[-2]
    if n is None or m is None:
        return "how many queries and keys there are is unknown"
    if n * m <= SMALLEST:
        return "few scores, for which blocks would cost more than they save"
    if call.dropout or call.return_weights or (call.bias is not None and type(call.bias) is not distances.Line):
        return "dropout, weights or a bias are asked for"
    if 0 in (*query.shape, *key.shape):
        return "there is nothing to compute"
    leaves_out = call.windowed or (call.valid_lens is not None and not call.lengths_per_query(len(query.shape)))
    if not leaves_out and n * m <= 2 * SMALLEST:
        heads = [x.shape[:-2].num_elements() for x in (query, key)]
        if None not in heads and max(heads) * n * m <= AT_ONCE:
            return "few scores, of which blocks would leave out none"
    if call.score not in (tab.scaled_dot_score, tab.dot_score) or call.normalize not in (tab.softmax, tab.masked_softmax):
        return "blocks are for softmax of dot products"
    if value.shape[:-2] != key.shape[:-2] or None in (*query.shape[-3:], *key.shape[-3:]):
        return "keys and values differ in their leading axes, or sizes are unknown"
    return "blocks are for the CPU, without XLA" if quirks.compiles_with_xla() or tf.config.list_physical_devices("GPU") else ""


def attention(tab, query, key, value, call, _blocks):
    """softmax(scores) @ value, and the log of the softmax's sums on request: what attention of ``tab`` returns."""
    segments = call.mask[1:] if type(call.mask) is Segments else ()
    of_all, m = call, key.shape[-2]  # what it says of pairs, as an array
    dtype = query.dtype
    query, key, value = map(tab._wide, (query, key, value))  # here, and not in each block: one trace serves half precision too

    def plain(*arrays):  # which no blocks of this file serve
        bias = of_all.bias and of_all.bias.whole(query.shape[-2], m)
        call = _of_arrays(of_all, len(query.shape))
        return tab._attend(*arrays, call=call._replace(normalize=partial(tab.softmax), bias=bias))

    call = call._replace(mask=call.mask.mask) if segments else call
    (_, _, _, *rest), kind, specs = _described(tab, query, key, value, call, segments)

    if call.mask is not None or segments or call.lengths_per_query(len(query.shape)):
        query, key, value = _without_padding(tab, query, key, value, of_all._replace(bias=None))
    elif (call.return_lse or kind.biased) and value.shape[-1] and tf.executing_eagerly():  # `_served` looks at the output
        kind = kind._replace(unshifted=True)

    @tf.custom_gradient
    def attend(query, key, value):
        results = _served(_forward, kind, specs, *_constants(query, key, value), *rest)

        def grad(*grads):
            return _twice_differentiable(query, key, value, *grads)

        @tf.custom_gradient
        def _twice_differentiable(*given):
            grads = [tf.cast(x, results[0].dtype) for x in given[3:]]
            wide = tuple((x.dtype, x.shape.rank) for x in (results[0], *grads))
            arrays = (*_constants(*given[:3]), *rest, *_constants(results[0], *grads))
            back = kind._replace(scores=GRAD_SCORES, unshifted=False, with_lse=False)
            firsts = _served(_backward, back, specs + wide, *arrays)
            for x, like in zip(firsts, given, strict=False):
                x.set_shape(like.shape)
            return firsts, lambda *seconds: _derivative(plain, given, seconds)

        for x, shape in zip(results, _shapes(query, key, value), strict=False):
            x.set_shape(shape)
        return tuple(results), grad

    output, *lse = attend(query, key, value)
    output = tf.cast(output, dtype)
    return (output, *lse) if lse else output


def _described(tab, query, key, value, call, segments=()):
    """The arrays that a program is given, its Kind, and the dtype and the number of axes of each array."""
    scale = call.scale
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1] or 1) if call.score is tab.scaled_dot_score else 1.0
    rest = [tf.cast(tf.clip_by_value(tf.cast(call.query_offset, tf.int64), -FAR, FAR), tf.int32)]
    if call.valid_lens is not None:
        rest.append(tf.cast(tf.minimum(tf.cast(call.valid_lens, tf.int64), key.shape[-2]), tf.int32))
    if call.mask is not None:
        mask, m = tf.reshape(call.mask, (*[1] * (2 - len(call.mask.shape)), *quirks.shape(call.mask))), key.shape[-2]
        rest.append(mask if mask.shape[-1] == m else tf.broadcast_to(mask, (*quirks.shape(mask)[:-1], m)))
    left, right = (None if side is None else min(side, FAR) for side in (call.left, call.right))
    rest += segments
    biased = call.bias is not None
    if biased:
        rest.append(tf.expand_dims(tab._wide(call.bias.values), -2))
    given = call.valid_lens is not None, call.mask is not None
    most = BAND_ROWS if call.windowed else ROWS
    kind = Kind(scale, call.softcap, left, right, *given, call.return_lse, SCORES, most, FEWEST, bool(segments), biased)
    arrays = [query, key, value, *rest]
    return arrays, kind, tuple((x.dtype, x.shape.rank) for x in arrays)


def takes_sink(query, key, call):
    """Whether a sink joins the blocks' sums: it costs no lse, but no tape may record it."""
    if not tf.executing_eagerly() or record.could_possibly_record() or call.return_lse or call.mask is not None:
        return False
    return planning.lead(query.shape, key.shape) == tuple(query.shape[:-2]) and absent(tf.convert_to_tensor(call.sink))


def attention_with_sink(tab, otherwise, query, key, value, call, _blocks):
    """The output of a call that `takes_sink`; ``otherwise``: what serves it if something is not finite."""
    sink, axes = tab._wide(call.sink), len(query.shape)
    sink = tf.broadcast_to(sink if len(sink.shape) == axes else sink[..., None, None], (*query.shape[:-1], 1))
    arrays, kind, specs = _described(tab, *map(tab._wide, (query, key, value)), call)
    arrays, specs = [*arrays, sink], (*specs, (sink.dtype, axes))
    (output,) = _compiled(_forward, kind._replace(sunk=True, unshifted=True), specs)(*arrays)
    return tf.cast(output, query.dtype) if absent(output) else otherwise(query, key, value, call, _blocks)


def _without_padding(tab, query, key, value, call):
    """The arguments; if something in them is not finite, with zeros where nobody looks: NaN there would leak as 0 * NaN."""

    def hidden():
        ndim = len(query.shape)
        allowed = tab._allowed(quirks.shape(query)[-2], tab._keys(key), ndim, _of_arrays(call, ndim))
        return tab._hide_padding(allowed, query, key, value)

    if tf.executing_eagerly():
        return (query, key, value) if absent(query, key, value) else hidden()
    finite = tf.math.is_finite(tf.add_n([tf.nn.l2_loss(tab._wide(x)) for x in (query, key, value)]))
    return tf.cond(finite, lambda: (query, key, value), hidden)


def _of_arrays(call, ndim):
    """The call with a mask of all pairs in the place of segments, for queries of so many axes."""
    return call._replace(mask=call.mask.array(ndim)) if type(call.mask) is Segments else call


def _served(function, kind, specs, *tensors):
    """What the compiled function returns; where that is not finite, and it can be seen, what its careful kind returns."""
    results = _compiled(function, kind, specs)(*tensors)
    finite = results[:1] if function is _forward else results  # the lse of an empty row is -inf
    if tf.executing_eagerly() and not absent(*finite):
        if kind.unshifted:
            return _served(function, kind._replace(unshifted=False), specs, *tensors)
        return _compiled(function, kind._replace(careful=True), specs)(*tensors)
    return results


def _constants(*tensors):
    """The tensors, unknown to any tape: what is done with them in place has no derivative of TensorFlow's own."""
    return [tf.stop_gradient(x) for x in tensors]


def _shapes(query, key, value):
    """The shapes of output and lse as far as the trace knows them."""
    batch = tf.broadcast_static_shape(query.shape[:-3], key.shape[:-3]) if query.shape.rank > 2 else []
    lead = [*batch, *query.shape[:-2][-1:], query.shape[-2]]
    return [*lead, value.shape[-1]], lead


def _derivative(plain, given, seconds):
    """The derivative of attention's gradients, by their arguments, from the formula: it holds all the scores."""

    def derivative(*tensors):
        given = [tf.identity(x) for x in tensors[: -len(seconds)]]  # apart, where one tensor is query and key
        results = plain(*given[:3])
        results = results if isinstance(results, tuple) else (results,)
        results = [tf.cast(x, grad.dtype) for x, grad in zip(results, given[3:], strict=True)]
        firsts = tf.gradients(results, given[:3], given[3:])  # tapes record nothing while a forward derivative is taken
        return tf.gradients(firsts, given, tensors[-len(seconds) :], unconnected_gradients="zero")

    return tf.function(derivative, autograph=False)(*given, *seconds)


@lru_cache(maxsize=KINDS)
def _compiled(function, kind, specs):
    """``function`` for a kind of call, traced once for arrays of every length, whatever graph it is first called from."""
    specs = [tf.TensorSpec([None] * rank, dtype) for dtype, rank in specs]
    with tf.init_scope():
        return tf.function(lambda *tensors: function(Arguments(kind, *tensors)), specs, autograph=False).get_concrete_function()


class Arguments:
    """The arguments with all leading axes and rows in one, and a table of which rows of them each block needs."""

    def __init__(self, kind, query, key, value, query_offset, *rest):
        self.kind, rest, rank = kind, list(rest), max(query.shape.rank, 3)
        lens, mask = rest.pop(0) if kind.padded else None, rest.pop(0) if kind.masked else None
        segments = [rest.pop(0), rest.pop(0)] if kind.segmented else []
        line = rest.pop(0) if kind.biased else None  # (..., 1, n + m - 1)
        self.sink = _rows(rest.pop(0)) if kind.sunk else None
        self.dtype = tf.float64 if query.dtype == tf.float64 else tf.float32
        self.given, self.without_heads = (query, key, value), query.shape.rank == 2
        if self.without_heads:
            query, key, value = query[None], key[None], value[None]
            lens = lens if lens is None else lens[None]
        self.n, m = tf.shape(query)[-2], tf.shape(key)[-2]
        batch = tf.broadcast_dynamic_shape(tf.shape(query)[:-3], tf.shape(key)[:-3])
        self.lead = tf.concat([batch, tf.shape(query)[-3:-2]], 0)
        self.query, self.key, self.value = _rows(query), _rows(key), _rows(value)
        self.results = [_rows(x) for x in rest[:2]] + [tf.reshape(x, (-1, 1)) for x in rest[2:]]
        self.lens, self.mask, self.line = None, None, None
        if kind.padded and lens.shape.rank > 1:  # lengths of each query's own
            self.lens, lens = tf.reshape(lens, [-1]), None
        if kind.masked:
            mask = tf.reshape(mask, tf.concat([tf.ones(rank - mask.shape.rank, tf.int32), tf.shape(mask)], 0))
            self.mask = _rows(mask)
        if kind.biased:
            line = tf.reshape(line, tf.concat([tf.ones(rank - line.shape.rank, tf.int32), tf.shape(line)], 0))
            self.line = tf.cast(tf.reshape(line, [-1]), self.dtype)
        self.segments = [tf.reshape(x, [-1]) for x in segments]
        self.masked = kind.segmented or not self.lens is self.mask is None  # pair by pair, before the softmax

        # for every head, (heads, 1): the place of its entry, query, key, value and mask among the leading axes
        entry = self._flat(tf.reshape(tf.range(self.lead[0]), tf.concat([self.lead[:1], tf.ones(rank - 3, tf.int32)], 0)))
        query_of, key_of, value_of = (self._of(tf.shape(x)[:-2]) for x in (query, key, value))
        mask_of, mask_rows = (self._of(tf.shape(mask)[:-2]), tf.shape(mask)[-2]) if kind.masked else (entry, self.n)
        head = tf.range(tf.shape(entry)[0])[:, None]

        offset = tf.gather(tf.broadcast_to(query_offset, self.lead[:1]), entry)
        heads = plan.Heads(self.n, m, offset, m if lens is None else tf.gather(lens, entry))
        size = plan.size(tf, m, kind.scores, kind.most, kind.fewest)
        start = tf.range(0, self.n, size)[None] + tf.zeros_like(entry)
        end = tf.minimum(start + size, self.n)
        start, end, low, high, below, above = plan.blocks(tf, start, end, heads, kind.left, kind.right, every_query=self.masked)
        more = {}
        if kind.segmented:
            first, last = (tf.gather(x, entry[:, 0]) for x in _ranges(*segments, self.lead[0], size))
            low = tf.maximum(low, first)
            high = tf.maximum(low, tf.minimum(high, last))
            of_queries, of_keys = (entry * tf.minimum(tf.shape(x)[0] - 1, 1) for x in segments)
            more["segments"] = of_queries * self.n + start, of_queries * self.n + end
            more["segments of keys"] = of_keys * m + low, of_keys * m + high
        if kind.biased:
            first = self._of(tf.shape(line)[:-2]) * (self.n + m - 1) + self.n  # one after the bias of a query beside itself
            more["line"] = first - end + low, first - start + high - 1
        columns = {
            "rows": (head * self.n + start, head * self.n + end),
            "query": (query_of * self.n + start, query_of * self.n + end),
            "key": (key_of * m + low, key_of * m + high),
            "value": (value_of * m + low, value_of * m + high),
            "window": (below, above),
            "positions": (start + offset, end + offset),
            "keys": (low, high),
            "lens": (entry * self.n + start, entry * self.n + end),
            "mask": tuple(mask_of * mask_rows + tf.where(mask_rows == self.n, x, y) for x, y in ((start, 0), (end, 1))),
            **more,
        }
        self.names = list(columns)
        flat = [tf.reshape(x + tf.zeros_like(start), [-1]) for pair in columns.values() for x in pair]
        self.table, self.count = tf.stack(flat, axis=1), tf.size(start)
        longest = tf.reduce_max([tf.shape(x)[0] for x in (self.query, self.key, self.value)] + [tf.size(head) * self.n])
        self.numbers = tf.range(longest)

    def _flat(self, index):
        """An index for each head, (heads, 1)."""
        return tf.reshape(tf.broadcast_to(index, self.lead), (-1, 1))

    def _of(self, own):
        """Which of an array's leading axes, of shape ``own``, each head of the scores has."""
        index = tf.reshape(tf.range(tf.reduce_prod(own)), own)
        return self._flat(tf.repeat(index, self.lead[-1] // own[-1], axis=-1))

    def each(self, body, *arrays):
        """The arrays after ``body``, (block, *arrays) -> arrays, for every block."""
        step = lambda i, *arrays: (i + 1, *body(Block(self, i), *arrays))  # noqa: E731
        return tf.while_loop(lambda i, *_: i < self.count, step, (0, *arrays), parallel_iterations=IN_FLIGHT)[1:]


def _ranges(of_queries, of_keys, batch, size):
    """The first key of the segments of each block of so many queries, and the one after their last, (batch, blocks)."""
    n, m = tf.shape(of_queries)[1], tf.shape(of_keys)[1]
    of_queries, of_keys = (tf.broadcast_to(x, tf.stack([batch, tf.shape(x)[1]])) for x in (of_queries, of_keys))
    order = tf.argsort(of_keys, axis=1, stable=True)  # keys of one segment in a row, and in their order
    in_order = tf.gather(of_keys, order, batch_dims=1)
    first, last = (tf.searchsorted(in_order, of_queries, side=side) for side in ("left", "right"))
    some = first < last
    first = tf.where(some, tf.gather(order, tf.minimum(first, m - 1), batch_dims=1), m)
    last = tf.where(some, tf.gather(order, tf.maximum(last - 1, 0), batch_dims=1) + 1, 0)
    blocks = -(-n // size)

    def of_blocks(x, other):
        more = tf.fill(tf.stack([batch, blocks * size - n]), other)
        return tf.reshape(tf.concat([x, more], axis=1), tf.stack([batch, blocks, size]))

    return tf.reduce_min(of_blocks(first, m), axis=2), tf.reduce_max(of_blocks(last, 0), axis=2)


def _rows(x):
    """(..., n, c) -> (rows, c)."""
    return tf.reshape(x, tf.stack([tf.reduce_prod(tf.shape(x)[:-1]), tf.shape(x)[-1]]))


class Block:
    """Some queries of one head, and the keys and values in their reach."""

    def __init__(self, arguments, i):
        self.arguments, self.kind = arguments, arguments.kind
        ends = tf.split(tf.gather(arguments.table, i), 2 * len(arguments.names))
        self.ends = dict(zip(arguments.names, zip(ends[::2], ends[1::2], strict=True), strict=True))
        self.query, self.key, self.value = (self.take(getattr(arguments, name), name) for name in ("query", "key", "value"))
        self.empty = None  # the queries that may attend to no key, once their scores are known

    def take(self, x, name):
        """The block's rows of an array of rows."""
        return tf.cast(_slice(x, *self.ends[name]), self.arguments.dtype)

    def of_rows_with_keys(self, x, other=0.0):
        """``x``, with another number in the rows of queries that may attend to no key."""
        return x if self.empty is None else tf.where(self.empty, tf.constant(other, x.dtype), x)

    def _allowed(self):
        """Which pairs may attend: (rows, keys)."""
        arguments, kind, allowed = self.arguments, self.kind, []
        keys = tf.range(*(x[0] for x in self.ends["keys"]))
        if arguments.lens is not None:
            allowed.append(keys < _slice(arguments.lens, *self.ends["lens"])[:, None])
        if kind.windowed:
            ahead = keys - tf.range(*(x[0] for x in self.ends["positions"]))[:, None]
            allowed += [] if kind.left is None else [ahead >= -kind.left]
            allowed += [] if kind.right is None else [ahead <= kind.right]
        if arguments.mask is not None:
            rows, keys = self.ends["mask"], self.ends["keys"]
            allowed.append(_slice(arguments.mask, *(tf.concat(x, 0) for x in zip(rows, keys, strict=True))))
        if arguments.segments:
            of_queries, of_keys = (
                _slice(x, *self.ends[name])
                for x, name in zip(arguments.segments, ("segments", "segments of keys"), strict=True)
            )
            allowed.append(tf.equal(of_queries[:, None], of_keys))
        return reduce(tf.logical_and, allowed)

    def scores(self):
        """The scores of all pairs, and the slope of softcap."""
        scores = tf.matmul(self.query * tf.constant(self.kind.scale, self.query.dtype), self.key, transpose_b=True)
        slope = None
        if self.kind.softcap is not None:
            capped = tf.tanh(scores / self.kind.softcap)
            scores, slope = self.kind.softcap * capped, 1 - capped * capped
        if self.kind.biased:
            scores += distances.block(_slice(self.arguments.line, *self.ends["line"]), tf.shape(scores)[0])
        return scores, slope

    def weights(self):
        """exp(scores) of the allowed pairs over some number, their row sums, the lse, or None, and the slope of softcap."""
        kind, masked = self.kind, self.arguments.masked
        scores, slope = self.scores()
        if kind.unshifted:
            return *self._exponentials(scores), slope
        if masked:
            scores = tf.where(self._allowed(), scores, scores.dtype.min)
            self.empty = tf.reduce_max(scores, axis=1, keepdims=True) <= scores.dtype.min
        if masked or not kind.windowed:
            weights, lse = self._softmax(scores)
            return weights, 1, lse, slope

        def masked_before():
            weights, lse = self._softmax(scores, self._allowed())
            return [weights, tf.ones_like(total)] + ([lse] if kind.with_lse else [])

        weights, lse = self._softmax(scores)
        weights = self._in_window(weights)
        total = tf.reduce_sum(weights, axis=1, keepdims=True)
        masked_after = [weights, total] + ([lse + tf.math.log(total)] if kind.with_lse else [])
        weights, total, *lse = tf.cond(tf.reduce_all(total >= LOSSLESS), lambda: masked_after, masked_before)
        return weights, total, *(lse or [None]), slope

    def _in_window(self, weights):
        """The weights, with 0 outside the window."""
        below, above = (x[0] for x in self.ends["window"])
        return tf.linalg.band_part(weights, -1 if self.kind.left is None else below, -1 if self.kind.right is None else above)

    def _exponentials(self, scores):
        """exp(scores) of the allowed pairs, their sums with the sink, and the logs of these: two passes less than a softmax."""
        weights = tf.exp(scores)
        if self.arguments.masked:
            weights = tf.where(self._allowed(), weights, 0)
        elif self.kind.windowed:
            weights = self._in_window(weights)
        total = tf.reduce_sum(weights, axis=1, keepdims=True)
        if self.kind.sunk:
            total += tf.exp(self.take(self.arguments.sink, "query"))
        fits = (total > LEAST) & (total < math.inf)  # what vanished beside a smaller sum could have counted
        total = tf.where(fits, total, math.nan)
        return weights, total, tf.math.log(total)

    def _softmax(self, scores, allowed=None):
        """Weights that sum to 1, and the lse; what an empty row has is replaced later."""
        least = scores.dtype.min
        if allowed is not None:
            scores = tf.where(allowed, scores, least)
        weights = tf.nn.softmax(scores)
        kept = weights if allowed is None else tf.where(allowed, weights, 0)  # beside scores of -inf the others' are not 0
        if not self.kind.with_lse:
            return kept, None
        top, largest = (tf.reduce_max(x, axis=1, keepdims=True) for x in (scores, weights))
        top = tf.where(tf.not_equal(top, least), top, -math.inf)
        return kept, top - tf.math.log(largest)  # the largest weight is 1 / sum(exp(scores - top))

    def careful(self):
        """The weights, the lse and the slope where something is not finite, and the pairs that may attend."""
        scores, slope = self.scores()
        allowed = self._allowed() if self.arguments.masked or self.kind.windowed else None
        pairs = AllowedPairs(None if allowed is None else lambda: allowed, always=True)
        scores = scores if allowed is None else tf.where(allowed, scores, -math.inf)
        top = tf.reduce_max(scores, axis=1, keepdims=True)
        top = tf.where(tf.equal(top, -math.inf), tf.zeros_like(top), top)
        weights = tf.exp(scores - top)
        total = tf.reduce_sum(weights, axis=1, keepdims=True)
        some = tf.not_equal(total, 0)
        lse = tf.where(some, top + tf.math.log(total), -math.inf)
        return pairs.zero_others(weights / tf.where(some, total, 1)), lse, slope, pairs

    def put(self, into, x):
        """``into``, an array of the output's rows, with x in the block's."""
        return tf.raw_ops.InplaceUpdate(x=into, i=_slice(self.arguments.numbers, *self.ends["rows"]), v=x)

    def add(self, into, x, name):
        """``into``, an array of the argument's rows, with x added to the block's."""
        return tf.raw_ops.InplaceAdd(x=into, i=_slice(self.arguments.numbers, *self.ends[name]), v=x)


def _slice(x, start, end):
    """x[start:end], of one or more axes; of one, with ends that are vectors of a number, it is no copy."""
    return tf.raw_ops.StridedSlice(input=x, begin=start, end=end, strides=[1] * start.shape[0])


def _zeros(arguments, rows, width):
    return tf.raw_ops.Empty(shape=tf.stack([rows, width]), dtype=arguments.dtype, init=True)  # no constant: it is written to


def _forward(arguments):
    """output (..., n, v), and lse (..., n) if it is asked for."""
    kind, rows = arguments.kind, tf.reduce_prod(arguments.lead) * arguments.n

    def body(block, output, *lses):
        if kind.careful:
            weights, lse, _, pairs = block.careful()
            found = pairs.matmul(weights, block.value)
        else:
            weights, total, lse, _ = block.weights()
            found = tf.matmul(weights, block.value) / total
        output = block.put(output, block.of_rows_with_keys(found))
        return output, *(block.put(x, block.of_rows_with_keys(lse, other=-math.inf)) for x in lses)

    empty = [_zeros(arguments, rows, tf.shape(arguments.value)[1])] + [_zeros(arguments, rows, 1) - math.inf] * kind.with_lse
    output, *lses = arguments.each(body, *empty)
    lead = tf.concat([arguments.lead[1:] if arguments.without_heads else arguments.lead, [arguments.n]], 0)
    return tf.reshape(output, tf.concat([lead, tf.shape(output)[1:]], 0)), *(tf.reshape(x, lead) for x in lses)


def _backward(arguments):
    """The gradients by query, key and value. With P the weights, O the output and G the gradient by it:

    dV = P^T G, dS = P (G V^T - row sums of G O), dQ = scale dS K, dK = scale dS^T Q. The lse's gradient joins the row sums.
    """
    kind, (output, grad_output, *grad_lse) = arguments.kind, arguments.results

    def body(block, by_query, by_key, by_value):
        if kind.careful:
            weights, _, slope, pairs = block.careful()
            total, product, keep = 1, pairs.matmul, pairs.zero_others
        else:
            weights, total, _, slope = block.weights()
            product, keep = lambda a, x, transposed=False: tf.matmul(a, x, transpose_a=transposed), lambda a: a
        grad = block.of_rows_with_keys(block.take(grad_output, "rows"))
        delta = tf.reduce_sum(grad * block.take(output, "rows"), axis=1, keepdims=True)
        for x in grad_lse:
            delta -= block.of_rows_with_keys(block.take(x, "rows"))
        grad, delta = grad / total, delta / total
        by_scores = weights * (tf.matmul(grad, block.value, transpose_b=True) - delta)
        by_scores = keep(by_scores if slope is None else by_scores * slope)
        scale = tf.constant(kind.scale, arguments.dtype)
        found = [product(by_scores, block.key) * scale, product(by_scores, block.query * scale, transposed=True)]
        found.append(product(weights, grad, transposed=True))
        into = zip((by_query, by_key, by_value), found, ("query", "key", "value"), strict=True)
        return [block.add(x, y, name) for x, y, name in into]

    shapes = [tf.unstack(tf.shape(x)) for x in (arguments.query, arguments.key, arguments.value)]
    grads = arguments.each(body, *(_zeros(arguments, *shape) for shape in shapes))
    return [tf.cast(tf.reshape(x, tf.shape(like)), like.dtype) for x, like in zip(grads, arguments.given, strict=True)]
