"""The generated cases, a family to a function: each takes the random generator and yields its cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from kvattn.conformance import oracle
from kvattn.conformance.cases import DTYPES, Case, attend, grid, kink_free, poisoned

NAN, INF = np.nan, np.inf
EVERYTHING = {"return_weights": True, "return_lse": True}


def every(rng: np.random.Generator) -> Iterator[Case]:
    for family in (plain, masks, biases, lengths, causal, windows, caps, groups, shapes, large, padding, positions, scores,
                   pooling, normalisers, merging, blocks, covariance, combinations):  # fmt: skip
        yield from family(rng)


def qkv(rng, n=4, m=5, d=3, v=2, lead=(2, 2), kv=None):
    kv = lead if kv is None else kv
    return grid(rng, *lead, n, d), grid(rng, *kv, m, d), grid(rng, *kv, m, v)


def flags(rng, *shape):
    return rng.random(shape) < 0.6


# ---- softmax attention and its keywords


def plain(rng):
    yield attend("plain", "plain", *qkv(rng), rng=rng, **EVERYTHING)
    yield attend("output alone", "plain", *qkv(rng), rng=rng)
    yield attend("with weights", "plain", *qkv(rng), rng=rng, return_weights=True, grad=False)
    yield attend("with lse", "plain", *qkv(rng), rng=rng, return_lse=True, grad=False)
    yield attend("n = m", "plain", *qkv(rng, n=4, m=4, d=4, v=4), rng=rng)
    yield attend("scale", "scale", *qkv(rng), rng=rng, scale=0.75, **EVERYTHING)
    yield attend("negative scale", "scale", *qkv(rng), rng=rng, scale=-1.5, **EVERYTHING)
    yield attend("zero scale", "scale", *qkv(rng), rng=rng, scale=0.0, **EVERYTHING)
    yield attend("scale 1", "scale", *qkv(rng), rng=rng, scale=1.0)
    yield attend("scale of another score", "scale", *qkv(rng), rng=rng, scale=0.25, score="distance_score", **EVERYTHING)


def masks(rng):
    for shape in ((2, 2, 4, 5), (5,), (4, 5), (4, 1), (2, 1, 1, 5), (1, 2, 4, 5), (2, 4, 5), ()):
        mask = flags(rng, *shape) if shape else np.array(True)
        yield attend(f"mask {shape}", "masks", *qkv(rng), rng=rng, grad=len(shape) in (1, 4), mask=mask, **EVERYTHING)
    yield attend("mask without batch", "masks", *qkv(rng, lead=()), rng=rng, mask=flags(rng, 4, 5), **EVERYTHING)
    rows = flags(rng, 2, 2, 4, 5)
    rows[0, 0, 1] = rows[1, :, 2] = False
    yield attend("mask with empty rows", "empty rows", *qkv(rng), rng=rng, mask=rows, **EVERYTHING)
    yield attend("mask of nothing", "empty rows", *qkv(rng), rng=rng, mask=np.zeros((4, 5), bool), **EVERYTHING)
    yield attend("mask of a column", "empty rows", *qkv(rng), rng=rng, grad=False, mask=np.array([[True], [False], [True], [False]]), **EVERYTHING)
    yield attend("mask () of nothing", "empty rows", *qkv(rng), rng=rng, mask=np.array(False), **EVERYTHING)


def biases(rng):
    for shape in ((2, 2, 4, 5), (5,), (4, 1), (2, 1, 1, 5), (1, 2, 4, 5)):
        yield attend(f"bias {shape}", "bias", *qkv(rng), rng=rng, bias=grid(rng, *shape), **EVERYTHING)
    forbidding = np.where(flags(rng, 2, 2, 4, 5), grid(rng, 2, 2, 4, 5), -INF)
    forbidding[0, 1, 2] = -INF
    yield attend("bias -inf", "bias", *qkv(rng), rng=rng, bias=forbidding, **EVERYTHING)
    yield attend("bias -inf for a column", "bias", *qkv(rng), rng=rng, bias=np.array([0.5, -INF, 0.0, -1.0, -INF]), **EVERYTHING)
    yield attend("bias -inf for all", "empty rows", *qkv(rng), rng=rng, bias=np.full((4, 5), -INF), **EVERYTHING)
    yield attend("bias and mask", "bias", *qkv(rng), rng=rng, bias=forbidding[0, 0], mask=flags(rng, 2, 1, 1, 5), **EVERYTHING)
    finite = np.where(flags(rng, 4, 5), 0.0, -30000.0 + 48)  # a float mask as others write it: a bias like any other
    yield attend("bias -29952", "bias", *qkv(rng), rng=rng, bias=finite, **EVERYTHING)


def lengths(rng):
    for name, lens in (("batch", [3, 5]), ("beyond m", [9, 2]), ("of 0", [0, 4]), ("of all 0", [0, 0]), ("of 1", [1, 1])):
        group = "empty rows" if "0" in name else "lengths"
        yield attend(f"valid_lens {name}", group, *qkv(rng), rng=rng, grad=name in ("batch", "of 0"), valid_lens=np.array(lens), **EVERYTHING)
    per_query = np.array([[1, 2, 0, 5], [7, 0, 3, 4]])
    yield attend("valid_lens (b, n)", "lengths", *qkv(rng), rng=rng, valid_lens=per_query, **EVERYTHING)
    yield attend("valid_lens (b, n), 3 axes", "lengths", *qkv(rng, lead=(2,)), rng=rng, valid_lens=per_query, **EVERYTHING)
    yield attend("valid_lens (b,), 3 axes", "lengths", *qkv(rng, lead=(2,)), rng=rng, grad=False, valid_lens=np.array([2, 4]), **EVERYTHING)
    yield attend("valid_lens (b,), 5 axes", "lengths", *qkv(rng, lead=(2, 2, 2), n=2, m=3), rng=rng, grad=False, valid_lens=np.array([2, 1]), **EVERYTHING)
    yield attend("valid_lens ()", "lengths", *qkv(rng, lead=()), rng=rng, grad=False, valid_lens=np.array(3), **EVERYTHING)
    yield attend("valid_lens (n,)", "lengths", *qkv(rng, lead=()), rng=rng, valid_lens=np.array([0, 2, 3, 9]), **EVERYTHING)
    yield attend("valid_lens n = batch", "lengths", *qkv(rng, n=2, m=3), rng=rng, grad=False, valid_lens=np.array([1, 2]), **EVERYTHING)


def causal(rng):
    for n, m, offset in ((4, 5, 0), (4, 5, 1), (4, 5, -1), (4, 5, -9), (4, 5, 9), (5, 3, 0), (3, 5, 2), (1, 5, 4)):
        group = "empty rows" if offset < 0 else "causal"
        yield attend(f"causal {n} x {m}, offset {offset}", group, *qkv(rng, n=n, m=m), rng=rng, grad=(n, m) == (4, 5), causal=True, query_offset=offset, **EVERYTHING)
    per_batch = np.array([2, -1])
    yield attend("causal, offset per batch", "causal", *qkv(rng), rng=rng, causal=True, query_offset=per_batch, **EVERYTHING)
    yield attend("causal, offset ()", "causal", *qkv(rng), rng=rng, grad=False, causal=True, query_offset=np.array(1), **EVERYTHING)
    yield attend("causal, 2 axes", "causal", *qkv(rng, lead=()), rng=rng, causal=True, query_offset=1, **EVERYTHING)
    yield attend("causal, 3 axes", "causal", *qkv(rng, lead=(2,)), rng=rng, causal=True, query_offset=per_batch, **EVERYTHING)
    yield attend("offset without causal", "causal", *qkv(rng), rng=rng, grad=False, query_offset=3, **EVERYTHING)
    yield attend("causal and lengths", "causal", *qkv(rng), rng=rng, causal=True, valid_lens=np.array([2, 9]), **EVERYTHING)
    yield attend("causal, mask and bias", "causal", *qkv(rng), rng=rng, causal=True, mask=flags(rng, 2, 1, 1, 5), bias=grid(rng, 4, 5), **EVERYTHING)


def windows(rng):
    for window in (1, 0, 9, (1, 0), (0, 2), (1, None), (None, 1), (None, None)):
        yield attend(f"window {window}", "window", *qkv(rng), rng=rng, grad=window in (1, (0, 2)), window=window, **EVERYTHING)
    yield attend("window, offset 2", "window", *qkv(rng), rng=rng, grad=False, window=1, query_offset=2, **EVERYTHING)
    yield attend("window, offset -3", "window", *qkv(rng), rng=rng, window=(1, 2), query_offset=-3, **EVERYTHING)
    yield attend("window and causal", "window", *qkv(rng), rng=rng, window=2, causal=True, **EVERYTHING)
    yield attend("window (1, None) and causal", "window", *qkv(rng), rng=rng, window=(1, None), causal=True, query_offset=1, **EVERYTHING)
    yield attend("window, offset per batch", "window", *qkv(rng), rng=rng, window=1, query_offset=np.array([0, 3]), **EVERYTHING)


def caps(rng):
    mask, bias = flags(rng, 4, 5), grid(rng, 2, 1, 4, 5, top=4)
    yield attend("softcap", "softcap", *qkv(rng), rng=rng, softcap=2.0, **EVERYTHING)
    yield attend("softcap, scale", "softcap", *qkv(rng), rng=rng, softcap=1.5, scale=2.0, **EVERYTHING)
    yield attend("softcap, bias", "softcap", *qkv(rng), rng=rng, softcap=1.0, bias=bias, **EVERYTHING)
    yield attend("softcap, mask", "softcap", *qkv(rng), rng=rng, softcap=0.5, mask=mask, **EVERYTHING)
    yield attend("softcap, mask, bias, scale", "softcap", *qkv(rng), rng=rng, softcap=1.0, mask=mask, bias=bias, scale=0.5, **EVERYTHING)
    yield attend("softcap of another score", "softcap", *qkv(rng), rng=rng, softcap=1.0, score="distance_score", **EVERYTHING)


# ---- shapes


def groups(rng):
    for name, lead, kv in (("2 of 4", (2, 4), (2, 2)), ("1 of 4", (2, 4), (2, 1)), ("3 of 6", (1, 6), (1, 3)), ("3 axes", (4,), (2,))):
        yield attend(f"grouped heads {name}", "grouped heads", *qkv(rng, lead=lead, kv=kv, n=3), rng=rng, grad=name[0] != "3", **EVERYTHING)
    q, k, v = qkv(rng, lead=(2, 4), kv=(2, 2))
    yield attend("grouped heads, mask per head", "grouped heads", q, k, v, rng=rng, mask=flags(rng, 1, 4, 4, 5), **EVERYTHING)
    yield attend("grouped heads, bias per head", "grouped heads", q, k, v, rng=rng, bias=grid(rng, 4, 4, 5), **EVERYTHING)
    yield attend("grouped heads, lengths", "grouped heads", q, k, v, rng=rng, valid_lens=np.array([[1, 2, 3, 0], [4, 5, 0, 1]]), **EVERYTHING)
    yield attend("grouped heads, causal", "grouped heads", q, k, v, rng=rng, causal=True, query_offset=np.array([0, 2]), **EVERYTHING)
    additive = ("additive_score", {"W_q": grid(rng, 3, 2), "W_k": grid(rng, 3, 2), "w_v": grid(rng, 2), "b": grid(rng, 2)})
    yield attend("grouped heads, additive", "grouped heads", q, k, v, rng=rng, score=additive, softcap=1.0, **EVERYTHING)


def shapes(rng):
    yield attend("no batch axis", "shapes", *qkv(rng, lead=()), rng=rng, **EVERYTHING)
    yield attend("3 axes", "shapes", *qkv(rng, lead=(3,)), rng=rng, grad=False, **EVERYTHING)
    yield attend("5 axes", "shapes", *qkv(rng, lead=(2, 2, 2), n=2, m=3), rng=rng, **EVERYTHING)
    yield attend("one key", "shapes", *qkv(rng, m=1), rng=rng, **EVERYTHING)
    yield attend("one query", "shapes", *qkv(rng, n=1), rng=rng, grad=False, **EVERYTHING)
    yield attend("one of each", "shapes", *qkv(rng, n=1, m=1, d=1, v=1, lead=()), rng=rng, grad=False, **EVERYTHING)
    yield attend("v > d", "shapes", *qkv(rng, d=2, v=5), rng=rng, grad=False, **EVERYTHING)
    yield attend("keys shared by the batch", "shapes", *qkv(rng, lead=(2, 2), kv=(1, 2)), rng=rng, **EVERYTHING)
    yield attend("no keys", "empty rows", *qkv(rng, m=0), rng=rng, **EVERYTHING)
    yield attend("no keys, 2 axes", "empty rows", *qkv(rng, m=0, lead=()), rng=rng, **EVERYTHING)
    yield attend("no keys, causal and lengths", "empty rows", *qkv(rng, m=0), rng=rng, causal=True, valid_lens=np.array([0, 3]), **EVERYTHING)
    yield attend("no keys, NaN queries", "empty rows", np.full((2, 2, 4, 3), NAN), *qkv(rng, m=0)[1:], rng=rng, **EVERYTHING)
    yield attend("no queries", "shapes", *qkv(rng, n=0), rng=rng, **EVERYTHING)


# ---- numbers


def large(rng):
    q, k, v = qkv(rng)
    yield attend("scores of 3000", "large scores", q, k, v, rng=rng, scale=1024.0, **EVERYTHING)
    yield attend("scores of -3000", "large scores", np.abs(q) + 1, -np.abs(k) - 1, v, rng=rng, scale=256.0, **EVERYTHING)
    yield attend("large bias", "large scores", q, k, v, rng=rng, bias=512.0 + grid(rng, 4, 5, top=128) * 0 + 4 * rng.integers(-3, 4, (4, 5)), **EVERYTHING)
    # products of 65536 and more, which cancel or do not; grids of multiples of 8 up to 256
    far = [8.0 * rng.integers(-32, 33, shape) for shape in ((2, 2, 4, 8), (2, 2, 5, 8))]
    yield attend("q.k of 1e5, scale", "half precision", *far, v, rng=rng, scale=2.0**-12, **EVERYTHING)
    yield attend("q.k of 1e5", "half precision", *far, v, rng=rng, **EVERYTHING)
    signs = np.array([1.0, 1, 1, 1, -1, -1, -1, -1])
    ones = 256.0 * np.ones((2, 2, 4, 8))
    near = 256.0 * signs + np.where(np.arange(8) < 4, 2.0, -2.0) * rng.integers(0, 2, (2, 2, 5, 8))
    yield attend("q.k that overflows on the way", "half precision", ones, near, v, rng=rng, scale=2.0**-9, **EVERYTHING)
    high = np.concatenate([np.full((2, 2, 4, 1), 128.0), grid(rng, 2, 2, 4, 2)], axis=-1)
    keys = np.concatenate([np.full((2, 2, 5, 1), 128.0), grid(rng, 2, 2, 5, 2)], axis=-1)
    yield attend("small differences of large scores", "half precision", high, keys, v, rng=rng, scale=1.0, dtypes=("float64", "float16", "bfloat16"), **EVERYTHING)
    yield attend("scores of 100", "half precision", 4 * q, 4 * k, v, rng=rng, scale=1.5, **EVERYTHING)
    yield attend("large values", "half precision", q, k, 8.0 * rng.integers(-32, 33, (2, 2, 5, 2)), rng=rng, grad=False, **EVERYTHING)


def padding(rng):
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
        *qkv_, rest = [*poisoned(rng, q, k, v, **which), None][:4]
        options = {**which, "bias": rest} if rest is not None else which
        yield attend(f"NaN behind {name}", "padding", *qkv_, rng=rng, **options, **EVERYTHING)
    lens = {"valid_lens": np.array([3, 2])}
    q, k, v = poisoned(rng, q, k, v, **lens)
    for name in ("dot_score", "cosine_score", "distance_score", "gaussian_kernel"):
        yield attend(f"NaN behind lengths, {name}", "padding", q, k, v, rng=rng, score=name, **lens, **EVERYTHING)
    for name, parameters in parametrised(rng, 3, 3):
        yield attend(f"NaN behind lengths, {name}", "padding", q, k, v, rng=rng, score=(name, parameters), **lens, **EVERYTHING)
    for name in ("sparsemax", "hardmax", "average", "identity"):
        yield attend(f"NaN behind lengths, {name}", "padding", q, k, v, rng=rng, normalize=name, grad=name != "sparsemax", return_weights=True, **lens)
    q, k, v = qkv(rng, n=3, m=6, lead=(2, 4), kv=(2, 2))
    which = {"mask": flags(rng, 2, 4, 3, 6) & mask}
    which["mask"][0, 1] = False
    yield attend("NaN behind a mask, grouped heads", "padding", *poisoned(rng, q, k, v, **which), rng=rng, **which, **EVERYTHING)
    q, k, v = qkv(rng, n=3, m=6, lead=())
    which = {"mask": flags(rng, 3, 6) & mask, "causal": True, "query_offset": 2}
    yield attend("NaN behind a mask, 2 axes", "padding", *poisoned(rng, q, k, v, **which), rng=rng, **which, **EVERYTHING)
    hidden = grid(rng, 2, 5)
    where = np.array([[True, False, True, True, False], [False] * 5])
    hidden[~where] = NAN
    yield normal("NaN behind where, softmax", "padding", "softmax", hidden, where=where)


# ---- selected keys


def positions(rng):
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
        yield attend(name, "positions", q, k, v, rng=rng, **which, **EVERYTHING)
    q, k, v = qkv(rng, lead=(2, 4), kv=(2, 2))
    yield attend("positions, grouped heads", "positions", q, k, v, rng=rng, positions=chosen, **EVERYTHING)
    yield attend("positions, 2 axes", "positions", *qkv(rng, lead=()), rng=rng, positions=chosen, **EVERYTHING)
    yield attend("positions of no keys", "positions", *qkv(rng, m=0), rng=rng, positions=np.full((4, 2), -1), **EVERYTHING)


# ---- scores and normalisers


def parametrised(rng, d_q, d_k) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    W_q, W_k, w_v, b = grid(rng, d_q, 2, top=1), grid(rng, d_k, 2, top=1), grid(rng, 2), grid(rng, 2)
    yield "additive_score", {"W_q": W_q, "W_k": W_k, "w_v": w_v, "b": b}
    yield "multiplicative_score", {"W": grid(rng, d_q, d_k, top=1)}
    if d_q == d_k:
        yield "gated_score", {"w_g": grid(rng, 2 * d_q, top=1)}


SIMPLE = ("dot_score", "scaled_dot_score", "cosine_score", "distance_score")
KERNELS = ("gaussian_kernel", "boxcar_kernel", "triangular_kernel", "epanechnikov_kernel", "constant_kernel")
WIDTH = 2.6  # no distance on the grid has u = 1 for it, where some kernels have a kink


def scores(rng):
    q, k, v = qkv(rng)
    with_parameters = [*parametrised(rng, 3, 3)]
    with_parameters.append(("additive_score", {n: x for n, x in with_parameters[0][1].items() if n != "b"}))
    for name, parameters in [*((name, {}) for name in SIMPLE), *with_parameters, *((name, {"width": WIDTH}) for name in KERNELS)]:
        label = f"{name} without b" if name == "additive_score" and "b" not in parameters else name
        yield pair_scores(f"{label} itself", q, k, name, parameters)
        score = (name, parameters) if parameters else name
        yield attend(label, "scores", q, k, v, rng=rng, score=score, **EVERYTHING)
        yield attend(f"{label}, masked", "scores", q, k, v, rng=rng, grad=False, score=score, mask=flags(rng, 4, 5), bias=grid(rng, 5), scale=0.5)
    for name in KERNELS:
        yield pair_scores(f"{name} of width 1", q, k, name, {})
    q, k = grid(rng, 2, 2, 4, 3), grid(rng, 2, 2, 5, 2)
    for name, parameters in parametrised(rng, 3, 2):
        yield pair_scores(f"{name}, d_q != d_k itself", q, k, name, parameters)
        yield attend(f"{name}, d_q != d_k", "scores", q, k, v, rng=rng, score=(name, parameters), **EVERYTHING)
    q, k, v = qkv(rng)
    k[:, :, 1], q[:, :, 2] = 0, 0
    yield pair_scores("cosine of a zero vector itself", q, k, "cosine_score", {})
    yield attend("cosine of a zero vector", "scores", q, k, v, rng=rng, score="cosine_score", **EVERYTHING)
    k = np.concatenate([q, k[:, :, :1]], axis=-2)
    for name in ("distance_score", *KERNELS):
        yield attend(f"{name} at distance 0", "scores", q, k, v, rng=rng, score=name, **EVERYTHING)
    far = 1000.0 + grid(rng, 4, 3)  # |q|^2 + |k|^2 - 2 q.k would cancel here
    yield pair_scores("distance of near vectors", far, far[:3] + grid(rng, 3, 3) / 8, "distance_score", {}, ("float64", "float32"))


def pair_scores(name, query, key, score, parameters, dtypes=()):
    answer = oracle.scores(score, query, key, **parameters)
    arrays = {n: x for n, x in parameters.items() if isinstance(x, np.ndarray)}
    numbers = {n: x for n, x in parameters.items() if n not in arrays}
    return Case(name, "scores", score, {"query": query, "key": key, **arrays}, numbers, *answer, dtypes)


def pooling(rng):
    """normalize= anything, with gradients; and Nadaraya-Watson, which is a kernel, normalised in proportion."""
    for normalize, score in (
        ("sparsemax", "scaled_dot_score"), ("sparsemax", "distance_score"), ("hardmax", "scaled_dot_score"), ("average", "dot_score"),
        ("identity", "scaled_dot_score"), ("identity", "gaussian_kernel"), ("proportional", ("gaussian_kernel", {"width": WIDTH})),
        ("proportional", ("epanechnikov_kernel", {"width": 2 * WIDTH})), ("proportional", ("triangular_kernel", {"width": 2 * WIDTH})),
        ("proportional", ("boxcar_kernel", {"width": WIDTH})), ("proportional", "constant_kernel"), ("proportional", "scaled_dot_score"),
    ):  # fmt: skip
        for which in ({}, {"mask": rows_of(rng), "scale": 0.5}):
            how = {"score": score, "normalize": normalize, **which}
            q, k, v = qkv(rng)
            while not kink_free(q, k, v, **how):
                q, k, v = qkv(rng)
            label = f"{normalize} of {score[0] if isinstance(score, tuple) else score}"
            yield attend(", ".join([label, *which]), "pooling", q, k, v, rng=rng, return_weights=True, **how)
    ties = np.repeat(grid(rng, 2, 2, 1, 3), 5, axis=-2)
    yield attend("hardmax of equals", "pooling", grid(rng, 2, 2, 4, 3), ties, grid(rng, 2, 2, 5, 2), rng=rng, normalize="hardmax", return_weights=True)
    for name in KERNELS:
        x, y, at = grid(rng, 6), grid(rng, 6), np.array([-1.5, 0.25, 1.0, 9.0])
        yield regression(f"nadaraya_watson, {name}", x, y, at, name)
    yield regression("nadaraya_watson of vectors", grid(rng, 5, 2), grid(rng, 5, 3), grid(rng, 4, 2), None)


def rows_of(rng):
    mask = flags(rng, 4, 5)
    mask[1], mask[2] = False, True
    return mask


def regression(name, x_train, y_train, x, kernel):
    query, key, value = (a[:, None] if a.ndim == 1 else a for a in (x, x_train, y_train))
    answer = oracle.attention(query, key, value, score=kernel or "gaussian_kernel", normalize="proportional")
    output = answer.values["output"]
    values = {"output": output[:, 0] if y_train.ndim == 1 else output, "weights": answer.values["weights"]}
    keywords = {"kernel": kernel} if kernel else {}
    return Case(name, "pooling", "nadaraya_watson", {"x_train": x_train, "y_train": y_train, "x": x}, keywords, values,
                answer.magnitude, answer.largest_score, results=("output", "weights"))  # fmt: skip


NORMALISERS = ("softmax", "masked_softmax", "sparsemax", "hardmax", "proportional", "average", "identity")


def normal(name, group, function, scores, dtypes=(), **arguments):
    answer = oracle.normalise(function, scores, **arguments)
    return Case(name, group, function, {"scores": scores, **arguments}, {}, *answer, dtypes)


def normalisers(rng):
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
    yield normal("hardmax of equals itself", "normalisers", "hardmax", np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]]), where=np.array([[False, True, True], [True] * 3]))
    yield normal("sparsemax of equals", "normalisers", "sparsemax", np.array([[1.0, 1.0, 1.0], [5.0, 5.0, 0.0]]))
    yield normal("softmax of -inf", "normalisers", "softmax", np.array([[1.0, -INF, 0.5], [-INF, 2.0, -INF]]))
    for label, lens in (("(b,)", np.array([3, 0])), ("(b, n)", np.array([[1, 0, 9, 5], [2, 2, 4, 3]]))):
        yield normal(f"masked_softmax {label}", "normalisers", "masked_softmax", s, valid_lens=lens)
    yield normal("masked_softmax, where", "normalisers", "masked_softmax", s, valid_lens=np.array([3, 4]), where=flags(rng, 5))
    four = grid(rng, 2, 2, 4, 5)
    yield normal("masked_softmax, 4 axes", "normalisers", "masked_softmax", four, valid_lens=np.array([2, 4]))
    yield normal("masked_softmax, 4 axes, (b, n)", "normalisers", "masked_softmax", four, valid_lens=np.array([[1, 0, 9, 5], [2, 2, 4, 3]]))
    yield normal("masked_softmax below -1e6", "normalisers", "masked_softmax", s - 2.0**21, valid_lens=np.array([2, 4]), dtypes=DTYPES[:1])
    yield normal("masked_softmax of -1e6", "normalisers", "masked_softmax", np.floor(s) - 2.0**21, valid_lens=np.array([2, 4]), dtypes=DTYPES[:2])


# ---- exact combinations


def merging(rng):
    for parts, shape in ((1, (2, 3)), (2, (2, 2, 3)), (4, (3,))):
        outputs, lses = grid(rng, parts, *shape, 2), grid(rng, parts, *shape, top=4)
        yield merged(f"merge {parts} of {len(shape)} axes", outputs, lses)
    outputs, lses = grid(rng, 3, 2, 4, 2), grid(rng, 3, 2, 4)
    lses[0, 0], lses[:, 1, 2], lses[1:, 1, 0] = -INF, -INF, -INF
    outputs[lses == -INF] = 0
    yield merged("merge with empty parts", outputs, lses)
    yield merged("merge of large lse", grid(rng, 2, 4, 2), 1024.0 + grid(rng, 2, 4, top=64))
    yield merged("merge of 1e5", grid(rng, 2, 4, 2), np.array([[131072.0, -131072, 0, 131072], [131072.0, -131072, 131072, -131072]]))
    for name, splits in (("two parts", [2]), ("three parts", [2, 4]), ("an empty part", [0, 3, 3]), ("single keys", [1, 2, 3, 4])):
        yield attend(f"attention over {name}", "merging", *qkv(rng), rng=rng, grad=False, call="split_attention", splits=splits, return_lse=True)
    yield attend("attention over grouped parts", "merging", *qkv(rng, lead=(2, 4), kv=(2, 2)), rng=rng, grad=False, call="split_attention", splits=[3], return_lse=True)


def merged(name, outputs, lses):
    values, magnitude, largest = oracle.merge(outputs, lses)
    return Case(name, "merging", "merge_attention", {"outputs": outputs, "lses": lses}, {"return_lse": True}, values, magnitude,
                largest, results=("output", "lse"))  # fmt: skip


def blocks(rng):
    """Long enough that a window is worked through in blocks."""
    n, m = 264, 560
    q, k, v = qkv(rng, n=n, m=m, d=2, v=1, lead=())
    yield attend("blocks", "blocks", q, k, v, rng=rng, window=3, return_lse=True)
    yield attend("blocks, causal, offset", "blocks", q, k, v, rng=rng, window=(2, 5), causal=True, query_offset=297, grad=False, return_lse=True)
    mask, bias = flags(rng, n, m), grid(rng, m)
    q, k, v, bias = poisoned(rng, q, k, v, mask=mask, window=2, query_offset=-2, bias=bias, valid_lens=np.array(258))
    yield attend("blocks, everything", "blocks", q, k, v, rng=rng, window=2, query_offset=-2, mask=mask, bias=bias, valid_lens=np.array(258), softcap=2.0)


def covariance(rng):
    """With score q.k and values = keys, the gradient of output c by the query is row c of the keys' covariance under the softmax."""
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
        yield Case(f"covariance of the keys, feature {c}", "identities", "attention", arguments, {"score": "dot_score"},
                   {"output": by_oracle.values["output"], "grad_query": answer}, by_oracle.magnitude, by_oracle.largest_score)  # fmt: skip


def combinations(rng, count=32):
    """Options drawn together; what nothing may attend to is poisoned half of the time."""
    for number in range(count):
        b, h, g = (int(rng.integers(1, 3)) for _ in range(3))
        lead, kv = [((), ()), ((b,), (b,)), ((b, h * g), (b, h)), ((b, h * g), (b, h))][rng.integers(4)]
        n, m, d, v = (int(rng.integers(1, top)) for top in (5, 7, 5, 4))
        full = (*lead, n, m)
        options: dict[str, Any] = {}

        def sometimes(share=0.35):
            return rng.random() < share

        def broadcast(full=full):
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
            options["query_offset"] = rng.integers(-2, m + 1, lead[:1]) if lead and sometimes(0.5) else int(rng.integers(-2, m + 1))
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
        dtypes = (("float64",), ("float32",), ("float16", "bfloat16"))[number % 3]
        yield attend(name, "combinations", q, k, x, rng=rng, dtypes=dtypes, **options, return_weights=sometimes(0.5), return_lse=sometimes(0.5))
