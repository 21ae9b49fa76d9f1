"""The adapter judges: NumPy's own attention over parts of the keys, merged, passes; what loses a part or an option does not."""

from itertools import accumulate

import adapter
import numpy as np
import pytest

import kvattn
from kvattn.backends import numpy as tab

REFUSES = {
    "softmax": lambda case: case.keywords.get("normalize", "softmax") != "softmax" or case.call == "nadaraya_watson",
    "positions": lambda case: "positions" in case.arguments,
}


def merged(parts, lose=None):
    """Attention over so many parts of the keys, a mask of which says which they are."""

    def attention(query, key, value, *, mask=None, normalize=tab.softmax, positions=None, sink=None, return_weights=False,
                  return_lse=False, **options):  # fmt: skip
        if normalize is not tab.softmax:
            raise NotImplementedError("only softmax can be merged")
        if positions is not None:
            raise NotImplementedError("positions")
        m = key.shape[-2]
        ends = [*accumulate(adapter.cut(m, parts))]
        found = []
        for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            here = (np.arange(m) >= start) & (np.arange(m) < end) & (i != lose)
            here = np.broadcast_to(here, (query.shape[-2], m)) if mask is None else mask & here
            wide = query.astype(np.promote_types(query.dtype, "float32"))
            found.append(tab.attention(
                wide, key.astype(wide.dtype), value.astype(wide.dtype), mask=here, normalize=normalize,
                sink=None if i else sink, return_lse=True, **options,
            ))  # fmt: skip
        output, lse = tab.merge_attention(*zip(*found, strict=True), return_lse=True)
        output = output.astype(query.dtype)
        return (output, lse) if return_lse else output

    return adapter.backend(tab, attention, tab.attention_grad)


@pytest.mark.parametrize("parts", [1, 4])
def test_a_form_that_keeps_the_promises_passes(parts):
    asked = [case for case in adapter.cases()[::5] if case.name != "a sink of inf"]  # parts of an infinite lse merge to NaN
    counts = adapter.judge(merged(parts), REFUSES, asked=asked)
    assert counts[adapter.JUDGED] > 60


def test_a_form_that_loses_a_part_or_an_option_does_not(monkeypatch):
    few = [case for case in adapter.cases() if case.group in ("plain", "causal")]
    with pytest.raises(AssertionError, match="off by"):
        adapter.judge(merged(4, lose=2), REFUSES, asked=few)
    with pytest.raises(AssertionError, match="it was computed"):
        adapter.judge(merged(2), REFUSES | {"causal": lambda case: case.group == "causal"}, asked=few)
    with pytest.raises(AssertionError, match="positions"):
        adapter.judge(merged(2), {"softmax": REFUSES["softmax"]}, asked=adapter.cases()[::5])
    assert kvattn.get_backend() == "numpy"
