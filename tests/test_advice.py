"""What an error advises works: the functions it names are there, the code it shows cures, the line it gives installs."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import chosen
from packaging.requirements import Requirement
from test_errors import BAD, GOOD

import kvattn
from kvattn import install

PACKAGE = Path(kvattn.__file__).parent
EXTRAS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
NAMED = re.compile(r"\bkvattn((?:\.[A-Za-z_]\w*)+)(?!['\w]*\.(?:json|py))")


def words(path):
    """Every text in the errors that a file of the package raises, what is put into it left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield "".join(str(part.value) for part in ast.walk(node.exc) if isinstance(part, ast.Constant))


def there(name):
    """Whether kvattn.NAME is: a module or what one of an engine defines, whether or not that is installed, or an attribute."""
    *inside, last = name[1:].split(".")
    folder = PACKAGE.joinpath(*inside)
    if (folder / f"{last}.py").is_file() or (folder / last).is_dir():
        return True
    if inside[:1] == ["distributed"]:
        return last in {getattr(x, "name", "") for x in ast.parse(folder.with_suffix(".py").read_text(encoding="utf-8")).body}
    return hasattr(importlib.import_module(".".join(["kvattn", *inside])), last)


def test_what_errors_name_of_kvattn_is_there():
    texts = [text for path in PACKAGE.rglob("*.py") for text in words(path)]
    assert len(texts) > 100
    named = {name for text in texts for name in NAMED.findall(text)}
    assert {name for name in named if not there(name)} == set()
    assert not there(".dot")
    assert not there(".distributed.torch.dot")
    assert [text for text in texts if "pip install" in text] == []  # install.line says it


@pytest.mark.parametrize("what", BAD)
def test_the_code_that_an_error_advises_cures_it(what):
    arguments, error, _ = BAD[what]
    with pytest.raises(error) as first:
        kvattn.attention(**GOOD | arguments, backend="numpy")
    said = str(first.value)
    assert [name for name in NAMED.findall(said) if not hasattr(kvattn, name[1:])] == []
    given = GOOD | arguments
    for ours, turned, name, how in re.findall(r"(?:(\w+)=)?(~?)(\w+)(\[[:None, ]+\]| != 0)", said):
        cured = {n: x for n, x in given.items() if not ours or n != name} | {ours or name: eval(turned + name + how, {}, given)}
        try:
            kvattn.attention(**cured, backend="numpy")
        except (TypeError, ValueError) as second:  # the next thing that is wrong, if there is one
            assert str(second) != said  # noqa: PT017
            assert f"{name} has dtype" not in str(second)  # noqa: PT017
    for name in NAMED.findall(said)[:1]:
        if arguments.keys() & {"score", "normalize"}:
            kvattn.attention(**given | dict.fromkeys(arguments, getattr(kvattn, name[1:])), backend="numpy")


def test_a_word_for_a_score_or_a_normaliser_is_answered_by_what_it_may_mean():
    def said(**option):
        with pytest.raises(TypeError) as caught:
            kvattn.attention(**GOOD, **option)
        return str(caught.value)

    assert said(score="dot") == "score must be a function, not 'dot': kvattn.dot_score, or your own"
    assert said(normalize="Soft") == "normalize must be a function, not 'Soft': kvattn.softmax, or your own"
    assert "not 'bahdanau': kvattn.scaled_dot_score, kvattn.dot_score, kvattn.additive_score" in said(score="bahdanau")
    assert "not 3: kvattn.softmax, kvattn.sparsemax" in said(normalize=3)


# ---- the line that installs


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """kvattn as it came: by the direct_url.json that pip leaves; None for an index. Its folder holds no pyproject.toml."""

    def come(direct_url, checkout=False):
        (home := tmp_path / "it's here" / "kvattn").mkdir(parents=True, exist_ok=True)
        if checkout:
            (home.parent / "pyproject.toml").write_text("")
        text = None if direct_url is None else json.dumps(direct_url)
        monkeypatch.setattr(install, "__file__", str(home / "install.py"))
        monkeypatch.setattr(install.metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text))
        monkeypatch.setattr(install.shutil, "which", lambda name: str(Path(sys.executable).with_name("pip")))
        return install.line("torch")

    return come


def test_the_line_installs_from_where_kvattn_came(installed, tmp_path):
    assert installed(None) == "pip install 'kvattn[torch]'"
    assert installed({"url": "file:///home/me/kvattn", "dir_info": {}}) == "pip install '/home/me/kvattn[torch]'"
    wheel = {"url": "file:///tmp/kvattn-0.1.0-py3-none-any.whl", "archive_info": {}}
    assert installed(wheel) == "pip install 'kvattn[torch] @ file:///tmp/kvattn-0.1.0-py3-none-any.whl'"
    repository = installed({"url": "https://host/kvattn.git", "vcs_info": {"vcs": "git", "commit_id": "0"}})
    assert repository == "pip install 'kvattn[torch] @ git+https://host/kvattn.git'"
    *_, editable, folder = shlex.split(installed(None, checkout=True))
    assert (editable, folder) == ("-e", f"{tmp_path}/it's here[torch]")


def test_the_line_is_for_this_python(installed, monkeypatch):
    installed(None)
    monkeypatch.setattr(install.shutil, "which", lambda name: "/elsewhere/pip")
    assert install.line("jax") == f"{sys.executable} -m pip install 'kvattn[jax]'"
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    assert install.line("jax") == f"{sys.executable} -m pip install 'kvattn[jax]'"


def test_the_extras_that_are_advised_are_there():
    """And here, where the tests run, the line names what pip would find."""
    asked = set(re.findall(r"line\([\"'](\w+)[\"']\)", "".join(path.read_text() for path in PACKAGE.rglob("*.py"))))
    assert asked | set(kvattn.registry.OURS) - {"numpy"} <= {*EXTRAS}
    source = install.line("torch").partition(" install ")[2]
    if source.startswith("-e "):
        assert Path(source[3:].strip("'").removesuffix("[torch]"), "pyproject.toml").is_file()
    else:
        source = source.strip("'")
        requirement = Requirement(
            source if source.startswith("kvattn") else f"kvattn[torch] @ file://{source.partition('[')[0]}"
        )
        assert requirement.extras == {"torch"}
        assert requirement.url is None or Path(requirement.url.removeprefix("file://")).exists()


# ---- import mxnet

MXNET = [name for name in chosen() if name == "mxnet"]


FIRST = {
    "the one line": "import kvattn.mxnet_compat",
    "a failure": "try:\n    import mxnet\nexcept Exception:\n    pass\nfrom kvattn import mxnet as kv",
}
USE = "import mxnet as mx\nmx.npx.set_np()\nimport kvattn\nx = mx.np.ones((2, 3, 4))\nprint(kvattn.attention(x, x, x).shape)"


@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
@pytest.mark.parametrize("framework", MXNET)
def test_a_script_may_import_mxnet_first(framework, first):
    done = subprocess.run([sys.executable, "-c", f"{first}\n{USE}"], capture_output=True, text=True)
    assert done.stdout == "(2, 3, 4)\n", done.stderr
