"""Layers whose weights PyTorch's FSDP2 keeps in shards, on the CPU: they learn what they learn whole."""

import copy

import pytest
from conftest import chosen

if "torch" not in chosen():
    pytest.skip("this run is without PyTorch", allow_module_level=True)

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kvattn import torch as kv

X, TOKENS = torch.randn(4, 5, 8, generator=torch.manual_seed(0)), torch.arange(20).reshape(4, 5)
LAYERS = {
    "MultiHeadAttention": ((8, 2), (X, X, X)),
    "AdditiveAttention": ((6,), (X, X, X)),
    "MultiplicativeAttention": ((), (X, X, X)),
    "GatedAttention": ((), (X, X, X)),
    "TransformerEncoder": ((20, 8, 16, 2, 2), (TOKENS,)),
}


@pytest.fixture
def mesh(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_sharded_layer_learns_what_the_whole_one_learns(name, parts, mesh):
    config, inputs = LAYERS[name]
    layer = getattr(kv, name)(*config, seed=1)
    layer(*inputs)  # its weights take their sizes from a call
    sharded = copy.deepcopy(layer)
    for part in reversed([*sharded.modules()] if parts else []):  # from the inside
        if isinstance(part, (nn.Linear, kv.TransformerEncoderBlock)):
            fully_shard(part, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for model in (layer, sharded):
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            optimiser.zero_grad()
            (model(*inputs) ** 2).sum().backward()
            optimiser.step()
    for p, shard in zip(layer.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(shard.full_tensor(), p, rtol=0, atol=1e-5)
    torch.testing.assert_close(sharded(*inputs), layer(*inputs), rtol=0, atol=1e-4)
    if name != "TransformerEncoder":
        shown = [(x.attention if name == "MultiHeadAttention" else x).attention_weights for x in (sharded, layer)]
        torch.testing.assert_close(*shown, rtol=0, atol=1e-4)
