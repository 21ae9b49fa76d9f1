"""Calls drawn at random: each backend gives the oracle's answer, and what fails is made small and printed as code."""

import contextlib
import io
import os
import sys
import types
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from test_mutants import altered, mutant

import kvattn
import kvattn.numpy
from kvattn import cli, dispatch, layers, registry
from kvattn.conformance import check, draws, programs

COUNT = {"numpy": 1000} | ({} if "KVATTN_EVERY" in os.environ else {"jax": 40, "tensorflow": 100})  # which compile programs


def test_a_backend_gives_the_answers_of_drawn_calls(backend):
    report = check.run(backend, list(draws.cases(COUNT.get(backend, 300))))
    assert not report.failures, "\n".join(result.message for result in report.failures)


def test_a_backend_gives_the_answers_of_every_layer(backend):
    drawn = [draws.draw(1, number) for number in range(3000)]
    each = [[x for x in drawn if x.call == name and x.dtype == "float64"] for name in layers.LAYERS]
    assert all(each)
    for of_layer in each:
        of_layer.sort(key=lambda x: "dropout" not in x.options)  # those that drop come first
    cases = [draws.case(x) for of_layer in each for x in (of_layer[:1] if backend == "jax" else of_layer[:2] + of_layer[-2:])]
    report = check.run(backend, cases)
    assert not report.failures, "\n".join(result.message for result in report.failures)


def test_draws_reach_every_option_and_every_edge():
    drawn = [draws.draw(0, number) for number in range(2000)]
    options = {name for each in drawn for name in each.options}
    signature = set(kvattn.attention.__kwdefaults__) - {"rng", "backend", "return_weights", "return_lse"}
    assert signature <= options
    assert {each.call for each in drawn} == {"attention", "split_attention", *check.PROJECTED, *layers.LAYERS}
    stepped = {each.call for each in drawn if "steps" in each.options}
    assert stepped == {"MultiHeadAttention", *draws.DEEP, *draws.DECODERS}
    assert {"rotary", "qk_norm", "alibi"} <= {
        name for each in drawn if each.call == "MultiHeadAttention" for name in each.options
    }
    assert {each.dtype for each in drawn} == set(draws.DTYPES)
    for size in ("n", "m", "v"):
        assert {0, 1} <= {getattr(each, size) for each in drawn}
    assert {*draws.EDGES} <= {each.n for each in drawn} | {each.m for each in drawn}
    assert {len(each.lead) for each in drawn} == {0, 1, 2, 3, 4}
    of_layers = [each for each in drawn if each.call in layers.LAYERS]
    assert {each.call for each in of_layers if "dropout" in each.options} == {*layers.LAYERS} - {"PositionWiseFFN"}
    assert {0, 1} <= {each.n for each in of_layers} & {each.lead[0] for each in of_layers}
    assert {each.options["score"] for each in drawn if "score" in each.options} == set(draws.SCORES)
    assert {each.options["normalize"] for each in drawn if "normalize" in each.options} == set(draws.NORMALISERS)


def test_the_same_seed_draws_the_same_and_another_does_not():
    def shown(seed):
        return [str((case.name, case.arguments, case.keywords)) for case in draws.cases(20, seed)]

    assert shown(1) == shown(1)
    assert shown(1) != shown(2)


FAULTS = [
    ("softcap is twice itself", "np.tanh(scores / call.softcap)", "np.tanh(scores / (2 * call.softcap))"),
    ("sums are a thousandth too large", "total = shifted.sum(axis=-1,", "total = 1.001 * shifted.sum(axis=-1,"),
    ("lengths are off by one", "keys < _lengths(call.valid_lens, ndim)", "keys <= _lengths(call.valid_lens, ndim)"),
    ("a repeated position counts twice", "& ~_repeated(index)", ""),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_a_fault_is_found_and_its_smallest_call_fails_as_code(monkeypatch, old, new):
    tab = mutant("numpy", old, new)
    monkeypatch.setitem(registry.loaded, "broken", tab)
    monkeypatch.setattr(registry, "known_backends", lambda: (*registry.OURS, "broken"))
    number = next(i for i in range(2000) if draws._failure(tab, draws.draw(0, i)))
    made, failure = draws.shrink(tab, draws.draw(0, number))
    arrays = [x for x in made.arguments.values() if isinstance(x, np.ndarray)]
    assert sum(x.size for x in arrays) <= 24
    program = programs.code(made, failure, "broken")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {})
    assert printed.getvalue().strip()
    right = io.StringIO()
    with contextlib.redirect_stdout(right):
        exec(program.replace("'broken'", "'numpy'"), {})
    assert right.getvalue() != printed.getvalue()


LAYER_FAULTS = [
    ("a block forgets what it was given", "Y = self.addnorm1(X, Y,", "Y = self.addnorm1(0 * X, Y,"),
    ("a step forgets where it stands", "cache, self.rotary, options)", "cache, self.rotary, {**options})"),
    ("positions begin anew", "math.sqrt(self.num_hiddens), first,", "math.sqrt(self.num_hiddens), 0,"),
    ("a gradient counts twice", "self.gradient(key, by_key)", "self.gradient(key, 2 * by_key)"),
    ("relu lets small numbers by", "np.maximum(X, 0) if", "np.maximum(X, -0.05) if"),
    ("a layer's seed begins another pattern", "seed = rng if pattern else", "seed = rng + 1 if pattern else"),
    ("what dropout leaves is not scaled", "rate, seed = self.dropout.rate if", "rate, seed = self.dropout.rate / 2 if"),
    ("gelu is by a logistic function", "_erfc(-X / math.sqrt(2)).astype(X.dtype) / 2", "1 / (1 + np.exp(-1.702 * X))"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), [fault[1:] for fault in LAYER_FAULTS], ids=[fault[0] for fault in LAYER_FAULTS])
def test_a_fault_of_a_layer_is_found_and_its_smallest_call_fails_as_code(monkeypatch, old, new):
    with monkeypatch.context() as broken:
        broken.setitem(sys.modules, "kvattn.layers.numpy", sys.modules["kvattn.layers.numpy"])
        module = altered("layers/numpy.py", "kvattn.layers.numpy", old, new)
        for name in layers.LAYERS:
            broken.setattr(kvattn.numpy, name, getattr(module, name))
        drawn = (draws.draw(0, number) for number in range(3000))
        drawn = next(each for each in drawn if each.call in layers.LAYERS and draws._failure("numpy", each))
        made, failure = draws.shrink("numpy", drawn)
        program = programs.code(made, failure, "numpy")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(program, {})
    with contextlib.redirect_stdout(io.StringIO()) as right:
        exec(program, {})
    assert printed.getvalue().strip() != right.getvalue().strip()


# what becomes of (the tab's own dropout, weights, call)
DROPOUT_FAULTS = {
    "the pattern begins a key late": lambda dropped, weights, call: dropped(weights, call._replace(first_key=1)),
    "what is left is not scaled": lambda dropped, weights, call: dropped(weights, call) * (1 - call.dropout),
    "heads drop alike": lambda dropped, weights, call: weights * dropped(weights[:, :1] * 0 + 1, call),
}


@pytest.mark.parametrize("fault", DROPOUT_FAULTS)
def test_a_fault_of_a_layers_dropout_is_found(backend, monkeypatch, fault):
    tab, options = registry.load(backend), {"num_heads": 2, "num_kv_heads": 2, "biases": True, "W_o": True}
    options |= {"dropout": 0.5, "seed": 1}
    made = draws.case(draws.Draw((0, 0), "MultiHeadAttention", lead=(2,), kv=(2,), n=3, m=5, d=2, options=options))
    assert check.run(backend, [made]).ok
    monkeypatch.setattr(tab, "_dropout", partial(DROPOUT_FAULTS[fault], tab._dropout))
    if backend == "mxnet":
        monkeypatch.setattr(tab.views, "obstacle", lambda *_: "it is a mutant")  # NumPy would answer
    with sys.modules["jax"].disable_jit() if backend == "jax" else contextlib.nullcontext():  # it keeps what it compiled
        failed = {result.what for result in check.run(backend, [made]).failures}
    assert {"output", "grad_value"} <= failed


def test_a_backend_without_layers_is_asked_for_none():
    third_party = types.SimpleNamespace(**{**vars(dispatch.load("numpy")), "__name__": "third_party"})
    drawn = [case for case in draws.cases(300) if case.call in layers.LAYERS]
    report = check.run(third_party, drawn)
    assert drawn
    assert not report.failures
    assert {result.message for result in report.not_offered} <= {f"not offered: {name}" for name in layers.LAYERS}
    assert len(report.not_offered) == len(drawn)


@pytest.mark.parametrize("call", ["attention", "split_attention", *check.PROJECTED, *layers.LAYERS])
def test_every_kind_of_call_can_be_printed_as_code(call):
    drawn = next(each for each in (draws.draw(3, i) for i in range(500)) if each.call == call and each.n and each.lead)
    for what in ("output", "grad_query"):
        made = draws.case(replace(drawn, dtype="float32"))
        failure = check.Result(made.name, made.group, "float32", what, 1.0, 0.0, False, "is off")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(programs.code(made, failure, "numpy"), {})
        assert printed.getvalue()


def test_shrinking_asks_for_a_failure():
    with pytest.raises(ValueError, match="gives the answer"):
        draws.shrink("numpy", draws.draw(0, 0))


def test_the_command_draws_and_prints_the_smallest_call(capsys, monkeypatch):
    assert cli.main(["conform", "--backend", "numpy", "--draws", "40", "--seed", "3"]) == 0
    assert "40 passed, 0 failed" in capsys.readouterr().out
    monkeypatch.setitem(registry.loaded, "numpy", mutant("numpy", *FAULTS[1][1:]))
    assert cli.main(["conform", "--backend", "numpy", "--draws", "40"]) == 1
    out = capsys.readouterr().out
    assert "The smallest call found on which numpy fails" in out
    assert "\nprint(kvattn." in out


@pytest.mark.parametrize("given", [["--draws", "0"], ["--draws", "3", "--seed", "-1"], ["--draws", "3", "--text", "x"]])
def test_the_command_refuses_what_it_cannot_draw(capsys, given):
    assert cli.main(["conform", "--backend", "numpy", *given]) == 2
    assert "--draws" in capsys.readouterr().err
