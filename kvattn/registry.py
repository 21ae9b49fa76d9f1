"""Which backends there are, loading one, and which class of arrays belongs to which.

Imports no framework: a class is recognised by its package's name, a tab is loaded when asked for. Kernels and conversion
ask here, and `dispatch`, which chooses by it and enters kvattn's own tabs, so that this module imports none of them.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from kvattn.call import Call

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from kvattn.backends import Backend

NEUTRAL = (list, tuple, float, int, bool, FunctionType, MethodType, partial)  # functions: of positions
ENTRY_POINTS = "kvattn.backends"  # of plugins: by the backend's name, the module or object that it is
NATIVE_PACKAGES = "kvattn.native_packages"  # by the same name, the package whose arrays are the backend's

OURS: dict[str, Callable[[], Any]] = {}  # kvattn's own tabs, and what imports each: `dispatch` enters them
_ALIASES = {"pytorch": "torch", "tf": "tensorflow"}
_PACKAGES = {"torch": "torch", "tensorflow": "tensorflow", "jax": "jax", "jaxlib": "jax", "mxnet": "mxnet", "numpy": None}

loaded: dict[str, Backend] = {}
_homes: dict[type, str | None] = {}  # of classes of other packages; a plain dict: torch.compile cannot trace lru_cache
_installed: tuple[Any, dict[str, EntryPoint], dict[str, str]] | None = None

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
        points = {point.name: point for point in reversed(_declarations(ENTRY_POINTS)) if point.name not in OURS}
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


def plugins() -> dict[str, str]:
    """The plugins that are installed, and what each loads, "module" or "module:object". None of them is imported.

    >>> "numpy" in plugins()
    False
    """
    return {name: point.value for name, point in sorted(_plugins().items())}


def known_backends() -> tuple[str, ...]:
    """Every name that ``backend=`` takes: ours, then the plugins."""
    return (*OURS, *sorted(_plugins()))


def available_backends() -> tuple[str, ...]:
    """The names of the backends whose framework is installed, without importing any.

    >>> "numpy" in available_backends()
    True
    """
    return tuple(name for name in known_backends() if name not in OURS or importlib.util.find_spec(name))


def load(name: str) -> Backend:
    """The backend called ``name``, imported on first use.

    Raises ValueError for an unknown name, ModuleNotFoundError for a framework that is not installed, ImportError for
    one that is installed but fails to import, TypeError for a plugin that lacks a required function.
    """
    name = canonical(name)
    if name in loaded:
        return loaded[name]
    if name in OURS:
        try:
            tab: Backend = OURS[name]()
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
        _homes.clear()  # classes whose backend was looked up before may be its own, or claimed by two now
    else:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(known_backends())} (pytorch = torch, tf = tensorflow)")
    if not (hasattr(tab, "tracing") and tab.tracing()):  # torch.compile would compile anew at the next call
        loaded[name] = tab
    return tab


def name_of(tab: Any) -> str:
    """The name that ``tab`` was loaded by; a backend that was given as an object: its own."""
    own = getattr(tab, "__name__", type(tab).__name__).removeprefix("kvattn.backends.")  # loaded in a trace: not remembered
    return next((name for name, each in loaded.items() if each is tab), own)


def verify(tab: Any, name: str) -> None:
    """Raises TypeError, naming what is missing, if ``tab`` is no backend."""
    missing = [part for part in REQUIRED if not callable(getattr(tab, part, None))]
    if not missing and (lacks := [each for each in lacking(tab) if each in ALWAYS]):
        missing = [f"attention's keywords {', '.join(lacks)}"]
    if missing:
        raise TypeError(f"backend {name!r} does not satisfy kvattn.backends.Backend; missing: {', '.join(missing)}")


def lacking(tab: Any) -> list[str]:
    """The keywords of `kvattn.attention` that the attention of ``tab`` does not take; none if it has no signature."""
    return not_taken(tab.attention, list(inspect.signature(Call.of).parameters)[2:])


def not_taken(function: Any, keywords: Sequence[str]) -> list[str]:
    """Those of the keywords that a function does not take; none if it has no signature."""
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
    """The backend an array belongs to, (None,) for neutral data; found by walking its class's MRO, () if not."""
    if isinstance(x, (int, float)):  # torch.compile's symbolic numbers have no MRO to walk
        return (None,)
    for base in type(x).__mro__:
        if base in NEUTRAL:
            return (None,)
        if (package := base.__module__.partition(".")[0]) in _PACKAGES:
            return (_PACKAGES[package],)
    return ()


def _claims(x: Any) -> tuple[str, ...]:
    """The plugins whose array ``x`` is. One is loaded only if it can own this class: if that, or what it is made from, is
    of the native package that the plugin declares, or of the plugin's own. Raises what loading raises if no other claims it.
    """
    packages = {base.__module__.partition(".")[0] for base in type(x).__mro__}
    points, natives = _plugins(), _declared()[1]
    found, failed = [], None
    for name, point in points.items():
        own = natives.get(name, ""), point.value.partition(":")[0].partition(".")[0]
        if name in loaded or packages.intersection(own):
            try:
                if load(name).is_array(x):
                    found.append(name)
            except Exception as error:  # a broken one is of no account where another takes the array
                failed = error
    if failed is not None and not found:
        raise failed
    return tuple(found)


def known(cls: type) -> str | None:
    """The backend of a class, None for NumPy's; a KeyError for one of another package that was not looked up before.

    Only classes of other packages are remembered: where torch.compile sees `_homes` read, it compiles anew once that grows.
    """
    package = cls.__module__
    if package not in _PACKAGES:  # which a tensor's and NumPy's array's is by itself
        package = package.partition(".")[0]
        if package not in _PACKAGES:
            return _homes[cls]
    return _PACKAGES[package]


def home(x: Any, wanted: str | None = None) -> str | None:
    """The name of the backend whose array ``x`` is; None for neutral data: NumPy arrays, lists, numbers, and unknown classes.

    Raises TypeError for a class that two plugins claim, unless the one that is ``wanted`` is among them.
    """
    cls = type(x)
    if isinstance(x, (int, float)) or cls in NEUTRAL:
        return None
    try:
        return known(cls)
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
