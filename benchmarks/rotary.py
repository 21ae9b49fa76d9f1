"""kvattn.rotary beside the formula that its users would write in one line, whose cosines and sines are there already.

    python benchmarks/rotary.py --backend numpy,torch

Each backend runs in a fresh process; the calls take turns. One query of (8, 8, 512, 64), float32, in both conventions: at once,
and where the framework compiles, as a program. A figure is kvattn's time over the formula's, the median of the rounds.
"""

SHAPE = (8, 8, 512, 64)


def frameworks(backend):
    """(its stack, its concatenate, what makes a program of a function or None, what waits for a result)."""
    if backend == "torch":
        import torch

        return torch.stack, torch.cat, torch.compile, lambda x: x
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.stack, tf.concat, tf.function, lambda x: x.numpy()
    if backend == "jax":
        import jax

        return jax.numpy.stack, jax.numpy.concatenate, jax.jit, lambda x: x.block_until_ready()
    if backend == "mxnet":
        from kvattn.backends.mxnet import mx, np

        mx.npx.set_np()
        return np.stack, np.concatenate, None, lambda x: x.wait_to_read()
    import numpy as np

    return np.stack, np.concatenate, None, lambda x: x


def measure(backend, rounds):
    """[{what, ratio, spread, ms}], in this process."""
    import numpy as np

    import kvattn
    from kvattn import timing

    stack, join, compiled, ready = frameworks(backend)
    half = SHAPE[-1] // 2
    angles = np.arange(SHAPE[-2])[:, None] * 10000.0 ** (-np.arange(half) / half)
    x = kvattn.asarray(np.random.default_rng(0).normal(size=SHAPE), dtype="float32", backend=backend)
    calls = {}
    for interleaved in (False, True):
        wide = [np.repeat(f(angles), 2, -1) if interleaved else np.tile(f(angles), 2) for f in (np.cos, np.sin)]
        cos, sin = (kvattn.asarray(table, dtype="float32", backend=backend) for table in wide)

        def formula(x, cos, sin, interleaved=interleaved):
            if interleaved:
                return x * cos + stack([-x[..., 1::2], x[..., ::2]], -1).reshape(SHAPE) * sin
            return x * cos + join([-x[..., half:], x[..., :half]], -1) * sin

        if backend == "tensorflow":
            import tensorflow as tf

            def formula(x, cos, sin, interleaved=interleaved):
                if interleaved:
                    return x * cos + tf.reshape(stack([-x[..., 1::2], x[..., ::2]], -1), SHAPE) * sin
                return x * cos + join([-x[..., half:], x[..., :half]], -1) * sin

        def ours(x, interleaved=interleaved):
            return kvattn.rotary(x, interleaved=interleaved)

        for kind, of in (("at once", lambda f: f), ("compiled", compiled)):
            if of is not None:
                name = f"{'interleaved' if interleaved else 'halves'}, {kind}"
                theirs, own = of(formula), of(ours)
                calls[name, "formula"] = lambda theirs=theirs, cos=cos, sin=sin: ready(theirs(x, cos, sin))
                calls[name, "kvattn"] = lambda own=own: ready(own(x))
    took = timing.rounds(calls, rounds)
    return [
        {"what": name, **timing.ratio(took[name, "kvattn"], took[name, "formula"]), "ms": 1e3 * min(took[name, "kvattn"])}
        for name, which in calls
        if which == "kvattn"
    ]


if __name__ == "__main__":
    import each_backend

    each_backend.main(measure, "{backend:<11} {what:<22} {ratio:5.2f} of the formula, {ms:7.2f} ms", rounds=7)
