"""The built site in a real browser: Debian's Chromium, headless, with a local server as its only network."""

import json
import os
import re
from pathlib import Path

import pytest
from axe_core_python.selenium import Axe
from browsing import SHOWN, choose, served, size, visit
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import kvattn

SITE = Path(os.environ["KVATTN_SITE"])
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if path.parts[len(SITE.parts)] in ("index.html", "_lessons", "howto", "reference")
)
LESSONS = [page for page in PAGES if page.startswith("_lessons/")]
TABS = list(dict.fromkeys(re.findall(r'data-sync-id="(\w+)"', (SITE / LESSONS[0]).read_text(encoding="utf-8"))))


@pytest.fixture(scope="session")
def address():
    with served(SITE) as found:
        yield found


def test_the_site_has_its_pages():
    assert LESSONS
    assert {"index.html", "howto/lessons.html", "reference/api.html", "reference/semantics.html"} <= set(PAGES)


def test_the_reference_has_every_public_name():
    text = (SITE / "reference" / "api.html").read_text(encoding="utf-8")
    assert [name for name in kvattn.__all__ if f'id="kvattn.{name}"' not in text] == []


def test_the_first_screen_shows_whom_it_is_for_what_it_does_and_how_to_install_it(browser, address):
    visit(browser, address, "index.html")
    picture = browser.find_element(By.CSS_SELECTOR, "article figure img")
    assert int(picture.get_property("naturalWidth")) > 500 or len(TABS) < 5
    line = browser.find_element(By.CSS_SELECTOR, "article div.highlight-sh pre")
    assert line.text.startswith("pip install ")
    assert line.rect["y"] + line.rect["height"] < 900
    told = browser.find_element(By.CSS_SELECTOR, "article figure figcaption").text
    assert float(re.search(r"by more than ([\d.]+) eps", told)[1]) < 16  # as they were where the page was built


@pytest.mark.parametrize("page", PAGES)
def test_a_page_loads_without_errors_or_requests_elsewhere_and_shows_its_maths(browser, address, page):
    visit(browser, address, page)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert f"{address}/{page}" in asked
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    answers = [event["params"]["response"] for event in events if event["method"] == "Network.responseReceived"]
    assert [answer["url"] for answer in answers if answer["status"] >= 400 and "favicon" not in answer["url"]] == []
    assert [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]] == []
    bare = "return [...document.querySelectorAll('.math')].filter(each => !each.querySelector('mjx-container')).length"
    assert browser.execute_script(bare) == 0
    assert browser.execute_script("return document.querySelectorAll('mjx-merror').length") == 0


@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_a_phone(browser, address, page):
    size(browser, 390, 800)
    visit(browser, address, page)
    width, inner = browser.execute_script("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert inner == 390
    assert width <= inner


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_its_landmarks(browser, address, page):
    visit(browser, address, page)
    count = {what: len(browser.find_elements(By.CSS_SELECTOR, what)) for what in ("main, [role=main]", "h1", "html[lang]")}
    assert count == {"main, [role=main]": 1, "h1": 1, "html[lang]": 1}
    assert browser.find_elements(By.CSS_SELECTOR, "nav, [role=navigation]")
    assert browser.execute_script("return [...document.images].filter(each => !each.alt).map(each => each.src)") == []


@pytest.mark.parametrize(
    "page", ["index.html", "reference/api.html", "reference/semantics.html", "reference/speed.html", *LESSONS[:1]]
)
def test_axe_finds_nothing_serious(browser, address, page):
    visit(browser, address, page)
    found = Axe().run(browser)["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert [(each["id"], each["nodes"][0]["html"][:200]) for each in serious] == []


def test_a_tab_that_is_chosen_shows_its_code_only(browser, address):
    visit(browser, address, "index.html")
    choose(browser, "jax")
    shown = [each.text for each in browser.find_elements(By.CSS_SELECTOR, ".sd-tab-content") if each.is_displayed()]
    assert len(shown) == 1
    assert "from kvattn import jax as kv" in shown[0]


def test_the_lessons_have_the_tabs_that_were_asked_for():
    assert set(TABS) == set(os.environ.get("KVATTN_DOCS_BACKENDS", ",".join(TABS)).split(","))


@pytest.mark.parametrize("page", LESSONS)
def test_a_lesson_opens_on_every_tab(browser, address, page):
    """Its code and its figures are there, and none of another's."""
    there = "return [...document.images].every(each => each.complete)"
    broken = "return [...document.images].filter(each => !each.naturalWidth).map(each => each.src)"
    visit(browser, address, page)
    for name in TABS:
        choose(browser, name)
        assert set(browser.execute_script(SHOWN)) == {name}
        text = browser.execute_script("return document.querySelector('[role=main]').innerText")  # `text` takes seconds
        assert [tab for tab in TABS if f"from kvattn import {tab} as kv" in text] == [name]
        WebDriverWait(browser, 30).until(lambda driver: driver.execute_script(there))
        assert browser.execute_script(broken) == [], name
    assert [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]] == []


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_a_drawing_has_the_colour_of_the_text_and_is_read_on_a_phone(browser, address, mode):
    size(browser, 390, 800)
    for page in LESSONS:
        visit(browser, address, page)
        browser.execute_script("document.body.dataset.theme = arguments[0]", mode)
        for drawing in browser.find_elements(By.CSS_SELECTOR, "figure.drawing svg"):
            assert drawing.get_attribute("role") == "img"
            assert len(drawing.get_attribute("aria-label")) > 20
            box, view = drawing.rect, float(drawing.get_dom_attribute("viewBox").split()[2])
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390
            assert 14 * box["width"] / view > 11  # pixels, of letters of 14 units
            ink, paper = (
                browser.execute_script(f"return getComputedStyle({of}).{what}", drawing)
                for of, what in (("arguments[0].querySelector('text')", "fill"), ("document.body", "backgroundColor"))
            )
            bright = [sum(map(float, re.findall(r"[\d.]+", colour)[:3])) for colour in (ink, paper)]
            assert abs(bright[0] - bright[1]) > 400, (ink, paper)
            assert (bright[0] > bright[1]) is (mode == "dark")


def test_solutions_are_folded_until_they_are_asked_for(browser, address):
    for page in LESSONS:
        visit(browser, address, page)
        choose(browser, TABS[0])
        folded = browser.find_elements(By.CSS_SELECTOR, "section[id=solutions] details")
        assert folded
        assert {each.get_attribute("open") for each in folded} == {None}, page
    inside = folded[0].find_elements(By.CSS_SELECTOR, "p, div.highlight")
    assert inside
    assert not inside[0].is_displayed()
    folded[0].find_element(By.CSS_SELECTOR, "summary").send_keys(Keys.ENTER)
    assert inside[0].is_displayed()


def test_a_wide_figure_scrolls_on_a_phone(browser, address):
    size(browser, 390, 800)
    visit(browser, address, next(page for page in LESSONS if "attention-pooling" in page))
    widths = "return [...document.querySelectorAll('a.image-reference')].map(each => [each.clientWidth, each.scrollWidth])"
    assert (found := browser.execute_script(widths))
    assert all(client < 390 < scroll for client, scroll in found)


def test_a_choice_holds_across_a_page_and_the_next(browser, address):
    visit(browser, address, max(LESSONS, key=lambda page: (SITE / page).read_text(encoding="utf-8").count('"sd-tab-set')))
    choose(browser, "numpy")
    assert set(browser.execute_script(SHOWN)) == {"numpy"}
    choose(browser, "torch")
    shown = browser.execute_script(SHOWN)
    assert len(shown) > 1
    assert set(shown) == {"torch"}
    choose(browser, "numpy")
    visit(browser, address, "index.html")
    assert browser.execute_script(SHOWN) == ["numpy"]


def test_tabs_work_from_the_keyboard(browser, address):
    visit(browser, address, "index.html")
    first = browser.find_element(By.CSS_SELECTOR, ".sd-tab-set > input")
    browser.execute_script("arguments[0].focus()", first)
    first.send_keys(Keys.ARROW_RIGHT)
    assert browser.execute_script(SHOWN) == ["numpy"]
    browser.refresh()
    assert browser.execute_script(SHOWN) == ["numpy"]


@pytest.mark.parametrize(("page", "start"), [("index.html", "pip install '.[torch]'"), ("reference/api.html", "attention([[")])
def test_code_copies_without_prompts(browser, address, page, start):
    grant = {"origin": address, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    browser.execute_cdp_cmd("Browser.grantPermissions", grant)
    visit(browser, address, page)
    browser.execute_cdp_cmd("Page.bringToFront", {})
    button = browser.find_element(By.CSS_SELECTOR, "button.copybtn")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button)
    ActionChains(browser).move_to_element(button).click(button).perform()
    WebDriverWait(browser, 10).until(lambda driver: "success" in button.get_attribute("class"))
    read = "const [done] = arguments; navigator.clipboard.readText().then(done, error => done(String(error)))"
    assert browser.execute_async_script(read).startswith(start)
