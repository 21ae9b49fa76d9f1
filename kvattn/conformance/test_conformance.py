"""The suite under pytest: a test for each backend and case, and one for each pair of backends."""

import pytest

from kvattn.conformance import pairwise
from kvattn.conformance.conftest import CASES, Judge

pytestmark = pytest.mark.filterwarnings("error")


def test_case(backend: str, case: str, judge: Judge) -> None:
    report = judge(backend, case)
    assert not report.failures, "\n".join(result.message for result in report.failures)


def test_agreement(pair: tuple[str, str], judge: Judge) -> None:
    a, b = pair
    compared = 0
    for case in CASES:
        for agreement in pairwise([judge(a, case), judge(b, case)]).values():
            compared += agreement.compared
            apart = f"{agreement.error:.4g} eps, {agreement.allowed:.4g} allowed"
            assert agreement.passed, f"{a} and {b} differ by {apart}: {agreement.message}"
    assert compared
