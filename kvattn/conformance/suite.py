"""The whole suite: golden cases, whose answers are stored, those that families.py generates, and the dtypes of each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvattn.conformance import families, golden
from kvattn.conformance.cases import NOT_FINITE, Case

TURNS = ("float64", "float32", "float16", "float32", "float64", "bfloat16")


def cases(seed: int = 0) -> list[Case]:
    """Every case: the golden ones, whose answers are stored, and those generated here from ``seed``."""
    made = _shared_out([*golden.stored(), *families.every(np.random.default_rng(seed))])
    names = [case.name for case in made]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return made


def _shared_out(made: list[Case]) -> list[Case]:
    """Give each case its usual run: one dtype, in turn, so that every group meets all; four where numbers are the point;
    and every other one without weights and lse, since a tab may take another path to the output alone.

    Every case in every dtype, both ways, is `run(..., dtypes=DTYPES)`: seconds where each operation runs by itself, many
    minutes where XLA compiles a program for each.
    """
    met: dict[str, int] = {}
    shared = []
    for case in made:
        turn = met[case.group] = met.get(case.group, -1) + 1
        usual = tuple(TURNS[(turn + step) % len(TURNS)] for step in range(len(TURNS)))
        usual = next((dtype,) for dtype in usual if dtype in case.dtypes)
        usual = case.dtypes if case.group in ("plain", "half precision", "large scores") else usual
        alone = case.call == "attention" and turn % 2 == 1 and case.group != NOT_FINITE  # where each case says what it asks for
        shared.append(replace(case, usual=usual, alone=alone))
    return shared
