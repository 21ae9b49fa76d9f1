"""What `from kvattn import torch as kv` and its four neighbours gather: kvattn's functions, on that backend by default."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from kvattn import api, decoding, maps, scaffold, weights


def functions(backend: str) -> dict[str, Any]:
    """Every public name of kvattn; what takes ``backend`` has this one by default.

    >>> functions("numpy")["softmax"]([0.0, 0.0])
    array([0.5, 0.5])
    """
    public = {name: getattr(api, name) for name in api.__all__} | {name: getattr(weights, name) for name in weights.__all__}
    public |= {"attention_maps": maps.attention_maps} | {name: getattr(decoding, name) for name in decoding.__all__}
    return {name: _bound(x, backend) if _takes_backend(x) else x for name, x in public.items()}


def _takes_backend(x: Any) -> bool:
    return inspect.isfunction(x) and "backend" in inspect.signature(x).parameters


def _bound(function: Callable[..., Any], default: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def bound(*args: Any, backend: Any = default, **options: Any) -> Any:
        return function(*args, backend=backend, **options)

    takes = inspect.signature(function)  # help() and completion show it, with this default
    here = [x.replace(default=default) if x.name == "backend" else x for x in takes.parameters.values()]
    vars(bound)["__signature__"] = takes.replace(parameters=here)
    return bound


DRAWING = ("plot", "show_heatmaps", "show_attention", "kernel_shapes", "use_svg_display", "set_figsize", "plt")


def listing(module: dict[str, Any]) -> Callable[[], list[str]]:
    """A module's ``__dir__``: what it holds, and what `lazily` finds."""
    return lambda: sorted({*module, *DRAWING, *scaffold.NAMES[module["__name__"].rpartition(".")[2]]})


def lazily(framework: str) -> Callable[[str], Any]:
    """A module's ``__getattr__``: what draws loads matplotlib when it is asked for, this framework's scaffold too."""

    def found(name: str) -> Any:
        if name == "plt":
            import matplotlib.pyplot as plt

            return plt
        if name in DRAWING:
            from kvattn import plot

            return getattr(plot, name)
        if name in scaffold.NAMES[framework]:
            return getattr(importlib.import_module(f"kvattn.scaffold.{framework}"), name)
        near = [] if name.startswith("_") else difflib.get_close_matches(name, dir(sys.modules[f"kvattn.{framework}"]))
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        raise AttributeError(f"kvattn's namespaces have no {name!r}{hint}")

    return found


def method(name: str) -> Callable[..., Any]:
    """A function that calls the method ``name`` of the array that it is given first: lessons write reshape(x, (2, 3)).

    >>> method("upper")("x")
    'X'
    """

    def call(x: Any, *args: Any, **options: Any) -> Any:
        return getattr(x, name)(*args, **options)

    call.__name__ = call.__qualname__ = name
    return call


def check_shape(x: Any, shape: Any) -> None:
    """Raises AssertionError unless ``x`` has this shape.

    >>> check_shape([[1.0]], (1, 1))
    """
    found = tuple(getattr(x, "shape", None) or api.to_numpy(x).shape)
    if found != tuple(shape):
        raise AssertionError(f"the shape is {found}; expected {tuple(shape)}")
