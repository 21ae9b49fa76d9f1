"""What a backend is: a module, or any object, with these functions.

The tabs beside this file are kvattn's own five. A stranger's is named by an entry point in the group
``kvattn.backends``; ``is_array``, ``asarray``, ``to_numpy`` and ``attention`` are required, every other function is
offered by having it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from kvattn.call import Call


class Backend(Protocol):
    """One framework's implementation of :mod:`kvattn.api`; the promises are written there."""

    def is_array(self, x: Any, /) -> bool:
        """Whether ``x`` is this framework's own array, traced ones included."""
        ...

    def asarray(self, x: Any, /, dtype: str | None = None, like: Any = None) -> Any:
        """``x`` as this framework's array, on the device of ``like``."""
        ...

    def to_numpy(self, x: Any, /) -> Any:
        """``x`` as a NumPy array; bfloat16 comes as float32, which holds it exactly."""
        ...

    def devices(self) -> dict[str, str]:
        """What `on` takes, and what it is: {"cpu": "cpu", "cuda:0": "NVIDIA H100"}. Optional, as `on` is."""
        ...

    def on(self, device: str, /) -> AbstractContextManager[Any]:
        """A context for arrays and calls on a device; its value, if not None, is what ``asarray`` takes as ``like``."""
        ...

    def peek(self, x: Any, /) -> Any:
        """``x`` as a NumPy array if that costs no wait and no trace, else None."""
        ...

    def signed(self, x: Any, /) -> Any:
        """Unsigned integers as int32, those beyond 2^30 as that. Optional: asked where `peek` does not show the values."""
        ...

    def tracing(self) -> bool:
        """Whether a graph is being recorded in which sizes may be unknown. Optional."""
        ...

    def converts(self, x: Any, y: Any, /) -> bool:
        """Whether the framework itself converts floating arrays of these two dtypes here (torch.autocast). Optional."""
        ...

    def choose(self, query: Any, key: Any, value: Any, call: Call, /) -> tuple[Any, ...]:
        """(name, why, ...) of the kernel that serves a call: `kvattn.call.Choice`, or the two alone. Optional."""
        ...

    def attention(self, query: Any, key: Any, value: Any, /, **keywords: Any) -> Any:
        """:func:`kvattn.attention` on arguments that the frontend has checked."""
        ...

    def __getattr__(self, name: str, /) -> Any:
        """Every other function of the specification that this backend offers; `rotary` is given frequencies, see its tabs."""
        ...
