"""What a case is: plain data, a call and its float64 answer. Inputs lie on a grid that every dtype holds exactly."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from kvattn.conformance import oracle

DTYPES = ("float64", "float32", "float16", "bfloat16")
WEIGHTS, LSE = ("weights",), ("lse",)
NOT_FINITE = "not finite"  # the group of cases with NaN and inf in pairs that may attend, and so in answers


@dataclass(frozen=True)
class Case:
    """A call of the public API and its answer.

    ``arguments`` holds NumPy arrays by name (``outputs`` and ``lses`` are stacked parts); ``keywords`` plain data, where a
    score or normaliser is a name, or (name, {parameter: array or number}). ``answer`` and ``magnitude`` are by quantity:
    output, weights, lse, grad_query, grad_W_q, ...; see tolerance.py for what magnitude and largest_score are for.
    ``dtypes`` hold its inputs exactly. Its usual run is in the ``usual`` ones, for the output alone if ``output_only``.
    Where an answer is NaN a result must be NaN, and where it is inf not finite, whichever; ``judged`` may leave entries out.
    """

    name: str
    group: str
    call: str
    arguments: dict[str, Any]
    keywords: dict[str, Any]
    answer: dict[str, np.ndarray]
    magnitude: dict[str, float]
    largest_score: float = 0.0
    dtypes: tuple[str, ...] = DTYPES
    results: tuple[str, ...] = ("output",)
    usual: tuple[str, ...] = DTYPES
    output_only: bool = False
    judged: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.group != NOT_FINITE and any((np.isnan(x) | (x == np.inf)).any() for x in self.answer.values()):
            raise ValueError(f"{self.name}: an answer that is not finite, outside the group {NOT_FINITE}")
        bound_parameters = [x[-1] for x in self.keywords.values() if isinstance(x, tuple) and isinstance(x[-1], dict)]
        parameters = [x for named in bound_parameters for x in named.values()]
        for x in [*(x for name, x in self.arguments.items() if name != "lses"), *parameters]:
            if isinstance(x, np.ndarray):
                x.setflags(write=False)  # cases may share an array
            if isinstance(x, np.ndarray) and x.dtype.kind == "f":
                x = x[np.isfinite(x)]
                if not all(exact(x, dtype) for dtype in self.dtypes):
                    raise ValueError(f"{self.name}: an input that {self.dtypes} do not all hold exactly")


def exact(x: np.ndarray, dtype: str) -> bool:
    if dtype == "bfloat16":  # the upper half of a float32
        return bool((x == x.astype(np.float32)).all() and (x.astype(np.float32).view(np.uint32) & 0xFFFF == 0).all())
    with np.errstate(over="ignore"):
        return bool((x.astype(dtype) == x).all())


# ---- building blocks


def grid(rng: np.random.Generator, *shape: int, top: float = 2.0) -> np.ndarray:
    """Multiples of 1/16 in [-2, 2], or of top/32 in [-top, top]."""
    return rng.integers(-32, 33, shape) * (top / 32)


def qkv(rng: np.random.Generator, n: int = 4, m: int = 5, d: int = 3, v: int = 2, lead: tuple[int, ...] = (2, 2),
        kv: tuple[int, ...] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    kv = lead if kv is None else kv
    return grid(rng, *lead, n, d), grid(rng, *kv, m, d), grid(rng, *kv, m, v)


def flags(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.random(shape) < 0.6


def attend(name: str, query: np.ndarray, key: np.ndarray, value: np.ndarray, *, group: str, rng: np.random.Generator,
           grad: bool | Literal["scores"] | np.ndarray = True, asked: tuple[str, ...] = WEIGHTS + LSE,
           dtypes: tuple[str, ...] = DTYPES, **options: Any) -> Case:  # fmt: skip
    """A case of attention with these options, of which ``seed`` stands for attention's own ``rng``, and with its answer.

    ``asked``: which of weights and lse the call returns beside the output. ``grad``: whether the case has gradients; the
    rows (n,) of the output that the loss depends on; or "scores", where it depends on the returned scores, too.
    """
    options |= {"rng": options.pop("seed")} if "seed" in options else {}
    results = ("output", *asked, *(["scores"] if "return_scores" in options else []))
    call_options = {n: x for n, x in options.items() if n != "splits"}
    options |= {f"return_{what}": True for what in asked}
    grad_output = None
    if grad is not False:
        grad_output = grid(rng, *oracle.leading(query, key), query.shape[-2], value.shape[-1])
        grad_output = np.where(np.reshape(isinstance(grad, str) or grad, (-1, 1)), grad_output, 0.0)
    if isinstance(grad, str):
        selected = options["positions"].shape[-1] if "positions" in options else key.shape[-2]
        call_options["grad_scores"] = options["grad_scores"] = grid(rng, *oracle.leading(query, key), query.shape[-2], selected)
    answer = oracle.attention(query, key, value, grad_output, **call_options)
    quantities = [what for what in answer.values if what in results or what.startswith("grad_")]
    arguments = {"query": query, "key": key, "value": value, "grad_output": grad_output}
    arguments |= {n: x for n, x in options.items() if isinstance(x, np.ndarray)}
    return Case(
        name, group, "attention", {n: x for n, x in arguments.items() if x is not None},
        {n: x for n, x in options.items() if not isinstance(x, np.ndarray)},
        {what: answer.values[what] for what in quantities}, {what: answer.magnitude[what] for what in quantities},
        answer.largest_score, dtypes, results,
    )  # fmt: skip


def merged(name: str, outputs: np.ndarray, lses: np.ndarray, group: str = "merging") -> Case:
    """A case of merging these parts."""
    values, magnitude, largest = oracle.merge(outputs, lses)
    return Case(name, group, "merge_attention", {"outputs": outputs, "lses": lses}, {"return_lse": True}, values, magnitude,
                largest, results=("output", "lse"))  # fmt: skip


def poisoned(rng: np.random.Generator, query: np.ndarray, key: np.ndarray, value: np.ndarray,
             **which: Any) -> Iterator[np.ndarray]:  # fmt: skip
    """query, key, value and the bias, if there is one, with NaN and inf in all that belongs to no pair that may attend."""
    lead, n, _, found = oracle.pairs(query, key, **which)
    at = tuple(np.array([pair for _, pair in found], int).reshape(-1, len(lead) + 2).T)

    def poison(x, cells, kept, bad):
        used = np.zeros(kept.shape, bool)
        used.flat[cells] = True
        return np.where((used | kept)[(..., *[None] * (x.ndim - kept.ndim))], x, rng.choice(bad, x.shape))

    for x, of in ((query, at[:-1]), (key, (*at[:-2], at[-1])), (value, (*at[:-2], at[-1]))):
        yield poison(x, oracle.flat_rows(x, lead)[of], np.zeros(x.shape[:-1], bool), [np.nan, np.inf, -np.inf])
    bias = which.get("bias")
    if isinstance(bias, np.ndarray):
        cells = np.broadcast_to(np.arange(bias.size).reshape(bias.shape), (*lead, n, key.shape[-2]))
        yield poison(bias, cells[at], bias == -np.inf, [np.nan, np.inf])  # a bias of -inf forbids its pair, and so stays


def kink_free(*inputs, weights_of=oracle.weights, score="scaled_dot_score", normalize="softmax", **call_options: Any) -> bool:
    """Whether no weight of a sparsemax is so near 0, and no sum so near 0, that rounding could cross the kink."""
    if normalize not in ("sparsemax", "proportional"):
        return True
    call_options.pop("seed", None)  # weights are those before dropout
    weights = weights_of(*inputs, score=score, normalize=normalize, **call_options)
    if normalize == "sparsemax":
        eps = 2.0**-9
        if ((weights > 0) & (weights < eps)).any():
            return False
        nudged = {**call_options, "scale": (call_options.get("scale") or 1) * (1 + eps)}
        support = weights_of(*inputs, score=score, normalize=normalize, **nudged) > 0
        return bool(((weights > 0) == support).all())
    return bool(np.abs(weights).max(initial=0) < 8)


# ---- cases as text


def written(every: Sequence[Case]) -> str:
    """The cases on one line, in JSON: their arrays, each once however often it is named, and what names them."""
    arrays: list[Any] = []
    places: dict[int, int] = {}  # by id, since a case may give one array as query, key and value

    def encoded(x: Any) -> Any:
        if isinstance(x, np.ndarray):
            if id(x) not in places:
                places[id(x)] = len(arrays)
                arrays.append((x.dtype.str, x.shape, base64.b64encode(x.tobytes()).decode("ascii")))
            return {"#array": places[id(x)]}
        if isinstance(x, tuple):
            return {"#tuple": [encoded(each) for each in x]}
        if isinstance(x, list):
            return [encoded(each) for each in x]
        return {name: encoded(each) for name, each in x.items()} if isinstance(x, dict) else x

    named = [[encoded(getattr(case, field.name)) for field in fields(Case)] for case in every]
    return json.dumps([arrays, json.dumps(named)])


def read(text: str) -> list[Case]:
    """The cases of which this is the text, equal in every bit."""
    arrays, named = json.loads(text)
    made = [np.frombuffer(base64.b64decode(numbers), kind).reshape(shape) for kind, shape, numbers in arrays]

    def decoded(x: dict[str, Any]) -> Any:
        if "#array" in x:
            return made[x["#array"]]
        return tuple(x["#tuple"]) if "#tuple" in x else x

    return [Case(*each) for each in json.loads(named, object_hook=decoded)]
