"""How long attention takes, as a ratio to PyTorch's scaled_dot_product_attention in the same process, call by call in turn.

Each backend runs in a process of its own, since the frameworks' thread pools disturb each other, with PyTorch's kernel beside
it as the yardstick: every query over every key, whatever part of them the others are restricted to. A round times each of
the yardstick, kvattn and the framework's own attention; the ratio is taken within the round, and the table shows the
median of the rounds with the quartiles. What was timed is checked in the same run.

Each is timed as in a loop of its own: it is called over and over for WARM seconds, and then for TIMED by the clock. After
another's call the threads of that one would go on spinning for some milliseconds; after a pause the system may wake several
threads on one core, where they stay for tens of milliseconds, in which small calls take up to seven times as long.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import numpy as np

from kvattn import dispatch

SHAPES = {  # batch, heads, queries, keys, features
    "S": (8, 8, 128, 128, 64),
    "M": (2, 8, 512, 512, 64),
    "L": (1, 8, 2048, 2048, 64),
    "XL": (1, 2, 8192, 8192, 64),
    "D": (1, 8, 1, 8192, 64),
    "tiny": (1, 1, 8, 8, 8),
}
KINDS = ("full", "causal", "valid", "window")
WINDOW = 256  # keys to each side of a query
WARM = 0.1  # seconds of calls before those that are timed: until a framework's threads have found cores of their own
TIMED = 0.05  # seconds of calls that are timed
# of the largest |value|: is what was timed attention at all? How near it is, the conformance suite says
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
YARDSTICK = "torch SDPA"

Call = Callable[[], Any]


def run(backends: list[str], shapes: list[str], kinds: list[str], *, dtype: str = "float32", grad: bool = False,
        device: str = "cpu", rounds: int = 15, progress: Callable[[dict[str, Any]], None] = lambda row: None,
        ) -> list[dict[str, Any]]:  # fmt: skip
    """A row for every backend, shape, kind and peer: seconds, the ratio to the yardstick, its quartiles, and the error.

    A backend whose process fails gives one row with ``failed``: the last line that it wrote.
    """
    rows: list[dict[str, Any]] = []
    how = {"shapes": shapes, "kinds": kinds, "dtype": dtype, "grad": grad, "device": device, "rounds": rounds}
    for backend in backends:
        asked = {"backend": backend, **how}
        with subprocess.Popen(
            [sys.executable, "-m", "kvattn.bench", json.dumps(asked)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for line in process.stdout:
                if line.startswith("{"):
                    rows.append(json.loads(line))
                    progress(rows[-1])
            said = process.stderr.read().strip().splitlines()
        if process.returncode:
            rows.append({"backend": backend, "failed": said[-1] if said else f"exit status {process.returncode}"})
            progress(rows[-1])
    return rows


def lacking(backends: list[str], device: str) -> dict[str, str]:
    """What each backend that has no such device says; asked in processes of their own, since some take a GPU whole."""
    found = {}
    for backend in backends if device.strip().lower() != "cpu" else ():
        asked = json.dumps({"backend": backend, "device": device})
        done = subprocess.run([sys.executable, "-m", "kvattn.bench", asked], capture_output=True, text=True, check=False)
        if done.stdout.startswith("{"):
            found[backend] = json.loads(done.stdout)["failed"]
    return found


def count(backends: list[str], shapes: list[str], kinds: list[str]) -> int:
    """How many measurements a run makes: one for each backend, shape and kind."""
    return len(backends) * sum(_meaningful(shape, kind) for shape in shapes for kind in kinds)


def _meaningful(shape: str, kind: str) -> bool:
    """A causal mask needs as many queries as keys: else every framework aligns it in its own way."""
    return kind != "causal" or SHAPES[shape][2] == SHAPES[shape][3]


def machine() -> dict[str, Any]:
    """What the figures were measured on, and when."""
    versions = {}
    for package in ("numpy", "torch", "tensorflow", "tensorflow-cpu", "jax", "mxnet"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    here = {"python": platform.python_version(), "processor": _processor(), "cores": len(os.sched_getaffinity(0))}
    return {"date": time.strftime("%Y-%m-%d"), **here, **versions}


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def tables(rows: list[dict[str, Any]], width: int) -> list[Any]:
    """Rich tables of the ratios: as many shapes in each as ``width`` characters hold."""
    rows = [row for row in rows if "failed" not in row]
    shapes, many = list(dict.fromkeys(row["shape"] for row in rows)), max(1, (width - 31) // 12)
    parts = [shapes[i : i + many] for i in range(0, len(shapes), many)]
    return [_table([row for row in rows if row["shape"] in part]) for part in parts]


def _table(rows: list[dict[str, Any]]) -> Any:
    """A line for each that was timed, a column for each shape, a section for each kind."""
    from rich.table import Table

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    device = rows[0].get("device", "cpu")
    time = f"time / {YARDSTICK}" if any(row.get("ratio") is not None for row in rows) else "time"  # there may be no PyTorch
    made = Table("", "", title=f"on {device}: {time}, all to all: median, quartiles")
    for shape in shapes:
        made.add_column(shape, justify="right", no_wrap=True, min_width=9)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        for what in dict.fromkeys(row["what"] for row in rows if row["kind"] == kind):
            found = {row["shape"]: _cell(row) for row in rows if (row["kind"], row["what"]) == (kind, what)}
            made.add_row(kind, what, *(found.get(shape, "") for shape in shapes))
        made.add_section()
    return made


def _cell(row: dict[str, Any]) -> str:
    if not row["right"]:
        return f"WRONG by {row['error']:.1g}"
    if row["ratio"] is None:
        return f"{1e3 * row['seconds']:.3g} ms"
    low, high = row["spread"]
    return f"{_short(row['ratio'])}\n{_short(low)}-{_short(high)}"


def _short(ratio: float) -> str:
    """At most four characters up to 1000, and no digits that mean nothing."""
    return f"{ratio:.{2 if ratio < 9.995 else 1 if ratio < 99.95 else 0}f}"


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Bars of the ratios, a panel for each shape and kind, written to ``path``."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.get("ratio")]
    panels = list(dict.fromkeys(f"{row['shape']} {row['kind']}" for row in rows)) or ["nothing"]
    names = list(dict.fromkeys(row["what"] for row in rows))
    figure = Figure(figsize=(1.5 + 2.6 * len(panels), 1 + 0.32 * len(names)), layout="constrained")
    for panel, axes in zip(panels, np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), strict=True):
        of = {row["what"]: row for row in rows if f"{row['shape']} {row['kind']}" == panel}
        for at, name in enumerate(names):
            if name in of:
                low, high = of[name]["spread"]
                colour = "tab:blue" if name.startswith("kvattn") else "tab:gray"
                ratio = of[name]["ratio"]
                axes.barh(at, ratio, color=colour, xerr=[[max(ratio - low, 0)], [max(high - ratio, 0)]])
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=panel, yticks=range(len(names)), yticklabels=names, xlabel=f"time / {YARDSTICK}")
        axes.invert_yaxis() if panel == panels[0] else None
    figure.savefig(path)


# ---- in the backend's own process


def _work(asked: dict[str, Any]) -> None:
    tab = dispatch.load(asked["backend"])
    try:
        device = dispatch.device(tab, asked["device"])
    except ValueError as error:
        print(json.dumps({"backend": asked["backend"], "failed": str(error)}))
        return
    with dispatch.on(tab, device):
        for name in asked.get("shapes", ()):
            for kind in (kind for kind in asked["kinds"] if _meaningful(name, kind)):
                for row in _measure(asked["backend"], name, kind, asked["dtype"], asked["grad"], device, asked["rounds"]):
                    print(json.dumps(row | {"device": tab.devices()[device]}), flush=True)


def _yardstick(device: str) -> bool:
    """Whether there is a yardstick on this device: else there are times, and no ratios."""
    if not find_spec("torch"):
        return False
    try:
        return bool(dispatch.device(dispatch.load("torch"), device))
    except ValueError:
        return False


def _measure(backend: str, shape: str, kind: str, dtype: str, grad: bool, device: str, rounds: int) -> Iterator[dict[str, Any]]:
    b, h, n, m, d = SHAPES[shape]
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((b, h, length, d)).astype("float32") for length in (n, m, m, n)][: 4 if grad else 3]
    lens = np.full(b, max(1, int(0.6 * m)))
    options = {"causal": {"causal": True}, "valid": {"valid_lens": lens}, "window": {"window": WINDOW}}.get(kind, {})
    peers = PEERS[backend](arrays, options, dtype, grad, device)  # first: MXNet's import leaves PyTorch half its threads
    calls = ({YARDSTICK: _sdpa(arrays, {}, dtype, grad, device)} if _yardstick(device) else {}) | peers
    errors = {  # each is warm now, and checked
        what: _error(call(), arrays, {} if what == YARDSTICK else options, grad) for what, call in calls.items()
    }
    took: dict[str, list[float]] = {what: [] for what in calls}
    for _ in range(rounds):
        for what, call in calls.items():
            took[what].append(_timed(call))
    for what, times in took.items():
        if what == YARDSTICK and backend != "torch":
            continue
        row: dict[str, Any] = {"backend": backend, "what": what, "shape": shape, "kind": kind, "dtype": dtype, "grad": grad}
        ratios = np.array(times) / np.array(took[YARDSTICK]) if YARDSTICK in took else None
        row |= {"seconds": float(np.median(times)), "ratio": None if ratios is None else float(np.median(ratios))}
        row |= {"spread": None if ratios is None else [float(x) for x in np.quantile(ratios, [0.25, 0.75])]}
        yield row | {"error": errors[what], "right": bool(errors[what] <= TOLERANCE[dtype])}


def _timed(call: Call) -> float:
    """Seconds of a call that follows others of its own: the median of as many as TIMED seconds hold, at least one."""
    end = time.perf_counter() + WARM
    while time.perf_counter() < end:
        call()
    took: list[float] = []
    spent = 0.0  # a sum that is taken anew after each of many short calls would cost more than they do
    while not took or spent < TIMED:
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
        spent += took[-1]
    return statistics.median(took)


def _error(got: Any, arrays: list[np.ndarray], options: dict[str, Any], grad: bool) -> float:
    """The largest difference from float64 NumPy in up to eight rows of the first head, over the largest value."""
    got = got.float().cpu() if hasattr(got, "cpu") else got.asnumpy() if hasattr(got, "asnumpy") else got
    got = np.asarray(got, dtype=float)  # MXNet's arrays, and tensors on a GPU, have no __array__
    query, key, value = (x[0, 0].astype(float) for x in arrays[:3])
    rows = np.unique(np.linspace(0, len(query) - 1, 8).astype(int))
    scores = query[rows] @ key.T / math.sqrt(query.shape[-1])
    if "causal" in options:
        scores = np.where(np.arange(len(key)) <= rows[:, None], scores, -np.inf)
    if "valid_lens" in options:
        scores = np.where(np.arange(len(key)) < options["valid_lens"][0], scores, -np.inf)
    if "window" in options:
        scores = np.where(abs(np.arange(len(key)) - rows[:, None]) <= options["window"], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = weights @ value
    if grad:  # by the query
        back = arrays[3][0, 0].astype(float)[rows] @ value.T
        expected = weights * (back - (weights * back).sum(axis=-1, keepdims=True)) @ key / math.sqrt(query.shape[-1])
    return float(np.abs(got[0, 0][rows] - expected).max() / (np.abs(expected).max() or 1))


def _named(calls: Callable[..., Iterator[tuple[str, Call]]]) -> Callable[..., dict[str, Call]]:
    """{name: call} of what a function yields; each call returns when its work is done, and copies nothing to show it."""
    return lambda *args: dict(calls(*args))


def _sdpa(arrays: list[np.ndarray], options: dict[str, Any], dtype: str, grad: bool, device: str) -> Call:
    """PyTorch's own kernel, told as its users tell it what is allowed."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    query, key, value, *back = (torch.tensor(x, dtype=getattr(torch, dtype), device=device) for x in arrays)
    mask = _mask(options, query.shape[-2], key.shape[-2]) if {"valid_lens", "window"} & options.keys() else None
    mask = None if mask is None else torch.tensor(mask, device=device)
    leaves = [x.requires_grad_(grad) for x in (query, key, value)]

    def call() -> Any:
        output = sdpa(*leaves, attn_mask=mask, is_causal="causal" in options)
        output = torch.autograd.grad(output, leaves, back[0])[0] if grad else output
        return _settled(output)

    return call


def _mask(options: dict[str, Any], n: int, m: int) -> np.ndarray | None:
    """What a framework without such options is given for them: (n, m), or (batch, 1, 1, m)."""
    if "causal" in options:
        return np.tri(n, m, dtype=bool)
    if "valid_lens" in options:
        return np.arange(m) < options["valid_lens"][:, None, None, None]
    if "window" in options:
        return abs(np.arange(m) - np.arange(n)[:, None]) <= options["window"]
    return None


def _settled(x: Any) -> Any:
    """A tensor whose work is done: on the CPU its NumPy view, on a GPU itself, as nothing is copied while it is timed."""
    x = x.detach()
    if x.is_cuda:
        import torch

        torch.cuda.synchronize(x.device)
        return x
    return (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()


def _ours(backend: str, arrays: list[Any], options: dict[str, Any], grad: bool) -> Callable[..., Any]:
    import kvattn

    def forward(*given: Any) -> Any:
        if grad:
            return kvattn.attention_grad(*given, **options, backend=backend)
        return kvattn.attention(*given, **options, backend=backend)

    return forward


def _first(x: Any) -> Any:
    return x[0] if isinstance(x, (tuple, list)) else x


@_named
def _numpy(arrays, options, dtype, grad, device):
    given = [x.astype(dtype) for x in arrays]
    ours = _ours("numpy", given, options, grad)
    yield "kvattn numpy", lambda: _first(ours(*given))
    if grad or math.prod(given[0].shape[:-1]) * given[1].shape[-2] > 2**28:  # the plain formula would hold gigabytes
        return
    query, key, value = given
    mask = _mask(options, query.shape[-2], key.shape[-2])

    def naive(softmax: Callable[..., Any]) -> Any:
        scores = query @ key.swapaxes(-1, -2) * query.dtype.type(1 / math.sqrt(query.shape[-1]))
        scores = scores if mask is None else np.where(mask, scores, query.dtype.type(-np.inf))
        return softmax(scores, axis=-1) @ value

    def softmax(scores: Any, axis: int) -> Any:
        e = np.exp(scores - scores.max(axis=axis, keepdims=True))
        return e / e.sum(axis=axis, keepdims=True)

    yield "NumPy, naive", lambda: naive(softmax)
    if find_spec("scipy"):
        special = import_module("scipy.special")
        yield "scipy softmax", lambda: naive(special.softmax)


@_named
def _torch(arrays, options, dtype, grad, device):
    import torch

    given = [torch.tensor(x, dtype=getattr(torch, dtype), device=device) for x in arrays]
    tensors = {name: torch.tensor(x, device=device) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    ours = _ours("torch", given, tensors, grad)
    yield "kvattn torch", lambda: _settled(_first(ours(*given)))
    if options:
        yield f"{YARDSTICK}, {'causal' if 'causal' in options else 'masked'}", _sdpa(arrays, options, dtype, grad, device)


@_named
def _jax(arrays, options, dtype, grad, device):
    import jax
    import jax.numpy as jnp

    given = [jnp.asarray(x, dtype) for x in arrays]
    options = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    ours = jax.jit(_ours("jax", given, options, grad))
    yield "kvattn jax", lambda: jax.block_until_ready(_first(ours(*given)))
    moved = [x.swapaxes(1, 2) for x in given]  # its own layout: (batch, n, heads, d)
    lens = options.get("valid_lens")

    def forward(*qkv: Any) -> Any:
        window = options.get("window")
        return jax.nn.dot_product_attention(
            *qkv, is_causal="causal" in options, key_value_seq_lengths=lens, local_window_size=window
        )

    native = jax.jit((lambda q, k, v, g: jax.vjp(forward, q, k, v)[1](g)) if grad else forward)
    yield "jax.nn", lambda: jax.block_until_ready(_first(native(*moved))).swapaxes(1, 2)


@_named
def _tensorflow(arrays, options, dtype, grad, device):
    import keras
    import tensorflow as tf

    given = [tf.constant(x, dtype) for x in arrays]
    asked, options = options, {name: tf.constant(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    ours = tf.function(_ours("tensorflow", given, options, grad), autograph=False)
    yield "kvattn tensorflow", lambda: np.asarray(_first(ours(*given)))
    if grad:
        return
    moved = [tf.transpose(x, [0, 2, 1, 3]) for x in given]
    mask = None if "causal" in options else _mask(asked, arrays[0].shape[-2], arrays[1].shape[-2])
    mask = None if mask is None else tf.constant(mask.reshape(-1, 1, *mask.shape[-2:]))
    native = tf.function(
        lambda q, k, v: keras.ops.dot_product_attention(q, k, v, mask=mask, is_causal="causal" in options), autograph=False
    )
    yield "keras.ops", lambda: np.asarray(native(*moved)).swapaxes(1, 2)


@_named
def _mxnet(arrays, options, dtype, grad, device):
    from kvattn.backends import mxnet as tab

    npx = tab.mx.npx
    given = [tab.asarray(x, dtype) for x in arrays]
    options = {name: tab.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    ours = _ours("mxnet", given, options, grad)

    def waited(x: Any) -> Any:
        x.wait_to_read()
        return x

    yield "kvattn mxnet", lambda: waited(_first(ours(*given)))
    if grad or {"causal", "window"} & options.keys():
        return
    flat = [x.reshape(-1, *x.shape[2:]) for x in given]
    each = arrays[0].shape[1] * arrays[0].shape[2]
    lens = tab.np.repeat(options["valid_lens"], each) if "valid_lens" in options else None

    def lesson() -> Any:  # as d2l's layer computes it
        query, key, value = flat
        scores = npx.batch_dot(query, key, transpose_b=True) / math.sqrt(query.shape[-1])
        if lens is None:
            weights = npx.softmax(scores)
        else:
            rows = scores.reshape(-1, scores.shape[-1])
            masked = npx.sequence_mask(rows, lens, True, value=-1e6, axis=1)
            weights = npx.softmax(masked).reshape(scores.shape)
        return waited(npx.batch_dot(weights, value).reshape(given[0].shape))

    yield "MXNet, as d2l", lesson


PEERS = {"numpy": _numpy, "torch": _torch, "jax": _jax, "tensorflow": _tensorflow, "mxnet": _mxnet}

if __name__ == "__main__":
    _work(json.loads(sys.argv[1]))
