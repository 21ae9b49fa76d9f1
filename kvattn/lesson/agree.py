"""Whether the numbers that one cell shows on two tabs are the same numbers: the tolerance is derived, not tuned.

The unit is that of kvattn.conformance.tolerance: eps of the coarser of the two dtypes, times the largest magnitude in
the array. Each of two tabs may lie (CONSTANT + S) units from the exact answer, S the largest |score|; so between them
twice that. What a cell computed is not known, so S is taken as ln(1 / eps), 16 in float32: scores that lie further
apart than that have weights below eps, which no sum over values can show. That allows 40 units in float32 (5e-6 of the
largest value), 80 in float64. Integers and booleans must be equal.

A Python float (``loss.item()``) and a number in printed text carry no dtype: they are judged as float32, text with one unit of
its last printed place added, for the two roundings.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from kvattn.conformance import tolerance

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:nan|inf|(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][-+]?\d++)?)(?!\w)")

Entry = dict[str, Any]


@dataclass(frozen=True)
class Agreement:
    """How far the numbers of a cell lie apart on two tabs: ``share`` is the part of the tolerance used, over 1: too far."""

    share: float
    message: str = ""


def judge(shown: dict[str, list[Entry]], figures: bool = False) -> Agreement | None:
    """The worst disagreement between two tabs about what a cell shows; None where there are no numbers, or one tab.

    >>> half, more = ({"dtype": "float32", "shape": [], "values": [x]} for x in (0.5, 0.75))
    >>> judge({"torch": [half], "jax": [half]})
    Agreement(share=0.0, message='')
    >>> judge({"torch": [half], "jax": [more]}).message
    'torch 0.5, jax 0.75: 0.25 apart, 4e-06 allowed'
    """
    numbers = {name: [entry for each in entries for entry in _numbers(each, figures)] for name, entries in shown.items()}
    if len(numbers) < 2 or not any(numbers.values()):
        return None
    return max((_pair(*pair) for pair in combinations(numbers.items(), 2)), key=lambda pair: pair.share)


def _numbers(entry: Entry, figures: bool) -> list[Entry]:
    """An entry as entries of numbers only."""
    if "figure" in entry:
        return list(entry["figure"]) if figures else []
    if "text" in entry:
        found = _NUMBER.findall(entry["text"])
        return [{"dtype": "text", "shape": [len(found)], "values": found}] if found else []
    return [entry]


def _pair(a: tuple[str, list[Entry]], b: tuple[str, list[Entry]]) -> Agreement:
    (one, ours), (two, theirs) = a, b
    if len(ours) != len(theirs):
        return Agreement(math.inf, f"{one} shows {len(ours)} results, {two} {len(theirs)}")
    worst = Agreement(0.0)
    for number, (left, right) in enumerate(zip(ours, theirs, strict=True), 1):
        where = f"result {number} of {len(ours)}: " if len(ours) > 1 else ""
        if left["shape"] != right["shape"]:
            shapes = [f"{name} has {_shape(entry)}" for name, entry in ((one, left), (two, right))]
            return Agreement(math.inf, where + ", ".join(shapes))
        share, message = _apart(one, left, two, right)
        if share > worst.share:
            worst = Agreement(share, where + message)
    return worst if worst.share > 1 else Agreement(worst.share)


def _shape(entry: Entry) -> str:
    return f"{entry['shape'][0]} numbers in a text" if entry["dtype"] == "text" else f"the shape {tuple(entry['shape'])}"


def _apart(one: str, left: Entry, two: str, right: Entry) -> tuple[float, str]:
    """The largest share of the tolerance that two arrays of one shape use, and where."""
    x, y = (np.array([float(value) for value in entry["values"]]) for entry in (left, right))
    if not x.size:
        return 0.0, ""
    kinds = [entry["dtype"] for entry in (left, right)]
    places = np.maximum(*(_places(entry) for entry in (left, right)))
    sizes = np.nan_to_num(np.maximum(np.abs(x), np.abs(y)), nan=0.0, posinf=0.0)
    if kinds == ["text", "text"]:  # each number for itself, and integers are counted, not computed
        allowed = np.where(places > 0, places + _allowed(kinds, 1.0) * sizes, 0.0)
    else:
        allowed = places + _allowed(kinds, float(sizes.max()))
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
        share = np.where(apart == 0, 0.0, np.where(np.isfinite(apart), apart / allowed, np.inf))
    i = int(np.argmax(share))
    index = np.unravel_index(i, left["shape"]) if left["dtype"] != "text" and left["shape"] else ()
    at = f" at [{', '.join(str(n) for n in index)}]" if index else ""
    return float(share[i]), f"{one} {x[i]:.9g}, {two} {y[i]:.9g}{at}: {apart[i]:.2g} apart, {allowed[i]:.1g} allowed"


def _allowed(kinds: list[str], magnitude: float) -> float:
    """The distance allowed between two results of these dtypes."""
    inexact = ["float32" if kind in ("float", "text") else kind for kind in kinds]
    known = [kind for kind in inexact if kind in tolerance.EPS]
    if not known:
        return 0.0
    dtype = max(known, key=lambda kind: tolerance.EPS[kind])
    return 2 * (tolerance.CONSTANT - math.log(tolerance.EPS[dtype])) * tolerance.unit(dtype, magnitude)


def _places(entry: Entry) -> np.ndarray[Any, Any]:
    """One unit of the last printed place of each number of a text; 0 where no decimals are printed: "3", "1.", "1e-05"."""
    if entry["dtype"] != "text":
        return np.zeros(len(entry["values"]))
    return np.array([_place(number) for number in entry["values"]])


def _place(number: str) -> float:
    digits, _, exponent = number.lower().partition("e")
    decimals = len(digits.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals) if decimals else 0.0
