"""Which mistake explains a wrong result: the oracle answers with the mistakes that implementers make, and compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvattn.conformance import oracle
from kvattn.conformance.cases import Case

ALWAYS = ("query", "key", "value")


def words(case: Case, what: str, dtype: str, x: np.ndarray, want: np.ndarray, same: Callable[..., Any]) -> str:
    """Where a result is wrong, and what gives the same, if a mistake known here does.

    ``same``: whether numbers are as near to each other as is allowed, of two arrays, number by number.
    """
    wrong = ~same(x, want)
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    summary = f"{wrong.sum()} of {x.size} wrong, the first at {at}: {x[at]:.6g}, promised {want[at]:.6g}"
    return "; ".join([summary, *_causes(case, what, dtype, x, want, wrong, same)][:2])


def _causes(case: Case, what: str, dtype: str, x: np.ndarray, want: np.ndarray, wrong: np.ndarray,
            same: Callable[..., Any]) -> Iterator[str]:  # fmt: skip
    """What explains all that is wrong, the likeliest first."""
    of_attention = case.call == "attention" and not what.startswith("grad_")
    options = {
        n: x for n, x in (case.arguments | case.keywords).items() if n[:5] != "grad_" and (n[:7] != "return_" or "scores" in n)
    }
    if of_attention:
        empty = np.isneginf(oracle.attention(**{**options, "sink": None, "normalize": "softmax"}).values["lse"])
        if wrong.any() and not (wrong & ~(empty if what == "lse" else empty[..., None])).any():
            yield "all in rows that may attend to nothing, which are zeros, with an lse of -inf, or the sink"
    if np.isnan(x).any() and not np.isnan(want).any():
        yield "NaN: what may not attend is to be zeros before a product, as 0 * NaN is NaN, and an empty sum is not to divide"
    if not of_attention:
        return
    if what == "lse" and same(x, want * np.log2(np.e)).all():
        yield "this is the lse in base 2, not of exp"
    name = "output" if what not in ("weights", "lse", "scores") else what
    for mistake, changed in _changed(options):
        try:
            answer = oracle.attention(**changed).values[name]
        except (IndexError, ValueError):  # what was changed does not fit the rest
            continue
        if answer.shape == x.shape and same(x, answer).all():
            yield f"the same as where {mistake}"
    if (
        dtype in ("float16", "bfloat16")
        and np.abs(x - want).max(initial=0, where=np.isfinite(want)) < 2**-5 * np.abs(want).max()
    ):
        yield f"as where scores, softmax or products are computed in {dtype}: float32 is promised"


def _changed(options: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Mistakes in words, each with the call that it makes of this one."""
    query, key, value = (options[name] for name in ALWAYS)
    n, m, d = query.shape[-2], key.shape[-2], max(query.shape[-1], 1)
    offset, window, scale = options.get("query_offset", 0), options.get("window"), options.get("scale")
    if options.get("causal") or window is not None:
        yield "causal and window count from the last key, not by query_offset", options | {"query_offset": offset + m - n}
        yield "query_offset is ignored", options | {"query_offset": 0}
        yield "query_offset is subtracted", options | {"query_offset": -offset}
        yield "causal leaves out a query's own position", options | {"query_offset": offset - 1}
    if window is not None:
        left, right = window if isinstance(window, tuple) else (window, window)
        for less, size in ((1, "narrow"), (-1, "wide")):
            left_end, right_end = (None if x is None else x - less for x in (left, right))
            for ends in ((left_end, right), (left, right_end), (left_end, right_end)):
                yield f"the window is one key too {size}", options | {"window": ends}
    for name in (
        "mask",
        "bias",
        "valid_lens",
        "causal",
        "window",
        "segments",
        "softcap",
        "scale",
        "sink",
        "dropout",
        "positions",
    ):
        if options.get(name) is not None and options[name] is not False:
            yield f"{name} is ignored", {n: x for n, x in options.items() if n != name}
    if options.get("softcap") is not None and options.get("bias") is not None:
        yield from (("the softcap is applied after the bias", _capped_last(options, hides)) for hides in (False, True))
    if isinstance(options.get("mask"), np.ndarray):
        yield "True in the mask forbids", options | {"mask": ~options["mask"]}
    if scale is None and options.get("score", "scaled_dot_score") == "scaled_dot_score":
        yield "scores are not divided by sqrt(d)", options | {"scale": 1.0}
    elif scale is not None:
        yield "the scale is taken beside 1/sqrt(d), which it replaces", options | {"scale": scale / d**0.5}
    if query.ndim > 2 and key.shape[-3] != query.shape[-3]:
        order = np.arange(query.shape[-3]) % key.shape[-3]
        tiled = {"key": key[..., order, :, :], "value": value[..., order, :, :]}
        yield "query head h looks at key head h modulo their number, not at h // group", options | tiled


def _capped_last(options: dict[str, Any], hides: bool) -> dict[str, Any]:
    """The call whose scores are those of this one, biased and then capped. ``hides``: a bias of -inf still forbids."""
    plain = {n: x for n, x in options.items() if n != "softcap"}
    scores = oracle.attention(**plain | {"return_scores": "biased", "normalize": "softmax"}).values["scores"]
    capped = options["softcap"] * np.tanh(scores / options["softcap"])
    return plain | {"scale": 0.0, "bias": np.where(np.isneginf(scores), -np.inf, capped) if hides else capped}
