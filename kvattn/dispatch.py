"""Which backend serves a call. Imports no framework: it looks at types by name and loads a tab when asked.

The first of these that gives an answer: the ``backend=`` argument, the arrays, ``use_backend``, ``set_backend``,
the environment variable KVATTN_BACKEND, numpy.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import partial
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from kvattn.backends import Backend

NEUTRAL = (list, tuple, float, int, bool, FunctionType, MethodType, partial)  # functions: of positions
ENVIRONMENT = "KVATTN_BACKEND"
_KEY: Any = os.fsencode(ENVIRONMENT) if os.name == "posix" else ENVIRONMENT  # as os.environ keeps it
ENTRY_POINTS = "kvattn.backends"  # of plugins: by the backend's name, the module or object that it is
NATIVE_PACKAGES = "kvattn.native_packages"  # by the same name, the package whose arrays are the backend's


# Import statements rather than importlib: torch.compile can trace these.
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


_OURS: dict[str, Callable[[], Any]] = {
    "numpy": _numpy,
    "torch": _torch,
    "tensorflow": _tensorflow,
    "jax": _jax,
    "mxnet": _mxnet,
}
_ALIASES = {"pytorch": "torch", "tf": "tensorflow"}
_PACKAGES = {"torch": "torch", "tensorflow": "tensorflow", "jax": "jax", "jaxlib": "jax", "mxnet": "mxnet"}
# Classes that torch.compile meets are told by their modules: where it saw _homes read, it would compile anew once that grew.
_MODULES = {"torch": "torch", "torch.nn.parameter": "torch", "numpy": None}

_loaded: dict[str, Backend] = {}
_homes: dict[type, str | None] = {}  # of other classes; a plain dict: torch.compile cannot trace lru_cache
_installed: tuple[Any, dict[str, EntryPoint], dict[str, str]] | None = None
_process: str | None = None
_context: ContextVar[str | None] = ContextVar("kvattn_backend", default=None)

REQUIRED = ("is_array", "asarray", "to_numpy", "attention")
# The keywords that every call of a backend's attention may hold; later ones, like sink, are passed where they are given.
ALWAYS = ("score", "normalize", "mask", "bias", "valid_lens", "causal", "query_offset", "window", "positions", "scale",
          "softcap", "dropout", "rng", "return_weights", "return_lse")  # fmt: skip


def canonical(name: str) -> str:
    """The name a backend goes by: aliases resolved, spaces and capitals forgiven."""
    name = name.strip().lower()
    return _ALIASES.get(name, name)


def _written(folder: str) -> int | None:
    """When something was last installed into a folder of sys.path; None if there is no such folder."""
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return None


def _declared() -> tuple[dict[str, EntryPoint], dict[str, str]]:
    """What plugins that are installed now declare: their backends, and whose arrays these take, each by the backend's name.

    Nothing of theirs is imported. Looking takes 20 ms: not at import, and again only if something was installed.
    """
    global _installed
    places = [(folder, _written(folder)) for folder in sys.path]
    if _installed is None or _installed[0] != places:
        points = {point.name: point for point in reversed(_declarations(ENTRY_POINTS)) if point.name not in _OURS}
        _installed = places, points, {point.name: point.value for point in reversed(_declarations(NATIVE_PACKAGES))}
    return _installed[1], _installed[2]


def _declarations(group: str) -> list[EntryPoint]:
    """The entry points of a group, those that come earlier on sys.path first."""
    from importlib.metadata import distributions, entry_points

    with suppress(Exception):
        return [*entry_points(group=group)]
    found = []
    for each in distributions():  # one of them, of whatever package, has metadata that cannot be read
        with suppress(Exception):
            found += [point for point in each.entry_points if point.group == group]
    return found


def _plugins() -> dict[str, EntryPoint]:
    """The plugins that are installed now, by the names of their backends."""
    return _declared()[0]


def _natives() -> dict[str, str]:
    """The package whose arrays are a plugin's, as its metadata declares it, by the name of its backend."""
    return _declared()[1]


def plugins() -> dict[str, str]:
    """The plugins that are installed, and what each loads, "module" or "module:object". None of them is imported.

    >>> "numpy" in plugins()
    False
    """
    return {name: point.value for name, point in sorted(_plugins().items())}


def known_backends() -> tuple[str, ...]:
    """Every name that ``backend=`` takes: ours, then the plugins."""
    return (*_OURS, *sorted(_plugins()))


def available_backends() -> tuple[str, ...]:
    """The names of the backends whose framework is installed, without importing any.

    >>> "numpy" in available_backends()
    True
    """
    return tuple(name for name in known_backends() if name not in _OURS or importlib.util.find_spec(name))


def load(name: str) -> Backend:
    """The backend called ``name``, imported on first use.

    Raises ValueError for an unknown name, ModuleNotFoundError for a framework that is not installed, ImportError for
    one that is installed but fails to import, TypeError for a plugin that lacks a required function.
    """
    name = canonical(name)
    if name in _loaded:
        return _loaded[name]
    if name in _OURS:
        try:
            tab: Backend = _OURS[name]()
        except Exception as error:  # a broken framework may raise anything while it is imported
            if importlib.util.find_spec(name) is None:
                from kvattn import install

                cure = install.line(name)
                raise ModuleNotFoundError(f"backend {name!r} needs {name}, which is not installed: {cure}") from error
            raise ImportError(f"backend {name!r}: {name} is installed but does not import: {error}") from error
    elif name in (plugins := _plugins()):
        try:
            tab = plugins[name].load()
        except Exception as error:
            raise ImportError(f"backend {name!r}: the plugin {plugins[name].value} fails to load: {error}") from error
        verify(tab, name)
        _homes.clear()  # classes that were met before may be its own, or claimed by two now
    else:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(known_backends())} (pytorch = torch, tf = tensorflow)")
    if not (hasattr(tab, "tracing") and tab.tracing()):  # torch.compile would compile anew at the next call
        _loaded[name] = tab
    return tab


def name_of(tab: Any) -> str:
    """The name that ``tab`` was loaded by; a backend that was given as an object: its own."""
    own = getattr(tab, "__name__", type(tab).__name__).removeprefix("kvattn.backends.")  # loaded in a trace: not remembered
    return next((name for name, loaded in _loaded.items() if loaded is tab), own)


def verify(tab: Any, name: str) -> None:
    """Raises TypeError, naming what is missing, if ``tab`` is no backend."""
    missing = [part for part in REQUIRED if not callable(getattr(tab, part, None))]
    if not missing and (lacks := [each for each in lacking(tab) if each in ALWAYS]):
        missing = [f"attention's keywords {', '.join(lacks)}"]
    if missing:
        raise TypeError(f"backend {name!r} does not satisfy kvattn.backends.Backend; missing: {', '.join(missing)}")


def lacking(tab: Any) -> list[str]:
    """The keywords of `kvattn.attention` that the attention of ``tab`` does not take; none if it tells no signature."""
    import inspect

    from kvattn.call import Call

    return not_taken(tab.attention, list(inspect.signature(Call.of).parameters)[2:])


def not_taken(function: Any, keywords: Sequence[str]) -> list[str]:
    """Those of the keywords that a function does not take; none if it tells no signature."""
    import inspect

    try:
        takes = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return []
    if any(each.kind is each.VAR_KEYWORD for each in takes.values()):
        return []
    return [each for each in keywords if each not in takes or takes[each].kind is takes[each].POSITIONAL_ONLY]


def offered(tab: Any, name: str) -> Any:
    """The function ``name`` of a backend. Raises NotImplementedError if it has none: all but REQUIRED are optional."""
    found = getattr(tab, name, None)
    if found is None:
        raise NotImplementedError(f"backend {name_of(tab)!r} offers no {name}; what it may offer: see kvattn.backends")
    return found


def _home(x: Any) -> tuple[str | None, ...]:
    """The backend an array belongs to, (None,) for neutral data; found by walking its class's MRO. () if that tells nothing."""
    if isinstance(x, (int, float)):  # torch.compile's symbolic numbers have no MRO to walk
        return (None,)
    for base in type(x).__mro__:
        package = base.__module__.partition(".")[0]
        if package in _PACKAGES:
            return (_PACKAGES[package],)
        if package == "numpy" or base in NEUTRAL:
            return (None,)
    return ()


def _claims(x: Any) -> tuple[str, ...]:
    """The plugins whose array ``x`` is. One is loaded only if it can own this class: if that, or what it is made from, is
    of the native package that the plugin declares, or of the plugin's own. Raises what loading raises if no other claims it.
    """
    packages = {base.__module__.partition(".")[0] for base in type(x).__mro__}
    points, natives = _plugins(), _natives()
    found, failed = [], None
    for name, point in points.items():
        own = natives.get(name, ""), point.value.partition(":")[0].partition(".")[0]
        if name in _loaded or packages.intersection(own):
            try:
                if load(name).is_array(x):
                    found.append(name)
            except Exception as error:  # a broken one is of no account where another takes the array
                failed = error
    if failed is not None and not found:
        raise failed
    return tuple(found)


def home(x: Any, wanted: str | None = None) -> str | None:
    """The name of the backend whose array ``x`` is; None for neutral data: NumPy arrays, lists, numbers, and unknown classes.

    Raises TypeError for a class that two plugins claim, unless the one that is ``wanted`` is among them.
    """
    cls = type(x)
    if isinstance(x, (int, float)) or cls in NEUTRAL:
        return None
    if cls.__module__ in _MODULES:
        return _MODULES[cls.__module__]
    try:
        return _homes[cls]
    except KeyError:
        found = _home(x) or _claims(x)
    if len(found) > 1:
        if wanted in found:
            return wanted
        both = " and ".join(map(repr, found))
        raise TypeError(f"backends {both} both claim arrays of class {cls.__name__}; say which: backend={found[0]!r}")
    if found:
        _homes[cls] = found[0]
        return found[0]
    return None  # and not remembered: its plugin may yet be installed, or loaded


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
    there = tab.devices()
    for found in (name.strip().lower(), f"{name.strip().lower()}:0"):
        if found in there:
            return found
    has = ", ".join(key if key == what else f"{key} ({what})" for key, what in there.items())
    raise ValueError(f"backend {name_of(tab).rpartition('.')[2]!r} has no device {name!r} here; it has {has}")


def on(tab: Any, name: str | None) -> AbstractContextManager[Any]:
    """A context whose value ``tab.asarray`` is given as ``like``, so that arrays lie on a device, of those that `device` gives.

    Without a name they lie wherever the backend puts them.
    """
    placed: AbstractContextManager[Any] = nullcontext() if name is None else tab.on(name)
    return placed


def loaded(cls: type, backend: Any) -> Backend:
    """The backend that serves arrays of a class that was met before; a KeyError if it is new, or no backend is loaded."""
    name: Any = backend
    if backend is None:
        home: Any = _MODULES.get(cls.__module__, cls)
        name = (_homes[cls] if home is cls else home) or get_backend()
    tab: Backend = _loaded[name] if type(name) is str else name
    return tab


def choose(backend: Any, **arrays: Any) -> Backend:
    """The backend that serves a call with these arguments.

    Raises TypeError, naming both arguments, where the arrays belong to two frameworks, or to another than ``backend``.
    """
    owner = first = None
    wanted = canonical(backend) if isinstance(backend, str) else None if backend is None else name_of(backend)
    for argument, x in arrays.items():
        if x is not None and (name := home(x, wanted)) is not None:
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
    if owner is not None and owner != wanted:
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
    """The environment variable as it is now. os.environ raises two errors within to tell that one is not set, in every call."""
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
