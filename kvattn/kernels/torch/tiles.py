"""Attention in one kernel of Triton's that never holds the scores whole, for whatever may be asked of softmax attention:

    s_ij = scale * q_i . k_j            softcap: s_ij = softcap * tanh(s_ij / softcap)         bias: s_ij += bias_ij
    o_i = sum_j exp(s_ij - lse_i) v_j   lse_i = log sum_j exp(s_ij)        over the keys j that query i may attend to

Which keys those are: j in [begin_i, end_i), where lengths, causal, a window and an offset meet, where mask_ij is true and
bias_ij is not -inf. A tile of queries walks over tiles of keys, from its lowest begin to its highest end, and keeps for each
query the largest score met, the sum of the weights relative to it and their sum of values. Only the tiles at the edge of
that range ask of each pair whether it may attend. Backward, from the same lse:

    p_ij = exp(s_ij - lse_i)    dv_j = sum_i p_ij do_i    ds_ij = p_ij (do_i . v_j - do_i . o_i + dlse_i) * the softcap's slope
    dq_i = scale * sum_j ds_ij k_j                        dk_j = scale * sum_i ds_ij q_i

NaN and inf. Keys at and after the highest end are never read. Within a tile a pair that may not attend has weight 0, and
0 * NaN is NaN: so a tile whose result is not finite is computed again, pair by pair (`_apart`), and then NaN is only in the
rows that may attend to it. That costs nothing where all is finite but a look at the result.

The queries of all the heads that share a key head are one list of rows, head after head. Where that list is short (as in
decoding) the keys are split among programs, and `combine` puts their parts together.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax" (https://arxiv.org/abs/1805.02867); Dao 2023,
"FlashAttention-2" (https://arxiv.org/abs/2307.08691).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(2**29)  # more than any position: sums of two stay within 32 bits

INTEGERS = ("heads", "group", "n", "m", "first", "last")  # no kernel is compiled again for another value of these


# ---- what the kernels share


@triton.jit
def _far(rows, stride):
    """How far so many rows are, in 64 bits."""
    return tl.full([], rows, tl.int64) * stride


@triton.jit
def _spans(
    i, entry, Lens, Offsets, n, m, first, last, LENS: tl.constexpr, OFFSETS: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):  # fmt: skip
    """(begin, end): query i may attend to the keys begin <= j < end, if a mask and a bias allow it."""
    begin = i * 0
    end = begin + m
    at = i
    if OFFSETS:
        at = i + tl.minimum(tl.maximum(tl.load(Offsets + entry), -FAR), FAR).to(tl.int32)
    if LEFT:
        begin = tl.maximum(begin, at + first)
    if RIGHT:
        end = tl.minimum(end, at + last)
    if LENS == 1:  # one for each entry of the batch
        end = tl.minimum(end, tl.minimum(tl.load(Lens + entry), m).to(tl.int32))
    if LENS == 2:  # one for each query
        end = tl.minimum(end, tl.minimum(tl.load(Lens + entry.to(tl.int64) * n + i), m).to(tl.int32))
    return begin, tl.maximum(end, 0)


@triton.jit
def _tanh(x, CAP: tl.constexpr):
    """tanh; with CAP == 2 the device's own, whose 11 bits are three more than bfloat16 holds, in half the time."""
    if CAP == 2:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1)
    return y


@triton.jit
def _unit(scale, cap, BIAS: tl.constexpr, CAP: tl.constexpr):
    """What makes exponents of 2 of the scores of `_scores`, which multiplies only where something is added."""
    unit = scale * LOG2E
    if CAP:
        unit = cap * LOG2E
    if BIAS:
        unit = scale * 0 + LOG2E
    return unit


@triton.jit
def _scores(
    dots, begin, end, cols, bias, mask, scale, cap, CUT: tl.constexpr, CAREFUL: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """(scores over `_unit`, the softcap's tanh, whether each pair may attend).

    A bias of -inf makes -inf of a finite score by itself. Where it does not, it is asked for only if CAREFUL: what came out
    as NaN is computed again so.
    """
    bent = dots
    if CAP:
        bent = _tanh(dots * (scale / cap), CAP)
    scores = bent
    if BIAS:
        bias = bias.to(tl.float32)
        scores = bent * (cap if CAP else scale) + bias
    if CUT:
        allowed = (cols >= begin) & (cols < end)
        if MASK:
            allowed = allowed & (mask != 0)
    elif MASK:
        allowed = mask != 0
    else:
        allowed = cols >= 0
    if BIAS and CAREFUL:
        allowed = allowed & (bias != -float("inf"))
    if CUT or MASK or (BIAS and CAREFUL):
        scores = tl.where(allowed, scores, -float("inf"))
    return scores, bent, allowed


@triton.jit
def _span_of(mask_at, mask_m, m):
    """(begin, end, forbids): the keys that a mask for all queries allows lie in [begin, end); whether it forbids some there."""
    begin = m
    end = m * 0
    count = m * 0
    for j in tl.range(0, m, 1024):
        cols = j + tl.arange(0, 1024)
        allowed = tl.load(mask_at + _far(j, mask_m) + tl.arange(0, 1024) * mask_m, mask=cols < m, other=0) != 0
        begin = tl.minimum(begin, tl.min(tl.where(allowed, cols, m), 0))
        end = tl.maximum(end, tl.max(tl.where(allowed, cols + 1, 0), 0))
        count += tl.sum(allowed.to(tl.int32), 0)
    return begin, end, count < end - begin


@triton.jit
def _odd(x):
    """Whether each number is NaN or infinite."""
    return ~(tl.abs(x.to(tl.float32)) < float("inf"))


@triton.jit
def _any_odd(x):
    return tl.max(tl.max(_odd(x).to(tl.int32), 1), 0) > 0


@triton.jit
def _apart(weights, allowed, x, total):
    """total + weights @ x from the allowed pairs alone: what is not finite in a row of x reaches only who may see that row."""
    odd = _odd(x)
    total = tl.dot(
        tl.where(allowed, weights, 0.0).to(x.dtype), tl.where(odd, 0.0, x).to(x.dtype), total, input_precision="ieee"
    )
    reached = tl.dot(allowed.to(x.dtype), odd.to(x.dtype), input_precision="ieee")
    return tl.where(reached > 0, float("nan"), total)


@triton.jit
def _load(at, inside, CUT: tl.constexpr, PADDED: tl.constexpr, features):
    """A tile; zeros where it reaches past the last row (at an edge) or the last feature (PADDED to a power of two)."""
    if CUT and PADDED:
        tile = tl.load(at, mask=inside & features, other=0.0)
    elif CUT:
        tile = tl.load(at, mask=inside, other=0.0)
    elif PADDED:
        tile = tl.load(at, mask=features, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _extra(at, inside, PRESENT: tl.constexpr, CUT: tl.constexpr):
    """A tile of a mask or a bias, if there is one."""
    tile = inside
    if PRESENT and CUT:
        tile = tl.load(at, mask=inside, other=0)
    elif PRESENT:
        tile = tl.load(at)
    return tile


@triton.jit
def _extra_at(X, first, rows, columns, KIND: tl.constexpr):
    """Where a tile of a mask or a bias begins. KIND 1: the same for all queries; 0: there is none."""
    at = X
    if KIND == 1:
        at = X + first + columns
    if KIND == 2:
        at = X + first + rows + columns
    return at


@triton.jit
def _queries(program, tiles, heads, group, n, ROWS: tl.constexpr):
    """(entry, head, own, i, inside) of a program's tile of queries: its batch entry and key head, and for each query its own
    head, its place there, and whether there is such a query. Causal: the longest first."""
    head = program // tiles % heads
    row = (tiles - 1 - program % tiles) * ROWS + tl.arange(0, ROWS)
    own = head * group + tl.minimum(row // n, group - 1)
    return program // tiles // heads, head.to(tl.int64), own.to(tl.int64), row % n, row < group * n


@triton.jit
def _inner(low, high, begins, ends, SIZE: tl.constexpr):
    """[start, stop): the whole tiles within [low, high) whose pairs all may attend; begins: the highest, ends: the lowest."""
    bound = low + tl.cdiv(tl.maximum(high - low, 0), SIZE) * SIZE
    start = tl.minimum(tl.maximum(tl.cdiv(begins, SIZE) * SIZE, low), bound)
    stop = tl.minimum(tl.maximum(ends // SIZE * SIZE, start), bound)
    return start, stop


@triton.jit
def _past(walked, start, stop):
    """The tiles at both edges in one row, the inner ones left out: where they begin."""
    return walked + tl.where(walked < start, 0, stop - start)


# ---- forward


@triton.jit
def _attend(
    q, acc, top, total, k_at, v_at, mask_at, bias_at, begin, end, j, high, d_inside, v_inside, scale, cap, unit,
    COLS: tl.constexpr, CUT: tl.constexpr, CAREFUL: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    CAP: tl.constexpr, PAD_D: tl.constexpr, PAD_V: tl.constexpr,
):  # fmt: skip
    """One more tile of keys: the running sum of values, the largest score and the sum of weights."""
    cols = j + tl.arange(0, COLS)
    k = _load(k_at, (cols < high)[None, :], CUT, PAD_D, d_inside[:, None])
    v = _load(v_at, (cols < high)[:, None], CUT, PAD_V, v_inside[None, :])
    dots = tl.dot(q, k, input_precision="ieee")
    bias = _extra(bias_at, (cols < high)[None, :], BIAS, CUT)
    mask = _extra(mask_at, (cols < high)[None, :], MASK, CUT)
    scores, _bent, _allowed = _scores(
        dots, begin[:, None], end[:, None], cols[None, :], bias, mask, scale, cap, CUT, CAREFUL, MASK, BIAS, CAP
    )
    largest = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(largest == -float("inf"), 0.0, largest)  # a row without a key so far
    weights = tl.exp2(scores * unit - (base * unit)[:, None])  # one instruction before the power
    fade = tl.exp2((top - base) * unit)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, largest, total


@triton.jit
def _left(lse, sink):
    """What a sink, a key of this score whose value is 0, leaves to the other keys of a row, and the lse of all."""
    sink = sink.to(tl.float32)
    sink = tl.where(sink == float("inf"), float("nan"), sink)
    ahead = tl.where(lse == -float("inf"), -float("inf"), lse - sink)
    left = 1 / (1 + tl.exp(-ahead))
    lse = tl.where(ahead > 0, lse + tl.log(1 + tl.exp(-ahead)), sink + tl.log(1 + tl.exp(ahead)))
    return left, lse


@triton.jit(do_not_specialize=INTEGERS)
def forward(
    Q, K, V, O, Lse, Parts, Lens, Offsets, Mask, Bias, Sink,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, o_b, o_h, o_n, mask_b, mask_h, mask_n, mask_m, bias_b, bias_h,
    bias_n, bias_m, sink_b, sink_h, sink_n,
    heads, group, n, m, first, last, scale, cap,
    D: tl.constexpr, V_D: tl.constexpr, WIDE_D: tl.constexpr, WIDE_V: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, SPLIT: tl.constexpr,
    LENS: tl.constexpr, OFFSETS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """The output and lse of one tile of queries; with SPLIT > 1, what one part of the keys adds to them."""
    tiles = tl.cdiv(group * n, ROWS)
    program = tl.program_id(0)
    part = program % SPLIT
    program = program // SPLIT
    entry, head, own, i, inside = _queries(program, tiles, heads, group, n, ROWS)
    d = tl.arange(0, WIDE_D)
    e = tl.arange(0, WIDE_V)
    c = tl.arange(0, COLS)
    big = entry.to(tl.int64)
    i_ = i.to(tl.int64)
    q = _load(
        Q + big * q_b + (own * q_h + i_ * q_n)[:, None] + d[None, :], inside[:, None], True, WIDE_D != D, (d < D)[None, :]
    )
    k_at = K + big * k_b + head * k_h + (c[None, :] * k_m + d[:, None])
    v_at = V + big * v_b + head * v_h + (c[:, None] * v_m + e[None, :])
    mask_at = _extra_at(Mask, big * mask_b, (own * mask_h + i_ * mask_n)[:, None], (c * mask_m)[None, :], MASK)
    bias_at = _extra_at(Bias, big * bias_b, (own * bias_h + i_ * bias_n)[:, None], (c * bias_m)[None, :], BIAS)
    unit = _unit(scale, cap, BIAS, CAP)

    begin, end = _spans(i, entry, Lens, Offsets, n, m, first, last, LENS, OFFSETS, LEFT, RIGHT)
    if MASK == 1:
        opens, closes, forbids = _span_of(Mask + big * mask_b, mask_m, m)
        begin = tl.maximum(begin, opens)
        end = tl.minimum(end, closes)
    low = tl.min(begin, 0) // COLS * COLS
    high = tl.max(end, 0)
    ends = tl.min(end, 0)
    if MASK == 1:
        ends = tl.where(forbids, 0, ends)
    if SPLIT > 1:
        size = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), COLS), SPLIT) * COLS
        low = low + part * size
        high = tl.minimum(low + size, high)
    start, stop = _inner(low, high, tl.max(begin, 0), tl.minimum(ends, high), COLS)

    acc = tl.zeros([ROWS, WIDE_V], tl.float32)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for j in tl.range(start, stop, COLS):
        acc, top, total = _attend(
            q, acc, top, total, k_at + _far(j, k_m), v_at + _far(j, v_m), mask_at + _far(j, mask_m),
            bias_at + _far(j, bias_m),
            begin, end, j, high, d < D, e < V_D, scale, cap, unit, COLS, False, False, 2 * (MASK == 2), BIAS,
            CAP, WIDE_D != D, WIDE_V != V_D,
        )  # fmt: skip
    for walked in tl.range(low, high - (stop - start), COLS):
        j = _past(walked, start, stop)
        acc, top, total = _attend(
            q, acc, top, total, k_at + _far(j, k_m), v_at + _far(j, v_m), mask_at + _far(j, mask_m),
            bias_at + _far(j, bias_m),
            begin, end, j, high, d < D, e < V_D, scale, cap, unit, COLS, True, False, MASK, BIAS, CAP,
            WIDE_D != D, WIDE_V != V_D,
        )  # fmt: skip

    # else all queries of a tile see the same keys; `and` would look at all of it where nothing is to be looked at
    if LENS == 2 or LEFT or RIGHT or MASK or BIAS:  # noqa: SIM102
        if _any_odd(acc):
            if BIAS:
                top = tl.full([ROWS], -float("inf"), tl.float32)
                total = tl.zeros([ROWS], tl.float32)
                for j in tl.range(low, high, COLS, num_stages=1):
                    _acc, top, total = _attend(
                        q, acc, top, total, k_at + _far(j, k_m), v_at + _far(j, v_m), mask_at + _far(j, mask_m),
                        bias_at + _far(j, bias_m),
                        begin, end, j, high, d < D, e < V_D, scale, cap, unit, COLS, True, True, MASK, BIAS, CAP,
                        WIDE_D != D, WIDE_V != V_D,
                    )  # fmt: skip
            acc = tl.zeros([ROWS, WIDE_V], tl.float32)
            base = tl.where(top == -float("inf"), 0.0, top)
            for j in tl.range(low, high, COLS, num_stages=1):
                cols = j + c
                k = _load(k_at + _far(j, k_m), (cols < high)[None, :], True, WIDE_D != D, (d < D)[:, None])
                v = _load(v_at + _far(j, v_m), (cols < high)[:, None], True, WIDE_V != V_D, (e < V_D)[None, :])
                dots = tl.dot(q, k, input_precision="ieee")
                bias = _extra(bias_at + _far(j, bias_m), (cols < high)[None, :], BIAS, True)
                mask = _extra(mask_at + _far(j, mask_m), (cols < high)[None, :], MASK, True)
                scores, _bent, allowed = _scores(
                    dots, begin[:, None], end[:, None], cols[None, :], bias, mask, scale, cap, True, True, MASK, BIAS, CAP
                )
                acc = _apart(tl.exp2(scores * unit - (base * unit)[:, None]), allowed, v, acc)

    at = (big * heads * group + own) * n + i_  # the row among all
    if SPLIT > 1:
        count = tl.num_programs(0).to(tl.int64) // SPLIT // tiles * group * n  # of all rows
        tl.store(Parts + (part * count + at)[:, None] * V_D + e[None, :], acc, mask=inside[:, None] & (e < V_D)[None, :])
        Sums = Parts + SPLIT * count * V_D
        tl.store(Sums + part * count + at, top * unit, mask=inside)
        tl.store(Sums + (SPLIT + part) * count + at, total, mask=inside)
    else:
        empty = total == 0
        total = tl.where(empty, 1.0, total)
        o = acc / total[:, None]
        lse = tl.where(empty, -float("inf"), (top * unit + tl.log2(total)) * LN2)
        if SINK:
            sink = tl.load(Sink + big * sink_b + own * sink_h + i_ * sink_n, mask=inside, other=0.0)
            left, lse = _left(lse, sink)
            o = o * left[:, None]
        o_at = O + big * o_b + (own * o_h + i_ * o_n)[:, None] + e[None, :]
        tl.store(o_at, o.to(O.dtype.element_ty), mask=inside[:, None] & (e < V_D)[None, :])
        tl.store(Lse + at, lse, mask=inside)


@triton.jit(do_not_specialize=("heads", "n"))
def combine(
    Parts, O, Lse, Sink, o_b, o_h, o_n, sink_b, sink_h, sink_n, heads, n, V_D: tl.constexpr, WIDE_V: tl.constexpr,
    SPLIT: tl.constexpr, WIDE_SPLIT: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """The output and lse of one query, from the parts of its keys. ``heads``: of the queries."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0).to(tl.int64)
    part = tl.arange(0, WIDE_SPLIT)
    e = tl.arange(0, WIDE_V)
    Sums = Parts + SPLIT * count * V_D
    top = tl.load(Sums + part * count + row, mask=part < SPLIT, other=-float("inf"))
    total = tl.load(Sums + (SPLIT + part) * count + row, mask=part < SPLIT, other=0.0)
    acc = tl.load(
        Parts + (part * count + row)[:, None] * V_D + e[None, :], mask=(part < SPLIT)[:, None] & (e < V_D)[None, :], other=0.0
    )
    largest = tl.max(top, 0)
    base = tl.where(largest == -float("inf"), 0.0, largest)
    fade = tl.exp2(top - base)
    sums = tl.sum(total * fade, 0)
    empty = sums == 0
    sums = tl.where(empty, 1.0, sums)
    o = tl.sum(acc * fade[:, None], 0) / sums
    lse = tl.where(empty, -float("inf"), (largest + tl.log2(sums)) * LN2)
    entry, head, i = row // n // heads, row // n % heads, row % n
    if SINK:
        left, lse = _left(lse, tl.load(Sink + entry * sink_b + head * sink_h + i * sink_n))
        o = o * left
    tl.store(O + entry * o_b + head * o_h + i * o_n + e, o.to(O.dtype.element_ty), mask=e < V_D)
    tl.store(Lse + row, lse)


# ---- backward


@triton.jit
def _by_query(
    q, g, base, delta, dq, k_at, v_at, mask_at, bias_at, begin, end, j, high, d_inside, v_inside, scale, cap, unit,
    COLS: tl.constexpr, CUT: tl.constexpr, APART: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    CAP: tl.constexpr, PAD_D: tl.constexpr, PAD_V: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to the gradient by a tile of queries."""
    cols = j + tl.arange(0, COLS)
    k = _load(k_at, (cols < high)[None, :], CUT, PAD_D, d_inside[:, None])
    v = _load(v_at, (cols < high)[None, :], CUT, PAD_V, v_inside[:, None])
    dots = tl.dot(q, k, input_precision="ieee")
    bias = _extra(bias_at, (cols < high)[None, :], BIAS, CUT)
    mask = _extra(mask_at, (cols < high)[None, :], MASK, CUT)
    scores, bent, allowed = _scores(
        dots, begin[:, None], end[:, None], cols[None, :], bias, mask, scale, cap, CUT, APART, MASK, BIAS, CAP
    )
    weights = tl.exp2(scores * unit - base[:, None])
    ds = weights * (tl.dot(g, v, input_precision="ieee") - delta[:, None])
    if CAP:
        ds = ds * (1 - bent * bent)
    if APART:
        dq = _apart(ds, allowed, tl.trans(k), dq)
    else:
        dq = tl.dot(ds.to(k.dtype), tl.trans(k), dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=INTEGERS)
def backward_query(
    Q, K, V, O, Lse, G, GLse, Delta, DQ, Lens, Offsets, Mask, Bias,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, o_b, o_h, o_n, g_b, g_h, g_n, dq_b, dq_h, dq_n, mask_b, mask_h,
    mask_n, mask_m, bias_b, bias_h, bias_n, bias_m,
    heads, group, n, m, first, last, scale, cap,
    D: tl.constexpr, V_D: tl.constexpr, WIDE_D: tl.constexpr, WIDE_V: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, BY_LSE: tl.constexpr,
    LENS: tl.constexpr, OFFSETS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The gradient by one tile of queries, and do_i . o_i - dlse_i, which the gradient by keys needs too."""
    tiles = tl.cdiv(group * n, ROWS)
    program = tl.program_id(0)
    entry, head, own, i, inside = _queries(program, tiles, heads, group, n, ROWS)
    d = tl.arange(0, WIDE_D)
    e = tl.arange(0, WIDE_V)
    c = tl.arange(0, COLS)
    big = entry.to(tl.int64)
    i_ = i.to(tl.int64)
    q = _load(
        Q + big * q_b + (own * q_h + i_ * q_n)[:, None] + d[None, :], inside[:, None], True, WIDE_D != D, (d < D)[None, :]
    )
    o = _load(
        O + big * o_b + (own * o_h + i_ * o_n)[:, None] + e[None, :], inside[:, None], True, WIDE_V != V_D, (e < V_D)[None, :]
    )
    g = _load(
        G + big * g_b + (own * g_h + i_ * g_n)[:, None] + e[None, :], inside[:, None], True, WIDE_V != V_D, (e < V_D)[None, :]
    )
    k_at = K + big * k_b + head * k_h + (c[None, :] * k_m + d[:, None])
    v_at = V + big * v_b + head * v_h + (c[None, :] * v_m + e[:, None])
    mask_at = _extra_at(Mask, big * mask_b, (own * mask_h + i_ * mask_n)[:, None], (c * mask_m)[None, :], MASK)
    bias_at = _extra_at(Bias, big * bias_b, (own * bias_h + i_ * bias_n)[:, None], (c * bias_m)[None, :], BIAS)
    unit = _unit(scale, cap, BIAS, CAP)

    at = (big * heads * group + own) * n + i_
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if BY_LSE:
        delta = delta - tl.load(GLse + at, mask=inside, other=0.0)
    tl.store(Delta + at, delta, mask=inside)
    lse = tl.load(Lse + at, mask=inside, other=0.0)
    base = tl.where(lse == -float("inf"), 0.0, lse * LOG2E)

    begin, end = _spans(i, entry, Lens, Offsets, n, m, first, last, LENS, OFFSETS, LEFT, RIGHT)
    if MASK == 1:
        opens, closes, forbids = _span_of(Mask + big * mask_b, mask_m, m)
        begin = tl.maximum(begin, opens)
        end = tl.minimum(end, closes)
    low = tl.min(begin, 0) // COLS * COLS
    high = tl.max(end, 0)
    ends = tl.min(end, 0)
    if MASK == 1:
        ends = tl.where(forbids, 0, ends)
    start, stop = _inner(low, high, tl.max(begin, 0), ends, COLS)
    dq = tl.zeros([ROWS, WIDE_D], tl.float32)
    for j in tl.range(start, stop, COLS):
        dq = _by_query(
            q, g, base, delta, dq, k_at + _far(j, k_m), v_at + _far(j, v_m), mask_at + _far(j, mask_m),
            bias_at + _far(j, bias_m),
            begin, end, j, high, d < D, e < V_D, scale, cap, unit, COLS, False, False, 2 * (MASK == 2), BIAS, CAP,
            WIDE_D != D, WIDE_V != V_D,
        )  # fmt: skip
    for walked in tl.range(low, high - (stop - start), COLS):
        j = _past(walked, start, stop)
        dq = _by_query(
            q, g, base, delta, dq, k_at + _far(j, k_m), v_at + _far(j, v_m), mask_at + _far(j, mask_m),
            bias_at + _far(j, bias_m),
            begin, end, j, high, d < D, e < V_D, scale, cap, unit, COLS, True, False, MASK, BIAS, CAP, WIDE_D != D,
            WIDE_V != V_D,
        )  # fmt: skip
    if LENS == 2 or LEFT or RIGHT or MASK or BIAS:  # noqa: SIM102
        if _any_odd(dq):
            dq = tl.zeros([ROWS, WIDE_D], tl.float32)
            for j in tl.range(low, high, COLS, num_stages=1):
                dq = _by_query(
                    q, g, base, delta, dq, k_at + _far(j, k_m), v_at + _far(j, v_m), mask_at + _far(j, mask_m),
                    bias_at + _far(j, bias_m),
                    begin, end, j, high, d < D, e < V_D, scale, cap, unit, COLS, True, True, MASK, BIAS, CAP,
                    WIDE_D != D, WIDE_V != V_D,
                )  # fmt: skip
    dq_at = DQ + big * dq_b + (own * dq_h + i_ * dq_n)[:, None] + d[None, :]
    tl.store(dq_at, (dq * scale).to(DQ.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _by_key(
    k, v, dk, dv, i, cols, Q_at, G_at, Lse_at, Delta_at, mask_at, bias_at, entry, Lens, Offsets, n, m, first, last,
    limit, d_inside, v_inside, scale, cap, unit,
    ROWS: tl.constexpr, CUT: tl.constexpr, APART: tl.constexpr, LENS: tl.constexpr, OFFSETS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, PAD_D: tl.constexpr, PAD_V: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to the gradients by a tile of keys and values. Scores lie transposed: (key, query)."""
    rows = i + tl.arange(0, ROWS)
    inside = rows < n
    q = _load(Q_at, inside[:, None], CUT, PAD_D, d_inside[None, :])
    g = _load(G_at, inside[:, None], CUT, PAD_V, v_inside[None, :])
    begin = rows
    end = rows
    if CUT:
        lse = tl.load(Lse_at, mask=inside, other=0.0)
        delta = tl.load(Delta_at, mask=inside, other=0.0)
        begin, end = _spans(tl.minimum(rows, n - 1), entry, Lens, Offsets, n, m, first, last, LENS, OFFSETS, LEFT, RIGHT)
        end = tl.where(inside, end, 0)
    else:
        lse = tl.load(Lse_at)
        delta = tl.load(Delta_at)
    base = tl.where(lse == -float("inf"), 0.0, lse * LOG2E)
    dots = tl.dot(k, tl.trans(q), input_precision="ieee")
    readable = (cols < limit)[:, None]
    bias = _extra(bias_at, readable if BIAS == 1 else readable & inside[None, :], BIAS, CUT)
    mask = _extra(mask_at, readable if MASK == 1 else readable & inside[None, :], MASK, CUT)
    scores, bent, allowed = _scores(
        dots, begin[None, :], end[None, :], cols[:, None], bias, mask, scale, cap, CUT, APART, MASK, BIAS, CAP
    )
    weights = tl.exp2(scores * unit - base[None, :])
    ds = weights * (tl.dot(v, tl.trans(g), input_precision="ieee") - delta[None, :])
    if CAP:
        ds = ds * (1 - bent * bent)
    if APART:
        dv = _apart(weights, allowed, g, dv)
        dk = _apart(ds, allowed, q, dk)
    else:
        dv = tl.dot(weights.to(g.dtype), g, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=INTEGERS)
def backward_key(
    Q, K, V, Lse, G, Delta, DK, DV, Lens, Offsets, Mask, Bias,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, g_b, g_h, g_n, mask_b, mask_h, mask_n, mask_m, bias_b, bias_h,
    bias_n, bias_m,
    heads, group, n, m, first, last, scale, cap,
    D: tl.constexpr, V_D: tl.constexpr, WIDE_D: tl.constexpr, WIDE_V: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LENS: tl.constexpr, OFFSETS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The gradients by one tile of keys and values, from the queries of all the heads that share them."""
    tiles = tl.cdiv(m, COLS)
    program = tl.program_id(0)
    j = program % tiles * COLS  # causal: the first keys have the most queries
    entry = program // tiles // heads
    head = program // tiles % heads
    d = tl.arange(0, WIDE_D)
    e = tl.arange(0, WIDE_V)
    r = tl.arange(0, ROWS)
    cols = j + tl.arange(0, COLS)
    cols_ = cols.to(tl.int64)
    big = entry.to(tl.int64)
    head_ = head.to(tl.int64)
    unit = _unit(scale, cap, BIAS, CAP)

    limit = m  # the keys that this entry has
    if LENS == 1:
        limit = tl.minimum(tl.load(Lens + entry), m).to(tl.int32)
    shift = 0
    if OFFSETS:
        shift = tl.minimum(tl.maximum(tl.load(Offsets + entry), -FAR), FAR).to(tl.int32)
    low = 0  # the queries that may attend to some of these keys, and within them those that may attend to all
    high = n
    begins = 0
    ends = n
    if RIGHT:
        low = tl.minimum(tl.maximum(j + 1 - shift - last, 0), n) // ROWS * ROWS
        begins = tl.maximum(j + COLS - shift - last, 0)
    if LEFT:
        high = tl.minimum(tl.maximum(tl.minimum(j + COLS, limit) - shift - first, 0), n)
        ends = tl.minimum(tl.maximum(j + 1 - shift - first, 0), n)
    ends = tl.where(j + COLS > limit, 0, ends)
    if LENS == 2:
        ends = ends * 0
    high = tl.where(j < limit, high, 0)
    if MASK == 1:
        allowed = tl.load(Mask + big * mask_b + cols_ * mask_m, mask=cols < limit, other=0) != 0
        some = tl.max(allowed.to(tl.int32), 0) > 0
        every = tl.min(allowed.to(tl.int32), 0) > 0
        ends = tl.where(every, ends, 0)
        high = tl.where(some, high, 0)
    start, stop = _inner(low, high, begins, ends, ROWS)

    dk = tl.zeros([COLS, WIDE_D], tl.float32)
    dv = tl.zeros([COLS, WIDE_V], tl.float32)
    k = _load(
        K + big * k_b + head_ * k_h + cols_[:, None] * k_m + d[None, :],
        (cols < limit)[:, None],
        True,
        WIDE_D != D,
        (d < D)[None, :],
    )
    v = _load(
        V + big * v_b + head_ * v_h + cols_[:, None] * v_m + e[None, :],
        (cols < limit)[:, None],
        True,
        WIDE_V != V_D,
        (e < V_D)[None, :],
    )
    for member in tl.range(0, group):
        own = head_ * group + member
        q_at = Q + big * q_b + own * q_h + (r[:, None] * q_n + d[None, :])
        g_at = G + big * g_b + own * g_h + (r[:, None] * g_n + e[None, :])
        lse_at = Lse + (big * heads * group + own) * n + r
        delta_at = Delta + (big * heads * group + own) * n + r
        mask_at = _extra_at(Mask, big * mask_b, own * mask_h + (r * mask_n)[None, :], (cols_ * mask_m)[:, None], MASK)
        bias_at = _extra_at(Bias, big * bias_b, own * bias_h + (r * bias_n)[None, :], (cols_ * bias_m)[:, None], BIAS)
        for i in tl.range(start, stop, ROWS):
            i_ = _far(i, 1)
            dk, dv = _by_key(
                k, v, dk, dv, i, cols, q_at + i_ * q_n, g_at + i_ * g_n, lse_at + i_, delta_at + i_,
                mask_at + i_ * mask_n, bias_at + i_ * bias_n,
                entry, Lens, Offsets, n, m, first, last, limit, d < D, e < V_D, scale, cap, unit,
                ROWS, False, False, LENS, OFFSETS, LEFT, RIGHT, 2 * (MASK == 2), BIAS, CAP, WIDE_D != D,
                WIDE_V != V_D,
            )  # fmt: skip
        for walked in tl.range(low, high - (stop - start), ROWS):
            i = _past(walked, start, stop)
            i_ = _far(i, 1)
            dk, dv = _by_key(
                k, v, dk, dv, i, cols, q_at + i_ * q_n, g_at + i_ * g_n, lse_at + i_, delta_at + i_,
                mask_at + i_ * mask_n, bias_at + i_ * bias_n,
                entry, Lens, Offsets, n, m, first, last, limit, d < D, e < V_D, scale, cap, unit,
                ROWS, True, False, LENS, OFFSETS, LEFT, RIGHT, MASK, BIAS, CAP, WIDE_D != D, WIDE_V != V_D,
            )  # fmt: skip
    if LENS or LEFT or RIGHT or MASK or BIAS:  # noqa: SIM102
        if _any_odd(dk) | _any_odd(dv):
            dk = tl.zeros([COLS, WIDE_D], tl.float32)
            dv = tl.zeros([COLS, WIDE_V], tl.float32)
            for member in tl.range(0, group):
                own = head_ * group + member
                q_at = Q + big * q_b + own * q_h + (r[:, None] * q_n + d[None, :])
                g_at = G + big * g_b + own * g_h + (r[:, None] * g_n + e[None, :])
                lse_at = Lse + (big * heads * group + own) * n + r
                delta_at = Delta + (big * heads * group + own) * n + r
                mask_at = _extra_at(Mask, big * mask_b, own * mask_h + (r * mask_n)[None, :], (cols_ * mask_m)[:, None], MASK)
                bias_at = _extra_at(Bias, big * bias_b, own * bias_h + (r * bias_n)[None, :], (cols_ * bias_m)[:, None], BIAS)
                for i in tl.range(low, high, ROWS, num_stages=1):
                    i_ = _far(i, 1)
                    dk, dv = _by_key(
                        k, v, dk, dv, i, cols, q_at + i_ * q_n, g_at + i_ * g_n, lse_at + i_, delta_at + i_,
                        mask_at + i_ * mask_n, bias_at + i_ * bias_n,
                        entry, Lens, Offsets, n, m, first, last, limit, d < D, e < V_D, scale, cap, unit,
                        ROWS, True, True, LENS, OFFSETS, LEFT, RIGHT, MASK, BIAS, CAP, WIDE_D != D, WIDE_V != V_D,
                    )  # fmt: skip
    at = ((big * heads + head) * m + cols_)[:, None]
    tl.store(DK + at * D + d[None, :], (dk * scale).to(DK.dtype.element_ty), mask=(cols < m)[:, None] & (d < D)[None, :])
    tl.store(DV + at * V_D + e[None, :], dv.to(DV.dtype.element_ty), mask=(cols < m)[:, None] & (e < V_D)[None, :])
