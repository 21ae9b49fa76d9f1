"""Any two options meet in one call of the conformance suite, and each of them makes a difference there."""

from itertools import combinations, product

import numpy as np
import pytest

from kvattn import conformance
from kvattn.conformance import oracle, together

CHOICES = {  # of each option of a call; "" is none
    "axes": ("grouped", "shared keys", "3 axes", "2 axes"),
    "place": ("", "offset 1", "window at -1", "offsets"),
    "mask": ("", "mask", "mask function"),
    "bias": ("", "bias", "bias function"),
    "lens": ("", "lengths", "lengths per query"),
    "segments": ("", "segments"),
    "positions": ("", "positions"),
    "scale": ("", "scale"),
    "softcap": ("", "softcap"),
    "sink": ("", "sink"),
    "dropout": ("", "dropout"),
    "score": ("", "distance", "additive"),
    "normalize": ("", "average", "sparsemax"),
}
OTHERS = {"average", "sparsemax"}  # normalisers, which have no sink


def plans():
    return [{*plan.split(", ")} for plan in together.PLANS]


def test_any_two_choices_meet():
    made = [[next((x for x in choices if x in plan), "") for choices in CHOICES.values()] for plan in plans()]
    assert [{*filter(None, plan)} for plan in made] == plans()
    met = {both for plan in made if not OTHERS & {*plan} for both in combinations(enumerate(plan), 2)}
    usual = [[x for x in choices if x not in OTHERS] for choices in CHOICES.values()]
    missing = {((i, a), (j, b)) for (i, x), (j, y) in combinations(enumerate(usual), 2) for a, b in product(x, y)} - met
    assert not missing
    for normalizer in OTHERS:
        met = {x for plan in made if normalizer in plan for x in enumerate(plan)}
        assert met >= {(i, x) for i, choices in enumerate(usual[:-1]) for x in choices if x != "sink"}


def test_each_option_makes_a_difference():
    for case in conformance.cases():
        if case.group != together.GROUP or "normalize" in case.keywords:  # an average reads no score, sparsemax not all pairs
            continue
        given = {n: x for n, x in (case.arguments | case.keywords).items() if n != "grad_output" and n[:7] != "return_"}
        for name in sorted({*given} - {"query", "key", "value", "rng"}):
            rest = {n: x for n, x in given.items() if n != name and (n != "rng" or name != "dropout")}
            with np.errstate(all="ignore"):
                found = oracle.attention(**rest).values["output"]
            assert not np.array_equal(found, case.answer["output"]), (case.name, name)


def test_a_line_that_cannot_be_drawn_is_told(monkeypatch):
    query, key, value, _ = together._arrays(np.random.default_rng(0), {"2 axes"})
    monkeypatch.setattr(together, "_arrays", lambda rng, plan: (query, key, value, {"mask": np.ones((5, 8), bool)}))
    monkeypatch.setattr(together, "TRIES", 3)
    with pytest.raises(RuntimeError, match="'2 axes, mask' held none in which each option makes a difference"):
        together._drawn(np.random.default_rng(0), {"mask", "2 axes"}, poison=False)
