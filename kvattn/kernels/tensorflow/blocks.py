"""Attention in blocks of queries, one after another, where the scores of all, and the features of which a score is made, would
fill the memory. Gradients compute each block again."""

from __future__ import annotations

from functools import partial

import tensorflow as tf

from kvattn import bands

PAIRS = 2**24  # numbers that are held at one time: scores, and their features


class Alone(partial):
    """A function of one's own that reads nothing whose gradients are asked for but its arguments and tf.Variables."""


def plan(score, query, key, *others, held=1):
    """Blocks of queries, as bands.plan's; [] where one block is all, or sizes are unknown. ``held``: numbers of each."""
    if any(None in x.shape for x in (query, key, *others) if x is not None):
        return []
    return bands.rows(score, tuple(query.shape), tuple(key.shape), PAIRS // held)


def attention(tab, steps, query, key, value, *, score, normalize, mask, bias, valid_lens, query_offset, dropout, rng,
              return_weights, return_lse, attend=None, **options):  # fmt: skip
    """What attention of ``tab``, or ``attend``, returns for all queries, made of what it returns for each block.

    What a score or normaliser of one's own reads beside its arguments, TensorFlow does not tell: unless it is Alone, tapes keep
    every block of it.
    """
    n, m, size = query.shape[-2], key.shape[-2], steps[0][1]
    count = n // size  # whole blocks; what is left is a smaller one
    rng = tf.random.uniform((), maxval=2**31 - 1, dtype=tf.int32) if dropout and rng is None else rng
    seed, first = rng if isinstance(rng, tuple) else (rng, 0)
    keywords = dict(getattr(score, "keywords", {}))
    bound = {name: tf.convert_to_tensor(x) for name, x in keywords.items() if tab.is_array(x)}
    fixed = {"key": key, "value": value, "mask": mask, "bias": bias, "valid_lens": valid_lens, **bound}
    each = {"query": (query, -2)}
    if valid_lens is not None and len(valid_lens.shape) == (1 if len(query.shape) < 3 else 2):
        each["valid_lens"] = (valid_lens, -1)
    for name in ("mask", "bias"):
        if fixed[name] is not None and len(fixed[name].shape) > 1 and fixed[name].shape[-2] == n:
            each[name] = (fixed[name], -2)

    serve = attend or tab.attention

    def attend(i, names, *tensors):
        here = {**fixed, **dict(zip(names, tensors, strict=True))}
        mine = {name: here.pop(name) for name in bound}
        rebound = partial(score.func, *score.args, **{**keywords, **mine}) if bound else score
        draws = None if rng is None else (seed, first * len(steps) + i)  # one seed would drop the same pairs in every block
        at = tf.cast(query_offset, tf.int64) + size * tf.cast(i, tf.int64)
        back = {"return_weights": return_weights, "return_lse": return_lse}
        arrays = [here.pop(name) for name in ("query", "key", "value")]
        results = serve(
            *arrays, score=rebound, normalize=normalize, query_offset=at, dropout=dropout, rng=draws, **here, **back, **options
        )
        return results if isinstance(results, tuple) else (results,)

    again = _known(tab, score) and _known(tab, normalize)

    def block(i, rows):
        here = {**fixed, **rows}
        names = [name for name, x in here.items() if x is not None and x.dtype.is_floating]
        run = partial(attend, i, [*names, *(name for name in rows if name not in names)])
        tensors = [here[name] for name in run.args[1]]
        return _again(run, len(names))(*tensors) if again else run(*tensors)

    lead = bands.lead(tuple(query.shape), tuple(key.shape))
    lse = tf.TensorSpec([*lead, size], tab._wide(query[..., :0]).dtype)
    like = [tf.TensorSpec([*lead, size, value.shape[-1]], query.dtype)]
    like += [tf.TensorSpec([*lead, size, m], query.dtype)] * return_weights + [lse] * return_lse
    stacked = {name: _stacked(x, len(x.shape) + axis, count, size) for name, (x, axis) in each.items()}
    parts = tf.map_fn(
        lambda given: block(*given), (tf.range(count), stacked), fn_output_signature=tuple(like), parallel_iterations=1
    )
    axes = [-2] * (1 + return_weights) + [-1] * return_lse
    results = [_side_by_side(x, len(x.shape) + axis) for x, axis in zip(parts, axes, strict=True)]
    if count < len(steps):
        rest = {name: x[..., count * size :, :] if axis == -2 else x[..., count * size :] for name, (x, axis) in each.items()}
        results = [tf.concat(x, axis=axis) for *x, axis in zip(results, block(count, rest), axes, strict=True)]
    return tuple(results) if len(results) > 1 else results[0]


def alone(tab, **functions):
    """Functions of one's own as Alone, kvattn's as they are; in a graph, whose loops may fail on what they read, all are."""
    known = not tf.executing_eagerly()
    return {name: function if known or _known(tab, function) else Alone(function) for name, function in functions.items()}


def _known(tab, function):
    inner = getattr(function, "func", function)
    return isinstance(function, Alone) or getattr(tab, getattr(inner, "__name__", ""), None) is inner


def _again(run, count):
    """``run``, that keeps nothing for its gradients, which are by its first ``count`` tensors, but its arguments."""

    @tf.custom_gradient
    def call(*tensors):
        def grad(*upstream, variables=None):
            apart = [tf.identity(x) for x in tensors]  # one tensor may be query and key
            sources = [*apart[:count], *(variables or [])]
            with tf.GradientTape() as tape:
                tape.watch(apart[:count])
                results = run(*apart)
            grads = tape.gradient(results, sources, upstream)
            if all(x is None for x in grads):  # tapes record nothing while a forward derivative is taken
                grads = _in_a_graph(run, apart, count, variables or [], upstream)
            grads = [tf.zeros_like(x) if grad is None else grad for x, grad in zip(sources, grads, strict=True)]
            by_tensors = [*grads[:count], *[None] * (len(tensors) - count)]
            return by_tensors if variables is None else (by_tensors, grads[count:])

        return run(*map(tf.stop_gradient, tensors)), grad  # unknown to any tape, which would keep what run computes

    return call


def _in_a_graph(run, tensors, count, variables, upstream):
    def gradients(*given):
        apart = [tf.identity(x) for x in given[: len(tensors)]]
        by = [*apart[:count], *variables]
        return tf.gradients(run(*apart), by, given[len(tensors) :], unconnected_gradients="zero")

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
