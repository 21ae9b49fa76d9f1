"""JAX where arrays are spread over devices, with every check of types on, and exported with sizes that are unknown yet."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import chosen

if "jax" not in chosen():
    pytest.skip("this run has no jax", allow_module_level=True)

import jax
import jax.numpy as jnp
from jax import export

import kvattn


def test_arrays_that_eight_devices_share():
    """Over batch, heads and queries; by shard_map, explicit axes and automatic ones: outputs and gradients are NumPy's."""
    script = Path(__file__).with_name("sharded_jax.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, ""), run.stdout + run.stderr


@pytest.mark.parametrize("call", [
    {"causal": True}, {"valid_lens": ("b",)}, {"valid_lens": ("b", "n"), "window": (3, None)}, {"bias": ("b", 4, "n", "m")},
    {"score": kvattn.cosine_score, "valid_lens": ("b",)}, {"normalize": kvattn.sparsemax, "causal": True},
], ids=lambda call: ", ".join(call))  # fmt: skip
def test_exported_with_unknown_sizes_and_run_with_others(call):
    """Lengths are arguments: full, short and 0; gradients are exported too."""
    call = dict(call)
    dtypes = {"valid_lens": np.int32, "bias": np.float32}
    given = {name: call.pop(name) for name in dtypes if name in call}
    scope = export.SymbolicScope()
    unknown = {x: export.symbolic_shape(x, scope=scope)[0] for x in "bnm"}

    def program(query, key, value, grad, *arrays):
        attend = partial(kvattn.attention, **call, **dict(zip(given, arrays, strict=True)))
        output, back = jax.vjp(attend, query, key, value)
        return output, *back(grad)

    def shapes(sizes):
        letters = [("b", 4, "n", 8), ("b", 2, "m", 8), ("b", 2, "m", 6), ("b", 4, "n", 6), *given.values()]
        kinds = [np.float32] * 4 + [dtypes[name] for name in given]
        return [(tuple(sizes.get(x, x) for x in shape), kind) for shape, kind in zip(letters, kinds, strict=True)]

    exported = export.export(jax.jit(program))(*(jax.ShapeDtypeStruct(*x) for x in shapes(unknown)))
    draw = np.random.default_rng(0)
    for b, n, m in ((3, 5, 7), (1, 1, 1), (2, 140, 130)):
        arrays = [draw.standard_normal(shape).astype(kind) for shape, kind in shapes({"b": b, "n": n, "m": m})]
        for length in (m, m // 2, 0) if "valid_lens" in given else (m,):
            arrays = [np.full_like(x, length) if x.dtype == np.int32 else x for x in arrays]
            found = exported.call(*map(jnp.asarray, arrays))
            options = {**call, **dict(zip(given, arrays[4:], strict=True))}
            expected = kvattn.attention(*arrays[:3], **options, backend="numpy")
            expected = expected, *kvattn.attention_grad(*arrays[:4], **options, backend="numpy")
            for x, y in zip(found, expected, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
