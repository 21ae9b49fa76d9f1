"""JAX's and flax's ways: they save variables, and have no need of the module."""

import copy
from pickle import dumps, loads

import jax
import numpy as np
from adapters.jax import Layer, call
from flax import errors, serialization, traverse_util
from flax import linen as nn
from flax import nnx as flax_nnx

from kvattn import jax as kv
from saving import LAYERS, arguments

ERRORS = (ValueError, errors.ScopeParamShapeError)  # of sizes flax tells when the module is called


class Model(nn.Module):
    def setup(self):
        made = {name: getattr(kv, name)(**config) for name, config in LAYERS.items()}
        self.encoder = made.pop("TransformerEncoder")
        self.listed = [made.pop("TransformerEncoderBlock")]
        self.named = made

    def __call__(self, X, tokens, lens):
        parts = {**self.named, "TransformerEncoderBlock": self.listed[0], "TransformerEncoder": self.encoder}
        found = [part(*arguments(name, X, tokens, lens)) for name, part in parts.items()]
        return tuple(x[0] if isinstance(x, tuple) else x for x in found), None  # in the place of weights


def model():
    return Layer(Model())


def called(layer, inputs):
    call(layer, *inputs)
    return layer


def to_bytes(saved, fresh, inputs, path):
    other = called(fresh(), inputs)
    (path / "layer.msgpack").write_bytes(serialization.to_bytes(saved.variables))
    return Layer(other.module, serialization.from_bytes(other.variables, (path / "layer.msgpack").read_bytes()))


def msgpack(saved, fresh, inputs, path):
    other = called(fresh(), inputs)
    (path / "layer.msgpack").write_bytes(serialization.msgpack_serialize(serialization.to_state_dict(saved.variables)))
    read = serialization.msgpack_restore((path / "layer.msgpack").read_bytes())
    return Layer(other.module, serialization.from_state_dict(other.variables, read))


def npz(saved, inputs, path):
    np.savez(path / "layer.npz", **traverse_util.flatten_dict(saved.variables, sep="/"))
    with np.load(path / "layer.npz", allow_pickle=False) as file:
        return Layer(saved.module, traverse_util.unflatten_dict(dict(file), sep="/"))


def pickle(saved, inputs, path):
    return Layer(*loads(dumps((saved.module, saved.variables))))


def deepcopy(saved, inputs, path):
    return copy.deepcopy(saved)


def nnx(saved, inputs, path):
    """The module as one of flax's nnx, its state into another's."""
    made = [flax_nnx.bridge.ToNNX(saved.module, rngs=flax_nnx.Rngs(seed)).lazy_init(*inputs) for seed in (0, 1)]
    first = kv.import_weights(made[0], kv.export_weights(saved.variables)) if saved.variables.get("params") else made[0]
    graph, params, rest = flax_nnx.split(made[1], flax_nnx.Param, ...)
    merged = flax_nnx.merge(graph, flax_nnx.split(first, flax_nnx.Param, ...)[1], rest)
    return lambda *inputs: _first(merged(*inputs)), len(jax.tree.leaves(params))


def _first(results):
    return results[0] if isinstance(results, tuple) else results
