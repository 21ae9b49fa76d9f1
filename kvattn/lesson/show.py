"""A lesson that was run, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvattn.lesson.reader import Cell
from kvattn.lesson.runner import Ran, Result
from kvattn.report import clean
from kvattn.terminal import number_of

if TYPE_CHECKING:
    from rich.console import Console


def show(result: Result, console: Console) -> None:
    """Print a row for each cell, how long it took on each tab and the share of the tolerance used; then what is wrong."""
    from rich.table import Table
    from rich.text import Text

    ran = {(each.cell, name): each for name, cells in result.tabs.items() for each in cells}
    table = Table("line", "cell", *result.tabs, *(["agree"] if len(result.tabs) > 1 else []))
    for column in table.columns[2:]:
        column.justify = "right"
    for cell in result.lesson.cells:
        states = [_state(cell, name, ran.get((cell, name))) for name in result.tabs]
        if any(states):
            title = Text(clean(cell.title), overflow="ellipsis", no_wrap=True)
            agreement = [_agreement(result, cell)] if len(result.tabs) > 1 else []
            table.add_row(str(cell.line), title, *(Text(*state) for state in (*states, *agreement)))
    console.print(table)
    for problem in result.problems():
        console.print(f"\n{clean(problem)}", soft_wrap=True)


def _state(cell: Cell, name: str, ran: Ran | None) -> tuple[str, str]:
    if ran is None:
        return ("not run", "dim") if cell.on(name) else ("", "")
    return ("error", "bold red") if ran.error else (f"{ran.seconds:.1f} s", "green")


def _agreement(result: Result, cell: Cell) -> tuple[str, str]:
    found = result.agreements.get(cell)
    if found is None:
        return ("", "") if cell.compared or cell.tabs is not None else ("differs", "dim")
    return ("no", "bold red") if found.share > 1 else (f"yes, {found.share:.0%}", "green")


def outcome(cells: Sequence[Ran]) -> str:
    """How a tab went, in a line."""
    failed = sum(each.error is not None for each in cells)
    ok = len(cells) - failed
    seconds = sum(each.seconds for each in cells)
    return f"{number_of(ok, 'cell')} run, {'stopped by an error' if failed else 'no error'}, {seconds:.1f} s"


def summary(result: Result) -> str:
    """The closing line."""
    cells = sum(len(ran) for ran in result.tabs.values())
    compared = f"{number_of(len(result.agreements), 'common cell')} compared, {number_of(len(result.apart), 'disagreement')}"
    lost = f"; {number_of(len(result.lost), 'reference')} without a target" if result.lost else ""
    ran = f"{number_of(cells, 'cell')} run on {number_of(len(result.tabs), 'tab')}"
    return f"{ran}, {number_of(len(result.errors), 'error')}; {compared}{lost}"
