"""The code of README and of the how-to pages, run as a reader would: word for word, from top to bottom."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import chosen

import kvattn
from kvattn import cli, conformance, registry
from kvattn.backends import numpy

ROOT = Path(__file__).parent.parent
FILES = {"docs/howto/lessons.md": "lesson.md", "docs/howto/add-a-backend.md": "fakecupy.py"}  # what a page says to save
ELSEWHERE = tuple(
    f"docs/howto/{page}.md" for page in ("transformers", "search", "processes")
)  # tests/integrations and tests/distributed run these
FRAMEWORKS = ("torch", "tensorflow", "jax", "mxnet")


def blocks(page):
    """(language, code) of each fenced block of a page, in order; those of d2l are lessons' own."""
    found = re.findall(r"^(`{3,})(\w+)\n(.*?)^\1$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, code) for _, language, code in found]


def asked(code):
    """The frameworks that code asks for."""
    words = re.findall(r"^(?:from kvattn )?import (\w+)|backend[ =]+\"?([\w,]+)|KVATTN_BACKEND=(\w+)", code, re.MULTILINE)
    return {name for found in words for each in found for name in each.split(",") if name in FRAMEWORKS}


def pages():
    """Each page whose frameworks are all in this run; of the front page, each tab."""
    found = []
    for page in ["README.md", "docs/index.md", *(f"docs/howto/{path.name}" for path in (ROOT / "docs/howto").glob("*.md"))]:
        parts = [(language, code) for language, code in blocks(page) if language in ("python", "md", "sh", "toml")]
        if page == "docs/index.md":
            for part in parts:
                if asked(part[1]) <= {*chosen()}:
                    found.append(pytest.param(page, [part], id=f"index {' '.join(asked(part[1])) or 'numpy'}"))
        elif page not in ELSEWHERE and {name for _, code in parts for name in asked(code)} <= {*chosen()}:
            found.append(pytest.param(page, parts, id=Path(page).stem))
    return found


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run a command in the new folder, where ``kvattn`` and ``python`` are what runs this test."""
    for name, of in (("python", ""), ("kvattn", " -m kvattn")):
        (script := tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\nexec {sys.executable}{of} "$@"\n')
        script.chmod(0o755)
    (folder := tmp_path / "new").mkdir()
    found = os.pathsep.join([str(Path(kvattn.__file__).parents[1]), str(folder)])
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": found}

    def run(*words):
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    run.folder = folder
    return run


def entry_point(folder, project):
    """What ``pip install -e .`` of a pyproject.toml leaves: its name, and the entry points that it declares."""
    declared = tomllib.loads(project)["project"]
    (info := folder / f"{declared['name']}-{declared['version']}.dist-info").mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {declared['name']}\nVersion: {declared['version']}\n")
    groups = declared["entry-points"].items()
    written = ["".join([f"[{group}]\n", *(f"{name} = {of}\n" for name, of in points.items())]) for group, points in groups]
    (info / "entry_points.txt").write_text("\n".join(written))


@pytest.mark.parametrize(("page", "parts"), pages())
def test_a_page_does_what_it_says(command, page, parts):
    readme = blocks("README.md")[0][1].splitlines()
    (command.folder / "script.py").write_text("\n".join(line for line in readme if "backend=" not in line))
    saved = FILES.get(page)
    for number, (language, code) in enumerate(parts):
        if saved and number == 0:
            (command.folder / saved).write_text(code)
        if language == "python":
            (command.folder / f"block{number}.py").write_text(code)
            status, said = command("python", f"block{number}.py")
        elif language == "toml":
            entry_point(command.folder, code)
        elif language == "sh" and "pip" not in code:
            status, said = command("sh", "-c", code)
            assert "Traceback" not in said
        else:
            continue
        assert status == 0, f"{page}, block {number}:\n{code}\n{said}"


def test_every_page_is_run_by_some_room():
    assert {Path(page).name for page in FILES} < {path.name for path in (ROOT / "docs/howto").glob("*.md")}
    assert asked('from kvattn import jax as kv\nimport torch\nf(backend="mxnet")\n--backend torch,tensorflow') == {*FRAMEWORKS}


def test_the_backend_of_the_page_fails_nothing_and_refuses_what_the_page_says():
    example = types.ModuleType("fakecupy")
    exec(blocks("docs/howto/add-a-backend.md")[0][1], vars(example))
    report = conformance.run(example)
    assert not report.failures
    assert report.passed > 200
    said = {"a score, a normaliser, positions and dropout", "NaN and inf where a query looks"}
    assert {each.message for each in report.refused} == {f"refused: {words}" for words in said}
    lacks = [] if "ml_dtypes" in sys.modules else ["its asarray makes no bfloat16: cases in that dtype are asked in float32"]
    assert report.excused == lacks  # ml_dtypes, which JAX and TensorFlow import, teaches NumPy bfloat16
    assert {"attention_grad"} <= {name for each in report.not_offered for name in each.message.split(": ")[1].split(", ")}


def test_a_backend_that_shows_no_values_is_given_signed_integers():
    example = types.ModuleType("fakecupy")
    exec(blocks("docs/howto/add-a-backend.md")[0][1], vars(example))
    del example.peek
    report = conformance.run(example, [case for case in conformance.cases() if "uint" in case.name])
    assert not report.failures
    assert report.passed >= 4
    x = np.ones((3, 1))
    for far in (2**31, 2**32 - 1):  # no two of them may become one segment
        with pytest.raises(ValueError, match=f"reach from 5 to {far}"):
            kvattn.attention(x, x, x, segments=example.asarray(np.array([5, 5, far], "uint32")), backend=example)


def test_the_test_of_the_page_passes(command):
    page = "docs/howto/add-a-backend.md"
    (project,) = [code for language, code in blocks(page) if language == "toml"]
    (test,) = [code for _, code in blocks(page) if "pytest" in code]
    (command.folder / "fakecupy.py").write_text(blocks(page)[0][1])
    (command.folder / "test_fakecupy.py").write_text(test)
    entry_point(command.folder, project)
    status, said = command("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_fakecupy.py")
    assert status == 0, said
    assert int(re.search(r"(\d+) passed", said)[1]) > 600


# ---- judging a third party's backend never raises


def hostile(**changed):
    """NumPy's tab but for what is changed."""
    return types.SimpleNamespace(**vars(numpy) | {"__name__": "hostile"} | changed)


@pytest.fixture(scope="module")
def few():
    """But not in bfloat16, which third parties made of NumPy's tab lack as it does, and do not all say."""
    few = conformance.cases()[::20]
    return [dataclasses.replace(case, dtypes=tuple(name for name in case.dtypes if name != "bfloat16")) for case in few]


def alone(query, key, value, **options):
    return numpy.attention(query, key, value)


def raises(*args, **options):
    raise ZeroDivisionError("[red]")


def refuses(*args, **options):
    raise NotImplementedError("[red] everything")


THIRD_PARTIES = {
    "ignores what is asked for": hostile(attention=alone),
    "gives lists": hostile(attention=lambda *args, **options: [alone(*args), 1]),
    "gives nothing": hostile(attention=lambda *args, **options: None),
    "gives too much": hostile(attention=lambda *args, **options: (alone(*args),) * 4),
    "gives words": hostile(attention=lambda *args, **options: "no"),
    "gives rows": hostile(attention=lambda *args, **options: (alone(*args)[0],) * 3),
    "raises": hostile(attention=raises),
    "knows no array": hostile(is_array=raises),
    "makes no array": hostile(asarray=raises),
    "takes no array apart": hostile(to_numpy=raises),
    "takes arrays apart into others": hostile(to_numpy=lambda x: numpy.to_numpy(x).reshape(-1)),
    "takes arrays apart into words": hostile(to_numpy=lambda x: "no"),
    "does not describe itself": hostile(describe=raises),
    "describes itself in a word": hostile(describe=lambda: "no"),
    "gives gradients alone": hostile(attention_grad=lambda *args, **options: numpy.attention_grad(*args, **options)[0]),
    "gives no gradients": hostile(attention_grad=lambda *args, **options: None),
    "refuses everything": hostile(attention=refuses),
}


@pytest.mark.parametrize("third_party", THIRD_PARTIES.values(), ids=THIRD_PARTIES)
def test_judging_a_third_partys_backend_never_raises(third_party, few, monkeypatch, tmp_path, capsys):
    good = third_party in (THIRD_PARTIES["does not describe itself"], THIRD_PARTIES["describes itself in a word"])
    plugin = types.SimpleNamespace(load=lambda: third_party, value="hostile")
    monkeypatch.setattr(registry, "_plugins", lambda: {"hostile": plugin})
    monkeypatch.setattr(registry, "loaded", {"numpy": numpy})
    monkeypatch.setattr(conformance, "cases", lambda seed=0: few)
    json_file = str(tmp_path / "r.json")
    status = cli.main(["conform", "--backend", "numpy,hostile", "--jobs", "1", "--json", json_file])
    out, err = capsys.readouterr()
    row = json.loads(Path(json_file).read_text())["backends"][1]
    assert (row["error"], err) == (None, "")
    assert (status, bool(row["failed"])) == ((0, False) if good else (1, True)), out
    assert "zip()" not in out
    assert "unpack" not in out
    assert good or "hostile" in out.partition("Failures")[2]
    drawn = cli.main(["conform", "--backend", "hostile", "--draws", "3", "--json", json_file])
    assert drawn in (0, 1)
