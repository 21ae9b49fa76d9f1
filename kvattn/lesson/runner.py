"""Run a lesson: each tab in a kernel of its own, then the results of its common cells against each other."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvattn
from kvattn.lesson import agree
from kvattn.lesson.agree import Agreement
from kvattn.lesson.forks import Forks, provisioner
from kvattn.lesson.reader import Cell, Lesson
from kvattn.lesson.references import References
from kvattn.lesson.watch import MIME

TIMEOUT = 600  # seconds for a cell
Output = dict[str, Any]  # as nbformat has it

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Ran:
    """One cell on one tab: what it showed, how long it took, and the numbers in it."""

    cell: Cell
    seconds: float
    outputs: list[Output]
    shown: list[dict[str, Any]]
    error: str | None  # with the lines of the lesson that led to it


@dataclass(frozen=True)
class Result:
    """A lesson that was run: per tab its cells, up to the first error; per common cell how far the tabs agree."""

    lesson: Lesson
    tabs: dict[str, list[Ran]]
    agreements: dict[Cell, Agreement]
    refers: bool = True  # whether its references are asked where they lead
    files: Sequence[Path] | None = None  # the lessons and .bib files that it may refer to; None: those of its folder

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
        return References(self.lesson, self.files).lost if self.refers else []

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
        shown = {name: each.shown for name, cells in ran.items() for each in cells if each.cell is cell and not each.error}
        if cell.compared and (found := agree.judge(shown, figures)):
            agreements[cell] = found
    return agreements


def run_tab(
    lesson: Lesson,
    name: str,
    *,
    cache: str | Path | None = None,
    timeout: int = TIMEOUT,
    progress: Callable[[int, str], None] = lambda done, doing: None,
    forks: Forks | None = None,
) -> list[Ran]:
    """Run the cells of one tab in a new kernel of this Python, in the lesson's folder, up to the first error.

    ``cache`` is a folder that keeps the outputs of a tab that had no error, by content: the tab's code, kvattn's own, what is
    installed, and the files and folders that the cells read. ``timeout`` is for a cell, in seconds. ``progress`` is called with
    the number of cells done and the first line of the next. ``forks``: whose kernel it is, where several lessons are run.

    Raises ModuleNotFoundError where ipykernel, nbclient or nbformat is not installed.
    """
    if not lesson.on(name):
        return []
    if (ran := remembered(lesson, name, cache)) is not None:
        return ran
    with closing(Tab(name, timeout, cache, forks)) as tab:
        return tab.run(lesson, progress)


def remembered(lesson: Lesson, name: str, cache: str | Path | None) -> list[Ran] | None:
    """What the cache has of a tab; None: nothing, or something has changed since."""
    import nbformat

    cells = lesson.on(name)
    kept = Path(cache, f"{_key(name, cells)}.json") if cache else None
    if kept is None or not kept.is_file():
        return None
    try:
        done = nbformat.read(kept, as_version=4).cells
        results = _results(lesson, cells, done) if all(_fresh(each, lesson) for each in done) else None
    except Exception:  # it was cut short, or is another's: as good as none
        return None
    if results is not None:
        kept.touch()  # for those who throw away what is not used
    return results


class Tab:
    """A tab whose kernel stays: of a lesson that is run again, only the cells from the first that changed on."""

    def __init__(self, name: str, timeout: int = TIMEOUT, cache: str | Path | None = None, forks: Forks | None = None) -> None:
        self.name, self.timeout, self.cache, self.forks = name, timeout, cache, forks
        self.done: list[Any] = []  # the cells that were executed without an error, as nbformat has them
        self.failed: Any = None  # the one after them
        self.kernel: _Kernel | None = None
        self.clean = True  # the kernel was given these cells and no others

    def run(self, lesson: Lesson, progress: Callable[[int, str], None] = lambda done, doing: None) -> list[Ran]:
        """As ``run_tab``."""
        import nbformat

        cells = lesson.on(self.name)
        same = self._same(cells, lesson)
        failed = self.failed is not None and same == len(self.done) < len(cells) and _same(self.failed, cells[same], lesson)
        if failed:
            executed = [*self.done, self.failed]
        elif same == len(cells):
            executed, self.failed = self.done[:same], None
            self.done = executed
        else:
            self.clean = self.clean and same == len(self.done) and self.failed is None
            if self.kernel is None:
                self.kernel = _Kernel(self.name, lesson.path.absolute().parent, self.timeout, self.forks)
                same, self.clean = 0, True
            self.done, self.failed = self.done[:same], None
            progress(same, cells[same].title)
            for cell in cells[same:]:
                made = nbformat.v4.new_code_cell(cell.code)
                if self.kernel.run(made):
                    for each in _read(made):
                        made.metadata["kvattn"]["files"][os.path.relpath(each, lesson.path.absolute().parent)] = _digest(each)
                    self.done.append(made)
                    progress(len(self.done), cells[len(self.done)].title if len(self.done) < len(cells) else "")
                else:
                    self.failed = made
                    if self.kernel.dead:
                        self.close()
                    break
            executed = [*self.done, *([self.failed] if self.failed else [])]
        for made, cell in zip(executed, cells, strict=False):
            made["id"] = f"line-{cell.line}"
        if self.cache and self.clean and len(self.done) == len(cells):
            kept = Path(self.cache, f"{_key(self.name, cells)}.json")
            kept.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(nbformat.v4.new_notebook(cells=executed), kept)
        return _results(lesson, cells, executed)

    def _same(self, cells: list[Cell], lesson: Lesson) -> int:
        """How many cells, from the first on, are as they were when they were executed."""
        pairs = zip(self.done, cells, strict=False)
        return next(
            (i for i, (made, cell) in enumerate(pairs) if not _same(made, cell, lesson)), min(len(self.done), len(cells))
        )

    def close(self) -> None:
        """End the kernel; what it gave stays."""
        if self.kernel is not None:
            self.kernel.close()
            self.kernel = None


def _same(made: Any, cell: Cell, lesson: Lesson) -> bool:
    return bool(made.source == cell.code and _fresh(made, lesson))


def _fresh(made: Any, lesson: Lesson) -> bool:
    """Whether the files that a cell read are as they were."""
    folder = lesson.path.absolute().parent
    return all(_digest(os.path.join(folder, name)) == digest for name, digest in made.metadata["kvattn"]["files"].items())


def _read(made: Any) -> list[str]:
    """The files and folders that a cell read."""
    notes = [output["data"][MIME] for output in made.outputs if MIME in output.get("data", {})]
    return [path for each in notes for path in each["files"]]


def _digest(path: str) -> str:
    """A name for a file's content, or for what a folder holds."""
    try:
        if os.path.isdir(path):
            return hashlib.sha256(
                "\0".join(sorted(name for name in os.listdir(path) if name[0] not in "._")).encode()
            ).hexdigest()
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "none"


def _key(name: str, cells: list[Cell]) -> str:
    """A name for what decides the outputs of these cells on this tab."""
    parts = [name, sys.version, platform.platform(), *(cell.code for cell in cells), *_sources(), *_installed()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@functools.cache
def _sources() -> list[str]:
    """kvattn's own code."""
    return [path.read_text(encoding="utf-8") for path in sorted(Path(kvattn.__file__).parent.rglob("*.py"))]


def _installed() -> list[str]:
    """Every package with its version: a lesson may import any."""
    return sorted({path.name for folder in sys.path if folder for path in Path(folder).glob("*.dist-info")})


class _Kernel:
    """A kernel of this Python with one tab selected."""

    def __init__(self, name: str, folder: Path, timeout: int, forks: Forks | None = None) -> None:
        import nbformat
        from jupyter_client.kernelspec import KernelSpecManager
        from jupyter_client.manager import AsyncKernelManager
        from nbclient import NotebookClient

        if importlib.util.find_spec("ipykernel") is None:
            raise ModuleNotFoundError("No module named 'ipykernel'", name="ipykernel")
        self.timeout, self.dead = timeout, False
        self.resources = ExitStack()
        scratch = self.resources.enter_context(tempfile.TemporaryDirectory(prefix="kvattn-", ignore_cleanup_errors=True))
        manager = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),  # this Python, whatever the user registered as python3
            connection_file=str(Path(scratch, "kernel.json")),
            **({"transport": "ipc", "ip": str(Path(scratch, "kernel"))} if os.name == "posix" else {}),
        )
        if forks is not None:
            manager.provisioner = provisioner(manager, name, forks, str(Path(scratch, "stderr")))
        self.client = NotebookClient(
            nbformat.v4.new_notebook(),
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
            "PYTHONDONTWRITEBYTECODE": "1",  # nothing is written beside a lesson that imports a module of its folder
        }
        self.words = self.resources.enter_context(open(Path(scratch, "stderr"), "w+", errors="replace"))  # noqa: SIM115
        try:
            self.resources.enter_context(
                self.client.setup_kernel(env=environment, cwd=str(folder), stderr=self.words, cleanup_kc=True)
            )
            # kvattn as this process has it, wherever the kernel's folder is
            start = (
                f"import sys; sys.path.append({str(Path(kvattn.__file__).parents[1])!r})\n"
                f"import kvattn.lesson.watch; kvattn.lesson.watch.start({name!r}); del sys, kvattn"
            )
            self.refused = self._execute(nbformat.v4.new_code_cell(start))
        except BaseException:
            self.resources.close()
            raise

    def run(self, cell: Any) -> bool:
        """Execute a cell in place; whether it had no error. What is not in its outputs goes into its metadata."""
        begun = time.perf_counter()
        error = self.refused or self._execute(cell)
        self.dead = self.dead or self.refused is not None
        seconds = time.perf_counter() - begun
        cell.metadata["kvattn"] = {"seconds": seconds, "error": error, "starting": self.refused is not None, "files": {}}
        return error is None

    def _execute(self, cell: Any) -> str | None:
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

        self.client.nb.cells = [cell]
        try:
            self.client.execute_cell(cell, 0)
        except CellExecutionError as raised:
            return f"{raised.ename}: {raised.evalue}"
        except CellTimeoutError:
            self.dead = True
            return f"took longer than {self.timeout} s (--timeout)"
        except DeadKernelError:
            self.dead = True
            self.words.seek(0)
            return "\n".join(["the kernel died", *self.words.read().splitlines()[-10:]])
        return None

    def close(self) -> None:
        self.resources.close()


def _results(lesson: Lesson, cells: list[Cell], executed_cells: list[Any]) -> list[Ran]:
    """What the cells did, from those that were executed, up to the first error."""
    lines = {each.execution_count: cell.line for each, cell in zip(executed_cells, cells, strict=False)}
    results = []
    for cell, executed in zip(cells, executed_cells, strict=False):
        about = executed.metadata["kvattn"]
        notes: dict[str, Any] = {"shown": [], "trace": []}
        for output in executed.outputs:
            notes |= output.get("data", {}).get(MIME, {})
        outputs = [output for output in executed.outputs if MIME not in output.get("data", {})]
        error = about["error"]
        if about["starting"]:
            error = f"{lesson.path}: the tab does not start: {error}"
        elif error:
            trace = _trace(lesson, lines, notes["trace"]) or [f"{lesson.at(cell.line)}:"]
            error = "\n".join([*trace, textwrap.indent(_ANSI.sub("", error), "  ")])
        results.append(Ran(cell, about["seconds"], outputs, notes["shown"], error))
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
