"""The answers, in float64: deliberately naive, written from kvattn/api.py and not from any tab.

Attention is a list of pairs (query row, key row): what may not attend is not on the list, so nothing has to be hidden.
Derivatives are by complex step, f'(x) = Im f(x + ih) / h with h = 1e-30, which neither truncates nor cancels: one step
for a score of a pair, one for a normaliser of a row; the chain rule between them is written out as sums. Beside every
number stands its magnitude: the same sums over absolute values, by which `tolerance` measures an error.

Arguments may hold NaN and infinities, which then reach what their pairs reach. Where an answer is NaN, only NaN is right;
inf stands for whatever is not finite.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kvattn.conformance import functions

STEP = 1e-30

Array = np.ndarray
Pair = tuple[Array, Array]  # of values and their magnitudes
Place = tuple[int, ...]


class Answer(NamedTuple):
    values: dict[str, np.ndarray]
    magnitude: dict[str, float]
    largest_score: float


# ---- scores of pairs, q (p, d_q) and k (p, d_k) -> (p,); complex-safe


def dot_score(q: Array, k: Array) -> Array:
    return (q * k).sum(axis=-1)


def scaled_dot_score(q: Array, k: Array) -> Array:
    return dot_score(q, k) / np.sqrt(max(q.shape[-1], 1))  # without features the scores are 0


def additive_score(q: Array, k: Array, W_q: Array, W_k: Array, w_v: Array, b: Any = 0.0) -> Array:
    return np.tanh(q @ W_q + k @ W_k + b) @ w_v


def multiplicative_score(q: Array, k: Array, W: Array) -> Array:
    return dot_score(q @ W, k)


def gated_score(q: Array, k: Array, w_g: Array) -> Array:
    return dot_score(q, k) / (1 + np.exp(-(np.concatenate([q, k], axis=-1) @ w_g)))


def cosine_score(q: Array, k: Array) -> Array:
    q_squares, k_squares = dot_score(q, q), dot_score(k, k)
    zero = (dot_score(q.real, q.real) == 0) | (dot_score(k.real, k.real) == 0)
    return np.where(zero, 0, dot_score(q, k) / np.sqrt(np.where(zero, 1, q_squares * k_squares)))


def distance_score(q: Array, k: Array) -> Array:
    return -dot_score(q - k, q - k) / 2


def gaussian_kernel(q: Array, k: Array, width: float = 1.0) -> Array:
    return np.exp(distance_score(q, k) / width**2)


def boxcar_kernel(q: Array, k: Array, width: float = 1.0) -> Array:
    return 1.0 * (-2 * distance_score(q, k).real < width**2)


def triangular_kernel(q: Array, k: Array, width: float = 1.0) -> Array:
    squares = dot_score(q - k, q - k)
    apart = dot_score((q - k).real, (q - k).real) > 0  # at the peak, the gradient between the two slopes: 0
    u = np.sqrt(np.where(apart, squares, 1)) / width
    return np.where(apart, np.where(u.real < 1, 1 - u, 0), 1)


def epanechnikov_kernel(q: Array, k: Array, width: float = 1.0) -> Array:
    u_squared = dot_score(q - k, q - k) / width**2
    return np.where(u_squared.real < 1, 1 - u_squared, 0)


def constant_kernel(q: Array, k: Array, width: float = 1.0) -> Array:
    return np.ones(len(q))


def score_magnitudes(name: str, q: Array, k: Array, **p: Any) -> dict[str, Array]:
    """What rounding a score, and its slope by each input, is relative to: absolute values at every product."""
    width, d = p.get("width", 1.0), q.shape[-1]
    p = {n: np.abs(x) for n, x in p.items() if x is not None}
    if name == "additive_score":
        hidden = q @ p["W_q"] * 0 + p["w_v"]  # |w_v| (1 - tanh^2) <= |w_v|
        size = (np.abs(q) @ p["W_q"] + np.abs(k) @ p["W_k"] + p.get("b", 0)).clip(None, 4) @ p["w_v"] + p["w_v"].sum()
        by_W = {"W_q": abs(q)[:, :, None] * hidden[:, None, :], "W_k": abs(k)[:, :, None] * hidden[:, None, :]}
        by_vectors = {"query": hidden @ p["W_q"].T, "key": hidden @ p["W_k"].T, "w_v": hidden * 0 + 1, "b": hidden}
        return {"size": size, **by_vectors, **by_W}
    difference: Any = np.abs(q - k) if q.shape == k.shape else None
    q, k = np.abs(q), np.abs(k)
    if name == "multiplicative_score":
        W = p["W"]
        return {"size": dot_score(q @ W, k), "query": k @ W.T, "key": q @ W, "W": q[:, :, None] * k[:, None, :]}
    dot, squares = dot_score(q, k), dot_score(difference, difference)
    if name == "gated_score":
        w, both = p["w_g"], np.concatenate([q, k], axis=-1)
        by_gate = dot[:, None]
        slopes = {"query": k + by_gate * w[:d], "key": q + by_gate * w[d:], "w_g": by_gate * both}
        return {"size": dot * (1 + both @ w), **slopes}
    if name == "cosine_score":
        q_size, k_size = (np.sqrt(dot_score(x, x))[:, None] for x in (q, k))
        q_size, k_size = (np.where(x == 0, 1, x) for x in (q_size, k_size))
        return {"size": np.ones(len(q)), "query": (k / k_size + q / q_size) / q_size, "key": (q / q_size + k / k_size) / k_size}
    u_squared = squares / width**2
    kernel, slope = {
        "dot_score": (dot, None),
        "scaled_dot_score": (dot / np.sqrt(max(d, 1)), None),
        "distance_score": (squares / 2, np.ones(len(q))),
        "gaussian_kernel": (np.exp(-u_squared / 2) * (1 + u_squared), np.exp(-u_squared / 2) * (1 + u_squared) / width**2),
        "boxcar_kernel": (np.ones(len(q)), np.zeros(len(q))),
        "triangular_kernel": (1 + np.sqrt(u_squared), 1 / (width * np.sqrt(np.where(squares > 0, squares, 1)))),
        "epanechnikov_kernel": (1 + u_squared, np.full(len(q), 2 / width**2)),
        "constant_kernel": (np.ones(len(q)), np.zeros(len(q))),
    }[name]
    if slope is None:
        factor = 1 if name == "dot_score" else 1 / np.sqrt(max(d, 1))
        return {"size": kernel, "query": k * factor, "key": q * factor}
    return {"size": kernel, "query": slope[:, None] * difference, "key": slope[:, None] * difference}


# ---- normalisers of one row of scores, of the pairs that are allowed; complex-safe


def softmax(s: Array) -> Array:
    if (s.real == -np.inf).all():
        return 0 * np.ones_like(s)
    e = np.exp(s - s.real.max(axis=-1, keepdims=True))  # all NaN if a score is NaN or inf
    return e / e.sum(axis=-1, keepdims=True)


def sparsemax(s: Array) -> Array:
    ordered = s[np.argsort(-s.real, kind="stable")]
    for count in range(1, len(s) + 1):
        threshold = (ordered[:count].sum() - 1) / count
        if count == len(s) or ordered[count].real <= threshold.real:
            return np.where(s.real > threshold.real, s - threshold, 0)
    raise AssertionError


def hardmax(s: Array) -> Array:
    return 1.0 * (np.arange(len(s)) == s.real.argmax())


def proportional(s: Array) -> Array:
    return s / s.sum() if s.sum().real != 0 else 0 * s


def average(s: Array) -> Array:
    return np.ones(len(s)) / len(s)


def identity(s: Array) -> Array:
    return s


def lse(s: Array) -> float:
    if s.max() == -np.inf:
        return -np.inf
    return s.max() + np.log(np.exp(s - s.max()).sum())


def weight_magnitudes(name: str, w: Array, s: Array, size: Array) -> Array:
    """What rounding the weights (k,) of one row is relative to."""
    if name == "identity":
        return size
    if name == "proportional":
        total = abs(s.sum())
        return (size.sum() / total if total else 0.0) * np.maximum(np.abs(w), 1)
    return np.ones(len(w)) if name == "sparsemax" else w


def slope_magnitudes(name: str, w: Array, s: Array, size: Array) -> Array:
    """The same of the weights' slopes, d weights / d scores (k, k)."""
    one = np.eye(len(w))
    if name in ("hardmax", "average"):
        return 0 * one
    if name == "identity":
        return one
    if name == "proportional":
        total = abs(s.sum())
        return (size.sum() / total / total if total else 0.0) * (one + np.abs(w))
    if name == "sparsemax":
        support = w > 0
        return support[:, None] * (one + 1 / support.sum()) * support
    return w[:, None] * (one + w)


def slopes_of_weights(name: str, s: Array) -> Array:
    """d weights / d scores of a row, (k, k): a row for each score."""
    if name == "softmax":  # of all the steps at once
        return np.imag(softmax(s + STEP * 1j * np.eye(len(s)))) / STEP
    return np.array([slope(globals()[name], s, (j,)) for j in range(len(s))])


def slope(function: Callable[[Array], Array], x: Array, at: tuple[int, ...]) -> Array:
    """d function / d x[..., at], by complex step."""
    x = x.astype(complex)
    place: Any = (..., *at)
    x[place] += STEP * 1j
    return np.imag(function(x)) / STEP


# ---- dropout, of a seed


def splitmix64(seed: int, number: int) -> int:
    """Output ``number``, from 0, of SplitMix64 seeded with ``seed``, in Python's integers.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"; Vigna's splitmix64.c.
    """
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def survivors(pairs: list[tuple[Place, Place]], lead: tuple[int, ...], rate: float, seed: int) -> Array:
    """What the weights of these pairs are multiplied by: 0 for those that dropout drops, the same number for the others."""
    dropped, factors = min(round(2**16 * rate), 2**16 - 1), []
    for _, (*at, i, j) in pairs:
        head, word = 0, seed  # its number among all heads of all batch entries
        for place, size in zip(at, lead, strict=True):
            head = head * size + place
        for number in (head, i, j // 4):
            word = splitmix64(word, number)
        factors.append(0.0 if (word >> 16 * (j % 4)) % 2**16 < dropped else 1 / (1 - dropped / 2**16))
    return np.array(factors)


# ---- attention


def flat(x: Array) -> Array:
    """(..., m, c) -> (rows, c), also where c is 0."""
    return x.reshape(np.prod(x.shape[:-1], dtype=int), x.shape[-1])


def flat_rows(x: Array, lead: tuple[int, ...]) -> Array:
    """The flat row of x (..., h_kv, m, c) that serves each (*lead, m)."""
    rows = np.arange(np.prod(x.shape[:-1], dtype=int)).reshape(x.shape[:-1])
    if lead:
        rows = np.repeat(rows, lead[-1] // (x.shape[-3] or 1), axis=-2)
    return np.broadcast_to(rows, (*lead, x.shape[-2]))


class Limits(NamedTuple):
    """What forbids pairs: the options of attention by these names, of scores (*lead, n, m)."""

    mask: Any = None  # an array, or the name of a function of positions
    bias: Any = None
    valid_lens: Any = None
    causal: bool = False
    query_offset: Any = 0
    window: Any = None
    positions: Any = None
    segments: Any = None

    def over(self, lead: tuple[int, ...], n: int, m: int) -> Limits:
        """The same, with a mask and a bias of every score, and positions of every query."""
        mask = self.mask if self.mask is None or isinstance(self.mask, str) else np.broadcast_to(self.mask, (*lead, n, m))
        forbids = self.bias is not None and not isinstance(self.bias, tuple)  # a function's bias holds no -inf
        bias = np.broadcast_to(self.bias, (*lead, n, m)) if forbids else None
        positions = self.positions
        positions = None if positions is None else np.broadcast_to(positions, (*lead, n, positions.shape[-1]))
        return self._replace(mask=mask, bias=bias, positions=positions)

    def keys(self, at: Place, i: int, m: int) -> Iterator[tuple[int, int]]:
        """(slot, j) for each key j that query i of the batch entry and head ``at`` may attend to.

        The slot is j, or, where the query selects its keys by positions, the first of the positions that selects j.
        """
        position = i + int(self.query_offset[at[0]] if np.ndim(self.query_offset) else self.query_offset)
        first, end = self._range(at, i, position, m)
        chosen: Any = ((j, j) for j in range(first, end))
        if self.positions is not None:
            named = self.positions[(*at, i)].tolist()
            chosen = ((slot, j) for slot, j in enumerate(named) if first <= j < end and j not in named[:slot])
        segment, of_keys = self._segments(at, i)
        if self.mask is self.bias is of_keys is None:
            yield from chosen
            return
        for slot, j in chosen:
            if isinstance(self.mask, str):
                if not functions.allows(self.mask, position, j):
                    continue
            elif self.mask is not None and not self.mask[(*at, i, j)]:
                continue
            if of_keys is not None and of_keys[j] != segment:
                continue
            if self.bias is not None and self.bias[(*at, i, j)] == -np.inf:
                continue
            yield slot, j

    def _range(self, at: Place, i: int, position: int, m: int) -> tuple[int, int]:
        """The first key, and the one after the last, that lengths, causal and the window leave to query i."""
        left, right = self.window if isinstance(self.window, tuple) else (self.window, self.window)
        ends = [m] + [position + 1] * self.causal + ([] if right is None else [position + right + 1])
        if self.valid_lens is not None:
            lens = self.valid_lens[at[0]] if at else self.valid_lens
            ends.append(int(lens[i] if np.ndim(lens) else lens))
        return 0 if left is None else max(0, position - left), min(ends)

    def _segments(self, at: Place, i: int) -> tuple[Any, Any]:
        """The number of query i's segment, and those of all keys; None without segments."""
        if self.segments is None:
            return None, None
        both = self.segments if isinstance(self.segments, tuple) else (self.segments, self.segments)
        of_queries, of_keys = (x[at[0]] if x.ndim > 1 else x for x in both)
        return of_queries[i], of_keys


def among(kind: Any, options: dict[str, Any]) -> Any:
    """A NamedTuple of that ``kind``, of those options that are its fields."""
    return kind(**{name: x for name, x in options.items() if name in kind._fields})


def pairs(query: Array, key: Array, **options: Any) -> tuple[tuple[int, ...], int, int, list[tuple[Place, Place]]]:
    """(lead, n, slots, found): the shape of the weights, and [((*at, i, slot), (*at, i, j))] for every pair that may attend."""
    lead, n, m = leading(query, key), query.shape[-2], key.shape[-2]
    limits = among(Limits, options).over(lead, n, m)
    found = [((*at, i, slot), (*at, i, j)) for *at, i in np.ndindex(*lead, n) for slot, j in limits.keys(tuple(at), i, m)]
    slots = m if limits.positions is None else limits.positions.shape[-1]
    return lead, n, slots, found


def _of_rows(sink: Array, axes: int) -> Array:
    """The sink as it broadcasts to the rows (..., n)."""
    return sink[..., 0] if sink.ndim == axes else sink[..., None]


def leading(query: Array, key: Array) -> tuple[int, ...]:
    """The batch and head axes of the scores: heads are the query's."""
    return (*np.broadcast_shapes(query.shape[:-3], key.shape[:-3]), *query.shape[:-2][-1:])


class Weighing(NamedTuple):
    """How the pairs are weighed: the options of attention by these names."""

    score: Any = "scaled_dot_score"  # a name, or (name, parameters)
    normalize: str = "softmax"
    scale: float | None = None
    softcap: float | None = None
    sink: Any = None
    dropout: float = 0.0
    rng: int = 0
    return_scores: str | None = None

    def named(self) -> tuple[str, dict[str, Any]]:
        """The name that the score has here, and its parameters."""
        name, parameters = self.score if isinstance(self.score, tuple) else (self.score, {})
        return "dot_score" if name == "scaled_dot_score" and self.scale is not None else name, parameters

    def raw(self, q: Array, k: Array, parameters: dict[str, Any]) -> Array:
        return globals()[self.named()[0]](q, k, **parameters) * (1 if self.scale is None else self.scale)

    def capped(self, q: Array, k: Array, parameters: dict[str, Any]) -> Array:
        s = self.raw(q, k, parameters)
        return s if self.softcap is None else self.softcap * np.tanh(s / self.softcap)


def attention(query: Array, key: Array, value: Array, grad_output: Array | None = None, **options: Any) -> Answer:
    """Output, weights and lse; with grad_output, the gradients of sum(grad_output * output) by every array, and with
    grad_scores those of sum(grad_scores * scores) as well, over the pairs that may attend. m > 0 or not."""
    with np.errstate(invalid="ignore", over="ignore"):
        values, sizes, largest = Attention(query, key, value, grad_output, options).answer()
    return Answer(with_inf(values), largest_finite(sizes), largest)


def weights(query: Array, key: Array, value: Array, **options: Any) -> Array:
    """The weights alone, in a fraction of the time."""
    with np.errstate(invalid="ignore", over="ignore"):
        call = Attention(query, key, value, None, options)
        for at, of in call.rows():
            call.weigh(at, of)
    return call.weights


class Attention:
    """A call of attention in four steps: its pairs, their scores, the weights of a row at a time, sums over the pairs.

    What has one entry for each pair is named for one of them: q and k are the vectors of its query and key, s is its score.
    ``x_size`` is the magnitude of ``x``. ``absolute``: the magnitudes of query, key, value and grad_output, where these are
    sums themselves. Raises TypeError for what is no option of attention: without it, this would be the answer of another call.
    """

    def __init__(self, query: Array, key: Array, value: Array, grad_output: Array | None, options: dict[str, Any],
                 absolute: list[Any] | None = None) -> None:  # fmt: skip
        if unknown := options.keys() - {*Limits._fields, *Weighing._fields, "grad_scores"}:
            raise TypeError(f"the oracle knows no {', '.join(sorted(unknown))}")
        self.weighing: Weighing = among(Weighing, options)
        self.grad_output, self.axes, self.m = grad_output, query.ndim, key.shape[-2]
        lead, n, slots, found = pairs(query, key, **options)
        self.shape = (*lead, n)  # of the rows
        self.at_pair = _columns([pair for _, pair in found], len(lead) + 2)  # places in (*lead, n, m)
        self.at_slot = self.at_pair  # and in (*lead, n, slots)
        if options.get("positions") is not None:
            self.at_slot = _columns([slot for slot, _ in found], len(lead) + 2)
        at_key = (*self.at_pair[:-2], self.at_pair[-1])
        self.sources = {"query": (query, flat_rows(query, lead)[self.at_pair[:-1]])}  # an array, and which of its rows
        self.sources |= {"key": (key, flat_rows(key, lead)[at_key]), "value": (value, flat_rows(value, lead)[at_key])}
        self.q, self.k, v = (flat(x)[rows] for x, rows in self.sources.values())
        self.share = (
            survivors(found, lead, self.weighing.dropout, self.weighing.rng) if self.weighing.dropout else np.ones(len(v))
        )
        each = self.share[:, None]
        # the gradient by the scores that are returned, of each pair
        self.by_scores: Any = 0 if options.get("grad_scores") is None else options["grad_scores"][self.at_slot]
        self.v, self.v_size = v * each, np.abs(v) * each  # what multiplies a weight may as well multiply its value
        self.g_size: Any = None if grad_output is None else np.abs(grad_output)
        q_size, k_size = self.q, self.k
        if absolute is not None:
            *inputs, self.g_size = absolute
            rows = [rows for _, rows in self.sources.values()]
            q_size, k_size, v_size = (flat(x)[r] for x, r in zip(inputs, rows, strict=True))
            self.v_size = v_size * each
            k_size = -k_size  # a difference of such sums is rounded relative to the sum of their magnitudes
        self.bias: Any = options.get("bias")
        self.learned_bias = isinstance(self.bias, np.ndarray)  # else one by a function of positions
        if isinstance(self.bias, tuple):
            self.bias = functions.bias_of(self.bias, lead, n, self.m, options.get("query_offset", 0))
        self._score(q_size, k_size)
        self._begin_rows(value.shape[-1], slots)

    def _score(self, q_size: Array, k_size: Array) -> None:
        """The scores of the pairs, at each of the stages that return_scores names, and what their rounding is relative to."""
        weighing, (name, parameters) = self.weighing, self.weighing.named()
        self.score_sizes = score_magnitudes(name, q_size, k_size, **parameters)
        self.factor = 1 if weighing.scale is None else abs(weighing.scale)
        self.s, self.s_size = weighing.capped(self.q, self.k, parameters), self.score_sizes["size"] * self.factor
        self.stages = {"raw": weighing.raw(self.q, self.k, parameters), "capped": self.s}
        if self.bias is not None:
            b = np.broadcast_to(self.bias, (*self.shape, self.m))[self.at_pair]
            self.s, self.s_size = self.s + b, self.s_size + np.abs(b)
        self.stages["biased"] = self.s

    def _begin_rows(self, features: int, slots: int) -> None:
        """What the rows fill, as a row with nothing to attend to leaves it."""
        self.output, self.weights = np.zeros((*self.shape, features)), np.zeros((*self.shape, slots))
        self.lse = np.full(self.shape, -np.inf)
        if self.weighing.sink is not None:  # one more score in every row, of no pair: it has no value
            self.lse[...] = _of_rows(np.asarray(self.weighing.sink), self.axes)
        self.sink = self.lse.copy()
        self.grad_sink, self.grad_sink_size = np.zeros(self.shape), np.zeros(self.shape)
        self.grad_s, self.grad_s_size, self.grad_v, self.grad_v_size = (
            np.zeros(x.shape) for x in (self.s, self.s, self.v, self.v)
        )
        self.row_sizes, self.weight_sizes = [0.0], [0.0]

    def rows(self) -> Iterator[tuple[Place, slice]]:
        """Each row that attends to something: its place in (*lead, n), and which of the pairs are its own."""
        if len(self.s):
            places = np.transpose(self.at_pair[:-1])
            first = [0, *(np.flatnonzero((places[1:] != places[:-1]).any(axis=-1)) + 1).tolist(), len(self.s)]
            for start, end in itertools.pairwise(first):
                yield tuple(places[start].tolist()), slice(start, end)

    def weigh(self, at: Place, of: slice) -> tuple[Array, Array]:
        """The scores of a row, the sink's as the last, and the weights of all of them; those of the pairs are kept."""
        row = self.s[of] if self.weighing.sink is None else np.append(self.s[of], self.sink[at])
        w = globals()[self.weighing.normalize](row)
        self.weights[at][self.at_slot[-1][of]] = w[: of.stop - of.start]
        return row, w

    def _attend(self, at: Place, of: slice) -> None:
        """The results of a row, and the gradients of its pairs."""
        count = of.stop - of.start
        row, w = self.weigh(at, of)
        row_size = self.s_size[of] if self.weighing.sink is None else np.append(self.s_size[of], abs(self.sink[at]))
        of_weights = self.weighing.normalize, w, row, row_size
        w, w_size = w[:count], weight_magnitudes(*of_weights)[:count]
        self.weight_sizes.append(w_size.max())
        self.row_sizes.append((w_size[:, None] * self.v_size[of]).sum(axis=0).max(initial=0))
        self.lse[at] = lse(row)
        self.output[at] = (w[:, None] * self.v[of]).sum(axis=0)
        if np.isfinite(w).all():  # a value that is not finite
            self.output[at][~np.isfinite(self.output[at])] = np.inf
        if self.grad_output is None:
            return
        g, g_size, kept = self.grad_output[at], self.g_size[at], self.share[of][:, None]
        finite = np.isfinite(self.s[of]).all() and np.isfinite(self.v[of]).all() and self.sink[at] < np.inf
        if finite and not g.any():
            return  # the loss does not depend on this row
        grad_w, grad_w_size = self.v[of] @ g, self.v_size[of] @ g_size
        self.grad_v[of], self.grad_v_size[of] = kept * w[:, None] * g, kept * w_size[:, None] * g_size
        if not (np.isfinite(w).all() and np.isfinite(grad_w).all()):  # of softmax: it reaches every score of the row
            self.grad_s[of] = self.grad_s_size[of] = np.nan
            self.grad_sink[at] = self.grad_sink_size[at] = 0.0 if self.sink[at] == -np.inf else np.nan  # -inf is no sink
            return
        grad_row = slopes_of_weights(self.weighing.normalize, row)[:, :count] @ grad_w  # the sink's as the last
        grad_row_size = grad_w_size @ slope_magnitudes(*of_weights)[:count]
        self.grad_s[of], self.grad_s_size[of] = grad_row[:count], grad_row_size[:count]
        if self.weighing.sink is not None:
            self.grad_sink[at], self.grad_sink_size[at] = grad_row[-1], grad_row_size[-1]

    def answer(self) -> tuple[dict[str, Array], dict[str, Any], float]:
        """(values, magnitudes element by element or at once, the largest score)."""
        for at, of in self.rows():
            self._attend(at, of)
        convex = self.weighing.normalize not in ("identity", "proportional")
        finite = np.abs(self.lse[np.isfinite(self.lse)])
        values = {"output": self.output, "weights": self.weights, "lse": self.lse}
        magnitude = {"output": self.v_size[np.isfinite(self.v_size)].max(initial=0) if convex else max(self.row_sizes)}
        magnitude |= {"weights": 1.0 if convex else max(self.weight_sizes), "lse": finite.max(initial=1)}
        if self.weighing.return_scores is not None:
            values["scores"] = np.full(self.weights.shape, -np.inf)  # of no pair
            values["scores"][self.at_slot] = self.stages[self.weighing.return_scores]
            magnitude["scores"] = self.s_size[np.isfinite(self.s_size)].max(initial=0)
        size = np.append(self.s_size, np.abs(self.sink))
        softened = self.weighing.normalize in ("softmax", "sparsemax")
        if self.grad_output is not None:
            self._gradients(values, magnitude)
        return values, magnitude, float(size[np.isfinite(size)].max(initial=0) if softened else 0.0)

    def _gradients(self, values: dict[str, Array], magnitude: dict[str, Any]) -> None:
        """The gradients by every array, put among the values: sums over the pairs that look at each of its rows."""
        _, parameters = self.weighing.named()
        ways = [(self.grad_s, self.weighing.capped)]  # through the weights, and through the scores that are returned
        if np.ndim(self.by_scores):
            ways.append((self.by_scores, self.weighing.raw if self.weighing.return_scores == "raw" else self.weighing.capped))
        size = self.grad_s_size + np.abs(self.by_scores)
        by = {
            "query": (self.q, lambda score, x: score(x, self.k, parameters)),
            "key": (self.k, lambda score, x: score(self.q, x, parameters)),
        }
        for what, (x, of_score) in by.items():
            values["grad_" + what] = np.zeros(self.sources[what][0].shape)
            for grad_s, score in ways:
                of_x = partial(of_score, score)
                slopes = np.stack([np.zeros(len(x)), *(slope(of_x, x, (c,)) for c in range(x.shape[-1]))], axis=-1)[:, 1:]
                values["grad_" + what] += self._collected(what, grad_s[:, None] * slopes)
            magnitude["grad_" + what] = self._collected(what, size[:, None] * self.score_sizes[what] * self.factor)
        by_biased = self.by_scores if self.weighing.return_scores == "biased" else 0 * self.by_scores
        kinds = (values, self.grad_s + by_biased, self.grad_v), (magnitude, size, self.grad_v_size)
        for kind, grad_s, grad_v in kinds:
            kind["grad_value"] = self._collected("value", grad_v)
            if self.learned_bias:
                cells = np.broadcast_to(_numbered(self.bias), (*self.shape, self.m))[self.at_pair]
                kind["grad_bias"] = _summed(cells, grad_s, self.bias.size).reshape(self.bias.shape)
        if isinstance(sink := self.weighing.sink, np.ndarray):
            cells = np.broadcast_to(_of_rows(_numbered(sink), self.axes), self.shape)
            values["grad_sink"] = _summed(cells, self.grad_sink, sink.size).reshape(sink.shape)
            magnitude["grad_sink"] = _summed(cells, self.grad_sink_size, sink.size)
        for what, x in parameters.items():
            if isinstance(x, np.ndarray):
                values["grad_" + what] = np.zeros(x.shape)
                for grad_s, score in ways:
                    scored = partial(lambda score, what, y: score(self.q, self.k, {**parameters, what: y}), score, what)
                    derivatives = [slope(scored, x, c) for c in np.ndindex(*x.shape)]
                    values["grad_" + what] += np.reshape([grad_s @ one for one in derivatives], x.shape)
                of_entry = size @ self.score_sizes[what].reshape(len(self.s), x.size)
                magnitude["grad_" + what] = of_entry.max(initial=0) * self.factor

    def _collected(self, what: str, by_pair: Array) -> Array:
        """What the pairs give, summed for each row of query, key or value."""
        x, rows = self.sources[what]
        return _summed(rows, by_pair, np.prod(x.shape[:-1], dtype=int)).reshape(x.shape)


def _summed(cells: Array, terms: Array, count: int) -> Array:
    """The sums of ``terms`` by cell, of which there are ``count``; ``cells``: the cell of each term."""
    total = np.zeros((count, *terms.shape[cells.ndim :]))
    np.add.at(total, cells, terms)
    return total


def _columns(places: list[Place], axes: int) -> tuple[Array, ...]:
    """The indices of these places, an array for each axis."""
    return tuple(np.array(places, dtype=int).reshape(-1, axes).T)


def _numbered(x: Array) -> Array:
    """The flat place of each number of x."""
    return np.arange(x.size).reshape(x.shape)


# ---- what is asked by itself


def scores(name: str, query: Array, key: Array, **parameters: Any) -> Answer:
    """A score on its own: (..., n, m)."""
    shape = (*leading(query, key), query.shape[-2], key.shape[-2])
    q = np.broadcast_to(query[..., :, None, :], (*shape, query.shape[-1])).reshape(-1, query.shape[-1])
    k = np.broadcast_to(key[..., None, :, :], (*shape, key.shape[-1])).reshape(-1, key.shape[-1])
    size = score_magnitudes(name, q, k, **parameters)["size"].max(initial=0)
    return Answer({"output": globals()[name](q, k, **parameters).reshape(shape)}, {"output": float(size)}, 0.0)


def normalise(name: str, scores: Array, where: Array | None = None, valid_lens: Any = None) -> Answer:
    """A normaliser on its own: weights in the shape of the scores."""
    output, sizes, largest = np.zeros(scores.shape), [0.0], [0.0]
    for at in np.ndindex(*scores.shape[:-1]):
        may = np.ones(scores.shape[-1], bool) if where is None else np.broadcast_to(where, scores.shape)[at].copy()
        if valid_lens is not None:
            lens = valid_lens[at[0]] if scores.ndim > 2 else valid_lens
            may &= np.arange(scores.shape[-1]) < (lens[at[-1]] if np.ndim(lens) else lens)
        if may.any():
            s = scores[at][may]
            output[at][may] = w = globals()["softmax" if name == "masked_softmax" else name](s)
            sizes.append(weight_magnitudes(name, w, s, np.abs(s)).max())
            largest.append(np.ptp(s[np.isfinite(s)]))  # scores are exact here: what rounds is how far they lie from the top
    softened = name in ("softmax", "masked_softmax", "sparsemax")
    magnitude = {"output": float(1.0 if softened else max(sizes))}
    return Answer({"output": output}, magnitude, float(max(largest)) if softened else 0.0)


def rotary(x: Array, positions: Any = None, base: float = 10000.0, interleaved: bool = False, rotary_dim: int | None = None,
           scaling: dict[str, Any] | None = None) -> Answer:  # fmt: skip
    """Every pair of features of every row by itself: a + bi times e^(i position frequency)."""
    width = x.shape[-1] if rotary_dim is None else rotary_dim
    first = 0 if positions is None else positions
    places = np.arange(x.shape[-2]) + first if np.ndim(first) == 0 else first
    places = np.broadcast_to(places, x.shape[:-1])
    output, size = x.copy(), 0.0
    for at in np.ndindex(*x.shape[:-1]):
        for pair in range(width // 2):
            i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width // 2)
            frequency, factor = frequency_of(pair, width, base, scaling or {}, int(places.max()) + 1)
            angle = int(places[at]) * frequency
            turned = complex(x[at][i], x[at][j]) * complex(math.cos(angle), math.sin(angle)) * factor
            output[at][i], output[at][j] = turned.real, turned.imag
            size = max(size, (abs(x[at][i]) + abs(x[at][j])) * factor)
    return Answer({"output": output}, {"output": float(max(size, np.abs(x).max(initial=0)))}, 0.0)


def frequency_of(pair: int, width: int, base: float, scaling: dict[str, Any], length: int) -> tuple[float, float]:
    """A pair's frequency and the factor of its cosine and sine, each scaling by its paper."""
    kind, s = scaling.get("rope_type", "default"), scaling.get("factor", 1.0)
    trained = scaling.get("original_max_position_embeddings", 1)
    plain = 1 / base ** (2 * pair / width)
    turns = trained * plain / (2 * math.pi)  # of the pair in the trained length
    if kind == "linear":
        return plain / s, 1.0
    if kind in ("ntk", "dynamic"):
        s = s if kind == "ntk" else s * max(length, trained) / trained - (s - 1)
        return plain / s ** (2 * pair / (width - 2)) if width > 2 else plain, 1.0
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        return (1 - share) * plain / s + share * plain, 1.0
    if kind == "yarn":
        ends = []  # the pairs that turn beta_fast and beta_slow times, solved from trained * base^(-2 i / width) = 2 pi turns
        for turned in (scaling.get("beta_fast", 32.0), scaling.get("beta_slow", 1.0)):
            ends.append(width / 2 * math.log(trained / (2 * math.pi * turned)) / math.log(base))
        low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), width - 1)
        share = min(max((pair - low) / (high - low), 0.0), 1.0)
        return plain * (share / s + 1 - share), scaling.get("attention_factor", 0.1 * math.log(s) + 1)
    if kind == "longrope":
        by = scaling["long_factor" if length > trained else "short_factor"][pair]
        return plain / by, scaling.get("attention_factor", math.sqrt(1 + math.log(s) / math.log(trained)))
    return plain, 1.0


def merge(outputs: Array, lses: Array) -> Answer:
    """merge_attention of stacked parts (parts, ..., n, v) and (parts, ..., n)."""
    output, log_sum, largest = np.zeros(outputs.shape[1:]), np.full(lses.shape[1:], -np.inf), [0.0]
    for at in np.ndindex(*lses.shape[1:]):
        parts = [part for part in range(len(lses)) if lses[(part, *at)] != -np.inf]
        if parts:
            s = np.array([lses[(part, *at)] for part in parts])
            output[at] = sum(w * outputs[(part, *at)] for w, part in zip(softmax(s), parts, strict=True))
            if np.isfinite(s).all():
                output[at][~np.isfinite(output[at])] = np.inf
                largest.append(np.ptp(s))
            log_sum[at] = lse(s)
    sizes = {"output": np.abs(outputs[lses != -np.inf]), "lse": np.maximum(np.abs(log_sum), 1)}
    return Answer(with_inf({"output": output, "lse": log_sum}), largest_finite(sizes), float(max(largest)))


def with_inf(values: dict[str, Array]) -> dict[str, Array]:
    """inf for every lse, score and gradient that is not finite: which of them it is depends on the order of the operations."""
    for name, x in values.items():
        x[~np.isfinite(x) & (name.startswith("grad_") | ((name in ("lse", "scores")) & (x != -np.inf)))] = np.inf
    return values


def largest_finite(magnitude: dict[str, Any]) -> dict[str, float]:
    return {name: float(np.max(x, initial=0, where=np.isfinite(x))) for name, x in magnitude.items()}
