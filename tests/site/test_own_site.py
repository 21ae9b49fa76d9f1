"""`kvattn lesson site` in a real browser: a site of one's own lessons, and one that follows what is written."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from axe_core_python.selenium import Axe
from browsing import SHOWN, choose, served, size, visit
from lessons import cell, setup
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

import kvattn

WIDE = "from matplotlib import pyplot as plt\nplt.figure(figsize=(14, 3))\nplt.plot([1, 2])\nplt.xlabel('Keys')\nplt.show()"
FIRST = """# The first
:label:`sec_first`

See :numref:`sec_second`, :eqref:`eq_far`, :numref:`fig_f` and :citet:`Vaswani.2017`.

$$a_i = \\frac{\\exp(s_i)}{\\sum_j \\exp(s_j)}$$
:eqlabel:`eq_near`

![A picture](img/x.svg)
:label:`fig_f`

""" + "".join(
    [
        setup("numpy", "pytorch"),
        cell("from kvattn import numpy as kv", "numpy"),
        cell("from kvattn import torch as kv", "pytorch"),
        cell("print(open('data.txt').read())\nprint(kv.numpy(kv.softmax(kv.asarray([[0.0, 1.0]]))))"),
        cell(WIDE),
        cell("kv.softmax(kv.asarray([0.0]))"),
    ]
)
SECOND = "# The second\n:label:`sec_second`\n\n$$b$$\n:eqlabel:`eq_far`\n\nBack to [the first](01-first.md): zebra.\n\n"
SECOND += "```python\n6 * 7\n```\n\n## A section\n"
FILES = {
    "01-first.md": FIRST,
    "02-second.md": SECOND,
    "data.txt": "words of a file",
    "img/x.svg": '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40"><circle r="9" cx="20" cy="20"/></svg>',
    "refs.bib": "@article{Vaswani.2017, author={Vaswani, A and Shazeer, N}, title={Attention}, year={2017}}",
}


def write(folder):
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def command(folder, *options):
    found = os.pathsep.join([str(Path(kvattn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-m", "kvattn", "lesson", "site", "lessons", "-o", "out", *options]
    environment = os.environ | {"PYTHONPATH": found, "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    for place in ("home", "tmp"):
        (folder / place).mkdir(exist_ok=True)
    return {"args": words, "cwd": folder, "env": environment, "text": True}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with lessons and the site that the command made of them, and what it said."""
    folder = tmp_path_factory.mktemp("own")
    write(folder / "lessons")
    done = subprocess.run(**command(folder, "--backend", "all", "--title", "My book"), capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    return folder, done.stdout


@pytest.fixture(scope="session")
def address(made):
    with served(made[0] / "out") as found:
        yield found


PAGES = ["index.html", "01-first.html", "02-second.html"]


def test_nothing_is_written_but_the_site_and_progress_is_told_without_warnings(made):
    folder, said = made
    written = {path.relative_to(folder / "lessons").as_posix() for path in (folder / "lessons").rglob("*") if path.is_file()}
    assert written == {*FILES}
    assert {path.name for path in folder.iterdir()} == {"lessons", "out", "home", "tmp"}
    lines = said.splitlines()
    assert [line.partition(",")[0] for line in lines[:-1] if not line.endswith("so far")] == [
        "01-first.md numpy: 4 cells run", "01-first.md torch: 4 cells run", "02-second.md numpy: 1 cell run",
        "02-second.md torch: 1 cell run",
    ]  # fmt: skip
    assert "2 lessons on numpy, torch: 10 cells run" in lines[-1]


def test_an_unchanged_folder_costs_nothing(made):
    folder, _ = made
    pages = {name: (folder / "out" / name).stat().st_mtime_ns for name in PAGES}
    again = subprocess.run(**command(folder, "--backend", "all", "--title", "My book"), capture_output=True)
    assert (again.returncode, again.stderr) == (0, "")
    assert re.fullmatch(r"2 lessons on numpy, torch: nothing had to be run, .*\n", again.stdout)
    assert {name: (folder / "out" / name).stat().st_mtime_ns for name in PAGES} == pages


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_needs_no_network_shows_its_maths_and_fits(browser, address, page, width):
    size(browser, width, 800)
    visit(browser, address, page)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert f"{address}/{page}" in asked
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]] == []
    bare = "return [...document.querySelectorAll('.math')].filter(each => !each.querySelector('mjx-container')).length"
    assert browser.execute_script(bare) == 0
    broken = (
        "return [...document.images].filter(each => !each.complete || !each.naturalWidth || !each.alt).map(each => each.src)"
    )
    assert browser.execute_script(broken) == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_chapters_references_and_citations_have_their_numbers(browser, address):
    visit(browser, address, "index.html")
    toc = browser.find_element(By.CSS_SELECTOR, "[role=main] .toctree-wrapper").text.splitlines()
    assert toc == ["1. The first", "1.1. References", "2. The second", "2.1. A section"]
    visit(browser, address, "01-first.html")
    text = browser.find_element(By.CSS_SELECTOR, "[role=main]").text
    assert "See Section 2, (2.1), Fig. 1.1 and Vaswani and Shazeer (2017)." in text
    assert "Vaswani, A; Shazeer, N. 2017. Attention." in text
    browser.find_element(By.LINK_TEXT, "Section 2").click()
    assert "02-second.html" in browser.current_url
    browser.find_element(By.LINK_TEXT, "the first").click()
    assert "01-first.html" in browser.current_url


def test_a_tab_that_is_chosen_is_chosen_in_all_and_shows_its_outputs(browser, address):
    visit(browser, address, "01-first.html")
    for name, shown, other in (("torch", "tensor([1.]", "array([1.]"), ("numpy", "array([1.]", "tensor([1.]")):
        choose(browser, name)
        assert set(browser.execute_script(SHOWN)) == {name}
        assert len(browser.execute_script(SHOWN)) > 1
        text = browser.find_element(By.CSS_SELECTOR, "[role=main]").text
        assert f"from kvattn import {name} as kv" in text
        assert shown in text
        assert other not in text
        assert text.count("words of a file\n[[0.26894") == 1


def test_it_is_searched_and_dark(browser, address):
    visit(browser, address, "search.html?q=zebra")
    WebDriverWait(browser, 20).until(lambda driver: driver.find_elements(By.CSS_SELECTOR, "#search-results li a"))
    assert [each.text for each in browser.find_elements(By.CSS_SELECTOR, "#search-results li a")] == ["The second"]
    visit(browser, address, "01-first.html")
    background = "return getComputedStyle(document.body).backgroundColor"
    seen = {browser.execute_script(background)}
    toggle = browser.find_element(By.CSS_SELECTOR, ".content-icon-container .theme-toggle, .theme-toggle")
    for _ in range(3):
        browser.execute_script("arguments[0].click()", toggle)
        seen.add(browser.execute_script(background))
    assert len(seen) == 2


def test_axe_finds_nothing_serious(browser, address):
    visit(browser, address, "01-first.html")
    serious = [each for each in Axe().run(browser)["violations"] if each["impact"] in ("serious", "critical")]
    assert [(each["id"], each["nodes"][0]["html"][:200]) for each in serious] == []


def test_a_lesson_has_a_notebook_to_download_for_each_framework(browser, address):
    visit(browser, address, "01-first.html")
    links = browser.find_elements(By.CSS_SELECTOR, "div.notebooks a")
    assert [each.text for each in links] == ["NumPy", "PyTorch"]
    for link, name in zip(links, ("numpy", "torch"), strict=True):
        with urllib.request.urlopen(link.get_attribute("href")) as answer:
            notebook = nbformat.reads(answer.read().decode(), as_version=4)
        nbformat.validate(notebook)
        assert f'tab.select_tab("{name}")' in "".join(each.source for each in notebook.cells)
        assert link.get_attribute("href").endswith(f"/01-first.{name}.ipynb")


def test_a_lesson_that_fails_leaves_the_site_as_it_was(made, tmp_path):
    write(tmp_path / "lessons")
    (tmp_path / "lessons" / "03-bad.md").write_text("# Bad\n\n" + cell("1 / 0") + ":numref:`sec_none`\n")
    done = subprocess.run(**command(tmp_path, "--backend", "numpy"), capture_output=True)
    assert done.returncode == 1
    assert "03-bad.md:5: 1 / 0\n  ZeroDivisionError: division by zero\n" in done.stdout
    assert "03-bad.md:7: :numref:`sec_none` leads nowhere" in done.stdout
    assert "so the site was not made" in done.stdout
    assert not (tmp_path / "out" / "index.html").exists()


def test_what_is_written_is_run_from_there_on_and_the_page_loads_again(chromium, tmp_path):
    lessons = write(tmp_path / "lessons")
    (lessons / "01-first.md").write_text("# First\n\n" + cell("x = 1\nimport os") + cell("print(x, os.getpid())"))
    (lessons / "02-second.md").write_text("# Second\n\n" + cell("1"))
    (tmp_path / "said").write_text("")
    options = ("--backend", "numpy", "--watch", "--port", "0")
    with (
        (tmp_path / "said").open("w") as out,
        # Ctrl-C ends it also where a shell that runs this in the background ignores it, which a process inherits.
        subprocess.Popen(
            **command(tmp_path, *options),
            stdout=out,
            stderr=out,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as running,
    ):

        def said(pattern):
            """What matches in the command's words, once they are said."""
            for _ in range(600):
                if found := re.search(pattern, (tmp_path / "said").read_text(), re.S):
                    return found[1]
                assert running.poll() is None, (tmp_path / "said").read_text()
                time.sleep(0.1)
            raise AssertionError((tmp_path / "said").read_text())

        def shown():
            outputs = [each.text for each in chromium.find_elements(By.CSS_SELECTOR, "div.output pre")]
            return outputs[0] if outputs else ""

        def change(old, new):
            text = (lessons / "01-first.md").read_text()
            assert old in text
            (lessons / "01-first.md").write_text(text.replace(old, new))

        try:
            address = said(r"Serving (http://127\.0\.0\.1:\d+) ")
            visit(chromium, address, "01-first.html")
            assert shown().split()[0] == "1"
            change("print(x,", "print(x + 1,")
            WebDriverWait(chromium, 60, ignored_exceptions=[Exception]).until(lambda _: shown().startswith("2 "))
            process = shown().split()[1]
            change("print(x + 1,", "print(x + 2,")
            WebDriverWait(chromium, 60, ignored_exceptions=[Exception]).until(lambda _: shown().startswith("3 "))
            assert shown().split()[1] == process
            change("print(x + 2,", "print(nothing,")
            said(r"(NameError: name 'nothing' is not defined.*the site was not made)")
            change("print(nothing,", "print(x + 3,")
            WebDriverWait(chromium, 60, ignored_exceptions=[Exception]).until(lambda _: shown().startswith("4 "))
            assert shown().split()[1] == process
        finally:
            running.send_signal(signal.SIGINT)
            running.wait(30)
    assert running.returncode == 0
    words = (tmp_path / "said").read_text()
    assert "Traceback" not in words
    assert re.findall(r": (\d+) cells? run, the others", words) == ["3", "2", "1", "1"]
    assert {path.name for path in lessons.iterdir()} == {*{name.partition("/")[0] for name in FILES}}
