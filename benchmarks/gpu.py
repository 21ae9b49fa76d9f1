"""Attention on one GPU: kvattn's torch and jax tabs against the frameworks' own kernels, each result checked in the same run.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --size tiny     (that the script works; its figures mean nothing)

The shapes that people use come first: BERT's, decoding, small calls, lengths that change, a layer; then the large ones. A row's
ratio is kvattn's time over that of the fastest native way that gives the right answer, which is named: below 1 kvattn is
faster. Native are, in torch, scaled_dot_product_attention, as it chooses and on each of its backends, with a boolean mask
where keys are masked, varlen_attn, compiled flex_attention, nn.MultiheadAttention; in jax, jax.nn.dot_product_attention on
cuDNN and on XLA. A round times each in turn, as often as fills some milliseconds; figures are medians of rounds. Checked: one
head of the first and one of the last batch entry, against float64. Each framework has a process of its own. What does not fit
into --minutes is named, not measured. Without a GPU: exit status 2.
"""

import argparse
import itertools
import math
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from kvattn import timing

SHAPES = {  # batch, heads, heads of keys, queries, keys, features
    "BERT": (32, 12, 12, 512, 512, 64),
    "decoding": (8, 32, 8, 1, 8192, 128),
    "small": (2, 8, 8, 128, 128, 64),
    "layer": (32, 12, 12, 512, 512, 64),
    "grouped": (4, 32, 8, 2048, 2048, 128),
    "large": (4, 16, 16, 4096, 4096, 128),
    "large, d=64": (4, 16, 16, 4096, 4096, 64),
    "long": (1, 16, 16, 8192, 8192, 128),
    "long, d=64": (1, 16, 16, 8192, 8192, 64),
}
TINY = {name: (2, 4, 4 if h == hk else 2, min(n, 24), 32 if n == 1 else 24, 8) for name, (_, h, hk, n, _, _) in SHAPES.items()}
SOFTCAP, FILLED, ROUNDS = 20.0, (0.4, 0.5, 0.7, 0.8), 7  # FILLED: the share of keys that is valid, in turn; 0.6 on average
FILL = 0.01  # seconds of calls in each round, at most FILLS calls: as in training, nobody waits for the GPU in between
FILLS, CHANGES, CHUNK = 100, 20, 6  # CHANGES: different lengths in turn; CHUNK: rows that JAX compiles side by side
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}  # of the largest value; TF32 would be 1e-3
BOTH, FORWARD = (False, True), (False,)
ROWS = [  # shape, kind, dtype, and whether with gradients: in the order of their weight, should time run out
    *(("BERT", kind, "bfloat16", BOTH) for kind in ("plain", "lengths", "mask", "bias")),
    *(("decoding", kind, "bfloat16", FORWARD) for kind in ("plain", "lengths")),
    *(("small", kind, "bfloat16", BOTH) for kind in ("plain", "causal", "lengths", "mask")),
    ("BERT", "changing lengths", "bfloat16", BOTH),
    *(("layer", kind, dtype, BOTH) for dtype in ("bfloat16", "float32") for kind in ("plain", "lengths")),
    ("grouped", "causal", "bfloat16", BOTH),
    *((shape, kind, "bfloat16", BOTH) for shape in ("large", "large, d=64") for kind in ("plain", "causal", "lengths")),
    *((shape, "window", "bfloat16", BOTH) for shape in ("long", "long, d=64")),
    ("large", "softcap", "bfloat16", BOTH),
    *(("large", kind, "float16", BOTH) for kind in ("plain", "lengths")),
    *(("large, d=64", kind, "float32", BOTH) for kind in ("plain", "lengths")),
]
UNASKED = {"jax": {"softcap"}}  # there is no native way, and the formula with all its scores takes gigabytes


def rows(framework, shapes=tuple(SHAPES)):
    """(shape, kind, dtype, gradients)."""
    for shape, kind, dtype, grads in ROWS:
        if shape in shapes and kind not in UNASKED.get(framework, ()):
            yield from ((shape, kind, dtype, grad) for grad in grads)


@cache
def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def lengths(batch, m, turn=0):
    return np.array([max(1, int(FILLED[(i + turn) % 4] * m) - turn) for i in range(batch)], dtype=np.int32)


def problem(shape, kind, size):
    """Query, key, value and the gradient of the output in float32, and what kvattn calls the kind."""
    batch, heads, kv_heads, n, m, d = (SHAPES if size == "full" else TINY)[shape]
    arrays = [draw(batch, h, x, d, seed=i) for i, (h, x) in enumerate(((heads, n), (kv_heads, m), (kv_heads, m), (heads, n)))]
    options = {
        "plain": {},
        "causal": {"causal": True},
        "lengths": {"valid_lens": lengths(batch, m)},
        "changing lengths": {"valid_lens": lengths(batch, m)},
        "mask": {"mask": np.arange(m) < lengths(batch, m)[:, None, None, None]},
        "bias": {"bias": draw(1, heads, n, m, seed=9)},
        "window": {"causal": True, "window": (max(n // 32, 1), 0)},
        "softcap": {"softcap": SOFTCAP},
    }[kind]
    return arrays, options


def weights(shape, size):
    """The matrices of a layer of as many features as its heads hold: of its queries, keys, values and output."""
    _, heads, _, _, _, d = (SHAPES if size == "full" else TINY)[shape]
    return [draw(heads * d, heads * d, seed=20 + i) / math.sqrt(heads * d) for i in range(4)]


def expected(arrays, options, entry, head):
    """(output, gradients by query, key and value) in float64, of one head's query, key, value and gradient of the output."""
    query, key, value, grad = (np.asarray(x, dtype=np.float64) for x in arrays)
    n, d = query.shape
    scores = query / math.sqrt(d) @ key.T
    if "bias" in options:
        scores += options["bias"][min(entry, options["bias"].shape[0] - 1), head]
    slope = 1.0
    if "softcap" in options:
        bent = np.tanh(scores / SOFTCAP)
        scores, slope = SOFTCAP * bent, 1 - bent * bent
    if "causal" in options or "window" in options:
        ahead = np.arange(len(key)) - np.arange(n)[:, None]
    if "causal" in options:
        scores[ahead > 0] = -np.inf
    if "window" in options:
        scores[ahead < -options["window"][0]] = -np.inf
    if "valid_lens" in options:
        scores[:, options["valid_lens"][entry] :] = -np.inf
    if "mask" in options:
        scores[:, ~options["mask"][entry, 0, 0]] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)  # from here on in place: of 8192 keys, each copy is half a gigabyte
    shares = np.exp(scores, out=scores)
    shares /= shares.sum(axis=-1, keepdims=True)
    back = grad @ value.T
    back -= np.einsum("ij,ij->i", shares, back)[:, None]
    back *= shares
    back *= slope / math.sqrt(d)
    return shares @ value, back @ key, back.T @ query, shares.T @ grad


def expected_of_layer(x, grad, matrices, options, entry, heads):
    """(output, gradient by the input) in float64 of self-attention on one batch entry (n, heads * d)."""
    x, grad, W_q, W_k, W_v, W_o = (np.asarray(each, dtype=np.float64) for each in (x, grad, *matrices))
    query, key, value, back = (np.split(each, heads, axis=-1) for each in (x @ W_q, x @ W_k, x @ W_v, grad @ W_o.T))
    found = [expected(each, options, entry, i) for i, each in enumerate(zip(query, key, value, back, strict=True))]
    output, *by = (np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True))
    return output @ W_o, sum(x @ W.T for x, W in zip(by, (W_q, W_k, W_v), strict=True))


def references(rounded, matrices, options, heads, group):
    """{place: (output, *gradients)} of the first and the last batch entry, and of a head of each."""
    last = len(rounded[0]) - 1
    if matrices is not None:
        return {entry: expected_of_layer(rounded[0][entry], rounded[1][entry], matrices, options, entry, heads)
                for entry in {0, last}}  # fmt: skip
    found = {}
    for entry, head in {(0, 0), (last, heads - 1)}:
        own = [x[entry, head // group if i in (1, 2) else head] for i, x in enumerate(rounded)]
        # the keys' gradients are of all the queries' heads that share them
        found[entry, head] = expected(own, options, entry, head)[: 2 if group > 1 else 4]
    return found


def error(results, wanted, grad):
    """The largest difference from the references, over the largest value; of the output, or of the gradients."""
    worst = 0.0
    for place, answer in wanted.items():
        answer = answer[1:] if grad else answer[:1]
        for x, y in zip(results, answer, strict=False):  # of shared keys only the gradient by the query
            x = np.asarray(x[place], dtype=np.float64)
            off = float(np.abs(x - y).max() / np.abs(y).max())
            worst = max(worst, off if math.isfinite(off) else math.inf)  # max(0, NaN) is 0
    return worst


class Looked:
    """A framework's array, of which only the parts that are asked for are brought here, as ``plain`` brings them."""

    def __init__(self, x, plain, moved=False):
        self.x, self.plain, self.moved, self.shape = x, plain, moved, x.shape

    def __len__(self):
        return len(self.x)

    def __getitem__(self, place):
        entry, *head = place if isinstance(place, tuple) else (place,)
        return self.plain(self.x[(entry, slice(None), *head) if self.moved else place])  # moved: heads after rows


def medians(calls, clock, rounds):
    """By name, milliseconds in each round: of each call in turn, as many times as fill FILL seconds."""
    once = {name: min(clock(call, count) / count for count in (1, 5)) for name, call in calls.items()}
    turns = {name: timing.queued(max(1, min(FILLS, int(1e3 * FILL / max(ms, 1e-3)))), clock) for name, ms in once.items()}
    return timing.rounds(calls, rounds, turns)  # who comes first finds the GPU at rest


# ---- torch


def torch_calls(shape, kind, dtype, grad, size, device):
    """(arrays as rounded, a layer's matrices, options, {name: call}); a call returns (output,), or the gradients."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    import kvattn

    arrays, options = problem(shape, kind, size)

    def tensor(x, dtype=dtype):
        return torch.tensor(x, dtype=getattr(torch, dtype) if x.dtype.kind == "f" else None, device=device)

    given = {name: tensor(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    options = {name: x.double().cpu().numpy() if name == "bias" else options[name] for name, x in given.items()}
    batch, heads, n, d = arrays[0].shape
    m, grouped = arrays[1].shape[-2], arrays[0].shape[1] != arrays[1].shape[1]
    at = torch.arange(m, device=device)
    turns = [given]
    if kind == "changing lengths":
        turns = [{"valid_lens": tensor(lengths(batch, m, turn))} for turn in range(CHANGES)]
    masks = [at < turn["valid_lens"][:, None, None, None] for turn in turns if "valid_lens" in turn] or [given.get("mask")]

    def of(forward, *leaves, back):
        turn, leaves = itertools.count(), [x.requires_grad_(grad) for x in leaves]

        def call():
            with torch.set_grad_enabled(grad):
                output = forward(next(turn), *leaves)
            return torch.autograd.grad(output, leaves, back) if grad else (output,)

        return call

    if shape == "layer":
        from kvattn import torch as kv

        x, back = (tensor(each.swapaxes(1, 2).reshape(batch, n, heads * d)) for each in (arrays[0], arrays[3]))
        matrices = [tensor(W) for W in weights(shape, size)]
        native = torch.nn.MultiheadAttention(heads * d, heads, bias=False, batch_first=True, device=device, dtype=x.dtype)
        ours = kv.MultiHeadAttention(heads * d, heads).to(device, x.dtype)
        ours(x, x, x)
        with torch.no_grad():
            native.in_proj_weight.copy_(torch.cat([W.T for W in matrices[:3]]))
            native.out_proj.weight.copy_(matrices[3].T)
            for name, W in zip(("W_q", "W_k", "W_v", "W_o"), matrices, strict=True):
                getattr(ours, name).weight.copy_(W.T)
        if not grad:
            native, ours = native.eval(), ours.eval()
        padding = None if masks[0] is None else ~masks[0][:, 0, 0]
        calls = {
            "kvattn": of(lambda _, x: ours(x, x, x, given.get("valid_lens")), x, back=back),
            "nn.MultiheadAttention": of(
                lambda _, x: native(x, x, x, key_padding_mask=padding, need_weights=False)[0], x, back=back
            ),
        }
        return [x, back], matrices, options, calls

    query, key, value, back = map(tensor, arrays)
    rounded = query, key, value, back
    leaves = query, key, value

    def native(backend=None, mask=None, **how):
        how |= {"enable_gqa": True} if grouped else {}

        def forward(turn, *leaves):
            mask = masks[turn % len(masks)] if kind != "bias" else given["bias"]
            if backend is None:
                return sdpa(*leaves, attn_mask=mask, **how)
            with sdpa_kernel(backend):
                return sdpa(*leaves, attn_mask=mask, **how)

        return of(forward, *leaves, back=back)

    def flex(score_mod=None, mask_mod=None):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        block = None if mask_mod is None else create_block_mask(mask_mod, None, None, n, m, device=device)
        compiled = torch.compile(flex_attention, dynamic=False)
        return of(lambda _, *leaves: compiled(*leaves, score_mod=score_mod, block_mask=block), *leaves, back=back)

    calls = {"kvattn": of(lambda turn, *leaves: kvattn.attention(*leaves, **turns[turn % len(turns)]), *leaves, back=back)}
    if kind == "softcap":

        def whole(_, query, key, value):
            scores = torch.matmul(query, key.transpose(-1, -2)).float() / math.sqrt(d)
            return torch.softmax(SOFTCAP * torch.tanh(scores / SOFTCAP), dim=-1).to(value.dtype) @ value

        calls["whole scores"] = of(whole, *leaves, back=back)
        if device != "cpu":
            calls["flex_attention"] = flex(score_mod=lambda score, *_: SOFTCAP * torch.tanh(score / SOFTCAP))
        return rounded, None, options, calls
    if kind == "window":
        left, ahead = options["window"][0], at - at[:, None]
        masks = [(ahead <= 0) & (ahead >= -left)]
        if device != "cpu":
            calls["flex_attention"] = flex(mask_mod=lambda b, h, q, k: (k <= q) & (k >= q - left))
    how = {"is_causal": True} if kind == "causal" else {}
    calls["SDPA"] = native(**how)
    for backend in ("CUDNN", "FLASH", "EFFICIENT"):
        calls[f"SDPA {backend.lower()}"] = native(getattr(SDPBackend, f"{backend}_ATTENTION"), **how)
    if kind == "lengths" and dtype != "float32" and n == m:
        calls["varlen_attn"] = of(lambda _, *leaves: varlen(given["valid_lens"], *leaves), *leaves, back=back)
    return rounded, None, options, calls


def varlen(lens, query, key, value):
    """FlashAttention over the valid keys in place: each head is a sequence, and the padding one without queries."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    (batch, heads, n, d), m = query.shape, key.shape[-2]
    start = torch.arange(batch * heads, device=lens.device)
    keys = torch.stack([start * m, start * m + lens.repeat_interleave(heads)], dim=1).flatten()
    rows = torch.stack([start * n, start * n + n], dim=1).flatten()
    ends = [torch.cat([x, x.new_tensor([batch * heads * r])]).int() for x, r in ((rows, n), (keys, m))]
    return varlen_attn(*(x.reshape(-1, 1, d) for x in (query, key, value)), *ends, n, m).reshape(query.shape)


def torch_plain(x):
    return x.detach().double().cpu().numpy()


def torch_clock(device):
    import torch

    def clock(call, count):
        if device == "cpu":
            return 1e3 * timing.wall(call, count)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return clock


def torch_machine(device):
    import torch

    name = "cpu" if device == "cpu" else torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return name, f"{torch.__version__}, cuDNN {torch.backends.cudnn.version()}"


# ---- jax


def jax_calls(shape, kind, dtype, grad, size, device):
    import jax
    import jax.numpy as jnp

    import kvattn

    arrays, options = problem(shape, kind, size)

    def array(x):
        return jnp.asarray(x, dtype if x.dtype.kind == "f" else None)

    given = {name: array(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    options = {n: np.asarray(x.astype(jnp.float32)) if n == "bias" else options[n] for n, x in given.items()}
    fixed = {name: x for name, x in given.items() if not isinstance(x, jax.Array)}
    named = [name for name in given if name not in fixed]
    batch, heads, n, d = arrays[0].shape
    m = arrays[1].shape[-2]
    turns = [[given[name] for name in named]]
    if kind == "changing lengths":
        turns = [[array(lengths(batch, m, turn))] for turn in range(CHANGES)]

    def of(forward, *leaves, back):
        """``forward`` takes the leaves and then the options that are arrays."""
        size = len(leaves)

        def gradients(*given):
            return jax.vjp(lambda *leaves: forward(*leaves, *given[size + 1 :]), *given[:size])[1](given[size])

        program = jax.jit(gradients if grad else lambda *given: (forward(*given[:size], *given[size + 1 :]),))
        turn = itertools.count()
        return lambda: program(*leaves, back, *turns[next(turn) % len(turns)])

    def native(implementation, precise=dtype == "float32"):
        def forward(query, key, value, *rest):
            rest = dict(zip(named, rest, strict=True))
            with jax.default_matmul_precision("highest" if precise else "default"):
                return jax.nn.dot_product_attention(
                    query, key, value, bias=rest.get("bias"), mask=rest.get("mask"), is_causal="causal" in options,
                    key_value_seq_lengths=rest.get("valid_lens"), local_window_size=options.get("window"),
                    implementation=implementation,
                )  # fmt: skip

        return forward

    implementations = ("cudnn", "xla") if n <= 512 else ("cudnn",) if dtype != "float32" else ("xla",)
    if shape == "layer":
        x, back = (array(each.swapaxes(1, 2).reshape(batch, n, heads * d)) for each in (arrays[0], arrays[3]))
        matrices = [array(W) for W in weights(shape, size)]
        params = dict(zip(("W_q", "W_k", "W_v", "W_o"), matrices, strict=True))

        def ours(x, *rest):
            rest = dict(zip(named, rest, strict=True))
            return kvattn.multi_head_attention(x, x, x, params, num_heads=heads, **rest)

        def by_hand(implementation):
            attend = native(implementation)

            def forward(x, *rest):
                with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
                    three = ((x @ W).reshape(batch, n, heads, d) for W in matrices[:3])
                    return attend(*three, *rest).reshape(x.shape) @ matrices[3]

            return forward

        calls = {"kvattn": of(ours, x, back=back)}
        calls |= {f"by hand, {name}": of(by_hand(name), x, back=back) for name in implementations}
        return [x, back], matrices, options, calls

    query, key, value, back = map(array, arrays)
    rounded = query, key, value, back
    theirs = [x.swapaxes(1, 2).copy() for x in (query, key, value, back)]  # their own layout, (batch, n, heads, d)

    def forward(query, key, value, *rest):
        return kvattn.attention(query, key, value, **fixed, **dict(zip(named, rest, strict=True)))

    calls = {"kvattn": of(forward, query, key, value, back=back)}
    for name in implementations:
        calls[f"jax.nn {name}"] = _moved(of(native(name), *theirs[:3], back=theirs[3]))
    return rounded, None, options, calls


def _moved(call):
    """A call whose results lie otherwise than kvattn's."""
    made = lambda: call()  # noqa: E731
    made.moved = True
    return made


def jax_plain(x):
    return np.asarray(x).astype(np.float32)


def jax_clock(device):
    import jax

    def clock(call, count):
        def queue():
            for _ in range(count):
                results = call()
            jax.block_until_ready(results)

        return 1e3 * timing.wall(queue)

    return clock


def jax_machine(device):
    import jax

    found = [x for x in jax.devices() if device == "cpu" or x.platform == "gpu"]
    return (found[0].device_kind if found else None), jax.__version__


# ---- one framework's process, and what it says


def work(framework, device, size, shapes, rounds, deadline):
    """Prints a JSON line for each row as it is measured, the first one the machine."""
    parts = globals()
    name, versions = parts[f"{framework}_machine"](device)
    timing.print_row({"framework": framework, "device": name, "versions": versions})
    if name is None:
        return
    clock, known = parts[f"{framework}_clock"](device), {}
    plain = parts[f"{framework}_plain"]
    chunk = CHUNK if framework == "jax" else 1
    asked = [*rows(framework, shapes)]
    for start in range(0, len(asked), chunk):
        made, refused = [], {}
        for at, (shape, kind, dtype, grad) in enumerate(asked[start : start + chunk]):
            row = {"framework": framework, "shape": shape, "kind": kind, "dtype": dtype, "grad": grad}
            if time.time() > deadline:
                timing.print_row(row | {"late": True})
                continue
            made.append((row, at, *parts[f"{framework}_calls"](shape, kind, dtype, grad, size, device)))

        def compiled(job, refused=refused):
            """A kernel that does not serve the call says so; ours may not."""
            at, what, call = job
            try:
                call()
            except Exception as error:
                if what == "kvattn":
                    raise
                refused[at, what] = f"{type(error).__name__}: {error}".splitlines()[0][:200]

        with ThreadPoolExecutor(chunk * 3 if chunk > 1 else 1) as pool:
            for _ in pool.map(compiled, [(at, what, call) for _, at, *_, calls in made for what, call in calls.items()]):
                pass
        for row, at, rounded, matrices, options, calls in made:
            if time.time() > deadline:  # compiling took what was left
                timing.print_row(row | {"late": True})
                continue
            turned_down = {what: why for (of, what), why in refused.items() if of == at}
            calls = {what: call for what, call in calls.items() if what not in turned_down}
            heads = (SHAPES if size == "full" else TINY)[row["shape"]][1]
            group = 1 if matrices is not None else heads // rounded[1].shape[1]
            key = row["shape"], row["kind"], row["dtype"]
            if key not in known:
                looked = [Looked(x, plain) for x in rounded]
                known[key] = references(looked, matrices and [plain(W) for W in matrices], options, heads, group)
            changing = row["kind"] == "changing lengths"
            wrong = {}
            for what, call in calls.items():
                for _ in range(CHANGES - 1 if changing else 0):  # to the first lengths again, which the reference has
                    call()
                results = [Looked(x, plain, hasattr(call, "moved")) for x in call()]
                wrong[what] = error(results, known[key], row["grad"])
            figures = medians(calls, clock, rounds)
            timing.print_row(row | judged(figures, wrong, TOLERANCE[row["dtype"]]) | {"refused": turned_down})


def judged(figures, wrong, tolerance):
    """Of a row: kvattn's milliseconds, the fastest native way whose answer is right, and kvattn's time over its."""
    ms = {what: statistics.median(times) for what, times in figures.items()}
    right = [what for what in ms if what != "kvattn" and wrong[what] <= tolerance]
    best = min(right, key=ms.get, default=None)
    compared = {"ratio": None, "spread": None} if best is None else timing.ratio(figures["kvattn"], figures[best])
    return {
        "ms": ms["kvattn"],
        "best": best,
        **compared,
        "error": wrong["kvattn"],
        "right": wrong["kvattn"] <= tolerance,
        "native": {what: {"ms": ms[what], "error": wrong[what]} for what in ms if what != "kvattn"},
    }


def told(row):
    """A row as a line."""
    if "versions" in row:
        return f"{row['framework']} {row['versions']} on {row['device'] or 'no GPU'}"
    what = f"{row['framework']} {row['shape']}, {row['kind']}, {row['dtype']}{', forward + backward' if row['grad'] else ''}"
    if row.get("late"):
        return f"not measured, for want of time: {what}"
    ours = f"{row['ms']:.3f} ms" + ("" if row["right"] else f" WRONG by {row['error']:.1e}")
    against = "no native way" if row["best"] is None else f"{row['ratio']:.2f} x {row['best']}"
    others = ", ".join(
        f"{name} {x['ms']:.3f}{'' if x['error'] <= TOLERANCE[row['dtype']] else ' (wrong)'}"
        for name, x in row["native"].items()
    )
    refused = f"; not {', '.join(row['refused'])}" if row["refused"] else ""
    return f"{what}: {ours}, {against} ({others}{refused})"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frameworks", default="torch,jax", help="names, separated by commas")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="full", choices=("full", "tiny"))
    parser.add_argument("--shapes", default=";".join(SHAPES), help=f"separated by semicolons, of: {'; '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--minutes", type=float, default=5, help="after these, rows are named but not measured")
    parser.add_argument("--json", help="write the figures to this file, as they come")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        work(args.work, args.device, args.size, args.shapes.split(";"), args.rounds, time.time() + 60 * args.minutes)
        return 0

    found, failed = [], []
    frameworks = args.frameworks.split(",")
    for framework in frameworks:
        command = [__file__, "--work", framework, "--device", args.device, "--size", args.size, "--shapes", args.shapes]
        command += ["--rounds", str(args.rounds), "--minutes", str(args.minutes / len(frameworks))]
        env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | (
            {"JAX_PLATFORMS": "cpu"} if args.device == "cpu" else {}
        )
        for row in timing.in_a_process(command, env):
            if "failed" in row:
                failed.append(framework)
                print(row["words"])
                continue
            found.append(row)
            print(told(row), flush=True)
            if args.json:
                timing.write(args.json, about(found), rows=[row for row in found if "versions" not in row])
    if not failed and not any(row.get("device") for row in found):
        print(f"no GPU here that {' or '.join(frameworks)} can use: nothing was measured")
        return 2
    for framework in failed:
        print(f"{framework} failed: its own words are above")
    return 1 if failed or not all(row.get("right", True) for row in found) else 0


def about(found):
    """The machine and the versions."""
    about = {"date": time.strftime("%Y-%m-%d")}
    for row in found:
        if row.get("device"):
            about |= {"device": row["device"], row["framework"]: row["versions"]}
    return about


if __name__ == "__main__":
    sys.exit(main())
