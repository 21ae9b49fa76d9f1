"""The PyTorch tab's fast path: scaled_dot_product_attention, with the gaps to kvattn's promises closed."""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import groupby

import torch
from torch._C import _is_tracing
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from kvattn import bands
from kvattn.kernels.torch import pairs
from kvattn.kernels.torch.traces import fusible, known, readable, tracing

CALL = 2**22  # multiplications that one more call must save, and
READ = 32  # that take as long as reading one number of a key or value
GAIN = 0.25  # share of the work that calls apart must save: they keep the cores less busy than one
PAIRS = 2**24  # numbers that are held at one time, of scores, masks or features: arrays under 32 MB would fragment glibc's heap
ROWS = 256  # queries of a block for which nothing but a mask is held
EMPTY_ROWS = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 11)  # zeros on a CPU: run there, and in 2.13
LACKS = "SDPA has no forward derivatives, no gradient by bias, no scale of 0 or less, and no answer without keys"


def without_leaks(*inputs):
    """Whether no NaN or inf in rows that meet nobody can reach a gradient: nobody asks for one, or all inputs are finite."""
    if tracing():
        return False
    if not torch.is_grad_enabled():
        return True
    return all(readable(x) and pairs.finite(x) for x in {id(x): x for x in inputs}.values())


def choose(query, key, value, usual, score, softcap, scale, where, reach, whole):
    """(kernel, its parts) of a call. ``usual``: softmax of scaled dot products; ``whole``: its weights are asked for."""
    fused = usual and not softcap and serves(query, key, value, where["bias"], scale)
    if fused and (parts := runs(query, key, value, **where, **reach)):
        return "SDPA, by lengths", parts
    n, m = query.shape[-2], key.shape[-2]
    unmasked = where["mask"] is where["bias"] is where["valid_lens"] is reach["window"] is None and not reach["causal"]
    if fused and (unmasked or is_triangle(n, m, **where, **reach)):
        return "SDPA", []
    parts = [] if whole else bands.plan(n, m, reach["causal"], where["query_offset"], reach["window"])
    kernel = "SDPA, in blocks" if fused else "the formula, in blocks"
    if not parts and (parts := rows(query, key, value, score, fused, **where, **reach)) and not fused:
        kernel = "the formula, in blocks computed again"
    if fused and n and is_band(n, m, **where, **reach):
        return "SDPA, in bands", [_band(i, j, m, where["query_offset"], **reach) for i, j, *_ in parts or [(0, n)]]
    if parts:
        return kernel, parts
    return "SDPA" if fused else "the formula", []


def serves(query, key, value, bias, scale):
    """Whether the fused kernels keep the promises: they lack gradients by bias, forward derivatives and second ones."""
    if key.shape[-2] == 0:  # they give NaN where a query is NaN, not the zeros of nothing to attend to
        return False
    if bias is not None and bias.requires_grad:
        return False
    if scale is not None and scale <= 0:  # CUDA's flash kernel takes the row maximum before it scales
        return False
    if is_compiling() or _is_tracing():
        return fusible() and (is_compiling() or not _transformed(query, key, value))
    return not _transformed(query, key, value)


def _transformed(*inputs):
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs)


def _taped(query, key, value):
    return (query.requires_grad or key.requires_grad or value.requires_grad) and torch.is_grad_enabled()


def runs(query, key, value, mask, bias, valid_lens, causal, query_offset, window):
    """Neighbours in the batch that have as many keys and share a call, [(how many, keys)]; or [].

    For valid_lens (batch,), where it is the only mask but for causal, can be read without a wait, and calls apart save work.
    """
    if valid_lens is None or valid_lens.ndim != 1 or not mask is bias is window is None or not readable(valid_lens):
        return []
    if causal and not (isinstance(query_offset, int) and query_offset == 0):
        return []
    if not query.shape[0] == key.shape[0] == value.shape[0] == len(valid_lens) or query.ndim < 3:
        return []
    n, m = query.shape[-2], key.shape[-2]
    most = min(n, m) if causal else m
    lens = [max(0, min(length, most)) for length in valid_lens.tolist()]  # those of a block may end before it begins
    found = [(len([*same]), length) for length, same in groupby(lens)]
    each = (n + READ) * math.prod(query.shape[1:-2]) * (query.shape[-1] + value.shape[-1])  # of a key
    saved, whole = each * (m * len(lens) - sum(lens)), each * m * len(lens)
    too_large = causal and len(lens) * n * m > PAIRS  # a mask
    return found if len(found) <= 1 or too_large or saved > max(CALL * len(found), GAIN * whole) else []


def by_runs(attend, found, query, key, value, causal, scale):
    """Each run by itself: no work on padding, and none to hide."""
    parts = (x.split([size for size, _ in found]) for x in (query, key, value))
    outputs = []
    for (_, length), q, k, v in zip(found, *parts, strict=True):
        k, v = k[..., :length, :], v[..., :length, :]
        outputs.append(fused(q, k, v, None, causal, scale) if length else attend(q, k, v))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def rows(query, key, value, score, fused, mask, bias, valid_lens, causal, query_offset, window):
    """Blocks of queries, as bands.plan's, that hold at most PAIRS numbers each; [] where one block is all."""
    if tracing() or _transformed(query, key, value):
        return []
    if not fused:
        return bands.rows(score, query.shape, key.shape, PAIRS)
    # nothing but masks is held; with gradients each block would keep its own, and keys without padding
    n, m, by_query = query.shape[-2], key.shape[-2], valid_lens is not None and valid_lens.ndim == (2 if query.ndim > 2 else 1)
    if not (causal or window or by_query) or mask is not bias or _taped(query, key, value):
        return []
    size = max(ROWS, PAIRS // max(1, m * (len(valid_lens) if by_query and query.ndim > 2 else 1)))
    reach = query_offset if causal and isinstance(query_offset, int) else m
    return [(i, j, 0, min(max(reach + j, 0), m)) for i in range(0, n, size) for j in [min(i + size, n)]] if size < n else []


def again(attend, rng):
    """``attend``, which keeps nothing for its gradients but its arguments: it is computed again, with the same draws of rng."""
    if not torch.is_grad_enabled():
        return attend

    @contextmanager
    def rewound(state):
        now = rng.get_state()
        rng.set_state(state)
        try:
            yield
        finally:
            rng.set_state(now)

    def contexts():
        return nullcontext(), nullcontext() if rng is None else rewound(rng.get_state())

    return partial(checkpoint, attend, use_reentrant=False, context_fn=contexts)


def is_triangle(n, m, mask, bias, valid_lens, causal, query_offset, window):
    """Whether the causal mask from the first key on is the only one: what ``is_causal`` means."""
    if not causal or not isinstance(query_offset, int) or query_offset != 0:
        return False
    if not (type(n) is type(m) is int or known(n == m)):  # whether there are keys that nobody sees is not known
        return False
    return mask is None and bias is None and valid_lens is None and window is None


def attention(query, key, value, allowed, bias, triangle, scale, hide=None):
    """softmax(scale * query @ key.T + bias) @ value: (..., h, n, v). A query with nothing to attend to gets zeros.

    ``hide``: a function (query, key, value) -> the same with zeros for what meets nobody. It copies them, and so is called
    only where the output tells that NaN or inf came through, or where nobody may look at it.
    """
    hide = hide or (lambda *inputs: inputs)
    if allowed is None and bias is None:
        return fused(*hide(query, key, value), None, triangle, scale)
    allowed, bias = (x if x is None else x.reshape(*[1] * (query.ndim - x.ndim), *x.shape) for x in (allowed, bias))
    exact = partial(pairs.attention, allowed=allowed, bias=bias, scale=scale)

    def hidden(query, key, value):
        query, key, value = hide(query, key, value)
        if allowed is None:
            return fused(query, key, value, bias, False, scale, exact)
        # an empty row attends to all and is dropped after: the kernels of GPUs, and older ones, have given NaN for it
        some = allowed.any(dim=-1, keepdim=True)
        added = allowed | ~some if bias is None else torch.where(allowed, bias, torch.where(some, -math.inf, 0).to(bias.dtype))
        return torch.where(some, fused(query, key, value, added, triangle, scale, exact), 0)

    if not (EMPTY_ROWS and query.numel() and readable(query)):
        return hidden(query, key, value)
    added = bias if allowed is None else allowed if bias is None else torch.where(allowed, bias, -math.inf)
    return fused(query, key, value, added, False, scale, exact, hidden)


def forbids(bias):
    """Whether the bias may hold -inf; a sum tells of a bias that can be looked at, which is one read of it."""
    return bias is not None and not (readable(bias) and pairs.finite(bias))


def is_band(n, m, mask, bias, valid_lens, causal, query_offset, window):
    """Whether causal and a window are the only masks, and leave each query some key: no padding to hide."""
    if not (causal or window) or not mask is bias is valid_lens is None:
        return False
    if not type(n) is type(m) is type(query_offset) is int:  # sizes may be symbols
        return False
    left, right = window or (None, None)
    right = 0 if causal else right
    return (right is None or query_offset + right >= 0) and (left is None or query_offset + n - 1 - left < m)


def _band(start, end, m, offset, causal, window):
    """A block of queries, and the keys that some of them sees: the others' NaN would leak."""
    left, right = window or (None, None)
    right = 0 if causal else right
    first = 0 if left is None else max(0, offset + start - left)
    return start, end, first, m if right is None else min(m, offset + end + right)


def by_band(steps, query, key, value, causal, query_offset, window, scale):
    """Causal or a window in blocks of queries and the keys they see; neighbours that lie alike share a mask."""
    left, right = window or (None, None)
    right = 0 if causal else right
    last, mask, parts = None, None, []  # no dict of places: torch.compile would fix what is looked up
    for block, cut in bands.cuts(steps, query, key, value, mask=None, bias=None, valid_lens=None, query_offset=query_offset):
        place = cut["query_offset"], *(x.shape[-2] for x in block[:2])
        if place != last:
            last = offset, n, m = place
            keys = torch.arange(-offset, m - offset, device=query.device)  # from the first query on
            at = torch.arange(n, device=query.device)[:, None]
            beyond = torch.zeros(n, m, dtype=torch.bool, device=query.device) if left is None else keys < at - left
            beyond = beyond if right is None else beyond | (keys > at + right)
            mask = torch.zeros(n, m, dtype=query.dtype, device=query.device).masked_fill_(beyond, -math.inf)
        parts.append(fused(*block, mask, False, scale))
    return torch.cat(parts, dim=-2)


def fused(query, key, value, mask, causal, scale, exact=None, unsound=None):
    """scaled_dot_product_attention; what ``unsound`` gives where NaN or inf reached, or may have, what it may not.

    ``exact``: a function (query, key, value) -> output that takes each pair by itself; by default that of the mask. Its
    derivatives are those where something is not finite, and second ones. ``unsound``: another such function, else ``exact``.
    """
    output = _run(query, key, value, mask, causal, scale)
    taped = _taped(query, key, value) and not tracing()
    sound = pairs.sound(output, query, key, mask is not None, causal)
    if sound and not taped:
        return output
    exact = exact or partial(_exact, mask=mask, causal=causal, scale=scale)
    if not sound:
        return (unsound or exact)(query, key, value)
    return _taped_as(output, exact, query, key, value, mask, mask is None and not causal)


def _exact(query, key, value, mask, causal, scale):
    allowed = bias = None
    if causal:
        allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    elif mask is not None and mask.dtype == torch.bool:
        allowed = mask
    else:
        bias = mask
    return pairs.attention(query, key, value, allowed, bias, scale)


def twice_differentiable(run, query, key, value, formula=None):
    """run(query, key, value); second derivatives are those of ``formula``, or of ``run`` by PyTorch's plain formula."""
    output = run(query, key, value)
    if _taped(query, key, value) and not tracing():
        return _taped_as(output, formula or partial(_formula, run), query, key, value, unlooked=True)
    return output


def _taped_as(output, formula, query, key, value, mask=None, unlooked=False):
    """The output with its gradients. ``unlooked``: on a GPU, or where all may attend to all and 0 * NaN is nobody else's."""
    return _TwiceDifferentiable.apply(output, formula, query, key, value, mask, unlooked)


def _formula(run, *inputs):
    with sdpa_kernel(SDPBackend.MATH):
        return run(*inputs)


def _run(query, key, value, mask, causal, scale):
    """scaled_dot_product_attention on (batch, h, r, c): with another number of axes the CPU's is not the fused one."""
    shape, of_keys = query.shape, key.shape
    if len(shape) == 4 and shape[0] == of_keys[0] == value.shape[0]:
        if shape[1] == of_keys[1]:
            return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale)
        return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=True)
    lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    output = _run(*(x if x is None else _four(x, lead) for x in (query, key, value, mask)), causal, scale)
    return output.reshape(*lead, *query.shape[-3:-1], value.shape[-1])


def _four(x, lead):
    x = x if x.ndim > 2 else x[None]
    return x.expand(*lead, *x.shape[-3:]).reshape(math.prod(lead), *x.shape[-3:])


class _TwiceDifferentiable(torch.autograd.Function):
    """A fused kernel's output and backward; the formula's under create_graph, since the fused one has no derivative, and
    where the fused one would multiply its zeros by NaN or inf. ``mask`` is kept so that a change of it is noticed."""

    @staticmethod
    def forward(ctx, output, formula, query, key, value, mask, unlooked):
        ctx.save_for_backward(query, key, value, mask)
        ctx.formula, ctx.unlooked = formula, unlooked
        return output.detach()

    @staticmethod
    def backward(ctx, grad_output):
        *inputs, _ = ctx.saved_tensors
        twice = torch.is_grad_enabled()
        # with a value that is not finite, neither were the output, nor is this its backward
        if not twice and (ctx.unlooked or not readable(grad_output) or all(map(pairs.finite, (grad_output, *inputs[:2])))):
            return grad_output, None, None, None, None, None, None
        wanted = ctx.needs_input_grad[2:5]
        with torch.enable_grad():  # apart, where one tensor is query and key
            inputs = [x.view_as(x) if twice else x.detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)]
            output = ctx.formula(*inputs)
        chosen = [x for x, w in zip(inputs, wanted, strict=True) if w]
        grads = iter(torch.autograd.grad(output, chosen, grad_output, create_graph=twice))
        return None, None, *(next(grads) if w else None for w in wanted), None, None
