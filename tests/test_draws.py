"""Calls drawn at random: each backend gives the oracle's answer, and what fails is made small and printed as code."""

import contextlib
import io
from dataclasses import replace

import numpy as np
import pytest
from test_mutants import mutant

import kvattn
from kvattn import cli, dispatch
from kvattn.conformance import check, draws

COUNT = {"numpy": 1000, "jax": 80}  # JAX compiles a program for each


def test_a_backend_gives_the_answers_of_drawn_calls(backend):
    report = check.run(backend, list(draws.cases(COUNT.get(backend, 300))))
    assert not report.failures, "\n".join(result.message for result in report.failures)


def test_draws_reach_every_option_and_every_edge():
    drawn = [draws.draw(0, number) for number in range(2000)]
    options = {name for each in drawn for name in each.options}
    signature = set(kvattn.attention.__kwdefaults__) - {"dropout", "rng", "backend", "return_weights", "return_lse"}
    assert signature <= options
    assert {each.call for each in drawn} == {"attention", "split_attention", *check.HEADED}
    assert {each.dtype for each in drawn} == set(draws.DTYPES)
    for size in ("n", "m", "v"):
        assert {0, 1} <= {getattr(each, size) for each in drawn}
    assert {*draws.EDGES} <= {each.n for each in drawn} | {each.m for each in drawn}
    assert {len(each.lead) for each in drawn} == {0, 1, 2, 3, 4}
    assert {each.options["score"] for each in drawn if "score" in each.options} == set(draws.SCORES)
    assert {each.options["normalize"] for each in drawn if "normalize" in each.options} == set(draws.NORMALISERS)


def test_the_same_seed_draws_the_same_and_another_does_not():
    def shown(seed):
        return [str((case.name, case.arguments, case.keywords)) for case in draws.cases(20, seed)]

    assert shown(1) == shown(1)
    assert shown(1) != shown(2)


FAULTS = [
    ("softcap is twice itself", "softcap * np.tanh(scores / softcap)", "softcap * np.tanh(scores / (2 * softcap))"),
    ("sums are a thousandth too large", "total = shifted.sum(axis=-1,", "total = 1.001 * shifted.sum(axis=-1,"),
    ("lengths are off by one", "keys < _lengths(valid_lens, ndim)", "keys <= _lengths(valid_lens, ndim)"),
    ("a repeated position counts twice", "& ~_repeated(index)", ""),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_a_fault_is_found_and_its_smallest_call_fails_as_code(monkeypatch, old, new):
    tab = mutant("numpy", old, new)
    monkeypatch.setitem(dispatch._loaded, "broken", tab)
    monkeypatch.setattr(dispatch, "known_backends", lambda: (*dispatch._OURS, "broken"))
    number = next(i for i in range(2000) if draws._failure(tab, draws.draw(0, i)))
    made, failure = draws.shrink(tab, draws.draw(0, number))
    arrays = [x for x in made.arguments.values() if isinstance(x, np.ndarray)]
    assert sum(x.size for x in arrays) <= 24
    program = draws.code(made, failure, "broken")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {})
    assert printed.getvalue().strip()
    right = io.StringIO()
    with contextlib.redirect_stdout(right):
        exec(program.replace("'broken'", "'numpy'"), {})
    assert right.getvalue() != printed.getvalue()


@pytest.mark.parametrize("call", ["attention", "split_attention", *check.HEADED])
def test_every_kind_of_call_can_be_printed_as_code(call):
    drawn = next(each for each in (draws.draw(3, i) for i in range(500)) if each.call == call and each.n and each.lead)
    for what in ("output", "grad_query"):
        made = draws.case(replace(drawn, dtype="float32"))
        failure = check.Result(made.name, made.group, "float32", what, 1.0, 0.0, False, "is off")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(draws.code(made, failure, "numpy"), {})
        assert printed.getvalue()


def test_shrinking_asks_for_a_failure():
    with pytest.raises(ValueError, match="gives the answer"):
        draws.shrink("numpy", draws.draw(0, 0))


def test_the_command_draws_and_prints_the_smallest_call(capsys, monkeypatch):
    assert cli.main(["conform", "--backend", "numpy", "--draws", "40", "--seed", "3"]) == 0
    assert "40 passed, 0 failed" in capsys.readouterr().out
    monkeypatch.setitem(dispatch._loaded, "numpy", mutant("numpy", *FAULTS[1][1:]))
    assert cli.main(["conform", "--backend", "numpy", "--draws", "40"]) == 1
    out = capsys.readouterr().out
    assert "The smallest call found on which numpy fails" in out
    assert "\nprint(kvattn." in out


@pytest.mark.parametrize("given", [["--draws", "0"], ["--draws", "3", "--seed", "-1"], ["--draws", "3", "--text", "x"]])
def test_the_command_refuses_what_it_cannot_draw(capsys, given):
    assert cli.main(["conform", "--backend", "numpy", *given]) == 2
    assert "--draws" in capsys.readouterr().err
