"""The cases of multi-head attention, self-attention and decoding with a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from kvattn.conformance import oracle_layers
from kvattn.conformance.cases import Case, flags, grid, poisoned  # noqa: F401

Params = dict[str, np.ndarray]
BIASES = ("b_q", "b_k", "b_v", "b_o")


def params_of(rng: np.random.Generator, heads: int, kv_heads: int, inputs: tuple[int, int, int] = (3, 3, 3), d: int = 2,
              v: int = 2, o: int = 3, biases: tuple[str, ...] = BIASES) -> Params:  # fmt: skip
    """Projections on a grid of quarters: what they project stays exact enough for every dtype to hold its inputs.

    ``inputs``: the features of query, key and value; ``d``, ``v`` and ``o``: of a head's keys and values, and of the output.
    """
    d_q, d_k, d_v = inputs
    shapes: dict[str, tuple[int, ...]] = {
        "W_q": (d_q, heads * d),
        "W_k": (d_k, kv_heads * d),
        "W_v": (d_v, kv_heads * v),
        "W_o": (heads * v, o),
    }
    shapes = {name: shape for name, shape in shapes.items() if shape[-1]}
    shapes |= {name: shapes["W_" + name[-1]][1:] for name in biases if "W_" + name[-1] in shapes}
    return {name: grid(rng, *shape, top=1.0) for name, shape in shapes.items()}


def multi_head(name: str, inputs: Sequence[np.ndarray], params: Params, rng: np.random.Generator, *, heads: int = 2,
               kv_heads: int | None = None, grad: bool = True, asked: tuple[str, ...] = (), group: str = "multi-head",
               **options: Any) -> Case:  # fmt: skip
    """A case of multi-head attention, as `attend` makes one of attention; ``inputs``: query, key and value."""
    query, key, value = inputs
    options |= {"rng": options.pop("seed")} if "seed" in options else {}
    kv_heads = heads if kv_heads is None else kv_heads
    o = params["W_o"].shape[-1] if "W_o" in params else params["W_v"].shape[-1] // kv_heads * heads
    grad_output = grid(rng, *query.shape[:-1], o) if grad else None
    answer = oracle_layers.multi_head_attention(query, key, value, params, heads, kv_heads, grad_output, **options)
    results = ("output", *asked, *(["scores"] if "return_scores" in options else []))
    quantities = [what for what in answer.values if what in results or what.startswith("grad_")]
    arrays = {n: x for n, x in options.items() if isinstance(x, np.ndarray)}
    arguments = {"query": query, "key": key, "value": value, "grad_output": grad_output, **params, **arrays}
    keywords = {n: x for n, x in options.items() if n not in arrays} | {f"return_{what}": True for what in asked}
    keywords |= {"num_heads": heads} | ({"num_kv_heads": kv_heads} if kv_heads != heads else {})
    return Case(name, group, "multi_head_attention", {n: x for n, x in arguments.items() if x is not None}, keywords,
                {what: answer.values[what] for what in quantities}, {what: answer.magnitude[what] for what in quantities},
                answer.largest_score, results=results)  # fmt: skip


def cases(rng: np.random.Generator) -> Iterator[Case]:
    def inputs(
        batch: tuple[int, ...] = (2,), n: int = 3, m: int = 4, d_q: int = 3, d_k: int = 3, d_v: int = 3
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return grid(rng, *batch, n, d_q), grid(rng, *batch, m, d_k), grid(rng, *batch, m, d_v)

    def two_heads() -> Params:
        return params_of(rng, 2, 2)

    both = ("weights", "lse")
    yield multi_head("two heads", inputs(), two_heads(), rng, asked=both)
    yield multi_head("heads: without biases", inputs(), params_of(rng, 2, 2, biases=()), rng)
    yield multi_head("one head", inputs(), params_of(rng, 1, 1, d=3), rng, heads=1, asked=("weights",))
    yield multi_head(
        "sizes of their own", inputs(d_q=2, d_k=4, d_v=5), params_of(rng, 2, 2, (2, 4, 5), d=3, v=1, o=4), rng, asked=both
    )
    yield multi_head("grouped heads, projected", inputs(), params_of(rng, 4, 2), rng, heads=4, kv_heads=2, asked=both)
    yield multi_head("one key head", inputs(), params_of(rng, 3, 1), rng, heads=3, kv_heads=1)
    no_output = {n: x for n, x in params_of(rng, 2, 2).items() if n not in ("W_o", "b_o")}
    yield multi_head("heads: without W_o", inputs(), no_output, rng)
    yield multi_head("heads: no batch", inputs(batch=()), two_heads(), rng, asked=both)
    yield multi_head("heads: two batch axes", inputs(batch=(2, 2), n=2, m=2), two_heads(), rng, grad=False)
    yield multi_head("heads: lengths", inputs(), two_heads(), rng, valid_lens=np.array([4, 2]), asked=both)
    yield multi_head("heads: lengths of 0", inputs(), two_heads(), rng, valid_lens=np.array([0, 3]), asked=both)
    yield multi_head("heads: a mask for each head", inputs(), two_heads(), rng, mask=flags(rng, 2, 2, 3, 4))
    yield multi_head("heads: a bias", inputs(), two_heads(), rng, bias=grid(rng, 2, 1, 4))
    yield multi_head("heads: causal, scaled", inputs(), two_heads(), rng, causal=True, query_offset=1, scale=0.5)
    # Here n, m and the number of heads are equal, so that no axis can be told from another by its size.
    yield multi_head("heads: no batch, lengths ()", inputs((), 2, 2), two_heads(), rng, valid_lens=np.array(1), asked=both)
    yield multi_head(
        "heads: no batch, lengths (n,)", inputs((), 2, 2), two_heads(), rng, valid_lens=np.array([1, 0]), asked=both
    )
    grouped, offset = params_of(rng, 4, 2), np.array(1)
    each: dict[str, Any] = {"valid_lens": np.array([2, 0, 4]), "causal": True, "query_offset": offset}
    yield multi_head("heads: no batch, lengths, offset ()", inputs(()), grouped, rng, heads=4, kv_heads=2, **each)
    nothing = {"W_q": np.zeros((3, 0)), "W_k": np.zeros((3, 0)), "b_q": np.zeros(0), "b_k": np.zeros(0)}
    yield multi_head("heads: no features", inputs(), two_heads() | nothing, rng, valid_lens=np.array([4, 2]), asked=both)
    yield multi_head("heads: no keys", inputs(m=0), two_heads(), rng, grad=False)
    sparse = params_of(rng, 2, 2)
    yield multi_head("heads: averaged", inputs(), sparse, rng, normalize="average", asked=("weights",))
    yield multi_head("heads: a sink", inputs(), two_heads() | {"sink": grid(rng, 2)}, rng, asked=both)
    grouped = params_of(rng, 4, 2) | {"sink": grid(rng, 4)}
    yield multi_head("heads: a sink, grouped, causal", inputs(), grouped, rng, heads=4, kv_heads=2, causal=True)
    yield from self_attention(rng)
    yield from padded(rng)
    yield from decoding(rng)


def dropout(rng: np.random.Generator) -> Iterator[Case]:
    """Weights that are dropped by the pattern of an int rng, in heads."""
    make = partial(multi_head, group="dropout", dropout=0.4, seed=21)
    query, key, value = grid(rng, 2, 3, 3), grid(rng, 2, 4, 3), grid(rng, 2, 4, 3)
    yield make("heads: dropout", (query, key, value), params_of(rng, 2, 2), rng, asked=("weights", "lse"))
    params = params_of(rng, 4, 2) | {"sink": grid(rng, 4)}
    one = [x[0] for x in (query, key, value)]
    yield make("heads: dropout, grouped, no batch", one, params, rng, heads=4, kv_heads=2, causal=True)
    x, params = grid(rng, 2, 4, 3), params_of(rng, 1, 1, d=3, v=2, biases=())
    params.pop("W_o")
    case = make("self-attention, dropout", [x] * 3, params, rng, heads=1, asked=("lse",))
    yield as_self_attention(case, x)


def self_attention(rng: np.random.Generator) -> Iterator[Case]:
    forms: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
        ("self-attention", (2,), {}),
        ("self-attention, no batch", (), {"causal": True}),
        ("self-attention, lengths", (2,), {"valid_lens": np.array([1, 4])}),
        ("self-attention, a sink", (2,), {"sink": np.array(0.5)}),
        ("self-attention, no batch, lengths ()", (), {"valid_lens": np.array(2)}),
        ("self-attention, no batch, lengths (n,)", (), {"valid_lens": np.array([1, 4, 0, 2])}),
    ]
    for name, batch, options in forms:
        x = grid(rng, *batch, 4, 3)
        params = {n: y for n, y in params_of(rng, 1, 1, d=3, v=2, biases=()).items() if n != "W_o"}
        case = multi_head(name, [x] * 3, params, rng, heads=1, asked=("weights", "lse"), **options)
        yield as_self_attention(case, x)


def padded(rng: np.random.Generator) -> Iterator[Case]:
    """NaN and inf in rows that no head attends to. Projections multiply them, but no gradient of a weight may."""

    with_nan = partial(_with_nan, rng)

    def make(name: str, n: int = 3, m: int = 4, kv_heads: int = 2, **options: Any) -> Case:
        inputs = [grid(rng, 2, rows, 3) for rows in (n, m, m)]
        return multi_head(f"heads: NaN {name}", inputs, params_of(rng, 2, kv_heads), rng, kv_heads=kv_heads, **options)

    tail, second = [[False] * 4, [False, False, True, True]], [[False] * 4, [True] * 4]
    yield with_nan(make("behind lengths", valid_lens=np.array([4, 2])), key=tail, value=tail)
    yield with_nan(
        make("behind lengths of 0", valid_lens=np.array([4, 0])),
        query=[[False] * 3, [True] * 3],
        key=second,
        value=second,
    )
    each: dict[str, Any] = {"valid_lens": np.array([[4, 1, 2], [2, 0, 1]]), "kv_heads": 1}
    yield with_nan(make("behind lengths of each query", **each), query=each["valid_lens"] == 0, key=tail, value=tail)
    mask = np.ones((2, 2, 3, 4), bool)
    mask[0, :, :, 1] = mask[1, :, 2] = mask[1, 0, :, 0] = mask[1, 1, :, 3] = False  # of the last two, one head attends to each
    yield with_nan(make("behind a mask", mask=mask), query=~mask.any((1, 3)), key=~mask.any((1, 2)), value=~mask.any((1, 2)))
    bias = np.where(mask[:1, :1], grid(rng, 1, 1, 3, 4), -np.inf)
    yield with_nan(make("behind a bias", bias=bias), key=[False, True, False, False], value=[False, True, False, False])
    out = [False, False, False, True]
    yield with_nan(make("beyond causal", causal=True), key=out, value=out)
    rows = [[True] * 3 + [False], [True] + [False] * 3]
    case = make("outside a window", window=(0, 1), query_offset=np.array([3, 1]))
    yield with_nan(case, query=[[False, True, True], [False] * 3], key=rows, value=rows)
    chosen = np.array([[0, 3], [3, -1], [-1, -1]])
    out = [False, True, True, False]
    yield with_nan(make("at no position", positions=chosen), query=[False, False, True], key=out, value=out)
    yield with_nan(make("without keys", m=0), query=[True] * 3)
    yield with_nan(make("without queries", n=0), key=[True] * 4, value=[True] * 4)
    x = grid(rng, 2, 4, 3)
    params = {n: y for n, y in params_of(rng, 1, 1, d=3, v=2, biases=()).items() if n != "W_o"}
    lens = np.array([[4, 1, 2, 3], [2, 1, 0, 0]])
    case = multi_head("self-attention, NaN behind lengths", [x] * 3, params, rng, heads=1, valid_lens=lens)
    yield with_nan(as_self_attention(case, x), x=lens == 0)


def one_head(rng: np.random.Generator) -> Iterator[Case]:
    """NaN in rows that no query attends to, in self-attention without a batch, whose lengths are those of its one head."""
    for name, lens in (("(n,)", np.array([2, 1, 0, 0])), ("() of 0", np.array(0))):
        x = grid(rng, 4, 3)
        params = {n: y for n, y in params_of(rng, 1, 1, d=3, v=2, biases=()).items() if n != "W_o"}
        case = multi_head(
            f"self-attention, no batch, NaN behind lengths {name}", [x] * 3, params, rng, heads=1, valid_lens=lens
        )
        yield _with_nan(rng, as_self_attention(case, x), x=np.broadcast_to(lens == 0, 4))


def selected(rng: np.random.Generator) -> Iterator[Case]:
    """NaN in keys that positions name and a mask forbids."""
    inputs, chosen = [grid(rng, 2, rows, 3) for rows in (3, 4, 4)], np.array([[0, 3], [3, -1], [-1, -1]])
    mask = np.ones((2, 1, 3, 4), bool)
    mask[0, ..., 3] = mask[1, ..., 0] = mask[1, :, 1] = False
    case = multi_head(
        "heads: NaN at positions, forbidden by a mask", inputs, params_of(rng, 2, 2), rng, positions=chosen, mask=mask
    )
    keys = [[False, True, True, True], [True, True, True, False]]
    yield _with_nan(rng, case, query=[[False, True, True]] * 2, key=keys, value=keys)


def _with_nan(rng: np.random.Generator, case: Case, **hidden: Any) -> Case:
    """The case with NaN and inf in these rows of its arguments."""
    arguments = dict(case.arguments)
    for name, rows in hidden.items():
        bad = rng.choice([np.nan, np.inf, -np.inf], arguments[name].shape)
        arguments[name] = np.where(np.array(rows)[..., None], bad, arguments[name])
    return replace(case, arguments=arguments)


def as_self_attention(case: Case, x: np.ndarray) -> Case:
    """A case of multi-head attention with one head, whose query, key and value are all x, as one of self-attention."""
    values, magnitude = dict(case.answer), dict(case.magnitude)
    three = [f"grad_{what}" for what in ("query", "key", "value")]
    if three[0] in values:
        values["grad_x"] = np.sum([values.pop(what) for what in three], axis=0)
        magnitude["grad_x"] = sum(magnitude.pop(what) for what in three)
    for what in case.results[1:]:  # one head: no axis for it
        values[what] = values[what][..., 0, :] if what == "lse" else values[what][..., 0, :, :]
    arguments = {"x": x} | {n: y for n, y in case.arguments.items() if n not in ("query", "key", "value")}
    keywords = {n: y for n, y in case.keywords.items() if n != "num_heads"}
    made: dict[str, Any] = {"arguments": arguments, "keywords": keywords, "answer": values, "magnitude": magnitude}
    return replace(case, group="self-attention", call="self_attention", **made)


def decoding(rng: np.random.Generator) -> Iterator[Case]:
    """Step by step with a cache, what the whole causal pass gives."""
    forms: list[tuple[str, int, int, dict[str, Any]]] = [
        ("decoding", 2, 2, {}),
        ("decoding without a batch, lengths ()", 2, 2, {"batch": (), "valid_lens": np.array(3)}),
        ("decoding, grouped heads", 4, 2, {}),
        ("decoding in a window", 2, 2, {"window": (1, 0)}),
        ("decoding with a sink", 4, 2, {"sink": np.array([0.5, -1.0, 0.0, 1.0])}),
        ("decoding, room set aside", 4, 2, {"capacity": (2, 2, 7, 2, 2)}),
        ("decoding, NaN behind lengths", 2, 2, {"valid_lens": np.array([5, 2])}),
        ("decoding, NaN behind lengths, room set aside", 4, 2, {"capacity": (2, 2, 7, 2, 2), "valid_lens": np.array([1, 4])}),
    ]
    for name, heads, kv_heads, options in forms:
        x = grid(rng, *options.pop("batch", (2,)), 5, 3)
        params = params_of(rng, heads, kv_heads)
        params |= {"sink": options.pop("sink")} if "sink" in options else {}
        call_options = {n: y for n, y in options.items() if n != "capacity"}
        case = multi_head(name, [x] * 3, params, rng, heads=heads, kv_heads=kv_heads, grad=False, causal=True, **call_options)
        keywords = {n: y for n, y in case.keywords.items() if n != "causal"} | options
        arguments = dict(case.arguments)
        for hidden in ("key", "value") if "NaN" in name else ():
            behind = np.arange(5) >= call_options["valid_lens"][:, None]
            arguments[hidden] = np.where(behind[..., None], np.nan, arguments[hidden])
        yield Case(name, "decoding", "decoding", arguments, keywords, case.answer, case.magnitude, case.largest_score)
