"""PyTorch's two exporters to ONNX, each given one set of sizes and lengths; ONNX Runtime is given others."""

import io

import numpy as np
import pytest
from conftest import chosen

import kvattn
import kvattn.numpy

if "torch" not in chosen():
    pytest.skip("this run is without PyTorch", allow_module_level=True)

import onnxruntime
import torch
from traced import RESTRICTIONS, SIZES, draw, empty, full, short

from kvattn import torch as kv

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # of every size that Python compares
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.jit.trace, and the exporter that uses it
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of constants that are not folded
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
FIRST = (6, 4, 5)  # no two sizes alike: sizes that are may share a symbol


class Module(torch.nn.Module):
    def __init__(self, function, *parts):
        super().__init__()
        self.function, self.parts = function, torch.nn.ModuleList(parts)

    def forward(self, *arrays):
        return self.function(*arrays)


def free(x):
    """The axes that are dynamic: all but the heads, the features, and those of size 1."""
    fixed = {3: [2], 4: [1, 3] if x.dtype.is_floating_point else []}.get(x.ndim, [])
    return [axis for axis, size in enumerate(x.shape) if axis not in fixed and size != 1]


def by_trace(module, arrays):
    file, names = io.BytesIO(), [f"x{i}" for i in range(len(arrays))]
    axes = {name: {axis: f"{name}_{axis}" for axis in free(x)} for name, x in zip(names, arrays, strict=True)}
    torch.onnx.export(module, arrays, file, dynamo=False, input_names=names, dynamic_axes=axes)
    return file.getvalue()


def by_export(module, arrays):
    axes = (tuple(dict.fromkeys(free(x), torch.export.Dim.DYNAMIC) for x in arrays),)
    program = torch.onnx.export(module, arrays, dynamo=True, dynamic_shapes=axes, verbose=False)
    return program.model_proto.SerializeToString()


def exported(way, function, *first, parts=()):
    """The program as a function of NumPy arrays."""
    session = onnxruntime.InferenceSession(way(Module(function, *parts).eval(), tuple(map(torch.tensor, first))))
    names = [x.name for x in session.get_inputs()]
    return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0]


GATHERED = ("positions", "sparsemax")  # ONNX gathers nothing from an axis of size 0, though the index stays unused
SOME = ("lengths", "mask and bias", "positions")  # an export of the second kind takes two seconds


@pytest.mark.parametrize(
    ("way", "which"), [*((by_trace, which) for which in RESTRICTIONS), *((by_export, which) for which in SOME)]
)
def test_one_onnx_program_serves_every_input(way, which):
    names, options = RESTRICTIONS[which]
    arguments = ["query", "key", "value", *names.values()]

    def attend(query, key, value, *restricting):
        return kvattn.attention(query, key, value, **options, **dict(zip(names, restricting, strict=True)))

    program = exported(way, attend, *[draw(*FIRST)[name] for name in arguments])
    inputs = [change(draw(*FIRST, seed=1)) for change in (full, short, empty)]
    inputs += [draw(*sizes) for sizes in (*SIZES[1:], (2, 6, 3), (3, 5, 5)) if which not in GATHERED or 0 not in sizes]
    for arrays in inputs:
        given = [arrays[name] for name in arguments]
        with kvattn.use_backend("numpy"):
            expected = attend(*given)
        np.testing.assert_allclose(program(*given), expected, rtol=0, atol=1e-5, err_msg=str(arrays["query"].shape))


@pytest.mark.parametrize("way", [by_trace, by_export])
def test_an_encoder_becomes_one_onnx_program_for_every_batch_and_length(way):
    sizes = {"vocab_size": 20, "num_hiddens": 8, "ffn_num_hiddens": 6, "num_heads": 2, "num_blks": 2, "seed": 1}
    layer = kv.TransformerEncoder(**sizes).eval()
    native = kvattn.numpy.TransformerEncoder(**sizes)
    rng = np.random.default_rng(0)
    layer(torch.zeros(1, 1, dtype=torch.int64))  # its weights take their sizes from a call
    program = exported(way, layer, rng.integers(0, 20, (6, 5)), np.full(6, 5), parts=[layer])
    for n, lens in ((5, [1, 0, 4, 2, 9, 3]), (7, [7, 0, 2]), (2, [0, 0])):
        tokens = rng.integers(0, 20, (len(lens), n))
        np.testing.assert_allclose(program(tokens, np.array(lens)), native(tokens, np.array(lens)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", [by_trace, by_export])
def test_a_step_with_a_cache_becomes_one_onnx_program_for_every_length(way):
    layer = kv.MultiHeadAttention(8, 2, seed=1).eval()
    rng = np.random.default_rng(0)
    layer(*[torch.zeros(1, 1, 8)] * 3)

    def step(x, key, value):
        cache = kvattn.KVCache(key, value, key.shape[-2])
        return layer(x, x, x, cache=cache, causal=True)[0]

    def arrays(b, n, m):
        return [rng.standard_normal(shape).astype("float32") for shape in ((b, n, 8), (b, 2, m, 4), (b, 2, m, 4))]

    program = exported(way, step, *arrays(6, 3, 5), parts=[layer])
    params = kv.export_weights(layer)
    for b, n, m in ((6, 3, 5), (2, 2, 9), (3, 4, 2)):
        x, key, value = arrays(b, n, m)
        cache = kvattn.KVCache(key, value, m)
        expected = kvattn.multi_head_attention(x, x, x, params, num_heads=2, cache=cache, causal=True, backend="numpy")[0]
        np.testing.assert_allclose(program(x, key, value), expected, rtol=0, atol=1e-5)
