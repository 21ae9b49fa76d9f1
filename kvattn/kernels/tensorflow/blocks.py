"""Attention in blocks of queries, one after another:

    attention(Q)[i : i + s] = attention(Q[i : i + s])

for where the scores of all, and the features of which a score is made, would fill the memory. Gradients compute each block
again.

Source: Rabe and Staats 2021, "Self-attention does not need O(n^2) memory".
"""

from __future__ import annotations

import math
from functools import partial

import tensorflow as tf

from kvattn import planning
from kvattn.kernels.tensorflow import dropout

MOST = 2**24  # numbers that a block holds at one time: scores, and their features


class SelfContained(partial):
    """A user's function that reads nothing whose gradients are asked for but its arguments and tf.Variables."""


def self_contained(tab, **functions):
    """Users' functions as SelfContained, kvattn's as they are; in a graph, whose loops may fail on what they read, all are."""
    if not tf.executing_eagerly():
        return functions
    return {name: function if is_kvattns(tab, function) else SelfContained(function) for name, function in functions.items()}


def is_kvattns(tab, function):
    """Whether a score or normaliser is one of ``tab``'s, be it with parameters."""
    inner = getattr(function, "func", function)
    return getattr(tab, getattr(inner, "__name__", ""), None) is inner


def plan(query, key, value, call, copies=1):
    """Blocks of queries; [] where one block is all, or sizes are unknown. ``copies``: of each number."""
    if any(None in x.shape for x in (query, key, value, call.mask, call.bias, call.valid_lens) if x is not None):
        return []
    there = 0 if call.bias is None else math.prod(call.bias.shape)  # a block may hold as many numbers as are there anyway
    return planning.memory_blocks(call.score, tuple(query.shape), tuple(key.shape), max(MOST, there) // copies)


def attention(tab, serve, query, key, value, call, plan):
    """What ``serve``, (query, key, value, call) -> results, returns for all queries, made of what it returns for each block.

    TensorFlow does not tell what a user's score or normaliser reads beside its arguments: unless it is SelfContained, tapes
    keep every block of it.
    """
    blocks = _Blocks(tab, serve, query, key, value, call, plan)
    results = blocks.one_by_one() if tf.executing_eagerly() else blocks.in_a_loop()
    return tuple(results) if len(results) > 1 else results[0]


class _Blocks:
    """A call in blocks: its arrays by name, and of those that are cut into blocks the axis of queries."""

    def __init__(self, tab, serve, query, key, value, call, plan):
        self.tab, self.serve, self.call, self.plan, self.size = tab, serve, call, plan, plan[0][1]
        draws = call.dropout and call.rng is None
        self.rng = (tf.random.uniform((), maxval=2**31 - 1, dtype=tf.int32), 0) if draws else call.rng
        keywords = getattr(call.score, "keywords", {})
        self.parameters = {name: f"the score's {name}" for name, x in keywords.items() if tab.is_array(x)}
        self.arrays = {"query": query, "key": key, "value": value}
        self.arrays |= {"mask": call.mask, "bias": call.bias, "valid_lens": call.valid_lens}
        self.arrays |= {label: tf.convert_to_tensor(keywords[name]) for name, label in self.parameters.items()}
        self.axes = {"query": -2}
        if call.lengths_per_query(len(query.shape)):
            self.axes["valid_lens"] = -1
        for name, x in (("mask", call.mask), ("bias", call.bias)):
            if x is not None and len(x.shape) > 1 and x.shape[-2] == query.shape[-2]:
                self.axes[name] = -2
        self.result_axes = [-2] * (1 + call.return_weights) + [-1] * call.return_lse
        self.recomputes = all(isinstance(x, SelfContained) or is_kvattns(tab, x) for x in (call.score, call.normalize))

    def one_by_one(self):
        """The results, computed now."""
        sizes = [end - start for start, end, *_ in self.plan]
        # `tf.split`, since of one head for all such parts are no copies
        parts = {name: tf.split(self.arrays[name], sizes, axis=axis) for name, axis in self.axes.items()}
        served = [self._block(i, {name: x[i] for name, x in parts.items()}) for i in range(len(self.plan))]
        return self._joined(served)

    def in_a_loop(self):
        """The results, of a graph that holds a block's operations once: whole blocks in a loop, what is left after it."""
        call, size, (query, key, value) = self.call, self.size, (self.arrays[name] for name in ("query", "key", "value"))
        count = query.shape[-2] // size
        lead = planning.lead(tuple(query.shape), tuple(key.shape))
        like = [tf.TensorSpec([*lead, size, value.shape[-1]], query.dtype)]
        like += [tf.TensorSpec([*lead, size, key.shape[-2]], query.dtype)] * call.return_weights
        like += [tf.TensorSpec([*lead, size], self.tab._wide(query[..., :0]).dtype)] * call.return_lse
        cut = {name: (self.arrays[name], axis) for name, axis in self.axes.items()}
        stacked = {name: _stacked(x, len(x.shape) + axis, count, size) for name, (x, axis) in cut.items()}
        served = tf.map_fn(
            lambda given: self._block(*given),
            (tf.range(count), stacked),
            fn_output_signature=tuple(like),
            parallel_iterations=1,
        )
        results = [_side_by_side(x, len(x.shape) + axis) for x, axis in zip(served, self.result_axes, strict=True)]
        if count == len(self.plan):
            return results
        rest = {name: x[(..., slice(count * size, None), *[slice(None)] * (-1 - axis))] for name, (x, axis) in cut.items()}
        return self._joined([results, self._block(count, rest)])

    def _joined(self, served):
        return [tf.concat(x, axis=axis) for *x, axis in zip(*served, self.result_axes, strict=True)]

    def _block(self, i, parts):
        """The results of block i, of these parts of the arrays that are cut."""
        here = {**self.arrays, **parts}
        names = [name for name, x in here.items() if x is not None]  # all: a loop's gradient may not reach past its arguments
        names.sort(key=lambda name: not here[name].dtype.is_floating)
        count = sum(here[name].dtype.is_floating for name in names)  # the first ones have gradients
        run, tensors = partial(self._serve, i, names), [here[name] for name in names]
        return _recomputed(run, count)(*tensors) if self.recomputes else run(*tensors)

    def _serve(self, i, names, *tensors):
        here, call = {**self.arrays, **dict(zip(names, tensors, strict=True))}, self.call
        score, step = call.score, self.size * tf.cast(i, tf.int64)
        if self.parameters:
            given = {name: here[label] for name, label in self.parameters.items()}
            score = partial(score.func, *score.args, **score.keywords | given)
        block_call = call._replace(
            score=score, mask=here["mask"], bias=here["bias"], valid_lens=here["valid_lens"],
            query_offset=tf.cast(call.query_offset, tf.int64) + step, rng=dropout.of_block(self.rng, i, len(self.plan)),
            first_query=tf.cast(call.first_query, tf.int64) + step,
        )  # fmt: skip
        results = self.serve(here["query"], here["key"], here["value"], block_call)
        return results if isinstance(results, tuple) else (results,)


def _recomputed(run, count):
    """``run``, that keeps nothing but its arguments for its gradients, which are by its first ``count`` tensors."""

    @tf.custom_gradient
    def call(*tensors):
        def grad(*upstream, variables=None):
            copies = [tf.identity(x) for x in tensors]  # one tensor may be query and key
            sources = [*copies[:count], *(variables or [])]
            with tf.GradientTape() as tape:
                tape.watch(copies[:count])
                results = run(*copies)
            grads = tape.gradient(results, sources, upstream)
            if all(x is None for x in grads):  # tapes record nothing while a forward derivative is taken
                grads = _gradients_in_a_graph(run, copies, count, variables or [], upstream)
            grads = [tf.zeros_like(x) if grad is None else grad for x, grad in zip(sources, grads, strict=True)]
            by_tensors = [*grads[:count], *[None] * (len(tensors) - count)]
            return by_tensors if variables is None else (by_tensors, grads[count:])

        return run(*map(tf.stop_gradient, tensors)), grad  # unknown to any tape, which would keep what run computes

    return call


def _gradients_in_a_graph(run, tensors, count, variables, upstream):
    def gradients(*given):
        copies = [tf.identity(x) for x in given[: len(tensors)]]
        sources = [*copies[:count], *variables]
        return tf.gradients(run(*copies), sources, given[len(tensors) :], unconnected_gradients="zero")

    return tf.function(gradients, autograph=False)(*tensors, *upstream)


def _stacked(x, axis, count, size):
    """The whole blocks of an array along an axis, as a new first axis."""
    x = x[(*[slice(None)] * axis, slice(0, count * size))]
    x = tf.reshape(x, [*x.shape[:axis], count, size, *x.shape[axis + 1 :]])
    return tf.transpose(x, [axis, *(i for i in range(len(x.shape)) if i != axis)])


def _side_by_side(x, axis):
    """The inverse of _stacked; ``axis`` of x, along which a block lies."""
    order = [*range(1, axis), 0, *range(axis, len(x.shape))]
    return tf.reshape(tf.transpose(x, order), [*x.shape[1:axis], x.shape[0] * x.shape[axis], *x.shape[axis + 1 :]])
