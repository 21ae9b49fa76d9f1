"""All tests that there are: kvattn's conformance suite, in every dtype; and that an array finds its backend by itself."""

import mlx.core as mx
import pytest

import kvattn
from kvattn import conformance
from kvattn.conformance.cases import DTYPES


@pytest.mark.parametrize("case", conformance.cases(), ids=lambda case: case.name)
def test_case(case):
    report = conformance.run("mlx", [case], DTYPES)
    assert report.ok, report.failures
    assert not report.not_offered + report.refused


def test_an_array_goes_to_mlx():
    x = mx.ones((2, 3))
    assert isinstance(kvattn.attention(x, x, x), mx.array)
