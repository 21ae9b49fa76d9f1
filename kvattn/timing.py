"""How calls are timed, for ``kvattn bench`` and for the scripts of benchmarks/: in turn, over many rounds.

What is compared is called in the same round, so that whatever else the machine does slows all alike; ratios are taken within
a round. A turn is either `looped`, as in a loop of a user's own, or `queued`: a given number of calls, one after another.

Looped, a call is made over and over for WARM seconds, and then for TIMED by the clock. After another's call the threads of that
one would go on spinning for some milliseconds; after a pause the system may wake several threads on one core, where they stay
for tens of milliseconds, in which small calls take up to seven times as long.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

WARM = 0.1  # seconds of calls before those that are timed: until a framework's threads have found cores of their own
TIMED = 0.05  # seconds of calls that are timed

Call = Callable[[], Any]
Clock = Callable[[Call, int], float]  # seconds of so many calls, one after another


def wall(call: Call, count: int = 1) -> float:
    """Seconds of so many calls by the clock on the wall: each returns when its work is done."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def looped(call: Call) -> float:
    """Seconds of a call that follows others of its own: the median of as many as TIMED seconds hold, at least one."""
    end = time.perf_counter() + WARM
    while time.perf_counter() < end:
        call()
    took: list[float] = []
    spent = 0.0  # a sum that is taken anew after each of many short calls would cost more than they do
    while not took or spent < TIMED:
        took.append(wall(call))
        spent += took[-1]
    return statistics.median(took)


def queued(count: int, clock: Clock = wall, before: int = 0) -> Callable[[Call], float]:
    """A turn of ``count`` calls in one go, after some that are not timed: seconds of one of them."""

    def turn(call: Call) -> float:
        for _ in range(before):
            call()
        return clock(call, count) / count

    return turn


def rounds(
    calls: Mapping[str, Call], number: int, turn: Callable[[Call], float] | Mapping[str, Callable[[Call], float]] = looped
) -> dict[str, list[float]]:
    """Seconds of each call in each round, in which all take their turn; who comes first in one is the last in the next.

    ``turn`` gives the seconds of a call; or there is one for each name.
    """
    took: dict[str, list[float]] = {name: [] for name in calls}
    names = [*calls]
    for at in range(number):
        first = at % len(names)
        for name in names[first:] + names[:first]:
            took[name].append((turn[name] if isinstance(turn, Mapping) else turn)(calls[name]))
    return took


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """The median and the quartiles of the ratio, round by round."""
    each = np.array(ours) / np.array(theirs)
    return {"ratio": float(np.median(each)), "spread": [float(x) for x in np.quantile(each, [0.25, 0.75])]}


def in_a_process(command: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """The JSON objects that Python's ``command`` prints, as they come, from a process of its own.

    Frameworks' threads disturb each other. If the process fails, the last object holds ``failed``: what it said at the end;
    and ``words``, all that it said.
    """
    with (
        tempfile.TemporaryFile("w+") as errors,  # a pipe that nobody reads would stop it
        subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=errors, text=True, env=env) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        if process.wait():
            errors.seek(0)
            words = errors.read().strip()
            yield {"failed": words.splitlines()[-1] if words else f"exit status {process.returncode}", "words": words}


def print_row(row: Mapping[str, Any]) -> None:
    """A row to the process that started this one by `in_a_process`."""
    print(json.dumps(row), flush=True)


def write(path: str, about: Mapping[str, Any], **measured: Any) -> None:
    """A file of what was ``measured``, and on what."""
    Path(path).write_text(document(about, **measured), encoding="utf-8")


def document(about: Mapping[str, Any], **measured: Any) -> str:
    return json.dumps({**about, **measured}, indent=1)


def machine() -> dict[str, Any]:
    """What the figures were measured on, and when."""
    versions = {}
    for package in ("numpy", "torch", "tensorflow", "tensorflow-cpu", "jax", "flax", "mxnet"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    here = {"python": platform.python_version(), "processor": _processor(), "cores": len(os.sched_getaffinity(0))}
    return {"date": time.strftime("%Y-%m-%d"), **here, **versions}


def _processor() -> str:
    """The processor's name, where Linux gives it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
