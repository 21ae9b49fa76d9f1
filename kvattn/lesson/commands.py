"""``kvattn lesson``: run a lesson, make a notebook of it, or a site of a folder of lessons."""

from __future__ import annotations

import argparse
import importlib.util
import re
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from kvattn import install, lesson, registry
from kvattn.lesson import Lesson, Ran, live, runner, site
from kvattn.lesson.forks import Forks
from kvattn.terminal import Progress, Refused, named_backends, new_console, number_of, writable

CELLS = "a cell is fenced as ```{.python .input}, ```{code-cell} or ```python, or is a code cell of a notebook"


def command(options: argparse.Namespace) -> int:
    """Run a lesson on its tabs, or make a notebook of one of them, or a site of a folder of lessons."""
    try:
        if options.action == "site":
            with closing(_Site(options)) as made:
                done = made.make()
                return _watch(made, options) if options.watch else 0 if done else 1
        given = _lesson(options.file)
        return _run_lesson(given, options) if options.action == "run" else _convert_lesson(given, options)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("ipykernel", "jupytext", "jupyter_client", "nbclient", "nbformat", *SITE):
            raise
        extra = "site" if options.action == "site" else "lessons"
        raise Refused(f"it needs {package}, which is not installed: {install.line(extra)}") from error


def _lesson(file: str) -> Lesson:
    try:
        return lesson.read(file)
    except IsADirectoryError as error:
        raise Refused(
            f"{file!r} is a folder; a site of its lessons, each of them run: kvattn lesson site {file} -o OUT"
        ) from error
    except OSError as error:
        raise Refused(f"cannot read {file!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise Refused(str(error)) from error


def _run_lesson(given: Lesson, options: argparse.Namespace) -> int:
    console = new_console()
    names = _tabs(given.path, given.tabs, options.backend)
    if not any(given.on(name) for name in names):
        where = f"on {', '.join(names)}" if given.cells else "in it"
        raise Refused(f"{options.file}: there is no code {where}, so nothing was run: {CELLS}")
    if absent := [name for name in given.tabs if name not in names and options.backend is None]:
        missing = ", ".join(f"{name} ({install.line(name)})" for name in absent)
        console.print(f"Not installed, so not run: {missing}", soft_wrap=True)
    ran = {}
    with Progress(console) as progress:
        for name in names:
            progress.start(name, len(given.on(name)), "starting")
            ran[name] = lesson.run_tab(given, name, timeout=options.timeout, progress=progress.move)
            stopped = any(each.error for each in ran[name])
            progress.done("failed" if stopped else "done", lesson.outcome(ran[name]))
    result = lesson.Result(given, ran, lesson.compare(given, ran, options.figures) if options.compare else {}, options.refers)
    lesson.show(result, console)
    console.print(f"\n{lesson.summary(result)}", style="bold green" if result.ok else "bold red", soft_wrap=True)
    return 0 if result.ok else 1


def _convert_lesson(given: Lesson, options: argparse.Namespace) -> int:
    name = registry.canonical(options.backend)
    if name not in (has := given.tabs or registry.known_backends()):
        raise Refused(f"{options.file} has no tab {options.backend!r}; it has: {', '.join(has)}")
    output = options.output or str(given.path.with_suffix(f".{name}.ipynb"))
    if options.output is None and Path(output).exists():
        raise Refused(f"{output!r} exists; --output names the file to write over")
    writable(output)
    if options.refers and (lost := lesson.References(given).lost):
        raise Refused("\n".join([*lost, "(--no-references converts it all the same)"]))
    try:
        lesson.convert(given, name, output, options.install)
    except ValueError as error:
        raise Refused(str(error)) from error
    new_console().print(f"Written: {output}", soft_wrap=True)
    return 0


def _tabs(what: Path, tabs: Sequence[str], named: str | None) -> list[str]:
    """The tabs of a lesson, or of a folder of lessons, to run: those that are named, or those that are installed."""
    has = tabs or registry.known_backends()
    if named is None:
        names = [name for name in has if name in (registry.available_backends() if tabs else named_backends(None))]
        if not names:
            raise Refused(f"none of the tabs of {what} is installed: {', '.join(install.line(name) for name in has)}")
        return names
    names = named_backends(",".join(has) if named.strip().lower() == "all" else named)
    if strange := [name for name in names if name not in has]:
        raise Refused(f"{what} has no tab {strange[0]!r}; it has: {', '.join(has)}")
    return names


# ---- a site of lessons


SITE = ("sphinx", "myst_parser", "furo", "sphinx_design", "sphinx_copybutton", "sphinx-mathjax-offline")


def _watch(made: _Site, options: argparse.Namespace) -> int:
    """Serve a site that was made, and make it again whenever its folder changes."""
    try:
        server = live.Server(made.out, options.port)
    except OSError as error:
        raise Refused(f"cannot serve at port {options.port}: {error.strerror or error}; --port 0 takes a free one") from error
    made.console.print(
        f"Serving {server.address} until Ctrl-C; what is changed in {options.folder} is run again", soft_wrap=True
    )
    try:
        for files in live.changes(made.folder):
            made.console.print(f"\nChanged: {', '.join(str(path.relative_to(made.folder)) for path in files)}", soft_wrap=True)
            try:
                made.make()
            except Refused as error:  # a lesson that cannot be read, now
                made.console.print(f"{error}", style="bold red", soft_wrap=True)
            else:
                server.reload()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()
    return 0


class _Site:
    """The site of a folder of lessons: made once, or again and again, with kernels that stay of the lesson run last."""

    def __init__(self, options: argparse.Namespace) -> None:
        for name in ("ipykernel", "jupytext", "nbclient", *SITE):
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        self.options, self.console = options, new_console()
        self.folder, self.out = Path(options.folder).absolute(), Path(options.output).absolute()
        if not self.folder.is_dir():
            raise Refused(f"{options.folder!r} is no folder; for one lesson: kvattn lesson run")
        if self.folder.resolve().is_relative_to(self.out.resolve()):
            raise Refused(f"{options.output!r} has the lessons in it: --output names a folder of its own for the site")
        is_site = (self.out / site.WORK_FOLDER).is_dir()
        if self.out.exists() and not is_site and (not self.out.is_dir() or any(self.out.iterdir())):
            raise Refused(f"{options.output!r} holds something else than a site of lessons: --output names a new folder")
        try:
            (self.out / site.WORK_FOLDER).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(f"cannot write {options.output!r}: {error.strerror or error}") from error
        self.source, self.cache = self.out / site.WORK_FOLDER / "source", self.out / site.WORK_FOLDER / "outputs"
        self.warm: dict[tuple[str, str], runner.Tab] = {}  # of --watch, by page and tab
        self.forks = Forks()
        self.ran = 0

    def make(self) -> bool:
        """Run what has changed and write the site; whether all is well."""
        try:
            book = site.find(self.folder)
        except (ValueError, OSError) as error:
            raise Refused(str(error)) from error
        names = _tabs(self.folder, book.tabs, self.options.backend)
        if not any(given.on(name) for given in book.lessons.values() for name in names):
            where = f"on {', '.join(names)}" if any(given.cells for given in book.lessons.values()) else "in it"
            raise Refused(f"{self.options.folder}: there is no code {where}, so nothing was run: {CELLS}")
        if absent := [name for name in book.tabs if name not in names and self.options.backend is None]:
            missing = ", ".join(f"{name} ({install.line(name)})" for name in absent)
            self.console.print(f"Not installed, so not run: {missing}", soft_wrap=True)
        self.ran, begun = 0, time.perf_counter()
        title = self.options.title or site.title_of(book)
        with Progress(self.console) as self.progress:
            problems = site.write(
                book, self.source, names, run=self._run, cache=self.cache, refers=self.options.refers, numbered=True,
                install=self.options.install, title=title,
            )  # fmt: skip
        for problem in problems:
            self.console.print(problem, soft_wrap=True)
        if problems:
            self.console.print(
                f"\n{number_of(len(problems), 'error')}, so the site was not made", style="bold red", soft_wrap=True
            )
            return False

        def say(line: str) -> None:
            line = line.replace(str(self.source), str(self.folder))
            line = re.sub(r"(\.md):\d+(?=: )", r"\1", line)  # of the page that was made, which is not the lesson's
            self.console.print(line, soft_wrap=True)

        site.html(self.source, self.out, title, say)
        lessons = f"{number_of(len(book.lessons), 'lesson')} on {', '.join(names)}"
        ran = f"{number_of(self.ran, 'cell')} run, the others as they were" if self.ran else "nothing had to be run"
        words = f"{lessons}: {ran}, {time.perf_counter() - begun:.1f} s. Written: {self.out / 'index.html'}"
        self.console.print(words, style="bold green", soft_wrap=True)
        return True

    def _run(self, given: Lesson, name: str) -> list[Ran]:
        from kvattn import lesson

        page = given.path.relative_to(self.folder).as_posix()
        if not (cells := given.on(name)):
            return []
        if (kept := runner.remembered(given, name, self.cache)) is not None:
            return kept
        counts = list[int]()

        def move(count: int, doing: str) -> None:
            if not counts:  # a kernel is at work
                self.end_kernels(but=page)
            counts.append(count)
            self.progress.move(count, doing)

        self.progress.start(f"{page} {name}", len(cells), "starting")
        tab = self.warm.setdefault((page, name), runner.Tab(name, self.options.timeout, self.cache, self.forks))
        ran = tab.run(given, move)
        if not self.options.watch:
            tab.close()
        self.progress.done("failed" if any(each.error for each in ran) else "done", lesson.outcome(ran))
        self.ran += len(counts) - 1 if counts else 0
        return ran

    def close(self) -> None:
        """End all processes."""
        self.end_kernels()
        self.forks.close()

    def end_kernels(self, but: str = "") -> None:
        """End the kernels of other lessons: what they computed stays in memory."""
        for (page, _), tab in self.warm.items():
            if page != but:
                tab.close()
