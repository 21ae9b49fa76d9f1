"""Attention on one GPU: kvattn's torch and jax tabs against the frameworks' own kernels, each result checked in the same run.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --size tiny     (that the script works; its figures mean nothing)

torch: against the fastest backend of scaled_dot_product_attention that serves the call, tried one by one, and, where keys are
masked, against scaled_dot_product_attention with the boolean mask. jax: against jax.nn.dot_product_attention on cuDNN and on
XLA. A round calls each once; the table has the medians of the rounds, and the ratio to kvattn taken within the rounds: above 1
kvattn is faster. Checked: one head of the first and one of the last batch entry, against float64. Each framework has a process
of its own. What does not fit into --minutes is named, not measured. Without a GPU: exit status 2.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from functools import cache

import numpy as np

SIZES = {"full": (4, 16, 4096, 8192), "tiny": (2, 2, 32, 48)}  # batch, heads, n = m, n = m of a window
SOFTCAP, FILLED, ROUNDS = 20.0, (0.4, 0.5, 0.7, 0.8), 15  # FILLED: the share of keys that is valid, in turn; 0.6 on average
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}  # of the largest value; TF32 would be 1e-3
KINDS = {"torch": ("plain", "causal", "valid 60%", "window", "softcap"), "jax": ("plain", "causal", "valid 60%", "window")}


def rows(framework):
    """(kind, dtype, d, gradients) in the order of their weight, should time run out."""
    for dtype, d in (("bfloat16", 128), ("bfloat16", 64), ("float16", 128), ("float32", 64), ("float16", 64), ("float32", 128)):
        for kind in KINDS[framework]:
            for grad in (False, True):
                yield kind, dtype, d, grad


@cache
def draw(*shape):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for _ in range(4)]


def problem(kind, d, size):
    """Arrays in float32, and what kvattn calls the kind."""
    batch, heads, n, longer = SIZES[size]
    if kind == "window":
        batch, n = max(batch // 4, 1), longer
    arrays, window = draw(batch, heads, n, d), n // 32
    options = {
        "plain": {},
        "causal": {"causal": True},
        "valid 60%": {"valid_lens": np.array([max(1, int(FILLED[i % 4] * n)) for i in range(batch)])},
        "window": {"causal": True, "window": (window, 0)},
        "softcap": {"softcap": SOFTCAP},
    }[kind]
    return arrays, options


def expected(heads, options, entry):
    """(output, gradients by query, key and value) in float64, of one head's query, key, value and gradient of the output."""
    query, key, value, grad = (np.asarray(x, dtype=np.float64) for x in heads)
    n, d = query.shape
    scores = query @ key.T / math.sqrt(d)
    slope = 1.0
    if "softcap" in options:
        bent = np.tanh(scores / SOFTCAP)
        scores, slope = SOFTCAP * bent, 1 - bent * bent
    ahead = np.arange(n) - np.arange(n)[:, None]
    if "causal" in options:
        scores[ahead > 0] = -np.inf
    if "window" in options:
        scores[ahead < -options["window"][0]] = -np.inf
    if "valid_lens" in options:
        scores[:, options["valid_lens"][entry] :] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    back = grad @ value.T
    back = weights * (back - (weights * back).sum(axis=-1, keepdims=True)) * slope / math.sqrt(d)
    return weights @ value, back @ key, back.T @ query, weights.T @ grad


def errors(calls, references):
    """By name, the largest error of what a call gives, over the largest value."""
    found = {}
    for name, (call, take) in calls.items():
        results = take(call())
        worst = 0.0
        for (entry, head), wanted in references.items():
            wanted = wanted[:1] if len(results) == 1 else wanted[1:]
            for x, y in zip(results, wanted, strict=True):
                worst = max(worst, float(np.abs(np.asarray(x(entry, head), dtype=np.float64) - y).max() / np.abs(y).max()))
        found[name] = worst
    return found


def medians(calls, clock, rounds):
    """By name, (milliseconds, the median over rounds of its time to kvattn's)."""
    took = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, _) in calls.items():
            took[name].append(clock(call))
    ours = took["kvattn"]
    return {
        name: (statistics.median(times), statistics.median(x / y for x, y in zip(times, ours, strict=True)))
        for name, times in took.items()
    }


# ---- torch


def torch_calls(kind, dtype, d, grad, size, device):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    import kvattn

    arrays, options = problem(kind, d, size)
    query, key, value, back = (torch.tensor(x, dtype=getattr(torch, dtype), device=device) for x in arrays)
    rounded = [lambda entry, head, x=x: x[entry, head].double().cpu().numpy() for x in (query, key, value, back)]
    leaves = [x.requires_grad_(grad) for x in (query, key, value)]
    given = {name: torch.tensor(x, device=device) if isinstance(x, np.ndarray) else x for name, x in options.items()}

    def of(forward):
        def call():
            output = forward(*leaves)
            return torch.autograd.grad(output, leaves, back) if grad else (output,)

        return call, lambda found: [lambda entry, head, x=x: x[entry, head].detach().double().cpu() for x in found]

    def on(backend, **how):
        def forward(*leaves):
            with sdpa_kernel(backend):
                return sdpa(*leaves, **how)

        return forward

    def naive(query, key, value):
        scores = torch.matmul(query, key.transpose(-1, -2)).float() / math.sqrt(d)
        return torch.softmax(SOFTCAP * torch.tanh(scores / SOFTCAP), dim=-1).to(value.dtype) @ value

    calls = {"kvattn": of(lambda *leaves: kvattn.attention(*leaves, **given))}
    if kind in ("plain", "causal"):
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            calls[backend.name.removesuffix("_ATTENTION").lower()] = of(on(backend, is_causal=kind == "causal"))
    elif kind == "softcap":
        calls["whole scores"] = of(naive)
    else:
        at = torch.arange(key.shape[-2], device=device)
        if kind == "window":
            ahead = at - at[:, None]
            mask = (ahead <= 0) & (ahead >= -options["window"][0])
        else:
            mask = at < given["valid_lens"][:, None, None, None]
        calls["sdpa, mask"] = of(lambda *leaves: sdpa(*leaves, attn_mask=mask))
        if kind == "valid 60%" and dtype != "float32":
            calls["varlen_attn"] = of(varlen(given["valid_lens"]))
    return rounded, options, calls


def varlen(lens):
    """FlashAttention over the valid keys in place: each head is a sequence, and the padding one without queries."""

    def forward(query, key, value):
        import torch
        from torch.nn.attention.varlen import varlen_attn

        (batch, heads, n, d), m = query.shape, key.shape[-2]
        start = torch.arange(batch * heads, device=lens.device)
        keys = torch.stack([start * m, start * m + lens.repeat_interleave(heads)], dim=1).flatten()
        rows = torch.stack([start * n, start * n + n], dim=1).flatten()
        ends = [torch.cat([x, x.new_tensor([batch * heads * r])]).int() for x, r in ((rows, n), (keys, m))]
        return varlen_attn(*(x.reshape(-1, 1, d) for x in (query, key, value)), *ends, n, m).reshape(query.shape)

    return forward


def torch_clock(device):
    import torch

    def clock(call):
        if device == "cpu":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return clock


def torch_machine(device):
    import torch

    name = "cpu" if device == "cpu" else torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return name, f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"


# ---- jax


def jax_calls(kind, dtype, d, grad, size, device):
    import jax
    import jax.numpy as jnp

    import kvattn

    arrays, options = problem(kind, d, size)
    ours = [jnp.asarray(x, dtype) for x in arrays]
    rounded = [lambda entry, head, x=x: np.asarray(x[entry, head].astype(jnp.float32)) for x in ours]
    theirs = [x.swapaxes(1, 2).copy() for x in ours]  # their own layout, (batch, n, heads, d)
    lens = jnp.asarray(options["valid_lens"], jnp.int32) if "valid_lens" in options else None
    given = options if lens is None else {"valid_lens": lens}

    def of(forward, arrays, place):
        def gradients(*arrays):
            return jax.vjp(forward, *arrays[:3])[1](arrays[3])

        program = jax.jit(gradients if grad else lambda *arrays: (forward(*arrays[:3]),))
        return lambda: jax.block_until_ready(program(*arrays)), lambda found: [
            lambda entry, head, x=x: x[place(entry, head)].astype(jnp.float32) for x in found
        ]

    def native(implementation):
        def forward(*arrays):
            with jax.default_matmul_precision("highest"):
                return jax.nn.dot_product_attention(
                    *arrays, is_causal="causal" in options, key_value_seq_lengths=lens, local_window_size=options.get("window"),
                    implementation=implementation,
                )  # fmt: skip

        return of(forward, theirs, lambda entry, head: (entry, slice(None), head))

    calls = {"kvattn": of(lambda *a: kvattn.attention(*a, **given), ours, lambda entry, head: (entry, head))}
    return rounded, options, calls | {"cudnn": native("cudnn"), "xla": native("xla")}


def jax_clock(device):
    def clock(call):
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    return clock


def jax_machine(device):
    import jax

    found = [x for x in jax.devices() if device == "cpu" or x.platform == "gpu"]
    return (found[0].device_kind if found else None), f"jax {jax.__version__}"


# ---- one framework's process, and the table


def work(framework, device, size, rounds, deadline):
    """Prints a JSON line for each row, the first one the machine."""
    parts = globals()
    name, versions = parts[f"{framework}_machine"](device)
    print(json.dumps({"framework": framework, "device": name, "versions": versions}), flush=True)
    if name is None:
        return
    clock, references = parts[f"{framework}_clock"](device), {}
    for kind, dtype, d, grad in rows(framework):
        row = {"framework": framework, "kind": kind, "dtype": dtype, "d": d, "grad": grad}
        if time.time() > deadline:
            print(json.dumps(row | {"late": True}), flush=True)
            continue
        rounded, options, calls = parts[f"{framework}_calls"](kind, dtype, d, grad, size, device)
        refused = {}
        for what, (call, _) in list(calls.items()):  # a kernel that does not serve the call says so; ours may not
            try:
                call()
            except Exception as error:
                if what == "kvattn":
                    raise
                refused[what] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                del calls[what]
        if (kind, dtype, d) not in references:
            batch, heads = SIZES[size][:2]
            last = (0 if kind == "window" else batch - 1, heads - 1)
            references[kind, dtype, d] = {at: expected([x(*at) for x in rounded], options, at[0]) for at in {(0, 0), last}}
        wrong = errors(calls, references[kind, dtype, d])
        figures = medians(calls, clock, rounds)
        row["calls"] = {what: {"ms": ms, "ratio": ratio, "error": wrong[what]} for what, (ms, ratio) in figures.items()}
        row["right"] = wrong["kvattn"] <= TOLERANCE[dtype]
        print(json.dumps(row | {"refused": refused}), flush=True)


def table(found):
    from rich.table import Table

    made = Table(title="milliseconds; of the others, how many times kvattn's", title_justify="left")
    for head in ("", "", "", "", "kvattn", "others", "largest error"):
        made.add_column(head)
    for row in (x for x in found if "calls" in x):
        ours, *others = row["calls"].items()
        told = [f"{name} {x['ratio']:.2f}{'' if x['error'] <= TOLERANCE[row['dtype']] else ' WRONG'}" for name, x in others]
        error = f"{ours[1]['error']:.1e}" + ("" if row["right"] else " WRONG")
        what = "forward + backward" if row["grad"] else "forward"
        made.add_row(
            row["framework"], f"{row['dtype']} d={row['d']}", row["kind"], what, f"{ours[1]['ms']:.3f}", ", ".join(told), error
        )
    return made


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frameworks", default="torch,jax", help="names, separated by commas")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="full", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--minutes", type=float, default=7, help="after these, rows are named but not measured")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        work(args.work, args.device, args.size, args.rounds, time.time() + 60 * args.minutes)
        return 0

    from rich.console import Console

    console, found, failed = Console(width=160), [], []
    frameworks = args.frameworks.split(",")
    shares = {"torch": 0.65, "jax": 0.35} if len(frameworks) > 1 else dict.fromkeys(frameworks, 1.0)
    for framework in frameworks:
        command = [sys.executable, __file__, "--work", framework, "--device", args.device, "--size", args.size]
        command += ["--rounds", str(args.rounds), "--minutes", str(args.minutes * shares[framework])]
        env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | (
            {"JAX_PLATFORMS": "cpu"} if args.device == "cpu" else {}
        )
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
            for line in process.stdout:
                if line.startswith("{"):
                    found.append(json.loads(line))
                    console.print(_progress(found[-1]), style="dim", highlight=False)
        failed += [framework] if process.returncode else []
    if not any(row.get("device") for row in found):
        console.print(f"no GPU here that {' or '.join(frameworks)} can use: nothing was measured")
        return 2
    console.print(table(found))
    for row in found:
        if row.get("late"):
            console.print(f"not measured, for want of time: {_progress(row)}")
        for what, why in row.get("refused", {}).items():
            console.print(f"{what} does not serve {_progress(row)}: {why}", highlight=False)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)
    for framework in failed:
        console.print(f"{framework} failed: its own words are above")
    return 1 if failed or not all(row.get("right", True) for row in found) else 0


def _progress(row):
    if "versions" in row:
        return f"{row['framework']}: {row['device'] or 'no GPU'}, {row['versions']}"
    return f"{row['framework']} {row['kind']} {row['dtype']} d={row['d']}{' + backward' if row['grad'] else ''}"


if __name__ == "__main__":
    sys.exit(main())
