"""Every test that asks for ``backend`` runs once for each backend of this run: KVATTN_CONFORMANCE, or all installed."""

import gc
import os
import sys
from pathlib import Path

import pytest

import kvattn


def chosen() -> list[str]:
    named = os.environ.get("KVATTN_CONFORMANCE")
    if not named:
        return list(kvattn.available_backends())
    names = [kvattn.dispatch.canonical(name) for name in named.split(",")]
    if absent := set(names) - set(kvattn.available_backends()):
        raise pytest.UsageError(f"KVATTN_CONFORMANCE names backends that are not installed: {', '.join(sorted(absent))}")
    return names


def pytest_generate_tests(metafunc):
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "backend" in metafunc.fixturenames and not any("backend" in names for names in named):
        metafunc.parametrize("backend", chosen())


@pytest.fixture
def tab(backend):
    return kvattn.dispatch.load(backend)


@pytest.fixture(autouse=True, scope="module")
def kept_is_not_collected():
    """What frameworks and earlier files made and keep, graphs and programs above all, no collection looks at again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def as_mxnet_was():
    """What a test or a lesson switches on by npx.set_np() is switched on for it alone."""
    mx, shape, array = _mxnet(), False, False
    if mx:
        shape, array = mx.util.is_np_shape(), mx.util.is_np_array()
    yield
    if mx := _mxnet():
        mx.util.set_np(shape, array)


def _mxnet():
    mx = sys.modules.get("mxnet")
    return mx if hasattr(mx, "util") else None


@pytest.fixture(scope="session")
def backends():
    return chosen()


# What takes most of the time is left to tox, and to those who name a file: `pytest tests/test_mutants.py`.
SLOW = (
    "docs", "draws", "fuzz", "howto", "lesson", "lesson_pages", "lesson_site", "mutants", "processes", "properties", "tiled",
    "tiled_mutants", "tiled_numpy",
)  # fmt: skip


def pytest_ignore_collect(collection_path, config):
    """Bare `pytest`, without KVATTN_CONFORMANCE, is the quick loop; None leaves the question to others."""
    named = [Path(arg.partition("::")[0]).resolve() for arg in config.args]
    if os.environ.get("KVATTN_CONFORMANCE") or any(
        path in (collection_path, *collection_path.parents[:1]) for path in named if path.name != "tests"
    ):
        return None
    quick = collection_path.name not in {
        "integrations",
        "package",
        "site",
        "distributed",
        *(f"test_{name}.py" for name in SLOW),
    }
    return None if quick else True


def pytest_addoption(parser):
    parser.addoption("--examples", type=int, default=200, help="drawn examples of each property on each backend")


def pytest_configure(config):
    from hypothesis import HealthCheck, settings

    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    settings.register_profile(
        "kvattn", max_examples=config.getoption("--examples"), deadline=None, derandomize=True, database=None,
        suppress_health_check=slow,
    )  # fmt: skip
    settings.load_profile("kvattn")
