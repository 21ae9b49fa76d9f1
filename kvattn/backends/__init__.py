"""What a backend is: a module, or any object, with these functions.

The tabs beside this file are kvattn's own five, and each is a `Tab`, which the type checker confirms. A third party's is
named by an entry point in the group ``kvattn.backends``; the package whose arrays it takes by one of the same name in the group
``kvattn.native_packages``, so that an array finds its backend and no other is loaded to ask. `Backend` is what it must have.
Everything else is optional, and offered by having it:

====================================================  ===============================================================
`Devices`                                             ``kvattn conform --device``, ``conformance.run(device=...)``
`Seen`                                                errors about values (lengths below 0), reports, `kvattn.explain`
a score, kernel or normaliser of its name             the function of that name; and as ``score=`` and ``normalize=``
``gaussian_kernel``, ``proportional``                 `kvattn.nadaraya_watson`, unless it is given another kernel
``attention_grad``                                    the function of that name
``merge_attention``, ``rotary``, ``self_attention``   the functions of these names
``multi_head_attention``                              the function of that name; with ``cache=`` also ``write``
``multi_head_attention_grad``                         the function of that name
====================================================  ===============================================================

What is absent raises NotImplementedError where a user asks for it, as a backend may do itself where its framework cannot
express a call; neither is a failure to the conformance suite, whose report lists both.

A backend may import `kvattn.call`, whose `Call` describes a call of attention in one object, and `kvattn.planning`, plain
arithmetic of shapes: they stay as they are for as long as the options of attention do.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from kvattn.call import Call


class Backend(Protocol):
    """What every backend has; the promises are written in :mod:`kvattn.api`."""

    def is_array(self, x: Any, /) -> bool:
        """Whether ``x`` is this framework's own array, traced ones included."""
        ...

    def asarray(self, x: Any, /, dtype: str | None = None, like: Any = None) -> Any:
        """``x`` as this framework's array, on the device of ``like``, of ``dtype``, by default of its own.

        ``x`` is such an array already, a NumPy array of any layout and byte order, a list or a number. Raises TypeError or
        ValueError for what the framework has no array for; float32 it has.
        """
        ...

    def to_numpy(self, x: Any, /) -> Any:
        """``x``, this framework's array or what `asarray` takes, as a NumPy array; bfloat16 as float32, which holds it."""
        ...

    def attention(
        self, query: Any, key: Any, value: Any, /, *, score: Any = ..., normalize: Any = ..., mask: Any = None,
        bias: Any = None, valid_lens: Any = None, causal: bool = False, query_offset: Any = 0,
        window: tuple[int | None, int | None] | None = None, positions: Any = None, scale: float | None = None,
        softcap: float | None = None, dropout: float = 0.0, rng: Any = None, return_weights: bool = False,
        return_lse: bool = False,
    ) -> Any:  # fmt: skip
        """:func:`kvattn.attention` on arguments that the frontend has checked: docs/howto/add-a-backend.md says how.

        ``sink``, and what later releases add, is passed only where a caller gives it.
        """
        ...


class Devices(Protocol):
    """Optional: where arrays lie, and where one computes."""

    def devices(self) -> dict[str, str]:
        """What `on` takes, and what it is: {"cpu": "cpu", "cuda:0": "NVIDIA H100"}."""
        ...

    def on(self, device: str, /) -> AbstractContextManager[Any]:
        """A context for arrays and calls on a device; its value, if not None, is what ``asarray`` takes as ``like``."""
        ...


class Seen(Protocol):
    """Optional, each by itself: what a backend tells of its arrays, of itself and of the kernel that serves a call."""

    def peek(self, x: Any, /) -> Any:
        """``x`` as a NumPy array if that costs no wait and no trace, else None."""
        ...

    def signed(self, x: Any, /) -> Any:
        """Unsigned integers as int32, those beyond 2^30 as that: asked where `peek` does not show the values."""
        ...

    def describe(self) -> tuple[str, str]:
        """(version of the framework, the device where new arrays lie), for reports."""
        ...

    def tracing(self) -> bool:
        """Whether a graph is being recorded in which sizes may be unknown."""
        ...

    def converts(self, x: Any, y: Any, /) -> bool:
        """Whether the framework itself converts floating arrays of these two dtypes here (torch.autocast)."""
        ...

    def places(self, x: Any, /, first: Any = 0, count: Any = None) -> Any:
        """Integers (count,) from ``first`` on, by default one for each row of ``x`` (..., n, c), on its device.

        A backend that has it is given segments, and masks and biases that are functions of positions, as `kvattn.pairs.Pairs`
        in the place of the mask; another is given arrays of all pairs.
        """
        ...

    def choose(self, query: Any, key: Any, value: Any, call: Call, /) -> tuple[Any, ...]:
        """(name, why, ...) of the kernel that serves a call: `kvattn.call.Choice`, or the two alone."""
        ...


class Functions(Protocol):
    """Optional, each by itself: the functions of :mod:`kvattn.api` beside attention, on checked arguments."""

    def attention_grad(
        self, query: Any, key: Any, value: Any, grad_output: Any, *, wrt: Sequence[str] = ..., **options: Any
    ) -> tuple[Any, ...]:
        """A gradient for each name of ``wrt``. What may be named beside query, key and value is among the options, or bound by
        ``score``, a functools.partial. ``return_scores`` and ``grad_scores`` are passed only where a caller gives them."""
        ...

    def merge_attention(self, outputs: Sequence[Any], lses: Sequence[Any], /, return_lse: bool = False) -> Any: ...

    def rotary(
        self, x: Any, positions: Any, frequencies: Sequence[float], /, *, factor: float = 1.0, interleaved: bool = False
    ) -> Any:
        """``positions``: an int, where the first row stands, or integers; ``frequencies``: one for each pair that turns,
        which base, rotary_dim and scaling have become; cosine and sine are multiplied by ``factor``."""
        ...

    def multi_head_attention(
        self, query: Any, key: Any, value: Any, params: dict[str, Any], *, num_heads: int, num_kv_heads: int,
        cache: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        """``params`` holds no None. A sink comes among them or among the options. With a cache, the last result is what
        ``cache.extend`` gave."""
        ...

    def multi_head_attention_grad(
        self, query: Any, key: Any, value: Any, params: dict[str, Any], grad_output: Any, *, wrt: Sequence[str] = ...,
        **options: Any,
    ) -> tuple[Any, ...]: ...  # fmt: skip

    def self_attention(self, x: Any, W_q: Any, W_k: Any, W_v: Any, **options: Any) -> Any: ...

    def write(self, buffer: Any, x: Any, at: Any, /) -> Any:
        """``buffer``, which may be used up, with x in the places at, at + 1, ... of axis -2; longer if it holds them not."""
        ...

    def dot_score(self, query: Any, key: Any, /) -> Any: ...
    def scaled_dot_score(self, query: Any, key: Any, /) -> Any: ...
    def additive_score(self, query: Any, key: Any, /, W_q: Any, W_k: Any, w_v: Any, b: Any = None) -> Any: ...
    def multiplicative_score(self, query: Any, key: Any, /, W: Any) -> Any: ...
    def gated_score(self, query: Any, key: Any, /, w_g: Any) -> Any: ...
    def cosine_score(self, query: Any, key: Any, /) -> Any: ...
    def distance_score(self, query: Any, key: Any, /) -> Any: ...
    def gaussian_kernel(self, query: Any, key: Any, /, width: float = 1.0) -> Any: ...
    def boxcar_kernel(self, query: Any, key: Any, /, width: float = 1.0) -> Any: ...
    def triangular_kernel(self, query: Any, key: Any, /, width: float = 1.0) -> Any: ...
    def epanechnikov_kernel(self, query: Any, key: Any, /, width: float = 1.0) -> Any: ...
    def constant_kernel(self, query: Any, key: Any, /, width: float = 1.0) -> Any: ...
    def softmax(self, scores: Any, /, where: Any = None) -> Any: ...
    def masked_softmax(self, scores: Any, /, valid_lens: Any = None, where: Any = None) -> Any: ...
    def sparsemax(self, scores: Any, /, where: Any = None) -> Any: ...
    def hardmax(self, scores: Any, /, where: Any = None) -> Any: ...
    def proportional(self, scores: Any, /, where: Any = None) -> Any: ...
    def average(self, scores: Any, /, where: Any = None) -> Any: ...
    def identity(self, scores: Any, /, where: Any = None) -> Any: ...


class Tab(Backend, Devices, Seen, Functions, Protocol):
    """A backend that offers everything, as kvattn's own do."""
