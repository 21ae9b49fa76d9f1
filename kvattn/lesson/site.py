"""A folder of lessons as the pages of a site, and the site itself."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvattn.lesson.forks import Forks
from kvattn.lesson.page import myst
from kvattn.lesson.prose import TITLES, directive
from kvattn.lesson.reader import MARKDOWN, Lesson, Prose, read
from kvattn.lesson.runner import Ran, Result, compare, run_tab
from kvattn.lesson.writer import notebook

WORK_FOLDER = ".kvattn"  # in the folder of a site: what it is made of
UNUSED = 7 * 24 * 3600  # seconds
_SKIPPED = ("_build", "node_modules", "__pycache__")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_HEADING = re.compile(r"^# [^\n]*\n", re.MULTILINE)
_TOCTREE = re.compile(r"^[`:]{3,}\{toctree\}", re.MULTILINE)
Run = Callable[[Lesson, str], list[Ran]]


@dataclass(frozen=True)
class Book:
    """The lessons of a folder and of its folders, by the name of their pages; and their .bib files."""

    folder: Path
    lessons: dict[str, Lesson]
    files: tuple[Path, ...]

    @property
    def tabs(self) -> list[str]:
        """Every tab that a lesson has."""
        return list(dict.fromkeys(name for lesson in self.lessons.values() for name in lesson.tabs))


def find(folder: str | Path) -> Book:
    """The lessons below a folder: Markdown and .ipynb, but for README.md, hidden folders, sites and environments.

    Raises ValueError for a lesson that cannot be read, and where two would be one page; OSError.
    """
    folder = Path(folder).absolute()
    paths: list[Path] = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(each for each in folders if _goes_into(Path(root, each)))
        paths += [Path(root, each) for each in sorted(files) if each[0] != "."]
    lessons: dict[str, Lesson] = {}
    for path in paths:
        name = path.relative_to(folder).with_suffix("").as_posix()
        converted = path.suffix == ".ipynb" and name.rpartition(".")[0] in lessons and name.rpartition(".")[2] in TITLES
        if path.suffix.lower() not in (*MARKDOWN, ".ipynb") or converted or path.stem.lower() == "readme":
            continue
        if name in lessons:
            raise ValueError(f"{lessons[name].path} and {path} would be one page: give one of them another name")
        lessons[name] = read(path)
    files_of = (*(each.path for each in lessons.values()), *(path for path in paths if path.suffix == ".bib"))
    return Book(folder, lessons, files_of)


def _goes_into(folder: Path) -> bool:
    site = (folder / WORK_FOLDER).is_dir() or (folder / "pyvenv.cfg").is_file()
    return folder.name[0] != "." and folder.name not in _SKIPPED and not site


def write(
    book: Book,
    pages: str | Path,
    backends: Sequence[str],
    *,
    run: Run | None = None,
    cache: str | Path | None = None,
    refers: bool = True,
    numbered: bool = False,
    install: str | None = None,
    title: str | None = None,
) -> list[str]:
    """Run the lessons on those of the backends that they have, and write their pages (MyST) and notebooks to a folder.

    Gives what is wrong, a text for each error, with file and line; then nothing is written. A page whose text is as it was is
    left as it is, and pages of lessons that are gone go too. ``run`` runs a tab, default ``run_tab`` with ``cache``; what the
    cache was not asked for in a week is lost. ``numbered``: the site numbers its sections. ``install``: see ``notebook``.
    ``title``: there is to be a page "index", of that title, which lists the others.
    """
    pages = Path(pages).absolute()
    results: dict[str, Result] = {}
    problems = []
    with Forks() as forks:
        run = run or partial(run_tab, cache=cache, forks=forks)
        for name, lesson in book.lessons.items():
            tabs = [each for each in backends if not lesson.tabs or each in lesson.tabs]
            if not tabs:
                problems.append(f"{lesson.path} has none of the tabs {', '.join(backends)}; it has: {', '.join(lesson.tabs)}")
                continue
            ran = {each: run(lesson, each) for each in tabs}
            results[name] = Result(lesson, ran, compare(lesson, ran, figures=True), refers, book.files)
            problems += results[name].problems()
    if problems:
        return problems
    kept = {pages / f"{name}.md": _page(pages, name, result, numbered, install) for name, result in results.items()}
    if title is not None:
        kept |= _indexes(book, pages, kept, title)
    used = "".join(kept.values())
    for path in pages.rglob("*"):
        picture = path.parent == pages / "outputs" and path.name not in used
        if picture or (path.suffix == ".md" and path not in kept) or (path.suffix == ".ipynb" and path.name not in used):
            path.unlink()
    for page, text in kept.items():
        changed(page, text)
    for remembered in Path(cache).glob("*.json") if cache else ():
        if remembered.stat().st_mtime < time.time() - UNUSED:
            remembered.unlink()
    return []


def changed(path: Path, text: str) -> bool:
    """Write a text where it is another one: what has not changed is not read again."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return True


def _page(pages: Path, name: str, result: Result, numbered: bool, install: str | None) -> str:
    """A page, with the line of its notebooks below the title."""
    import nbformat

    page = pages / f"{name}.md"
    text = myst(result, pages / "outputs", page, numbered)
    links = []
    for each in result.tabs if result.lesson.cells else ():
        path = pages / "notebooks" / f"{name}.{each}.ipynb"
        changed(path, nbformat.writes(notebook(result.lesson, each, files=result.files, install=install)) + "\n")
        links.append(f"{{download}}`{TITLES.get(each, each)} <{os.path.relpath(path, page.parent).replace(os.sep, '/')}>`")
    if not links:
        return text
    line = directive("container", "notebooks", {}, f"Notebook: {' '.join(links)}")
    title = _HEADING.search(text)
    return f"{text[: title.end()]}\n{line}{text[title.end() :]}" if title else f"{line}\n{text}"


# ---- the site of a folder of lessons


def _indexes(book: Book, pages: Path, kept: dict[Path, str], title: str) -> dict[Path, str]:
    """The pages that list others, as numbered chapters: the author's index.md, of a folder too, or one that is made."""
    indexes = {}
    for name in dict.fromkeys(("index", *(each for each in book.lessons if each.endswith("/index")))):
        text = kept.get(pages / f"{name}.md", f"# {title}\n")
        if not _TOCTREE.search(text) and (chapters := _chapters(book, name.rpartition("index")[0])):
            options = {"maxdepth": "2", **({"numbered": ""} if name == "index" else {})}
            text += "\n" + directive("toctree", "", options, "\n".join(chapters))
        indexes[pages / f"{name}.md"] = text
    return indexes


def _chapters(book: Book, prefix: str) -> list[str]:
    """The pages below a folder that no index of a folder in it lists."""
    below = [name for name in book.lessons if name.startswith(prefix) and name != f"{prefix}index"]
    inner = {name.rpartition("index")[0] for name in below if name.endswith("/index")}
    listed = [each for each in below if not any(each.startswith(one) and each != f"{one}index" for one in inner)]
    return [f"/{name}" for name in listed]


def html(source: Path, out: Path, title: str, say: Callable[[str], None]) -> None:
    """Make the site of these pages with Sphinx, which reads only those that have changed; ``say`` is given its warnings.

    Raises ModuleNotFoundError where a part of the extra ``site`` is not installed.
    """
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    settings: dict[str, Any] = {
        "extensions": ["kvattn.lesson"],
        "kvattn_lessons": "",  # they are pages already
        "project": title,
        "html_title": title,
        "html_theme": "furo",
        "html_theme_options": {"navigation_with_keys": True},
        "pygments_dark_style": "github-dark",
        "html_copy_source": False,
        "html_show_sphinx": False,
        "html_show_copyright": False,
    }
    changed(source / "conf.py", "".join(f"{name} = {value!r}\n" for name, value in settings.items()))
    with patch_docutils(source), docutils_namespace():
        app = Sphinx(source, source, out, out / WORK_FOLDER / "doctrees", "html", status=None, warning=_Warnings(say))
        app.build()
    pages = {path.relative_to(source).with_suffix(".html") for path in source.rglob("*.md")}
    for page in [path for path in out.rglob("*.html") if WORK_FOLDER not in path.parts and "_static" not in path.parts]:
        if page.relative_to(out) not in pages | {Path("search.html"), Path("genindex.html")}:
            page.unlink()


class _Warnings:
    """A stream that gives its lines away."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def write(self, text: str) -> None:
        for line in _ANSI.sub("", text).splitlines():
            if line.strip():
                self.say(line)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def title_of(book: Book) -> str:
    """The title of the author's index.md, or the folder's name."""
    parts = book.lessons["index"].parts if "index" in book.lessons else ()
    found = next((match for part in parts if isinstance(part, Prose) and (match := _HEADING.search(part.text))), None)
    return found[0].removeprefix("# ").strip() if found else book.folder.name.replace("-", " ").replace("_", " ").capitalize()
