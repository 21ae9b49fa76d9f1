"""Attention of a sequence that processes share, on torch.distributed.

Each process holds some rows of the sequence. Its queries stay with it; keys and values travel round the ring of processes, by
point-to-point messages, while each computes its queries' attention to the keys that it has just now and merges what it gets,
exactly. No process holds more than two parts of the keys at a time. kvattn/kernels/torch/ring.py has the formula.

PyTorch's own, torch.distributed.tensor.experimental.context_parallel, serves none of this, as read and run in 2.13:

- It is for CUDA's kernels: on a CPU it raises NotImplementedError.
- It takes plain and causal calls of parts of one size, and gives no lse: no lengths, masks, segments, soft caps.
- NaN reaches rows that may not see it, as in CUDA's kernels themselves.
- It gathers the keys of all processes in each, unless its options say otherwise, and waits as long as the group does.
- While it is on, F.scaled_dot_product_attention is another function in the whole process.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Never

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from kvattn import checks, conversion, planning, prepare, registry
from kvattn.kernels.torch import ring as kernel

__all__ = ["local_positions", "ring_attention", "shard", "unshard"]

TIMEOUT = 300.0
Run = tuple[slice, int]  # rows of a process that follow each other in the sequence, and where the first of them stands there


@torch.compiler.disable
def ring_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    group: Any = None,
    axis: str | int | None = None,
    zigzag: bool = False,
    mask: Any = None,
    bias: Any = None,
    valid_lens: Any = None,
    causal: bool = False,
    query_offset: Any = 0,
    window: Any = None,
    segments: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Any = None,
    return_lse: bool = False,
    timeout: float = TIMEOUT,
    **unknown: Never,
) -> Any:
    """`kvattn.attention` of a sequence that the processes of a group hold together; every one of them makes this call.

    Args:
        query: (..., n, d), the rows of this process: n may differ from process to process, and be 0; all else is the same.
        key, value: (..., m, d) and (..., m, v), its keys and values; m may differ, too, and from n.
        group: a ProcessGroup, or a DeviceMesh; by default the group of all processes. A group of one is plain attention.
        axis: the axis of the mesh over which the sequence lies, its name or number; needed where the mesh has several.
        zigzag: of P processes, process r holds the parts r and 2 P - 1 - r of 2 P, as `shard` gives them, so that each has as
            much to do where the call is causal. Else rows lie in the order of the processes.
        mask, bias: of this process's queries and the keys of all, (..., n, m of all), in the sequence's order; or
            functions of positions in it.
        segments: a pair: of this process's queries, (batch, n), and of the keys of all, (batch, m of all), in the sequence's
            order.
        valid_lens: (batch,), counted over the whole sequence; or (batch, n), of this process's queries.
        causal, window, query_offset: by positions in the whole sequence, of which query_offset is the first query's.
        scale, softcap, return_lse: as `attention`'s.
        sink: as `attention`'s; one for each query is of this process's.
        timeout: seconds to wait for a message.

    Returns:
        The output (..., n, v) of this process's queries, or (output, lse).

    Query, key and value get the gradients of the process's own rows; bias and sink, which processes share, those of its own
    queries: their sum over the processes is the whole gradient. Every process has to run backward. There are no second
    derivatives. Before the first step the processes send each other sizes and options, in one short message to each.

    Raises:
        RuntimeError: no process group is initialised.
        ConnectionError: a process is lost, or sends nothing for ``timeout`` seconds. The group is of no use then.
        ValueError, TypeError: as `attention`'s; an axis that is not there. On all processes: sizes, dtypes or options that
            differ from one to another, and what one of them refuses.
        NotImplementedError: an option of `attention` that is not above, as a score.

    It is proved on CPUs, with gloo. With NCCL on GPUs it makes the same calls, on each process's current device; no card has
    run them: tests/distributed/torch_cards.py does. There, as read in PyTorch's sources, its watchdog ends a process soon after
    it has lost another, unless TORCH_NCCL_BLOCKING_WAIT=1 is set, which starts none: then the ConnectionError can be caught.

        torch.distributed.init_process_group("gloo")
        query, key, value = (shard(x, zigzag=True) for x in (query, key, value))
        output = ring_attention(query, key, value, causal=True, zigzag=True)
        whole = unshard(output, zigzag=True)

    Source: Liu et al. 2023, "Ring attention with blockwise transformers"; zigzag: Llama 3, 2024, section 3.3.2.
    """
    ring = _ring(group, axis, timeout, query)
    tab = registry.load("torch")
    given = {"query": query, "key": key, "value": value, "mask": mask, "bias": bias, "valid_lens": valid_lens, "sink": sink}
    given |= {"segments": segments}
    options = {"causal": causal, "query_offset": query_offset, "window": window, "scale": scale, "softcap": softcap}
    arrays: tuple[Any, ...] = ()
    refused, message = None, [0] * len(MESSAGE)
    try:
        if unknown:
            raise _refusal(unknown)
        zigzag, return_lse = checks.flag("zigzag", zigzag), checks.flag("return_lse", return_lse)
        arrays, options, message = _checked(tab, given, options, zigzag)
    except Exception as error:  # whatever it is, the others learn of it
        refused = error
    everyone = _exchange(ring, message)
    if refused is not None:
        raise refused
    plan = _plan(tab, ring, everyone, options, zigzag)
    query, key, value, bias, sink = arrays
    output, lse = kernel.attention(query, key, value, bias, sink, ring, plan)
    return (output, lse) if return_lse else output


# ---- which rows a process holds


def local_positions(n: int, *, group: Any = None, axis: str | int | None = None, zigzag: bool = False) -> Any:
    """Where the rows of this process stand in a sequence of n: int64, as `kvattn.rotary` takes them.

    Where the processes do not divide n, some have a row more; zigzag deals in halves of a part. The other arguments are
    `ring_attention`'s.
    """
    ring = _ring(group, axis, TIMEOUT)
    parts = _parts(checks.count("n", n, 0), 2 * ring.size if zigzag else ring.size)
    sizes = [parts[i] + parts[-1 - i] for i in range(ring.size)] if zigzag else parts
    return _positions(sizes, ring.rank, zigzag)


def shard(x: Any, *, dim: int = -2, group: Any = None, axis: str | int | None = None, zigzag: bool = False) -> Any:
    """The rows along ``dim`` that are this process's, of an array that each process holds whole; differentiable."""
    places = local_positions(x.shape[dim], group=group, axis=axis, zigzag=zigzag)
    return x.index_select(dim, places.to(x.device))


@torch.no_grad()
def unshard(x: Any, *, dim: int = -2, group: Any = None, axis: str | int | None = None, zigzag: bool = False,
            timeout: float = TIMEOUT) -> Any:  # fmt: skip
    """The whole array in the sequence's order, of the rows along ``dim`` of each process: in all, without a gradient."""
    ring, dim = _ring(group, axis, timeout, x), dim % x.ndim
    sizes = [size for (size,) in _exchange(ring, [x.shape[dim]])]
    shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
    sequence = x.new_empty((*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :]))
    for rank, part in enumerate(ring.gathered(x, shapes)):
        sequence.index_copy_(dim, _positions(sizes, rank, zigzag).to(x.device), part)
    return sequence


def _parts(n: int, count: int) -> list[int]:
    return [n // count + (i < n % count) for i in range(count)]


def _positions(sizes: Sequence[int], rank: int, zigzag: bool) -> Any:
    return torch.cat([torch.arange(start, start + rows.stop - rows.start) for rows, start in _runs(sizes, zigzag)[rank]])


def _runs(sizes: Sequence[int], zigzag: bool) -> list[list[Run]]:
    """The runs of each process, where they hold so many rows.

    >>> _runs([2, 1], False)
    [[(slice(0, 2, None), 0)], [(slice(0, 1, None), 2)]]
    >>> _runs([3, 2], True)
    [[(slice(0, 2, None), 0), (slice(2, 3, None), 4)], [(slice(0, 1, None), 2), (slice(1, 2, None), 3)]]
    """
    if not zigzag:
        return [[(slice(0, size), start)] for size, start in zip(sizes, accumulate(sizes, initial=0), strict=False)]
    parts = _parts(sum(sizes), 2 * len(sizes))
    starts = [*accumulate(parts, initial=0)]
    found = []
    for rank, size in enumerate(sizes):
        first, last = rank, len(parts) - 1 - rank
        if size != parts[first] + parts[last]:
            raise ValueError(
                f"rank {rank} holds {size} rows of {sum(sizes)}; expected {parts[first] + parts[last]} where they lie in "
                "zigzag, as kvattn.distributed.torch.shard gives them"
            )
        found.append([(slice(0, parts[first]), starts[first]), (slice(parts[first], size), starts[last])])
    return found


# ---- processes


def _ring(group: Any, axis: Any, timeout: Any, x: Any = None) -> kernel.Ring:
    timeout = checks.number("timeout", timeout, positive=True)
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "there is no process group: call torch.distributed.init_process_group first, in a program that torchrun starts"
        )
    if isinstance(group, DeviceMesh):
        group = group.get_group(_axis(group, axis))
    elif axis is not None:
        raise ValueError(f"axis is {axis!r}, but group is no DeviceMesh: only a mesh has axes")
    group = dist.group.WORLD if group is None else group
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not in the group: those that are make the call")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or a DeviceMesh, not {type(group).__name__}")
    device = torch.device(getattr(x, "device", "cpu"))
    if x is not None and dist.get_world_size(group) > 1:
        had = dist.get_backend_config(group)  # "cpu:gloo,cuda:nccl"
        backend = dict(pair.split(":") for pair in had.split(",")).get(device.type)
        if backend is None or (backend == "gloo" and device.type != "cpu"):  # which sends to and from main memory alone
            raise ValueError(
                f"an array lies on {device}, and the group, {had}, sends nothing from there: on GPUs "
                'torch.distributed.init_process_group("nccl"), on CPUs "gloo", for both "cpu:gloo,cuda:nccl"'
            )
    return kernel.Ring(group, dist.get_rank(group), dist.get_world_size(group), timeout, device)


def _axis(mesh: Any, axis: Any) -> Any:
    names = mesh.mesh_dim_names or ()
    available = f"{mesh.ndim} axes" + (f", {', '.join(names)}" if names else "")
    if axis is None and mesh.ndim > 1:
        raise ValueError(f"the mesh has {available}: say by axis= over which of them the sequence lies")
    if axis is None:
        return 0
    if axis not in names and not (conversion.is_integer(axis) and -mesh.ndim <= axis < mesh.ndim):
        raise ValueError(f"the mesh has no axis {axis!r}; it has {available}")
    return axis if isinstance(axis, str) else int(axis) % mesh.ndim


def _exchange(ring: kernel.Ring, numbers: Sequence[int]) -> list[list[int]]:
    """The integers of every process."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=ring.device)
    return [x.tolist() for x in ring.gathered(mine, [mine.shape] * ring.size)]


# ---- the message that processes send each other

OPTIONS = ("mask", "bias", "valid_lens", "causal", "query_offset", "window", "segments", "scale", "softcap", "sink",
           "return_lse")  # fmt: skip

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COUNTS = ("axes", "query heads", "key heads", "features of the query", "features of the value")
COMPARED = ("dtype", *(f"number of {x}" for x in COUNTS), "batch axes", "options: causal, query_offset, window, scale, "
            "softcap and zigzag, and which of mask, bias, valid_lens, segments and sink are given",
            "need of gradients")  # fmt: skip
MESSAGE = (*COMPARED, "n", "m", "columns", "ids", "fine")  # the integers that each process sends to all, in this order


def _checked(tab: Any, given: dict[str, Any], options: dict[str, Any], zigzag: bool) -> tuple[Any, Any, list[int]]:
    """(query, key, value, bias, sink) and the options as the tab takes them, and the message to the other processes."""
    for name, x in given.items():
        if hasattr(x, "to_local"):
            raise TypeError(f"{name} is a DTensor; expected the rows that this process holds: {name}.to_local()")
    query, key, value, scores = prepare.inputs(tab, given["query"], given["key"], given["value"], None)
    rest = {name: x for name, x in given.items() if name not in ("query", "key", "value") and x is not None}
    pairs = [rest[name] for name in ("mask", "bias") if name in rest and not callable(rest[name])]
    pairs = [conversion.array(tab, "mask or bias", x, query) for x in pairs]
    columns = max((x.shape[-1] for x in pairs if x.ndim), default=1)
    ids = -1  # of the keys; there are none
    if "segments" in rest:
        if not isinstance(rest["segments"], (tuple, list)) or len(rest["segments"]) != 2:
            raise TypeError("segments must be a pair here: of this process's queries, and of the keys of all processes")
        rest["segments"] = [conversion.array(tab, "segments", x, query) for x in rest["segments"]]
        ids = [1, *rest["segments"][1].shape][-1]
    features, shape = (query.shape[-1], key.shape[-1]), (*scores[:-1], ids if columns == 1 and ids >= 0 else columns)
    options = prepare.options(tab, query, shape, features, return_lse=True, **rest, **options)
    made = query, key, value, options.pop("bias"), options.pop("sink", None)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in made)
    heads = [x.shape[-3] if x.ndim > 2 else 0 for x in (query, key)]
    message = [DTYPES.index(query.dtype), query.ndim, *heads, query.shape[-1], value.shape[-1]]
    message += [_crc(*(x.shape[:-3] for x in (query, key, value)))]
    offset = options["query_offset"] if type(options["query_offset"]) is int else "an array"
    message += [_crc(*(options[name] for name in ("causal", "window", "scale", "softcap")), offset, zigzag, *rest), int(learns)]
    return made, options | {"scores": shape}, [*message, query.shape[-2], key.shape[-2], columns, ids, 1]


def _refusal(unknown: dict[str, Any]) -> Exception:
    for name in unknown:
        if name in prepare.OPTIONS:
            known = ", ".join(OPTIONS)
            return NotImplementedError(f"{name} is not to be had of a sequence that processes share: there are {known}")
    return checks.unknown(unknown, OPTIONS)


def _crc(*values: Any) -> int:
    return zlib.crc32(repr(values).encode())


class Piece(NamedTuple):
    """A run of this process's queries, and one of some process's keys: which rows they are there, which places the keys have
    in the sequence, and where the first query stands, counted from the first of these keys."""

    rows: slice
    cols: slice
    places: slice
    offset: Any


class Plan(NamedTuple):
    """What this process computes: its runs of queries, everyone's runs of keys, and the tab's function with its options."""

    queries: list[Run]
    keys: list[list[Run]]
    scores: tuple[int, ...]
    attend: Any
    mask: Any
    lens: Any
    given: dict[str, Any]

    def count(self, rank: int) -> int:
        """How many keys that process holds."""
        return int(self.keys[rank][-1][0].stop)

    def pieces(self, rank: int) -> Iterator[Piece]:
        """Each run of queries beside each run of that process's keys, where causal and the window let some see some."""
        left, right = (math.inf if x is None else x for x in self.given["window"] or (None, None))
        right = min(right, 0) if self.given["causal"] else right
        for rows, first in self.queries:
            for cols, start in self.keys[rank]:
                n, m = rows.stop - rows.start, cols.stop - cols.start
                offset = self.given["query_offset"] + first - start
                sees = type(offset) is not int or (offset + n - 1 + right >= 0 and offset - left < m)
                if n and m and sees:
                    yield Piece(rows, cols, slice(start, start + m), offset)

    def fused(self, piece: Piece) -> bool | None:
        """Whether SDPA's kernel serves a piece as it is, if no bias is given: of all pairs, False; causal, True; else None."""
        n, m, scale = piece.rows.stop - piece.rows.start, piece.cols.stop - piece.cols.start, self.given["scale"]
        if not (self.mask is self.lens is self.given["softcap"] is None) or (scale is not None and scale <= 0):
            return None
        left, right = self.given["window"] or (None, None)
        right = 0 if self.given["causal"] else right
        if planning.allows_all(n, m, piece.offset, left, right):
            return False
        return True if left is None and right == 0 and type(piece.offset) is int and piece.offset == 0 and n == m else None

    def options(self, piece: Piece) -> dict[str, Any]:
        """The options of the tab, for these queries and keys alone."""
        lens = self.lens
        if lens is not None:
            lens = lens[..., piece.rows] if lens.ndim == (2 if len(self.scores) > 2 else 1) else lens
            lens = (lens - piece.places.start).clamp(min=0)
        return self.given | {"valid_lens": lens, "query_offset": piece.offset}


def _plan(tab: Any, ring: kernel.Ring, everyone: list[list[int]], options: dict[str, Any], zigzag: bool) -> Plan:
    """The plan of this process. What does not fit from process to process, each of them raises."""
    sent = {name: [numbers[i] for numbers in everyone] for i, name in enumerate(MESSAGE)}
    if 0 in sent["fine"]:
        raise ValueError(f"rank {sent['fine'].index(0)} of the ring refuses its arguments: its own error says why")
    for name in COMPARED:
        other = next((rank for rank, x in enumerate(sent[name]) if x != sent[name][0]), None)
        if other is not None:
            both = [str(sent[name][rank]) for rank in (0, other)]
            both = [str(DTYPES[int(x)]) for x in both] if name == "dtype" else both
            numbers = name in COMPARED[:6]
            shown = f": {both[0]} on rank 0, {both[1]} on rank {other}" if numbers else f" as on rank {other}"
            raise ValueError(f"the processes of the ring differ in their {name}{shown}; expected the same on all")
    total = sum(sent["m"])
    for rank, columns in enumerate(sent["columns"]):
        if columns not in (1, total):
            raise ValueError(
                f"mask or bias has {columns} columns on rank {rank}; expected one for each key of all ranks, {total}"
            )
    for rank, ids in enumerate(sent["ids"]):
        if ids not in (-1, total):
            raise ValueError(f"segments of the keys are {ids} on rank {rank}; expected one for each key of all ranks, {total}")
    queries, keys = _runs(sent["n"], zigzag), _runs(sent["m"], zigzag)
    scores, mask, lens = (options.pop(name) for name in ("scores", "mask", "valid_lens"))
    return Plan(queries[ring.rank], keys, scores, tab.attention, mask, lens, options | {"return_lse": True})
