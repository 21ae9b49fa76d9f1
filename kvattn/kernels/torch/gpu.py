"""Attention on a CUDA device: which kernel serves a call. scaled_dot_product_attention is called as it is wherever it has no
mask to read; the rest of what differs from it goes to a kernel that skips what may not attend:

==========================================================  ======================================================
nothing but causal from position 0, n = m                   scaled_dot_product_attention, which chooses by itself
causal at another offset (an int)                           "corner": the same, aligned to the last key; no mask
float32, valid_lens (and causal from 0) alone               "slices": entries of one length together
float32, window, softcap, offsets in an array               "flash": kvattn's own, in Triton (flash.py, tiles.py)
half precision, whatever else is asked for, and lse         "flash"
bias that wants a gradient, dropout, weights, float64, few  None: the tab's own path, as on the CPU
==========================================================  ======================================================

Why slices in float32: "flash" multiplies without tensor cores there, where the kernel behind scaled_dot_product_attention
splits each number in three (3xTF32), at full precision whatever allow_tf32 says.
"""

from __future__ import annotations

import weakref
from functools import cache
from importlib.util import find_spec

import torch
from torch.autograd import forward_ad  # its level is private: read in 2.13
from torch.nn.functional import scaled_dot_product_attention

from kvattn.call import Choice
from kvattn.kernels.torch import sdpa
from kvattn.kernels.torch.traces import known, tracing

HALF = (torch.float16, torch.bfloat16)
WIDEST = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}  # features that fit the kernel's shared memory
SHORTEST = 128  # queries or keys: below, compiling for the call's options would take longer than there is to win
KEPT = 8  # lists of lengths that are kept for the next layer's call
READY = 1024  # calls of the kernel in Triton that are prepared

_kept = {}
_ready = {}  # of calls that the kernel in Triton served before: the choice, prepared for their like


# ---- which kernel


def choose(query, key, value, call):
    """The kernel that serves softmax of scaled dot products; None for the tab's own path."""
    name = _name(query, key, value, call)
    ready = None if name is None else _ready.get(name)  # torch.compile would watch what it looks into
    return ready or _choose(query, key, value, call)


def _name(query, key, value, call):
    """All that decides about a call, where values and what PyTorch is doing do not; else None."""
    mask, bias, lens, offset = call.mask, call.bias, call.valid_lens, call.query_offset
    if (
        tracing()
        or torch.is_autocast_enabled("cuda")
        or forward_ad._current_level >= 0
        or (bias is not None and bias.requires_grad)
    ):
        return None
    if lens is not None and not lens.is_cuda:
        return None
    placed = offset if type(offset) is int else (offset.device, offset.dtype, offset.shape)
    given = [None if x is None else (x.dtype, x.device, x.shape, x.stride()) for x in (mask, bias, lens, call.sink)]
    return (
        query.device, query.dtype, query.shape, query.stride(), key.device, key.dtype, key.shape, key.stride(), value.device,
        value.dtype, value.shape, value.stride(), *given, placed, call.left, call.right, call.scale, call.softcap,
        call.return_lse, sdpa.wants_gradients(query, key, value),
    )  # fmt: skip


def _choose(query, key, value, call):
    """The kernel that serves softmax of scaled dot products; None for the tab's own path."""
    recorded = tracing()
    plain = call.mask is None and call.bias is None and call.sink is None and not call.softcap and not call.return_lse
    if (plain and not call.restricted) or not _possible(query, key, value, call, recorded):
        return None
    causal = call.right == 0 and call.left is None  # else it is a window
    if plain and causal and call.valid_lens is None and type(call.query_offset) is int:
        if call.from_the_first and known(query.shape[-2] == key.shape[-2]):
            return None
        if not recorded:
            return Choice("SDPA, corner", "causal from an offset, aligned to the last key without a mask", (), corner)
    entries = (
        call.valid_lens is not None and call.valid_lens.ndim == 1 and ((causal and call.from_the_first) or not call.windowed)
    )
    if plain and entries and not recorded:
        if query.dtype == torch.float32:
            return _by_slices(call.valid_lens)
        if call.valid_lens.device.type == "cpu" and len({*call.valid_lens.tolist()}) == 1:  # the tab slices: it is one call
            return None
    return FLASH if _flash_is_faster(query, key, value, call, causal) and _flexible(query, key, value) else None


def _possible(query, key, value, call, recorded):
    """Whether any kernel of this file can serve the call."""
    if recorded and (not torch.compiler.is_compiling() or torch.compiler.is_exporting()):
        return False
    if call.sink is not None and (recorded or query.ndim != 4):  # the tab adds it to the kernel's lse
        return False
    if torch.is_autocast_enabled("cuda") or not _in_heads(query, key, value):
        return False
    return not sdpa.obstacle(query, key, value, call.bias, call.scale)


def _by_slices(lens):
    lengths = _read(lens)
    why = "entries of one length together, each over its own keys"
    return Choice("SDPA, slices", why, lengths, slices) if lengths and all(lengths) else None


def _flash_is_faster(query, key, value, call, causal):
    """Whether kvattn's kernel is faster than SDPA with a mask, and all arrays are where it reads them."""
    window = call.windowed and not causal
    moved = call.windowed and type(call.query_offset) is not int
    if query.dtype == torch.float32 and not (call.softcap or window or moved):
        return False
    wide = max(query.shape[-1], value.shape[-1]) > 128
    if wide and not (call.softcap or window or call.return_lse) and sdpa.wants_gradients(query, key, value):
        return False  # three times as slow backward as SDPA with a mask, on an H100
    others = key, value, call.mask, call.bias, call.sink
    return all(x is None or x.device == query.device for x in others)  # it would take their addresses for its own


def _in_heads(query, key, value):
    """Whether the arrays are (batch, h, r, c), or (batch, r, c), of one batch, and not empty."""
    if query.ndim not in (3, 4) or not query.shape[0] == key.shape[0] == value.shape[0] or key.shape[:-1] != value.shape[:-1]:
        return False
    return 0 not in query.shape and 0 not in value.shape


def _flexible(query, key, value):
    if query.dtype not in WIDEST or not query.dtype == key.dtype == value.dtype:
        return False
    if max(query.shape[-2], key.shape[-2]) < SHORTEST or max(query.shape[-1], value.shape[-1]) > WIDEST[query.dtype]:
        return False
    return can_compile(query.device)


@cache
def can_compile(device):
    """Whether Triton can compile for the device: not for those before Ampere, and where it is not installed (Windows)."""
    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    from kvattn.kernels.torch import flash  # noqa: F401  (its operators are there before a program is recorded)

    return True


# What torch.compiler.assume_constant_result does (private: read in 2.13). That loads the compiler, and with it Triton, which
# ends a process that has loaded TensorFlow.
can_compile._dynamo_marked_constant = True


def _read(lens):
    """Lengths as a list; waits for a GPU's, once for each tensor, unwritten since; None while a CUDA graph is captured."""
    if lens.device.type != "cpu" and torch.cuda.is_current_stream_capturing():
        return None
    if lens.device.type == "cpu" or lens.is_inference():  # whose versions are not counted
        return lens.tolist()
    ref, lengths = _kept.get(name := (id(lens), lens._version), (None, None))
    if ref is None or ref() is not lens:
        _make_room(_kept, KEPT)
        lengths = lens.tolist()
        _kept[name] = weakref.ref(lens), lengths
    return lengths


# ---- the kernels


def slices(query, key, value, call, lengths):
    """Each batch entry over its own first keys, entries of one length together: no work on padding, and none to hide."""
    order, parts = [], []
    lengths = [min(length, key.shape[-2]) for length in lengths]
    for length in sorted({*lengths}):
        entries = [i for i, of in enumerate(lengths) if of == length]
        q, k, v = (x if len(entries) == len(lengths) else x[entries] for x in (query, key, value))
        parts.append(sdpa.fused(q, k[..., :length, :], v[..., :length, :], None, call.windowed, call.scale))
        order += entries
    return parts[0] if len(parts) == 1 else torch.cat(parts)[sorted(range(len(order)), key=order.__getitem__)]


def corner(query, key, value, call, blocks=()):
    """Causal attention of queries that stand at offset, offset + 1, ...: those before the first key see nothing, those from
    the last key on see all, and the rest is a triangle aligned to its last key. No mask, and no key that nobody sees."""
    if query.ndim == 3:
        return corner(*(x[:, None] for x in (query, key, value)), call)[:, 0]
    n, m, offset = query.shape[-2], key.shape[-2], call.query_offset
    first, last = min(max(-offset, 0), n), min(max(m - offset, 0), n)
    first = min(first, last)
    parts = []
    if first:
        parts.append(query.new_zeros((*query.shape[:-2], first, value.shape[-1])))
    if last > first:
        rows, near = query[..., first:last, :], (x[..., : offset + last, :] for x in (key, value))
        square = offset + last == last - first
        parts.append(sdpa.twice_differentiable(_Triangle(square, call.scale), rows, *near))
    if n > last:
        parts.append(sdpa.twice_differentiable(_Triangle(None, call.scale), query[..., last:, :], key, value))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _flash(query, key, value, call, blocks=()):
    from kvattn.kernels.torch import flash  # imports Triton, which not everyone has

    name = _name(query, key, value, call)
    if name is None:
        return flash.attention(query, key, value, call)
    _make_room(_ready, READY)
    prepared = flash.Prepared(query, key, value, call)
    _ready[name] = FLASH._replace(run=prepared)
    return prepared(query, key, value, call)


FLASH = Choice("kvattn's kernel in Triton", "tiles of keys that no query of a tile may attend to are skipped", (), _flash)


class _Triangle:
    """scaled_dot_product_attention: on all keys (None), or causal, square (True) or aligned to the last key (False)."""

    def __init__(self, square, scale):
        self.square, self.scale = square, scale

    def __call__(self, query, key, value):
        grouped = {} if query.shape[1] == key.shape[1] else {"enable_gqa": True}
        mask = None
        if self.square is False:
            from torch.nn.attention.bias import causal_lower_right  # loads the compiler, which `import kvattn.torch` need not

            mask = causal_lower_right(query.shape[-2], key.shape[-2])
        return scaled_dot_product_attention(query, key, value, mask, is_causal=self.square is True, scale=self.scale, **grouped)


def _make_room(entries, most):
    """Forgets the oldest entries, so that one more fits."""
    while len(entries) >= most:
        entries.pop(next(iter(entries)), None)
