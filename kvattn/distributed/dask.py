"""Attention over keys that do not fit in memory, on Dask: NumPy's over each chunk of the keys, merged in a tree.

>>> import dask.array as da
>>> key = da.random.default_rng(0).normal(size=(1000, 8), chunks=(300, -1))  # of files: dask.array.from_npy_stack, from_zarr
>>> output, lse = attention([[1.0] * 8], key, key, return_lse=True)  # nothing is computed yet
>>> output.compute().shape
(1, 8)

With O_p, l_p the output and the log-sum-exp over chunk p: l = log sum_p exp(l_p), O = sum_p exp(l_p - l) O_p. With G the
gradient of a loss by O, that by O_p is exp(l_p - l) G and that by l_p is exp(l_p - l) (G O_p - G O): each chunk has its own.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Rabe and Staats 2021, "Self-attention does
not need O(n^2) memory".
"""

from __future__ import annotations

import math
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import dask
import dask.array as da
import numpy as np
from dask import delayed
from dask.core import flatten
from dask.graph_manipulation import bind

import kvattn
from kvattn import checks, conversion, dispatch, planning, prepare
from kvattn.backends import numpy
from kvattn.call import Call
from kvattn.kernels.numpy import gradients, memory, tiled_grad
from kvattn.pairs import Pairs

__all__ = ["attention", "attention_grad", "topk"]

Array = Any  # a dask array, a NumPy array or a list
Range = tuple[int, int]  # start, end
At = tuple[int, int]  # which part of the first axis, and which of the queries or of the keys
tab: Any = numpy
by_hand: Any = gradients
by_blocks: Any = memory

CHILDREN = 8  # results that one task of a tree takes
INLINE = 2**23  # bytes of an array in all tasks that take it
OPTIONS = ("score", "mask", "bias", "valid_lens", "causal", "query_offset", "window", "segments", "scale", "softcap", "sink")
REFUSED = {
    "normalize": "only softmax can be merged from chunks; the key that hardmax looks up is topk's, with k = 1",
    "positions": "select the keys and values instead: key[positions]",
    "dropout": "what is dropped of a batch in chunks would not be what is dropped of the whole",
    "rng": "there is no dropout",
    "return_weights": "they are as many as the keys; topk gives the largest scores, return_lse what they are divided by",
    "return_scores": "they are as many as the keys; topk gives the largest",
}

# what kvattn's checks ask of a backend, where an array may also be one of Dask, whose values are not computed yet
_lazy = types.SimpleNamespace(**vars(numpy))
_lazy.is_array = lambda x: isinstance(x, da.Array) or tab.is_array(x)
_lazy.peek = lambda x: None if isinstance(x, da.Array) else tab.peek(x)


def attention(query: Array, key: da.Array, value: da.Array, *, return_lse: bool = False, **options: Any) -> Any:
    """`kvattn.attention` of dask arrays of keys and values, lazily: nothing is computed before ``.compute()``.

    Args:
        query: (..., n, d), an array or a dask array, of which each chunk of rows is served by itself.
        key, value: (..., m, d) and (..., m, v), dask arrays in the same chunks, of axis -2 and of the first leading axis.
        return_lse: also return the lse, (..., n).
        options: `kvattn.attention`'s score, mask, bias, valid_lens, causal, query_offset, window, segments, scale, softcap and
            sink. Arrays among them may be dask arrays, as a mask of millions of keys should be. Positions count from the
            first of all keys.

    Returns:
        The output (..., n, v) in the query's dtype, or (output, lse): dask arrays, in chunks of the query's rows. The graph
        has a task for each chunk of keys, which reads it too, a merge for every seven of them, and at most ten more for each
        chunk of the output. Where the queries are in chunks, or chunks of keys are made of something that they share, what
        reads them is beside these. A chunk of keys is neither read nor computed where lengths and window together, or a mask, a
        bias or segments, leave no query a key in it; what dask arrays and functions say is not known in time.

    Half precision is float32 until all is merged.

    Raises:
        ValueError, TypeError: as `kvattn.attention`, and for chunks that do not fit each other.
        NotImplementedError: an option that attention over chunks has not, saying why.
    """
    call, cut, query, key, value = _checked(query, key, value, return_lse, options)
    shape, narrow = cut.shape(value.shape[-1]), delayed(_cast)
    complete = _merged(call, cut, query, _pairs(key, value), value.shape[-1])
    output = {at: narrow(x[0], query.dtype) for at, x in complete.items()}
    output = _assembled(output, shape, query.dtype, cut.batches, cut.rows, -2)
    if not call.return_lse:
        return output
    lse = {at: x[1] for at, x in complete.items()}
    return output, _assembled(lse, shape[:-1], _wide(query.dtype), cut.batches, cut.rows, -1)


def attention_grad(query: Array, key: da.Array, value: da.Array, grad_output: Array, *,
                   wrt: Sequence[str] = ("query", "key", "value"), output: Array | None = None, lse: Array | None = None,
                   **options: Any) -> tuple[da.Array, ...]:  # fmt: skip
    """`kvattn.attention_grad` of dask arrays of keys and values, lazily; its gradients are dask arrays, in the same chunks.

    Args:
        grad_output: (..., n, v), an array or a dask array.
        wrt: what to differentiate by, any of "query", "key" and "value".
        output, lse: what `attention` gave with ``return_lse=True``, computed or not. Without them keys and values are read
            twice, the first time for these. Leave them out in half precision, to which the output has been rounded.

    The other arguments, and what is raised, are `attention`'s.
    """
    call, cut, query, key, value = _checked(query, key, value, False, options)
    wrt, shape = prepare.differentiable(wrt, {"query", "key", "value"}), cut.shape(value.shape[-1])
    loss = cut.in_rows(_fitting("grad_output", grad_output, query.dtype, shape), -2)
    if (output is None) != (lse is None):
        raise ValueError("output and lse go together: give both or none")
    pairs = _pairs(key, value)
    if output is None:
        complete = _merged(call, cut, query, pairs, shape[-1])
        pairs = bind(pairs, [*complete.values()])  # read anew once these are there, not kept in memory until then
    else:
        outputs = cut.in_rows(_fitting("output", output, query.dtype, shape), -2)
        lses = cut.in_rows(_fitting("lse", lse, _wide(query.dtype), shape[:-1]), -1)
        complete = {at: [outputs[at], lses[at]] for at in outputs}

    of = {"query": query, "key": key, "value": value}
    grads: dict[str, dict[At, list[Any]]] = {name: defaultdict(list) for name in wrt}
    part_grad, total, narrow = delayed(_part_grad, nout=len(wrt)), delayed(_total), delayed(_cast)
    for (batch, row), _, blocks in _blocks(call, cut, query, pairs):
        for column, arrays, block in blocks:
            made = part_grad(*arrays, loss[batch, row], complete[batch, row], block, wrt)
            for name, grad in zip(wrt, made, strict=True):
                at = 0 if of[name].shape[0] == 1 else batch, row if name == "query" else column
                grads[name][at].append(grad)
    found = []
    for name in wrt:
        x, second = of[name], cut.rows if name == "query" else cut.columns
        summed = {at: narrow(_tree(total, parts), x.dtype) for at, parts in grads[name].items()}
        found.append(_assembled(summed, x.shape, x.dtype, cut.batches_of(x), second, -2))
    return tuple(found)


def topk(query: Array, key: da.Array, k: int, **options: Any) -> tuple[da.Array, da.Array]:
    """The k best keys of each query, exactly and lazily: (positions, scores), each (..., n, k), the best first.

    Args:
        k: how many; 1 finds the key that hardmax looks up.
        options: `attention`'s, without the sink.

    Returns:
        Positions, int64, which `kvattn.attention` takes as ``positions``, and scores, with the bias, float32 for half
        precision: dask arrays. Of equal scores the first is the better, and NaN counts as inf. Where a query may attend to
        fewer than k keys the rest is -1 and -inf.

    Raises what `attention` raises, and TypeError or ValueError unless k is an int above 0.
    """
    k = checks.count("k", k)
    if options.get("sink") is not None:
        raise NotImplementedError("sink: it is no key, so it is never among the best")
    call, cut, query, key, _ = _checked(query, key, key, False, options)
    shape, dtype, best, best_of, none = cut.shape(k), _wide(query.dtype), delayed(_best), delayed(_best_of), delayed(_no_best)
    positions, scores = {}, {}
    for at, _, blocks in _blocks(call, cut, query, _pairs(key, key)):
        parts = [best(*arrays, block, k) for _, arrays, block in blocks]
        complete = _tree(partial(best_of, k=k), [none(cut.shape(k, at), dtype), *parts])
        positions[at], scores[at] = complete[0], complete[1]
    return (
        _assembled(positions, shape, np.dtype(np.int64), cut.batches, cut.rows, -2),
        _assembled(scores, shape, dtype, cut.batches, cut.rows, -2),
    )


# ---- arguments


def _checked(query: Array, key: Array, value: Array, return_lse: bool, options: dict[str, Any]) -> tuple[Any, ...]:
    """The call, how it is cut, query, key and value. Raises for what does not fit, before anything is computed."""
    for name in [name for name in REFUSED if name in options]:
        given = options.pop(name)
        nothing = isinstance(given, (int, float)) and not given
        if not (nothing or any(given is x for x in (None, kvattn.softmax, tab.softmax))):
            raise NotImplementedError(f"{name} is not to be had of keys in chunks: {REFUSED[name]}")
    if unknown := [name for name in options if name not in OPTIONS]:
        raise checks.unknown(unknown, OPTIONS)
    dispatch.choose("numpy", query=query, key=key, value=value, **{name: options.get(name) for name in prepare.ARRAYS})
    for name, x in (("key", key), ("value", value)):
        if not isinstance(x, da.Array):
            raise TypeError(f"{name} must be a dask array, not {type(x).__name__}: dask.array.from_array({name}, chunks=...)")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if isinstance(x, da.Array) and any(math.isnan(size) for size in x.shape):
            raise ValueError(f"{name} has chunks of unknown sizes; find them first: {name}.compute_chunk_sizes()")
    query, key, value, scores = prepare.inputs(_lazy, query, key, value, options.get("score"))
    if 0 in key.shape[:-1]:  # Dask joins chunks of no keys where there are no others
        key, value = (da.zeros(x.shape, dtype=x.dtype, chunks=-1) for x in (key, value))
    cut = _Cut.of(query, key, value)
    for name, x in getattr(options.get("score"), "keywords", {}).items():
        if isinstance(x, da.Array):
            raise TypeError(f"score binds {name} to a dask array; expected one that is computed: {name}.compute()")
    features = (query.shape[-1], key.shape[-1])
    options = prepare.options(_lazy, query, scores, features, return_lse=return_lse, **options)
    return Call.of(query, key, **options, return_lse=checks.flag("return_lse", return_lse)), cut, query, key, value


def _fitting(name: str, x: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    x = conversion.floating(name, conversion.array(_lazy, name, x), ("what it belongs to", np.empty(0, dtype)))
    checks.same_shape(name, x, shape, "of these arguments")
    return x


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.promote_types(dtype, np.float32)


# ---- how the scores are cut


class _Cut(NamedTuple):
    """Where the scores (..., n, m) are cut, along the first leading axis, the queries and the keys."""

    lead: tuple[int, ...]
    batches: Sequence[Range]  # of the first leading axis, where it is cut
    rows: Sequence[Range]
    columns: Sequence[Range]

    @classmethod
    def of(cls, query: Array, key: da.Array, value: da.Array) -> _Cut:
        """By the chunks of these; ValueError for chunks of other axes, and for those that differ between key and value."""
        lead, first = planning.lead(query.shape, key.shape), {}
        for name, x in (("key", key), ("value", value)):
            for axis in range(-x.ndim, 0):
                if x.numblocks[axis] > 1 and axis != -2 and (axis != -x.ndim or x.ndim == 2):
                    raise ValueError(
                        f"{name} has chunks {x.chunks[axis]} along axis {axis}; expected one: only axis -2, the keys, and the "
                        f"first leading axis may be in chunks: {name}.rechunk({{{axis + x.ndim}: -1}})"
                    )
            if x.ndim > 2 and x.shape[0] > 1:
                first[name] = x.chunks[0]
        for axis, (a, b) in {-2: (key.chunks[-2], value.chunks[-2]), -key.ndim: [*first.values(), (), ()][:2]}.items():
            if b and a != b:
                raise ValueError(
                    f"value has chunks {b} along axis {axis} but key has {a}; expected the same: "
                    f"value.rechunk({{{axis + key.ndim}: key.chunks[{axis}]}})"
                )
        sizes = next(iter(first.values()), (1,))
        group = lead[0] // sum(sizes) if lead and len(sizes) > 1 else 1  # heads of the query that share one of the key
        rows = query.chunks[-2] if isinstance(query, da.Array) else query.shape[-2:-1]
        batches = [(i * group, j * group) for i, j in _ranges(sizes)]
        return cls(lead, batches, _ranges(rows), _ranges(key.chunks[-2]))

    def first(self, x: Any, batch: int) -> Any:
        """The part of an array whose first axis is that of the scores, or 1."""
        return x[slice(*self.batches[batch])] if len(self.batches) > 1 and x.shape[0] > 1 else x

    def batches_of(self, x: Array) -> Sequence[Range]:
        """The parts of the first axis of query, key or value, of which several query heads may share one."""
        if len(self.batches) == 1 or x.shape[0] == 1:
            return [(0, 1)]
        group = self.lead[0] // x.shape[0]
        return [(i // group, j // group) for i, j in self.batches]

    def in_rows(self, x: Array, axis: int) -> dict[At, Any]:
        """An array (..., n, c), or (..., n) of axis -1, in the parts of the queries.

        A small one is a part of the tasks that take it, and no task itself, which workers would send each other: so reading a
        chunk of keys and computing with it is one task, where no other needs the chunk.
        """
        rest = (slice(None),) * (-1 - axis)
        small = isinstance(x, np.ndarray) and x.nbytes * len(self.columns) <= INLINE
        return {
            (batch, row): (np.array if small else delayed)(self.first(x, batch)[(..., slice(i, j), *rest)])
            for batch in range(len(self.batches))
            for row, (i, j) in enumerate(self.rows)
        }

    def shape(self, width: int, at: At | None = None) -> tuple[int, ...]:
        """(..., n, width), of all or of one part of the queries."""
        if at is None:
            return (*self.lead, self.rows[-1][1], width)
        (start, end), (i, j) = self.batches[at[0]], self.rows[at[1]]
        lead = (end - start, *self.lead[1:]) if len(self.batches) > 1 else self.lead
        return (*lead, j - i, width)

    def calls(self, call: Call, ndim: int) -> Iterator[tuple[At, list[Call]]]:
        """For each part of the queries the calls of its blocks, which know lengths, offset, mask, ... of their own."""
        axes = {"mask": (ndim,), "bias": (ndim,), "valid_lens": (1, 2), "query_offset": (1,), "sink": (ndim, ndim - 2)}
        spec = call.mask if type(call.mask) is Pairs else None
        call = call if spec is None else call._replace(mask=spec.mask)
        query, key = (np.broadcast_to(np.float32(0), (*[1] * (ndim - 2), x[-1][1], 1)) for x in (self.rows, self.columns))
        for batch in range(len(self.batches)):
            given = {name: getattr(call, name) for name in axes}
            given = {name: x for name, x in given.items() if getattr(x, "ndim", 0) and x.ndim in axes[name]}
            part = call._replace(**{name: self.first(x, batch) for name, x in given.items()})
            for row, (i, j) in enumerate(self.rows):
                blocks = [(i, j, k, l) for k, l in self.columns]
                found = [block for *_, block in part.cut(blocks, query, key, key)]
                if spec is not None:
                    masks = [self.spec_of(spec, batch, at, x.mask, call) for at, x in zip(blocks, found, strict=True)]
                    found = [x._replace(mask=mask) for x, mask in zip(found, masks, strict=True)]
                yield (batch, row), found

    def spec_of(self, spec: Pairs, batch: int, at: tuple[int, ...], mask: Any, call: Call) -> Pairs:
        """What is said of the pairs of a block, whose positions are counted from its first key."""
        start, end, first, last = at
        entries = self.batches[batch] if len(self.batches) > 1 else None
        of_chunk = partial(_Function, first=first, entries=entries, offset=call.query_offset, axes=len(self.lead) + 2)
        functions: list[Any] = [None if x is None else of_chunk(x) for x in (spec.mask_function, spec.bias_function)]
        segments = spec.segments
        if segments is not None:
            segments = self.first(segments[0], batch)[:, start:end], self.first(segments[1], batch)[:, first:last]
        return Pairs(tab, mask, functions[0], functions[1], segments)


def _ranges(sizes: Sequence[int]) -> list[Range]:
    return [*pairwise(accumulate(sizes, initial=0))]


def _pairs(key: da.Array, value: da.Array) -> da.Array:
    """The chunks of keys, each with its values, a pair in the place of each block of the array.

    One task reads both, or of two workers each would read one and send it to the other. Dask's own optimization is to see to
    that (`dask.blockwise.fuse_roots`), but in Dask 2026.8 it does nothing to tasks of the class Task, which all are now.
    """
    *axes, d, v = range(key.ndim + 1)
    meta = np.empty((0,) * len(axes), object)
    (pairs,) = dask.optimize(da.blockwise(_pair, axes, key, (*axes, d), value, (*axes, v), dtype=object, meta=meta))
    graph = dict(pairs.dask)
    users = Counter(name for task in graph.values() for name in task.dependencies)
    for at in flatten(pairs.__dask_keys__()):
        unshared = [name for name in graph[at].dependencies if users[name] == 1 and name in graph]
        graph[at] = graph[at].fuse(graph[at], *map(graph.pop, unshared))
    return da.Array(graph, pairs.name, pairs.chunks, dtype=object)


def _blocks(call: Call, cut: _Cut, query: Array, pairs: da.Array) -> Iterator[tuple[Any, ...]]:
    """For each part of the queries: which it is, its sink, and (column, (query, pair), call) where any may attend."""
    chunks, rows = pairs.to_delayed(optimize_graph=False).reshape(-1, len(cut.columns)), cut.in_rows(query, -2)
    if len(cut.rows) == 1:  # a chunk is read by the one task that needs it
        for at, chunk in np.ndenumerate(chunks):
            reading = pairs.dask[chunk.key]
            chunks[at] = chunk if getattr(reading, "dependencies", True) else reading
    for (batch, row), calls in cut.calls(call, query.ndim):
        (i, j), blocks = cut.rows[row], []
        for column, ((k, l), block) in enumerate(zip(cut.columns, calls, strict=True)):
            if _attends(j - i, l - k, query.ndim, block):
                blocks.append((column, (rows[batch, row], chunks[batch, column]), block._replace(sink=None)))
        yield (batch, row), calls[0].sink, blocks


def _attends(n: int, m: int, ndim: int, call: Call) -> bool:
    """Whether some query may attend to some key, as far as is known before anything is computed."""
    if not (n and m):
        return False
    spec = call.mask if type(call.mask) is Pairs else Pairs(tab, call.mask)
    for x, none in ((spec.mask, False), (call.bias, -math.inf)):
        if isinstance(x, (np.ndarray, np.generic)) and not (x != none).any():
            return False
    if spec.segments is not None and all(map(tab.is_array, spec.segments)):
        count = max(map(len, spec.segments))
        both = zip(*(np.broadcast_to(x, (count, x.shape[-1])) for x in spec.segments), strict=True)
        if not any(np.isin(*ids).any() for ids in both):
            return False
    first, end = 0, m  # of each query's keys
    if tab.is_array(call.valid_lens):
        end = np.minimum(end, tab._lengths(call.valid_lens, ndim))
    if call.windowed and not isinstance(call.query_offset, da.Array):
        at = tab._positions(call.query_offset, n, ndim)
        first = first if call.left is None else np.maximum(first, at - call.left)
        end = end if call.right is None else np.minimum(end, at + call.right + 1)
    return bool(np.any(np.less(first, end)))


# ---- the graph


def _merged(call: Call, cut: _Cut, query: Array, pairs: da.Array, width: int) -> dict[At, Any]:
    """The output and the lse of each part of the queries, wide."""
    part, none, merge, with_sink, complete = delayed(_part), delayed(_none), delayed(_merge), delayed(_with_sink), {}
    for at, sink, blocks in _blocks(call, cut, query, pairs):
        parts = [part(*arrays, block) for _, arrays, block in blocks]
        parts = parts or [none(cut.shape(width, at), _wide(query.dtype))]
        complete[at] = _tree(merge, parts) if sink is None else with_sink(_tree(merge, parts), sink)
    return complete


def _tree(function: Callable[..., Any], parts: list[Any]) -> Any:
    """What is left of the parts when function, of some of them, has taken all."""
    while len(parts) > 1:
        parts = [function(*parts[i : i + CHILDREN]) for i in range(0, len(parts), CHILDREN)]
    return parts[0]


def _assembled(parts: dict[At, Any], shape: tuple[int, ...], dtype: Any, first: Sequence[Range], second: Sequence[Range],
               axis: int) -> da.Array:  # fmt: skip
    """The dask array of parts in these ranges of its first axis, where there are several, and of ``axis``; 0 where none is."""
    rows, zeros = [], delayed(np.zeros)
    for i, (start, end) in enumerate(first):
        row = []
        for j, (from_, to) in enumerate(second):
            size = [*shape]
            size[0] = end - start if len(first) > 1 else size[0]
            size[axis] = to - from_
            part = parts[i, j] if (i, j) in parts else zeros(size, dtype)
            row.append(da.from_delayed(part, size, dtype))
        rows.append(da.concatenate(row, axis=axis))
    return rows[0] if len(rows) == 1 else da.concatenate(rows)


# ---- tasks


def _pair(*chunks: Any) -> Any:
    """A chunk of keys and its values, out of the lists in which they come along the one chunk of their features."""
    key, value = (x[0] if isinstance(x, list) else x for x in chunks)
    return key, value


def _part(query: Any, pair: Any, call: Call) -> Any:
    """The output and the lse over one chunk of the keys."""
    return tab._attend(*map(tab._wide, (query, *pair)), call._replace(return_lse=True))


def _none(shape: tuple[int, ...], dtype: Any) -> Any:
    """The output and the lse over no key."""
    return np.zeros(shape, dtype), np.full(shape[:-1], -math.inf, dtype)


class _Function(NamedTuple):
    """A function of positions, asked of those that are counted from the key ``first``.

    Where the batch is cut, it is asked of all entries, since it may know them, and these are cut from what it says.
    """

    function: Any
    first: int
    entries: Range | None
    offset: Any  # of all entries
    axes: int

    def __call__(self, query: Any, key: Any) -> Any:
        if self.entries is not None and query.ndim > 2:  # each entry's queries stand elsewhere
            rows = query[:1] - self.offset[self.entries[0]] if len(query) else np.zeros_like(query, shape=(1, *query.shape[1:]))
            query = rows + self.offset.reshape(-1, *[1] * (query.ndim - 1))
        made = self.function(query + self.first, key + self.first)
        if self.entries is None or getattr(made, "ndim", 0) != self.axes or len(made) == 1:
            return made
        return made[slice(*self.entries)]


def _merge(*parts: Any) -> Any:
    return kvattn.merge_attention(*zip(*parts, strict=True), return_lse=True, backend="numpy")


def _with_sink(complete: Any, sink: Any) -> Any:
    output, lse = complete
    left, lse = tab._left(lse, sink, output.ndim)
    return left * output, lse


def _part_grad(query: Any, pair: Any, grad_output: Any, complete: Any, call: Call, wrt: tuple[str, ...]) -> Any:
    """What one chunk of the keys adds to the gradients; ``complete``: the output and the lse over all keys."""
    query, key, value, grad_output, output, lse = (tab._wide(x) for x in (query, *pair, grad_output, *complete))
    part_output, part_lse = _part(query, (key, value), call)
    share = np.exp(part_lse - np.where(lse == -math.inf, 0, lse))
    by_lse = share * ((grad_output * part_output).sum(axis=-1) - (grad_output * output).sum(axis=-1))
    known = tiled_grad.Known(part_output, part_lse, by_lse)
    return by_hand.attention_grad(tab, query, key, value, share[..., None] * grad_output, wrt, call, known)


def _total(*parts: Any) -> Any:
    return reduce(np.add, parts)


def _cast(x: Any, dtype: Any) -> Any:
    return x.astype(dtype, copy=False)


def _best(query: Any, pair: Any, call: Call, k: int) -> Any:
    """The positions and scores of the k best in one chunk of the keys."""
    query, key = tab._wide(query), tab._wide(pair[0])
    if type(call.mask) is Pairs:  # arrays in place of functions and segments
        call = call.mask.whole(query, key, call._replace(mask=call.mask.mask))
    n, m = query.shape[-2], key.shape[-2]
    found = []
    blocks = by_blocks.query_blocks(call.score, query.shape, key.shape) or [(0, n, 0, m)]
    for *arrays, part in call.cut(blocks, query, key, key):
        allowed = tab._allowed(arrays[0].shape[-2], np.arange(m), query.ndim, part)
        with np.errstate(over="ignore", invalid="ignore"):  # of pairs that may not attend
            scores = tab._scores(*arrays[:2], part)
        scores = scores if allowed is None else np.where(allowed, scores, -math.inf)
        found.append(_largest(np.arange(call.first_key, call.first_key + m), scores, k))
    return [np.concatenate(x, axis=-2) for x in zip(*found, strict=True)]


def _best_of(*parts: Any, k: int) -> Any:
    positions, scores = (np.concatenate(x, axis=-1) for x in zip(*parts, strict=True))
    return _largest(positions, scores, k)


def _no_best(shape: tuple[int, ...], dtype: Any) -> Any:
    return np.full(shape, -1), np.full(shape, -math.inf, dtype)


def _largest(positions: Any, scores: Any, k: int) -> Any:
    """The positions and scores of the k largest in each row, of equal ones the first; -1 where a score is -inf."""
    m = scores.shape[-1]
    k = min(k, m)
    at = np.empty((math.prod(scores.shape[:-1]), k), np.int64)
    for row, into in zip(scores.reshape(len(at), m), at, strict=True):
        row = np.where(np.isnan(row), math.inf, row)
        some = np.flatnonzero(row >= np.partition(row, m - k)[m - k]) if k < m else np.arange(m)
        into[:] = some[np.argsort(-row[some], kind="stable")[:k]]
    at = at.reshape(*scores.shape[:-1], k)
    positions, scores = (np.take_along_axis(np.broadcast_to(x, scores.shape), at, axis=-1) for x in (positions, scores))
    return np.where(scores == -math.inf, -1, positions), scores
