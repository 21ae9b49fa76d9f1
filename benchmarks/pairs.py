"""Segments, and masks and biases that are functions of positions, beside the calls whose cost they should have.

    python benchmarks/pairs.py --backend numpy,torch

Each backend runs in a fresh process; the calls take turns. A figure is the time of one call over another's, the median of the
rounds, in float32, of 64 features: eight documents of 1,024 in a row of 8,192 over the whole call; a function that says causal,
or a window of 256 keys, over ``causal=`` and ``window=``; ALiBi by a function over the plain call, and over its array (n, m)
for each head; sinks, one logit a head, over the plain call, and with gradients; a small call that names return_scores and
does not ask for them, over one that does not.
"""

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
    inputs, sink = arrays(8, sizes["lengths"][0]), tab.asarray(rng.normal(size=8), dtype="float32")

    def gradients(**options):
        return lambda: [ready(x) for x in kvattn.attention_grad(*inputs, inputs[0], **options)]

    found["sinks", "the plain call"] = call(inputs, sink=sink), call(inputs)
    found["sinks, gradients", "the plain call's"] = gradients(sink=sink), gradients()
    few = [tab.asarray(rng.normal(size=(2, 4, 10, 8)), dtype="float32") for _ in range(3)]
    found["return_scores=None, few numbers", "the same call"] = call(few, return_scores=None), call(few)
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


def measure(backend, rounds, small):
    """[{what, beside, ratio, spread, ms}], in this process."""
    import kvattn
    from kvattn import timing

    rows = []
    for (what, beside), (ours, theirs) in calls_of(kvattn, backend, SMALL if small else SIZES).items():
        took = timing.rounds({"ours": ours, "theirs": theirs}, rounds)
        ms = 1e3 * min(took["ours"])
        rows.append({"what": what, "beside": beside, **timing.ratio(took["ours"], took["theirs"]), "ms": ms})
    return rows


if __name__ == "__main__":
    import each_backend

    each_backend.main(measure, "{backend:<11} {what:<31} {ratio:5.2f} of {beside:<15} {ms:8.2f} ms", rounds=5, small=True)
