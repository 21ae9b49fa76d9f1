"""All tests that there are: kvattn's conformance suite, of which the operator serves what it can express."""

import pytest

from kvattn import conformance

CASES = conformance.cases()
REFUSES = ("score", "normalize", "positions", "dropout", "scale", "sizes of 0", "float64", "NaN, inf and overflow")


@pytest.fixture(scope="module")
def report():
    return conformance.run("onnx", CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(report, case):
    assert not [each.message for each in report.failures if each.case == case.name]


def test_what_is_refused_is_what_the_operator_cannot_express(report):
    assert {each.message.removeprefix("refused: ").partition(":")[0] for each in report.refused} <= {*REFUSES}


def test_the_groups_that_it_serves(report):
    passed = {each.group for each in report.results if each.passed}
    assert {
        "plain",
        "scale",
        "masks",
        "bias",
        "lengths",
        "causal",
        "window",
        "softcap",
        "empty rows",
        "grouped heads",
    } <= passed
    assert report.passed > 120
