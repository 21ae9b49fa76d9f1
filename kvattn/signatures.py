"""The types of kvattn's functions, for type checkers: an array of a framework in, one of the same out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypedDict, TypeVar


class ArrayOfAFramework(Protocol):
    """An array of some framework, NumPy's too; lists and numbers are none."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...


A = TypeVar("A", bound=ArrayOfAFramework)
Array = Any  # one framework's array, or neutral data
Score = Callable[..., Array]
Normalizer = Callable[..., Array]


class LayerOptions(TypedDict, total=False):
    """The keywords of an attention layer's call, but for those that say what else is returned, and ``cache``."""

    mask: Array | Callable[[Array, Array], Array] | None
    bias: Array | Callable[[Array, Array], Array] | None
    causal: bool
    query_offset: Any
    window: Any
    positions: Array | None
    scale: float | None
    softcap: float | None
    sink: Array | None
    segments: Any
    rng: Any


class Options(LayerOptions, total=False):
    """The keywords of `kvattn.attention`, but for backend and for those that say what is returned."""

    score: Score | None
    normalize: Normalizer | None
    valid_lens: Array | None
    dropout: float
