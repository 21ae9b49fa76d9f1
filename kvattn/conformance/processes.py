"""Backends side by side, each in a process of its own: what ``kvattn conform`` waits for is half of the sum, on two cores.

A process loads one backend, and answers on its standard output with lines of JSON: the case that begins, and at last all of
the report. One that crashes takes nothing else with it.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from kvattn.conformance.check import Report, Result, run
from kvattn.conformance.suite import cases, version
from kvattn.quiet import quiet

LAST = {"tensorflow": 1, "jax": 2}  # the slowest last, so that the first rows are soon there
SHARED = {"jax": 16}  # a backend that takes longer than the rest together: its cases are dealt out to all, so many at a time
# Nearly all that JAX's cases cost is compilation. Its operations stay as they are; LLVM spends less on making them fast.
QUICK = {
    "jax": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
}
# Several processes have one device between them; and every program goes to JAX's cache, if the user named a folder for it.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from kvattn.conformance import processes; processes.answer()"


@dataclass
class Judged:
    """What became of a backend: its report, or the error that ended it; what it makes of the text, or why it does not."""

    name: str
    report: Report | None = None
    error: str | None = None
    text: Any = None  # (output, weights), or the error in words
    seconds: float = 0.0
    quick: str | None = None  # the flags that its programs were compiled with


def judge(
    names: Sequence[str], words: str, jobs: int, progress: Callable[[str, str], None] = lambda *_: None
) -> Iterator[Judged]:
    """Run the suite and the text on the backends, ``jobs`` processes at one time; yields each backend as it is done.

    ``progress`` is told the backend and the case that begins.
    """
    order = sorted(names, key=lambda name: LAST.get(name, 0))
    shares = {name: jobs if name in SHARED else 1 for name in order}
    tasks = deque((name, share) for name in order for share in range(shares[name]))
    events: queue.Queue[tuple[str, Any]] = queue.Queue()
    running: set[subprocess.Popen[str]] = set()
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not tasks:
                    return
                name, share = tasks.popleft()
            start = time.perf_counter()
            asked = {"backend": name, "share": share, "of": shares[name], "words": words}
            quick = QUICK.get(name) if "XLA_FLAGS" not in os.environ else None

            def tell(case: Any, name: str = name) -> None:
                events.put((name, case))

            found = _ask(asked, quick, running, tell)
            if quick is not None and found is None:  # a release of XLA that does not know the flags aborts
                quick = None
                found = _ask(asked, None, running, tell)
            found = found or {"error": "the process in which it was judged ended by itself"}
            events.put((name, found | {"quick": quick, "start": start, "share": share}))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in order}
    try:
        while any(len(done[name]) < shares[name] for name in order):
            name, event = events.get()
            if isinstance(event, str):
                progress(name, event)
                continue
            done[name].append(event)
            if len(done[name]) == shares[name]:
                yield _joined(name, sorted(done[name], key=lambda part: part["share"]))
    finally:
        tasks.clear()
        for process in list(running):
            process.kill()


def _ask(
    asked: dict[str, Any], quick: str | None, running: set[subprocess.Popen[str]], tell: Callable[[str], None]
) -> dict[str, Any] | None:
    """The answer of a process to what it is asked; None if it ends without one."""
    environment = ENVIRONMENT | os.environ | ({} if quick is None else {"XLA_FLAGS": quick})
    command = [sys.executable, "-c", _CODE, json.dumps(sys.path), json.dumps(asked)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, encoding="utf-8", env=environment) as process:
        running.add(process)
        try:
            for line in process.stdout or ():
                found = json.loads(line)
                if "case" not in found:
                    return dict(found)
                tell(found["case"])
        finally:
            running.discard(process)
    return None


def _joined(name: str, parts: list[dict[str, Any]]) -> Judged:
    """The report of a backend, from those of its processes."""
    first = parts[0]
    judged = Judged(name, text=first.get("text"), quick=first["quick"])
    judged.seconds = time.perf_counter() - min(part["start"] for part in parts)
    judged.error = next((part["error"] for part in parts if "error" in part), None)
    if judged.error is None:
        judged.report = report = Report(name, first["version"], first["device"], suite=first["suite"])
        for part in parts:
            report.results += [Result(*each) for each in part["results"]]
            report.excused += [reason for reason in part["excused"] if reason not in report.excused]
            for at, shape, numbers, tolerance in part["outputs"]:
                report.outputs[tuple(at)] = np.frombuffer(base64.b64decode(numbers)).reshape(shape)
                report.tolerances[tuple(at)] = tuple(tolerance)
    return judged


# ---- the process of a backend


def answer() -> None:
    """Judge the backend that the command line asks for, and say what came of it."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a framework prints is no answer

    def say(**found: Any) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    with suppress(BrokenPipeError):  # nobody listens any more
        say(**_found(json.loads(sys.argv[2]), lambda case: say(case=case)))


def _found(asked: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    from kvattn import dispatch, text

    name = asked["backend"]
    try:
        with quiet():
            dispatch.load(name)
    except (Exception, SystemExit) as error:  # a framework that fails to import is a row, whatever it raises
        return {"error": f"it does not import: {type(error).__name__}: {error}"}
    found: dict[str, Any] = {}
    if asked["share"] == 0:
        made = text.attend(asked["words"], name)
        found["text"] = made if isinstance(made, str) else [x.tolist() for x in made]
    every = cases()
    deal = SHARED.get(name, len(every))
    mine = [case for i, case in enumerate(every) if i // deal % asked["of"] == asked["share"]]
    try:
        report = run(name, cases=mine, progress=tell)
    except (Exception, SystemExit) as error:
        return found | {"error": f"the suite stopped: {type(error).__name__}: {error}"}
    outputs = [
        (at, x.shape, base64.b64encode(x.tobytes()).decode("ascii"), report.tolerances[at]) for at, x in report.outputs.items()
    ]
    about = {"suite": version(every), "version": report.version, "device": report.device, "excused": report.excused}
    return found | about | {"results": [astuple(each) for each in report.results], "outputs": outputs}
