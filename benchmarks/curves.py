"""The cost curves of attention: time and memory as the number of queries and keys grows. For Linux.

    python benchmarks/curves.py --backend numpy,torch --kind full,window --plot curves.png

Each point runs in a fresh process, float32: the best of a few calls, and by how much the process grows beyond the inputs,
the results and what the framework took for its first call. Linear growth has the exponent 1.
"""

import argparse
import math
import statistics
import sys

SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
S = W = 32  # keys that a query selects; keys to each side of it
LONGEST = {"additive": 8192, "gated": 8192, "own": 8192}  # these are slow
SHAPES = {"full": (8, 64), "causal": (8, 64)}  # heads, features; else one head of 32
KINDS = ("positions", "window", "full", "causal", "additive", "gated", "own")
SECONDS = 10  # for the calls of one point after the first


def options_of(kind, n, tab, rng):
    """The arguments that make a call of that kind."""
    from functools import partial

    import numpy as np

    import kvattn

    def draw(*shape):
        return tab.asarray(rng.standard_normal(shape, dtype=np.float32))

    def own(query, key):
        return 0.5 * kvattn.dot_score(query, key)

    def grad(query, key, grad_scores):  # NumPy asks for it
        return 0.5 * grad_scores @ key, 0.5 * grad_scores.swapaxes(-1, -2) @ query

    own.grad = grad

    return {
        "full": lambda: {},
        "causal": lambda: {"causal": True},
        "window": lambda: {"window": (W, W)},
        "positions": lambda: {"positions": tab.asarray(rng.integers(0, n, (n, S)))},
        "additive": lambda: {"score": partial(kvattn.additive_score, W_q=draw(32, 32), W_k=draw(32, 32), w_v=draw(32))},
        "gated": lambda: {"score": partial(kvattn.gated_score, w_g=draw(64))},
        "own": lambda: {"score": own},
    }[kind]()


def peak():
    """MiB of resident memory, at most, since the peak was forgotten."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def measure(backend, kind, n, gradients):
    """Seconds, MiB beyond inputs and results, and MiB of inputs of one point, in this process."""
    import numpy as np

    import kvattn
    from kvattn import timing

    tab = kvattn.dispatch.load(backend)
    rng = np.random.default_rng(0)
    h, d = SHAPES.get(kind, (1, 32))
    inputs = [tab.asarray(rng.standard_normal((1, h, n, d), dtype=np.float32)) for _ in range(4 if gradients else 3)]
    small = [x[..., :8, :] for x in inputs]

    def run(*arrays, **options):
        results = kvattn.attention_grad(*arrays, **options) if gradients else [kvattn.attention(*arrays, **options)]
        for x in results:
            kvattn.to_numpy(x[..., :1, :1])  # waits for it: a copy of all would be counted
        return sum(4 * math.prod(x.shape) for x in results)

    run(*small, **options_of(kind, 8, tab, rng))
    options = options_of(kind, n, tab, rng)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak so far is forgotten
    before = peak()
    seconds, sizes = [], []
    while len(seconds) < 6 and sum(seconds[1:]) < SECONDS:
        seconds.append(timing.wall(lambda: sizes.append(run(*inputs, **options))))
    grown = max(0, peak() - before - sizes[-1] / 2**20)
    return {"seconds": min(seconds[1:]), "MiB": grown, "inputs MiB": len(inputs) * h * n * d * 4 / 2**20}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="numpy", help="names, separated by commas")
    parser.add_argument("--kind", default="positions,window", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of queries and keys")
    parser.add_argument("--gradients", action="store_true", help="of query, key and value, instead of the output")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--plot", help="write the curves to this file")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()

    from kvattn import timing

    if args.point:
        backend, kind, n = args.point
        timing.print_row(measure(backend, kind, int(n), args.gradients))
        return

    from rich.console import Console
    from rich.progress import track

    sizes = [int(n) for n in args.sizes.split(",")]
    points = [(b, kind, n) for b in args.backend.split(",") for kind in args.kind.split(",") for n in sizes]
    found = {}
    for point in track([p for p in points if p[2] <= LONGEST.get(p[1], math.inf)], "measuring"):
        *_, figures = timing.in_a_process([__file__, *["--gradients"] * args.gradients, "--point", *map(str, point)])
        if "failed" in figures:
            sys.exit(f"{' '.join(map(str, point))} failed:\n{figures['words']}")
        found[point] = tuple(figures.values())
    Console(width=max(120, Console().width)).print(table(found))
    if args.json:
        rows = [{"backend": b, "kind": kind, "n": n, "grad": args.gradients, "ms": 1e3 * s, "MiB": grown, "inputs MiB": size}
                for (b, kind, n), (s, grown, size) in found.items()]  # fmt: skip
        timing.write(args.json, timing.machine(), rows=rows)
    if args.plot:
        plot(found, args.plot)


def curves(found):
    """{(backend, kind): {n: (seconds, MiB, MiB of inputs)}}."""
    made = {}
    for (backend, kind, n), figures in found.items():
        made.setdefault((backend, kind), {})[n] = figures
    return made


def table(found):
    """A line for each backend and kind."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.MARKDOWN)
    sizes = list(dict.fromkeys(n for *_, n in found))
    for head in ("backend", "kind", *(f"n = {n}" for n in sizes), "time grows as n to the", "inputs"):
        made.add_column(head, justify="right")
    for (backend, kind), curve in curves(found).items():
        cells = [f"{1e3 * curve[n][0]:.3g} ms, {curve[n][1]:.3g} MiB" if n in curve else "" for n in sizes]
        slope = math.nan
        if len(curve) > 1:
            logs = [(math.log(n), math.log(seconds)) for n, (seconds, *_) in curve.items()]
            slope = statistics.linear_regression(*zip(*logs, strict=True)).slope
        made.add_row(backend, kind, *cells, f"{slope:.2f}", f"{max(curve.values())[2]:.3g} MiB")
    return made


def plot(found, path):
    """Time and memory, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    kinds = list(dict.fromkeys(kind for _, kind, _ in found))
    backends = list(dict.fromkeys(backend for backend, _, _ in found))
    for (backend, kind), curve in curves(found).items():
        style = {"marker": "os^Dvx*"[kinds.index(kind)], "color": f"C{backends.index(backend)}", "label": f"{backend}, {kind}"}
        for axis, at in zip(axes, (0, 1), strict=True):
            axis.loglog(list(curve), [max(figures[at], 0.1 if at else 0) for figures in curve.values()], base=2, **style)
    axes[0].set(xlabel="n", ylabel="seconds", title="time")
    axes[1].set(xlabel="n", ylabel="MiB", title="memory beyond inputs and results")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
