"""Layers that two replicas train by MirroredStrategy, on two virtual devices of the CPU, have the losses of one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import dying


def test_two_replicas_have_the_losses_of_one():
    script = Path(__file__).with_name("tensorflow_replicas.py")
    run = subprocess.run(dying(sys.executable, script), capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["replicas"] == 2
    for name, (one, two) in found["losses"].items():
        assert len(one) > 2, name
        assert one[-1] < one[0], name
        np.testing.assert_allclose(two, one, rtol=1e-10 if name != "Keras's fit" else 1e-5, err_msg=name)  # Keras's in float32
