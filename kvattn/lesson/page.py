"""A lesson as a MyST page of a site: its cells in tabs, with what they showed when they were run."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from kvattn.lesson import agree
from kvattn.lesson.prose import cited, directive, quoted, tab_set, to_myst
from kvattn.lesson.reader import Cell, Prose, read
from kvattn.lesson.references import References
from kvattn.lesson.runner import Result, run

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_IMAGES = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpeg"}
_MARK = re.compile(r"^#@differs[ \t]*\n", re.MULTILINE)  # for the runner, not for readers
_WIDTH = re.compile(r'<svg [^>]*width="([\d.]+)pt"')
_PICTURE = re.compile(r"^(`{3,}\{(?:figure|image)\} |[^\n`]*?!\[[^\]]*\]\()([^()\s]+)", re.MULTILINE)
_WIDE = 700  # pixels: on a narrow screen such a figure cannot be read


class _Shown(NamedTuple):
    """An output as MyST; if it is a figure, with what it draws."""

    text: str
    figure: dict[str, Any] | None


def render(
    file: str | Path, backends: Sequence[str], outputs: str | Path, *, cache: str | Path | None = None, figures: bool = True
) -> str:
    """Run a lesson on these backends and give it as MyST text (with sphinx-design's tab-set, dollarmath and amsmath).

    A step that has a version for each framework becomes a tab-set; choosing a framework in one chooses it in all. A
    common cell stands once, and so does each of its outputs that is the same on all tabs. Images go to the folder
    ``outputs``, named by their content, and are referred to from the lesson's own folder. ``cache`` keeps executed outputs by
    content (see ``run``); ``figures`` compares what the figures of common cells draw.

    Raises ValueError, naming file and line, where a cell fails or the tabs disagree: no such lesson reaches a site.
    """
    result = run(read(file), backends, cache=cache, figures=figures)
    if not result.ok:
        raise ValueError("\n".join(result.problems()))
    return myst(result, outputs)


def myst(result: Result, outputs: str | Path, page: str | Path | None = None, numbered: bool = False) -> str:
    """A lesson that was run, as ``render`` gives it.

    ``page``: the file that it goes to, whose pictures are then copied to ``outputs``; None: one in the lesson's own folder.
    ``numbered``: as ``to_myst`` has it.
    """
    made = _Page(result, Path(outputs), Path(page or result.lesson.path))
    parts = [part for part in result.lesson.parts if not (isinstance(part, Cell) and part.setup)]
    pieces, references = [], References(result.lesson, result.files)
    for part, versions in _steps(parts):
        if isinstance(part, Prose):
            text = to_myst(cited(part.text, references), list(result.tabs), numbered)
            pieces.append(made.with_pictures(text) if page else text)
        elif part.tabs is None:
            pieces.append(made.common(part))
        else:
            pieces.append(made.versions(versions))
    pieces.append(references.bibliography())
    return "\n\n".join(piece.strip("\n") for piece in pieces if piece) + "\n"


def _steps(parts: Sequence[Prose | Cell]) -> list[tuple[Prose | Cell, list[Cell]]]:
    """The parts of a lesson, where cells that follow each other for different frameworks are versions of one step."""
    steps: list[tuple[Prose | Cell, list[Cell]]] = []
    for part in parts:
        versions = steps[-1][1] if steps else []
        if not isinstance(part, Cell) or part.tabs is None:
            steps.append((part, []))
        elif versions and not any(version.on(name) for version in versions for name in part.tabs):
            versions.append(part)
        else:
            steps.append((part, [part]))
    return steps


class _Page:
    def __init__(self, result: Result, folder: Path, page: Path) -> None:
        self.tabs, self.folder, self.beside = list(result.tabs), folder, result.lesson.path.absolute().parent
        self.ran = {(each.cell, name): each for name, cells in result.tabs.items() for each in cells}
        self.prefix = os.path.relpath(folder.absolute(), page.absolute().parent).replace(os.sep, "/")

    def versions(self, cells: list[Cell]) -> str:
        """A step that each framework takes in its own way: a tab for each, also for those that have nothing to do."""
        shown = {name: cell for name in self.tabs for cell in cells if cell.on(name)}
        bodies = {name: _stack([_Shown(_code(cell), None), *self._outputs(cell, name)]) for name, cell in shown.items()}
        if len(self.tabs) == 1 or not bodies:
            return "".join(bodies.values())
        return tab_set({name: bodies.get(name, "*Nothing to do here.*") for name in self.tabs})

    def common(self, cell: Cell) -> str:
        """A step with the same code everywhere: the code once, and each output once if all tabs show the same."""
        outputs = {name: self._outputs(cell, name) for name in self.tabs}
        if len({len(pieces) for pieces in outputs.values()}) > 1:
            return _code(cell) + "\n" + tab_set({name: _stack(pieces) for name, pieces in outputs.items()})
        text = _code(cell)
        for same, group in groupby(zip(*outputs.values(), strict=True), _same):
            rows = list(group)
            columns = {name: _stack(pieces) for name, pieces in zip(outputs, zip(*rows, strict=True), strict=True)}
            text += "\n" + (columns[self.tabs[0]] if same else tab_set(columns))
        return text

    def _outputs(self, cell: Cell, name: str) -> list[_Shown]:
        """What a cell showed on a tab; not what it wrote to stderr."""
        pieces: list[_Shown] = []
        if (ran := self.ran.get((cell, name))) is None:
            return pieces
        figures = iter([entry for entry in ran.shown if "figure" in entry])
        for output in ran.outputs:
            data = output.get("data", {})
            kind = next((kind for kind in _IMAGES if kind in data), None)
            if data.get("text/html", "").startswith("<figure"):  # a drawing, which takes the colours of the page
                pieces.append(_Shown(directive("raw", "html", {}, data["text/html"]), None))
            elif kind:
                figure = next(figures, {})
                alt = f"Figure: {figure['alt']}" if figure.get("alt") else "Figure drawn by the code above"
                pieces.append(_Shown(self._image(kind, data[kind], alt), figure))
            elif output.get("name") == "stdout" or "text/plain" in data:
                text = _ANSI.sub("", output.get("text") or data["text/plain"])
                pieces.append(_Shown(directive("code-block", "text", {"class": "output"}, text), None))
        return pieces

    def with_pictures(self, text: str) -> str:
        """Prose whose pictures, files of the lesson's folder, are those of the page."""

        def kept(found: re.Match[str]) -> str:
            path = self.beside / found[2]
            return f"{found[1]}{self._keep(path.read_bytes(), path.suffix)}" if path.is_file() else found[0]

        return _PICTURE.sub(kept, text)

    def _keep(self, content: bytes, suffix: str) -> str:
        """Where the page finds this picture."""
        name = f"{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / name).exists():  # else Sphinx would read its page again
            (self.folder / name).write_bytes(content)
        return f"{self.prefix}/{name}"

    def _image(self, kind: str, data: str, alt: str) -> str:
        kept = self._keep(data.encode() if kind == "image/svg+xml" else base64.b64decode(data), f".{_IMAGES[kind]}")
        options = {"alt": quoted(alt), "class": "output"}
        if (found := _WIDTH.search(data)) and (width := round(float(found[1]) * 96 / 72)) > _WIDE:
            options["width"] = f"{width}px"  # which makes it a link to the figure alone
        return directive("image", kept, options, "")


def _code(cell: Cell) -> str:
    return directive("code-block", "python", {"class": "input"}, _MARK.sub("", cell.code))


def _stack(pieces: Sequence[_Shown]) -> str:
    return "\n".join(piece.text for piece in pieces)


def _same(row: Sequence[_Shown]) -> bool:
    """Whether the tabs show the same text, or figures that draw the same numbers up to the tolerance."""
    if len({piece.text for piece in row}) == 1:
        return True
    figures = {str(i): [piece.figure] for i, piece in enumerate(row) if piece.figure}
    found = agree.judge(figures, figures=True) if len(figures) == len(row) else None
    return found is not None and found.share <= 1
