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

LAST = {"tensorflow": 1, "jax": 2}  # The slowest backends come last, so that the first rows are there soon.
SHARED = {"jax": 12}  # of a backend that takes longer than all others: any free process takes so many of its cases at a time
# JAX spends nearly all its time in compilation. These flags change no operation: LLVM spends less on making them fast.
QUICK = {
    "jax": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
}
# Several processes share one device. Every program goes to JAX's cache, if the user named a folder for it.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "OMP_WAIT_POLICY": "PASSIVE",  # a thread that spins while it waits would take a core from another process
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

    ``progress`` is called with the backend and the case that begins.
    """
    order = sorted(names, key=lambda name: LAST.get(name, 0))
    shares = {name: jobs if name in SHARED else 1 for name in order}
    tasks = deque(_Share(name, share, shares[name], words) for name in order for share in range(shares[name]))
    deals = {name: _CaseNumbers() for name in order}
    events: queue.Queue[tuple[str, Any]] = queue.Queue()
    running: set[subprocess.Popen[str]] = set()
    cases_text: Future[str] = Future()

    def work() -> None:
        while True:
            try:
                share = tasks.popleft()
            except IndexError:
                return

            def report_case(case: str, name: str = share.backend) -> None:
                events.put((name, case))

            events.put((share.backend, share.judged(cases_text, deals[share.backend], running, report_case)))

    for _ in range(jobs):
        threading.Thread(target=work, daemon=True).start()
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in order}
    try:
        cases_text.set_result(written(cases()))
        while any(len(done[name]) < shares[name] for name in order):
            name, event = events.get()
            if isinstance(event, str):
                progress(name, event)
                continue
            done[name].append(event)
            if len(done[name]) == shares[name]:
                yield _combined(name, sorted(done[name], key=lambda part: part["share"]))
    finally:
        tasks.clear()
        for process in list(running):
            process.kill()


class _CaseNumbers:
    """The numbers of the cases of a backend, which its processes take in turn."""

    def __init__(self) -> None:
        self.lock, self.numbers = threading.Lock(), itertools.count()
        self.returned: list[int] = []  # by a process that ended before it was done

    def next(self) -> int:
        with self.lock:
            return self.returned.pop() if self.returned else next(self.numbers)

    def put_back(self, numbers: list[int]) -> None:
        with self.lock:
            self.returned += numbers


class _Share(NamedTuple):
    """The task of one process: a backend, and which share of how many of its cases."""

    backend: str
    share: int
    of: int
    words: str

    def judged(
        self,
        cases_text: Future[str],
        numbers: _CaseNumbers,
        running: set[subprocess.Popen[str]],
        report_case: Callable[[str], None],
    ) -> dict[str, Any]:
        """What a process answers. Where one ended before its first case, another is started with a flag less.

        A release of XLA that does not know a flag aborts; the newest flag is the last.
        """
        start, flags = time.perf_counter(), [] if "XLA_FLAGS" in os.environ else QUICK.get(self.backend, "").split()
        while True:
            begun: list[str] = []
            taken: list[int] = []

            def announce(case: str, begun: list[str] = begun) -> None:
                begun.append(case)
                report_case(case)

            def take(taken: list[int] = taken) -> int:
                taken.append(numbers.next())
                return taken[-1]

            quick = " ".join(flags) or None
            found = _run_process(self._asdict(), quick, cases_text, running, announce, take)
            if found is None and flags and not begun:
                flags.pop()
                numbers.put_back(taken)
                continue
            found = {"error": "the process in which it was judged ended by itself"} if found is None else found
            return found | {"quick": quick, "start": start, "share": self.share}


def _run_process(
    task: dict[str, Any],
    quick: str | None,
    cases_text: Future[str],
    running: set[subprocess.Popen[str]],
    report_case: Callable[[str], None],
    next_number: Callable[[], int],
) -> dict[str, Any] | None:
    """The answer of a process that is given this task; None if it ends without one.

    The process asks for the cases, and then for the numbers of those that it is to judge.
    """
    environment = ENVIRONMENT | os.environ | ({} if quick is None else {"XLA_FLAGS": quick})
    command = [sys.executable, "-c", _CODE, json.dumps(sys.path), json.dumps(task)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, encoding="utf-8", env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        running.add(process)
        try:
            for line in process.stdout:
                found = json.loads(line)
                if "next" in found:
                    answer = cases_text.result() if found["next"] == "cases" else str(next_number())
                    with suppress(BrokenPipeError):  # it ended meanwhile
                        process.stdin.write(answer + "\n")
                        process.stdin.flush()
                elif "case" in found:
                    report_case(found["case"])
                else:
                    return dict(found)
        finally:
            running.discard(process)
            with suppress(BrokenPipeError):
                process.stdin.close()
    return None


def _combined(name: str, parts: list[dict[str, Any]]) -> Judged:
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
    os.dup2(2, 1)  # so that what a framework prints is not read as an answer

    def send(**found: Any) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    with suppress(BrokenPipeError):  # the process that asked has ended
        send(**_judge_backend(json.loads(sys.argv[2]), lambda case: send(case=case), lambda what: send(next=what)))


def _judge_backend(task: dict[str, Any], report_case: Callable[[str], None], request: Callable[[str], None]) -> dict[str, Any]:
    from kvattn import registry, text

    name = task["backend"]
    try:
        with quiet():
            registry.load(name)
    except (Exception, SystemExit) as error:  # a framework that fails to import has a row of the report, whatever it raises
        return {"error": f"it does not import: {type(error).__name__}: {error}"}
    found: dict[str, Any] = {}
    if task["share"] == 0:
        made = text.attend(task["words"], name)
        found["text"] = made if isinstance(made, str) else [x.tolist() for x in made]
    request("cases")
    cases = read(sys.stdin.readline())
    gc.collect()
    gc.freeze()  # modules and cases stay until the end: the garbage collector need not look at them again
    size = SHARED.get(name, len(cases)) if task["of"] > 1 else len(cases)
    results, outputs, excused = [], [], []
    try:
        report = run(name, cases=[])
        while True:
            request("deal")
            first = size * int(sys.stdin.readline())
            if first >= len(cases):
                break
            report = run(name, cases=cases[first : first + size], progress=report_case)
            results += [astuple(each) for each in report.results]
            excused += [reason for reason in report.excused if reason not in excused]
            for at, x in report.outputs.items():
                encoded = base64.b64encode(x.tobytes()).decode("ascii")
                outputs.append((at, x.shape, encoded, report.tolerances[at]))
    except (Exception, SystemExit) as error:
        return found | {"error": f"the suite stopped: {type(error).__name__}: {error}"}
    about = {"suite": version(cases), "version": report.version, "device": report.device, "excused": excused}
    return found | about | {"results": results, "outputs": outputs}
