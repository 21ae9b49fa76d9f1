"""Attention over a sequence that JAX's devices share; what each of them does is in kernels/jax/ring.py."""

from __future__ import annotations

from functools import partial
from typing import Any, Never

import jax
from jax.sharding import AbstractMesh, Mesh, get_abstract_mesh
from jax.tree_util import Partial

from kvattn import checks, dispatch, prepare
from kvattn.call import Call
from kvattn.kernels.jax import ring

Array = Any

LACKS = {
    "normalize": "it has softmax alone: other normalisers have no log-sum-exp by which parts are merged",
    "segments": "give them as a mask: query_segments[..., :, None] == key_segments[..., None, :]",
    "return_scores": "no device holds a whole row of them",
    "positions": "selected keys may lie on any device; kvattn.attention gathers them, under jit with sharded arrays too",
    "dropout": "a device would draw what another one draws",
    "rng": "it has no dropout",
    "return_weights": "no device holds a whole row of them; a row alone is kvattn.attention's",
}


def ring_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mesh: Mesh | AbstractMesh,
    axis: str | None,
    batch_axis: str | None = None,
    head_axis: str | None = None,
    score: Any = None,
    mask: Array | None = None,
    bias: Array | None = None,
    valid_lens: Array | None = None,
    causal: bool = False,
    query_offset: Any = 0,
    window: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Array | None = None,
    return_lse: bool = False,
    **unknown: Never,
) -> Any:
    """`kvattn.attention`, whose queries and keys are spread over the devices of one axis of a mesh, along the sequence.

    Args:
        query, key, value: whole arrays, (..., n, d), (..., m, d) and (..., m, v), as `kvattn.attention` takes them, grouped
            heads too; under jit or not. No device needs to hold more than its share: best they lie as the results do.
        mesh: a jax.sharding.Mesh; the sequence is spread over its axis ``axis``, or over none, if that is None. Where the
            devices (causal: twice as many) do not divide n or m, it is filled up to a size that they do, which costs a copy.
        batch_axis, head_axis: other axes of the mesh, over which the first axis and the heads (axis -3, after a batch axis)
            are spread, at no cost: their devices send each other nothing. Explicit axes of the query's type name themselves.
            Over axes that are not named everything is repeated, or left to XLA inside a program.
        mask, bias: arrays; each device holds the rows of its own queries, beside all keys: n m / P numbers.

    The other arguments are `kvattn.attention`'s, with its answers. The whole sequence is in its usual order: causal, devices
    exchange half of what they hold, before and after, so that their work is balanced.

    Returns:
        The output (..., n, v), or (output, lse), spread as PartitionSpec(batch_axis, head_axis, axis, None) says.

    Of P devices each holds 1 / P of the arrays, of a gradient also, and works on one pair of chunks at a time. With K the
    bytes of the keys and values of one device, it sends (P - 1) K, and for the gradients (P - 1) K and P times as much as
    they take in float32; under a window those hops alone that it reaches. Half precision is computed in float32.
    Reverse mode alone: grad and vjp, not jvp.

    Raises:
        ValueError: what `kvattn.attention` raises; an axis that the mesh lacks, devices that do not divide batch or heads.
        TypeError: what `kvattn.attention` raises; options that this form lacks: normalize, positions, dropout, return_weights.

    >>> import jax
    >>> x = jax.numpy.ones((2, 4, 16, 8))  # batch, heads, sequence, features
    >>> ring_attention(x, x, x, mesh=jax.make_mesh((1,), ("x",)), axis="x", causal=True).shape
    (2, 4, 16, 8)

    Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context".
    """
    for name, why in LACKS.items():
        if name in unknown:
            raise TypeError(f"ring_attention has no {name}: {why}")
    if unknown:
        raise checks.unknown(unknown, [*prepare.OPTIONS])
    for name, x in (("mask", mask), ("bias", bias)):
        if callable(x):
            raise TypeError(
                f"ring_attention takes {name} as an array, not as a function of positions: call it, with all of them"
            )
    size = _devices(mesh, axis, batch_axis, head_axis)
    arrays = {"query": query, "key": key, "value": value, "mask": mask, "bias": bias, "valid_lens": valid_lens}
    tab = dispatch.choose("jax", **arrays, query_offset=query_offset, sink=sink)
    query, key, value, scores = prepare.inputs(tab, query, key, value, score)
    options = prepare.options(
        tab, query, scores, (query.shape[-1], key.shape[-1]), score, None, mask, bias, valid_lens, causal, query_offset,
        window, scale=scale, softcap=softcap, sink=sink,
    )  # fmt: skip
    call = Call.of(query, key, **options, return_lse=checks.flag("return_lse", return_lse))
    names: list[str | None] = [None] * (query.ndim - 2)
    typed = jax.typeof(query).sharding.spec[:-2]  # explicit axes of a mesh, which stand in the query's type
    for name, x, at in (("batch_axis", batch_axis, 0), ("head_axis", head_axis, 1)):
        if x is None and len(typed) > at and typed[-at] in mesh.axis_names and typed[-at] != axis:
            x = typed[-at]
        if x is not None:
            _divides(mesh, name, x, {"query": query, "key": key, "value": value}, at)
            names[-1 if at else 0] = x
    if 0 in (*query.shape, *key.shape):  # there is nothing to share
        return tab.attention(query, key, value, **call.keywords)
    given = {"query": query, "key": key, "value": value}
    given |= {name: x for name in ("mask", "bias", "valid_lens", "sink") if (x := getattr(call, name)) is not None}
    if not call.windowed:
        call = call._replace(query_offset=0)  # no option depends on the queries' positions
    elif type(call.query_offset) is not int:
        given["query_offset"] = call.query_offset
    if isinstance(call.score, partial):
        as_tree = Partial(call.score.func, *call.score.args, **call.score.keywords)
        if all(isinstance(x, float) or tab.is_array(x) for x in jax.tree.leaves(as_tree)):
            given["score"] = as_tree
    plan = ring.plan(axis, size, call, query.shape[-2], key.shape[-2])
    rest: dict[str, Any] = dict.fromkeys(given.keys() - {"query", "key", "value"})
    return ring.run(plan._replace(call=call._replace(**rest)), mesh, tuple(names), given)


def _devices(mesh: Any, axis: Any, batch_axis: Any, head_axis: Any) -> int:
    """How many devices there are along the axis. Raises TypeError for what is no mesh, ValueError for axes that it lacks."""
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, not {type(mesh).__name__}: jax.make_mesh((8,), ('x',)), say")
    named = {"axis": axis, "batch_axis": batch_axis, "head_axis": head_axis}
    named = {name: x for name, x in named.items() if x is not None}
    for name, x in named.items():
        if x not in mesh.axis_names:
            raise ValueError(f"{name} is {x!r}, but the mesh has the axes {', '.join(map(repr, mesh.axis_names)) or 'none'}")
        if x in get_abstract_mesh().manual_axes:
            raise ValueError(
                f"{name} is {x!r}, along which jax.shard_map has cut these arrays: call ring_attention outside, with whole ones"
            )
    if len({*named.values()}) < len(named):
        raise ValueError(f"{', '.join(named)} must be different axes of the mesh, not {', '.join(map(repr, named.values()))}")
    return 1 if axis is None else int(mesh.shape[axis])


def _divides(mesh: Any, name: str, axis: str, arrays: dict[str, Any], at: int) -> None:
    """Raises ValueError unless there is such an axis of each array, whose size the devices divide, or it is 1."""
    for array, x in arrays.items():
        shape, axes = tuple(x.shape), x.ndim
        if axes < 3 + at:
            raise ValueError(
                f"{name} is {axis!r}, but {array} has shape {shape}; expected {'(batch, heads, ...)' if at else '(batch, ...)'}"
            )
        size, where = shape[-3 if at else 0], "-3 (heads)" if at else "0 (batch)"
        if size != 1 and size % mesh.shape[axis]:
            raise ValueError(
                f"{array} has shape {shape}: axis {where} is {size}, no multiple of the {mesh.shape[axis]} devices of {name} "
                f"{axis!r}; name an axis of fewer devices, or none"
            )
