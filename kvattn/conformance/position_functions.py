"""The cases of masks and biases that are functions of positions, and of segments."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from kvattn.conformance import multihead
from kvattn.conformance.cases import LSE, NOT_FINITE, WEIGHTS, Case, attend, grid, qkv
from kvattn.conformance.functions import MASKS


def cases(rng: np.random.Generator) -> Iterator[Case]:
    make = partial(attend, group="functions of positions", rng=rng)
    for name in MASKS:
        asked = LSE if name in ("causal", "prefix") else () if name != "nothing" else WEIGHTS + LSE
        yield make(f"mask function: {name}", *qkv(rng), mask=name, asked=asked)
    slopes = np.array([0.5, 0.25])[:, None, None]
    alibi: Any = ("alibi", {"slopes": slopes})
    each: dict[str, Any] = {"query_offset": np.array([2, -1])}
    yield make("mask function, offset", *qkv(rng), mask="first key and window", query_offset=-2)
    yield make("mask function, offset per entry", *qkv(rng), mask="prefix", **each, asked=())
    yield make("mask function, no batch", *qkv(rng, lead=()), mask="every other", asked=LSE)
    yield make("mask function, causal, window", *qkv(rng), mask="every other", causal=True, window=(2, None), asked=())
    yield make("mask function, padded, grouped", *qkv(rng, lead=(2, 4), kv=(2, 2)), mask="prefix", valid_lens=np.array([2, 4]))
    yield make("mask function, bias, sink, capped", *qkv(rng), mask="causal", bias=grid(rng, 2, 1, 5), sink=grid(rng, 2),
               softcap=2.0, scale=0.5, asked=LSE)  # fmt: skip
    yield make("mask function, positions", *qkv(rng), mask="prefix", positions=rng.integers(-1, 5, (4, 3)), asked=())
    yield make("mask function, averaged", *qkv(rng), mask="prefix", normalize="average", asked=WEIGHTS)
    yield make("mask function, no keys", *qkv(rng, m=0), mask="prefix", asked=LSE, group="empty rows")
    yield make("mask function, no queries", *qkv(rng, n=0), mask="prefix")
    many: Any = {"n": 12, "m": 13, "d": 2, "lead": (2,)}  # blocks that begin anywhere
    yield make("mask function, in a window", *qkv(rng, **many), mask="every other", window=(2, 1), asked=())
    yield make("mask function, first key and window, many", *qkv(rng, **many), mask="first key and window", asked=LSE,
               valid_lens=np.array([11, 13]))  # fmt: skip
    yield make("bias function, in a window", *qkv(rng, **many), bias=("alibi", {"slopes": np.array([[[0.5]]])}),
               window=(2, 1), query_offset=1, asked=())  # fmt: skip
    yield make("bias function", *qkv(rng), bias=alibi)
    yield make("bias function, alone", *qkv(rng), bias=alibi, asked=())
    yield make("bias function, causal, offset per entry", *qkv(rng), bias=alibi, causal=True, **each, asked=())
    yield make("bias function, mask function", *qkv(rng), bias=alibi, mask="first key and window", query_offset=1, asked=LSE)
    yield make("bias function, mask, sink", *qkv(rng), bias=alibi, mask=rng.random((4, 5)) < 0.6, sink=grid(rng, 2), asked=())
    yield make("bias function, positions", *qkv(rng), bias=alibi, positions=rng.integers(-1, 5, (4, 3)))

    make = partial(attend, group="segments", rng=rng)
    sorted_, apart = np.array([[0, 0, 1, 1, 3], [5, 5, 5, 5, 9]]), np.array([[0, 1, 0, 1, 1], [2, 2, 7, 2, 7]])
    of_queries = np.array([[0, 1, 1, 4], [5, 9, 9, 9]])
    square: Any = {"n": 5, "m": 5}
    yield make("segments", *qkv(rng, **square), segments=sorted_)
    yield make("segments, alone", *qkv(rng, **square), segments=sorted_, asked=())
    yield make("segments that lie apart", *qkv(rng, **square), segments=apart, asked=LSE)
    yield make("segments, causal", *qkv(rng, **square), segments=sorted_[:1].repeat(2, 0), causal=True, asked=())
    yield make("segments, int8", *qkv(rng, **square), segments=sorted_.astype("int8"), window=1, asked=LSE)
    yield make("segments, no batch", *qkv(rng, lead=(), **square), segments=sorted_[0], causal=True, asked=())
    yield make("segments of heads", *qkv(rng, lead=(2,), **square), segments=sorted_, asked=LSE)
    yield make("segments of queries and keys", *qkv(rng), segments=(of_queries, sorted_), asked=LSE)
    yield make("segments of queries and keys, alone", *qkv(rng), segments=(of_queries, sorted_), valid_lens=np.array([3, 5]),
               asked=())  # fmt: skip
    yield make("segments, mask function, bias, sink", *qkv(rng, **square), segments=sorted_, mask="every other",
               bias=grid(rng, 2, 5, 5), sink=grid(rng, 2), asked=())  # fmt: skip
    yield make("segments, bias function, offsets, grouped", *qkv(rng, lead=(2, 4), kv=(2, 2), **square), segments=sorted_,
               bias=("alibi", {"slopes": np.array([0.5, 0.25, 0.125, 1.0])[:, None, None]}), causal=True,
               query_offset=np.array([1, 0]), asked=())  # fmt: skip
    yield make("segments that lie apart, mask function", *qkv(rng, **square), segments=apart, mask="every other", asked=())
    yield make("segments that lie apart, mask", *qkv(rng, **square), segments=apart, mask=rng.random((2, 2, 5, 5)) < 0.6)
    yield make("segments, mask", *qkv(rng, **square), segments=sorted_, mask=rng.random((2, 1, 5, 5)) < 0.6, asked=LSE)
    yield make("segments, shared keys", *qkv(rng, lead=(2, 2), kv=(1, 2), **square), segments=sorted_, asked=LSE)
    for stage in ("capped", "biased"):
        both: dict[str, Any] = {"segments": sorted_, "mask": "every other", "bias": alibi, "softcap": 2.0}
        yield make(f"segments and functions, {stage} scores", *qkv(rng, **square), **both, return_scores=stage, asked=())
    yield make("segments, lengths per query", *qkv(rng, **square), segments=apart, valid_lens=rng.integers(0, 6, (2, 5)))
    yield make("segments, positions", *qkv(rng, **square), segments=sorted_, positions=rng.integers(-1, 5, (5, 3)), asked=())
    query, key, value = qkv(rng, **square)
    key[0, :, 2:, 0], value[0, :, 0], query[1, :, 4] = np.nan, np.inf, np.nan
    yield make("segments: what is not finite stays in its own", query, key, value, segments=sorted_, asked=(), group=NOT_FINITE)
    yield make("mask function: what is not finite stays with its pairs", query, key, value, mask="window", asked=(),
               group=NOT_FINITE)  # fmt: skip
    steep: Any = ("alibi", {"slopes": np.array([[0.125]])})  # so many pairs that a kernel may take it as one line of distances
    yield make("bias function, many pairs", *qkv(rng, n=264, m=300, d=2, lead=()), bias=steep, query_offset=50, asked=(),
               group="functions of positions")  # fmt: skip

    projected: Any = partial(multihead.multi_head, rng=rng)
    x, keys, packed = grid(rng, 2, 3, 3), grid(rng, 2, 4, 3), np.array([[0, 0, 4], [1, 2, 2]])
    params, grouped = multihead.params_of(rng, 2, 2), multihead.params_of(rng, 4, 2)
    yield projected("heads: segments, causal", [x] * 3, params, segments=packed, causal=True)
    yield projected("heads: no batch, segments", [x[0]] * 3, params, segments=packed[0], asked=WEIGHTS + LSE)
    of_heads: Any = ("alibi", {"slopes": np.array([0.5, 0.25, 0.125, 1.0])[:, None, None]})
    options: Any = {"heads": 4, "kv_heads": 2, "mask": "prefix", "bias": of_heads, "query_offset": 1}
    yield projected("heads: functions of positions", (x, keys, keys), grouped, **options)
