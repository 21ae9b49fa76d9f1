"""Weights of the frameworks' own attention layers come into kvattn's, and reproduce the original's output."""

import importlib
import json

import numpy as np
import pytest
from conftest import chosen
from near import assert_near

import kvattn
from kvattn import layouts, weights

RNG = np.random.default_rng(0)
QUERY, MEMORY, OTHER = (RNG.normal(size=(2, n, d)).astype("float32") for n, d in ((3, 8), (5, 8), (5, 6)))


def torch_originals():
    import torch

    def run(layer, *inputs):
        with torch.no_grad():
            return layer(*map(torch.from_numpy, inputs), need_weights=False)[0].numpy()

    def random(**options):
        layer = torch.nn.MultiheadAttention(8, 4, batch_first=True, **options)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        return layer

    yield "packed", random(), run, (QUERY, MEMORY, MEMORY)
    yield "without biases", random(bias=False), run, (QUERY, MEMORY, MEMORY)
    yield "sizes of their own", random(kdim=6, vdim=8), run, (QUERY, OTHER, MEMORY)


def tensorflow_originals():
    import keras

    def run(layer, query, key, value):
        return np.asarray(layer(query, value, key))  # Keras' order

    def random(*inputs, **options):
        layer = keras.layers.MultiHeadAttention(4, 2, output_shape=8, **options)
        run(layer, *inputs)
        layer.set_weights([RNG.normal(size=x.shape).astype("float32") / 2 for x in layer.get_weights()])
        return layer

    yield "per head", random(QUERY, MEMORY, MEMORY), run, (QUERY, MEMORY, MEMORY)
    yield "without biases", random(QUERY, MEMORY, MEMORY, use_bias=False), run, (QUERY, MEMORY, MEMORY)
    yield "sizes of their own", random(QUERY, OTHER, MEMORY), run, (QUERY, OTHER, MEMORY)


def jax_originals():
    import jax
    from flax import linen, nnx

    def random(tree):
        return jax.tree.map(lambda x: jax.numpy.asarray(RNG.normal(size=x.shape), "float32") / 2, tree)

    for name, options in (("per head", {}), ("without biases", {"use_bias": False})):
        module = linen.MultiHeadDotProductAttention(num_heads=4, **options)
        variables = random(module.init(jax.random.key(0), QUERY, MEMORY, MEMORY))
        yield name, variables, lambda x, *inputs, module=module: np.asarray(module.apply(x, *inputs)), (QUERY, MEMORY, MEMORY)
        module = nnx.MultiHeadAttention(4, 8, decode=False, rngs=nnx.Rngs(0), **options)
        nnx.update(module, random(nnx.state(module, nnx.Param)))
        yield f"nnx {name}", module, lambda x, *inputs: np.asarray(x(*inputs)), (QUERY, MEMORY, MEMORY)


ORIGINALS = {"torch": torch_originals, "tensorflow": tensorflow_originals, "jax": jax_originals}


@pytest.fixture(params=[name for name in ORIGINALS if name in chosen()])
def originals(request):
    return list(ORIGINALS[request.param]())


def test_a_frameworks_own_layer_lives_on_in_kvattn(originals):
    for name, layer, run, inputs in originals:
        params = weights.export_weights(layer)
        got = kvattn.multi_head_attention(*inputs, params, num_heads=4)
        assert_near(got, run(layer, *inputs), name)


def test_and_takes_weights_back(originals):
    for name, layer, run, inputs in originals:
        moved = {n: x + 0.25 for n, x in weights.export_weights(layer).items()}
        layer = weights.import_weights(layer, moved)
        got = kvattn.multi_head_attention(*inputs, moved, num_heads=4)
        assert_near(got, run(layer, *inputs), name)


def test_in_every_backends_own_layer(originals, backend):
    adapter = importlib.import_module(f"adapters.{backend}")
    for name, layer, run, inputs in originals:
        params = weights.export_weights(layer)
        ours = adapter.load(adapter.layer("MultiHeadAttention", num_hiddens=8, num_heads=4, bias="b_q" in params), params)
        assert_near(adapter.call(ours, *inputs), run(layer, *inputs), name)


def test_a_stranger_is_refused_by_name():
    with pytest.raises(TypeError, match="not object"):
        weights.export_weights(object())


# ---- layouts of other libraries' checkpoints; tests/integrations has the models themselves


def _state(prefix="", **more):
    rng = np.random.default_rng(0)
    shapes = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8)}  # (out, in), as torch.nn.Linear keeps them
    return {f"{prefix}{c}_proj.weight": rng.normal(size=shape).astype("float32") for c, shape in shapes.items()} | more


def test_a_layout_is_the_same_in_every_framework(backend):
    kv = importlib.import_module(f"kvattn.{backend}")
    if backend == "mxnet":
        kv.mx.npx.set_np()
    layer = kv.MultiHeadAttention(num_hiddens=8, num_heads=4, num_kv_heads=2)
    if backend == "mxnet":
        layer.initialize()
    state = _state("model.layers.2.self_attn.", **{"lm_head.weight": np.zeros((3, 8), "float32")})
    made = kv.import_weights(layer, state, layout="llama", prefix="model.layers.2.self_attn")
    found = kv.export_weights(made)
    for c in "qkvo":
        np.testing.assert_array_equal(found[f"W_{c}"], state[f"model.layers.2.self_attn.{c}_proj.weight"].T)


def test_one_matrix_of_three_is_split():
    wide, bias = np.arange(48, dtype="float32").reshape(4, 12), np.arange(12, dtype="float32")
    state = {"c_attn.weight": wide, "c_attn.bias": bias, "c_proj.weight": np.eye(4, dtype="float32"), "c_proj.bias": bias[:4]}
    found = layouts.translated(state | {"bias": np.ones((1, 1, 9, 9))}, "gpt2")
    assert sorted(found) == ["W_k", "W_o", "W_q", "W_v", "b_k", "b_o", "b_q", "b_v"]
    np.testing.assert_array_equal(np.concatenate([found[f"W_{c}"] for c in "qkv"], axis=1), wide)
    np.testing.assert_array_equal(found["b_v"], bias[8:])


WRONG_STATES = {
    "a name that is missing": (
        {n: x for n, x in _state().items() if n[0] != "k"}, {}, ["no llama attention block", "missing: k_proj.weight"]),
    "a name that is left over": (_state(**{"g_proj.weight": np.ones(2)}), {}, ["left over: g_proj.weight", "nothing"]),
    "norms that the layer has not": (_state(**{"q_norm.weight": np.ones(2)}), {}, ["unknown: q_norm (2,)"]),
    "a model without a prefix": (
        _state("h.0.attn."), {}, ["missing: q_proj.weight", "left over: h.0.attn.q_proj.weight", "prefix=", "'h.0.attn'"]),
    "another block's prefix": (_state("h.0.attn."), {"prefix": "h.1.attn"}, ["missing: h.1.attn.q_proj.weight", "'h.0.attn'"]),
    "an unknown layout": (_state(), {"layout": "opt"}, ["layout must be one of", "'llama', 'gpt2', 'bert', 't5'", "'opt'"]),
    "a prefix without a layout": (_state(), {"layout": None, "prefix": "h.0"}, ["prefix is 'h.0', but no layout is given"]),
    "three that are no three": (
        {"c_attn.weight": np.ones((4, 8)), "c_proj.weight": np.ones((4, 4))}, {"layout": "gpt2"}, ["multiple of 3"]),
    "biases that the layer has not": (_state(**{"q_proj.bias": np.ones(8, "float32")}), {}, ["unknown: b_q (8,)"]),
    "heads of another size": (
        _state() | {"k_proj.weight": np.ones((8, 8), "float32")}, {}, ["W_k has shape (8, 8); expected (?, 4)"]),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_STATES)
def test_a_state_that_does_not_fit_is_told_by_the_models_names(what):
    from kvattn import numpy as kv

    state, options, words = WRONG_STATES[what]
    layer = kv.MultiHeadAttention(8, 4, num_kv_heads=2)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words are below)
        kv.import_weights(layer, state, **{"layout": "llama"} | options)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert layer.weights() == {}


@pytest.mark.parametrize("layout", [None, "llama"])
def test_weights_that_are_no_dict_are_told_so(layout):
    from kvattn import numpy as kv

    with pytest.raises(TypeError, match=r"weights must be a dict of arrays by name, not list: .* state_dict"):
        kv.import_weights(kv.MultiHeadAttention(8, 4), [np.ones((8, 8))], layout)


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_a_state_of_numbers_is_told_by_their_shapes(layout):
    from kvattn import numpy as kv

    names = layouts.LAYOUTS[layout].parts.values()
    with pytest.raises(ValueError, match=r"has shape \(\)"):
        kv.import_weights(kv.MultiHeadAttention(8, 4), {f"{name}.weight": np.array(1.0) for name in names}, layout)


def damaged(header, body=bytes(48)):
    """A file with this header."""
    header = header if isinstance(header, bytes) else json.dumps({"W": {"dtype": "F32", "shape": [3, 4], **header}}).encode()
    return len(header).to_bytes(8, "little") + header + body


WHOLE = damaged({"data_offsets": [0, 48]})
DAMAGED = {
    **{f"cut after {size}": WHOLE[:size] for size in (0, 7, 8, 30, len(WHOLE) - 1)},
    "a header that is longer than all": b"\xff" * 8 + b"{}",
    "a header that is a list": damaged(b"[]"),
    "a header of braces": damaged(b"{" * 5000),
    "a negative shape": damaged({"shape": [-3, -4], "data_offsets": [0, 48]}),
    "a shape that overflows": damaged({"shape": [2**62, 2**62], "data_offsets": [0, 48]}),
    "a shape of fractions": damaged({"shape": [1.5, 8], "data_offsets": [0, 48]}),
    "a dtype that is none": damaged({"dtype": "Q9", "data_offsets": [0, 48]}),
    "offsets beyond the end": damaged({"shape": [3, 400], "data_offsets": [0, 4800]}),
    "bytes after the last": WHOLE + b"more",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_a_value_error_that_names_it(tmp_path, content):
    (path := tmp_path / "w.safetensors").write_bytes(WHOLE)
    assert weights.load_weights(path)["W"].shape == (3, 4)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.safetensors is no \.safetensors file that can be read: "):
        weights.load_weights(path)


def test_a_file_that_is_not_there_or_a_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        weights.load_weights(tmp_path / "none.safetensors")
    with pytest.raises(IsADirectoryError):
        weights.load_weights(tmp_path)


# ---- the dtype of a layer that was never called is that of what is loaded


BIASED = {"num_hiddens": 8, "num_heads": 4, "bias": True, "qk_norm": True, "sink": True}
ENCODER = {"vocab_size": 11, "num_hiddens": 8, "ffn_num_hiddens": 12, "num_heads": 4, "num_blks": 1}
UNCALLED = [("MultiHeadAttention", BIASED), ("TransformerEncoder", ENCODER)]


def wide(name, config):
    """A layer's weights in float64, whose digits float32 has not."""
    from adapters import numpy as adapter

    layer = adapter.layer(name, **config)
    adapter.call(layer, *([np.array([[1, 2, 3]])] if name == "TransformerEncoder" else [QUERY] * 3))
    return {n: RNG.normal(size=x.shape) / 3 for n, x in weights.export_weights(layer).items()}


@pytest.mark.parametrize(("name", "config"), UNCALLED, ids=[name for name, _ in UNCALLED])
def test_float64_stays_in_a_layer_that_was_never_called(backend, name, config):
    adapter = importlib.import_module(f"adapters.{backend}")
    arrays = wide(name, config)
    layer = adapter.layer(name, **config)
    if backend == "tensorflow":  # whose layers have a dtype from the first
        with pytest.raises(TypeError, match=r"weights are float64, and this layer.*make the layer with dtype='float64'"):
            weights.import_weights(layer, arrays)
        with pytest.raises(ValueError, match="no values yet"):
            weights.export_weights(layer)
        layer = adapter.layer(name, **config, dtype="float64")
    if backend == "jax" and name == "TransformerEncoder":  # tokens do not tell that this is float64
        with pytest.raises(TypeError, match=r"weights are float64.*jax_enable_x64"):
            adapter.load(layer, arrays)
        return
    layer = adapter.load(layer, arrays)
    for n, x in adapter.weights(layer).items():
        assert x.dtype == np.float64, n
        np.testing.assert_array_equal(x, arrays[n], err_msg=n)
    if name == "MultiHeadAttention":
        inputs = [x.astype("float64") for x in (QUERY, MEMORY, MEMORY)]
        oracle = importlib.import_module("adapters.numpy").layer(name, **config)
        want = importlib.import_module("adapters.numpy").call(weights.import_weights(oracle, arrays), *inputs)
        got = adapter.call(layer, *(inputs if backend != "jax" else [kvattn.asarray(x, backend="jax") for x in inputs]))
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    else:
        adapter.call(layer, np.array([[1, 2, 3]]))


def test_a_layer_that_was_called_keeps_its_dtype(backend):
    adapter = importlib.import_module(f"adapters.{backend}")
    arrays = wide("MultiHeadAttention", BIASED)
    layer = adapter.layer("MultiHeadAttention", **BIASED)
    layer = adapter.load(layer, {n: np.zeros(x.shape, "float32") for n, x in arrays.items()})
    layer = adapter.load(layer, arrays)
    for n, x in adapter.weights(layer).items():
        assert x.dtype == np.float32, n
        np.testing.assert_array_equal(x, arrays[n].astype("float32"), err_msg=n)


def test_bfloat16_is_taken_as_float32_that_holds_it(backend):
    adapter = importlib.import_module(f"adapters.{backend}")
    arrays = wide("MultiHeadAttention", BIASED)
    if backend == "torch":
        import torch

        given = {n: torch.nn.Parameter(torch.tensor(x).bfloat16()) for n, x in arrays.items()}
        want = {n: x.detach().float().numpy() for n, x in given.items()}
    elif backend == "jax":
        import jax.numpy as jnp

        given = {n: jnp.asarray(x, "bfloat16") for n, x in arrays.items()}
        want = {n: np.asarray(x.astype("float32")) for n, x in given.items()}
    elif backend == "tensorflow":
        import tensorflow as tf

        given = {n: tf.cast(x, "bfloat16") for n, x in arrays.items()}
        want = {n: tf.cast(x, "float32").numpy() for n, x in given.items()}
    else:
        given = want = {n: x.astype("float16") for n, x in arrays.items()}
    layer = adapter.load(adapter.layer("MultiHeadAttention", **BIASED), given)
    for n, x in adapter.weights(layer).items():
        assert x.dtype == np.float32, n
        np.testing.assert_array_equal(x, want[n].astype("float32"), err_msg=n)


def test_a_file_of_bfloat16_is_read_as_float32(tmp_path):
    bits = np.array([0x3F80, 0xC040, 0x7F80], "<u2")  # 1, -3 and infinity
    header = json.dumps({
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]},
        "i": {"dtype": "I32", "shape": [1], "data_offsets": [6, 10]},
        "t": {"dtype": "BOOL", "shape": [2], "data_offsets": [10, 12]},
    }).encode()  # fmt: skip
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bits.tobytes() + np.array([7], "<i4").tobytes() + b"\x01\x00")
    found = weights.load_weights(path)
    assert {name: (x.dtype.name, x.tolist()) for name, x in found.items()} == {
        "b": ("float32", [1.0, -3.0, np.inf]), "i": ("int32", [7]), "t": ("bool", [True, False]),
    }  # fmt: skip
