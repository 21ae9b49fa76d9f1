"""The whole suite: golden cases, whose answers are stored, those that families.py generates, and the dtypes of each."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import kvattn
from kvattn.conformance import families, golden
from kvattn.conformance.cases import NOT_FINITE, Case, read, written

FOLDER = "KVATTN_CASES"  # the environment variable that names the folder in which cases are kept
AS_ASKED = (NOT_FINITE, "scores out", "options together")
TURNS = ("float64", "float32", "float16", "float32", "float64", "bfloat16")


def cases(seed: int = 0) -> list[Case]:
    """Every case: the golden ones, whose answers are stored, and those generated here from ``seed``.

    The oracle takes seconds for them. Where the environment variable KVATTN_CASES names a folder they are kept there as text,
    for other processes of the same kvattn, Python and NumPy.
    """
    return [*_made(seed)]


@cache  # cases are not written to
def _made(seed: int) -> tuple[Case, ...]:
    if not (folder := os.environ.get(FOLDER)):
        return _generated(seed)
    kept = Path(folder, f"cases-{seed}-{_makers()}.json")
    with suppress(FileNotFoundError):
        return tuple(read(kept.read_text(encoding="ascii")))
    made = _generated(seed)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="ascii", dir=folder, delete=False) as file:
        file.write(written(made))
    os.replace(file.name, kept)  # another process finds all of it, or nothing
    return made


def _makers() -> str:
    """Sixteen digits that change with what the cases are made by: any file of kvattn, Python or NumPy."""
    digest = hashlib.sha256(f"{sys.version} {np.__version__}".encode())
    package = Path(kvattn.__file__).parent
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".json")):
        digest.update(f"{path.relative_to(package)} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _generated(seed: int) -> tuple[Case, ...]:
    made = _shared_out([*golden.stored(), *families.every(np.random.default_rng(seed))])
    names = [case.name for case in made]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return tuple(made)


def _shared_out(made: list[Case]) -> list[Case]:
    """Give each case its usual run: one dtype, in turn, so that every group is run in all; four where numbers are the point;
    and every other one without weights and lse, since a tab may take another path to the output alone.

    Every case in every dtype, both ways, is `run(..., dtypes=DTYPES)`: seconds where each operation runs by itself, many
    minutes where XLA compiles a program for each.
    """
    counts: dict[str, int] = {}
    result = []
    for case in made:
        turn = counts[case.group] = counts.get(case.group, -1) + 1
        usual = tuple(TURNS[(turn + step) % len(TURNS)] for step in range(len(TURNS)))
        usual = next((dtype,) for dtype in usual if dtype in case.dtypes)
        usual = case.dtypes if case.group in ("plain", "half precision", "large scores") else usual
        # each dtype both ways, as the turns go on; some groups' cases say what they ask for
        output_only = case.call == "attention" and (turn + turn // len(TURNS)) % 2 == 1 and case.group not in AS_ASKED
        result.append(replace(case, usual=usual, output_only=output_only))
    return result


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
