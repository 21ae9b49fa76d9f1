"""Drawings: what is in them, that it fits on their ground, and that any framework's weights are drawn."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

import kvattn
from kvattn import drawings

LAST, FIRST = ["Zhang", "Lipton", "Li"], ["Aston", "Zachary", "Mu"]
MADE = {
    "look_up": drawings.look_up("Li", LAST, FIRST, [0.0, 0.25, 0.75], "Mu"),
    "seq2seq": drawings.seq2seq(["la", "maison", "bleue"], ["the", "blue"], [0.0, 0.25, 0.75]),
    "heads": drawings.heads(["looks left", "looks right"]),
    "encoder_block": drawings.encoder_block(),
    "decoder_block": drawings.decoder_block(),
    "transformer": drawings.transformer(caption="5 < 6"),
}
SVG = "{http://www.w3.org/2000/svg}"


def elements(drawing, name):
    return ElementTree.fromstring(drawing.svg).iter(SVG + name)


def test_every_drawing_is_here():
    assert set(MADE) == set(drawings.__all__) - {"Drawing"}


@pytest.mark.parametrize("drawing", MADE.values(), ids=MADE)
def test_a_drawing_says_what_it_shows_and_stays_on_its_ground(drawing):
    root = ElementTree.fromstring(drawing.svg)
    assert (root.get("role"), root.get("aria-label")) == ("img", drawing.alt)
    width, height = (float(x) for x in root.get("viewBox").split()[2:])
    assert width <= 400.5  # letters of 14 have more than 11 pixels on a phone of 375
    for box in root.iter(SVG + "rect"):
        x, y, w, h = (float(box.get(name)) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
    for path in [*root.iter(SVG + "polyline"), *root.iter(SVG + "polygon")]:
        points = np.array([[float(x) for x in pair.split(",")] for pair in path.get("points").split()])
        assert (points >= 0).all()
        assert (points <= [width, height]).all()
    for text in root.iter(SVG + "text"):
        x, y, letters = float(text.get("x")), float(text.get("y")), len("".join(text.itertext()))
        wide = letters * drawings.LETTER * float(text.get("font-size")) / 14
        start = x - {"start": 0, "middle": wide / 2, "end": wide}[text.get("text-anchor")]
        assert 0 <= start <= start + wide <= width, "".join(text.itertext())
        assert 8 <= y <= height
    colours = {part.get("stroke") for part in root.iter()} | {part.get("fill") for part in root.iter()}
    assert colours <= {None, "none", "currentColor", *drawings.COLOURS.values()}  # no black, no white


def test_words_stay_in_their_boxes():
    for drawing in MADE.values():
        boxes = [[float(box.get(name)) for name in ("x", "y", "width", "height")] for box in elements(drawing, "rect")]
        for text in elements(drawing, "text"):
            x, y, letters = float(text.get("x")), float(text.get("y")), len("".join(text.itertext()))
            around = [w for left, top, w, h in boxes if h < 60 and left < x < left + w and top < y < top + h]
            assert all(letters * drawings.LETTER <= w + 1 for w in around), "".join(text.itertext())


def test_lines_are_as_thick_as_the_weights(backend):
    weights = kvattn.asarray(np.float32([0.0, 0.25, 0.75]), backend=backend)
    drawing = drawings.look_up("Li", LAST, FIRST, weights, "Mu")
    assert drawing.svg == MADE["look_up"].svg
    assert [float(line.get("stroke-width")) for line in elements(drawing, "polyline")] == [0.5, 0.5, 1.75, 1.75, 4.25, 4.25]
    said = [text.text for text in elements(drawing, "text")]
    assert [word for word in said if word and "." in word] == ["0.00", "0.25", "0.75"]
    assert {"Li", "Mu", *LAST, *FIRST} <= {*said}


def test_numbers_are_written_as_they_are():
    drawing = drawings.look_up(1, [1, 2], [3, 4], [1.0, 0.0], 3)
    assert drawing.svg == drawings.look_up("1", ["1", "2"], ["3", "4"], [1.0, 0.0], "3").svg


def test_a_drawing_is_saved_as_it_is_shown_and_its_caption_escaped(tmp_path):
    MADE["heads"].save(tmp_path / "heads.svg")
    assert (tmp_path / "heads.svg").read_text(encoding="utf-8") == MADE["heads"].svg == MADE["heads"]._repr_svg_()
    assert MADE["transformer"]._repr_html_().endswith("</svg><figcaption>5 &lt; 6</figcaption></figure>")
    escaped = drawings.Drawing(90, 40, 'a "<b>"').box(1, 1, 80, 30, "x_q <y>")
    (text,) = elements(escaped, "text")
    assert "".join(text.itertext()) == "xq <y>"


def test_what_cannot_be_drawn_is_told():
    with pytest.raises(ValueError, match=re.escape("weights has shape (2,), with 3 keys and 3 values")):
        drawings.look_up("Li", LAST, FIRST, [0.5, 0.5])
    with pytest.raises(ValueError, match=re.escape("weights has shape (1, 2), with 2 of source")):
        drawings.seq2seq(["a", "b"], ["c"], [[0.5, 0.5]])
    with pytest.raises(TypeError, match="weights must be an array of real numbers, not list of dtype <U1"):
        drawings.look_up("Li", LAST, FIRST, ["a", "b", "c"])
    with pytest.raises(ValueError, match="kind must be one of query, key, value, attention, plain, not 'lock'"):
        drawings.Drawing(9, 9, "").box(0, 0, 1, 1, kind="lock")
