"""Attention on Symbols, which hybridized gluon blocks are traced with: one operator whose shapes come later.

A Symbol has no shape and no values, so the call is kept until the graph runs, and then made on the arrays.
"""

from __future__ import annotations

from functools import partial

from kvattn import bands
from kvattn.lend import lend

with lend():
    import mxnet as mx

OPERATOR = "kvattn_attention"
_calls = []  # operators take their arguments as text: the index of a call here stands for it


def deferred(x):
    """Whether ``x`` is a Symbol."""
    return isinstance(x, mx.sym.Symbol)


def defer(function, query, key, value, **options):
    """The Symbol, or the tuple of Symbols, of ``function`` on Symbols; options may hold Symbols and so may a partial score."""
    score = options.get("score")
    inputs = {"query": query, "key": key, "value": value}
    inputs |= {name: x for name, x in options.items() if deferred(x)}
    bound = {name: x for name, x in getattr(score, "keywords", {}).items() if deferred(x)}
    fixed = {name: x for name, x in options.items() if name not in inputs}
    _calls.append((function, (*inputs, *bound), len(inputs), fixed))
    node = mx.sym.Custom(op_type=OPERATOR, call=str(len(_calls) - 1), **inputs, **bound)
    many = 1 + options["return_weights"] + options["return_lse"]
    return tuple(node[i] for i in range(many)) if many > 1 else node


class Attention(mx.operator.CustomOp):
    def __init__(self, call):
        super().__init__()
        self.function, self.names, self.own, self.fixed = _calls[call]

    def _run(self, arrays):
        given = dict(zip(self.names[: self.own], arrays, strict=False))
        bound = dict(zip(self.names[self.own :], arrays[self.own :], strict=True))
        fixed = dict(self.fixed)
        if bound:
            fixed["score"] = partial(fixed["score"].func, **{**fixed["score"].keywords, **bound})
        results = self.function(**given, **fixed)
        return [x.as_nd_ndarray() for x in (results if isinstance(results, tuple) else (results,))]

    def forward(self, is_train, req, in_data, out_data, aux):
        for i, x in enumerate(self._run(in_data)):
            self.assign(out_data[i], req[i], x)

    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        leaves = [x.copy() for x in in_data]
        for leaf in leaves:
            leaf.attach_grad()
        with mx.autograd.record():
            results = self._run(leaves)
        mx.autograd.backward(results, head_grads=list(out_grad))
        for i, leaf in enumerate(leaves):
            self.assign(in_grad[i], req[i], leaf.grad)


@mx.operator.register(OPERATOR)
class AttentionShapes(mx.operator.CustomOpProp):
    def __init__(self, call):
        super().__init__(need_top_grad=True)
        self.call = int(call)
        _, self.names, _, self.fixed = _calls[self.call]

    def list_arguments(self):
        return [*self.names]

    def list_outputs(self):
        return ["output", *["weights"] * self.fixed["return_weights"], *["lse"] * self.fixed["return_lse"]]

    def infer_shape(self, in_shape):
        shapes = dict(zip(self.names, in_shape, strict=True))
        rows = (*bands.lead(shapes["query"], shapes["key"]), shapes["query"][-2])
        selected = shapes.get("positions") or getattr(self.fixed["positions"], "shape", shapes["key"][:-1])
        found = {"output": (*rows, shapes["value"][-1]), "weights": (*rows, selected[-1]), "lse": rows}
        return in_shape, [found[name] for name in self.list_outputs()], []

    def infer_type(self, in_type):
        half = in_type[0].__name__ == "float16"
        return in_type, [mx.base.np.float32 if half and name == "lse" else in_type[0] for name in self.list_outputs()], []

    def create_operator(self, ctx, shapes, dtypes):
        return Attention(self.call)
