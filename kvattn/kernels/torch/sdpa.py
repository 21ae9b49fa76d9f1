"""scaled_dot_product_attention, with the gaps to kvattn's promises closed: where nothing but softmax is asked for, it computes

    softmax(scale * query @ key.T + bias) @ value          over the keys that a query may attend to

in tiles that are never held whole. It is called as it is wherever it needs no mask, since with one it reads n * m numbers:
for causal from the first key (`whole`), for lengths (`by_lengths`: each batch entry beside its own keys) and for a window
(`in_the_window`: blocks of queries beside the keys in it, whose small masks are shared). `masked` is what is left.

What it lacks is added around it (`fused`): NaN and inf reach no row that may not attend to them, and second derivatives.

Source: Dao 2023, "FlashAttention-2" (https://arxiv.org/abs/2307.08691), which PyTorch's kernels for the CPU and CUDA follow.
"""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch._C import _is_tracing  # private: read in 2.13, as are the other names with an underscore below
from torch.compiler import is_compiling
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from kvattn import planning
from kvattn.call import Choice
from kvattn.kernels.torch import nonfinite, operators, plan, sinks
from kvattn.kernels.torch.traces import dual, fusible, known, readable, tracing
from kvattn.pairs import Pairs

EMPTY_ROWS = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 11)  # zeros on a CPU: run there, and in 2.13

CONSTANTS = 256  # arrays that are kept


# ---- which way serves


def few(query, key):
    """Whether a call is so small that its time is what Python takes, and its values can be looked at."""
    return readable(query) and 0 < query.numel() * key.shape[-2] <= plan.FEW * query.shape[-1]


def small(query, key, value, mask, bias, valid_lens, query_offset, left, right, scale):
    """Whether a small call is SDPA's, with one mask."""
    if not few(query, key) or type(mask) is Pairs or type(query_offset) is not int:
        return False
    if _of_options(bias, scale) or dual(query, key, value):  # of `obstacle` the rest cannot be: values can be looked at
        return False
    if left is right is valid_lens is None:
        return True
    n, m = query.shape[-2], key.shape[-2]
    if left is not None or right is not None:
        large = n > planning.BLOCK or m > planning.FEW
        if large or planning.allows_all(n, m, query_offset, left, right):  # in blocks, or no window at all
            return False
    if valid_lens is None or valid_lens.ndim != 1 or mask is not None:
        return True
    if (n + plan.READ) * (key.numel() + value.numel()) <= plan.CALL:  # nothing that calls apart could save
        return True
    most = m if right is None else min(n, m)
    return readable(valid_lens) and plan.differ(valid_lens.tolist(), most)  # else by lengths


def obstacle(query, key, value, bias, scale):
    """Why the fused kernels cannot serve softmax of scaled dot products; "" where they can."""
    if key.shape[-2] == 0:
        return "SDPA gives NaN, not zeros, where there is no key and a query is NaN"
    if words := _of_options(bias, scale):
        return words
    compiling = is_compiling()
    if (compiling or _is_tracing()) and not fusible():
        return "ONNX's SDPA takes neither every mask nor a size of 0"
    if not compiling and _transformed(query, key, value):
        return "SDPA has no forward derivatives, and no rules for torch.func"
    return ""


def _of_options(bias, scale):
    if bias is not None and bias.requires_grad:
        return "SDPA has no gradient by the bias"
    if scale is not None and scale <= 0:
        return "SDPA takes no scale of 0 or less: CUDA's kernel takes the row maximum before it scales"
    return ""


def _transformed(*inputs):
    return torch._C._are_functorch_transforms_active() or dual(*inputs)


def choose(query, key, value, call, masked, in_blocks):
    """The way to serve a call that asks for nothing else and meets no obstacle. ``masked``, ``in_blocks``: the tab's."""
    why, n, m = "softmax of scaled dot products", query.shape[-2], key.shape[-2]
    if (call.valid_lens is not None or call.mask is not None) and (lengths := _equal_lengths(query, key, value, call)):
        runs = f"{len(lengths)} runs of batch entries of one length, each over its own keys"
        return Choice("SDPA, by lengths", f"{why}; {runs}", lengths, partial(by_lengths, masked))
    if not call.restricted or (call.only_causal and (type(n) is type(m) is int or known(n == m))):
        return Choice("SDPA", why, (), whole)
    shared = plan.each_sees_a_key(n, m, call)
    run = in_the_window if shared else in_blocks
    if blocks := call.window_blocks(n, m):
        return Choice("SDPA", why).in_window(blocks, run)
    if blocks := _blocks_of_masks(query, key, value, call):
        return Choice("SDPA", why).in_blocks(blocks, run, "as many as keep the masks small")
    return Choice("SDPA", why, [(0, n)], in_the_window) if shared else Choice("SDPA", why, (), masked)


def _equal_lengths(query, key, value, call):
    """Runs of batch entries, where lengths are all that forbids pairs, but for a bias or causal, and they can be read without
    a wait."""
    if call.mask is not None and call.valid_lens is not None:
        return []
    lengths = call.valid_lens if call.mask is None else _lengths_of(call.mask, query, key)
    if lengths is None or lengths.ndim != 1 or not readable(lengths):
        return []
    causal = call.windowed
    if causal and not (call.bias is None and call.right == 0 and call.left is None and call.from_the_first):
        return []
    if not query.shape[0] == key.shape[0] == value.shape[0] == len(lengths) or query.ndim < 3:
        return []
    numbers = math.prod(query.shape[1:-2]) * (query.shape[-1] + value.shape[-1])
    return plan.equal_lengths(lengths.tolist(), query.shape[-2], key.shape[-2], causal, numbers)


def _lengths_of(mask, query, key):
    """The lengths (batch,) that a mask (batch, 1, ..., 1, m) tells, if it forbids keys at the end and no others; else None."""
    batch, m = query.shape[0], key.shape[-2]
    if query.ndim < 3 or not readable(mask) or mask.shape != (batch, *[1] * (query.ndim - 2), m):
        return None
    rows = mask.reshape(batch, m)
    lengths = rows.sum(dim=-1)
    return lengths if torch.equal(rows, torch.arange(m, device=mask.device) < lengths[:, None]) else None


def _blocks_of_masks(query, key, value, call):
    """Blocks of queries where a mask would be large that is not given; with gradients each block would keep its own."""
    if tracing() or query.shape[-2] <= plan.ROWS or wants_gradients(query, key, value):
        return []
    by_query = call.lengths_per_query(query.ndim)
    if call.mask is not None and call.bias is not None:
        masks = 4 * math.prod(planning.lead(query.shape, key.shape))  # of the two together, as long numbers as the bias's
    elif (call.windowed or by_query) and call.mask is call.bias is None:
        masks = len(call.valid_lens) if by_query and query.ndim > 2 else 1
    else:
        return []
    known_end = call.right is not None and type(call.query_offset) is int
    return plan.blocks_of_masks(query.shape[-2], key.shape[-2], masks, call.query_offset + call.right if known_end else None)


def wants_gradients(query, key, value):
    return (query.requires_grad or key.requires_grad or value.requires_grad) and torch.is_grad_enabled()


def blocks_of_scores(query, key, score):
    """Blocks of queries for the formula, which holds PAIRS numbers at one time; [] where one block is all."""
    return [] if tracing() or _transformed(query, key) else planning.memory_blocks(score, query.shape, key.shape, plan.PAIRS)


# ---- the ways


def whole(query, key, value, call, blocks=()):
    """All keys, or causal from the first key on: nobody sees keys after the last query, nor NaN in them."""
    n, causal = query.shape[-2], call.right == 0
    if causal and n < key.shape[-2]:
        key, value = key[..., :n, :], value[..., :n, :]
    return fused(query, key, value, None, causal, call.scale, sink=call.sink).to(query.dtype)  # autocast's is another


def by_lengths(masked, query, key, value, call, lengths):
    """Each run of batch entries by itself: no work on padding, and none to hide. ``masked``: the tab's, for a bias."""
    sizes, sink, bias = [size for size, _ in lengths], call.sink, call.bias
    parts = [x.split(sizes) for x in (query, key, value)] if len(sizes) > 1 else [(query,), (key,), (value,)]
    for x, of_entries in ((sink, sink is not None and sink.ndim > 1), (bias, bias is not None and bias.ndim == query.ndim)):
        parts.append(x.split(sizes) if of_entries and len(x) > 1 else [x] * len(sizes))  # each batch entry has its own, or not
    outputs = []
    for (_, length), q, k, v, s, b in zip(lengths, *parts, strict=True):
        k, v = k[..., :length, :], v[..., :length, :]
        if not length:  # zeros, with gradients of 0
            outputs.append(nonfinite.attention(q, k, v, None, None, call.scale))
        elif b is None:
            outputs.append(fused(q, k, v, None, call.windowed, call.scale, sink=s))
        else:
            b = b if not b.ndim or b.shape[-1] == 1 else b[..., :length]
            outputs.append(masked(q, k, v, call._replace(mask=None, valid_lens=None, bias=b, sink=s)))
    return (torch.cat(outputs) if len(outputs) > 1 else outputs[0]).to(query.dtype)


def in_the_window(query, key, value, call, blocks):
    """A window in blocks of queries and the keys they see; neighbours that lie alike share a mask."""
    n, m = query.shape[-2], key.shape[-2]
    blocks = plan.narrowed(blocks, m, call)
    last, mask, parts = None, None, []  # no dict of places: torch.compile would fix what is looked up
    for *arrays, block in [(query, key, value, call)] if blocks == [(0, n, 0, m)] else call.cut(blocks, query, key, value):
        place = block.query_offset, block.left, block.right, *(x.shape[-2] for x in arrays[:2])
        if place != last:
            make = partial(window_bias, *place, query)
            last, mask = place, constant((*place, query.dtype), make) if few(*arrays[:2]) else make()
        parts.append(fused(*arrays, mask, False, call.scale, sink=block.sink))
    return (torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]).to(query.dtype)


def window_bias(offset, left, right, n, m, like):
    """0 in the window and -inf beyond it: (n, m); None where all of it lies in the window."""
    if left is None and right is None:
        return None
    keys = torch.arange(-offset, m - offset, device=like.device)  # from the first query on
    queries = torch.arange(n, device=like.device)[:, None]
    beyond = torch.zeros(n, m, dtype=torch.bool, device=like.device) if left is None else keys < queries - left
    beyond = beyond if right is None else beyond | (keys > queries + right)
    return torch.zeros(n, m, dtype=like.dtype, device=like.device).masked_fill_(beyond, -math.inf)


def masked(query, key, value, mask, bias, scale, hide, sink=None, small=False):
    """softmax(scale * query @ key.T + bias) @ value over the pairs that ``mask`` (None: all) and a bias above -inf allow.

    A query with nothing to attend to gets zeros. ``hide``: a function (allowed, query, key, value) -> the last three with zeros
    for what meets nobody. It copies them, and so is called only where the output tells that NaN or inf came through, or where
    nobody may look at it. ``small``: the call is small, and the caller has asked whether values may be looked at.
    """
    mask, bias = _of_axes(mask, query.ndim), _of_axes(bias, query.ndim)
    if sink is None and not (EMPTY_ROWS and (small or (query.numel() and readable(query)))):
        if not operators.obstacle(query, key, value, scale):
            return operators.masked(query, key, value, mask, bias, scale)
        return _hidden(query, key, value, mask, bias, scale, hide)
    added = bias if mask is None else mask
    if mask is not None and (small or bias is not None):
        dtype = query.dtype if bias is None else bias.dtype
        zero, none = constant(dtype, lambda: torch.tensor([0.0, -math.inf], dtype=dtype, device="cpu").unbind())
        bias = zero if bias is None else bias
        # a sum of large ones, since torch.where of two shapes takes several times as long
        added = torch.where(mask, bias, none) if small else bias + torch.where(mask, zero, none)
    return fused(query, key, value, added, False, scale, (mask, bias, hide), sink, small)


def _hidden(query, key, value, mask, bias, scale, hide):
    """What `masked` gives, of arrays without what nobody may attend to."""
    allowed = mask
    if bias is not None and forbids(bias):
        allowed = bias != -math.inf if mask is None else mask & (bias != -math.inf)
    query, key, value = hide(allowed, query, key, value)
    if allowed is None:
        return fused(query, key, value, bias, False, scale, (mask, bias, None))
    # an empty row attends to all and is dropped after: the kernels of GPUs, and older ones, have given NaN for it
    some = allowed.any(dim=-1, keepdim=True)
    added = allowed | ~some if bias is None else torch.where(allowed, bias, torch.where(some, -math.inf, 0).to(bias.dtype))
    return torch.where(some, fused(query, key, value, added, False, scale, (mask, bias, None)), 0)


_constants = {}


def constant(key, make):
    """``make()``, a small array that calls like this one ask for again and again, or what it gave for this key before."""
    if (found := _constants.get(key)) is None:
        if len(_constants) >= CONSTANTS:
            _constants.clear()
        with torch.inference_mode(False):  # what is kept may serve a call that is differentiated
            _constants[key] = found = make()
    return found


def _of_axes(x, ndim):
    return x if x is None or x.ndim == ndim else x.reshape(*[1] * (ndim - x.ndim), *x.shape)


def forbids(bias):
    """Whether the bias may hold -inf; a sum tells of a bias that can be looked at, which is one read of it."""
    return not (readable(bias) and nonfinite.finite(bias))


def recomputed(attend, rng):
    """``attend``, which keeps nothing for its gradients but its arguments, and computes again, with the same draws of rng."""
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
        return nullcontext(), rewound(rng.get_state()) if isinstance(rng, torch.Generator) else nullcontext()

    return partial(checkpoint, attend, use_reentrant=False, context_fn=contexts)


# ---- what is added around it


def with_sink(run, otherwise, query, key, value, call, blocks=()):
    """What ``run``, a way above, gives of a call with a sink; ``otherwise``, a way to serve any, where something is not finite
    and for second derivatives."""
    output = run(query, key, value, call, blocks)
    looked_at = call.restricted or key.shape[-2] < nonfinite.VECTOR  # `fused` says by NaN what few keys may have lost
    if not nonfinite.sound(output, query, key, False, looked_at) or not (call.sink.detach() < math.inf).all():
        return otherwise(query, key, value, call)
    if not (torch.is_grad_enabled() and output.requires_grad):
        return output

    def formula(query, key, value, sink):
        return otherwise(query, key, value, call._replace(sink=sink))

    return _TwiceDifferentiable.apply(output, formula, call.mask, not call.restricted, query, key, value, call.sink)


def gives_lse(query, key, value, call):
    """Whether the CPU's kernel has the lse of a call that asks for no more, nor for gradients: each query has a key."""
    n, m = query.shape[-2], key.shape[-2]
    whole = not call.restricted or (call.only_causal and n <= m)
    return whole and not wants_gradients(query, key, value) and not sinks.obstacle(query, key, value)


def with_lse(otherwise, query, key, value, call, blocks=()):
    """The output and the lse, from one kernel; of ``otherwise``, a way to serve any call, where something is not finite."""
    causal, n = call.right == 0, query.shape[-2]
    keys, values = (key[..., :n, :], value[..., :n, :]) if causal else (key, value)
    output, lse = sinks.with_lse(query, keys, values, causal, call.scale)
    empty = lse == 0  # as the kernel gives it for a row of scores that are all -inf, beside zeros
    empty = bool(empty.any()) and not bool(output[empty].any(dim=-1).all())
    if empty or not nonfinite.sound(output, query, keys, False, causal):
        return otherwise(query, key, value, call)
    return output, lse


def fused(query, key, value, mask, causal, scale, mask_parts=None, sink=None, known_readable=False):
    """scaled_dot_product_attention. Where NaN or inf may have reached rows that see none, all is computed again pair by pair;
    that formula gives second derivatives too.

    ``mask_parts``: (mask, bias, hide), from which ``mask`` was made, by default itself; ``hide`` is `masked`'s.
    """
    if sink is not None:
        output = sinks.fused(query, key, value, mask, causal, scale, sink)
        few_keys = mask is None and key.shape[-2] < nonfinite.VECTOR  # `with_sink`, which looks at all parts, has more
        lost = few_keys and not nonfinite.sound(output, query, key, False, False)
        return torch.full_like(output, math.nan) if lost else output
    output = _run(query, key, value, mask, causal, scale)
    sound = nonfinite.sound(output, query, key, mask is not None, causal, known_readable)
    if sound and (not wants_gradients(query, key, value) or tracing()):
        return output
    if mask_parts is None:
        pair_by_pair = partial(_pair_by_pair, mask=mask, causal=causal, scale=scale)
    else:
        allowed, bias, hide = mask_parts
        pair_by_pair = partial(nonfinite.attention, allowed=allowed, bias=bias, scale=scale)
        if not sound and hide is not None:
            return _hidden(query, key, value, *mask_parts[:2], scale, hide)
    if not sound:
        return pair_by_pair(query, key, value)
    harmless = mask is None and not causal  # all may attend to all, and 0 * NaN is nobody else's
    return _TwiceDifferentiable.apply(output, pair_by_pair, mask, harmless, query, key, value)


def _pair_by_pair(query, key, value, mask, causal, scale):
    allowed = bias = None
    if causal:
        allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    elif mask is not None and mask.dtype == torch.bool:
        allowed = mask
    else:
        bias = mask
    return nonfinite.attention(query, key, value, allowed, bias, scale)


def twice_differentiable(run, query, key, value):
    """run(query, key, value); second derivatives are those of ``run`` by PyTorch's plain formula."""
    output = run(query, key, value)
    if wants_gradients(query, key, value) and not tracing():
        return _TwiceDifferentiable.apply(output, partial(_formula, run), None, True, query, key, value)  # values are not read
    return output


def _formula(run, *inputs):
    with sdpa_kernel(SDPBackend.MATH):
        return run(*inputs)


def _run(query, key, value, mask, causal, scale):
    """scaled_dot_product_attention on (batch, h, r, c): with another number of axes the CPU's is not the fused one."""
    shape, of_keys = query.shape, key.shape
    if len(shape) == 4 and shape[0] == of_keys[0] == value.shape[0]:
        if shape[1] == of_keys[1] and not causal and scale is None:  # what is not given saves a microsecond
            return scaled_dot_product_attention(query, key, value, mask)
        grouped = {"enable_gqa": True} if shape[1] != of_keys[1] else {}
        return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, **grouped)
    lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    arrays = [x if x is None or x.ndim > 2 else x[None] for x in (query, key, value, mask)]
    arrays = [x if x is None else x.expand(*lead, *x.shape[-3:]).reshape(math.prod(lead), *x.shape[-3:]) for x in arrays]
    output = _run(*arrays, causal, scale)
    return output.reshape(*lead, *query.shape[-3:-1], value.shape[-1])


class _TwiceDifferentiable(torch.autograd.Function):
    """A fused kernel's output and backward; the formula's under create_graph, since the fused one has no derivative, and
    where the fused one would multiply its zeros by NaN or inf, unless that is ``harmless``. ``mask`` is kept so that a
    change of it is noticed."""

    @staticmethod
    def forward(ctx, output, formula, mask, harmless, *inputs):
        ctx.save_for_backward(*inputs, mask)
        ctx.formula, ctx.harmless = formula, harmless
        return output.detach()

    @staticmethod
    def backward(ctx, grad_output):
        *inputs, _ = ctx.saved_tensors
        twice = torch.is_grad_enabled()
        # a value need not be looked at: were it not finite, the output would not be, and not of this class
        if not twice and (ctx.harmless or not readable(grad_output) or all(map(nonfinite.finite, (grad_output, *inputs[:2])))):
            return grad_output, *[None] * (3 + len(inputs))
        wanted = ctx.needs_input_grad[4:]
        with torch.enable_grad():  # apart, where one tensor is query and key
            inputs = [x.view_as(x) if twice else x.detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)]
            output = ctx.formula(*inputs)
        chosen = [x for x, w in zip(inputs, wanted, strict=True) if w]
        grads = iter(torch.autograd.grad(output, chosen, grad_output, create_graph=twice))
        return None, None, None, None, *(next(grads) if w else None for w in wanted)
