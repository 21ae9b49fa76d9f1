"""Attention with dropout of a seed, beside the same attention with the framework's own dropout, written by hand.

    python benchmarks/dropout.py --backend numpy,torch

Each backend runs in a fresh process; the calls take turns. Queries, keys and values of (4, 8, 512, 64), float32, a rate of 0.1.
A figure is the time of kvattn.attention(..., dropout=0.1, rng=7) over that of the formula softmax(q k^T / sqrt(d)), the
framework's dropout of it, times v, and of kvattn's own call that draws from the framework; the median of the rounds. With
gradients it is forward and backward by query, key and value; by hand NumPy has none.
"""

import math

SHAPE, RATE, SEED = (4, 8, 512, 64), 0.1, 7


def numpy(q, k, v):
    """{what: a function that computes it by hand}, and what kvattn may draw from."""
    import numpy as np

    draw = np.random.default_rng(0)

    def formula():
        scores = q @ k.swapaxes(-1, -2) / np.float32(math.sqrt(SHAPE[-1]))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        kept = draw.random(weights.shape, dtype="float32") >= RATE
        return np.where(kept, weights / np.float32(1 - RATE), np.float32(0)) @ v

    return {"forward": formula}, lambda: draw, lambda x: x


def torch(q, k, v):
    import torch

    draw = torch.Generator().manual_seed(0)

    def attend(q, k, v):
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(SHAPE[-1]), -1)
        return torch.nn.functional.dropout(weights, RATE) @ v

    def gradients():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*leaves), leaves, v)

    return {"forward": lambda: attend(q, k, v), "gradients": gradients}, lambda: draw, lambda x: x


def tensorflow(q, k, v):
    import tensorflow as tf

    def attend(q, k, v):
        weights = tf.nn.softmax(tf.matmul(q, k, transpose_b=True) / math.sqrt(SHAPE[-1]))
        return tf.nn.dropout(weights, RATE) @ v

    def gradients():
        with tf.GradientTape() as tape:
            tape.watch((q, k, v))
            output = attend(q, k, v)
        return tape.gradient(output, (q, k, v), v)

    return {"forward": lambda: attend(q, k, v), "gradients": gradients}, lambda: None, lambda x: tf.nest.flatten(x)[0].numpy()


def jax(q, k, v):
    import jax

    @jax.jit
    def attend(q, k, v, key):
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / math.sqrt(SHAPE[-1]))
        kept = jax.random.bernoulli(key, 1 - RATE, weights.shape)
        return jax.numpy.where(kept, weights / (1 - RATE), 0) @ v

    @jax.jit
    def gradients(q, k, v, key):
        return jax.vjp(lambda *x: attend(*x, key), q, k, v)[1](v)

    key = jax.random.key(0)
    calls = {"forward": lambda: attend(q, k, v, key), "gradients": lambda: gradients(q, k, v, key)}
    return calls, lambda: key, jax.block_until_ready


def mxnet(q, k, v):
    from kvattn.backends.mxnet import mx

    mx.npx.set_np()

    def attend(q, k, v):
        weights = mx.npx.softmax(mx.npx.batch_dot(q, k, transpose_b=True) / math.sqrt(SHAPE[-1]))
        return mx.npx.batch_dot(mx.npx.dropout(weights, RATE, mode="always"), v)

    def forward():
        output = attend(*(x.reshape(-1, *SHAPE[-2:]) for x in (q, k, v)))
        output.wait_to_read()

    def gradients():
        leaves = [x.reshape(-1, *SHAPE[-2:]) for x in (q, k, v)]
        for x in leaves:
            x.attach_grad()
        with mx.autograd.record():
            output = attend(*leaves)
        output.backward(leaves[2])
        for x in leaves:
            x.grad.wait_to_read()

    def ready(x):
        for each in x if isinstance(x, tuple) else [x]:
            each.wait_to_read()

    return {"forward": forward, "gradients": gradients}, lambda: None, lambda x: x if x is None else ready(x)


def measure(backend, rounds):
    """[{what, beside, ratio, spread, ms}], in this process."""
    import numpy as np

    import kvattn
    from kvattn import timing

    inputs = (np.random.default_rng(i).normal(size=SHAPE) for i in range(3))
    q, k, v = (kvattn.asarray(x, dtype="float32", backend=backend) for x in inputs)
    by_hand, draw, ready = globals()[backend](q, k, v)

    def ours(what, rng):
        if what == "forward":
            return lambda: ready(kvattn.attention(q, k, v, dropout=RATE, rng=rng()))
        return lambda: ready(kvattn.attention_grad(q, k, v, v, dropout=RATE, rng=rng()))

    calls = {}
    for what in ("forward", "gradients"):
        calls[what, "seed"] = ours(what, lambda: SEED)
        calls[what, "kvattn, the framework's numbers"] = ours(what, draw)
        if what in by_hand:
            calls[what, "by hand"] = lambda run=by_hand[what]: ready(run())
    took = timing.rounds(calls, rounds)
    return [
        {"what": what, "beside": beside, **timing.ratio(took[what, "seed"], times), "ms": 1e3 * min(took[what, "seed"])}
        for (what, beside), times in took.items()
        if beside != "seed"
    ]


if __name__ == "__main__":
    import each_backend

    each_backend.main(measure, "{backend:<11} {what:<10} {ratio:5.2f} of {beside}, {ms:7.1f} ms", rounds=7)
