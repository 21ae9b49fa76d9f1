"""A lesson as a notebook for one framework."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvattn.lesson.prose import for_tab
from kvattn.lesson.reader import Cell, Lesson
from kvattn.lesson.references import References

_DETAILS = re.compile(r"^(<details|</details)[^>\n]*>[ \t]*\n?(<summary>[^\n]*</summary>)?", re.MULTILINE)


def notebook(lesson: Lesson, name: str, *, files: Sequence[Path] | None = None, install: str | None = None) -> Any:
    """The lesson as an nbformat notebook with the prose and the code of one tab, the code as the author wrote it.

    ``files`` are the lessons and .bib files that it may refer to, None: those of its folder. ``install``: where kvattn is
    to be had, "kvattn" for the index or an address; the notebook then begins with the cell that installs it, as Colab and
    JupyterLite need it.

    The cells that select a tab become one that selects this tab; references bear titles and numbers, citations the names of
    authors, with what is cited as the last cell. Raises ModuleNotFoundError where nbformat is not installed.
    """
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    cells, references, fold = [], References(lesson, files), _Fold()
    if install:
        cells.append(new_code_cell(f"%pip install -q {_wanted(name, install)}", id="install"))
    setup = next((part for part in lesson.parts if isinstance(part, Cell) and part.setup), None)
    for part in lesson.parts:
        about = {"id": f"line-{part.line}"}
        if not isinstance(part, Cell):
            if text := fold.prose(for_tab(part.text, name, references).strip("\n")):
                cells.append(new_markdown_cell(text, **about))
        elif part is setup:
            cells.append(new_code_cell(f'%load_ext kvattn.tab\ntab.select_tab("{name}")', **about))
        elif not part.setup and part.on(name):
            cells.append(new_code_cell(part.code, metadata=fold.code(), **about))
    if text := references.bibliography():
        cells.append(new_markdown_cell(text, id="references"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


class _Fold:
    """What stands between ``<details>`` and ``</details>``, as a solution does, folded in a notebook too.

    There each cell is a document of its own: each piece of prose gets its own ``<details>``, with the summary of the whole,
    and code is hidden until it is asked for, in JupyterLab, and where pages are made of notebooks.
    """

    def __init__(self) -> None:
        self.summary = ""

    def prose(self, text: str) -> str:
        begun = f"<details>\n{self.summary}\n\n" if self.summary else ""
        if self.summary and text.startswith("</details>"):  # after code: there is nothing to fold
            begun, text = "", text.removeprefix("</details>").lstrip("\n")
            self.summary = ""
        for mark, summary in _DETAILS.findall(text):
            self.summary = summary.strip() or "<summary></summary>" if mark == "<details" else ""
        return begun + text + ("\n\n</details>" if self.summary else "")

    def code(self) -> dict[str, Any]:
        return {"jupyter": {"source_hidden": True}, "tags": ["hide-cell"]} if self.summary else {}


def _wanted(name: str, install: str) -> str:
    """kvattn with the tab's framework, quoted, as pip takes it: PEP 508 has names with `@` and an address."""
    package = "kvattn" if name == "numpy" else f"kvattn[{name}]"
    return f'"{package}"' if install == "kvattn" else f'"{package} @ {install}"'


def convert(lesson: Lesson, name: str, output: str | Path, install: str | None = None) -> None:
    """Write the notebook of one tab: .ipynb, or any format that jupytext knows by its ending (.py, .md, .qmd).

    Raises ModuleNotFoundError where nbformat or jupytext is not installed, ValueError for an ending that is not known,
    OSError where the file cannot be written.
    """
    import jupytext

    target = Path(output)
    try:
        text = jupytext.writes(notebook(lesson, name, install=install), fmt=target.suffix.lstrip("."))
    except ModuleNotFoundError:
        raise
    except Exception as error:  # an ending that it does not know, a program that a format needs: QuartoError and the like
        raise ValueError(f"cannot write {str(target)!r}: {error}") from None
    target.write_text(text, encoding="utf-8")
