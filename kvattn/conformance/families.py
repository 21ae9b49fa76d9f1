"""The cases of attention, a family to a function: each takes the random generator and yields its cases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from kvattn.conformance import multihead, notfinite, option_pairs, oracle, pooling, position_functions, rotary
from kvattn.conformance.cases import LSE, WEIGHTS, Case, attend, flags, grid, merged, poisoned, qkv
from kvattn.conformance.pooling import parametrised

INF, NAN = np.inf, np.nan


def every(rng: np.random.Generator) -> Iterator[Case]:
    keywords = (plain, masks, biases, lengths, unsigned, causal, windows, caps)
    parts = (groups, shapes, large, padding, positions, pooling.scores, pooling.pooling, pooling.normalisers)
    combined = (merging, blocks, covariance, multihead.cases, combinations, many_axes, notfinite.cases, lone, rotary.cases)
    later = (sinks, notfinite.sinks, position_functions.cases, scores_out, rotary.layered, notfinite.scores_out)
    dropped = (dropout, multihead.dropout, rotary.alibi)
    # New cases stand at the end, where they do not change the random data of the others.
    last = (
        option_pairs.cases,
        option_pairs.restrictions_alone,
        option_pairs.edges,
        through_scores,
        streamed,
        multihead.one_head,
    )
    latest = (merged_once, multihead.selected, far_above)
    for family in (*keywords, *parts, *combined, *later, *dropped, *last, *latest):
        yield from family(rng)


# ---- softmax attention and its keywords


def plain(rng: np.random.Generator) -> Iterator[Case]:
    make = partial(attend, group="plain", rng=rng)
    yield make("plain", *qkv(rng))
    yield make("output alone", *qkv(rng), asked=())
    yield make("with weights", *qkv(rng), grad=False, asked=WEIGHTS)
    yield make("with lse", *qkv(rng), grad=False, asked=LSE)
    yield make("n = m", *qkv(rng, n=4, m=4, d=4, v=4), asked=())
    yield make("scale", *qkv(rng), scale=0.75, group="scale")
    yield make("negative scale", *qkv(rng), scale=-1.5, group="scale")
    yield make("zero scale", *qkv(rng), scale=0.0, group="scale")
    yield make("scale 1", *qkv(rng), scale=1.0, group="scale", asked=())
    yield make("scale of another score", *qkv(rng), scale=0.25, score="distance_score", group="scale")


def masks(rng: np.random.Generator) -> Iterator[Case]:
    make = partial(attend, group="masks", rng=rng)
    for shape in ((2, 2, 4, 5), (5,), (4, 5), (4, 1), (2, 1, 1, 5), (1, 2, 4, 5), (2, 4, 5), ()):
        mask = flags(rng, *shape) if shape else np.array(True)
        yield make(f"mask {shape}", *qkv(rng), grad=len(shape) in (1, 4), mask=mask)
    yield make("mask without batch", *qkv(rng, lead=()), mask=flags(rng, 4, 5))
    rows = flags(rng, 2, 2, 4, 5)
    rows[0, 0, 1] = rows[1, :, 2] = False
    yield make("mask with empty rows", *qkv(rng), mask=rows, group="empty rows")
    yield make("mask of nothing", *qkv(rng), mask=np.zeros((4, 5), bool), group="empty rows")
    yield make("mask of a column", *qkv(rng), grad=False, mask=np.array([[True], [False], [True], [False]]), group="empty rows")
    yield make("mask () of nothing", *qkv(rng), mask=np.array(False), group="empty rows")


def biases(rng: np.random.Generator) -> Iterator[Case]:
    make = partial(attend, group="bias", rng=rng)
    for shape in ((2, 2, 4, 5), (5,), (4, 1), (2, 1, 1, 5), (1, 2, 4, 5)):
        yield make(f"bias {shape}", *qkv(rng), bias=grid(rng, *shape))
    forbidding = np.where(flags(rng, 2, 2, 4, 5), grid(rng, 2, 2, 4, 5), -INF)
    forbidding[0, 1, 2] = -INF
    yield make("bias -inf", *qkv(rng), bias=forbidding)
    yield make("bias -inf for a column", *qkv(rng), bias=np.array([0.5, -INF, 0.0, -1.0, -INF]))
    yield make("bias -inf for all", *qkv(rng), bias=np.full((4, 5), -INF), group="empty rows")
    yield make("bias and mask", *qkv(rng), bias=forbidding[0, 0], mask=flags(rng, 2, 1, 1, 5))
    finite = np.where(flags(rng, 4, 5), 0.0, -30000.0 + 48)  # a float mask as others write it: a bias like any other
    yield make("bias -29952", *qkv(rng), bias=finite)


def lengths(rng: np.random.Generator) -> Iterator[Case]:
    make = partial(attend, group="lengths", rng=rng)
    for name, lens in (("batch", [3, 5]), ("beyond m", [9, 2]), ("of 0", [0, 4]), ("of all 0", [0, 0]), ("of 1", [1, 1])):
        group = "empty rows" if "0" in name else "lengths"
        yield make(f"valid_lens {name}", *qkv(rng), grad=name in ("batch", "of 0"), valid_lens=np.array(lens), group=group)
    per_query = np.array([[1, 2, 0, 5], [7, 0, 3, 4]])
    yield make("valid_lens (b, n)", *qkv(rng), valid_lens=per_query)
    yield make("valid_lens (b, n), 3 axes", *qkv(rng, lead=(2,)), valid_lens=per_query)
    yield make("valid_lens (b,), 3 axes", *qkv(rng, lead=(2,)), grad=False, valid_lens=np.array([2, 4]))
    yield make("valid_lens (b,), 5 axes", *qkv(rng, lead=(2, 2, 2), n=2, m=3), grad=False, valid_lens=np.array([2, 1]))
    yield make("valid_lens ()", *qkv(rng, lead=()), grad=False, valid_lens=np.array(3))
    yield make("valid_lens (n,)", *qkv(rng, lead=()), valid_lens=np.array([0, 2, 3, 9]))
    yield make("valid_lens n = batch", *qkv(rng, n=2, m=3), grad=False, valid_lens=np.array([1, 2]))


def unsigned(rng: np.random.Generator) -> Iterator[Case]:
    """Lengths, offsets and positions of unsigned dtypes, whose differences would wrap."""
    make = partial(attend, group="unsigned integers", rng=rng)
    for name, far in (("uint8", 255), ("uint16", 2**16 - 1), ("uint32", 2**32 - 1), ("uint64", 2**40)):
        lens, offset = np.array([[2, 0, far, 5], [1, 3, 4, far]], name), np.array([0, 2], name)
        yield make(f"{name} lengths and offsets", *qkv(rng), valid_lens=lens, query_offset=offset, window=(1, 0))
        chosen, offset = np.array([[3, 0, 3]], name), np.array([1, far], name)
        yield make(f"{name} positions and offsets", *qkv(rng), grad=False, positions=chosen, query_offset=offset, causal=True)


def causal(rng: np.random.Generator) -> Iterator[Case]:
    make = partial(attend, group="causal", rng=rng)
    sizes = ((4, 5, 0), (4, 5, 1), (4, 5, -1), (4, 5, -9), (4, 5, 9), (5, 3, 0), (3, 5, 2), (1, 5, 4), (4, 4, 0), (4, 4, 1))
    for n, m, offset in sizes:
        group = "empty rows" if offset < 0 else "causal"
        name, grad = f"causal {n} x {m}, offset {offset}", n == 4
        yield make(name, *qkv(rng, n=n, m=m), group=group, grad=grad, causal=True, query_offset=offset)
    per_batch = np.array([2, -1])
    yield make("causal, offset per batch", *qkv(rng), causal=True, query_offset=per_batch)
    yield make("causal, offset ()", *qkv(rng), grad=False, causal=True, query_offset=np.array(1))
    yield make("causal, 2 axes", *qkv(rng, lead=()), causal=True, query_offset=1)
    yield make("causal, 3 axes", *qkv(rng, lead=(2,)), causal=True, query_offset=per_batch)
    yield make("offset without causal", *qkv(rng), grad=False, query_offset=3)
    yield make("causal and lengths", *qkv(rng), causal=True, valid_lens=np.array([2, 9]))
    yield make("causal, mask and bias", *qkv(rng), causal=True, mask=flags(rng, 2, 1, 1, 5), bias=grid(rng, 4, 5))


def windows(rng: np.random.Generator) -> Iterator[Case]:
    make = partial(attend, group="window", rng=rng)
    for window in (1, 0, 9, (1, 0), (0, 2), (1, None), (None, 1), (None, None)):
        yield make(f"window {window}", *qkv(rng), grad=window in (1, (0, 2)), window=window)
    yield make("window, offset 2", *qkv(rng), grad=False, window=1, query_offset=2)
    yield make("window, offset -3", *qkv(rng), window=(1, 2), query_offset=-3)
    yield make("window and causal", *qkv(rng), window=2, causal=True)
    yield make("window (1, None) and causal", *qkv(rng), window=(1, None), causal=True, query_offset=1)
    yield make("window, offset per batch", *qkv(rng), window=1, query_offset=np.array([0, 3]))


def dropout(rng: np.random.Generator) -> Iterator[Case]:
    """Weights that are dropped by the pattern of an int rng, whatever else the call asks for."""
    make = partial(attend, group="dropout", rng=rng)
    yield make("dropout", *qkv(rng), dropout=0.5, seed=7)
    yield make("dropout of 0.1, the largest seed", *qkv(rng, n=3, m=9), dropout=0.1, seed=2**64 - 1, asked=())
    yield make("dropout of 0.3, a seed beyond 63 bits", *qkv(rng, n=3, m=6), dropout=0.3, seed=2**63 + 5, asked=LSE)
    yield make("dropout, no batch", *qkv(rng, lead=(), m=7), dropout=0.25, seed=0, asked=())
    yield make("dropout, 3 axes", *qkv(rng, lead=(3,)), dropout=0.5, seed=1)
    yield make("dropout, 6 axes", *qkv(rng, lead=(2, 1, 3, 2), kv=(1, 2, 1, 2), n=2, m=3), dropout=0.5, seed=2, asked=())
    yield make("dropout, grouped heads", *qkv(rng, lead=(2, 4), kv=(2, 2)), dropout=0.5, seed=3, causal=True)
    yield make("dropout of nearly all", *qkv(rng), dropout=1 - 2.0**-30, seed=4, asked=())
    yield make("dropout of less than 2^-17, none", *qkv(rng), dropout=2.0**-18, seed=5, asked=(), grad=False)
    for nothing, sizes in (("queries", {"n": 0}), ("keys", {"m": 0}), ("entries", {"lead": (0, 2)})):
        yield make(f"dropout, no {nothing}", *qkv(rng, **sizes), dropout=0.5, seed=6, asked=(), group="empty rows")
    forms: dict[str, dict[str, Any]] = {
        "a mask with empty rows": {"mask": flags(rng, 2, 2, 4, 5) & np.array([[True], [False], [True], [True]])},
        "a bias": {"bias": np.where(flags(rng, 4, 5), grid(rng, 2, 1, 4, 5), -INF)},
        "lengths and offsets": {"valid_lens": np.array([0, 4]), "causal": True, "query_offset": np.array([1, 3])},
        "positions": {"positions": np.array([[0, 3], [3, -1], [-1, -1], [2, 2]]), "bias": grid(rng, 2, 1, 4, 5)},
        "a sink": {"sink": grid(rng, 2)},
        "softcap, a score with parameters": {"softcap": 1.0, "score": next(parametrised(rng, 3, 3))},
        "functions of positions": {"mask": "prefix", "bias": ("alibi", {"slopes": np.array([0.5, 0.25])[:, None, None]})},
        "segments": {"segments": (np.array([[0, 0, 1, 1], [2, 3, 3, 3]]), np.array([[0, 0, 1, 1, 4], [2, 2, 2, 3, 3]]))},
        "average": {"normalize": "average", "asked": WEIGHTS},
        "sparsemax of distances": {"normalize": "sparsemax", "score": "distance_score", "asked": (), "grad": False},
    }
    for name, which in forms.items():
        yield make(f"dropout, {name}", *qkv(rng), dropout=0.4, seed=11, **which)
    n, m = 264, 560  # in blocks, which begin in the midst of the bits of four pairs
    q, k, v = qkv(rng, n=n, m=m, d=2, v=1, lead=())
    each: dict[str, Any] = {"dropout": 0.5, "seed": 12, "asked": ()}
    yield make("dropout in blocks", q, k, v, window=3, query_offset=2, **each)
    apart = np.repeat([0, 1, 2], [70, 90, 104]), np.repeat([0, 1, 2], [190, 181, 189])
    yield make("dropout in blocks of segments", q, k, v, segments=apart, causal=True, query_offset=200, **each)
    yield make("dropout in blocks of another score", q, k, v, score="distance_score", window=(2, 5), query_offset=297, **each)


def caps(rng: np.random.Generator) -> Iterator[Case]:
    make = partial(attend, group="softcap", rng=rng)
    mask, bias = flags(rng, 4, 5), grid(rng, 2, 1, 4, 5, top=4)
    yield make("softcap", *qkv(rng), softcap=2.0)
    yield make("softcap, scale", *qkv(rng), softcap=1.5, scale=2.0)
    yield make("softcap, bias", *qkv(rng), softcap=1.0, bias=bias)
    yield make("softcap, mask", *qkv(rng), softcap=0.5, mask=mask)
    yield make("softcap, mask, bias, scale", *qkv(rng), softcap=1.0, mask=mask, bias=bias, scale=0.5)
    yield make("softcap of another score", *qkv(rng), softcap=1.0, score="distance_score")


def sinks(rng: np.random.Generator) -> Iterator[Case]:
    """A logit in every row that has no value; and what else may take part in a row's sum, or be all of it."""
    make = partial(attend, group="sink", rng=rng)
    yield make("sink ()", *qkv(rng), sink=np.array(0.5))
    for shape in ((2,), (2, 1), (2, 2, 4, 1)):
        yield make(f"sink {shape}", *qkv(rng), sink=grid(rng, *shape), asked=LSE if len(shape) == 1 else ())
    yield make("sink 0, softmax off by one", *qkv(rng), grad=False, sink=0.0)
    yield make("sink 1, an int, with weights", *qkv(rng), grad=False, sink=1, asked=WEIGHTS)
    yield make("sink -inf, none", *qkv(rng), sink=np.array([-INF, 0.5]))
    yield make("sink, 2 axes, for each query", *qkv(rng, lead=()), sink=grid(rng, 4, 1), mask=flags(rng, 4, 5), asked=())
    yield make("sink, 7 axes", *qkv(rng, lead=(2, 1, 2, 1, 2), kv=(1, 2, 1, 2, 1), n=2, m=3), sink=grid(rng, 2, 1, 2))
    yield make("sink, grouped heads", *qkv(rng, lead=(2, 4), kv=(2, 2)), sink=grid(rng, 4), causal=True)
    yield make("sink beside scores of 3000", *qkv(rng), scale=1024.0, sink=np.array([512.0, -512.0]))
    yield make("sink, no keys", *qkv(rng, m=0), sink=grid(rng, 2), group="empty rows")
    yield make("sink -inf, no keys", *qkv(rng, m=0), sink=np.array(-INF), group="empty rows", asked=LSE)
    yield make("sink, no queries", *qkv(rng, n=0), sink=grid(rng, 2))
    yield make("sink, no entries", *qkv(rng, lead=(0, 2)), sink=grid(rng, 2), asked=())
    empty = flags(rng, 2, 2, 4, 5) & np.array([[True], [False], [True], [True]])
    offsets: dict[str, Any] = {"causal": True, "query_offset": np.array([1, -2])}
    forms: dict[str, dict[str, Any]] = {
        "a mask with empty rows": {"mask": empty},
        "a bias": {"bias": np.where(flags(rng, 4, 5), grid(rng, 2, 1, 4, 5), -INF)},
        "softcap, scale, lengths and offsets": {"softcap": 1.0, "scale": 2.0, "valid_lens": np.array([0, 3]), **offsets},
        "positions": {"positions": np.array([[0, 3], [3, -1], [-1, -1], [2, 2]])},
        "a score with parameters": {"score": next(parametrised(rng, 3, 3)), "causal": True},
    }
    for name, which in forms.items():
        yield make(f"sink, {name}", *qkv(rng), sink=grid(rng, 2), **which)
    each: dict[str, Any] = {"positions": np.array([[0, 3, 3]]), "sink": grid(rng, 2, 1, 4, 1), "causal": True}
    yield make("sink of each query, positions", *qkv(rng), **each, asked=())
    q, k, v = poisoned(rng, *qkv(rng, n=3, m=6), valid_lens=np.array([3, 0]))
    yield make("sink, NaN behind lengths", q, k, v, valid_lens=np.array([3, 0]), sink=grid(rng, 2), asked=())
    # long enough for tiles and for blocks
    q, k, v = qkv(rng, n=264, m=560, d=2, v=1, lead=())
    yield make("sink, blocks", q, k, v, window=3, sink=np.array(-0.5), asked=())
    yield make("sink of each query, blocks", q, k, v, window=3, sink=grid(rng, 264, 1), score="distance_score", asked=LSE)
    loss_rows = np.zeros(300, bool)
    loss_rows[[0, 130, 299]] = True
    q, k, v = qkv(rng, n=300, m=600, d=2, lead=(2,), kv=(1,))
    yield make("sink, causal, many pairs", q, k, v, causal=True, sink=grid(rng, 2), asked=(), grad=loss_rows)


def scores_out(rng: np.random.Generator) -> Iterator[Case]:
    """The scores beside the output, at each stage: -inf for a pair that may not attend."""
    make = partial(attend, group="scores out", rng=rng)
    bias = np.where(flags(rng, 4, 5), grid(rng, 2, 1, 4, 5), -INF)
    for stage in ("raw", "capped", "biased"):
        which: dict[str, Any] = {"softcap": 1.5, "scale": 0.75, "return_scores": stage}
        yield make(f"{stage} scores", *qkv(rng), return_scores=stage, asked=(), grad=False)
        yield make(f"{stage} scores, softcap, bias, mask", *qkv(rng), bias=bias, mask=flags(rng, 4, 5), **which)
        chosen = np.array([[0, 3, 3], [3, -1, 1], [-1, -1, -1], [2, 4, 0]])
        yield make(f"{stage} scores, positions", *qkv(rng), positions=chosen, causal=True, bias=bias, **which)
        q, k, v = qkv(rng, lead=(2, 4), kv=(2, 2))
        additive = next(parametrised(rng, 3, 3))
        lens = np.array([[1, 2, 3, 0], [4, 5, 0, 1]])
        yield make(f"{stage} scores, grouped heads, additive", q, k, v, score=additive, valid_lens=lens, return_scores=stage)
        q, k, v = poisoned(rng, *qkv(rng, n=3, m=6), valid_lens=np.array([3, 0]))
        yield make(f"{stage} scores, NaN behind lengths", q, k, v, valid_lens=np.array([3, 0]), return_scores=stage, asked=())
    offsets: dict[str, Any] = {"window": (1, None), "causal": True, "query_offset": np.array([1, -2])}
    yield make("scores beside a sink, a window, offsets", *qkv(rng), sink=grid(rng, 2), **offsets, return_scores="biased")
    sparse: dict[str, Any] = {"normalize": "average", "score": "distance_score", "return_scores": "raw"}
    yield make("scores of another normaliser", *qkv(rng), **sparse, mask=flags(rng, 4, 5), asked=WEIGHTS)
    yield make("scores, 2 axes", *qkv(rng, lead=()), causal=True, return_scores="raw", asked=LSE)
    many: dict[str, Any] = {"n": 2, "m": 3, "lead": (2, 1, 2, 1, 2), "kv": (1, 2, 1, 2, 1)}
    seven: dict[str, Any] = {"bias": grid(rng, 1, 2, 2, 1, 2, 2, 3), "mask": flags(rng, 2, 1, 1, 2, 1, 1, 3)}
    yield make("scores, 7 axes", *qkv(rng, **many), **seven, return_scores="capped", asked=())
    yield make("scores, no keys", *qkv(rng, m=0), return_scores="raw", asked=(), group="empty rows")
    yield make("scores, no keys, positions", *qkv(rng, m=0), positions=np.array([[-1, -1]]), return_scores="raw", asked=())
    yield make("scores, no queries", *qkv(rng, n=0), return_scores="biased")
    yield make("scores, no entries", *qkv(rng, lead=(0, 2)), return_scores="biased", asked=())
    yield make("scores, no features", *qkv(rng, d=0), causal=True, return_scores="raw", asked=())
    # long enough for tiles and for blocks
    q, k, v = qkv(rng, n=264, m=560, d=2, v=1, lead=())
    yield make("scores, blocks", q, k, v, window=3, return_scores="biased", asked=LSE, grad=False)
    inputs, lens = [grid(rng, 2, rows, 3) for rows in (3, 4, 4)], np.array([4, 2])
    params = multihead.params_of(rng, 4, 2)
    options: dict[str, Any] = {"heads": 4, "kv_heads": 2, "valid_lens": lens, "softcap": 2.0, "return_scores": "capped"}
    yield multihead.multi_head("heads: scores", inputs, params, rng, asked=WEIGHTS + LSE, group="scores out", **options)


# ---- shapes


def groups(rng: np.random.Generator) -> Iterator[Case]:
    make = partial(attend, group="grouped heads", rng=rng)
    heads = (("2 of 4", (2, 4), (2, 2)), ("1 of 4", (2, 4), (2, 1)), ("3 of 6", (1, 6), (1, 3)), ("3 axes", (4,), (2,)))
    for name, lead, kv in heads:
        yield make(f"grouped heads {name}", *qkv(rng, lead=lead, kv=kv, n=3), grad=name[0] != "3")
    q, k, v = qkv(rng, lead=(2, 4), kv=(2, 2))
    yield make("grouped heads, mask per head", q, k, v, mask=flags(rng, 1, 4, 4, 5))
    yield make("grouped heads, bias per head", q, k, v, bias=grid(rng, 4, 4, 5))
    yield make("grouped heads, lengths", q, k, v, valid_lens=np.array([[1, 2, 3, 0], [4, 5, 0, 1]]))
    yield make("grouped heads, causal", q, k, v, causal=True, query_offset=np.array([0, 2]))
    additive = ("additive_score", {"W_q": grid(rng, 3, 2), "W_k": grid(rng, 3, 2), "w_v": grid(rng, 2), "b": grid(rng, 2)})
    yield make("grouped heads, additive", q, k, v, score=additive, softcap=1.0)


def shapes(rng: np.random.Generator) -> Iterator[Case]:
    make = partial(attend, group="shapes", rng=rng)
    yield make("no batch axis", *qkv(rng, lead=()))
    yield make("3 axes", *qkv(rng, lead=(3,)), grad=False)
    yield make("5 axes", *qkv(rng, lead=(2, 2, 2), n=2, m=3))
    yield make("one key", *qkv(rng, m=1))
    yield make("one query", *qkv(rng, n=1), grad=False)
    yield make("one of each", *qkv(rng, n=1, m=1, d=1, v=1, lead=()), grad=False)
    yield make("v > d", *qkv(rng, d=2, v=5), grad=False)
    yield make("keys shared by the batch", *qkv(rng, lead=(2, 2), kv=(1, 2)))
    yield make("no keys", *qkv(rng, m=0), group="empty rows")
    yield make("no keys, 2 axes", *qkv(rng, m=0, lead=()), group="empty rows")
    yield make("no keys, causal and lengths", *qkv(rng, m=0), causal=True, valid_lens=np.array([0, 3]), group="empty rows")
    yield make("no keys, NaN queries", np.full((2, 2, 4, 3), NAN), *qkv(rng, m=0)[1:], group="empty rows")
    # Scores of no features are 0: the output is the mean over the keys that may be attended to.
    yield make("no features", *qkv(rng, d=0))
    yield make("no features, causal and lengths", *qkv(rng, d=0), causal=True, valid_lens=np.array([0, 3]))
    yield make("no features, grouped heads, bias", *qkv(rng, d=0, lead=(2, 4), kv=(2, 2)), bias=grid(rng, 4, 1, 5))
    yield make("no features, positions", *qkv(rng, d=0), positions=np.array([[0, 3, 3]]))
    yield make("no features, cosine_score", *qkv(rng, d=0), score="cosine_score", mask=flags(rng, 4, 5))
    yield make("no queries", *qkv(rng, n=0))
    yield make("no entries", *qkv(rng, lead=(0, 2)), bias=grid(rng, 4, 5))
    # Inputs that are in no pair reach no gradient, with any score and by any parameter.
    for score in (*parametrised(rng, 3, 3), "scaled_dot_score", "cosine_score", "distance_score", "triangular_kernel"):
        name = score if isinstance(score, str) else score[0]
        _, k, v = qkv(rng, m=0)
        nan = np.full((2, 2, 4, 1), NAN)
        yield make(f"no keys, NaN queries and bias, {name}", nan + np.zeros(3), k, v, bias=nan, score=score, group="empty rows")
        q, k, v = qkv(rng, n=0)
        yield make(f"no queries, NaN keys, {name}", q, k * NAN, v * NAN, score=score, group="empty rows")
    shared, k, v = qkv(rng, lead=(0, 2), kv=(1, 2))
    additive, mask = next(parametrised(rng, 3, 3)), flags(rng, 4, 5)
    yield make("no entries, shared NaN keys", shared, k * NAN, v * NAN, score=additive, mask=mask, group="empty rows")


def many_axes(rng: np.random.Generator) -> Iterator[Case]:
    """Frameworks broadcast, slice and normalise arrays of a few axes only; each of these axes may be shared."""
    make = partial(attend, group="many axes", rng=rng)
    additive, _, gated = parametrised(rng, 3, 3)
    sizes: dict[str, Any] = {"n": 2, "m": 3}
    lead, kv = (2, 1, 2, 1, 2), (1, 2, 1, 2, 1)
    chosen, lens = np.array([[0, 2], [1, -1]]), np.array([1, 3])
    yield make("5 axes, mask and positions", *qkv(rng, lead=(2, 1, 2), **sizes), mask=flags(rng, 2, 3), positions=chosen)
    yield make("6 axes", *qkv(rng, lead=(1, 2, 1, 2), **sizes), asked=())
    mask, bias = flags(rng, 2, 1, 2, 1, 2, 3), grid(rng, 2, 1, 2, 1, 3)
    yield make("6 axes, mask and bias", *qkv(rng, lead=(2, 2, 2, 2), **sizes), mask=mask, bias=bias)
    yield make(
        "6 axes, lengths and offset", *qkv(rng, lead=(2, 2, 1, 2), **sizes), valid_lens=lens, causal=True, query_offset=lens
    )
    yield make("7 axes, each shared", *qkv(rng, lead=lead, kv=kv, **sizes), valid_lens=lens, window=1)
    scores: tuple[tuple[str, Any], ...] = (("distance_score",) * 2, ("additive_score", additive), ("gated_score", gated))
    for name, score in scores:
        for given, keys in (((2, 1, 2), (1, 2, 2)), (lead, kv)):
            axes = f"{len(given) + 2} axes, {name}"
            yield make(f"{axes}, shared", *qkv(rng, lead=given, kv=keys, **sizes), score=score)
            q, k, _ = qkv(rng, lead=given, kv=(*keys[:-1], given[-1]), **sizes)
            yield pooling.pair_scores(f"{axes}, itself", q, k, name, {} if score == name else score[1])
    yield make("7 axes, positions", *qkv(rng, lead=lead, kv=kv, **sizes), score=additive, positions=chosen, asked=())
    yield make("5 axes, sparsemax", *qkv(rng, lead=(1, 2, 2), kv=(2, 1, 2), **sizes), normalize="sparsemax", asked=WEIGHTS)


# ---- numbers


def large(rng: np.random.Generator) -> Iterator[Case]:
    make = partial(attend, group="large scores", rng=rng)
    q, k, v = qkv(rng)
    yield make("scores of 3000", q, k, v, scale=1024.0)
    yield make("scores of -3000", np.abs(q) + 1, -np.abs(k) - 1, v, scale=256.0)
    yield make("large bias", q, k, v, bias=512.0 + 4 * rng.integers(-3, 4, (4, 5)))
    yield make("rows far below each other", q, k, v, bias=np.array([[0.0], [-48], [-96], [-92]]))
    # products of 65536 and more, which cancel or do not; grids of multiples of 8 up to 256
    far = [8.0 * rng.integers(-32, 33, shape) for shape in ((2, 2, 4, 8), (2, 2, 5, 8))]
    yield make("q.k of 1e5, scale", far[0], far[1], v, scale=2.0**-12, group="half precision")
    yield make("q.k of 1e5", far[0], far[1], v, group="half precision")
    signs = np.array([1.0, 1, 1, 1, -1, -1, -1, -1])
    ones = 256.0 * np.ones((2, 2, 4, 8))
    near = 256.0 * signs + np.where(np.arange(8) < 4, 2.0, -2.0) * rng.integers(0, 2, (2, 2, 5, 8))
    yield make("q.k that overflows on the way", ones, near, v, scale=2.0**-9, group="half precision")
    high = np.concatenate([np.full((2, 2, 4, 1), 128.0), grid(rng, 2, 2, 4, 2)], axis=-1)
    keys = np.concatenate([np.full((2, 2, 5, 1), 128.0), grid(rng, 2, 2, 5, 2)], axis=-1)
    yield make("small differences of large scores", high, keys, v, group="half precision", scale=1.0)
    yield make("scores of 100", 4 * q, 4 * k, v, scale=1.5, group="half precision")
    yield make("large values", q, k, 8.0 * rng.integers(-32, 33, (2, 2, 5, 2)), grad=False, group="half precision")


def padding(rng: np.random.Generator) -> Iterator[Case]:
    make = partial(attend, group="padding", rng=rng)
    q, k, v = qkv(rng, n=3, m=6)
    per_query = np.array([[1, 2, 0], [4, 3, 0]])
    mask = np.array([True, False, True, True, False, True])
    forms: dict[str, dict[str, Any]] = {
        "lengths": {"valid_lens": np.array([3, 0])},
        "lengths (b, n)": {"valid_lens": per_query},
        "a mask (m,)": {"mask": mask},
        "a mask (n, 1)": {"mask": np.array([[True], [False], [True]])},
        "a mask (b, 1, 1, m)": {"mask": np.stack([mask, ~mask])[:, None, None, :]},
        "a full mask": {"mask": flags(rng, 2, 2, 3, 6) & mask},
        "causal": {"causal": True},
        "causal, offset per batch": {"causal": True, "query_offset": np.array([1, -2])},
        "a window": {"window": (1, 0), "query_offset": 1},
        "-inf in the bias": {"bias": np.array([0.5, -INF, 0.0, -INF, 1.0, -0.5])},
        "a mask, under a bias": {"mask": mask & flags(rng, 3, 6), "bias": grid(rng, 3, 6)},
        "lengths, under a bias": {"valid_lens": np.array([2, 4]), "bias": grid(rng, 2, 1, 3, 6)},
        "lengths, softcap": {"valid_lens": np.array([2, 4]), "softcap": 1.0},
        "positions": {"positions": np.array([[0, 3], [3, -1], [-1, -1]])},
    }
    for name, which in forms.items():
        bad_q, bad_k, bad_v, *rest = poisoned(rng, q, k, v, **which)
        options = {**which, "bias": rest[0]} if rest else which
        yield make(f"NaN behind {name}", bad_q, bad_k, bad_v, **options)
    lens: dict[str, Any] = {"valid_lens": np.array([3, 2])}
    q, k, v = poisoned(rng, q, k, v, **lens)
    for name in ("dot_score", "cosine_score", "distance_score", "gaussian_kernel"):
        yield make(f"NaN behind lengths, {name}", q, k, v, score=name, **lens)
    for name, parameters in parametrised(rng, 3, 3):
        yield make(f"NaN behind lengths, {name}", q, k, v, score=(name, parameters), **lens)
    for name in ("sparsemax", "hardmax", "average", "identity"):
        yield make(f"NaN behind lengths, {name}", q, k, v, normalize=name, grad=name != "sparsemax", **lens, asked=WEIGHTS)
    q, k, v = qkv(rng, n=3, m=6, lead=(2, 4), kv=(2, 2))
    which = {"mask": flags(rng, 2, 4, 3, 6) & mask}
    which["mask"][0, 1] = False
    yield make("NaN behind a mask, grouped heads", *poisoned(rng, q, k, v, **which), **which)
    q, k, v = qkv(rng, n=3, m=6, lead=())
    which = {"mask": flags(rng, 3, 6) & mask, "causal": True, "query_offset": 2}
    yield make("NaN behind a mask, 2 axes", *poisoned(rng, q, k, v, **which), **which)
    hidden = grid(rng, 2, 5)
    where = np.array([[True, False, True, True, False], [False] * 5])
    hidden[~where] = NAN
    yield pooling.normal("NaN behind where, softmax", "padding", "softmax", hidden, where=where)


# ---- selected keys


def positions(rng: np.random.Generator) -> Iterator[Case]:
    make = partial(attend, group="positions", rng=rng)
    q, k, v = qkv(rng)
    chosen = np.array([[0, 2, 4], [4, 1, 0], [3, -1, 2], [1, 0, 3]])
    repeated = np.array([[2, 2, 4], [4, 1, 4], [0, -1, 0], [3, 3, 3]])
    none = np.array([[-1, -1, -1], [1, -1, 0], [-1, 2, -1], [-1, -1, 3]])
    forms: dict[str, dict[str, Any]] = {
        "positions": {"positions": chosen},
        "positions, one key each": {"positions": chosen[:, :1]},
        "positions for all": {"positions": np.array([[3, 0]])},
        "positions per head": {"positions": rng.permuted(np.tile(np.arange(5), (2, 2, 4, 1)), axis=-1)[..., :3]},
        "positions of -1": {"positions": none},
        "positions twice": {"positions": repeated},
        "positions, causal": {"positions": chosen, "causal": True, "query_offset": np.array([1, -1])},
        "positions, window": {"positions": chosen, "window": 1},
        "positions, lengths": {"positions": chosen, "valid_lens": np.array([[3, 5, 1, 0], [2, 2, 2, 2]])},
        "positions, mask and bias": {"positions": repeated, "mask": flags(rng, 2, 1, 4, 5), "bias": grid(rng, 4, 5)},
        "positions, softcap and scale": {"positions": chosen, "softcap": 1.0, "scale": 0.75},
        "positions, bias -inf": {"positions": chosen, "bias": np.array([-INF, 0.5, 1.0, -INF, -1.0])},
        "positions, additive": {"positions": none, "score": next(parametrised(rng, 3, 3))},
    }
    for name, which in forms.items():
        yield make(name, q, k, v, **which)
    q, k, v = qkv(rng, lead=(2, 4), kv=(2, 2))
    yield make("positions, grouped heads", q, k, v, positions=chosen)
    yield make("positions, 2 axes", *qkv(rng, lead=()), positions=chosen)
    yield make("positions of no keys", *qkv(rng, m=0), positions=np.full((4, 2), -1))
    yield make("no positions of no values", *qkv(rng, v=0), positions=np.zeros((4, 0), int))
    yield make("positions of no queries, no values", *qkv(rng, n=0, v=0), positions=chosen[:0])
    # every axis of positions and of the bias may be shared, and every axis may be empty
    each_head, each_entry = np.array([[[0, 3, 0]], [[4, -1, 2]]]), np.array([3, 1])[:, None, None, None]
    yield make("positions for all, bias (n, m)", *qkv(rng), positions=np.array([[0, 1]]), bias=grid(rng, 4, 5))
    yield make("positions per head, bias (b, 1, n, 1)", *qkv(rng), positions=each_head, bias=grid(rng, 2, 1, 4, 1))
    q, k, v = qkv(rng, lead=(2, 4), kv=(1, 2))
    yield make("positions per entry, bias per head, shared keys", q, k, v, positions=each_entry, bias=grid(rng, 4, 1, 5))
    parameters = [*parametrised(rng, 3, 3)]
    empty: dict[str, tuple[dict[str, Any], Any]] = {
        "no position": ({}, np.zeros((1, 0), int)),
        "no queries": ({"n": 0}, np.array([[0, 1]])),
        "no keys": ({"m": 0}, np.array([[-1, -1]])),
        "no entries": ({"lead": (0, 2)}, np.array([[0, 1]])),
    }
    for (name, (sizes, chosen)), score in zip(empty.items(), [*parameters, "scaled_dot_score"], strict=True):
        q, k, v = qkv(rng, **sizes)
        bias = grid(rng, 1, 2, 1, k.shape[-2])
        yield make(f"positions, {name}", q, k, v, positions=chosen, bias=bias, score=score, group="empty rows")


# ---- combinations


def merging(rng: np.random.Generator) -> Iterator[Case]:
    make = partial(attend, group="merging", rng=rng)
    for parts, shape in ((1, (2, 3)), (2, (2, 2, 3)), (4, (3,))):
        outputs, lses = grid(rng, parts, *shape, 2), grid(rng, parts, *shape, top=4)
        yield merged(f"merge {parts} of {len(shape)} axes", outputs, lses)
    outputs, lses = grid(rng, 3, 2, 4, 2), grid(rng, 3, 2, 4)
    lses[0, 0], lses[:, 1, 2], lses[1:, 1, 0] = -INF, -INF, -INF
    outputs[lses == -INF] = 0
    yield merged("merge with empty parts", outputs, lses)
    for nothing, sizes in (("queries", (2, 0, 2)), ("entries", (0, 2, 3, 2)), ("features", (2, 3, 0))):
        yield merged(f"merge of no {nothing}", grid(rng, 2, *sizes), grid(rng, 2, *sizes[:-1]))
    yield merged("merge of large lse", grid(rng, 2, 4, 2), 1024.0 + grid(rng, 2, 4, top=64))
    yield merged("merge of 1e5", grid(rng, 2, 4, 2), 131072.0 * np.array([[1, -1, 0, 1], [1, -1, 1, -1]]))
    cuts = (("two parts", [2]), ("three parts", [2, 4]), ("an empty part", [0, 3, 3]), ("single keys", [1, 2, 3, 4]))
    for name, splits in cuts:
        case = make(f"attention over {name}", *qkv(rng), grad=False, splits=splits, asked=LSE)
        yield replace(case, call="split_attention")
    grouped = qkv(rng, lead=(2, 4), kv=(2, 2))
    case = make("attention over grouped parts", *grouped, grad=False, splits=[3], asked=LSE)
    yield replace(case, call="split_attention")


def lone(rng: np.random.Generator) -> Iterator[Case]:
    """A key that only one of several queries or heads may attend to, rows of one key, and empty parts of a merge: where code
    that takes `any` for `all`, or the first for the last, gives another answer."""
    make = partial(attend, group="padding", rng=rng)
    first = np.array([True, False, False, True, False, False])
    each = np.stack([first, ~first])
    forms: dict[str, dict[str, Any]] = {
        "lengths": {"valid_lens": np.array([2, 5])},
        "a mask of entries": {"mask": each[:, None, None, :]},
        "a mask of heads": {"mask": each[:, None, :]},
        "a mask of queries": {"mask": np.stack([first, ~first, np.zeros(6, bool)])},
        "offsets": {"query_offset": np.array([0, 3]), "window": (1, 0)},
    }
    for name, which in forms.items():
        for of, lead, kv in (("keys", (2, 2), (1, 2)), ("queries", (1, 2), (2, 2)), ("keys of heads", (2, 2), (2, 1))):
            q, k, v = poisoned(rng, *qkv(rng, n=3, m=6, lead=lead, kv=kv), **which)
            yield make(f"shared {of} seen by some, {name}", q, k, v, **which)
    one_key = np.eye(5, dtype=bool)[[4, 0, 2]]
    for name in pooling.NORMALISERS:
        if name != "masked_softmax":
            s = np.abs(grid(rng, 2, 3, 5, top=1)) + 0.5
            yield pooling.normal(f"{name} of one key", "normalisers", name, s[..., :1])
            yield pooling.normal(f"{name} where one key is allowed", "normalisers", name, s, where=one_key)
    make = partial(make, group="pooling", normalize="average", asked=WEIGHTS)
    yield make("average of one key each", *qkv(rng, n=3), mask=one_key)
    yield make("average of causal keys", *qkv(rng, n=3), causal=True)
    yield make("average of keys that a bias allows", *qkv(rng), bias=np.array([0.5, -INF, 0.0, -1.0, -INF]))
    make = partial(attend, group="positions", rng=rng)  # two of each, since every other case is run without weights
    for name, chosen in (("thrice", [[3, 3, 3, 1]]), ("twice, apart", [[0, 4, 2, 0, 4]])):
        yield make(f"positions {name}", *qkv(rng), positions=np.array(chosen))
    outputs, lses = grid(rng, 3, 2, 4, 2), grid(rng, 3, 2, 4)
    lses[0, 0], lses[1:, 1, 0] = -INF, -INF
    outputs[lses == -INF] = NAN
    yield merged("merge with NaN in empty parts", outputs, lses)


def blocks(rng: np.random.Generator) -> Iterator[Case]:
    """Enough queries that a window is computed in blocks."""
    make = partial(attend, group="blocks", rng=rng)
    n, m = 264, 560
    q, k, v = qkv(rng, n=n, m=m, d=2, v=1, lead=())
    yield make("blocks", q, k, v, window=3, asked=LSE)
    yield make("blocks, causal, offset", q, k, v, window=(2, 5), causal=True, query_offset=297, grad=False, asked=LSE)
    # a kernel may serve dot products whole, where other scores go in blocks
    offset: dict[str, Any] = {"window": (2, 5), "causal": True, "query_offset": 297}
    yield make("blocks of another score", q, k, v, score="distance_score", **offset, asked=())
    lens = np.array(200, "uint8")  # so that the last block has no key within the length
    yield make("blocks, uint8 lengths", q, k, v, score="distance_score", window=3, valid_lens=lens, asked=())
    mask, bias = flags(rng, n, m), grid(rng, m)
    which: dict[str, Any] = {"mask": mask, "window": 2, "query_offset": -2, "valid_lens": np.array(258)}
    q, k, v, bias = poisoned(rng, q, k, v, bias=bias, **which)
    yield make("blocks, everything", q, k, v, bias=bias, **which, softcap=2.0, asked=())
    q, k, v = qkv(rng, n=n, m=300, d=2, v=1, lead=(6,), kv=(2,))
    yield make("blocks, grouped heads", q, k, v, window=3, asked=())


def covariance(rng: np.random.Generator) -> Iterator[Case]:
    """With score q.k and values = keys, the gradient of output c by the query is row c of the keys' covariance."""
    query, key = grid(rng, 2, 4, 3), grid(rng, 2, 5, 3)
    for c in range(3):
        chosen = np.broadcast_to(np.eye(3)[c], (2, 4, 3)).copy()
        by_oracle = oracle.attention(query, key, key, chosen, score="dot_score")
        answer = np.empty(query.shape)
        for b, i in np.ndindex(2, 4):
            p = oracle.softmax(key[b] @ query[b, i])
            mean = p @ key[b]
            answer[b, i] = sum(p[j] * (key[b, j, c] - mean[c]) * (key[b, j] - mean) for j in range(5))
        arguments = {"query": query, "key": key, "value": key, "grad_output": chosen}
        answers = {"output": by_oracle.values["output"], "grad_query": answer}
        yield Case(f"covariance of the keys, feature {c}", "identities", "attention", arguments, {"score": "dot_score"},
                   answers, by_oracle.magnitude, by_oracle.largest_score)  # fmt: skip


def combinations(rng: np.random.Generator, count: int = 24) -> Iterator[Case]:
    """Options drawn together; half of the time there is NaN in what nothing may attend to."""
    make = partial(attend, group="combinations", rng=rng)
    for number in range(count):
        b, h, g = (int(rng.integers(1, 3)) for _ in range(3))
        lead, kv = [((), ()), ((b,), (b,)), ((b, h * g), (b, h)), ((b, h * g), (b, h))][rng.integers(4)]
        n, m, d, v = (int(rng.integers(1, top)) for top in (5, 7, 5, 4))
        full = (*lead, n, m)
        options: dict[str, Any] = {}

        def sometimes(share: float = 0.35) -> bool:
            return rng.random() < share

        def broadcast(full: tuple[int, ...] = full) -> tuple[int, ...]:
            return tuple(1 if sometimes() else size for size in full[rng.integers(len(full)) :])

        if sometimes():
            options["mask"] = rng.random(broadcast()) < 0.7
        if sometimes():
            shape = broadcast()
            options["bias"] = np.where(rng.random(shape) < 0.15, -INF, grid(rng, *shape))
        if sometimes():
            options["valid_lens"] = rng.integers(0, m + 2, (*lead[:1], n) if sometimes() else lead[:1])
        if sometimes(0.5):
            options["causal"] = True
        if sometimes():
            options["window"] = [1, (2, 0), (0, None), (None, 1)][rng.integers(4)]
        if sometimes(0.5):
            per_batch = bool(lead) and sometimes(0.5)
            options["query_offset"] = rng.integers(-2, m + 1, lead[:1]) if per_batch else int(rng.integers(-2, m + 1))
        if sometimes():
            options["scale"] = [0.5, 1.0, 0.3][rng.integers(3)]
        if sometimes(0.25):
            options["softcap"] = [0.5, 2.0][rng.integers(2)]
        if sometimes(0.2):
            options["positions"] = rng.integers(-1, m, (*(lead if sometimes() else ()), n, int(rng.integers(1, 4))))
        if sometimes(0.25):
            options["score"] = [*parametrised(rng, d, d), "distance_score", "cosine_score"][rng.integers(5)]
        q, k, x = qkv(rng, n, m, d, v, lead, kv)
        if sometimes(0.5):
            which = {name: value for name, value in options.items() if name not in ("scale", "softcap", "score")}
            q, k, x, *bias = poisoned(rng, q, k, x, **which)
            options |= {"bias": bias[0]} if bias else {}
        name = f"combination {number}: " + ", ".join(options)
        asked = ("weights",) * sometimes(0.5) + ("lse",) * sometimes(0.5)
        yield make(name, q, k, x, **options, asked=asked)


def through_scores(rng: np.random.Generator) -> Iterator[Case]:
    """A loss that depends on the returned scores as well as on the output."""
    make = partial(attend, group="scores out", rng=rng, grad="scores", asked=())
    which: dict[str, Any] = {"softcap": 1.5, "scale": 0.75, "causal": True, "query_offset": 1}
    for stage in ("raw", "capped", "biased"):
        bias, mask = np.where(flags(rng, 4, 5), grid(rng, 2, 1, 4, 5), -INF), flags(rng, 4, 1, 5)
        q, k, v = qkv(rng, lead=(2, 4), kv=(2, 2))
        yield make(f"a loss of {stage} scores", q, k, v, bias=bias, mask=mask, **which, return_scores=stage)
    chosen, lens = np.array([[0, 3, 3], [3, -1, 1], [-1, -1, -1], [2, 4, 0]]), np.array([[1, 2, 3, 0], [4, 5, 0, 1]])
    sink: dict[str, Any] = {"sink": grid(rng, 2), "dropout": 0.4, "seed": 3}
    sink |= {"mask": "prefix"}
    yield make("a loss of scores, positions, sink", *qkv(rng), positions=chosen, bias=bias, **sink, return_scores="biased")
    additive = next(parametrised(rng, 3, 3))
    yield make("a loss of scores, lengths, additive", *qkv(rng), valid_lens=lens, score=additive, return_scores="raw")
    segments: dict[str, Any] = {"segments": (np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1, 4]))}
    yield make("a loss of scores, segments, 2 axes", *qkv(rng, lead=()), **segments, return_scores="raw")


def streamed(rng: np.random.Generator) -> Iterator[Case]:
    """Scores that rise with the keys for some queries, and fall for others, from 128 to 128: a kernel with tiles
    of any size up to 512 then finds a larger maximum after others, while the sums it has so far still matter."""
    n, m = 264, 560
    step = np.arange(m) // 128 / 16
    turn = rng.choice([-3, -2, -1, 1, 2, 3], n) / 16
    q, k = np.stack([np.full(n, 2.0), turn], axis=-1), np.stack([np.full(m, 2.0), step], axis=-1)
    q, k, v = (x[None, None] for x in (q, k, grid(rng, m, 1)))  # kernels for GPUs take arrays with heads only
    loss_rows = np.isin(np.arange(n), [0, 130, 263])
    which: dict[str, Any] = {
        "scale": 256.0,
        "causal": True,
        "query_offset": np.array([296]),
    }  # the largest score is 1024, whose exp overflows
    yield attend("a maximum that rises", q, k, v, group="edges", rng=rng, grad=loss_rows, asked=LSE, **which)


def merged_once(rng: np.random.Generator) -> Iterator[Case]:
    """Parts whose every output has as many digits as the largest: there, rounded weights or products change the result."""
    yield merged("merge: rounded once", 1 + rng.integers(1, 9, (3, 2, 9, 2)) / 16, grid(rng, 3, 2, 9), "half precision")


def far_above(rng: np.random.Generator) -> Iterator[Case]:
    """Scores all about 800, of which exp is inf in float64 too, in a window of more queries than a block of it holds.

    A kernel that takes the exponentials of scores as they are has to begin again; its lse then counts the window's keys alone.
    """
    q, k, v = qkv(rng, n=264, m=560, d=2, v=1, lead=())
    q[:, 0] = k[:, 0] = 34.0
    which: dict[str, Any] = {"window": 3, "grad": False, "group": "options together"}
    yield attend("many pairs, a window, scores of 800", q, k, v, rng=rng, asked=LSE, **which)
