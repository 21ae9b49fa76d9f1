"""What scores are given by how far apart a query and a key stand, ALiBi's slopes and T5's buckets; segments. Plain numbers."""

from __future__ import annotations

from typing import Any


def slopes(heads: int) -> list[float]:
    """ALiBi's slope of each head: 2^(-8 / heads), its square, its cube, ...

    For a number of heads that is no power of two, those of the power below it, then every other one of the power above, as
    in the paper's code.

    >>> slopes(3)
    [0.0625, 0.00390625, 0.25]
    """
    below = 1 << (heads.bit_length() - 1)
    found = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    return found if below == heads else found + slopes(2 * below)[::2][: heads - below]


def buckets(of_one_side: int, max_distance: int) -> list[int]:
    """T5's bucket of each distance up to max_distance, from where on all share the last one.

    Half of the buckets hold one distance each, the others ranges that grow geometrically. The edges are compared as integers:
    logarithms round, and the frameworks' would put a distance that is an edge into different buckets.

    >>> buckets(4, 8)
    [0, 1, 2, 2, 3, 3, 3, 3, 3]
    """
    exact = of_one_side // 2
    ranges = of_one_side - exact

    def bucket(distance: int) -> int:  # distance / exact >= (max_distance / exact)^(k / ranges)
        if distance < exact:
            return distance
        reached = (distance**ranges >= exact ** (ranges - k) * max_distance**k for k in range(ranges))
        return exact - 1 + int(sum(reached))

    return [bucket(distance) for distance in range(max_distance + 1)]


def values(x: Any) -> Any:
    """What is no framework's array as NumPy's own: lists, numbers, what NumPy reads, what DLPack exchanges.

    It is of this machine's byte order, and of no subclass: np.matrix, for one, has its own idea of a product.
    """
    import numpy as np  # here, since importing kvattn loads nothing

    exchanged = hasattr(x, "__dlpack__") and not hasattr(x, "__array__")
    made = np.from_dlpack(x) if exchanged else np.asarray(x)
    return made if made.dtype.isnative else made.astype(made.dtype.newbyteorder("="))


def bucketed(relative_position: Any, of_one_side: int, max_distance: int, bidirectional: bool) -> Any:
    """The bucket of each of NumPy's integers, key's position minus query's; those of keys after the query come second."""
    import numpy as np  # here too

    table = np.array(buckets(of_one_side, max_distance), np.int32)
    relative_position = relative_position.clip(-max_distance, max_distance)  # first, since int64's least has no absolute value
    found = table[abs(relative_position) if bidirectional else (-relative_position).clip(0)]
    return found + np.where(relative_position > 0, of_one_side, 0) if bidirectional else found


def segments(ends: Any, length: int) -> Any:
    """An id for each place, of where the sequences that lie there begin and end; NumPy's integers."""
    import numpy as np  # here too

    return np.repeat(np.arange(len(ends), dtype=np.int32), np.diff(ends, append=length))
