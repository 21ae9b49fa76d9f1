"""A lesson as a notebook for one framework."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvattn.lesson.prose import for_tab
from kvattn.lesson.reader import Cell, Lesson
from kvattn.lesson.references import References


def notebook(lesson: Lesson, name: str) -> Any:
    """The lesson as an nbformat notebook with the prose and the code of one tab, the code as the author wrote it.

    The cells that select a tab become one that selects this tab; references bear titles and numbers, citations the names of
    authors, with what is cited as the last cell. Raises ModuleNotFoundError where nbformat is not installed.
    """
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    cells, references = [], References(lesson)
    setup = next((part for part in lesson.parts if isinstance(part, Cell) and part.setup), None)
    for part in lesson.parts:
        about = {"id": f"line-{part.line}"}
        if not isinstance(part, Cell):
            if text := for_tab(part.text, name, references).strip("\n"):
                cells.append(new_markdown_cell(text, **about))
        elif part is setup:
            cells.append(new_code_cell(f'%load_ext kvattn.tab\ntab.select_tab("{name}")', **about))
        elif not part.setup and part.on(name):
            cells.append(new_code_cell(part.code, **about))
    if text := references.bibliography():
        cells.append(new_markdown_cell(text, id="references"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def convert(lesson: Lesson, name: str, output: str | Path) -> None:
    """Write the notebook of one tab: .ipynb, or any format that jupytext knows by its ending (.py, .md, .qmd).

    Raises ModuleNotFoundError where nbformat or jupytext is not installed, ValueError for an ending that is not known,
    OSError where the file cannot be written.
    """
    import jupytext

    target = Path(output)
    try:
        text = jupytext.writes(notebook(lesson, name), fmt=target.suffix.lstrip("."))
    except ModuleNotFoundError:
        raise
    except Exception as error:  # an ending that it does not know, a program that a format needs: QuartoError and the like
        raise ValueError(f"cannot write {str(target)!r}: {error}") from None
    target.write_text(text, encoding="utf-8")
