"""Where the microseconds of a tiny eager call go: the frontend over the tab, the tab over the framework's own attention.

    python benchmarks/overhead.py --backend numpy,torch

Each backend runs in a fresh process. The calls take turns, so that what else runs slows them alike; a turn is one call that
is not timed, for what ran before has the processor's caches, and a few that are. A figure is the median, and the smallest, of
many turns. One call of (1, 1, 8, 8), float32.
"""

import argparse
import math
import os
import statistics

KINDS = {"plain": {}, "causal": {"causal": True}, "scale": {"scale": 0.5}, "valid_lens": {"valid_lens": [6]}}
TARGETS = {"numpy": 4, "torch": 4, "jax": 4, "tensorflow": 12, "mxnet": 12}
IMPORT = 20  # milliseconds over NumPy's
TURN = 5  # calls


def natives(backend, q, k, v):
    """The framework's own attention, plain and causal, where it has one (TensorFlow's is Keras's); else the formula."""
    scale = 1 / math.sqrt(q.shape[-1])
    if backend == "torch":
        from torch.nn.functional import scaled_dot_product_attention as sdpa

        return {"plain": lambda: sdpa(q, k, v), "causal": lambda: sdpa(q, k, v, is_causal=True)}
    if backend == "jax":
        import jax

        both = {
            causal: jax.jit(lambda q, k, v, c=causal: jax.nn.dot_product_attention(q, k, v, is_causal=c)) for causal in (0, 1)
        }
        return {"plain": lambda: both[0](q, k, v), "causal": lambda: both[1](q, k, v)}
    if backend == "tensorflow":
        import keras
        import tensorflow as tf

        q, k, v = (tf.transpose(x, (0, 2, 1, 3)) for x in (q, k, v))
        own = keras.ops.dot_product_attention
        return {"plain": lambda: own(q, k, v), "causal": lambda: own(q, k, v, is_causal=True)}
    if backend == "mxnet":
        from mxnet import npx

        return {"plain": lambda: npx.batch_dot(npx.softmax(npx.batch_dot(q[0], k[0], transpose_b=True) * scale), v[0])}
    import numpy as np

    def formula():
        scores = q @ k.swapaxes(-1, -2) * np.float32(scale)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True) @ v

    return {"plain": formula}


def measure(backend, rounds):
    """{what: (median, smallest)} in microseconds, in this process."""
    import numpy as np

    import kvattn
    from kvattn import dispatch, prepare, timing

    tab = dispatch.load(backend)
    q, k, v = (tab.asarray(np.random.default_rng(i).standard_normal((1, 1, 8, 8)).astype("float32")) for i in range(3))
    calls = {"nothing": lambda: None}
    for kind, options in KINDS.items():
        options = {name: tab.asarray(x) if isinstance(x, list) else x for name, x in options.items()}
        calls[f"api {kind}"] = lambda options=options: kvattn.attention(q, k, v, **options)
        calls[f"tab {kind}"] = lambda options=options: tab.attention(q, k, v, **options)
    calls |= {f"native {kind}": call for kind, call in natives(backend, q, k, v).items()}
    named = {"query": q, "key": k, "value": v}
    calls["who serves NumPy's"] = dispatch.get_backend
    calls["checked before?"] = lambda: prepare.remembered(q, k, v, None)
    calls["dispatch"] = lambda: dispatch.choose(None, **named)
    calls["checks"] = lambda: prepare.inputs(tab, q, k, v, None)
    calls["options"] = lambda: prepare.options(tab, q, (1, 1, 8, 8), (8, 8))
    for call in [*calls.values()] * 3:
        call()
    took = timing.rounds(calls, rounds, timing.queued(TURN, before=1))
    nothing = min(took.pop("nothing"))
    return {what: [1e6 * (f(x) - nothing) for f in (statistics.median, min)] for what, x in took.items()}


def importing(module):
    """Milliseconds of a fresh process that imports a module after NumPy: the median of seven; the first may compile it."""
    from kvattn import timing

    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each would compile all that it imports
    code = f"import numpy, json, time; t = time.perf_counter(); import {module}; t = time.perf_counter() - t; "
    runs = [row for _ in range(7) for row in timing.in_a_process(["-c", code + "print(json.dumps({'took': t}))"])]
    return 1e3 * statistics.median(run["took"] for run in runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", help="names, separated by commas; default all that are installed")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()

    from kvattn import timing

    if args.one:
        timing.print_row(measure(args.one, args.rounds))
        return

    from rich import box
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    import kvattn

    names, found = args.backend.split(",") if args.backend else kvattn.available_backends(), {}
    for name in track(names, "measuring"):
        rounds = args.rounds if TARGETS.get(name) == 4 else args.rounds // 4
        *_, found[name] = timing.in_a_process([__file__, "--one", name, "--rounds", str(rounds)])
        if "failed" in found[name]:
            raise SystemExit(f"{name} failed:\n{found[name]['words']}")
    console = Console(width=160)
    console.print(overhead(found, Table(box=box.MARKDOWN)))
    console.print(shares(found, Table(box=box.MARKDOWN)))
    took = importing("kvattn")
    console.print(f"import kvattn, after NumPy: {took:.1f} ms (at most {IMPORT})")
    if args.json:
        timing.write(args.json, timing.machine(), calls=found, **{"import": took})


def overhead(found, table):
    """A row for every backend and kind of call: microseconds, medians (smallest)."""
    for head in ("backend", "call", "native", "tab", "api", "tab - native", "api - tab", "at most"):
        table.add_column(head, justify="right")
    for name, took in found.items():
        for kind in KINDS:
            native, tab, api = (took.get(f"{what} {kind}") for what in ("native", "tab", "api"))
            cells = [_cell(x) for x in (native, tab, api)] + [_cell(_less(tab, native)), _cell(_less(api, tab))]
            table.add_row(name, kind, *cells, str(TARGETS.get(name, "")) if kind in ("plain", "causal") else "")
    return table


def shares(found, table):
    """Where the frontend's microseconds go: a call like one before pays the first two, any other the rest as well."""
    parts = ("who serves NumPy's", "checked before?", "dispatch", "checks", "options")
    for head in ("backend", *parts):
        table.add_column(head, justify="right")
    for name, took in found.items():
        table.add_row(name, *(_cell(took[part]) for part in parts))
    return table


def _less(a, b):
    return None if a is None or b is None else [x - y for x, y in zip(a, b, strict=True)]


def _cell(figures):
    return "" if figures is None else f"{figures[0]:.1f} ({figures[1]:.1f})"


if __name__ == "__main__":
    main()
