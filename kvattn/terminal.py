"""What the commands share: how they refuse, what they print on and to which file, and which backends --backend names."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvattn import install, registry

if TYPE_CHECKING:
    from rich.console import Console


SILENT = 20  # seconds: for longer nothing is left unsaid where there is no bar


class Refused(Exception):
    """The command cannot be carried out as it was given: its message, exit status 2."""


def new_console() -> Console:
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False, soft_wrap=False)


def named_backends(given: str | None) -> list[str]:
    """The backends of ``--backend``, or all of ours that are installed; plugins are loaded where they are named."""
    installed = registry.available_backends()
    if given is None:
        return [name for name in installed if name not in registry.plugins()]
    names = list(dict.fromkeys(registry.canonical(name) for name in given.split(",") if name.strip()))
    if not names:
        raise Refused(f"--backend {given!r} names no backend; known: {', '.join(registry.known_backends())}")
    for name in names:
        if name not in registry.known_backends():
            known = ", ".join(registry.known_backends())
            raise Refused(f"unknown backend {name!r}; known: {known} (pytorch = torch, tf = tensorflow)")
        if name not in installed:
            raise Refused(f"backend {name!r} is not installed: {install.line(name)}")
    return names


def writable(path: str | None) -> None:
    """Refuse before the suite runs, not after, and without touching the file; None is no file that was asked for."""
    if path is None:
        return
    if not path or "\0" in path:
        raise Refused(f"cannot write {path!r}: it is no name of a file")
    target = Path(path)
    if target.is_dir():
        raise Refused(f"cannot write {path!r}: it is a directory")
    if not target.absolute().parent.is_dir():
        raise Refused(f"cannot write {path!r}: there is no directory {str(target.absolute().parent)!r}")
    if not os.access(target if target.exists() else target.absolute().parent, os.W_OK):
        raise Refused(f"cannot write {path!r}: permission denied")


def number_of(count: int, noun: str) -> str:
    """
    >>> number_of(1, "cell"), number_of(2, "cell")
    ('1 cell', '2 cells')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class Progress:
    """A bar per backend on a terminal; elsewhere a line per backend when it is done, and now and then one that it goes on."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.console, self.tasks = console, dict[str, Any]()
        self.last_message: dict[str, float] = {}  # when it was last said how far a backend is
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[doing]}", markup=False),  # a line of code may look like markup
        )
        self.bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def start(self, name: str, total: int | None, doing: str) -> None:
        self.name = name
        self.last_message[name] = time.perf_counter()
        self.tasks[name] = self.bars.add_task(name, total=total, doing=doing)

    def move(self, completed: int, doing: str, name: str | None = None) -> None:
        """So many are done, and this one begins: of what started last, or of what is named."""
        from kvattn.report import clean

        doing = clean(doing)[: max(0, self.console.width - 60)]
        self.bars.update(self.tasks[name or self.name], completed=completed, doing=doing)
        if not self.console.is_terminal and time.perf_counter() - self.last_message[name or self.name] > SILENT:
            self.last_message[name or self.name] = time.perf_counter()
            self.console.print(f"{name or self.name}: {completed} so far", soft_wrap=True)

    def done(self, state: str, outcome: str, name: str | None = None) -> None:
        self.bars.update(self.tasks[name or self.name], total=1, completed=1, doing=state)
        if not self.console.is_terminal:
            self.console.print(f"{name or self.name}: {outcome}", soft_wrap=True)
