"""benchmarks/gpu.py measures and checks what it says; its figures need a GPU, its code does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import chosen

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
sys.path.insert(0, str(SCRIPT.parent))
import gpu  # noqa: E402

PRESENT = [name for name in ("torch", "jax") if name in chosen()]
SHAPES = {"torch": tuple(gpu.SHAPES), "jax": ("decoding", "layer", "long")}  # JAX compiles two programs for each row


def run(*flags, **env):
    return subprocess.run(
        [sys.executable, SCRIPT, *flags], capture_output=True, text=True, check=False, env={**os.environ, **env}
    )


@pytest.mark.parametrize("framework", PRESENT)
def test_a_whole_run_of_tiny_shapes(framework, tmp_path):
    path, shapes = tmp_path / "found.json", SHAPES[framework]
    flags = ["--device", "cpu", "--size", "tiny", "--rounds", "1", "--frameworks", framework, "--json", str(path)]
    done = run(*flags, "--shapes", ";".join(shapes))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert found["device"]
    assert framework in found
    assert [(x["shape"], x["kind"], x["dtype"], x["grad"]) for x in found["rows"]] == [*gpu.rows(framework, shapes)]
    said = done.stdout.splitlines()
    assert len(said) == 1 + len(found["rows"])
    for row, line in zip(found["rows"], said[1:], strict=True):
        assert row["right"], row
        assert row["ms"] > 0
        assert f"{row['shape']}, {row['kind']}, {row['dtype']}" in line
        assert f" x {row['best']} (" in line if row["best"] else "no native way" in line
    assert sum(row["best"] is not None for row in found["rows"]) > len(found["rows"]) / 2


@pytest.mark.parametrize("framework", PRESENT)
def test_without_a_gpu_it_says_so(framework):
    done = run("--frameworks", framework, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no GPU here" in done.stdout


@pytest.mark.parametrize("framework", PRESENT)
def test_what_there_is_no_time_for_is_named(framework):
    done = run("--device", "cpu", "--size", "tiny", "--minutes", "0", "--frameworks", framework)
    assert done.returncode == 0
    assert done.stdout.count("not measured, for want of time") == len([*gpu.rows(framework)])


def test_the_shapes_that_people_use_come_first():
    first = list(dict.fromkeys(shape for shape, *_ in gpu.rows("torch")))
    assert first[:3] == ["BERT", "decoding", "small"]
    assert set(first) == set(gpu.SHAPES) == set(gpu.TINY)


def test_the_ratio_is_to_the_fastest_native_way_that_is_right():
    took = {"kvattn": [2.0, 4.0, 3.0], "good": [4.0, 4.0, 4.0], "better": [2.0, 2.0, 1.5], "wrong": [1.0, 1.0, 1.0]}
    found = gpu.judged(took, {"kvattn": 0.0, "good": 0.0, "better": 0.0, "wrong": 0.5}, 1e-2)
    assert (found["ms"], found["best"], found["ratio"], found["right"]) == (3.0, "better", 2.0, True)
    assert not gpu.judged(took, dict.fromkeys(took, 0.5), 1e-2)["right"]
    assert gpu.judged(took, dict.fromkeys(took, 0.5), 1e-2)["best"] is None


def test_a_wrong_result_is_seen():
    arrays, options = gpu.problem("small", "lengths", "tiny")
    wanted = gpu.references(arrays, None, options, 4, 1)
    entry, head = at = (1, 3)
    output, *grads = wanted[at]
    whole = [np.zeros((2, 4, *x.shape)) for x in (output, *grads)]
    for place, answer in wanted.items():
        for x, y in zip(whole, answer, strict=True):
            x[place] = y
    assert gpu.error(whole[:1], wanted, False) == 0
    assert gpu.error(whole[1:], wanted, True) == 0
    for i in range(4):
        wrong = [x.copy() for x in whole]
        wrong[i][entry, head] *= 1.01
        assert (gpu.error(wrong[:1], wanted, False) > 9e-3) == (i == 0)
        assert (gpu.error(wrong[1:], wanted, True) > 9e-3) == (i > 0)
    whole[0][at] = np.nan
    assert gpu.error(whole[:1], wanted, False) > 1


@pytest.mark.parametrize("kind", sorted({kind for _, kind, _, _ in gpu.ROWS}))
def test_the_reference_is_kvattns_in_float64(kind):
    import kvattn

    shape = next(shape for shape, other, _, _ in gpu.ROWS if other == kind)
    arrays, options = gpu.problem(shape, kind, "tiny")
    arrays, options = [x.astype(np.float64) for x in arrays], dict(options)
    if "bias" in options:
        options["bias"] = options["bias"].astype(np.float64)
    found = kvattn.attention(*arrays[:3], **options), *kvattn.attention_grad(*arrays, **options)
    for entry in range(len(arrays[0])):
        for x, y in zip(found, gpu.expected([x[entry, 1] for x in arrays], options, entry, 1), strict=True):
            np.testing.assert_allclose(x[entry, 1], y, atol=1e-7)


def test_the_reference_of_a_layer_is_kvattns_in_float64():
    import kvattn

    arrays, options = gpu.problem("layer", "lengths", "tiny")
    (batch, heads, n, d), matrices = arrays[0].shape, gpu.weights("layer", "tiny")
    x, grad = (each.swapaxes(1, 2).reshape(batch, n, heads * d).astype(np.float64) for each in (arrays[0], arrays[3]))
    params = {name: W.astype(np.float64) for name, W in zip(("W_q", "W_k", "W_v", "W_o"), matrices, strict=True)}
    output = kvattn.multi_head_attention(x, x, x, params, num_heads=heads, **options)
    by = kvattn.multi_head_attention_grad(x, x, x, params, grad, num_heads=heads, **options)
    for entry in range(batch):
        found = gpu.expected_of_layer(x[entry], grad[entry], matrices, options, entry, heads)
        np.testing.assert_allclose(output[entry], found[0], atol=1e-12)
        np.testing.assert_allclose(sum(by)[entry], found[1], atol=1e-12)
