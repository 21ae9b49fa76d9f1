"""Any two options stand in one call of the conformance suite, and each of them makes a difference there."""

from itertools import combinations, product

import numpy as np
import pytest

from kvattn import conformance
from kvattn.conformance import option_pairs, oracle

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


def lines():
    return [{*line.split(", ")} for line in option_pairs.LINES]


def test_any_two_choices_stand_in_a_line():
    made = [[next((x for x in choices if x in line), "") for choices in CHOICES.values()] for line in lines()]
    assert [{*filter(None, line)} for line in made] == lines()
    found_pairs = {both for line in made if not OTHERS & {*line} for both in combinations(enumerate(line), 2)}
    usual = [[x for x in choices if x not in OTHERS] for choices in CHOICES.values()]
    missing = {((i, a), (j, b)) for (i, x), (j, y) in combinations(enumerate(usual), 2) for a, b in product(x, y)} - found_pairs
    assert not missing
    for normalizer in OTHERS:
        found_pairs = {x for line in made if normalizer in line for x in enumerate(line)}
        assert found_pairs >= {(i, x) for i, choices in enumerate(usual[:-1]) for x in choices if x != "sink"}


def test_each_option_makes_a_difference():
    for case in conformance.cases():
        # An average reads no score, and sparsemax not all pairs.
        if case.group != option_pairs.GROUP or "normalize" in case.keywords:
            continue
        given = {n: x for n, x in (case.arguments | case.keywords).items() if n != "grad_output" and n[:7] != "return_"}
        for name in sorted({*given} - {"query", "key", "value", "rng"}):
            rest = {n: x for n, x in given.items() if n != name and (n != "rng" or name != "dropout")}
            with np.errstate(all="ignore"):
                found = oracle.attention(**rest).values["output"]
            assert not np.array_equal(found, case.answer["output"]), (case.name, name)


def test_a_line_that_cannot_be_drawn_is_an_error(monkeypatch):
    query, key, value, _ = option_pairs._arrays(np.random.default_rng(0), {"2 axes"})
    monkeypatch.setattr(option_pairs, "_arrays", lambda rng, line: (query, key, value, {"mask": np.ones((5, 8), bool)}))
    monkeypatch.setattr(option_pairs, "TRIES", 3)
    with pytest.raises(RuntimeError, match="'2 axes, mask' held none in which each option makes a difference"):
        option_pairs._drawn(np.random.default_rng(0), {"mask", "2 axes"}, poison=False)
