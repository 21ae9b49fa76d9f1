"""The site: `tox -e docs`, or `sphinx-build docs docs/_build/html`. Lessons are run on the backends of KVATTN_DOCS_BACKENDS."""

import os
import re
import sys
from pathlib import Path

from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

import kvattn

sys.path.insert(0, str(Path(__file__).parent))
import agreement
import measured

project = "kvattn"
author = "the kvattn authors"
copyright = "2026, the kvattn authors, Apache-2.0"
version = release = kvattn.__version__

extensions = ["kvattn.lesson", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
default_role = "py:obj"

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = "kvattn"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes and dtypes, which say more
napoleon_numpy_docstring = False
autodoc_mock_imports = ["dask"]  # of which no page needs more than its name


def _backends():
    """Those that KVATTN_DOCS_BACKENDS names, or all that are installed."""
    named = os.environ.get("KVATTN_DOCS_BACKENDS")
    backends = [kvattn.dispatch.canonical(name) for name in named.split(",")] if named else list(kvattn.available_backends())
    if absent := set(backends) - set(kvattn.available_backends()):
        raise ValueError(f"KVATTN_DOCS_BACKENDS names backends that are not installed: {', '.join(sorted(absent))}")
    return backends


kvattn_backends = _backends()


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
        eps, width = agreement.draw(_backends(), path), agreement.pixels(_backends())
        text = f"```{{figure}} /_build/agreement.svg\n:class: output\n:width: {width}px\n:alt: '{agreement.ALT}'\n\n"
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
    app.connect("autodoc-process-docstring", literal_formulas, priority=100)
