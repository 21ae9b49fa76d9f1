"""The golden set is what mpmath says, and the oracle of the generated cases says the same."""

import golden_answers
import numpy as np
import pytest

from kvattn.conformance import golden, oracle

STORED = golden.stored()


def test_the_file_is_small():
    assert golden.FILE.stat().st_size < 60_000


def test_the_file_holds_the_calls_of_the_script():
    assert [case.name for case in STORED] == [call["name"] for call in golden_answers.inputs()]
    for case, call in zip(STORED, golden_answers.inputs(), strict=True):
        assert repr(call["arguments"]) == repr(case.arguments)
        assert repr(call["keywords"]) == repr(case.keywords)


@pytest.mark.parametrize("case", STORED, ids=lambda case: case.name)
def test_mpmath_gives_the_stored_answers_again(case):
    again = golden_answers.solve(case.arguments, case.keywords)
    assert again.keys() == case.answer.keys()
    for what, x in again.items():
        np.testing.assert_array_max_ulp(x, case.answer[what], maxulp=1)


@pytest.mark.parametrize("case", STORED, ids=lambda case: case.name)
def test_the_oracle_agrees_with_mpmath(case):
    how = {name: x for name, x in case.keywords.items() if not name.startswith("return_")}
    answer = oracle.attention(**case.arguments, **how)
    for what, x in case.answer.items():
        np.testing.assert_allclose(
            answer.values[what], x, rtol=0, atol=(8 + case.largest_score) * 2**-52 * max(case.magnitude[what], 1)
        )


def test_the_oracle_refuses_what_is_no_option_of_attention():
    x = np.ones((2, 3))
    with pytest.raises(TypeError, match="the oracle knows no causual, windw"):
        oracle.attention(x, x, x, causual=True, windw=2)
