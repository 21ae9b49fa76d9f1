"""The ``kvattn`` command. What is heavy is imported where it is used, so that ``kvattn --help`` is quick."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvattn import __version__, dispatch, install, registry
from kvattn.terminal import Progress, Refused, named_backends, new_console, number_of, writable

if TYPE_CHECKING:
    from rich.console import Console

    from kvattn.conformance import Case, Report, Result
    from kvattn.conformance.processes import Judged


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0 all well, 1 something failed, 2 the command was wrong."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return 0
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow reports its CPU features when it is imported
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # else it, and JAX, take a GPU's whole memory at once
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a text's words, on a terminal that is not UTF-8
    try:
        commands: dict[str, Callable[[argparse.Namespace], int]] = {
            "bench": bench, "conform": conform, "doctor": doctor, "lesson": lesson,
        }  # fmt: skip
        return commands[options.command](options)
    except Refused as error:
        from kvattn.report import clean

        print(clean(f"kvattn {options.command}: error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvattn",
        description="One attention, five frameworks, the same numbers.",
        epilog="Start with 'kvattn doctor' (what works here), then 'kvattn conform' (do the backends agree).",
    )
    parser.add_argument("--version", action="version", version=f"kvattn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="say which backends work here, which one serves a call, and what to install for the rest",
        description="Import every backend that is installed; say what works, which one serves a call with NumPy arrays and "
        "why, and what to install for the rest. Exit status 1 if the backend that would serve the call is not usable.",
    )
    doctor.add_argument("--backend", metavar="NAMES", help="plugins to import as well, separated by commas")
    conform = commands.add_parser(
        "conform",
        help="run the conformance suite on every installed backend and compare them with each other",
        description="Run the conformance suite on every installed backend and on a text, and compare the backends pairwise; "
        "a plugin is asked where --backend names it. Exit status 1 on any failure or disagreement, 2 if the command itself is "
        "wrong.",
    )
    names = ", ".join(registry.OURS)
    conform.add_argument("--backend", metavar="NAMES", help=f"only these, separated by commas: {names}, or a plugin's")
    conform.add_argument(
        "--device", metavar="NAME", help="where the arrays lie: cpu, cuda, cuda:1 (default: where each backend puts new ones)"
    )
    conform.add_argument(
        "--jobs",
        metavar="N",
        type=int,
        default=_jobs(),
        help="backends at one time, each in a process of its own (default: as many as cores, at most 4); 1, or --device or "
        "--draws: one after another, in this process",
    )
    conform.add_argument("--text", metavar="FILE", help="UTF-8 text to attend over (default: a sentence about a dog)")
    conform.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    conform.add_argument("--html", metavar="FILE", help="also write the report as one self-contained page")
    conform.add_argument(
        "--draws",
        metavar="N",
        type=int,
        help="instead of the suite and the text, N calls drawn at random over every option, dtype and edge of the shapes; "
        "the smallest that fails is printed as code",
    )
    conform.add_argument("--seed", metavar="S", type=int, default=0, help="of the drawn calls (default: 0)")

    bench = commands.add_parser(
        "bench",
        help="time the backends against PyTorch's scaled_dot_product_attention",
        description="Time kvattn and each framework's own attention, as a ratio to PyTorch's scaled_dot_product_attention "
        "in the same process, in turn; what is timed is checked. Exit status 1 if a backend fails or a result is wrong.",
    )
    bench.add_argument("--backend", metavar="NAMES", help="separated by commas (default: all that are installed)")
    bench.add_argument("--shapes", metavar="NAMES", default="S,M,L,D", help="of S, M, L, XL, D, tiny (default: S,M,L,D)")
    bench.add_argument("--dtype", choices=("float64", "float32", "float16", "bfloat16"), default="float32")
    bench.add_argument("--grad", action="store_true", help="forward and backward together")
    bench.add_argument("--causal", action="store_true", help="also with the causal mask")
    bench.add_argument("--valid", action="store_true", help="also with padding: valid_lens at 60%% of the keys")
    bench.add_argument("--per-query", action="store_true", help="also with valid_lens of each query, drawn")
    bench.add_argument("--window", action="store_true", help="also in a window of 256 keys to each side")
    bench.add_argument("--mask", action="store_true", help="also with a mask of padding (batch, 1, 1, keys), and one of pairs")
    bench.add_argument("--bias", action="store_true", help="also with a bias (1, heads, queries, keys); with --mask, also both")
    bench.add_argument(
        "--layers", action="store_true", help="instead of attention, MultiHeadAttention: of --causal and --valid; --grad trains"
    )
    bench.add_argument("--device", metavar="NAME", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    bench.add_argument("--rounds", metavar="N", type=int, default=15, help="in each of which all take their turn (default: 15)")
    bench.add_argument("--quick", action="store_true", help="a call or two of each: that it works; its figures mean nothing")
    bench.add_argument("--json", metavar="FILE", help="also write the measurements as JSON")
    bench.add_argument("--plot", metavar="FILE", help="also draw them; needs matplotlib")

    lesson = commands.add_parser(
        "lesson", help="run a lesson on all its tabs, make a notebook of it for one, or a site of many"
    )
    actions = lesson.add_subparsers(dest="action", metavar="{run,convert,site}", required=True)
    run = actions.add_parser(
        "run",
        help="execute each tab in a kernel of its own, and compare what the common cells show",
        description="Execute each tab of a lesson in a kernel of its own, and compare the numbers that the cells which are "
        "common to all tabs show. A comment '#@differs' in a cell excuses it. Exit status 1 if a cell fails or the tabs "
        "disagree, 2 if the command itself is wrong.",
    )
    run.add_argument("file", metavar="FILE", help="a lesson: Markdown in the notation of d2l or MyST, or a notebook")
    run.add_argument(
        "--backend",
        metavar="NAMES",
        help="tabs to run, separated by commas, or 'all' that the lesson has (default: those of them that are installed)",
    )
    run.add_argument("--no-compare", dest="compare", action="store_false", help="do not compare the tabs")
    run.add_argument("--figures", action="store_true", help="compare what figures draw too")
    run.add_argument("--timeout", metavar="SECONDS", type=int, default=600, help="for each cell (default: 600)")
    convert = actions.add_parser(
        "convert",
        help="write a notebook for one framework",
        description="Write a notebook with the prose and the code of one tab of a lesson, the code as it stands there.",
    )
    convert.add_argument("file", metavar="FILE", help="a lesson: Markdown in the notation of d2l or MyST, or a notebook")
    convert.add_argument("--backend", metavar="NAME", required=True, help="the tab")
    convert.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="where to, in the format of its ending: .ipynb, .py, .md (default: beside the lesson, as LESSON.NAME.ipynb)",
    )
    site = actions.add_parser(
        "site",
        help="make a site of a folder of lessons: tabs with what they showed, notebooks, search",
        description="Run the lessons of a folder on their tabs, compare them, and make a site of them, which needs no network: "
        "chapters in the order of the files' names, or as an index.md lists them. Nothing is written but in the site's folder, "
        "where outputs are kept by content: what has not changed is not run again. Exit status 1 if a cell fails, the tabs "
        "disagree or a reference leads nowhere, 2 if the command itself is wrong.",
    )
    site.add_argument("folder", metavar="FOLDER", help="of lessons: Markdown in the notation of d2l or MyST, or notebooks")
    site.add_argument(
        "--backend",
        metavar="NAMES",
        help="tabs, separated by commas, or 'all' that the lessons have (default: those of them that are installed)",
    )
    site.add_argument("-o", "--output", metavar="OUT", required=True, help="the folder of the site")
    site.add_argument("--title", metavar="WORDS", help="of the site (default: that of index.md, or the folder's name)")
    site.add_argument(
        "--watch", action="store_true", help="serve the site to this machine, and make it again whenever a lesson changes"
    )
    site.add_argument("--port", metavar="N", type=int, default=8000, help="for --watch (default: 8000; 0: one that is free)")
    site.add_argument("--timeout", metavar="SECONDS", type=int, default=600, help="for each cell (default: 600)")
    for action in (convert, site):
        action.add_argument(
            "--install",
            metavar="WHERE",
            help="a notebook begins with a cell that installs kvattn, for Colab and JupyterLite: from 'kvattn', by its name in "
            "the index, or from an address, as pip takes it",
        )
    for action in (run, convert, site):
        action.add_argument(
            "--no-references",
            dest="refers",
            action="store_false",
            help="do not ask where references and citations lead: for a chapter without its book",
        )
    return parser


def _jobs() -> int:
    """How many backends are judged at one time, unless the user says it: each holds a framework in memory."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4)


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


# ---- conform


def conform(options: argparse.Namespace) -> int:
    """Run the suite and the text on the backends asked for; print the report and write it where asked."""
    from kvattn import report, text

    names = named_backends(options.backend)
    if options.draws is not None and (options.draws < 1 or options.seed < 0 or options.text):
        raise Refused("--draws takes at least 1 call and no --text, --seed a number that is not negative")
    if options.jobs < 1:
        raise Refused(f"--jobs must be at least 1, not {options.jobs}")
    try:
        source = options.text or "the built-in sentence"
        words = text.read(options.text) if options.text else text.SENTENCE
    except ValueError as error:
        raise Refused(str(error)) from error
    for path in (options.json, options.html):
        writable(path)

    console = new_console()
    names = _having(names, _lacking(names, options.device), options.backend is None, console)
    if options.backend is None and (others := registry.plugins()):
        console.print(f"Not asked, since --backend does not name them: {_listed(others)}\n", soft_wrap=True)
    judged, backends, pairs, found = _suite(names, words, options, console)
    document = report.document(
        kvattn=__version__,
        suite=next((each.report.suite for each in judged if each.report is not None), ""),
        python=platform.python_version(),
        platform=platform.platform(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        backends=backends,
        pairs=pairs,
        text=text.compare(source, words, {} if options.draws else found),
    )
    report.show(document, console)
    if options.draws:
        _smallest(document, options.seed, console, options.device)
    try:
        for path, render in ((options.json, report.to_json), (options.html, report.to_html)):
            if path:
                _write(path, render(document))
                console.print(f"Written: {path}", soft_wrap=True)
    finally:
        console.print(f"\n{report.summary(document)}", style="bold green" if document["ok"] else "bold red")
    return 0 if document["ok"] else 1


def _lacking(names: list[str], device: str | None) -> dict[str, str]:
    """What each backend that has no such device says; one that does not import is a row of the report, later."""
    from kvattn.quiet import quiet

    lacking: dict[str, str] = {}
    for name in names if device is not None else ():
        try:
            with quiet():
                tab = registry.load(name)
        except (Exception, SystemExit):
            continue
        try:
            dispatch.device(tab, str(device))
        except ValueError as error:
            lacking[name] = str(error)
    return lacking


def _having(names: list[str], lacking: dict[str, str], any_will_do: bool, console: Console) -> list[str]:
    """The backends that have the device; refused where one that was asked for has it not, or none has it."""
    if lacking and not (any_will_do and len(lacking) < len(names)):
        raise Refused("; ".join(lacking.values()))
    for why in lacking.values():
        console.print(f"Not asked: {why}", soft_wrap=True)
    return [name for name in names if name not in lacking]


def _listed(plugins: dict[str, str]) -> str:
    """Plugins by name, and what each would load."""
    from kvattn.report import clean

    return clean(", ".join(f"{name} (the plugin {value})" for name, value in plugins.items()))


def _write(path: str, content: str) -> None:
    try:
        Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise Refused(f"cannot write {path!r}: {error.strerror or error}") from error


def _cases(options: argparse.Namespace, console: Console) -> list[Case]:
    """The cases of the suite, or those that are drawn."""
    from kvattn import conformance
    from kvattn.conformance import draws

    if options.draws is None:
        return conformance.cases()
    made = []
    with Progress(console) as progress:
        progress.start("drawing", options.draws, "")
        for case in draws.cases(options.draws, options.seed):
            made.append(case)
            progress.move(len(made), case.name)
    return made


def _smallest(document: dict[str, Any], seed: int, console: Console, device: str | None) -> None:
    """For each backend that fails a drawn call, the smallest such call that is found, as code."""
    from kvattn.conformance import draws, programs
    from kvattn.report import clean

    for row in document["backends"]:
        if row["failures"]:
            number = min(draws.number_of(each["case"]) for each in row["failures"])
            made, failure = draws.shrink(row["backend"], draws.draw(seed, number), device=device)
            console.print(f"\nThe smallest call found on which {row['backend']} fails, made from draw {number}:\n")
            console.print(clean(programs.code(made, failure, row["backend"], device)), soft_wrap=True)


def _suite(
    names: list[str], words: str, options: argparse.Namespace, console: Console
) -> tuple[list[Judged], list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """The cases on each backend: what became of each, the report's rows and pairs, and what is made of the text."""
    from kvattn import conformance

    in_processes = options.jobs > 1 and not (options.draws or options.device)
    every = [] if in_processes else _cases(options, console)
    with Progress(console) as progress:
        finished: dict[str, set[str]] = {}  # a case comes once for each of its dtypes

        def begun(name: str, case: str) -> None:
            finished.setdefault(name, set()).add(case)
            progress.move(len(finished[name]), case, name)

        if in_processes:
            from kvattn.conformance.processes import judge

            for name in names:
                progress.start(name, None, "")
            ended = judge(names, words, options.jobs, begun)
        else:
            ended = _in_turn(names, every, words, options.device, begun, progress)
        judged = {}
        for each in ended:
            judged[each.name] = each, (row := _row(each))
            outcome = row["error"] or f"{row['passed']} cases passed, {row['failed']} failed, {row['seconds']:.1f} s"
            progress.done("failed" if row["error"] else "done", outcome, each.name)
    inorder = [judged[name] for name in names]
    reports = [each.report for each, _ in inorder if each.report is not None]
    pairs = [
        {"a": a, "b": b} | {key: getattr(each, key) for key in ("error", "allowed", "passed", "compared", "message")}
        for (a, b), each in conformance.pairwise(reports).items()
        if each.compared
    ]
    return (
        [each for each, _ in inorder],
        [row for _, row in inorder],
        pairs,
        {each.name: each.text for each, _ in inorder if each.text is not None},
    )


def _in_turn(
    names: list[str],
    cases: Sequence[Case],
    words: str,
    device: str | None,
    begun: Callable[[str, str], None],
    progress: Progress,
) -> Iterator[Judged]:
    """Each backend, one after another, in this process."""
    from kvattn import conformance, text
    from kvattn.conformance.processes import Judged
    from kvattn.quiet import quiet

    for name in names:
        start = time.perf_counter()
        progress.start(name, len(cases), "importing")
        judged, doing = Judged(name), "it does not import"
        try:
            with quiet():
                registry.load(name)
            doing = "the suite stopped"
            judged.text = text.attend(words, name, device)
            judged.report = conformance.run(name, cases=cases, progress=partial(begun, name), device=device)
        except (Exception, SystemExit) as error:  # a framework that fails to import is a row, whatever it raises
            judged.error = f"{doing}: {_say(error)}"
        judged.seconds = time.perf_counter() - start
        yield judged


def _row(judged: Judged) -> dict[str, Any]:
    """A backend's row of the report."""
    row: dict[str, Any] = {
        "backend": judged.name, "version": None, "device": None, "cases": 0, "passed": 0, "failed": 0, "worst_value": None,
        "refused": 0, "not_offered": 0,
        "worst_gradient": None, "worst_share": None, "error": judged.error, "notes": [], "failures": [], "results": [],
    }  # fmt: skip
    if (result := judged.report) is not None:
        row |= {key: getattr(result, key) for key in ("version", "device", "passed", "failed")}
        row |= {key: getattr(result, key) for key in ("worst_value", "worst_gradient")}
        row["worst_share"] = max((each.error / each.allowed for each in result.results if each.allowed), default=None)
        row["cases"] = result.passed + result.failed
        row["refused"] = len({each.case for each in result.refused})
        row["not_offered"] = len({each.case for each in result.not_offered})
        row["notes"] = _notes(result) + ([] if judged.quick is None else [f"compiled quickly: XLA_FLAGS={judged.quick!r}"])
        if not row["cases"]:
            row["error"] = "no case ran: it offers none of the functions"
        fields = ("case", "group", "dtype", "what", "error", "allowed", "message")
        row["failures"] = [{key: getattr(each, key) for key in fields} for each in result.failures]
        row["results"] = [{key: getattr(each, key) for key in (*fields, "passed")} for each in result.results]
    row["seconds"] = judged.seconds
    return row


def _notes(result: Report) -> list[str]:
    """What a backend was not asked, and why."""
    notes = [f"known difference: {reason}" for reason in result.excused]
    if absent := {each.case for each in result.not_offered}:
        notes.append(
            f"{number_of(len(absent), 'case')} for functions that it does not offer: {_counted(result.not_offered, ', ')}"
        )
    if refused := {each.case for each in result.refused}:
        notes.append(f"{number_of(len(refused), 'case')} refused: {_counted(result.refused)}")
    return notes


def _counted(results: list[Result], between: str | None = None) -> str:
    """What results say after their first word, or its parts, the commonest first, with the number of cases of each."""
    cases: dict[str, set[str]] = {}
    for each in results:
        words = each.message.partition(": ")[2]
        for part in words.split(between) if between else [words]:
            cases.setdefault(part, set()).add(each.case)
    said = sorted(cases.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{words} ({len(found)})" for words, found in said)


# ---- bench


def bench(options: argparse.Namespace) -> int:
    """Time the backends, print the table of ratios, and write it where asked."""
    from kvattn import bench, peers, timing

    names = named_backends(options.backend)
    if options.backend is not None and (strange := [name for name in names if name not in peers.ATTENTION]):
        raise Refused(f"backend {strange[0]!r} is not timed; those that are: {', '.join(peers.ATTENTION)}")
    names = [name for name in names if name in peers.ATTENTION]
    shapes = list(dict.fromkeys(name.strip() for name in options.shapes.split(",")))
    if unknown := [name for name in shapes if name not in bench.SHAPES]:
        raise Refused(f"unknown shape {unknown[0]!r}; known: {', '.join(bench.SHAPES)}")
    if options.rounds < 1:
        raise Refused(f"--rounds must be at least 1, not {options.rounds}")
    for path in (options.json, options.plot):
        writable(path)
    kinds = [kind for kind, flags in bench.KINDS.items() if all(getattr(options, flag) for flag in flags)]
    if options.layers:
        if unknown := [kind for kind in kinds if kind not in bench.OF_LAYERS]:
            raise Refused(f"--layers goes with --causal and --valid, not --{bench.KINDS[unknown[0]][0].replace('_', '-')}")
        if not bench.count(names, shapes, kinds, True):
            raise Refused(f"--layers is self-attention, and has no shape {options.shapes}")
    console = new_console()
    names = _having(names, bench.lacking(names, options.device), options.backend is None, console)
    if "torch" not in registry.available_backends():
        console.print(f"PyTorch is not installed, so there are times but no ratios: {install.line('torch')}")
    with Progress(console) as progress:
        progress.start("bench", bench.count(names, shapes, kinds, options.layers), "starting")
        done: set[tuple[str, ...]] = set()

        def advance(row: dict[str, Any]) -> None:
            done.add(tuple(str(row.get(key)) for key in ("backend", "shape", "kind")))
            progress.move(len(done), " ".join(str(row.get(key, "")) for key in ("what", "shape", "kind")))

        given = {name: getattr(options, name) for name in ("dtype", "grad", "device", "rounds", "layers", "quick")}
        rows = bench.run(names, bench.Settings(shapes, kinds, **given), advance)
        progress.done("done", number_of(len(rows), "measurement"))
    console.print(*bench.tables(rows, console.width))
    for row in rows:
        if "failed" in row:
            console.print(f"{row['backend']} failed: {row['failed']}", style="bold red", soft_wrap=True)
    if options.json:
        device = next((row["device"] for row in rows if "device" in row), options.device)
        about = {"kvattn": __version__, **timing.machine(), "device": device}
        _write(options.json, timing.document(about, rows=rows))
    if options.plot:
        bench.plot(rows, options.plot)
    return 0 if rows and all(row.get("right") for row in rows) else 1


def lesson(options: argparse.Namespace) -> int:
    """Run a lesson on its tabs, or make a notebook of one of them, or a site of a folder of lessons."""
    from kvattn.lesson import commands

    return commands.command(options)


# ---- doctor


def doctor(options: argparse.Namespace) -> int:
    """Say what works here; 1 if the backend that would serve a call does not."""
    from rich.table import Table
    from rich.text import Text

    from kvattn import old_numpy
    from kvattn.quiet import quiet
    from kvattn.report import clean

    console = new_console()
    console.print(f"kvattn {__version__}, Python {platform.python_version()}, {platform.platform()}\n", soft_wrap=True)
    table = Table(*("backend", "state", "version", "device"))
    known, installed, plugins = registry.known_backends(), registry.available_backends(), registry.plugins()
    asked = {*(named_backends(options.backend) if options.backend else ()), dispatch.get_backend()}
    broken: dict[str, str] = {}
    for name in known:
        version = device = "-"
        unasked = name in plugins and name not in asked
        if name in installed and not unasked:
            try:
                with quiet():
                    version, device = _describe(registry.load(name))
            except (Exception, SystemExit) as error:  # frameworks fail at import with whatever they like
                broken[name] = _say(error)
        state = "broken" if name in broken else "works" if name in installed else "not installed"
        state = "a plugin, not loaded" if unasked else state
        style = {"works": "green", "broken": "bold red"}.get(state, "dim")
        table.add_row(clean(name), Text(state, style), clean(version), clean(device))
    console.print(table)

    name, why = dispatch.reason()
    console.print(f"\nA call with NumPy arrays is served by {clean(name)}: chosen by {why}.", soft_wrap=True)
    usable = name in installed and name not in broken
    if name not in known:
        names = ", ".join(known)
        console.print(f"  But there is no such backend; known: {names} (pytorch = torch, tf = tensorflow).", soft_wrap=True)
    elif not usable:
        console.print(f"  But it is {'broken' if name in broken else 'not installed'}: such a call fails.", soft_wrap=True)
    for each, why in broken.items():
        cure = f"the plugin is {clean(plugins[each])}" if each in plugins else f"to install it anew: {install.line(each)}"
        console.print(f"\n{clean(each)} is broken: {clean(why)}\n  {cure}", soft_wrap=True)
    if others := {name: value for name, value in plugins.items() if name not in asked}:
        console.print(f"\nPlugins that are loaded where --backend names them: {_listed(others)}", soft_wrap=True)
    if "mxnet" in installed and "mxnet" not in broken and old_numpy.lacking():
        cure = "'import kvattn.mxnet_compat' before it, or kvattn.mxnet, is the cure"
        console.print(f"\n'import mxnet' by itself fails on this NumPy: {cure}.", soft_wrap=True)
    if missing := [each for each in known if each not in installed]:
        console.print("\nTo add what is not installed:", soft_wrap=True)
        for each in missing:
            console.print(f"  {install.line(each)}", soft_wrap=True)
    return 0 if usable else 1


def _describe(tab: Any) -> tuple[str, str]:
    version, device = tab.describe() if hasattr(tab, "describe") else ("?", "?")
    return version, ", ".join(tab.devices().values()) if hasattr(tab, "devices") else device


if __name__ == "__main__":
    sys.exit(main())
