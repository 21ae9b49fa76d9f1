"""How the JAX tab's functions run: at which precision, and as which programs. Decorators."""

from __future__ import annotations

import functools
import math
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, auto_axes, get_abstract_mesh
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from kvattn import patterns, planning
from kvattn.kernels.jax import dropout, nonfinite, placement
from kvattn.kernels.jax import gpu as jax_gpu

if hasattr(jax, "enable_x64"):
    x64 = jax.enable_x64
else:  # before jax 0.8
    from jax.experimental import enable_x64 as x64

_WIDE = frozenset(np.dtype(name) for name in ("float64", "int64", "uint64"))


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


def product(x, W):
    """x W of rows x (..., d) by a matrix W, all in one: for the CPU, XLA makes of a product of more axes, turned about for the
    gradient by W, one that takes half as long again. Devices may share the axes, so that where there are several they stay.
    """
    if x.ndim < 3 or placement.several():
        return x @ W
    return (x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) @ W).reshape(*x.shape[:-1], W.shape[-1])


# ---- devices


def devices():
    """JAX's devices by the names that `jax.devices` knows: "cpu", "cuda:0", "tpu:1"."""
    found = {"cpu": jax.local_devices(backend="cpu")[0]}
    for at, device in enumerate(x for x in jax.local_devices() if x.platform != "cpu"):
        kind = str(device).partition(":")[0] if device.platform == "gpu" else device.platform  # cuda, or rocm
        found[f"{kind}:{at}"] = device
    return found


# ---- compilation


_TRACED = ("mask", "bias", "valid_lens", "positions", "rng", "softcap", "sink")  # fields of a Call that are always arguments


def compiled(layout):
    """One program for a whole call, since eager JAX pays for every operation; not where it would freeze a user's own code.

    It takes arrays, a Call, and by name what becomes part of the program. ``layout``: see `_placed`.
    """

    def decorate(function):
        inner = exact(_placed(function, layout))

        @functools.wraps(function)
        def run(*args, **named):
            *arrays, call = args
            if type(call.score) is functools.partial or type(call.normalize) is functools.partial:
                call = call._replace(score=_as_tree(call.score), normalize=_as_tree(call.normalize))
            if not _is_own(call, function.__module__):
                return inner(*arrays, call, **named)
            call, given = _split(call, arrays[0].shape[-2])
            wide = not jax.config.jax_enable_x64 and any(map(_is_wide, (arrays[0], *(jax.tree.leaves(given) if given else ()))))
            traits = nonfinite.pair_by_pair(), placement.shared_if_known((arrays, given))
            return (_run_exact if wide else _run)(inner, call, tuple(named.items()), traits, arrays, given)

        return run

    return decorate


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(function, call, named, traits, arrays, given):  # ``traits`` tell one program from the other
    return placement.either(
        lambda arrays, given: function(*arrays, call._replace(**given), **dict(named)), traits[1], arrays, given
    )


_run_exact = exact(_run)


def one(function, *args):
    """What a tab's own function of arrays and, as the last argument, a Call returns, by one program."""
    *arrays, call = args
    call, given = _split(call, arrays[0].shape[-2])
    return _run(function, call, (), (False, placement.shared_if_known((arrays, given))), arrays, given)


def _split(call, n):
    """(what of a call of n queries is part of its program, what is an argument of that)."""
    given = {name: x for name in _TRACED if (x := getattr(call, name)) is not None}
    given |= {name: x for name in ("score", "normalize") if type(x := getattr(call, name)) is Partial}
    if call.rng is not None:
        given["rng"] = dropout.seed(call.rng)
    if call.scale is not None and not (isinstance(call.scale, float) and jax_gpu.device()):  # cuDNN's is part of its program
        given["scale"] = call.scale
    if call.dropout and patterns.drawn(call.rng):
        given |= {"first_query": call.first_query, "first_key": call.first_key}
    else:
        call = call._replace(first_query=0, first_key=0)  # nobody asks: blocks that lie alike share a program
    if not call.windowed:
        call = call._replace(query_offset=0)  # nor where the queries stand
    elif _traces_offset(call, n):
        far = call.query_offset  # no array is as long as 2^30, and an argument of a program is an int32
        given["query_offset"] = max(-(2**30), min(far, 2**30)) if type(far) is int else far
    return call._replace(**dict.fromkeys(given)) if given else call, given


def at_once(query):
    """Whether a call of such arrays is a program as it is: none in 64 bits that JAX has off, nor one that goes pair by pair,
    nor one that depends on where its arrays lie."""
    return not (nonfinite.pair_by_pair() or placement.several()) and (query.dtype not in _WIDE or jax.config.jax_enable_x64)


def serves_other_offsets(call, n, module):
    """Whether a call of n queries of the tab ``module`` becomes a program that serves other offsets too."""
    return _is_own(call, module) and _traces_offset(call, n)


def _traces_offset(call, n):
    """Not an offset of 0, which a kernel has to know, nor one of many queries in a window, which is cut into blocks by it."""
    if type(call.query_offset) is not int or call.query_offset == 0:
        return type(call.query_offset) is not int
    return call.left is None or call.right is None or type(n) is not int or n <= planning.BLOCK


def _is_own(call, module):
    """Whether score and normaliser are the tab's: whatever they do can be traced, and never changes."""
    return all(getattr(getattr(f, "func", f), "__module__", None) == module for f in (call.score, call.normalize))


# ---- NaN and inf


LARGE = {"float16": 0x7C00, "bfloat16": 0x5F00}  # bits, without the sign, from which on a product of two may be inf


def careful(function):
    """Where NaN may have leaked from one row to another, the call again pair by pair.

    Python looks at numbers, so at those of a CPU, where JAX runs the call at once: under grad, vjp and jvp too, but not in
    what jit, vmap, checkpoint and their like trace. It looks at arguments, since to wait for results would cost time.
    """

    @functools.wraps(function)
    def run(*args, **named):
        results = function(*args, **named)
        *arrays, call = args
        if not _shared(*arrays[:3], call) or nonfinite.pair_by_pair() or sound(results, *arrays, bias=call.bias):
            return results
        with nonfinite.computed_pair_by_pair():
            return function(*args, **named)

    return run


def _shared(query, key, value, call):
    """Whether some pairs may not attend, and several queries share what they may not attend to: else it is hidden."""
    if not call.restricted or call.positions is not None:
        return False
    return query.shape[-2] != 1 or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]


def sound(results, query, key, value, *grad, bias=None):
    """Whether nothing leaked into the results, nor will into derivatives that are being taken, as far as is known."""
    found = results if isinstance(results, tuple) else (results,)
    derived = isinstance(found[0], jax.core.Tracer)
    if not grad and not derived:  # weights are 0 where they should be, and reach values alone
        return _small(value) or not _has_nan(found[0])
    if not all(map(_small, (query, key, value, *jax.tree.leaves(grad)))):
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


def _placed(function, layout):
    """Leaves to XLA, inside, the axes of a mesh that the arrays' types name: else every product would have to name its own.

    ``layout``: a function of the call's arguments, specs in place of arrays, that returns the specs of its results.
    """

    @functools.wraps(function)
    def run(*args, **named):
        given, tree = jax.tree.flatten(args)
        kinds = [jax.typeof(x).sharding if isinstance(x, jax.Array) else None for x in given]
        mesh = next((kind.mesh for kind in kinds if kind is not None and any(kind.spec)), None)
        if mesh is None:
            return function(*args, **named)
        arrays = [x for x, kind in zip(given, kinds, strict=True) if kind is not None]

        def inner(*arrays):
            arrays = iter(arrays)
            whole = [x if kind is None else next(arrays) for x, kind in zip(given, kinds, strict=True)]
            return function(*jax.tree.unflatten(tree, whole), **named)

        specs = [x if kind is None else tuple(kind.spec) for x, kind in zip(given, kinds, strict=True)]
        results = layout(*jax.tree.unflatten(tree, specs), **named)
        explicit = tuple(x for x, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), results, is_leaf=lambda x: isinstance(x, P))
        return auto_axes(inner, axes=explicit, out_sharding=shardings)(*arrays)

    return run


def of_results(query, key, value, call):
    """The specs of attention's results, given those of its arguments: batch, heads and queries lie as the query's do."""
    rows = [*(q if q is not None else k for q, k in zip(query[:-3], key[:-3], strict=True)), *query[-3:-1]]
    output = _once(*rows, value[-1])
    results = [output]
    results += [_once(*rows, key[-2] if call.positions is None else None)] if call.return_weights else []
    results += [_once(*rows)] if call.return_lse else []
    results += [_once(*rows, key[-2] if call.positions is None else None)] if call.return_scores else []
    return tuple(results) if len(results) > 1 else output


def of_gradients(query, key, value, grad_output, call, *, wrt):
    """The specs of attention_grad's results: each lies as what it is the gradient by."""
    sources = {**getattr(call.score, "keywords", {}), "query": query, "key": key, "value": value, "bias": call.bias}
    sources["sink"] = call.sink
    return tuple(P(*sources[name]) for name in wrt)


def _once(*spec):
    """A spec that names each axis of the mesh once: where it stands first."""
    named, found = set(), []
    for names in spec:
        names = tuple(x for x in (names if isinstance(names, tuple) else (names,)) if x is not None and x not in named)
        named.update(names)
        found.append(names or None)
    return P(*found)
