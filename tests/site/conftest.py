"""Sites are tested where there is one: KVATTN_SITE is the folder that sphinx-build wrote (`tox -e docs`)."""

import os
import shutil
import tempfile

import pytest

collect_ignore = [] if "KVATTN_SITE" in os.environ else ["test_site.py", "test_own_site.py"]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="session")
def chromium():
    from selenium import webdriver

    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    assert all(programs), "the site's tests need Debian's Chromium: apt-get install chromium chromium-driver"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = programs[0]
        for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
        yield driver
        driver.quit()


@pytest.fixture
def browser(chromium, address):
    """A browser that has chosen nothing, on a desktop's screen."""
    from browsing import size

    size(chromium, 1280, 900)
    chromium.get(f"{address}/index.html")
    chromium.execute_script("localStorage.clear()")
    chromium.get_log("browser")
    chromium.get_log("performance")
    return chromium
