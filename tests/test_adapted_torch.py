"""Layers whose children were changed by PyTorch's tools: what the children do then is what counts, not a weight of theirs."""

import copy
from functools import partial

import numpy as np
import pytest
from conftest import chosen

if "torch" not in chosen():
    pytest.skip("this run is without PyTorch", allow_module_level=True)

import torch
from torch import nn
from torch.nn.utils import parametrizations

import kvattn
from kvattn import torch as kv


class LoRA(nn.Module):
    """A dense layer beside a product of two small matrices; it has no weight of its own."""

    def __init__(self, dense):
        super().__init__()
        self.dense = dense
        self.A = nn.Parameter(torch.randn(dense.in_features, 2, generator=torch.manual_seed(3)))
        self.B = nn.Parameter(torch.randn(2, dense.out_features, generator=torch.manual_seed(4)))

    def forward(self, x):
        return self.dense(x) + x @ self.A @ self.B


def wrapped(layer, name):
    child = LoRA(getattr(layer, name))
    setattr(layer, name, child)
    return child.dense.weight.T + child.A @ child.B


def parametrized(layer, name):
    child = getattr(layer, name)
    parametrizations.weight_norm(child)
    with torch.no_grad():
        child.parametrizations.weight.original0.mul_(2)
    return child.weight.T


def hooked(layer, name):
    child = getattr(layer, name)
    child.register_forward_hook(lambda module, given, output: 3 * output)
    return 3 * child.weight.T


def before(layer, name):
    child = getattr(layer, name)
    child.register_forward_pre_hook(lambda module, given: (3 * given[0],))
    return 3 * child.weight.T


@pytest.mark.parametrize("change", [wrapped, parametrized, hooked, before])
@pytest.mark.parametrize("name", ["W_q", "W_k", "w_v"])
def test_additive_attention_does_what_its_children_do(change, name):
    x = torch.randn(2, 5, 4, generator=torch.manual_seed(0))
    layer = kv.AdditiveAttention(6, seed=1)
    layer(x, x, x)
    given = {which: getattr(layer, which).weight.T.detach().numpy() for which in ("W_q", "W_k", "w_v")}
    given[name] = change(layer, name).detach().numpy()
    hidden = (x.numpy() @ given["W_q"])[:, :, None] + (x.numpy() @ given["W_k"])[:, None]
    scores = (np.tanh(hidden) @ given["w_v"])[..., 0]
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    output = layer(x, x, x)
    np.testing.assert_allclose(output.detach(), weights @ x.numpy(), rtol=0, atol=1e-5)
    (output**2).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


class Bent(nn.Module):
    """A child that is not linear: what it does to the identity tells nothing."""

    def __init__(self, dense):
        super().__init__()
        self.dense = dense

    def forward(self, x):
        return torch.relu(self.dense(x)) + 0.5


@pytest.mark.parametrize("name", ["W_q", "W_k", "w_v"])
@pytest.mark.parametrize("mask", [False, True])
def test_additive_attention_calls_a_child_that_is_not_linear(name, mask):
    x = torch.randn(2, 5, 4, generator=torch.manual_seed(0))
    allowed = np.tril(np.ones((5, 5), bool)) if mask else np.ones((5, 5), bool)
    layer = kv.AdditiveAttention(6, seed=1)
    layer(x, x, x)
    setattr(layer, name, Bent(getattr(layer, name)))
    made = {}
    for which in ("W_q", "W_k", "w_v"):
        W = (getattr(layer, which).dense if which == name else getattr(layer, which)).weight.T.detach().numpy()
        made[which] = lambda y, W=W, bent=which == name: np.maximum(y @ W, 0) + 0.5 if bent else y @ W
    hidden = made["W_q"](x.numpy())[:, :, None] + made["W_k"](x.numpy())[:, None]
    weights = np.exp(made["w_v"](np.tanh(hidden))[..., 0]) * allowed
    weights /= weights.sum(-1, keepdims=True)
    output = layer(x, x, x, causal=mask)
    np.testing.assert_allclose(output.detach(), weights @ x.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(layer.attention_weights, weights, rtol=0, atol=1e-5)
    (output**2).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    torch.testing.assert_close(copy.deepcopy(layer)(x, x, x, causal=mask), output, rtol=0, atol=0)


def test_additive_attention_adds_the_bias_of_a_dense_child_put_in_its_place():
    x, layer = torch.randn(2, 5, 4, generator=torch.manual_seed(0)), kv.AdditiveAttention(6, seed=1)
    layer(x, x, x)
    weights = kv.export_weights(layer)
    layer.W_q = nn.Linear(4, 6)
    weights["W_q"] = layer.W_q.weight.T.detach().numpy()
    score = partial(kvattn.additive_score, **weights, b=layer.W_q.bias.detach().numpy())
    expected = kvattn.attention(*[x.numpy()] * 3, score=score, backend="numpy")
    np.testing.assert_allclose(layer(x, x, x).detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of quantized storage
@pytest.mark.parametrize("kind", ["AdditiveAttention", "MultiHeadAttention"])
def test_a_quantized_layer_is_near_its_original(kind):
    x = torch.randn(2, 5, 8, generator=torch.manual_seed(0))
    layer = kv.AdditiveAttention(6, seed=1) if kind == "AdditiveAttention" else kv.MultiHeadAttention(8, 2, seed=1)
    expected = layer(x, x, x).detach()
    quantized = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    # A step of 8 bits is 1 / 127 of the range. Which numbers are rounded up differs between processors; what all of them
    # lose together hardly does.
    assert (quantized(x, x, x) - expected).norm() < 0.05 * expected.norm()


def test_weights_are_still_exported_by_name():
    layer = kv.AdditiveAttention(6, seed=1)
    x = torch.randn(2, 5, 4)
    layer(x, x, x)
    shapes = {name: array.shape for name, array in kv.export_weights(layer).items()}
    assert shapes == {
        "W_q": (4, 6),
        "W_k": (4, 6),
        "w_v": (6,),
    }


@pytest.mark.filterwarnings("ignore::UserWarning")  # nested and compressed tensors are called prototypes
@pytest.mark.parametrize("what", ["strided", "jagged", "sparse", "rows", "columns", "blocks"])
def test_what_is_not_dense_is_refused_with_its_cure(what):
    x = torch.ones(3, 4)
    if what in ("strided", "jagged"):
        layout = torch.strided if what == "strided" else torch.jagged
        given, cure = torch.nested.nested_tensor([x, x[:2]], layout=layout), "to_padded_tensor"
    else:
        given, cure = sparse(x, what), "to_dense"
    for arrays in ((given,) * 3, (torch.ones(2, 3, 4), given, given)):
        with pytest.raises(TypeError, match=cure):
            kvattn.attention(*arrays)


def sparse(x, what):
    layouts = {"rows": torch.sparse_csr, "columns": torch.sparse_csc, "blocks": torch.sparse_bsr}
    return (
        x.to_sparse() if what == "sparse" else x.to_sparse(layout=layouts[what], blocksize=(1, 1) if what == "blocks" else None)
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"return_weights": True}, {"scale": 2.0}], ids=str)
@pytest.mark.parametrize("what", ["sparse", "rows", "columns", "blocks"])
def test_after_a_dense_call_a_sparse_tensor_of_its_class_shape_and_dtype_is_refused_as_before(what, options):
    x, mask = torch.ones(3, 4), torch.ones(3, 3, dtype=torch.bool)
    for masks in ({}, {"mask": mask}):
        kvattn.attention(x, x, x, **options, **masks)
        for i in range(3):
            with pytest.raises(TypeError, match="to_dense"):
                kvattn.attention(*(sparse(x, what) if i == j else x for j in range(3)), **options, **masks)
    with pytest.raises(TypeError, match="to_dense"):
        kvattn.attention(x, x, x, mask=sparse(mask, what), **options)


@pytest.mark.parametrize("heads", [False, True])
def test_a_call_with_a_learned_bias_is_copied_and_keeps_no_graph(heads):
    learned = torch.zeros(5, 5, requires_grad=True)
    layer = kv.MultiHeadAttention(8, 2, seed=0) if heads else kv.DotProductAttention()
    x = torch.randn(2, 5, 8, generator=torch.manual_seed(0))
    layer(x, x, x, bias=2 * learned)
    attention = layer.attention if heads else layer
    assert not attention._last[-1]["bias"].requires_grad
    copied = copy.deepcopy(attention)
    torch.testing.assert_close(copied.attention_weights, attention.attention_weights)


@pytest.mark.parametrize("name", ["MultiHeadAttention", "TransformerEncoderBlock", "AdditiveAttention"])
def test_a_layer_that_was_never_called_takes_float64_from_a_file_as_it_is(name):
    config = {"num_hiddens": 8} | ({} if name == "AdditiveAttention" else {"num_heads": 2})
    config |= {"ffn_num_hiddens": 12} if name == "TransformerEncoderBlock" else {"seed": 0}
    X = torch.rand(2, 3, 8, dtype=torch.float64, generator=torch.manual_seed(0))
    inputs = (X,) if name == "TransformerEncoderBlock" else (X, X, X)
    layer = getattr(kv, name)(**config).double()
    expected, fresh = layer(*inputs), nn.Sequential(getattr(kv, name)(**config))
    fresh.load_state_dict({f"0.{key}": x for key, x in layer.state_dict().items()})
    assert torch.equal(fresh[0](*inputs), expected)
