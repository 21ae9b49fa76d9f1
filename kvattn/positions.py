"""What a function of positions is evaluated on instead of all pairs, where that gives as much and costs less.

    f(q, k) for all pairs = g(k - q) for n + m - 1 distances          where f asks for nothing but k - q

A causal mask, a window, ALiBi and T5's buckets ask for nothing else, which `Position` finds out: it has no other operation.
What asks for more is asked with NumPy's integers, `Exact`, which are faster than arrays of a framework that plans each of its
operations; they have only operations that give the same integers and bools everywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

LIMIT = 2**20  # added to a position: int32 holds it, and so do the distances

# What the operators of Python give, and rounding and overflow cannot change.
SAME_EVERYWHERE = {"add", "subtract", "multiply", "floor_divide", "remainder", "negative", "absolute", "invert", "less",
                   "less_equal", "greater", "greater_equal", "equal", "not_equal", "bitwise_and", "bitwise_or",
                   "bitwise_xor"}  # fmt: skip


class Position:
    """The position of a query or of a key: of the two only the distance can be had, or which comes first.

    ``ahead``: how far the key is ahead, an array (1, count) of every distance that the pairs have.

    >>> query, key = (Position(np.array([[-1, 0, 1]]), is_key) for is_key in (False, True))
    >>> key <= query, query + 1 - key
    (array([[ True,  True, False]]), array([[2, 1, 0]]))
    """

    __slots__ = ("_ahead", "_is_key", "_shift")
    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None  # so that NumPy's arrays leave it to what stands below

    def __init__(self, ahead: Any, is_key: bool, shift: int = 0) -> None:
        self._ahead, self._is_key, self._shift = ahead, is_key, shift

    def __add__(self, other: Any) -> Any:
        shift = self._shift + other if type(other) is int else LIMIT
        return Position(self._ahead, self._is_key, shift) if abs(shift) < LIMIT else NotImplemented

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if type(other) is not Position:
            return self + -other if type(other) is int else NotImplemented
        return self._from(other)

    def _from(self, other: Any) -> Any:
        if type(other) is not Position or other._is_key is self._is_key:
            raise TypeError("only the distance of a key from a query is known")
        distance, shift = self._ahead if self._is_key else -self._ahead, self._shift - other._shift
        return distance + shift if shift else distance

    def __lt__(self, other: Any) -> Any:
        return self._from(other) < 0

    def __le__(self, other: Any) -> Any:
        return self._from(other) <= 0

    def __gt__(self, other: Any) -> Any:
        return self._from(other) > 0

    def __ge__(self, other: Any) -> Any:
        return self._from(other) >= 0

    def __eq__(self, other: Any) -> Any:
        return self._from(other) == 0

    def __ne__(self, other: Any) -> Any:
        return self._from(other) != 0

    def __bool__(self) -> bool:
        raise TypeError("a position stands for many")


class Exact(np.ndarray[Any, Any]):
    """Integers and bools whose operations give what every framework's give; TypeError or FloatingPointError for others."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **more: Any) -> Any:
        kinds = {x.dtype.kind if isinstance(x, Exact) else "" for x in inputs if type(x) is not int}
        small = all(abs(x) < LIMIT for x in inputs if type(x) is int)
        known = ufunc.__name__ in SAME_EVERYWHERE and method == "__call__" and not more
        if not (known and small and kinds in ({"i"}, {"b"})) or ("b" in kinds and int in map(type, inputs)):
            return NotImplemented
        with np.errstate(all="raise"):  # a division by 0
            return ufunc(*(x.view(np.ndarray) if isinstance(x, Exact) else x for x in inputs)).view(Exact)

    def __array_function__(self, function: Any, *more: Any) -> Any:
        return NotImplemented


def exact(x: Any) -> Any:
    """NumPy's integers, to ask a function with."""
    return x.view(Exact)


def of_distances(function: Any, ahead: Any) -> Any:
    """What the function gives for pairs whose keys are this far ahead, (..., 1, count); None where it depends on more."""
    try:
        made = function(Position(ahead, False), Position(ahead, True))
        return made if tuple(made.shape[-2:]) == tuple(ahead.shape) else None
    except Exception:  # it is asked again with arrays, and its error is for the user then
        return None


def of_pairs(function: Any, queries: Any, keys: Any) -> Any:
    """What the function gives for all pairs of NumPy's integers (n, 1) and (1, m), as NumPy's bools; None: ask otherwise."""
    try:
        made = function(exact(queries), exact(keys))
    except Exception:  # as above
        return None
    return made.view(np.ndarray) if type(made) is Exact and made.dtype.kind == "b" else None


def window(flags: Any, least: int) -> tuple[int | None, int | None] | None:
    """(left, right) of the window that allows these distances, from ``least`` on; None for no limit; None where there is none.

    >>> window(np.array([False, True, True, True]), -3)
    (2, None)
    >>> window(np.array([True, False, True]), -1)
    """
    inside = np.flatnonzero(flags)
    if not len(inside) or inside[-1] - inside[0] + 1 != len(inside):
        return None
    left = -(least + int(inside[0])) if inside[0] > 0 else None
    right = least + int(inside[-1]) if inside[-1] < len(flags) - 1 else None
    return None if (left or 0) < 0 or (right or 0) < 0 else (left, right)
