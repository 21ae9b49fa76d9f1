"""Attention on a CUDA device: which kernel serves a call. scaled_dot_product_attention is called as it is wherever it has no
mask to read; the rest of what differs from it goes to a kernel that skips what may not attend:

==========================================================  ======================================================
nothing but causal from position 0, n = m                   scaled_dot_product_attention, which chooses by itself
causal at another offset (an int)                           "corner": the same, aligned to the last key; no mask
valid_lens, window, softcap, offsets in an array            "flex": compiled flex_attention with a BlockMask
float32, valid_lens (and causal from 0) alone               "slices": entries of one length together
mask, bias, dropout, weights, lse, float64, tiny, compiled  None: the tab's own path, as on the CPU
==========================================================  ======================================================

Why flex for lengths in half precision: the variable-length kernel (torch.nn.attention.varlen) is FlashAttention 2, which
others have measured at about half of cuDNN's speed on Hopper; cuDNN builds a plan for every new length. Why slices in
float32: flex would multiply without tensor cores there, where the kernel behind scaled_dot_product_attention splits each
number in three (3xTF32), at full precision whatever allow_tf32 says.
"""

from __future__ import annotations

import math
import warnings
import weakref
from functools import cache
from importlib.util import find_spec
from types import FunctionType

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvattn.kernels.torch import sdpa as kernels

HALF = (torch.float16, torch.bfloat16)
SHORTEST = 128  # queries, and keys, that are worth flex_attention's blocks
BLOCK = 128  # queries, and keys, of one block: flex_attention's own
WIDEST = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}  # features that fit the kernel's shared memory
PROGRAMS = 32  # compiled at most, each for one scale, softcap, dtype and number of heads and features
OLDEST = (2, 10)  # the first PyTorch whose flex_attention was read, or run, for this
KEPT = 8  # masks that are kept for the next layer's call

WHY = {
    "corner": "causal from an offset, aligned to the last key without a mask",
    "slices": "entries of one length together, each over its own keys",
    "flex": "blocks of keys that no query of a block may attend to are skipped",
}

_programs = {}
_kept = {}


# ---- which kernel


def choose(query, key, value, mask, bias, valid_lens, causal, query_offset, window, scale, softcap):
    """The kernel that serves such a call: "corner", "slices", "flex", or None for the tab's own path."""
    left, right = window or (None, None)
    bounded = causal or left is not None or right is not None
    if mask is not None or bias is not None or not (bounded or softcap or valid_lens is not None):
        return None
    if kernels.tracing() or not kernels.serves(query, key, value, bias, scale):
        return None
    if torch.is_autocast_enabled("cuda") or not _in_heads(query, key, value) or query.shape[-2] == 0:
        return None
    only_causal = causal and window is None and not softcap
    if only_causal and valid_lens is None and isinstance(query_offset, int):
        square = query_offset == 0 and query.shape[-2] == key.shape[-2]
        return None if square else "corner"
    from_zero = isinstance(query_offset, int) and query_offset == 0
    if valid_lens is not None and valid_lens.ndim == 1 and not softcap and window is None and (not causal or from_zero):
        if query.dtype == torch.float32:
            lens = _read(valid_lens)
            return "slices" if lens and all(lens) else None
        if valid_lens.device.type == "cpu" and len({*valid_lens.tolist()}) == 1:  # the tab slices: it is one call
            return None
    return "flex" if _flexible(query, key, value) else None


def _in_heads(query, key, value):
    """Whether the arrays are (batch, h, r, c), or (batch, r, c), of one batch."""
    return query.ndim in (3, 4) and query.shape[0] == key.shape[0] == value.shape[0] and key.shape[:-1] == value.shape[:-1]


def _flexible(query, key, value):
    widths = (query.shape[-1], value.shape[-1])
    if query.dtype not in WIDEST or min(widths) < 16 or max(widths) > WIDEST[query.dtype]:
        return False
    if min(query.shape[-2], key.shape[-2]) < SHORTEST:
        return False
    return can_compile(query.device)


@cache
def can_compile(device):
    """Whether Triton can compile for the device: not for those before Ampere, and where it is not installed (Windows)."""
    version = tuple(int(x) for x in torch.__version__.split(".")[:2])
    return version >= OLDEST and find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _read(lens):
    """Lengths as a list; waits for a GPU's, once for each tensor; None while a CUDA graph is captured."""
    if lens.device.type == "cpu":
        return lens.tolist()
    if torch.cuda.is_current_stream_capturing():
        return None
    return _once(("lengths",), [lens], lens.tolist)


# ---- the kernels


def attention(kernel, query, key, value, mask, bias, valid_lens, causal, query_offset, window, scale, softcap):
    """softmax(softcap(scale * query @ key.T)) @ value over the keys allowed, by the kernel that `choose` named."""
    if kernel == "slices":
        return slices(query, key, value, _read(valid_lens), causal, scale)
    if query.ndim == 3:
        query, key, value = (x[:, None] for x in (query, key, value))
        return attention(kernel, query, key, value, mask, bias, valid_lens, causal, query_offset, window, scale, softcap)[:, 0]
    if kernel == "corner":
        return corner(query, key, value, query_offset, scale)
    return flex(query, key, value, valid_lens, causal, query_offset, window, scale, softcap)


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


def flex(query, key, value, valid_lens, causal, query_offset, window, scale, softcap):
    """Compiled flex_attention, on the blocks of keys that some query of the block may attend to."""
    heads, n, d = query.shape[1:]
    m, scale = key.shape[-2], 1 / math.sqrt(d or 1) if scale is None else scale
    spans = blocks = None
    if valid_lens is not None or causal or window is not None:
        left = (window or (None, None))[0]
        from_zero = isinstance(query_offset, int) and query_offset == 0
        spans, blocks, seen, sees = _planned(n, m, query.device, valid_lens, causal, query_offset, window)
        if valid_lens is not None or not from_zero or n != m:  # NaN there would leak as 0 * NaN
            key, value = (torch.where(seen[:, None, :, None], x, 0) for x in (key, value))
        if not from_zero or (left is not None and (valid_lens is not None or n != m)) or getattr(valid_lens, "ndim", 1) == 2:
            query = torch.where(sees[:, None, :, None], query, 0)
    signature = (query.dtype, heads, key.shape[1], d, value.shape[-1], scale, softcap, spans is not None and len(spans[0]) > 1)
    run = _Flex(signature, spans, blocks, scale, softcap)
    return kernels.twice_differentiable(run, query, key, value, formula=run.formula)


class _Flex:
    """Compiled flex_attention over the spans of keys; `formula` is the same with all its scores, for second derivatives."""

    def __init__(self, signature, spans, blocks, scale, softcap):
        self.signature, self.spans, self.blocks, self.scale, self.softcap = signature, spans, blocks, scale, softcap

    def __call__(self, query, key, value):
        program = compiled(self.signature)
        if program is None:
            return self.formula(query, key, value)
        change = None if self.softcap is None else capped(self.softcap)
        try:
            return program(query, key, value, change, self.blocks, self.scale, query.shape[1] != key.shape[1])
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            warnings.warn(f"flex_attention did not compile, so attention takes its scores whole: {error}", stacklevel=2)
            _programs[self.signature] = None
            return self.formula(query, key, value)

    def formula(self, query, key, value):
        wide = torch.float32 if query.dtype in HALF else query.dtype
        grouped = query.to(wide).unflatten(1, (key.shape[1], -1))  # (batch, key heads, group, n, d)
        scores = self.scale * (grouped @ key.to(wide)[:, :, None].transpose(-1, -2))
        scores = scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)
        if self.spans is not None:
            first, last = (x[:, None, None, :, None] for x in self.spans)
            at = torch.arange(key.shape[-2], device=key.device)
            allowed = (at >= first) & (at < last)
            some = allowed.any(dim=-1, keepdim=True)
            scores = torch.where(allowed | ~some, scores, -math.inf)
        weights = torch.softmax(scores, dim=-1)
        weights = weights if self.spans is None else torch.where(some, weights, 0)
        return (weights @ value.to(wide)[:, :, None]).flatten(1, 2).to(query.dtype)


# ---- compiled flex_attention


def compiled(signature):
    """The compiled flex_attention for calls of one signature, or None where it failed to compile before."""
    if signature not in _programs:
        _make_room(_programs, PROGRAMS)
        # a code object of its own: the limit of recompilations, past which Dynamo gives up, is counted for each
        _programs[signature] = torch.compile(FunctionType(_call.__code__.replace(), globals()), fullgraph=True)
    return _programs[signature]


def _call(query, key, value, score_mod, block_mask, scale, grouped):
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(
        query, key, value, score_mod, block_mask, scale, grouped, kernel_options={"FLOAT32_PRECISION": "'ieee'"}
    )


def capped(softcap):
    def change(score, b, h, i, j):
        return softcap * torch.tanh(score / softcap)

    return change


def inside(first, last):
    """Whether key j lies in query i's span [first, last): (batch, n), or (1, n) for every entry."""
    if len(first) == 1:
        first, last = first[0], last[0]
        return lambda b, h, i, j: (j >= first[i]) & (j < last[i])
    return lambda b, h, i, j: (j >= first[b, i]) & (j < last[b, i])


# ---- spans of keys, and the blocks that they touch


def _planned(n, m, device, valid_lens, causal, query_offset, window):
    """The spans, their BlockMask, and which keys are seen and which queries see; kept for the next layer's call."""

    def make():
        found = spans(n, m, device, valid_lens, causal, query_offset, window)
        return found, blocks(*found, m), *touched(*found, m)

    arrays = [x for x in (valid_lens, query_offset) if isinstance(x, torch.Tensor)]
    how = (
        torch.is_inference_mode_enabled(),
        n,
        m,
        device,
        causal,
        window,
        query_offset if isinstance(query_offset, int) else None,
        valid_lens is None,
    )
    return _once(how, arrays, make)


def spans(n, m, device, valid_lens, causal, query_offset, window):
    """(first, last), int32 (1 or batch, n): query i may attend to the keys first <= j < last; (m, 0) for none."""
    left, right = window or (None, None)
    right = 0 if causal else right
    if isinstance(query_offset, torch.Tensor):
        query_offset = query_offset.to(device).reshape(-1, 1)
    position = query_offset + torch.arange(n, device=device)[None]
    first = torch.zeros_like(position) if left is None else (position - left).clamp(0, m)
    last = torch.full_like(position, m) if right is None else (position + right + 1).clamp(0, m)
    if valid_lens is not None:
        last = torch.minimum(last, valid_lens.to(device).reshape(valid_lens.shape[0], -1))
    first, last = torch.broadcast_tensors(first, last)
    some = first < last
    return torch.where(some, first, m).int(), torch.where(some, last, 0).int()


def blocks(first, last, m):
    """The BlockMask of spans: which blocks of keys each block of queries reads, and which of them need no mask."""
    from torch.nn.attention.flex_attention import BlockMask

    n = first.shape[-1]
    rows = -n % BLOCK
    first = torch.nn.functional.pad(first, (0, rows), value=m).unflatten(-1, (-1, BLOCK))
    last = torch.nn.functional.pad(last, (0, rows), value=0).unflatten(-1, (-1, BLOCK))
    start = torch.arange(0, max(m, 1), BLOCK, device=first.device)

    def bound(x):
        return x[:, None, :, None]  # (batch, 1, blocks of queries, 1)

    some = (start < bound(last.amax(-1))) & (start + BLOCK > bound(first.amin(-1)))
    full = (start >= bound(first.amax(-1))) & (start + BLOCK <= bound(last.amin(-1)))
    lists = []
    for dense in (some & ~full, full):
        for side in (dense, dense.transpose(-1, -2)):
            side = side.int()
            order = side.argsort(dim=-1, descending=True, stable=True)
            lists += [side.sum(dim=-1).int().contiguous(), order.int().contiguous()]
    kv, kv_at, q, q_at, full_kv, full_kv_at, full_q, full_q_at = lists
    mask_mod = inside(first.flatten(-2)[:, :n].contiguous(), last.flatten(-2)[:, :n].contiguous())
    return BlockMask((n, m), kv, kv_at, full_kv, full_kv_at, q, q_at, full_q, full_q_at, (BLOCK, BLOCK), mask_mod)


def touched(first, last, m):
    """(seen, sees): the keys (batch, m) in some query's span, and the queries (batch, n) that have one."""
    sees = first < last
    steps = first.new_zeros((len(first), m + 1))
    steps.scatter_add_(1, first.long(), sees.int())
    steps.scatter_add_(1, last.long(), -sees.int())
    return steps.cumsum(dim=1)[:, :m] > 0, sees


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
