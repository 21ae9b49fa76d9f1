"""What is NumPy's own: gradients derived by hand, the layer that others are made of, optimisers, and the short names."""

import copy
import importlib
import importlib.util
import tracemalloc

import numpy as np
import pytest
from conftest import chosen
from near import assert_near

import kvattn
from kvattn import layers
from kvattn import numpy as kv
from kvattn.kernels.numpy import tiled
from kvattn.layers.analytic import parts

pytestmark = pytest.mark.skipif("numpy" not in chosen(), reason="KVATTN_CONFORMANCE names other backends only")

RNG = np.random.default_rng(0)
LENS = np.array([5, 2])
Q, K, V = (RNG.normal(size=shape) for shape in ((2, 4, 8), (2, 6, 8), (2, 6, 3)))
OTHER, X, Y = (RNG.normal(size=shape) for shape in ((2, 6, 7), (2, 5, 8), (2, 5, 8)))
TOKENS = RNG.integers(0, 11, (2, 5))
BLOCK = {"num_hiddens": 8, "ffn_num_hiddens": 6, "num_heads": 4}
MASKED = {"mask": RNG.random((4, 6)) < 0.7, "bias": RNG.normal(size=(4, 6)), "softcap": 2.0}

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 2}
CASES = {  # (layer, configuration, inputs, options)
    "dot product": ("DotProductAttention", {}, (Q, K, V, LENS), {}),
    "mask, bias, softcap": ("DotProductAttention", {}, (Q, K, V), MASKED),
    "additive": ("AdditiveAttention", {"num_hiddens": 5}, (Q, OTHER, V, LENS), {}),
    "multiplicative": ("MultiplicativeAttention", {}, (Q, OTHER, V), {"window": (3, 1)}),
    "gated": ("GatedAttention", {}, (Q, K, V, np.array([[1, 2, 3, 4], [0, 6, 6, 2]])), {}),
    "heads": ("MultiHeadAttention", {"num_hiddens": 12, "num_heads": 6, "bias": True}, (Q, K, V, LENS), {}),
    "grouped heads": (
        "MultiHeadAttention", {"num_hiddens": 12, "num_heads": 6, "num_kv_heads": 2}, (Q, OTHER, V), {"causal": True},
    ),
    "rotary": (
        "MultiHeadAttention", {"num_hiddens": 12, "num_heads": 6, "num_kv_heads": 2, "rotary": True}, (Q, OTHER, V),
        {"causal": True, "query_offset": 2},
    ),
    "rotary, stretched": (
        "MultiHeadAttention", {"num_hiddens": 12, "num_heads": 3, "rotary": {"scaling": DYNAMIC}}, (Q, K, V), {},
    ),
    "positions": ("PositionalEncoding", {"num_hiddens": 8}, (X,), {"offset": 3}),
    "add and norm": ("AddNorm", {"norm_shape": 8}, (X, Y), {}),
    "norm over two axes": ("AddNorm", {"norm_shape": (5, 8)}, (X, Y), {}),
    "relu": ("PositionWiseFFN", {"ffn_num_hiddens": 6, "ffn_num_outputs": 4}, (X,), {}),
    "gelu": ("PositionWiseFFN", {"ffn_num_hiddens": 6, "ffn_num_outputs": 4, "activation": "gelu"}, (3 * X,), {}),
    "block": ("TransformerEncoderBlock", {**BLOCK, "use_bias": True, "activation": "gelu"}, (X, LENS), {}),
    "encoder": ("TransformerEncoder", {**BLOCK, "vocab_size": 11, "num_blks": 2}, (TOKENS, LENS), {"causal": True}),
    "dense": ("Dense", {"units": 3}, (X,), {}),
    "dropout": ("Dropout", {}, (X,), {}),
}  # fmt: skip


def cast(x, dtype):
    return x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


def made(case, dtype="float64"):
    """(layer, inputs, options) of a case, its weights of this dtype and away from their first values."""
    name, config, inputs, options = CASES[case]
    inputs, options = [cast(x, dtype) for x in inputs], {key: cast(x, dtype) for key, x in options.items()}
    layer, rng = getattr(kv, name)(**config), np.random.default_rng(3)
    layer(*inputs, **options)
    shaken = {key: (x + rng.normal(size=x.shape) / 4).astype(dtype) for key, x in kv.export_weights(layer).items()}
    return kv.import_weights(getattr(kv, name)(**config), shaken), inputs, options


def dropouts(layer, rate, seed=5):
    """The layer, with every dropout in it at this rate and drawing from one new generator."""
    rng = np.random.default_rng(seed)
    for _, part in parts(layer):
        if isinstance(part, kv.Dropout):
            part.rate, part.rng = rate, rng
    return layer


def listed(x):
    return list(x) if isinstance(x, tuple) else [x]


def assert_gradient(found, function, x, name, step=1e-6):
    """In some directions ``found`` is d function / d x, by central differences; x is written to, and put back."""
    value = x.copy()
    for seed in range(4):
        direction = np.random.default_rng(seed).normal(size=x.shape)
        values = []
        for sign in (1, -1):
            x[...] = value + sign * step * direction
            values.append(function())
        x[...] = value
        np.testing.assert_allclose((found * direction).sum(), (values[0] - values[1]) / (2 * step), 1e-6, 1e-6, err_msg=name)


def assert_gradients(layer, call, inputs):
    """backward's gradients by the inputs and the weights are those of call()."""
    grad_output = np.random.default_rng(9).normal(size=call().shape)
    call(record=True)
    found = dict(zip((f"input {i}" for i in range(len(inputs))), listed(layer.backward(grad_output)), strict=True))
    assert set(layer.grads) == set(layer.weights())
    sources = dict(zip(found, inputs, strict=True)) | layer.weights()
    for name, grad in (found | layer.grads).items():
        assert_gradient(grad, lambda: (grad_output * call()).sum(), sources[name], name)


# ---- gradients


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_central_differences(case, rate):
    layer, inputs, options = made(case)

    def call(record=False):
        return dropouts(layer, rate)(*inputs, training=rate > 0, record=record, **options)

    assert_gradients(layer, call, [x for x in inputs if x.dtype.kind == "f"])


@pytest.mark.parametrize("asked", [{}, {"return_weights": True}, {"return_weights": True, "return_lse": True}])
@pytest.mark.parametrize("options", [{}, {"window": (20, 0)}, {"positions": RNG.integers(-1, 600, (600, 4))}])
def test_backward_drops_the_weights_that_the_call_dropped(options, asked):
    """At a length where windows are computed in blocks: the gradient by the values is linear in what was kept."""
    q, k, v = (RNG.normal(size=(1, 600, 2)) for _ in range(3))
    layer = kv.DotProductAttention(0.5, rng=0)
    output, *rest = listed(layer(q, k, v, training=True, **options, **asked))
    grad = RNG.normal(size=output.shape)
    by_values = layer.backward(grad)[2]
    np.testing.assert_allclose((by_values * v).sum(), (grad * output).sum())  # output is linear in v
    plain = kvattn.attention(q, k, v, **options, **asked)
    for shown, expected in zip(rest, listed(plain)[1:], strict=True):  # before dropout
        np.testing.assert_allclose(shown, expected)


@pytest.mark.parametrize("case", [case for case, (name, *_) in CASES.items() if name in layers.LAYERS])
def test_pytorch_has_the_same_outputs_weights_and_gradients(backend, case):
    """In float64, where what two programs round differently is far below what a wrong formula changes, on every machine."""
    if backend == "torch":
        adapter = importlib.import_module("adapters.torch")
        name, config, *_ = CASES[case]
        layer, inputs, options = made(case)
        weights = kv.export_weights(layer)
        layer = kv.import_weights(getattr(kv, name)(**config), weights)
        other = adapter.load(adapter.layer(name, **config).double(), weights)
        output = layer(*inputs, record=True, **options)
        assert_same(output, adapter.call(other, *inputs, **options), "output")
        if name.endswith("Attention"):
            assert_same(getattr(layer, "attention", layer).attention_weights, adapter.shown(other), "weights")
        grad_output = np.random.default_rng(9).normal(size=output.shape)
        by_inputs, by_weights = adapter.gradients(other, inputs, grad_output, **options)
        for i, (found, expected) in enumerate(zip(listed(layer.backward(grad_output)), by_inputs, strict=True)):
            assert_same(found, expected, f"input {i}")
        assert set(layer.grads) == set(by_weights)
        for key, expected in by_weights.items():
            assert_same(layer.grads[key], expected, key)


def assert_same(found, expected, name):
    """float64 both: a sum of a few numbers of size 1 is exact to 1e-15, and a layer norm over little divides that by little."""
    assert found.dtype == expected.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10, err_msg=name)


# ---- what a call keeps


def test_a_call_out_of_training_keeps_nothing_for_backward():
    layer, x = kv.PositionWiseFFN(4096, 8), np.ones((1, 512, 8), np.float32)
    hidden = 512 * 4096 * 4  # bytes
    layer(x)
    tracemalloc.start()
    try:
        layer(x)
        assert tracemalloc.get_traced_memory()[0] < hidden / 8
        with pytest.raises(RuntimeError, match="PositionWiseFFN kept nothing for backward: call it first with training=True"):
            layer.backward(x)
        layer(x, training=True)
        assert tracemalloc.get_traced_memory()[0] > hidden
        layer.backward(x)
        assert tracemalloc.get_traced_memory()[0] < hidden
    finally:
        tracemalloc.stop()


def test_one_call_serves_one_backward():
    layer = kv.Dense(2)
    layer.backward(layer(X, training=True)[..., :])
    with pytest.raises(RuntimeError, match="once for each backward"):
        layer.backward(np.ones((2, 5, 2)))
    layer(X, training=True)
    layer(X)  # the last call is not recorded
    with pytest.raises(RuntimeError, match="kept nothing"):
        layer.backward(np.ones((2, 5, 2)))


def test_a_trained_layer_is_copied():
    layer = kv.TransformerEncoder(**BLOCK, vocab_size=11, num_blks=1, dropout=0.5)
    layer.backward(np.ones_like(layer(TOKENS, LENS, training=True)))
    kv.Adam(layer).step()
    output = layer(TOKENS, LENS)
    other = copy.deepcopy(layer)
    np.testing.assert_array_equal(other.attention_weights[0], layer.attention_weights[0])
    for x in layer.weights().values():
        x[...] = 0
    np.testing.assert_array_equal(other(TOKENS, LENS), output)


# ---- a layer's own behaviour


def test_the_first_call_makes_the_weights_in_its_dtype_and_every_call_computes_in_its_own():
    wide, narrow = kv.Dense(3, seed=1), kv.Dense(3, seed=1)
    assert wide(X).dtype == wide.weights()["W"].dtype == np.float64
    assert narrow(X.astype("float32")).dtype == narrow.weights()["W"].dtype == np.float32
    np.testing.assert_array_equal(narrow(X), wide(X))  # seed= draws float32 numbers
    narrow.backward(narrow(X, training=True))
    assert narrow.grads["W"].dtype == np.float32


def test_seeds_and_generators_draw_first_values_and_dropout():
    config = {**BLOCK, "vocab_size": 11, "num_blks": 1, "dropout": 0.5}
    first, again, other = (kv.TransformerEncoder(**config, rng=seed) for seed in (1, np.random.default_rng(1), 2))
    calls = [layer(TOKENS, training=True) for layer in (first, again, other)]
    np.testing.assert_array_equal(calls[0], calls[1])
    assert np.abs(calls[0] - calls[2]).max() > 0.1
    assert np.abs(calls[0] - first(TOKENS, training=True)).max() > 0.1  # the next call drops others
    a, b = kv.TransformerEncoder(**config, seed=3), kv.TransformerEncoder(**config, seed=3)
    np.testing.assert_array_equal(a(TOKENS), b(TOKENS))
    layer = kv.DotProductAttention(0.5)
    drawn = [layer(Q, K, V, training=True, rng=np.random.default_rng(7)) for _ in range(2)]
    np.testing.assert_array_equal(*drawn)


class Decoder(kv.Layer):
    """A user's model: no super().__init__(), parts in lists and dicts too, one called twice, a weight of its own."""

    def __init__(self):
        self.tokens = kv.Embedding(11, 8, seed=0)
        self.blks = [kv.TransformerEncoderBlock(8, 6, 2, 0.1, seed=1)]
        self.cross = kv.MultiHeadAttention(8, 2, seed=2)
        self.ln = kv.LayerNorm()
        self.heads = {"left": kv.Dense(8, seed=3)}
        self.w_v = kv.Dense(1, bias=False, seed=4)
        self.parameter("scale", (None,), seed=5)

    def forward(self, tokens, memory, training=False):
        assert training == self.training
        X = self.blks[0](self.tokens(tokens), causal=True)
        X = self.cross(X, keys=memory, values=memory)
        X = np.tanh(self.ln(self.heads["left"](self.heads["left"](X))))
        scale = self.weight("scale", X.shape[-1:], X.dtype)
        self.keep(X, scale)
        return self.w_v(X * scale)

    def vjp(self, grad, X, scale):
        grad = self.w_v.backward(grad)
        self.gradient("scale", (grad * X).sum(axis=(0, 1)))
        grad = self.ln.backward(grad * scale * (1 - X * X))
        left = self.heads["left"]
        grad, keys, values = self.cross.backward(left.backward(left.backward(grad)))
        self.tokens.backward(self.blks[0].backward(grad))
        return keys + values


def decoder(dtype="float64"):
    model = Decoder()
    model(TOKENS, X.astype("float32"))
    return kv.import_weights(Decoder(), {name: x.astype(dtype) for name, x in kv.export_weights(model).items()})


def test_a_model_of_layers_is_a_layer():
    model = decoder()
    assert_gradients(model, lambda record=False: model(TOKENS, X, record=record), [X])
    shapes = {name: x.shape for name, x in kv.export_weights(model).items()}
    block = [name for name in shapes if name.startswith("blocks.0.")]
    assert "blocks.0.attention.W_q" in block
    assert {name: shapes[name] for name in shapes if name not in block} == {
        "tokens": (11, 8), **{f"cross.W_{c}": (8, 8) for c in "qkvo"}, "gamma": (8,), "beta": (8,),
        "heads.left.W": (8, 8), "heads.left.b": (8,), "w_v": (8,), "scale": (8,),
    }  # fmt: skip
    assert model(TOKENS, X, training=True).shape == (2, 5, 1)


def test_a_model_learns_in_place():
    model = decoder("float32")
    weights = model.weights()
    before = {name: x.copy() for name, x in weights.items()}
    model.backward(np.ones_like(model(TOKENS, X.astype("float32"), training=True)))
    kv.SGD(model, 0.1).step()
    for name, x in kv.export_weights(model).items():
        np.testing.assert_array_equal(x, weights[name], err_msg=name)
        np.testing.assert_allclose(x, before[name] - np.float32(0.1) * model.grads[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_gradients_are_of_the_last_call_alone():
    class Either(kv.Layer):
        def __init__(self):
            self.a, self.b = kv.Dense(2, seed=0), kv.Dense(2, seed=1)

        def forward(self, x, first):
            self.keep(first)
            return (self.a if first else self.b)(x)

        def vjp(self, grad, first):
            return (self.a if first else self.b).backward(grad)

    model = Either()
    for first, reached in ((True, {"a.W", "a.b"}), (False, {"b.W", "b.b"})):
        model.backward(model(X, first, training=True))
        assert set(model.grads) == reached


def test_a_part_with_two_names_has_one_weight():
    class Tied(kv.Layer):
        def __init__(self):
            self.a = self.b = kv.Dense(8, seed=0)

        def forward(self, x):
            return self.b(self.a(x))

        def vjp(self, grad):
            return self.a.backward(self.b.backward(grad))

    model = Tied()
    assert_gradients(model, lambda record=False: model(X, record=record), [X])
    assert set(model.weights()) == {"a.W", "a.b"}


def test_dropout_divides_what_it_keeps_by_its_share():
    layer, x = kv.Dropout(0.2, rng=0), np.ones((100, 100), np.float32)
    assert layer(x) is x
    dropped = layer(x, training=True)
    np.testing.assert_array_equal(np.unique(dropped), np.float32([0, 1.25]))
    assert abs(dropped.mean() - 1) < 0.02
    np.testing.assert_array_equal(layer.backward(x), dropped)


def test_parts_take_their_mode_from_the_call_around_them():
    modes = []

    class Part(kv.Layer):
        def forward(self, x):
            modes.append(self.training)
            return x

    class Whole(kv.Layer):
        def __init__(self):
            self.part = Part()

        def forward(self, x):
            return self.part(self.part(x), training=False)

    Whole()(X, training=True)
    Whole()(X)
    assert modes == [True, False, False, False]
    with pytest.raises(TypeError, match="training must be True or False, not 1"):
        Whole()(X, training=1)


@pytest.mark.parametrize("dtype", ["float16", *(["bfloat16"] if importlib.util.find_spec("ml_dtypes") else [])])
@pytest.mark.parametrize("case", [case for case in CASES if case != "encoder"])
def test_half_precision_is_float32_inside(case, dtype):
    layer, inputs, options = made(case, "float32")
    dtype = np.dtype(dtype if dtype == "float16" else importlib.import_module("ml_dtypes").bfloat16)
    halves, half_options = [cast(x, dtype) for x in inputs], {key: cast(x, dtype) for key, x in options.items()}
    output = layer(*halves, record=True, **half_options)
    assert output.dtype == dtype
    grad_output = np.ones_like(output)
    found = listed(layer.backward(grad_output))
    wide = {key: x.astype("float32") if getattr(x, "dtype", None) == dtype else x for key, x in half_options.items()}
    expected = layer(*(x.astype("float32") if x.dtype == dtype else x for x in halves), record=True, **wide)
    np.testing.assert_array_equal(output, expected.astype(dtype))
    for x, grad in zip(found, listed(layer.backward(grad_output.astype("float32"))), strict=True):
        assert x.dtype == dtype
        np.testing.assert_array_equal(x, grad.astype(dtype))


def test_half_precision_weights_lse_and_caches():
    layer, x = kv.MultiHeadAttention(8, 2), X.astype("float16")
    output, weights, lse, cache = layer(x, x, x, return_weights=True, return_lse=True, cache=kv.KVCache(), causal=True)
    assert (output.dtype, weights.dtype, lse.dtype, cache.key.dtype) == ("float16", "float16", "float32", "float32")
    again, cache = layer(x, x, x, cache=cache, causal=True)
    assert again.dtype == "float16"
    assert cache.length == 10


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 2}


@pytest.mark.parametrize("place", [{}, {"rotary": True}, {"rotary": {"scaling": DYNAMIC}}, {"alibi": True}])
def test_numpy_layers_stay_numpys_whatever_backend_is_chosen(backend, place):
    layer = kv.TransformerEncoder(**BLOCK, vocab_size=11, num_blks=1, seed=0, **place)
    with kvattn.use_backend(backend):
        output, caches = layer(TOKENS, causal=True, cache=[])
        again, caches = layer(TOKENS, causal=True, cache=caches)
        grad = layer.backward(layer(TOKENS, LENS, training=True))
        shown = layer.attention_weights[0]
    assert {type(x) for x in (output, again, caches[0].key, shown)} == {np.ndarray}
    assert grad == ()


def test_arrays_go_in_by_name_and_as_lists():
    layer = kv.DotProductAttention()
    expected = layer(Q, K, V, LENS)
    np.testing.assert_array_equal(layer(Q, keys=K, values=V, valid_lens=LENS), expected)
    np.testing.assert_array_equal(layer(Q.tolist(), K.tolist(), V.tolist(), [5, 2]), expected)
    layer(Q, keys=K, values=V, training=True)
    assert [x.shape for x in layer.backward(np.ones((2, 4, 3)))] == [Q.shape, K.shape, V.shape]
    narrow = Q.astype("float32")
    assert layer(narrow, K.tolist(), V.tolist()).dtype == np.float32


ERRORS = {
    "integers": (lambda: kv.Dense(2)(TOKENS), TypeError, "X has dtype int64; expected floating point"),
    "mixed": (lambda: kv.AddNorm()(X, Y.astype("float32")), TypeError, "Y has dtype float32 but X has float64"),
    "mixed halves": (
        lambda: kv.DotProductAttention()(Q.astype("float16"), K.astype("float32"), V.astype("float32")), TypeError,
        "keys has dtype float32 but queries has float16",
    ),
    "mixed options": (
        lambda: kv.DotProductAttention()(Q.astype("float16"), K.astype("float16"), V.astype("float16"), bias=Q[:, :, :6]),
        TypeError, "bias has dtype float64 but queries has float16",
    ),
    "features": (lambda: imported()(X[..., :5]), ValueError, r"Dense's W has shape \(8, 2\); expected \(5, 2\)"),
    "declared": (lambda: kv.AddNorm(4)(X, Y), ValueError, r"gamma was declared \(4,\); these inputs need \(8,\)"),
    "dropout as norm_shape": (lambda: kv.AddNorm(0.5), TypeError, "norm_shape must be an int, .* not 0.5; dropout comes after"),
    "broadcast": (lambda: kv.AddNorm()(X, Y[:1]), ValueError, r"Y has shape \(1, 5, 8\); expected \(2, 5, 8\)"),
    "rate": (lambda: kv.DotProductAttention(1.0), ValueError, r"dropout must be in \[0, 1\), not 1.0"),
    "activation": (lambda: kv.PositionWiseFFN(2, 2, activation="tanh"), ValueError, "'relu' or 'gelu', not 'tanh'"),
    "heads": (lambda: kv.MultiHeadAttention(10, 4), ValueError, "num_hiddens is 10, no multiple of num_heads, 4"),
    "float tokens": (lambda: kv.Embedding(3, 2)(X), TypeError, "tokens have dtype float64; expected an integer dtype"),
    "token outside": (lambda: kv.Embedding(3, 2)([[0, -1]]), ValueError, r"tokens must lie in \[0, 3\); got -1 to 0"),
    "score": (lambda: kv.DotProductAttention()(Q, K, V, score=kv.dot_score), TypeError, "multiple values .*'score'"),
    "float lengths": (lambda: kv.DotProductAttention()(Q, K, V, LENS + 0.5), TypeError, "valid_lens has dtype float64"),
    "negative lengths": (lambda: kv.DotProductAttention()(Q, K, V, -LENS), ValueError, "valid_lens must not be negative"),
    "grad's shape": (lambda: recorded().backward(X), ValueError, r"grad_output has shape \(2, 5, 8\); expected \(2, 5, 2\)"),
    "grad's dtype": (
        lambda: recorded().backward(np.ones((2, 5, 2), np.float32)), TypeError, "grad_output has dtype float32 but the output",
    ),
    "cache": (lambda: cached().backward(X), RuntimeError, "a call with a cache has no backward"),
    "exporting early": (
        lambda: kv.export_weights(kv.Dense(2)), ValueError, "no values yet for W, b: call the layer once",
    ),
    "no vjp": (lambda: forward_only().backward(X), NotImplementedError, "Forward has no vjp, so no gradients"),
    "labels": (lambda: kv.softmax_cross_entropy(X, TOKENS), ValueError, r"labels must lie in \[0, 8\); got 2 to 9"),
    "float labels": (lambda: kv.softmax_cross_entropy(X, X[..., 0]), TypeError, "labels have dtype float64"),
    "labels' shape": (lambda: kv.softmax_cross_entropy(X, TOKENS[:1]), ValueError, r"labels has shape \(1, 5\); expected"),
    "no labels": (lambda: kv.softmax_cross_entropy(X[:0], TOKENS[:0]), ValueError, "no labels"),
}  # fmt: skip


def imported():
    return kv.import_weights(kv.Dense(2), {"W": np.ones((8, 2)), "b": np.ones(2)})


def recorded():
    layer = kv.Dense(2)
    layer(X, training=True)
    return layer


def cached():
    layer = kv.MultiHeadAttention(8, 2)
    _, cache = layer(X, X, X, cache=kv.KVCache())
    layer(X, X, X, cache=cache, training=True)
    return layer


def test_the_first_call_with_a_cache_has_the_backward_of_one_without():
    grad, layer = RNG.normal(size=X.shape), kv.MultiHeadAttention(8, 2, seed=1, rotary=True)
    layer(X, X, X, causal=True, training=True)
    expected = layer.backward(grad)
    layer(X, X, X, cache=kv.KVCache(), causal=True, training=True)
    for found, other in zip(layer.backward(grad), expected, strict=True):
        np.testing.assert_allclose(found, other, rtol=0, atol=1e-12)


def forward_only():
    class Forward(kv.Layer):
        def forward(self, x):
            return x

    layer = Forward()
    layer(X, training=True)
    return layer


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_was_wrong(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()


def test_another_frameworks_arrays_are_refused(backend, tab):
    if backend != "numpy":
        with pytest.raises(TypeError, match=f"X is an array of {backend} but backend='numpy'; convert it first"):
            kv.Dense(2)(tab.asarray(X))


# ---- weights


def test_imported_weights_go_into_the_arrays_that_are_there():
    layer = kv.Dense(2)
    layer(X.astype("float32"))
    there = layer.weights()["W"]
    kv.import_weights(layer, {"W": np.full((8, 2), 2.0), "b": np.zeros(2)})
    assert there.dtype == np.float32
    assert (there == 2).all()
    exported = kv.export_weights(layer)
    exported["W"][...] = 0
    assert (there == 2).all()


def test_first_values_from_a_generator_have_the_same_distribution():
    layer = kv.PositionWiseFFN(300, 100, rng=0)
    layer(np.zeros((1, 2, 100)))
    bound = layers.glorot((100, 300))
    assert np.abs(layer.weights()["W_1"]).max() <= bound
    assert abs(layer.weights()["W_1"].std() - bound / np.sqrt(3)) < bound / 100


# ---- what trains


def test_cross_entropy_and_its_gradient():
    logits, labels = 3 * X.copy(), TOKENS % 8
    loss, grad = kv.softmax_cross_entropy(logits, labels)
    chances = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    assert loss == pytest.approx(-np.log(np.take_along_axis(chances, labels[..., None], axis=-1)).mean())
    assert_gradient(grad, lambda: kv.softmax_cross_entropy(logits, labels)[0], logits, "logits")
    loss, grad = kv.softmax_cross_entropy(np.array([[1e4, 0.0]], "float16"), [1])
    assert (loss, grad.dtype) == (1e4, "float16")
    np.testing.assert_array_equal(grad, [[1, -1]])


@pytest.mark.parametrize("make", [kv.SGD, kv.Adam])
def test_optimisers_take_pytorchs_steps(backend, make):
    if backend == "torch":
        import torch

        layer, x = kv.Dense(3, seed=0), X.astype("float32")
        layer(x)
        there = {name: torch.tensor(w) for name, w in layer.weights().items()}
        here, other = make(layer, 0.1), getattr(torch.optim, make.__name__)(list(there.values()), 0.1)
        for _ in range(20):
            layer.backward(layer(x, training=True) / 10)  # of sum(output ** 2) / 20
            for name, w in there.items():
                w.grad = torch.tensor(layer.grads[name])
            here.step()
            other.step()
            for name, w in there.items():
                assert_near(layer.weights()[name], w.numpy())


def test_optimisers_leave_weights_that_backward_did_not_reach():
    layer, x = kv.Dense(3, seed=0), X.astype("float32")
    layer(x)
    before = kv.export_weights(layer)
    for make in (kv.SGD, kv.Adam):
        make(layer, 0.1).step()
    np.testing.assert_array_equal(layer.weights()["W"], before["W"])
    layer.backward(layer(x, training=True))
    kv.Adam(layer, 0.1).step()  # the first step is lr along the sign of the gradient
    np.testing.assert_allclose(layer.weights()["W"], before["W"] - 0.1 * np.sign(layer.grads["W"]), atol=1e-5)


# ---- as lessons have it


def test_calls_as_in_the_chapters():
    """d2l has no NumPy tab: its PyTorch tab's calls, without .eval()."""
    d2l = kv
    queries, keys = d2l.normal(0, 1, (2, 1, 2)), d2l.normal(0, 1, (2, 10, 2))
    values, valid_lens = d2l.normal(0, 1, (2, 10, 4)), d2l.tensor([2, 6])
    attention = d2l.DotProductAttention(dropout=0.5)
    d2l.check_shape(attention(queries, keys, values, valid_lens), (2, 1, 4))
    assert d2l.reshape(attention.attention_weights, (1, 1, 2, 10)).shape == (1, 1, 2, 10)
    attention = d2l.AdditiveAttention(num_hiddens=8, dropout=0.1)
    d2l.check_shape(attention(d2l.normal(0, 1, (2, 1, 20)), keys, values, valid_lens), (2, 1, 4))

    attention = d2l.MultiHeadAttention(100, 5, 0.5)
    X, Y = d2l.ones((2, 4, 100)), d2l.ones((2, 6, 100))
    d2l.check_shape(attention(X, Y, Y, d2l.tensor([3, 2])), (2, 4, 100))
    d2l.check_shape(attention.attention.attention_weights, (10, 4, 6))

    encoding = d2l.PositionalEncoding(32, 0)
    X = encoding(d2l.zeros((1, 60, 32)))
    np.testing.assert_array_equal(encoding.P[:, : X.shape[1], :], X)

    assert d2l.PositionWiseFFN(4, 8)(d2l.ones((2, 3, 4)))[0].shape == (3, 8)
    d2l.check_shape(d2l.AddNorm(4, 0.5)(d2l.ones((2, 3, 4)), d2l.ones((2, 3, 4))), (2, 3, 4))
    X = d2l.ones((2, 100, 24))
    d2l.check_shape(d2l.TransformerEncoderBlock(24, 48, 8, 0.5)(X, d2l.tensor([3, 2])), X.shape)
    encoder = d2l.TransformerEncoder(200, 24, 48, 8, 2, 0.5)
    d2l.check_shape(encoder(d2l.ones((2, 100), dtype=d2l.int64), d2l.tensor([3, 2])), (2, 100, 24))
    d2l.check_shape(d2l.concat(encoder.attention_weights, 0), (32, 100, 100))


def test_short_names_have_their_numpy_meaning():
    x = kv.tensor([[1.0, 2.0]])
    assert type(kv.numpy(x)) is np.ndarray
    assert kv.to(x, "cpu") is x
    assert kv.astype(x, kv.float32).dtype == np.float32
    assert (kv.size(x), kv.transpose(x).shape, kv.reshape(x, 2, 1).shape, kv.reshape(x, (2, 1)).shape) == (2, *[(2, 1)] * 3)
    assert (kv.reduce_sum(x), kv.reduce_mean(x, 1, keepdims=True).shape) == (3, (1, 1))
    assert kv.concat([x, x], 0).shape == kv.repeat(x, 2, 0).shape == (2, 2)
    np.testing.assert_allclose(kv.sigmoid([-1e4, 0.0, 1e4]), [0, 0.5, 1])
    np.random.seed(3)
    drawn = [kv.rand(2), kv.randn(2), kv.normal(0, 1, (2,)), kv.get_key()]
    np.random.seed(3)
    for x, again in zip(drawn, [np.random.rand(2), np.random.randn(2), np.random.normal(0, 1, 2), kv.get_key()], strict=True):
        np.testing.assert_array_equal(x, again)


def test_the_namespace_has_what_pytorchs_has(backend):
    names = [
        "abs", "arange", "astype", "check_shape", "concat", "exp", "eye", "float32", "get_key", "normal", "numpy", "ones",
        "plt", "rand", "randn", "reduce_sum", "reshape", "sin", "tensor", "transpose", "use_svg_display", "zeros", "plot",
        "show_heatmaps", "attention", "export_weights",
    ]  # fmt: skip
    if backend == "torch":
        names += [name for name in vars(importlib.import_module("kvattn.torch")) if name[0] != "_" and name != "torch"]
    assert [name for name in [*names, *layers.LAYERS] if not hasattr(kv, name)] == []


def test_numpys_bools_say_whether_queries_and_keys_are_normed():
    assert [layers.check_qk_norm(x) for x in (np.True_, np.False_, True, False)] == [1e-6, None, 1e-6, None]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "sink": np.ones(2)}, {"return_lse": True}, {"return_weights": True}], ids=str
)
def test_backward_computes_no_attention_again_that_forward_gave(options, dropout, monkeypatch):
    given = np.random.default_rng(0).normal(size=(3, 1, 2, 512, 8))
    layer, pattern = kv.DotProductAttention(dropout), {"rng": 1} if dropout else {}
    results = layer(*given, training=True, **pattern, **options)
    output = results[0] if type(results) is tuple else results
    options = {name: x for name, x in options.items() if not name.startswith("return_")}
    expected = kvattn.attention_grad(*given, output, dropout=dropout, **pattern, **options)
    monkeypatch.setattr(tiled, "forward", lambda *_: pytest.fail("attention was computed again"))
    for grad, x in zip(layer.backward(output), expected, strict=True):
        assert_near(grad, x)
