"""Drawings of attention as SVG: a look-up, heads side by side, the blocks of a Transformer.

Text and lines have the colour of the page's text, and fills are translucent, so that a drawing is read on white and on black.
A notebook and a page of lessons show it in place; none is wider than a phone. `Drawing` is for drawings of one's own.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvattn import api, conversion, registry

__all__ = ["Drawing", "decoder_block", "encoder_block", "heads", "look_up", "seq2seq", "transformer"]

COLOURS = {"query": "#1f77b4", "key": "#e67e00", "value": "#2ca02c", "attention": "#9467bd", "plain": "#8a8a8a"}
LETTER = 7.6  # units, the width of a letter of 14
ROW, GAP = 30.0, 22.0  # the height of a box, and between two boxes of a column


class Drawing:
    """Boxes, words and arrows on a ground of ``width`` by ``height``; up to 400 wide it is read on a phone.

    ``alt`` tells what is to be seen to those who do not see it; ``caption`` stands below. The corner (0, 0) is top left.
    Each method returns the drawing.

    >>> drawing = Drawing(120, 40, "a box that says dog").box(10, 5, 100, 30, "dog", "key")
    >>> drawing.svg[:52]
    '<svg xmlns="http://www.w3.org/2000/svg" role="img" a'
    """

    def __init__(self, width: float, height: float, alt: str, caption: str = "") -> None:
        self.width, self.height, self.alt, self.caption = width, height, alt, caption
        self._parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, words: str = "", kind: str = "plain") -> Drawing:
        """A box with words in it. ``kind``: its colour, that of "query", "key", "value", "attention" or "plain"."""
        if kind not in COLOURS:
            raise ValueError(f"kind must be one of {', '.join(COLOURS)}, not {kind!r}")
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self._parts.append(
            f'<rect {place} rx="4" fill="{COLOURS[kind]}" fill-opacity="0.2" stroke="{COLOURS[kind]}" stroke-width="1.5"/>'
        )
        return self.words(x + width / 2, y + height / 2 + 5, words) if words else self

    def words(self, x: float, y: float, words: str, size: float = 14, anchor: str = "middle") -> Drawing:
        """Words whose line stands at ``y``; "W_q" is a W with a small q. ``anchor``: "start", "middle" or "end"."""
        text = re.sub(r"_(\w)\b", r'<tspan dy="3" font-size="75%">\1</tspan>', html.escape(words))
        self._parts.append(f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}">{text}</text>')
        return self

    def line(self, *points: tuple[float, float], kind: str = "", width: float = 1.4, arrow: bool = True) -> Drawing:
        """A line through the points, with the head of an arrow at its end. ``kind`` as of a box; "": the text's colour."""
        colour = COLOURS[kind] if kind else "currentColor"
        (x, y), (end_x, end_y) = points[-2:]
        length = float(np.hypot(end_x - x, end_y - y)) or 1.0
        across, down = (end_x - x) / length, (end_y - y) / length
        head = 6.0 + width
        stop = (end_x - head * across, end_y - head * down) if arrow else (end_x, end_y)
        path = " ".join(f"{a:.4g},{b:.4g}" for a, b in (*points[:-1], stop))
        self._parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:.3g}"/>')
        if arrow:
            half = 0.45 * head
            wings = [(stop[0] + side * half * down, stop[1] - side * half * across) for side in (-1, 1)]
            path = " ".join(f"{a:.4g},{b:.4g}" for a, b in ((end_x, end_y), *wings))
            self._parts.append(f'<polygon points="{path}" fill="{colour}"/>')
        return self

    @property
    def svg(self) -> str:
        """The drawing as SVG."""
        about = f'role="img" aria-label="{html.escape(self.alt)}" viewBox="0 0 {self.width:g} {self.height:g}"'
        look = f'width="{self.width:g}" style="max-width: 100%; height: auto" font-family="sans-serif" fill="currentColor"'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {about} {look}>{"".join(self._parts)}</svg>'

    def save(self, path: str | Path) -> None:
        """Write the SVG to a file. Raises OSError where that cannot be written."""
        Path(path).write_text(self.svg, encoding="utf-8")

    def _repr_svg_(self) -> str:
        return self.svg

    def _repr_html_(self) -> str:
        caption = f"<figcaption>{html.escape(self.caption)}</figcaption>" if self.caption else ""
        return f'<figure class="drawing">{self.svg}{caption}</figure>'


# ---- a look-up


def look_up(
    query: Any, keys: Sequence[Any], values: Sequence[Any], weights: Any, answer: Any = "", *, caption: str = ""
) -> Drawing:
    """A query that asks the keys, and the values that it gets: lines as thick as the weights, (m,), which stand beside them.

    Raises ValueError unless there are as many keys, values and weights, TypeError for weights that are no numbers.

    >>> look_up("Li", ["Li", "Hu"], ["Mu", "Rachel"], [1.0, 0.0], "Mu").alt
    'The query Li, and what each key weighs: Li 1.00, Hu 0.00. The answer: Mu'
    """
    shares, answer = _weights(weights), str(answer)
    rows = len(keys)
    if shares.shape != (rows,) or len(values) != rows:
        raise ValueError(
            f"weights has shape {shares.shape}, with {rows} keys and {len(values)} values; expected one weight and value a key"
        )
    widths = [max(_wide(word) for word in (head, *words)) for head, words in (
        ("query", [str(query)]), ("keys", map(str, keys)), ("values", map(str, values)), ("answer", [answer]),
    )]  # fmt: skip
    asks, gets = 84.0, 72.0
    ends = np.cumsum([0, widths[0], asks, widths[1], 3, widths[2], gets, widths[3]]) + 2
    height, top = 34.0, 26.0
    middle = top + rows * height / 2
    words = ", ".join(f"{key} {share:.2f}" for key, share in zip(keys, shares, strict=True))
    alt = f"The query {query}, and what each key weighs: {words}." + (f" The answer: {answer}" if answer else "")
    drawing = Drawing(float(ends[-1]) + 2, top + rows * height + 8, alt, caption)
    for place, width, head in zip(ends[[0, 2, 4, 6]], widths, ("query", "keys", "values", "answer"), strict=True):
        drawing.words(place + width / 2, 15, head, 12)
    for i, (key, value, share) in enumerate(zip(keys, values, shares, strict=True)):
        y = top + (i + 0.5) * height
        faint = 0.5 + 5 * min(max(float(share), 0.0), 1.0)
        drawing.line((ends[1], middle), (ends[2], y), kind="query", width=faint, arrow=False)
        drawing.box(ends[2], y - 13, widths[1], 26, str(key), "key")
        drawing.box(ends[4], y - 13, widths[2], 26, str(value), "value")
        drawing.line((ends[5], y), (ends[6], middle), kind="value", width=faint, arrow=False)
        drawing.words(ends[5] + 8, y - 6 if y <= middle else y + 15, f"{share:.2f}", 11, "start")
    drawing.box(ends[0], middle - 15, widths[0], ROW, str(query), "query")
    return drawing.box(ends[6], middle - 15, widths[3], ROW, answer, "value")


def seq2seq(source: Sequence[Any], target: Sequence[Any], weights: Any, *, caption: str = "") -> Drawing:
    """An encoder below, a decoder above: the step that writes the last of ``target`` asks each state of the encoder.

    ``weights``: (m,), one for each of ``source``, as thick as the lines. Raises what `look_up` does.

    >>> seq2seq(["le", "chien"], ["the", "dog"], [0.125, 0.875]).alt
    'A decoder that writes dog after the; its query asks the states of an encoder: le 0.12, chien 0.88'
    """
    shares = _weights(weights)
    if shares.shape != (len(source),) or not target:
        raise ValueError(f"weights has shape {shares.shape}, with {len(source)} of source; expected one weight for each")
    cell = max(_wide(str(word)) for word in (*source, *target))
    step = cell + 20
    ground = max(max(len(source), len(target)) * step, 270) + 20
    shown = ", ".join(f"{word} {share:.2f}" for word, share in zip(source, shares, strict=True))
    before = f" after {' '.join(map(str, target[:-1]))}" if len(target) > 1 else ""
    alt = f"A decoder that writes {target[-1]}{before}; its query asks the states of an encoder: {shown}"
    drawing = Drawing(ground, 252, alt, caption)
    lefts = [[(ground - len(row) * step) / 2 + 10 + i * step for i in range(len(row))] for row in (source, target)]
    writes = lefts[1][-1] + cell / 2
    for x, share in zip(lefts[0], shares, strict=True):
        faint = 0.5 + 5 * min(max(float(share), 0.0), 1.0)
        drawing.line((writes, 88), (x + cell / 2, 160), kind="query", width=faint, arrow=False)
        drawing.words(x + cell / 2 + 5, 155, f"{share:.2f}", 11, "start")
    for words, row, y, kind in ((source, lefts[0], 160, "key"), (target, lefts[1], 58, "query")):
        for i, (word, x) in enumerate(zip(words, row, strict=True)):
            drawing.box(x, y, cell, ROW, "", kind)
            if i:
                drawing.line((x - 20, y + ROW / 2), (x, y + ROW / 2))
            if kind == "key":
                drawing.words(x + cell / 2, 226, str(word)).line((x + cell / 2, 212), (x + cell / 2, 190))
            else:
                drawing.words(x + cell / 2, 35, str(word)).line((x + cell / 2, 58), (x + cell / 2, 41))
    drawing.words(ground / 2, 246, "encoder: its states are keys and values", 12)
    return drawing.words(ground / 2, 12, "decoder: its state is the query", 12)


# ---- heads and blocks, from below to above


def heads(titles: Sequence[str] = ("head 1", "head 2"), *, caption: str = "") -> Drawing:
    """Multi-head attention: each head with matrices of its own, their answers joined and mixed.

    >>> heads().alt
    'Queries, keys and values go to head 1 and head 2, each with its own W_q, W_k, W_v and attention; joined; times W_o'
    """
    count = len(titles)
    column, small = 176.0 if count < 3 else 130.0, 48.0 if count < 3 else 36.0
    ground = count * column + 10
    alt = f"Queries, keys and values go to {' and '.join(titles)}, each with its own W_q, W_k, W_v and attention"
    drawing = Drawing(ground, 316, alt + "; joined; times W_o", caption)
    centre, third = ground / 2, min(ground / 3, 120)
    inputs = [centre + (i - 1) * third for i in range(3)]
    kinds = ("query", "key", "value")
    for h, title in enumerate(titles):
        left = 5 + h * column
        middle = left + column / 2
        for i, (kind, at) in enumerate(zip(kinds, inputs, strict=True)):
            x = middle + (i - 1) * (small + 8)
            drawing.line((at, 282), (x, 232), kind=kind).box(x - small / 2, 202, small, ROW, f"W_{'qkv'[i]}", kind)
            drawing.line((x, 202), (x, 174), kind=kind)
        drawing.box(left + 5, 144, column - 10, ROW, title, "attention").line((middle, 144), (middle, 112))
    drawing.box(10, 82, ground - 20, ROW, "join").line((centre, 82), (centre, 62)).box(centre - 40, 32, 80, ROW, "W_o")
    drawing.line((centre, 32), (centre, 8)).words(centre + 12, 18, "output", 12, "start")
    for at, name, kind in zip(inputs, ("queries", "keys", "values"), kinds, strict=True):
        drawing.box(at - 38, 282, 76, ROW, name, kind)
    return drawing


ADD = ("add, then norm", "plain", False)
ENCODER = [("self-attention", "attention", True), ADD, ("small network", "value", True), ADD]
DECODER = [*ENCODER[:2], ("cross-attention", "key", True), ADD, *ENCODER[2:]]


def encoder_block(*, caption: str = "") -> Drawing:
    """A block of a Transformer's encoder.

    >>> encoder_block().alt
    'From below: self-attention; add, then norm; small network; add, then norm. What goes in is added to what comes out'
    """
    names = "; ".join(name for name, *_ in ENCODER)
    drawing = Drawing(290, 286, f"From below: {names}. What goes in is added to what comes out", caption)
    _column(drawing, 60, 190, 244, ENCODER)
    drawing.line((155, 36), (155, 20))
    return drawing.words(155, 262, "a row for each word").words(155, 14, "a row for each word")


def decoder_block(*, caption: str = "") -> Drawing:
    """A block of a Transformer's decoder, which also attends to what the encoder made.

    >>> decoder_block().alt.partition(":")[2][:60]
    ' self-attention; add, then norm; cross-attention; add, then '
    """
    names = "; ".join(name for name, *_ in DECODER)
    drawing = Drawing(350, 390, f"From below: {names}. What goes in is added to what comes out", caption)
    heights = _column(drawing, 60, 190, 348, DECODER)
    drawing.line((155, 36), (155, 20))
    drawing.line((346, heights[2]), (250, heights[2]), kind="key").words(305, heights[2] - 8, "the encoder's", 12)
    drawing.words(305, heights[2] + 18, "output", 12)
    return drawing.words(155, 366, "a row for each word so far").words(155, 14, "a row for each word so far")


def transformer(*, caption: str = "") -> Drawing:
    """The encoder and the decoder of a Transformer, side by side.

    >>> transformer().alt.partition(",")[0]
    'An encoder on the left'
    """
    alt = (
        "An encoder on the left, a decoder on the right. Each embeds its words, adds their positions, and has blocks of "
        "attention and small networks; the decoder's also attend to what the encoder made, and a dense layer scores words"
    )
    drawing = Drawing(400, 520, alt, caption)
    start, width = 420.0, 140.0
    for x, words, rows in ((32.0, "source", ENCODER), (244.0, "written so far", DECODER)):
        centre, top = x + width / 2, start - len(rows) * (ROW + GAP) - 8
        drawing.box(x - 28, top, width + 38, start - 2 - top)
        heights = _column(drawing, x, width, start, rows)
        drawing.box(x, 452, width, ROW, "embed + position").line((centre, 452), (centre, start), arrow=False)
        drawing.words(centre, 516, words).line((centre, 502), (centre, 482)).words(x - 28, start + 14, "n times", 12, "start")
    ahead = start - len(ENCODER) * (ROW + GAP)
    drawing.line((102, ahead), (102, ahead - 30), (198, ahead - 30), (198, heights[2]), (x, heights[2]), kind="key")
    drawing.box(x, 42, width, ROW, "dense").line((centre, top + 8), (centre, 72)).line((centre, 42), (centre, 20))
    return drawing.words(centre, 14, "next word")


def _column(drawing: Drawing, x: float, width: float, bottom: float, rows: Sequence[tuple[str, str, bool]]) -> list[float]:
    """Boxes one above the other with arrows between them; what goes into those that add is led around them to the next.

    Returns the heights of their middles.
    """
    centre, heights = x + width / 2, []
    for i, (words, kind, adds) in enumerate(rows):
        y = bottom - (i + 1) * (ROW + GAP)
        drawing.line((centre, y + ROW + GAP), (centre, y + ROW)).box(x, y, width, ROW, words, kind)
        if adds:
            below, above = y + ROW + GAP * 0.6, y - GAP - ROW / 2
            drawing.line((centre, below), (x - 14, below), (x - 14, above), (x, above))
        heights.append(y + ROW / 2)
    return heights


def _weights(weights: Any) -> Any:
    """One weight for each key, as NumPy."""
    given = np.asarray(api.to_numpy(weights) if registry.home(weights) is not None else weights)
    if conversion.dtype_name(given) not in (*conversion.FLOATS, *conversion.INTEGERS):
        raise TypeError(f"weights must be an array of real numbers, not {type(weights).__name__} of dtype {given.dtype}")
    return given.astype(np.float64)


def _wide(word: str) -> float:
    """What a box needs for this word."""
    return max(len(word) * LETTER + 12, 34.0)
