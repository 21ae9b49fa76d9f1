"""Masks and biases that depend on positions: functions of the positions of query and key, and segments.

Here they are evaluated for any pairs; and few pairs are evaluated to find that the function is a window, or a bias of each
distance. `kvattn.partition` cuts the call by what is found here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from kvattn import checks, conversion
from kvattn.call import Call

Run = tuple[int, int]  # keys: the first, and the one after the last
Rows = tuple[int, "int | None"]  # queries: the first, and their number; None for all
Shape = tuple[Any, ...]

SQUARE = 46341  # the first number whose square int32 does not hold
REMEMBERED = 256  # windows


_windows: dict[Any, tuple[int | None, int | None]] = {}  # the windows that mask functions are, by `_cache_key`


class Segments(NamedTuple):
    """A mask, or None, and the segments of the queries (batch or 1, n) and of the keys (..., m), in the place of a call's mask:
    for kernels that compare them a block at a time and leave out blocks that share none, where their values cannot be read."""

    mask: Any
    of_queries: Any
    of_keys: Any

    def array(self, axes: int) -> Any:
        """The mask of all pairs, for queries of so many axes."""
        alike = same(self.of_queries, self.of_keys, axes)
        return alike if self.mask is None else self.mask & alike


class Pairs(NamedTuple):
    """What restricts and biases pairs by position, in the place of a call's mask: an array, functions, segments.

    ``tab``: the backend whose arrays the functions take; ``segments``: of the queries (batch or 1, n), of the keys (..., m).
    ``in_numpy``: within this call, the mask function may be evaluated on NumPy's integers.
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
            k = tab.asarray(positions_of_runs(runs), dtype=_dtype(tab, key, runs[0][0], runs[-1][1]), like=key)
        if type(offset) is int:
            return _places(tab, query, offset + start, count)[:, None], k[None]
        wide = _dtype(tab, query, 0, SQUARE)  # an offset that is an array may be large
        q = tab.asarray(_places(tab, query, start, count), dtype=wide)[:, None]
        if len(getattr(offset, "shape", ())) == 0:
            numpy_values = conversion.peek(tab, offset) if tab.is_array(offset) else None
            return q + (offset if numpy_values is None else int(numpy_values)), k[None]
        offset = tab.asarray(offset, dtype=wide)
        return q + offset[(slice(None), *[None] * (len(query.shape) - 1))], k[None]

    def flags(self, query: Any, key: Any, full: Shape, offset: Any, rows: Rows, runs: Sequence[Run] | None,
              entries: Run | None = None) -> Any:  # fmt: skip
        """Which of these pairs the function and the segments let attend: bool, broadcastable to ``full``, or None for all.

        ``entries``: those of the batch that are asked for; ``full`` and ``offset`` are of all, since a function
        may close over arrays of the whole batch.
        """
        found = None
        if self.mask_function is not None:
            if (made := self.numpy_flags(key, full, offset, rows, runs)) is not None:
                made = self.tab.asarray(made, like=query)
            else:
                made = checks.asked("mask", self.mask_function, *self.places(query, key, offset, rows, runs))
            found = of_entries(checks.flags(self.tab, made, full), entries, len(full))
        if self.segments is not None:
            found = both(self.tab, found, self._same_segment(query, full, rows, runs, entries))
        return found

    def numpy_flags(self, key: Any, full: Shape, offset: Any, rows: Rows, runs: Sequence[Run] | None) -> Any:
        """The mask function at these pairs, NumPy's bools; None where it takes the framework's arrays only."""
        if not self.in_numpy:
            return None
        from kvattn import positions  # here, since importing kvattn loads nothing

        keys, start = runs or [(0, full[-1])], offset + rows[0]
        of_queries = _dtype(self.tab, key, start, start + full[-2])
        q = positions_of_runs([(start, start + full[-2])]).astype(of_queries)[:, None]
        of_keys = _dtype(self.tab, key, keys[0][0], keys[-1][1])
        return positions.of_pairs(self.mask_function, q, positions_of_runs(keys).astype(of_keys)[None])

    def _same_segment(self, query: Any, full: Shape, rows: Rows, runs: Sequence[Run] | None, entries: Run | None) -> Any:
        assert self.segments is not None
        numpy_values = conversion.peek(self.tab, self.segments[0]), conversion.peek(self.tab, self.segments[1])
        # NumPy compares where it can read both: MXNet does not for more than five axes.
        known = numpy_values[0] is not None and numpy_values[1] is not None
        of_queries, of_keys = numpy_values if known else self.segments
        of_queries, of_keys = (x if entries is None or x.shape[0] == 1 else x[slice(*entries)] for x in (of_queries, of_keys))
        of_queries = of_queries[:, rows[0] : None if rows[1] is None else rows[0] + rows[1]]
        if runs is not None and len(runs) == 1:
            of_keys = of_keys[:, slice(*runs[0])]
        elif runs is not None:
            of_keys = of_keys[:, positions_of_runs(runs)]
        found = same(of_queries, of_keys, len(full))
        return self.tab.asarray(found, like=query) if known else found

    def bias(self, query: Any, key: Any, full: Shape, offset: Any, rows: Rows, runs: Sequence[Run] | None,
             entries: Run | None = None) -> Any:  # fmt: skip
        """The bias of these pairs, in the query's dtype; ``entries`` as in `flags`."""
        assert self.bias_function is not None
        made = checks.asked("bias", self.bias_function, *self.places(query, key, offset, rows, runs))
        made = of_entries(checks.added(self.tab, made, full), entries, len(full))
        return self.tab.asarray(made, dtype=conversion.dtype_name(query))

    def arrays(self, query: Any, key: Any, full: Shape, offset: Any, rows: Rows = (0, None),
               runs: Sequence[Run] | None = None) -> tuple[Any, Any]:  # fmt: skip
        """The mask and the bias of all pairs; no bias, where that is no function."""
        mask = both(self.tab, self.mask, self.flags(query, key, full, offset, rows, runs))
        return mask, None if self.bias_function is None else self.bias(query, key, full, offset, rows, runs)

    def whole(self, query: Any, key: Any, call: Call, heads: bool = True) -> Call:
        """The same call, with arrays of all pairs in place of what this says.

        ``heads``: whether query and key have an axis of all heads; else theirs is 1, where their number is not known yet.
        """
        lead = leading(query.shape, key.shape)
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


def positions_of_runs(runs: Sequence[Run]) -> Any:
    """The positions in these runs of keys or of queries, NumPy's."""
    import numpy as np  # here, since importing kvattn loads nothing

    return np.concatenate([np.arange(*run) for run in runs])


def _places(tab: Any, x: Any, first: Any, count: Any) -> Any:
    """The tab's `places`; of another's backend, which may have none, an array of NumPy's."""
    if hasattr(tab, "places"):
        return tab.places(x, first, count)
    return tab.asarray(positions_of_runs([(first, first + count)]), like=x)


def _dtype(tab: Any, x: Any, first: int, end: int) -> str:
    """The dtype that `_places` has for positions from ``first`` to ``end``."""
    return conversion.dtype_name(_places(tab, x, 0 if short(first, end) else SQUARE, 1))


def leading(query: Any, key: Any) -> Shape:
    """The leading axes of the scores, None where they are unknown."""

    def broadcast(a: Any, b: Any) -> Any:
        if a is None or b is None:
            return None
        return 0 if 0 in (a, b) else max(a, b)

    batch = [broadcast(a, b) for a, b in zip(query[:-3], key[:-3], strict=True)]
    return (*batch, *query[:-2][-1:])


# ---- what the functions allow, as far as values can be read


def same_in_numpy(spec: Pairs, query: Any, key: Any, offset: Any) -> bool:
    """Whether the mask function may be evaluated on NumPy's integers: on the framework's it gives the same."""
    if spec.mask_function is None or type(offset) is not int:
        return False
    import numpy as np

    q, k = spec.places(query, key, offset, (0, 1), None)
    if (numpy_values := conversion.peek(spec.tab, q)) is None or numpy_values is q:  # the framework's are NumPy's
        return False
    try:
        made = spec.mask_function(q, k)
    except Exception:  # it is evaluated again for all pairs, and the user then gets its error
        return False
    if not spec.tab.is_array(made) or conversion.dtype_name(made) not in ("bool", "bool_"):
        return False
    found = spec._replace(in_numpy=True).numpy_flags(key, (1, key.shape[-2]), offset, (0, 1), None)
    return found is not None and np.array_equal(found, conversion.peek(spec.tab, made))


def _evaluated(tab: Any) -> AbstractContextManager[Any]:
    """A context in which the tab's operations on known numbers run at once, inside of a trace too."""
    context: AbstractContextManager[Any] = getattr(tab, "EVALUATED", nullcontext)()
    return context


def _of_distances(function: Any, query: Any, key: Any, call: Call, in_numpy: bool = False) -> Any:
    """The function at each distance, (..., 1, n + m - 1), the least first; None where it depends on more or cannot
    be read. At the first query and the last it is evaluated on arrays, too: it may depend on their sizes or class.

    ``in_numpy``: it may be evaluated on NumPy's integers; where it depends on no more, the result is NumPy's bools.
    """
    import numpy as np

    from kvattn import positions  # here, as above

    tab, offset, n, m = call.mask.tab, call.query_offset, query.shape[-2], key.shape[-2]
    if type(offset) is not int or (numpy_values := conversion.peek(tab, place := _places(tab, key, 0, 1))) is None:
        return None
    small = short(0, m) and short(offset, offset + n)
    dtype = conversion.dtype_name(place) if small else _dtype(tab, key, 0, SQUARE)  # the positions' own
    ahead, made = np.arange(1 - offset - n, m - offset).astype(dtype)[None], None
    if in_numpy and numpy_values is not place:  # else the framework's are NumPy's
        flags = positions.of_distances(function, positions.exact(ahead))
        made = flags.view(np.ndarray) if type(flags) is positions.Exact and flags.dtype.kind == "b" else None
    known = made
    if made is None:
        made = positions.of_distances(function, tab.asarray(ahead, like=key))
        if made is None or not tab.is_array(made):
            return None
        known = conversion.peek(tab, made)
    try:
        ends = tab.asarray(np.array([[offset], [offset + n - 1]], dtype), like=query)
        found = function(ends, tab.asarray(np.arange(m, dtype=dtype)[None], like=key))
    except Exception:  # it is evaluated again, and the user then gets its error
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
    """The window that the mask function is, where it depends on the distance alone and its values can be read."""
    import numpy as np

    from kvattn import positions  # here, as above

    tab, count = call.mask.tab, query.shape[-2] + key.shape[-2] - 1
    if call.mask.segments is not None:
        return None
    name = _cache_key(query, key, call)
    remembered = None if name is None else _windows.get(name)  # at once: another thread may forget it in between
    if remembered is not None:
        return remembered
    with _evaluated(tab):
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


def _cache_key(query: Any, key: Any, call: Call) -> tuple[Any, ...] | None:
    """What identifies a call's mask function and the positions, so that equal ones have equal windows; None where nothing does.

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
    with _evaluated(tab := call.mask.tab):
        made = _of_distances(call.mask.bias_function, query, key, call)
        if made is None or conversion.dtype_name(made) not in conversion.FLOATS:
            return None
        lead, given = leading(query.shape, key.shape), tuple(made.shape[:-2])
        if len(given) > len(lead) or any(x not in (1, full) for x, full in zip(reversed(given), reversed(lead), strict=False)):
            return None
        return tab.asarray(made[..., 0, :], dtype=conversion.dtype_name(query))


def window_of_flags(flags: Any, position: int) -> tuple[int | None, int | None] | None:
    """(left, right) of the window that gives these flags to queries from ``position`` on; None where it is no window. A side
    without a limit is None.

    >>> import numpy as np
    >>> window_of_flags(np.tri(3, dtype=bool), 0)
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


def one_window(windows: list[tuple[int, int, int | None, int | None]], m: int) -> tuple[int | None, int | None] | None:
    """The window that these, (first position, last, left, right), are parts of; None where there is none."""
    lefts, rights = {left for *_, left, _ in windows} - {None}, {right for *_, right in windows} - {None}
    if len(lefts) > 1 or len(rights) > 1:
        return None
    left, right = next(iter(lefts), None), next(iter(rights), None)
    for first, last, here, there in windows:  # a side without a limit in one block may have one in another
        if here is None and left is not None and last - left > 0:
            return None
        if there is None and right is not None and first + right < m - 1:
            return None
    return left, right


def of_entries(x: Any, which: Run | None, axes: int) -> Any:
    """``x`` of these entries of the batch, where it has the first of so many axes, and an entry of each."""
    return x if which is None or x is None or len(x.shape) != axes or x.shape[0] == 1 else x[slice(*which)]
