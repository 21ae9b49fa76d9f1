"""A call in parts: blocks of queries, each beside the keys that some of them may attend to, as functions and segments say.

    attention(Q)[i : j] = attention(Q[i : j]) over the keys that one of these queries may attend to

A call with `kvattn.pairs.Pairs` becomes one whose window says the same, or calls of these parts, with the mask and the bias of
their pairs alone. Where values cannot be read, as in a trace, one call has all pairs.

Source: He et al. 2024, "FlexAttention", of masks as functions, and of what is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from kvattn import conversion, pairs, planning
from kvattn.call import Call, Choice
from kvattn.pairs import Pairs, Run, Segments, Shape

BLOCK = 256  # queries that share keys
FEW = 2**16  # pairs: so few that finding which of them may attend costs more than it saves
FLAGS_AT_ONCE = 2**18  # pairs whose flags are evaluated at one time: as many numbers as a CPU's cache holds
WHOLE_MASK = 2**24  # pairs whose mask may be kept in memory where blocks would save little
SAVED = 0.25  # the share of all pairs that is worth blocks, and of a block's keys that is worth picking them
GAP = 128  # keys: what is left out between two runs, to be worth a copy of both
RUNS = 8  # of keys that a block puts side by side
SHORT_SEGMENT = 64  # queries: a segment of fewer is computed together with its neighbour
BIAS = 2**21  # numbers of a bias that exist at one time
TRACED = 16  # blocks of a program that is recorded


class Part(NamedTuple):
    """A block of queries and the runs of keys beside it. ``restricted``: some of these pairs may not attend.

    ``entries``: of which entries of the batch it is, the first and the one after the last; None for all.
    """

    start: int
    end: int
    runs: tuple[Run, ...]
    restricted: bool = True
    entries: Run | None = None


def resolved(query: Any, key: Any, value: Any, call: Call,
             by_distance: Callable[..., Any] | None = None) -> tuple[Call, Sequence[Part]]:  # fmt: skip
    """The call without what its Pairs say, and (); or the call as it is and its parts, for `cut`.

    ``by_distance``: the tab's, (line, query, key, value, call) -> a bias (..., n, m) that is no more than a view of that line,
    (..., n + m - 1), the biases of keys the least ahead first; or None.
    """
    spec: Pairs = call.mask
    plain = call._replace(mask=spec.mask)
    n, m = query.shape[-2], key.shape[-2]
    if not _can_be_cut(query, key, value, call) or (n * m <= FEW and spec.segments is None):
        return spec.whole(query, key, plain), ()
    parts: Sequence[Part] | None = None
    if spec.segments is not None:
        parts = _of_few_shapes(spec.tab, _of_segments(query, key, value, call))
        if parts is None and (compared := _compared(query, key, value, plain, spec)) is not None:
            return compared, ()
    if parts is None and spec.restricts:
        window = pairs.window_of(query, key, call)
        if window is None:
            spec = spec._replace(in_numpy=pairs.same_in_numpy(spec, query, key, call.query_offset))
            call = call._replace(mask=spec)
        left, right, parts = _looked_at(query, key, call, window)
        if parts is None and (left is not None or right is not None):  # it is a window
            plain = in_window(plain, left, right, query, key)
            spec = spec._replace(mask_function=None)
            call = plain._replace(mask=spec)
    parts = _of_few_shapes(spec.tab, parts)
    if spec.bias_function is not None and parts is None and by_distance is not None:
        line = pairs.line_of(query, key, call)
        bias = None if line is None else by_distance(line, query, key, value, plain)
        if bias is not None:
            plain, spec = plain._replace(bias=bias), spec._replace(bias_function=None)
    if spec.bias_function is not None:
        return call, _of_bias(query, key, call, parts)
    if parts is None:
        return (spec.whole(query, key, plain) if spec.restricts else plain), ()
    if len(parts) == 1 and parts[0] == (0, n, ((0, m),), False, None):
        return plain, ()
    return call, parts


def _can_be_cut(query: Any, key: Any, value: Any, call: Call) -> bool:
    """Whether a call may be served in parts: there are pairs, so many as is known, and it asks for nothing of all of them."""
    most_axes = getattr(call.mask.tab, "MOST_AXES", len(query.shape))  # of arrays that can be cut
    known = all(type(size) is int for x in (query, key, value) for size in x.shape)
    if not known or 0 in (*query.shape[:-1], *key.shape[:-1]) or len(query.shape) > most_axes:
        return False
    return call.positions is None and not call.return_weights and call.return_scores is None


def _of_few_shapes(tab: Any, parts: Sequence[Part] | None) -> Sequence[Part] | None:
    """The parts; None where they have more shapes than the tab makes programs for, one for each."""
    shapes = {(x.end - x.start, sum(last - first for first, last in x.runs), x.restricted) for x in parts or ()}
    return parts if len(shapes) <= getattr(tab, "MOST_SHAPES", len(shapes)) else None


def _compared(query: Any, key: Any, value: Any, call: Call, spec: Pairs) -> Call | None:
    """The call with its segments as they are, where the kernel that serves it compares them; else None."""
    grouped = len(query.shape) == 3 and query.shape[0] != key.shape[0]  # heads that share keys, of segments of their own
    if grouped or spec.bias_function is not None or not spec.tab.choose(query, key, value, call).compares_segments:
        return None
    assert spec.segments is not None
    full = (*pairs.leading(query.shape, key.shape), query.shape[-2], key.shape[-2])
    mask, _ = spec._replace(segments=None).arrays(query, key, full, call.query_offset)
    return call._replace(mask=Segments(mask, *spec.segments))


def in_window(call: Call, left: int | None, right: int | None, query: Any, key: Any) -> Call:
    """The call in the narrower of its own window and this one, on each side."""
    left = call.left if left is None else left if call.left is None else min(left, call.left)
    right = call.right if right is None else right if call.right is None else min(right, call.right)
    return call._replace(left=left, right=right)._of_a_block(query, key)


def _keys_in_window(call: Call, start: int, end: int, first: int, last: int) -> Run:
    """The keys from ``first`` to ``last`` that the window of the call leaves to queries of these rows."""
    if type(call.query_offset) is not int:
        return first, last
    if call.left is not None:
        first = min(max(first, call.query_offset + start - call.left), last)
    if call.right is not None:
        last = max(min(last, call.query_offset + end + call.right), first)
    return first, last


# ---- which parts


def _of_bias(query: Any, key: Any, call: Call, parts: Sequence[Part] | None) -> Sequence[Part]:
    """The parts in blocks of queries whose biases are in memory one at a time; of all pairs, where there are no parts."""
    n, m = query.shape[-2], key.shape[-2]
    if parts is None:
        restricted = call.mask.restricts
        parts = [Part(0, n, ((0, m),), restricted)]
    heads = math.prod(planning.lead(query.shape, key.shape))
    found = []
    for part in parts:
        width = sum(last - first for first, last in part.runs)
        size = max(1, BIAS // max(1, width * heads))
        recorded = conversion.peek(call.mask.tab, query) is None
        size = max(size, -(-n // TRACED)) if recorded else size
        alike = len(part.runs) > 1 or (hasattr(call.mask.tab, "MOST_SHAPES") and not recorded)
        for start in range(part.start, part.end, size):
            end = min(start + size, part.end)
            runs = part.runs if alike else (_keys_in_window(call, start, end, *part.runs[0]),)
            found.append(part._replace(start=start, end=end, runs=runs))
    return found


def _of_segments(query: Any, key: Any, value: Any, call: Call) -> list[Part] | None:
    """Parts that hold one segment each, or several short ones; None where they cannot be read, or lie apart."""
    of_queries, of_keys = (conversion.peek(call.mask.tab, x) for x in call.mask.segments)
    if of_queries is None or of_keys is None:
        return None
    count = max(len(of_queries), len(of_keys))
    rows = [(of_queries[i % len(of_queries)], of_keys[i % len(of_keys)]) for i in range(count)]
    groups = [[*same] for _, same in groupby(range(count), lambda i: tuple(x.tobytes() for x in rows[i]))]
    alike = len(query.shape) > 3 or query.shape[0] == key.shape[0] == value.shape[0]
    if len(groups) > 1 and (call.dropout or len(query.shape) < 3 or not alike):
        return None
    parts = []
    for group in groups:
        entries = (group[0], group[-1] + 1) if len(groups) > 1 else None
        found = _runs_of_ids(*rows[group[0]])
        if found is None:
            return None
        restricted = call.mask.mask_function is not None
        parts += [Part(start, end, (run,), several or restricted, entries) for start, end, run, several in found]
    return parts


def _runs_of_ids(queries: Any, keys: Any) -> list[tuple[int, int, Run, bool]] | None:
    """(first query, end, keys, whether several segments), for each segment, or neighbours that are short; None where one lies
    in several places.

    >>> import numpy as np
    >>> _runs_of_ids(np.array([7, 7, 7, 2]), np.array([2, 7, 7]))
    [(0, 4, (0, 3), True)]
    """
    import numpy as np

    def runs(x: Any) -> dict[int, Run] | None:
        ends = [*(np.flatnonzero(np.diff(x)) + 1).tolist(), len(x)]
        starts = [0, *ends[:-1]]
        found = dict(zip(x[starts].tolist(), zip(starts, ends, strict=True), strict=True))
        return found if len(found) == len(ends) else None

    of_queries, of_keys = runs(queries), runs(keys)
    if of_queries is None or of_keys is None:
        return None
    found: list[tuple[int, int, Run, bool]] = []
    for name, (start, end) in of_queries.items():
        first, last = of_keys.get(name, (0, 0))
        if found and found[-1][1] - found[-1][0] < SHORT_SEGMENT and end - start < BLOCK:
            before, _, (low, high), _ = found.pop()
            runs_of_both = [run for run in ((low, high), (first, last)) if run[0] < run[1]] or [(0, 0)]
            range_of_both = min(run[0] for run in runs_of_both), max(run[1] for run in runs_of_both)
            found.append((before, end, range_of_both, True))
        else:
            found.append((start, end, (first, last), False))
    return found


def _looked_at(query: Any, key: Any, call: Call,
               window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None, list[Part] | None]:  # fmt: skip
    """(left, right, None) where the flags are those of a window, (None, None, parts), or (None, None, None): of all pairs."""
    import numpy as np

    n, m, offset = query.shape[-2], key.shape[-2], call.query_offset
    if window is not None:
        return (*window, None) if window != (None, None) else (None, None, [Part(0, n, ((0, m),), False)])

    def look(start: int, count: int) -> Any:
        rows = start, min(count, n - start)
        full = (*pairs.leading(query.shape, key.shape), rows[1], m)
        flags = call.mask.numpy_flags(key, full, offset, rows, [(0, m)]) if call.mask.segments is None else None
        if flags is None:
            flags = conversion.peek(call.mask.tab, call.mask.flags(query, key, full, offset, rows, [(0, m)]))
        return None if flags is None else np.broadcast_to(flags, (*flags.shape[:-2], rows[1], m))

    size = max(1, FLAGS_AT_ONCE // m)
    flags = look(0, size)
    if flags is None:
        return None, None, None
    if type(offset) is int and call.mask.segments is None:
        windows: list[tuple[int, int, int | None, int | None]] = []
        for start in range(0, n, size):
            flags = look(start, size) if start else flags
            rows = flags.shape[-2]
            found_window = pairs.window_of_flags(flags.reshape(rows, m), offset + start) if flags.size == rows * m else None
            if found_window is None:
                break
            windows.append((offset + start, offset + start + rows - 1, *found_window))
        else:
            if (window := pairs.one_window(windows, m)) is not None:
                return (*window, None) if window != (None, None) else (None, None, [Part(0, n, ((0, m),), False)])
    parts = [_narrowed(look(start, BLOCK), start, call) for start in range(0, n, BLOCK)]
    count = sum((part.end - part.start) * sum(last - first for first, last in part.runs) for part in parts)
    if count > (1 - SAVED) * n * m and n * m <= WHOLE_MASK and call.mask.bias_function is None:
        return None, None, None
    return None, None, parts


def _narrowed(flags: Any, start: int, call: Call) -> Part:
    """The part of these queries, from ``start`` on, beside the keys that some of them may attend to."""
    import numpy as np

    n, m = flags.shape[-2:]
    first, last = _keys_in_window(call, start, start + n, 0, m)
    some = np.zeros(m + 2, bool)
    some[1 + first : 1 + last] = flags[..., first:last].any(axis=tuple(range(flags.ndim - 1)))
    changes = np.flatnonzero(some[1:] != some[:-1]).tolist()
    runs = [*zip(changes[::2], changes[1::2], strict=True)] or [(first, first)]
    merged = [runs[0]]
    for low, high in runs[1:]:
        if low - merged[-1][1] < GAP:
            merged[-1] = merged[-1][0], high
        else:
            merged.append((low, high))
    width = merged[-1][1] - merged[0][0]
    if len(merged) > RUNS or call.dropout or sum(high - low for low, high in merged) > (1 - SAVED) * width:
        merged = [(merged[0][0], merged[-1][1])]
    restricted = not all(flags[..., low:high].all() for low, high in merged)
    return Part(start, start + n, tuple(merged), restricted)


# ---- each part of a call, and the results of all


def cut(parts: Sequence[Part], query: Any, key: Any, value: Any, call: Call,
        concatenate: Callable[[Any, int], Any]) -> Iterator[tuple[Any, Any, Any, Call]]:  # fmt: skip
    """Each part's own query, key, value and call, as `Call.cut`; ``concatenate``: the framework's, (arrays, axis) -> array."""
    spec: Pairs = call.mask
    for of_these in _by_entries(parts):
        entries = of_these[0].entries
        arrays = query, key, value, call._replace(mask=spec.mask)
        if entries is not None:
            arrays = _of_entries(entries, *arrays)
        lead, m = pairs.leading(query.shape, key.shape), key.shape[-2]
        blocks = [(part.start, part.end, *(part.runs[0] if len(part.runs) == 1 else (0, m))) for part in of_these]
        for part, (q, k, v, part_call) in zip(of_these, arrays[3].cut(blocks, *arrays[:3]), strict=True):
            yield _with_flags(part, spec, q, k, v, part_call, call.query_offset, lead, concatenate)


def _by_entries(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts of the same entries of the batch, which are neighbours; torch.compile knows no groupby by a function."""
    found: list[list[Part]] = []
    for part in parts:
        if found and found[-1][-1].entries == part.entries:
            found[-1].append(part)
        else:
            found.append([part])
    return found


def _with_flags(part: Part, spec: Pairs, query: Any, key: Any, value: Any, call: Call, offset: Any, lead: Shape,
                concatenate: Callable[[Any, int], Any]) -> tuple[Any, Any, Any, Call]:  # fmt: skip
    """The part with the mask and the bias of its pairs; and where it has several runs of keys, these alone, side by side.

    ``offset`` and ``lead``, the leading axes of the scores, are those of all entries of the batch.
    """
    tab, several = spec.tab, len(part.runs) > 1
    rows = part.start, part.end - part.start
    mask, bias, m = call.mask, call.bias, key.shape[-2]
    if several:

        def picked(x: Any, axis: int) -> Any:
            rest = [slice(None)] * (-1 - axis)
            return concatenate([x[(..., slice(*run), *rest)] for run in part.runs], axis)

        key, value = picked(key, -2), picked(value, -2)
        mask, bias = (x if x is None or tuple(x.shape[-1:]) != (m,) else picked(x, -1) for x in (mask, bias))
    full = (*lead, query.shape[-2], key.shape[-2])
    if part.restricted:
        mask = pairs.both(spec.tab, mask, spec.flags(query, key, full, offset, rows, part.runs, part.entries))
    if spec.bias_function is not None:
        bias = spec.bias(query, key, full, offset, rows, part.runs, part.entries)
    if several:  # which no window and no length can express
        if call.windowed or call.valid_lens is not None:
            places = tab.asarray(
                pairs.positions_of_runs(part.runs), dtype=conversion.dtype_name(tab.places(key, 0, 1)), like=key
            )
            mask = tab._allowed(rows[1], places, len(query.shape), call._replace(mask=mask, bias=None))
        call = call._replace(valid_lens=None, left=None, right=None, query_offset=0)
    return query, key, value, call._replace(mask=mask, bias=bias)


def _of_entries(which: Run, query: Any, key: Any, value: Any, call: Call) -> tuple[Any, Any, Any, Call]:
    """What some entries of the batch have of a call."""
    axes, (first, last) = len(query.shape), which

    def entries(x: Any, full: int) -> Any:
        return pairs.of_entries(x, which, full)

    offset, sink = call.query_offset, call.sink
    call = call._replace(
        mask=entries(call.mask, axes),
        bias=entries(call.bias, axes),
        valid_lens=None if call.valid_lens is None else call.valid_lens[first:last],
        query_offset=offset[first:last] if len(getattr(offset, "shape", ())) else offset,
        sink=sink if sink is None else entries(sink, axes if len(sink.shape) == axes else axes - 2),
    )
    return entries(query, axes), entries(key, axes), entries(value, axes), call


def joined(call: Call, parts: Sequence[Part], results: Sequence[Any], concatenate: Callable[[Any, int], Any]) -> Any:
    """The results of all queries, of those of each part."""
    found, at = [], 0
    for of_these in _by_entries(parts):
        found.append(call.joined(results[at : at + len(of_these)], concatenate))
        at += len(of_these)
    if len(found) == 1:
        return found[0]
    if not isinstance(found[0], tuple):
        return concatenate(found, 0)
    return tuple(concatenate(x, 0) for x in zip(*found, strict=True))


# ---- what serves a call, and its gradients


def choice(query: Any, key: Any, value: Any, call: Call, in_parts: Callable[..., Any],
           by_distance: Callable[..., Any] | None = None) -> Choice:  # fmt: skip
    """The kernel that serves a call with Pairs. ``in_parts``: the tab's, (query, key, value, call, parts) -> results;
    ``by_distance``: as in `resolved`."""
    plain, parts = resolved(query, key, value, call, by_distance)
    found: Choice = call.mask.tab.choose(*(_like(query, key, value, plain, parts) if parts else (query, key, value, plain)))
    run, run_grad = in_parts if parts else found.run, found.run_grad

    def serve(query: Any, key: Any, value: Any, _: Call, blocks: Sequence[Any]) -> Any:
        assert run is not None
        return run(query, key, value, plain, blocks)

    def derive(query: Any, key: Any, value: Any, grad_output: Any, wrt: Sequence[str], _: Call) -> Any:
        assert run_grad is not None
        return run_grad(query, key, value, grad_output, wrt, plain)

    if parts:
        why = f"{found.why}; {len(parts)} blocks of queries, each beside the keys that it may attend to"
        return Choice(f"{found.kernel}, in blocks of pairs", why, parts, serve)
    served_as = "a window" if plain.windowed and not plain.masked else "arrays"
    why = f"{found.why}; functions of positions are {served_as} here"
    if type(plain.mask) is Segments:
        why = f"{found.why}; segments are compared in its blocks, and blocks that share none left out"
    return found._replace(why=why, run=serve, run_grad=None if run_grad is None else derive)


def _like(query: Any, key: Any, value: Any, call: Call, parts: Sequence[Part]) -> tuple[Any, Any, Any, Call]:
    """A call like that of the largest part, for which no function is run: a kernel is chosen by shapes."""
    import numpy as np

    spec: Pairs = call.mask
    if spec.mask_function is not None:
        spec = spec._replace(mask_function=lambda q, k: k == k)
    if spec.bias_function is not None:
        spec = spec._replace(bias_function=lambda q, k: spec.tab.asarray(np.zeros((1, 1), np.float32), like=query))
    part = max(parts, key=lambda part: (part.end - part.start) * (part.runs[-1][1] - part.runs[0][0]))
    part = part._replace(runs=((part.runs[0][0], part.runs[-1][1]),))
    return next(cut([part], query, key, value, call._replace(mask=spec), lambda arrays, axis: arrays[0]))


def of_blocks(tab: Any, blocks: Sequence[planning.Block], call: Call) -> tuple[Call, list[Part]]:
    """A call in blocks of queries as one in parts, for `gradients`."""
    parts = [Part(start, end, ((first, last),), restricted=False) for start, end, first, last in blocks]
    return call._replace(mask=Pairs(tab, call.mask)), parts


def gradients(parts: Sequence[Part], sources: dict[str, Any], grad_output: Any, wrt: Sequence[str], call: Call, zeros: Any,
              concatenate: Any, of_part: Callable[..., Any], grad_lse: Any = None) -> dict[str, Any]:  # fmt: skip
    """The gradients by what ``wrt`` names, summed over the parts. ``of_part``: (query, key, value, grad_output, wrt, call) ->
    those of one part, given ``grad_lse`` too, if there is one; ``zeros``: an array -> zeros of its shape, in which they are
    summed."""
    query, key, value = (sources[name] for name in ("query", "key", "value"))
    found = {name: zeros(sources[name]) for name in wrt}
    axes, n, m = len(query.shape), query.shape[-2], key.shape[-2]

    def where(name: str, x: Any, part: Part, run: Run | None) -> tuple[slice, ...]:
        """The place of a part's gradient in the whole one."""
        shape, at = tuple(x.shape), [slice(None)] * len(x.shape)
        cut_by_rows = name == "query" or (name in ("bias", "sink") and shape[-2:-1] == (n,))
        if name == "sink" and len(shape) != axes:
            cut_by_rows, of_entries = False, len(shape) == axes - 2
        else:
            of_entries = name in ("query", "key", "value", "bias", "sink") and len(shape) == axes
        if part.entries is not None and of_entries and shape[0] != 1:
            at[0] = slice(*part.entries)
        if cut_by_rows:
            at[-2] = slice(part.start, part.end)
        if run is not None:
            at[-1 if name == "bias" else -2] = slice(*run)
        return tuple(at)

    for part, (*arrays, part_call) in zip(parts, cut(parts, query, key, value, call, concatenate), strict=True):
        given = (grad_output,) if grad_lse is None else (grad_output, grad_lse)
        grad, *more = given if part.entries is None else (x[slice(*part.entries)] for x in given)
        more = [x[..., part.start : part.end] for x in more]
        grads = of_part(*arrays, grad[..., part.start : part.end, :], wrt, part_call, *more)
        for name, grad in zip(wrt, grads, strict=True):
            total, begin = found[name], 0
            if name in ("key", "value") or (name == "bias" and tuple(total.shape[-1:]) == (m,)):
                for run in part.runs:
                    end = begin + run[1] - run[0]
                    piece = grad[..., begin:end] if name == "bias" else grad[..., begin:end, :]
                    at, begin = where(name, total, part, run), end
                    total[at] = total[at] + piece
            else:
                at = where(name, total, part, None)
                total[at] = total[at] + grad
    return found
