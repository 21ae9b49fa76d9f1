"""The cases of two options and more in one call: any two options stand together in some call of these, whatever it returns.

A fault that shows with two options alone, one that leaves out lengths where there is a mask too, is found by no case of one
of them. Without the weights a call may take another path, so each call is made twice: for the output alone and every
gradient, and for all that can be returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np

from kvattn.conformance import oracle
from kvattn.conformance.cases import LSE, WEIGHTS, Case, attend, flags, grid, kink_free, poisoned, qkv
from kvattn.conformance.pooling import parametrised

GROUP = "options together"
LEADS = {"grouped": ((2, 4), (2, 2)), "shared keys": ((2, 2), (1, 2)), "3 axes": ((2,), (2,))}
STAGES = ("raw", "capped", "biased")
TRIES = 1000  # at most to draw a call in which every option makes a difference: more than any line needs, unless none can do so
# Any two choices stand together in some line with softmax; every choice stands in some line with another normaliser.
LINES = (
    "2 axes, window at -1, mask, lengths per query, scale, sink, dropout, distance",
    "shared keys, offset 1, bias function, lengths per query, segments, positions, softcap, additive",
    "3 axes, offsets, mask function, bias, lengths, segments, dropout",
    "grouped, mask function, bias, positions, scale, softcap, sink",
    "3 axes, window at -1, mask, segments, positions, softcap, distance",
    "shared keys, bias function, lengths, scale, sink, dropout, additive",
    "2 axes, offsets, mask, bias function, positions, scale, softcap, dropout, additive",
    "grouped, offset 1, mask, bias, lengths, segments, sink, distance",
    "2 axes, lengths, segments, softcap",
    "3 axes, offset 1, mask function, lengths per query, positions, scale, sink, dropout, additive",
    "shared keys, offsets, segments, scale, sink, distance",
    "grouped, window at -1, bias, lengths per query, positions, softcap, dropout, additive",
    "shared keys, window at -1, mask function, bias function, lengths, positions",
    "3 axes, bias function, lengths per query, segments, positions, scale, softcap, dropout, distance",
    "2 axes, offset 1, mask function, bias, positions, scale, softcap, dropout, distance",
    "grouped, offsets, mask, lengths per query, segments, positions",
    "shared keys, mask, bias, sink, dropout",
    "grouped, offset 1, mask, bias function, segments, softcap, sink, dropout",
    "3 axes, offsets, mask function, segments, positions, dropout, distance, average",
    "grouped, window at -1, bias, lengths per query, scale, softcap, sparsemax",
    "shared keys, offsets, mask, segments, positions, dropout, additive, sparsemax",
    "shared keys, window at -1, mask, bias function, lengths per query, scale, softcap, average",
    "grouped, bias, lengths, dropout, additive, average",
    "3 axes, mask function, bias function, lengths, segments, scale, softcap, dropout, distance, sparsemax",
    "2 axes, offset 1, mask function, bias function, lengths per query, positions, softcap, sparsemax",
    "2 axes, offset 1, bias, lengths, scale, softcap, dropout, distance, average",
)


def cases(rng: np.random.Generator) -> Iterator[Case]:
    for number, line in enumerate(LINES):
        chosen = {*line.split(", ")}
        query, key, value, options = _drawn(rng, chosen, poison=number % 2 == 1)
        make: dict[str, Any] = {"group": GROUP, "rng": rng}
        stage: dict[str, Any] = {"return_scores": STAGES[number % 3]}
        if "normalize" in options:
            yield attend(f"together: {line}", query, key, value, asked=WEIGHTS, **make, **options, **stage)
            continue
        yield attend(f"together: {line}", query, key, value, asked=(), **make, **options)
        asked = WEIGHTS + LSE
        yield attend(f"together, with all: {line}", query, key, value, asked=asked, grad=False, **make, **options, **stage)


def restrictions_alone(rng: np.random.Generator) -> Iterator[Case]:
    """Any two restrictions, and all of them, with no other option: a backend may have a shorter path for such calls."""
    n, m = 4, 5
    each: dict[str, dict[str, Any]] = {
        "mask": {"mask": (2 * np.arange(n)[:, None] + np.arange(m)) % 5 != 3},
        "bias": {"bias": np.where(np.arange(m) == 2, -np.inf, grid(rng, n, m))},
        "lengths": {"valid_lens": np.array([3, 4])},
        "lengths per query": {"valid_lens": np.array([[1, 4, 2, 5], [3, 0, 4, 2]])},
        "causal": {"causal": True, "query_offset": 1},
        "window": {"window": (2, 1)},
    }
    both = [*combinations(each, 2), tuple(each)[:3] + tuple(each)[4:]]
    for number, names in enumerate(names for names in both if not {"lengths", "lengths per query"} <= {*names}):
        options: dict[str, Any] = {}
        for name in names:
            options |= each[name]
        grouped: dict[str, Any] = {"lead": (2, 4), "kv": (2, 2)} if number % 2 else {}
        arrays = qkv(rng, n, m, **grouped)
        yield attend(f"nothing but {', '.join(names)}", *arrays, group=GROUP, rng=rng, asked=(), **options)


def edges(rng: np.random.Generator) -> Iterator[Case]:
    """What implementers got wrong that none of the earlier cases found."""
    make: dict[str, Any] = {"group": "edges", "rng": rng}
    yield attend("bias ()", *qkv(rng), bias=np.array(-0.5), mask=flags(rng, 4, 5), **make)
    for offset in (2**40, -(2**40)):
        group = {"group": "empty rows"} if offset < 0 else {}
        yield attend(f"causal, offset {offset}", *qkv(rng), causal=True, query_offset=offset, asked=LSE, **make | group)
    yield attend(
        "a window as wide as int32 counts", *qkv(rng), window=(2**31 - 1, 2**31 - 2), query_offset=3, asked=LSE, **make
    )
    same: dict[str, Any] = {"d": 3, "v": 3}  # a kernel may give the lse itself only where values have as many features as keys
    yield attend("scale, lse, as many features", *qkv(rng, **same), scale=0.75, asked=LSE, grad=False, **make)
    yield attend(
        "causal, scale, lse, as many features", *qkv(rng, **same), causal=True, scale=1.5, asked=LSE, grad=False, **make
    )
    x = grid(rng, 2, 2, 4, 3)
    yield attend("one array is query, key and value", x, x, x, causal=True, asked=(), **make)
    (q, k, _), (_, _, v) = qkv(rng, kv=(1, 2)), qkv(rng)
    yield attend("keys that entries share, values of each", q, k, v, valid_lens=np.array([3, 5]), asked=(), **make)
    (q, k, _), (_, _, v) = qkv(rng), qkv(rng, kv=(1, 2))
    yield attend("values that entries share, keys of each", q, k, v, mask=flags(rng, 2, 1, 4, 5), asked=(), **make)
    # Rounding twice shows where the largest output has as many digits as the largest value.
    q, k, _ = qkv(rng, n=9, m=9)
    near = 1 + rng.integers(1, 5, (2, 2, 9, 2)) / 16
    yield attend("sink: rounded once", q, k, near, sink=np.array([-1.5, -2.0]), asked=(), **make | {"group": "half precision"})

    # These are long enough for tiles, and for kernels that are called once for each length.
    many: dict[str, Any] = {"n": 68, "m": 484, "d": 2, "lead": (2, 2), "kv": (2, 1)}
    loss_rows = np.arange(68) == 40
    each: dict[str, Any] = {"valid_lens": np.array([484, 150]), "query_offset": np.array([416, 60]), "causal": True}
    yield attend("many pairs, lengths and offsets", *qkv(rng, **many), grad=loss_rows, asked=LSE, **each | make)
    arrays = qkv(rng, **many | {"d": 64, "v": 64})
    yield attend("many pairs, lengths", *arrays, valid_lens=np.array([484, 12]), grad=False, asked=(), **make)
    yield attend("many pairs, large scores", *qkv(rng, **many), scale=256.0, grad=loss_rows, asked=LSE, **make)
    lens = rng.integers(0, 500, 264)
    q, k, v = qkv(rng, n=264, m=560, d=2, v=1, lead=())
    yield attend(
        "many pairs, lengths per query", q, k, v, causal=True, query_offset=200, valid_lens=lens, asked=(), grad=False, **make
    )


def _drawn(rng: np.random.Generator, chosen: set[str], poison: bool) -> Any:
    """query, key, value and the options of such a call, each of which makes a difference to its answer."""
    for _ in range(TRIES):
        query, key, value, options = _arrays(rng, chosen)
        restricting = [name for name in ("mask", "valid_lens", "segments", "positions", "causal", "window") if name in options]
        found = _attending(query, key, options)
        without = [{n: x for n, x in options.items() if n != name} for name in restricting]
        without += [options | {"query_offset": 0}] if "query_offset" in options else []
        if len(found) < len({pair[:-1] for pair in found}) + 2 or any(
            _attending(query, key, which) == found for which in without
        ):
            continue
        if not kink_free(query, key, value, **options):
            continue
        if poison:
            query, key, value, *bias = poisoned(rng, query, key, value, **options)
            options |= {"bias": bias[0]} if bias else {}
        return query, key, value, options
    raise RuntimeError(
        f"{TRIES} draws of {', '.join(sorted(chosen))!r} held none in which each option makes a difference and no score lies"
        " near a kink: two of these options may say the same; take one of them out of this line of LINES"
    )


def _attending(query: np.ndarray, key: np.ndarray, options: dict[str, Any]) -> set[tuple[int, ...]]:
    """The pairs that attend: those that may, and are not dropped."""
    lead, _, _, found = oracle.pairs(query, key, **options)
    if "dropout" in options:
        kept = oracle.survivors(found, lead, options["dropout"], options["seed"])
        found = [pair for pair, share in zip(found, kept, strict=True) if share]
    return {pair for _, pair in found}


def _arrays(rng: np.random.Generator, chosen: set[str]) -> Any:
    n, m = 5, 8  # enough that some pairs may attend even where every option forbids some
    lead, kv = next((LEADS[name] for name in LEADS if name in chosen), ((), ()))
    batch, heads = lead[:1], lead[-1:]
    offsets = {"offset 1": 1, "window at -1": -1, "offsets": rng.integers(-1, 3, batch)}
    every: dict[str, dict[str, Any]] = {
        **{name: {"causal": True, "query_offset": offset} for name, offset in offsets.items()},
        "window at -1": {"window": (1, 2), "query_offset": -1},
        "mask": {"mask": flags(rng, *batch, *[1] * (len(lead) - 1), n, m)},
        "mask function": {"mask": "every other"},
        "bias": {"bias": np.where(rng.random((*heads, n, m)) < 0.1, -np.inf, grid(rng, *heads, n, m))},
        "bias function": {"bias": ("alibi", {"slopes": grid(rng, *heads, 1, 1)})},
        "lengths": {"valid_lens": rng.integers(1, m + 1, batch)},
        "lengths per query": {"valid_lens": rng.integers(1, m + 1, (*batch, n))},
        "segments": {"segments": tuple(rng.integers(0, 2, (*batch, size)) for size in (n, m))},
        "positions": {"positions": rng.integers(-1, m, (n, m))},
        "scale": {"scale": 0.75},
        "softcap": {"softcap": 1.5},
        "sink": {"sink": grid(rng, *(heads or (n, 1)))},
        "dropout": {"dropout": 0.4, "seed": int(rng.integers(2**32))},
        "distance": {"score": "distance_score"},
        "additive": {"score": next(parametrised(rng, 3, 3))},
        "average": {"normalize": "average"},
        "sparsemax": {"normalize": "sparsemax"},
    }
    options: dict[str, Any] = {}
    for name, which in every.items():
        options |= which if name in chosen else {}
    return *qkv(rng, n, m, lead=lead, kv=kv), options
