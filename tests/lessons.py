"""What the tests of lessons share: cells, a folder with a plugin in it, the command."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import kvattn
from kvattn import cli


def cell(code, tabs="all"):
    return f"```{{.python .input}}\n%%tab {tabs}\n{code}\n```\n"


def setup(*tabs):
    return f"```{{.python .input  n=1}}\n%load_ext d2lbook.tab\ntab.interact_select({list(tabs)})\n```\n"


TWINS = setup("numpy", "twin")
FIGURE = "from matplotlib import pyplot as plt\nplt.plot([1, 2], [3, y])\nplt.xlabel('Keys'); plt.title('Weights')\nplt.show()"
WIDE = FIGURE.replace("plt.plot", "plt.figure(figsize=(14, 3))\nplt.plot")


@pytest.fixture(name="world")
def fixture_world(tmp_path, monkeypatch):
    """A folder to write lessons to; ``twin`` is a plugin backend, here and in the kernels."""
    plugin = tmp_path / "site" / "twin-1.0.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: twin\nVersion: 1.0\n")
    (plugin / "entry_points.txt").write_text("[kvattn.backends]\ntwin = kvattn.backends.numpy\n")
    monkeypatch.syspath_prepend(str(plugin.parent))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(plugin.parent), str(Path(kvattn.__file__).parents[1])]))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    return tmp_path


@pytest.fixture(name="command")
def fixture_command(world, capsys):
    """Write a lesson and give the command what follows: its status, stdout and stderr. The lesson goes by FILE."""

    def run(text, action, *options):
        file = world / "lesson.md"
        file.write_text(text, encoding="utf-8")
        status = cli.main(["lesson", action, str(file), *options])
        out, err = (said.replace(str(file), "FILE") for said in capsys.readouterr())
        return SimpleNamespace(status=status, out=out, err=err, last=out.rstrip().rpartition("\n")[2])

    return run
