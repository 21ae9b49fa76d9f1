"""The published cases of ONNX's operator Attention, each as one call of kvattn."""

import warnings

import numpy as np
import pytest
from conftest import chosen

import kvattn
from kvattn.conformance import tolerance

if "torch" not in chosen():
    pytest.skip("this run is without PyTorch, whose room has onnx", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what makes the cases of other operators
    import onnx
    from onnx.backend.test.case.node import collect_testcases

    CASES = {case.name: case for case in collect_testcases("Attention") if not case.name.endswith("_expanded")}

STAGES = ("raw", "capped", "biased")  # by ONNX's qk_matmul_output_mode; 3 are the weights


def apart(x, heads):
    """(batch, n, heads * c) -> (batch, heads, n, c)."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) if x.ndim == 3 else x


def attend(given, attributes, array, asked):
    """The operator's results, by its names, from kvattn's; ``array``: of the backend, from NumPy's."""
    query = apart(given["Q"], attributes.get("q_num_heads"))
    key, value = (apart(given[name], attributes.get("kv_num_heads")) for name in ("K", "V"))
    offset, lens, mask, n = 0, given.get("nonpad_kv_seqlen"), given.get("attn_mask"), query.shape[-2]
    if "past_key" in given:
        offset = given["past_key"].shape[-2]
        key, value = (np.concatenate([given[f"past_{x}"], y], axis=-2) for x, y in (("key", key), ("value", value)))
    elif lens is not None:
        offset = lens - n
    if mask is not None and mask.shape[-1] < key.shape[-2]:  # what it does not say is forbidden
        widths = [(0, 0)] * (mask.ndim - 1) + [(0, key.shape[-2] - mask.shape[-1])]
        mask = np.pad(mask, widths, constant_values=False if mask.dtype == bool else -np.inf)
    options = {} if mask is None else {"mask" if mask.dtype == bool else "bias": array(mask)}
    sides = [attributes.get(f"{side}_window_size", -1) for side in ("left", "right")]
    mode = attributes.get("qk_matmul_output_mode", 0)
    if "qk_matmul_output" in asked:
        options |= {"return_weights": True} if mode == 3 else {"return_scores": STAGES[mode]}
    results = kvattn.attention(
        *map(array, (query, key, value)), **options, valid_lens=lens, causal=bool(attributes.get("is_causal")),
        query_offset=offset, window=tuple(None if side < 0 else side for side in sides), scale=attributes.get("scale"),
        softcap=attributes.get("softcap") or None,
    )  # fmt: skip
    output, *more = map(kvattn.to_numpy, results if isinstance(results, tuple) else (results,))
    if given["Q"].ndim == 3:
        output = output.swapaxes(1, 2).reshape(*output.shape[::2], -1)
    return {"Y": output, "present_key": key, "present_value": value} | dict(zip(["qk_matmul_output"], more, strict=False))


def test_there_are_as_many_cases_as_were_counted():
    assert len(CASES) >= 93


@pytest.mark.parametrize("name", CASES)
def test_a_published_case_of_onnx_is_a_call(backend, name):
    case = CASES[name]
    node, (arrays, expected) = case.model.graph.node[0], case.data_sets[0]
    given = dict(zip([x for x in node.input if x], arrays, strict=True))
    attributes = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
    expected = dict(zip([x for x in node.output if x], expected, strict=True))
    dtype = given["Q"].dtype.name

    def array(x):
        if dtype == "bfloat16" and backend in ("numpy", "mxnet"):  # which have none
            x = x.astype("float32")
        return kvattn.asarray(x, dtype=None if x.dtype == bool else x.dtype.name, backend=backend)

    found = attend(given, attributes, array, expected)
    # what was published was computed in the dtype of the inputs, a rounding at each of its six steps
    near = {"rtol": case.rtol, "atol": case.atol} if dtype == "float32" else {"rtol": 0, "atol": 6 * tolerance.EPS[dtype]}
    for what, x in expected.items():
        np.testing.assert_allclose(found[what].astype("float64"), x.astype("float64"), **near, err_msg=what)
