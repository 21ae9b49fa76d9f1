"""Which backend serves a call.

The first of these that gives an answer: the ``backend=`` argument, the arrays, ``use_backend``, ``set_backend``,
the environment variable KVATTN_BACKEND, numpy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from kvattn import registry
from kvattn.registry import canonical, home, known, load, name_of

if TYPE_CHECKING:
    from kvattn.backends import Backend

ENVIRONMENT = "KVATTN_BACKEND"
_KEY: Any = os.fsencode(ENVIRONMENT) if os.name == "posix" else ENVIRONMENT  # as os.environ keeps it

_process: str | None = None
_context: ContextVar[str | None] = ContextVar("kvattn_backend", default=None)


# ---- kvattn's own tabs. Import statements rather than importlib: torch.compile can trace these.


def _numpy() -> Any:
    from kvattn.backends import numpy

    return numpy


def _torch() -> Any:
    from kvattn.backends import torch

    return torch


def _tensorflow() -> Any:
    from kvattn.backends import tensorflow

    return tensorflow


def _jax() -> Any:
    from kvattn.backends import jax

    return jax


def _mxnet() -> Any:
    from kvattn.backends import mxnet

    return mxnet


registry.OURS |= {
    "numpy": _numpy,
    "torch": _torch,
    "tensorflow": _tensorflow,
    "jax": _jax,
    "mxnet": _mxnet,
}


# ---- which one serves


def device(tab: Any, name: str) -> str:
    """The device of ``tab`` that is meant by ``name``: "cuda" is "cuda:0", where there is one.

    Raises ValueError, saying what is there, for a device that is not.

    >>> device(load("numpy"), "CPU")
    'cpu'
    """
    if not (callable(getattr(tab, "devices", None)) and callable(getattr(tab, "on", None))):
        raise ValueError(
            f"backend {name_of(tab)!r} cannot be told to run on {name!r}: it lacks devices() and on(device); "
            "see kvattn.backends.Backend"
        )
    devices = tab.devices()
    for found in (name.strip().lower(), f"{name.strip().lower()}:0"):
        if found in devices:
            return found
    has = ", ".join(key if key == what else f"{key} ({what})" for key, what in devices.items())
    raise ValueError(f"backend {name_of(tab).rpartition('.')[2]!r} has no device {name!r} here; it has {has}")


def on(tab: Any, name: str | None) -> AbstractContextManager[Any]:
    """A context whose value ``tab.asarray`` is given as ``like``, so that arrays lie on a device, of those that `device` gives.

    Without a name they lie wherever the backend puts them.
    """
    placed: AbstractContextManager[Any] = nullcontext() if name is None else tab.on(name)
    return placed


def loaded(cls: type, backend: Any) -> Backend:
    """The backend that serves arrays of a class whose backend is known; a KeyError if it is new, or no backend is loaded."""
    name: Any = (known(cls) or get_backend()) if backend is None else backend
    tab: Backend = registry.loaded[name] if type(name) is str else name
    return tab


def choose(backend: Any, **arrays: Any) -> Backend:
    """The backend that serves a call with these arguments.

    Raises TypeError, naming both arguments, where the arrays belong to two frameworks, or to another than ``backend``.
    """
    owner = first = None
    named = canonical(backend) if isinstance(backend, str) else None if backend is None else name_of(backend)
    for argument, x in arrays.items():
        if x is not None and (name := home(x, named)) is not None:
            if owner is None:
                owner, first = name, argument
            elif owner != name:
                raise TypeError(
                    f"{first} is an array of {owner} and {argument} of {name}; "
                    f"convert one of them first: kvattn.convert({argument}, {owner!r})"
                )
    if backend is None:
        return load(owner) if owner else _default()
    if not isinstance(backend, str):
        tab: Backend = backend
        return tab
    if owner is not None and owner != named:
        raise TypeError(
            f"{first} is an array of {owner} but backend={backend!r}; convert it first: kvattn.convert({first}, {backend!r})"
        )
    return load(backend)


def _default() -> Backend:
    """The backend of neutral data. Raises what `load` raises, saying who chose a backend that is none."""
    name = get_backend()
    try:
        return load(name)
    except ValueError as error:
        raise ValueError(f"{error}; {name!r} was chosen by {reason()[1]}") from None


def get_backend() -> str:
    """The name of the backend that serves neutral data (NumPy arrays, lists, numbers) here and now.

    >>> with use_backend("numpy"):
    ...     get_backend()
    'numpy'
    """
    # of `reason`, only the name: looking at the environment is most of what it costs
    name = _context.get() or _process
    if name is None:
        name = _of_environment()
        name = canonical(name) if name else "numpy"
    return name


def _of_environment() -> str | None:
    """The environment variable as it is now. os.environ raises and catches two errors for one that is not set."""
    kept = getattr(os.environ, "_data", None)
    return None if kept is not None and _KEY not in kept else os.environ.get(ENVIRONMENT)


def reason() -> tuple[str, str]:
    """(name, why): the backend that serves neutral data here and now, and which rule chose it."""
    if (name := _context.get()) is not None:
        return name, "use_backend"
    if _process is not None:
        return _process, "set_backend"
    if name := _of_environment():
        return canonical(name), f"the environment variable {ENVIRONMENT}"
    return "numpy", "the default"


def set_backend(name: str | None) -> None:
    """Choose the backend for neutral data in this process; None takes the choice back.

    Raises what loading the backend raises: ValueError (unknown), ImportError (not installed, or broken).
    """
    global _process
    if name is not None:
        load(name)
        name = canonical(name)
    _process = name


@contextmanager
def use_backend(name: str) -> Iterator[Backend]:
    """Choose the backend for neutral data inside a ``with`` block, in this thread or task only.

    >>> with use_backend("numpy") as tab:
    ...     tab.__name__
    'kvattn.backends.numpy'
    """
    tab = load(name)
    token = _context.set(canonical(name))
    try:
        yield tab
    finally:
        _context.reset(token)
