"""What the NumPy layers are made of: a layer with its vector-Jacobian product, and dense layers, dropout, norm, embedding.

NumPy has no autodiff: every layer derives its own gradients, and one made of layers asks its parts in reverse order.
"""

# mypy: ignore-errors

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextvars import ContextVar
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvattn import checks, conversion, dispatch, layers
from kvattn.backends import numpy as tab
from kvattn.kernels.numpy.gradients import sum_to


class _Mode(NamedTuple):
    training: bool  # dropout drops
    record: bool  # what backward needs is kept


_mode: ContextVar[_Mode | None] = ContextVar("kvattn_mode", default=None)  # of the layer's call that runs


class _State:
    """What a layer holds beside its own attributes."""

    def __init__(self) -> None:
        self.declared, self.arrays, self.grads = {}, {}, {}  # by the weight's own key: (shape, seed, name); values; gradients
        self.calls, self.kept = [], ()  # the recorded calls, and what the present one keeps


class Layer:
    """A layer, or a model of layers: those among its attributes, in lists and dicts too, are its parts.

    A subclass has ``forward(*inputs, **options)`` and ``vjp(grad_output, *kept)``: the gradients by the floating-point
    inputs, one or a tuple, where ``kept`` is what forward gave to `keep`. One that is called several times in a model keeps
    each call and adds its gradients up. Weights of its own: `parameter` declares, `weight` gives, `gradient` adds to theirs.

    ``layer(*inputs, training=True)`` drops by dropout and keeps what one `backward` needs; ``record=True`` keeps it without
    dropout. Other calls keep only what ``attention_weights`` shows. Parts take both from the call around them.

    The first call makes the weights: float64 where its inputs are, else float32. A call computes in the dtype of its inputs,
    half precision in float32, and its results have that dtype. Kept arrays are no copies: do not write to them in between.

    >>> class Model(Layer):
    ...     def __init__(self):
    ...         self.hidden, self.head = Dense(4, seed=0), Dense(2, seed=1)
    ...
    ...     def forward(self, X):
    ...         H = np.tanh(self.hidden(X))
    ...         self.keep(H)
    ...         return self.head(H)
    ...
    ...     def vjp(self, grad, H):
    ...         return self.hidden.backward(self.head.backward(grad) * (1 - H * H))
    >>> model = Model()
    >>> model.backward(np.ones_like(model(np.ones((3, 5)), training=True))).shape
    (3, 5)
    >>> sorted(model.grads)
    ['head.W', 'head.b', 'hidden.W', 'hidden.b']
    """

    _inputs, _takes_training = [], False  # forward's positional inputs, and whether it takes ``training``
    _results = 1  # that forward returns in the dtype of its inputs
    kind = None  # by which layers.names calls its weights: dense, norm, embedding, or None: as their keys

    @cached_property
    def _state(self) -> _State:
        return _State()  # when it is asked for, so that a model need not call super().__init__()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        taken = list(inspect.signature(cls.forward).parameters.values())[1:]
        cls._inputs = [x.name for x in taken if x.kind is x.POSITIONAL_OR_KEYWORD and x.name != "training"]
        cls._takes_training = any(x.name == "training" for x in taken)

    if TYPE_CHECKING:  # a subclass takes what it likes
        forward: Callable[..., Any]
        vjp: Callable[..., Any]
    else:

        def forward(self, *inputs, **options):
            raise NotImplementedError(f"{type(self).__name__} has no forward")

        def vjp(self, grad_output, *kept):
            raise NotImplementedError(f"{type(self).__name__} has no vjp, so no gradients")

    def __call__(self, *inputs: Any, training: bool | None = None, record: bool | None = None, **options: Any) -> Any:
        mode, state = _mode.get(), self._state
        outer = mode
        if outer is None or training is not None or record is not None:
            if training is None:
                training = outer is not None and outer.training
            if record is None:
                record = training if outer is None else outer.record
            mode = _Mode(checks.flag("training", training), checks.flag("record", record))
        if not mode.record:
            state.calls.clear()
        elif outer is None:
            for _, part in parts(self):
                part._state.calls, part._state.grads = [], {}

        inputs, options, floats = self._arguments([*inputs], options)
        half = floats[0] if floats and floats[0].itemsize == 2 else None
        if self._takes_training:
            options["training"] = mode.training
        state.kept, token = (), None if mode is outer else _mode.set(mode)
        try:
            results = self.forward(*inputs, **options)
        finally:
            if token is not None:
                _mode.reset(token)
        if half is not None:
            results = _halved(results, half, self._results + bool(options.get("return_weights")))
        if mode.record:
            output = results[0] if type(results) is tuple else results
            state.calls.append((state.kept, floats, (output.dtype, output.shape)))
        state.kept = ()
        return results

    def _arguments(self, inputs, options):
        """The inputs and options as forward takes them, half precision in float32, and the dtypes of the floating inputs."""
        for name in self._inputs[len(inputs) :]:
            if name not in options:
                break
            inputs.append(options.pop(name))
        if (plain := _dtypes_of_plain(inputs)) and not any(map(_floats, options.values())):
            return inputs, options, plain
        like = next((x for x in inputs if _floats(x)), None)
        names = [*self._inputs, *(f"input {i}" for i in range(len(self._inputs), len(inputs)))]
        named = {name: _array(name, x, like) for name, x in zip(names, inputs, strict=False)}
        floats = {name: x for name, x in named.items() if _floats(x)}
        first = next(iter(floats.items()), None)
        for name, x in floats.items():
            if x.dtype is not first[1].dtype:
                conversion.floating(name, x, first)
        for name, x in options.items():
            if _floats(x):
                conversion.floating(name, x, first)
                options[name] = tab._wide(x)
        return [tab._wide(x) if _floats(x) else x for x in named.values()], options, [x.dtype for x in floats.values()]

    def backward(self, grad_output: Any) -> Any:
        """The gradients of sum(grad_output * output) by the floating-point inputs of the last recorded call: an array, or a
        tuple of as many as there were, each in its input's dtype. Those by the weights go to `grads`.

        Raises RuntimeError without such a call: one call serves one backward. ValueError and TypeError unless grad_output
        has the shape and dtype of the output.
        """
        if not self._state.calls:
            raise RuntimeError(
                f"{type(self).__name__} kept nothing for backward: call it first with training=True "
                "(or record=True, without dropout), once for each backward"
            )
        kept, dtypes, (dtype, shape) = self._state.calls[-1]
        if not (type(grad_output) is np.ndarray and grad_output.dtype is dtype and grad_output.shape == shape):
            output = np.broadcast_to(np.zeros((), dtype), shape)
            grad_output = conversion.array(tab, "grad_output", grad_output, output)
            conversion.floating("grad_output", grad_output, ("the output", output))
            checks.same_shape("grad_output", grad_output, shape, "the output")
        self._state.calls.pop()
        grads = self.vjp(tab._wide(grad_output), *kept)
        several = type(grads) is tuple
        grads = grads if several else (grads,)
        if len(grads) != len(dtypes):
            raise TypeError(f"{type(self).__name__}.vjp gave {len(grads)} gradients for {len(dtypes)} floating-point inputs")
        grads = tuple(x if x is None else x.astype(dtype, copy=False) for x, dtype in zip(grads, dtypes, strict=True))
        return grads if several else grads[0]

    @property
    def training(self) -> bool:
        """Whether the call that runs is one in training."""
        mode = _mode.get()
        return mode is not None and mode.training

    @property
    def recording(self) -> bool:
        """Whether what `keep` is given by the call that runs is kept."""
        mode = _mode.get()
        return mode is not None and mode.record

    def keep(self, *values: Any) -> None:
        """What `vjp` will be given, if this call is recorded."""
        self._state.kept = values

    def weights(self) -> dict[str, Any]:
        """{name: array} of every weight that is made: the arrays themselves, which an optimiser may write into."""
        return {name: layers.own(name, part._state.arrays[key]) for name, part, key in slots(self) if key in part._state.arrays}

    @property
    def grads(self) -> dict[str, Any]:
        """{name: gradient} of the weights, in their shapes and dtypes, from the last call in training and its backward."""
        return {name: layers.own(name, part._state.grads[key]) for name, part, key in slots(self) if key in part._state.grads}

    def parameter(self, key: str, shape: Any, *, seed: Any = None, name: str | None = None) -> None:
        """Declare a weight: None in its shape waits for the first call; drawn as layers.initial draws what has this name."""
        self._state.declared[key] = (tuple(shape), seed, name or key)

    def weight(self, key: str, shape: Any, dtype: Any = None) -> Any:
        """A declared weight, made by the first call, in this dtype (None: its own). Raises ValueError for another shape."""
        declared, seed, name = self._state.declared[key]
        if key not in self._state.arrays:
            if not len(declared) == len(shape) or any(a not in (None, b) for a, b in zip(declared, shape, strict=True)):
                raise ValueError(f"{type(self).__name__}'s {name} was declared {declared}; these inputs need {tuple(shape)}")
            self._state.arrays[key] = layers.initial(seed, name, tuple(shape)).astype(dtype or np.float32)
        array = self._state.arrays[key]
        if array.shape != tuple(shape):
            checks.same_shape(f"{type(self).__name__}'s {name}", array, tuple(shape), "these inputs need")
        return array if dtype is None else array.astype(dtype, copy=False)

    def gradient(self, key: str, grad: Any) -> None:
        """Add to the gradient by the weight ``key``."""
        grad = grad.astype(self._state.arrays[key].dtype, copy=False)
        self._state.grads[key] = self._state.grads[key] + grad if key in self._state.grads else grad


def _array(name, x, like):
    """A list of numbers as an array, the rest as it is. Raises TypeError for another framework's array."""
    if type(x) is np.ndarray or x is None:
        return x
    if hasattr(x, "dtype"):
        dispatch.choose("numpy", **{name: x})
    leaf = x
    while isinstance(leaf, list) and leaf:
        leaf = leaf[0]
    return conversion.array(tab, name, x, like) if isinstance(x, list) and isinstance(leaf, (int, float)) else x


def _dtypes_of_plain(inputs):
    """The dtypes of the floating inputs, where all inputs are NumPy's arrays or None and those of floats are of one dtype,
    single or double precision: what a layer gives its parts. Else None."""
    dtypes = []
    for x in inputs:
        if type(x) is np.ndarray:
            if x.dtype.char in "fd":
                dtypes.append(x.dtype)
            elif x.dtype.kind not in "biu":
                return None
        elif x is not None:
            return None
    return dtypes if dtypes and all(dtype is dtypes[0] for dtype in dtypes) else None


def _floats(x):
    return isinstance(x, np.ndarray) and (x.dtype.char in "fd" or conversion.dtype_name(x) in conversion.FLOATS)


def _halved(results, dtype, count):
    """The first ``count`` results in half precision: lse and caches stay as they are."""
    if type(results) is not tuple:
        return results.astype(dtype)
    return (*(x.astype(dtype) for x in results[:count]), *results[count:])


# ---- the parts that layers are made of


class Dense(Layer):
    """X W + b, with ``units`` features out.

    >>> Dense(2, seed=0)(np.ones((3, 4))).shape
    (3, 2)
    """

    kind = "dense"

    def __init__(self, units, bias=True, *, seed=None, rng=None, name="W") -> None:
        self.units, self.bias = units, bias
        self.parameter("weight", (None, units), seed=source(seed, rng), name=name)
        if bias:
            self.parameter("bias", (units,), name="b")

    def forward(self, X):
        conversion.floating("X", X)
        W = self.weight("weight", (X.shape[-1], self.units), X.dtype)
        self.keep(X, W)
        Y = _times(X, W)
        return Y + self.weight("bias", (self.units,), X.dtype) if self.bias else Y

    def vjp(self, grad, X, W):
        rows = _rows(grad)
        self.gradient("weight", _rows(X).T @ rows)
        if self.bias:
            self.gradient("bias", rows.sum(axis=0))
        return _times(grad, W.T)


def _rows(X):
    """(..., d) -> (rows, d)."""
    return X.reshape(math.prod(X.shape[:-1]), X.shape[-1])


def _times(X, W):
    """X @ W in one product: NumPy would make one of each batch entry, between which the threads of BLAS wait."""
    return (_rows(X) @ W).reshape(*X.shape[:-1], W.shape[-1])


class Dropout(Layer):
    """X with entries dropped at this rate in training, the others divided by 1 - rate."""

    def __init__(self, rate=0.0, *, rng=None) -> None:
        self.rate, self.rng = checks.probability("dropout", rate), np.random.default_rng(rng)

    def forward(self, X, *, rng=None):
        drops = self.training and self.rate
        kept = self.rng.random(X.shape) >= self.rate if drops and rng is None else None
        seed = rng if drops else None
        self.keep(kept, seed)
        return self._drop(X, kept, seed)

    def vjp(self, grad, kept, seed):
        return self._drop(grad, kept, seed)

    def _drop(self, X, kept, seed):
        if seed is not None:
            return layers.dropped(tab, X, self.rate, seed)
        return X if kept is None else np.where(kept, X / (1 - self.rate), 0).astype(X.dtype)


class LayerNorm(Layer):
    """(X - mean) / sqrt(variance + 1e-5) * gamma + beta, over the last axis, or the axes of ``norm_shape``."""

    kind = "norm"

    def __init__(self, norm_shape=None) -> None:
        sizes = (norm_shape,) if norm_shape is None or conversion.is_integer(norm_shape) else norm_shape
        if not isinstance(sizes, (tuple, list)) or not all(size is None or conversion.is_integer(size) for size in sizes):
            raise TypeError(f"norm_shape must be an int, a tuple of ints, or None, not {norm_shape!r}; dropout comes after it")
        self.axes = tuple(range(-len(sizes), 0))
        self.parameter("weight", sizes, name="gamma")
        self.parameter("bias", sizes, name="beta")

    def forward(self, X):
        conversion.floating("X", X)
        gamma, beta = (self.weight(key, X.shape[self.axes[0] :], X.dtype) for key in ("weight", "bias"))
        centred = X - self._mean(X)
        scale = 1 / np.sqrt(self._mean(centred * centred) + layers.EPSILON)
        unit = centred * scale
        self.keep(unit, scale, gamma)
        return unit * gamma + beta

    def vjp(self, grad, unit, scale, gamma):
        self.gradient("weight", sum_to(grad * unit, gamma.shape))
        self.gradient("bias", sum_to(grad, gamma.shape))
        grad = grad * gamma
        return (grad - self._mean(grad) - unit * self._mean(grad * unit)) * scale

    def _mean(self, X):
        return X.mean(axis=self.axes, keepdims=True)


class Embedding(Layer):
    """The rows of a (vocab_size, num_hiddens) matrix that integer tokens name. Raises ValueError for a token outside."""

    kind = "embedding"

    def __init__(self, vocab_size, num_hiddens, *, seed=None, rng=None) -> None:
        self.shape = (vocab_size, num_hiddens)
        self.parameter("weight", self.shape, seed=source(seed, rng), name="embedding")

    def forward(self, tokens):
        tokens = np.asarray(tokens)
        if tokens.dtype.kind not in "iu":
            raise TypeError(f"tokens have dtype {tokens.dtype}; expected an integer dtype")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.shape[0]:
            raise ValueError(f"tokens must lie in [0, {self.shape[0]}); got {tokens.min()} to {tokens.max()}")
        self.keep(tokens)
        return self.weight("weight", self.shape)[tokens]

    def vjp(self, grad, tokens):
        total = np.zeros(self.shape, grad.dtype)
        np.add.at(total, tokens, grad)
        self.gradient("weight", total)
        return ()


def source(seed, rng):
    """What first values are drawn from."""
    return np.random.default_rng(rng) if seed is None else seed


# ---- a layer's parts and their weights, by name


def parts(x, path=(), visited=None):
    """(path, layer) of a layer and of every layer in it, each once."""
    visited = set() if visited is None else visited
    if id(x) in visited:
        return
    visited.add(id(x))
    if isinstance(x, Layer):
        yield path, x
        x = vars(x)
    for name, part in x.items() if isinstance(x, dict) else enumerate(x):
        if isinstance(part, (Layer, dict, list, tuple)):
            yield from parts(part, (*path, str(name)), visited)


def slots(layer):
    """(name, part, key) of every declared weight."""
    for path, part in parts(layer):
        known = layers.names(path, part.kind) if part.kind else {}
        for key in part._state.declared:
            name = known[key] if key in known else layers.names((*path, key), "embedding")["weight"]
            yield name.lstrip(".") or "embedding", part, key
