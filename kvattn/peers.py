"""The calls that ``kvattn bench`` times: kvattn's, and what its users would write without it, in each of the frameworks.

Each function yields (name, call) pairs, kvattn's first. A call returns when its work is done, and copies nothing to show it:
the output, or with ``grad`` the gradient by the query, which is computed with those by key and value.
A framework that has no such option is given the mask that means the same, made beforehand; where that is a mask and a bias in
one, which a user who has the two makes in each call, PyTorch is timed both ways.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from kvattn import weights
from kvattn.timing import Call

Named = Iterator[tuple[str, Call]]
LARGE = 2**28  # scores, whose plain formula would hold gigabytes


class Problem(NamedTuple):
    """What is computed, in float32 and to be cast to ``dtype``.

    ``arrays``: query, key and value (batch, heads, n or m, d), and the output's gradient if there is ``grad``. Of a layer: its
    input (batch, n, heads * d), and the gradient; then ``matrices`` are its W_q, W_k, W_v, W_o, and ``heads`` how many.
    """

    arrays: list[np.ndarray]
    options: dict[str, Any]
    dtype: str = "float32"
    grad: bool = False
    device: str = "cpu"
    matrices: tuple[np.ndarray, ...] = ()
    heads: int = 1

    @property
    def sizes(self) -> tuple[int, int]:
        """Of queries and keys."""
        return self.arrays[0].shape[-2], self.arrays[0 if self.matrices else 1].shape[-2]

    @property
    def scores(self) -> int:
        """How many there are, of all heads."""
        queries, keys = self.sizes
        heads = self.heads if self.matrices else int(self.arrays[0].shape[1])
        return len(self.arrays[0]) * heads * queries * keys

    def cast(self, make: Callable[..., Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arrays and the options as ``make(array, dtype)`` makes them; lengths and masks keep their own dtype."""
        options = {
            name: make(x, self.dtype if x.dtype.kind == "f" else x.dtype.name) if isinstance(x, np.ndarray) else x
            for name, x in self.options.items()
        }
        return [make(x, self.dtype) for x in self.arrays], options

    def allowed(self) -> np.ndarray | None:
        """The pairs that may attend, broadcastable to (batch, heads, n, m); None for all."""
        n, m = self.sizes
        keys, found = np.arange(m), []
        if "causal" in self.options:
            found.append(np.tri(n, m, dtype=bool))
        if "window" in self.options:
            found.append(abs(keys - np.arange(n)[:, None]) <= self.options["window"])
        if "valid_lens" in self.options:
            lens = self.options["valid_lens"]
            found.append(keys < (lens[:, None, None, None] if lens.ndim == 1 else lens[:, None, :, None]))
        if "mask" in self.options:
            found.append(self.options["mask"])
        return None if not found else np.logical_and.reduce(np.broadcast_arrays(*found)) if len(found) > 1 else found[0]

    def added(self) -> np.ndarray | None:
        """The bias, -inf where a pair may not attend; for a framework that takes no mask beside it."""
        bias, allowed = self.options.get("bias"), self.allowed()
        return bias if bias is None or allowed is None else np.where(allowed, bias, np.float32(-np.inf))


def split(x: Any, heads: int) -> Any:
    """(batch, n, heads * d) to (batch, heads, n, d), of NumPy's or MXNet's arrays."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).swapaxes(1, 2)


def join(x: Any) -> Any:
    """(batch, heads, n, d) to (batch, n, heads * d)."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def first(x: Any) -> Any:
    return x[0] if isinstance(x, (tuple, list)) else x


def ours(backend: str, options: dict[str, Any], grad: bool) -> Callable[..., Any]:
    """kvattn's call of query, key, value, and the gradient of the output."""
    import kvattn

    made: Any = kvattn.attention_grad if grad else kvattn.attention
    return lambda *given: made(*given, **options, backend=backend)


def weighted(layer: Any, problem: Problem) -> Any:
    """A layer, kvattn's or the framework's own, with the problem's weights; a module of JAX gives its variables."""
    return weights.import_weights(layer, dict(zip(("W_q", "W_k", "W_v", "W_o"), problem.matrices, strict=True)))


# ---- NumPy


def softmax(scores: Any, axis: int = -1) -> Any:
    e = np.exp(scores - scores.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def naive(*given: Any, allowed: Any = None, bias: Any = None, softmax: Callable[..., Any] = softmax) -> Any:
    """Attention in three lines of NumPy; given the gradient of the output, the gradients by query, key and value."""
    query, key, value, *upstream = given
    weights = naive_weights(query, key, allowed, bias, softmax)
    return naive_gradients(query, key, value, weights, *upstream) if upstream else weights @ value


def naive_weights(query: Any, key: Any, allowed: Any = None, bias: Any = None, softmax: Callable[..., Any] = softmax) -> Any:
    scores = query @ key.swapaxes(-1, -2) * query.dtype.type(1 / math.sqrt(query.shape[-1]))
    scores = scores if bias is None else scores + bias
    scores = scores if allowed is None else np.where(allowed, scores, query.dtype.type(-np.inf))
    return softmax(scores, axis=-1)


def naive_gradients(query: Any, key: Any, value: Any, weights: Any, upstream: Any) -> tuple[Any, Any, Any]:
    """The gradients by query, key and value; ``back``: the gradient of the output."""
    slope = upstream @ value.swapaxes(-1, -2)
    slope = weights * (slope - (weights * slope).sum(axis=-1, keepdims=True)) * query.dtype.type(1 / math.sqrt(query.shape[-1]))
    return slope @ key, slope.swapaxes(-1, -2) @ query, weights.swapaxes(-1, -2) @ upstream


def naive_layer(x: Any, *upstream: Any, matrices: Any, heads: int, allowed: Any) -> Any:
    """Multi-head self-attention in NumPy: the output; given its gradient, those by the input and by each matrix, and it."""
    W_q, W_k, W_v, W_o = matrices
    query, key, value = (split(x @ W, heads) for W in (W_q, W_k, W_v))
    weights = naive_weights(query, key, allowed)
    joined = join(weights @ value)
    output = joined @ W_o
    if not upstream:
        return output
    flat = x.reshape(-1, x.shape[-1])
    by = [join(each) for each in naive_gradients(query, key, value, weights, split(upstream[0] @ W_o.T, heads))]
    grads = [flat.T @ each.reshape(flat.shape) for each in by]
    grads.append(joined.reshape(flat.shape).T @ upstream[0].reshape(flat.shape))
    return sum(each @ W.T for each, W in zip(by, (W_q, W_k, W_v), strict=True)), *grads, output


def _numpy(problem: Problem) -> Named:
    given, options = problem.cast(lambda x, dtype: x.astype(dtype))
    call = ours("numpy", options, problem.grad)
    yield "kvattn numpy", lambda: first(call(*given))
    if problem.scores > LARGE:
        return
    keywords: dict[str, Any] = {"allowed": problem.allowed(), "bias": options.get("bias")}
    yield "NumPy, naive", lambda: first(naive(*given, **keywords))
    if find_spec("scipy") and not problem.grad:
        special = import_module("scipy.special")
        yield "scipy softmax", lambda: naive(*given, **keywords, softmax=special.softmax)


def _numpy_layer(problem: Problem) -> Named:
    from kvattn import numpy as kv

    (x, *upstream), options = problem.cast(lambda x, dtype: x.astype(dtype))
    made = weighted(kv.MultiHeadAttention(x.shape[-1], problem.heads), problem)

    def call() -> Any:
        output = made(x, x, x, training=problem.grad, **options)
        return sum(made.backward(upstream[0])) if upstream else output

    yield "kvattn numpy", call
    if problem.scores > LARGE:
        return
    matrices, allowed = [W.astype(problem.dtype) for W in problem.matrices], problem.allowed()
    yield "NumPy, naive", lambda: first(naive_layer(x, *upstream, matrices=matrices, heads=problem.heads, allowed=allowed))


# ---- PyTorch


def finished(x: Any) -> Any:
    """A tensor whose work is done: on the CPU its NumPy view, on a GPU itself, as nothing is copied while it is timed."""
    x = x.detach()
    if x.is_cuda:
        import torch

        torch.cuda.synchronize(x.device)
        return x
    return (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()


def tensors(device: str) -> Callable[[np.ndarray, str], Any]:
    import torch

    return lambda x, dtype: torch.tensor(x, dtype=getattr(torch, dtype), device=device)


def sdpa(problem: Problem, each_call: bool = False) -> Call:
    """PyTorch's own kernel, called as its users call it; a mask and a bias are added before, or in each_call."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    make = tensors(problem.device)
    (*leaves, upstream) = problem.cast(make)[0] if problem.grad else [*problem.cast(make)[0], None]
    keywords: dict[str, Any] = {"is_causal": True} if [*problem.options] == ["causal"] else {}
    if not keywords:
        added, allowed = problem.added(), problem.allowed()
        mask = allowed if added is None else added
        keywords = {"attn_mask": None if mask is None else make(mask, "bool" if added is None else problem.dtype)}
    leaves = [x.requires_grad_(problem.grad) for x in leaves]
    given = problem.cast(make)[1]

    def call() -> Any:
        if each_call:
            keywords["attn_mask"] = given["bias"].masked_fill(~given["mask"], -math.inf)
        output = scaled_dot_product_attention(*leaves, **keywords)
        return finished(torch.autograd.grad(output, leaves, upstream)[0] if problem.grad else output)

    return call


def _torch(problem: Problem) -> Named:
    given, options = problem.cast(tensors(problem.device))
    call = ours("torch", options, problem.grad)
    yield "kvattn torch", lambda: finished(first(call(*given)))
    if options:
        yield f"torch SDPA, {'causal' if 'causal' in options else 'masked'}", sdpa(problem)
    if {*options} == {"mask", "bias"}:
        yield "torch SDPA, masked in each call", sdpa(problem, each_call=True)


def _torch_trained(layer: Any, problem: Problem, x: Any, upstream: Any, **keywords: Any) -> Call:
    """A layer of self-attention, in training if there are gradients: by its input, computed with those by its weights."""
    import torch

    layer.train(problem.grad)
    leaves = [x.requires_grad_(problem.grad), *layer.parameters()]

    def call() -> Any:
        with torch.set_grad_enabled(problem.grad):
            output = first(layer(x, x, x, **keywords))
        return finished(torch.autograd.grad(output, leaves, upstream)[0] if problem.grad else output)

    return call


def mha(problem: Problem) -> Call:
    """nn.MultiheadAttention, which takes padding as a mask."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    make = tensors(problem.device)
    x, upstream = [*problem.cast(make)[0], None][:2]
    made = weighted(torch.nn.MultiheadAttention(x.shape[-1], problem.heads, bias=False, batch_first=True), problem)
    keywords: dict[str, Any] = {"need_weights": False}
    allowed = problem.allowed()
    if allowed is not None and "causal" in problem.options:
        keywords |= {"attn_mask": ~make(allowed, "bool"), "is_causal": True}
    elif allowed is not None:
        keywords |= {"key_padding_mask": ~make(allowed[:, 0, 0], "bool")}
    return _torch_trained(made.to(x.device, x.dtype), problem, x, upstream, **keywords)


def _torch_layer(problem: Problem) -> Named:
    from kvattn import torch as kv

    arrays, options = problem.cast(tensors(problem.device))
    x, upstream = [*arrays, None][:2]
    made = weighted(kv.MultiHeadAttention(x.shape[-1], problem.heads), problem)
    yield "kvattn torch", _torch_trained(made.to(x.device, x.dtype), problem, x, upstream, **options)
    if options:
        yield "nn.MultiheadAttention", mha(problem)


# ---- JAX


def _jax(problem: Problem) -> Named:
    import jax
    import jax.numpy as jnp

    given, options = problem.cast(jnp.asarray)
    call = jax.jit(ours("jax", options, problem.grad))
    yield "kvattn jax", lambda: jax.block_until_ready(first(call(*given)))
    moved = [x.swapaxes(1, 2) for x in given]  # its own layout: (batch, n, heads, d)
    keywords = {
        "is_causal": "causal" in options, "local_window_size": options.get("window"), "bias": options.get("bias"),
        "mask": options.get("mask"), "key_value_seq_lengths": options.get("valid_lens"),
    }  # fmt: skip
    if "valid_lens" in options and options["valid_lens"].ndim == 2:  # it knows lengths of keys, not of each query's
        keywords |= {"mask": jnp.asarray(problem.allowed()), "key_value_seq_lengths": None}

    def forward(*qkv: Any) -> Any:
        return jax.nn.dot_product_attention(*qkv, **keywords)

    native = jax.jit((lambda q, k, v, g: jax.vjp(forward, q, k, v)[1](g)) if problem.grad else forward)
    yield "jax.nn", lambda: jax.block_until_ready(first(native(*moved))).swapaxes(1, 2)


def _jax_layer(problem: Problem) -> Named:
    import jax
    import jax.numpy as jnp
    from flax import linen

    from kvattn import jax as kv

    (x, *upstream), options = problem.cast(jnp.asarray)
    heads, width = problem.heads, x.shape[-1]
    allowed = problem.allowed()
    mask = None if allowed is None else jnp.asarray(allowed)

    def timed(forward: Callable[[Any, Any], Any], params: Any) -> Call:
        params = jax.tree.map(lambda W: jnp.asarray(W, problem.dtype), params)
        program = jax.jit(forward)
        if problem.grad:
            program = jax.jit(lambda params, x: jax.vjp(forward, params, x)[1](upstream[0])[::-1])
        return lambda: first(jax.block_until_ready(program(params, x)))

    made = kv.MultiHeadAttention(width, heads)
    params = weighted(made, problem)
    yield "kvattn jax", timed(lambda params, x: made.apply(params, x, x, x, training=problem.grad, **options)[0], params)
    theirs = linen.MultiHeadDotProductAttention(heads, qkv_features=width, use_bias=False, dtype=x.dtype, param_dtype=x.dtype)
    params = weighted(theirs.init(jax.random.key(0), x[:1, :1]), problem)
    yield "flax", timed(lambda params, x: theirs.apply(params, x, mask=mask, deterministic=not problem.grad), params)


# ---- TensorFlow


def _tensorflow(problem: Problem) -> Named:
    import keras
    import tensorflow as tf

    given, options = problem.cast(tf.constant)
    call = tf.function(ours("tensorflow", options, problem.grad), autograph=False)
    yield "kvattn tensorflow", lambda: np.asarray(first(call(*given)))
    moved = [tf.transpose(x, [0, 2, 1, 3]) for x in given]
    causal = [*options] == ["causal"]
    allowed = None if causal else problem.allowed()
    keywords: dict[str, Any] = {"is_causal": True} if causal else {"bias": options.get("bias")}
    if allowed is not None:
        keywords["mask"] = tf.constant(allowed.reshape((1,) * (4 - allowed.ndim) + allowed.shape))

    def forward(*qkv: Any) -> Any:
        return keras.ops.dot_product_attention(*qkv, **keywords)

    def gradients(*given: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(given[:3])
            output = forward(*given[:3])
        return tape.gradient(output, given[:3], given[3])

    native = tf.function(gradients if problem.grad else forward, autograph=False)
    yield "keras.ops", lambda: np.asarray(first(native(*moved))).swapaxes(1, 2)


def _tensorflow_layer(problem: Problem) -> Named:
    import keras
    import tensorflow as tf

    from kvattn import tensorflow as kv

    (x, *upstream), options = problem.cast(tf.constant)
    heads, width, allowed = problem.heads, x.shape[-1], problem.allowed()

    def timed(made: Any, **keywords: Any) -> Call:
        def gradients(x: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                output = made(x, x, x, training=True, **keywords)
            return tape.gradient(output, [x, *made.trainable_variables], upstream[0])

        program = tf.function(
            gradients if problem.grad else lambda x: made(x, x, x, training=False, **keywords), autograph=False
        )
        return lambda: np.asarray(first(program(x)))

    made = kv.MultiHeadAttention(num_hiddens=width, num_heads=heads, dtype=problem.dtype)
    yield "kvattn tensorflow", timed(weighted(made, problem), **options)
    theirs = keras.layers.MultiHeadAttention(heads, width // heads, use_bias=False, dtype=problem.dtype)
    theirs.build(x.shape, x.shape)
    weighted(theirs, problem)
    keywords: dict[str, Any] = {"use_causal_mask": True} if "causal" in options else {}
    if not keywords and allowed is not None:
        keywords = {"attention_mask": tf.constant(allowed[:, 0])}
    yield "keras.layers", timed(theirs, **keywords)


# ---- MXNet


def waited(x: Any) -> Any:
    x.wait_to_read()
    return x


def _mxnet(problem: Problem) -> Named:
    tab: Any = import_module("kvattn.backends.mxnet")

    given, options = problem.cast(tab.asarray)
    call = ours("mxnet", options, problem.grad)
    yield "kvattn mxnet", lambda: waited(first(call(*given)))
    if problem.scores > LARGE:
        return
    yield "MXNet, as d2l", mxnet_trained(lesson(problem, options), given[:3], given[3:])


def lesson(problem: Problem, options: dict[str, Any]) -> Callable[..., Any]:
    """Attention as d2l's layer computes it, which knows lengths; a mask is added as large numbers, for MXNet's own `where`
    has no gradient where one side is a number."""
    tab: Any = import_module("kvattn.backends.mxnet")

    npx, lens, added, allowed = tab.mx.npx, options.get("valid_lens"), options.get("bias"), problem.allowed()
    heads, n = (problem.heads if problem.matrices else problem.arrays[0].shape[1]), problem.sizes[0]
    if lens is not None:  # one for each row of scores
        lens = tab.np.repeat(lens, heads * n) if lens.ndim == 1 else tab.np.repeat(lens, heads, axis=0).reshape(-1)
    elif allowed is not None:
        added = tab.asarray(np.where(allowed, problem.options.get("bias", 0.0), -1e6), problem.dtype)

    def attend(query: Any, key: Any, value: Any) -> Any:
        shape = query.shape
        query, key, value = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
        scores = npx.batch_dot(query, key, transpose_b=True) / math.sqrt(query.shape[-1])
        if added is not None:
            scores = (scores.reshape(-1, heads, *scores.shape[1:]) + added).reshape(scores.shape)
        if lens is not None:
            rows = npx.sequence_mask(scores.reshape(-1, scores.shape[-1]), lens, True, value=-1e6, axis=1)
            scores = rows.reshape(scores.shape)
        return npx.batch_dot(npx.softmax(scores), value).reshape(shape)

    return attend


def mxnet_trained(forward: Callable[..., Any], leaves: list[Any], upstream: list[Any]) -> Call:
    """A call, or given the gradient of its output, one that is recorded and differentiated by all leaves."""
    tab: Any = import_module("kvattn.backends.mxnet")

    for x in leaves if upstream else ():
        x.attach_grad()

    def call() -> Any:
        if not upstream:
            return waited(forward(*leaves))
        with tab.mx.autograd.record():
            output = forward(*leaves)
        output.backward(upstream[0])
        for x in leaves:
            waited(x.grad)
        return leaves[0].grad

    return call


def _mxnet_layer(problem: Problem) -> Named:
    from kvattn import mxnet as kv

    tab: Any = import_module("kvattn.backends.mxnet")

    (x, *upstream), options = problem.cast(tab.asarray)
    tab.mx.npx.set_np()
    made = weighted(kv.MultiHeadAttention(x.shape[-1], problem.heads), problem)
    if problem.dtype != "float32":
        made.cast(problem.dtype)
    yield "kvattn mxnet", mxnet_trained(lambda x: made(x, x, x, **options), [x], upstream)
    if problem.scores > LARGE:
        return
    npx, attend, width = tab.mx.npx, lesson(problem, options), x.shape[-1]
    matrices = [tab.asarray(W.T.copy(), problem.dtype) for W in problem.matrices]

    def by_hand(x: Any, *matrices: Any) -> Any:
        def dense(x: Any, W: Any) -> Any:
            return npx.fully_connected(x, W, no_bias=True, num_hidden=width, flatten=False)

        *three, W_o = matrices
        return dense(join(attend(*(split(dense(x, W), problem.heads) for W in three))), W_o)

    yield "MXNet, as d2l", mxnet_trained(by_hand, [x.copy(), *matrices], upstream)


ATTENTION = {"numpy": _numpy, "torch": _torch, "jax": _jax, "tensorflow": _tensorflow, "mxnet": _mxnet}
LAYERS = {
    "numpy": _numpy_layer, "torch": _torch_layer, "jax": _jax_layer, "tensorflow": _tensorflow_layer, "mxnet": _mxnet_layer,
}  # fmt: skip
