"""What the layers of kvattn/layers/tensorflow.py stand on: how options and masks pass through Keras, saving, and names."""

from __future__ import annotations

import math
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras.layers import Dense, Embedding, LayerNormalization

from kvattn import api, checks, layers
from kvattn.backends import tensorflow as tab

if keras.backend.backend() != "tensorflow":
    raise ImportError(f"kvattn's TensorFlow layers need Keras on TensorFlow, not {keras.backend.backend()}: see KERAS_BACKEND")

ARRAYS = ("mask", "bias", "segments", "positions", "query_offset", "sink", "rng")  # the options that may be tensors

registered = keras.saving.register_keras_serializable("kvattn")


class Layer(keras.layers.Layer):
    """What the layers share: how attention's options pass through Keras, how it saves a layer and copies it.

    VARIABLES: the (name, shape) of the variable that a layer makes itself, None for sizes that the first call decides.
    """

    VARIABLES = ()

    def __init__(self, given, **kwargs):
        super().__init__(**kwargs)
        self._given = {name: x for name, x in given.items() if name not in ("self", "kwargs", "__class__")}
        self._allow_non_tensor_positional_args = True  # lengths may be lists
        self.supports_masking = True  # the output has the mask of the first input

    def __call__(self, *args, arrays=None, cache=None, **options):
        # Keras has a meaning of its own for ``mask``, and refuses an argument in which tensors and other things mix.
        if isinstance(options.get("mask"), (list, tuple)):
            options["mask"] = np.asarray(options["mask"])
        if found := {name: options.pop(name) for name in ARRAYS if _of_arrays(options.get(name))} | (arrays or {}):
            options["arrays"] = found
        if cache is not None:
            options["cache"] = CacheBox(cache)
        return super().__call__(*args, **options)

    def get_config(self):
        return {**super().get_config(), **self._given}

    def get_build_config(self):
        if (config := super().get_build_config()) is not None:
            return config
        found = {name: slot.shape for name, slot in slots(self).items()}  # imported weights are there before the first call
        return None if any(None in shape for shape in found.values()) else {"weights": found}

    def build_from_config(self, config):
        if "weights" in config:
            assign(self, {name: np.zeros(shape, np.float32) for name, shape in config["weights"].items()})
        else:
            super().build_from_config(config)

    def __deepcopy__(self, memo):
        rebuild, saved = self.__reduce__()  # Keras copies what it saves, so not the last call
        memo[id(self)] = copied = rebuild(*saved)
        for (_, old), (_, new) in zip(parts(self), parts(copied), strict=True):
            if "_last" in vars(old):
                vars(new)["_last"] = old._last
        return copied

    def __dir__(self):
        return [name for name in super().__dir__() if name != "attention_weights"]  # saving reads every attribute


def _of_arrays(x):
    """Whether an option is an array, or, as segments may be, a pair of them."""
    return hasattr(x, "dtype") or (isinstance(x, tuple) and all(hasattr(y, "dtype") for y in x))


def tensors(arrays):
    """These options as tensors: of a variable, the value now."""
    return {name: tf.nest.map_structure(tf.convert_to_tensor, x) for name, x in (arrays or {}).items()}


class Decoding(Layer):
    """A layer that is called with X and a decoder's state, of which Keras sees the parts: call(X, enc_outputs, enc_valid_lens,
    ...), and with ``cache``, the list of the blocks', it returns (output, caches); a block returns its own.

    A functional model is made and run without: nothing can follow its calls.
    """

    def __call__(self, X, state, *args, **options):
        if hasattr(state, "shape"):  # Keras's own call, in a functional model that runs
            return super().__call__(X, state, *args, **options)
        whole = hasattr(self, "blks")
        outputs, lens, caches = layers.parts_of_state(state, len(self.blks) if whole else self.i + 1, whole)
        if any(isinstance(x, keras.KerasTensor) for x in (X, outputs)):
            output = super().__call__(X, outputs, lens, **options)
            kept = [layers.NOT_KEPT] * len(caches) if whole else layers.NOT_KEPT
        else:
            output, kept = super().__call__(X, outputs, lens, cache=caches, **options)
        return output, [outputs, lens, kept] if whole else layers.following(state, self.i, kept)


class CacheBox:
    """A cache, in which Keras is not to look for tensors."""

    def __init__(self, cache):
        self.cache = cache


@registered
class _First(keras.initializers.Initializer):
    """The first values of the weight that kvattn calls ``name``, drawn from ``seed``."""

    def __init__(self, seed, name):
        self.seed, self.name = seed, name

    def __call__(self, shape, dtype=None):
        array = layers.initial(self.seed, self.name, layers.own_shape(self.name, tuple(shape)))
        return tf.cast(layers.native(self.name, array), dtype or "float32")

    def get_config(self):
        return {"seed": self.seed, "name": self.name}


def initializer(seed, name, shape=None):
    """The initializer of the weight that kvattn calls ``name``; ``shape`` where it is no matrix of a Dense."""
    if seed is not None:
        return _First(seed, name)
    if name == "embedding":
        return keras.initializers.RandomNormal(stddev=1 / math.sqrt(shape[-1]))
    return keras.initializers.RandomUniform(-layers.glorot(shape), layers.glorot(shape)) if shape else "glorot_uniform"


def dense(layer, name, units, bias, seed):
    """A Dense, in the layer's dtype, that knows its name."""
    return Dense(units, use_bias=bias, kernel_initializer=initializer(seed, name), name=name, dtype=layer.dtype_policy)


def build_once(part, *shapes):
    """Build a part, unless its weights have been imported already."""
    if not part.built:
        part.build(*shapes)


def check_given(layer, **sizes):
    """Raises TypeError naming the sizes that were not given."""
    if missing := [name for name, size in sizes.items() if size is None]:
        raise TypeError(
            f"{type(layer).__name__} needs {' and '.join(missing)}: give sizes by name, or in d2l's order for TensorFlow, "
            "in which key_size, query_size and value_size come first"
        )


def seed_among(arrays, rng):
    """The seed, which is among the ``arrays`` where it is a tensor, and the others."""
    others = dict(arrays or {})
    return others.pop("rng", rng), others or None


def dropped(dropout, X, training, rng):
    """What a keras.layers.Dropout makes of X; given a seed, by its pattern."""
    if rng is None or not (training and dropout.rate):
        return dropout(X, training=training)
    return layers.dropped(tab, X, dropout.rate, rng)


# ---- Keras's masks: (batch, n), True where a position is no padding


def padding_of(x):
    """The mask that Keras has noted at a tensor, or None."""
    return getattr(x, "_keras_mask", None)


def hide_padding(options, queries, keys, scores, queries_mask, *keys_masks):
    """Put Keras's masks among attention's options, for ``scores`` of this shape: padded keys are hidden, and padded queries
    attend to nothing.

    A query is hidden by a length of 0, not by a mask, which would have an entry for every pair.
    """
    for mask in keys_masks:
        if mask is not None:
            _hide(options, queries, scores, mask[..., None, :])
    if queries_mask is not None and len(queries_mask.shape) > 2:
        _hide(options, queries, scores, queries_mask[..., None])
    elif queries_mask is not None:
        lens, (*batch, n) = options["valid_lens"], queries_mask.shape
        lens = keras.ops.shape(keys)[-2] if lens is None else checks.lengths(tab, lens, tuple(batch), n, queries)
        lens = tf.convert_to_tensor(lens)
        lens = lens[..., None] if len(lens.shape) < len(queries_mask.shape) else lens
        options["valid_lens"] = lens * tf.cast(queries_mask, lens.dtype)


def _hide(options, queries, scores, mask):
    """Join a mask (batch, n or 1, m or 1) to the mask of the scores, which may have axes for heads."""
    mask = tf.cast(mask, "bool")[(slice(None), *[None] * (len(scores) - len(mask.shape)))]
    if (given := options.get("mask")) is not None:
        mask = tf.logical_and(mask, checks.masks(tab, queries, scores, given, None)[0])
    options["mask"] = mask


def check_cache_sees_no_padding(options):
    """A cache keeps keys without their masks: a mask of all of them must be given, and goes instead of Keras's."""
    if options["keys_mask"] is None and options["values_mask"] is None:
        return
    if options.get("mask") is None:
        raise ValueError(
            "these keys have Keras's mask of padding, which a cache does not keep for the next call: give mask=, "
            "(batch, 1, 1, m), True for each key so far, those of earlier calls first, that is no padding"
        )
    options["keys_mask"] = options["values_mask"] = None


def keeps(cache, X, mask):
    """Whether the keys of a decoder's call can join its cache: as its first, not of an unknown number, nor behind a mask."""
    return cache.key is not None or (X.shape[1] is not None and mask is None)


# ---- weights by kvattn's names, for kvattn/weights.py


class _Slot(NamedTuple):
    owner: keras.layers.Layer
    attribute: str
    shape: tuple  # here, (features in, out); None in it where the first call decides

    @property
    def variable(self):
        """None where the first call makes it."""
        return getattr(self.owner, self.attribute, None)

    def read(self):
        """A NumPy array; None where there are no values yet."""
        return None if self.variable is None else api.to_numpy(self.variable).reshape(self.shape)


def parts(module, path=(), visited=None):
    """(path, layer) of the module and every layer in it: by attribute, by name in functional and Sequential models."""
    visited = set() if visited is None else visited
    if id(module) not in visited:
        visited.add(id(module))
        yield path, module
        for name, child in _children(module):
            yield from parts(child, (*path, name), visited)


def _children(module):
    """(name, layer) of the layers that a layer holds."""
    if isinstance(module, keras.Sequential) or hasattr(module, "operations"):
        return [(part.name, part) for part in module.layers]
    found = []
    for name, x in vars(module).items():
        if name != "_layers" and not name.startswith("_self_"):  # Keras's and TensorFlow's own lists of them
            inside = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ()
            found += [(name, x), *((f"{name}.{key}", y) for key, y in inside)]
    return [(name, x) for name, x in found if isinstance(x, keras.layers.Layer)]


def slots(module):
    """{name: slot} of every weight in ``module``."""
    found, inside = {}, set()
    for path, part in parts(module):
        if id(part) in inside:
            continue
        if isinstance(part, keras.layers.MultiHeadAttention):
            inside |= {id(x) for _, x in parts(part)}
            own = {".".join((*path, name)): slot for name, slot in _heads(part).items()}
        else:
            own = {name: _Slot(part, *place) for name, place in _own(path, part).items()}
        rest = {id(x) for x in part.weights} - {id(slot.variable) for slot in own.values()}
        if rest - {id(x) for _, child in _children(part) for x in child.weights if id(child) not in inside}:
            raise TypeError(f"{'.'.join(path)} is a {type(part).__name__}, whose weights have no name outside Keras")
        found |= own
    return found


def _own(path, part):
    """{name: (attribute, shape)} of the weights that a part holds itself."""
    if isinstance(part, Dense):
        kind, has = "dense", {"weight": ("kernel", (None, part.units)), "bias": part.use_bias and ("bias", (part.units,))}
    elif isinstance(part, LayerNormalization):
        shape = (None,) * (len(part.axis) if isinstance(part.axis, list) else 1)
        kind, has = "norm", {"weight": part.scale and ("gamma", shape), "bias": part.center and ("beta", shape)}
    elif isinstance(part, Embedding):
        kind, has = "embedding", {"weight": ("embeddings", (part.input_dim, part.output_dim))}
    else:
        places = {name: (name, _known(part, name, shape)) for name, shape in getattr(part, "VARIABLES", ())}
        return {layers.names((*path, name), "embedding")["weight"]: place for name, place in places.items()}
    names = layers.names(path, kind)
    has = {names[which]: place for which, place in has.items() if place}
    return {name: (x, layers.own_shape(name, _known(part, x, shape))) for name, (x, shape) in has.items()}


def _known(part, attribute, shape):
    """The shape of a part's weight, once it is there."""
    variable = getattr(part, attribute, None)
    return shape if variable is None else tuple(variable.shape)


def _heads(part):
    """The slots of Keras's own multi-head attention, whose projections have an axis for the heads."""
    if not part.built:
        raise ValueError(f"no values yet for {part.name}, a keras.layers.MultiHeadAttention: call it once")
    found = {}
    for name, dense in zip("qkvo", (part.query_dense, part.key_dense, part.value_dense, part.output_dense), strict=True):
        *into, out = dense.kernel.shape if name == "o" else (dense.kernel.shape[0], math.prod(dense.kernel.shape[1:]))
        found[f"W_{name}"] = _Slot(dense, "kernel", (math.prod(into), out))
        if dense.bias is not None:
            found[f"b_{name}"] = _Slot(dense, "bias", (out,))
    return found


def assign(module, arrays):
    """Put these arrays, whose names and shapes fit, in the module's weights; returns the module.

    Raises TypeError for float64, which a layer that is to make weights of float32 would round.
    """
    found = slots(module)
    fresh = {slot.owner.dtype_policy.name for slot in found.values() if slot.variable is None}
    if "float32" in fresh and any(x.dtype == np.float64 for x in arrays.values()):
        raise TypeError(
            "weights are float64, and this layer, which was never called, is to make its own in float32: "
            "make the layer with dtype='float64', or give weights of float32, x.astype('float32')"
        )
    for name, slot in found.items():
        if slot.variable is None:
            _make(slot.owner, arrays[name].shape)
        array = tf.reshape(arrays[name], slot.variable.shape)
        slot.variable.assign(tf.cast(array, slot.variable.dtype))
    return module


def _make(part, shape):
    """The variables of a part whose weight, the first of two, is to have this shape."""
    if isinstance(part, Dense):
        part.build((None, shape[0]))
    elif isinstance(part, LayerNormalization):
        first = part.axis[0] if isinstance(part.axis, list) else part.axis
        part.build((1,) * max(first, 0) + shape)
    elif isinstance(part, Embedding):
        part.build()
    else:
        part.make(shape)
