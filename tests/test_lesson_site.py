"""A folder of lessons as pages: what is run again and what is not, what is written and where. In a browser: tests/site."""

import http.client
import os
import re
import threading
from pathlib import Path

import nbformat
import pytest
from lessons import TWINS, cell, fixture_command, fixture_world  # noqa: F401

from kvattn import cli, install, lesson
from kvattn.lesson import commands, forks, live, runner, site


@pytest.fixture
def executed(monkeypatch):
    """The code of the cells that kernels are given."""
    given = []
    run = runner._Kernel.run
    monkeypatch.setattr(runner._Kernel, "run", lambda kernel, made: (given.append(made.source), run(kernel, made))[1])
    return given


# ---- what is run again


def test_a_tab_is_run_again_when_a_file_that_it_reads_has_changed(world, executed):
    (world / "data.txt").write_text("1")
    (world / "mine.py").write_text("x = 2")
    (folder := world / "more").mkdir()
    code = ["import mine", "open('data.txt').read()", "import os\nlen(os.listdir('more'))"]
    code.append("open('new.txt', 'w').write('3'); open('new.txt').read()")
    parsed = lesson.parse("".join(cell(each) for each in code), world / "lesson.md")

    def run():
        executed.clear()
        ran = lesson.run_tab(parsed, "numpy", cache=world / "cache")
        return [each.outputs[-1]["data"]["text/plain"] for each in ran if each.outputs]

    assert run() == ["'1'", "0", "'3'"]
    assert executed == code
    assert run() == ["'1'", "0", "'3'"]
    assert executed == []
    (world / "other.txt").write_text("not read")
    (world / "new.txt").unlink()  # which the lesson itself writes
    run()
    assert executed == []
    (world / "data.txt").write_text("4")
    assert run()[0] == "'4'"
    (folder / "one").write_text("")
    assert run()[1] == "1"
    (world / "mine.py").write_text("x = 5")
    run()
    assert executed == code
    assert {path.name for path in world.iterdir()} == {"cache", "data.txt", "mine.py", "more", "new.txt", "other.txt", "site"}


def test_a_kernel_that_stays_is_given_only_the_cells_from_the_first_that_changed_on(world, executed):
    tab = runner.Tab("numpy", cache=world / "cache")

    def run(*cells, prose=""):
        executed.clear()
        ran = tab.run(lesson.parse(prose + "".join(cell(each) for each in cells), world / "lesson.md"))
        return [each.error or (each.outputs[-1]["data"]["text/plain"] if each.outputs else None) for each in ran]

    def kept():
        return len(list((world / "cache").glob("*.json")))

    try:
        assert run("x = 1", "x += 1; x", "x * 10") == [None, "2", "20"]
        assert run("x = 1", "x += 1; x", "x * 100", prose="# Title\n") == [None, "2", "200"]
        assert executed == ["x * 100"]
        assert run("x = 1", "x += 1; x", "x * 100") == [None, "2", "200"]
        assert executed == []
        assert kept() == 1  # not what depends on cells that are gone
        broken = run("x = 1", "x += 1; x", "1 /\\\n 0", "5")
        assert "lesson.md:11: 1 /\\\n" in broken[-1].replace("  ", "")
        assert len(broken) == 3
        assert run("x = 1", "x += 1; x", "1 /\\\n 0", "5") == broken
        assert executed == []
        assert run("x = 1", "x += 1; x", "x", "5") == [None, "2", "2", "5"]
        assert executed == ["x", "5"]
        tab.close()
        assert run("x = 1", "x += 1; x", "x", "5") == [None, "2", "2", "5"]
        assert executed == []
        assert run("x = 1", "x += 1; x", "x", "6") == [None, "2", "2", "6"]
        assert executed == ["x = 1", "x += 1; x", "x", "6"]
        assert kept() == 2
        assert run("x = 1", "x += 1; x", "x", "6", "7")[-1] == "7"
        assert executed == ["7"]
        assert kept() == 3  # a kernel that was given these cells and no others
    finally:
        tab.close()


# ---- the pages of a folder


@pytest.fixture
def book(world):
    (world / "book").mkdir()

    def write(**files):
        for name, text in files.items():
            path = world / "book" / name.replace("__", "/").replace("_ipynb", ".ipynb").replace("_bib", ".bib")
            path = path if path.suffix else path.with_suffix(".md")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return site.find(world / "book")

    return write


def test_the_lessons_of_a_folder_are_those_of_its_folders_too_but_for_what_is_no_lesson(book, world):
    made = book(**{"b": "# B\n", "a": "# A\n", "two__c": "# C\n", "README": "# No\n", "_build__x": "# No\n", "d_bib": ""})
    (world / "book" / ".hidden.md").write_text("# No")
    (world / "book" / "out" / site.WORK_FOLDER).mkdir(parents=True)
    (world / "book" / "out" / "x.md").write_text("# No")
    assert cli.main(["lesson", "convert", str(world / "book" / "a.md"), "--backend", "numpy"]) == 0
    assert (world / "book" / "a.numpy.ipynb").is_file()
    again = site.find(world / "book")
    assert list(made.lessons) == list(again.lessons) == ["a", "b", "two/c"]
    assert [path.name for path in again.files] == ["a.md", "b.md", "c.md", "d.bib"]
    nbformat.write(nbformat.v4.new_notebook(), world / "book" / "b.ipynb")
    with pytest.raises(ValueError, match=r"b.md and .*b.ipynb would be one page|b.ipynb and .*b.md would be one page"):
        site.find(world / "book")


def test_pages_refer_to_each_other_and_have_a_notebook_for_each_framework(book, world, executed):
    one = f"# One\n:label:`sec_one`\n{TWINS}See :numref:`sec_two`, :cite:`K`.\n\n![P](p.svg)\n" + cell("7") + cell("1", "twin")
    files = {"one": one, "two__second": "# Two\n:label:`sec_two`\n\n![P](../p.svg) and `![P](p.svg)`\n"}
    (world / "book" / "p.svg").write_text("<svg/>")
    made = book(**files, r_bib="@misc{K, author={Ann Key}, year=1999}")
    pages = world / "pages"
    given = {"numbered": True, "install": "https://x.org/kvattn.whl", "title": "My book", "cache": world / "cache"}
    assert site.write(made, pages, ["numpy", "twin"], **given) == []
    text = (pages / "one.md").read_text(encoding="utf-8")
    assert "See {numref}`sec_two`, [Key, 1999]." in text
    (picture,) = re.findall(r"!\[P\]\(outputs/(\w+\.svg)\)", text)
    assert (pages / "outputs" / picture).read_text() == "<svg/>"
    assert f"![P](../outputs/{picture}) and `![P](p.svg)`" in (pages / "two" / "second.md").read_text(encoding="utf-8")
    links = re.findall(r"{download}`(\w+) <(notebooks/one\.\w+\.ipynb)>`", text.partition("# One\n")[2])
    assert links == [("NumPy", "notebooks/one.numpy.ipynb"), ("twin", "notebooks/one.twin.ipynb")]
    cells = [nbformat.read(pages / path, as_version=4).cells for _, path in links]
    assert [each[0].source for each in cells] == [
        '%pip install -q "kvattn @ https://x.org/kvattn.whl"',
        '%pip install -q "kvattn[twin] @ https://x.org/kvattn.whl"',
    ]
    assert [[each.source for each in one if each.cell_type == "code"][2:] for one in cells] == [["7"], ["7", "1"]]
    assert "*Two* (second)" in "".join(each.source for each in cells[0])
    index = (pages / "index.md").read_text(encoding="utf-8")
    assert index.startswith("# My book\n")
    assert re.search(r"\{toctree\}\n:maxdepth: 2\n:numbered: ?\n\n/one\n/two/second\n```", index)

    # what has not changed is neither run nor written again; what is gone goes
    times = {path: path.stat().st_mtime_ns for path in pages.rglob("*.*")}
    executed.clear()
    assert site.write(made, pages, ["numpy", "twin"], **given) == []
    assert executed == []
    assert {path for path, then in times.items() if path.suffix == ".md" and path.stat().st_mtime_ns != then} == set()
    for kept in (world / "cache").iterdir():
        os.utime(kept, (0, 0))
    (world / "book" / "one.md").unlink()
    problems = site.write(site.find(world / "book"), pages, ["numpy"], **given)
    assert problems == []
    left = sorted(path.relative_to(pages).as_posix() for path in pages.rglob("*") if path.is_file())
    assert left == ["index.md", f"outputs/{picture}", "two/second.md"]
    assert list((world / "cache").iterdir()) == []


def test_the_authors_own_index_lists_the_pages_or_is_given_their_list(book, world):
    made = book(index="# Mine\n\nWords.\n", a="# A\n", ch__index="# Chapter\n", ch__b="# B\n", dh__c="# C\n")
    assert site.title_of(made) == "Mine"
    assert site.write(made, world / "pages", ["numpy"], title="x") == []
    text = (world / "pages" / "index.md").read_text()
    assert text.startswith("# Mine\n\nWords.\n")
    assert text.endswith(":numbered: \n\n/a\n/ch/index\n/dh/c\n```\n")
    assert (world / "pages" / "ch" / "index.md").read_text().endswith(":maxdepth: 2\n\n/ch/b\n```\n")
    made = book(index="# Mine\n\n```toc\na\n```\n")
    assert site.write(made, world / "pages", ["numpy"], title="x") == []
    assert (world / "pages" / "index.md").read_text().count("{toctree}") == 1


def test_what_is_wrong_is_told_and_nothing_is_written(book, world):
    made = book(a=f"# A\n{TWINS}{cell('1 / 0', 'twin')}", b="# B\n:numref:`sec_nowhere`\n", c=cell("1", "twin"))
    problems = site.write(made, world / "pages", ["numpy"])
    assert [re.sub(r".*/book/", "", each) for each in problems] == [
        "b.md:2: :numref:`sec_nowhere` leads nowhere: no heading, figure, table or equation of this folder's lessons has it",
        "c.md has none of the tabs numpy; it has: twin",
    ]
    assert "a.md:8: 1 / 0" in site.write(made, world / "pages", ["twin"])[0]
    assert not (world / "pages").exists()


# ---- kernels that are forked

LEFT = """
import builtins, os, random, signal, sys, warnings
import numpy as np
import kvattn
from matplotlib import pyplot as plt
builtins.left = os.environ["LEFT"] = sys.modules["left"] = np.left = "left"
np.set_printoptions(precision=2)
np.seterr(all="raise")
kvattn.set_backend("twin")
plt.rcParams["figure.dpi"] = 7
plt.plot([1])
warnings.simplefilter("error")
os.chdir("..")
sys.path.insert(0, "left")
held = open("left.txt", "w")
before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
"""
NOTHING = """
import os, signal, sys, warnings
import numpy as np
import kvattn
state = {
    "names": [name for name in dir() if name[0] != "_"], "builtin": "left" in dir(__builtins__), "env": "LEFT" in os.environ,
    "module": "left" in sys.modules or hasattr(np, "left"), "print": np.get_printoptions()["precision"], "err": np.geterr(),
    "backend": kvattn.get_backend(), "filters": len(warnings.filters), "path": sys.path, "cwd": os.getcwd(),
    "files": {os.path.basename(os.readlink(each.path)) for each in os.scandir("/proc/self/fd") if os.path.isfile(each.path)},
    "signals": [str(signal.getsignal(each)) for each in (signal.SIGTERM, signal.SIGCHLD)],
    "argv": "ipykernel_launcher" in sys.argv[0],
    "main": sys.modules["__main__"].__name__, "session": os.getsid(0) == os.getpid(),
    "pyplot": "matplotlib.pyplot" in sys.modules,
}
"""


@pytest.fixture
def started():
    """Runs lessons, by fork or each by itself, and gives what their cells ended with."""
    with forks.Forks() as made:

        def run(path, *codes, fork=True, name="numpy"):
            parsed = lesson.parse("".join(cell(each) for each in codes), path)
            ran = lesson.run_tab(parsed, name, forks=made if fork else None)
            return [each.error or (each.outputs[-1]["data"]["text/plain"] if each.outputs else None) for each in ran]

        run.forks = made
        yield run


def test_a_lesson_finds_nothing_of_another_that_was_run_before(world, started):
    (world / "book").mkdir()
    one, two = world / "book" / "one.md", world / "book" / "two.md"
    assert "Figure" in started(one, LEFT)[0]  # nothing went wrong
    found = [eval(*started(two, NOTHING + "state", fork=fork)) for fork in (True, False)]
    assert found[0] == found[1]
    for fork in (True, False):  # and who needs it fails
        (said,) = started(two, "print(left)", fork=fork)
        assert "NameError: name 'left' is not defined" in said
        (said,) = started(two, "import os\nos.environ['LEFT']", fork=fork)
        assert "KeyError" in said


def test_lessons_of_a_tab_are_forked_by_one_process_which_ends_with_what_it_forked(world, started):
    ask = "import os, random, numpy as np\nos.getpid(), os.getppid(), np.random.rand(), random.random()"
    ran = [eval(*started(world / f"{i}.md", ask)) for i in range(2)]
    (pid, parent, *drawn), (other, same, *more) = ran
    assert parent == same == started.forks.parents["numpy"].process.pid
    assert len({pid, other, parent}) == 3
    assert not {*drawn} & {*more}  # what is not seeded is not the same in both
    tab = runner.Tab("numpy", forks=started.forks)
    tab.run(lesson.parse(cell("import subprocess; child = subprocess.Popen(['sleep', '1000'])"), world / "a.md"))
    (pid,) = [each.pid for each in [tab.kernel.client.km.provisioner]]
    assert Path(f"/proc/{pid}").exists()
    started.forks.close()
    assert not any(Path(f"/proc/{each}").exists() for each in (pid, parent))
    tab.close()


def test_kernels_that_die_or_that_nobody_can_fork_are_told_and_started(world, started):
    (said,) = started(world / "a.md", "import os, sys\nsys.stderr.flush(); os.write(2, b'my words'); os._exit(3)")
    assert "the kernel died" in said
    assert "my words" in said
    assert started(world / "a.md", "1") == ["1"]
    started.forks.parents["numpy"].process.kill()
    started.forks.parents["numpy"].process.wait()
    assert started(world / "a.md", "2") == ["2"]
    assert started(world / "a.md", "3", name="twin") == ["3"]  # a plugin
    assert started.forks.parents["twin"] is None


def test_a_module_beside_a_lesson_is_what_it_would_be_to_the_lesson_alone(world, started):
    (world / "book").mkdir()
    (world / "book" / "statistics.py").write_text(
        "raise ImportError('mine')"
    )  # behind Python's own, or not: so IPython decides
    (world / "book" / "other.py").write_text("x = 'mine'")
    path = world / "book" / "a.md"
    one, other = (started(path, "import statistics", "import other\nother.x", fork=fork) for fork in (True, False))
    assert one == other
    (world / "book" / "numpy.py").write_text("raise ImportError('mine')")
    one, other = (started(path, "import numpy", fork=fork) for fork in (True, False))
    assert one == other
    assert "the tab does not start: ImportError: " in one[0]


# ---- the command


@pytest.fixture
def refused(monkeypatch, capsys, world):
    (world / "book").mkdir(exist_ok=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # of Sphinx, which these do not reach

    def run(*options):
        assert cli.main(["lesson", "site", *map(str, options)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err

    return run


def test_a_site_is_refused_where_it_would_write_among_the_authors_files(refused, world):
    (world / "book" / "a.md").write_text(cell("1"))
    before = sorted(world.rglob("*"))
    for out in (world / "book", world, world / "book" / ".."):
        assert "has the lessons in it: --output names a folder of its own" in refused(world / "book", "-o", out)
    assert "holds something else than a site" in refused(world / "book", "-o", world / "site")
    assert "holds something else than a site" in refused(world / "book", "-o", world / "book" / "a.md")
    assert "is no folder; for one lesson: kvattn lesson run" in refused(world / "book" / "a.md", "-o", world / "out")
    assert sorted(world.rglob("*")) == before


def test_a_folder_without_code_is_no_success(refused, world):
    assert "there is no code in it, so nothing was run: a cell is fenced" in refused(world / "book", "-o", world / "out")
    (world / "book" / "a.md").write_text(TWINS + cell("1", "twin"))
    said = refused(world / "book", "-o", world / "out", "--backend", "numpy")
    assert "there is no code on numpy" in said
    assert "unknown backend 'nonesuch'" in refused(world / "book", "-o", world / "out", "--backend", "nonesuch")


@pytest.mark.parametrize("package", commands.SITE)
def test_what_a_site_needs_and_is_absent_is_named_with_its_extra(world, capsys, monkeypatch, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    assert cli.main(["lesson", "site", str(world), "-o", str(world / "out")]) == 2
    assert f"it needs {package}, which is not installed: {install.line('site')}" in capsys.readouterr().err
    assert not (world / "out").exists()


# ---- while lessons are written


def test_files_that_change_are_told(world):
    (world / "a.md").write_text("1")
    steps = iter([lambda: None, lambda: (world / "a.md").write_text("12"), lambda: (world / "b.md").write_text(""),
                  lambda: (world / ".hidden").write_text(""), lambda: (world / "a.md").unlink()])  # fmt: skip
    told = live.changes(world, pause=lambda: next(steps)())
    assert [[path.name for path in next(told)] for _ in range(3)] == [["a.md"], ["b.md"], ["a.md"]]


def test_pages_are_served_to_this_machine_and_told_to_load_again(world):
    (world / "index.html").write_text("<html><body>words</body></html>")
    (world / "x.txt").write_text("text")
    server = live.Server(world, 0)
    try:
        host = server.address.removeprefix("http://")
        assert host.startswith("127.0.0.1:")

        def get(path):
            connection = http.client.HTTPConnection(host, timeout=10)
            connection.request("GET", path)
            return connection.getresponse()

        for path in ("/", "/index.html"):
            page = get(path)
            assert re.fullmatch(r"<html><body>words<script>.*</script></body></html>", page.read().decode())
            assert page.headers["Cache-Control"] == "no-store"
        assert get("/x.txt").read() == b"text"
        assert get("/none.html").status == 404
        events = get("/.kvattn/changes")
        threading.Timer(0.2, server.reload).start()
        assert events.readline() == b"data: changed\n"
    finally:
        server.close()


def test_a_port_that_is_taken_is_told():
    server = live.Server(Path(), 0)
    try:
        with pytest.raises(OSError, match="in use"):
            live.Server(Path(), server.server.server_port)
    finally:
        server.close()
