"""Attention on Symbols, which hybridized gluon blocks are traced with: one operator whose shapes come later.

A Symbol has no shape and no values, so the call is kept until the graph runs, and then made on the arrays. Its checks are
made twice before: what needs no shape when the block is traced, all when its operator is created, on shapes and dtypes alone.
Operators take their arguments as text: a call of kvattn's own functions is written out, so that an exported graph runs in
another process too.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import partial
from itertools import count
from threading import local
from weakref import WeakValueDictionary

import numpy

from kvattn import planning, prepare, registry
from kvattn.old_numpy import old_names
from kvattn.pairs import Pairs

with old_names():
    import mxnet as mx
    from mxnet.ndarray.ndarray import _DTYPE_MX_TO_NP as DTYPES  # private, as read in MXNet 1.9.1, like the next
    from mxnet.symbol.numpy import _Symbol as NumpySymbol

OPERATOR = "kvattn_attention"
ARRAYS = {"mask": (), "valid_lens": (None,), "query_offset": (), "positions": (None, None)}  # and shapes that always fit
callable_by_name = {}  # what a call may name besides the functions of kvattn.api
_calls = WeakValueDictionary()  # calls that text cannot hold: a number stands for each, while its graph lives
_numbers = count()
_failed = local()


def deferred(x):
    """Whether ``x`` is a Symbol."""
    return isinstance(x, mx.sym.Symbol)


def defer(function, query, key, value, **options):
    """The Symbol, or the tuple of Symbols, of ``function`` on Symbols; options may hold Symbols and so may a partial score.

    Raises at once what the call itself would raise whatever the Symbols' shapes and dtypes are.
    """
    refuse_seed(options.get("rng"))
    score, keywords = options.get("score"), {}
    if isinstance(score, partial):
        options["score"], keywords = score.func, score.keywords
    inputs = {"query": query, "key": key, "value": value}
    for name, x in inputs.items():
        if not deferred(x):
            raise TypeError(f"query is a Symbol, but {name} is of class {type(x).__name__}: a graph takes Symbols")
    inputs |= {name: x for name, x in options.items() if deferred(x)}
    parameters = {name: x for name, x in keywords.items() if deferred(x)}
    call = _Deferred(
        function, [*inputs, *parameters], len(inputs), {name: x for name, x in options.items() if name not in inputs},
        {name: x for name, x in keywords.items() if name not in parameters},
    )  # fmt: skip
    call.check()
    symbols = {name: x.as_nd_ndarray() for name, x in {**inputs, **parameters}.items()}
    node = mx.sym.Custom(op_type=OPERATOR, call=call.text(), **symbols)
    outputs = [node[i].as_np_ndarray() if isinstance(query, NumpySymbol) else node[i] for i in range(len(call.outputs()))]
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def refuse_seed(rng):
    """Raises ValueError for what a graph would draw from."""
    if rng is not None:
        raise ValueError("rng in a graph would drop the same at every run: give it to a call that runs at once, not hybridized")


class _Deferred:
    """A call of ``function``: the names of the arrays to come, the first ``own`` of them its own and the rest its score's,
    and the options and the score's keywords that it has already."""

    def __init__(self, function, names, own, options, keywords):
        self.function, self.names, self.own, self.options, self.keywords = function, names, own, options, keywords

    def __call__(self, arrays, **more):
        given = dict(zip(self.names[: self.own], arrays, strict=False))
        keywords = {**self.keywords, **dict(zip(self.names[self.own :], arrays[self.own :], strict=True))}
        options = {**self.options, "score": partial(self.options["score"], **keywords)} if keywords else self.options
        return self.function(**given, **options, **more)

    def check(self):
        """Raises what the call raises whatever the shapes and dtypes of the arrays to come are."""
        options = {name: x for name, x in self.options.items() if name not in ("bias", "segments", *ARRAYS)}
        if hasattr(options.get("sink"), "shape"):  # what it broadcasts to are axes to come
            options.pop("sink")
        arrays = {name: self.options[name] for name in ARRAYS if hasattr(self.options.get(name), "dtype")}
        arrays = {name: _ShapeAndDtype(ARRAYS[name], x.dtype) for name, x in arrays.items()}
        if self.own < len(self.names) or self.keywords:
            options.pop("score")
        self.function(*[_ShapeAndDtype((None, None, None), "float32")] * 3, **options, **arrays, backend=_ChecksAlone())

    def outputs(self):
        flags = (("weights", "return_weights"), ("lse", "return_lse"), ("scores", "return_scores"))
        return ["output", *(name for name, flag in flags if self.options.get(flag))]

    def text(self):
        """The call as JSON; a number where it holds what is none."""

        def name(x):
            if _named(getattr(x, "__name__", None)) is not x:
                raise TypeError
            return {"kvattn": x.__name__}

        try:
            return json.dumps([self.function, self.names, self.own, self.options, self.keywords], default=name)
        except TypeError:
            number = next(_numbers)
            _calls[number] = self
            return str(number)

    @staticmethod
    def read(text):
        def function(x):
            if "kvattn" in x and _named(x["kvattn"]) is None:
                raise ValueError(f"this graph attends with {x['kvattn']}: import kvattn.mxnet first")
            return _named(x["kvattn"]) if "kvattn" in x else x

        call = json.loads(text, object_hook=function)
        if isinstance(call, list):
            return _Deferred(*call)
        if call not in _calls:
            raise ValueError("this graph attends with a function or an array of the process that made it")
        return _calls[call]


def _named(name):
    """The function of this name that a call may name, or None."""
    return callable_by_name.get(name) or prepare.public.get(name)


class _ShapeAndDtype:
    """What is known of an array: its shape, with None for a size to come, and its dtype."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype, self.ctx = shape, dtype, mx.cpu()


class _ChecksAlone:
    """The tab as a backend whose attention computes nothing: the checks alone, of what functions of positions give too."""

    def __init__(self):
        self._tab = registry.load("mxnet")

    def __getattr__(self, name):
        return getattr(self._tab, name)

    def is_array(self, x):
        return isinstance(x, _ShapeAndDtype) or self._tab.is_array(x)

    def asarray(self, x, dtype=None, like=None):
        return _ShapeAndDtype(x.shape, dtype or x.dtype) if isinstance(x, _ShapeAndDtype) else self._tab.asarray(x, dtype)

    def peek(self, x):
        return None if isinstance(x, _ShapeAndDtype) else self._tab.peek(x)

    def attention(self, query, key, value, mask=None, query_offset=0, **_):
        if type(mask) is Pairs and type(query_offset) is int and query.shape[-2] is not None:
            full = (*planning.lead(query.shape, key.shape), query.shape[-2], key.shape[-2])
            mask._replace(mask=None, segments=None).arrays(query, key, full, query_offset)


class Attention(mx.operator.CustomOp):
    def __init__(self, call):
        super().__init__()
        self.call, self.graph = call, None

    def _run(self, arrays):
        results = self.call(arrays)
        return list(results) if isinstance(results, tuple) else [results]

    def _record(self, in_data, train):
        leaves = _copies(in_data)
        for leaf in leaves:
            if leaf.dtype.kind == "f":
                leaf.attach_grad()
        with mx.autograd.record(train_mode=train):
            return leaves, self._run(leaves)

    @mx.util.use_np_shape  # operators run in threads of MXNet's own, where zeros in a shape are sizes to come
    def forward(self, is_train, req, in_data, out_data, aux):
        drops = self.call.options.get("dropout") or (is_train and self.call.options.get("rate"))
        self.graph = self._record(in_data, bool(is_train)) if drops else None  # backward must drop the same weights
        for i, x in enumerate(self.graph[1] if drops else self._run(_copies(in_data))):
            put(self, out_data[i], req[i], x)

    @mx.util.use_np_shape
    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        if self.graph == ():
            raise RuntimeError("the weights that forward dropped were forgotten after the first backward")
        leaves, results = self.graph or self._record(in_data, False)
        self.graph = self.graph and ()  # Python finds this operator, garbage in a cycle, only later
        mx.autograd.backward(results, head_grads=[x.as_np_ndarray() for x in out_grad])
        for i, leaf in enumerate(leaves):
            put(self, in_grad[i], req[i], mx.np.zeros_like(leaf) if leaf.grad is None else leaf.grad)


def put(operator, target, req, x):
    """An operator's assign: which of MXNet's two arrays it is given depends on when it was registered."""
    operator.assign(target, req, x if isinstance(target, mx.np.ndarray) else x.as_nd_ndarray())


def _copies(arrays):
    """Copies: what is kept of a call outlives the memory that a graph lends it."""
    return [x.as_np_ndarray().copy() for x in arrays]


@mx.operator.register(OPERATOR)
class AttentionShapes(mx.operator.CustomOpProp):
    def __init__(self, call):
        super().__init__(need_top_grad=True)
        self.call = _Deferred.read(call)

    def list_arguments(self):
        return [*self.call.names]

    def list_outputs(self):
        return self.call.outputs()

    def infer_shape(self, in_shape):
        """Of shapes that do not fit, a guess: create_operator refuses them, and can do so at every run."""
        names, own = self.call.names, self.call.own
        shapes = dict(zip(names[:own], map(tuple, in_shape), strict=False))
        query, key, value = (shapes[name] for name in ("query", "key", "value"))
        lead = planning.lead(query, key) if len(query) == len(key) else query[:-2]
        rows = (*lead, *query[-2:-1])
        selected = self.call.options.get("positions")
        keys = numpy.shape(selected) if selected is not None else shapes.get("positions", key[:-1])
        found = {"output": (*rows, *value[-1:]), "weights": (*rows, *keys[-1:]), "lse": rows, "scores": (*rows, *keys[-1:])}
        d_q, d_k = query[-1], key[-1]
        sizes = {"W_q": (d_q,), "W_k": (d_k,), "W": (d_q, d_k), "w_g": (d_q + d_k,)}  # for gluon, which asks the graph
        known = [sizes.get(name, ()) for name in names[own:]]
        parameters = [(*size, *shape[len(size) :]) for size, shape in zip(known, in_shape[own:], strict=True)]
        return [*in_shape[:own], *parameters], [found[name] for name in self.list_outputs()], []

    def infer_type(self, in_type):
        half = getattr(in_type[0], "__name__", "") == "float16"
        wide = ("lse", "scores") if half else ()
        return in_type, [numpy.float32 if name in wide else in_type[0] for name in self.list_outputs()], []

    def create_operator(self, ctx, shapes, dtypes):
        arrays = [_ShapeAndDtype(tuple(shape), numpy.dtype(DTYPES[dtype])) for shape, dtype in zip(shapes, dtypes, strict=True)]
        with keeping_the_error():
            self.call(arrays, backend=_ChecksAlone())
        return Attention(self.call)


@contextmanager
def keeping_the_error():
    """Keeps what is raised in the block, while an operator is created: MXNet only prints it."""
    try:
        yield
    except Exception as error:
        _failed.error = error
        raise


@mx.error.register("MXNetError")
def _error(message):
    """MXNet's error; where it is that our operator could not be created, the reason, which MXNet has only printed."""
    error, _failed.error = getattr(_failed, "error", None), None
    return error if error is not None and "kCustomOpPropCreateOperator" in message else mx.base.MXNetError(message)
