"""The prose of a lesson: from the notation of d2l to MyST for a site, and to plain Markdown for a notebook."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from kvattn import registry, tab
from kvattn.lesson.reader import fences

References = Any  # kvattn.lesson.references.References, which finds labels by what stands here

TITLES = {"numpy": "NumPy", "torch": "PyTorch", "tensorflow": "TensorFlow", "jax": "JAX", "mxnet": "MXNet"}

_BEGIN, _END = re.compile(r"^:begin_tab:`([^`]*)`\s*$"), re.compile(r"^:end_tab:\s*$")
_SLIDE = re.compile(r"([\[(])(\*\*|~~)((?:(?!\n\n).){1,2000}?)\2[\])](?!\()", re.DOTALL)  # not **[a link](target)**
HEADING = re.compile(r"^(#{1,6} [^\n]*)\n\s*?\n?:label:`([^`]*)`[ \t]*$", re.MULTILINE)
BEFORE = re.compile(r"^:label:`([^`]*)`[ \t]*\n\s*(#{1,6} [^\n]*)$", re.MULTILINE)
FIGURE = re.compile(
    r"^!\[((?:(?!\n\n).){,2000}?)\]\(([^()\s]+)\)[ \t]*((?:\n:(?:width|height|label):`[^`\n]*`[ \t]*)+)$",
    re.MULTILINE | re.DOTALL,
)
TABLE = re.compile(
    r"^:[ \t]*(?!\w+:`)(\S[^\n]*)\n(?::label:`([^`]*)`[ \t]*\n)?\s*((?:\|[^\n]*(?:\n|\Z))+)(?::label:`([^`]*)`[ \t]*$)?",
    re.MULTILINE,
)
EQUATION = re.compile(r"\$\$((?:(?!\$\$).)+)\$\$[ \t]*\n?\s*?\n?:eqlabel:`([^`]*)`[ \t]*$", re.MULTILINE | re.DOTALL)
ATTRIBUTE = re.compile(r":(width|height|label):`([^`\n]*)`")
DIRECTIVE = re.compile(r"^:(label|bibliography|width|height):`([^`]*)`[ \t]*$", re.MULTILINE)
ROLE = re.compile(r"(?<![\w`:]):(numref|ref|eqref|citet|cite):`([^`]+)`")

_ROLES = {"ref": "ref", "eqref": "eq", "cite": "cite:p", "citet": "cite:t"}
_FLOATS = ("fig", "tab", "table", "img")  # d2l's labels of what has a number: fig_..., tab_...


def to_myst(text: str, tabs: Sequence[str] | None = None, numbered: bool = False) -> str:
    """Prose in the notation of d2l as MyST, with the extensions dollarmath, amsmath and sphinx-design's tab-set.

    Labels of headings become targets, those of figures and tables names, of equations ``$$ (label)``; ``:numref:``,
    ``:ref:``, ``:eqref:`` and ``:cite:`` roles, ``:begin_tab:`` blocks a tab-set, or notes where not every tab has one.
    Fenced blocks stay as they are, but for ``toc`` and ``eval_rst``. ``tabs`` are those that the site shows; None: all.
    ``numbered``: the site numbers its sections, and ``:numref:`` of one is its number; else it is the title. Raises
    ValueError for an unknown tab.

    >>> print(to_myst("# Attention\\n:label:`sec_attention`\\n\\nSee :eqref:`eq_a`.\\n"))
    (sec_attention)=
    # Attention
    <BLANKLINE>
    See {eq}`eq_a`.
    <BLANKLINE>
    """
    out, blocks = [], list(_blocks(text))
    while blocks:
        names, body = blocks.pop(0)
        if names is None:
            out.append(_outside_fences(body, lambda words: _myst(words, numbered), _fence))
            continue
        group = [(names, body)]
        while len(blocks) > 1 and blocks[0][0] is None and not blocks[0][1].strip() and blocks[1][0] is not None:
            group.append((blocks[1][0], blocks[1][1]))
            del blocks[:2]
        bodies = {name: to_myst(part, numbered=numbered) for given, part in group for name in given or ()}
        shown = {name: bodies[name] for name in tabs or registry.known_backends() if name in bodies}
        if tabs is not None and len(tabs) == 1:
            out.append("".join(shown.values()))
        elif tabs is None or len(shown) == len(tabs):
            out.append(tab_set(shown))
        else:  # a reader who chose a framework of which this says nothing would be shown another's tab
            out += [_note([name for name in shown if shown[name] == body], body) for body in dict.fromkeys(shown.values())]
    return "\n".join(out)


def for_tab(text: str, name: str, references: References = None) -> str:
    """Prose for the notebook of one tab: its ``:begin_tab:`` blocks only, labels as anchors, references as links.

    Given the lesson's ``references``, links bear titles and numbers, and citations the names of authors.

    >>> for_tab(":begin_tab:`jax`\\nUse jax.vmap.\\n:end_tab:\\nSee :numref:`sec_a`.", "jax")
    'Use jax.vmap.\\nSee [sec_a](#sec_a).'
    """
    mine = [body for names, body in _blocks(text) if names is None or name in names]
    return _outside_fences("\n".join(mine), lambda words: _plain(words, references), lambda info, block: block)


def cited(text: str, references: References) -> str:
    """Prose whose citations are words: [Bahdanau et al., 2014]."""

    def words(part: str) -> str:
        part = DIRECTIVE.sub(lambda found: "" if found[1] == "bibliography" else found[0], part)
        return ROLE.sub(lambda found: references.cited(found[1], found[2]) if found[1].startswith("cite") else found[0], part)

    return _outside_fences(text, words, lambda info, block: block)


def without_fences(text: str) -> str:
    """The text with the lines of fenced blocks left empty, so that lines and places stay."""
    lines = text.split("\n")
    for start, stop, *_ in fences(text):
        lines[start:stop] = [" " * len(line) for line in lines[start:stop]]
    return "\n".join(lines)


def directive(name: str, argument: str, options: dict[str, str], body: str) -> str:
    """A MyST directive, fenced with more backticks than anything in its body."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`{3,}", body)), default=0))
    lines = [f"{fence}{{{name}}} {argument}".rstrip(), *(f":{key}: {value}" for key, value in options.items()), ""]
    return "\n".join([*lines, body.strip("\n"), fence, ""])


def quoted(text: str) -> str:
    """Words as the value of a directive's option, which is YAML, in one line."""
    return "'" + " ".join(text.split()).replace("'", "''") + "'"


def tab_set(bodies: dict[str, str]) -> str:
    """A tab for each framework; choosing one chooses it in all tab-sets of the page."""
    items = [directive("tab-item", TITLES.get(name, name), {"sync": name}, body) for name, body in bodies.items() if body]
    return directive("tab-set", "", {"sync-group": "framework"}, "\n".join(items)) if items else ""


def _note(names: list[str], body: str) -> str:
    return directive("admonition", ", ".join(TITLES.get(name, name) for name in names), {}, body)


def _blocks(text: str) -> list[tuple[list[str] | None, str]]:
    """The text in pieces: (the tabs of a ``:begin_tab:`` block, its text), None for what is for every tab."""
    inside = {i for start, stop, *_ in fences(text) for i in range(start, stop)}
    blocks: list[tuple[list[str] | None, list[str]]] = [(None, [])]
    for i, line in enumerate(text.split("\n")):
        if i not in inside and (begins := _BEGIN.match(line)):
            blocks.append((tab.named(begins[1]), []))
        elif i not in inside and _END.match(line):
            blocks.append((None, []))
        else:
            blocks[-1][1].append(line)
    return [(names, "\n".join(lines)) for names, lines in blocks if names is not None or lines]


def _outside_fences(text: str, change: Callable[[str], str], fence: Callable[[str, str], str]) -> str:
    """``change`` for the text between fenced blocks, ``fence`` for these."""
    lines = text.split("\n")
    out, end = [], 0
    for start, stop, info, _, nested in fences(text):
        if not nested:
            out += [change("\n".join(lines[end:start]))] if end < start else []
            out.append(fence(info, "\n".join(lines[start:stop])))
            end = stop
    out += [change("\n".join(lines[end:]))] if end < len(lines) else []
    return "\n".join(out)


def _fence(info: str, block: str) -> str:
    """Sphinx's own directives for the fences that d2l's build had."""
    known = {"toc": "{toctree}", "eval_rst": "{eval-rst}"}
    return block.replace(info, known[info], 1) if info in known else block


def _unslide(text: str) -> str:
    """Without the marks of d2l's slides: [**shown there too**], (~~shown there only~~)."""
    return _SLIDE.sub(lambda mark: "" if mark[2] == "~~" else mark[3], text)


def _myst(text: str, numbered: bool) -> str:
    def role(found: re.Match[str]) -> str:
        return _role(found, numbered)

    text = HEADING.sub(r"(\2)=\n\1", _unslide(text))
    text = FIGURE.sub(lambda found: _figure(found, role), text)
    text = TABLE.sub(_table, text)
    text = EQUATION.sub(lambda found: f"$$\n{found[1].strip()}\n$$ ({found[2]})", text)
    text = DIRECTIVE.sub(_directive, text)
    return ROLE.sub(role, text)


def _figure(found: re.Match[str], role: Callable[[re.Match[str]], str]) -> str:
    options = dict(ATTRIBUTE.findall(found[3]))
    if "label" in options:
        options["name"] = options.pop("label")
    caption = " ".join(found[1].split())
    options["alt"] = quoted(ROLE.sub(r"\2", caption))
    return directive("figure", found[2], options, ROLE.sub(role, caption)).rstrip()


def _table(found: re.Match[str]) -> str:
    caption, before, rows, after = found.groups()
    label = before or after
    return directive("table", caption.strip(), {"name": label} if label else {}, rows) + "\n"


def _directive(found: re.Match[str]) -> str:
    kind, value = found.groups()
    return {"label": f"({value})=", "bibliography": directive("bibliography", value, {}, "")}.get(kind, "")


def _role(found: re.Match[str], numbered: bool) -> str:
    kind, value = found[1], " ".join(found[2].split())
    if kind == "numref":
        return f"{{numref}}`{value}`" if numbered or value.split("_")[0] in _FLOATS else f"{{ref}}`{value}`"
    return f"{{{_ROLES[kind]}}}`{value}`"


def _plain(text: str, references: References) -> str:
    text = _unslide(text)
    if references is not None:
        text = FIGURE.sub(lambda found: _captioned(found, references), text)
        text = TABLE.sub(lambda found: _headed(found, references), text)
        text = EQUATION.sub(lambda found: _tagged(found, references), text)
    text = DIRECTIVE.sub(lambda found: _anchor(found[2]) if found[1] == "label" else "", text)
    text = re.sub(r"^:eqlabel:`([^`]*)`[ \t]*$", lambda found: _anchor(found[1]), text, flags=re.MULTILINE)
    return ROLE.sub(lambda found: _link(found, references), text)


def _anchor(label: str) -> str:
    return f'<a id="{label}"></a>'


def _link(found: re.Match[str], references: References) -> str:
    """A reference as a link with its title or number; to another lesson, whose file's name is not known, as words."""
    kind, label = found[1], " ".join(found[2].split())
    if kind.startswith("cite"):
        return f"[{found[2]}]" if references is None else references.cited(kind, label)
    target = references.target(label) if references is not None else None
    if target is None:
        return f"[{label}](#{label})"
    return f"*{target.text}* ({target.elsewhere})" if target.elsewhere else f"[{target.text}](#{label})"


def _captioned(found: re.Match[str], references: References) -> str:
    label = dict(ATTRIBUTE.findall(found[3])).get("label", "")
    picture = f"![{found[1]}]({found[2]})"
    return f"{picture}\n\n{_anchor(label)}*{references.own[label].text}: {found[1]}*" if label in references.own else picture


def _headed(found: re.Match[str], references: References) -> str:
    caption, before, rows, after = found.groups()
    label = before or after or ""
    if label not in references.own:
        return found[0]
    return f"{_anchor(label)}*{references.own[label].text}: {caption.strip()}*\n\n{rows}"


def _tagged(found: re.Match[str], references: References) -> str:
    number = references.own[found[2]].text.strip("()") if found[2] in references.own else found[2]
    return f"$$\n{found[1].strip()} \\tag{{{number}}}\n$$\n\n{_anchor(found[2])}"
