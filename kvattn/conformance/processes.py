"""Backends side by side, each in a process of its own: what ``kvattn conform`` waits for is half of the sum, on two cores.

A process loads one backend, and answers on its standard output with lines of JSON: the case that begins, and at last all of
the report. One that crashes takes nothing else with it. The oracle answers once for all of them, while they import their
frameworks: cases are plain data, which they are sent as text.
"""

from __future__ import annotations

import base64
import gc
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import numpy as np

from kvattn.conformance.cases import read, written
from kvattn.conformance.check import Report, Result, run
from kvattn.conformance.suite import cases, version
from kvattn.quiet import quiet

LAST = {"tensorflow": 1, "jax": 2}  # the slowest last, so that the first rows are soon there
SHARED = {"jax": 12}  # a backend that takes longer than the rest together: who is free takes so many of its cases at a time
# Nearly all that JAX's cases cost is compilation. Its operations stay as they are; LLVM spends less on making them fast.
QUICK = {
    "jax": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
}
# Several processes have one device between them; and every program goes to JAX's cache, if the user named a folder for it.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "OMP_WAIT_POLICY": "PASSIVE",  # and the cores: a thread that spins while it waits takes one from the other process
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
    tasks = deque(_Share(name, share, shares[name], words) for name in order for share in range(shares[name]))
    deals = {name: _Deal() for name in order}
    events: queue.Queue[tuple[str, Any]] = queue.Queue()
    running: set[subprocess.Popen[str]] = set()
    every: Future[str] = Future()

    def work() -> None:
        while True:
            try:
                share = tasks.popleft()
            except IndexError:
                return

            def tell(case: str, name: str = share.backend) -> None:
                events.put((name, case))

            events.put((share.backend, share.judged(every, deals[share.backend], running, tell)))

    for _ in range(jobs):
        threading.Thread(target=work, daemon=True).start()
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in order}
    try:
        every.set_result(written(cases()))
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


class _Deal:
    """The numbers of the cases of a backend, which its processes take in turn."""

    def __init__(self) -> None:
        self.lock, self.numbers = threading.Lock(), itertools.count()
        self.returned: list[int] = []  # by a process that ended before it was done

    def take(self) -> int:
        with self.lock:
            return self.returned.pop() if self.returned else next(self.numbers)

    def put_back(self, numbers: list[int]) -> None:
        with self.lock:
            self.returned += numbers


class _Share(NamedTuple):
    """What one process is asked: of a backend, which share of how many."""

    backend: str
    share: int
    of: int
    words: str

    def judged(
        self, every: Future[str], deal: _Deal, running: set[subprocess.Popen[str]], tell: Callable[[str], None]
    ) -> dict[str, Any]:
        """What a process found; another is asked, with a flag less, where one ended before it began.

        A release of XLA that does not know a flag aborts; the newest flag is the last.
        """
        start, flags = time.perf_counter(), [] if "XLA_FLAGS" in os.environ else QUICK.get(self.backend, "").split()
        while True:
            begun: list[str] = []
            dealt: list[int] = []

            def announce(case: str, begun: list[str] = begun) -> None:
                begun.append(case)
                tell(case)

            def dealing(dealt: list[int] = dealt) -> int:
                dealt.append(deal.take())
                return dealt[-1]

            quick = " ".join(flags) or None
            found = _ask(self._asdict(), quick, every, running, announce, dealing)
            if found is None and flags and not begun:
                flags.pop()
                deal.put_back(dealt)
                continue
            found = {"error": "the process in which it was judged ended by itself"} if found is None else found
            return found | {"quick": quick, "start": start, "share": self.share}


def _ask(
    asked: dict[str, Any],
    quick: str | None,
    every: Future[str],
    running: set[subprocess.Popen[str]],
    tell: Callable[[str], None],
    deal: Callable[[], int],
) -> dict[str, Any] | None:
    """The answer of a process to what it is asked; None if it ends without one.

    It asks for the cases, and then which of them are its own, a deal at a time.
    """
    environment = ENVIRONMENT | os.environ | ({} if quick is None else {"XLA_FLAGS": quick})
    command = [sys.executable, "-c", _CODE, json.dumps(sys.path), json.dumps(asked)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, encoding="utf-8", env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        running.add(process)
        try:
            for line in process.stdout:
                found = json.loads(line)
                if "next" in found:
                    answer = every.result() if found["next"] == "cases" else str(deal())
                    with suppress(BrokenPipeError):  # it ended meanwhile
                        process.stdin.write(answer + "\n")
                        process.stdin.flush()
                elif "case" in found:
                    tell(found["case"])
                else:
                    return dict(found)
        finally:
            running.discard(process)
            with suppress(BrokenPipeError):
                process.stdin.close()
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
        say(**_found(json.loads(sys.argv[2]), lambda case: say(case=case), lambda what: say(next=what)))


def _found(asked: dict[str, Any], tell: Callable[[str], None], ask: Callable[[str], None]) -> dict[str, Any]:
    from kvattn import registry, text

    name = asked["backend"]
    try:
        with quiet():
            registry.load(name)
    except (Exception, SystemExit) as error:  # a framework that fails to import is a row, whatever it raises
        return {"error": f"it does not import: {type(error).__name__}: {error}"}
    found: dict[str, Any] = {}
    if asked["share"] == 0:
        made = text.attend(asked["words"], name)
        found["text"] = made if isinstance(made, str) else [x.tolist() for x in made]
    ask("cases")
    every = read(sys.stdin.readline())
    gc.collect()
    gc.freeze()  # modules and cases stay: no collection need look at them again
    size = SHARED.get(name, len(every)) if asked["of"] > 1 else len(every)
    results, outputs, excused = [], [], []
    try:
        report = run(name, cases=[])
        while True:
            ask("deal")
            first = size * int(sys.stdin.readline())
            if first >= len(every):
                break
            report = run(name, cases=every[first : first + size], progress=tell)
            results += [astuple(each) for each in report.results]
            excused += [reason for reason in report.excused if reason not in excused]
            for at, x in report.outputs.items():
                numbers = base64.b64encode(x.tobytes()).decode("ascii")
                outputs.append((at, x.shape, numbers, report.tolerances[at]))
    except (Exception, SystemExit) as error:
        return found | {"error": f"the suite stopped: {type(error).__name__}: {error}"}
    about = {"suite": version(every), "version": report.version, "device": report.device, "excused": excused}
    return found | about | {"results": results, "outputs": outputs}
