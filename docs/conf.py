"""The site: `tox -e docs`, or `sphinx-build docs docs/_build/html`. Lessons are run on the backends of KVATTN_DOCS_BACKENDS."""

import importlib.util
import os
import re
import sys
from pathlib import Path

from docutils.parsers.rst import directives
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective
from sphinx.util.fileutil import copy_asset
from sphinx.util.logging import getLogger

import kvattn
from kvattn import lesson

sys.path.insert(0, str(Path(__file__).parent))
import agreement
import measured

project = "kvattn"
author = "the kvattn authors"
copyright = "2026, the kvattn authors, Apache-2.0"
version = release = kvattn.__version__

extensions = [
    "myst_parser",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "lessons"]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
numfig = True
default_role = "py:obj"

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = "kvattn"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
copybutton_selector = "div.highlight-python pre, div.highlight-sh pre, div.highlight-md pre, div.doctest pre"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
mathjax_path = "mathjax/tex-chtml.js"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes and dtypes, which say more
napoleon_numpy_docstring = False


def _backends():
    """Those that KVATTN_DOCS_BACKENDS names, or all that are installed."""
    named = os.environ.get("KVATTN_DOCS_BACKENDS")
    backends = [kvattn.dispatch.canonical(name) for name in named.split(",")] if named else list(kvattn.available_backends())
    if absent := set(backends) - set(kvattn.available_backends()):
        raise ValueError(f"KVATTN_DOCS_BACKENDS names backends that are not installed: {', '.join(sorted(absent))}")
    return backends


def lessons(app):
    """docs/lessons, run on each backend, as pages of docs/_lessons."""
    backends = _backends()
    pages, source = Path(app.srcdir, "_lessons"), Path(app.srcdir, "lessons")
    pages.mkdir(exist_ok=True)
    texts = {}
    for file in sorted(source.glob("*.md")):
        getLogger("kvattn.docs").info("running %s on %s", file.name, ", ".join(backends))
        offered = lesson.read(file).tabs
        tabs = [name for name in backends if not offered or name in offered]
        reads = ".read_text(" in file.read_text(encoding="utf-8")  # other files, which a cache would not see change
        cache = None if reads else Path(app.doctreedir, "lessons")
        try:
            texts[file.name] = lesson.render(file, tabs, pages / "outputs", cache=cache)
        except ValueError as error:  # a cell that fails, tabs that disagree: told without Sphinx's own traceback
            raise ExtensionError(str(error)) from None
    for page in pages.glob("*.md"):
        if page.name not in texts:
            page.unlink()
    for name, text in texts.items():
        page = pages / name
        if not page.exists() or page.read_text(encoding="utf-8") != text:  # an unchanged page is not read again
            page.write_text(text, encoding="utf-8")


def mathjax(app, error):
    """MathJax beside the pages: they need no network."""
    if error is None:
        folder = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
        for part in ("tex-chtml.js", "a11y", "input/tex/extensions", "output/chtml/fonts/woff-v2"):
            target = Path(app.outdir, "_static", "mathjax", part)
            copy_asset(folder / part, target if (folder / part).is_dir() else target.parent)


def literal_formulas(app, what, name, obj, options, lines):
    """The docstrings are plain text: |x| is a norm, not a substitution, and b_* no emphasis."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            pieces = line.split("`")
            pieces[::2] = [re.sub(r"[|*]", r"\\\g<0>", piece) for piece in pieces[::2]]
            lines[i] = "`".join(pieces)


class Agreement(SphinxDirective):
    """``{agreement}``: the picture of agreement.py, of the backends that the lessons are run on."""

    def run(self):
        path = Path(self.env.srcdir, "_build", "agreement.svg")
        path.parent.mkdir(parents=True, exist_ok=True)
        eps = agreement.draw(_backends(), path)
        text = f"```{{figure}} /_build/agreement.svg\n:class: output\n:width: 1000px\n:alt: '{agreement.ALT}'\n\n"
        return self.parse_text_to_nodes(text + agreement.caption(eps) + "\n```\n")


class Measured(SphinxDirective):
    """``{measured} FILE``: see measured.py."""

    required_arguments = 1
    option_spec = {"columns": directives.unchanged, "value": directives.unchanged, "summary": directives.flag}  # noqa: RUF012

    def run(self):
        file, pictures = Path(self.env.relfn2path(self.arguments[0])[1]), Path(self.env.srcdir, "_build", "measured")
        self.env.note_dependency(file)
        summary = "summary" in self.options
        text = measured.summary(file, pictures) if summary else measured.myst(file, pictures, **self.options)
        return self.parse_text_to_nodes(text.replace(f"{{image}} {self.env.srcdir}", "{image} "))


def setup(app):
    app.add_directive("agreement", Agreement)
    app.add_directive("measured", Measured)
    app.connect("builder-inited", lessons)
    app.connect("build-finished", mathjax)
    app.connect("autodoc-process-docstring", literal_formulas, priority=100)
