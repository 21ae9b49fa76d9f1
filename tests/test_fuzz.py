"""Whatever is read from outside, however damaged: an error that says so, an exit status, and an end.

Drawn by hypothesis, always the same examples; `--examples 10000` draws more of them. Coverage-guided, by hand:
`python benchmarks/fuzz.py`.
"""

import contextlib
import io
import json
import signal
import struct
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import fuzz
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvattn
from kvattn import cli, dispatch, registry
from kvattn.lesson import reader, runner

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGVTALRM"), reason="nothing here tells a process how long it computes")


@contextlib.contextmanager
def an_end(seconds=10):
    """Raises AssertionError in what computes for longer, of the processor's time."""

    def stop(*_):
        raise AssertionError(f"it did not end in {seconds} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


FEW = settings(max_examples=max(1, settings().max_examples // 8))  # of what takes long for each


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# ---- weights

NAMES = st.sampled_from(["W", "W_q", "", "..", "__metadata__", "a/b", "\0", "W\n", "é" * 50])
NUMBERS = st.one_of(st.integers(-3, 60), st.sampled_from([2**31, 2**63, 2**64, 1.5, -0.0, None, True, "12", [], {}]))
DTYPES = st.sampled_from(["F32", "F64", "F16", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "F4", "C64", "Q9", "", 5, None])
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": DTYPES,
        "shape": st.one_of(st.lists(NUMBERS, max_size=3), st.sampled_from([[3, 4], [12], None, {}])),
        "data_offsets": st.one_of(
            st.sampled_from([[0, 48], [48, 96], [24, 72], [48, 0], [0, 2**63]]), st.lists(NUMBERS, max_size=3)
        ),
        "more": NUMBERS,
    },
)


@st.composite
def safetensors(draw):
    """A header of two entries, whose names may be one, and a body; then some of it is lost, or says that it is longer."""
    entries = draw(st.lists(st.tuples(NAMES, st.one_of(ENTRY, NUMBERS)), max_size=3))
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in entries) + "}"
    header = draw(st.one_of(st.just(text.encode()), st.binary(max_size=40), st.just(text.encode() + b" " * 8)))
    size = draw(st.one_of(st.just(len(header)), st.sampled_from([0, 1, 2**20, 10**8, 2**40, 2**63, 2**64 - 1])))
    whole = struct.pack("<Q", size) + header + draw(st.sampled_from([b"", bytes(48), bytes(96), b"\xff" * 48]))
    return whole[: draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))]


@given(safetensors())
def test_weights(folder, content):
    path = folder / "weights.safetensors"
    path.write_bytes(content)
    with an_end():
        fuzz.weights(path)


# ---- lessons

PIECES = st.sampled_from(
    [
    "\n", "\n\n", " ", "# ", "#", "```", "````", "~~~", "{.python .input}\n", "{code-cell} ipython3\n", "python\n",
    "```python\n", "%%tab all\n", "%%tab pytorch, jax\n", "%%tab nobody\n", "#@tab mxnet\n", "#@differs\n",
    "tab.interact_select('numpy', 'jax')\n", "%load_ext d2lbook.tab\n", "---\n", ":tags: [x]\n", "kernelspec: [\n", "{",
    "}", "[", "](", ")", "**", "~~", "![", "$$", "|", "| a |\n", ": x\n", ":label:`a`", ":eqlabel:`e`\n", ":numref:`a`",
    ":cite:`k,l`", ":citet:`k`", ":bibliography:`../a.bib`\n", ":begin_tab:`jax`\n", ":begin_tab:`x`\n", ":end_tab:\n",
    ":width:`1px`\n", "<details>", "<summary>", "</details>\n", "<script>", "```toc\n", "```eval_rst\n",
    "```{toctree}\n", "::: {.callout}\n", ":::{note}\n", "> ", "- ", "1. ", "\t", "\r\n", "\r", "\ufeff", "\u0000",
    "\u2028", "\u00e9", "x = 1\n", "$$x$$\n:eqlabel:`e`\n", "![a](b.png)\n:label:`fig_a`\n",
    "@a{k, author = {B, C and ", "title={", '"', "\\'{e}", "year=1,", "@", ",",
]
)  # fmt: skip
TEXT = st.one_of(st.lists(PIECES, max_size=25).map("".join), st.text(max_size=60))


@given(TEXT)
def test_lessons_of_markdown(folder, text):
    with an_end():
        fuzz.markdown(text, folder / "lesson.md")


@given(st.binary(max_size=40))
def test_bytes_are_lessons_or_refused(folder, content):
    for suffix in (".md", ".ipynb", ".py", ".qmd"):
        with an_end():
            fuzz.file(folder / f"bytes{suffix}", content)


@given(st.lists(PIECES, max_size=25).map("".join))
def test_bibliographies(folder, text):
    with an_end():
        fuzz.bibliography(text, folder)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 5), st.sampled_from([2**70, 1.5]), TEXT),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["cells", "source", "metadata", "x"]), inner)
    ),
    max_leaves=6,
)  # fmt: skip


@st.composite
def notebooks(draw):
    """A notebook in which one thing, of any depth, is another."""
    code = {"cell_type": "code", "id": "a", "execution_count": None, "metadata": {}, "outputs": [], "source": draw(TEXT)}
    prose = {"cell_type": "markdown", "id": "b", "metadata": {}, "source": draw(st.one_of(TEXT, st.lists(TEXT, max_size=2)))}
    made = {"cells": [code, prose], "metadata": {"kernelspec": {"name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}
    places = [(made, key) for key in made] + [(code, key) for key in code] + [(prose, key) for key in prose]
    places += [(made["metadata"], "kernelspec"), (made["metadata"]["kernelspec"], "name"), (made["metadata"], "jupytext")]
    for where, key in draw(st.lists(st.sampled_from(places), max_size=2)):
        if draw(st.booleans()):
            where[key] = draw(JSON)
        else:
            where.pop(key, None)
    return made


@given(notebooks())
def test_notebooks(folder, content):
    with an_end():
        fuzz.file(folder / "lesson.ipynb", json.dumps(content).encode())


@FEW
@given(st.one_of(notebooks(), JSON))
def test_kept_outputs_that_are_damaged_are_as_good_as_none(folder, content):
    lesson = reader.parse("```python\n1 + 1\n```\n", folder / "lesson.md")
    kept = folder / f"{runner._key('numpy', lesson.on('numpy'))}.json"
    kept.write_text(json.dumps(content), encoding="utf-8")
    with an_end():
        assert runner.remembered(lesson, "numpy", folder) in (None, [])


LONG = {  # what a pattern of text may look at again and again: of 5,000 characters
    "a comment of one sign": "```python\n" + "#" * 5_000 + "\nx = 1\n```\n",
    "comments": "```python\n" + "# " * 2_500 + "\nx = 1\n```\n",
    "calls": "```python\n" + "tab.select_tab()" * 300 + "!\n```\n",
    "pictures": "![\n" * 1_700,
    "pictures in a line": "![a](" * 1_000,
    "slides": "[**a " * 1_000,
    "headings": "# a\n" * 1_250,
    "a heading far from its label": "# a" + "\n" * 1_250,
    "captions": ": a\n" * 1_250,
    "tables": ": a\n| b\n" * 600,
    "formulas": "$$" * 600,
    "formulas of a sign": "$$a" * 1_600,
    "labels": ":label:`" * 600,
    "roles": ":cite:`a" * 600,
    "tabs": ":begin_tab:`jax`\n" * 300,
    "quotations": "> " * 600,
    "lists": "- " * 600,
    "brackets": "[" * 1_250,
    "fences": "```\n" * 1_250,
    "front matter": "---\n" * 1_250,
    "options": "```{code-cell}\n" + ":a: b\n" * 800 + "```\n",
    "details": "<details" * 600,
}


@pytest.mark.parametrize("what", LONG)
def test_what_repeats_itself_is_read_in_no_time(folder, what):
    with an_end(3):
        fuzz.markdown(LONG[what], folder / "lesson.md")


BIB = {
    "entries that nobody closes": "@a{b, c = {" * 2_000,
    "names that nobody ends": "@a{" * 7_000,
    "spaces": "@a{b," + " " * 1_250,
    "spaces before a brace": "@a" + " " * 1_250,
    "accents": "@a{b, c = {" + "\\'{" * 6_000,
    "authors": "@a{b, author = {" + "A and " * 800 + "}}",
}


@pytest.mark.parametrize("what", BIB)
def test_a_bibliography_that_repeats_itself_is_read_in_no_time(folder, what):
    with an_end(3):
        fuzz.bibliography(BIB[what], folder)


# ---- the environment, plugins, the command

WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
HOSTILE = "<script>alert('&')</script>\x1b[31m[red]"


@FEW
@given(st.one_of(WORDS, st.sampled_from(["numpy ", "TF", "torch,jax", "none", "__class__", "../numpy", HOSTILE])))
def test_a_backend_of_the_environment(text):
    with pytest.MonkeyPatch.context() as patch, an_end():
        patch.setenv(dispatch.ENVIRONMENT, text)
        fuzz.environment()


@st.composite
def plugins(draw):
    names = st.one_of(WORDS, st.sampled_from(["numpy", "torch", "mine", "a.b", "", HOSTILE]))
    values = st.one_of(
        WORDS, st.sampled_from(["json", "json:loads", "no.such:thing", "os:", ":x", "..", "a b", "json:loads [x]", HOSTILE])
    )
    return draw(st.lists(st.tuples(names, values), min_size=1, max_size=4))


@FEW
@given(plugins(), plugins())
def test_what_plugins_declare(backends, natives):
    declared = {
        registry.ENTRY_POINTS: [EntryPoint(name, value, registry.ENTRY_POINTS) for name, value in backends],
        registry.NATIVE_PACKAGES: [EntryPoint(name, value, registry.NATIVE_PACKAGES) for name, value in natives],
    }
    with pytest.MonkeyPatch.context() as patch, an_end():
        patch.setattr(registry, "_declarations", declared.__getitem__)
        patch.setattr(registry, "_installed", None)
        patch.setattr(registry, "_homes", dict(registry._homes))
        patch.setattr(registry, "loaded", dict(registry.loaded))
        for name in registry.plugins():
            with contextlib.suppress(ValueError, ImportError, TypeError):
                kvattn.attention([[1.0]], [[1.0]], [[1.0]], backend=name)
        assert kvattn.attention(np.eye(2), np.eye(2), np.eye(2)).shape == (2, 2)
        with contextlib.suppress(TypeError):
            kvattn.softmax(SimpleNamespace())
        status, out, err = command(["doctor", "--backend", ",".join([*registry.plugins(), "numpy"])])
        assert status in (0, 1, 2), (out, err)
        assert "\x1b" not in out + err


@FEW
@given(st.binary(max_size=60))
def test_metadata_of_any_package(folder, content):
    package = folder / "strange-1.dist-info"
    package.mkdir(exist_ok=True)
    (package / "METADATA").write_bytes(content)
    (package / "entry_points.txt").write_bytes(b"[kvattn.backends]\n" + content)
    with pytest.MonkeyPatch.context() as patch, an_end():
        patch.syspath_prepend(str(folder))
        patch.setattr(registry, "_installed", None)
        assert "numpy" in kvattn.available_backends()
        assert kvattn.softmax([0.0, 0.0])[0] == 0.5
    registry._installed = None


OPTIONS = [
    "--backend", "--device", "--jobs", "--text", "--json", "--html", "--draws", "--seed", "--shapes", "--dtype",
    "--rounds", "--plot", "--output", "-o", "--install", "--timeout", "--title", "--port", "--no-compare", "--figures",
    "--grad", "--quick", "--no-references", "--version", "--help", "--",
]  # fmt: skip
VALUES = [
    "numpy", "nobody", "NUMPY,numpy", ",", "", "cpu", "cuda", "0", "-1", "1", "1e9", "nan", "99999999999999999999", "S",
    "S,,Z", "float32", "/", "/no/such/file", "\u0000", ".", "..", "lesson.md", "code.md", "text.md", "kvattn", HOSTILE,
    "\u00e9\udcff",
]  # fmt: skip


def command(argv):
    """The exit status, and what was said; what is no way to end raises."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(argv)
        except SystemExit as end:  # of argparse
            status = end.code
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def idle(folder):
    """The command in a folder of its own, without what takes long: no case, no measurement, no kernel."""
    (folder / "text.md").write_text("# Words\n", encoding="utf-8")
    (folder / "code.md").write_text("```python\n1 + 1\n```\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(cli, "_suite", lambda *_: ([], [], [], {}))
        patch.setattr("kvattn.bench.run", lambda *_, **__: [])
        patch.setattr("kvattn.lesson.run_tab", lambda *_, **__: [])
        patch.setattr("kvattn.lesson.commands._Site", lambda *_: SimpleNamespace(make=lambda: True, close=lambda: None))
        yield


COMMANDS = [
    ["doctor"],
    ["conform"],
    ["bench"],
    ["lesson", "run"],
    ["lesson", "convert"],
    ["lesson", "site"],
    ["lesson"],
    [],
    ["x"],
]


@given(
    st.sampled_from(COMMANDS),
    st.lists(st.one_of(st.sampled_from(VALUES), st.tuples(st.sampled_from(OPTIONS), st.sampled_from(VALUES))), max_size=4),
)
def test_the_command(idle, begin, rest):
    argv = [*begin, *(word for each in rest for word in ([each] if isinstance(each, str) else each))]
    if "--watch" not in argv:
        with an_end():
            status, out, err = command(argv)
        assert status in (0, 1, 2), (argv, out, err)
        assert "Traceback" not in out + err
        assert status != 2 or err.strip(), argv


def endless():
    """A loop of Python's, which looks for signals; a loop in C may not."""
    while True:
        pass


def test_the_fuzz_is_awake(folder):
    """That it sees what it looks for: other errors, and what does not end."""
    with pytest.raises(ZeroDivisionError), fuzz.said(ValueError):
        raise ZeroDivisionError
    with pytest.raises(AssertionError, match="did not end"), an_end(0.05):
        endless()
    with pytest.raises(AssertionError, match="says nothing"), fuzz.said(ValueError):
        raise ValueError
