"""Real text as an input: words, a fixed embedding of them, and self-attention over it in every backend.

The embedding is a function of the text alone, the same numbers on every machine: token t at position p is

    x[i] = hash(t)[i] + round(8 sin(p / 10000^(i/16))) / 16        i even; cos of i - 1 for i odd (Vaswani et al. 2017, 3.5)

where hash(t) is the 16 bytes of blake2b(lower-cased t, key=SEED), the high half h of each read as (2 h - 15) / 16. All of
it lies on a grid of 1/16 and d = 16, so the scores x.x/sqrt(d) are exact in float32: what backends may differ in is the
softmax and the weighted sum.
"""

from __future__ import annotations

import codecs
import hashlib
import math
import re
import unicodedata
from itertools import combinations
from pathlib import Path
from typing import Any

SENTENCE = "When he saw his owner, the dog was happy, so he wagged his tail."
SEED = b"kvattn 0"
DIMENSIONS = 16
USED = 512  # tokens that are compared
DRAWN = 40  # tokens that are drawn
_READ = 1 << 20  # bytes: far more than 512 tokens


def read(path: str | Path) -> str:
    """The text of a UTF-8 file, its first MiB.

    Raises ValueError, saying what to do, for a file that cannot be read, is not UTF-8, or has no words.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_READ)
    except OSError as error:
        raise ValueError(f"cannot read the text file {str(path)!r}: {error.strerror or error}") from error
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=len(data) < _READ)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{str(path)!r} is not UTF-8 (byte 0x{byte:02x} at {error.start}): save it as UTF-8 text") from error
    if not tokenize(text):
        raise ValueError(f"the text file {str(path)!r} has no words in it: give it at least one")
    return text


def tokenize(text: str) -> list[str]:
    """Words (with their apostrophes) and punctuation marks; nothing that a terminal would obey.

    >>> tokenize("It's a dog, isn't it?")
    ["It's", 'a', 'dog', ',', "isn't", 'it', '?']
    """
    tokens = re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", unicodedata.normalize("NFC", text))
    return [token for token in tokens if token.isprintable()]


def embed(tokens: list[str]) -> Any:
    """The tokens as a float32 NumPy array (n, 16) on a grid of 1/16, as described above.

    >>> float(embed(["dog", "dog"])[0, 1] - embed(["dog", "dog"])[1, 1])  # one word, two positions
    0.25
    """
    import numpy as np

    return np.array([_vector(token, p) for p, token in enumerate(tokens)], np.float32).reshape(-1, DIMENSIONS)


def _vector(token: str, position: int) -> list[float]:
    digest = hashlib.blake2b(token.lower().encode(), digest_size=DIMENSIONS, key=SEED).digest()
    row = []
    for i, byte in enumerate(digest):
        wave = math.cos if i % 2 else math.sin
        row.append((2 * (byte >> 4) - 15 + round(8 * wave(position / 10000 ** ((i - i % 2) / DIMENSIONS)))) / 16)
    return row


def attend(text: str, backend: str, device: str | None = None) -> Any:
    """Self-attention over the text in a backend: (output, weights) as float64 NumPy arrays, or why not, in words.

    Given a ``device``, the text lies there; else it is a NumPy array.
    """
    import numpy as np

    import kvattn
    from kvattn import dispatch, registry
    from kvattn.conformance.check import as_promised

    x: Any = embed(tokenize(text)[:USED])
    try:
        tab = registry.load(backend)
        with dispatch.on(tab, None if device is None else dispatch.device(tab, device)) as like:
            x = x if device is None else tab.asarray(x, like=like)
            pair = as_promised(kvattn.attention(x, x, x, return_weights=True, backend=backend), ("output", "weights"))
        found = tuple(np.asarray(tab.to_numpy(each), np.float64) for each in pair)
        for name, each, last in zip(("output", "weights"), found, x.shape[::-1], strict=True):
            if each.shape != (len(x), last):
                raise ValueError(f"{name} has shape {each.shape}; promised {(len(x), last)}")
        return found
    except Exception as error:  # one backend's failure is a line of the report
        return f"{type(error).__name__}: {error}"


def compare(source: str, text: str, found: dict[str, Any]) -> dict[str, Any]:
    """What `attend` made of the text in each backend, by name, compared pairwise; plain data for kvattn.report.

    The errors, of outputs and weights, have the units and the allowance of the suite's cases (conformance/tolerance.py).
    """
    import numpy as np

    from kvattn.conformance import tolerance

    tokens = tokenize(text)[:USED]
    x = embed(tokens)
    sizes = np.abs(x)
    score = float((sizes @ sizes.T).max()) / math.sqrt(DIMENSIONS)
    allowed = 2 * tolerance.allowed("output", "float32", score)  # two backends may each be off by it
    units = [tolerance.unit("float32", magnitude) for magnitude in (float(sizes.max()), 1.0)]  # of the output, the weights

    errors = {name: made for name, made in found.items() if isinstance(made, str)}
    results = {name: [np.asarray(x) for x in made] for name, made in found.items() if name not in errors}
    pairs = []
    for a, b in combinations(results, 2):
        apart = [float(np.abs(p - q).max()) / u for p, q, u in zip(results[a], results[b], units, strict=True)]
        worst = max(apart, key=lambda e: math.inf if math.isnan(e) else e)
        pairs.append({"a": a, "b": b, "error": worst, "allowed": allowed, "passed": worst <= allowed, "message": ""})
    drawn = next(iter(results), None)
    return {
        "source": source,
        "tokens": tokens,
        "drawn_by": drawn,
        "weights": results[drawn][1][:DRAWN, :DRAWN].tolist() if drawn else [],
        "pairs": pairs,
        "errors": errors,
    }
