"""Run a lesson: each tab in a kernel of its own, then the results of its common cells against each other."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvattn
from kvattn.lesson import agree
from kvattn.lesson.agree import Agreement
from kvattn.lesson.reader import Cell, Lesson
from kvattn.lesson.references import References
from kvattn.lesson.watch import MIME

TIMEOUT = 600  # seconds for a cell
Output = dict[str, Any]  # as nbformat has it

# What decides the outputs besides the lesson and kvattn: the cache forgets them when one of these changes.
_PACKAGES = (
    "numpy",
    "torch",
    "tensorflow",
    "tensorflow-cpu",
    "keras",
    "jax",
    "jaxlib",
    "flax",
    "mxnet",
    "matplotlib",
    "ipython",
)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Ran:
    """One cell on one tab: what it showed, how long it took, and the numbers in it."""

    cell: Cell
    seconds: float
    outputs: list[Output]
    seen: list[dict[str, Any]]
    error: str | None  # with the lines of the lesson that led to it


@dataclass(frozen=True)
class Result:
    """A lesson that was run: per tab its cells, up to the first error; per common cell how far the tabs agree."""

    lesson: Lesson
    tabs: dict[str, list[Ran]]
    agreements: dict[Cell, Agreement]
    refers: bool = True  # whether its references are asked where they lead

    @property
    def errors(self) -> list[tuple[str, Ran]]:
        """(tab, cell) for each tab that an error stopped."""
        return [(name, ran) for name, cells in self.tabs.items() for ran in cells if ran.error]

    @property
    def apart(self) -> list[tuple[Cell, Agreement]]:
        """The common cells whose numbers differ between tabs by more than the tolerance."""
        return [(cell, found) for cell, found in self.agreements.items() if found.share > 1]

    @property
    def lost(self) -> list[str]:
        """The references and citations that lead nowhere."""
        return References(self.lesson).lost if self.refers else []

    @property
    def ok(self) -> bool:
        return not self.errors and not self.apart and not self.lost

    def problems(self) -> list[str]:
        """What is wrong, a text for each error and disagreement, with file and line."""
        stopped = [f"{name}: {ran.error}" for name, ran in self.errors]
        apart = [f"{self.lesson.at(cell.line)}: the tabs disagree: {found.message}" for cell, found in self.apart]
        return stopped + self.lost + apart


def run(
    lesson: Lesson,
    tabs: Iterable[str],
    *,
    figures: bool = False,
    cache: str | Path | None = None,
    timeout: int = TIMEOUT,
) -> Result:
    """Run a lesson's cells, tab after tab, each tab in a new kernel (see ``run_tab``), and compare the tabs (``compare``)."""
    ran = {name: run_tab(lesson, name, cache=cache, timeout=timeout) for name in tabs}
    return Result(lesson, ran, compare(lesson, ran, figures))


def compare(lesson: Lesson, ran: dict[str, list[Ran]], figures: bool = False) -> dict[Cell, Agreement]:
    """How far the tabs agree about each common cell (``%%tab all``, or no ``%%tab``) that shows numbers.

    They must be the same up to the tolerance of kvattn.lesson.agree. A cell with the comment ``#@differs`` is left out:
    for what is random or measured. ``figures``: and what Matplotlib figures draw.
    """
    agreements = {}
    for cell in lesson.cells:
        seen = {name: each.seen for name, cells in ran.items() for each in cells if each.cell is cell and not each.error}
        if cell.compared and (found := agree.judge(seen, figures)):
            agreements[cell] = found
    return agreements


def run_tab(
    lesson: Lesson,
    name: str,
    *,
    cache: str | Path | None = None,
    timeout: int = TIMEOUT,
    progress: Callable[[int, str], None] = lambda done, doing: None,
) -> list[Ran]:
    """Run the cells of one tab in a new kernel of this Python, in the lesson's folder, up to the first error.

    ``cache`` is a folder that keeps the outputs of a tab that had no error, by content: the tab's code, kvattn's own, and
    the versions of the frameworks; not the files that a lesson reads. ``timeout`` is for a cell, in seconds. ``progress`` is
    called with the number of cells done and the first line of the next.

    Raises ModuleNotFoundError where ipykernel, nbclient or nbformat is not installed.
    """
    import nbformat

    if not (cells := lesson.on(name)):
        return []
    kept = Path(cache, f"{_key(name, cells)}.json") if cache else None
    if kept and kept.is_file():
        notebook = nbformat.read(kept, as_version=4)
        return _results(lesson, cells, notebook)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.code, id=f"line-{cell.line}") for cell in cells])
    _execute(notebook, name, lesson.path.absolute().parent, timeout, lambda done: progress(done, _title(cells, done)))
    ran = _results(lesson, cells, notebook)
    if kept and not any(each.error for each in ran):
        kept.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, kept)
    return ran


def _title(cells: list[Cell], index: int) -> str:
    return cells[index].title if index < len(cells) else ""


def _key(name: str, cells: list[Cell]) -> str:
    """A name for what decides the outputs of these cells on this tab."""
    parts = [name, sys.version, platform.platform(), *(cell.code for cell in cells), *_sources()]
    parts += [f"{each} {_version(each)}" for each in _PACKAGES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@functools.cache
def _sources() -> list[str]:
    """kvattn's own code."""
    return [path.read_text(encoding="utf-8") for path in sorted(Path(kvattn.__file__).parent.rglob("*.py"))]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _execute(notebook: Any, name: str, folder: Path, timeout: int, progress: Callable[[int], None]) -> None:
    """Execute the cells in place, up to the first error; what is not in their outputs goes into their metadata."""
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    if importlib.util.find_spec("ipykernel") is None:
        raise ModuleNotFoundError("No module named 'ipykernel'", name="ipykernel")
    # kvattn as this process has it, wherever the kernel's folder is
    start = (
        f"import sys; sys.path.append({str(Path(kvattn.__file__).parents[1])!r})\n"
        f"import kvattn.lesson.watch; kvattn.lesson.watch.start({name!r}); del sys, kvattn"
    )
    with tempfile.TemporaryDirectory(prefix="kvattn-", ignore_cleanup_errors=True) as scratch:
        manager = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),  # this Python, whatever the user registered as python3
            connection_file=str(Path(scratch, "kernel.json")),
            **({"transport": "ipc", "ip": str(Path(scratch, "kernel"))} if os.name == "posix" else {}),
        )
        client = NotebookClient(
            nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(start), *notebook.cells]),
            km=manager,
            timeout=timeout,
            shutdown_kernel="immediate",
            coalesce_streams=True,
        )
        environment = {
            **os.environ,
            "KVATTN_BACKEND": name,
            "IPYTHONDIR": scratch,  # no profile of the user's has a say, and no history is written
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        }
        with (
            Path(scratch, "stderr").open("w+", errors="replace") as words,
            client.setup_kernel(env=environment, cwd=str(folder), stderr=words, cleanup_kc=True),
        ):
            for index, cell in enumerate(client.nb.cells):
                begun = time.perf_counter()
                error = None
                try:
                    client.execute_cell(cell, index)
                except CellExecutionError as raised:
                    error = f"{raised.ename}: {raised.evalue}"
                except CellTimeoutError:
                    error = f"took longer than {timeout} s (--timeout)"
                except DeadKernelError:
                    words.seek(0)
                    error = "\n".join(["the kernel died", *words.read().splitlines()[-10:]])
                if index or error:
                    each = cell if index else notebook.cells[0]
                    each.metadata["kvattn"] = {"seconds": time.perf_counter() - begun, "error": error, "starting": not index}
                if error:
                    return
                progress(index)


def _results(lesson: Lesson, cells: list[Cell], notebook: Any) -> list[Ran]:
    """What the cells did, from the notebook in which they were executed, up to the first error."""
    lines = {each.execution_count: cell.line for each, cell in zip(notebook.cells, cells, strict=True)}
    results = []
    for cell, executed in zip(cells, notebook.cells, strict=True):
        if about := executed.metadata.get("kvattn"):
            notes: dict[str, Any] = {"seen": [], "trace": []}
            for output in executed.outputs:
                notes |= output.get("data", {}).get(MIME, {})
            outputs = [output for output in executed.outputs if MIME not in output.get("data", {})]
            error = about["error"]
            if about["starting"]:
                error = f"{lesson.path}: the tab does not start: {error}"
            elif error:
                trace = _trace(lesson, lines, notes["trace"]) or [f"{lesson.at(cell.line)}:"]
                error = "\n".join([*trace, textwrap.indent(_ANSI.sub("", error), "  ")])
            results.append(Ran(cell, about["seconds"], outputs, notes["seen"], error))
    return results


def _trace(lesson: Lesson, lines: dict[int, int], frames: list[list[Any]]) -> list[str]:
    """The lines that led to an error: those of the lesson as file:line, and the last, wherever it is."""
    trace = []
    for frame in frames:
        place, line, function, source = frame
        if place.startswith("In[") and (first := lines.get(int(place[3:-1]))):
            trace.append(f"{lesson.at(first + (line or 1) - 1)}: {source or ''}")
        elif frame is frames[-1]:
            trace.append(f"  {place}:{line}, in {function}: {source or ''}")
    return trace
