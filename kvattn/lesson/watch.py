"""In the kernel of a lesson that is run: notes the numbers that its cells show, in full precision, for the runner to compare.

What a cell prints, displays or ends with is noted as it is shown; nothing of the author's code is changed. After each
cell one message of the private type MIME carries the notes, JSON: {"shown": [entry, ...], "trace": [[file or In[n], line,
function, source], ...], "files": [a file or folder that the cell read, ...]}. An entry is {"text": a printed string},
{"dtype", "shape", "values"} for numbers and arrays, or {"figure": [entry, ...], "alt": words} for what a Matplotlib figure
draws.
"""

from __future__ import annotations

import builtins
import importlib.util
import inspect
import math
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

import kvattn
from kvattn import dispatch, registry

MIME = "application/vnd.kvattn.lesson+json"
LARGEST = 10_000  # elements of an array that are noted; the shape is of the whole
MOST = 1_000  # entries of a cell


def start(name: str) -> None:
    """Select the tab and begin to take notes. Raises what loading the backend raises."""
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    shell.run_line_magic("load_ext", "kvattn.tab")
    dispatch.set_backend(name)
    if importlib.util.find_spec("d2l") is None:
        sys.modules["d2l"] = kvattn  # `from d2l import torch as d2l`, in the chapters of d2l
    _Watch(shell)


class _Watch:
    def __init__(self, shell: Any) -> None:
        from IPython.core.formatters import JSONFormatter

        self.shell, self.shown, self.print, self.files = shell, list[dict[str, Any]](), print, Files()
        shell.config.InlineBackend.figure_formats = {"svg"}  # sharp on every screen; a lesson may choose otherwise
        builtins.print = self._print
        looker = JSONFormatter(parent=shell.display_formatter, format_type=MIME)
        looker.for_type(object, self._note)  # asked about every object, it adds nothing to what is displayed
        shell.display_formatter.formatters[MIME] = looker
        shell.events.register("pre_run_cell", lambda info: self.shown.clear())
        shell.events.register("post_run_cell", self._publish)

    def _print(self, *args: Any, file: Any = None, **options: Any) -> None:
        self.print(*args, file=file, **options)
        if file in (None, sys.stdout):
            for arg in args:
                self._note(arg)

    def _note(self, value: Any) -> None:
        try:
            self.shown += islice(entries(value), MOST - len(self.shown))
        except Exception:  # a list that holds itself, an object that answers oddly: never the author's trouble
            return

    def _publish(self, result: Any) -> None:
        error = result.error_before_exec or result.error_in_exec
        notes = {"shown": self.shown, "trace": self._trace(error) if error else [], "files": self.files.read()}
        self.shell.display_pub.publish({MIME: notes})

    def _trace(self, error: BaseException) -> list[list[Any]]:
        frames: list[list[Any]] = [
            [frame.filename, frame.lineno, frame.name, frame.line] for frame in traceback.extract_tb(error.__traceback__)
        ]
        if isinstance(error, SyntaxError):
            frames.append([error.filename or "", error.lineno, "", (error.text or "").strip()])
        for frame in frames:
            if name := self.shell.compile.format_code_name(frame[0]):
                frame[0] = name[1]
        first = next((i for i, frame in enumerate(frames) if frame[0].startswith("In[")), 0)
        return frames[first:]


def _caller() -> str:
    """The file whose code raised an audit event; called in the event's hook."""
    frame = inspect.currentframe()
    caller = frame.f_back.f_back if frame and frame.f_back else None
    return caller.f_code.co_filename if caller else ""


class Files:
    """The files and folders that Python opens, by its audit events: not what a library reads without Python."""

    def __init__(self) -> None:
        self.opened, self.written = dict[str, None](), set[str]()
        places = [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), os.path.dirname(kvattn.__file__)]
        places += [os.environ.get("IPYTHONDIR", ""), "/proc", "/sys", "/dev", "/etc"]
        # what is installed, and the system's
        self.installed = tuple(f"{os.path.abspath(place)}{os.sep}" for place in places if place)
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: Any) -> None:
        if event not in ("open", "os.listdir", "os.scandir"):
            return
        try:
            path = os.path.abspath(os.fsdecode(args[0]))
        except Exception:  # a number, of what was opened before
            return
        if event == "open":
            mode, flags = args[1], args[2]
            writes = set(mode) & set("wax+") if isinstance(mode, str) else (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if writes:
                self.written.add(path)
                return
        elif "importlib" in _caller():
            return  # Python looks for a module, or for what is installed
        self.opened[path] = None

    def read(self) -> list[str]:
        """Those since the last time that are the author's own: not what the lesson itself wrote, nor hidden files."""
        opened = [importlib.util.source_from_cache(path) if path.endswith(".pyc") else path for path in self.opened]
        self.opened.clear()
        return [path for path in dict.fromkeys(opened) if self._is_the_authors(path)]

    def _is_the_authors(self, path: str) -> bool:
        parts = os.path.relpath(path).split(os.sep)
        hidden = any(part[:1] == "." and part not in (".", "..") for part in parts)
        is_installed = f"{path}{os.sep}".startswith(self.installed) or "site-packages" in parts
        return not hidden and not is_installed and path not in self.written and os.path.exists(path)


def entries(x: Any) -> Iterator[dict[str, Any]]:
    """The numbers of what a cell shows, in order; nothing for what holds none.

    >>> list(entries({"loss": 0.5, "shape": (2, 3)}))  # doctest: +NORMALIZE_WHITESPACE
    [{'dtype': 'float', 'shape': [], 'values': [0.5]}, {'dtype': 'int', 'shape': [2], 'values': [2, 3]}]
    """
    if isinstance(x, str):
        yield {"text": x}
    elif isinstance(x, Mapping):
        for each in x.values():
            yield from entries(each)
    elif isinstance(x, (bool, int, float)) and not isinstance(x, np.generic):
        yield _entry(type(x).__name__, np.asarray(x))
    elif isinstance(x, (list, tuple)):
        if x and all(type(each) is type(x[0]) and isinstance(each, (bool, int, float)) for each in x):
            yield _entry(type(x[0]).__name__, np.asarray(x))
        else:
            for each in x:
                yield from entries(each)
    elif hasattr(x, "as_list"):  # TensorFlow's shapes
        yield from entries(x.as_list())
    elif hasattr(x, "get_axes") and hasattr(x, "savefig"):
        yield _figure(x)
    elif hasattr(x, "__array__") or registry.home(x) is not None:
        try:
            home = registry.home(x)
            array = np.asarray(registry.load(home).to_numpy(x) if home else x)
        except Exception:  # a key, a symbol: no numbers to compare
            return
        if array.dtype.kind in "biuf" or array.dtype.name == "bfloat16":
            yield _entry(array.dtype.name, array)


def _entry(dtype: str, array: np.ndarray[Any, Any]) -> dict[str, Any]:
    kept = array.reshape(-1)[:LARGEST]
    if array.dtype.kind not in "biu":
        kept = kept.astype(np.float64)  # exact, bfloat16 too
    values = [x if math.isfinite(x) else str(x) for x in kept.tolist()]  # JSON has no infinities
    return {"dtype": dtype, "shape": list(array.shape), "values": values}


def _figure(figure: Any) -> dict[str, Any]:
    """What a figure draws: its lines and images; and its words, for those who cannot see it."""
    drawn, words = [], dict[str, None]()
    for axes in figure.get_axes():
        drawn += [entry for line in axes.get_lines() for entry in entries(np.asarray(line.get_xydata()))]
        drawn += [entry for image in axes.get_images() for entry in entries(np.ma.getdata(image.get_array()))]
        words |= dict.fromkeys((axes.get_title(), axes.get_xlabel(), axes.get_ylabel()))
    for entry in drawn:  # Matplotlib widens what it draws: the dtype says nothing of the precision
        entry["dtype"] = "float" if "float" in entry["dtype"] else entry["dtype"]
    return {"figure": drawn, "alt": ", ".join(word for word in words if word)}
