"""The cost curve of sparse attention: time and memory of `positions` and `window` as n grows, s and w fixed.

    python benchmarks/sparse.py --backend numpy,torch --plot curve.png

Each point runs in a fresh process (one head, d = 32, float32): the best of five calls after a warm-up, and the peak of
resident memory over what the arrays and the framework took before the first call. Linear cost has the exponent 1.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time

SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
S = W = 32


def measure(backend, kind, n, gradients):
    """(seconds, MiB) of one point, in this process."""
    import numpy as np

    import kvattn

    tab = kvattn.dispatch.load(backend)
    rng = np.random.default_rng(0)
    q, k, v = (tab.asarray(rng.standard_normal((1, 1, n, 32)).astype(np.float32)) for _ in range(3))
    options = {"window": (W, W)} if kind == "window" else {"positions": tab.asarray(rng.integers(0, n, (n, S)))}
    small = [tab.asarray(np.zeros((1, 1, 8, 32), np.float32))] * 3

    def run(*arrays, **options):
        results = kvattn.attention_grad(*arrays, arrays[0], **options) if gradients else [kvattn.attention(*arrays, **options)]
        for x in results:
            kvattn.to_numpy(x)  # waits for it

    run(*small)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        run(q, k, v, **options)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="numpy", help="names, separated by commas")
    parser.add_argument("--gradients", action="store_true", help="of query, key and value, instead of the output")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--plot", help="write the curves to this file")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        backend, kind, n = args.point
        print(json.dumps(measure(backend, kind, int(n), args.gradients)))
        return

    from rich import box
    from rich.progress import track
    from rich.table import Table

    points = [(b, kind, n) for b in args.backend.split(",") for kind in ("positions", "window") for n in SIZES]
    found = {}
    for point in track(points, "measuring"):
        flags = ["--gradients"] if args.gradients else []
        command = [sys.executable, __file__, *flags, "--point", *map(str, point)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[point] = json.loads(done.stdout.splitlines()[-1])
    show(found, Table(box=box.MARKDOWN))
    if args.json:
        with open(args.json, "w") as file:
            json.dump([[*point, *figures] for point, figures in found.items()], file, indent=1)
    if args.plot:
        plot(found, args.plot)


def show(found, table):
    from rich.console import Console

    for head in ("backend", "kind", *(f"n = {n}, ms" for n in SIZES), "exponent", f"MiB at {SIZES[0]}", f"at {SIZES[-1]}"):
        table.add_column(head, justify="right")
    for backend, kind in dict.fromkeys((b, kind) for b, kind, _ in found):
        seconds, memory = zip(*(found[backend, kind, n] for n in SIZES), strict=True)
        slope = statistics.linear_regression([math.log(n) for n in SIZES], [math.log(x) for x in seconds]).slope
        milliseconds = (f"{1e3 * x:.1f}" for x in seconds)
        table.add_row(backend, kind, *milliseconds, f"{slope:.2f}", f"{memory[0]:.0f}", f"{memory[-1]:.0f}")
    Console(width=200).print(table)


def plot(found, path):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for backend, kind in dict.fromkeys((b, kind) for b, kind, _ in found):
        rows = [found[backend, kind, n] for n in SIZES]
        for axis, values in zip(axes, zip(*rows, strict=True), strict=True):
            axis.loglog(SIZES, values, "o-" if kind == "window" else "s--", label=f"{backend}, {kind}", base=2)
    axes[0].set(xlabel="n", ylabel="seconds", title="time")
    axes[1].set(xlabel="n", ylabel="MiB", title="peak memory beyond the arrays")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
