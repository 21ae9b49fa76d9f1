"""Tabs in notebooks: one notebook, a version of its code for each framework, in the notation of d2l.

    %load_ext kvattn.tab
    tab.interact_select("pytorch", "jax")

A cell whose first line is ``%%tab pytorch, jax`` runs if one of these tabs is selected, ``%%tab all`` always; inside a
cell ``if tab.selected("pytorch"):`` chooses. The selected tab is the selected backend (``kvattn.get_backend()``):
KVATTN_BACKEND, or numpy, until ``tab.select_tab("jax")`` says otherwise; so NumPy inputs follow the tab too. A cell that
is run is run by the notebook itself: its errors fail it, ``await`` and a trailing ``;`` work.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from kvattn import dispatch, registry

if TYPE_CHECKING:
    from collections.abc import Iterable


def selected(*tabs: str | Iterable[str]) -> bool:
    """Whether one of these tabs is the selected one. Raises ValueError for a name that is no backend.

    >>> with dispatch.use_backend("numpy"):
    ...     selected("pytorch", "numpy"), selected(["pytorch", "jax"])
    (True, False)
    """
    return dispatch.get_backend() in known(*_flat(tabs))


def select_tab(tab: str | None = None) -> None:
    """Select a tab, and with it the backend for NumPy arrays; None: KVATTN_BACKEND's, or numpy.

    Raises what loading the backend raises: ValueError (unknown), ImportError (not installed, or broken).
    """
    dispatch.set_backend(tab)


def interact_select(*tabs: str | Iterable[str]) -> None:
    """Offer these tabs to choose from: a drop-down where there is ipywidgets, else a line that says which is selected.

    The selected backend stays, if it is one of them. If nobody selected one, it is the first of them that is installed.
    Raises ValueError where KVATTN_BACKEND or ``select_tab`` chose a tab that is not among them.
    """
    given = _flat(tabs)
    names = known(*given)
    chosen, why = dispatch.reason()
    note = ""
    if chosen not in names:
        offers = f"this notebook's tabs are {', '.join(given)}"
        if why != "the default":
            cure = f"set {dispatch.ENVIRONMENT} to one of them, or call tab.select_tab({chosen!r}) instead of interact_select"
            raise ValueError(f"the tab {chosen!r}, chosen by {why}, is not offered: {offers}; {cure}")
        chosen = next((name for name in names if name in registry.available_backends()), "")
        if not chosen:
            from kvattn import install

            raise ModuleNotFoundError(f"{offers}, and none is installed: {install.line(names[0])}")
        note = f", the first of {', '.join(given)} that is installed; tab.select_tab or {dispatch.ENVIRONMENT} chooses"
        select_tab(chosen)
    if not _drop_down(dict(zip(given, names, strict=True)), chosen):
        print(f"The tab is {chosen}{note}.")


def known(*tabs: str) -> list[str]:
    """These tabs by their backends' names (pytorch = torch, tf = tensorflow). Raises ValueError for any other."""
    names = [registry.canonical(tab) for tab in tabs]
    if not set(names) <= set(registry.OURS):  # looking for plugins takes 20 ms
        backends = registry.known_backends()
        for tab, name in zip(tabs, names, strict=True):
            if name not in backends:
                offers = ", ".join(backends)
                raise ValueError(f"unknown tab {tab!r}; known: {offers} (pytorch = torch, tf = tensorflow)")
    return names


def named(line: str) -> list[str] | None:
    """The tabs that the rest of a ``%%tab`` line names, None if it says all. Raises ValueError for an unknown name.

    >>> named("pytorch, tf"), named("all")
    (['torch', 'tensorflow'], None)
    """
    words = [word.strip() for word in line.split(",")]
    if words == [""]:
        raise ValueError("%%tab needs a tab's name, or several with commas between them, or all")
    names = known(*(word for word in words if word != "all"))
    return None if "all" in words else names


def _flat(tabs: Iterable[str | Iterable[str]]) -> list[str]:
    return [name for tab in tabs for name in ([tab] if isinstance(tab, str) else tab)]


def _drop_down(choices: dict[str, str], chosen: str) -> bool:
    """Show a drop-down, if this is a notebook that can; whether it did."""
    try:
        from IPython.core.getipython import get_ipython
        from IPython.display import display
        from ipywidgets import Dropdown
    except ModuleNotFoundError:
        return False
    if not hasattr(get_ipython(), "kernel"):
        return False
    menu = Dropdown(options=list(choices.items()), value=chosen, description="tab")
    menu.observe(lambda change: select_tab(change["new"]), "value")
    display(menu)
    return True


def _uncover(lines: list[str]) -> list[str]:
    """Take the ``%%tab`` line off a cell that the selected tab runs: what is left is an ordinary cell.

    A cell of another tab, or of an unknown one, is left as it is, and so reaches the magic.
    """
    if not lines or lines[0].split(maxsplit=1)[:1] != ["%%tab"]:
        return lines
    try:
        names = named(lines[0].strip().removeprefix("%%tab"))
    except ValueError:
        return lines
    if names is not None and dispatch.get_backend() not in names:
        return lines
    # an empty line in its place keeps the line numbers of tracebacks, but would hide the next cell magic
    return lines[1:] if lines[1:] and lines[1].startswith("%%") else ["\n", *lines[1:]]


def _magic(line: str, cell: str) -> None:
    """``%%tab pytorch, jax``: run the cell if one of these tabs is selected. ``%%tab all``: run it on every tab."""
    names = named(line)
    if names is not None and not selected(names):
        print(f"Not run: a cell for {', '.join(names)}, and the tab is {dispatch.get_backend()}.")
        return
    from IPython.core.getipython import get_ipython

    # only code that calls the magic itself gets here
    get_ipython().run_cell(cell).raise_error()


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext kvattn.tab``: the ``%%tab`` cells and the name ``tab``. Raises ImportError if the backend does."""
    registry.load(dispatch.get_backend())  # now, so that `import mxnet` in a cell finds the NumPy that it needs
    shell.input_transformers_cleanup.append(_uncover)
    shell.register_magic_function(_magic, magic_kind="cell", magic_name="tab")
    shell.push({"tab": sys.modules[__name__]})


def unload_ipython_extension(shell: Any) -> None:
    """``%unload_ext kvattn.tab``."""
    shell.input_transformers_cleanup.remove(_uncover)
    del shell.magics_manager.magics["cell"]["tab"]
    shell.drop_by_id({"tab": sys.modules[__name__]})
