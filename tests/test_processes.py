"""Backends judged in processes of their own: what comes back is what one process finds; none harms another."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from kvattn import cli, conformance, text
from kvattn.conformance import processes, suite
from kvattn.conformance.cases import read, written

THIRD_PARTIES = """
import os, sys
from kvattn.backends.numpy import *
print("a framework that talks")
asked = asarray
def asarray(*args, **options):
    if __name__ == "dies":
        os._exit(7)
    return asked(*args, **options)
if __name__ == "breaks":
    raise OSError("libbreaks.so")
if __name__ == "aborts" and "no_such" in os.environ.get("XLA_FLAGS", ""):
    os.abort()
"""


@pytest.fixture
def third_parties(tmp_path, monkeypatch):
    """Plugins that are installed: one whose process dies, one that does not import, one that does not know the flags."""
    info = tmp_path / "third_parties-1.0.dist-info"
    info.mkdir()
    names = ("dies", "breaks", "aborts")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-parties\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvattn.backends]\n" + "".join(f"{name} = {name}\n" for name in names))
    for name in names:
        (tmp_path / f"{name}.py").write_text(THIRD_PARTIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return names


def test_cases_travel_as_text():
    every = suite._generated(0)  # and not what was kept as text
    arrays = lambda case: [id(x) for x in case.arguments.values() if isinstance(x, np.ndarray)]  # noqa: E731
    for case, came in zip(every, read(written(every)), strict=True):
        same = [x == y for x, y in itertools.combinations(arrays(case), 2)]
        assert [x == y for x, y in itertools.combinations(arrays(came), 2)] == same, case.name  # one array stays one
        for field in dataclasses.fields(case):
            assert _equal(getattr(case, field.name), getattr(came, field.name)), (case.name, field.name)


def test_cases_are_kept_for_other_processes_of_the_same_code(tmp_path, monkeypatch):
    """In the folder that is named, until what makes them changes; the suite is the same."""
    few, package, fresh, asked = conformance.cases()[:9], tmp_path / "kvattn", suite._made.__wrapped__, []
    monkeypatch.setenv(suite.FOLDER, str(tmp_path / "kept"))
    monkeypatch.setattr(suite, "_generated", lambda seed: asked.append(seed) or tuple(few))
    monkeypatch.setattr(suite.kvattn, "__file__", str(package / "__init__.py"))
    package.mkdir()
    for change in ("__init__.py", "golden.json", "NumPy"):
        if change == "NumPy":
            monkeypatch.setattr(np, "__version__", "0.1")
        else:
            (package / change).write_text("changed")
        for seed in (0, 1, 0, 1):
            assert conformance.version(fresh(seed)) == conformance.version(few)
    assert asked == [0, 1] * 3
    assert len([*(tmp_path / "kept").iterdir()]) == 6


def _equal(x, y):
    if type(x) is not type(y):
        return False
    if isinstance(x, np.ndarray):
        return (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
    if isinstance(x, dict):
        return list(x) == list(y) and all(_equal(x[name], y[name]) for name in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(_equal, x, y))
    return x == y or (x != x and y != y)


def test_what_comes_back_is_what_one_process_finds(third_parties, monkeypatch):
    monkeypatch.setitem(processes.SHARED, "numpy", 16)  # dealt out to two processes
    monkeypatch.setitem(processes.SHARED, "aborts", 16)
    monkeypatch.setitem(processes.QUICK, "aborts", "--xla_known --no_such_flag")
    seen = set()
    found = {
        each.name: each
        for each in processes.judge(["numpy", *third_parties], text.SENTENCE, 2, lambda name, case: seen.add((name, case)))
    }
    assert sorted(found) == sorted(["numpy", *third_parties])
    whole, got = conformance.run("numpy"), found["numpy"].report
    key = lambda each: (each.case, each.dtype, each.what)  # noqa: E731
    assert sorted(got.results, key=key) == sorted(whole.results, key=key)
    assert (got.version, got.device, got.excused) == (whole.version, whole.device, whole.excused)
    assert got.tolerances == whole.tolerances
    assert got.outputs.keys() == whole.outputs.keys()
    assert all(np.array_equal(x, whole.outputs[at], equal_nan=True) for at, x in got.outputs.items())
    assert {case for name, case in seen if name == "numpy"} == {case.name for case in conformance.cases()}
    for made in (found["numpy"].text, found["aborts"].text):
        assert all(np.array_equal(x, y) for x, y in zip(made, text.attend(text.SENTENCE, "numpy"), strict=True))
    assert found["dies"].error == "the process in which it was judged ended by itself"
    assert found["breaks"].error.startswith("it does not import: ImportError: ")
    assert found["aborts"].report.passed > 400
    assert found["aborts"].quick == "--xla_known"  # and it was asked again, without the flag that it does not know


def test_the_command_prints_a_backend_when_it_is_done_and_writes_all(third_parties, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert cli.main(["conform", "--backend", "breaks,numpy", "--jobs", "2", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert out.index("numpy: ") < out.index("Conformance: ")
    document = json.loads(path.read_text())
    assert [row["backend"] for row in document["backends"]] == ["breaks", "numpy"]  # as they were named
    assert document["backends"][1]["cases"] == len(conformance.cases())
    assert document["text"]["weights"]


def test_flags_of_the_users_own_are_kept(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    asked = []
    monkeypatch.setattr(processes, "_run_process", lambda what, quick, *_: asked.append(quick) or {"error": "not asked"})
    assert [each.error for each in processes.judge(["jax"], "", 1)] == ["not asked"]
    assert asked == [None]


def test_jobs_that_are_none_are_refused(capsys):
    assert cli.main(["conform", "--jobs", "0"]) == 2
    assert "--jobs must be at least 1" in capsys.readouterr().err
