"""What is MXNet's own in the layers: d2l's calls, gluon's graphs, files, casts, copies, initializers, Trainer, composition."""

import contextlib
import copy
import subprocess
import sys
from functools import partial

import numpy
import pytest
from conftest import chosen

if "mxnet" not in chosen():
    pytest.skip("this run is without MXNet", allow_module_level=True)

from kvattn import layers
from kvattn import mxnet as kv
from kvattn.backends.mxnet import autograd, mx, np

gluon, nn = mx.gluon, mx.gluon.nn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MXNet's own

RNG = numpy.random.default_rng(0)


def array(*shape):
    return np.array(RNG.normal(size=shape), dtype="float32")


Q, K, V, X, Y = array(2, 3, 4), array(2, 5, 4), array(2, 5, 6), array(2, 4, 8), array(2, 4, 8)
OTHER = array(2, 5, 7)
LENS = np.array([4, 2], dtype="int32")
TOKENS = np.array(RNG.integers(0, 11, (2, 5)), dtype="int32")
BLOCK = {"num_hiddens": 8, "ffn_num_hiddens": 12, "num_heads": 4}
ENCODER = {"vocab_size": 11, **BLOCK, "num_blks": 2}
LAYERS = {  # every layer with a configuration and its inputs
    "DotProductAttention": ({}, (Q, K, V, LENS)),
    "AdditiveAttention": ({"num_hiddens": 8}, (Q, OTHER, V, LENS)),
    "MultiplicativeAttention": ({}, (Q, OTHER, V, LENS)),
    "GatedAttention": ({}, (Q, K, V, LENS)),
    "MultiHeadAttention": ({"num_hiddens": 8, "num_heads": 4, "num_kv_heads": 2, "use_bias": True}, (Q, K, V, LENS)),
    "PositionalEncoding": ({"num_hiddens": 8}, (X,)),
    "AddNorm": ({}, (X, Y)),
    "PositionWiseFFN": ({"ffn_num_hiddens": 5, "ffn_num_outputs": 8, "activation": "gelu"}, (X,)),
    "TransformerEncoderBlock": (BLOCK, (X, LENS)),
    "TransformerEncoder": (ENCODER, (TOKENS, LENS)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def numpy_semantics():
    with mx.util.np_shape(True), mx.util.np_array(True):
        yield
        with contextlib.suppress(mx.MXNetError):  # what a test has looked at already
            mx.nd.waitall()


def made(name, **more):
    """The layer, initialized but not called, and its inputs."""
    config, inputs = LAYERS[name]
    layer = getattr(kv, name)(**config, **more)
    layer.initialize()
    return layer, inputs


def gradients(layer, *inputs, train=False, **options):
    """The output, and the gradients of sum(output^2) by the floating-point inputs and every weight."""
    inputs = [x.copy() for x in inputs]
    leaves = [x for x in inputs if x.dtype.kind == "f"]
    for leaf in leaves:
        leaf.attach_grad()
    with autograd.record(train_mode=train):
        output = layer(*inputs, **options)
        loss = (output * output).sum()
    loss.backward(train_mode=train)
    parameters = layer.collect_params().values()
    return [output, *(x.grad for x in leaves), *(p.grad() for p in parameters)]


def same(found, expected, atol=0.0):
    for x, y in zip(found, expected, strict=True):
        numpy.testing.assert_allclose(kv.to_numpy(x), kv.to_numpy(y), atol=atol, rtol=0)


# ---- d2l's calls


def test_the_lessons_calls_work_word_for_word():
    queries, keys, values = kv.normal(0, 1, (2, 1, 2)), kv.normal(0, 1, (2, 10, 2)), kv.normal(0, 1, (2, 10, 4))
    valid_lens = kv.tensor([2, 6])
    attention = kv.DotProductAttention(dropout=0.5)
    attention.initialize()
    kv.check_shape(attention(queries, keys, values, valid_lens), (2, 1, 4))
    shown = kv.reshape(attention.attention_weights, (1, 1, 2, 10))
    assert (shown.asnumpy()[0, 0, 0, 2:] == 0).all()

    attention = kv.AdditiveAttention(num_hiddens=8, dropout=0.1)
    attention.initialize()
    kv.check_shape(attention(kv.normal(0, 1, (2, 1, 20)), keys, values, valid_lens), (2, 1, 4))
    kv.check_shape(attention.attention_weights, (2, 1, 10))

    attention = kv.MultiHeadAttention(100, 5, 0.5)
    attention.initialize()
    X, Y = kv.ones((2, 4, 100)), kv.ones((2, 6, 100))
    kv.check_shape(attention(X, Y, Y, kv.tensor([3, 2])), (2, 4, 100))
    kv.check_shape(attention.attention.attention_weights, (10, 4, 6))

    pos_encoding = kv.PositionalEncoding(32, 0)
    pos_encoding.initialize()
    X = pos_encoding(np.zeros((1, 60, 32)))
    P = pos_encoding.P[:, : X.shape[1], :]
    same([P[0, :, 6:10].T], [X[0, :, 6:10].T])

    ffn = kv.PositionWiseFFN(4, 8)
    ffn.initialize()
    kv.check_shape(ffn(np.ones((2, 3, 4)))[0], (3, 8))
    add_norm = kv.AddNorm(0.5)
    add_norm.initialize()
    kv.check_shape(add_norm(kv.ones((2, 3, 4)), kv.ones((2, 3, 4))), (2, 3, 4))

    X = kv.ones((2, 100, 24))
    encoder_blk = kv.TransformerEncoderBlock(24, 48, 8, 0.5)
    encoder_blk.initialize()
    kv.check_shape(encoder_blk(X, valid_lens), X.shape)
    encoder = kv.TransformerEncoder(200, 24, 48, 8, 2, 0.5)
    kv.check_shape(encoder(np.ones((2, 100)), valid_lens), (2, 100, 24))  # and nobody has called initialize
    kv.check_shape(kv.concat(encoder.attention_weights, 0), (2 * 2 * 8, 100, 100))
    kv.check_shape(kv.masked_softmax(np.random.uniform(size=(2, 2, 4)), kv.tensor([[1, 3], [2, 4]])), (2, 2, 4))


@pytest.mark.parametrize("hybrid", [False, True])
def test_lengths_may_be_mxnets_floats_if_they_are_whole(hybrid):
    layer, inputs = made("DotProductAttention")
    if hybrid:
        layer.hybridize()
    same([layer(Q, K, V, np.array([4, 2], dtype="float32"))], [layer(*inputs)])
    same([kv.attention(Q, K, V, valid_lens=kv.tensor([4, 2]))], [layer(*inputs)])
    with pytest.raises(TypeError, match="fractions"):
        kv.masked_softmax(array(2, 3, 5), kv.tensor([2.5, 1]))
    if not hybrid:
        with pytest.raises(TypeError, match="fractions"):
            layer(Q, K, V, np.array([2.5, 2]))


def test_arguments_may_be_named():
    layer, _ = made("MultiHeadAttention")
    plain = layer(Q, K, V, LENS)
    layer.hybridize()
    same([layer(Q, K, values=V, valid_lens=LENS)], [plain], 1e-6)
    same([layer(queries=Q, keys=K, values=V, valid_lens=LENS)], [plain], 1e-6)
    assert layer._cached_graph  # the graph served


def test_dtypes_are_not_mixed():
    for cast, given in (("float16", X), ("float32", X.astype("float16")), ("float32", X.astype("float64"))):
        layer = kv.PositionWiseFFN(5, 8)
        layer.initialize()
        layer.cast(cast)
        with pytest.raises(TypeError, match=r"X has dtype float\d+ but weight has float"):
            layer(given)


def test_what_is_added_is_dropped_and_what_it_is_added_to_is_not():
    layer = kv.AddNorm(0.5)
    layer.initialize()
    still = layer(X, Y * 0)
    with autograd.train_mode():
        same([layer(X, Y * 0)], [still])
        assert abs(layer(X * 0, Y) - layer(X * 0, Y)).max() > 0.1


def test_without_set_np_the_cure_is_named():
    with mx.util.np_array(False), pytest.raises(RuntimeError, match=r"npx\.set_np"):
        kv.AddNorm()


def test_a_norm_of_two_axes_is_refused():
    with pytest.raises(ValueError, match="one axis"):
        kv.AddNorm(0.0, [4, 8])


# ---- inputs at the edge


@pytest.mark.parametrize("hybrid", [False, True])
def test_padding_that_is_no_number_reaches_nothing(hybrid):
    keys = OTHER.copy()
    keys[:, 4:] = numpy.nan
    for name in ("AdditiveAttention", "MultiplicativeAttention"):
        layer, _ = made(name)
        layer(Q, OTHER, V)
        layer.hybridize(hybrid)
        for x in gradients(layer, Q, keys, V, LENS):
            assert np.isfinite(x).all()


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_ask_or_to_attend_to(n, m, hybrid):
    layer, _ = made("MultiHeadAttention")
    layer.hybridize(hybrid)
    output, *grads = gradients(layer, array(2, n, 4), array(2, m, 4), array(2, m, 6))
    assert output.shape == (2, n, 8)
    assert all(np.isfinite(x).all() for x in grads if x.size)


# ---- files


@every_layer
def test_parameters_go_to_a_file_and_come_back(name, tmp_path):
    layer, inputs = made(name)
    expected = layer(*inputs)
    other, _ = made(name)
    other(*inputs)
    fresh = getattr(kv, name)(**LAYERS[name][0])  # not even initialized
    layer.save_parameters(str(tmp_path / "layer.params"))
    for receiver in (other, fresh):
        receiver.load_parameters(str(tmp_path / "layer.params"))
        same([receiver(*inputs)], [expected])


def test_every_parameter_of_an_encoder_is_trained():
    """So that d2l's clipping, which reads the gradient of each, works; the positions are computed, and none."""
    layer, inputs = made("TransformerEncoder")
    layer(*inputs)
    assert all(p.grad_req == "write" for p in layer.collect_params().values())
    assert len(kv.export_weights(layer)) == len(list(layer.collect_params()))


def test_an_exported_graph_runs_in_another_process(tmp_path):
    names = ["TransformerEncoder", "AdditiveAttention"]
    for name in names:
        layer, inputs = made(name)
        layer.hybridize()
        expected = layer(*inputs)
        layer.export(str(tmp_path / name))
        numpy.savez(tmp_path / f"{name}.npz", kv.to_numpy(expected), *map(kv.to_numpy, inputs))
    code = f"""if True:
        import warnings, numpy
        warnings.simplefilter("ignore")
        from kvattn import mxnet as kv
        import mxnet as mx
        mx.npx.set_np()
        for name in {names}:
            with numpy.load(name + ".npz") as case:
                expected, *inputs = [mx.np.array(case[x]) for x in case.files]
            places = [f"data{{i}}" for i in range(len(inputs))]
            layer = mx.gluon.SymbolBlock.imports(f"{{name}}-symbol.json", places, f"{{name}}-0000.params")
            print(abs(layer(*inputs) - expected).max())
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    assert max(map(float, run.stdout.split())) < 1e-6


# ---- dtypes


@every_layer
@pytest.mark.parametrize("hybrid", [False, True])
def test_half_precision(name, hybrid):
    layer, inputs = made(name)
    expected = layer(*inputs)
    half = copy.deepcopy(layer)
    half.cast("float16")
    if hybrid:
        half.hybridize()
    given = [x.astype("float16") if x.dtype == "float32" else x for x in inputs]
    found = gradients(half, *given)
    assert found[0].dtype == "float16"
    same(found[:1], [expected], 1e-2)
    same([x / (1 + abs(x).max()) for x in found], [x / (1 + abs(x).max()) for x in gradients(layer, *inputs)], 2e-2)
    half.cast("float32")
    same([half(*inputs)], [expected], 1e-2)


def test_half_precision_before_the_first_values():
    layer = kv.TransformerEncoder(**ENCODER)
    layer.cast("float16")
    layer.initialize()
    assert layer(TOKENS).dtype == "float16"


def test_half_precision_does_not_overflow():
    layer = kv.AddNorm()
    layer.initialize()
    layer.cast("float16")
    x = (X * 300).astype("float16")  # squares are past 65504
    expected = x.asnumpy().astype(float)
    expected = (expected - expected.mean(-1, keepdims=True)) / expected.std(-1, keepdims=True)
    numpy.testing.assert_allclose(layer(x, x * 0).asnumpy(), expected, atol=2e-3)


@every_layer
def test_double_precision(name):
    layer, inputs = made(name)
    expected = layer(*inputs)
    layer.cast("float64")
    found = layer(*[x.astype("float64") if x.dtype == "float32" else x for x in inputs])
    assert found.dtype == "float64"
    same([found], [expected], 1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("width", [8, 7])
def test_positions_take_the_dtype_of_what_they_join(dtype, width):
    layer = kv.PositionalEncoding(width)
    layer.initialize()
    encoded = layer(np.zeros((1, 6, width), dtype=dtype))
    assert encoded.dtype == dtype
    atol = 1e-3 if dtype == "float16" else 1e-6
    numpy.testing.assert_allclose(encoded.asnumpy()[0], layers.encoding(6, width), atol=atol)
    x = array(2, 6, width).astype(dtype)
    plain = layer(x)
    layer.hybridize()
    assert layer(x).dtype == dtype
    same([layer(x)], [plain])


# ---- copies, first values, training


@every_layer
@pytest.mark.parametrize("hybrid", [False, True])
def test_a_trained_layer_can_be_copied(name, hybrid):
    layer, inputs = made(name, **({} if name in ("MultiplicativeAttention", "GatedAttention") else {"dropout": 0.1})
                         if name != "PositionWiseFFN" else {})  # fmt: skip
    if hybrid:
        layer.hybridize()
    gradients(layer, *inputs, train=True)
    if list(layer.collect_params()):
        trainer = gluon.Trainer(layer.collect_params(), "sgd")
        trainer.step(1)
    copied = copy.deepcopy(layer)
    assert not any(p._trainer for p in copied.collect_params().values())
    same(gradients(copied, *inputs), gradients(layer, *inputs), 1e-6)
    before = layer(*inputs)
    for parameter in copied.collect_params().values():
        parameter.set_data(parameter.data() + 1)
    same([layer(*inputs)], [before])
    if "Attention" in name and name != "MultiHeadAttention":
        same([copy.deepcopy(layer).attention_weights], [layer.attention_weights])


def test_a_part_can_be_copied_without_the_whole():
    layer, inputs = made("TransformerEncoder")
    layer.hybridize()
    layer(*inputs)
    part = copy.deepcopy(layer.blks[0])
    same([part(X, LENS)], [layer.blks[0](X, LENS)], 1e-6)
    assert part._scope._old_scope is None


def test_first_values_come_from_mxnets_generator():
    def drawn(**more):
        mx.random.seed(5)
        layer, inputs = made("TransformerEncoder", **more)
        layer(*inputs)
        return kv.export_weights(layer)

    first, again, seeded = drawn(), drawn(), drawn(seed=3)
    assert all((first[name] == again[name]).all() for name in first)
    assert (seeded["embedding"] == layers.initial(3, "embedding", (11, 8))).all()
    assert abs(first["embedding"] - seeded["embedding"]).max() > 0.1


def test_an_initializer_of_ones_own_is_heard_without_a_seed():
    found = {}
    for seed in (None, 3):
        layer = kv.MultiHeadAttention(8, 4, seed=seed)
        layer.initialize(mx.init.Constant(0.5))
        layer(X, X, X)
        found[seed] = kv.export_weights(layer)["W_q"]
    assert (found[None] == 0.5).all()
    assert (found[3] == layers.initial(3, "W_q", (8, 8))).all()


def test_a_trainer_learns_the_same_with_and_without_a_graph():
    def learn(hybrid):
        net = nn.HybridSequential()
        net.add(kv.TransformerEncoder(**ENCODER, seed=4), nn.Dense(11, flatten=False, weight_initializer=mx.init.Constant(0.1)))
        net.initialize()
        if hybrid:
            net.hybridize()
        trainer = gluon.Trainer(net.collect_params(), "adam", {"learning_rate": 3e-2})
        loss_of, losses = gluon.loss.SoftmaxCrossEntropyLoss(), []
        for _ in range(20):
            with autograd.record():
                loss = loss_of(net(TOKENS), TOKENS).mean()
            loss.backward()
            trainer.step(1)
            losses.append(loss.item())
        return losses

    plain, graph = learn(False), learn(True)
    assert plain[-1] < 0.3 * plain[0]
    numpy.testing.assert_allclose(graph, plain, atol=1e-4)


# ---- the weights shown


def test_the_weights_shown_are_detached_and_of_the_moment():
    layer, inputs = made("GatedAttention")
    layer(*inputs)
    with autograd.record():
        output = layer(inputs[0] * layer.w_g.data()[:1], *inputs[1:])
    shown = layer.attention_weights
    output.backward()
    with pytest.raises(mx.MXNetError, match="not in a computational graph"):
        layer._last[0].backward()
    layer.w_g.set_data(layer.w_g.data() * 0)  # as a Trainer writes
    same([layer.attention_weights], [shown])


# ---- composition and weights by name


def test_a_users_model_exports_and_imports_under_its_own_names():
    class Model(gluon.Block):
        def __init__(self):
            super().__init__()
            self.encoder = kv.TransformerEncoder(**ENCODER)
            self.norm, self.head = nn.LayerNorm(), nn.Dense(3, flatten=False)

        def forward(self, X):
            return self.head(self.norm(self.encoder(X)))

    model, other = Model(), Model()
    model.initialize()
    expected = model(TOKENS)
    weights = kv.export_weights(model)
    assert {"encoder.embedding", "encoder.blocks.1.ffn.W_2", "norm.gamma", "norm.beta", "head.W", "head.b"} <= set(weights)
    assert weights["head.W"].shape == (8, 3)
    same([kv.import_weights(other, weights)(TOKENS)], [expected])
    model.extra = nn.BatchNorm()
    with pytest.raises(TypeError, match="extra is a BatchNorm"):
        kv.export_weights(model)


def test_values_that_wait_are_named():
    layer, _ = made("PositionWiseFFN")
    with pytest.raises(ValueError, match="no values yet for W_1, W_2:"):
        kv.export_weights(layer)


# ---- the namespace


def test_short_names_have_mxnets_meaning():
    x = kv.tensor([[1, 2], [3, 4]])
    assert x.dtype == kv.float32
    assert kv.astype(x, "int32").dtype == "int32"
    assert kv.numpy(kv.transpose(x)).tolist() == [[1, 3], [2, 4]]
    assert kv.reshape(x, (4,)).shape == kv.reshape(x, 4).shape == (4,)
    assert kv.reduce_sum(x).item() == 10
    assert kv.reduce_mean(x, axis=0).tolist() == [2, 3]
    assert kv.argmax(x, axis=1).tolist() == [1, 1]
    assert kv.concat((x, x)).shape == (4, 2)
    assert kv.swapaxes(x, 0, 1).tolist() == [[1, 3], [2, 4]]
    assert kv.repeat(x, 2, axis=0).shape == (4, 2)
    assert kv.matmul(x, kv.eye(2)).tolist() == x.tolist()
    assert kv.batch_matmul(x[None], x[None]).tolist() == [[[7, 10], [15, 22]]]
    assert kv.size(x) == 4
    assert kv.to(x, mx.cpu()).ctx == mx.cpu()
    assert kv.rand(2, 3).shape == kv.randn(2, 3).shape == kv.normal(0, 1, (2, 3)).shape == (2, 3)
    assert isinstance(kv.get_key(), int)
    for name in ("abs", "arange", "exp", "ones", "sin", "zeros", "sigmoid", "tanh", "linspace", "meshgrid", "stack", "log"):
        assert callable(getattr(kv, name)), name


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_layer_keeps_a_learned_bias_as_it_was_and_is_copied(hybrid):
    layer, bias = kv.MultiHeadAttention(8, 2, seed=1), array(4, 4)
    layer.initialize()
    if hybrid:
        layer.hybridize()
    bias.attach_grad()
    with autograd.record():
        output = layer(X, X, X, bias=bias)
    output.backward()
    shown = layer.attention.attention_weights
    bias[:] = 0  # as an optimiser writes into it
    same(layer.attention.attention_weights, shown)
    same(copy.deepcopy(layer)(X, X, X), layer(X, X, X))


RANGE = np.arange(5, dtype="float32")


def near(slope, query, key, power=1):
    return -slope * (abs(query - key) ** power).astype("float32")


@pytest.mark.parametrize("bias", [partial(near, 2.0, power=2), partial(near, np.array(2.0), power=2)], ids=["float", "array"])
def test_weights_are_shown_beside_a_function_that_is_given_some_of_its_arguments(bias):
    layer = kv.DotProductAttention()
    layer.initialize()
    layer(Q, K, V, bias=bias)
    same([layer.attention_weights], [kv.attention(Q, K, V, bias=-2 * (RANGE[:3, None] - RANGE) ** 2, return_weights=True)[1]])


def test_weights_are_shown_of_a_layer_with_alibi():
    layer = kv.MultiHeadAttention(8, 4, alibi=True)
    layer.initialize()
    _, expected = layer(X, X, X, return_weights=True)
    same([layer.attention.attention_weights], [np.reshape(expected, (8, 4, 4))])


@pytest.mark.parametrize("how", [{"rotary": {"interleaved": True}}, {"alibi": True}], ids=["rotary", "alibi"])
def test_a_hybridized_layer_places_what_its_graph_is_given(how):
    layer = kv.MultiHeadAttention(8, 2, **how, seed=3)
    layer.initialize()
    x = array(2, 4, 8)
    expected = layer(x, x, x).asnumpy()
    layer.hybridize()
    for _ in range(2):
        numpy.testing.assert_allclose(layer(x, x, x).asnumpy(), expected, atol=1e-5)
    plain = kv.MultiHeadAttention(8, 2, seed=3)
    plain.initialize()
    assert numpy.abs(plain(x, x, x).asnumpy() - expected).max() > 1e-3


@pytest.mark.parametrize("how", [{}, {"rotary": True, "sink": True}], ids=["alone", "rotary, sink"])
def test_a_hybridized_layer_learns_its_norms(how):
    layer = kv.MultiHeadAttention(8, 2, num_kv_heads=1, qk_norm=True, seed=3, **how)
    layer.initialize()
    x = array(2, 4, 8)

    def step():
        with autograd.record():
            output = layer(x, x, x)
            loss = (output * output).sum()
        loss.backward()
        return [output.asnumpy(), *(y.grad().asnumpy().copy() for y in (layer.q_norm, layer.k_norm, layer.W_k.weight))]

    expected = step()
    assert all(numpy.abs(y).max() > 1e-4 for y in expected)
    layer.hybridize()
    for y, found in zip(expected, step(), strict=True):
        numpy.testing.assert_allclose(found, y, atol=1e-4)


def test_a_hybridized_layer_learns_its_sink():
    layer = kv.MultiHeadAttention(8, 2, sink=True, seed=3)
    layer.initialize()
    x = array(2, 4, 8)
    layer(x, x, x)
    layer.sink.set_data(kv.tensor([0.5, -1.0]))

    def step():
        with autograd.record():
            output = layer(x, x, x)
        output.backward()
        return output.asnumpy(), layer.sink.grad().asnumpy()

    expected, by_expected = step()
    assert numpy.abs(by_expected).min() > 1e-3
    layer.hybridize()
    for _ in range(2):
        for made, right in zip(step(), (expected, by_expected), strict=True):
            numpy.testing.assert_allclose(made, right, atol=1e-5)


class WithSink(mx.gluon.HybridBlock):
    """attention whose sink is a weight of the block's, in its graph."""

    def __init__(self):
        super().__init__()
        self.sink = self.params.get("sink", shape=(2,), init="zeros")

    def hybrid_forward(self, F, x, sink):
        return kv.attention(x, x, x, sink=sink, causal=True)


def test_a_symbol_may_be_the_sink():
    block, x = WithSink(), array(3, 2, 4, 8)
    block.initialize()
    block.sink.set_data(kv.tensor([0.5, -1.0]))
    made = []
    for _ in range(2):
        with autograd.record():
            output = block(x)
        output.backward()
        made.append((output.asnumpy(), block.sink.grad().asnumpy()))
        block.hybridize()
    for eager, hybrid in zip(*made, strict=True):
        numpy.testing.assert_allclose(hybrid, eager, atol=1e-5)
    numpy.testing.assert_allclose(made[0][0], kv.attention(x, x, x, causal=True, sink=block.sink.data()).asnumpy(), atol=1e-6)


@pytest.mark.parametrize(("n", "together"), [(10, True), (3000, False)])
def test_the_operators_of_a_small_call_reach_the_engine_together(n, together):
    layer, X, seen = kv.MultiHeadAttention(32, 4), mx.np.ones((1, n, 32)), []

    def look(*_):
        seen.append(mx.engine.set_bulk_size(0))
        mx.engine.set_bulk_size(seen[-1])

    layer.initialize()
    layer.W_o.register_forward_hook(look)
    with mx.engine.bulk(3):
        layer(X, X, X)
        with pytest.raises(ValueError, match="valid_lens"):
            layer(X, X, X, mx.np.array([1, 2, 3]))
        assert mx.engine.set_bulk_size(3) == 3
    assert (seen[0] > 3) == together
