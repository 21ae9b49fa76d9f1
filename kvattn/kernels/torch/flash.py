"""Calls of the kernels in tiles.py: their tiles, their launch, their gradients, and the operators that torch.compile sees."""

from __future__ import annotations

import math
from functools import cache, lru_cache, partial, reduce
from operator import or_
from typing import NamedTuple

import torch
import triton

from kvattn import registry
from kvattn.kernels.torch import sinks, tiles

HALF = (torch.float16, torch.bfloat16)
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: on the CPU, for tests
FAST_TANH = not INTERPRETED and torch.version.hip is None  # it is an instruction of CUDA's devices
FAR = 2**29  # as in tiles.py
MOST_PARTS = 64
MOST_COMPILED = 4096  # launches whose program is kept: then it starts anew, since lengths that grow would fill the memory


class Rest(NamedTuple):
    """What is not an array: ``first`` and ``last``: query i sees the keys i + first <= j < i + last, or None."""

    first: int | None
    last: int | None
    scale: float
    softcap: float | None


# ---- a call


def attention(query, key, value, call):
    """(batch, h, n, v) for query (batch, h, n, d), key (batch, h_kv, m, d), value (batch, h_kv, m, v); lse, if asked for.

    Or all of them without the heads' axis.
    """
    if torch.compiler.is_compiling():
        output, lse = torch.ops.kvattn.attention(*_arrays(query, key, value, call), *_rest(query, call))
        return _returned(output, lse, query.ndim == 3, call)
    return Prepared(query, key, value, call)(query, key, value, call)


def _arrays(query, key, value, call):
    """What the kernels read: (query, key, value, mask, bias, lens, offsets); the same arrays wherever they can be."""
    mask, bias, lens, offsets = call.mask, call.bias, call.valid_lens, None
    if call.windowed and not isinstance(call.query_offset, int):
        offsets = call.query_offset.to(query.device).expand(query.shape[0]).contiguous()
    if lens is not None:
        lens = lens.to(query.device).contiguous()
    if query.ndim == 3:
        query, key, value = (x[:, None] for x in (query, key, value))
        mask, bias = (x[:, None] if x is not None and x.ndim == 3 else x for x in (mask, bias))
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return query, key, value, mask, bias, lens, offsets


def _rest(query, call):
    offset = call.query_offset if isinstance(call.query_offset, int) else 0  # else the kernels read it
    first = None if call.left is None else _near(offset - call.left)
    last = None if call.right is None else _near(offset + call.right + 1)
    scale = 1 / math.sqrt(query.shape[-1]) if call.scale is None else float(call.scale)
    return Rest(first, last, scale, None if call.softcap is None else float(call.softcap))


def _near(x):
    return max(-FAR, min(x, FAR))


def _returned(output, lse, headless, call):
    if headless:
        output, lse = output[:, 0], lse[:, 0]
    return (output, lse) if call.return_lse else output


class Prepared:
    """All that calls of the same shapes, strides, dtypes and options share: a small call's time is what is done in Python."""

    def __init__(self, query, key, value, call):
        arrays = _arrays(query, key, value, call)
        given = query, key, value, call.mask, call.bias, call.valid_lens, None
        self.as_given = all(x is y for x, y in zip(arrays, given, strict=True))
        self.headless = query.ndim == 3
        self.rest = _rest(query, call)
        self.plan = _planned(arrays, self.rest, sink=_rows_of(call.sink, query.shape[:-1]))
        self.backward_plans = {}

    def __call__(self, query, key, value, call, blocks=()):
        arrays = query, key, value, call.mask, call.bias, call.valid_lens, None
        if not self.as_given:
            arrays = _arrays(query, key, value, call)
        sink = call.sink
        differentiated = (
            query.requires_grad or key.requires_grad or value.requires_grad or (sink is not None and sink.requires_grad)
        )
        if differentiated and torch.is_grad_enabled():
            output, lse = _Attention.apply(*arrays, sink, self)
        else:
            output, lse = _forward(self.plan, arrays, sink)
        return _returned(output, lse, self.headless, call) if self.headless or call.return_lse else output

    def backward(self, arrays, output, lse, grad, grad_lse):
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        output, of_grad = _as_made(output, arrays[0]), (grad.stride(), grad_lse is not None)
        # the strides of all again: hooks of autograd may have moved what was kept
        like = (*of_grad, *(None if x is None else x.stride() for x in arrays))
        plan = self.backward_plans.get(like)
        if plan is None:
            plan = self.backward_plans[like] = _planned(arrays, self.rest, *of_grad)
        return _backward(plan, arrays, output, lse, grad, grad_lse)


class _Attention(torch.autograd.Function):
    """The kernels' output, lse and gradients; the formula's under create_graph, since the kernels have no derivative."""

    @staticmethod
    def forward(ctx, query, key, value, mask, bias, lens, offsets, sink, prepared):
        arrays = query, key, value, mask, bias, lens, offsets
        output, lse = _forward(prepared.plan, arrays, sink)
        ctx.save_for_backward(*arrays, sink, output, lse)
        ctx.prepared = prepared
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):
        *arrays, sink, output, lse = ctx.saved_tensors
        if not torch.is_grad_enabled():
            grad = torch.zeros_like(output) if grad is None else grad
            *grads, delta = ctx.prepared.backward(arrays, output, lse, grad, grad_lse)
            by_sink = sinks.gradient(sink, lse, delta) if ctx.needs_input_grad[7] else None
            return *grads, None, None, None, None, by_sink, None
        wanted = (*ctx.needs_input_grad[:3], ctx.needs_input_grad[7])
        with torch.enable_grad():
            inputs = [x if x is None else x.view_as(x) for x in (*arrays[:3], sink)]  # apart, where one tensor is query and key
            output, lse = formula(*inputs[:3], *arrays[3:], ctx.prepared.rest)
            if sink is not None:
                left, lse = registry.load("torch")._left(lse, inputs[3], output.ndim)
                output = (left * output).to(output.dtype)
            results = [(x, g) for x, g in ((output, grad), (lse, grad_lse)) if g is not None]
        chosen = [x for x, w in zip(inputs, wanted, strict=True) if w]
        outputs, grads = zip(*results, strict=True)
        found = iter(torch.autograd.grad(outputs, chosen, grads, create_graph=True))
        *grads, by_sink = (next(found) if w else None for w in wanted)
        return *grads, None, None, None, None, by_sink, None


def _rows_of(sink, lse_shape):
    """The sink of each row (batch, heads, n), a view."""
    return None if sink is None else sinks.rows(sink.detach(), sink).expand(lse_shape)


def formula(query, key, value, mask, bias, lens, offsets, rest):
    """The same, (output, lse), with all its scores."""
    (*lead, n, _), m = query.shape, key.shape[-2]
    mask, bias = (x if x is None else x.expand(*lead, n, m) for x in (mask, bias))
    j = torch.arange(m, device=query.device)
    i = torch.arange(n, device=query.device)[:, None]
    i = i if offsets is None else i + offsets[:, None, None, None]
    allowed = torch.ones(1, 1, 1, m, dtype=torch.bool, device=query.device) if mask is None else mask
    if bias is not None:
        allowed = allowed & (bias != -math.inf)
    if lens is not None:
        allowed = allowed & (j < lens.reshape(len(lens), 1, -1, 1))
    if rest.first is not None:
        allowed = allowed & (j >= i + rest.first)
    if rest.last is not None:
        allowed = allowed & (j < i + rest.last)
    wide = torch.float32 if query.dtype in HALF else query.dtype
    key, value = (torch.repeat_interleave(x.to(wide), query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    attended = allowed.any(dim=-2)[..., None]
    key, value = (torch.where(attended, x, 0) for x in (key, value))
    scores = rest.scale * (query.to(wide) @ key.mT)
    scores = scores if rest.softcap is None else rest.softcap * torch.tanh(scores / rest.softcap)
    scores = scores if bias is None else scores + bias
    some = allowed.any(dim=-1, keepdim=True)
    scores = torch.where(allowed, scores, torch.where(some, -math.inf, 0))
    output = torch.where(some, torch.softmax(scores, dim=-1), 0) @ value
    lse = torch.where(some[..., 0], torch.logsumexp(scores, dim=-1), -math.inf)
    return output.to(query.dtype), lse


# ---- operators, for torch.compile, which does not look into them

# torch.library.custom_op declares the same, and calls it in twice the time of a small attention
_library = torch.library.Library("kvattn", "FRAGMENT")
_TAGS = torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order
_ARRAYS = "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? lens, Tensor? offsets"
_REST = "SymInt? first, SymInt? last, float scale, float? softcap"
_library.define(f"attention({_ARRAYS}, {_REST}) -> (Tensor, Tensor)", tags=_TAGS)
_results = "Tensor output, Tensor lse, Tensor grad, Tensor? grad_lse"
_library.define(f"attention_backward({_ARRAYS}, {_REST}, {_results}) -> (Tensor, Tensor, Tensor)", tags=_TAGS)


def _operator(*given):
    return forward(given[:7], Rest(*given[7:]))


def _operator_backward(*given):
    return backward(given[:7], Rest(*given[7:11]), *given[11:])


for _device in ("CUDA", "CPU"):  # on the CPU Triton's interpreter runs it
    _library.impl("attention", _operator, _device)
    _library.impl("attention_backward", _operator_backward, _device)


@torch.library.register_fake("kvattn::attention", lib=_library)
def _(query, key, value, *rest):
    return _like(query, value.shape[-1]), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("kvattn::attention_backward", lib=_library)
def _(query, key, value, *rest):
    return _like(query, query.shape[-1]), *(x.new_empty(x.shape) for x in (key, value))


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.rest = inputs[7:]
    ctx.set_materialize_grads(False)


def _operator_gradients(ctx, grad, grad_lse):
    *arrays, output, lse = ctx.saved_tensors
    grad = torch.zeros_like(output) if grad is None else grad
    grads = torch.ops.kvattn.attention_backward(*arrays, *ctx.rest, output, lse, grad, grad_lse)
    return *grads, *[None] * 8


torch.library.register_autograd("kvattn::attention", _operator_gradients, setup_context=_keep, lib=_library)


# ---- the kernels


def forward(arrays, rest):
    """(output, lse); ``arrays``: as of `_arrays`, here and below."""
    return _forward(_planned(arrays, rest), arrays)


def _forward(plan, arrays, sink=None):
    query, key, value, *restrictions = arrays
    output = _empty(query, plan.output)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    parts = lse if plan.partial is None else query.new_empty(plan.partial, dtype=torch.float32)
    sink = lse if sink is None else _rows_of(sink, lse.shape)
    plan.forward(query, key, value, output, lse, parts, *_given(lse, *restrictions), sink)
    if plan.partial is not None:
        plan.combine(parts, output, lse, sink)
    return output, lse


def backward(arrays, rest, output, lse, grad, grad_lse):
    """The gradients by query, key and value."""
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    plan = _planned(arrays, rest, grad.stride(), grad_lse is not None)
    return _backward(plan, arrays, _as_made(output, arrays[0]), lse, grad, grad_lse)[:3]


def _backward(plan, arrays, output, lse, grad, grad_lse):
    query, key, value, *restrictions = arrays
    delta, by_query = torch.empty_like(lse), _empty(query, plan.output)
    by_key, by_value = key.new_empty(key.shape), value.new_empty(value.shape)
    grad_lse = lse if grad_lse is None else grad_lse.contiguous()
    given = _given(lse, *restrictions)
    plan.by_query(query, key, value, output, lse, grad, grad_lse, delta, by_query, *given)
    plan.by_key(query, key, value, lse, grad, delta, by_key, by_value, *given)
    return by_query, by_key, by_value, delta


def _given(other, mask, bias, lens, offsets):
    """The arrays of the restrictions, with ``other`` for what is not there, and not read."""
    return [other if x is None else x for x in (lens, offsets, mask, bias)]


def _like(query, features):
    return _empty(query, _laid_out(query.shape, query.stride(), features))


def _empty(query, laid_out):
    shape, heads_last = laid_out
    return query.new_empty(shape).transpose(1, 2) if heads_last else query.new_empty(shape)


def _as_made(output, query):
    """The output as it was made for a query that lies like this, which the kernels take for granted."""
    features = output.shape[-1]
    if output.stride()[:3] == _rows(query.shape, query.stride(), features):
        return output
    return _like(query, features).copy_(output)


def _laid_out(shape, strides, features):
    """The shape of an empty output, and whether its heads come after its queries, as in the query's memory."""
    batch, heads, n, _ = shape
    if _heads_last(shape, strides):
        return (batch, n, heads, features), True
    return (batch, heads, n, features), False


def _heads_last(shape, strides):
    return shape[1] > 1 and strides[1] < strides[2]


# ---- what is the same for all calls of some shapes


def _planned(arrays, rest, grad_strides=None, by_lse=False, sink=None):
    query, key, value, *restrictions = arrays
    layout = query.shape, key.shape, value.shape[-1], query.stride(), key.stride(), value.stride()
    described = tuple(None if x is None else (x.dtype, x.shape, x.stride()) for x in restrictions)
    of_sink = None if sink is None else (sink.dtype, sink.stride())
    return _plan(query.device, query.dtype, layout, described, rest, grad_strides, by_lse, of_sink)


class _Plan(NamedTuple):
    forward: Launch | None
    combine: Launch | None
    by_query: Launch | None
    by_key: Launch | None
    partial: int | None  # numbers that the parts of the keys leave to ``combine``
    output: tuple  # `_laid_out`: of the output; of the gradient by the query


@lru_cache(maxsize=1024)
def _plan(device, dtype, layout, restrictions, rest, grad_strides, by_lse, sink):
    shape, of_keys, v, q_strides, k_strides, v_strides = layout
    mask, bias, lens, offsets = restrictions
    (batch, heads, n, d), (_, kv_heads, m, _) = shape, of_keys
    group, width = heads // kv_heads, max(d, v)
    first, last, scale, softcap = rest
    numbers = (kv_heads, group, n, m, first or 0, last or 0, scale, softcap or 1.0)
    steps = [_steps(x) for x in (mask, bias)]
    kinds = [0 if x is None else 1 if by[1:3] == (0, 0) else 2 for x, by in zip((mask, bias), steps, strict=True)]
    flags = (
        0 if lens is None else len(lens[1]),
        offsets is not None,
        first is not None,
        last is not None,
        *kinds,
        0 if softcap is None else 2 if dtype == torch.bfloat16 and FAST_TANH else 1,
    )
    narrow = softcap is not None or first is not None
    light = softcap is None and bias is None and kinds[0] < 2 and (kinds[0] == 1 or first is not None)
    inputs = (*q_strides[:3], *k_strides[:3], *v_strides[:3])
    outputs = _rows(shape, q_strides, v)
    masks = (*steps[0], *steps[1])
    sizes = (d, v, _wide(d), _wide(v))
    types = (dtype, *(None if x is None else x[0] for x in restrictions))
    if grad_strides is None:
        rows, cols, *launch = forward_tiles(dtype, width, group * n, light, kinds != [0, 0])
        programs = -(-group * n // rows) * batch * kv_heads
        parts = how_many_parts(programs, m, cols, device)
        constants = (*sizes, rows, cols, parts, *flags, sink is not None)
        kind_of_sink, of_sink = sink or (None, (0, 0, 0))
        types = (*types, kind_of_sink)
        strides = (*inputs, *outputs, *masks, *of_sink)
        forward = Launch(tiles.forward, device, types, programs * parts, strides, numbers, constants, launch)
        output = _laid_out(shape, q_strides, v)
        if parts == 1:
            return _Plan(forward, None, None, None, None, output)
        constants = (v, _wide(v), parts, parts, sink is not None)
        combine = Launch(tiles.combine, device, types, batch * heads * n, (*outputs, *of_sink), (heads, n), constants, (4, 1))
        return _Plan(forward, combine, None, None, parts * batch * heads * n * (v + 2), output)
    rows, cols, *launch = query_tiles(dtype, width, light, narrow)
    strides = (*inputs, *outputs, *grad_strides[:3], *_rows(shape, q_strides, d), *masks)
    programs = -(-group * n // rows) * batch * kv_heads
    constants = (*sizes, rows, cols, by_lse, *flags)
    by_query = Launch(tiles.backward_query, device, types, programs, strides, numbers, constants, launch)
    rows, cols, *launch = key_tiles(dtype, width, narrow)
    programs = -(-m // cols) * batch * kv_heads
    strides = (*inputs, *grad_strides[:3], *masks)
    by_key = Launch(tiles.backward_key, device, types, programs, strides, numbers, (*sizes, rows, cols, *flags), launch)
    return _Plan(None, None, by_query, by_key, None, _laid_out(shape, q_strides, d))


def _rows(shape, strides, features):
    """The strides of what `_like` makes."""
    _, heads, n, _ = shape
    if _heads_last(shape, strides):
        return n * heads * features, features, heads * features
    return heads * n * features, n * features, features


def _steps(described):
    """The four strides of a mask or a bias, 0 where it is the same for all."""
    if described is None:
        return 0, 0, 0, 0
    steps = [0 if size == 1 else step for size, step in zip(*described[1:], strict=True)]
    return (*[0] * (4 - len(steps)), *steps)


def _wide(features):
    return max(16, 1 << (features - 1).bit_length())


class Launch:
    """A kernel with all its arguments but the arrays.

    Triton looks at every argument of every call to find the program that was compiled for its like, which takes longer than
    a small attention. That program depends on nothing but what ``self.like`` holds, if all arrays begin at a multiple of 16
    bytes; ``numbers`` are those arguments that tiles.py does not let it depend on, and floats. ``options``: how many warps and
    stages, and, perhaps, registers of a thread at most.
    """

    def __init__(self, kernel, device, types, programs, strides, numbers, constants, options):
        warps, stages, registers = (*options, None)[:3]
        self.kernel, self.device, self.grid = kernel, device, (programs, 1, 1)
        self.arguments = (*strides, *numbers, *constants)
        self.options = {"num_warps": warps, "num_stages": stages} | ({"maxnreg": registers} if registers else {})
        self.like = (kernel, device, types, strides, constants, warps, registers)
        self.use(_compiled.get(self.like))

    def use(self, compiled):
        """``compiled``: what Triton made of the kernel, or None. Its launcher is called as Inductor's programs call it, without
        a profiler's hooks: those take as long as the rest of it."""
        self.run = compiled and partial(compiled.run, *self.grid)
        self.program = compiled and (compiled.function, compiled.packed_metadata, None, None, None)

    def __call__(self, *arrays):
        if INTERPRETED:
            self.kernel[self.grid](*arrays, *self.arguments)
            return
        index = self.device.index
        if index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self(*arrays)
        at = [x.data_ptr() for x in arrays]
        aligned = not reduce(or_, at) & 15
        if aligned and self.run is not None:
            self.run(_stream(index), *self.program, *at, *self.arguments)
            return
        compiled = self._first(arrays)
        if aligned:
            if len(_compiled) >= MOST_COMPILED:
                _compiled.clear()
            _compiled[self.like] = compiled
            self.use(compiled)

    def _first(self, arrays):
        """Runs the kernel as Triton's documentation tells; with fewer stages on a device with less shared memory."""
        while True:
            try:
                return self.kernel[self.grid](*arrays, *self.arguments, **self.options)
            except triton.runtime.errors.OutOfResources:
                if self.options["num_stages"] == 1:
                    raise
                self.options["num_stages"] -= 1


def _stream(index):
    """The device's current stream, as a number."""
    return triton.runtime.driver.active.get_current_stream(index)


_compiled = {}


# ---- tiles: (queries, keys, warps, stages), and how many registers a thread may have, where that is told:
# the fastest on an H100 and an H200 of those that were tried


def forward_tiles(dtype, width, rows, light, masked):
    """``light``: what forbids pairs is a window's left end or a mask that is the same for all queries: little to read.

    ``masked``: by a mask or a bias. With 168 registers three programs share a processor, where the compiler would take 255.
    """
    if dtype == torch.float32:
        return 32, 32, 4, 1
    if rows <= 32:
        return 16 if rows <= 16 else 32, 64, 4, 3
    if width > 128:
        return 64, 64, 4, 2
    if width <= 64 and masked:
        return 64, 64, 4, 3, 168
    return (128, 64, 4, 3) if rows > 64 and width <= 64 and light else (64, 64, 4, 3)


def query_tiles(dtype, width, light, narrow):
    """``narrow``: with a softcap, whose tanh takes registers, or a window's left end."""
    if dtype == torch.float32:
        return 32, 32, 4, 1
    if width > 128:
        return 64, 32, 4, 2
    if width > 64:
        return (64, 64, 4, 2) if light and narrow else (128, 64, 8, 3)
    return (64, 32, 4, 3) if light else (64, 64, 4, 3)


def key_tiles(dtype, width, narrow):
    if dtype == torch.float32:
        return 32, 32, 4, 1
    if width > 128:
        return 32, 64, 4, 2
    return (32, 128, 8, 3) if width > 64 and not narrow else (32, 64, 4, 3)


def how_many_parts(programs, m, cols, device):
    """A power of two: parts of the keys that keep the device busy, of at least two tiles each."""
    parts, processors = 1, _processors(device)
    while parts < MOST_PARTS and 2 * parts * programs < 3 * processors and 4 * parts * cols <= m:
        parts *= 2
    return parts


@cache
def _processors(device):
    return 8 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
