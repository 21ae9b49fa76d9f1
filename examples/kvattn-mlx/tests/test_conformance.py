"""All tests that there are: kvattn's conformance suite; and that an array finds its backend by itself."""

import mlx.core as mx
import pytest

import kvattn
from kvattn import conformance
from kvattn.layers import LAYERS

CASES = [case for case in conformance.cases() if case.call not in LAYERS]  # layers are of kvattn's own frameworks


@pytest.fixture(scope="module")
def report():
    return conformance.run("mlx", CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(report, case):
    assert not [each.message for each in report.results if each.case == case.name and not each.passed]


def test_an_array_goes_to_mlx():
    x = mx.ones((2, 3))
    assert isinstance(kvattn.attention(x, x, x), mx.array)
