"""The cases of scores and normalisers: each by itself, and as ``score=`` and ``normalize=`` of attention, with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from kvattn.conformance import oracle
from kvattn.conformance.cases import DTYPES, WEIGHTS, Case, attend, flags, grid, kink_free, qkv

INF, NAN = np.inf, np.nan
SIMPLE = ("dot_score", "scaled_dot_score", "cosine_score", "distance_score")
KERNELS = ("gaussian_kernel", "boxcar_kernel", "triangular_kernel", "epanechnikov_kernel", "constant_kernel")
NORMALISERS = ("softmax", "masked_softmax", "sparsemax", "hardmax", "proportional", "average", "identity")
WIDTH = 2.6  # no distance on the grid has u = 1 for it, where some kernels have a kink


def parametrised(rng: np.random.Generator, d_q: int, d_k: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    W_q, W_k, w_v, b = grid(rng, d_q, 2, top=1), grid(rng, d_k, 2, top=1), grid(rng, 2), grid(rng, 2)
    yield "additive_score", {"W_q": W_q, "W_k": W_k, "w_v": w_v, "b": b}
    yield "multiplicative_score", {"W": grid(rng, d_q, d_k, top=1)}
    if d_q == d_k:
        yield "gated_score", {"w_g": grid(rng, 2 * d_q, top=1)}


def scores(rng: np.random.Generator) -> Iterator[Case]:
    make = partial(attend, group="scores", rng=rng)
    q, k, v = qkv(rng)
    with_parameters = [*parametrised(rng, 3, 3)]
    with_parameters.append(("additive_score", {n: x for n, x in with_parameters[0][1].items() if n != "b"}))
    all_of_them: list[tuple[str, dict[str, Any]]] = [
        *((name, {}) for name in SIMPLE),
        *with_parameters,
        *((name, {"width": WIDTH}) for name in KERNELS),
    ]
    for name, parameters in all_of_them:
        label = f"{name} without b" if name == "additive_score" and "b" not in parameters else name
        yield pair_scores(f"{label} itself", q, k, name, parameters)
        score = (name, parameters) if parameters else name
        yield make(label, q, k, v, score=score)
        options: dict[str, Any] = {"mask": flags(rng, 4, 5), "bias": grid(rng, 5), "scale": 0.5}
        yield make(f"{label}, masked", q, k, v, grad=False, score=score, **options, asked=())
    yield pair_scores("epanechnikov_kernel of width 1", q, k, "epanechnikov_kernel", {})
    q, k = grid(rng, 2, 2, 4, 3), grid(rng, 2, 2, 5, 2)
    for name, parameters in parametrised(rng, 3, 2):
        yield pair_scores(f"{name}, d_q != d_k itself", q, k, name, parameters)
        yield make(f"{name}, d_q != d_k", q, k, v, score=(name, parameters))
    q, k, v = qkv(rng)
    k[:, :, 1], q[:, :, 2] = 0, 0
    yield pair_scores("cosine of a zero vector itself", q, k, "cosine_score", {})
    yield make("cosine of a zero vector", q, k, v, score="cosine_score")
    k = np.concatenate([q, k[:, :, :1]], axis=-2)
    for name in ("distance_score", *KERNELS):
        yield make(f"{name} at distance 0", q, k, v, score=name)
    far = 1000.0 + grid(rng, 4, 3)  # |q|^2 + |k|^2 - 2 q.k would cancel here
    yield pair_scores("distance of near vectors", far, far[:3] + grid(rng, 3, 3) / 8, "distance_score", {}, ("float32",))


def pair_scores(
    name: str, query: np.ndarray, key: np.ndarray, score: str, parameters: dict[str, Any], dtypes: tuple[str, ...] = DTYPES
) -> Case:
    answer = oracle.scores(score, query, key, **parameters)
    arrays = {n: x for n, x in parameters.items() if isinstance(x, np.ndarray)}
    numbers = {n: x for n, x in parameters.items() if n not in arrays}
    return Case(name, "scores", score, {"query": query, "key": key, **arrays}, numbers, *answer, dtypes)


def pooling(rng: np.random.Generator) -> Iterator[Case]:
    """normalize= anything, with gradients; and Nadaraya-Watson, which is a kernel, normalised in proportion."""
    make = partial(attend, group="pooling", rng=rng)
    wide, wider = {"width": WIDTH}, {"width": 2 * WIDTH}
    for normalize, score in (
        ("sparsemax", "scaled_dot_score"),
        ("sparsemax", "distance_score"),
        ("hardmax", "scaled_dot_score"),
        ("average", "dot_score"),
        ("identity", "scaled_dot_score"),
        ("identity", "gaussian_kernel"),
        ("proportional", "scaled_dot_score"),
        ("proportional", "constant_kernel"),
        ("proportional", ("gaussian_kernel", wide)),
        ("proportional", ("boxcar_kernel", wide)),
        ("proportional", ("epanechnikov_kernel", wider)),
        ("proportional", ("triangular_kernel", wider)),
    ):
        for which in ({}, {"mask": rows_of(rng), "scale": 0.5}):
            options: dict[str, Any] = {"score": score, "normalize": normalize, **which}
            q, k, v = qkv(rng)
            while not kink_free(q, k, v, **options):
                q, k, v = qkv(rng)
            label = f"{normalize} of {score[0] if isinstance(score, tuple) else score}"
            yield make(", ".join([label, *which]), q, k, v, **options, asked=WEIGHTS)
    ties = np.repeat(grid(rng, 2, 2, 1, 3), 5, axis=-2)
    yield make("hardmax of equals", grid(rng, 2, 2, 4, 3), ties, grid(rng, 2, 2, 5, 2), normalize="hardmax", asked=WEIGHTS)
    for name in KERNELS:
        x, y, at = grid(rng, 6), grid(rng, 6), np.array([-1.5, 0.25, 1.0, 9.0])
        yield regression(f"nadaraya_watson, {name}", x, y, at, name)
    yield regression("nadaraya_watson of vectors", grid(rng, 5, 2), grid(rng, 5, 3), grid(rng, 4, 2), None)


def rows_of(rng: np.random.Generator) -> np.ndarray:
    mask = flags(rng, 4, 5)
    mask[1], mask[2] = False, True
    return mask


def regression(name: str, x_train: np.ndarray, y_train: np.ndarray, x: np.ndarray, kernel: str | None) -> Case:
    query, key, value = (a[:, None] if a.ndim == 1 else a for a in (x, x_train, y_train))
    answer = oracle.attention(query, key, value, score=kernel or "gaussian_kernel", normalize="proportional")
    output = answer.values["output"]
    values = {"output": output[:, 0] if y_train.ndim == 1 else output, "weights": answer.values["weights"]}
    keywords = {"kernel": kernel} if kernel else {}
    return Case(name, "pooling", "nadaraya_watson", {"x_train": x_train, "y_train": y_train, "x": x}, keywords, values,
                answer.magnitude, answer.largest_score, results=("output", "weights"))  # fmt: skip


def normal(
    name: str, group: str, function: str, scores: np.ndarray, dtypes: tuple[str, ...] = DTYPES, **arguments: np.ndarray
) -> Case:
    answer = oracle.normalise(function, scores, **arguments)
    return Case(name, group, function, {"scores": scores, **arguments}, {}, *answer, dtypes)


def beside_nan(rng: np.random.Generator, name: str) -> Case:
    """Rows with NaN have 0 where nothing may be attended to; what they have elsewhere, only softmax says, in attention."""
    s, where = grid(rng, 2, 4, 5, top=1) + (1.0 if name == "proportional" else 0.0), flags(rng, 2, 4, 5)
    where[0, :3], where[1, 1, 0], where[1, 3] = [True, False, True, False, True], True, False
    case, bad = normal(f"{name} beside NaN", "normalisers", name, s, where=where), s.copy()
    bad[0, 1, 2] = bad[0, 2, 1] = bad[1, 1, 0] = bad[1, 3] = NAN  # of which the second and the last are hidden
    defined = ~(np.isnan(bad) & where).any(axis=-1, keepdims=True) | ~where
    return replace(case, arguments={"scores": bad, "where": where}, judged={"output": defined})


def normalisers(rng: np.random.Generator) -> Iterator[Case]:
    for name in NORMALISERS:
        s = grid(rng, 2, 4, 5, top=1) + (1.0 if name == "proportional" else 0.0)
        where = flags(rng, 2, 4, 5)
        where[0, 1], where[1, 0] = False, True
        yield normal(f"{name} itself", "normalisers", name, s)
        yield normal(f"{name} where", "normalisers", name, s, where=where)
        yield normal(f"{name} where nothing", "empty rows", name, s, where=np.zeros((4, 1), bool))
        yield normal(f"{name} of no keys", "empty rows", name, s[..., :0])
        yield normal(f"{name} of one axis", "normalisers", name, s[0, 0])
        if name in ("softmax", "sparsemax", "hardmax"):
            yield normal(f"{name} of large scores", "normalisers", name, 256.0 * np.abs(s), where=where)
    s = grid(rng, 2, 4, 5)
    yield normal("proportional of zeros", "normalisers", "proportional", np.array([[0.0, 0.0], [1.0, 3.0], [1.0, -1.0]]))
    equals, where = np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]]), np.array([[False, True, True], [True] * 3])
    yield normal("hardmax of equals itself", "normalisers", "hardmax", equals, where=where)
    yield normal("sparsemax of equals", "normalisers", "sparsemax", np.array([[1.0, 1.0, 1.0], [5.0, 5.0, 0.0]]))
    yield normal("softmax of -inf", "normalisers", "softmax", np.array([[1.0, -INF, 0.5], [-INF, 2.0, -INF]]))
    per_query = np.array([[1, 0, 9, 5], [2, 2, 4, 3]])
    for label, lens in (("(b,)", np.array([3, 0])), ("(b, n)", per_query)):
        yield normal(f"masked_softmax {label}", "normalisers", "masked_softmax", s, valid_lens=lens)
    yield normal("masked_softmax, where", "normalisers", "masked_softmax", s, valid_lens=np.array([3, 4]), where=flags(rng, 5))
    four = grid(rng, 2, 2, 4, 5)
    yield normal("masked_softmax, 4 axes", "normalisers", "masked_softmax", four, valid_lens=np.array([2, 4]))
    yield normal("masked_softmax, 4 axes, (b, n)", "normalisers", "masked_softmax", four, valid_lens=per_query)
    low, lens = np.floor(s) - 2.0**21, np.array([2, 4])  # below the -1e6 that d2l fills in for what is masked
    yield normal("masked_softmax below -1e6", "normalisers", "masked_softmax", low, valid_lens=lens, dtypes=DTYPES[:2])
    for name in NORMALISERS:
        yield beside_nan(rng, name)
