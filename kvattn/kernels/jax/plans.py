"""Which calls the tiles of tiles.py serve, and of which sizes those are: plain integers, without JAX."""

from __future__ import annotations

from typing import NamedTuple

from kvattn import planning
from kvattn.pairs import Segments

TILE, BLOCK = 1024, 1024  # queries of a tile, keys of a block
CAUSAL_TILE, WINDOW_TILE = 512, 256  # queries of a tile that causal or a window, and that a window on both sides, cuts
SCORES = 2**20  # that exist at once, in several heads where those of one are fewer
WINDOW = 2048  # keys that a tile under a window on both sides reaches at most, to meet them in one block
FEWEST_SCORES = 2**14  # of a batch entry's head that tiles are worth their own cost for
FEWEST_QUERIES = 16  # likewise
MANY_KEYS = 2**12  # of which fewer queries than that leave unread those that are out of their reach


def obstacle(tab, query, key, value, call):
    """Why tiles do not serve a call of ``tab`` for arrays of these shapes, wherever they lie; "" if they do."""
    if any(type(size) is not int for size in (*query, *key, *value)):  # in jax.export
        return "the sizes are not known yet"
    if call.score not in (tab.scaled_dot_score, tab.dot_score):
        return "the score is not a dot product"
    if call.normalize not in (tab.softmax, tab.masked_softmax):
        return "the normaliser is not softmax"
    if call.dropout or call.return_weights:
        return "dropout is asked for" if call.dropout else "return_weights is asked for"
    n, m = query[-2], key[-2]
    unread = call.windowed or call.valid_lens is not None  # so that blocks need not look at all keys
    if not (n * m >= FEWEST_SCORES if n >= FEWEST_QUERIES else m >= MANY_KEYS and unread) or 0 in (*query, *key):
        return "few scores, for which tiles would cost more than they save"
    lead = planning.lead(query, key)
    if any(size not in (1, whole) for size, whole in zip(value[:-3], lead[:-1], strict=True)):
        return "the values widen a batch axis"
    return ""


class Plan(NamedTuple):
    """Tiles of queries, each beside blocks of keys."""

    lead: tuple  # (*batch, heads) of the output
    heads: int  # of the keys
    n: int
    m: int
    tile: int  # queries of a tile
    block: int  # keys of a block that each query of the tile may attend to
    cut_block: int  # keys of one of which some pairs may be forbidden, and of any in the derivative
    cut_blocks: int  # of the latter that a tile can reach
    gaps: bool  # whether there may be keys between those that its queries may attend to
    heads_at_once: int  # heads of the keys whose tiles are computed at once


def plan(query, key, call):
    """The Plan of a call for arrays of these shapes.

    >>> from kvattn.call import Call
    >>> plan((2, 4096, 64), (2, 4096, 64), Call(score=None, normalize=None, left=100, right=0))[4:]
    (256, 1024, 356, 1, False, 2)
    """
    n, m, lead, left, right = query[-2], key[-2], planning.lead(query, key) or (1,), call.left, call.right
    heads = key[-3] if len(key) > 2 else 1
    both, segments = left is not None and right is not None, call.mask.of_queries if type(call.mask) is Segments else None
    narrow = CAUSAL_TILE if call.windowed or segments is not None else TILE
    tile = _part(n, WINDOW_TILE if both and WINDOW_TILE + left + right <= WINDOW else narrow)
    block = cut_block = _part(m, BLOCK)
    if call.windowed or call.valid_lens is not None or segments is not None:
        # never all keys in a block: XLA would take its products out of the loop
        block, cut_block = max(1, min(block, m // 2)), _part(m, min(BLOCK, CAUSAL_TILE * CAUSAL_TILE // tile))
    cut_blocks = -(-m // cut_block)
    if both:
        reached = tile + left + right
        cut_block = min(m, reached) if reached <= WINDOW else cut_block
        cut_blocks = min(-(-m // cut_block), -(-reached // cut_block))
    own = call.valid_lens, call.query_offset if call.windowed else 0, segments, getattr(call.mask, "of_keys", None)
    each_alone = len(query) == 3 and any((getattr(x, "shape", ()) or (1,))[0] > 1 for x in own)  # heads where they differ
    most = 1 if each_alone else SCORES // (tile * (cut_block if call.windowed else block))
    heads_at_once = max(g for g in range(1, heads + 1) if heads % g == 0 and (g == 1 or g <= most))
    block = min(block, max(cut_block, SCORES // (heads_at_once * tile)))
    gaps = left is not None and call.lengths_per_query(len(query))
    return Plan(lead, heads, n, m, tile, block, cut_block, cut_blocks, gaps, heads_at_once)


def _part(size, most):
    """The length of equal parts of at most about ``most``."""
    return -(-size // -(-size // most))
