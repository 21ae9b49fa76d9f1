"""The golden set: a dozen cases whose answers were computed by mpmath at 50 digits and are stored in golden.json.

``python tests/golden_answers.py`` in a checkout computes them, and writes the file again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from kvattn.conformance import oracle
from kvattn.conformance.cases import Case

FILE = Path(__file__).with_name("golden.json")


def stored() -> list[Case]:
    """The cases as golden.json has them; the oracle only says how exact a backend must be."""
    found = []
    for entry in json.loads(FILE.read_text(encoding="utf-8")):
        arguments, keywords, answer = (_decode(entry[part]) for part in ("arguments", "keywords", "answer"))
        options = {n: x for n, x in keywords.items() if not n.startswith("return_")}
        size = oracle.attention(**arguments, **options)
        results = ("output", "weights", *(["lse"] if "lse" in answer else []))
        found.append(Case(entry["name"], "golden", "attention", arguments, keywords, answer,
                          {what: size.magnitude[what] for what in answer}, size.largest_score, results=results))  # fmt: skip
    return found


def _decode(x: Any) -> Any:
    if isinstance(x, dict) and "array" in x:
        return np.array(x["array"], x["dtype"]).reshape(x["shape"])
    if isinstance(x, dict) and "tuple" in x:
        return tuple(_decode(y) for y in x["tuple"])
    return {n: _decode(y) for n, y in x.items()} if isinstance(x, dict) else x
