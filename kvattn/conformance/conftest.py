"""``KVATTN_CONFORMANCE=torch,jax pytest --pyargs kvattn.conformance``; unset, each of ours that is installed, and no plugin.

In a checkout also ``pytest kvattn/conformance --backends torch,jax``: pytest reads options before it looks up --pyargs.
KVATTN_THOROUGH=1 runs each case in every dtype, both with and without weights and lse: minutes on JAX, for its compiler.
KVATTN_SHARE=7 asks every seventh case only. KVATTN_CASES names a folder that keeps the cases for the next process.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from itertools import combinations

import pytest

from kvattn import available_backends, conformance, registry
from kvattn.conformance.cases import DTYPES

VARIABLE, THOROUGH, SHARE = "KVATTN_CONFORMANCE", "KVATTN_THOROUGH", "KVATTN_SHARE"
Judge = Callable[[str, str], conformance.Report]
BACKENDS = pytest.StashKey[list[str]]()
CASES = {case.name: case for case in conformance.cases()[:: int(os.environ.get(SHARE) or 1)]}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backends", help=f"backends to judge, by commas (default: {VARIABLE}, else all of ours that are installed)"
    )


def chosen(config: pytest.Config) -> list[str]:
    """The backends to judge, loaded; one that was named and is absent is an error, never a skip."""
    named = config.getoption("--backends", default=None) or os.environ.get(VARIABLE)
    names = named.split(",") if named else [name for name in available_backends() if name not in registry.plugins()]
    found = [registry.canonical(name) for name in names if name.strip()]
    for name in found:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a framework may warn at its import
                registry.load(name)
        except (ImportError, ValueError, TypeError) as error:
            raise pytest.UsageError(f"conformance: {error}") from error
    return found


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BACKENDS] = chosen(config)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # modules and cases stay until the end: the garbage collector need not look at them again


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    backends = metafunc.config.stash[BACKENDS]
    if "pair" in metafunc.fixturenames:
        metafunc.parametrize("pair", list(combinations(backends, 2)) or [(name, name) for name in backends], ids="-".join)
    elif "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backends)
        metafunc.parametrize("case", CASES)


@pytest.fixture(scope="session")
def judge() -> Judge:
    """The report of a backend on a case, by their names, computed once."""
    done: dict[tuple[str, str], conformance.Report] = {}

    def report(backend: str, case: str) -> conformance.Report:
        if (backend, case) not in done:
            done[backend, case] = conformance.run(backend, [CASES[case]], DTYPES if os.environ.get(THOROUGH) else None)
        return done[backend, case]

    return report
