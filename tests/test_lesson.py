"""Lessons: what is read, run and compared. A plugin that is the NumPy tab again is the second tab."""

import io
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import chosen
from lessons import FIGURE, TWINS, cell, fixture_command, fixture_world, setup  # noqa: F401
from rich.console import Console

import kvattn
from kvattn import cli, install, lesson, terminal
from kvattn.lesson import agree, forks, watch

# ---- reading

# a cell whose source is a number
NUMBER = (
    '{"cells": [{"cell_type": "code", "source": 5, "metadata": {}, "outputs": [], "execution_count": null}], '
    '"metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
)


def test_a_lesson_is_prose_and_cells_with_their_tabs_and_lines():
    text = f"# Title\n\n{setup('numpy', 'jax')}\nprose\n{cell('x = 1', 'PyTorch, tf')}```python\nno cell\n```\n"
    text += cell("", "jax") + cell("\n# why\ny")
    got = lesson.parse(text)
    assert got.tabs == ("numpy", "torch", "tensorflow", "jax")
    assert [(each.code, each.tabs) for each in got.cells] == [("x = 1", ("torch", "tensorflow")), ("# why\ny", None)]
    lines = text.split("\n")
    assert [lines[each.line - 1] for each in got.cells] == ["x = 1", "# why"]
    assert [lines[each.line - 1] for each in got.parts if isinstance(each, lesson.Prose)] == ["# Title", "", "```python"]
    assert [each.title for each in got.on("jax")] == ["y"]


MYST = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
---

# Title

```{code-cell} ipython3
:tags: [hide-input]

x = 0.5
```

```python
code that is shown
```

```{code-cell}
---
tags: [a]
---
%%tab numpy
x / 0
```
"""


def test_plain_python_and_mysts_code_cells_are_cells_where_there_are_none_of_d2ls():
    got = lesson.parse(MYST)
    assert [(each.code, each.tabs) for each in got.cells] == [("x = 0.5", None), ("x / 0", ("numpy",))]
    lines = MYST.split("\n")
    assert [lines[each.line - 1] for each in got.cells] == ["x = 0.5", "x / 0"]
    assert got.parts[0].text.strip() == "# Title"
    got = lesson.parse("# Title\n```python\nx = 1\n```\n``` py\n%%tab torch\ny\n```\n```sh\nls\n```\n```\nno\n```\n")
    assert [(each.line, each.code, each.tabs) for each in got.cells] == [(3, "x = 1", None), (7, "y", ("torch",))]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"# Title\n{cell('1', 'numpy, torhc')}", "L.md:3: unknown tab 'torhc'; known: numpy, torch, tensorflow, jax, mxnet"),
        (cell("1", ""), "L.md:2: %%tab needs a tab's name"),
        ("```{.python .input}\n#@tab mxnet\n1\n```", "L.md:2: '#@tab' is an older notation"),
        ("- item\n\n  ```{.python .input}\n  1\n  ```", "L.md:4: a code cell in a list"),
        (setup("numpy", "torhc"), "L.md:2: unknown tab 'torhc'"),
    ],
)
def test_a_lesson_that_cannot_be_read_says_where(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        lesson.parse(text, Path("L.md"))


def test_what_is_not_utf_8_is_refused(command, world):
    (world / "latin.md").write_bytes(b"caf\xe9")
    assert cli.main(["lesson", "run", str(world / "latin.md")]) == 2
    assert cli.main(["lesson", "run", str(world / "none.md")]) == 2


# ---- running


def test_tabs_that_agree_exit_0_and_each_cell_is_reported(command, world):
    text = TWINS + cell("x = 3", "numpy") + cell("x = 1 + 2", "twin") + cell("print(x, f'{x:.2f}')\nx / 7") + "prose\n"
    got = command(text + "```{.python .input}\n'no numbers'\n```", "run", "--backend", "all")
    assert (got.status, got.err) == (0, "")
    assert got.last == "6 cells run on 2 tabs, 0 errors; 1 common cell compared, 0 disagreements"
    rows = [[word.strip() for word in line.split("│")[1:-1]] for line in got.out.splitlines() if "│" in line]
    assert [(row[0], row[1], bool(row[2]), bool(row[3]), row[4]) for row in rows] == [
        ("7", "x = 3", True, False, ""),
        ("11", "x = 1 + 2", False, True, ""),
        ("15", "print(x, f'{x:.2f}')", True, True, "yes, 0%"),
        ("20", "'no numbers'", True, True, ""),
    ]
    assert "\x1b" not in got.out
    assert sorted(os.listdir(world)) == ["lesson.md", "site"]


@pytest.mark.parametrize("kind", ["ipynb", "py", "myst.md", "plain.md"])
def test_what_jupytext_reads_is_run_and_converted(world, capsys, kind):
    import jupytext

    new = nbformat.v4
    cells = [new.new_markdown_cell("# Title"), new.new_code_cell("x = 6"), new.new_raw_cell("raw")]
    cells += [new.new_code_cell("%%tab numpy\n\ny = 7"), new.new_code_cell("y = 1\nx / (y - 1)")]
    notebook = new.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    formats = {"py": "py:percent", "myst.md": "md:myst", "plain.md": "md"}
    text = jupytext.writes(notebook, fmt=formats.get(kind, "ipynb"))
    (file := world / f"lesson.{kind}").write_text(text)
    assert cli.main(["lesson", "run", str(file), "--backend", "numpy"]) == 1
    out = capsys.readouterr().out.replace(str(file), "FILE")
    where = f"FILE:{text.split('x /')[0].count(chr(10)) + 1}" if kind.endswith("md") else "FILE: cell 5, line 2"
    assert f"numpy: {where}: x / (y - 1)\n  ZeroDivisionError" in out
    assert "3 cells run" in out
    file.write_text(text.replace("y - 1", "y + 1"))
    assert cli.main(["lesson", "run", str(file), "--backend", "numpy"]) == 0
    assert "3 cells run on 1 tab, 0 errors" in capsys.readouterr().out
    assert cli.main(["lesson", "convert", str(file), "--backend", "numpy", "--output", str(world / "new.ipynb")]) == 0
    made = nbformat.read(world / "new.ipynb", as_version=4)
    assert [each.source.strip() for each in made.cells if each.cell_type == "code"] == ["x = 6", "y = 7", "y = 1\nx / (y + 1)"]
    assert made.cells[0].source.strip() == "# Title"


def test_nothing_run_is_no_success(command, world, capsys):
    for text in ("# Title\n", "# Title\n```sh\nls\n```\n", TWINS, TWINS + cell("")):
        got = command(text, "run")
        assert (got.status, got.out) == (2, "")
        assert "FILE: there is no code in it, so nothing was run: a cell is fenced as ```{.python .input}" in got.err
    got = command(TWINS + cell("1", "twin"), "run", "--backend", "numpy")
    assert got.status == 2
    assert "there is no code on numpy" in got.err
    for name, content in (("a.ipynb", "[]"), ("b.ipynb", "{"), ("c.rst", "Title"), ("d.ipynb", ""), ("e.ipynb", NUMBER)):
        (world / name).write_text(content)
        assert cli.main(["lesson", "run", str(world / name)]) == 2
        assert f"{name} is no Markdown, and no notebook that can be read" in capsys.readouterr().err


def test_tabs_that_disagree_exit_1(command):
    text = TWINS + cell("x = 0.5 + (1e-5 if tab.selected('twin') else 0)") + cell("1\n[x, 2]")
    got = command(text, "run")
    assert got.status == 1
    assert "FILE:11: the tabs disagree: result 1 of 2: numpy 0.5, twin 0.50001: 1e-05 apart, 2e-06 allowed" in got.out
    assert got.last.endswith("1 common cell compared, 1 disagreement")
    assert command(text, "run", "--no-compare").status == 0
    assert command(text.replace("1\n[", "1  #@differs\n["), "run").status == 0


def test_an_error_exits_1_and_leads_to_the_lines_of_the_lesson(command):
    text = TWINS + cell("def broken(x):\n    return x.nothing") + cell("1", "numpy") + cell("\nbroken(1)", "twin") + cell("2")
    got = command(text, "run")
    assert got.status == 1
    said = "twin: FILE:17: broken(1)\nFILE:8: return x.nothing\n  AttributeError: 'int' object has no attribute 'nothing'"
    assert said in got.out
    assert "not run" in got.out
    assert got.last == "5 cells run on 2 tabs, 1 error; 0 common cells compared, 0 disagreements"


def test_errors_of_syntax_of_libraries_and_of_kernels_are_told(command):
    told = command(setup("numpy") + cell("x = 1\ny = (2,\nz = 3"), "run").out
    assert "numpy: FILE:8: y = (2,\n  SyntaxError: '(' was never closed" in told
    told = command(setup("numpy") + cell("import json\njson.loads('{')"), "run").out
    assert re.search(r"FILE:8: json.loads.*\n  \S*decoder.py:\d+, in raw_decode: .*\n  JSONDecodeError: Expecting", told)
    told = command(setup("numpy") + cell("1") + cell("import os\nos.write(2, b'last words')\nos._exit(1)"), "run").out
    assert "numpy: FILE:11:\n  the kernel died\n  last words" in told
    told = command(setup("numpy") + cell("import time\ntime.sleep(60)"), "run", "--timeout", "1").out
    assert "numpy: FILE:7:\n  took longer than 1 s (--timeout)" in told


def test_the_progress_bar_shows_code_as_it_is():
    shown = io.StringIO()
    with terminal.Progress(Console(file=shown, width=120, force_terminal=True)) as progress:
        progress.start("numpy", 2, "starting")
        progress.move(1, "x[/b] = y[bold]\x1b[31m")
        progress.bars.refresh()
    assert "x[/b] = y[bold]\N{REPLACEMENT CHARACTER}[31m" in shown.getvalue()


def test_a_cell_is_the_notebooks_own(command):
    got = command(TWINS + cell("import asyncio\nawait asyncio.sleep(0, 3)") + cell("tab.selected('twin');"), "run")
    assert got.last == "4 cells run on 2 tabs, 0 errors; 1 common cell compared, 0 disagreements"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--backend", "jax"), "'jax' is not installed|FILE has no tab 'jax'; it has: numpy, twin"),
        (("--backend", "nonesuch"), "unknown backend 'nonesuch'; known: numpy"),
        (("--backend", ","), "names no backend"),
    ],
)
def test_a_tab_that_the_lesson_lacks_exits_2(command, options, said):
    got = command(TWINS + cell("1"), "run", *options)
    assert (got.status, got.out) == (2, "")
    assert re.search(said, got.err)


def test_a_framework_that_is_absent_is_left_out_with_its_cure_and_refused_if_all_are_asked_for(command, monkeypatch):
    monkeypatch.setattr(kvattn.registry, "available_backends", lambda: ("numpy", "twin"))
    text = setup("numpy", "mxnet") + cell("1")
    got = command(text, "run")
    assert got.status == 0
    assert f"Not installed, so not run: mxnet ({install.line('mxnet')})" in got.out
    got = command(text, "run", "--backend", "all")
    assert got.status == 2
    assert f"'mxnet' is not installed: {install.line('mxnet')}" in got.err
    assert command(setup("mxnet") + cell("1"), "run").status == 2


def test_a_package_that_is_absent_is_named_with_its_extra(command, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nbformat", None)
    got = command(TWINS + cell("1"), "run")
    assert got.status == 2
    assert f"it needs nbformat, which is not installed: {install.line('lessons')}" in got.err


def test_the_frameworks_agree_about_neutral_data_and_their_own(world):
    names = chosen()
    arrays = {
        "numpy": "import numpy as np\nx = np.arange(6, dtype=np.float32).reshape(2, 3) / 3",
        "torch": "import torch\nx = torch.arange(6.).reshape(2, 3) / 3",
        "tensorflow": "import tensorflow as tf\nx = tf.reshape(tf.range(6.), (2, 3)) / 3",
        "jax": "from jax import numpy as jnp\nx = jnp.arange(6.).reshape(2, 3) / 3",
        "mxnet": "from mxnet import np\nx = np.arange(6.).reshape(2, 3) / 3",
    }
    text = "".join(cell(arrays[name], name) for name in names)
    text += cell("import kvattn\nprint(x)\nx.shape, kvattn.attention(x, x, x)")
    text += cell("kvattn.attention([[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]], [[1.0], [2.0]])")
    got = lesson.run(lesson.parse(text, world / "lesson.md"), names)
    assert got.problems() == []
    shown = {name: [entry["dtype"] for ran in cells for entry in ran.shown] for name, cells in got.tabs.items()}
    assert shown == {name: ["float32", "int", "float32", "float64"] for name in names}
    assert len(got.agreements) == (2 if len(names) > 1 else 0)


# ---- comparing


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (np.float32([1, 2]), np.float32([1, 2]) * (1 + 2**-19), True),  # 16 eps of 40
        (np.float32([1, 2]), np.float32([1, 2]) * (1 + 2**-17), False),
        (np.float64([1, 2]), np.float64([1, 2]) * (1 + 2**-40), False),
        (np.float32([1e4, 1e-3]), np.float32([1e4, 1.1e-3]), True),  # against the largest of the array
        (np.float64(1), np.float32(1 + 2**-20), True),
        (1.0, 1 + 1e-6, True),  # a Python float may come from a float32
        (1.0, 1 + 1e-5, False),
        (3, 4, False),
        (3, 3.0, True),
        (True, False, False),
        ((2, 3), [2, 3], True),
        (np.zeros((2, 3)), np.zeros((3, 2)), False),
        (np.float32(np.nan), np.float32(np.nan), True),
        (np.float32(np.inf), np.float32(-np.inf), False),
        (np.float32(np.nan), np.float32(0), False),
        ({"a": 1.0}, {"a": 1.0, "b": 2.0}, False),
        ("loss 0.333", "loss 0.3334", True),  # to the printed place
        ("loss 0.333", "loss 0.335", False),
        ("[1. 2.]", "tensor([2., 2.])", False),
        ("3 of 4", "3 of 5", False),
        ("tensor([0.5000], dtype=torch.float32)", "[0.5]", True),
        ("step 1000: 0.001", "step 1000: 0.004", False),
        ("1.50e-05", "1.51e-05", True),
        ("1.50e-05", "1.53e-05", False),
        ("accuracy 0.5", "accuracy", False),
    ],
)
def test_numbers_are_the_same_up_to_the_derived_tolerance(left, right, same):
    found = agree.judge({"a": list(watch.entries(left)), "b": list(watch.entries(right))})
    assert (found.share <= 1) is same
    assert bool(found.message) is not same


def test_what_holds_no_numbers_is_not_compared():
    odd = [None, "words", object(), np.array(["a"]), np.array([None]), np.ndarray, b"1", {}, 1j]
    assert [entry for x in odd for entry in watch.entries(x) if "text" not in entry] == []
    assert agree.judge({name: [entry for x in odd for entry in watch.entries(x)] for name in "ab"}) is None
    assert agree.judge({"a": list(watch.entries(1))}) is None


def test_a_large_array_is_noted_in_part_but_its_shape_in_full():
    (entry,) = watch.entries(np.zeros((3, watch.LARGEST)))
    assert (entry["shape"], len(entry["values"])) == ([3, watch.LARGEST], watch.LARGEST)


def test_what_figures_draw_is_compared_if_asked_as_float32(world):
    text = cell("y = 4 + tab.selected('twin')") + cell(FIGURE)
    text += cell("y = 4 + tab.selected('twin') * 1e-6  # Matplotlib makes float64 of it") + cell("plt.imshow([[y]])")
    parsed = lesson.parse(text, world / "lesson.md")
    ran = lesson.run(parsed, ["numpy", "twin"])
    assert ran.problems() == []
    (apart,) = lesson.Result(parsed, ran.tabs, lesson.compare(parsed, ran.tabs, figures=True)).problems()
    assert apart.endswith("lesson.md:7: the tabs disagree: numpy 4, twin 5 at [1, 1]: 1 apart, 2e-05 allowed")


# ---- kernels that one process forks; more in test_lesson_site.py, by NumPy's


UNSEEDED = {
    "torch": "import torch\ntorch.rand(3).sum().item()",
    "tensorflow": "import tensorflow as tf\nfloat(tf.random.uniform(()))",
}


@pytest.mark.parametrize("name", [name for name in UNSEEDED if name in chosen()])
def test_what_is_not_seeded_is_not_the_same_in_two_lessons(name, world):
    with forks.Forks() as made:
        parsed = [lesson.parse(cell(UNSEEDED[name]), world / f"{i}.md") for i in range(2)]
        (one,), (other,) = (lesson.run_tab(each, name, forks=made) for each in parsed)
        assert made.parents[name]
    assert one.error is other.error is None
    assert one.outputs[-1]["data"] != other.outputs[-1]["data"]


@pytest.mark.parametrize(("fence", "line"), [("```python\nx = 1\n", 3), ("~~~~\nwords\n~~~\n", 3), ("```", 3)])
def test_a_fence_that_is_never_closed_is_told_by_its_line(fence, line):
    with pytest.raises(ValueError, match=rf"^lesson\.md:{line}: this fence is never closed"):
        lesson.parse(f"# Title\n\n{fence}")
    for end in ("````", "~~~~~  "):
        assert lesson.parse(f"# Title\n\n{end}\nwords\n  {end}\n").cells == []
