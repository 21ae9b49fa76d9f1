"""Softmax attention of dot products in blocks of queries, for TensorFlow on the CPU: no array of queries by keys exists.

A block of a head's queries meets the keys that it can reach, all at once. Causal, window and lengths are limits of the slice
of keys, and what lies outside the band is taken out of the softmax after the fact; where that would lose precision the scores
are masked before. The backward pass computes the weights of each block again.

Source: Rabe and Staats 2021, "Self-attention does not need O(n^2) memory".
"""

from __future__ import annotations

import math
from functools import lru_cache, partial, reduce

import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from kvattn.kernels.tensorflow.nonfinite import Pairs, absent

SMALLEST = 2**17  # scores of a head that blocks are worth their own cost for; twice that, if they save no work
HELD = 2**24  # scores of a call that may be held all at once
SCORES, GRAD_SCORES = 2**20, 2**22  # of a block, forward and backward: there each adds to all the keys in its reach
ROWS, BAND_ROWS, FEWEST = 512, 256, 32  # queries of a block: at most, at most beside a band, at least
AHEAD = 3  # blocks in flight: one works while another waits for a core
FLOOR = 2.0**-24  # where less than this share of the softmax is left inside the band, small terms may be lost
FAR = 2**29  # no array is as long: positions stay within int32
KINDS = 256  # kinds of call that are kept compiled


def serves(tab, query, key, value, score, normalize, bias=None, dropout=0.0, return_weights=False, restricted=False):
    """Whether blocks serve a call of ``tab``: softmax of dot products, many for each head, weights not asked for.

    ``restricted``: to some of the keys, so that blocks need not look at all. They are made for the CPU, and use operations
    that XLA lacks. Gradients by a bias and values that widen a batch axis are left to the tab.
    """
    n, m = query.shape[-2], key.shape[-2]
    if n is None or m is None or n * m <= SMALLEST or dropout or return_weights or bias is not None:
        return False
    if 0 in (*query.shape, *key.shape):
        return False
    if not restricted and n * m <= 2 * SMALLEST:
        heads = [x.shape[:-2].num_elements() for x in (query, key)]
        if None not in heads and max(heads) * n * m <= HELD:
            return False
    if score not in (tab.scaled_dot_score, tab.dot_score) or normalize not in (tab.softmax, tab.masked_softmax):
        return False
    if value.shape[:-2] != key.shape[:-2] or None in (*query.shape[-3:], *key.shape[-3:]):
        return False
    return not (_compiles_with_xla() or tf.config.list_physical_devices("GPU"))


def _compiles_with_xla():
    return not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def attention(tab, query, key, value, *, score, scale, softcap, return_lse, mask, bias, valid_lens, causal, query_offset,
              window):  # fmt: skip
    """softmax(scores) @ value, and the log of the softmax's sums on request: what attention of ``tab`` returns."""
    assert bias is None
    options = {"mask": mask, "valid_lens": valid_lens, "causal": causal, "query_offset": query_offset, "window": window}
    options |= {"score": score, "scale": scale, "softcap": softcap, "return_lse": return_lse}
    plain = partial(tab.attention, normalize=partial(tab.softmax), **options)  # no blocks: their gradients' derivative
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1] or 1) if score is tab.scaled_dot_score else 1.0
    where = [tf.cast(tf.clip_by_value(tf.cast(query_offset, tf.int64), -FAR, FAR), tf.int32)]
    where += [] if valid_lens is None else [tf.cast(tf.minimum(tf.cast(valid_lens, tf.int64), key.shape[-2]), tf.int32)]
    where += [] if mask is None else [mask]
    left, right = (None if side is None else min(side, FAR) for side in window or (None, None))
    restricted = (left, 0 if causal else right, valid_lens is not None, mask is not None)
    kind = (scale, softcap, *restricted, return_lse)
    specs = tuple((x.dtype, x.shape.rank) for x in (query, key, value, *where))

    @tf.custom_gradient
    def attend(query, key, value):
        results = _served(_forward, kind, (SCORES, ROWS, BAND_ROWS, FEWEST), specs, *_constants(query, key, value), *where)

        def grad(*grads):
            return _twice_differentiable(query, key, value, *grads)

        @tf.custom_gradient
        def _twice_differentiable(*given):
            grads = [tf.cast(x, results[0].dtype) for x in given[3:]]
            wide = tuple((x.dtype, x.shape.rank) for x in (results[0], *grads))
            arrays = (*_constants(*given[:3]), *where, *_constants(results[0], *grads))
            firsts = _served(_backward, kind, (GRAD_SCORES, ROWS, BAND_ROWS, FEWEST), specs + wide, *arrays)
            for x, like in zip(firsts, given, strict=False):
                x.set_shape(like.shape)
            return firsts, lambda *seconds: _derivative(plain, given, seconds)

        for x, shape in zip(results, _shapes(query, key, value), strict=False):
            x.set_shape(shape)
        return tuple(results), grad

    output, *lse = attend(query, key, value)
    output = tf.cast(output, query.dtype)
    return (output, *lse) if lse else output


def _served(function, kind, sizes, specs, *tensors):
    """What the compiled function returns; where that is not finite, and it can be seen, what its careful kind returns."""
    results = _compiled(function, (*kind, False, *sizes), specs)(*tensors)
    looked = results[:1] if function is _forward else results  # the lse of an empty row is -inf
    if tf.executing_eagerly() and not absent(*looked):
        return _compiled(function, (*kind, True, *sizes), specs)(*tensors)
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
    """That of attention's gradients, by their arguments, from the formula: it holds all the scores."""

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
    """``function`` for a kind of call, traced once for sizes of every length, whatever graph it is first called from."""
    specs = [tf.TensorSpec([None] * rank, dtype) for dtype, rank in specs]
    with tf.init_scope():
        return tf.function(lambda *tensors: function(Call(kind, *tensors)), specs, autograph=False).get_concrete_function()


class Call:
    """The arguments with all leading axes and rows in one, and a table of which rows of them each block needs."""

    def __init__(self, kind, query, key, value, query_offset, *rest):
        self.scale, self.softcap, self.left, self.right, padded, masked, self.with_lse, self.careful, *sizes = kind
        rest, rank = list(rest), max(query.shape.rank, 3)
        valid_lens, mask = rest.pop(0) if padded else None, rest.pop(0) if masked else None
        self.dtype = tf.float64 if query.dtype == tf.float64 else tf.float32
        self.given, self.squeezed = (query, key, value), query.shape.rank == 2
        if self.squeezed:
            query, key, value = query[None], key[None], value[None]
            valid_lens = valid_lens if valid_lens is None else valid_lens[None]
        n, self.m = tf.shape(query)[-2], tf.shape(key)[-2]
        batch = tf.broadcast_dynamic_shape(tf.shape(query)[:-3], tf.shape(key)[:-3])
        self.lead = tf.concat([batch, tf.shape(query)[-3:-2]], 0)
        self.query, self.key, self.value = _rows(query), _rows(key), _rows(value)
        self.results = [_rows(x) for x in rest[:2]] + [tf.reshape(x, (-1, 1)) for x in rest[2:]]
        self.banded = self.left is not None or self.right is not None
        self.ragged = padded and valid_lens.shape.rank > 1  # lengths of each query's own
        self.masked = masked or self.ragged
        self.lens = tf.reshape(valid_lens, [-1]) if self.ragged else None
        if masked:
            mask = tf.reshape(mask, tf.concat([tf.ones(rank - mask.shape.rank, tf.int32), tf.shape(mask)], 0))
            self.mask = tf.reshape(mask, tf.concat([[tf.reduce_prod(tf.shape(mask)[:-2])], tf.shape(mask)[-2:]], 0))
        else:
            self.mask = None

        # for every head, (heads, 1): the place of its entry, query, key, value and mask among the leading axes, and its limits
        entry = self._flat(tf.reshape(tf.range(self.lead[0]), tf.concat([self.lead[:1], tf.ones(rank - 3, tf.int32)], 0)))
        query_of, key_of, value_of = (self._of(tf.shape(x)[:-2]) for x in (query, key, value))
        mask_of = self._of(tf.shape(mask)[:-2]) if masked else entry
        offset = tf.gather(tf.broadcast_to(query_offset, self.lead[:1]), entry)
        length = tf.gather(valid_lens, entry) if padded and not self.ragged else self.m

        # for every block: its rows, which all see something if there is no mask, and the keys in their reach
        scores, most, most_banded, fewest = sizes
        size = tf.clip_by_value(scores // tf.maximum(self.m, 1), fewest, most_banded if self.banded else most)
        start = tf.range(0, n, size)[None] + tf.zeros_like(entry)
        end = tf.minimum(start + size, n)
        if not self.masked:
            sees = 0 if self.right is None else -self.right - offset
            last = n if self.left is None else length + self.left - offset
            start, end = (tf.minimum(tf.maximum(x, sees), tf.where(length > 0, last, sees)) for x in (start, end))
        first, low, high = start + offset, tf.zeros_like(start), length + tf.zeros_like(start)
        if self.left is not None:
            low = tf.clip_by_value(first - self.left, 0, self.m)
        if self.right is not None:
            high = tf.minimum(end + offset + self.right, high)
        high = tf.where(start < end, tf.maximum(high, low), low)
        # what tf.linalg.band_part keeps above and below the diagonal
        above = 0 if self.right is None else tf.minimum(first + self.right - low, high - low)
        below = 0 if self.left is None else tf.minimum(low - (first - self.left), end - start)
        head = tf.range(tf.shape(entry)[0])[:, None]
        columns = {
            "rows": (head * n + start, head * n + end),
            "query": (query_of * n + start, query_of * n + end),
            "key": (key_of * self.m + low, key_of * self.m + high),
            "value": (value_of * self.m + low, value_of * self.m + high),
            "band": (below, above),
            "positions": (first, first + end - start),
            "keys": (low, high),
            "lens": (entry * n + start, entry * n + end),
            "masked": (start, end),
            "mask": (mask_of, mask_of + 1),
        }
        self.names = list(columns)
        flat = [tf.reshape(x + tf.zeros_like(start), [-1]) for pair in columns.values() for x in pair]
        self.table, self.count = tf.stack(flat, axis=1), tf.size(start)
        self.numbers = tf.range(
            tf.reduce_max([tf.shape(x)[0] for x in (self.query, self.key, self.value)] + [tf.size(head) * n])
        )
        self.n = n

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
        return tf.while_loop(lambda i, *_: i < self.count, step, (0, *arrays), parallel_iterations=AHEAD)[1:]


def _rows(x):
    """(..., n, c) -> (rows, c)."""
    return tf.reshape(x, tf.stack([tf.reduce_prod(tf.shape(x)[:-1]), tf.shape(x)[-1]]))


class Block:
    """Some queries of one head, and the keys and values in their reach."""

    def __init__(self, call, i):
        self.call = call
        ends = tf.split(tf.gather(call.table, i), 2 * len(call.names))
        self.ends = dict(zip(call.names, zip(ends[::2], ends[1::2], strict=True), strict=True))
        self.query, self.key, self.value = (self.take(getattr(call, name), name) for name in ("query", "key", "value"))
        self.sees = None
        if call.masked:
            self.allowed = self._allowed()
            self.sees = tf.reduce_any(self.allowed, axis=1, keepdims=True)
            seen = tf.reduce_any(self.allowed, axis=0)[:, None]  # NaN where nobody looks would leak as 0 * NaN
            self.key, self.value, self.query = self.seen(self.key, seen), self.seen(self.value, seen), self.seen(self.query)

    def take(self, x, name):
        """The block's rows of an array of rows."""
        return tf.cast(_slice(x, *self.ends[name]), self.call.dtype)

    def seen(self, x, where=None, other=0.0):
        """``x``, with another number in rows that see nothing, or that are not seen."""
        where = self.sees if where is None else where
        return x if where is None else tf.where(where, x, tf.constant(other, x.dtype))

    def _allowed(self):
        """Which pairs may attend: (rows, keys)."""
        call, allowed = self.call, []
        keys = tf.range(*(x[0] for x in self.ends["keys"]))
        if call.ragged:
            allowed.append(keys < _slice(call.lens, *self.ends["lens"])[:, None])
        if call.banded:
            ahead = keys - tf.range(*(x[0] for x in self.ends["positions"]))[:, None]
            allowed += [] if call.left is None else [ahead >= -call.left]
            allowed += [] if call.right is None else [ahead <= call.right]
        if call.mask is not None:
            mask = _slice(call.mask, *self.ends["mask"])[0]
            for axis, name in enumerate(("masked", "keys")):
                ends = tf.where(tf.equal(tf.shape(mask)[axis], 1), (0, 1), tf.concat(self.ends[name], 0))
                mask = tf.gather(mask, tf.range(ends[0], ends[1]), axis=axis)
            shape = [end[0] - start[0] for start, end in (self.ends["masked"], self.ends["keys"])]
            allowed.append(tf.broadcast_to(mask, shape))
        return reduce(tf.logical_and, allowed)

    def scores(self):
        """The scores of all pairs, and the slope of softcap."""
        scores = tf.matmul(self.query * tf.constant(self.call.scale, self.call.dtype), self.key, transpose_b=True)
        if self.call.softcap is None:
            return scores, None
        capped = tf.tanh(scores / self.call.softcap)
        return self.call.softcap * capped, 1 - capped * capped

    def weights(self):
        """exp(scores) of the allowed pairs over some number, their row sums, the lse, or None, and the slope of softcap."""
        call = self.call
        scores, slope = self.scores()
        if call.masked or not call.banded:
            weights, lse = self._softmax(scores, self.allowed if call.masked else None)
            return weights, 1, lse, slope

        def again():
            weights, lse = self._softmax(scores, self._allowed())
            return [weights, tf.ones_like(total)] + ([lse] if call.with_lse else [])

        weights, lse = self._softmax(scores)
        below, above = (x[0] for x in self.ends["band"])
        weights = tf.linalg.band_part(weights, -1 if call.left is None else below, -1 if call.right is None else above)
        total = tf.reduce_sum(weights, axis=1, keepdims=True)
        found = [weights, total] + ([lse + tf.math.log(total)] if call.with_lse else [])
        weights, total, *lse = tf.cond(tf.reduce_all(total >= FLOOR), lambda: found, again)
        return weights, total, *(lse or [None]), slope

    def _softmax(self, scores, allowed=None):
        """Weights that sum to 1, and the lse; an empty row has some or other."""
        least = scores.dtype.min
        if allowed is not None:
            scores = tf.where(allowed, scores, least)
        weights = tf.nn.softmax(scores)
        kept = weights if allowed is None else tf.where(allowed, weights, 0)  # beside scores of -inf the others' are not 0
        if not self.call.with_lse:
            return kept, None
        top, largest = (tf.reduce_max(x, axis=1, keepdims=True) for x in (scores, weights))
        top = tf.where(tf.not_equal(top, least), top, -math.inf)
        return kept, top - tf.math.log(largest)  # the largest weight is 1 / sum(exp(scores - top))

    def careful(self):
        """The weights, the lse and the slope where something is not finite, and the pairs that may attend."""
        scores, slope = self.scores()
        allowed = self._allowed() if self.call.masked or self.call.banded else None
        pairs = Pairs(None if allowed is None else lambda: allowed, always=True)
        scores = scores if allowed is None else tf.where(allowed, scores, -math.inf)
        top = tf.reduce_max(scores, axis=1, keepdims=True)
        top = tf.where(tf.equal(top, -math.inf), tf.zeros_like(top), top)
        weights = tf.exp(scores - top)
        total = tf.reduce_sum(weights, axis=1, keepdims=True)
        some = tf.not_equal(total, 0)
        lse = tf.where(some, top + tf.math.log(total), -math.inf)
        return pairs.only(weights / tf.where(some, total, 1)), lse, slope, pairs

    def put(self, into, x):
        """``into``, an array of the output's rows, with x in the block's."""
        return tf.raw_ops.InplaceUpdate(x=into, i=_slice(self.call.numbers, *self.ends["rows"]), v=x)

    def add(self, into, x, name):
        """``into``, an array of the argument's rows, with x added to the block's."""
        return tf.raw_ops.InplaceAdd(x=into, i=_slice(self.call.numbers, *self.ends[name]), v=x)


def _slice(x, start, end):
    """x[start:end], which is no copy: the ends are vectors of one number."""
    return tf.raw_ops.StridedSlice(input=x, begin=start, end=end, strides=[1])


def _product(pairs, x, turned=False):
    return tf.matmul(pairs, x, transpose_a=turned)


def _zeros(call, rows, width):
    return tf.raw_ops.Empty(shape=tf.stack([rows, width]), dtype=call.dtype, init=True)  # no constant: it is written to


def _forward(call):
    """output (..., n, v), and lse (..., n) if it is asked for."""
    rows = tf.reduce_prod(call.lead) * call.n

    def body(block, output, *lses):
        if call.careful:
            weights, lse, _, pairs = block.careful()
            found = pairs.of(weights, block.value)
        else:
            weights, total, lse, _ = block.weights()
            found = tf.matmul(weights, block.value) / total
        output = block.put(output, block.seen(found))
        return output, *(block.put(x, block.seen(lse, other=-math.inf)) for x in lses)

    empty = [_zeros(call, rows, tf.shape(call.value)[1])] + [_zeros(call, rows, 1) - math.inf] * call.with_lse
    output, *lses = call.each(body, *empty)
    lead = tf.concat([call.lead[1:] if call.squeezed else call.lead, [call.n]], 0)
    return tf.reshape(output, tf.concat([lead, tf.shape(output)[1:]], 0)), *(tf.reshape(x, lead) for x in lses)


def _backward(call):
    """The gradients by query, key and value. With P the weights, O the output and G the gradient by it:

    dV = P^T G, dS = P (G V^T - row sums of G O), dQ = scale dS K, dK = scale dS^T Q. The lse's gradient joins the row sums.
    """
    output, grad_output, *grad_lse = call.results

    def body(block, by_query, by_key, by_value):
        grad = block.seen(block.take(grad_output, "rows"))
        delta = tf.reduce_sum(grad * block.take(output, "rows"), axis=1, keepdims=True)
        for x in grad_lse:
            delta -= block.seen(block.take(x, "rows"))
        if call.careful:
            weights, _, slope, pairs = block.careful()
            product = pairs.of
        else:
            weights, total, _, slope = block.weights()
            grad, delta = grad / total, delta / total
            product = _product
        by_scores = weights * (tf.matmul(grad, block.value, transpose_b=True) - delta)
        by_scores = by_scores if slope is None else by_scores * slope
        by_scores = pairs.only(by_scores) if call.careful else by_scores
        scale = tf.constant(call.scale, call.dtype)
        found = [product(by_scores, block.key) * scale, product(by_scores, block.query * scale, turned=True)]
        found.append(product(weights, grad, turned=True))
        into = zip((by_query, by_key, by_value), found, ("query", "key", "value"), strict=True)
        return [block.add(x, y, name) for x, y, name in into]

    grads = call.each(body, *(_zeros(call, *tf.unstack(tf.shape(x))) for x in (call.query, call.key, call.value)))
    return [tf.cast(tf.reshape(x, tf.shape(like)), like.dtype) for x, like in zip(grads, call.given, strict=True)]
