"""What is shown as HTML says what it was given, and does nothing else: names, errors, tokens, titles, what a lesson prints.

The prose of a lesson is its author's own and may hold raw HTML, as Markdown's may: so says SECURITY.md.
"""

import html
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kvattn import drawings, report, text
from kvattn.lesson import page, reader, runner

HOSTILE = "<script>alert('&')</script><img src=x onerror=\"alert(1)\">\x1b[31m]]>--><style>*{}</style>"


class Tags(HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.words = set(), set(), []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.words.append(data)


def harmless(source, tags=frozenset()):
    found = Tags(source)
    assert not found.tags & ({"script", "img", "iframe", "link", "a", "form", "object"} - tags)
    assert not {name for name in found.attributes if name.startswith("on")}
    assert "\x1b" not in source
    return found


def test_a_report_of_hostile_names_and_errors():
    case = {
        "case": HOSTILE,
        "group": HOSTILE,
        "dtype": HOSTILE,
        "what": HOSTILE,
        "error": 9.0,
        "allowed": 4.0,
        "message": HOSTILE,
    }
    row = {
        "backend": HOSTILE, "version": HOSTILE, "device": HOSTILE, "cases": 1, "passed": 0, "failed": 1, "worst_value": 1.0,
        "refused": 0, "not_offered": 0, "worst_gradient": None, "worst_share": 0.5, "error": HOSTILE, "notes": [HOSTILE],
        "failures": [case], "results": [case | {"passed": False}], "seconds": 1.0,
    }  # fmt: skip
    pair = {"a": HOSTILE, "b": "other", "error": 1.0, "allowed": 2.0, "passed": False, "compared": 1, "message": HOSTILE}
    words = text.compare(HOSTILE, HOSTILE, {HOSTILE: HOSTILE})
    words |= {"tokens": [HOSTILE, "b"], "weights": [[0.5, 0.5], [1.0, 0.0]], "drawn_by": HOSTILE, "pairs": [pair]}
    about = dict.fromkeys(("kvattn", "suite", "python", "platform", "created"), HOSTILE)
    made = report.to_html(report.document(backends=[row], pairs=[pair], text=words, **about))
    found = harmless(made)
    assert found.tags >= {"table", "details", "svg", "li"}
    assert made.count("<style>") == 1  # its own
    assert HOSTILE.replace("\x1b", "\N{REPLACEMENT CHARACTER}") in "".join(found.words), "it is told, as words"


@pytest.mark.parametrize("part", ["words", "alt", "caption", "tokens"])
def test_drawings(part):
    if part == "tokens":
        made = drawings.look_up(HOSTILE, [HOSTILE, "b"], ["c", HOSTILE], [0.5, 0.5], HOSTILE, caption=HOSTILE)
    else:
        given = {"words": "a", "alt": "b", "caption": "c"} | {part: HOSTILE}
        made = drawings.Drawing(9, 9, given["alt"], given["caption"]).box(0, 0, 9, 9, given["words"])
    found = Tags(made._repr_html_())
    assert found.tags <= {
        "figure",
        "svg",
        "rect",
        "text",
        "tspan",
        "figcaption",
        "polyline",
        "polygon",
        "g",
        "path",
        "title",
        "circle",
    }
    assert not {name for name in found.attributes if name.startswith("on")}
    assert "<script>" in "".join(found.words) or part == "alt"


def test_the_page_of_a_lesson_shows_what_code_prints_as_text(tmp_path):
    printed = f"{HOSTILE}\n```\n`````\n:::\n{HOSTILE}\n"
    given = reader.parse(f"# T\n```python\nprint('''{html.escape(HOSTILE)}''')\n```\n", tmp_path / "lesson.md")
    (cell,) = given.cells
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": printed},
        {"output_type": "execute_result", "data": {"text/plain": printed, "text/html": HOSTILE}, "metadata": {}},
        {"output_type": "display_data", "data": {"image/svg+xml": "<svg></svg>"}, "metadata": {}},
    ]
    seen = [{"figure": [], "alt": "a title\n```\n<script>alert('it''s')</script>\n:class: x"}]
    made = page.myst(runner.Result(given, {"numpy": [runner.Ran(cell, 0.0, outputs, seen, None)]}, {}), tmp_path / "out")
    blocks = reader.fences(made)
    outside = made.split("\n")
    for start, stop, *_ in blocks:
        outside[start:stop] = [""] * (stop - start)
    assert "<" not in "".join(outside), "only Markdown's blocks of code hold what was printed"
    infos = [info for _, _, info, *_ in blocks]
    assert infos[:3] == ["{code-block} python", "{code-block} text", "{code-block} text"]
    assert infos[3].startswith("{image} ")
    (options,) = [content for _, _, info, content, _ in blocks if info.startswith("{image}")]
    assert options.startswith(":alt: 'Figure: a title ``` <script>alert(''it''''s'')</script> :class: x'\n:class: output\n")
    assert len(blocks) == 4


def test_labels_in_pictures(tmp_path):
    from matplotlib import pyplot as plt

    from kvattn import plot

    figure = plot.show_attention(
        [[[0.5, 0.5], [1.0, 0.0]]], queries=[HOSTILE, "$$"], keys=["<b>", "\\foo$x$"], titles=[HOSTILE.replace("\x1b", "")]
    )
    figure.savefig(tmp_path / "a.svg")
    plt.close("all")
    found = harmless(Path(tmp_path / "a.svg").read_text(encoding="utf-8"))
    assert "svg" in found.tags
