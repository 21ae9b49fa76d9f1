"""What is released: a wheel that needs no compiler, an sdist with the tests in it, the same bytes each time they are built."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DAY = "1735689600"  # any: it is the time that the files in a wheel bear


def build(source, folder):
    """The wheel and the sdist of a source tree."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": DAY}
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("dist"))


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_two_builds_are_the_same_bytes(built, tmp_path):
    assert [*map(digest, build(ROOT, tmp_path))] == [*map(digest, built)]


def test_the_wheel_built_from_the_sdist_is_the_wheel(built, tmp_path):
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        how = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since Python 3.11.4
        archive.extractall(tmp_path, **how)
    (source,) = tmp_path.iterdir()
    assert digest(build(source, tmp_path / "dist")[0]) == digest(wheel)


def test_the_wheel_is_pure_and_holds_the_package_alone(built):
    wheel, _ = built
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if "dist-info" not in name} == {"kvattn"}
    assert {"kvattn/py.typed", "kvattn/conformance/test_conformance.py"} <= {*names}
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "kvattn").rglob("*.*") if "__pycache__" not in path.parts}
    assert ours <= {*names}, "the data of golden cases, and all else that is no module"


def test_the_sdist_holds_the_tests_and_what_runs_them(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")}
    assert tests <= names
    assert {
        "tox.ini",
        "constraints.txt",
        "CHANGELOG.md",
        "LICENSE",
        "SECURITY.md",
        "examples/kvattn-mlx/kvattn_mlx.py",
    } <= names
    assert not {name for name in names if name.startswith((".tox", ".venv", "docs/_build"))}


def test_the_metadata_is_what_an_index_takes(built):
    wheel, sdist = built
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        said = Parser().parsestr(archive.read(name).decode())
    assert said["Version"] == re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert (said["Name"], said["License-Expression"], said["Requires-Python"]) == ("kvattn", "Apache-2.0", ">=3.11")
    assert "kvattn conform" in said.get_payload()
    for command in (["twine", "check", "--strict", str(wheel), str(sdist)], ["check_wheel_contents", str(wheel)]):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_bill_of_materials_lists_what_is_installed(tmp_path):
    """By the command that SECURITY.md gives: of the environment of this test, with the versions that passed it."""
    command = ["cyclonedx_py", "environment", "--output-reproducible", "--output-format", "JSON", "--output-file"]
    done = subprocess.run([sys.executable, "-m", *command, str(tmp_path / "sbom.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "sbom.json").read_text(encoding="utf-8"))
    assert made["bomFormat"] == "CycloneDX"
    listed = {(part["name"].lower(), part["version"]) for part in made["components"]}
    assert listed >= {(name, metadata.version(name)) for name in ("kvattn", "numpy", "rich", "threadpoolctl", "pytest")}
