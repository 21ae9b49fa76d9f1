"""A lesson file, read into its prose and its code cells: Markdown whose cells are fenced as d2l's, as MyST's {code-cell} or as
plain python; or a notebook, in any format that jupytext reads."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from kvattn import registry, tab

# What only chooses the tab: the runner and the notebook writer do that themselves.
_SETUP = re.compile(r"(?:\s|#[^\n]*+|%load_ext\s+(?:d2lbook|kvattn)\.tab\b|tab\.(?:interact_select|select_tab)\([^()]*\))++")
_OFFER = re.compile(r"^tab\.interact_select\(([^()]*)\)", re.MULTILINE)
_DIFFERS = re.compile(r"#@differs\b")

# How Markdown says that a fence is a cell. A file keeps to the first of them that it uses: beside d2l's cells, a fence of plain
# python is code to look at.
_FENCED = (re.compile(r"\{\.python\s+\.input\b.*\}"), re.compile(r"\{code-cell\}.*"), re.compile(r"(?:i?python3?|py)\b.*"))
_OPTIONS = re.compile(r"---\n(?:.*\n)*?---\n|(?::[\w-]+:.*\n)*")  # of a {code-cell}: its tags, and the like
_FRONT = re.compile(r"---\n(?:.*\n)*?---\n")  # what jupytext writes at the top of a file: the kernel, and the like
MARKDOWN = (".md", ".markdown", ".myst")


@dataclass(frozen=True)
class Prose:
    """Markdown between two cells; ``line`` is its first, counted from 1."""

    line: int
    text: str


@dataclass(frozen=True)
class Cell:
    """A code cell as the author wrote it, but for its ``%%tab`` line; ``line`` is the first of its code in the file."""

    line: int
    code: str
    tabs: tuple[str, ...] | None  # None: all
    setup: bool = False  # does no more than to load the tab magic and to select a tab

    def on(self, name: str) -> bool:
        """Whether the cell belongs to this tab."""
        return self.tabs is None or name in self.tabs

    @property
    def title(self) -> str:
        """Its first line that is not a comment."""
        lines = [line.strip() for line in self.code.splitlines() if line.strip()]
        return next((line for line in lines if not line.startswith("#")), lines[0] if lines else "")

    @property
    def compared(self) -> bool:
        """Whether its results must agree between tabs: common code, that no ``#@differs`` excuses."""
        return self.tabs is None and not self.setup and not _DIFFERS.search(self.code)


@dataclass(frozen=True)
class Lesson:
    """A lesson: its parts in order, and the tabs that it has. No tabs: nothing in it is for one framework."""

    path: Path
    parts: tuple[Prose | Cell, ...]
    tabs: tuple[str, ...]
    starts: tuple[int, ...] = ()  # of a notebook: the first line of each of its cells, if all stood in one text

    def at(self, line: int) -> str:
        """Where a line is: FILE:LINE; in a notebook, whose file has other lines than its cells, the cell and its line."""
        if not self.starts:
            return f"{self.path}:{line}"
        number = bisect_right(self.starts, line)
        return f"{self.path}: cell {number}, line {line - self.starts[number - 1] + 1}"

    @property
    def cells(self) -> list[Cell]:
        """The code cells, without those that are empty or only select a tab."""
        return [part for part in self.parts if isinstance(part, Cell) and part.code and not part.setup]

    def on(self, name: str) -> list[Cell]:
        """The code cells of one tab."""
        return [cell for cell in self.cells if cell.on(name)]


def read(path: str | Path) -> Lesson:
    """Read a lesson: Markdown, or a notebook, .ipynb, .py or whatever else jupytext knows by its ending.

    Raises OSError, and ValueError, naming file and line, for a file that is not UTF-8 and for a cell that cannot be read;
    ModuleNotFoundError for a notebook where jupytext is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in MARKDOWN and path.is_file():
        return _notebook(path)
    try:
        return parse(path.read_text(encoding="utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.object[error.start]:#x} at {error.start})") from None


def parse(text: str, path: Path = Path("lesson.md")) -> Lesson:
    """The lesson with this text.

    >>> lesson = parse("# Title\\n```{.python .input}\\n%%tab pytorch, jax\\n1 + 1\\n```\\n")
    >>> lesson.tabs, lesson.cells
    (('torch', 'jax'), [Cell(line=4, code='1 + 1', tabs=('torch', 'jax'), setup=False)])
    """
    lines = text.split("\n")
    rows = re.split("\r\n?|\n", text)  # as Markdown counts them
    parts: list[Prose | Cell] = []
    found = fences(text)
    fenced = next((each for each in _FENCED if any(each.fullmatch(info) for _, _, info, *_ in found)), None)
    front = _FRONT.match(text) if fenced is not _FENCED[0] else None
    end = front.group().count("\n") if front else 0
    names: list[str] = []
    for start, stop, info, code, nested in found:
        if not nested and not _closed(rows[start:stop]):
            raise ValueError(
                f"{path}:{start + 1}: this fence is never closed, and all that follows is in it: end it with its marks"
            )
        if fenced is None or not fenced.fullmatch(info):
            continue
        options = _OPTIONS.match(code) if fenced is _FENCED[1] else None
        if options:
            code = "\n" * options.group().count("\n") + code[options.end() :]
        try:
            if nested:
                raise ValueError("a code cell in a list or a quotation: cells stand at the left margin")
            cell, tabs = _cell(start + 2, code)
        except ValueError as error:
            raise ValueError(f"{path}:{start + 2}: {error}") from None
        names += tabs
        parts += [_prose(lines, end, start), cell]
        end = stop
    parts.append(_prose(lines, end, len(lines)))
    return _lesson(path, parts, names)


def _notebook(path: Path) -> Lesson:
    """The lesson in a notebook, whose cells may begin with ``%%tab`` as those of Markdown do."""
    import jupytext

    try:
        cells = jupytext.read(path).cells
        if not all(isinstance(each.source, str) and isinstance(each.cell_type, str) for each in cells):
            raise ValueError("a cell holds something other than text")
    except OSError:
        raise
    except Exception as error:  # an ending that jupytext does not know, and whatever it raises of a file that is no notebook
        raise ValueError(f"{path} is no Markdown, and no notebook that can be read: {type(error).__name__}: {error}") from None
    parts: list[Prose | Cell] = []
    names: list[str] = []
    starts, line = [], 1
    for number, each in enumerate(cells, 1):
        starts.append(line)
        if each.cell_type == "code":
            try:
                cell, tabs = _cell(line, each.source)
            except ValueError as error:
                raise ValueError(f"{path}: cell {number}: {error}") from None
            names += tabs
            parts.append(cell)
        elif each.cell_type == "markdown":
            parts.append(Prose(line, each.source))
        line += each.source.count("\n") + 1
    return _lesson(path, parts, names, tuple(starts))


def _lesson(path: Path, parts: list[Prose | Cell], names: list[str], starts: tuple[int, ...] = ()) -> Lesson:
    tabs = tuple(name for name in registry.known_backends() if name in names)
    return Lesson(path, tuple(part for part in parts if isinstance(part, Cell) or part.text.strip()), tabs, starts)


def fences(text: str) -> list[tuple[int, int, str, str, bool]]:
    """The fenced blocks of a Markdown text: first line and the line after the last, from 0; info; content; if nested."""
    from markdown_it import MarkdownIt  # rich brings it

    return [
        (token.map[0], token.map[1], token.info.strip(), token.content, token.level > 0)
        for token in MarkdownIt("commonmark").parse(text)
        if token.type == "fence" and token.map
    ]


def _closed(lines: list[str]) -> bool:
    """Whether a fenced block, which else runs to the end of its text, ends with the marks that it begins with, or more."""
    marks = re.match(r"(`+|~+)", lines[0].lstrip())
    return len(lines) > 1 and marks is not None and bool(re.fullmatch(rf" {{0,3}}{marks[1]}{marks[1][0]}*[ \t]*", lines[-1]))


def _prose(lines: list[str], start: int, stop: int) -> Prose:
    return Prose(start + 1, "\n".join(lines[start:stop]))


def _cell(line: int, code: str) -> tuple[Cell, list[str]]:
    """The cell whose fence holds this code, from this line of the file on, and the tabs that it names."""
    rest, tabs = code.lstrip("\n"), None
    if rest.startswith("#@tab"):
        raise ValueError("'#@tab' is an older notation of d2l: begin the cell with '%%tab', or with '%%tab all'")
    if rest.split(maxsplit=1)[:1] == ["%%tab"]:
        head, _, rest = rest.partition("\n")
        named = tab.named(head.strip().removeprefix("%%tab"))
        tabs, rest = tuple(named) if named is not None else None, rest.lstrip("\n")
    skipped = code.count("\n") - rest.count("\n")
    offered = tab.known(*re.findall(r"""["']([^"']+)["']""", " ".join(_OFFER.findall(code))))
    setup = bool(rest.strip()) and _SETUP.fullmatch(rest) is not None
    return Cell(line + skipped, rest.rstrip(), tabs, setup), [*(tabs or ()), *offered]
