"""Under torch.autocast, arrays of several dtypes meet: dense layers give half precision, weights and masks stay float32."""

from functools import partial

import numpy as np
import pytest
from conftest import chosen

if "torch" not in chosen():
    pytest.skip("this run is without PyTorch", allow_module_level=True)

import torch

import kvattn
from kvattn import torch as kv

RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal((2, 2, n, 4)).astype("float32") for n in (5, 7, 7))
BIAS, MASK = RNG.standard_normal((5, 7)).astype("float32"), RNG.random((5, 7)) < 0.8
X, W = RNG.standard_normal((2, 5, 8)).astype("float32"), RNG.standard_normal((4, 8, 8)).astype("float32")
PARAMS = dict(zip(("W_q", "W_k", "W_v", "W_o"), W, strict=True))
ADDITIVE = {"W_q": W[0, :4, :6], "W_k": W[1, :4, :6], "w_v": W[2, 0, :6]}
HALF = torch.bfloat16


def narrow(dtype=HALF):
    return torch.autocast("cpu", dtype)


def near(found, expected, dtype):
    assert found.dtype == dtype
    np.testing.assert_allclose(found.detach().float(), expected, rtol=0, atol=0.05 * max(1, abs(expected).max()))


@pytest.mark.parametrize("which", ["query", "key", "value", "bias", "all but bias", "query and bias"])
@pytest.mark.parametrize("options", [{}, {"mask": MASK}, {"softcap": 2.0}, {"normalize": kvattn.sparsemax}], ids=str)
@pytest.mark.parametrize("half", [HALF, torch.float16])
def test_attention_takes_arrays_of_several_dtypes_and_answers_in_the_querys(which, options, half):
    given = {"query": Q, "key": K, "value": V, "bias": BIAS}
    expected = kvattn.attention(Q, K, V, bias=BIAS, **options)
    given = {name: torch.tensor(x) for name, x in given.items()}
    narrowed = {"all but bias": ("query", "key", "value"), "query and bias": ("query", "bias")}.get(which, (which,))
    given |= {name: given[name].to(half) for name in narrowed}
    options = {name: torch.tensor(x) if name == "mask" else x for name, x in options.items()}
    with narrow(half):
        found = kvattn.attention(**given, **options)
    near(found, expected, given["query"].dtype)
    with pytest.raises(TypeError, match="convert one of them"):  # nor has it been forgotten
        kvattn.attention(**given, **options)


def test_without_a_bias_the_answer_is_not_remembered_as_a_call_of_one_dtype():
    given = torch.tensor(Q), torch.tensor(K).to(HALF), torch.tensor(V).to(HALF)
    with narrow():
        near(kvattn.attention(*given), kvattn.attention(Q, K, V), torch.float32)
    with pytest.raises(TypeError, match="key has dtype bfloat16 but query has float32"):
        kvattn.attention(*given)
    with narrow(), pytest.raises(TypeError, match="float64"):  # which autocast leaves alone
        kvattn.attention(given[0].double(), *given[1:])


def test_weights_of_scores_and_projections_may_be_float32():
    query, key, value, x = (torch.tensor(a).to(HALF) for a in (Q, K, V, X))
    params = {name: torch.tensor(a) for name, a in PARAMS.items()}
    expected = kvattn.attention(Q, K, V, score=partial(kvattn.additive_score, **ADDITIVE))
    with narrow():
        score = partial(kvattn.additive_score, **{name: torch.tensor(a) for name, a in ADDITIVE.items()})
        near(kvattn.attention(query, key, value, score=score), expected, HALF)
        near(kvattn.self_attention(x, *list(params.values())[:3]), kvattn.self_attention(X, *W[:3]), HALF)
        found = kvattn.multi_head_attention(x, x, x, params, num_heads=2, bias=torch.tensor(BIAS[:, :5]))
        near(found, kvattn.multi_head_attention(X, X, X, PARAMS, num_heads=2, bias=BIAS[:, :5]), HALF)
        near(kvattn.dot_score(query, key.float()), kvattn.dot_score(Q, K), HALF)


def test_gradients_come_in_the_dtype_of_their_arguments():
    grad, wrt = RNG.standard_normal(Q.shape).astype("float32"), ("query", "key", "value", "bias", "W_q")
    plain = {"bias": BIAS, "score": partial(kvattn.additive_score, **ADDITIVE), "wrt": wrt}
    expected = kvattn.attention_grad(Q, K, V, grad, **plain)
    score = partial(kvattn.additive_score, **{name: torch.tensor(a) for name, a in ADDITIVE.items()})
    given = [torch.tensor(a).to(dtype) for a, dtype in ((Q, HALF), (K, torch.float32), (V, HALF), (grad, torch.float32))]
    with narrow():
        found = kvattn.attention_grad(*given, bias=torch.tensor(BIAS), score=score, wrt=wrt)
    for x, y, dtype in zip(found, expected, (HALF, torch.float32, HALF, torch.float32, torch.float32), strict=True):
        near(x, y, dtype)
    wrt = ("query", "value", "W_q", "W_o")
    expected = kvattn.multi_head_attention_grad(X, X, X, PARAMS, X, num_heads=2, wrt=wrt)
    params, x = {name: torch.tensor(a) for name, a in PARAMS.items()}, torch.tensor(X)
    with narrow():
        found = kvattn.multi_head_attention_grad(x.to(HALF), x, x, params, x, num_heads=2, wrt=wrt)
    for x, y, dtype in zip(found, expected, (HALF, *[torch.float32] * 3), strict=True):
        near(x, y, dtype)


LAYERS = {
    "DotProductAttention": kv.DotProductAttention,
    "AdditiveAttention": partial(kv.AdditiveAttention, 6, seed=1),
    "MultiplicativeAttention": partial(kv.MultiplicativeAttention, seed=1),
    "GatedAttention": partial(kv.GatedAttention, seed=1),
    "MultiHeadAttention": partial(kv.MultiHeadAttention, 8, 2, seed=1),
    "TransformerEncoderBlock": partial(kv.TransformerEncoderBlock, 8, 16, 2, seed=1),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("given", [torch.float32, HALF], ids=str)
def test_a_layer_learns_a_float32_bias(name, given):
    """Its inputs come from a layer norm (float32 under autocast) or from a dense layer (half precision)."""
    layer, x, bias = LAYERS[name](), torch.tensor(X), torch.tensor(BIAS[:, :5], requires_grad=True)
    call = (lambda x: layer(x, bias=bias)) if name == "TransformerEncoderBlock" else (lambda x: layer(x, x, x, bias=bias))
    expected = call(x)
    (expected**2).sum().backward()
    gradients = [p.grad.clone() for p in (bias, *layer.parameters())]
    for p in (bias, *layer.parameters()):
        p.grad = None
    with narrow():
        found = call(x.to(given))
    (found.float() ** 2).sum().backward()
    assert not (found.detach().float() - expected.detach()).abs().max() > 0.1
    for p, expected in zip((bias, *layer.parameters()), gradients, strict=True):
        near(p.grad, expected, torch.float32)
    if name != "TransformerEncoderBlock":
        weights = layer.attention.attention_weights if name == "MultiHeadAttention" else layer.attention_weights
        torch.testing.assert_close(weights.float().sum(-1), torch.ones(weights.shape[:-1]), rtol=0, atol=0.05)


def test_a_cache_with_room_takes_what_autocast_gives_and_a_program_is_compiled():
    layer, x = kv.MultiHeadAttention(8, 2, seed=1).eval(), torch.tensor(X)
    expected = layer(x, x, x, causal=True).detach()
    with torch.no_grad(), narrow():
        cache, outputs = kvattn.KVCache.allocate((2, 2, 5, 4), backend="torch"), []
        for i in range(5):
            output, cache = layer(*[x[:, i : i + 1]] * 3, cache=cache, causal=True)
            outputs.append(output)
    assert cache.key.dtype == torch.float32
    near(torch.cat(outputs, dim=1), expected.numpy(), HALF)
    torch._dynamo.reset()
    program = torch.compile(lambda *args: kvattn.attention(*args[:3], bias=args[3]), fullgraph=True, backend="eager")
    with narrow():
        found = program(torch.tensor(Q).to(HALF), torch.tensor(K), torch.tensor(V).to(HALF), torch.tensor(BIAS))
    near(found, kvattn.attention(Q, K, V, bias=BIAS), HALF)


PARTS = {
    "MultiHeadAttention": ({"num_hiddens": 8, "num_heads": 2}, 3, "queries has dtype {} but the layer's weight has {}"),
    "AdditiveAttention": ({"num_hiddens": 4}, 3, None),  # once its weights are there, they are arguments of the score
    "PositionWiseFFN": ({"ffn_num_hiddens": 4, "ffn_num_outputs": 8}, 1, "X has dtype {} but the layer's weight has {}"),
    "TransformerEncoderBlock": (
        {"num_hiddens": 8, "ffn_num_hiddens": 4, "num_heads": 2}, 1, "queries has dtype {} but the layer's weight has {}"
    ),
    "AddNorm": ({"norm_shape": 8}, 2, "X has dtype {} but the layer's weight has {}"),
}  # fmt: skip


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_a_layer_names_an_input_of_another_dtype_than_its_weights(name, called):
    config, count, words = PARTS[name]
    layer, x = getattr(kv, name)(**config), torch.tensor(X)
    if called:
        layer(*[x] * count)
    for dtype in (torch.float64, torch.bfloat16):
        if name == "AddNorm" and dtype == torch.bfloat16:
            assert layer(x.to(dtype), x.to(dtype)).dtype == dtype  # as PyTorch's own norm
            continue
        told = (words or "{}").format(*[str(each)[6:] for each in (dtype, torch.float32)])
        with pytest.raises(TypeError, match=told if words else "has dtype .*; convert one of them"):
            layer(*[x.to(dtype)] * count)
        with narrow():
            if dtype == torch.bfloat16:
                layer(*[x.to(dtype)] * count)
            else:
                with pytest.raises(TypeError, match="float64"):
                    layer(*[x.to(dtype)] * count)
        layer = layer.to(dtype)
        assert layer(*[x.to(dtype)] * count).dtype == dtype
        layer = layer.float()


@pytest.mark.parametrize("name", [name for name in PARTS if name != "AddNorm"] + ["DotProductAttention"])
def test_a_layer_names_an_input_that_is_no_tensor(name):
    config, count, _ = PARTS.get(name, ({}, 3, None))
    layer, x = getattr(kv, name)(**config), torch.tensor(X)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"(queries|X) is of .*numpy.ndarray.* tensors: torch.as_tensor"):
            layer(*[x.numpy()] * count)
        layer(*[x] * count)


def test_a_part_that_converts_its_input_itself_is_not_asked():
    layer, x = kv.PositionWiseFFN(4, 8), torch.tensor(X)
    expected = layer(x)
    layer.dense1.register_forward_pre_hook(lambda part, given: tuple(x.float() for x in given))
    assert torch.equal(layer(x.double()), expected)


def test_a_norm_without_weights_takes_what_comes():
    layer, x = kv.AddNorm(8), torch.tensor(X)
    expected = layer(x, x)
    layer.ln = torch.nn.LayerNorm(8, elementwise_affine=False, eps=layer.ln.eps)
    assert torch.equal(layer(x, x), expected)
