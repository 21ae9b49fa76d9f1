"""DTensors that devices share over batch or heads: each device computes its own part, and no number travels,

    output[b, h] = attention(query[b, h], key[b, h], value[b, h])          of the entries b and heads h that are here

PyTorch itself has rules for its GPU's kernels alone, and lets no operation mix DTensors and plain tensors. A plain tensor
beside them, a mask, a bias or lengths, is taken to be the same on every device.

Source: what DTensor is, https://docs.pytorch.org/docs/stable/distributed.tensor.html.
"""

from __future__ import annotations

import math
from functools import partial

from kvattn import planning
from kvattn.call import Choice
from kvattn.pairs import Pairs

ARRAYS = ("mask", "bias", "valid_lens", "query_offset", "positions", "sink")


def spread(query):
    """Whether the query is a DTensor."""
    return hasattr(query, "device_mesh")


def choose(query, attend):
    """The way to serve a DTensor. ``attend``: the tab's function (query, key, value, call) -> results, of plain tensors."""
    return Choice("each device's own part", "arrays are DTensors", (), partial(_attention, attend))


def _attention(attend, query, key, value, call, blocks=()):
    from torch.distributed.tensor import DTensor  # loads much, which whoever gives one has loaded

    if type(call.mask) is Pairs:  # a function may tell heads apart, by where they stand among all
        raise ValueError("masks and biases as functions, and segments, are not for DTensors; expected arrays")
    if call.dropout and isinstance(call.rng, int):  # what it drops goes by where a weight stands among all
        raise ValueError("dropout by a seed is not for DTensors; expected a torch.Generator of each device, or none")
    mesh, ndim = query.device_mesh, query.ndim
    axes = _axes(query, key)

    def here(x, at):
        """The part of x that goes with this device's queries; ``at``: the axis of x that is the query's axis, or below 0."""
        return _part(DTensor, x, mesh, [None if axis is None else at(axis) for axis in axes])

    arrays = [here(x, lambda axis: axis) for x in (query, key, value)]
    given = {name: getattr(call, name) for name in ARRAYS if hasattr(getattr(call, name), "ndim")}
    for name, x in given.items():
        skipped = ndim - x.ndim if name != "sink" or x.ndim == ndim else ndim - 2 - x.ndim  # axes that x is not given
        by_entry = name in ("valid_lens", "query_offset")
        given[name] = here(x, _of_entries if by_entry else partial(_less, skipped))
    score = call.score
    if isinstance(score, partial):
        parameters = {n: here(x, lambda _: -1) if hasattr(x, "ndim") else x for n, x in score.keywords.items()}
        score = partial(score.func, *score.args, **parameters)
    results = attend(*arrays, call._replace(score=score, **given))
    whole = (*planning.lead(query.shape, key.shape), query.shape[-2])
    return _joined(results, lambda x: _spread(DTensor, x, mesh, axes, (*whole, *x.shape[len(whole) :])))


def _less(skipped, axis):
    return axis - skipped


def _of_entries(axis):
    return axis if axis == 0 else -1


def _axes(query, key):
    """The axis of the query over which each part of the mesh shares the work, or None, where each device does all of it."""
    axes, lead = [], planning.lead(query.shape, key.shape)
    for place in query.placements:
        axis = place.dim % query.ndim if place.is_shard() else None  # a sum that is not added up yet is
        if axis is not None and axis >= query.ndim - 2:
            name = "features" if axis == query.ndim - 1 else "sequence"
            raise ValueError(
                f"query is a DTensor that devices share over its {name}, axis {axis}; expected its batch or heads: "
                "query.redistribute(placements=...), or kvattn.distributed.torch.ring_attention of query.to_local()"
            )
        axes.append(axis if axis is None or lead[axis] > 1 else None)
    heads = query.ndim - 3
    devices = math.prod(size for size, axis in zip(query.device_mesh.shape, axes, strict=True) if axis == heads)
    if query.shape[heads] % devices or (key.shape[heads] != 1 and key.shape[heads] % devices):
        axes = [None if axis == heads else axis for axis in axes]  # groups of heads would be torn apart
    return axes


def _part(DTensor, x, mesh, axes):
    """The local part of x that is shared over these of its axes, None for a part of the mesh over which nobody shares."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    shared = [axis is not None and 0 <= axis < x.ndim and x.shape[axis] > 1 for axis in axes]
    places = [Shard(axis) if yes else Replicate() for axis, yes in zip(axes, shared, strict=True)]
    # where all have the same array, but different work, each has a part of its gradient
    grads = [Partial() if axis is not None and not yes else at for axis, yes, at in zip(axes, shared, places, strict=True)]
    return x.redistribute(mesh, places).to_local(grad_placements=grads)


def _spread(DTensor, x, mesh, axes, shape):
    from torch.distributed.tensor import Replicate, Shard

    stride = [1]
    for size in reversed(shape[1:]):
        stride.insert(0, stride[0] * max(size, 1))
    places = [Replicate() if axis is None else Shard(axis) for axis in axes]
    return DTensor.from_local(x.contiguous(), mesh, places, run_check=False, shape=shape, stride=tuple(stride))


def _joined(results, spread):
    return tuple(map(spread, results)) if isinstance(results, tuple) else spread(results)
