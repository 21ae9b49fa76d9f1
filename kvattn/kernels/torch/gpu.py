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
from torch.nn.functional import scaled_dot_product_attention

from kvattn.kernels.torch import sdpa as kernels

HALF = (torch.float16, torch.bfloat16)
WIDEST = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}  # features that fit the kernel's shared memory
SHORTEST = 128  # queries or keys: below, compiling for the call's options would take longer than there is to win
KEPT = 8  # lists of lengths that are kept for the next layer's call

WHY = {
    "corner": "causal from an offset, aligned to the last key without a mask",
    "slices": "entries of one length together, each over its own keys",
    "flash": "tiles of keys that no query of a tile may attend to are skipped",
}

_kept = {}


# ---- which kernel


def choose(query, key, value, mask, bias, valid_lens, causal, query_offset, window, scale, softcap, return_lse=False):
    """The kernel that serves such a call: "corner", "slices", "flash", or None for the tab's own path."""
    left, right = window or (None, None)
    bounded = causal or left is not None or right is not None
    alone = mask is None and bias is None and not softcap and not return_lse
    if alone and not bounded and valid_lens is None:
        return None
    recorded = kernels.tracing()
    if recorded and (not torch.compiler.is_compiling() or torch.compiler.is_exporting()):
        return None
    if (
        not kernels.serves(query, key, value, bias, scale)
        or torch.is_autocast_enabled("cuda")
        or not _in_heads(query, key, value)
    ):
        return None
    n, m = query.shape[-2], key.shape[-2]
    from_zero = isinstance(query_offset, int) and query_offset == 0
    if alone and valid_lens is None and causal and window is None and isinstance(query_offset, int):
        if from_zero and kernels.known(n == m):
            return None
        if not recorded:
            return "corner"
    if (
        alone
        and valid_lens is not None
        and valid_lens.ndim == 1
        and window is None
        and (not causal or from_zero)
        and not recorded
    ):
        if query.dtype == torch.float32:
            lens = _read(valid_lens)
            return "slices" if lens and all(lens) else None
        if valid_lens.device.type == "cpu" and len({*valid_lens.tolist()}) == 1:  # the tab slices: it is one call
            return None
    if query.dtype == torch.float32 and not (softcap or window or (causal and not isinstance(query_offset, int))):
        return None
    if (
        max(query.shape[-1], value.shape[-1]) > 128
        and not (softcap or window or return_lse)
        and kernels._taped(query, key, value)
    ):
        return None  # three times as slow backward as SDPA with a mask, on an H100
    return "flash" if _flexible(query, key, value) else None


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


@torch.compiler.assume_constant_result
@cache
def can_compile(device):
    """Whether Triton can compile for the device: not for those before Ampere, and where it is not installed (Windows)."""
    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    from kvattn.kernels.torch import flash  # noqa: F401  (its operators are there before a program is recorded)

    return True


def _read(lens):
    """Lengths as a list; waits for a GPU's, once for each tensor; None while a CUDA graph is captured."""
    if lens.device.type == "cpu":
        return lens.tolist()
    if torch.cuda.is_current_stream_capturing():
        return None
    return _once(("lengths",), [lens], lens.tolist)


# ---- the kernels


def attention(
    kernel, query, key, value, mask, bias, valid_lens, causal, query_offset, window, scale, softcap, return_lse=False
):
    """softmax(softcap(scale * query @ key.T) + bias) @ value over the keys allowed, by the kernel that `choose` named."""
    if kernel == "slices":
        return slices(query, key, value, _read(valid_lens), causal, scale)
    if query.ndim == 3:
        query, key, value = (x[:, None] for x in (query, key, value))
        mask, bias = (x[:, None] if x is not None and x.ndim == 3 else x for x in (mask, bias))
        given = (mask, bias, valid_lens, causal, query_offset, window, scale, softcap, return_lse)
        results = attention(kernel, query, key, value, *given)
        return tuple(x[:, 0] for x in results) if return_lse else results[:, 0]
    if kernel == "corner":
        return corner(query, key, value, query_offset, scale)
    from kvattn.kernels.torch import flash  # imports Triton, which not everyone has

    return flash.attention(query, key, value, mask, bias, valid_lens, causal, query_offset, window, scale, softcap, return_lse)


def slices(query, key, value, lens, causal, scale):
    """Each batch entry over its own first keys, entries of one length together: no work on padding, and none to hide."""
    order, parts = [], []
    lens = [min(length, key.shape[-2]) for length in lens]
    for length in sorted({*lens}):
        entries = [i for i, of in enumerate(lens) if of == length]
        q, k, v = (x if len(entries) == len(lens) else x[entries] for x in (query, key, value))
        parts.append(kernels.attention(q, k[..., :length, :], v[..., :length, :], None, None, causal, scale))
        order += entries
    return parts[0] if len(parts) == 1 else torch.cat(parts)[sorted(range(len(order)), key=order.__getitem__)]


def corner(query, key, value, offset, scale):
    """Causal attention of queries that stand at offset, offset + 1, ...: those before the first key see nothing, those from
    the last key on see all, and the rest is a triangle aligned to its last key. No mask, and no key that nobody sees."""
    n, m = query.shape[-2], key.shape[-2]
    first, last = min(max(-offset, 0), n), min(max(m - offset, 0), n)
    first = min(first, last)
    parts = []
    if first:
        parts.append(query.new_zeros((*query.shape[:-2], first, value.shape[-1])))
    if last > first:
        rows, seen = query[..., first:last, :], (x[..., : offset + last, :] for x in (key, value))
        square = offset + last == last - first
        parts.append(kernels.twice_differentiable(_Triangle(square, scale), rows, *seen))
    if n > last:
        parts.append(kernels.twice_differentiable(_Triangle(None, scale), query[..., last:, :], key, value))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


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


def _once(how, arrays, make):
    """What ``make`` gives for the same arrays, unwritten since, and the same ``how``."""
    if any(x.is_inference() for x in arrays):  # their versions are not counted
        return make()
    name = (how, *((id(x), x._version) for x in arrays))
    refs, made = _kept.get(name, ((), None))
    if made is None or any(ref() is not x for ref, x in zip(refs, arrays, strict=True)):
        _make_room(_kept, KEPT)
        made = make()
        _kept[name] = [weakref.ref(x) for x in arrays], made
    return made


def _make_room(entries, most):
    """Forgets the oldest entries, so that one more fits."""
    while len(entries) >= most:
        entries.pop(next(iter(entries)), None)
