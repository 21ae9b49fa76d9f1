"""How a call is divided before PyTorch serves it, in plain integers: batch entries of one length, and blocks of queries."""

from __future__ import annotations

from itertools import groupby

from kvattn import planning

CALL = 2**22  # multiplications that one more call must save, and
READ = 32  # that take as long as reading one number of a key or value
GAIN = 0.25  # share of the work that calls apart must save: they keep the cores less busy than one
PAIRS = 2**24  # numbers that are held at one time, of scores, masks or features: arrays under 32 MB would fragment glibc's heap
FEW = 2**14  # scores, of a call whose time is what Python takes
ROWS = 256  # queries of a block for which nothing but a mask is held


def equal_lengths(lengths, n, m, causal, numbers):
    """Neighbours in the batch that have as many keys and share a call, [(how many, keys)]; [] where one call is faster.

    ``numbers``: of the query, key and value heads beside one key, features and all, for each of which work is saved.

    >>> equal_lengths([64, 64, 8, 8], 1024, 64, False, 512)
    [(2, 64), (2, 8)]
    """
    most = min(n, m) if causal else m
    mask_is_large = causal and len(lengths) * n * m > PAIRS
    each = (n + READ) * numbers
    whole = each * m * len(lengths)
    if whole <= 2 * CALL and not mask_is_large and differ(lengths, most):
        return []  # two calls or more would save less than they cost
    lengths = [max(0, min(length, most)) for length in lengths]  # those of a block may end before it begins
    found = [(len([*same]), length) for length, same in groupby(lengths)]
    saved = each * (m * len(lengths) - sum(lengths))
    return found if len(found) <= 1 or mask_is_large or saved > max(CALL * len(found), GAIN * whole) else []


def differ(lengths, most):
    """Whether there are lengths from 0 to ``most`` of two sizes, where others count as the nearest of these."""
    return bool(lengths) and min(max(lengths), most) > max(min(lengths), 0)


def blocks_of_masks(n, m, masks, beyond):
    """Blocks of queries, as planning.window_blocks's, whose masks hold at most PAIRS numbers; [] where one block is all.

    ``masks``: how many entries have a mask of their own; ``beyond``: how far past its row a query sees, None for no limit.

    >>> blocks_of_masks(8192, 8192, 1, 0)[:2]
    [(0, 2048, 0, 2048), (2048, 4096, 0, 4096)]
    """
    size = max(ROWS, PAIRS // max(1, m * masks))
    ends = [(i, min(i + size, n)) for i in range(0, n, size)] if size < n else []
    return [(i, j, 0, m if beyond is None else min(max(beyond + j, 0), m)) for i, j in ends]


def each_sees_a_key(n, m, call):
    """Whether a window is all that forbids pairs, and it leaves each query some key: then there is no padding to hide."""
    alone = call.windowed and not call.masked and n  # sizes may be symbols, an offset an array
    return bool(alone) and planning.leaves_each_a_key(n, m, call.query_offset, call.left, call.right)


def narrowed(blocks, m, call):
    """The blocks beside just the keys that some of their queries sees: NaN in others would reach them."""
    offset, left, right = call.query_offset, call.left, call.right

    def keys(i, j):
        return 0 if left is None else max(0, offset + i - left), m if right is None else min(m, offset + j + right)

    return [(i, j, *keys(i, j)) for i, j, *_ in blocks]
