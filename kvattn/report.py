"""The report of ``kvattn conform``: one plain document, shown in the terminal, as JSON or as one HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from html import escape
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

LISTED = 20  # failures shown in the terminal
SHADES, ASCII_SHADES = " ░▒▓█", " .:*#"
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))

EXPLAINED = (
    "used: of an error's own limit, which grows with the scores; values, grads: the largest errors, in eps of the dtype times "
    "the magnitude of the result. A large one is allowed where the scores are large."
)
WORDS = (
    "A word's vector is made of a hash of it and of its place, not of its meaning: it finds itself, its like and what is near."
)

Document = dict[str, Any]


# ---- the document


SCHEMA = 1  # of the JSON: docs/reference/report.schema.json


def document(*, backends: list[Document], pairs: list[Document], text: Document, **about: str) -> Document:
    """Everything the report says; ``about`` is who ran it where. Errors are in eps units, times in seconds."""
    whole: Document = {"schema": SCHEMA, **about, "backends": backends, "pairs": pairs, "text": text}
    apart = sum(not pair["passed"] for pair in (*pairs, *text["pairs"]))
    whole["passed"] = sum(row["passed"] for row in backends)
    whole["failed"] = sum(row["failed"] + (row["error"] is not None) for row in backends) + apart + len(text["errors"])
    whole["ok"] = whole["failed"] == 0 and bool(backends)
    return whole


def problems(whole: Document) -> Iterator[Document]:
    """What failed, one entry each: where, what, and error and allowed where there is a number; the gravest first."""
    for row in whole["backends"]:
        if row["error"] is not None:
            yield {"where": row["backend"], "what": row["error"]}
    for title, pairs in (("disagree", whole["pairs"]), ("disagree on the text", whole["text"]["pairs"])):
        for pair in pairs:
            if not pair["passed"]:
                yield {"where": f"{pair['a']} and {pair['b']}", "what": title, **pair}
    for name, error in whole["text"]["errors"].items():
        yield {"where": name, "what": f"cannot attend over the text: {error}"}
    # In turn, so that one backend's many failures do not hide another's few.
    for turn in zip_longest(*([(row["backend"], each) for each in row["failures"]] for row in whole["backends"])):
        for name, each in filter(None, turn):
            yield {**each, "where": " ".join(str(part) for part in (name, each["case"], each["dtype"]) if part)}


def clean(text: object) -> str:
    """Text without the characters that a terminal obeys and XML forbids."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def number(x: Any) -> str:
    """An error in eps units, short; '-' where there is none."""
    if not isinstance(x, (int, float)):
        return "-"
    return f"{x:.2f}" if not math.isfinite(x) or 0.005 <= x < 1000 or x == 0 else f"{x:.1e}"


def to_json(whole: Document) -> str:
    """The document as JSON; infinities and NaN, which JSON lacks, as the strings "inf", "-inf" and "nan"."""
    return json.dumps(_plain(whole), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if x is None or isinstance(x, (str, bool, int)):
        return x
    if hasattr(x, "item"):  # a NumPy scalar
        return _plain(x.item())
    return x if isinstance(x, float) and math.isfinite(x) else str(x)


def summary(whole: Document) -> str:
    """The closing line: cases passed; cases failed, backends broken and pairs that disagree."""
    return f"{whole['passed']} passed, {whole['failed']} failed"


def _judgement(pairs: list[Document]) -> str:
    """In words, what the pairs say."""
    apart = [pair for pair in pairs if not pair["passed"]]
    if not pairs:
        return "one backend: nothing to compare it with"
    worst = max(pairs, key=_share)
    how = f"nearest the limit {worst['a']} and {worst['b']}, {percent(_share(worst))} of it"
    count, verb = (len(apart), "disagree") if apart else (len(pairs), "agree")
    return f"{count} of {len(pairs)} pairs {verb}: {how}"


def _share(pair: Document) -> float:
    """How much of its limit a pair uses."""
    return math.inf if math.isnan(pair["error"]) else pair["error"] / (pair["allowed"] or 1.0)


def percent(x: Any) -> str:
    """A share as a percentage; "-" where there is none."""
    return f"{x:.0%}" if isinstance(x, float) and math.isfinite(x) else "-" if x is None else "inf"


def _grid(whole: Document, pairs: list[Document]) -> tuple[list[str], dict[tuple[str, str], Document]]:
    """The names of the matrix and its cells, both ways round."""
    cells = {(pair["a"], pair["b"]): pair for pair in pairs} | {(pair["b"], pair["a"]): pair for pair in pairs}
    return [row["backend"] for row in whole["backends"] if any(row["backend"] in key for key in cells)], cells


# ---- the terminal


def show(whole: Document, console: Console) -> None:
    """Print the report, all but its closing line."""
    from rich.table import Table
    from rich.text import Text

    if suite := whole.get("suite"):
        console.print(f"\nThe suite of kvattn {clean(whole['kvattn'])}, its cases {clean(suite)}")
    console.print("\nConformance: how much of what is allowed the errors use, at most", style="bold")
    table = Table()
    for title in ("backend", "version", "device"):
        table.add_column(title, overflow="fold")
    for title in ("cases", "used", "values", "grads", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in whole["backends"]:
        bad = row["failed"] or row["error"] is not None
        table.add_row(
            *(clean(row[key] or "-") for key in ("backend", "version", "device")),
            Text("failed" if row["error"] else f"{row['passed']}/{row['cases']}", "bold red" if bad else "green"),
            percent(row["worst_share"]),
            number(row["worst_value"]),
            number(row["worst_gradient"]),
            f"{row['seconds']:.1f} s",
        )
    console.print(table)
    console.print(f"{EXPLAINED}\n", style="dim")
    for name, note in _notes(whole):
        console.print(f"{name}: {clean(note)}", soft_wrap=True)

    if whole["pairs"]:
        names, cells = _grid(whole, whole["pairs"])
        console.print("\nAgreement: how much of what is allowed two backends' differences use, at most", style="bold")
        table = Table("")
        for name in names:
            table.add_column(name, justify="right", overflow="fold")
        for a in names:
            table.add_row(Text(a, "bold"), *(_cell(cells.get((a, b))) for b in names))
        console.print(table)
    console.print(f"Agreement: {_judgement(whole['pairs'])}", soft_wrap=True)

    if (text := whole["text"])["weights"]:
        console.print(f"\nAttention over {clean(text['source'])}, {len(text['tokens'])} tokens", style="bold", soft_wrap=True)
        console.print(WORDS, style="dim")
        console.print(heat(text["tokens"], text["weights"], console), no_wrap=True, overflow="crop", end="")
        console.print(f"Text: {_judgement(text['pairs'])}", soft_wrap=True)

    failures = list(problems(whole))
    if failures:
        console.print("\nFailures", style="bold red")
    for each in failures[:LISTED]:
        console.print(Text.assemble((f"  {clean(each['where'])}", "bold"), f": {clean(_sentence(each))}"), soft_wrap=True)
    if len(failures) > LISTED:
        console.print(f"  and {len(failures) - LISTED} more (all are in the --json and --html reports)", soft_wrap=True)


def _notes(whole: Document) -> list[tuple[str, str]]:
    return [(row["backend"], note) for row in whole["backends"] for note in row["notes"]]


def _sentence(problem: Document) -> str:
    """What is wrong, in one line, with nothing said twice: most messages name the case and the numbers themselves."""
    message = problem.get("message", "").removeprefix(f"{problem.get('case')} {problem.get('dtype')}: ")
    parts = [] if problem["what"] in message else [problem["what"]]
    if math.isfinite(problem.get("error", math.nan)) and "allowed" not in message:
        parts.append(f"error {number(problem['error'])}, {number(problem['allowed'])} allowed")
    return "; ".join([*parts, message] if message else parts)


def _cell(pair: Document | None) -> Text:
    from rich.text import Text

    if pair is None:
        return Text("·", "dim")
    if not pair["passed"]:
        return Text(f"{percent(_share(pair))} ✗", "bold red")
    return Text(percent(_share(pair)), "green" if pair["error"] <= pair["allowed"] / 2 else "yellow")


def heat(tokens: list[str], weights: list[list[float]], console: Console) -> Text:
    """Attention weights as a heat map: a row a query, a column a key, as many as fit the terminal's width."""
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    label = min(12, max(cell_len(token) for token in tokens[: len(weights)]))
    available = max(console.width - label - 2, 1)
    width = next((w for w in (3, 2, 1) if w * len(weights) <= available), 1)
    count = min(len(weights), available // width)
    hidden = count < len(tokens)
    tokens, weights = tokens[:count], [row[:count] for row in weights[:count]]
    most = _most(weights)
    shades = SHADES if console.encoding.lower().startswith("utf") else ASCII_SHADES
    coloured = console.color_system is not None and not console.no_color

    def block(weight: float) -> tuple[str, str]:
        share = weight / most if math.isfinite(weight) else 0.0
        if coloured:
            return " " * width, "on #{:02x}{:02x}{:02x}".format(*_viridis(share))
        return shades[min(int(share * len(shades)), len(shades) - 1)] * width, ""

    heads = [token[:8] for token in tokens]
    height = max(map(len, heads))
    picture = Text()
    for line in range(height):  # the keys, read downwards
        picture.append(" " * (label + 1))
        for head in heads:
            letter = head.rjust(height)[line]
            letter = letter if cell_len(letter) <= width else "?"
            picture.append(set_cell_size(" " * ((width - cell_len(letter)) // 2) + letter, width))
        picture.append("\n")
    for token, row in zip(tokens, weights, strict=True):
        picture.append(set_cell_size(token, label) + " ")
        for weight in row:
            picture.append(*block(weight))
        picture.append("\n")
    picture.append(" " * (label + 1) + "0 ")
    for step in range(5):
        picture.append(*block(most * step / 4))
    picture.append(f" {most:.2f}; rows attend to columns")
    return picture.append(f", the first {count} tokens\n" if hidden else "\n")


def _most(weights: list[list[float]]) -> float:
    return max((w for row in weights for w in row if math.isfinite(w)), default=0.0) or 1.0


def _viridis(share: float) -> tuple[int, ...]:
    at = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    low = min(int(at), len(_VIRIDIS) - 2)
    return tuple(round(a + (b - a) * (at - low)) for a, b in zip(_VIRIDIS[low], _VIRIDIS[low + 1], strict=True))


# ---- the page

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --page: #fff; --line: #c9d1d9; --heat: #0b62c4; --bad: #b3141d;
  --good: #116329; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --page: #0d1117; --line: #3d444d; --heat: #4c9aff; --bad: #ff7b72; --good: #56d364; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .3rem .8rem; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.good { color: var(--good); } .bad { color: var(--bad); } .wide { overflow-x: auto; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg .cell { fill: var(--heat); } svg .apart { fill: var(--bad); } svg .frame { fill: none; stroke: var(--line); }
li { overflow-wrap: anywhere; } summary { cursor: pointer; }
details { margin: .5rem 0; } footer { margin-top: 3rem; font-size: .85rem; }
"""


def _html(text: object) -> str:
    return escape(clean(text))


def to_html(whole: Document) -> str:
    """The document as one page that needs nothing else: style inline, pictures as SVG, no script."""
    text, failures = whole["text"], list(problems(whole))
    listed = "".join(f"<li><strong>{_html(each['where'])}</strong>: {_html(_sentence(each))}</li>\n" for each in failures)
    notes = "".join(f"<p>{_html(name)}: {_html(note)}.</p>\n" for name, note in _notes(whole))
    picture = _heat_svg(text["tokens"], text["weights"]) if text["weights"] else ""
    shown = f", the first {len(text['weights'])} drawn" if len(text["weights"]) < len(text["tokens"]) else ""
    by = (
        f" Drawn from {_html(text['drawn_by'])}: rows attend to columns, the stronger the colour, the more."
        if text["drawn_by"]
        else ""
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kvattn conform: {summary(whole)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>kvattn conform</h1>
<p class="{"good" if whole["ok"] else "bad"}"><strong>{summary(whole)}</strong></p>

<h2>Backends</h2>
<div class="wide">{_table(whole)}</div>
<p>{_html(EXPLAINED)}</p>
{notes}
{_cases(whole)}

<h2>Agreement</h2>
<p>{_html(_judgement(whole["pairs"]))}. Each cell: how much of what is allowed the differences of two backends use, at most.</p>
{_matrix_svg(whole, whole["pairs"])}

<h2>Attention over a text</h2>
<p>{_html(text["source"])}: {len(text["tokens"])} tokens{shown}.{by} {_html(WORDS)}</p>
{picture}
<p>{_html(_judgement(text["pairs"]))}.</p>
{f"<h2>Failures</h2>{chr(10)}<ul>{chr(10)}{listed}</ul>" if failures else ""}
</main>
<footer>Cases {_html(whole.get("suite") or "-")} of
kvattn {_html(whole["kvattn"])}, Python {_html(whole["python"])}, {_html(whole["platform"])}, {_html(whole["created"])}.
An eps unit is eps(dtype) &times; the magnitude of the result, the largest |value| for outputs; allowed are 4 + the largest
|score| of them, twice that for gradients and between two backends.</footer>
</body>
</html>
"""


def _table(whole: Document) -> str:
    titles = (
        "backend",
        "version",
        "device",
        "cases passed",
        "used, at most",
        "values (eps units)",
        "grads (eps units)",
        "time",
    )
    head = "".join(f'<th scope="col"{_aligned(i)}>{title}</th>' for i, title in enumerate(titles))
    lines = []
    for row in whole["backends"]:
        failed = row["error"] is not None
        cases = "failed" if failed else f"{row['passed']} of {row['cases']}"
        cells = [
            *(_html(row[key] or "-") for key in ("version", "device")),
            f'<span class="{"bad" if failed or row["failed"] else "good"}">{cases}</span>',
            percent(row["worst_share"]),
            *(number(row[key]) for key in ("worst_value", "worst_gradient")),
            f"{row['seconds']:.1f} s",
        ]
        data = "".join(f"<td{_aligned(i)}>{cell}</td>" for i, cell in enumerate(cells, 1))
        lines.append(f'<tr><th scope="row">{_html(row["backend"])}</th>{data}</tr>')
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>"


def _cases(whole: Document) -> str:
    """Every case of each backend with its errors, folded: the proof, to be read."""
    parts = []
    for row in whole["backends"]:
        lines: dict[tuple[str, str], list[str]] = {}
        for each in row["results"]:
            entry = f"{number(each['error'])} of {number(each['allowed'])}{'' if each['passed'] else ' ✗'}"
            entry = each["message"] if each["message"].startswith("not offered") else entry
            lines.setdefault((each["case"], each["dtype"]), []).append(f"{each['what']} {entry}")
        body = "".join(
            f"<tr><td>{_html(case)}</td><td>{_html(dtype)}</td><td>{_html('; '.join(entry))}</td></tr>\n"
            for (case, dtype), entry in lines.items()
        )
        head = "".join(f'<th scope="col">{title}</th>' for title in ("case", "dtype", "errors of what is allowed"))
        summary = f"<summary>{_html(row['backend'])}: every case, with its errors</summary>"
        table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
        parts += [f'<details>{summary}\n<div class="wide">{table}</div></details>'] if lines else []
    return "\n".join(parts)


def _aligned(column: int) -> str:
    return ' class="n"' if column > 2 else ""


def _svg(width: int, height: int, title: str, body: list[str]) -> str:
    start = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{_html(title)}">'
    return "\n".join([start, f"<title>{_html(title)}</title>", *body, "</svg>"])


def _matrix_svg(whole: Document, pairs: list[Document]) -> str:
    names, cells = _grid(whole, pairs)
    if not names:
        return ""
    left, top, wide, high = 100, 30, 96, 44
    body = []
    for i, a in enumerate(names):
        y, x = top + i * high, left + i * wide
        body.append(f'<text x="{left - 8}" y="{y + high / 2 + 5}" text-anchor="end">{_html(a[:12])}</text>')
        body.append(f'<text x="{x + wide / 2}" y="{top - 10}" text-anchor="middle">{_html(a[:12])}</text>')
        for j, b in enumerate(names):
            at = f'x="{left + j * wide}" y="{y}" width="{wide}" height="{high}"'
            if (pair := cells.get((a, b))) is not None:
                share = min(max(_share(pair), 0.0), 1.0) if pair["passed"] else 1.0
                kind, mark = ("cell", "") if pair["passed"] else ("apart", " ✗")
                body.append(f'<rect class="{kind}" fill-opacity="{0.05 + 0.45 * share:.2f}" {at}/>')
                middle = f'x="{left + j * wide + wide / 2}" y="{y + high / 2 + 5}" text-anchor="middle"'
                body.append(f"<text {middle}>{percent(_share(pair))}{mark}</text>")
            body.append(f'<rect class="frame" {at}/>')
    title = f"Agreement of each two backends, the share of what is allowed that they use: {_judgement(pairs)}"
    return _svg(left + wide * len(names) + 1, top + high * len(names) + 1, title, body)


def _heat_svg(tokens: list[str], weights: list[list[float]]) -> str:
    count, side = len(weights), 22
    names = [token if len(token) <= 14 else token[:13] + "…" for token in tokens[:count]]
    margin = 16 + 8 * max(map(len, names))
    most = _most(weights)
    body = []
    for i, name in enumerate(names):
        at = margin + i * side
        body.append(f'<text x="{margin - 6}" y="{at + 16}" text-anchor="end">{_html(name)}</text>')
        body.append(f'<text transform="translate({at + 16} {margin - 6}) rotate(-90)">{_html(name)}</text>')
        for j, weight in enumerate(weights[i]):
            share = min(max(weight / most, 0.0), 1.0) if math.isfinite(weight) else 0.0
            where = f'x="{margin + j * side}" y="{at}" width="{side}" height="{side}"'
            label = f"{_html(name)} to {_html(names[j])}: {weight:.3f}"
            body.append(f'<rect class="cell" fill-opacity="{share:.3f}" {where}><title>{label}</title></rect>')
    body.append(f'<rect class="frame" x="{margin}" y="{margin}" width="{side * count}" height="{side * count}"/>')
    title = f"Heat map of the attention weights among {count} tokens; the largest is {most:.2f}"
    return _svg(margin + side * count + 1, margin + side * count + 1, title, body)
