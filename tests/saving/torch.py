"""PyTorch's ways."""

import copy

import torch
from adapters.torch import call
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from kvattn import torch as kv
from saving import LAYERS, arguments, output

ERRORS = RuntimeError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        made = {name: getattr(kv, name)(**config) for name, config in LAYERS.items()}
        self.encoder = made.pop("TransformerEncoder")
        self.listed = nn.ModuleList([made.pop("TransformerEncoderBlock")])
        self.named = nn.ModuleDict(made)

    def forward(self, X, tokens, lens):
        parts = {**self.named, "TransformerEncoderBlock": self.listed[0], "TransformerEncoder": self.encoder}
        return tuple(output(name, part(*arguments(name, X, tokens, lens))) for name, part in parts.items())


def model():
    return Model()


def state_dict(saved, fresh, inputs, path):
    other = fresh()
    other.load_state_dict(saved.state_dict())
    return other


def file(saved, fresh, inputs, path):
    other = fresh()
    torch.save(saved.state_dict(), path / "layer.pt")
    other.load_state_dict(torch.load(path / "layer.pt", weights_only=True), assign=True)
    return other


def file_after_a_call(saved, fresh, inputs, path):
    other = fresh()
    call(other, *inputs)
    torch.save(saved.state_dict(), path / "layer.pt")
    other.load_state_dict(torch.load(path / "layer.pt", weights_only=True))
    return other


def safetensors_of_a_dict(saved, fresh, inputs, path):
    other = fresh()
    save_file(saved.state_dict(), path / "layer.safetensors")
    other.load_state_dict(load_file(path / "layer.safetensors"))
    return other


def safetensors_of_a_model(saved, fresh, inputs, path):
    other = fresh()
    call(other, *inputs)  # safetensors compares, and cannot where no values are yet
    save_model(saved, path / "layer.safetensors")
    load_model(other, path / "layer.safetensors")
    return other


def deepcopy(saved, inputs, path):
    return copy.deepcopy(saved)


def pickle(saved, inputs, path):
    torch.save(saved, path / "layer.pt")  # the user's own choice: kvattn pickles nothing
    return torch.load(path / "layer.pt", weights_only=False)
