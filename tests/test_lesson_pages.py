"""Lessons as notebooks and pages: what is converted, where references lead, what is rendered."""

import os
import re

import nbformat
import pytest
from lessons import FIGURE, TWINS, WIDE, cell, fixture_command, fixture_world  # noqa: F401
from nbclient import NotebookClient

from kvattn import lesson
from kvattn.lesson import page, prose, runner

# ---- converting


def test_a_notebook_has_the_code_of_one_tab_as_it_stands_and_runs(command, world, monkeypatch):
    code = "import numpy as np  #@save\nx   =  np.ones(3)\n\n# spaces stay\nint(x.sum())"
    text = f"# Title\n:label:`sec_t`\n{TWINS}{cell(code, 'numpy')}{cell('never', 'twin')}\n:begin_tab:`twin`\nno\n:end_tab:\n"
    text += ":begin_tab:`numpy`\nyes\n:end_tab:\nSee :numref:`sec_t`.\n" + cell("%%time\ntab.selected('numpy')")
    got = command(text, "convert", "--backend", "numpy")
    assert (got.status, got.out) == (0, "Written: " + str(world / "lesson.numpy.ipynb") + "\n")
    notebook = nbformat.read(world / "lesson.numpy.ipynb", as_version=4)
    nbformat.validate(notebook)
    sources = [each.source for each in notebook.cells]
    assert sources == [
        '# Title\n<a id="sec_t"></a>',
        '%load_ext kvattn.tab\ntab.select_tab("numpy")',
        code,
        "yes\nSee [Title](#sec_t).",
        "%%time\ntab.selected('numpy')",
    ]
    monkeypatch.setenv("IPYTHONDIR", str(world))
    NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    assert [each.outputs[-1]["data"]["text/plain"] for each in notebook.cells if each.get("outputs")] == ["3", "True"]

    again = command(text, "convert", "--backend", "numpy")
    assert again.status == 2
    assert "exists; --output names the file to write over" in again.err


def test_what_is_folded_is_folded_in_a_notebook_and_stays_whole_on_a_page(command, world):
    folded = f"Ask.\n\n<details>\n<summary>1. Why</summary>\n\nSo.\n\n{cell('40 + 2')}\nAnd so.\n\n{cell('41')}\n</details>\n"
    folded += "\n<details>\n<summary>2. How</summary>\n\nThus.\n\n</details>\n\n"
    text = TWINS + folded + cell("43")
    assert command(text, "convert", "--backend", "numpy").status == 0
    cells = nbformat.read(world / "lesson.numpy.ipynb", as_version=4).cells[1:]
    head, end = "<details>\n<summary>1. Why</summary>\n\n", "\n\n</details>"
    assert [each.source for each in cells if each.cell_type == "markdown"] == [
        f"Ask.\n\n{head}So.{end}",
        f"{head}And so.{end}",
        f"<details>\n<summary>2. How</summary>\n\nThus.{end}",
    ]
    hidden = {each.source: each.metadata.get("jupyter", {}).get("source_hidden") for each in cells if each.cell_type == "code"}
    assert hidden == {"40 + 2": True, "41": True, "43": None}
    made = lesson.render(world / "lesson.md", ["numpy", "twin"], world / "out")
    order = [head, "So.", "40 + 2", "42", "And so.", "41", "</details>", "2. How", "</details>", "43"]
    places = [made.index(order[0])]
    for each in order[1:]:
        places.append(made.index(each, places[-1] + 1))
    assert made.count("<details>") == made.count("</details>") == 2


def test_nothing_is_folded_behind_a_solution_that_ends_in_code(command, world):
    folded = f"<details>\n<summary>1. Why</summary>\n\nSo.\n\n{cell('40')}\n</details>\n\n"
    text = TWINS + folded + f"## Sources\n\n{cell('43')}\n{folded}{cell('44')}"
    assert command(text, "convert", "--backend", "numpy").status == 0
    cells = nbformat.read(world / "lesson.numpy.ipynb", as_version=4).cells[1:]
    so = "<details>\n<summary>1. Why</summary>\n\nSo.\n\n</details>"
    assert [each.source for each in cells] == [so, "40", "## Sources", "43", so, "40", "44"]
    assert [each.source for each in cells if each.metadata.get("jupyter")] == ["40", "40"]


def test_a_drawing_stands_on_a_page_itself_and_once(world):
    code = "from kvattn import drawings\ndrawings.look_up('Li', ['Li', 'Hu'], ['Mu', 'R<'], [0.75, 0.25], 'x', caption='A & B')"
    (world / "lesson.md").write_text(TWINS + cell(code))
    text = lesson.render(world / "lesson.md", ["numpy", "twin"], world / "out")
    assert text.count('```{raw} html\n\n<figure class="drawing"><svg ') == text.count("<svg") == 1
    assert "<figcaption>A &amp; B</figcaption></figure>\n```" in text
    assert "R&lt;" in text
    assert not (world / "out").exists()


def test_other_formats_and_files_that_cannot_be_written(command, world):
    text = TWINS + cell("x = 1", "numpy")
    assert command(text, "convert", "--backend", "NumPy", "--output", str(world / "x.py")).status == 0
    assert '# %load_ext kvattn.tab\ntab.select_tab("numpy")\n\n# %%\nx = 1\n' in (world / "x.py").read_text()
    for output, said in (("x.nonesuch", "cannot write"), ("none/x.ipynb", "there is no directory")):
        got = command(text, "convert", "--backend", "numpy", "--output", str(world / output))
        assert (got.status, got.out) == (2, "")
        assert said in got.err
    assert "has no tab 'jax'" in command(text, "convert", "--backend", "jax").err


# ---- references


BIB = r"""
@article{Bahdanau.2014,
  title = {Translation by {J}oint learning},
  author={Bahdanau, Dzmitry and Cho, Kyunghyun and Bengio, Yoshua},
  journal="arXiv {1409}", year = 2014 }
@book{Holder, author = {Otto H{\"o}lder and Ren\'e B}, title={Values}, year={1889}, publisher={T}}
@misc{one, author={Nobody}, title={x}}
"""
REFERRING = """# One
:label:`sec_one`

:numref:`sec_one`, :ref:`sec_two`, :eqref:`eq_b`, :numref:`fig_f`, :numref:`tab_t` and :eqref:`eq_far`.

$$a$$
:eqlabel:`eq_a`

$$b$$
:eqlabel:`eq_b`

![A picture](a.svg)
:width:`10px`
:label:`fig_f`

: Machines
:label:`tab_t`

| a |
|---|
| 1 |

:cite:`Bahdanau.2014,Holder` and :citet:`Holder`.

```text
:numref:`sec_shown` :cite:`shown`
```

"""
OTHER = "# The second\n\n:label:`sec_two`\n\n$$c$$\n:eqlabel:`eq_far`\n"


@pytest.fixture
def folder(world):
    """A lesson's folder, with another lesson and a bibliography."""
    (world / "02-second.md").write_text(OTHER)
    (world / "d2l.bib").write_text(BIB, encoding="utf-8")
    return world


def test_references_of_a_folder_become_titles_and_numbers_in_a_notebook(folder, command):
    got = command(REFERRING + cell("1"), "convert", "--backend", "numpy", "--output", str(folder / "x.ipynb"))
    assert (got.status, got.err) == (0, "")
    notebook = nbformat.read(folder / "x.ipynb", as_version=4)
    text = notebook.cells[0].source
    assert "[One](#sec_one), *The second* (02-second), [(2)](#eq_b), [Fig. 1](#fig_f), [Table 1](#tab_t)" in text
    assert "and *(1)* (02-second)." in text
    assert '$$\nb \\tag{2}\n$$\n\n<a id="eq_b"></a>' in text
    assert '![A picture](a.svg)\n\n<a id="fig_f"></a>*Fig. 1: A picture*' in text
    assert '<a id="tab_t"></a>*Table 1: Machines*\n\n| a |' in text
    assert "[Bahdanau et al., 2014; Hölder and B, 1889] and Hölder and B (1889)." in text
    assert ":numref:`sec_shown` :cite:`shown`" in text
    assert notebook.cells[-1].source.splitlines() == [
        "## References",
        "",
        "- Bahdanau, Dzmitry; Cho, Kyunghyun; Bengio, Yoshua. 2014. Translation by Joint learning. *arXiv 1409*.",
        "- Hölder, Otto; B, René. 1889. Values. *T*.",
    ]


def test_a_page_of_a_site_has_the_same_citations(folder):
    (folder / "01-first.md").write_text(REFERRING + cell("1"))
    text = lesson.render(folder / "01-first.md", ["numpy"], folder / "out")
    assert "[Bahdanau et al., 2014; Hölder and B, 1889] and Hölder and B (1889)." in text
    assert text.endswith("- Hölder, Otto; B, René. 1889. Values. *T*.\n")
    assert "{cite" not in text
    assert "{ref}`sec_two`" in text


def test_a_label_that_stands_at_nothing_leads_nowhere(folder):
    text = "# One\n:label:`sec_before`\n\n## Two\n\n" + cell("1") + ":label:`fig_of_code`\n\n"
    (folder / "01-first.md").write_text(
        text + ":ref:`sec_before`, :numref:`fig_of_code`, :numref:`sec_after`\n\n:label:`sec_after`\n## Three\n"
    )
    (lost,) = lesson.References(lesson.read(folder / "01-first.md")).lost
    assert ":numref:`fig_of_code` leads nowhere: no heading, figure" in lost


def test_what_leads_nowhere_fails_a_run_and_a_conversion(folder, command):
    text = REFERRING.replace("sec_two", "sec_too").replace("citet:`Holder`", "citet:`Hoelder`") + cell("1")
    said = [
        "FILE:4: :ref:`sec_too` leads nowhere: no heading, figure, table or equation of this folder's lessons has it",
        "FILE:23: :citet:`Hoelder` cites nothing: the .bib files here have no such entry",
    ]
    got = command(text, "run", "--backend", "numpy")
    assert got.status == 1
    assert [line for line in got.out.splitlines() if line.startswith("FILE")] == said
    assert got.last.endswith("2 references without a target")
    assert command(text, "run", "--backend", "numpy", "--no-references").status == 0
    got = command(text, "convert", "--backend", "numpy")
    assert (got.status, got.out) == (2, "")
    assert "\n".join(said) in got.err
    assert command(text, "convert", "--backend", "numpy", "--no-references").status == 0
    with pytest.raises(ValueError, match="leads nowhere"):
        lesson.render(folder / "lesson.md", ["numpy"], folder / "out")
    (folder / "d2l.bib").unlink()
    assert (
        "cites nothing: there is no .bib file beside the lesson"
        in command(REFERRING + cell("1"), "run", "--backend", "numpy").out
    )
    (folder / "library").mkdir()
    (folder / "library" / "mine.bib").write_text(BIB)
    named = REFERRING + ":bibliography:`library/mine.bib`\n" + cell("1")
    assert command(named, "run", "--backend", "numpy").status == 0


@pytest.mark.parametrize("suffix", ["qmd", "Rmd", "R", "myst", "nonesuch", "txt", ""])
def test_a_format_that_cannot_be_written_is_told_and_never_raised(command, world, suffix, monkeypatch):
    import jupytext

    def raises(*args, **options):
        raise type("QuartoError", (Exception,), {})("there is no quarto here")

    if suffix == "qmd":  # as jupytext does without the program
        monkeypatch.setattr(jupytext, "writes", raises)
    file = world / ("t." + suffix if suffix else "t")
    got = command(cell("1"), "convert", "--backend", "numpy", "--output", str(file))
    if suffix in ("Rmd", "R", "myst"):
        assert got.status == 0
    else:
        assert (got.status, got.out) == (2, "")
        assert f"cannot write '{file}'" in got.err
        assert not file.exists()


# ---- rendering


def test_prose_becomes_myst():
    text = """[**Dot**] :numref:`sec_a`, :numref:`fig_b` :eqref:`eq_c` :cite:`A.2014,B.2015` :citet:`C` (~~slides only~~)

## Heading

:label:`sec_a`

$$a =
b.$$
:eqlabel:`eq_c`

![It's a :cite:`X`
picture](../img/x.svg)
:width:`400px`
:label:`fig_b`

: Machines
:label:`tab_d`

| a |
|---|
| 1 |

```text
:label:`kept` [**kept**]
```

```toc
intro
```
"""
    assert (
        lesson.to_myst(text)
        == """Dot {ref}`sec_a`, {numref}`fig_b` {eq}`eq_c` {cite:p}`A.2014,B.2015` {cite:t}`C` 

(sec_a)=
## Heading

$$
a =
b.
$$ (eq_c)

```{figure} ../img/x.svg
:width: 400px
:name: fig_b
:alt: 'It''s a X picture'

It's a {cite:p}`X` picture
```

```{table} Machines
:name: tab_d

| a |
|---|
| 1 |
```


```text
:label:`kept` [**kept**]
```

```{toctree}
intro
```
"""
    )


def test_prose_for_tabs_becomes_a_tab_set_in_the_order_of_the_tabs():
    text = "a\n\n:begin_tab:`jax`\n```bash\n:end_tab:\n```\n:end_tab:\n\n:begin_tab:`mxnet, pytorch`\nM\n:end_tab:\nb"
    got = lesson.to_myst(text, ["torch", "jax"])
    assert re.findall(r"tab-item} (\w+)\n:sync: (\w+)\n\n(\S+)", got) == [("PyTorch", "torch", "M"), ("JAX", "jax", "```bash")]
    assert got.startswith("a\n")
    assert got.endswith("\nb")
    assert "tab-set" not in lesson.to_myst(text, ["torch"])
    partly = lesson.to_myst(text, ["numpy", "torch", "mxnet"])  # NumPy's reader is shown no other's tab
    assert re.findall(r"{([\w-]+)} ?(.*)\n\n(.*)\n```", partly) == [("admonition", "PyTorch, MXNet", "M")]
    assert prose.for_tab(text, "jax") == "a\n\n```bash\n:end_tab:\n```\n\nb"


def test_a_directive_is_fenced_beyond_its_body():
    assert prose.directive("note", "", {}, "````\n").splitlines()[0] == "`````{note}"


def test_a_page_shows_what_differs_in_tabs_and_what_does_not_once(world, monkeypatch):
    text = f"# T\n{TWINS}{cell('x = 1', 'numpy')}{cell('x = 1.0', 'twin')}{cell('print(7)')}{cell('x')}"
    text += cell("#@differs\ny = 1 + tab.selected('twin') * 1e-9") + cell(FIGURE) + cell(WIDE)
    text += cell("import sys; print('!', file=sys.stderr)")
    file = world / "lesson.md"
    file.write_text(text)
    got = lesson.render(file, ["numpy", "twin"], world / "out", cache=world / "cache")
    assert got.startswith("# T\n\n`````{tab-set}\n:sync-group: framework\n")

    def below(code):
        """What stands below this code, up to the next."""
        assert got.count(code) == 1
        return got.partition(code)[2].partition("```{code-block} python")[0]

    item = r"tab-item\} \w+\n:sync: (\w+)\n\n```\{code-block\} %s\n:class: %s\n\n(.*)\n```"
    assert re.findall(item % ("python", "input"), got) == [("numpy", "x = 1"), ("twin", "x = 1.0")]
    assert "#@differs" not in got
    assert below("print(7)\n```\n") == "\n```{code-block} text\n:class: output\n\n7\n```\n\n"
    assert re.findall(item % ("text", "output"), below("\n\nx\n")) == [("numpy", "1"), ("twin", "1.0")]
    image = r"^```\{image\} out/(\w+\.svg)\n:alt: 'Figure: Weights, Keys'\n:class: output\n(:width: 1\d\d\dpx\n)?\n+```$"
    ((name, width),) = re.findall(image, below(FIGURE), flags=re.MULTILINE)
    assert "<svg " in (world / "out" / name).read_text(encoding="utf-8")
    assert not width
    ((_, width),) = re.findall(image, below(WIDE), flags=re.MULTILINE)
    assert width
    assert "tab-set" not in below(FIGURE) + below(WIDE)
    assert below("print('!', file=sys.stderr)\n```\n") == ""

    monkeypatch.setattr(runner, "_Kernel", lambda *_: pytest.fail("it was not remembered"))
    assert lesson.render(file, ["numpy", "twin"], world / "out", cache=world / "cache") == got
    file.write_text(text.replace("print(7)", "print(8)"))
    with pytest.raises(pytest.fail.Exception, match="not remembered"):
        lesson.render(file, ["numpy", "twin"], world / "out", cache=world / "cache")
    file.write_text(text)
    monkeypatch.setattr(runner, "_installed", lambda: ["another-2.0.dist-info"])
    with pytest.raises(pytest.fail.Exception, match="not remembered"):
        lesson.render(file, ["numpy", "twin"], world / "out", cache=world / "cache")


def test_a_step_that_a_framework_has_not_says_so_in_its_tab(world):
    file = world / "lesson.md"
    file.write_text(TWINS + cell("x = 1", "twin") + "prose\n" + cell("x = 2", "numpy"))
    got = lesson.render(file, ["numpy", "twin"], world / "out")
    assert got.count("sync: numpy\n\n*Nothing to do here.*\n") == got.count("sync: twin\n\n*Nothing to do here.*\n") == 1


def test_a_lesson_that_fails_or_disagrees_is_not_rendered(world):
    file = world / "lesson.md"
    file.write_text(TWINS + cell("1 + tab.selected('twin')") + cell("1 / 0", "twin"))
    with pytest.raises(ValueError, match=r"(?s)lesson.md:11: 1 / 0.*ZeroDivisionError.*lesson.md:7: the tabs disagree"):
        lesson.render(file, ["numpy", "twin"], world / "out", cache=world / "cache")
    assert not (world / "out").exists()
    assert len(os.listdir(world / "cache")) == 1  # numpy's, which had no error


def test_cells_that_follow_each_other_for_different_frameworks_are_one_step():
    text = cell("a", "torch") + cell("b", "numpy, jax") + cell("c", "torch") + "prose\n" + cell("d", "numpy") + cell("e")
    steps = page._steps(lesson.parse(text).parts)
    assert [[each.code for each in versions] for _, versions in steps] == [["a", "b"], ["c"], [], ["d"], []]
