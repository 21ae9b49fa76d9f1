"""How the JAX tab's functions run: at which precision, and as which programs. Decorators."""

from __future__ import annotations

import functools
import inspect
import math
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, auto_axes, get_abstract_mesh
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from kvattn import bands
from kvattn.kernels.jax import gpu as jax_gpu
from kvattn.kernels.jax import pairs

if hasattr(jax, "enable_x64"):
    x64 = jax.enable_x64
else:  # before jax 0.8
    from jax.experimental import enable_x64 as x64

_WIDE = frozenset(np.dtype(name) for name in ("float64", "int64", "uint64"))
_FLAGS = {"causal", "return_weights", "return_lse"}
_STATIC = ("causal", "window", "dropout", "wrt", "return_weights", "return_lse")


# ---- precision


def exact(function):
    """Full float32 products (a GPU would take TF32), and 64 bits for float64 arguments where JAX has them off."""

    @functools.wraps(function)
    def call(*args, **options):
        options = {name: _as_tree(x) for name, x in options.items()}
        needed = jax.config.jax_enable_x64
        if not needed and (wide := {x.dtype for x in jax.tree.leaves((args, options)) if _is_wide(x)}):
            args, options = jax.tree.map(_narrow, (args, options))
            needed = np.dtype("float64") in wide
        with x64(needed), jax.default_matmul_precision("highest"):
            return function(*args, **options)

    return call


def _is_wide(x):
    return isinstance(x, jax.Array) and x.dtype in _WIDE


def _as_tree(x):
    """A partial whose arrays JAX can see; the rest as it is."""
    return Partial(x.func, *x.args, **x.keywords) if type(x) is functools.partial else x


def _narrow(x):
    """64-bit integers as int32, which any length or position fits: then a float32 call needs no 64 bits."""
    if not _is_wide(x):
        return x
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"jit, grad and vmap over {x.dtype} need JAX's 64 bits for the whole transformation, not just inside kvattn: "
            "jax.config.update('jax_enable_x64', True)"
        )
    if x.dtype == np.dtype("float64"):
        return x
    with evaluated(), x64(True):
        return jnp.clip(x, -(2**31), 2**31 - 1).astype(np.int32)


def evaluated():
    """A context in which arrays of known values are made at once, not traced; where each device has its own, JAX cannot."""
    return nullcontext() if get_abstract_mesh().manual_axes else jax.ensure_compile_time_eval()


def fitting(x):
    """A NumPy array that a trace can hold: where nothing is made at once, _narrow would come too late."""
    if x.dtype == np.int64 and get_abstract_mesh().manual_axes and not jax.config.jax_enable_x64:
        return np.clip(x, -(2**31), 2**31 - 1).astype(np.int32)
    return x


# ---- devices


def devices():
    """JAX's devices by the names that `jax.devices` knows: "cpu", "cuda:0", "tpu:1"."""
    found = {"cpu": jax.local_devices(backend="cpu")[0]}
    for at, device in enumerate(x for x in jax.local_devices() if x.platform != "cpu"):
        kind = str(device).partition(":")[0] if device.platform == "gpu" else device.platform  # cuda, or rocm
        found[f"{kind}:{at}"] = device
    return found


# ---- compilation


def reaching(function):
    """No causal mask nor window where they allow every pair, as in decoding; seen before the offset is traced."""

    @functools.wraps(function)
    def call(query, key, *args, causal=False, query_offset=0, window=None, **options):
        if bands.reaches_all(query.shape[-2], key.shape[-2], causal, query_offset, window):
            causal, query_offset, window = False, 0, None
        return function(query, key, *args, causal=causal, query_offset=query_offset, window=window, **options)

    return call


def traces_offset(module, query, score, normalize, query_offset, window):
    """Whether a call becomes a program of the tab ``module`` that serves other offsets too: no blocks are planned by this."""
    return _own((score, normalize), module) and not _keeps_offset(query, query_offset, window)


def _own(functions, module):
    return all(getattr(getattr(f, "func", f), "__module__", None) == module for f in functions)


def _keeps_offset(query, query_offset, window):
    """The plan of blocks needs the number, and a kernel to know that it is 0."""
    return isinstance(query_offset, int) and (query_offset == 0 or bool(window and query.shape[-2] > bands.BLOCK))


def compiled(function):
    """One program for the whole call, since eager JAX pays for every operation; not where it would freeze a stranger's code."""

    @functools.wraps(function)
    def call(*args, **options):
        given = {name: options[name] for name in ("score", "normalize") if name in options}
        if not _own(given.values(), function.__module__):
            return function(*args, **options)
        static = {*_STATIC, *(name for name, f in given.items() if not isinstance(f, Partial))}
        if _keeps_offset(args[0], options.get("query_offset"), options.get("window")):
            static.add("query_offset")
        if isinstance(options.get("scale"), float) and jax_gpu.device() is not None:
            static.add("scale")  # cuDNN's is part of the program
        fixed = tuple((name, x) for name, x in options.items() if name in static)
        return _run(function, fixed, pairs.apart(), args, {name: x for name, x in options.items() if name not in static})

    return call


# ---- NaN and inf


LARGE = {"float16": 0x7C00, "bfloat16": 0x5F00}  # bits, without the sign, from which on a product of two may be inf


def careful(function):
    """Where NaN may have leaked from one row to another, the call again with its pairs apart.

    Python looks at numbers, so at those of a CPU, where JAX runs the call at once: under grad, vjp and jvp too, but not in
    what jit, vmap, checkpoint and their like trace. It looks at arguments, since to wait for results would cost time.
    """

    @functools.wraps(function)
    def call(*arrays, **options):
        results = function(*arrays, **options)
        if pairs.apart() or not _shared(*arrays, **options) or sound(results, *arrays, bias=options.get("bias")):
            return results
        with pairs.computed_apart():
            return function(*arrays, **options)

    return call


def _shared(query, key, value, *_, causal=False, mask=None, bias=None, valid_lens=None, window=None, positions=None, **__):
    """Whether some pairs may not attend, and several queries share what they may not attend to: else it is hidden."""
    if positions is not None or not (causal or not mask is bias is valid_lens is window is None):
        return False
    return query.shape[-2] != 1 or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]


def sound(results, query, key, value, *grad, bias=None):
    """Whether nothing leaked into the results, nor will into derivatives that are being taken, as far as is known."""
    found = results if isinstance(results, tuple) else (results,)
    derived = isinstance(found[0], jax.core.Tracer)
    if not grad and not derived:  # weights are 0 where they should be, and reach values alone
        return _small(value) or not _has_nan(found[0])
    if not all(map(_small, (query, key, value, *grad))):
        return not derived and not any(map(_has_nan, found))
    return bias is None or not any(map(_has_nan, found))


def _numbers(x):
    """``x`` for NumPy, where Python can read it: beneath derivatives that are taken at once too; else None."""
    while isinstance(x, jax.core.Tracer):
        x = getattr(x, "primal", None)
    device = getattr(x, "device", None)  # of an array that is spread, how it is
    return np.asarray(x) if getattr(device, "platform", None) == "cpu" else None


def _small(x):
    """Whether no number is known that is NaN, inf, or so large that its product with another may be inf."""
    return (x := _numbers(x)) is None or _is_small(x)


def finite(x):
    """Whether all numbers are known, beneath derivatives that are taken at once too, and finite, none of them large."""
    return (x := _numbers(x)) is not None and _is_small(x)


def _is_small(x):
    if x.dtype.itemsize == 2:  # for which NumPy's products are slow
        return (x.view(np.uint16) & 0x7FFF).max(initial=0) < LARGE[x.dtype.name]
    return math.isfinite(np.vdot(x, x))


def _has_nan(x):
    """What leaks is 0 * NaN or 0 * inf, so NaN. inf beside -inf is a false alarm, which costs time alone."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (x := _numbers(x)) is not None and np.isnan(x.sum())


# ---- arrays that are spread over devices


def placed(layout):
    """Leaves to XLA, inside, the axes of a mesh that the arrays' types name: else every product would have to name its own.

    ``layout``: a function of the call's arguments, specs in place of arrays, that returns the specs of its results.
    """

    def decorate(function):
        @functools.wraps(function)
        def call(*args, **options):
            given, tree = jax.tree.flatten((args, options))
            kinds = [jax.typeof(x).sharding if isinstance(x, jax.Array) else None for x in given]
            mesh = next((kind.mesh for kind in kinds if kind is not None and any(kind.spec)), None)
            if mesh is None:
                return function(*args, **options)
            arrays = [x for x, kind in zip(given, kinds, strict=True) if kind is not None]

            def inner(*arrays):
                arrays = iter(arrays)
                whole = [x if kind is None else next(arrays) for x, kind in zip(given, kinds, strict=True)]
                args, options = jax.tree.unflatten(tree, whole)
                return function(*args, **options)

            specs = [x if kind is None else tuple(kind.spec) for x, kind in zip(given, kinds, strict=True)]
            args_specs, options_specs = jax.tree.unflatten(tree, specs)
            results = layout(*args_specs, **options_specs)
            explicit = tuple(x for x, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)
            shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), results, is_leaf=lambda x: isinstance(x, P))
            return auto_axes(inner, axes=explicit, out_sharding=shardings)(*arrays)

        return call

    return decorate


def of_results(query, key, value, *, positions=None, return_weights=False, return_lse=False, **_):
    """The specs of attention's results, given those of its arguments: batch, heads and queries lie as the query's do."""
    rows = [*(q if q is not None else k for q, k in zip(query[:-3], key[:-3], strict=True)), *query[-3:-1]]
    output = _once(*rows, value[-1])
    results = [output]
    results += [_once(*rows, key[-2] if positions is None else None)] if return_weights else []
    results += [_once(*rows)] if return_lse else []
    return tuple(results) if len(results) > 1 else output


def of_gradients(query, key, value, grad_output, *, wrt=("query", "key", "value"), **options):
    """The specs of attention_grad's results: each lies as what it is the gradient by."""
    score = options.get("score")
    sources = {**getattr(score, "keywords", {}), "query": query, "key": key, "value": value, "bias": options.get("bias")}
    return tuple(P(*sources[name]) for name in wrt)


def _once(*spec):
    """A spec that names each axis of the mesh once: where it stands first."""
    seen, found = set(), []
    for names in spec:
        names = tuple(x for x in (names if isinstance(names, tuple) else (names,)) if x is not None and x not in seen)
        seen.update(names)
        found.append(names or None)
    return P(*found)


def _equal(x, default):
    return x is default or (type(x) is type(default) is float and x == default)


def short(function):
    """The commonest calls straight to their program: what the long way looks for is not there."""
    defaults = inspect.unwrap(function).__kwdefaults__
    program = jax.jit(function, static_argnames=_FLAGS)

    @functools.wraps(function)
    def call(query, key, value, **options):
        if options:
            options = {name: x for name, x in options.items() if not _equal(x, defaults[name])}
        if options.keys() <= _FLAGS and not pairs.apart() and (query.dtype not in _WIDE or jax.config.jax_enable_x64):
            results = program(query, key, value, **options)
            if "causal" not in options or sound(results, query, key, value):
                return results
        return function(query, key, value, **options)

    return call


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(function, fixed, apart, args, options):  # ``apart`` tells one program from the other
    return function(*args, **dict(fixed), **options)
