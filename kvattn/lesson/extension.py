"""The Sphinx extension, ``extensions = ["kvattn.lesson"]``: a folder of lessons, run, as pages of a site.

Settings of conf.py: ``kvattn_lessons``, the folder, default "lessons"; ``kvattn_backends``, a list, default those that are
installed; ``kvattn_numbered``, default True: the toctree that has the lessons says ``:numbered:``; ``kvattn_install``: see
``kvattn.lesson.notebook``. The pages are those of the folder "_lessons".
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from sphinx.errors import ExtensionError
from sphinx.ext.mathjax import MATHJAX_URL
from sphinx.util.fileutil import copy_asset
from sphinx.util.logging import getLogger

import kvattn
from kvattn import registry
from kvattn.lesson import site

_STATIC = Path(__file__).parent / "static"


def setup(app: Any) -> dict[str, Any]:
    for name in ("myst_parser", "sphinx_design", "sphinx_copybutton", "sphinx.ext.mathjax"):
        app.setup_extension(name)
    app.add_config_value("kvattn_lessons", "lessons", "env")
    app.add_config_value("kvattn_backends", None, "env")
    app.add_config_value("kvattn_numbered", True, "env")
    app.add_config_value("kvattn_install", None, "env")
    app.connect("config-inited", _configure, priority=400)  # before sphinx_copybutton's own
    app.connect("builder-inited", _lessons)
    app.connect("build-finished", _mathjax)
    app.add_css_file("kvattn-lessons.css")
    app.add_js_file("kvattn-lessons.js")
    return {"version": kvattn.__version__, "parallel_read_safe": True, "parallel_write_safe": True}


def _configure(app: Any, config: Any) -> None:
    """What the pages need of Sphinx."""
    config.myst_enable_extensions = {*config.myst_enable_extensions, "amsmath", "colon_fence", "dollarmath"}
    config.html_static_path = [*config.html_static_path, str(_STATIC)]
    config.numfig = True
    if config.mathjax_path == MATHJAX_URL:
        config.mathjax_path = "mathjax/tex-chtml.js"
    if config.copybutton_selector == "div.highlight pre":  # what a cell showed is not to be copied
        config.copybutton_selector = "div.highlight-python pre, div.highlight-sh pre, div.highlight-md pre, div.doctest pre"
        config.copybutton_prompt_text, config.copybutton_prompt_is_regexp = r">>> |\.\.\. ", True
    if config.kvattn_lessons:
        config.exclude_patterns = [*config.exclude_patterns, config.kvattn_lessons]


def _lessons(app: Any) -> None:
    """The lessons, run on each backend, as pages of the folder _lessons."""
    if not app.config.kvattn_lessons:
        return
    names = app.config.kvattn_backends
    installed = registry.available_backends()
    backends = [registry.canonical(name) for name in names] if names else list(installed)
    if absent := [name for name in backends if name not in installed]:
        raise ExtensionError(f"kvattn_backends names what is not installed: {', '.join(absent)}")
    try:
        book = site.find(Path(app.srcdir, app.config.kvattn_lessons))
        getLogger(__name__).info("running %d lessons on %s", len(book.lessons), ", ".join(backends))
        problems = site.write(
            book,
            Path(app.srcdir, "_lessons"),
            backends,
            cache=Path(app.doctreedir, "lessons"),
            numbered=app.config.kvattn_numbered,
            install=app.config.kvattn_install,
        )
    except ValueError as error:
        raise ExtensionError(str(error)) from None
    if problems:  # reported without Sphinx's own traceback
        raise ExtensionError("\n".join(problems))


def _mathjax(app: Any, error: BaseException | None) -> None:
    """MathJax beside the pages: they need no network."""
    found = importlib.util.find_spec("sphinx-mathjax-offline")
    if error is None and app.config.mathjax_path.startswith("mathjax/"):
        if found is None or found.origin is None:
            raise ModuleNotFoundError("No module named 'sphinx-mathjax-offline'", name="sphinx-mathjax-offline")
        folder = Path(found.origin).parent / "static" / "mathjax"
        for part in ("tex-chtml.js", "a11y", "input/tex/extensions", "output/chtml/fonts/woff-v2"):
            target = Path(app.outdir, "_static", "mathjax", part)
            copy_asset(folder / part, target if (folder / part).is_dir() else target.parent)
