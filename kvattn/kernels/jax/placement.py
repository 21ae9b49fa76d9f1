"""One of two programs: by how many devices share it, which is known when it is compiled, not while it is traced.

A primitive holds both, and compiles one. What JAX makes of it makes the same of both: derivatives, batches, transposes.

Source: the documentation of JAX, "How JAX primitives work".
"""

from __future__ import annotations

import functools
import math
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import get_abstract_mesh

# Of a program that is traced, whether devices share its arrays: before JAX 0.10, under jit, the primitive below has no
# derivative along a direction of a gradient, in whose program values of the one around it stay, which JAX 0.7.1 cannot compile.
_known = ContextVar("known", default=None if jax.__version_info__ >= (0, 10) else True)
_asked = ContextVar("asked", default=None)  # where it is noted that such a program asked


@functools.cache
def several():
    return jax.device_count() > 1


def shared(arrays):
    """Whether several devices share these arrays, or may."""
    if (asked := _asked.get()) is not None:
        asked.append(arrays)
    return shared_if_known(arrays) is not False


def shared_if_known(arrays):
    """Whether several devices share these arrays; None where that is known when their program is compiled."""
    if not several():
        return False
    arrays = [_beneath(x) for x in jax.tree.leaves(arrays) if hasattr(x, "aval")]
    traced = [x for x in arrays if isinstance(x, jax.core.Tracer)]
    if not traced:
        return any(hasattr(x, "sharding") and len(x.sharding.device_set) > 1 for x in arrays)
    if any(any(jax.typeof(x).sharding.spec) for x in traced):  # a mesh's axes that types name
        return True
    return False if _sharing(get_abstract_mesh()) == 1 else _known.get()


def _beneath(x):
    """The array whose derivative is being taken, where it is taken at once."""
    while isinstance(x, jax.core.Tracer) and hasattr(x, "primal"):
        x = x.primal
    return x


def _sharing(mesh):
    """How many devices may share an array inside of jax.shard_map, where each has its own along some axes; 0 outside."""
    return math.prod(size for name, size in mesh.shape.items() if name not in mesh.manual_axes) if mesh.manual_axes else 0


def either(function, known, *args):
    """What ``function`` gives of these arrays, in a program that is `told` this of them; where it is None, as one of two."""
    if known is not None:
        return _knowing(known, function)(*args)
    given, tree = jax.tree.flatten(args)
    asked, results = _asked.set([]), []

    def flat(*given):
        found, kind = jax.tree.flatten(function(*jax.tree.unflatten(tree, given)))
        results.append(kind)
        return found

    try:
        programs = [jax.make_jaxpr(_knowing(False, flat))(*given)]
        programs += [jax.make_jaxpr(_knowing(True, flat))(*given)] if _asked.get() else []
    finally:
        _asked.reset(asked)
    found = _either.bind(*given, programs=tuple(programs)) if len(programs) > 1 else jaxpr_as_fun(programs[0])(*given)
    return jax.tree.unflatten(results[0], found)


def _knowing(known, function):
    """``function``, in which `told` gives ``known``."""

    def run(*args):
        token = _known.set(known)
        try:
            return function(*args)
        finally:
            _known.reset(token)

    return run


# ---- the primitive: its arguments are arrays, ``programs`` the jaxpr of one device and that of several


_either = Primitive("one_or_several_devices")
_either.multiple_results = True


@_either.def_impl
def _run(*args, programs):
    return jaxpr_as_fun(programs[shared_if_known(args) is True])(*args)


@_either.def_abstract_eval
def _shapes(*_, programs):
    return programs[0].out_avals


def _bound(functions, *args):
    """The primitive of two other functions of arrays, each of which gives a list."""
    return _either.bind(*args, programs=tuple(jax.make_jaxpr(function)(*args) for function in functions))


def _compiled(context, *args, programs):
    where = context.module_context.axis_context
    count = where.num_devices if hasattr(where, "num_devices") else _sharing(where.mesh) if hasattr(where, "mesh") else 1
    return mlir.lower_fun(jaxpr_as_fun(programs[count > 1]), multiple_results=True)(context, *args)


def _batched(args, axes, *, programs):
    found = _bound([jax.vmap(jaxpr_as_fun(program), in_axes=tuple(axes)) for program in programs], *args)
    return found, [0] * len(found)


def _along(primals, tangents, *, programs):
    """Results, and what each program's derivative keeps of its own; the other's are zeros in its place."""
    moved = [i for i, x in enumerate(tangents) if type(x) is not ad.Zero]
    made = [jax.make_jaxpr(_linearized(program, moved), return_shape=True)(*primals) for program in programs]
    count = len(programs[0].out_avals)
    types = [program.out_avals[count:] for program, _ in made]  # of what each keeps
    derivatives = [jax.tree.structure(derivative) for _, (_, derivative) in made]
    start = [0, len(types[0]), len(types[0]) + len(types[1])]

    def forward(at):
        def run(*given):
            found = jaxpr_as_fun(made[at][0])(*given)
            rest = [_zeros(x) for x in types[1 - at]]
            return found + rest if at == 0 else found[:count] + rest + found[count:]

        return run

    def derivative(at):
        def run(*given):
            found = jax.tree.unflatten(derivatives[at], given[start[at] : start[at + 1]])(*given[start[-1] :])
            return [x for x in found if x.dtype != jax.dtypes.float0]

        return run

    results, kept = (found := _bound([forward(0), forward(1)], *primals))[:count], found[count:]
    along = iter(_bound([derivative(0), derivative(1)], *kept, *(tangents[i] for i in moved)))
    return results, [next(along) if jnp.issubdtype(x.dtype, jnp.inexact) else _no_tangent(x) for x in results]


def _linearized(program, moved):
    """The results of a program, and its derivative by those arguments, a function that is a tree of arrays."""

    def run(*given):
        def of_moved(*some):
            mine = dict(zip(moved, some, strict=True))
            return jaxpr_as_fun(program)(*(mine.get(i, x) for i, x in enumerate(given)))

        return jax.linearize(of_moved, *(given[i] for i in moved))

    return run


def _no_tangent(x):
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def _zeros(kind):
    return vary(jnp.zeros(kind.shape, kind.dtype), varying(kind))


def _transposed(cotangents, *args, programs):
    """Of what is linear in the arguments that are not known."""
    linear = [i for i, x in enumerate(args) if ad.is_undefined_primal(x)]
    known = [x for x in args if not ad.is_undefined_primal(x)]
    cotangents = [ad.instantiate_zeros(x) for x in cotangents]

    def transpose(program):
        def run(*given):
            known_here, cotangents = iter(given[: len(known)]), given[len(known) :]
            whole = [None if i in linear else next(known_here) for i in range(len(args))]

            def of_linear(*along):
                mine = dict(zip(linear, along, strict=True))
                return jaxpr_as_fun(program)(*(mine.get(i, x) for i, x in enumerate(whole)))

            return jax.linear_transpose(of_linear, *(args[i].aval for i in linear))(list(cotangents))

        return run

    found = iter(_bound([transpose(program) for program in programs], *known, *cotangents))
    return [next(found) if i in linear else None for i in range(len(args))]


mlir.register_lowering(_either, _compiled)
batching.primitive_batchers[_either] = _batched
ad.primitive_jvps[_either] = _along
ad.primitive_transposes[_either] = _transposed


# ---- types in jax.shard_map


def varying(kind):
    """The axes of a mesh along which an array of this type differs from device to device, as types say in jax.shard_map."""
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def vary(x, axes):
    """``x``, whose type says that it differs along these axes too."""
    if not (missing := tuple(axes - varying(jax.typeof(x)))):
        return x
    return jax.lax.pcast(x, missing, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, missing)
