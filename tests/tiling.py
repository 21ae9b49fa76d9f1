"""Calls that fast paths have to get right, each with the oracle's answer, and how to have a backend's own serve them.

Tiles of a few queries and blocks of a few keys put every edge within reach of small arrays.
"""

import math
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import ClassVar
from unittest.mock import patch

import numpy as np

import kvattn
from kvattn import conversion, planning
from kvattn.call import Call
from kvattn.conformance import oracle, tolerance
from kvattn.conformance.cases import LSE, attend, grid
from kvattn.kernels.numpy import gradients, threads, tiled, tiled_grad, tiles

INF, NAN = np.inf, np.nan
WRT = ("query", "key", "value")


# ---- calls


def _lengths(n, m):
    return (np.arange(n) * [[1], [2]] + [[0], [1]]) % (m + 2)  # no two rows alike


def _grid(low, high, *shape):
    return np.round(np.linspace(low, high, math.prod(shape)).reshape(shape) * 16) / 16


RESTRICTIONS = {
    "nothing": lambda n, m: {},
    "causal": lambda n, m: {"causal": True},
    "causal, from the end": lambda n, m: {"causal": True, "query_offset": m - n},
    "causal, before the start": lambda n, m: {"causal": True, "query_offset": -3},
    "causal, offset per batch": lambda n, m: {"causal": True, "query_offset": np.array([2, -1])},
    "causal, padded": lambda n, m: {"causal": True, "valid_lens": np.array([0, m - 1], "int8")},
    "causal, window, padded": lambda n, m: {"causal": True, "window": (1, None), "valid_lens": np.array([m // 2, m])},
    "window": lambda n, m: {"window": (1, 2)},
    "window, one side": lambda n, m: {"window": (None, 1), "query_offset": 1},
    "window, causal, offset per batch": lambda n, m: {"window": (3, 1), "causal": True, "query_offset": np.array([0, 4])},
    "window, past the end": lambda n, m: {"window": (1, 0), "query_offset": m + 2},
    "lengths": lambda n, m: {"valid_lens": np.array([m // 2, m])},
    "lengths of 0": lambda n, m: {"valid_lens": np.array([0, 1])},
    "lengths per query": lambda n, m: {"valid_lens": _lengths(n, m)},
    "lengths per query, window": lambda n, m: {"valid_lens": _lengths(n, m), "window": (2, 1)},
    "mask": lambda n, m: {"mask": np.arange(n * m).reshape(n, m) % 3 > 0},
    "mask of columns": lambda n, m: {"mask": np.arange(m) % 2 == 0},
    "mask of blocks": lambda n, m: {"mask": (np.arange(n)[:, None] // 4 + np.arange(m) // 3) % 2 == 0},
    "bias": lambda n, m: {"bias": _grid(-2, 2, n, m)},
    "bias -inf": lambda n, m: {"bias": np.where(np.arange(n * m).reshape(n, m) % 4 == 1, -INF, 0.5)},
    "bias far below 0, and -inf": lambda n, m: {
        "bias": np.array([-1024, -INF, -1280, -2048])[np.arange(n * m).reshape(n, m) % 4],
    },
    "window, with holes": lambda n, m: {
        "window": (1, 2), "query_offset": 2, "valid_lens": np.tile(np.where(np.arange(n) // 3 % 3 == 1, 0, m - 1), (2, 1)),
    },
    "softcap": lambda n, m: {"softcap": 0.7, "scale": 2.0},
    "softcap, causal": lambda n, m: {"softcap": 0.7, "scale": 2.0, "causal": True},
    "all": lambda n, m: {
        "mask": np.arange(n * m).reshape(n, m) % 5 > 0, "bias": _grid(-1, 1, m), "causal": True, "window": (4, None),
        "query_offset": 1, "valid_lens": np.array([m - 1, m]),
    },
    "all but a bias": lambda n, m: {
        "mask": np.arange(n * m).reshape(n, m) % 5 > 0, "causal": True, "window": (4, None), "query_offset": 1,
        "valid_lens": np.array([m - 1, m]), "scale": -0.5,
    },
}  # fmt: skip


def draw(seed=0, lead=(2,), n=9, m=7, d=3, v=2, kv=None, dtype=np.float64):
    """query, key, value and the gradient of the output, on no grid."""
    rng = np.random.default_rng(seed)
    shapes = (*lead, n, d), (*(kv or lead), m, d), (*(kv or lead), m, v), (*lead, n, v)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def call(which="nothing", n=9, m=7, seed=0, lead=(2,), kv=None, d=3, v=2, **more):
    """The case of that restriction and those shapes; ``more`` options beside the restriction's."""
    rng = np.random.default_rng(seed)
    arrays = grid(rng, *lead, n, d), grid(rng, *(kv or lead), m, d), grid(rng, *(kv or lead), m, v)
    return made(*arrays, seed=seed, **{**RESTRICTIONS[which](n, m), **more})


def made(query, key, value, seed=0, dtypes=tolerance.EPS, **options):
    """The case of these arrays, whose values ``dtypes`` hold exactly."""
    rng = np.random.default_rng(seed)
    return attend("a call", query, key, value, group="tiling", rng=rng, asked=LSE, dtypes=tuple(dtypes), **options)


cached = cache(call)  # where every option is hashable: several sizes, and backends, ask for the same


def with_arrays(case, **arrays):
    """``case`` with other arrays in its arguments' place."""
    return replace(case, arguments={**case.arguments, **arrays})


def allowed(case):
    """Which query may attend to which key, bool (*lead, n, m)."""
    which = {name: x for name, x in (case.arguments | case.keywords).items() if name in WHERE}
    lead, n, m, found = oracle.pairs(**which)
    allowed = np.zeros((*lead, n, m), bool)
    for _, at in found:
        allowed[at] = True
    return allowed


WHERE = ("query", "key", "mask", "bias", "valid_lens", "causal", "query_offset", "window")


def judge(case, dtype, found):
    """That every quantity is the oracle's, as near as tolerance.py allows, in the promised shape and dtype."""
    for what, x in found.items():
        name = what.removesuffix(" alone")
        want, due = case.answer[name], tolerance.result_dtype(case.call, name, dtype)
        assert tuple(x.shape) == want.shape, what
        assert conversion.dtype_name(x) == due, what
        near = tolerance.unit(due, case.magnitude[name]) * tolerance.allowed(name, due, case.largest_score)
        x = np.asarray(kvattn.to_numpy(x), np.float64)
        np.testing.assert_allclose(x, want, rtol=0, atol=near, err_msg=f"{what} in {dtype} of {case.keywords}")


# ---- NumPy's tiles, which MXNet's arrays are worked through in too

ALWAYS = {"TINY": 0, "SMALLEST": 0, "SMALLEST_ENTRY": 0}
SIZES = [  # of tiles and blocks
    {"ROWS": 4, "COLUMNS": 3, "LONGEST": 5, "CUT": 2},
    {"ROWS": 2, "COLUMNS": 1, "LONGEST": 3, "CUT": 1},
    {"ROWS": 3, "COLUMNS": 4, "LONGEST": 100, "CUT": 3},
]


@contextmanager
def in_tiles(sizes=SIZES[0], workers=2):
    """Every call that tiles can serve is served by small ones; names the passes that were."""
    served = []
    forward, backward = tiled.attention, tiled_grad.attention_grad

    def counted(function):
        return lambda *args, **options: served.append(function.__name__) or function(*args, **options)

    with (
        patch.multiple(tiles, **sizes), patch.multiple(tiled, **ALWAYS, attention=counted(forward)),
        patch.object(tiled_grad, "attention_grad", counted(backward)), patch.object(threads, "count", lambda: workers),
    ):  # fmt: skip
        yield served


@contextmanager
def all_at_once():
    with patch.multiple(tiled, SMALLEST=INF, SMALLEST_KEYS=INF):
        yield


# ---- subjects: how each backend is called, its path taken, and its taking it told


def functions(subject, arrays, options):
    """Every quantity, by kvattn's functions."""
    output, lse = kvattn.attention(*arrays[:3], **options, return_lse=True)
    alone = kvattn.attention(*arrays[:3], **options)
    grads = kvattn.attention_grad(*arrays, **options)
    return dict(zip(QUANTITIES, (output, lse, *grads), strict=True)) | {"output alone": alone}


def autograd(subject, arrays, options):
    """Every quantity, by one call and the framework's way back through it."""
    *inputs, grad_output = arrays
    results, grads = subject.vjp(partial(kvattn.attention, **options, return_lse=True), inputs, grad_output)
    return dict(zip(QUANTITIES, (*results, *grads), strict=True))


QUANTITIES = ("output", "lse", "grad_query", "grad_key", "grad_value")
MERGED = ("output", "grad_query", "grad_key", "grad_value")
ARRAYS = (*WRT, "grad_output")


class Subject:
    """A backend and its fast path: NumPy's, and what the others have in common with it.

    ``sizes``: constants of its kernels, each for calls of a few queries. ``ways`` to ask for every quantity. ``compiles``:
    what it compiles a program for, "kinds" of call or "shapes" too. ``kernel``: the path's name, as `explain` tells it.
    """

    sizes: ClassVar = {
        "4 by 3": {"sizes": SIZES[0], "workers": 2},
        "2 by 1": {"sizes": SIZES[1], "workers": 1},
        "3 by 4": {"sizes": SIZES[2], "workers": 3},
    }
    dtypes = ("float16", "float32")  # beside float64
    ways: ClassVar = {"functions": functions}
    compiles = ""
    kernel = "tiles"
    suites, thorough = 3, ("float64", "float32", "float16")  # sizes in which the conformance suite runs; dtypes, or None
    lacks = frozenset()  # its groups that the path has no part in

    def __init__(self, name):
        self.name, self.tab = name, kvattn.dispatch.load(name)

    @property
    def few(self):
        """The first of its sizes where each costs programs, else all."""
        return list(self.sizes.values())[: 1 if self.compiles else None]

    def forced(self, sizes):
        """Every call that the path can serve is served by it, in those sizes; names its passes in the list it yields."""
        return in_tiles(**sizes)

    def forget(self):
        """Have the next call compiled again, so that the path's part in it shows."""

    def array(self, x, dtype="float64"):
        return self.tab.asarray(x, dtype=dtype if x.dtype.kind == "f" else None)

    def laid(self, x, dtype="float64"):
        """``x`` in the backend's arrays, with the same strides where these have any."""
        return x if self.name == "numpy" else self.array(x, dtype)

    def passes(self, case):
        """The passes that are to serve a case: those of softmax of dot products, where there is something to compute."""
        names = ("score", "scaled_dot_score", "dot_score"), ("normalize", "softmax", "masked_softmax")
        usual = all(case.keywords.get(name, usual[0]) in usual for name, *usual in names)
        if not usual or case.call != "attention" or "positions" in case.arguments:
            return set()
        if case.keywords.get("dropout") and self.name not in ("numpy", "mxnet"):
            return set()
        if 0 in (*case.arguments["query"].shape, *case.arguments["key"].shape):
            return set()
        return {"attention"} if case.keywords.get("softcap") else {"attention", "attention_grad"}

    def found(self, case, dtype="float64", way=None, array=None):
        """Every quantity of a case, by name."""
        arrays = [(array or self.array)(case.arguments[name], dtype) for name in ARRAYS]
        options = {name: self.array(x, dtype) for name, x in case.arguments.items() if name not in ARRAYS}
        options |= {name: x for name, x in case.keywords.items() if not name.startswith("return_")}
        return self.run(way or next(iter(self.ways.values())), arrays, options)

    def run(self, way, arrays, options):
        return way(self, arrays, options)

    def merged(self, arrays, options):
        """The output merged with that of a key of zeros, whose value is zeros, and gradients: by hand, as NumPy takes both."""
        output, lse = kvattn.attention(*arrays[:3], **options, return_lse=True)
        share = np.exp(-np.logaddexp(0, -lse))
        by_lse = share * (1 - share) * (arrays[3] * output).sum(axis=-1)
        share = share[..., None]
        usual = {"score": self.tab.scaled_dot_score, "normalize": self.tab.softmax, "causal": False, "window": None}
        call = Call.of(*arrays[:2], **usual | {"query_offset": 0} | options)
        grads = gradients.attention_grad(self.tab, *arrays[:3], share * arrays[3], WRT, call, tiled_grad.Known(grad_lse=by_lse))
        return dict(zip(MERGED, (share * output, *grads), strict=True))


class Differentiating(Subject):
    """Of a framework that finds its own way back: vjp(function, inputs, grad of its first result) -> results, gradients."""

    def merged(self, arrays, options):
        *inputs, grad_output = arrays
        nothing = [self.array(np.zeros(shape)) for shape in (tuple(grad_output.shape), tuple(grad_output.shape[:-1]))]

        def function(query, key, value):
            part = kvattn.attention(query, key, value, **options, return_lse=True)
            return kvattn.merge_attention(*zip(part, nothing, strict=True))

        output, grads = self.vjp(function, inputs, grad_output)
        return dict(zip(MERGED, (output, *grads), strict=True))


class Torch(Differentiating):
    """SDPA, over the keys that are seen, and in blocks of queries where masks would be large."""

    sizes: ClassVar = {
        "each length by itself": {"CALL": -INF, "GAIN": -1, "PAIRS": 1, "ROWS": 1},
        "all lengths together": {"CALL": INF, "PAIRS": 40, "ROWS": 1},
        "calls apart if they save much": {"CALL": 60, "READ": 1, "GAIN": 0, "PAIRS": 70, "ROWS": 2},
    }
    dtypes = (*Subject.dtypes, "bfloat16")
    kernel = "SDPA"
    thorough = None
    lacks = frozenset({"softcap"})

    @contextmanager
    def forced(self, sizes, masks=None):
        """``masks``: a list for those that SDPA is given."""
        from torch.nn.functional import scaled_dot_product_attention

        from kvattn.kernels.torch import plan, sdpa, sinks

        served, masks, fused, with_lse = [], [] if masks is None else masks, sinks.fused, sinks.with_lse

        def counted(query, key, value, mask=None, **options):
            served.append("SDPA")
            masks.append(mask)
            return scaled_dot_product_attention(query, key, value, mask, **options)

        def counted_with_sink(query, key, value, mask, causal, scale, sink):
            served.append("SDPA")
            masks.append(mask)
            return fused(query, key, value, mask, causal, scale, sink)

        def counted_with_lse(*args):
            served.append("SDPA")
            return with_lse(*args)

        with (
            patch.dict(vars(plan), {"FEW": 0} | sizes), patch.object(sdpa, "scaled_dot_product_attention", counted),
            patch.object(sinks, "fused", counted_with_sink), patch.object(sinks, "with_lse", counted_with_lse),
            patch.multiple(planning, BLOCK=2, SLICES=2),
        ):  # fmt: skip
            yield served

    def laid(self, x, dtype="float64"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an array that may not be written to
            return self.tab.torch.from_numpy(x)

    def passes(self, case):
        keywords = {"score": "scaled_dot_score", "softcap": None, "scale": None} | case.keywords
        able = keywords["score"] == "scaled_dot_score" and not keywords["softcap"]
        passes = super().passes(case)
        if passes and ("sink" in case.arguments or keywords.get("sink") is not None):
            # SDPA gives the lse that a sink asks for of these alone
            query, value, sink = case.arguments["query"], case.arguments["value"], np.asarray(case.arguments.get("sink", 0.0))
            able &= query.ndim == 4 and query.shape[-1] == value.shape[-1] and set(case.results) <= {"output", "scores"}
            able &= query.shape[0] > 0 and (sink.ndim < 2 or sink.ndim == 4 or len(sink) == 1)
        return {"SDPA"} if passes and able and (keywords["scale"] is None or keywords["scale"] > 0) else set()

    def vjp(self, function, inputs, grad_output):
        inputs = [x.requires_grad_() for x in inputs]
        results = function(*inputs)
        return results, self.tab.torch.autograd.grad(first(results), inputs, grad_output)


class TensorFlow(Differentiating):
    sizes: ClassVar = {
        "blocks of 12 scores": {"SCORES": 12, "GRAD_SCORES": 21, "ROWS": 4, "BAND_ROWS": 3, "FEWEST": 2},
        "blocks of a row": {"SCORES": 1, "GRAD_SCORES": 1, "ROWS": 1, "BAND_ROWS": 1, "FEWEST": 1},
        "few blocks": {"SCORES": 1000, "GRAD_SCORES": 1000, "ROWS": 5, "BAND_ROWS": 8, "FEWEST": 1},
    }
    dtypes = (*Subject.dtypes, "bfloat16")
    compiles = "kinds"
    kernel = "blocks"
    suites, thorough = 1, None
    lacks = frozenset({"bias"})

    @contextmanager
    def forced(self, sizes):
        from kvattn.kernels.tensorflow import tiles as tiled

        served, compiled = [], tiled._compiled

        def counted(function, kind, specs):
            served.append(function.__name__)
            return compiled(function, kind, specs)

        with patch.multiple(tiled, **sizes, SMALLEST=0, _compiled=counted):
            yield served

    def passes(self, case):
        passes = super().passes(case) and "bias" not in case.arguments | case.keywords
        alike = passes and case.arguments["key"].shape[:-2] == case.arguments["value"].shape[:-2]
        return {"_forward", "_backward"} if alike else set()

    def vjp(self, function, inputs, grad_output):
        with self.tab.tf.GradientTape() as tape:
            tape.watch(inputs)
            results = function(*inputs)
        return results, tape.gradient(first(results), inputs, grad_output)


class Jax(Differentiating):
    sizes: ClassVar = {"4 by 3": {"TILE": 4, "BLOCK": 3, "CAUSAL_TILE": 3, "WINDOW_TILE": 2}}
    dtypes = (*Subject.dtypes, "bfloat16")
    ways: ClassVar = {"autograd": autograd}  # one program: the others' would be three
    compiles = "shapes"
    suites, thorough = 1, None

    def __init__(self, name):
        super().__init__(name)
        self.program = self.tab.jax.jit(self._with, static_argnums=(0, 1))

    @contextmanager
    def forced(self, sizes):
        from kvattn.kernels.jax import plans, tiles

        served, attention = [], tiles.attention

        def counted(*args):
            served.append("attention")
            return attention(*args)

        self.forget()
        small = patch.multiple(plans, **sizes, FEWEST_SCORES=0, FEWEST_QUERIES=0)
        with small, patch.object(tiles, "attention", counted):
            yield served
        self.forget()

    def forget(self):
        self.tab.jax.clear_caches()

    def array(self, x, dtype="float64"):
        with self.tab.programs.x64(True):
            return super().array(x, dtype)

    laid = array

    def run(self, way, arrays, options):
        """All of a way as one program, compiled once for the same shapes while small tiles are forced."""
        fixed = {name: x for name, x in options.items() if not self.tab.is_array(x)}
        with self.tab.programs.x64(True):
            return self.program(way, tuple(fixed.items()), arrays, {n: x for n, x in options.items() if n not in fixed})

    def _with(self, way, fixed, arrays, options):
        return way(self, arrays, {**dict(fixed), **options})

    def passes(self, case):
        return {"attention"} if super().passes(case) else set()

    def vjp(self, function, inputs, grad_output):
        jax = self.tab.jax
        with self.tab.programs.x64(True):
            results, back = jax.vjp(function, *inputs)
            rest = jax.tree.map(jax.numpy.zeros_like, results)
            return results, back((grad_output, *rest[1:]) if isinstance(results, tuple) else grad_output)


class MXNet(Differentiating):
    """NumPy's tiles, on views of the arrays' memory."""

    sizes: ClassVar = {name: Subject.sizes[name] for name in ("4 by 3", "2 by 1")}
    ways: ClassVar = {"functions": functions, "autograd": autograd}
    kernel = "NumPy's"
    suites = 1  # the tiles are those of NumPy, which runs it in the other sizes

    @contextmanager
    def forced(self, sizes):
        from kvattn.kernels.mxnet import views

        def counted(function):
            return lambda *args, **options: served.append("views") or function(*args, **options)

        both = {name: counted(getattr(views, name)) for name in ("attention", "attention_grad")}
        with in_tiles(**sizes) as served, patch.multiple(views, **both):
            yield served

    def passes(self, case):
        passes = super().passes(case)
        return passes and passes | {"views"}

    def vjp(self, function, inputs, grad_output):
        for x in inputs:
            x.attach_grad()
        with self.tab.autograd.record():
            results = function(*inputs)
        first(results).backward(grad_output)
        return results, [x.grad for x in inputs]


def first(results):
    return results[0] if isinstance(results, tuple) else results


SUBJECTS = {"torch": Torch, "tensorflow": TensorFlow, "jax": Jax, "mxnet": MXNet}


@cache
def subject(name):
    return SUBJECTS.get(name, Subject)(name)


def right(subject, case, sizes=None, dtype="float64"):
    """That the subject's path serves a case, by each of its ways and in these sizes, and is right."""
    for size in subject.few if sizes is None else sizes:
        with subject.forced(size) as served:
            for way in subject.ways.values():
                judge(case, dtype, subject.found(case, dtype, way))
        assert set(served) == subject.passes(case) or not (served or np.isfinite(case.answer["lse"]).any())
