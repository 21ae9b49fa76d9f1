"""Which queries and keys each block of a call holds, in integers. A query i of a head may attend to the keys j with

    offset + i - left <= j <= offset + i + right   and   0 <= j < length

where left or right None is no limit. ``ops`` does the arithmetic: TensorFlow, whose trace serves calls of all sizes, or NumPy,
by which it is tested.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Heads(NamedTuple):
    """The sizes of a call, and for each head (heads, 1) where its first query stands and how many of its keys are valid."""

    n: Any
    m: Any
    offset: Any
    length: Any


class Blocks(NamedTuple):
    """Integers for each block, (heads, blocks)."""

    start: Any  # the first of its queries, and the one after its last
    end: Any
    low: Any  # the first key that any of them may attend to, and the one after the last
    high: Any
    below: Any  # the diagonals of its scores in the window: below that of the first query with the first key, and above it
    above: Any


def size(ops: Any, m: Any, scores: int, most: int, fewest: int) -> Any:
    """The queries of a block of about so many scores with all the keys."""
    return ops.minimum(ops.maximum(scores // ops.maximum(m, 1), fewest), most)


def blocks(ops: Any, start: Any, end: Any, heads: Heads, left: int | None, right: int | None, *, every_query: bool) -> Blocks:
    """The blocks of the queries start ... end of each head; without ``every_query`` only those that may attend to some key."""
    n, m, offset, length = heads
    if not every_query:
        first = 0 if right is None else -right - offset
        last = n if left is None else length + left - offset
        start, end = (ops.minimum(ops.maximum(x, first), ops.where(length > 0, last, first)) for x in (start, end))
    low, high = 0 * start, length + 0 * start
    if left is not None:
        low = ops.minimum(ops.maximum(start + offset - left, 0), m)
    if right is not None:
        high = ops.minimum(end + offset + right, high)
    high = ops.where(start < end, ops.maximum(high, low), low)
    below = 0 if left is None else ops.minimum(low - (start + offset - left), end - start)
    above = 0 if right is None else ops.minimum(start + offset + right - low, high - low)
    return Blocks(start, end, low, high, below, above)
