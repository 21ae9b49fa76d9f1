"""Blocks of queries: those that make a window cost O(n w), and those that keep memory bounded. Plain integers, no framework."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

Block = tuple[int, int, int, int]

BLOCK = 256  # queries that share one slice of the keys
FEW = 1024  # keys: not worth a slice for one block
SLICES = 4  # that are cut from one array
PLAIN = ("dot_score", "scaled_dot_score", "multiplicative_score", "gated_score", "cosine_score")  # these hold no features


def window_blocks(n: Any, m: Any, offset: Any, left: int | None, right: int | None) -> list[Block]:
    """Blocks that hold every pair in the window; [] where blocks would save nothing, and where a size or the offset is unknown.

    >>> window_blocks(512, 1024, 0, 10, 0)
    [(0, 256, 0, 256), (256, 512, 246, 512)]
    """
    if not (type(n) is type(m) is type(offset) is int):
        return []
    width = (m if left is None else left) + (m if right is None else right) + min(n, BLOCK)
    if 2 * width > m or (n <= BLOCK and m <= FEW):
        return []
    blocks = []
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        first = 0 if left is None else offset + start - left
        last = m if right is None else offset + end + right
        first = min(max(first, 0), m)
        blocks.append((start, end, first, max(first, min(last, m))))
    return blocks


def numbers_per_pair(score: Any, query: tuple[int, ...], key: tuple[int, ...]) -> int:
    """How many numbers a score holds for each pair while it computes: as many as there are features, if it is not PLAIN."""
    if getattr(getattr(score, "func", score), "__name__", "") in PLAIN:
        return 1
    parameters = getattr(score, "keywords", {}).values()
    sizes: list[int] = [size for x in parameters for size in getattr(x, "shape", ())]
    return max(1, query[-1], key[-1], *sizes)


def memory_blocks(score: Any, query: tuple[int, ...], key: tuple[int, ...], most: int) -> list[Block]:
    """Blocks of queries beside all keys, all but the last alike, that hold at most so many numbers each; [] where one is all.

    >>> memory_blocks(None, (8, 100), (64, 100), 5 * 64 * 100)
    [(0, 4, 0, 64), (4, 8, 0, 64)]
    """
    n, m = query[-2], key[-2]
    size = max(1, most // max(1, m * math.prod(lead(query, key)) * numbers_per_pair(score, query, key)))
    size = -(-n // -(-n // size)) if n else size
    return [(i, min(i + size, n), 0, m) for i in range(0, n, size)] if size < n else []


def allows_all(n: Any, m: Any, offset: Any, left: int | None, right: int | None) -> bool:
    """Whether the window allows every pair; False where a size or the offset is unknown, or an array.

    >>> allows_all(1, 1024, 1023, None, 0)  # a decoding step: the query stands at the last key
    True
    """
    if not (type(n) is type(m) is type(offset) is int):
        return False
    if left is not None and offset + n - 1 > left:  # the last query, from the first key
        return False
    return right is None or m - 1 - offset <= right  # the last key, from the first query


def leaves_none_out(n: Any, m: Any, offset: Any, left: int | None, right: int | None) -> bool:
    """Whether the window leaves each query a key and each key a query; False where a size or the offset is unknown.

    >>> leaves_none_out(4, 4, 0, None, 0), leaves_none_out(3, 4, 0, None, 0)  # no query attends to the fourth key
    (True, False)
    """
    if not (type(n) is type(m) is type(offset) is int and n and m):
        return False
    end = offset + n - 1  # where the last query stands
    if (right is not None and end + right < m - 1) or (left is not None and offset > left):
        return False
    return leaves_each_a_key(n, m, offset, left, right)


def leaves_each_a_key(n: Any, m: Any, offset: Any, left: int | None, right: int | None) -> bool:
    """Whether the window leaves each query a key; False where a size or the offset is unknown.

    >>> leaves_each_a_key(4, 2, 0, None, 0), leaves_each_a_key(4, 2, 0, 1, 0)  # the fourth query sees keys 2 and 3 at most
    (True, False)
    """
    if not (type(n) is type(m) is type(offset) is int):
        return False
    return (right is None or offset + right >= 0) and (left is None or offset + n - 1 - left < m)


def heads(query: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, int]:
    """(query heads, key heads) of two shapes; (1, 1) where there is no head axis."""
    return (query[-3], key[-3]) if len(query) > 2 else (1, 1)


def lead(query: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The leading axes (..., h) of the scores: broadcast, but for the heads, which are the query's."""
    return (*(max(pair) if 0 not in pair else 0 for pair in zip(query[:-3], key[:-3], strict=True)), *query[:-2][-1:])


def cut(
    blocks: list[Block],
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    bias: Any,
    valid_lens: Any,
    query_offset: Any,
    sink: Any = None,
) -> Iterator[tuple[tuple[Any, Any, Any], dict[str, Any]]]:
    """The arguments of each block's own attention: slices, with lengths and offset counted from its first key."""
    if len(blocks) > SLICES:  # slices of slices: autodiff fills the whole of what a slice was cut from, for every slice
        size = -(-len(blocks) // SLICES)
        for group in (blocks[i : i + size] for i in range(0, len(blocks), size)):
            i, j = group[0][0], group[-1][1]
            k, l = min(block[2] for block in group), max(block[3] for block in group)
            for outer, at in cut([(i, j, k, l)], query, key, value, mask, bias, valid_lens, query_offset, sink):
                yield from cut([(a - i, b - i, c - k, d - k) for a, b, c, d in group], *outer, **at)
        return
    n, m = query.shape[-2], key.shape[-2]
    each_sink = sink is not None and len(sink.shape) == len(query.shape) and sink.shape[-2] == n

    def part(x: Any, start: int, end: int, first: int, last: int) -> Any:
        if x is None or len(x.shape) == 0:
            return x
        x = x[..., first:last] if x.shape[-1] == m else x
        return x[..., start:end, :] if len(x.shape) > 1 and x.shape[-2] == n else x

    for start, end, first, last in blocks:
        block = (query[..., start:end, :], key[..., first:last, :], value[..., first:last, :])
        lens = valid_lens
        if lens is not None:
            per_query = len(lens.shape) == (1 if len(query.shape) < 3 else 2)
            lens = (lens[..., start:end] if per_query else lens) - first
        yield (
            block,
            {
                "mask": part(mask, start, end, first, last),
                "bias": part(bias, start, end, first, last),
                "valid_lens": lens,
                "query_offset": query_offset + start - first,
                "sink": sink[..., start:end, :] if each_sink else sink,
            },
        )
