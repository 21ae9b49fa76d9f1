"""Segments, and masks and biases that are functions of positions, beside the calls whose cost they should have.

    python benchmarks/pairs.py --backend numpy,torch

Each backend runs in a fresh process; the calls take turns. A figure is the time of one call over another's, the median of the
rounds, in float32, of 64 features: eight documents of 1,024 in a row of 8,192 over the whole call; a function that says causal,
or a window of 256 keys, over ``causal=`` and ``window=``; ALiBi by a function over the plain call, and over its array (n, m)
for each head.
"""

import argparse

SIZES = {"documents": 8, "document": 1024, "heads": 4, "window": 256, "lengths": (1024, 4096)}
SMALL = {"documents": 3, "document": 64, "heads": 2, "window": 16, "lengths": (300,)}  # that it runs, for a test


def calls_of(kvattn, backend, sizes):
    """{(what, beside what): (a call, the call beside it)}"""
    import numpy as np

    tab, rng = kvattn.dispatch.load(backend), np.random.default_rng(0)
    ready = {
        "tensorflow": lambda x: x.numpy(),
        "jax": lambda x: x.block_until_ready(),
        "mxnet": lambda x: x.wait_to_read(),
    }.get(backend, lambda x: x)

    def arrays(heads, n):
        return [tab.asarray(rng.normal(size=(1, heads, n, 64)), dtype="float32") for _ in range(3)]

    def call(inputs, **options):
        return lambda: ready(kvattn.attention(*inputs, **options))

    inputs = arrays(sizes["heads"], sizes["documents"] * sizes["document"])
    ids = tab.asarray(np.repeat(np.arange(sizes["documents"]), sizes["document"])[None].astype("int32"))
    found = {("segments", "the whole call"): (call(inputs, segments=ids), call(inputs))}
    left = sizes["window"] - 1
    slopes = tab.asarray(0.5 ** np.arange(1, 9)[:, None, None], dtype="float32")
    for n in sizes["lengths"]:
        inputs, places = arrays(8, n), np.arange(n)
        plain = call(inputs)
        found[f"a function: causal, {n}", "causal="] = (call(inputs, mask=lambda q, k: k <= q), call(inputs, causal=True))
        found[f"a function: window, {n}", "window="] = (
            call(inputs, mask=lambda q, k: (k <= q) * (q - k <= left)), call(inputs, window=(left, 0)),
        )  # fmt: skip
        alibi = call(inputs, bias=lambda q, k: -slopes * tab.asarray(abs(q - k), dtype="float32"))
        found[f"a function: ALiBi, {n}", "the plain call"] = alibi, plain
        bias = tab.asarray(-kvattn.to_numpy(slopes) * abs(places[:, None] - places), dtype="float32")
        found[f"a function: ALiBi, {n}", "its array"] = alibi, call(inputs, bias=bias)
    return found


def measure(backend, rounds, sizes):
    """[{what, beside, ratio, spread, ms}], in this process."""
    import kvattn
    from kvattn import timing

    rows = []
    for (what, beside), (ours, theirs) in calls_of(kvattn, backend, sizes).items():
        took = timing.rounds({"ours": ours, "theirs": theirs}, rounds)
        ms = 1e3 * min(took["ours"])
        rows.append({"what": what, "beside": beside, **timing.ratio(took["ours"], took["theirs"]), "ms": ms})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="numpy,torch,tensorflow,jax,mxnet", help="which ones (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each call (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="small arrays, to see that it runs")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    from kvattn import timing

    if asked.here:
        for row in measure(asked.backend, asked.rounds, SMALL if asked.small else SIZES):
            timing.tell(row | {"backend": asked.backend})
        return
    rows = []
    for backend in asked.backend.split(","):
        command = [__file__, "--here", "--backend", backend, "--rounds", str(asked.rounds), *["--small"] * asked.small]
        for row in timing.in_a_process(command):
            if "failed" in row:
                raise SystemExit(f"{backend}: {row['words']}")
            rows.append(row)
            print(f"{row['backend']:<11} {row['what']:<26} {row['ratio']:5.2f} of {row['beside']:<15} {row['ms']:8.2f} ms")
    if asked.json:
        timing.write(asked.json, timing.machine(), rows=rows)


if __name__ == "__main__":
    main()
