"""The tab magic, in a real kernel: what runs, what fails the notebook, what is left behind."""

import os
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import kvattn
from kvattn import dispatch, registry, tab

LOAD = "%load_ext kvattn.tab"


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Execute cells in a kernel of this Python, as Jupyter does; what each shows, without stderr."""
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    home = tmp_path / "home"
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(os.path.dirname(kvattn.__file__)))

    def run(*cells, allow_errors=False, **environment):
        document = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        client = NotebookClient(document, kernel_name="python3", timeout=120, allow_errors=allow_errors)
        client.execute(env={**os.environ, **environment}, cwd=str(tmp_path))
        return ["".join(text(out) for out in cell.outputs if out.get("name") != "stderr") for cell in document.cells]

    return run


def text(output):
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}"
    return output.get("text") or output.data["text/plain"]


def test_a_cell_runs_on_its_tabs_and_errors_await_and_semicolons_are_the_notebooks_own(notebook):
    shown = notebook(
        LOAD,
        "%%tab pytorch, numpy\n6 * 7",
        "%%tab pytorch\nraise SystemError",
        "%%tab all   \n\nimport asyncio\nawait asyncio.sleep(0, 'slept')",
        "%%tab numpy\n6 * 7;",
        "\n%%tab all\n%%capture said\nprint('captured')",
        "said.stdout",
        "%%capture outer\n%%tab all\nprint('inside')",
        "outer.stdout",
        "%%tab all",
        "[tab.selected('numpy'), tab.selected('pytorch', 'tf'), tab.selected(['jax', 'numpy'])]",
        "import kvattn; kvattn.get_backend()",
    )
    assert shown[1:] == [
        "42",
        "Not run: a cell for torch, and the tab is numpy.\n",
        "'slept'",
        "",
        "",
        "'captured\\n'",
        "",
        "'inside\\n'",
        "",
        "[True, False, True]",
        "'numpy'",
    ]


def test_an_error_in_a_cell_fails_the_notebook(notebook):
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebook(LOAD, "%%tab numpy\n\n1 / 0")
    with pytest.raises(CellExecutionError, match="unknown tab 'torhc'; known: numpy, torch, tensorflow, jax, mxnet"):
        notebook(LOAD, "%%tab torhc\n1")


def test_every_wrong_name_is_an_error_that_lists_the_known_ones(notebook):
    shown = notebook(
        LOAD,
        "%%tab numpy, torhc\n1",
        "%%tab\n1",
        "tab.selected('torhc')",
        "tab.select_tab('torhc')",
        "tab.interact_select('torhc')",
        "get_ipython().run_cell_magic('tab', 'all', '1 / 0')",
        "%%tab all\n'goes on'",
        allow_errors=True,
    )
    known = "known: numpy, torch, tensorflow, jax, mxnet (pytorch = torch, tf = tensorflow)"
    assert shown[1] == shown[3] == shown[5] == f"ValueError: unknown tab 'torhc'; {known}"
    assert shown[2].startswith("ValueError: %%tab needs a tab's name")
    assert shown[4] == f"ValueError: unknown backend 'torhc'; {known}"
    assert "ZeroDivisionError" in shown[6]
    assert shown[7] == "'goes on'"


def test_a_traceback_has_the_line_numbers_of_the_cell(notebook):
    with pytest.raises(CellExecutionError, match="line 3"):
        notebook(LOAD, "%%tab all\nx = 1\n1 / 0")


def test_the_tab_is_the_backend_and_nothing_is_left_behind(notebook, tmp_path):
    shown = notebook(
        LOAD,
        "import kvattn, numpy as np; kvattn.set_backend('numpy'); tab.selected('numpy')",
        "with kvattn.use_backend('numpy'):\n    print(type(kvattn.softmax([1.0])).__name__)",
        "tab.select_tab('numpy'); kvattn.dispatch.reason()",
        "tab.select_tab(); kvattn.dispatch.reason()",
        KVATTN_BACKEND="numpy",
    )
    assert shown[1:] == [
        "True",
        "ndarray\n",
        "('numpy', 'set_backend')",
        "('numpy', 'the environment variable KVATTN_BACKEND')",
    ]
    assert os.listdir(tmp_path) == ["home"]


def test_a_backend_that_is_not_there_fails_as_the_magic_is_loaded(notebook):
    with pytest.raises(CellExecutionError, match="unknown backend 'nonesuch'"):
        notebook(LOAD, KVATTN_BACKEND="nonesuch")


@pytest.fixture
def world(monkeypatch):
    """No kernel: three backends are known, of which all but mxnet are installed, and nobody has chosen one."""
    monkeypatch.setattr(registry, "OURS", dict.fromkeys(("numpy", "torch", "mxnet"), registry.OURS["numpy"]))
    monkeypatch.setattr(registry, "available_backends", lambda: ("numpy", "torch"))
    monkeypatch.setattr(registry, "loaded", {})
    monkeypatch.setattr(dispatch, "_process", None)
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)


def test_interact_select_keeps_the_backend_if_it_is_offered(world, capsys):
    tab.interact_select("pytorch", "numpy")
    assert capsys.readouterr().out == "The tab is numpy.\n"
    tab.select_tab("torch")
    tab.interact_select(["numpy", "pytorch"])
    assert capsys.readouterr().out == "The tab is torch.\n"


def test_interact_select_takes_the_first_that_is_installed_if_nobody_chose(world, capsys):
    tab.interact_select("mxnet", "pytorch")
    assert dispatch.get_backend() == "torch"
    said = "The tab is torch, the first of mxnet, pytorch that is installed; tab.select_tab or KVATTN_BACKEND chooses.\n"
    assert capsys.readouterr().out == said


def test_interact_select_says_what_to_install_if_none_is(world):
    with pytest.raises(ModuleNotFoundError, match=r"none is installed: .*pip install .*\[mxnet\]"):
        tab.interact_select("mxnet")


def test_interact_select_refuses_a_chosen_backend_that_is_not_offered(world, monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "numpy")
    chosen = "'numpy', chosen by the environment variable KVATTN_BACKEND, is not offered: this notebook's tabs are mxnet, torch"
    with pytest.raises(ValueError, match=chosen):
        tab.interact_select("mxnet", "torch")


def test_interact_select_shows_a_drop_down_that_selects(notebook):
    shown = notebook(
        LOAD,
        "from types import SimpleNamespace as Plugin\n"
        "tab.registry._plugins = lambda: {'twin': Plugin(load=tab.registry.OURS['numpy'], value='twin:tab')}",
        "tab.interact_select('twin', 'numpy')",
        "%%tab twin\n'ran'",
        "import gc, ipywidgets\nmenu, = [x for x in gc.get_objects() if type(x) is ipywidgets.Dropdown]\nmenu.value = 'twin'",
        "%%tab twin\n'ran'",
    )
    assert shown[2].startswith("Dropdown(")
    assert "Not run" in shown[3]
    assert shown[5] == "'ran'"


def test_the_extension_can_be_reloaded_and_unloaded(notebook):
    shown = notebook(
        LOAD,
        "%reload_ext kvattn.tab",
        "%%tab all\n1",
        "len([f for f in get_ipython().input_transformers_cleanup if f.__module__ == 'kvattn.tab'])",
        "%unload_ext kvattn.tab",
        "'tab' in globals(), 'tab' in get_ipython().magics_manager.magics['cell']",
    )
    assert shown[2:4] == ["1", "1"]
    assert shown[5] == "(False, False)"


def test_importing_the_module_needs_no_ipython():
    code = "import sys; sys.modules['IPython'] = None; import kvattn.tab; kvattn.tab.interact_select('numpy')"
    environment = {**os.environ, dispatch.ENVIRONMENT: "numpy"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "The tab is numpy.\n"


def test_names_on_a_tab_line():
    assert tab.named(" PyTorch,tf ") == ["torch", "tensorflow"]
    assert tab.named("all") is None
    assert tab.named("jax, all") is None
    with pytest.raises(ValueError, match="unknown tab 'torhc'"):
        tab.named("all, torhc")
