"""What type checkers see of a call of PyTorch's and NumPy's layers: bases that are not there when a program runs."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from kvattn.signatures import A, LayerOptions


class Options(LayerOptions, total=False):
    training: bool | None  # of NumPy's layers, as record
    record: bool | None


class Attends:
    """An array of the queries' type; a tuple where return_weights or return_lse ask for more."""

    @overload
    def __call__(
        self, queries: A, keys: Any, values: Any, valid_lens: Any = None, *, return_weights: Literal[False] = False,
        return_lse: Literal[False] = False, cache: None = None, **options: Unpack[Options],
    ) -> A: ...  # fmt: skip
    @overload
    def __call__(
        self, queries: A, keys: Any, values: Any, valid_lens: Any = None, *, return_weights: Literal[True],
        return_lse: Literal[False] = False, cache: None = None, **options: Unpack[Options],
    ) -> tuple[A, A]: ...  # fmt: skip
    @overload
    def __call__(
        self, queries: A, keys: Any, values: Any, valid_lens: Any = None, *, return_weights: Literal[False] = False,
        return_lse: Literal[True], cache: None = None, **options: Unpack[Options],
    ) -> tuple[A, A]: ...  # fmt: skip
    @overload
    def __call__(
        self, queries: A, keys: Any, values: Any, valid_lens: Any = None, *, return_weights: Literal[True],
        return_lse: Literal[True], cache: None = None, **options: Unpack[Options],
    ) -> tuple[A, A, A]: ...  # fmt: skip
    @overload
    def __call__(self, *args: Any, **options: Any) -> Any: ...
    def __call__(self, *args: Any, **options: Any) -> Any: ...


class Encodes:
    """An array of the input's type; with a cache, a tuple."""

    @overload
    def __call__(self, X: A, valid_lens: Any = None, *, cache: None = None, **options: Unpack[Options]) -> A: ...
    @overload
    def __call__(self, *args: Any, **options: Any) -> Any: ...
    def __call__(self, *args: Any, **options: Any) -> Any: ...


class Changes:
    """An array of the input's type."""

    @overload
    def __call__(self, X: A, *args: Any, **options: Any) -> A: ...
    @overload
    def __call__(self, *args: Any, **options: Any) -> Any: ...
    def __call__(self, *args: Any, **options: Any) -> Any: ...
