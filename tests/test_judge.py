"""The judge of the conformance suite: how far off a result may be, in numbers that are written down here."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from kvattn import conformance
from kvattn.backends import numpy as by_numpy
from kvattn.conformance import tolerance

CASES = {case.name: case for case in conformance.cases()}


@pytest.mark.parametrize(
    ("what", "dtype", "allowed"),
    [
        ("output", "float64", 7.0),
        ("lse", "float32", 7.0),
        ("grad_key", "float32", 14.0),
        ("output", "float16", 0.5 + 7 / 8192),  # float32's, and the half unit of rounding
        ("output", "bfloat16", 0.5 + 7 / 65536),
        ("grad_key", "float16", 1.0 + 14 / 8192),
    ],
)
def test_what_scores_of_3_allow(what, dtype, allowed):
    assert tolerance.allowed(what, dtype, 3.0) == allowed


def judged(name, dtype, changed):
    """What the suite says of NumPy's tab, whose results ``changed`` changes, by name."""
    case = CASES[name]

    def attention(*args, **options):
        results = by_numpy.attention(*args, **options)
        if not isinstance(results, tuple):  # asked for the output alone
            return results
        results = dict(zip(case.results, results, strict=True))
        return tuple((results | changed(results)).values())

    own = {name: getattr(by_numpy, name) for name in dir(by_numpy) if not name.startswith("__")}
    tab = SimpleNamespace(**own | {"__name__": "a.third_party", "attention": attention})
    return conformance.run(tab, [case], [dtype]).failures


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("what", ["output", "weights"])
def test_an_error_is_noticed_from_where_it_is_too_large(what, dtype):
    case = CASES["with weights"]
    largest = tolerance.allowed(what, dtype, case.largest_score) * tolerance.unit(dtype, case.magnitude[what])

    def off(share):
        return lambda results: {what: (case.answer[what] + share * largest).astype(dtype)}

    assert {result.what for result in judged("with weights", dtype, off(1.2))} == {what}
    assert not judged("with weights", dtype, off(0.8))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda results: {"weights": results["weights"].astype("float32")}, "has dtype float32; promised float64"),
        (lambda results: {"weights": results["weights"][..., :1]}, "promised (2, 2, 4, 5)"),
        (lambda results: {"weights": results["weights"].tolist()}, "is a list"),
        (lambda results: {"weights": results["weights"] * np.nan}, "off by inf eps"),
        (lambda results: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_what_is_promised_beside_the_numbers(changed, words):
    failures = judged("with weights", "float64", changed)
    assert failures
    assert words in failures[0].message


def test_a_report_says_which_cases_were_asked():
    few = conformance.cases()[:6]
    version = conformance.version(few)
    assert version.startswith("6-")
    assert conformance.run("numpy", few).suite == version == conformance.version([*few])
    other = replace(few[3], arguments={**few[3].arguments, "query": few[3].arguments["query"] + 0.5})
    for changed in (few[:5], few[::-1], [*few[:3], other, *few[4:]], [*few[:5], replace(few[5], name="another")]):
        assert conformance.version(changed) != version


def third_party(changed):
    """NumPy's tab as a third party's, whose call of attention ``changed`` changes: (query, key, options) -> options."""
    own = {name: getattr(by_numpy, name) for name in dir(by_numpy) if not name.startswith("__")}
    del own["choose"], own["places"]

    def attention(query, key, value, **options):
        return by_numpy.attention(query, key, value, **changed(query, key, options))

    return SimpleNamespace(**own | {"__name__": "a.third_party", "attention": attention})


MISTAKES = {
    "at the end": (
        "causal 4 x 5, offset 1", "count from the last key, not by query_offset",
        lambda q, k, options: options | {"query_offset": options["query_offset"] + k.shape[-2] - q.shape[-2]},
    ),
    "no offset": ("causal 4 x 5, offset 1", "query_offset is ignored", lambda q, k, options: options | {"query_offset": 0}),
    "lengths": ("valid_lens (b, n)", "valid_lens is ignored", lambda q, k, options: options | {"valid_lens": None}),
    "scale": ("plain", "not divided by sqrt(d)", lambda q, k, options: options | {"scale": 1.0}),
    "mask": ("mask (4, 5)", "True in the mask forbids", lambda q, k, options: options | {"mask": ~options["mask"]}),
    "softcap": ("softcap, bias", "the softcap is applied after the bias", lambda *given: _capped_last(*given)),
    "window": ("golden: window", "one key too narrow", lambda q, k, options: options | _narrower(options["window"])),
}  # fmt: skip


def _capped_last(query, key, options):
    """A score of one's own that adds the bias first, as the models do not."""
    cap, bias = options["softcap"], options["bias"]

    def score(query, key):
        return cap * np.tanh((query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1]) + bias) / cap)

    return options | {"score": score, "softcap": None, "bias": None}


def _narrower(window):
    return {} if window is None else {"window": (window[0] - 1, window[1])}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_report_names_the_mistake_that_gives_the_same(mistake):
    name, words, changed = MISTAKES[mistake]
    failures = conformance.run(third_party(changed), [CASES[name]], ["float64"]).failures
    assert any(words in failure.message for failure in failures)


@pytest.mark.parametrize(
    ("name", "what", "changed", "words"),
    [
        ("plain", "lse", lambda results: results["lse"] * np.log2(np.e), "the lse in base 2"),
        ("mask of nothing", "output", lambda results: results["output"] + 0.5, "in rows that may attend to nothing"),
        ("plain", "output", lambda results: results["output"] + np.nan, "0 * NaN is NaN"),
        ("plain", "weights", lambda results: 2 * results["weights"], "80 of 80 wrong, the first at (0, 0, 0, 0): "),
    ],
)
def test_a_report_says_where_and_what_kind_of_numbers_are_wrong(name, what, changed, words):
    failures = judged(name, "float64", lambda results: {what: changed(results)})
    assert any(failure.what == what and words in failure.message for failure in failures)


def _naive(query, key, value, *, mask=None, valid_lens=None, return_weights=False, return_lse=False, **_):
    """Attention whose rows without keys divide by 0, and whose weights of 0 multiply what padding holds."""
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    allowed = np.ones(scores.shape, bool) if mask is None else np.broadcast_to(mask, scores.shape)
    if valid_lens is not None:
        allowed = allowed & (np.arange(key.shape[-2]) < valid_lens[:, None, None, None])
    weights = np.where(allowed, np.exp(scores), 0)
    sums = weights.sum(axis=-1, keepdims=True)
    weights = weights / sums
    results = [weights @ value, *[weights] * return_weights, *[np.log(sums[..., 0])] * return_lse]
    return tuple(results) if len(results) > 1 else results[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [("mask of nothing", "in rows that may attend to nothing"), ("NaN behind a mask (m,)", "0 * NaN is NaN")],
)
def test_a_report_names_the_mistake_behind_a_warning(name, words):
    own = {each: getattr(by_numpy, each) for each in ("is_array", "asarray", "to_numpy", "scaled_dot_score", "softmax")}
    tab = SimpleNamespace(**own, __name__="a.third_party", attention=_naive)
    failures = conformance.run(tab, [CASES[name]], ["float64"]).failures
    assert [failure.what for failure in failures][:2] == ["warnings", "output"]
    assert "every warning is an error here" in failures[0].message
    assert words in failures[1].message
