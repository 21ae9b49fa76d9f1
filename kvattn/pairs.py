"""What is said of pairs by where they stand: masks and biases that are functions of positions, and segments.

    attention(Q)[i : j] = attention(Q[i : j]) over the keys that one of these queries may attend to

A call with them becomes one whose window says the same, or calls of blocks of queries, each beside the keys that it needs,
with the mask and the bias of these pairs alone. Where values cannot be read, as in a trace, one call has all pairs.

Source: He et al. 2024, "FlexAttention", of masks as functions, and of what is skipped.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from kvattn import checks, conversion, planning
from kvattn.call import Call, Choice

Run = tuple[int, int]  # keys: the first, and the one after the last
Rows = tuple[int, "int | None"]  # queries: the first, and how many; None for all
Shape = tuple[Any, ...]

BLOCK = 256  # queries that share keys
FEW = 2**16  # pairs: too few for a look at which of them may attend
LOOK = 2**18  # pairs whose flags are looked at together: numbers of theirs that a cache holds
WHOLE = 2**24  # pairs whose mask may be held, where blocks would save little
SAVED = 0.25  # the share of all pairs that is worth blocks, and of a block's keys that is worth picking them
GAP = 128  # keys: what is left out between two runs, to be worth a copy of both
RUNS = 8  # of keys that a block puts side by side
SHORT = 64  # queries: a segment of fewer is served beside its neighbour
BIAS = 2**21  # numbers of a bias that exist at one time
SQUARE = 46341  # the first number whose square int32 does not hold
TRACED = 16  # blocks of a program that is recorded
REMEMBERED = 256  # windows


_windows: dict[Any, tuple[int | None, int | None]] = {}  # what mask functions said, by `_name_for_good`


class Part(NamedTuple):
    """A block of queries and the runs of keys beside it. ``looks``: some of these pairs may not attend, as the functions say.

    ``entries``: of which entries of the batch it is, the first and the one after the last; None for all.
    """

    start: int
    end: int
    runs: tuple[Run, ...]
    looks: bool = True
    entries: Run | None = None


class Segments(NamedTuple):
    """A mask, or None, and the segments of the queries (batch or 1, n) and of the keys (..., m), in the place of a call's mask:
    for kernels that compare them a block at a time, and leave out blocks that share none, where nobody can read them now."""

    mask: Any
    of_queries: Any
    of_keys: Any

    def array(self, axes: int) -> Any:
        """The mask of all pairs, for queries of so many axes."""
        alike = same(self.of_queries, self.of_keys, axes)
        return alike if self.mask is None else self.mask & alike


class Pairs(NamedTuple):
    """What a call says of pairs, in the place of its mask: an array, a function, a function for the bias, segments.

    ``tab``: the backend whose arrays the functions take; ``segments``: of the queries (batch or 1, n), of the keys (..., m).
    ``in_numpy``: the mask function may be asked with NumPy's integers, as far as it is asked in one call.
    """

    tab: Any
    mask: Any = None
    mask_function: Callable[[Any, Any], Any] | None = None
    bias_function: Callable[[Any, Any], Any] | None = None
    segments: tuple[Any, Any] | None = None
    in_numpy: bool = False

    @property
    def restricts(self) -> bool:
        """Whether a function or segments forbid pairs."""
        return self.mask_function is not None or self.segments is not None

    def places(self, query: Any, key: Any, offset: Any, rows: Rows, runs: Sequence[Run] | None) -> tuple[Any, Any]:
        """The positions of the queries of these rows, (n, 1) or (batch, 1, ..., n, 1), and of the keys, (1, m)."""
        tab, (start, count) = self.tab, rows
        if runs is None:
            k = _places(tab, key, 0, None)
        elif len(runs) == 1:
            k = _places(tab, key, runs[0][0], runs[0][1] - runs[0][0])
        else:
            k = tab.asarray(_numbers(runs), dtype=_dtype(tab, key, runs[0][0], runs[-1][1]), like=key)
        if type(offset) is int:
            return _places(tab, query, offset + start, count)[:, None], k[None]
        far = _dtype(tab, query, 0, SQUARE)  # an offset that is an array may be large
        q = tab.asarray(_places(tab, query, start, count), dtype=far)[:, None]
        if len(getattr(offset, "shape", ())) == 0:
            seen = conversion.peek(tab, offset) if tab.is_array(offset) else None
            return q + (offset if seen is None else int(seen)), k[None]
        offset = tab.asarray(offset, dtype=far)
        return q + offset[(slice(None), *[None] * (len(query.shape) - 1))], k[None]

    def flags(self, query: Any, key: Any, full: Shape, offset: Any, rows: Rows, runs: Sequence[Run] | None,
              entries: Run | None = None) -> Any:  # fmt: skip
        """Which of these pairs the function and the segments let attend: bool, broadcastable to ``full``, or None for all.

        ``entries``: those of the batch that are asked for; ``full`` and ``offset`` are of all, since a function may know them.
        """
        found = None
        if self.mask_function is not None:
            if (made := self._numpy_flags(key, full, offset, rows, runs)) is not None:
                made = self.tab.asarray(made, like=query)
            else:
                made = checks.asked("mask", self.mask_function, *self.places(query, key, offset, rows, runs))
            found = _entries(checks.flags(self.tab, made, full), entries, len(full))
        if self.segments is not None:
            found = both(self.tab, found, self._same_segment(query, full, rows, runs, entries))
        return found

    def _numpy_flags(self, key: Any, full: Shape, offset: Any, rows: Rows, runs: Sequence[Run] | None) -> Any:
        """What the mask function says of these pairs, NumPy's bools; None where only arrays of the framework can ask it."""
        if not self.in_numpy:
            return None
        from kvattn import positions  # here, since importing kvattn loads nothing

        keys, start = runs or [(0, full[-1])], offset + rows[0]
        of_queries = _dtype(self.tab, key, start, start + full[-2])
        q = _numbers([(start, start + full[-2])]).astype(of_queries)[:, None]
        of_keys = _dtype(self.tab, key, keys[0][0], keys[-1][1])
        return positions.of_pairs(self.mask_function, q, _numbers(keys).astype(of_keys)[None])

    def _same_segment(self, query: Any, full: Shape, rows: Rows, runs: Sequence[Run] | None, entries: Run | None) -> Any:
        assert self.segments is not None
        seen = conversion.peek(self.tab, self.segments[0]), conversion.peek(self.tab, self.segments[1])
        known = seen[0] is not None and seen[1] is not None  # then NumPy compares: MXNet does not for more than five axes
        of_queries, of_keys = seen if known else self.segments
        of_queries, of_keys = (x if entries is None or x.shape[0] == 1 else x[slice(*entries)] for x in (of_queries, of_keys))
        of_queries = of_queries[:, rows[0] : None if rows[1] is None else rows[0] + rows[1]]
        if runs is not None and len(runs) == 1:
            of_keys = of_keys[:, slice(*runs[0])]
        elif runs is not None:
            of_keys = of_keys[:, _numbers(runs)]
        found = same(of_queries, of_keys, len(full))
        return self.tab.asarray(found, like=query) if known else found

    def bias(self, query: Any, key: Any, full: Shape, offset: Any, rows: Rows, runs: Sequence[Run] | None,
             entries: Run | None = None) -> Any:  # fmt: skip
        """The bias of these pairs, in the query's dtype; ``entries`` as in `flags`."""
        assert self.bias_function is not None
        made = checks.asked("bias", self.bias_function, *self.places(query, key, offset, rows, runs))
        made = _entries(checks.added(self.tab, made, full), entries, len(full))
        return self.tab.asarray(made, dtype=conversion.dtype_name(query))

    def arrays(self, query: Any, key: Any, full: Shape, offset: Any, rows: Rows = (0, None),
               runs: Sequence[Run] | None = None) -> tuple[Any, Any]:  # fmt: skip
        """The mask and the bias of all pairs; no bias, where that is no function."""
        mask = both(self.tab, self.mask, self.flags(query, key, full, offset, rows, runs))
        return mask, None if self.bias_function is None else self.bias(query, key, full, offset, rows, runs)

    def whole(self, query: Any, key: Any, call: Call, heads: bool = True) -> Call:
        """The same call, with arrays of all pairs in place of what this says.

        ``heads``: whether query and key have theirs; else they are (..., 1, n, c), before how many there are is known.
        """
        lead = _lead(query.shape, key.shape)
        full = (*(lead if heads else (*lead[:-1], None)), query.shape[-2], key.shape[-2])
        mask, bias = self.arrays(query, key, full, call.query_offset)
        return call._replace(mask=mask, bias=call.bias if bias is None else bias)


def short(first: Any, end: Any) -> bool:
    """Whether int32 holds the product of any two of these positions: half as many bytes to go through as int64's."""
    return type(first) is type(end) is int and -SQUARE < first <= end < SQUARE


def both(tab: Any, mask: Any, other: Any) -> Any:
    """Where both of two masks, or None, allow."""
    if mask is None or other is None:
        return other if mask is None else mask
    return getattr(tab, "AND", operator.and_)(mask, other)


def same(of_queries: Any, of_keys: Any, axes: int) -> Any:
    """Which pairs are of one segment, (n, m) or (batch or 1, 1, ..., n, m), for queries of so many axes."""
    if axes < 3:
        return of_queries[0][:, None] == of_keys[0][None]
    between = [None] * (axes - 3)
    return of_queries[(slice(None), *between, slice(None), None)] == of_keys[(slice(None), *between, None, slice(None))]


def _numbers(runs: Sequence[Run]) -> Any:
    """The positions of these keys, NumPy's."""
    import numpy as np  # here, since importing kvattn loads nothing

    return np.concatenate([np.arange(*run) for run in runs])


def _places(tab: Any, x: Any, first: Any, count: Any) -> Any:
    """The tab's `places`; of another's backend, which may have none, an array of NumPy's."""
    return tab.places(x, first, count) if hasattr(tab, "places") else tab.asarray(_numbers([(first, first + count)]), like=x)


def _dtype(tab: Any, x: Any, first: int, end: int) -> str:
    """The dtype that `_places` has for positions from ``first`` to ``end``."""
    return conversion.dtype_name(_places(tab, x, 0 if short(first, end) else SQUARE, 1))


def _lead(query: Any, key: Any) -> Shape:
    """The leading axes of the scores, None where they are unknown."""

    def broadcast(a: Any, b: Any) -> Any:
        if a is None or b is None:
            return None
        return 0 if 0 in (a, b) else max(a, b)

    batch = [broadcast(a, b) for a, b in zip(query[:-3], key[:-3], strict=True)]
    return (*batch, *query[:-2][-1:])


# ---- what a call becomes


def resolved(query: Any, key: Any, value: Any, call: Call,
             by_distance: Callable[..., Any] | None = None) -> tuple[Call, Sequence[Part]]:  # fmt: skip
    """The call without what its Pairs say, and (); or the call as it is and its parts, for `cut`.

    ``by_distance``: the tab's, (line, query, key, value, call) -> a bias (..., n, m) that is no more than a view of that line,
    (..., n + m - 1), the biases of keys the least ahead first; or None.
    """
    said: Pairs = call.mask
    plain = call._replace(mask=said.mask)
    n, m = query.shape[-2], key.shape[-2]
    if not _can_be_cut(query, key, value, call) or (n * m <= FEW and said.segments is None):
        return said.whole(query, key, plain), ()
    parts: Sequence[Part] | None = None
    if said.segments is not None:
        parts = _of_few_shapes(said.tab, _of_segments(query, key, value, call))
        if parts is None and (compared := _compared(query, key, value, plain, said)) is not None:
            return compared, ()
    if parts is None and said.restricts:
        window = window_of(query, key, call)
        if window is None:
            said = said._replace(in_numpy=_same_in_numpy(said, query, key, call.query_offset))
            call = call._replace(mask=said)
        left, right, parts = _looked_at(query, key, call, window)
        if parts is None and (left is not None or right is not None):  # it is a window
            plain = in_window(plain, left, right, query, key)
            said = said._replace(mask_function=None)
            call = plain._replace(mask=said)
    parts = _of_few_shapes(said.tab, parts)
    if said.bias_function is not None and parts is None and by_distance is not None:
        line = line_of(query, key, call)
        bias = None if line is None else by_distance(line, query, key, value, plain)
        if bias is not None:
            plain, said = plain._replace(bias=bias), said._replace(bias_function=None)
    if said.bias_function is not None:
        return call, _of_bias(query, key, call, parts)
    if parts is None:
        return (said.whole(query, key, plain) if said.restricts else plain), ()
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
    if parts is None or len({_form(part) for part in parts}) <= getattr(tab, "MOST_SHAPES", len(parts)):
        return parts
    return None


def _compared(query: Any, key: Any, value: Any, call: Call, said: Pairs) -> Call | None:
    """The call with its segments as they are, where the kernel that serves it compares them; else None."""
    kernels = getattr(said.tab, "COMPARES_SEGMENTS", ())
    grouped = len(query.shape) == 3 and query.shape[0] != key.shape[0]  # heads that share keys, of segments of their own
    if not kernels or grouped or said.bias_function is not None:
        return None
    if said.tab.choose(query, key, value, call).kernel not in kernels:
        return None
    assert said.segments is not None
    full = (*_lead(query.shape, key.shape), query.shape[-2], key.shape[-2])
    mask, _ = said._replace(segments=None).arrays(query, key, full, call.query_offset)
    return call._replace(mask=Segments(mask, *said.segments))


def _form(part: Part) -> tuple[Any, ...]:
    """What tells the shapes of a part from another's."""
    return part.end - part.start, sum(last - first for first, last in part.runs), part.looks


def in_window(call: Call, left: int | None, right: int | None, query: Any, key: Any) -> Call:
    """The call in the narrower of its own window and this one, on each side."""
    left = call.left if left is None else left if call.left is None else min(left, call.left)
    right = call.right if right is None else right if call.right is None else min(right, call.right)
    return call._replace(left=left, right=right)._of_a_block(query, key)


def _of_bias(query: Any, key: Any, call: Call, parts: Sequence[Part] | None) -> Sequence[Part]:
    """The parts in blocks of queries whose biases are held one at a time; of all pairs, where there are no parts."""
    n, m = query.shape[-2], key.shape[-2]
    if parts is None:
        looks = call.mask.restricts
        parts = [Part(0, n, ((0, m),), looks)]
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
            runs = part.runs if alike else (_in_reach(call, start, end, *part.runs[0]),)
            found.append(part._replace(start=start, end=end, runs=runs))
    return found


def _in_reach(call: Call, start: int, end: int, first: int, last: int) -> Run:
    """The keys from ``first`` to ``last`` that the window of the call leaves to queries of these rows."""
    if type(call.query_offset) is not int:
        return first, last
    if call.left is not None:
        first = min(max(first, call.query_offset + start - call.left), last)
    if call.right is not None:
        last = max(min(last, call.query_offset + end + call.right), first)
    return first, last


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
        looks = call.mask.mask_function is not None
        parts += [Part(start, end, (run,), several or looks, entries) for start, end, run, several in found]
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
        if found and found[-1][1] - found[-1][0] < SHORT and end - start < BLOCK:
            before, _, (low, high), _ = found.pop()
            runs_of_both = [run for run in ((low, high), (first, last)) if run[0] < run[1]] or [(0, 0)]
            both_ends = min(run[0] for run in runs_of_both), max(run[1] for run in runs_of_both)
            found.append((before, end, both_ends, True))
        else:
            found.append((start, end, (first, last), False))
    return found


# ---- what the functions let attend, as far as it can be read


def _same_in_numpy(said: Pairs, query: Any, key: Any, offset: Any) -> bool:
    """Whether the mask function may be asked with NumPy's integers: of the framework's it makes bools that can be read."""
    if said.mask_function is None or type(offset) is not int:
        return False
    import numpy as np

    q, k = said.places(query, key, offset, (0, 1), None)
    if (seen := conversion.peek(said.tab, q)) is None or seen is q:  # the framework's are NumPy's
        return False
    try:
        made = said.mask_function(q, k)
    except Exception:  # it is asked again, for all pairs, and its error is for the user then
        return False
    if not said.tab.is_array(made) or conversion.dtype_name(made) not in ("bool", "bool_"):
        return False
    found = said._replace(in_numpy=True)._numpy_flags(key, (1, key.shape[-2]), offset, (0, 1), None)
    return found is not None and np.array_equal(found, conversion.peek(said.tab, made))


def _of_distances(function: Any, query: Any, key: Any, call: Call, in_numpy: bool = False) -> Any:
    """What a function gives for each distance, (..., 1, n + m - 1), the least first; None where it asks for more, or nobody can
    tell. The first query and the last, asked with arrays, tell of one that looks at the sizes or the class of these.

    ``in_numpy``: NumPy's integers may be asked; where they tell, the result is NumPy's bools.
    """
    import numpy as np

    from kvattn import positions  # here, as above

    tab, offset, n, m = call.mask.tab, call.query_offset, query.shape[-2], key.shape[-2]
    if type(offset) is not int or (seen := conversion.peek(tab, keys := _places(tab, key, 0, None)[None])) is None:
        return None
    near = short(0, m) and short(offset, offset + n)
    dtype = conversion.dtype_name(keys) if near else _dtype(tab, key, 0, SQUARE)  # the positions' own
    ahead, made = np.arange(1 - offset - n, m - offset).astype(dtype)[None], None
    if in_numpy and seen is not keys:  # else the framework's are NumPy's
        flags = positions.of_distances(function, positions.exact(ahead))
        made = flags.view(np.ndarray) if type(flags) is positions.Exact and flags.dtype.kind == "b" else None
    known = made
    if made is None:
        made = positions.of_distances(function, tab.asarray(ahead, like=key))
        if made is None or not tab.is_array(made):
            return None
        known = conversion.peek(tab, made)
    try:
        found = function(tab.asarray(np.array([[offset], [offset + n - 1]], dtype), like=query), keys)
    except Exception:  # it is asked again, and its error is for the user then
        return None
    if not tab.is_array(found):
        return None
    if known is None or (found := conversion.peek(tab, found)) is None:
        return made
    known = np.concatenate([known[..., n - 1 :], known[..., :m]], axis=-2)  # beside the first query, and the last
    if known.shape != found.shape:
        return None
    if known.dtype.kind != "b":
        known, found = np.asarray(known, np.float64), np.asarray(found, np.float64)
    close = (known == found).all() or np.allclose(known, found, atol=1e-6, equal_nan=True)
    return made if close else None


def window_of(query: Any, key: Any, call: Call) -> tuple[int | None, int | None] | None:
    """The window that the mask function says, where all it asks for is how far a key is from a query, as can be read."""
    import numpy as np

    from kvattn import positions  # here, as above

    tab, count = call.mask.tab, query.shape[-2] + key.shape[-2] - 1
    if call.mask.segments is not None:
        return None
    name = _name_for_good(query, key, call)
    remembered = None if name is None else _windows.get(name)  # at once: another thread may forget it in between
    if remembered is not None:
        return remembered
    made = _of_distances(call.mask.mask_function, query, key, call, in_numpy=True)
    if made is None or conversion.dtype_name(made) not in ("bool", "bool_"):
        return None
    flags = made if type(made) is np.ndarray else conversion.peek(tab, made)
    one_for_all = flags is not None and flags.size == count
    window = positions.window(flags.reshape(-1), 1 - call.query_offset - query.shape[-2]) if one_for_all else None
    if window is not None and name is not None:
        if len(_windows) >= REMEMBERED:
            _windows.clear()
        _windows[name] = window
    return window


def _name_for_good(query: Any, key: Any, call: Call) -> tuple[Any, ...] | None:
    """What tells a call's mask function, and the positions, from others that may say otherwise; None where nothing does.

    It does where the function reads no name and no attribute, and closes over integers alone: then its code and these are all
    that it knows. To ask it anew costs a framework a few of its operations, and a short call a tenth of its time.
    """
    tab, function, offset = call.mask.tab, call.mask.mask_function, call.query_offset
    place = _places(tab, query, 0, 1)
    if type(offset) is not int or conversion.peek(tab, place) is None:  # a trace is the same, whatever was asked before
        return None
    named = getattr(tab, "__name__", None)
    if type(function) is not FunctionType or function.__kwdefaults__ or named is None:
        return None
    code = function.__code__
    try:
        known = (*(function.__defaults__ or ()), *(cell.cell_contents for cell in function.__closure__ or ()))
    except ValueError:  # a cell that holds nothing yet
        return None
    if code.co_names or any(type(x) is not int for x in known) or any(type(x) is CodeType for x in code.co_consts):
        return None
    return code, known, named, conversion.dtype_name(place), query.shape[-2], key.shape[-2], offset


def line_of(query: Any, key: Any, call: Call) -> Any:
    """The bias of each distance, (..., n + m - 1), the least first, where the bias function asks for no more; or None."""
    tab, made = call.mask.tab, _of_distances(call.mask.bias_function, query, key, call)
    if made is None or conversion.dtype_name(made) not in conversion.FLOATS:
        return None
    lead, given = _lead(query.shape, key.shape), tuple(made.shape[:-2])
    if len(given) > len(lead) or any(x not in (1, full) for x, full in zip(reversed(given), reversed(lead), strict=False)):
        return None
    return tab.asarray(made[..., 0, :], dtype=conversion.dtype_name(query))


def _looked_at(query: Any, key: Any, call: Call,
               window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None, list[Part] | None]:  # fmt: skip
    """(left, right, None) where the flags are those of a window, (None, None, parts), or (None, None, None): of all pairs."""
    import numpy as np

    n, m, offset = query.shape[-2], key.shape[-2], call.query_offset
    if window is not None:
        return (*window, None) if window != (None, None) else (None, None, [Part(0, n, ((0, m),), False)])

    def look(start: int, count: int) -> Any:
        rows = start, min(count, n - start)
        full = (*_lead(query.shape, key.shape), rows[1], m)
        flags = call.mask._numpy_flags(key, full, offset, rows, [(0, m)]) if call.mask.segments is None else None
        if flags is None:
            flags = conversion.peek(call.mask.tab, call.mask.flags(query, key, full, offset, rows, [(0, m)]))
        return None if flags is None else np.broadcast_to(flags, (*flags.shape[:-2], rows[1], m))

    size = max(1, LOOK // m)
    flags = look(0, size)
    if flags is None:
        return None, None, None
    if type(offset) is int and call.mask.segments is None:
        bands: list[tuple[int, int, int | None, int | None]] = []
        for start in range(0, n, size):
            flags = look(start, size) if start else flags
            rows = flags.shape[-2]
            band = _band(flags.reshape(rows, m), offset + start) if flags.size == rows * m else None
            if band is None:
                break
            bands.append((offset + start, offset + start + rows - 1, *band))
        else:
            if (window := _one_window(bands, m)) is not None:
                return (*window, None) if window != (None, None) else (None, None, [Part(0, n, ((0, m),), False)])
    parts = [_narrowed(look(start, BLOCK), start, call) for start in range(0, n, BLOCK)]
    pairs = sum((part.end - part.start) * sum(last - first for first, last in part.runs) for part in parts)
    if pairs > (1 - SAVED) * n * m and n * m <= WHOLE and call.mask.bias_function is None:
        return None, None, None
    return None, None, parts


def _narrowed(flags: Any, start: int, call: Call) -> Part:
    """The part of these queries, from ``start`` on, beside the keys that some of them may attend to."""
    import numpy as np

    n, m = flags.shape[-2:]
    first, last = _in_reach(call, start, start + n, 0, m)
    some = np.zeros(m + 2, bool)
    some[1 + first : 1 + last] = flags[..., first:last].any(axis=tuple(range(flags.ndim - 1)))
    edges = np.flatnonzero(some[1:] != some[:-1]).tolist()
    runs = [*zip(edges[::2], edges[1::2], strict=True)] or [(first, first)]
    joined = [runs[0]]
    for low, high in runs[1:]:
        if low - joined[-1][1] < GAP:
            joined[-1] = joined[-1][0], high
        else:
            joined.append((low, high))
    width = joined[-1][1] - joined[0][0]
    if len(joined) > RUNS or call.dropout or sum(high - low for low, high in joined) > (1 - SAVED) * width:
        joined = [(joined[0][0], joined[-1][1])]
    looks = not all(flags[..., low:high].all() for low, high in joined)
    return Part(start, start + n, tuple(joined), looks)


def _band(flags: Any, position: int) -> tuple[int | None, int | None] | None:
    """(left, right) of the window that gives these flags to queries from ``position`` on, None for no limit; None for none.

    >>> import numpy as np
    >>> _band(np.tri(3, dtype=bool), 0)
    (None, 0)
    """
    import numpy as np

    n, m = flags.shape
    end, first, last = position + n - 1, int(flags[-1].argmax()), m - 1 - int(flags[0, ::-1].argmax())
    left, right = end - first if first else None, last - position if last < m - 1 else None
    if not (flags[0, last] and flags[-1, first]) or (left or 0) < 0 or (right or 0) < 0:
        return None
    ahead = np.arange(-end, m - position)  # how far after a query a key may lie
    within = np.ones(len(ahead), bool) if left is None else ahead >= -left
    within = within if right is None else within & (ahead <= right)
    moved = np.lib.stride_tricks.as_strided(within[n - 1 :], (n, m), (-within.itemsize, within.itemsize), writeable=False)
    return (left, right) if np.array_equal(flags, moved) else None


def _one_window(bands: list[tuple[int, int, int | None, int | None]], m: int) -> tuple[int | None, int | None] | None:
    """The window that these bands, (first position, last, left, right), are parts of; None where there is none."""
    lefts, rights = {left for *_, left, _ in bands} - {None}, {right for *_, right in bands} - {None}
    if len(lefts) > 1 or len(rights) > 1:
        return None
    left, right = next(iter(lefts), None), next(iter(rights), None)
    for first, last, here, there in bands:  # what limits nobody in one block may limit others
        if here is None and left is not None and last - left > 0:
            return None
        if there is None and right is not None and first + right < m - 1:
            return None
    return left, right


# ---- parts


def _by_entries(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts of the same entries of the batch, which are neighbours; torch.compile knows no groupby by a function."""
    found: list[list[Part]] = []
    for part in parts:
        if found and found[-1][-1].entries == part.entries:
            found[-1].append(part)
        else:
            found.append([part])
    return found


def cut(parts: Sequence[Part], query: Any, key: Any, value: Any, call: Call,
        concatenate: Callable[[Any, int], Any]) -> Iterator[tuple[Any, Any, Any, Call]]:  # fmt: skip
    """Each part's own query, key, value and call, as `Call.cut`; ``concatenate``: the framework's, (arrays, axis) -> array."""
    said: Pairs = call.mask
    for of_these in _by_entries(parts):
        entries = of_these[0].entries
        arrays = query, key, value, call._replace(mask=said.mask)
        if entries is not None:
            arrays = _of_entries(entries, *arrays)
        lead, m = _lead(query.shape, key.shape), key.shape[-2]
        blocks = [(part.start, part.end, *(part.runs[0] if len(part.runs) == 1 else (0, m))) for part in of_these]
        for part, (q, k, v, here) in zip(of_these, arrays[3].cut(blocks, *arrays[:3]), strict=True):
            yield _with_flags(part, said, q, k, v, here, call.query_offset, lead, concatenate)


def _with_flags(part: Part, said: Pairs, query: Any, key: Any, value: Any, call: Call, offset: Any, lead: Shape,
                concatenate: Callable[[Any, int], Any]) -> tuple[Any, Any, Any, Call]:  # fmt: skip
    """The part with the mask and the bias of its pairs; and where it has several runs of keys, these alone, side by side.

    ``offset`` and ``lead``, the leading axes of the scores, are those of all entries of the batch.
    """
    tab, several = said.tab, len(part.runs) > 1
    rows = part.start, part.end - part.start
    mask, bias, m = call.mask, call.bias, key.shape[-2]
    if several:

        def picked(x: Any, axis: int) -> Any:
            rest = [slice(None)] * (-1 - axis)
            return concatenate([x[(..., slice(*run), *rest)] for run in part.runs], axis)

        key, value = picked(key, -2), picked(value, -2)
        mask, bias = (x if x is None or tuple(x.shape[-1:]) != (m,) else picked(x, -1) for x in (mask, bias))
    full = (*lead, query.shape[-2], key.shape[-2])
    if part.looks:
        mask = both(said.tab, mask, said.flags(query, key, full, offset, rows, part.runs, part.entries))
    if said.bias_function is not None:
        bias = said.bias(query, key, full, offset, rows, part.runs, part.entries)
    if several:  # of which no window and no length tells
        if call.windowed or call.valid_lens is not None:
            places = tab.asarray(_numbers(part.runs), dtype=conversion.dtype_name(tab.places(key, 0, 1)), like=key)
            mask = tab._allowed(rows[1], places, len(query.shape), call._replace(mask=mask, bias=None))
        call = call._replace(valid_lens=None, left=None, right=None, query_offset=0)
    return query, key, value, call._replace(mask=mask, bias=bias)


def _of_entries(which: Run, query: Any, key: Any, value: Any, call: Call) -> tuple[Any, Any, Any, Call]:
    """What some entries of the batch have of a call."""
    axes, (first, last) = len(query.shape), which

    def entries(x: Any, full: int) -> Any:
        return _entries(x, which, full)

    offset, sink = call.query_offset, call.sink
    call = call._replace(
        mask=entries(call.mask, axes),
        bias=entries(call.bias, axes),
        valid_lens=None if call.valid_lens is None else call.valid_lens[first:last],
        query_offset=offset[first:last] if len(getattr(offset, "shape", ())) else offset,
        sink=sink if sink is None else entries(sink, axes if len(sink.shape) == axes else axes - 2),
    )
    return entries(query, axes), entries(key, axes), entries(value, axes), call


def _entries(x: Any, which: Run | None, axes: int) -> Any:
    """``x`` of these entries of the batch, where it has the first of so many axes, and an entry of each."""
    return x if which is None or x is None or len(x.shape) != axes or x.shape[0] == 1 else x[slice(*which)]


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
    said = "a window" if plain.windowed and not plain.masked else "arrays"
    why = f"{found.why}; functions of positions are {said} here"
    if type(plain.mask) is Segments:
        why = f"{found.why}; segments are compared in its blocks, and blocks that share none left out"
    return found._replace(why=why, run=serve, run_grad=None if run_grad is None else derive)


def _like(query: Any, key: Any, value: Any, call: Call, parts: Sequence[Part]) -> tuple[Any, Any, Any, Call]:
    """A call like that of the largest part, for which no function is run: a kernel is chosen by shapes."""
    import numpy as np

    said: Pairs = call.mask
    if said.mask_function is not None:
        said = said._replace(mask_function=lambda q, k: k == k)
    if said.bias_function is not None:
        said = said._replace(bias_function=lambda q, k: said.tab.asarray(np.zeros((1, 1), np.float32), like=query))
    part = max(parts, key=lambda part: (part.end - part.start) * (part.runs[-1][1] - part.runs[0][0]))
    part = part._replace(runs=((part.runs[0][0], part.runs[-1][1]),))
    return next(cut([part], query, key, value, call._replace(mask=said), lambda arrays, axis: arrays[0]))


def of_blocks(tab: Any, blocks: Sequence[planning.Block], call: Call) -> tuple[Call, list[Part]]:
    """A call in blocks of queries as one in parts, for `gradients`."""
    parts = [Part(start, end, ((first, last),), looks=False) for start, end, first, last in blocks]
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

    for part, (*arrays, here) in zip(parts, cut(parts, query, key, value, call, concatenate), strict=True):
        given = (grad_output,) if grad_lse is None else (grad_output, grad_lse)
        grad, *more = given if part.entries is None else (x[slice(*part.entries)] for x in given)
        more = [x[..., part.start : part.end] for x in more]
        grads = of_part(*arrays, grad[..., part.start : part.end, :], wrt, here, *more)
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
