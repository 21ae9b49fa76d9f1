"""PyTorch's meta device: shapes and no values, for those who plan a model before they have room for it."""

import numpy as np
import pytest
from conftest import chosen

if "torch" not in chosen():
    pytest.skip("PyTorch is not among the backends of this run", allow_module_level=True)

import torch

import kvattn

META = torch.zeros(2, 2, 3, 4, device="meta")
CPU = torch.ones(2, 2, 3, 4)


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": 1}, {"valid_lens": [1, 2]}, {"mask": np.ones((3, 3), bool)}, {"sink": 0.0},
     {"mask": lambda q, k: q >= k}, {"segments": np.zeros((2, 3), int)}, {"softcap": 1.0}, {"bias": np.ones((3, 3), "f")}],
    ids=str,
)  # fmt: skip
def test_shapes_alone(options):
    out, lse = kvattn.attention(META, META, META, return_lse=True, **options)
    assert (out.device.type, out.shape, out.dtype) == ("meta", META.shape, META.dtype)
    assert (lse.device.type, lse.shape) == ("meta", (2, 2, 3))


def test_neutral_arrays_follow_and_gradients_are_shapes_too():
    assert kvattn.attention(np.zeros((2, 2, 3, 4), "f"), META, META).device.type == "meta"
    assert [x.device.type for x in kvattn.attention_grad(META, META, META, META)] == ["meta"] * 3
    assert kvattn.self_attention(META[:, 0], *[np.eye(4, dtype="f")] * 3).device.type == "meta"


OPTIONS = {
    "mask": torch.ones(3, 3, dtype=torch.bool),
    "bias": torch.ones(3, 3),
    "valid_lens": torch.ones(2, dtype=torch.int64),
    "positions": torch.zeros(3, 2, dtype=torch.int64),
    "sink": torch.ones(2),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_no_kernel_reads_what_has_no_values(name):
    """PyTorch's attention on the CPU takes a mask from the meta device, and adds to the scores what lies at address 0."""
    kvattn.attention(CPU, CPU, CPU, **{name: OPTIONS[name]})  # a call that is remembered
    for x, beside in ((CPU, "meta"), (META, "cpu")):
        option = OPTIONS[name].to(beside)
        with pytest.raises(ValueError, match=rf"{name} is on the device {beside}.*{name}\.to\('{x.device}'\)"):
            kvattn.attention(x, x, x, **{name: option})


def test_there_is_nothing_to_read():
    for call in (lambda: kvattn.to_numpy(META), lambda: kvattn.convert(META, "numpy")):
        with pytest.raises(ValueError, match="x lies on PyTorch's meta device, which holds shapes and no values"):
            call()
