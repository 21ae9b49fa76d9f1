"""What the tests of sites do in a browser."""

import contextlib
import functools
import http.server
import threading

from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

# the tabs that are shown, of sets with more than one
SHOWN = (
    "return [...document.querySelectorAll('.sd-tab-set:has(> label ~ label) > input:checked + label')]"
    ".map(each => each.dataset.syncId)"
)


@contextlib.contextmanager
def served(folder):
    """The address of a folder, as long as it is needed."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def size(browser, width, height):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def visit(browser, address, page):
    """Open a page, and wait for its maths."""
    browser.get(f"{address}/{page}")
    ready = "return !document.querySelector('.math') || (window.MathJax?.startup?.promise ? 1 : 0)"
    WebDriverWait(browser, 30).until(lambda driver: driver.execute_script(ready))
    done = "const [done] = arguments; Promise.resolve(window.MathJax?.startup?.promise).then(() => done())"
    browser.execute_async_script(done)


def choose(browser, name):
    browser.find_element(By.CSS_SELECTOR, f".sd-tab-set > label[data-sync-id={name}]").click()
