"""MXNet's and gluon's ways."""

import copy

from adapters.mxnet import call

from kvattn import mxnet as kv
from kvattn.backends.mxnet import mx
from saving import LAYERS, arguments, output

ERRORS = (AssertionError, ValueError, mx.MXNetError)  # gluon's own are assertions
nn = mx.gluon.nn


class Model(nn.HybridBlock):
    def __init__(self):
        super().__init__()
        made = {name: getattr(kv, name)(**config) for name, config in LAYERS.items()}
        self.encoder = made.pop("TransformerEncoder")
        self.listed = nn.HybridSequential()
        self.listed.add(made.pop("TransformerEncoderBlock"))
        self.names = list(made)
        for name, layer in made.items():
            setattr(self, name, layer)

    def hybrid_forward(self, F, X, tokens, lens):
        parts = {name: getattr(self, name) for name in self.names}
        parts |= {"TransformerEncoderBlock": self.listed[0], "TransformerEncoder": self.encoder}
        return tuple(output(name, part(*arguments(name, X, tokens, lens))) for name, part in parts.items())


@mx.util.use_np
def model():
    made = Model()
    made.initialize()
    return made


def called(layer, inputs):
    call(layer, *inputs)
    return layer


@mx.util.use_np
def parameters(saved, fresh, inputs, path):
    other = fresh()
    saved.save_parameters(str(path / "layer.params"))
    other.load_parameters(str(path / "layer.params"))
    return other


@mx.util.use_np
def parameters_after_a_call(saved, fresh, inputs, path):
    other = called(fresh(), inputs)
    saved.save_parameters(str(path / "layer.params"))
    other.load_parameters(str(path / "layer.params"))
    return other


@mx.util.use_np
def arrays(saved, fresh, inputs, path):
    """A file of arrays by their place in collect_params."""
    other = called(fresh(), inputs)
    mx.npx.save(str(path / "layer.npy"), [x.data() for x in saved.collect_params().values()])
    for parameter, array in zip(other.collect_params().values(), mx.npx.load(str(path / "layer.npy")), strict=True):
        parameter.set_data(array)
    return other


@mx.util.use_np
def deepcopy(saved, inputs, path):
    return copy.deepcopy(saved)


@mx.util.use_np
def export(saved, inputs, path):
    saved.hybridize()
    called(saved, inputs)
    saved.export(str(path / "layer"))
    places = [f"data{i}" for i in range(len(inputs))] if len(inputs) > 1 else ["data"]
    served = mx.gluon.SymbolBlock.imports(str(path / "layer-symbol.json"), places, str(path / "layer-0000.params"))
    return lambda *inputs: call(served, *inputs), len(served.collect_params().keys())
