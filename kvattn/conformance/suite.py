"""The whole suite: golden cases, whose answers are stored, those that families.py generates, and the dtypes of each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from kvattn.conformance import families, golden
from kvattn.conformance.cases import NOT_FINITE, Case

AS_ASKED = (NOT_FINITE, "scores out", "options together")
TURNS = ("float64", "float32", "float16", "float32", "float64", "bfloat16")


def cases(seed: int = 0) -> list[Case]:
    """Every case: the golden ones, whose answers are stored, and those generated here from ``seed``."""
    return [*_made(seed)]


@cache  # seconds of the oracle's; cases are not written to
def _made(seed: int) -> tuple[Case, ...]:
    made = _shared_out([*golden.stored(), *families.every(np.random.default_rng(seed))])
    names = [case.name for case in made]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return tuple(made)


def _shared_out(made: list[Case]) -> list[Case]:
    """Give each case its usual run: one dtype, in turn, so that every group meets all; four where numbers are the point;
    and every other one without weights and lse, since a tab may take another path to the output alone.

    Every case in every dtype, both ways, is `run(..., dtypes=DTYPES)`: seconds where each operation runs by itself, many
    minutes where XLA compiles a program for each.
    """
    counts: dict[str, int] = {}
    shared = []
    for case in made:
        turn = counts[case.group] = counts.get(case.group, -1) + 1
        usual = tuple(TURNS[(turn + step) % len(TURNS)] for step in range(len(TURNS)))
        usual = next((dtype,) for dtype in usual if dtype in case.dtypes)
        usual = case.dtypes if case.group in ("plain", "half precision", "large scores") else usual
        # each dtype both ways, as the turns go on; some groups' cases say what they ask for
        alone = case.call == "attention" and (turn + turn // len(TURNS)) % 2 == 1 and case.group not in AS_ASKED
        shared.append(replace(case, usual=usual, alone=alone))
    return shared


def version(cases: Iterable[Case]) -> str:
    """How many cases there are, and eight digits that change with any name, input or keyword: "710-1f3a9c0e".

    Two results with the same version were asked the same.
    """
    digest, count = hashlib.sha256(), 0
    for case in cases:
        count += 1
        for part in _plain([case.name, case.call, case.arguments, case.keywords, case.dtypes]):
            digest.update(part + b"\0")
    return f"{count}-{digest.hexdigest()[:8]}"


def _plain(x: Any) -> Iterable[bytes]:
    """The bytes that say the same as names, numbers and arrays, in containers of them."""
    if isinstance(x, Mapping):
        x = sorted(x.items())
    if isinstance(x, (list, tuple)):
        yield f"{len(x)} of".encode()
        for each in x:
            yield from _plain(each)
    elif isinstance(x, (np.ndarray, np.generic)):
        yield f"{x.dtype.kind}{x.shape}".encode()
        yield np.ascontiguousarray(x, np.float64).tobytes()
    else:
        yield str(getattr(x, "__qualname__", type(x).__name__) if callable(x) else x).encode()
