"""The cases of NaN, inf and overflow in pairs that may attend: they change the rows of those pairs, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from kvattn.conformance import oracle
from kvattn.conformance.cases import LSE, NOT_FINITE, WEIGHTS, Case, attend, flags, grid, kink_free, merged, qkv
from kvattn.conformance.multihead import multi_head, params_of

INF, NAN = np.inf, np.nan
HUGE = {"float64": 2.0**600, "float32": 2.0**100, "bfloat16": 2.0**100}  # its square is inf where scores are computed


def cases(rng: np.random.Generator) -> Iterator[Case]:
    yield from small(rng)
    yield from overflows(rng)
    yield from others(rng)
    yield from parts(rng)
    yield from large(rng)
    yield from at_nothing(rng)


def _signed(rng: np.random.Generator, n: int = 5, **sizes: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries and keys whose first feature is positive: what is inf there has scores of inf."""
    q, k, v = qkv(rng, n=n, m=n, **sizes)
    for x in (q, k):
        x[..., 0] = np.abs(x[..., 0]) + 1 / 16
    return q, k, v


def small(rng: np.random.Generator) -> Iterator[Case]:
    make = partial(attend, group=NOT_FINITE, rng=rng)
    chosen = np.array([[0, 2, 4], [4, 1, 0], [3, -1, 2], [1, 0, 3], [2, 4, -1]])
    mask = np.array([[j <= i or (i + j) % 3 == 0 for j in range(5)] for i in range(5)])
    mask[4, 3] = False
    forms: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"causal": True},
        "lengths": {"valid_lens": np.array([3, 4])},
        "lengths (b, n)": {"valid_lens": np.array([[1, 2, 0, 5, 4], [7, 0, 2, 3, 5]])},
        "a window": {"window": (1, 0), "query_offset": 1},
        "a mask": {"mask": mask},
        "a bias": {"causal": True, "bias": np.where(np.eye(5)[::-1] > 0, -INF, grid(rng, 5, 5))},
        "positions": {"positions": chosen},
        "a softcap": {"causal": True, "softcap": 2.0, "scale": 0.5},
    }
    # One NaN only, so that the result shows it alone.
    single_faults = (("plain", ()), ("causal", ()), ("causal", WEIGHTS + LSE), ("lengths (b, n)", LSE), ("a mask", ()))
    for name, asked in single_faults:
        label, options = ", ".join([name, *asked]), forms[name]
        q, k, v = _signed(rng)
        q[0, 0, 3, 1] = NAN
        yield make(f"a NaN query, {label}", q, k, v, asked=asked, **options)
        q, k, v = _signed(rng)
        k[1, 0, 2] = NAN
        yield make(f"a NaN key, {label}", q, k, v, asked=asked, **options)
        q, k, v = _signed(rng)
        v[0, 1, 2, 1] = NAN
        yield make(f"a NaN value, {label}", q, k, v, asked=asked, **options)
    # Then NaN in query, key and value, each in another batch entry or head.
    for number, (name, options) in enumerate(forms.items()):
        q, k, v = _signed(rng, lead=(2, 4 if number % 2 else 2), kv=(2, 2))
        bad = NAN if name == "a softcap" else INF  # tanh(inf) is 1
        q[0, 0, 3, 0], k[0, 1, 2, 0], v[1, 0, 2, 0], v[1, 1, 1, 1] = bad, bad, NAN, INF
        label = f"inf and NaN, {name}{', grouped heads' * (number % 2)}"
        yield make(label, q, k, v, **options, asked=() if number % 4 < 2 else LSE)
    q, k, v = _signed(rng, lead=())
    q[3, 0] = NAN
    yield make("a NaN query, 2 axes", q, k, v, causal=True)
    q, k, v = _signed(rng)
    bias = grid(rng, 2, 2, 5, 5)
    bias[0, 0, 3, 1], bias[0, 1, 2, 2], bias[1, 0, 4, 4], bias[1, 1, 0, 3] = NAN, INF, NAN, NAN
    yield make("a bias of NaN and inf", q, k, v, bias=bias)
    yield make("a bias of NaN and inf, causal", q, k, v, bias=bias, causal=True, asked=())
    yield make("a bias of NaN for a key", q, k, v, bias=np.array([0.5, 0.0, -1.0, NAN, 1.0]), causal=True)
    q, k, v = _signed(rng)
    q[..., 0], k[:, :, 2, 0] = -q[..., 0], INF
    yield make("scores of -inf", q, k, v, grad=False)
    yield make("scores of -inf, causal", q, k[:, :, 2:], v[:, :, 2:], grad=False, causal=True)


def at_nothing(rng: np.random.Generator) -> Iterator[Case]:
    """NaN beside rows without keys, and beside scores of -inf, which must stay as they are."""
    make = partial(attend, group=NOT_FINITE, rng=rng)
    mask = np.roll(np.eye(5, dtype=bool), 1, axis=1) | np.eye(5, dtype=bool)
    mask[1], mask[2, 3] = False, False  # only query 3 attends to key 3
    q, k, v = _signed(rng)
    k[0, 1, 3, 1] = NAN
    yield make("a NaN key, a mask with an empty row", q, k, v, mask=mask, asked=())
    yield make("a NaN key, a bias with an empty row", q, k, v, bias=np.where(mask, grid(rng, 5, 5), -INF), asked=())
    for name, which in (("key", 1), ("query", 0)):
        inputs = _signed(rng, n=20)
        inputs[0][..., 0] *= -1
        inputs[which][0, 1, 2, 0] = -INF if name == "query" else INF
        case = make(f"scores of -inf of one {name}, causal", *inputs, causal=True, asked=())
        # In rows with such a score the gradients are 0 * inf: only those of other rows are judged.
        yield replace(case, judged={what: np.isfinite(x) for what, x in case.answer.items()})
    lens = rng.integers(0, 4, 600)  # keys of 600 queries, long enough for tiles
    lens[[0, 257, 599]] = 0
    empty: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "lengths": ({}, {"valid_lens": np.array([0, 3])}),
        "a mask": ({}, {"mask": np.array([True, False, True, False])[:, None] & flags(rng, 4, 5)}),
        "an offset": ({}, {"causal": True, "query_offset": -2}),
        "many queries": ({"n": 600, "m": 600, "d": 2, "lead": ()}, {"valid_lens": lens}),
    }
    for name, (shape, options) in empty.items():
        case = make(f"a loss of NaN at rows without keys, {name}", *qkv(rng, **shape), asked=LSE, **options)
        sees = np.isfinite(case.answer["lse"])[..., None]
        yield replace(case, arguments={**case.arguments, "grad_output": np.where(sees, case.arguments["grad_output"], NAN)})
    for n in (5, 20):  # A tab may compute all rows again because of the one with NaN: the others keep their bias.
        q, k, v = _signed(rng, n=n)
        q[0, 0, 3, 1] = NAN
        yield make(f"a NaN query, a bias of {n} keys", q, k, v, bias=grid(rng, 2, 2, n, n), asked=())
    q, k, v = _signed(rng)
    k[0, 1, 3, 1] = NAN
    yield make("a NaN key, causal, scaled", q, k, v, causal=True, scale=0.5, asked=())  # some rows see it, and some do not


def overflows(rng: np.random.Generator) -> Iterator[Case]:
    """Query 3 times key 2 overflows; only query 3 attends to that key, whose other products are nearly as large."""
    mask = flags(rng, 5, 5)
    mask[:, 2], mask[3, 2], mask[3, 0] = False, True, True
    for dtypes in (("float64",), ("float32", "bfloat16")):
        q, k, v = qkv(rng, n=5, m=5)
        q[..., 0] = k[..., 0] = 0
        q[:, 0, 3, 0] = k[:, 0, 2, 0] = HUGE["float64"]
        case = attend(f"a score that overflows in {dtypes[0]}", q, k, v, mask=mask, group=NOT_FINITE, rng=rng,
                      dtypes=("float64",))  # fmt: skip
        arguments = {n: np.where(x == HUGE["float64"], HUGE[dtypes[0]], x) if x.dtype.kind == "f" else x
                for n, x in case.arguments.items()}  # fmt: skip
        yield replace(case, arguments=arguments, dtypes=dtypes)


def others(rng: np.random.Generator) -> Iterator[Case]:
    """Scores that are NaN for NaN; then normalisers, and scores that may not be, where only other rows are promised."""
    W_q, W_k, w_v = grid(rng, 3, 2, top=1), grid(rng, 3, 2, top=1), grid(rng, 2)
    for score in (
        "cosine_score",
        "distance_score",
        ("additive_score", {"W_q": W_q, "W_k": W_k, "w_v": w_v}),
        ("multiplicative_score", {"W": grid(rng, 3, 3, top=1)}),
        ("gated_score", {"w_g": grid(rng, 6, top=1)}),
    ):
        q, k, v = _signed(rng)
        q[0, 0, 3, 0], k[0, 1, 2, 0], v[1, 0, 2, 0] = NAN, NAN, NAN
        name = score[0] if isinstance(score, tuple) else score
        yield attend(f"NaN, causal, {name}", q, k, v, group=NOT_FINITE, rng=rng, score=score, causal=True, asked=())
    q, k, v = qkv(rng, d=0)
    v[0, 0, 2, 0] = NAN
    yield attend("a NaN value, no features", q, k, v, group=NOT_FINITE, rng=rng, score="distance_score", causal=True,
                 bias=grid(rng, 4, 5), asked=())  # fmt: skip
    for options in (
        {"normalize": "sparsemax"},
        {"normalize": "hardmax"},
        {"normalize": "average"},
        {"normalize": "identity"},
        {"normalize": "proportional", "score": "gaussian_kernel"},
        {"score": "epanechnikov_kernel"},
    ):
        yield _other_rows(rng, options)


def _other_rows(rng: np.random.Generator, options: dict[str, Any]) -> Case:
    """Judged where softmax would be finite, by the answer of a call with numbers in place of NaN."""
    q, k, v = _signed(rng)
    while not kink_free(q, k, v, causal=True, **options):
        q, k, v = _signed(rng)
    case = attend(f"NaN, causal, {', '.join(options.values())}", q, k, v, group=NOT_FINITE, rng=rng, causal=True,
                  asked=WEIGHTS, **options)  # fmt: skip
    q, k, v = q.copy(), k.copy(), v.copy()
    q[0, 0, 3, 0], k[0, 1, 2, 0], v[1, 0, 2, 0] = NAN, NAN, NAN
    with_nan = oracle.attention(q, k, v, case.arguments["grad_output"], causal=True).values
    judged = {what: np.isfinite(with_nan[what]) for what in case.answer}
    return replace(case, arguments={**case.arguments, "query": q, "key": k, "value": v}, judged=judged)


def sinks(rng: np.random.Generator) -> Iterator[Case]:
    """A sink that is not finite is a score of every row of its head, but for those without a key."""
    make = partial(attend, group=NOT_FINITE, rng=rng)
    mask = np.array([[j <= i and i != 2 for j in range(5)] for i in range(4)])
    yield make("a sink of NaN", *qkv(rng), sink=np.array([NAN, 0.5]), mask=mask)
    yield make("a sink of inf", *qkv(rng), sink=np.array([[0.5, INF], [0.0, -1.0]]), mask=mask, asked=LSE)
    yield make("a sink of NaN, causal", *qkv(rng), sink=np.array([0.5, NAN]), causal=True, asked=())
    q, k, v = _signed(rng)
    q[0, 0, 3, 0], k[0, 1, 2, 0], v[1, 0, 2, 0], v[1, 1, 1, 1] = INF, INF, NAN, INF
    yield make("a sink beside inf and NaN, causal", q, k, v, sink=grid(rng, 2), causal=True)
    q, k, v = qkv(rng)
    q[1, 0, 3, 0], v[0, 0, 2, 1] = NAN, NAN
    none = np.array([-INF, 0.5])  # a sink of -inf is no score, and has no gradient even where the row is NaN
    yield make("a sink of -inf beside NaN", q, k, v, sink=none, asked=())
    yield make("a sink of -inf beside NaN, a softcap", q, k, v, sink=none, softcap=2.0, valid_lens=np.array([4, 5]), asked=())


def scores_out(rng: np.random.Generator) -> Iterator[Case]:
    """A score that is not finite is its own pair's alone, and -inf stands for every pair that may not attend."""
    make = partial(attend, group=NOT_FINITE, rng=rng, causal=True)
    q, k, v = _signed(rng)
    q[0, 0, 3, 0], k[0, 1, 2, 0], v[1, 0, 2, 0] = NAN, INF, NAN
    yield make("NaN and inf beside scores, causal", q, k, v, return_scores="raw")
    bias = np.where(np.arange(5) == 3, NAN, grid(rng, 5, 5))
    yield make("a bias of NaN beside scores, causal", *_signed(rng), bias=bias, return_scores="biased", asked=())


def parts(rng: np.random.Generator) -> Iterator[Case]:
    """Merged parts, and projected heads."""
    outputs, lses = grid(rng, 3, 2, 4, 2), grid(rng, 3, 2, 4)
    lses[0, 0, 1] = lses[2, :, 3] = -INF
    lses[1, 0, 2], outputs[1, 0, 2], outputs[0, 1, 0, 1], outputs[2, :, 3] = NAN, NAN, NAN, NAN
    yield merged("merge with NaN in two rows", outputs, lses, NOT_FINITE)
    for name, kv_heads in (("causal", 2), ("causal, one key head", 1)):
        x, y, z = (grid(rng, 2, 4, 3) for _ in range(3))
        x[0, 2, 1] = y[1, 3, 1] = NAN
        params = params_of(rng, 2, kv_heads)
        yield multi_head(f"heads: NaN, {name}", (x, y, z), params, rng, kv_heads=kv_heads, group=NOT_FINITE, causal=True)
    x = grid(rng, 2, 5, 3)
    x[0, 3, 0] = NAN
    case = multi_head("decoding, NaN", [x] * 3, params_of(rng, 2, 2), rng, grad=False, causal=True, group=NOT_FINITE)
    yield replace(case, call="decoding", keywords={"num_heads": 2})


def large(rng: np.random.Generator) -> Iterator[Case]:
    """Long enough for tiles and blocks, whose edges lie at multiples of 128 or 256; the loss depends on some rows only."""

    def make(name: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, rows: list[int], **options: Any) -> Case:
        loss_rows = np.zeros(q.shape[-2], bool)
        loss_rows[rows] = True
        return attend(name, q, k, v, group=NOT_FINITE, rng=rng, grad=loss_rows, **options)

    def inputs(n: int = 600, lead: tuple[int, ...] = (), **sizes: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return qkv(rng, n=n, m=600, d=2, v=2, lead=lead, **sizes)

    q, k, v = inputs()
    q[300, 1], q[20, 0], k[:21, 0] = NAN, INF, np.abs(k[:21, 0]) + 1 / 16
    yield make("a NaN query of 600, causal", q, k, v, [0, 255, 256, 299, 301, 599], causal=True, asked=())
    q, k, v = inputs()
    k[500, 0] = NAN
    yield make("a NaN key of 600, causal window", q, k, v, [400, 499, 511, 599], causal=True, window=(99, None), asked=LSE)
    q, k, v = inputs()
    v[256, 0], v[255, 1] = NAN, INF
    yield make("a NaN value of 600, causal", q, k, v, [3, 254, 255, 256, 599], causal=True, asked=())
    q, k, v = inputs(280, (2,), kv=(1,))
    lens, bias = rng.integers(0, 601, (2, 280)), grid(rng, 600)
    lens[:, :3], lens[:, 200:203], bias[400] = [400, 401, 256], [0, 600, 255], NAN
    yield make("a bias of NaN for a key of 600, lengths", q, k, v, [1, 2, 200, 201, 202], valid_lens=lens, bias=bias, asked=LSE)
