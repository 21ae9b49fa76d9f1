"""The keys and values of earlier decoding steps."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvattn import checks, conversion, dispatch, registry

Array = Any


class KVCache(NamedTuple):
    """Keys (..., capacity, d) and values (..., capacity, v), of which the first ``length`` are filled.

    ``KVCache()`` is empty and grows by what `extend` adds. `allocate` sets room aside: no copy a step, and one compiled
    program for all steps, since no shape changes. A tuple of arrays: it passes through jax.jit, tf.function and torch.compile.

    >>> cache = KVCache().extend([[1.0]], [[2.0]]).extend([[3.0]], [[4.0]])
    >>> cache.length, cache.seen()[1]
    (2, array([[2.],
           [4.]]))
    """

    key: Array = None
    value: Array = None
    length: Any = 0

    @classmethod
    def allocate(
        cls, shape: tuple[int, ...], v: int | None = None, *, dtype: str = "float32", like: Array = None, backend: Any = None
    ) -> KVCache:
        """An empty cache with room for keys of ``shape`` (..., capacity, d) and values (..., capacity, v); v: d by default.

        It lies on the device of ``like``, an array, or where the backend puts new arrays; room in NumPy is filled by any.

        >>> KVCache.allocate((2, 8, 100, 16)).key.shape
        (2, 8, 100, 16)
        """
        import numpy as np

        tab = dispatch.choose(backend, like=like)
        shapes = (shape, (*shape[:-1], shape[-1] if v is None else v))
        key, value = (tab.asarray(np.zeros(x, "float32"), dtype=dtype, like=like) for x in shapes)
        return cls(key, value, 0)

    def extend(self, key: Array, value: Array, *, backend: Any = None) -> KVCache:
        """The cache with (..., n, d) keys and (..., n, v) values added; this one is used up: its arrays may be reused.

        Raises ValueError for shapes that do not continue the cache, TypeError for another dtype. Where ``length`` is a
        traced array, running past the capacity cannot be noticed: allocate enough.
        """
        tab = dispatch.choose(backend, cache=self.key, key=key, value=value)
        key, value = conversion.array(tab, "key", key, self.key), conversion.array(tab, "value", value, self.value)
        if self.key is None:
            *lead, n, _ = checks.shape("key", key, 2)
            conversion.floating("key", key)
            value = conversion.floating("value", value, ("key", key), tab)
            checks.same_shape("value", value, (*lead, n, checks.shape("value", value, 2)[-1]), "the keys need")
            return KVCache(key, value, _known(key.shape[-2]))
        key = conversion.floating("key", key, ("the cache", self.key), tab)
        value = conversion.floating("value", value, ("the cache", self.value), tab)
        for name, x, old in (("key", key, self.key), ("value", value, self.value)):
            checks.same_shape(name, x, (*tuple(old.shape)[:-2], key.shape[-2], old.shape[-1]), "the cache continues")
        length = self.length + _known(key.shape[-2])
        write = registry.offered(tab, "write")
        # room that NumPy set aside is filled by any framework
        old_key, old_value = (x if tab.is_array(x) else tab.asarray(x, like=key) for x in (self.key, self.value))
        return KVCache(write(old_key, key, self.length), write(old_value, value, self.length), length)

    def seen(self) -> tuple[Array, Array]:
        """The filled keys and values; where ``length`` is traced, all: ``causal`` with ``query_offset`` hides the rest."""
        if not conversion.is_integer(self.length) or self.key is None or self.length == self.key.shape[-2]:
            return self.key, self.value
        return self.key[..., : self.length, :], self.value[..., : self.length, :]


def _known(n: Any) -> Any:
    """How many keys a step adds, by its shape: a number, or where a program is recorded what stands for one."""
    if n is None:
        raise ValueError("key has an axis -2 of unknown size; a cache counts its keys: give the step a size (tf.ensure_shape)")
    return n
