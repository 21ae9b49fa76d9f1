"""Where a lesson's references lead: to the labels of all lessons of a folder, and to the entries of the .bib files there."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from kvattn.lesson import prose
from kvattn.lesson.reader import MARKDOWN, Lesson, Prose

LABELLED = "heading, figure, table or equation"  # what a label may stand at: Sphinx finds no other
_ENTRY = re.compile(r"@(\w++)\s*+\{\s*+([^,\s{}]++)\s*+,")
_FIELD = re.compile(r"\s*+,?\s*+(\w++)\s*+=\s*+")
_ACCENTS = {"`": "\u0300", "'": "\u0301", "^": "\u0302", "~": "\u0303", '"': "\u0308", "c": "\u0327", "v": "\u030c"}
_ACCENT = re.compile(r"\{?\\([`'^~\"]|[cv](?=[\s{]))\s*\{?\\?(\w)\}?\}?")


class Target(NamedTuple):
    """What a label stands at: a heading's title, "Fig. 1", "Table 1" or "(1)"; and the lesson, if it is another one."""

    text: str
    elsewhere: str = ""


class References:
    """The labels and citations that a lesson may refer to; other files are read when they are asked for.

    ``files`` are the lessons and the .bib files that it may refer to; None: those of its folder.
    """

    def __init__(self, lesson: Lesson, files: Sequence[Path] | None = None) -> None:
        self.lesson = lesson
        self.folder = lesson.path.absolute().parent
        self.files = sorted(self.folder.glob("*") if files is None else files)
        self._texts = [part.text for part in lesson.parts if isinstance(part, Prose)]

    @cached_property
    def own(self) -> dict[str, Target]:
        """The labels of the lesson itself."""
        return _labels("\n\n<!-- a cell -->\n\n".join(self._texts))  # beyond which no label goes with a heading

    @cached_property
    def others(self) -> dict[str, Target]:
        """The labels of the other Markdown files."""
        found: dict[str, Target] = {}
        own = self.lesson.path.absolute()
        for path in self.files:
            if path.suffix.lower() in MARKDOWN and path.is_file() and path.absolute() != own:
                labels = _labels(path.read_text(encoding="utf-8-sig", errors="replace"))
                found = {label: Target(each.text, path.stem) for label, each in labels.items()} | found
        return found

    @cached_property
    def entries(self) -> dict[str, dict[str, str]]:
        """The entries of the .bib files of the folder, and of those that :bibliography: names, by key."""
        directives = [found for text in self._texts for found in prose.DIRECTIVE.findall(text)]
        named = [self.folder / name for kind, name in directives if kind == "bibliography"]
        paths = [path for path in [*(each for each in self.files if each.suffix == ".bib"), *named] if path.is_file()]
        texts = [path.read_text(encoding="utf-8-sig", errors="replace") for path in paths]
        return {key: fields for text in texts for key, fields in _entries(text).items()}

    def target(self, label: str) -> Target | None:
        """Where a label is; None: nowhere."""
        return self.own.get(label) or self.others.get(label)

    @cached_property
    def lost(self) -> list[str]:
        """The references and citations that lead nowhere, a text for each, with file and line."""
        lost = []
        for line, kind, name in self._used():
            if not kind.startswith("cite") and self.target(name) is None:
                lost.append(
                    f"{self.lesson.at(line)}: :{kind}:`{name}` leads nowhere: no {LABELLED} of this folder's lessons has it"
                )
            elif kind.startswith("cite") and name not in self.entries:
                bib = "the .bib files here have no such entry" if self.entries else "there is no .bib file beside the lesson"
                lost.append(f"{self.lesson.at(line)}: :{kind}:`{name}` cites nothing: {bib}")
        return lost

    def _used(self) -> list[tuple[int, str, str]]:
        """(line, kind, label or key) of each reference and citation."""
        used = []
        for part in self.lesson.parts:
            if isinstance(part, Prose):
                for found in prose.ROLE.finditer(prose.without_fences(part.text)):
                    line = part.line + part.text.count("\n", 0, found.start())
                    names = found[2].split(",") if found[1].startswith("cite") else [found[2]]
                    used += [(line, found[1], " ".join(name.split())) for name in names]
        return used

    def cited(self, kind: str, keys: str) -> str:
        """What stands for :cite:`keys`: [Bahdanau et al., 2014]; for :citet:, Bahdanau et al. (2014)."""
        shown = []
        for key in (" ".join(key.split()) for key in keys.split(",")):
            who, year = _who(self.entries.get(key, {})) or key, self.entries.get(key, {}).get("year", "")
            shown.append(f"{who} ({year})" if kind == "citet" and year else f"{who}, {year}" if year else who)
        return "; ".join(shown) if kind == "citet" else f"[{'; '.join(shown)}]"

    def bibliography(self) -> str:
        """What the lesson cites, as a list with its heading; "" for nothing."""
        keys = dict.fromkeys(key for _, kind, key in self._used() if kind.startswith("cite") and key in self.entries)
        lines = sorted(_line(self.entries[key]) for key in keys)
        return "\n".join(["## References", "", *(f"- {line}" for line in lines)]) if lines else ""


def _labels(text: str) -> dict[str, Target]:
    """The labels of a text: titles of headings, and figures, tables and equations counted from 1."""
    text = prose.without_fences(prose._unslide(text))
    headings = [*prose.HEADING.findall(text), *(found[::-1] for found in prose.BEFORE.findall(text))]
    found = {label: Target(title.lstrip("#").strip()) for title, label in headings}
    figures = [dict(prose.ATTRIBUTE.findall(each[2])).get("label") for each in prose.FIGURE.findall(text)]
    tables = [before or after for _, before, _, after in prose.TABLE.findall(text)]
    equations = [label for _, label in prose.EQUATION.findall(text)]
    for form, labels in (("Fig. {}", figures), ("Table {}", tables), ("({})", equations)):
        numbered = enumerate((label for label in labels if label), 1)
        found |= {label: Target(form.format(number)) for number, label in numbered}
    return found


# ---- BibTeX


def _entries(text: str) -> dict[str, dict[str, str]]:
    found = {}
    starts = [*_ENTRY.finditer(text)]
    for start, following in zip_longest(starts, starts[1:]):
        fields: dict[str, str] = {}
        entry = text[start.end() : following.start() if following else len(text)]  # a brace that nobody closes ends here
        at = 0
        while field := _FIELD.match(entry, at):
            value, at = _value(entry, field.end())
            fields[field[1].lower()] = _plain(value)
        found[start[2]] = fields
    return found


def _value(text: str, at: int) -> tuple[str, int]:
    """A value in braces, in quotation marks, or bare, and where it ends."""
    if text[at : at + 1] not in ("{", '"'):
        bare = re.compile(r"[^\s,}]*").match(text, at)
        return (bare[0], bare.end()) if bare else ("", at)
    depth = 0
    for i in range(at, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if (text[at] == "{" and depth == 0) or (text[at] == '"' and i > at and text[i] == '"' and depth == 0):
            return text[at + 1 : i], i + 1
    return text[at + 1 :], len(text)


def _plain(value: str) -> str:
    """A value without the marks of LaTeX: accents as letters, no braces."""
    value = _ACCENT.sub(lambda found: unicodedata.normalize("NFC", found[2] + _ACCENTS[found[1]]), value)
    return " ".join(value.replace("--", "–").replace("\\&", "&").replace("{", "").replace("}", "").split())


def _names(fields: dict[str, str]) -> list[str]:
    """The authors, family names first."""
    names = re.split(r"\s+and\s+", fields.get("author") or fields.get("editor") or "")
    return [name if "," in name else ", ".join(filter(None, name.rpartition(" ")[::-2])) for name in names if name]


def _who(fields: dict[str, str]) -> str:
    families = [name.partition(",")[0] for name in _names(fields)]
    return f"{families[0]} et al." if len(families) > 2 else " and ".join(families)


def _line(fields: dict[str, str]) -> str:
    where = next((fields[name] for name in ("journal", "booktitle", "publisher", "school", "url") if name in fields), "")
    parts = ["; ".join(_names(fields)), fields.get("year", ""), fields.get("title", ""), f"*{where}*" if where else ""]
    return ". ".join(part.rstrip(".") for part in parts if part) + "."
