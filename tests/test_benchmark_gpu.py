"""benchmarks/gpu.py measures and checks what it says; its figures need a GPU, its code does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import chosen

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
sys.path.insert(0, str(SCRIPT.parent))
import gpu  # noqa: E402

PRESENT = [name for name in ("torch", "jax") if name in chosen()]


def run(*flags, **env):
    return subprocess.run(
        [sys.executable, SCRIPT, *flags], capture_output=True, text=True, check=False, env={**os.environ, **env}
    )


@pytest.mark.parametrize("framework", PRESENT)
def test_a_whole_run_of_tiny_shapes(framework, tmp_path):
    path = tmp_path / "found.json"
    flags = ["--device", "cpu", "--size", "tiny", "--rounds", "1", "--frameworks", framework, "--json", str(path)]
    done = run(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    machine, *found = json.loads(path.read_text())
    assert machine["device"]
    assert len(found) == len([*gpu.rows(framework)])
    for row in found:
        assert row["right"], row
        assert row["calls"]["kvattn"]["ratio"] == 1
    assert all(row["kind"] in done.stdout for row in found)


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


def test_a_wrong_result_is_seen():
    arrays, options = gpu.problem("valid 60%", 8, "tiny")
    at = (1, 1)
    output, *grads = gpu.expected([x[at] for x in arrays], options, at[0])

    def calls(*found):
        return {"kvattn": (lambda: found, lambda found: [lambda entry, head, x=x: x for x in found])}

    assert gpu.errors(calls(output), {at: (output, *grads)})["kvattn"] == 0
    assert gpu.errors(calls(*grads), {at: (output, *grads)})["kvattn"] == 0
    assert gpu.errors(calls(1.01 * output), {at: (output, *grads)})["kvattn"] > 9e-3
    assert gpu.errors(calls(grads[0], grads[1], 1.01 * grads[2]), {at: (output, *grads)})["kvattn"] > 9e-3


def test_the_reference_is_kvattns_in_float64():
    import numpy as np

    import kvattn

    for kind in gpu.KINDS["torch"]:
        arrays, options = gpu.problem(kind, 8, "tiny")
        arrays = [x.astype(np.float64) for x in arrays]
        found = kvattn.attention(*arrays[:3], **options), *kvattn.attention_grad(*arrays, **options)
        for entry in range(len(arrays[0])):
            for x, y in zip(found, gpu.expected([x[entry, 1] for x in arrays], options, entry), strict=True):
                np.testing.assert_allclose(x[entry, 1], y, atol=1e-12)
