"""MXNet's layers hybridized: a graph gives what the layer gives, at other shapes, in dropout, in copies; or refuses."""

import copy
import gc

import numpy
import pytest
from conftest import chosen

if "mxnet" not in chosen():
    pytest.skip("this run is without MXNet", allow_module_level=True)

from test_layers_mxnet import (  # noqa: F401
    ENCODER,
    LAYERS,
    LENS,
    OTHER,
    RNG,
    TOKENS,
    K,
    Q,
    V,
    array,
    every_layer,
    gradients,
    made,
    numpy_semantics,
    same,
)

from kvattn import mxnet as kv
from kvattn.backends.mxnet import autograd, mx, np
from kvattn.layers import symbols

gluon, nn = mx.gluon, mx.gluon.nn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MXNet's own


@every_layer
@pytest.mark.parametrize("flags", [{}, {"static_alloc": True, "static_shape": True}], ids=["dynamic", "static"])
def test_a_hybridized_layer_gives_the_same_numbers_and_gradients(name, flags):
    plain, inputs = made(name, **({} if name in ("DotProductAttention", "AddNorm", "PositionalEncoding") else {"seed": 3}))
    expected = gradients(plain, *inputs)
    hybrid = copy.deepcopy(plain)
    hybrid.hybridize(**flags)
    for _ in range(2):
        same(gradients(hybrid, *inputs), expected, 1e-6)
    same([hybrid(*inputs)], expected[:1], 1e-6)


@every_layer
def test_a_hybridized_model_finds_the_sizes_of_what_it_holds(name):
    class Model(nn.HybridBlock):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.head = layer, nn.Dense(3, flatten=False)

        def hybrid_forward(self, F, *args):
            return self.head(self.layer(*args))

    layer, inputs = made(name)
    model = Model(layer)
    model.head.initialize()
    model.hybridize()
    graph = model(*inputs)
    model.hybridize(False)
    same([graph], [model(*inputs)], 1e-6)


@pytest.mark.parametrize("static", [False, True])
def test_a_graph_runs_at_other_shapes(static):
    layer, _ = made("TransformerEncoderBlock")
    layer.hybridize(static_alloc=static)
    for n in (4, 7, 2):
        x = array(3, n, 8)
        graph = layer(x, np.array([1, 2, 2]))
        layer.hybridize(False, clear=False)
        same([graph], [layer(x, np.array([1, 2, 2]))], 1e-6)
        layer.hybridize(True, static_alloc=static, clear=False)


OTHERS = [  # batch, n, m, lengths: full, none, of each query; other sizes; past a tile; nothing
    (2, 3, 5, [5, 5]), (2, 3, 5, [0, 0]), (2, 3, 5, [[5, 0, 1], [2, 3, 0]]), (3, 7, 6, [6, 0, 2]), (1, 1, 9, [1]),
    (1, 300, 300, [257]), (2, 4, 0, [0, 0]),
]  # fmt: skip
NOTHING = [(0, 4, 5, numpy.zeros(0)), (2, 0, 5, [0, 0])]


def resized(name, batch, n, m, lens):
    """Inputs of other sizes for a layer of LAYERS."""
    lens = np.array(lens, dtype="int32")
    if name == "TransformerEncoder":
        return np.array(RNG.integers(0, 11, (batch, n)), dtype="int32"), lens
    inputs = LAYERS[name][1]
    sizes = (n, m, m) if name.endswith("Attention") else (n, n)
    floats = [array(batch, size, x.shape[-1]) for size, x in zip(sizes, inputs, strict=False) if x.dtype.kind == "f"]
    return (*floats, lens) if len(floats) < len(inputs) else tuple(floats)


@pytest.mark.filterwarnings("ignore:Cannot decide type")
@every_layer
def test_a_graph_of_one_input_serves_others(name, tmp_path):
    """Of other lengths and sizes: nothing of the input that it was made with stays in it."""
    plain, inputs = made(name)
    plain(*inputs)
    graphs = [copy.deepcopy(plain), copy.deepcopy(plain)]
    for graph, flags in zip(graphs, ({}, {"static_alloc": True, "static_shape": True}), strict=True):
        graph.hybridize(**flags)
        graph(*inputs)
    graphs[0].export(str(tmp_path / "layer"))
    places = [f"data{i}" for i in range(len(inputs))] if len(inputs) > 1 else ["data"]
    imported = gluon.SymbolBlock.imports(str(tmp_path / "layer-symbol.json"), places, str(tmp_path / "layer-0000.params"))
    for sizes in OTHERS:
        given = resized(name, *sizes)
        expected = plain(*given)
        for graph in (*graphs, imported):
            same([graph(*given)], [expected], 2e-6)
    for sizes in NOTHING:  # in its layers: a graph of MXNet's own dense layers fails
        given = resized(name, *sizes)
        for graph in graphs:
            assert graph(*given).shape == plain(*given).shape
    mx.nd.waitall()


def test_calls_of_other_forms_work_beside_a_graph():
    layer, _ = made("TransformerEncoder", seed=1)
    plain, _ = made("TransformerEncoder", seed=1)
    layer.hybridize()
    for args, options in (
        ((TOKENS,), {}), ((TOKENS, LENS), {}), ((TOKENS, None), {}), ((TOKENS, [4, 2]), {}), ((TOKENS,), {"causal": True}),
        ((TOKENS,), {"mask": np.array(numpy.tri(5) > 0, dtype="bool")}), ((TOKENS, LENS), {"window": 1, "softcap": 2.0}),
    ):  # fmt: skip
        same([layer(*args, **options)], [plain(*args, **options)], 1e-6)


def test_a_hybridized_encoder_shows_the_weights_of_every_block():
    layer, inputs = made("TransformerEncoder", seed=1)
    layer(*inputs)
    expected = layer.attention_weights
    layer.hybridize()
    layer(TOKENS[::-1], LENS[::-1])
    layer(*inputs)
    same(layer.attention_weights, expected, 1e-6)


def test_options_of_a_part_are_in_the_graph_of_the_whole():
    class Decoder(nn.HybridBlock):
        def __init__(self):
            super().__init__()
            self.encoder = kv.TransformerEncoder(**ENCODER, seed=2)

        def hybrid_forward(self, F, tokens):
            return self.encoder(tokens, causal=True)

    model = Decoder()
    model.initialize()
    model.hybridize()
    same([model(TOKENS)], [model.encoder(TOKENS, causal=True)], 1e-6)
    changed = TOKENS.copy()
    changed[:, 3:] = (TOKENS[:, 3:] + 1) % 11
    same([model(changed)[:, :3]], [model(TOKENS)[:, :3]], 1e-6)


@pytest.mark.parametrize("name", ["DotProductAttention", "AdditiveAttention", "MultiplicativeAttention", "GatedAttention"])
def test_a_graph_shows_the_weights_of_its_last_run(name):
    layer, (q, k, v, lens) = made(name)
    expected = []
    for hybrid in (False, True):
        layer.hybridize(hybrid)
        for scale in (1, 2):
            layer(q * scale, k, v, lens)
            expected.append(layer.attention_weights)
    same(expected[2:], expected[:2], 1e-6)
    assert abs(expected[0] - expected[1]).max() > 1e-3


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_backward_drops_the_weights_that_forward_dropped(hybrid, static):
    layer = kv.DotProductAttention(0.5)
    layer.initialize()
    if hybrid:
        layer.hybridize(static_alloc=static)
    eye, grad = np.stack([np.eye(5)] * 2), array(2, 3, 5)
    eye.attach_grad()
    with autograd.record():
        dropped = layer(Q, K, eye)  # the weights themselves
    dropped.backward(grad)
    assert 0 < (dropped == 0).sum() < dropped.size
    same([eye.grad], [np.matmul(dropped.swapaxes(1, 2), grad)], 1e-6)
    still = layer(Q, K, eye)
    same([still], [layer.attention_weights], 1e-6)
    kept = dropped.asnumpy() != 0
    numpy.testing.assert_allclose(dropped.asnumpy()[kept], 2 * still.asnumpy()[kept], rtol=1e-5)
    with autograd.record(train_mode=False):
        output = layer(Q, K, eye)
    output.backward(grad)
    same([eye.grad], [np.matmul(still.swapaxes(1, 2), grad)], 1e-6)


def test_a_second_backward_has_the_same_weights_or_none():
    for rate in (0.0, 0.5):
        layer = kv.DotProductAttention(rate)
        layer.initialize()
        layer.hybridize()
        value = V.copy()
        value.attach_grad()
        with autograd.record():
            output = layer(Q, K, value)
        output.backward(retain_graph=True)
        first = value.grad.copy()
        output.backward()
        if rate:
            with pytest.raises(mx.MXNetError):
                value.grad.asnumpy()
        else:
            same([value.grad], [first])


def test_a_graph_keeps_nothing_of_a_call_whose_backward_is_done():
    layer = kv.TransformerEncoder(**{**ENCODER, "dropout": 0.1})
    layer.hybridize()
    for _ in range(3):
        gradients(layer, TOKENS, train=True)
    mx.nd.waitall()
    operators = [x for x in gc.get_objects() if type(x) is symbols.Attention]
    assert operators
    assert not any(x.graph for x in operators)


def test_decoding_works_in_a_hybridized_encoder_part_by_part():
    layer, _ = made("TransformerEncoder", num_kv_heads=2)
    whole = layer(TOKENS, causal=True)
    layer.hybridize()
    steps, cache = [], []
    for i in range(TOKENS.shape[1]):
        step, cache = layer(TOKENS[:, i : i + 1], causal=True, cache=cache)
        steps.append(step)
    same([np.concatenate(steps, axis=1)], [whole], 1e-5)


def test_a_graph_refuses_what_it_cannot_hold():
    layer, _ = made("MultiHeadAttention")
    x = mx.sym.var("x").as_np_ndarray()
    with pytest.raises(TypeError, match="a Symbol has no values"):
        layer(x, x, x, cache=kv.KVCache())
    with pytest.raises(ValueError, match="window must not be negative"):
        layer(x, x, x, window=-1)
    encoder, _ = made("TransformerEncoder", max_len=5)
    encoder.hybridize()
    encoder(TOKENS)
    with pytest.raises(ValueError, match="max_len=5"):
        encoder(np.zeros((2, 6)))
    attention, _ = made("DotProductAttention")
    attention.hybridize()
    with pytest.raises(ValueError, match="key has shape"):
        attention(Q, OTHER, V)


def test_a_graph_refuses_a_seed_which_it_would_hold():
    class Net(nn.HybridBlock):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def hybrid_forward(self, F, X):
            if self.inner is None:
                return kv.attention(X, X, X, dropout=0.5, rng=3)
            return self.inner(X, X, rng=3) if isinstance(self.inner, kv.AddNorm) else self.inner(X, X, X, rng=3)

    X = np.array(RNG.normal(size=(2, 3, 8)), dtype="float32")
    for inner in (None, kv.DotProductAttention(0.5), kv.AddNorm(0.5)):
        net = Net(inner)
        net.initialize()
        net(X)  # at once it is served
        net.hybridize()
        with pytest.raises(ValueError, match="rng in a graph"):
            net(X)


# ---- decoders


class EncoderDecoder(nn.HybridBlock):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = kv.TransformerEncoder(**ENCODER, seed=1), kv.TransformerDecoder(**ENCODER, seed=2)

    def hybrid_forward(self, F, source, lens, tokens):
        logits, self.state = self.decoder(tokens, self.decoder.init_state(self.encoder(source, lens), lens))
        return logits


def test_a_graph_around_a_decoder_gives_its_numbers_and_gradients_and_keeps_no_cache():
    model, inputs = EncoderDecoder(), (TOKENS, LENS, TOKENS[:, :3])
    model.initialize()
    expected = gradients(model, *inputs)
    assert [cache.length for cache in model.state[2]] == [3, 3]
    model.hybridize()
    for _ in range(2):
        same(gradients(model, *inputs), expected, 1e-4)  # sums of squares of logits
    with pytest.raises(ValueError, match=r"state\[2\]\[0\] kept nothing"):
        model.decoder(TOKENS[:, :1], model.state)


def test_a_hybridized_decoder_keeps_its_cache():
    decoder, source = kv.TransformerDecoder(**ENCODER, seed=1), array(2, 4, 8)
    whole, _ = decoder(TOKENS, decoder.init_state(source, LENS))
    decoder.hybridize()
    state, steps = decoder.init_state(source, LENS), []
    for i in range(5):
        logits, state = decoder(TOKENS[:, i : i + 1], state)
        steps.append(logits)
    same([np.concatenate(steps, axis=1)], [whole], 1e-5)
