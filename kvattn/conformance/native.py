"""Our own layers, each in its framework: made, given its weights, called, and asked for its gradients."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from kvattn import registry
from kvattn.cache import KVCache

Made = tuple[Callable[..., Any], Callable[[list[Any], dict[str, Any], Any], tuple[Any, Any]]]


def run(backend: Any, name: str, config: dict[str, Any], weights: dict[str, np.ndarray], inputs: list[np.ndarray], *,
        dtype: str = "float32", grad_output: np.ndarray | None = None, steps: bool = False, like: Any = None,
        **options: Any) -> Any:  # fmt: skip
    """[the layer's results], [gradients of sum(grad_output * output) by floating-point inputs], {by the weight of a name}.

    Arrays and weights lie on the device of ``like``, an array.
    ``steps``: called with a cache, for two positions, then for one at a time, and the outputs are joined.
    A layer whose ``config`` has a ``dropout`` is called in training, where it drops.

    >>> ones = np.ones((1, 2, 1))
    >>> results, *_ = run("numpy", "AddNorm", {"norm_shape": 1}, {"gamma": np.ones(1), "beta": np.ones(1)}, [ones, ones])
    >>> results[0].tolist()
    [[[1.0], [1.0]]]
    """
    tab: Any = registry.load(backend) if isinstance(backend, str) else backend
    framework = tab.__name__.rpartition(".")[2]
    kv = importlib.import_module(f"kvattn.{framework}")

    def array(x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        return tab.asarray(x.copy(), dtype=dtype if x.dtype.kind == "f" else None, like=like)

    def converted() -> tuple[list[Any], dict[str, Any]]:
        return [array(x) for x in inputs], {key: array(x) for key, x in options.items()}

    with _framework_settings(framework):
        exact = {key: np.asarray(x, dtype) for key, x in weights.items()}
        call, gradients = globals()[f"_{framework}"](kv, name, config, exact, dtype)
        if framework == "torch" and like is not None:  # others make weights where they compute
            call.to(like.device)
        arrays, call_options = converted()
        if name.startswith("TransformerDecoder"):
            return [array(_decoded(tab, call, config.get("num_blks", 1), arrays, call_options, steps))], [], {}
        if steps:
            return [array(_stepped(tab, call, name, arrays, call_options))], [], {}
        results = _as_list(call(*arrays, **call_options))
        if grad_output is None:
            return results, [], {}
        by_inputs, by_weights = gradients(*converted(), array(grad_output))
    return results, [*by_inputs], {key: array(x) for key, x in by_weights.items()}


def _as_list(results: Any) -> list[Any]:
    return [*results] if isinstance(results, (tuple, list)) else [results]


def _stepped(tab: Any, call: Any, name: str, inputs: list[Any], options: dict[str, Any]) -> np.ndarray:
    kept: Any = [] if name == "TransformerEncoder" else KVCache()
    parts = []
    for start, end in _steps(inputs[0]):
        output, kept = call(*(x[:, start:end] for x in inputs), cache=kept, **options)
        parts.append(np.array(tab.to_numpy(output)))
    return np.concatenate(parts, axis=1)


def _steps(x: Any) -> list[tuple[int, int]]:
    return [(0, 2), *((i, i + 1) for i in range(2, int(x.shape[1])))]


def _decoded(tab: Any, call: Any, blocks: int, inputs: list[Any], options: dict[str, Any], steps: bool) -> np.ndarray:
    """The output of a decoder, or of its block, for X, the encoder's outputs and, perhaps, their lengths."""
    X, outputs, *lens = inputs
    state: Any = [outputs, lens[0] if lens else None, [None] * blocks]
    parts = []
    for start, end in _steps(X) if steps else [(0, int(X.shape[1]))]:
        output, state = call(X[:, start:end], state, **options)
        parts.append(np.array(tab.to_numpy(output)))
    return np.concatenate(parts, axis=1)


def _framework_settings(framework: str) -> Any:
    """For the call alone: 64 bits of JAX, and what npx.set_np() sets of MXNet."""
    both = contextlib.ExitStack()
    if framework == "jax":
        both.enter_context(importlib.import_module("kvattn.kernels.jax.programs").x64(True))
    elif framework == "mxnet":
        util = importlib.import_module("mxnet").util
        both.enter_context(util.np_shape(True))
        both.enter_context(util.np_array(True))
    return both


# (call, gradients) of a layer that is given these weights


def _numpy(kv: Any, name: str, config: dict[str, Any], weights: dict[str, Any], dtype: str) -> Made:
    layer = kv.import_weights(getattr(kv, name)(**config), weights)
    call = partial(layer, training="dropout" in config)

    def gradients(inputs: list[Any], options: dict[str, Any], grad_output: Any) -> tuple[Any, Any]:
        call(*inputs, record=True, **options)
        by_inputs = layer.backward(grad_output)
        return by_inputs if isinstance(by_inputs, tuple) else (by_inputs,), layer.grads

    return call, gradients


def _torch(kv: Any, name: str, config: dict[str, Any], weights: dict[str, Any], dtype: str) -> Made:
    import torch

    layer = kv.import_weights(getattr(kv, name)(**config), weights).to(getattr(torch, dtype)).train("dropout" in config)

    def gradients(inputs: list[Any], options: dict[str, Any], grad_output: Any) -> tuple[Any, Any]:
        leaves, parameters = [x.requires_grad_() for x in inputs if x.is_floating_point()], [*layer.parameters()]
        output = _as_list(layer(*inputs, **options))[0]
        grads = torch.autograd.grad(output, [*leaves, *parameters], grad_output, allow_unused=True, materialize_grads=True)
        for parameter, grad in zip(parameters, grads[len(leaves) :], strict=True):
            parameter.data = grad  # read as a weight is
        return grads[: len(leaves)], kv.export_weights(layer)

    return layer, gradients


def _tensorflow(kv: Any, name: str, config: dict[str, Any], weights: dict[str, Any], dtype: str) -> Made:
    import tensorflow as tf

    layer = kv.import_weights(getattr(kv, name)(**config, dtype=dtype), weights)
    call = partial(layer, training="dropout" in config)

    def gradients(inputs: list[Any], options: dict[str, Any], grad_output: Any) -> tuple[Any, Any]:
        leaves, parameters = [x for x in inputs if x.dtype.is_floating], layer.trainable_variables
        with tf.GradientTape() as tape:
            tape.watch(leaves)
            output = _as_list(call(*inputs, **options))[0]
        sources = [leaves, [x.value for x in parameters]]
        by_inputs, by_parameters = tape.gradient(output, sources, grad_output, unconnected_gradients="zero")
        for variable, grad in zip(parameters, by_parameters, strict=True):
            variable.assign(grad)  # read as a weight is
        return by_inputs, kv.export_weights(layer)

    return call, gradients


def _jax(kv: Any, name: str, config: dict[str, Any], weights: dict[str, Any], dtype: str) -> Made:
    import jax
    import jax.numpy as jnp

    layer = getattr(kv, name)(**config)
    variables = jax.tree.map(lambda x: x.astype(dtype), kv.import_weights(layer, weights))
    always = {} if name in ("PositionalEncoding", "AddNorm", "PositionWiseFFN") else {"return_weights": False}
    always |= {"training": True} if "dropout" in config else {}

    def call(*inputs: Any, **options: Any) -> Any:
        return layer.apply(variables, *inputs, **always | options)

    def gradients(inputs: list[Any], options: dict[str, Any], grad_output: Any) -> tuple[Any, Any]:
        floats = [i for i, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.floating)]

        def output(variables: Any, *leaves: Any) -> Any:
            arguments = dict(enumerate(inputs)) | dict(zip(floats, leaves, strict=True))
            return _as_list(layer.apply(variables, *arguments.values(), **always | options))[0]

        # eagerly a program would be compiled for each operation, and for its derivative
        pulled = jax.jit(lambda grad_output, *at: jax.vjp(output, *at)[1](grad_output))
        by_variables, *by_inputs = pulled(grad_output, variables, *(inputs[i] for i in floats))
        return by_inputs, kv.export_weights(by_variables)

    return call, gradients


def _mxnet(kv: Any, name: str, config: dict[str, Any], weights: dict[str, Any], dtype: str) -> Made:
    import mxnet as mx

    layer = getattr(kv, name)(**config)
    layer.initialize()
    layer = kv.import_weights(layer, weights)
    layer.cast(dtype)
    training = "dropout" in config

    def call(*inputs: Any, **options: Any) -> Any:
        with mx.autograd.train_mode() if training else mx.autograd.predict_mode():
            return layer(*inputs, **options)

    def gradients(inputs: list[Any], options: dict[str, Any], grad_output: Any) -> tuple[Any, Any]:
        leaves = [x for x in inputs if x.dtype.kind == "f"]
        for leaf in leaves:
            leaf.attach_grad()
        with mx.autograd.record(train_mode=training):
            output = _as_list(layer(*inputs, **options))[0]
        output.backward(grad_output, train_mode=training)
        for parameter in layer.collect_params().values():
            parameter.set_data(parameter.grad())  # read as a weight is
        return [x.grad for x in leaves], kv.export_weights(layer)

    return call, gradients
